"""Products of a few rows with matrices in blocks: every byte of a weight is read once, in file order, and no tile is decoded.

The kernels of generated rows: bounded by the bytes of the weights. A program owns a few output features and walks their
rows, so nothing is summed across programs and the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.block_weights import f16, i8, iq4_of_word, k_scale, u8, weight, whole, word16, word32
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.overlap import LINE_BYTES, ask_for_rows, overlaps, wait_for_inputs

# Output features of a program, and weights of a row in one pass. Numbers: 1024 programs for 2048 features. Blocks: what a
# pass costs besides its weights is shared by more of them.
OF_NUMBERS = (2, 1024)
OF_BLOCKS = (4, 2048)
FEW_FEATURES = (
    512  # up to so many (a router's), one each: 64 programs of one row leave half of the SMs idle as it is
)


@triton.jit
def _pair(x, mask):
    """Two neighbours, float32 each: bfloat16 as one word, whose halves are upper halves of float32."""
    if x.dtype.element_ty == tl.bfloat16:
        word = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=0)
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        first = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        return first, tl.load(x + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _nibbles(word, SHIFT: tl.constexpr, x, mask):
    """Sum of (1 + q / 16) x over a nibble q of each of four bytes, and sum of x. The nibble lies on top of the mantissa
    of 1.0: no conversion, no subtraction."""
    x0, x1 = _pair(x, mask)
    x2, x3 = _pair(x + 2, mask)
    q0 = (((word >> SHIFT) & 15) << 19) | 0x3F800000
    q1 = (((word >> (SHIFT + 8)) & 15) << 19) | 0x3F800000
    q2 = (((word >> (SHIFT + 16)) & 15) << 19) | 0x3F800000
    q3 = (((word >> (SHIFT + 24)) & 15) << 19) | 0x3F800000
    near = q0.to(tl.float32, bitcast=True) * x0[None, :, :] + q1.to(tl.float32, bitcast=True) * x1[None, :, :]
    far = q2.to(tl.float32, bitcast=True) * x2[None, :, :] + q3.to(tl.float32, bitcast=True) * x3[None, :, :]
    return near + far, (x0 + x1) + (x2 + x3)


@triton.jit
def _products(
    sums,
    first,
    raw,
    scale,
    row,
    x,
    row_bytes,
    scale_cols,
    COLS: tl.constexpr,
    TYPE: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """sums plus the products of WEIGHTS numbers of x from `first` on with those of the rows, in a shape of the type's."""
    if TYPE == "Q4_0" or TYPE == "IQ4_NL":  # noqa: PLR1714 (a set is no constant to Triton)
        b = first // 32 + tl.arange(0, WEIGHTS // 32)
        j = tl.arange(0, 8)  # words of two bytes
        inside = b < COLS // 32
        x0, x1 = _pair(x + b[:, None] * 32 + j[None, :] * 2, inside[:, None])
        x16, x17 = _pair(x + b[:, None] * 32 + j[None, :] * 2 + 16, inside[:, None])
        at = row[:, None, None] * row_bytes + b[None, :, None] * 18
        word = word16(raw, at + 2 + j[None, None, :] * 2, inside[None, :, None])
        d = f16(raw, at, inside[None, :, None])
        if TYPE == "Q4_0":
            w0, w16 = whole(word & 15) - 8.0, whole((word >> 4) & 15) - 8.0
            w1, w17 = whole((word >> 8) & 15) - 8.0, whole((word >> 12) & 15) - 8.0
        else:
            w0, w16, w1, w17 = iq4_of_word(word)
        run = w0 * x0[None, :, :] + w1 * x1[None, :, :] + w16 * x16[None, :, :] + w17 * x17[None, :, :]
        return sums + d * run
    elif TYPE == "Q8_0":
        b = first // 32 + tl.arange(0, WEIGHTS // 32)
        j = tl.arange(0, 32)
        inside = b < COLS // 32
        x_b = tl.load(x + b[:, None] * 32 + j[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        at = row[:, None, None] * row_bytes + b[None, :, None] * 34
        q = i8(raw, at + 2 + j[None, None, :], inside[None, :, None])
        return sums + f16(raw, at, inside[None, :, None]) * (q * x_b[None, :, :])
    elif TYPE == "Q4_K":
        b = first // 64 + tl.arange(0, WEIGHTS // 64)  # runs of 64: low nibbles and high nibbles of 32 bytes
        j = tl.arange(0, 8)  # words of four bytes
        inside = b < COLS // 64
        block = row[:, None] * row_bytes + (b // 4)[None, :] * 144
        start = block[:, :, None] + 16 + (b % 4)[None, :, None] * 32
        word = word32(raw, start + j[None, None, :] * 4, inside[None, :, None])
        # In two dimensions: a thread would load the scales of a run again for each word it holds.
        is_run = inside[None, :]
        d, m = f16(raw, block, is_run), f16(raw, block + 2, is_run)
        s0, m0 = k_scale(raw, block + 4, (b % 4 * 2)[None, :], is_run)
        s1, m1 = k_scale(raw, block + 4, (b % 4 * 2 + 1)[None, :], is_run)
        x_at = x + b[:, None] * 64 + j[None, :] * 4
        low, x_low = _nibbles(word, 0, x_at, inside[:, None])
        high, x_high = _nibbles(word, 4, x_at + 32, inside[:, None])
        # sum of (d s q - m m') x = 16 d s sum of (1 + q / 16) x - (16 d s + m m') sum of x
        s0, s1 = 16.0 * d * s0, 16.0 * d * s1
        sums += s0[:, :, None] * low - (s0 + m * m0)[:, :, None] * x_low[None, :, :]
        return sums + s1[:, :, None] * high - (s1 + m * m1)[:, :, None] * x_high[None, :, :]
    elif TYPE == "Q6_K":
        b = first // 128 + tl.arange(0, WEIGHTS // 128)  # runs of 128: nibbles of 64 bytes, bit pairs of 32
        j = tl.arange(0, 32)
        inside = b < COLS // 128
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
            sums += d * i8(raw, levels + plane * 2, is_in) * (whole(q) - 32.0) * x_b[None, :, :]
        return sums
    else:
        col = first + tl.arange(0, WEIGHTS)
        inside = col < COLS
        x_k = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
        w = weight(raw, scale, row[:, None], col[None, :], inside[None, :], row_bytes, scale_cols, TYPE)
        return sums + w * x_k[None, :]


@triton.jit
def _no_products(ROWS: tl.constexpr, TYPE: tl.constexpr, WEIGHTS: tl.constexpr):
    """Zeros in the shape that `_products` sums in."""
    if TYPE == "Q4_0" or TYPE == "IQ4_NL":  # noqa: PLR1714
        return tl.zeros([ROWS, WEIGHTS // 32, 8], tl.float32)
    elif TYPE == "Q8_0":
        return tl.zeros([ROWS, WEIGHTS // 32, 32], tl.float32)
    elif TYPE == "Q4_K":
        return tl.zeros([ROWS, WEIGHTS // 64, 8], tl.float32)
    elif TYPE == "Q6_K":
        return tl.zeros([ROWS, WEIGHTS // 128, 32], tl.float32)
    else:
        return tl.zeros([ROWS, WEIGHTS], tl.float32)


@triton.jit
def _row_products(
    raw, scale, row, x, row_bytes, scale_cols,
    COLS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Products of rows `row` int64 [ROWS] with x [COLS], not summed yet: a sum across threads waits for all of them, so
    callers load everything first."""
    sums = _no_products(ROWS, TYPE, WEIGHTS)
    if COLS <= 4 * WEIGHTS:
        for first in tl.static_range(0, COLS, WEIGHTS):
            sums = _products(sums, first, raw, scale, row, x, row_bytes, scale_cols, COLS, TYPE, WEIGHTS)
    else:
        for first in range(0, COLS, WEIGHTS):
            sums = _products(sums, first, raw, scale, row, x, row_bytes, scale_cols, COLS, TYPE, WEIGHTS)
    return sums


@triton.jit
def _total(sums):
    """[ROWS, ..] -> [ROWS]."""
    if len(sums.shape) == 3:
        sums = tl.sum(sums, 2)
    return tl.sum(sums, 1)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _linear(
    x, raw, scale, out, rows, row_bytes, scale_cols, x_stride, out_stride,
    COLS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, LINES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    if EARLY:
        ask_for_rows(raw, row, row_bytes, LINES)
        wait_for_inputs()
    y = _row_products(raw, scale, row, x + t * x_stride, row_bytes, scale_cols, COLS, TYPE, ROWS, WEIGHTS)
    tl.store(out + t * out_stride + feature, _total(y), mask=feature < rows)


@triton.jit
def _gate_up(
    x, gate, gate_scale, up, up_scale, ids, out, rows, gate_bytes, up_bytes, scale_rows, scale_cols, x_stride,
    COLS: tl.constexpr, PER_ROW: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Pair p is row p // PER_ROW of x with expert ids[p] (PER_ROW 0: row p, the only matrix)."""
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    if EARLY:
        if PER_ROW == 0:  # else nobody knows yet which expert
            ask_for_rows(gate, row, gate_bytes, LINES)
            ask_for_rows(up, row, up_bytes, LINES)
        wait_for_inputs()
    if PER_ROW > 0:
        expert = tl.load(ids + pair).to(tl.int64)
        x += pair // PER_ROW * x_stride
        gate += expert * rows * gate_bytes
        up += expert * rows * up_bytes
        gate_scale += expert * scale_rows * scale_cols
        up_scale += expert * scale_rows * scale_cols
    else:
        x += pair * x_stride
    g = _row_products(gate, gate_scale, row, x, gate_bytes, scale_cols, COLS, GATE, ROWS, WEIGHTS)
    u = _row_products(up, up_scale, row, x, up_bytes, scale_cols, COLS, UP, ROWS, WEIGHTS)
    tl.store(out + pair * rows + feature, silu(_total(g)) * _total(u), mask=feature < rows)


@triton.jit
def _down(
    hidden, raw, scale, ids, weights, out, rows, row_bytes, scale_rows, scale_cols,
    COLS: tl.constexpr, PER_ROW: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        wait_for_inputs()
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    y = _no_products(ROWS, TYPE, WEIGHTS)
    for choice in tl.static_range(PER_ROW):
        pair = t * PER_ROW + choice
        expert = tl.load(ids + pair).to(tl.int64)
        part = raw + expert * rows * row_bytes
        part_scale = scale + expert * scale_rows * scale_cols
        x = hidden + pair * COLS
        products = _row_products(part, part_scale, row, x, row_bytes, scale_cols, COLS, TYPE, ROWS, WEIGHTS)
        y += tl.load(weights + pair) * products
    tl.store(out + t * rows + feature, _total(y), mask=feature < rows)


def _sizes(w: Matrix) -> tuple[int, int]:
    return OF_NUMBERS if w.type in ("F32", "F16", "BF16", "F8_E4M3") else OF_BLOCKS


def _lines(row_bytes: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(row_bytes, LINE_BYTES)))


def linear(x: Tensor, w: Matrix, out: Tensor) -> None:
    """out [T, rows] = x [T, cols] @ w^T; the last stride of both is 1."""
    rows, weights = _sizes(w)
    rows = 1 if w.rows <= FEW_FEATURES else rows
    early = overlaps(x)
    _linear[(triton.cdiv(w.rows, rows), len(x))](
        x, w.raw, w.scale_or_raw, out, w.rows, w.row_bytes, w.scale_cols, x.stride(0), out.stride(0),
        COLS=w.cols, TYPE=w.type, ROWS=rows, WEIGHTS=weights, LINES=_lines(w.row_bytes), EARLY=early, launch_pdl=early,
    )  # fmt: skip


def gate_up(x: Tensor, gate: Matrix, up: Matrix, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """silu(gate x) * (up x): [T, rows], or with ids int32 [T, k] [T * k, rows] of the chosen experts."""
    per_row = 0 if ids is None else ids.shape[1]
    out = torch.empty(len(x) * max(per_row, 1), gate.rows, dtype=dtype, device=x.device)
    rows, weights = _sizes(gate)
    early = overlaps(x)
    _gate_up[(triton.cdiv(gate.rows, rows), len(out))](
        x, gate.raw, gate.scale_or_raw, up.raw, up.scale_or_raw, x if ids is None else ids, out, gate.rows,
        gate.row_bytes, up.row_bytes, gate.scale_rows, gate.scale_cols, x.stride(0),
        COLS=gate.cols, PER_ROW=per_row, GATE=gate.type, UP=up.type, ROWS=rows, WEIGHTS=weights,
        LINES=max(_lines(gate.row_bytes), _lines(up.row_bytes)), EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return out


def down(hidden: Tensor, w: Matrix, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [T, rows] = sum over a row's choices of weights [T, k] times the chosen experts' w hidden [T * k, cols]."""
    rows, width = _sizes(w)
    early = overlaps(hidden)
    _down[(triton.cdiv(w.rows, rows), len(ids))](
        hidden, w.raw, w.scale_or_raw, ids, weights, out, w.rows, w.row_bytes, w.scale_rows, w.scale_cols,
        COLS=w.cols, PER_ROW=ids.shape[1], TYPE=w.type, ROWS=rows, WEIGHTS=width, EARLY=early, launch_pdl=early,
    )  # fmt: skip
