"""Another program under the same cases: its command, stopped at every row of llama-bench's JSON that it prints.

The contract is llama-bench's `-o json`: objects with n_prompt, n_gen, n_depth and samples_ts (tokens a second of each
repetition, load excluded). Lines between them are passed over: ik_llama.cpp reports repacking on stdout.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from kvfold.bench.measure import Case
from kvfold.errors import SettingError

# ik_llama.cpp has no n_depth: `-gp 4096,128` generates 128 tokens behind 4096 that do not count.
_AFTER_PROMPT = re.compile(r"tg\d+\s*@\s*pp\d+")
_SHOWN_CHARACTERS = 400  # of what a command that failed printed last
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Opponent:
    """argv: the command in words; no shell sees it, so variables are set by `env NAME=VALUE ...` in front."""

    argv: tuple[str, ...]

    @classmethod
    def parse_all(cls, commands: str) -> tuple[Opponent, ...]:
        """Commands parted by semicolons. Raises SettingError for quotes that do not close and for nothing at all."""
        words = shlex.shlex(commands, posix=True, punctuation_chars=";")
        words.whitespace_split = True
        words.commenters = ""
        found: list[list[str]] = [[]]
        try:
            for word in words:
                if set(word) == {";"}:
                    found += [[] for _ in word]
                else:
                    found[-1].append(word)
        except ValueError as error:
            raise SettingError(f"opponent={commands}: {error}.") from error
        if not all(found):
            raise SettingError(
                "opponent: expected a command such as 'llama-bench -m FILE -p 512 -n 0 -r 1 -o json', or several "
                "parted by ';'."
            )
        return tuple(cls(tuple(argv)) for argv in found)

    @property
    def command(self) -> str:
        return shlex.join(self.argv)

    def rows(self) -> Generator[tuple[Case, float]]:
        """One run of the command: each case as its row is printed, and the median of its tokens a second.

        Until the next row is asked for, the command and all it started are stopped (SIGSTOP), so whoever has a row
        measures alone; closing the iterator ends them. Raises SettingError where it fails or prints no rows.
        """
        with tempfile.TemporaryFile() as said, self._start(said) as process:
            try:
                yield from self._rows_of(process, said)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _start(self, said: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                bufsize=0,
                process_group=0,  # signals reach all it starts; stopped and without us, the system hangs it up
            )
        except OSError as error:
            raise SettingError(f"opponent {self.argv[0]}: cannot be started: {error.strerror}.") from error

    def _rows_of(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> Iterator[tuple[Case, float]]:
        assert process.stdout is not None
        out, seen = b"", 0
        while chunk := process.stdout.read(_CHUNK_BYTES):
            out += chunk
            for row in islice(rows_in(out.decode(errors="replace")), seen, None):
                seen += 1
                os.killpg(process.pid, signal.SIGSTOP)
                # Until it has stopped: before, it would disturb who measures, and nothing would hang it up.
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                yield case_of(row), rate_of(row)
                os.killpg(process.pid, signal.SIGCONT)
        if code := process.wait():
            said.seek(0)
            words = (said.read().strip() or out.strip()).decode(errors="replace")[-_SHOWN_CHARACTERS:]
            raise SettingError(f"opponent {self.command}: exit code {code}: {words or 'it said nothing.'}")
        if not seen:
            raise SettingError(
                f"opponent {self.command}: printed no rows of llama-bench's JSON. Add `-o json` to the command."
            )


def rows_in(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text that are rows of llama-bench."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            if {"n_prompt", "n_gen", "samples_ts"} <= value.keys():
                yield value
        at = text.find("{", end)


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row measured."""
    prompt, generated = int(row["n_prompt"]), int(row["n_gen"])
    if _AFTER_PROMPT.fullmatch(str(row.get("test", ""))):
        return Case(0, generated, prompt)
    return Case(prompt, generated, int(row.get("n_depth", 0)))


def rate_of(row: Mapping[str, Any]) -> float:
    """Median tokens a second. Raises SettingError for a row without samples."""
    samples = row["samples_ts"]
    is_list = isinstance(samples, list) and len(samples) > 0
    if not is_list or not all(isinstance(sample, int | float) and sample > 0 for sample in samples):
        raise SettingError(f"opponent: samples_ts is {samples!r:.60}, expected a list of numbers above 0.")
    return float(statistics.median(samples))
