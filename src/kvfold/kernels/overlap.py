"""Programmatic dependent launch (sm_90 on): a kernel starts while the one before it ends.

A step of one row is some 200 launches of 2 to 20 us, and a launch alone takes 1 us. A kernel that has let its successor
start shares the multiprocessors with it; the successor waits until every kernel before it has ended and what they wrote is
there. Before it waits it may read what no kernel writes, weights above all. Two orders:

- `wait_for_inputs` alone waits and then lets the next one start: that one may read, before it waits, whatever kernels
  before this one wrote.
- `let_next_start` at the very beginning, `wait_for_inputs` later: for short kernels. Several may be under way, each with
  its weights in registers while an older one computes.

Every kernel waits, also where it needs nothing: that its successor may wait for it alone rests on this.
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
def let_next_start():
    gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    # The next kernel may start only now: it reads what was there before this one's inputs without waiting itself.
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
