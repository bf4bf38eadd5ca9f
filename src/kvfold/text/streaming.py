"""Text from tokens as they arrive: never half a character, never a stop string or the beginning of one.

Owns the bytes and characters held back between two tokens. Knows no vocabulary: it is handed a function from id
to bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class StopStrings:
    """Cuts a text that arrives in pieces before the first stop string.

    First is the one that is complete first; of two complete at the same character, the longer. So the result does
    not depend on where the pieces end. `matched` is that stop string, None until it was seen.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string stops before any text; SamplingParams refuses it"
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now: all of it but the longest suffix that a stop string could begin with."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, minus_length, self.matched = min(found)
            self._held = ""
            return text[: end + minus_length]
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """No more text: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, suffix: str) -> bool:
        return any(stop.startswith(suffix) for stop in self._stop)


class DetokenizeStream:
    """One answer's text, token by token. `stopped_by` is the stop string that ended it, or None.

    The pieces of all `push` calls and `finish` together are the whole decode, cut before the stop string. Bytes that
    can begin a character wait for the rest of it; bytes that cannot become U+FFFD at once, as in the whole decode.
    """

    def __init__(
        self, token_bytes: Callable[[int, bool], bytes], *, skip_special: bool = True, stop: Sequence[str] = ()
    ) -> None:
        """token_bytes: (id, skip_special) -> the bytes the token stands for."""
        self._token_bytes = token_bytes
        self._skip_special = skip_special
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = StopStrings(stop)

    @property
    def stopped_by(self) -> str | None:
        return self._stop.matched

    def push(self, id: int) -> str:
        """The text that `id` completes; may be empty. After a stop string always empty."""
        return self._stop.push(self._characters.decode(self._token_bytes(id, self._skip_special)))

    def finish(self) -> str:
        """The rest: a character cut short becomes U+FFFD, a stop string begun and not ended is text."""
        return self._stop.push(self._characters.decode(b"", final=True)) + self._stop.finish()
