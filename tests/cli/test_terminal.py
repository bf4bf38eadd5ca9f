"""Progress, sizes in words, tables and JSON."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

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


def test_an_error_is_one_line_whatever_it_contains(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.error("[bold]" + "long " * 60)
    assert capsys.readouterr().err == "kvfold: [bold]" + "long " * 60 + "\n"
