"""Products of a few rows with matrices in blocks: every byte of a weight is read once, in file order, and no tile is decoded.

The kernels of generated rows: bounded by the bytes of the weights. A program owns a few output features and walks their
rows, so nothing is summed across programs and the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.block_weights import f16, i8, iq4, k_scale, u8, weight
from kvfold.kernels.matrix import Matrix

ROWS = 4  # output features of a program: 512 programs for 2048 features, four for each of 132 SMs
WEIGHTS = 1024  # of a row in one pass: 4 rows of 1024 bf16 are 64 B in flight for each of 128 threads


@triton.jit
def row_dots(
    raw, scale, row, x, cols, row_bytes, scale_cols, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr
):
    """Rows `row` int64 [ROWS] of a matrix times x [cols]: float32 [ROWS]."""
    if TYPE == "Q4_0" or TYPE == "IQ4_NL":  # noqa: PLR1714 (a set is no constant to Triton)
        BLOCKS_4: tl.constexpr = WEIGHTS // 32
        block = tl.arange(0, BLOCKS_4)
        j = tl.arange(0, 16)
        sums = tl.zeros([ROWS, BLOCKS_4, 16], tl.float32)
        for first in range(0, cols // 32, BLOCKS_4):
            b = first + block
            inside = b < cols // 32
            x_at = x + b[:, None] * 32 + j[None, :]
            x_low = tl.load(x_at, mask=inside[:, None], other=0.0).to(tl.float32)
            x_high = tl.load(x_at + 16, mask=inside[:, None], other=0.0).to(tl.float32)
            at = row[:, None, None] * row_bytes + b[None, :, None] * 18
            packed = u8(raw, at + 2 + j[None, None, :], inside[None, :, None])
            d = f16(raw, at, inside[None, :, None])
            if TYPE == "Q4_0":
                low, high = (packed & 15).to(tl.float32) - 8.0, (packed >> 4).to(tl.float32) - 8.0
            else:
                low, high = iq4(packed & 15), iq4(packed >> 4)
            sums += d * (low * x_low[None, :, :] + high * x_high[None, :, :])
        return tl.sum(tl.sum(sums, 2), 1)
    elif TYPE == "Q8_0":
        BLOCKS_8: tl.constexpr = WEIGHTS // 32
        block = tl.arange(0, BLOCKS_8)
        j = tl.arange(0, 32)
        sums = tl.zeros([ROWS, BLOCKS_8, 32], tl.float32)
        for first in range(0, cols // 32, BLOCKS_8):
            b = first + block
            inside = b < cols // 32
            x_b = tl.load(x + b[:, None] * 32 + j[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            at = row[:, None, None] * row_bytes + b[None, :, None] * 34
            q = i8(raw, at + 2 + j[None, None, :], inside[None, :, None])
            sums += f16(raw, at, inside[None, :, None]) * (q * x_b[None, :, :])
        return tl.sum(tl.sum(sums, 2), 1)
    elif TYPE == "Q4_K":
        RUNS_64: tl.constexpr = WEIGHTS // 64  # runs of 64: low nibbles and high nibbles of 32 bytes
        run = tl.arange(0, RUNS_64)
        j = tl.arange(0, 32)
        sums = tl.zeros([ROWS, RUNS_64, 32], tl.float32)
        for first in range(0, cols // 64, RUNS_64):
            b = first + run
            inside = b < cols // 64
            is_in = inside[None, :, None]
            x_at = x + b[:, None] * 64 + j[None, :]
            x_low = tl.load(x_at, mask=inside[:, None], other=0.0).to(tl.float32)
            x_high = tl.load(x_at + 32, mask=inside[:, None], other=0.0).to(tl.float32)
            at = row[:, None, None] * row_bytes + (b // 4)[None, :, None] * 144
            packed = u8(raw, at + 16 + (b % 4)[None, :, None] * 32 + j[None, None, :], is_in)
            d, m = f16(raw, at, is_in), f16(raw, at + 2, is_in)
            s0, m0 = k_scale(raw, at + 4, (b % 4 * 2)[None, :, None], is_in)
            s1, m1 = k_scale(raw, at + 4, (b % 4 * 2 + 1)[None, :, None], is_in)
            low = d * s0 * (packed & 15).to(tl.float32) - m * m0
            high = d * s1 * (packed >> 4).to(tl.float32) - m * m1
            sums += low * x_low[None, :, :] + high * x_high[None, :, :]
        return tl.sum(tl.sum(sums, 2), 1)
    elif TYPE == "Q6_K":
        RUNS_128: tl.constexpr = WEIGHTS // 128  # runs of 128: two nibbles of 64 bytes and four bit pairs of 32
        run = tl.arange(0, RUNS_128)
        j = tl.arange(0, 32)
        sums = tl.zeros([ROWS, RUNS_128, 32], tl.float32)
        for first in range(0, cols // 128, RUNS_128):
            b = first + run
            inside = b < cols // 128
            is_in = inside[None, :, None]
            at = row[:, None, None] * row_bytes + (b // 2)[None, :, None] * 210
            half = (b % 2)[None, :, None]
            near = u8(raw, at + half * 64 + j[None, None, :], is_in)
            far = u8(raw, at + half * 64 + 32 + j[None, None, :], is_in)
            top = u8(raw, at + 128 + half * 32 + j[None, None, :], is_in)
            d = f16(raw, at + 208, is_in)
            levels = at + 192 + half * 8 + (j // 16)[None, None, :]
            x_at = x + b[:, None] * 128 + j[None, :]
            for plane in tl.static_range(4):
                nibble = (near if plane % 2 == 0 else far) >> (plane // 2 * 4)
                q = (nibble & 15) | (((top >> (plane * 2)) & 3) << 4)
                x_b = tl.load(x_at + plane * 32, mask=inside[:, None], other=0.0).to(tl.float32)
                sums += d * i8(raw, levels + plane * 2, is_in) * (q - 32).to(tl.float32) * x_b[None, :, :]
        return tl.sum(tl.sum(sums, 2), 1)
    else:
        k = tl.arange(0, WEIGHTS)
        sums = tl.zeros([ROWS, WEIGHTS], tl.float32)
        for first in range(0, cols, WEIGHTS):
            col = first + k
            inside = col < cols
            x_k = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
            w = weight(raw, scale, row[:, None], col[None, :], inside[None, :], row_bytes, scale_cols, TYPE)
            sums += w * x_k[None, :]
        return tl.sum(sums, 1)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _linear(
    x, raw, scale, out, rows, cols, row_bytes, scale_cols, x_stride, out_stride,
    TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    y = row_dots(raw, scale, row, x + t * x_stride, cols, row_bytes, scale_cols, TYPE, ROWS, WEIGHTS)
    tl.store(out + t * out_stride + feature, y, mask=feature < rows)


@triton.jit
def _gate_up(
    x, gate, gate_scale, up, up_scale, ids, out, rows, cols, gate_bytes, up_bytes, scale_rows, scale_cols, x_stride,
    PER_ROW: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Pair p is row p // PER_ROW of x with expert ids[p] (PER_ROW 0: row p, the only matrix)."""
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    if PER_ROW > 0:
        expert = tl.load(ids + pair).to(tl.int64)
        x += pair // PER_ROW * x_stride
        gate += expert * rows * gate_bytes
        up += expert * rows * up_bytes
        gate_scale += expert * scale_rows * scale_cols
        up_scale += expert * scale_rows * scale_cols
    else:
        x += pair * x_stride
    g = row_dots(gate, gate_scale, row, x, cols, gate_bytes, scale_cols, GATE, ROWS, WEIGHTS)
    u = row_dots(up, up_scale, row, x, cols, up_bytes, scale_cols, UP, ROWS, WEIGHTS)
    tl.store(out + pair * rows + feature, silu(g) * u, mask=feature < rows)


