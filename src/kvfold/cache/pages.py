"""Which pages are free and which belong to whom. Owns page numbers only; never touches cached rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.errors import OutOfPages


def pages_for(num_tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """A stack of free page numbers."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, or OutOfPages and none taken."""
        if count > len(self._free):
            raise OutOfPages(
                f"The cache needs {count} more pages of {PAGE_TOKENS} tokens and has {len(self._free)} free of "
                f"{self.num_pages}: shorten the request, end another, or load with a larger n_ctx."
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "a page was given back twice"


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
