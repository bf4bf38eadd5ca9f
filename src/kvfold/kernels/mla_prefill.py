"""MLA prefill: causal attention of a prompt's rows over expanded keys and values (192 and 128 wide in DeepSeek).

Owns one launch over one run of keys. The rope part of a key is shared by all heads and is never copied next to its 128
nope numbers: the score is the sum of two products. A long context comes as several runs of keys, each expanded into
bounded scratch; `merge` folds a run into what earlier runs left, by log-sum-exp. Few rows of few heads over many keys
leave multiprocessors idle, so on Hopper the keys of a run are then shared out, and `merge_parts` puts the parts together.

The kernel of this file is plain Triton: right on any GPU from sm_80 on and in Triton's CPU interpreter, and the judge of
the Hopper kernel in mla_prefill_gluon.py, which `mla_prefill` takes where it applies.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl

from kvfold.kernels.online_softmax import LOG2_E, NO_SCORE

Form = Literal["triton", "gluon"]

# Rows, keys, warps, stages: 156 KB of shared memory and 186 registers a thread at 128 + 64 and 128 numbers a head.
HOPPER_BLOCKS = (128, 64, 8, 3)
L2_BYTES = 32 << 20  # of the 60 MB of an H200


def mla_prefill(
    q: torch.Tensor,  # [R, H, nope + rope]   rows first_row .. first_row + R of one sequence
    k_nope: torch.Tensor,  # [K, H, nope]     keys first_key .. first_key + K; any strides but the last, which is 1
    k_rope: torch.Tensor,  # [K, H or 1, rope]
    v: torch.Tensor,  # [K, H, v]
    out: torch.Tensor,  # [R, H, v]           of q's type or float32
    lse: torch.Tensor,  # float32 [H, R]      natural logarithm of the sum of exp(scale * score)
    *,
    scale: float,
    first_row: int,
    first_key: int,
    merge: bool,
    kv_len: torch.Tensor | None = None,  # int32 [1]
    form: Form | None = None,
) -> None:
    """Row i attends to key j iff first_key + j <= first_row + i. With `merge`, `out` and `lse` hold the attention over
    other keys and get that over both; a row that sees no key is zero with lse -inf, or stays as it was. With `kv_len`, read on the
    device, the first kv_len <= K keys are those of the sequence whose last rows these are, rows before its first among them;
    keys and values behind are zeros. `form` forces a kernel."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)
    if form is None:
        form = "gluon" if hopper and _gluon_serves(q, k_nope, k_rope, v, out) else "triton"
    if kv_len is not None and (first_row, first_key) != (0, 0):
        raise ValueError(
            f"first_row={first_row}, first_key={first_key}: expected 0 of rows that are counted by kv_len."
        )
    if form == "gluon":
        from kvfold.kernels.mla_prefill_gluon import launch  # names of Triton's experimental room, which move

        num_parts = _num_parts(q, k_nope)
        if num_parts == 1:
            parts, parts_lse = out[None], lse[None]
        else:
            parts = torch.empty(num_parts, *out.shape, dtype=torch.float32, device=out.device)
            parts_lse = torch.empty(num_parts, *lse.shape, dtype=torch.float32, device=lse.device)
        launch(
            q, k_nope, k_rope, v, parts, parts_lse, scale * LOG2_E, first_row - first_key, _heads_together(k_nope, v),
            merge and num_parts == 1, kv_len,
        )  # fmt: skip
        if num_parts > 1:
            merge_parts(parts, parts_lse, out, lse, merge)
        return
    num_rows, num_heads, qk_dim = q.shape
    num_keys, _, nope = k_nope.shape
    rope, v_dim = qk_dim - nope, v.shape[2]
    wide = q.element_size() == 4
    if wide:
        block_rows, block_keys, warps, stages = 32, 32, 4, 1
    elif hopper:
        block_rows, block_keys, warps, stages = HOPPER_BLOCKS
    else:
        block_rows, block_keys, warps, stages = 64, 32, 4, 2
    _prefill_kernel[(triton.cdiv(num_rows, block_rows) * num_heads,)](
        q, k_nope, k_rope, v, out, lse, lse if kv_len is None else kv_len, scale * LOG2_E, num_rows, num_keys, first_row - first_key,
        q.stride(0), q.stride(1), k_nope.stride(0), k_nope.stride(1),
        k_rope.stride(0), k_rope.stride(1) if k_rope.shape[1] > 1 else 0, v.stride(0), v.stride(1),
        out.stride(0), out.stride(1), lse.stride(0),
        HEADS_TOGETHER=_heads_together(k_nope, v), NOPE=nope, ROPE=rope, V=v_dim,
        BLOCK_NOPE=max(triton.next_power_of_2(nope), 16), BLOCK_ROPE=max(triton.next_power_of_2(rope), 16),
        BLOCK_V=max(triton.next_power_of_2(v_dim), 16), BLOCK_ROWS=block_rows, BLOCK_KEYS=block_keys, MERGE=merge,
        COUNTED=kv_len is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _heads_together(k_nope: torch.Tensor, v: torch.Tensor) -> int:
    """How many heads run at a time: as many as have keys and values of at most L2_BYTES, and divide all heads."""
    num_keys, num_heads, nope = k_nope.shape
    head_bytes = max(num_keys, 1) * (nope + v.shape[2]) * k_nope.element_size()
    return max(n for n in range(1, num_heads + 1) if num_heads % n == 0 and (n == 1 or n * head_bytes <= L2_BYTES))


def _num_parts(q: torch.Tensor, k_nope: torch.Tensor) -> int:
    """How many parts of the keys work side by side: where row blocks and heads are fewer than multiprocessors, as many
    as fill them, of at least 1024 keys each."""
    multiprocessors: int = torch.cuda.get_device_properties(q.device).multi_processor_count
    pieces = math.ceil(q.shape[0] / 128) * q.shape[1]
    return max(1, min(multiprocessors // pieces, k_nope.shape[0] // 1024))


def _gluon_serves(
    q: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> bool:
    """16-bit inputs of one type, 128 + 64 and 128 numbers a head, in rows that TMA can address."""
    inputs = (q, k_nope, k_rope, v)
    return (
        (q.shape[2], k_nope.shape[2], k_rope.shape[2], v.shape[2]) == (192, 128, 64, 128)
        and k_nope.shape[0] > 0
        and q.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == q.dtype and x.data_ptr() % 16 == 0 and x.stride(2) == 1 for x in inputs)
        and all(x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 for x in inputs)
        and out.stride(2) == 1
    )


@triton.jit
def _fold_keys(
    highest, weight, values, q_nope, q_rope, k_nope, k_rope, v, scale_log2, first, last, num_keys, sees,
    k_stride, k_rope_stride, v_stride,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    BLOCK_NOPE: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Folds keys first..last into the running softmax. Without MASKED every row sees every key of every block."""
    key = tl.arange(0, BLOCK_KEYS)
    nope = tl.arange(0, BLOCK_NOPE)
    rope = tl.arange(0, BLOCK_ROPE)
    value = tl.arange(0, BLOCK_V)
    for start in range(first, last, BLOCK_KEYS):
        j = start + key
        at = j.to(tl.int64)
        k_at = k_nope + at[None, :] * k_stride + nope[:, None]
        k_rope_at = k_rope + at[None, :] * k_rope_stride + rope[:, None]
        v_at = v + at[:, None] * v_stride + value[None, :]
        if MASKED or BLOCK_NOPE + BLOCK_ROPE + BLOCK_V != NOPE + ROPE + V:
            real = j < num_keys
            k = tl.load(k_at, mask=real[None, :] & (nope < NOPE)[:, None], other=0)
            kr = tl.load(k_rope_at, mask=real[None, :] & (rope < ROPE)[:, None], other=0)
            rows = tl.load(v_at, mask=real[:, None] & (value < V)[None, :], other=0)
        else:
            k = tl.load(k_at)
            kr = tl.load(k_rope_at)
            rows = tl.load(v_at)
        if k.dtype != q_nope.dtype:
            k = k.to(tl.float32).to(q_nope.dtype)
            rows = rows.to(tl.float32).to(q_nope.dtype)
        if kr.dtype != q_nope.dtype:
            kr = kr.to(tl.float32).to(q_nope.dtype)
        score = tl.dot(q_nope, k, input_precision="ieee")
        score = tl.dot(q_rope, kr, score, input_precision="ieee")
        if MASKED:
            score = tl.where(j[None, :] < sees[:, None], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1) * scale_log2)
        p = tl.exp2(score * scale_log2 - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weight = weight * shrink + tl.sum(p, 1)
        values = values * shrink[:, None]
        values = tl.dot(p.to(q_nope.dtype), rows, values, input_precision="ieee")
        highest = higher
    return highest, weight, values


@triton.jit
def _prefill_kernel(
    q, k_nope, k_rope, v, out, lse, kv_len, scale_log2, num_rows, num_keys, ahead,
    q_stride, q_head_stride, k_stride, k_head_stride, k_rope_stride, k_rope_head_stride, v_stride, v_head_stride,
    out_stride, out_head_stride, lse_stride,
    HEADS_TOGETHER: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    BLOCK_NOPE: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, MERGE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Program: HEADS_TOGETHER heads at a time, of them the longest row blocks first. `ahead`: keys of this run before
    the first row's own."""
    if COUNTED:
        num_keys = tl.load(kv_len)
        ahead = num_keys - num_rows
    num_blocks = (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    place = tl.program_id(0) % (num_blocks * HEADS_TOGETHER)
    head = tl.program_id(0) // (num_blocks * HEADS_TOGETHER) * HEADS_TOGETHER + place % HEADS_TOGETHER
    head = head.to(tl.int64)
    row0 = (num_blocks - 1 - place // HEADS_TOGETHER) * BLOCK_ROWS
    i = row0 + tl.arange(0, BLOCK_ROWS)
    nope = tl.arange(0, BLOCK_NOPE)
    rope = tl.arange(0, BLOCK_ROPE)
    value = tl.arange(0, BLOCK_V)
    real_row = (i < num_rows)[:, None]

    q_row = (q + i.to(tl.int64) * q_stride + head * q_head_stride)[:, None]
    q_nope = tl.load(q_row + nope[None, :], mask=real_row & (nope < NOPE)[None, :], other=0)
    q_rope = tl.load(q_row + NOPE + rope[None, :], mask=real_row & (rope < ROPE)[None, :], other=0)
    k_nope += head * k_head_stride
    k_rope += head * k_rope_head_stride
    v += head * v_head_stride

    sees = tl.minimum(ahead + i + 1, num_keys)  # keys of this run each row sees; none where it is not positive
    free = tl.maximum(tl.minimum(ahead + row0 + 1, num_keys), 0) // BLOCK_KEYS * BLOCK_KEYS
    last = tl.maximum(tl.minimum(ahead + row0 + BLOCK_ROWS, num_keys), 0)
    highest = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    values = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    highest, weight, values = _fold_keys(
        highest, weight, values, q_nope, q_rope, k_nope, k_rope, v, scale_log2, 0, free, num_keys, sees,
        k_stride, k_rope_stride, v_stride, NOPE, ROPE, V, BLOCK_NOPE, BLOCK_ROPE, BLOCK_V, BLOCK_KEYS, False,
    )  # fmt: skip
    highest, weight, values = _fold_keys(
        highest, weight, values, q_nope, q_rope, k_nope, k_rope, v, scale_log2, free, last, num_keys, sees,
        k_stride, k_rope_stride, v_stride, NOPE, ROPE, V, BLOCK_NOPE, BLOCK_ROPE, BLOCK_V, BLOCK_KEYS, True,
    )  # fmt: skip

    some = weight > 0
    values = values / tl.where(some, weight, 1.0)[:, None]
    own_lse = tl.where(some, highest + tl.log2(tl.where(some, weight, 1.0)), float("-inf"))
    out_row = (out + i.to(tl.int64) * out_stride + head * out_head_stride)[:, None]
    kept = real_row & (value < V)[None, :]
    lse_at = lse + head * lse_stride + i
    if MERGE:
        old_lse = tl.load(lse_at, mask=i < num_rows, other=float("-inf")) * 1.4426950408889634
        top = tl.maximum(tl.maximum(old_lse, own_lse), NO_SCORE)
        old_share = tl.exp2(old_lse - top)
        own_share = tl.exp2(own_lse - top)
        both = old_share + own_share
        safe = tl.where(both > 0, both, 1.0)
        old = tl.load(out_row + value[None, :], mask=kept, other=0).to(tl.float32)
        values = old * (old_share / safe)[:, None] + values * (own_share / safe)[:, None]
        own_lse = tl.where(both > 0, top + tl.log2(safe), float("-inf"))
    tl.store(out_row + value[None, :], values.to(out.dtype.element_ty), mask=kept)
    tl.store(lse_at, own_lse * 0.6931471805599453, mask=i < num_rows)


def merge_parts(
    parts: torch.Tensor,  # float32 [parts, R, H, v]
    parts_lse: torch.Tensor,  # float32 [parts, H, R]
    out: torch.Tensor,  # [R, H, v]
    lse: torch.Tensor,  # float32 [H, R]
    merge: bool,
) -> None:
    """Attention over all parts of the keys, and over what `out` and `lse` hold where `merge`, into `out` and `lse`."""
    num_parts, num_rows, num_heads, width = parts.shape
    _merge_kernel[(triton.cdiv(num_rows, 16), num_heads)](
        parts, parts_lse, out, lse, num_parts, num_rows, width, *parts.stride()[:3], *parts_lse.stride()[:2],
        out.stride(0), out.stride(1), lse.stride(0),
        BLOCK_ROWS=16, BLOCK=triton.next_power_of_2(width), MERGE=merge, num_warps=4,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    parts, parts_lse, out, lse, num_parts, num_rows, width,
    part_stride, row_stride, head_stride, part_lse_stride, head_lse_stride, out_stride, out_head_stride, lse_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_ROWS rows of one head."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(1).to(tl.int64)
    value = tl.arange(0, BLOCK)
    real = i < num_rows
    kept = real[:, None] & (value < width)[None, :]
    row = i.to(tl.int64)
    out_at = out + row[:, None] * out_stride + head * out_head_stride + value[None, :]
    lse_at = lse + head * lse_stride + i
    highest = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    values = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    if MERGE:
        own = tl.load(lse_at, mask=real, other=float("-inf")) * 1.4426950408889634
        highest = tl.maximum(highest, own)
        weight = tl.exp2(own - highest)
        values = tl.load(out_at, mask=kept, other=0).to(tl.float32) * weight[:, None]
    parts_at = parts + row[:, None] * row_stride + head * head_stride + value[None, :]
    parts_lse_at = parts_lse + head * head_lse_stride + i
    for _ in range(0, num_parts):
        own = tl.load(parts_lse_at, mask=real, other=float("-inf")) * 1.4426950408889634
        higher = tl.maximum(highest, own)
        shrink = tl.exp2(highest - higher)
        share = tl.exp2(own - higher)
        weight = weight * shrink + share
        values = values * shrink[:, None] + tl.load(parts_at, mask=kept, other=0) * share[:, None]
        highest = higher
        parts_at += part_stride
        parts_lse_at += part_lse_stride
    some = weight > 0
    safe = tl.where(some, weight, 1.0)
    tl.store(out_at, (values / safe[:, None]).to(out.dtype.element_ty), mask=kept)
    whole = tl.where(some, highest + tl.log2(safe), float("-inf"))
    tl.store(lse_at, whole * 0.6931471805599453, mask=real)
