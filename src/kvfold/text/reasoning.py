"""The thought and the answer of a reasoning model, kept apart as they stream.

DeepSeek-R1 and its successors put `<think>` ... `</think>` before the answer; where the prompt opens the thought
already, only the end is in the text. Works on decoded text in pieces of any size; knows no tokens.
"""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Split(NamedTuple):
    """What one piece of text adds; either may be empty."""

    thought: str
    answer: str


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, as DeepSeek-R1's and V3.1's thinking prompts do."""
    return prompt.rstrip().endswith(OPEN)


class ThoughtSplitter:
    """Splits one answer. The tags belong to neither part; line breaks beside them are dropped.

    A thought is one at the very beginning (blank space aside): `<think>` later in an answer is text, and so is
    `</think>` where no thought is open.
    """

    def __init__(self, *, inside: bool = False) -> None:
        """inside: the prompt has opened the thought (`opens_thought`)."""
        self._state = "thought" if inside else "before"
        self._begun = False  # the current part has text
        self._held = ""

    def push(self, text: str) -> Split:
        """The next piece of text. What may be part of a tag, or a line break beside one, waits."""
        self._held += text
        thought = answer = ""
        if self._state == "before":
            self._find_beginning()
        if self._state == "thought":
            thought = self._take_thought()
        if self._state == "answer":
            answer = self._begin(self._held)
            self._held = ""
        return Split(thought, answer)

    def finish(self) -> Split:
        """No more text: what was held back belongs to the part it was held in."""
        held, self._held = self._held, ""
        if self._state == "thought":
            return Split(self._begin(held).rstrip("\n"), "")
        return Split("", held)

    # ---- inside

    def _find_beginning(self) -> None:
        """Decides whether a thought comes first, once the text can tell."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._state, self._held = "thought", start.removeprefix(OPEN)
        elif not OPEN.startswith(start):
            self._state, self._begun = "answer", True  # no thought, so nothing to trim

    def _take_thought(self) -> str:
        thought, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held = rest
            shown = self._begin(thought).rstrip("\n")
            self._state, self._begun = "answer", False
            return shown
        kept = next((n for n in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:n])), 0)
        body = thought[: len(thought) - kept].rstrip("\n")
        self._held = thought[len(body) :]
        return self._begin(body)

    def _begin(self, text: str) -> str:
        """`text` without the line breaks that lead a part."""
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return text