@triton.jit
def _down(
    hidden, raw, scale, ids, weights, out, rows, cols, row_bytes, scale_rows, scale_cols,
    PER_ROW: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    y = tl.zeros([ROWS], tl.float32)
    for choice in range(PER_ROW):
        pair = t * PER_ROW + choice
        expert = tl.load(ids + pair).to(tl.int64)
        part = raw + expert * rows * row_bytes
        part_scale = scale + expert * scale_rows * scale_cols
        dots = row_dots(
            part, part_scale, row, hidden + pair * cols, cols, row_bytes, scale_cols, TYPE, ROWS, WEIGHTS
        )
        y += tl.load(weights + pair) * dots
    tl.store(out + t * rows + feature, y, mask=feature < rows)


def linear(x: Tensor, w: Matrix, out: Tensor) -> None:
    """out [T, rows] = x [T, cols] @ w^T; the last stride of both is 1."""
    grid = (triton.cdiv(w.rows, ROWS), len(x))
    _linear[grid](
        x, w.raw, w.scale_or_raw, out, w.rows, w.cols, w.row_bytes, w.scale_cols, x.stride(0), out.stride(0),
        TYPE=w.type, ROWS=ROWS, WEIGHTS=WEIGHTS,
    )  # fmt: skip


def gate_up(x: Tensor, gate: Matrix, up: Matrix, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """silu(gate x) * (up x): [T, rows], or with ids int32 [T, k] [T * k, rows] of the chosen experts."""
    per_row = 0 if ids is None else ids.shape[1]
    out = torch.empty(len(x) * max(per_row, 1), gate.rows, dtype=dtype, device=x.device)
    _gate_up[(triton.cdiv(gate.rows, ROWS), len(out))](
        x, gate.raw, gate.scale_or_raw, up.raw, up.scale_or_raw, x if ids is None else ids, out, gate.rows, gate.cols,
        gate.row_bytes, up.row_bytes, gate.scale_rows, gate.scale_cols, x.stride(0),
        PER_ROW=per_row, GATE=gate.type, UP=up.type, ROWS=ROWS, WEIGHTS=WEIGHTS,
    )  # fmt: skip
    return out


def down(hidden: Tensor, w: Matrix, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [T, rows] = sum over a row's choices of weights [T, k] times the chosen experts' w hidden [T * k, cols]."""
    _down[(triton.cdiv(w.rows, ROWS), len(ids))](
        hidden, w.raw, w.scale_or_raw, ids, weights, out, w.rows, w.cols, w.row_bytes, w.scale_rows, w.scale_cols,
        PER_ROW=ids.shape[1], TYPE=w.type, ROWS=ROWS, WEIGHTS=WEIGHTS,
    )  # fmt: skip
