"""Values of a few rows' decode attention, from the parts of mla_decode to W_UV, in one launch.

Owns what comes behind mla_decode's first launch where rows and heads are few: each program merges the partial results of
one head by their log-sum-exps, for itself, and multiplies a block of that head's W_UV, which it has asked for before. So
nothing is written and read between the two, and one launch of the two is gone. A head's parts are read once for every
block of features, from L2: 132 parts of 2 KB by 128 programs are 35 MB, some 7 us; more heads merge in a launch of their
own (mla_decode.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.mla_decode import DecodeWorkspace
from kvfold.kernels.online_softmax import NO_SCORE
from kvfold.kernels.overlap import let_next_start, overlaps, wait_for_inputs

MOST_ROWS = 4
MOST_HEADS = 32
FEATURES = 16  # of a program: 128 programs for 16 heads of 128
SPLITS = 32  # parts in registers at once: 64 of each of 256 threads


@triton.jit
def _merge_unfold(
    whole, whole_row, whole_head, splits, partial, partial_lse, w, out, out_row, rows, v_dim,
    S_Q: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, KV_LORA: tl.constexpr, LORA: tl.constexpr,
    FEATURES: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (head, block of features). The schedule is older than the kernel before this one, so it may be read early."""
    if EARLY:
        let_next_start()
    head = tl.program_id(0)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    column = tl.arange(0, LORA)
    real_column = column < KV_LORA
    at = (head * v_dim + tl.minimum(feature, v_dim - 1)).to(tl.int64) * KV_LORA
    tile = tl.load(w + at[:, None] + column[None, :], mask=real_column[None, :], other=0.0)
    lane = tl.arange(0, SPLITS)
    parts = ()
    for t in tl.static_range(TOKENS):
        parts += ((tl.load(splits + t // S_Q * 2), tl.load(splits + t // S_Q * 2 + 1)),)  # type: ignore[assignment]
    if EARLY:
        wait_for_inputs()
    for t in tl.static_range(TOKENS):
        row = t % S_Q * HEADS + head
        first_part, num_splits = parts[t]  # type: ignore[var-annotated]
        if num_splits > 1:
            highest = tl.full([], NO_SCORE, tl.float32)
            weight = tl.zeros([SPLITS], tl.float32)
            values = tl.zeros([SPLITS, LORA], tl.float32)
            for start in range(0, num_splits, SPLITS):
                split = start + lane
                real = split < num_splits
                slot = (2 * (first_part + split) + (split == 0).to(tl.int32)).to(tl.int64) * rows + row
                lse = tl.load(partial_lse + slot, mask=real, other=float("-inf"))
                mask = real[:, None] & real_column[None, :]
                part = tl.load(partial + slot[:, None] * KV_LORA + column[None, :], mask=mask, other=0.0)
                higher = tl.maximum(highest, tl.max(lse, 0))
                share = tl.exp2(lse - higher)
                shrink = tl.exp2(highest - higher)
                weight = weight * shrink + share
                values = values * shrink + part * share[:, None]
                highest = higher
            total = tl.sum(weight, 0)
            x = tl.sum(values, 0) / tl.where(total > 0, total, 1.0)
        else:
            x = tl.load(whole + t * whole_row + head * whole_head + column, mask=real_column, other=0.0).to(
                tl.float32
            )
        y = tl.sum(tile.to(tl.float32) * x[None, :], 1)
        tl.store(out + t * out_row + head * v_dim + feature, y, mask=feature < v_dim)


def serves(num_rows: int, num_heads: int) -> bool:
    return num_rows <= MOST_ROWS and num_heads <= MOST_HEADS


def merge_unfold(whole: Tensor, workspace: DecodeWorkspace, w_uv: Tensor, out: Tensor) -> None:
    """out [T, H * v] = values [T, H, kv_lora] of `mla_decode(.., merges=False)`, whole ones in `whole` and parts in
    `workspace`, times w_uv [H, v, kv_lora] of their head."""
    num_heads, v_dim, kv_lora = w_uv.shape
    early = overlaps(whole)
    _merge_unfold[(num_heads, triton.cdiv(v_dim, FEATURES))](
        whole, whole.stride(0), whole.stride(1), workspace.splits, workspace.partial, workspace.partial_lse, w_uv, out,
        out.stride(0), workspace.rows_per_sequence * num_heads, v_dim,
        S_Q=workspace.rows_per_sequence, HEADS=num_heads, TOKENS=len(whole), KV_LORA=kv_lora,
        LORA=triton.next_power_of_2(kv_lora), FEATURES=FEATURES, SPLITS=SPLITS, num_warps=8, EARLY=early,
        launch_pdl=early,
    )  # fmt: skip
