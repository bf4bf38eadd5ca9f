"""Which requests work next: generated rows of all running requests in one step, a window of prompt rows in another.

A request is admitted when the pages of its worst case (prompt + max_tokens) are free, so a running request never
waits for memory and never has to be undone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.cache.pages import PagePool, pages_for
from kvfold.engine.batch import Work
from kvfold.engine.request import FinishReason, Request
from kvfold.errors import OutOfPages

# Prompts that need not wait for a long one: beside a window of 8192 rows they take 3 % of its time.
SHORT_PROMPT_ROWS = 256


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

    def admit(self) -> None:
        """Start the requests that have room, in their order."""
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

    def generation(self) -> list[tuple[Request, Work]]:
        """One row of every running request whose prompt is done."""
        return [
            (request, Work(request.sequence, request.pending(1), is_prompt=False, choice=request.choice(0)))
            for request in self.running
            if request.token_ids
        ]

    def prompts(self) -> list[tuple[Request, Work]]:
        """The next window of prompt rows, requests in their order; only the last rows of a prompt have an output."""
        works: list[tuple[Request, Work]] = []
        rows_left = self._max_prompt_rows
        for request in self._with_prompts():
            if rows_left > 0:
                tokens = request.pending(rows_left)
                rows_left -= len(tokens)
                outputs = int(len(tokens) == request.num_pending)
                works.append((request, Work(request.sequence, tokens, is_prompt=True, outputs=outputs)))
        return works

    def short_prompts(self, without: Collection[Request]) -> list[tuple[Request, Work]]:
        """Whole prompts that have at most SHORT_PROMPT_ROWS rows together, of requests but those."""
        works: list[tuple[Request, Work]] = []
        rows_left = SHORT_PROMPT_ROWS
        for request in self._with_prompts():
            if request not in without and request.num_pending <= rows_left:
                rows_left -= request.num_pending
                works.append(
                    (request, Work(request.sequence, request.pending(request.num_pending), is_prompt=True))
                )
        return works

    def _with_prompts(self) -> list[Request]:
        return [request for request in self.running if not request.token_ids]

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
