"""How much of a multiprocessor's memory a kernel wants as shared memory, and how much is left to it as L1 (256 KB are both).

The driver makes room for the shared memory that a kernel asks for, and then leaves the split as it is: behind attention of a long
context, which takes 168 KB, the kernels that stream weights find an L1 of 60 KB. What they read is used once and passes through L1
all the same, so how many loads are under way depends on it. A preference is a property of the compiled function, and a
captured launch keeps it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # of CUfunction_attribute in cuda.h; in percent


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _prefer(function: int, shared_percent: int) -> None:
    attribute, value = PREFERRED_SHARED_MEMORY_CARVEOUT, shared_percent
    error = _driver().cuFuncSetAttribute(ctypes.c_void_p(function), attribute, value)
    if error:
        raise RuntimeError(
            f"cuFuncSetAttribute({attribute}, {value}) of a kernel: error {error} of the CUDA driver."
        )


class Splitting:
    """A Triton kernel each of whose compiled functions has this preference behind its first launch; nothing in the interpreter."""

    def __init__(self, kernel: Any, shared_percent: int) -> None:
        self._kernel = kernel
        self._shared_percent = shared_percent

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            compiled = self._kernel[grid](*arguments, **constants)
            if compiled is not None:
                _prefer(compiled.function, self._shared_percent)

        return launch


def prefers_shared(percent: int) -> Callable[[Any], Splitting]:
    """Decorates a kernel: 0 is the largest L1 there is."""
    return lambda kernel: Splitting(kernel, percent)
