"""What a GPU does at most, for shares of it: reads of memory past every cache, and products of square matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

READ_BYTES = 2 << 30  # 40 times the second-level cache of an H200
MATRIX = 8192
_BLOCK, _TURNS = 2048, 16


@triton.jit
def _sum(x, out, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * TURNS + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TURNS):
        total += tl.load(x + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


class Ceilings:
    """Buffers on a device and what reading and multiplying them takes. Takes up to READ_BYTES, or half of what is free."""

    def __init__(self, device: torch.device) -> None:
        free, _ = torch.cuda.mem_get_info(device)
        self._programs = min(READ_BYTES, free // 2) // (4 * _BLOCK * _TURNS)
        self._numbers = torch.zeros(self._programs * _BLOCK * _TURNS, device=device)
        self._sums = torch.empty(self._programs, device=device)
        self.read_rate()  # compiles

    def read_rate(self) -> float:
        """Bytes a second of a kernel that only reads."""
        grid = (self._programs,)
        seconds = _seconds(lambda: _sum[grid](self._numbers, self._sums, BLOCK=_BLOCK, TURNS=_TURNS, num_warps=8))
        return self._numbers.nbytes / seconds

    def multiply_adds(self, dtype: torch.dtype) -> float:
        """A second, of the library's product of two matrices of `dtype` with 8192 rows and columns."""
        # numbers as they occur: of zeros the product runs faster, at less power
        a, b = (torch.randn(MATRIX, MATRIX, device=self._numbers.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        return MATRIX**3 / _seconds(lambda: torch.mm(a, b, out=out))


def _seconds(call: Callable[[], object]) -> float:
    """Of one of three calls in a row, on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(3):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 3e3
