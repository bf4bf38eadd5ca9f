"""Products of many rows: tiles on the matrix units. Experts of few rows decode their weights into the tile, of more into scratch
first; linear products multiply here in fp8 alone, since cuBLAS does the others from decoded weights.

Experts run as groups: the (row, expert) pairs sorted by expert, cut in tiles of one expert each. How many tiles there are
stays on the device; the grid is what there can be at most, and a program without a tile ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels import block_levels, rounded_product
from kvfold.kernels.block_levels import run_levels, run_words
from kvfold.kernels.block_weights import (
    COMPILED,
    iq4_of_word,
    k_scale,
    load_f16,
    load_word,
    number,
    to_e4m3,
    weight,
    whole,
)
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.overlap import overlaps, wait_for_inputs
from kvfold.kernels.rows import silu

Form = Literal["triton", "gluon"]

FEATURES = 64  # output features of a tile
DEPTH = 64  # weights of a row in one pass
FEW_ROWS, MANY_ROWS = 16, 128  # rows of a tile: matrix units want 16 at least
# Of products in fp8, whose passes are the 128 weights of a scale. Few rows: five passes under way, since the bytes bound them.
FP8_FEW = {"FEATURES": 64, "DEPTH": 128, "num_warps": 4, "num_stages": 5}
FP8_MANY = {"FEATURES": 128, "DEPTH": 128, "num_warps": 8, "num_stages": 3}
FP8_EXPERTS = {"FEATURES": 64, "DEPTH": 128, "num_warps": 8, "num_stages": 3}  # of many rows: two matrices at once
# Experts with more pairs than this, mean of all, have their weights decoded first. V2-Lite on an H200, all kernels of a prompt:
# 64 rows (6 pairs) of Q4_0 16.3 ms in tiles and 16.5 decoded first, of Q4_K 17.2 and 22.9; 128 rows 24.6 and 17.6, 29.7 and 24.3.
TILED_PAIRS = 8
# Up to so many pairs each is compared with all others: 384 of them took 19 us in torch.sort alone, and a dozen launches
# around it.
COUNTED_PAIRS = 2048


@triton.jit
def _weight_tile(raw, scale, row, col, rows, cols, row_bytes, scale_cols, TYPE: tl.constexpr, NUMBER: tl.constexpr):
    """[DEPTH, FEATURES] of the compute type: a tile of the transposed matrix. TYPE "PLAIN": it has that type already."""
    inside = (row < rows)[None, :] & (col < cols)[:, None]
    row = row[None, :].to(tl.int64)
    if TYPE == "PLAIN":
        return number(raw, row, col[:, None], inside, row_bytes, NUMBER)  # straight to shared memory
    else:
        return weight(raw, scale, row, col[:, None], inside, row_bytes, scale_cols, TYPE).to(NUMBER)


@triton.jit
def _experts(
    a, a_scale, a_stride, w0, scale0, w1, scale1, out, pairs, starts, tiles, rows, cols, bytes0, bytes1, scale_rows, scale_cols,
    first_expert, last_expert,
    PER_ROW: tl.constexpr, TWO: tl.constexpr, TYPE0: tl.constexpr, TYPE1: tl.constexpr, NUMBER: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[pair] = w0 a, or silu(w0 a) * (w1 a); the row of `a` is pair // PER_ROW."""
    tile = tl.program_id(1)
    expert = tl.load(tiles + tile * 2)
    if (expert < first_expert) | (expert >= last_expert):
        return
    m = tl.load(tiles + tile * 2 + 1) + tl.arange(0, ROWS)
    is_row = m < tl.load(starts + expert + 1)
    pair = tl.load(pairs + m, mask=is_row, other=0).to(tl.int64)
    part = (expert - first_expert).to(tl.int64)
    w0 += part * rows * bytes0
    w1 += part * rows * bytes1
    scale0 += part * scale_rows * scale_cols
    scale1 += part * scale_rows * scale_cols
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    y0 = tl.zeros([ROWS, FEATURES], tl.float32)
    y1 = tl.zeros([ROWS, FEATURES], tl.float32)
    a_row = a + (pair // PER_ROW)[:, None] * a_stride
    for first in range(0, cols, DEPTH):
        col = first + tl.arange(0, DEPTH)
        x = tl.load(a_row + col[None, :], mask=is_row[:, None] & (col < cols)[None, :], other=0.0).to(NUMBER)
        w = _weight_tile(w0, scale0, feature, col, rows, cols, bytes0, scale_cols, TYPE0, NUMBER)
        if tl.float8e4nv == NUMBER:
            at = feature // 128 * scale_cols + first // 128
            s = tl.load(a_scale + (pair // PER_ROW) * scale_cols + first // 128, mask=is_row, other=0.0)[:, None]
            y0 += s * tl.load(scale0 + at, mask=feature < rows, other=0.0)[None, :] * tl.dot(x, w)
        else:
            y0 = tl.dot(x, w, y0, input_precision="ieee")
        if TWO:
            w = _weight_tile(w1, scale1, feature, col, rows, cols, bytes1, scale_cols, TYPE1, NUMBER)
            if tl.float8e4nv == NUMBER:
                y1 += s * tl.load(scale1 + at, mask=feature < rows, other=0.0)[None, :] * tl.dot(x, w)
            else:
                y1 = tl.dot(x, w, y1, input_precision="ieee")
    if TWO:
        y0 = silu(y0) * y1
    inside = is_row[:, None] & (feature < rows)[None, :]
    tl.store(out + pair[:, None] * rows + feature[None, :], y0, mask=inside)


@triton.jit
def _linear(
    x, x_scale, raw, scale, out, out_stride, num_rows, rows, cols, scale_cols,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows and weights in F8_E4M3."""
    m = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    y = tl.zeros([ROWS, FEATURES], tl.float32)
    is_row = m < num_rows
    for first in range(0, cols, DEPTH):
        col = first + tl.arange(0, DEPTH)
        a = tl.load(x + m[:, None] * cols + col[None, :], mask=is_row[:, None] & (col < cols)[None, :], other=0.0)
        w = _weight_tile(raw, scale, feature, col, rows, cols, cols, scale_cols, "PLAIN", tl.float8e4nv)
        at = feature // 128 * scale_cols + first // 128
        s = tl.load(x_scale + m * scale_cols + first // 128, mask=is_row, other=0.0)[:, None]
        y += s * tl.load(scale + at, mask=feature < rows, other=0.0)[None, :] * tl.dot(a, w)
    inside = is_row[:, None] & (feature < rows)[None, :]
    tl.store(out + m[:, None] * out_stride + feature[None, :], y, mask=inside)


@triton.jit
def _round_rows(x, codes, scales, cols, x_stride, scale_cols, EARLY: tl.constexpr):
    """128 neighbours of x to F8_E4M3 and a scale, as quant/activations.py says."""
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(0).to(tl.int64)
    square = tl.program_id(1) * 8 + tl.arange(0, 8)
    col = square[:, None] * 128 + tl.arange(0, 128)[None, :]
    v = tl.load(x + t * x_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    largest = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # what is not finite is larger than all
    is_finite = largest < 0x7F800000
    is_used = is_finite & (largest >= 0x03800000)  # 2^-120
    most = tl.full([8], 448.0, tl.float32)
    size = tl.where(is_used, largest, 0x43E00000).to(tl.float32, bitcast=True)  # 448
    inverse = tl.div_rn(most, size)
    v = tl.where(is_used[:, None], v * inverse[:, None], 0.0)
    tl.store(codes + t * cols + col, to_e4m3(v), mask=col < cols)
    scale = tl.where(is_used, tl.div_rn(size, most), 0.0)
    scale = tl.where(is_finite, scale, float("nan"))
    tl.store(scales + t * scale_cols + square, scale, mask=square < scale_cols)


@triton.jit
def _decode(
    raw, scale, out, rows, cols, row_bytes, scale_rows, scale_cols,
    TYPE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * WEIGHTS + tl.arange(0, WEIGHTS)
    part = tl.program_id(2).to(tl.int64)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    raw += part * rows * row_bytes
    scale += part * scale_rows * scale_cols
    w = weight(raw, scale, row[:, None].to(tl.int64), col[None, :], inside, row_bytes, scale_cols, TYPE)
    tl.store(out + (part * rows + row[:, None]) * cols + col[None, :], w, mask=inside)


@triton.jit
def _store4(out, a, b, c, d, inside):
    """Four neighbours at `out` (a multiple of four numbers), of its type. Stores of assembly stay with the thread that has
    the word, so that neighbours in a warp write neighbours in memory."""
    if COMPILED and out.dtype.element_ty == tl.bfloat16:
        tl.inline_asm_elementwise(
            """{
            .reg .b32 p, q;
            .reg .pred inside;
            setp.ne.s32 inside, $6, 0;
            cvt.rn.bf16x2.f32 p, $3, $2;
            cvt.rn.bf16x2.f32 q, $5, $4;
            @inside st.global.v2.b32 [$1], {p, q};
            mov.b32 $0, 0;
            }""",
            "=r,l,f,f,f,f,r", [out.to(tl.int64), a, b, c, d, inside.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(out, a, mask=inside)
        tl.store(out + 1, b, mask=inside)
        tl.store(out + 2, c, mask=inside)
        tl.store(out + 3, d, mask=inside)


@triton.jit
def _nibble(word, AT: tl.constexpr):
    return whole((word >> (4 * AT)) & 15)


@triton.jit
def _decode_words(
    raw, out, rows, cols, row_bytes,
    TYPE: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The types of rounded_product.OF_WORDS, a word of codes a thread: a byte has low and high bits of two runs."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    i = (tl.program_id(1) * WORDS + tl.arange(0, WORDS))[None, :]
    inside = (row < rows) & (i < (cols // 4 if TYPE == "Q8_0" else cols // 8))
    row, i = tl.where(inside, row, 0), tl.where(inside, i, 0)
    start = raw.to(tl.int64) + row * row_bytes
    out += row * cols
    if TYPE == "Q8_0":
        word = load_word(start + i * 4, ALIGN)
        d = load_f16(start + cols + i // 8 * 2)
        a, b, c = (word << 24) >> 24, (word << 16) >> 24, (word << 8) >> 24
        _store4(
            out + i * 4, d * a.to(tl.float32), d * b.to(tl.float32), d * c.to(tl.float32),
            d * (word >> 24).to(tl.float32), inside,
        )  # fmt: skip
    elif TYPE == "Q4_0" or TYPE == "IQ4_NL":  # noqa: PLR1714
        word = load_word(start + i * 4, ALIGN)
        d = load_f16(start + cols // 2 + i // 4 * 2)
        if TYPE == "IQ4_NL":
            a0, b0, a1, b1 = iq4_of_word(word)
            a2, b2, a3, b3 = iq4_of_word(word >> 16)
        else:
            a0, a1, a2, a3 = (
                _nibble(word, 0) - 8.0,
                _nibble(word, 2) - 8.0,
                _nibble(word, 4) - 8.0,
                _nibble(word, 6) - 8.0,
            )
            b0, b1, b2, b3 = (
                _nibble(word, 1) - 8.0,
                _nibble(word, 3) - 8.0,
                _nibble(word, 5) - 8.0,
                _nibble(word, 7) - 8.0,
            )
        out += i // 4 * 32 + i % 4 * 4
        _store4(out, d * a0, d * a1, d * a2, d * a3, inside)
        _store4(out + 16, d * b0, d * b1, d * b2, d * b3, inside)
    elif TYPE == "Q4_K":
        start += i // 32 * 144
        word = load_word(start + 16 + i % 32 * 4, 4)
        both = load_word(start, 4)
        d = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        m = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        s0, m0 = k_scale(start.to(tl.pointer_type(tl.uint8), bitcast=True), 4, i % 32 // 8 * 2, inside)
        s1, m1 = k_scale(start.to(tl.pointer_type(tl.uint8), bitcast=True), 4, i % 32 // 8 * 2 + 1, inside)
        s0, m0, s1, m1 = d * s0, m * m0, d * s1, m * m1
        out += i // 8 * 64 + i % 8 * 4
        _store4(
            out, s0 * _nibble(word, 0) - m0, s0 * _nibble(word, 2) - m0, s0 * _nibble(word, 4) - m0,
            s0 * _nibble(word, 6) - m0, inside,
        )  # fmt: skip
        _store4(
            out + 32, s1 * _nibble(word, 1) - m1, s1 * _nibble(word, 3) - m1, s1 * _nibble(word, 5) - m1,
            s1 * _nibble(word, 7) - m1, inside,
        )  # fmt: skip
    else:
        tl.static_assert(TYPE == "Q6_K", "a type of rounded_product.OF_WORDS")
        half, plane = i // 16, i % 16 // 8
        word = load_word(start + i * 4, ALIGN)
        top = load_word(start + cols // 2 + half * 32 + i % 8 * 4, ALIGN) >> (plane * 2)
        d = load_f16(start + cols // 256 * 208 + half // 2 * 2)
        level = start.to(tl.pointer_type(tl.int8), bitcast=True) + cols // 4 * 3 + half * 8 + plane * 2 + i % 8 // 4
        low = d * tl.load(level).to(tl.float32)
        high = d * tl.load(level + 4).to(tl.float32)
        out += half * 128 + plane * 32 + i % 8 * 4
        q = (word & 0x0F0F0F0F) | ((top << 4) & 0x30303030)
        _store4(out, low * _level(q, 0), low * _level(q, 1), low * _level(q, 2), low * _level(q, 3), inside)
        q = ((word >> 4) & 0x0F0F0F0F) | (top & 0x30303030)
        _store4(
            out + 64, high * _level(q, 0), high * _level(q, 1), high * _level(q, 2), high * _level(q, 3), inside
        )


@triton.jit
def _decode_runs(
    raw, codebook, out, rows,
    COLS: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """The types of block_levels.TYPES, a run of 32 weights a thread."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    b = (tl.program_id(1) * RUNS + tl.arange(0, RUNS))[None, :]
    inside = (row < rows) & (b < COLS // 32)
    row, b = tl.where(inside, row, 0), tl.where(inside, b, 0)
    words = run_words(raw.to(tl.int64) + row * ROW_BYTES, b, COLS, ROW_BYTES, TYPE)
    w0, w1, w2, w3, w4, w5, w6, w7, first, last, less_first, less_last = run_levels(words, b, codebook, TYPE)
    out += row * COLS + b * 32
    _store_levels(out, w0, w1, first, less_first, inside)
    _store_levels(out + 8, w2, w3, first, less_first, inside)
    _store_levels(out + 16, w4, w5, last, less_last, inside)
    _store_levels(out + 24, w6, w7, last, less_last, inside)


@triton.jit
def _store_levels(out, near, far, factor, less, inside):
    """The eight signed bytes of two words times factor, less so much, neighbours at `out` (a multiple of eight numbers), of its type."""
    a, b, c, d = _of_bytes(near, factor, less)
    e, f, g, h = _of_bytes(far, factor, less)
    if COMPILED and out.dtype.element_ty == tl.bfloat16:
        tl.inline_asm_elementwise(
            """{
            .reg .b32 p, q, r, s;
            .reg .pred inside;
            setp.ne.s32 inside, $10, 0;
            cvt.rn.bf16x2.f32 p, $3, $2;
            cvt.rn.bf16x2.f32 q, $5, $4;
            cvt.rn.bf16x2.f32 r, $7, $6;
            cvt.rn.bf16x2.f32 s, $9, $8;
            @inside st.global.v4.b32 [$1], {p, q, r, s};
            mov.b32 $0, 0;
            }""",
            "=r,l,f,f,f,f,f,f,f,f,r", [out.to(tl.int64), a, b, c, d, e, f, g, h, inside.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        _store4(out, a, b, c, d, inside)
        _store4(out + 4, e, f, g, h, inside)


@triton.jit
def _of_bytes(word, factor, less):
    """The four signed bytes of a word times factor, less so much, float32."""
    a, b = factor * ((word << 24) >> 24).to(tl.float32), factor * ((word << 16) >> 24).to(tl.float32)
    c, d = factor * ((word << 8) >> 24).to(tl.float32), factor * (word >> 24).to(tl.float32)
    return a - less, b - less, c - less, d - less


@triton.jit
def _level(q, PLACE: tl.constexpr):
    return whole((q >> (8 * PLACE)) & 63) - 32.0


@triton.jit
def _embed(ids, raw, scale, out, cols, row_bytes, scale_cols, TYPE: tl.constexpr, WEIGHTS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WEIGHTS + tl.arange(0, WEIGHTS)
    row = tl.load(ids + t).to(tl.int64)
    w = weight(raw, scale, row, col, col < cols, row_bytes, scale_cols, TYPE)
    tl.store(out + t * cols + col, w, mask=col < cols)


@triton.jit
def _weighted_sum(y, weights, out, cols, PER_ROW: tl.constexpr, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for choice in range(PER_ROW):
        pair = t * PER_ROW + choice
        part = tl.load(y + pair * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * part
    tl.store(out + t * cols + col, total, mask=col < cols)


_NUMBERS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def _type(w: Matrix, dtype: torch.dtype) -> str:
    return "PLAIN" if w.is_plain(dtype) else w.type


def rounds(w: Matrix) -> bool:
    """Whether rows that meet w are rounded to F8_E4M3 and both multiplied in it, scales applied once per 128 weights."""
    return w.rounds and w.type == "F8_E4M3"


def _rounded(x: Tensor, w: Matrix) -> tuple[Tensor, Tensor]:
    """(rows, their scales) as the product with w takes them: x itself where it does not round."""
    if not rounds(w):
        return x, x
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), w.scale_cols, device=x.device)
    early = overlaps(x)
    _round_rows[(len(x), triton.cdiv(w.scale_cols, 8))](
        x, codes, scales, w.cols, x.stride(0), w.scale_cols, EARLY=early, launch_pdl=early
    )
    return codes, scales


def _rows_of_tile(rows: int) -> int:
    return FEW_ROWS if rows <= FEW_ROWS else min(MANY_ROWS, triton.next_power_of_2(rows))


def linear(x: Tensor, w: Matrix, out: Tensor) -> None:
    """out [T, rows] = x [T, cols] @ w^T with a matrix that `rounds`."""
    rows = _rows_of_tile(len(x))
    codes, x_scale = _rounded(x, w)
    sizes = _sizes(codes, rows, FP8_MANY)
    _linear[(triton.cdiv(w.rows, sizes["FEATURES"]), triton.cdiv(len(x), rows))](
        codes, x_scale, w.raw, w.scale_or_raw, out, out.stride(0), len(x), w.rows, w.cols, w.scale_cols,
        ROWS=rows, **sizes,
    )  # fmt: skip


def decode(w: Matrix, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    """[parts * rows, cols], every weight rounded once to dtype, at the start of scratch (uint8) where that is large enough."""
    shape = w.parts * w.rows, w.cols
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if scratch is not None and len(scratch) >= nbytes:
        out = scratch[:nbytes].view(dtype).view(shape)
    else:
        out = torch.empty(shape, dtype=dtype, device=w.raw.device)
    if w.type in block_levels.TYPES:
        _decode_runs[(triton.cdiv(len(out), 4), triton.cdiv(w.cols // 32, 64))](
            w.raw, w.scale_or_raw, out, len(out), COLS=w.cols, ROW_BYTES=w.row_bytes, TYPE=w.type, ROWS=4, RUNS=64
        )
        return out
    if w.type in rounded_product.OF_WORDS:
        _decode_words[(triton.cdiv(len(out), 4), triton.cdiv(w.cols, 1024 if w.type == "Q8_0" else 2048))](
            w.raw, out, len(out), w.cols, w.row_bytes,
            TYPE=w.type, ALIGN=2 if w.row_bytes % 4 else 4, ROWS=4, WORDS=256,
        )  # fmt: skip
        return out
    rows, weights = 8, 256
    _decode[(triton.cdiv(w.rows, rows), triton.cdiv(w.cols, weights), w.parts)](
        w.raw, w.scale_or_raw, out, w.rows, w.cols, w.row_bytes, w.scale_rows, w.scale_cols,
        TYPE=w.type, ROWS=rows, WEIGHTS=weights,
    )  # fmt: skip
    return out


def embed(ids: Tensor, w: Matrix) -> Tensor:
    """Rows `ids` int32 [T] of the table: float32 [T, cols]."""
    out = torch.empty(len(ids), w.cols, dtype=torch.float32, device=ids.device)
    _embed[(len(ids), triton.cdiv(w.cols, 1024))](
        ids, w.raw, w.scale_or_raw, out, w.cols, w.row_bytes, w.scale_cols, TYPE=w.type, WEIGHTS=1024
    )
    return out


@triton.jit
def _place_pairs(ids, pairs, starts, num_pairs, num_experts, BLOCK: tl.constexpr):
    """pairs: each at (pairs of lower experts) + (earlier pairs of its own). starts: pairs of lower experts."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(ids + p, mask=p < num_pairs, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    start = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_pairs, BLOCK):
        q = first + tl.arange(0, BLOCK)
        other = tl.load(ids + q, mask=q < num_pairs, other=num_experts)
        is_before = (other[None, :] < mine[:, None]) | (
            (other[None, :] == mine[:, None]) & (q[None, :] < p[:, None])
        )
        place += tl.sum(is_before.to(tl.int32), 1)
        start += tl.sum((other[None, :] < p[:, None]).to(tl.int32), 1)
    tl.store(pairs + place, p, mask=p < num_pairs)
    tl.store(starts + p, start, mask=p <= num_experts)


@triton.jit
def _cut_tiles(starts, tiles, num_experts, num_tiles, rows, EXPERTS: tl.constexpr, TILES: tl.constexpr):
    e = tl.arange(0, EXPERTS)
    is_expert = e < num_experts
    start = tl.load(starts + e, mask=is_expert, other=0)
    count = tl.load(starts + e + 1, mask=is_expert, other=0) - start
    its_tiles = (count + rows - 1) // rows
    stop = tl.cumsum(its_tiles, 0)  # tiles up to and with this expert's
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.sum(((stop[None, :] <= tile[:, None]) & is_expert[None, :]).to(tl.int32), 1)
    is_its = e[None, :] == expert[:, None]
    first = start[None, :] + (tile[:, None] - (stop - its_tiles)[None, :]) * rows
    tl.store(tiles + tile * 2, expert, mask=tile < num_tiles)
    tl.store(tiles + tile * 2 + 1, tl.sum(tl.where(is_its, first, 0), 1), mask=tile < num_tiles)


@dataclass(frozen=True, eq=False)
class Groups:
    """(row, choice) pairs by expert.

    pairs:  int32 [P]        pair numbers, row * k + choice, sorted by expert
    starts: int32 [E + 1]    the pairs of expert e are pairs[starts[e] : starts[e + 1]]
    tiles:  int32 [N, 2]     (expert, first place in pairs) of every tile; (E, ..) where there is none
    rows:   pairs of a tile
    """

    pairs: Tensor
    starts: Tensor
    tiles: Tensor
    rows: int


def group_by_expert(ids: Tensor, num_experts: int, rows: int) -> Groups:
    """ids int32 [T, k], in tiles of so many rows. Nothing of it comes to the host."""
    num_pairs = ids.numel()
    most = num_pairs // rows + min(num_experts, num_pairs)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    if num_pairs <= COUNTED_PAIRS:
        pairs = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
        block = 64
        _place_pairs[(triton.cdiv(max(num_pairs, num_experts + 1), block),)](
            ids, pairs, starts, num_pairs, num_experts, BLOCK=block
        )
    else:
        experts, order = ids.flatten().sort(stable=True)
        pairs = order.to(torch.int32)
        numbers = torch.arange(num_experts + 1, dtype=experts.dtype, device=ids.device)
        torch.searchsorted(experts, numbers, out_int32=True, out=starts)
    tiles = torch.empty(most, 2, dtype=torch.int32, device=ids.device)
    _cut_tiles[(triton.cdiv(most, 64),)](
        starts, tiles, num_experts, most, rows, EXPERTS=triton.next_power_of_2(num_experts), TILES=64
    )
    return Groups(pairs, starts, tiles, rows)


def _sizes(x: Tensor, rows: int, many: dict[str, int]) -> dict[str, int]:
    """Of tiles of so many rows of x; many: of more than 64 rows in fp8."""
    if x.dtype != torch.float8_e4m3fn:
        return {"FEATURES": FEATURES, "DEPTH": DEPTH}
    return FP8_FEW if rows <= 64 else many


def _run_experts(
    a: Tensor, per_row: int, w: Matrix, other: Matrix | None, groups: Groups, out: Tensor, first: int, last: int
) -> None:
    second = w if other is None else other
    a, a_scale = _rounded(a, w)
    sizes = _sizes(a, groups.rows, FP8_EXPERTS)
    _experts[(triton.cdiv(w.rows, sizes["FEATURES"]), len(groups.tiles))](
        a, a_scale, a.stride(0), w.raw, w.scale_or_raw, second.raw, second.scale_or_raw, out, groups.pairs, groups.starts,
        groups.tiles, w.rows, w.cols, w.row_bytes, second.row_bytes, w.scale_rows, w.scale_cols, first, last,
        PER_ROW=per_row, TWO=other is not None, TYPE0=_type(w, a.dtype), TYPE1=_type(second, a.dtype), NUMBER=_NUMBERS[a.dtype],
        ROWS=groups.rows, **sizes,
    )  # fmt: skip


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    out: Tensor,
    scratch: Tensor | None,
    form: Form | None = None,
) -> None:
    """out [T, rows of down] = sum of weights [T, k] times down(silu(gate x) * up x) over the experts ids int32 [T, k].

    Weights that are not of x's type are decoded in the tiles while an expert has few rows, else beforehand, as many
    experts at a time as fit scratch (uint8), one at least; without scratch always in the tiles. On Hopper blocks become
    numbers in the tiles of any number of rows (tile_product_gluon.py). form forces one of the two.
    """
    if form is None:
        form = "gluon" if _gluon_serves(x, gate, up, down) else "triton"
    if form == "gluon":
        from kvfold.kernels import tile_product_gluon  # names of Triton's experimental room, which move

        rows = tile_product_gluon.rows_of_tile(ids.numel(), gate.parts)
        groups = group_by_expert(ids, gate.parts, rows)
        y = torch.empty(ids.numel(), down.rows, dtype=x.dtype, device=x.device)
        tile_product_gluon.experts(x, ids.shape[1], gate, up, down, groups, y)
        _add_choices(y, weights, out)
        return
    groups = group_by_expert(ids, gate.parts, _rows_of_tile(max(1, ids.numel() // gate.parts)))
    hidden = torch.empty(ids.numel(), gate.rows, dtype=x.dtype, device=x.device)
    y = torch.empty(ids.numel(), down.rows, dtype=x.dtype, device=x.device)
    place = scratch if ids.numel() > TILED_PAIRS * gate.parts else None
    for first, last, (w_gate, w_up) in _numbers_of([gate, up], x.dtype, place):
        _run_experts(x, ids.shape[1], w_gate, w_up, groups, hidden, first, last)
    for first, last, (w_down,) in _numbers_of([down], x.dtype, place):
        _run_experts(hidden, 1, w_down, None, groups, y, first, last)
    _add_choices(y, weights, out)


def _add_choices(y: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [T, cols] = sum of weights [T, k] times rows of y [T * k, cols]."""
    _weighted_sum[(len(out), triton.cdiv(out.shape[1], 1024))](
        y, weights, out, out.shape[1], PER_ROW=weights.shape[1], WIDTH=1024
    )


# Blocks that tile_product_gluon.py decodes.
GLUON_TYPES = frozenset(["Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _gluon_serves(x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> bool:
    matrices = (gate, up, down)
    return (
        _is_hopper(x.device)
        and x.dtype == torch.bfloat16
        and gate.type == up.type
        and all(w.type in GLUON_TYPES and w.cols % 128 == 0 for w in matrices)
        and all(w.row_bytes % 16 == 0 and w.raw.data_ptr() % 16 == 0 for w in matrices)
    )


def _numbers_of(
    weights: list[Matrix], dtype: torch.dtype, scratch: Tensor | None
) -> Iterator[tuple[int, int, list[Matrix]]]:
    """(first part, one behind the last, these of all weights in numbers of dtype), as many as fit scratch (one at least);
    as they are, and all, without it."""
    parts = weights[0].parts
    each = dtype.itemsize * sum(w.rows * w.cols for w in weights if not multiplies_as_it_is(w, dtype))
    if scratch is None or each == 0:
        yield 0, parts, weights
        return
    size = max(1, len(scratch) // each)
    for first in range(0, parts, size):
        last = min(first + size, parts)
        numbers, free = [], scratch
        for w in weights:
            numbers.append(_plain(w.part(first, last), dtype, free))
            if not multiplies_as_it_is(w, dtype):
                free = free[(last - first) * w.rows * w.cols * dtype.itemsize :]
        yield first, last, numbers


def multiplies_as_it_is(w: Matrix, dtype: torch.dtype) -> bool:
    """Whether products with rows of this type decode nothing beforehand."""
    return w.is_plain(dtype) or rounds(w)


def _plain(w: Matrix, dtype: torch.dtype, scratch: Tensor) -> Matrix:
    """The same matrix in numbers of this type, if it has to be."""
    if multiplies_as_it_is(w, dtype):
        return w
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    return Matrix(name, w.rows, w.cols, decode(w, dtype, scratch).view(torch.uint8), None, w.parts)
