"""Products of a few rows: every byte of a weight is read once, and no tile is decoded.

The kernels of generated rows: bounded by the bytes of the weights. A program owns a few output features and walks their
rows, so nothing is summed across programs and the same input gives the same bits. Matrices that ask for it (`Matrix.rounds`)
get their rows rounded to 8 bits, by rounded_product.py; those of other types are decoded number by number, which the
instructions bound.
"""

from __future__ import annotations

from functools import cache
from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels import rounded_product
from kvfold.kernels.block_weights import e4m3_of_word, load4, weight
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.overlap import LINE_BYTES, ask_for_rows, overlaps, wait_for_inputs
from kvfold.kernels.rounded_product import aligned, numbers16
from kvfold.kernels.rounding import RoundedRows
from kvfold.kernels.rows import silu

# Output features of a program, weights of a row in one pass, and warps. Numbers: 1024 programs for 2048 features. Blocks:
# what a pass costs besides its weights is shared by more of them. fp8: 16 weights a thread.
OF_NUMBERS = (2, 1024, 4)
OF_FP8 = (2, 1024, 2)
OF_BLOCKS = (4, 2048, 4)
FEW_FEATURES = (
    512  # up to so many (a router's), one each: 64 programs of one row leave half of the SMs idle as it is
)
FP8_AHEAD = tl.constexpr(4)  # passes of fp8 whose weights are asked for at once: 32 registers a thread


