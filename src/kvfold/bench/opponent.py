"""Another program under the same cases: its command, run to its end, and the rows of llama-bench's JSON it prints.

The contract is llama-bench's `-o json`: objects with n_prompt, n_gen, n_depth and samples_ts (tokens a second of each
repetition, load excluded). Lines between them are passed over: ik_llama.cpp reports repacking on stdout.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvfold.bench.measure import Case
from kvfold.errors import SettingError

# ik_llama.cpp has no n_depth: `-gp 4096,128` generates 128 tokens behind 4096 that do not count.
_AFTER_PROMPT = re.compile(r"tg\d+\s*@\s*pp\d+")
_SHOWN_CHARACTERS = 400  # of what a command that failed printed last


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

    def run(self) -> Mapping[Case, float]:
        """Tokens a second of every case it ran: the median of its repetitions. Raises SettingError where it fails or
        prints no rows."""
        try:
            done = subprocess.run(
                self.argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise SettingError(f"opponent {self.argv[0]}: cannot be started: {error.strerror}.") from error
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-_SHOWN_CHARACTERS:]
            raise SettingError(f"opponent {self.command}: exit code {done.returncode}: {said}")
        rates = {case_of(row): rate_of(row) for row in rows_in(done.stdout)}
        if not rates:
            raise SettingError(
                f"opponent {self.command}: printed no rows of llama-bench's JSON. Add `-o json` to the command."
            )
        return rates


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
