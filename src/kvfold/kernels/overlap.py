"""Programmatic dependent launch (sm_90 on): a kernel starts while the one before it ends.

A step of one row is 400 launches of 2 to 20 us, and a launch alone takes 1 us. Each kernel first waits until the one
before it has ended and then lets its successor start, so that no more than two are under way and what an older one
wrote is there. Before it waits it may touch what no kernel writes: rows of weights are asked into L2.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE_BYTES = 128


@cache
def _serves(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlaps(x: Tensor) -> bool:
    """Whether kernels on x's device may start early: the launchers' `launch_pdl`."""
    return x.is_cuda and _serves(x.device)


@triton.jit
def wait_for_inputs():
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def ask_for_rows(raw, row, row_bytes, LINES: tl.constexpr):
    """Rows `row` int64 [ROWS] of at most LINES lines each, towards L2."""
    at = tl.minimum(tl.arange(0, LINES) * 128, row_bytes - 1)
    address = (raw + row[:, None] * row_bytes + at[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