@triton.jit
def _row_products(
    raw, scale, row, x, row_bytes, scale_cols,
    COLS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Products of rows `row` int64 [ROWS] with x [COLS], not summed yet: a sum across threads waits for all of them, so
    callers load everything first."""
    if TYPE == "F8_E4M3" and COLS % 16 == 0:
        return _fp8_products(raw, scale, row, x, row_bytes, scale_cols, COLS, ROWS, WEIGHTS // 16, HARDWARE)
    else:
        sums = tl.zeros([ROWS, WEIGHTS], tl.float32)
        if COLS <= 4 * WEIGHTS:
            for first in tl.static_range(0, COLS, WEIGHTS):
                sums += _products(first, raw, scale, row, x, row_bytes, scale_cols, COLS, TYPE, WEIGHTS)
        else:
            for first in range(0, COLS, WEIGHTS):
                sums += _products(first, raw, scale, row, x, row_bytes, scale_cols, COLS, TYPE, WEIGHTS)
        return sums


@triton.jit
def _products(
    first, raw, scale, row, x, row_bytes, scale_cols, COLS: tl.constexpr, TYPE: tl.constexpr, WEIGHTS: tl.constexpr
):
    """[ROWS, WEIGHTS] products of numbers of x from `first` on with those of the rows."""
    col = first + tl.arange(0, WEIGHTS)
    inside = col < COLS
    x_k = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
    w = weight(raw, scale, row[:, None], col[None, :], inside[None, :], row_bytes, scale_cols, TYPE)
    return w * x_k[None, :]


@triton.jit
def _fp8_products(
    raw, scale, row, x, row_bytes, scale_cols,
    COLS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """[ROWS, PARTS]: a thread has 16 neighbours of a row, which share a scale, so that nothing crosses threads before the
    last sum. (Summing tiles reshaped from squares was wrong: Triton 3.6 reduces over the wrong lanes there.)"""
    sums = tl.zeros([ROWS, PARTS], tl.float32)
    start = (raw + row * row_bytes).to(tl.int64)[:, None]
    scale += (row // 128 * scale_cols)[:, None]
    GROUP: tl.constexpr = FP8_AHEAD * PARTS
    if COLS // 16 <= 4 * GROUP:
        for first in tl.static_range(0, COLS // 16, GROUP):
            sums += _fp8_passes(
                first,
                start,
                scale,
                x,
                COLS,
                PARTS,
                min(FP8_AHEAD, (COLS // 16 - first + PARTS - 1) // PARTS),
                HARDWARE,
            )
    else:
        for first in range(0, COLS // 16, GROUP):
            sums += _fp8_passes(first, start, scale, x, COLS, PARTS, FP8_AHEAD, HARDWARE)
    return sums


@triton.jit
def _fp8_passes(
    first, start, scale, x, COLS: tl.constexpr, PARTS: tl.constexpr, PASSES: tl.constexpr, HARDWARE: tl.constexpr
):
    words = ()
    for i in tl.static_range(PASSES):
        part = tl.minimum(first + i * PARTS + tl.arange(0, PARTS), COLS // 16 - 1)
        words += (load4(start + part[None, :] * 16, COLS),)  # type: ignore[assignment]
    sums = tl.zeros([start.shape[0], PARTS], tl.float32)
    for i in tl.static_range(PASSES):
        at = first + i * PARTS + tl.arange(0, PARTS)
        part = tl.minimum(at, COLS // 16 - 1)
        factor = tl.where((at < COLS // 16)[None, :], tl.load(scale + (part // 8)[None, :]), 0.0)
        v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, _ = numbers16(x, x, part * 16, False)
        w0, w1, w2, w3 = words[i]  # type: ignore[var-annotated]
        y = _fp8_dot4(w0, v0, v1, v2, v3, HARDWARE) + _fp8_dot4(w1, v4, v5, v6, v7, HARDWARE)
        y += _fp8_dot4(w2, v8, v9, v10, v11, HARDWARE) + _fp8_dot4(w3, v12, v13, v14, v15, HARDWARE)
        sums += factor * y
    return sums


@triton.jit
def _fp8_dot4(word, a, b, c, d, HARDWARE: tl.constexpr):
    """Products of a word's four weights with the float32 of these bits, summed."""
    e, f, g, h = e4m3_of_word(word, HARDWARE)
    y = e * a.to(tl.float32, bitcast=True)[None, :] + f * b.to(tl.float32, bitcast=True)[None, :]
    return y + (g * c.to(tl.float32, bitcast=True)[None, :] + h * d.to(tl.float32, bitcast=True)[None, :])


@triton.jit
def _linear(
    x, raw, scale, out, rows, row_bytes, scale_cols, x_stride, out_stride,
    COLS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, LINES: tl.constexpr,
    EARLY: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    if EARLY:
        ask_for_rows(raw, row, row_bytes, LINES)
        wait_for_inputs()
    y = _row_products(raw, scale, row, x + t * x_stride, row_bytes, scale_cols, COLS, TYPE, ROWS, WEIGHTS, HARDWARE)
    tl.store(out + t * out_stride + feature, tl.sum(y, 1), mask=feature < rows)


@triton.jit
def _gate_up(
    x, gate, gate_scale, up, up_scale, ids, out, rows, gate_bytes, up_bytes, scale_rows, scale_cols, x_stride,
    COLS: tl.constexpr, PER_ROW: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr, HARDWARE: tl.constexpr,
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
    g = _row_products(gate, gate_scale, row, x, gate_bytes, scale_cols, COLS, GATE, ROWS, WEIGHTS, HARDWARE)
    u = _row_products(up, up_scale, row, x, up_bytes, scale_cols, COLS, UP, ROWS, WEIGHTS, HARDWARE)
    tl.store(out + pair * rows + feature, silu(tl.sum(g, 1)) * tl.sum(u, 1), mask=feature < rows)


@triton.jit
def _down(
    hidden, raw, scale, ids, weights, out, rows, row_bytes, scale_rows, scale_cols,
    COLS: tl.constexpr, PER_ROW: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
    EARLY: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    if EARLY:
        wait_for_inputs()
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1).to(tl.int64)
    row = tl.minimum(feature, rows - 1).to(tl.int64)
    y = tl.zeros([ROWS, 1], tl.float32)  # wider with the first products
    for choice in tl.static_range(PER_ROW):
        pair = t * PER_ROW + choice
        expert = tl.load(ids + pair).to(tl.int64)
        part = raw + expert * rows * row_bytes
        part_scale = scale + expert * scale_rows * scale_cols
        x = hidden + pair * COLS
        products = _row_products(
            part, part_scale, row, x, row_bytes, scale_cols, COLS, TYPE, ROWS, WEIGHTS, HARDWARE
        )
        y = y + tl.load(weights + pair) * products
    tl.store(out + t * rows + feature, tl.sum(y, 1), mask=feature < rows)


def _sizes(w: Matrix) -> tuple[int, int, int]:
    """ROWS, WEIGHTS, num_warps."""
    if w.type == "F8_E4M3":
        return OF_FP8
    return OF_NUMBERS if w.type in ("F32", "F16", "BF16") else OF_BLOCKS


@cache
def _converts_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _lines(row_bytes: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(row_bytes, LINE_BYTES)))


def linear(x: Tensor, w: Matrix, out: Tensor) -> None:
    """out [T, rows] = x [T, cols] @ w^T; the last stride of both is 1."""
    if rounded_product.serves(w):
        return rounded_product.linear(x, w, out)
    rows, weights, num_warps = _sizes(w)
    rows = 1 if w.rows <= FEW_FEATURES else rows
    early = overlaps(x)
    x = aligned(x)
    _linear[(triton.cdiv(w.rows, rows), len(x))](
        x, w.raw, w.scale_or_raw, out, w.rows, w.row_bytes, w.scale_cols, x.stride(0), out.stride(0),
        COLS=w.cols, TYPE=w.type, ROWS=rows, WEIGHTS=weights, LINES=_lines(w.row_bytes), EARLY=early,
        HARDWARE=_converts_fp8(x.device), launch_pdl=early, num_warps=num_warps,
    )  # fmt: skip


@overload
def gate_up(x: Tensor, gate: Matrix, up: Matrix, ids: Tensor | None, dtype: torch.dtype) -> Tensor: ...
@overload
def gate_up(
    x: Tensor, gate: Matrix, up: Matrix, ids: Tensor | None, dtype: torch.dtype, meets: Matrix
) -> Tensor | RoundedRows: ...
def gate_up(
    x: Tensor, gate: Matrix, up: Matrix, ids: Tensor | None, dtype: torch.dtype, meets: Matrix | None = None
) -> Tensor | RoundedRows:
    """silu(gate x) * (up x): [T, rows], or with ids int32 [T, k] [T * k, rows] of the chosen experts.

    meets: the matrix that `down` multiplies the result by next, which may want it rounded.
    """
    per_row = 0 if ids is None else ids.shape[1]
    count = len(x) * max(per_row, 1)
    if rounded_product.serves(gate) and gate.type == up.type:
        if meets is not None and rounded_product.serves(meets):
            rounded = RoundedRows.empty(count, gate.rows, meets.type, x.device)
            rounded_product.gate_up(x, gate, up, ids, rounded)
            return rounded
        out = torch.empty(count, gate.rows, dtype=dtype, device=x.device)
        rounded_product.gate_up(x, gate, up, ids, out)
        return out
    out = torch.empty(count, gate.rows, dtype=dtype, device=x.device)
    rows, weights, num_warps = _sizes(gate)
    early = overlaps(x)
    x = aligned(x)
    _gate_up[(triton.cdiv(gate.rows, rows), len(out))](
        x, gate.raw, gate.scale_or_raw, up.raw, up.scale_or_raw, x if ids is None else ids, out, gate.rows,
        gate.row_bytes, up.row_bytes, gate.scale_rows, gate.scale_cols, x.stride(0),
        COLS=gate.cols, PER_ROW=per_row, GATE=gate.type, UP=up.type, ROWS=rows, WEIGHTS=weights,
        LINES=max(_lines(gate.row_bytes), _lines(up.row_bytes)), EARLY=early, HARDWARE=_converts_fp8(x.device),
        launch_pdl=early, num_warps=num_warps,
    )  # fmt: skip
    return out


def down(hidden: Tensor | RoundedRows, w: Matrix, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [T, rows] = sum over a row's choices of weights [T, k] times the chosen experts' w hidden [T * k, cols]."""
    if rounded_product.serves(w):
        return rounded_product.down(hidden, w, ids, weights, out)
    assert isinstance(hidden, Tensor), "only matrices that round get rounded rows"
    rows, weights_of_pass, num_warps = _sizes(w)
    early = overlaps(hidden)
    _down[(triton.cdiv(w.rows, rows), len(ids))](
        hidden, w.raw, w.scale_or_raw, ids, weights, out, w.rows, w.row_bytes, w.scale_rows, w.scale_cols,
        COLS=w.cols, PER_ROW=ids.shape[1], TYPE=w.type, ROWS=rows, WEIGHTS=weights_of_pass,
        EARLY=early, HARDWARE=_converts_fp8(hidden.device), launch_pdl=early, num_warps=num_warps,
    )  # fmt: skip
