"""Which requests work in the next step: generated rows of all running requests, and one window of prompt rows.

A request is admitted when the pages of its worst case (prompt + max_tokens) are free, so a running request never
waits for memory and never has to be undone.
"""

from __future__ import annotations

from collections import deque

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.cache.pages import PagePool, pages_for
from kvfold.engine.batch import Work
from kvfold.engine.request import FinishReason, Request
from kvfold.errors import OutOfPages


class Scheduler:
    """max_prompt_rows: prompt rows in one step, the row window of a long prompt."""

    def __init__(self, pool: PagePool, max_prompt_rows: int) -> None:
        self._pool = pool
        self._max_prompt_rows = max_prompt_rows
        self._waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self.running

    def submit(self, request: Request) -> None:
        """Queue a request. Raises OutOfPages if even an empty cache would be too small for it."""
        if _worst_case(request) > self._pool.num_pages:
            raise OutOfPages(
                f"{len(request.prompt_ids)} prompt tokens and max_tokens={request.max_tokens} need "
                f"{_worst_case(request) * PAGE_TOKENS} cache slots; the cache has "
                f"{self._pool.num_pages * PAGE_TOKENS}. Shorten the prompt, lower max_tokens or raise n_ctx."
            )
        self._waiting.append(request)

    def next_works(self) -> list[tuple[Request, Work]]:
        """The works of the next step, generation first. Empty when idle."""
        while self._waiting and self._fits(self._waiting[0]):
            self.running.append(self._waiting.popleft())
        while self._waiting and not self.running:  # nobody will free a page: sessions hold the missing ones
            request = self._waiting.popleft()
            held = self._pool.num_pages - self._pool.num_free - len(request.sequence.pages)
            request.end(
                FinishReason.ERROR,
                OutOfPages(
                    f"{len(request.prompt_ids)} prompt tokens and max_tokens={request.max_tokens} need "
                    f"{_worst_case(request)} pages; {held} of {self._pool.num_pages} are held by other sessions. "
                    f"Release one, or raise n_ctx."
                ),
            )
        works: list[tuple[Request, Work]] = []
        rows_left = self._max_prompt_rows
        for request in self.running:
            assert request.num_pending > 0, "a running request has a token to compute"
            if request.token_ids:
                works.append((request, Work(request.sequence, request.pending(1), is_prompt=False)))
            elif rows_left > 0:
                tokens = request.pending(rows_left)
                rows_left -= len(tokens)
                is_last_window = len(tokens) == request.num_pending
                works.append((request, Work(request.sequence, tokens, is_prompt=True, outputs=int(is_last_window))))
        return works

    def retire(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request, running or waiting."""
        if request in self.running:
            self.running.remove(request)
        else:
            self._waiting.remove(request)
        request.end(reason, error)

    def _fits(self, request: Request) -> bool:
        promised = sum(_worst_case(r) - len(r.sequence.pages) for r in self.running)
        return _worst_case(request) - len(request.sequence.pages) <= self._pool.num_free - promised


def _worst_case(request: Request) -> int:
    return pages_for(len(request.prompt_ids) + request.max_tokens)
