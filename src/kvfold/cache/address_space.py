"""Memory that costs nothing until it is written to, and nothing again once it is given back.

An array is reserved as address space (MAP_NORESERVE: no swap or memory is promised for it); the system commits a page of
it at the first write. Where an array's parts are large these are 2 MiB pages: reads through 4 KiB pages miss the TLB.
Numbers that were never written, or were given back, are zero.
"""

from __future__ import annotations

import mmap
import platform
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES = 2 << 20
# Python's mmap does not have the name before 3.13; the number is the same on these.
_IS_LINUX = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE = 0x4000 if _IS_LINUX else 0


class AddressSpace:
    """`array`: `dtype` [shape], in anonymous memory from a 2 MiB boundary on.

    huge: on 2 MiB pages where the system has them; `granule` is then what is committed and given back at a time.

    Raises MemoryError where the process has no such address range left.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic], *, huge: bool) -> None:
        nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        try:
            self._memory = mmap.mmap(-1, nbytes + 2 * HUGE_PAGE_BYTES, flags=flags)
        except OSError as error:
            raise MemoryError(f"{nbytes} bytes of address space: {error.strerror}") from error
        data = np.frombuffer(self._memory, np.uint8)
        self._start = -int(data.__array_interface__["data"][0]) % HUGE_PAGE_BYTES
        self.granule = mmap.PAGESIZE
        advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
        if advice is not None:
            self._memory.madvise(advice)
            self.granule = HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
        self.array: NDArray[np.generic] = data[self._start : self._start + nbytes].view(dtype).reshape(shape)

    def give_back(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The system takes back these [first, last) bytes of the array; granules that reach beyond one stay."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for first, last in ranges:
            start = -(-first // self.granule) * self.granule
            stop = last // self.granule * self.granule
            if start < stop:
                self._memory.madvise(mmap.MADV_DONTNEED, self._start + start, stop - start)
