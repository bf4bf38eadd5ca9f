"""The token of the highest logit, chosen on the device, and the next step's tokens taken from there.

So a step of generated rows can be launched before the host knows what the one before it said.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.overlap import overlaps, wait_for_inputs

BLOCK = 4096


@triton.jit
def _likeliest(
    logits, stride, vocab, tops, places, arrived, out,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (block of logits, row); the last of a row to end compares its blocks."""
    if EARLY:
        wait_for_inputs()
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + i, mask=i < vocab, other=float("-inf"))
    x = tl.where(x < float("inf"), x, float("inf"))  # NaN is no likelihood, as +inf is none
    top = tl.max(x, 0)
    tl.store(tops + row * num_blocks + block, top)
    tl.store(places + row * num_blocks + block, tl.min(tl.where(x == top, i, vocab), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == num_blocks - 1:
        tl.store(arrived + row, 0)
        b = tl.arange(0, BLOCKS)
        is_block = b < num_blocks
        each = tl.load(tops + row * num_blocks + b, mask=is_block, other=float("-inf"), volatile=True)
        place = tl.load(places + row * num_blocks + b, mask=is_block, other=0, volatile=True)
        highest = tl.max(each, 0)
        token = tl.min(tl.where(is_block & (each == highest), place, vocab), 0)
        is_finite = tl.abs(highest) < float("inf")
        tl.store(out + row, tl.where(is_finite, token, -1))


@triton.jit
def _take(token_ids, chosen, num_rows, ROWS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(token_ids + i, mask=i < num_rows, other=0)
    is_chosen = (i < num_rows) & (token < 0)
    there = tl.load(chosen + (-1 - token), mask=is_chosen, other=0)
    tl.store(token_ids + i, tl.maximum(there, 0), mask=is_chosen)


def likeliest(logits: Tensor, arrived: Tensor, out: Tensor) -> None:
    """out int32 [T]: the lowest id of the highest of a row's logits float32 [T, vocab], -1 where that is not finite.

    arrived: int32 [T], zero before and after; launches that share it run one after another.
    """
    num_rows, vocab = logits.shape
    num_blocks = triton.cdiv(vocab, BLOCK)
    tops = torch.empty(num_rows, num_blocks, device=logits.device)
    places = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    early = overlaps(logits)
    _likeliest[(num_blocks, num_rows)](
        logits, logits.stride(0), vocab, tops, places, arrived, out,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=8, EARLY=early, launch_pdl=early,
    )  # fmt: skip


def take_chosen(token_ids: Tensor, chosen: Tensor) -> None:
    """token_ids int32 [T], IN PLACE: -1 - i becomes chosen[i] (0 where that is -1)."""
    rows = 128
    _take[(triton.cdiv(len(token_ids), rows),)](token_ids, chosen, len(token_ids), ROWS=rows)
