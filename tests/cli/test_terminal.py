"""Progress, sizes in words, tables and JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from kit.command_line import start
from kvfold.cli import terminal
from kvfold.cli.terminal import ByteProgress, TokenProgress, human_bytes, plain, print_table, report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1 << 20, "1 MiB"),
        (972 << 20, "972 MiB"),
        (10_505_142_272, "9.78 GiB"),
        (404 << 30, "404 GiB"),
    ],
)
def test_sizes_in_three_digits(nbytes: int, words: str) -> None:
    assert human_bytes(nbytes) == words


def test_a_bar_on_a_terminal_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "BAR_AFTER_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    with ByteProgress("reading") as progress:
        for done in range(0, 101, 10):
            progress(done << 20, 100 << 20)
            if done == 100:
                assert progress._bar is None, "what is printed next has the line to itself"
            else:
                assert progress._bar is not None
                progress._bar.refresh()
    text = screen.getvalue()
    assert "reading" in text and "MiB" in text and "/s" in text and "0:00:" in text


def test_a_prompt_is_counted_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "BAR_AFTER_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    with TokenProgress("prompt") as progress:
        progress(5000, 32000)
        assert progress._bar is not None
        progress._bar.refresh()
    text = screen.getvalue()
    assert "prompt" in text and "5000/32000" in text and "tokens" in text and "B/s" not in text


def test_a_quick_read_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with ByteProgress("reading") as progress:
        progress(0, 100)
        progress(100, 100)
    assert screen.getvalue() == ""


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("kvfold.cli.terminal.time.monotonic", lambda: clock[0])
    with ByteProgress("reading") as progress:
        for second in range(31):
            clock[0] = float(second)
            progress(second << 30, 30 << 30)
    assert capsys.readouterr().err.splitlines() == [
        "reading 10 GiB of 30 GiB, 1 GiB/s, 20 s left",
        "reading 20 GiB of 30 GiB, 1 GiB/s, 10 s left",
    ]


def test_tables_align_and_never_fold(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    print_table(report(), "Title", ("name", ">bytes", ""), [("a", "1,000", "[b]"), ("bcd", "7", long)])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name   bytes",
        "a      1,000   [b]",
        f"bcd        7   {long}",
        "",
    ]


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class Point:
    x: int
    colour: Colour

    @property
    def double(self) -> int:
        return 2 * self.x


def test_json_has_fields_properties_and_lower_case_names() -> None:
    value = {"p": (Point(2, Colour.RED),), "path": Path("a/b"), "none": None}
    assert plain(value) == {"p": [{"x": 2, "colour": "red", "double": 4}], "path": "a/b", "none": None}


RUN = ("run", "-n", "3", "--temp", "0")
BENCH = ("bench", "--shape", "tiny", "-p", "8", "-n", "0", "-r", "1", "-t", "1", "--workspace", "64M")


def redirected(redirection: str, *arguments: str, **added: str) -> subprocess.CompletedProcess[str]:
    """The command line with its streams as a shell redirects them; those that it does not are read here."""
    command = ("sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "kvfold", *arguments)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | added
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, **pipes, env=environment, text=True, check=False, timeout=60)


@pytest.mark.parametrize("arguments", [(*RUN, "Once"), ("plan",), (*BENCH, "-o", "json")])
def test_a_closed_stdout_is_written_nowhere(arguments: tuple[str, ...]) -> None:
    done = redirected(">&-", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_stderr_takes_nothing_from_stdout() -> None:
    done = redirected("2>&-", *RUN, "--json", "Once")
    assert done.returncode == 0
    assert json.loads(done.stdout)["token_ids"]


def test_a_closed_stdin_is_an_empty_one() -> None:
    done = redirected("<&-", *RUN)
    assert (done.returncode, done.stderr) == (1, "kvfold: stdin: the prompt is empty.\n")


@pytest.mark.parametrize(
    "arguments", [(*RUN, "Once"), ("plan",), ("plan", "--json"), (*BENCH, "-o", "json"), BENCH, ("--version",)]
)
def test_a_full_disk_is_one_sentence(arguments: tuple[str, ...]) -> None:
    done = redirected("> /dev/full", *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "kvfold: stdout: No space left on device."
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_full_disk_is_one_sentence_where_nothing_is_buffered() -> None:
    done = redirected("> /dev/full", "plan", PYTHONUNBUFFERED="1")
    assert (done.returncode, done.stderr) == (1, "kvfold: No space left on device.\n")


def test_a_full_disk_under_both_streams_ends_with_1() -> None:
    assert redirected("> /dev/full 2>&1", *RUN, "Once").returncode == 1


def test_ctrl_c_while_the_verbs_are_imported_is_quiet() -> None:
    """Pressed as typer is looked for, of which all of them are made."""
    script = """
import sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Press())
from kvfold.__main__ import main
main()
"""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["kvfold"] == "kvfold.__main__:main"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_went_away_is_quiet() -> None:
    """Output shorter than a buffer, so nothing is written before the end."""
    process = start("plan", "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 1)


def test_an_error_is_one_line_whatever_it_contains(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.error("[bold]" + "long " * 60)
    assert capsys.readouterr().err == "kvfold: [bold]" + "long " * 60 + "\n"
