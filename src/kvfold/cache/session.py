"""A sequence that outlives its requests, so that a prompt which begins like the last one reuses its cached rows.

A chat is the common case: the second turn's prompt is the first turn's prompt and answer, and more.
"""

from __future__ import annotations

from kvfold.cache.pages import PagePool, Sequence
from kvfold.errors import SettingError


class Session:
    """Cached rows and the token ids they belong to. One request at a time."""

    def __init__(self, pool: PagePool) -> None:
        self.sequence = Sequence(pool)
        self.token_ids: list[int] = []
        self._is_busy = False

    def check_free(self) -> None:
        """SettingError while a request works in this session."""
        if self._is_busy:
            raise SettingError(
                "This session has a request under way: read its stream to the end or close it first."
            )

    def begin(self, prompt_ids: list[int]) -> int:
        """Takes the session for a request, keeps the cached rows its prompt begins with and returns their number.

        At least one prompt token is left to compute: its logits are where generation starts.
        """
        self.check_free()
        self._is_busy = True
        most = min(len(prompt_ids) - 1, self.sequence.length)
        reused = next((i for i in range(most) if self.token_ids[i] != prompt_ids[i]), most)
        self.sequence.truncate(reused)
        self.token_ids = prompt_ids[:reused]
        return reused

    def record(self, token_ids: list[int]) -> None:
        """The request has ended with these tokens; those not cached (the last one) are dropped."""
        self.token_ids = token_ids[: self.sequence.length]
        self._is_busy = False

    def release(self) -> None:
        """Give the pages back."""
        self.check_free()
        self.sequence.release()
        self.token_ids = []
