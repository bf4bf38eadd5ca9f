"""A chat's answer as it arrives: Markdown where a person sees it, its very characters in a pipe; thoughts dim, on
stderr. Decides nothing about the conversation."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

REDRAW_SECONDS = 0.1
FENCES = ("```", "~~~")


class AnswerView(AbstractContextManager["AnswerView"]):
    def __init__(self) -> None:
        from rich.console import Console

        self._stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._markdown = MarkdownBlocks(Console()) if sys.stdout.isatty() else None
        self._last = ""  # what ends the line that is being written: "thought", "answer", or nothing was written

    def write(self, thought: str, answer: str) -> None:
        if thought:
            self._stderr.print(thought, style="dim", end="")
            self._last = "thought"
        if answer:
            if self._last == "thought":
                self._stderr.print("\n")
            self._last = "answer"
            if self._markdown is not None:
                self._markdown.write(answer)
            else:
                sys.stdout.write(answer)
                sys.stdout.flush()

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last == "thought":
            self._stderr.print()
        if self._markdown is not None:
            self._markdown.finish()
        elif self._last == "answer":
            sys.stdout.write("\n")
            sys.stdout.flush()


class MarkdownBlocks:
    """Renders Markdown that is still being written: finished blocks are printed for good, only the last one is drawn
    again, at most every REDRAW_SECONDS."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._block = ""
        self._drawn_at = 0.0

    def write(self, text: str) -> None:
        self._block += text
        while (end := block_end(self._block)) is not None:
            block, self._block = self._block[:end], self._block[end:]
            self._print(block)
            self._console.print()
        if time.monotonic() - self._drawn_at >= REDRAW_SECONDS and self._block.strip():
            self._draw()

    def finish(self) -> None:
        """No more text."""
        block, self._block = self._block, ""
        self._print(block)

    def _draw(self) -> None:
        from rich.live import Live
        from rich.markdown import Markdown

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="ellipsis")
            self._live.start()
        self._live.update(Markdown(keep_line_breaks(self._block)), refresh=True)
        self._drawn_at = time.monotonic()

    def _print(self, block: str) -> None:
        """The block as it will stay."""
        from rich.markdown import Markdown

        shown = Markdown(keep_line_breaks(block))
        if self._live is not None:
            self._live.update(shown)
            self._live.stop()
            self._live = None
        elif block.strip():
            self._console.print(shown)


def block_end(text: str) -> int | None:
    """Where the first Markdown block of `text` ends for certain: at an empty line outside a code fence, before a line
    that begins at the margin (an indented one goes on with a list). None while more text may change it."""
    start, fence, has_text, is_empty_before = 0, "", False, False
    for line in text.splitlines(keepends=True):
        if has_text and is_empty_before and line.strip() and not line[0].isspace():
            return start
        fence = _fence_after(line, fence)
        has_text = has_text or bool(line.strip())
        is_empty_before = not line.strip() and not fence
        start += len(line)
    return None


def keep_line_breaks(text: str) -> str:
    """Markdown joins the lines of a paragraph; an answer's line breaks are meant (verses, addresses), so each becomes
    a hard one, but in code."""
    lines, fence = [], ""
    for line in text.split("\n"):
        fence = _fence_after(line, fence)
        is_text = line.strip() and not fence and not line.lstrip().startswith(FENCES)
        lines.append(line + "  " if is_text else line)
    return "\n".join(lines)


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after this line; "" for none."""
    mark = line.lstrip()[:3]
    if fence:
        return "" if mark == fence and not line.strip().strip(fence[0]) else fence
    return mark if mark in FENCES else ""
