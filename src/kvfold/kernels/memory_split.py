"""How much of a multiprocessor's memory a kernel wants as shared memory, and how much is left to it as L1 (256 KB are both).

On an H200 (30 November 2026) kernels that stream weights are slower in steps whose attention takes 168 KB of shared memory, though they
read no cache themselves, and not if they prefer L1. What they read is used once and passes through L1 all the same, so how many loads are
under way may depend on its size. A preference is a hint to the driver and a property of the compiled function; a captured launch keeps it.
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
