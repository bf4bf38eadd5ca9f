"""What a GPU does at most, for shares of it: reads of memory past every cache, and products of square matrices.

Memory is taken for a measurement and given back after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

READ_BYTES = 2 << 30  # 40 times the second-level cache of an H200
MATRIX = 8192
LEAST_BYTES = 1 << 30  # three matrices in float32 take 0.8 GB, and the library's product some for itself
_BLOCK, _TURNS = 2048, 16


@triton.jit
def _sum(x, out, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * TURNS + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TURNS):
        total += tl.load(x + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_rate(device: torch.device) -> float:
    """Bytes a second of a kernel that only reads READ_BYTES, or half of what is free. MemoryError: too little is free."""

    def measure(free_bytes: int) -> float:
        programs = min(READ_BYTES, free_bytes // 2) // (4 * _BLOCK * _TURNS)
        numbers = torch.zeros(programs * _BLOCK * _TURNS, device=device)
        sums = torch.empty(programs, device=device)

        def read() -> None:
            _sum[(programs,)](numbers, sums, BLOCK=_BLOCK, TURNS=_TURNS, num_warps=8)

        read()  # compiles
        return numbers.nbytes / _seconds(read)

    return _given_back(device, measure)


def multiply_adds(device: torch.device, dtype: torch.dtype) -> float:
    """A second, of the library's product of two matrices of `dtype` with 8192 rows and columns. MemoryError: too little
    is free."""

    def measure(free_bytes: int) -> float:
        # Numbers as they occur: of zeros the product runs faster, at less power. Nothing is freed before the first product,
        # whose workspace stays: in a freed matrix it would keep all of its memory (256 MiB).
        a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        return MATRIX**3 / _seconds(lambda: torch.mm(a, b, out=out))

    return _given_back(device, measure)


def _given_back(device: torch.device, measure: Callable[[int], float]) -> float:
    """What `measure` finds, given the bytes that are free; its own go back to the device."""
    free: int = torch.cuda.mem_get_info(device)[0]
    if free < LEAST_BYTES:
        raise MemoryError(
            f"The ceilings of {device} are measured in {LEAST_BYTES / 1e9:.2f} GB of its memory and {free / 1e9:.2f} GB are "
            f"free, {(LEAST_BYTES - free) / 1e9:.2f} GB are missing: use a smaller context (n_ctx) or a smaller type of the model."
        )
    try:
        return measure(free)
    finally:
        torch.cuda.empty_cache()


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
