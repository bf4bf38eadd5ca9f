"""What reaches the terminal: stdout carries the answer, stderr everything else. Rich is imported on first use."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

# A bar that lives shorter than this only flickers.
BAR_AFTER_SECONDS = 0.3
# Without a terminal (a log file) a line this often.
LINE_EVERY_SECONDS = 10.0


def error(sentence: object) -> None:
    """`kvfold: ...` on stderr, red on a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(f"kvfold: {sentence}", style="red"))


def note(line: str) -> None:
    """One line on stderr, dim on a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(line, style="dim"))


def show_prompt(prompt: str) -> None:
    """The prompt before its answer, where a person sees both: dim, on stderr, so that stdout is the answer alone."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text(prompt, style="dim"), end="")


def report() -> Console:
    """A console on stdout that never folds a line: a report keeps its columns in a pipe and in a narrow window."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, markup=False)


def print_table(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A bold title, the rows under their headings, a blank line. A heading that starts with ">" aligns its column to
    the right; no headings, no line of them."""
    right = [heading.startswith(">") for heading in headings]
    lines = [[heading.removeprefix(">") for heading in headings], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    console.print(title, style="bold")
    for number, line in enumerate(lines):
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        if any(line):
            console.print("   ".join(cells).rstrip(), style="dim" if number == 0 else None)
    console.print()


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")


def plain(value: object) -> Any:
    """A report as JSON has it: dataclasses become objects of their fields and properties, enum members their
    lower-case names."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        names += [name for name, item in vars(type(value)).items() if isinstance(item, property)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, Path):
        return str(value)
    return value


def human_bytes(nbytes: float) -> str:
    """Three digits and a binary unit: "972 MiB"."""
    size, unit = float(nbytes), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    while abs(size) >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {units[unit]}" if unit == 0 else f"{size:.3g} {units[unit]}"


class ByteProgress(AbstractContextManager["ByteProgress"]):
    """Progress of a long read or write on stderr: a bar with rate and time left on a terminal, else a line now and
    then. Called with (bytes done, bytes in all)."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar: Bar | None = None

    def __call__(self, done: int, total: int) -> None:
        seconds = self.seconds
        if sys.stderr.isatty():
            if self._bar is None and seconds >= BAR_AFTER_SECONDS and done < total:
                self._bar = self._start_bar(total)
            if self._bar is not None and done < total:
                self._bar.update(self._bar.task_ids[0], completed=done)
            elif self._bar is not None:
                self._stop()  # what is printed next has the line to itself
        elif seconds - self._last_line >= LINE_EVERY_SECONDS and done < total:
            self._last_line = seconds
            rate = done / seconds
            left = f", {(total - done) / rate:.0f} s left" if rate else ""
            note(f"{self._verb} {self._amount(done)} of {self._amount(total)}, {self._amount(rate)}/s{left}")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def _start_bar(self, total: int) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeRemainingColumn

        bar = Progress(
            "[progress.description]{task.description}",
            BarColumn(),
            *self._columns(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.add_task(self._verb, total=total)
        bar.start()
        return bar

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _amount(self, count: float) -> str:
        return human_bytes(count)

    def _columns(self) -> tuple[ProgressColumn, ...]:
        from rich.progress import DownloadColumn, TransferSpeedColumn

        return DownloadColumn(binary_units=True), TransferSpeedColumn()


class TokenProgress(ByteProgress):
    """As ByteProgress, of prompt tokens: called with (tokens done, tokens in all)."""

    def _amount(self, count: float) -> str:
        return f"{count:,.0f} tokens"

    def _columns(self) -> tuple[ProgressColumn, ...]:
        from rich.progress import MofNCompleteColumn, TextColumn

        return MofNCompleteColumn(), TextColumn("tokens")
