"""Which pages are free and which belong to whom. Owns page numbers only; never touches cached rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.errors import OutOfPages

WARM_PAGES = 32
"""Free pages that keep their memory: 2,048 tokens."""


def pages_for(num_tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """The free pages: warm ones, which were used and still have memory, are taken before cold ones.

    give_back_memory: called with all cold pages when some warm ones have become cold. Measured on 1.2 GB, 512 pages of
    V2-Lite in f16: 3 ms to give back, 0.1 s to commit again, or 2.6 s on a virtual machine whose host took it. Computing
    their 32,768 tokens takes minutes; WARM_PAGES save short requests even that.
    """

    def __init__(self, num_pages: int, give_back_memory: Callable[[list[int]], None] = lambda pages: None) -> None:
        self.num_pages = num_pages
        self._give_back_memory = give_back_memory
        self._cold = list(range(num_pages - 1, -1, -1))
        self._warm: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._warm) + len(self._cold)

    def take(self, count: int) -> list[int]:
        """`count` pages, or OutOfPages and none taken."""
        if count > self.num_free:
            raise OutOfPages(
                f"The cache needs {count} more pages of {PAGE_TOKENS} tokens and has {self.num_free} free of "
                f"{self.num_pages}: shorten the request, end another, or load with a larger n_ctx."
            )
        return [(self._warm or self._cold).pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self._warm.extend(reversed(pages))  # taken again in the same order
        assert self.num_free <= self.num_pages, "a page was given back twice"
        if len(self._warm) >= 2 * WARM_PAGES:
            self._cold = sorted([*self._cold, *self._warm[:-WARM_PAGES]], reverse=True)
            self._warm = self._warm[-WARM_PAGES:]
            self._give_back_memory(self._cold)


@dataclass
class Sequence:
    """One growing text in the cache: its tokens' pages, in order, and how many tokens are cached."""

    pool: PagePool
    pages: list[int] = field(default_factory=list)
    length: int = 0

    def reserve(self, num_tokens: int) -> None:
        """Pages for `num_tokens` more tokens. Raises OutOfPages and changes nothing."""
        missing = pages_for(self.length + num_tokens) - len(self.pages)
        if missing > 0:
            self.pages += self.pool.take(missing)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens and give back the pages that held only forgotten ones."""
        assert 0 <= length <= self.length
        keep = pages_for(length)
        self.pool.give_back(self.pages[keep:])
        del self.pages[keep:]
        self.length = length

    def release(self) -> None:
        """Give every page back; the sequence is empty again."""
        self.truncate(0)
