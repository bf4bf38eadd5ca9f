"""Products of a few rows, rounded to 8 bits, with matrices in blocks: four multiply-adds an instruction.

The rounding is quant/activations.py's: 32 neighbours of x share a scale. Sums inside a block of 32 are exact in whole
numbers; a weight costs 2 to 3.5 instructions, all included, where decoding it to float32 takes 8. A thread holds whole
blocks and rounds its part of x itself, once for all rows of its program, so no launch and no barrier comes before the
product.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels import block_levels
from kvfold.kernels.block_levels import run_levels, run_words
from kvfold.kernels.block_weights import COMPILED, e2m1, load4, load_f16, load_word, mxfp4_scale
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.memory_split import prefers_shared
from kvfold.kernels.number_product import Norm, Routed, one_over_rms
from kvfold.kernels.overlap import let_next_start, overlaps, wait_for_inputs
from kvfold.kernels.rounding import SHARED_PERCENT, RoundedRows, code, codes4, mixed_place, scale_of
from kvfold.kernels.rows import silu

GATE_UP = (16, 4)
DOWN = (4, 4, 128)
# Parts of a row in one pass of `down`: a warp's lanes.
LANES = 32


class Sizes(NamedTuple):
    """How products with matrices of a type are cut.

    each:       weights that a thread holds of a row. Q4_K: low and high nibbles of 32 bytes. Q6_K: half a block.
    most_parts: such parts of a row in one pass; with LANES of them a warp has rows of its own, whose sums cross no warps
    linear:     rows of a program, its warps. A step of V2-Lite takes 1150 us in Q4_K with one warp of 8 rows and 1173 with
                two of 16, 1118 in IQ4_NL with two of 8 and 1138 with four of 16.
    gate_up:    of 32 rows: warps, registers of a thread where the compiler would take so many that fewer programs fit, and
                shares of the rows that a program takes one after another, so that fewer weights are held. Q4_K in two shares
                holds the weights of gate and up together in 80 registers: V2-Lite's 352 programs run at once, a step of
                1170 us takes 1127.
    ahead:      of `down`: passes whose weights are asked for at once, and those whose hidden numbers are: so many that 128
                registers suffice
    is_apart:   gate and up are read one after the other. IQ4_NL: with 80 registers three programs fit a multiprocessor and
                V2-Lite's 352 run at once; two leave 88 for a second turn.
    """

    each: int
    most_parts: int
    linear: tuple[int, int]
    gate_up: tuple[int, int | None, int]
    ahead: tuple[int, int]
    is_apart: bool = False


_RUNS = Sizes(32, LANES, (16, 4), (8, None, 4), (3, 1))  # a thread makes levels of runs of 32
SIZES = dict.fromkeys(block_levels.TYPES, _RUNS) | {
    "MXFP4": Sizes(32, 64, (16, 4), (8, 80, 1), (9, 3), is_apart=True),
    "Q3_K": _RUNS._replace(ahead=(2, 1)),
    "Q5_K": _RUNS._replace(ahead=(2, 1)),
    "Q4_0": Sizes(32, 64, (16, 2), (8, 128, 1), (9, 3)),
    "IQ4_NL": Sizes(32, 64, (8, 2), (8, 80, 1), (9, 3), is_apart=True),
    "Q8_0": Sizes(32, 64, (16, 2), (8, None, 1), (5, 2)),
    "Q4_K": Sizes(64, 32, (8, 1), (8, 80, 2), (4, 1)),
    "Q6_K": Sizes(128, 16, (16, 2), (8, None, 1), (2, 1)),
}
TYPES = frozenset(SIZES)
OF_WORDS = TYPES - block_levels.TYPES


@triton.jit
def _byte(word, PLACE: tl.constexpr):
    """A signed byte of a word."""
    return (word << (24 - 8 * PLACE)) >> 24


@triton.jit
def _dot4(a, b, c):
    """c plus the products of four signed bytes."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        shift = 24 - 8 * tl.arange(0, 4)  # all four at once: operations are what the interpreter takes its time for
        x = (tl.expand_dims(a, -1) << shift) >> 24
        y = (tl.expand_dims(b, -1) << shift) >> 24
        return c + tl.sum(x * y, -1)


@triton.jit
def _high_dot4(a, b, c):
    """c plus 16 times the products of the upper nibbles of four bytes with four signed bytes."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b32 n; and.b32 n, $1, 0xF0F0F0F0; dp4a.u32.s32 $0, n, $2, $3;}",
            "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return c + 16 * _dot4((a >> 4) & 0x0F0F0F0F, b, 0 * c)


@triton.jit
def _level(q, TYPE: tl.constexpr):
    if TYPE == "MXFP4":
        return e2m1(q).to(tl.int32)
    low = tl.where(q < 4, 0x3E2C1700, 0x75695C4E)
    high = tl.where(q < 12, -0x5A677380, -0xF273B4C)
    return ((tl.where(q < 8, low, high) >> ((q & 3) * 8)) & 255) - 127


@triton.constexpr_function
def _dot8_ptx(type: str) -> str:
    """Of `_codebook_dot8`. The upper four levels of each half of the codebook are constants."""
    lower, upper = ("0x0D090705", "0xF4F8FAFC") if type == "MXFP4" else ("0xF6EADDCF", "0x725A4636")
    return f"""{{
            .reg .b32 v, s, a, b;
            xor.b32 v, $1, 0x88888888;
            prmt.b32 a, $5, {lower}, $1;
            prmt.b32 b, $6, {upper}, v;
            dp4a.s32.s32 $0, a, $2, $4;
            dp4a.s32.s32 $0, b, $2, $0;
            shr.u32 s, $1, 16;
            shr.u32 v, v, 16;
            prmt.b32 a, $5, {lower}, s;
            prmt.b32 b, $6, {upper}, v;
            dp4a.s32.s32 $0, a, $3, $0;
            dp4a.s32.s32 $0, b, $3, $0;
            }}"""


@triton.constexpr_function
def _tables_ptx(type: str) -> str:
    low, high = ("0x04030200", "0xFDFEFF00") if type == "MXFP4" else ("0xBFAD9881", "0x271A0E02")
    return f"or.b32 $0, $2, {low}; or.b32 $1, $2, {high};"


@triton.jit
def _codebook_dot8(word, near, far, c, low, high, TYPE: tl.constexpr):
    """c plus the products of eight levels with codes in the order of their nibbles.

    A byte permutation looks four nibbles up in eight levels; a nibble of 8 or more gets the sign of a level instead: -1
    from the lower half of the codebook, whose levels are negative, 0 from the upper half, looked up with bit 3 turned.
    So the upper half holds 1 more than its levels, and both go into the sum. low, high: of `_tables`. The codebook of
    MXFP4 has its halves the other way round, and twice a 0: of these none is 1 more.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            _dot8_ptx(TYPE), "=&r,r,r,r,r,r,r", [word, near, far, c, low, high],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for i in tl.static_range(4):
            c += _level((word >> (4 * i)) & 15, TYPE) * _byte(near, i)
            c += _level((word >> (16 + 4 * i)) & 15, TYPE) * _byte(far, i)
        return c


@triton.jit
def _zero(word):
    """0, which the compiler does not know before `word` is there."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1; shr.u32 $0, $0, 6;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return 0 * word


@triton.jit
def _tables(b, TYPE: tl.constexpr):
    """The lower four levels of each half of the codebook, per thread: as constants each use would move them anew."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            _tables_ptx(TYPE), "=&r,=r,r", [_zero(b)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        return b, b


@triton.jit
def numbers16(x, norm, at, NORM: tl.constexpr):
    """Sixteen neighbours of x (times norm) from number `at` on as the bits of float32, and the bits of the largest size.

    As whole numbers the bits of sizes order like the sizes, and what is not finite comes last.
    """
    address = (x + at).to(tl.int64)
    if x.dtype.element_ty == tl.bfloat16:
        a, b, c, d = load4(address, 16)
        e, f, g, h = load4(address + 16, 16)
        v0, v1, v2, v3 = a << 16, a & -65536, b << 16, b & -65536
        v4, v5, v6, v7 = c << 16, c & -65536, d << 16, d & -65536
        v8, v9, v10, v11 = e << 16, e & -65536, f << 16, f & -65536
        v12, v13, v14, v15 = g << 16, g & -65536, h << 16, h & -65536
        if not NORM:
            most = _larger(_larger(_larger(a, b), _larger(c, d)), _larger(_larger(e, f), _larger(g, h)))
            most = tl.maximum(most << 16, most & 0x7FFF0000)
    else:
        v0, v1, v2, v3 = load4(address, 16)
        v4, v5, v6, v7 = load4(address + 16, 16)
        v8, v9, v10, v11 = load4(address + 32, 16)
        v12, v13, v14, v15 = load4(address + 48, 16)
    if NORM:
        by = (norm + at).to(tl.int64)
        v0, v1, v2, v3 = _times4(v0, v1, v2, v3, by)
        v4, v5, v6, v7 = _times4(v4, v5, v6, v7, by + 16)
        v8, v9, v10, v11 = _times4(v8, v9, v10, v11, by + 32)
        v12, v13, v14, v15 = _times4(v12, v13, v14, v15, by + 48)
    if NORM or x.dtype.element_ty != tl.bfloat16:
        most = tl.maximum(
            tl.maximum(_most(v0, v1, v2, v3), _most(v4, v5, v6, v7)),
            tl.maximum(_most(v8, v9, v10, v11), _most(v12, v13, v14, v15)),
        )
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, most


@triton.jit
def _times4(a, b, c, d, address):
    """The bits of four numbers times those of float32 at `address`."""
    e, f, g, h = load4(address, 16)
    return _times_bits(a, e), _times_bits(b, f), _times_bits(c, g), _times_bits(d, h)


@triton.jit
def _times_bits(a, b):
    return (a.to(tl.float32, bitcast=True) * b.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def _larger(a, b):
    """The larger sizes of two pairs of bfloat16; what is NaN stays so."""
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a & 0x7FFF7FFF, b & 0x7FFF7FFF],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _most(a, b, c, d):
    """The largest size of four numbers, as bits."""
    return tl.maximum(tl.maximum(a & 0x7FFFFFFF, b & 0x7FFFFFFF), tl.maximum(c & 0x7FFFFFFF, d & 0x7FFFFFFF))


@triton.jit
def _rounded(x, norm, at, inside, MIXED: tl.constexpr, NORM: tl.constexpr):
    """The block of 32 numbers from x + at on (times norm + at): eight words of codes, and the scale (0 where not inside).

    MIXED: a word has the numbers j, j + 16, j + 1, j + 17, the order of nibbles in two bytes.
    """
    at = tl.where(inside, at, 0)
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, near = numbers16(x, norm, at, NORM)
    e0, e1, e2, e3, f0, f1, f2, f3, g0, g1, g2, g3, h0, h1, h2, h3, far = numbers16(x, norm, at + 16, NORM)
    inverse, scale = scale_of(tl.maximum(near, far))
    scale = tl.where(inside, scale, 0.0)
    if MIXED:
        return (
            _word(a0, e0, a1, e1, inverse), _word(a2, e2, a3, e3, inverse),
            _word(b0, f0, b1, f1, inverse), _word(b2, f2, b3, f3, inverse),
            _word(c0, g0, c1, g1, inverse), _word(c2, g2, c3, g3, inverse),
            _word(d0, h0, d1, h1, inverse), _word(d2, h2, d3, h3, inverse), scale,
        )  # fmt: skip
    else:
        return (
            _word(a0, a1, a2, a3, inverse), _word(b0, b1, b2, b3, inverse),
            _word(c0, c1, c2, c3, inverse), _word(d0, d1, d2, d3, inverse),
            _word(e0, e1, e2, e3, inverse), _word(f0, f1, f2, f3, inverse),
            _word(g0, g1, g2, g3, inverse), _word(h0, h1, h2, h3, inverse), scale,
        )  # fmt: skip


@triton.jit
def _word(a, b, c, d, inverse):
    return codes4(
        a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True), c.to(tl.float32, bitcast=True),
        d.to(tl.float32, bitcast=True), inverse,
    )  # fmt: skip


@triton.jit
def _sum4(p0, p1, p2, p3):
    """The sum of 16 codes, float32."""
    ones = tl.full(p0.shape, 0x01010101, tl.int32)
    return _dot4(p3, ones, _dot4(p2, ones, _dot4(p1, ones, _dot4(p0, ones, 0 * p0)))).to(tl.float32)


@triton.jit
def _sum8(p0, p1, p2, p3, p4, p5, p6, p7):
    """The sum of 32 codes, float32."""
    ones = tl.full(p0.shape, 0x01010101, tl.int32)
    near = _dot4(p3, ones, _dot4(p2, ones, _dot4(p1, ones, _dot4(p0, ones, 0 * p0))))
    return _dot4(p7, ones, _dot4(p6, ones, _dot4(p5, ones, _dot4(p4, ones, near)))).to(tl.float32)


@triton.jit
def _weights(start, b, COLS: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr):
    """Words and scales of parts `b` int32 [1, B] of the rows at `start` int64 [R, 1]: tensors [R, B]."""
    if TYPE == "Q4_0" or TYPE == "IQ4_NL":  # noqa: PLR1714
        w0, w1, w2, w3 = load4(start + b * 16, ROW_BYTES)
        return w0, w1, w2, w3, load_f16(start + COLS // 2 + b * 2)
    elif TYPE == "MXFP4":
        return run_words(start, b, COLS, ROW_BYTES, TYPE)
    elif TYPE == "Q8_0":
        w0, w1, w2, w3 = load4(start + b * 32, ROW_BYTES)
        w4, w5, w6, w7 = load4(start + b * 32 + 16, ROW_BYTES)
        return w0, w1, w2, w3, w4, w5, w6, w7, load_f16(start + COLS + b * 2)
    elif TYPE == "Q4_K":
        block = start + b // 4 * 144
        d, s0, s1, s2 = load4(block, 16)
        w0, w1, w2, w3 = load4(block + 16 + b % 4 * 32, 16)
        w4, w5, w6, w7 = load4(block + 32 + b % 4 * 32, 16)
        return w0, w1, w2, w3, w4, w5, w6, w7, d, s0, s1, s2
    elif TYPE == "Q6_K":
        near = start + b * 64
        a0, a1, a2, a3 = load4(near, ROW_BYTES)
        b0, b1, b2, b3 = load4(near + 16, ROW_BYTES)
        c0, c1, c2, c3 = load4(near + 32, ROW_BYTES)
        d0, d1, d2, d3 = load4(near + 48, ROW_BYTES)
        top = start + COLS // 2 + b * 32
        e0, e1, e2, e3 = load4(top, ROW_BYTES)
        f0, f1, f2, f3 = load4(top + 16, ROW_BYTES)
        levels = start + COLS // 4 * 3 + b * 8
        s0, s1 = load_word(levels, ROW_BYTES), load_word(levels + 4, ROW_BYTES)
        d = load_f16(start + COLS // 256 * 208 + b // 2 * 2)
        return (
            a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, e0, e1, e2, e3, f0, f1, f2, f3, s0, s1, d
        )  # fmt: skip
    else:
        return run_words(start, b, COLS, ROW_BYTES, TYPE)


@triton.jit
def _block(x, scales, norm, at, inside, MIXED: tl.constexpr, NORM: tl.constexpr):
    """A block of x as `_rounded` makes it; x of bytes is rounded already, its words in the order of MIXED."""
    if x.dtype.element_ty == tl.int8:
        at = tl.where(inside, at, 0)
        p0, p1, p2, p3 = load4((x + at).to(tl.int64), 16)
        p4, p5, p6, p7 = load4((x + at + 16).to(tl.int64), 16)
        return p0, p1, p2, p3, p4, p5, p6, p7, tl.where(inside, tl.load(scales + at // 32), 0.0)
    else:
        return _rounded(x, norm, at, inside, MIXED, NORM)


@triton.jit
def _activations(x, scales, norm, b, COLS: tl.constexpr, TYPE: tl.constexpr, NORM: tl.constexpr):
    """The blocks of x that parts b [B] meet: for each eight words, the scale, and what the type's minimum takes."""
    if TYPE == "IQ4_NL" or TYPE == "MXFP4":  # noqa: PLR1714
        return _block(x, scales, norm, b * 32, b < COLS // 32, True, NORM)
    elif TYPE == "Q8_0":
        return _block(x, scales, norm, b * 32, b < COLS // 32, False, NORM)
    elif TYPE == "Q4_0":
        p0, p1, p2, p3, p4, p5, p6, p7, scale = _block(x, scales, norm, b * 32, b < COLS // 32, False, NORM)
        return p0, p1, p2, p3, p4, p5, p6, p7, scale, 8.0 * _sum8(p0, p1, p2, p3, p4, p5, p6, p7)
    elif TYPE == "Q4_K":
        inside = b < COLS // 64
        p0, p1, p2, p3, p4, p5, p6, p7, s = _block(x, scales, norm, b * 64, inside, False, NORM)
        q0, q1, q2, q3, q4, q5, q6, q7, t = _block(x, scales, norm, b * 64 + 32, inside, False, NORM)
        m, n = s * _sum8(p0, p1, p2, p3, p4, p5, p6, p7), t * _sum8(q0, q1, q2, q3, q4, q5, q6, q7)
        return p0, p1, p2, p3, p4, p5, p6, p7, q0, q1, q2, q3, q4, q5, q6, q7, s, t * 0.0625, m, n
    elif TYPE == "Q6_K":
        return (
            _block_q6(x, scales, norm, b * 128, b < COLS // 128, NORM), _block_q6(x, scales, norm, b * 128 + 32, b < COLS // 128, NORM),
            _block_q6(x, scales, norm, b * 128 + 64, b < COLS // 128, NORM), _block_q6(x, scales, norm, b * 128 + 96, b < COLS // 128, NORM),
        )  # fmt: skip
    else:
        p0, p1, p2, p3, p4, p5, p6, p7, scale = _block(x, scales, norm, b * 32, b < COLS // 32, False, NORM)
        return p0, p1, p2, p3, p4, p5, p6, p7, scale, scale * _sum4(p0, p1, p2, p3), scale * _sum4(p4, p5, p6, p7)


@triton.jit
def _block_q6(x, scales, norm, at, inside, NORM: tl.constexpr):
    """The block, and -32 times the sums of its halves: levels are 32 too large."""
    p0, p1, p2, p3, p4, p5, p6, p7, scale = _block(x, scales, norm, at, inside, False, NORM)
    less = tl.full(p0.shape, -0x1F1F1F20, tl.int32)  # four times -32
    first = _dot4(p3, less, _dot4(p2, less, _dot4(p1, less, _dot4(p0, less, 0 * p0))))
    second = _dot4(p7, less, _dot4(p6, less, _dot4(p5, less, _dot4(p4, less, 0 * p0))))
    return p0, p1, p2, p3, p4, p5, p6, p7, scale, first, second


@triton.jit
def _dot16(w0, w1, w2, w3, p0, p1, p2, p3, c):
    """c plus the products of the bytes of four words."""
    return _dot4(w3, p3[None, :], _dot4(w2, p2[None, :], _dot4(w1, p1[None, :], _dot4(w0, p0[None, :], c))))


@triton.jit
def _low_dot16(w0, w1, w2, w3, p0, p1, p2, p3, c):
    """c plus the products of the lower nibbles of four words."""
    c = _dot4(w0 & 0x0F0F0F0F, p0[None, :], c)
    c = _dot4(w1 & 0x0F0F0F0F, p1[None, :], c)
    c = _dot4(w2 & 0x0F0F0F0F, p2[None, :], c)
    return _dot4(w3 & 0x0F0F0F0F, p3[None, :], c)


@triton.jit
def _high_dot16(w0, w1, w2, w3, p0, p1, p2, p3, c):
    """c plus 16 times the products of the upper nibbles of four words: they stay in place, which saves a shift."""
    c = _high_dot4(w0, p0[None, :], c)
    c = _high_dot4(w1, p1[None, :], c)
    c = _high_dot4(w2, p2[None, :], c)
    return _high_dot4(w3, p3[None, :], c)


@triton.jit
def _q6_dot16(n0, n1, n2, n3, t0, t1, t2, t3, PLANE: tl.constexpr, p0, p1, p2, p3, c):
    """16 weights of plane 0 to 3, of nibbles and bit pairs of four words each."""
    c = _dot4(_q6(n0, t0, PLANE), p0, c)
    c = _dot4(_q6(n1, t1, PLANE), p1, c)
    c = _dot4(_q6(n2, t2, PLANE), p2, c)
    return _dot4(_q6(n3, t3, PLANE), p3, c)


@triton.jit
def _q6(nibbles, top, PLANE: tl.constexpr):
    """The levels, 0 to 63, of four bytes."""
    low = (nibbles >> (PLANE // 2 * 4)) & 0x0F0F0F0F
    if PLANE < 2:
        return low | ((top << (4 - 2 * PLANE)) & 0x30303030)
    else:
        return low | ((top >> (2 * PLANE - 4)) & 0x30303030)


@triton.jit
def _q6_plane(n0, n1, n2, n3, m0, m1, m2, m3, w, scales, PLANE: tl.constexpr, x, zero):
    p0, p1, p2, p3, p4, p5, p6, p7, s, first, second = x
    c = _q6_dot16(n0, n1, n2, n3, w[16], w[17], w[18], w[19], PLANE,
                  p0[None, :], p1[None, :], p2[None, :], p3[None, :], first[None, :] + zero)  # fmt: skip
    d = _q6_dot16(m0, m1, m2, m3, w[20], w[21], w[22], w[23], PLANE,
                  p4[None, :], p5[None, :], p6[None, :], p7[None, :], second[None, :] + zero)  # fmt: skip
    c = c * _byte(scales, 2 * PLANE % 4) + d * _byte(scales, 2 * PLANE % 4 + 1)
    return s[None, :] * c.to(tl.float32)


@triton.jit
def _times(w, x, b, zero, codebook, TYPE: tl.constexpr):
    """float32 [R, B]: products of parts of rows with what they meet of x, in sums of a thread that start from zero."""
    if TYPE == "IQ4_NL" or TYPE == "MXFP4":  # noqa: PLR1714
        w0, w1, w2, w3, d = w
        if TYPE == "MXFP4":
            d = mxfp4_scale(d)
        p0, p1, p2, p3, p4, p5, p6, p7, scale = x
        low, high = _tables(b[None, :], TYPE)
        c = _codebook_dot8(w0, p0[None, :], p1[None, :], zero, low, high, TYPE)
        c = _codebook_dot8(w1, p2[None, :], p3[None, :], c, low, high, TYPE)
        c = _codebook_dot8(w2, p4[None, :], p5[None, :], c, low, high, TYPE)
        c = _codebook_dot8(w3, p6[None, :], p7[None, :], c, low, high, TYPE)
        return d * scale[None, :] * c.to(tl.float32)
    elif TYPE == "Q4_0":
        w0, w1, w2, w3, d = w
        p0, p1, p2, p3, p4, p5, p6, p7, scale, eight = x
        high = _high_dot16(w0, w1, w2, w3, p4, p5, p6, p7, zero)
        c = _low_dot16(w0, w1, w2, w3, p0, p1, p2, p3, high >> 4)
        return d * scale[None, :] * (c.to(tl.float32) - eight[None, :])
    elif TYPE == "Q8_0":
        w0, w1, w2, w3, w4, w5, w6, w7, d = w
        p0, p1, p2, p3, p4, p5, p6, p7, scale = x
        c = _dot16(w4, w5, w6, w7, p4, p5, p6, p7, _dot16(w0, w1, w2, w3, p0, p1, p2, p3, zero))
        return d * scale[None, :] * c.to(tl.float32)
    elif TYPE == "Q4_K":
        w0, w1, w2, w3, w4, w5, w6, w7, d, s0, s1, s2 = w
        p0, p1, p2, p3, p4, p5, p6, p7, q0, q1, q2, q3, q4, q5, q6, q7, s, t, m, n = x
        low = _low_dot16(w4, w5, w6, w7, p4, p5, p6, p7, _low_dot16(w0, w1, w2, w3, p0, p1, p2, p3, zero))
        high = _high_dot16(w4, w5, w6, w7, q4, q5, q6, q7, _high_dot16(w0, w1, w2, w3, q0, q1, q2, q3, zero))
        # Two neighbours each of 8 scales and 8 minima of 6 bits: the runs of b's low and high nibbles.
        shift = (b % 2 * 16)[None, :]
        f, g, h = s0 >> shift, s1 >> shift, s2 >> shift
        is_first = (b % 4 < 2)[None, :]
        scales = tl.where(is_first, f & 0x3F3F, (h & 0x0F0F) | ((f >> 2) & 0x3030))
        minima = tl.where(is_first, g & 0x3F3F, ((h >> 4) & 0x0F0F) | ((g >> 2) & 0x3030))
        product = _u8(scales, 0) * (s[None, :] * low.to(tl.float32))
        product += _u8(scales, 1) * (t[None, :] * high.to(tl.float32))
        minimum = _u8(minima, 0) * m[None, :] + _u8(minima, 1) * n[None, :]
        return _half(d, 0) * product - _half(d, 1) * minimum
    elif TYPE == "Q6_K":
        a, c, d, e = x
        y = _q6_plane(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w, w[24], 0, a, zero)
        y += _q6_plane(w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], w, w[24], 1, c, zero)
        y += _q6_plane(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w, w[25], 2, d, zero)
        y += _q6_plane(w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], w, w[25], 3, e, zero)
        return w[26] * y
    else:
        w0, w1, w2, w3, w4, w5, w6, w7, first, last, less_first, less_last = run_levels(
            w, b[None, :], codebook, TYPE
        )
        p0, p1, p2, p3, p4, p5, p6, p7, scale, sum_first, sum_last = x
        c = _dot16(w0, w1, w2, w3, p0, p1, p2, p3, zero)
        if (
            TYPE == "Q2_K"  # noqa: PLR1714
            or TYPE == "Q3_K"
            or TYPE == "IQ2_XS"
            or TYPE == "IQ2_S"
            or TYPE == "IQ1_M"
            or TYPE == "IQ1_M_R4"
            or TYPE == "NVFP4"
        ):
            d = _dot16(w4, w5, w6, w7, p4, p5, p6, p7, zero)
            y = scale[None, :] * (first * c.to(tl.float32) + last * d.to(tl.float32))
        else:  # one factor
            y = first * scale[None, :] * _dot16(w4, w5, w6, w7, p4, p5, p6, p7, c).to(tl.float32)
        if TYPE == "Q2_K" or TYPE == "Q5_K" or TYPE == "Q4_1" or TYPE == "Q5_1":  # noqa: PLR1714
            y -= less_first * sum_first[None, :] + less_last * sum_last[None, :]
        return y


@triton.jit
def _of_each_load(w, x, TYPE: tl.constexpr):
    """Bits that are there when the words of w and x are."""
    if TYPE == "Q6_K":
        return w[0] | w[4] | w[8] | w[12] | w[16] | w[20]
    elif TYPE == "Q5_K" or TYPE == "Q3_K":  # noqa: PLR1714
        return w[0] | w[4] | w[8] | w[12] | w[16] | (x[0] | x[4])[None, :]
    elif TYPE == "Q8_0" or TYPE == "Q4_K":  # noqa: PLR1714
        return w[0] | w[4] | (x[0] | x[4])[None, :]
    else:
        return w[0] | (x[0] | x[4])[None, :]


@triton.jit
def _u8(word, PLACE: tl.constexpr):
    return ((word >> (8 * PLACE)) & 255).to(tl.float32)


@triton.jit
def _half(word, PLACE: tl.constexpr):
    """A half of a word as float16, float32."""
    return (word >> (16 * PLACE)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _start(raw, pid, rows, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """(first row, addresses of ROWS rows int64 [ROWS, 1]). The last program repeats rows of the one before it, so that
    the rows of a program lie at constant distances."""
    first = tl.minimum(pid * ROWS, rows - ROWS)
    return first, (raw + first.to(tl.int64) * ROW_BYTES).to(tl.int64) + tl.arange(0, ROWS)[:, None] * ROW_BYTES


@triton.jit
def _part(first, NUM: tl.constexpr, PARTS: tl.constexpr):
    """(parts [PARTS] from `first` on, the same within the row)."""
    b = first + tl.arange(0, PARTS)
    if NUM % PARTS == 0:
        return b, b
    else:
        return b, tl.minimum(b, NUM - 1)


@prefers_shared(SHARED_PERCENT)
@triton.jit
def _linear(
    x, norm, eps, add, raw, codebook, out, rows, x_stride, out_stride,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """NORM: of x / rms(x) * norm. The factor of a whole row changes no code of a block, so it comes last."""
    if EARLY:
        let_next_start()
    first, start = _start(raw, tl.program_id(0), rows, ROWS, ROW_BYTES)
    b, near = _part(0, COLS // EACH, PARTS)
    w = _weights(start, near[None, :], COLS, ROW_BYTES, TYPE)  # on their way while the kernel before this one ends
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(1).to(tl.int64)
    x += t * x_stride
    none = tl.zeros([ROWS, PARTS], tl.int32)
    y = _times(w, _activations(x, x, norm, b, COLS, TYPE, NORM), near, none, codebook, TYPE)
    for part in tl.static_range(PARTS, COLS // EACH, PARTS):
        b, near = _part(part, COLS // EACH, PARTS)
        w = _weights(start, near[None, :], COLS, ROW_BYTES, TYPE)
        y += _times(w, _activations(x, x, norm, b, COLS, TYPE, NORM), near, none, codebook, TYPE)
    y = tl.sum(y, 1)
    if NORM:
        y *= one_over_rms(x, eps, COLS, PADDED)
    feature = first + tl.arange(0, ROWS)
    if ADD:
        y += tl.load(add + t * rows + feature)
    tl.store(out + t * out_stride + feature, y)


@triton.jit
def _gate_up_features(
    x, x_scales, gate, up, codebook, out, scales, pid, pair, rows,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, ROUNDS: tl.constexpr, MIXED: tl.constexpr, APART: tl.constexpr, TURNS: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """ROWS features of silu(gate x) * (up x) to row `pair` of out. ROUNDS: of each ROWS = 32 numbers to codes and a scale,
    in the order that `_rounded` gives a block. APART: up is asked for when gate is done. TURNS: so many shares of the
    features, one after another. WAITS: weights of the first are asked for before the inputs are there."""
    most = 0
    ys = ()
    for turn in tl.static_range(TURNS):
        first, g_start = _start(gate, pid * TURNS + turn, rows, ROWS // TURNS, ROW_BYTES)
        _, u_start = _start(up, pid * TURNS + turn, rows, ROWS // TURNS, ROW_BYTES)
        b, near = _part(0, COLS // EACH, PARTS)
        g_w = _weights(g_start, near[None, :], COLS, ROW_BYTES, TYPE)
        if not APART:
            u_w = _weights(u_start, near[None, :], COLS, ROW_BYTES, TYPE)
        if turn == 0 and WAITS:
            wait_for_inputs()
        none = tl.zeros([ROWS // TURNS, PARTS], tl.int32)
        a = _activations(x, x_scales, x, b, COLS, TYPE, False)
        g = _times(g_w, a, near, none, codebook, TYPE)
        if APART:
            u_w = _weights(u_start, near[None, :], COLS, ROW_BYTES, TYPE)
        u = _times(u_w, a, near, none, codebook, TYPE)
        for part in tl.static_range(PARTS, COLS // EACH, PARTS):
            b, near = _part(part, COLS // EACH, PARTS)
            g_w = _weights(g_start, near[None, :], COLS, ROW_BYTES, TYPE)
            if not APART:
                u_w = _weights(u_start, near[None, :], COLS, ROW_BYTES, TYPE)
            a = _activations(x, x_scales, x, b, COLS, TYPE, False)
            g += _times(g_w, a, near, none, codebook, TYPE)
            if APART:
                u_w = _weights(u_start, near[None, :], COLS, ROW_BYTES, TYPE)
            u += _times(u_w, a, near, none, codebook, TYPE)
        y = silu(tl.sum(g, 1)) * tl.sum(u, 1)
        ys = ys + ((first, y),)  # type: ignore[assignment] # noqa: RUF005
        most = tl.maximum(most, tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    for turn in tl.static_range(TURNS):
        first, y = ys[turn]
        i = tl.arange(0, ROWS // TURNS)
        if ROUNDS:
            inverse, factor = scale_of(most)
            place = turn * (ROWS // TURNS) + i
            if MIXED:
                place = mixed_place(place)
            tl.store(out + pair * rows + first - turn * (ROWS // TURNS) + place, code(y, inverse).to(tl.int8))
            if turn == 0:
                tl.store(scales + (pair * rows + first) // 32, factor)
        else:
            tl.store(out + pair * rows + first + i, y)


@prefers_shared(SHARED_PERCENT)
@triton.jit
def _gate_up(
    x, gate, up, codebook, ids, out, scales, rows, x_stride,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr, MIXED: tl.constexpr, APART: tl.constexpr, TURNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Pair p is row p // PER_ROW of x with expert ids[p] (PER_ROW 0: row p, the only matrix)."""
    pair = tl.program_id(1).to(tl.int64)
    if PER_ROW > 0:
        if EARLY:
            wait_for_inputs()
        expert = tl.load(ids + pair).to(tl.int64)
        x += pair // PER_ROW * x_stride
        gate += expert * rows * ROW_BYTES
        up += expert * rows * ROW_BYTES
    else:
        if EARLY:
            let_next_start()
        x += pair * x_stride
    _gate_up_features(x, x, gate, up, codebook, out, scales, tl.program_id(0), pair, rows, COLS, EACH, ROW_BYTES, TYPE, ROWS, PARTS,
                      ROUNDS, MIXED, APART, TURNS, EARLY and PER_ROW == 0)  # fmt: skip


@prefers_shared(SHARED_PERCENT)
@triton.jit
def _gate_up_of_all(
    x, x_scales, gate, up, codebook, ids, out, scales, rows, shared_gate, shared_up, shared_codebook, shared_out, shared_scales,
    shared_rows, x_stride,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, PARTS: tl.constexpr,
    MIXED: tl.constexpr, SHARED_EACH: tl.constexpr, SHARED_BYTES: tl.constexpr, SHARED_TYPE: tl.constexpr,
    SHARED_PARTS: tl.constexpr, SHARED_MIXED: tl.constexpr, APART: tl.constexpr, SHARED_APART: tl.constexpr,
    TURNS: tl.constexpr, SHARED_TURNS: tl.constexpr, TOKENS: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The first programs own ROWS features of the shared experts, whose weights need no choice and come early; the others
    those of a pair of row and expert. The next kernel starts when the choice is there, which it reads at once."""
    program = tl.program_id(0)
    each = tl.cdiv(shared_rows, ROWS)
    if program < TOKENS * each:
        t = (program // each).to(tl.int64)
        _gate_up_features(x + t * x_stride, x_scales + t * (COLS // 32), shared_gate, shared_up, shared_codebook, shared_out, shared_scales, program % each, t,
                          shared_rows, COLS, SHARED_EACH, SHARED_BYTES, SHARED_TYPE, ROWS, SHARED_PARTS, True,
                          SHARED_MIXED, SHARED_APART, SHARED_TURNS, EARLY)  # fmt: skip
    else:
        if EARLY:
            wait_for_inputs()
        program -= TOKENS * each
        each = tl.cdiv(rows, ROWS)
        pair = (program // each).to(tl.int64)
        expert = tl.load(ids + pair).to(tl.int64)
        t = pair // PER_ROW
        _gate_up_features(x + t * x_stride, x_scales + t * (COLS // 32), gate + expert * rows * ROW_BYTES, up + expert * rows * ROW_BYTES,
                          codebook, out, scales, program % each, pair, rows, COLS, EACH, ROW_BYTES, TYPE, ROWS, PARTS,
                          True, MIXED, APART, TURNS, False)  # fmt: skip


@triton.jit
def _chosen_weights(
    start, ids, rows, FIRST: tl.constexpr, LAST: tl.constexpr,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, PER_ROW: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Passes [FIRST, LAST), PARTS each, over the rows of all chosen experts as one row: of each (weights, parts of that
    row, parts of the expert's own row, choices). start: as `_start`, of expert 0; ids: of a row's choices."""
    NUM: tl.constexpr = COLS // EACH
    passes = ()
    for i in tl.static_range(FIRST, LAST):
        part, near = _part(i * PARTS, PER_ROW * NUM, PARTS)
        choice, b = near // NUM, near % NUM
        expert = tl.load(ids + choice).to(tl.int64)
        w = _weights(start + (expert * rows * ROW_BYTES)[None, :], b[None, :], COLS, ROW_BYTES, TYPE)
        passes = passes + ((w, part, b, choice),)  # type: ignore[assignment] # noqa: RUF005 (Triton knows sums of tuples)
    return passes


@prefers_shared(SHARED_PERCENT)
@triton.jit
def _down(
    hidden, scales, raw, codebook, ids, weights, shared_hidden, shared_scales, shared, shared_codebook, add, out, rows,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, TOGETHER: tl.constexpr, ADD: tl.constexpr,
    SHARED_COLS: tl.constexpr, SHARED_EACH: tl.constexpr, SHARED_BYTES: tl.constexpr, SHARED_TYPE: tl.constexpr,
    SHARED_PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (ROWS features, row). A row's chosen experts count as one long row: 44 blocks each would leave 20 of 64 lanes
    idle. ids are of two kernels ago, and the kernel before this one lets it start when it has them itself, so they may be
    read before the wait. AHEAD: passes whose weights are asked for together, the first of them before the inputs are there.
    TOGETHER: passes that wait together for what they meet. SHARED_COLS: numbers of a row that meet the shared experts'
    matrix, 0 without."""
    if EARLY:
        let_next_start()
    t = tl.program_id(1).to(tl.int64)
    ids += t * PER_ROW
    weights += t * PER_ROW
    hidden += t * (PER_ROW * COLS)
    scales += t * (PER_ROW * (COLS // 32))
    first, start = _start(raw, tl.program_id(0), rows, ROWS, ROW_BYTES)
    PASSES: tl.constexpr = (PER_ROW * (COLS // EACH) + PARTS - 1) // PARTS
    passes = _chosen_weights(start, ids, rows, 0, min(AHEAD, PASSES), COLS, EACH, ROW_BYTES, TYPE, PER_ROW, PARTS)
    shared_ws = ()
    if SHARED_COLS > 0:
        _, shared_start = _start(shared, tl.program_id(0), rows, ROWS, SHARED_BYTES)
        for part in tl.static_range(0, SHARED_COLS // SHARED_EACH, SHARED_PARTS):
            b, near = _part(part, SHARED_COLS // SHARED_EACH, SHARED_PARTS)
            shared_ws = shared_ws + (  # type: ignore[assignment] # noqa: RUF005
                _weights(shared_start, near[None, :], SHARED_COLS, SHARED_BYTES, SHARED_TYPE),
            )
    if EARLY:
        wait_for_inputs()
    y = tl.zeros([ROWS, PARTS], tl.float32)
    for group in tl.static_range(0, PASSES, AHEAD):
        if group > 0:
            passes = _chosen_weights(start, ids, rows, group, min(group + AHEAD, PASSES), COLS, EACH, ROW_BYTES, TYPE,
                                     PER_ROW, PARTS)  # fmt: skip
        for few in tl.static_range(0, min(AHEAD, PASSES - group), TOGETHER):
            xs = ()
            seen = tl.zeros([ROWS, PARTS], tl.int32)
            for i in tl.static_range(few, min(few + TOGETHER, AHEAD, PASSES - group)):
                w, part, _, _ = passes[i]
                x = _activations(hidden, scales, weights, part, PER_ROW * COLS, TYPE, False)
                xs = xs + (x,)  # type: ignore[assignment] # noqa: RUF005
                seen |= _of_each_load(w, x, TYPE)
            # Else the compiler moves each load to where it is needed, and one after another waits for memory.
            zero = _zero(seen)
            for i in tl.static_range(few, min(few + TOGETHER, AHEAD, PASSES - group)):
                w, _, b, choice = passes[i]
                weight = tl.load(weights + choice)
                y += weight[None, :] * _times(w, xs[i - few], b, zero, codebook, TYPE)
    y = tl.sum(y, 1)
    if SHARED_COLS > 0:
        z = tl.zeros([ROWS, SHARED_PARTS], tl.float32)
        none = tl.zeros([ROWS, SHARED_PARTS], tl.int32)
        shared_hidden += t * SHARED_COLS
        shared_scales += t * (SHARED_COLS // 32)
        for part in tl.static_range(0, SHARED_COLS // SHARED_EACH, SHARED_PARTS):
            b, near = _part(part, SHARED_COLS // SHARED_EACH, SHARED_PARTS)
            x = _activations(shared_hidden, shared_scales, weights, b, SHARED_COLS, SHARED_TYPE, False)
            z += _times(shared_ws[part // SHARED_PARTS], x, near, none, shared_codebook, SHARED_TYPE)
        y += tl.sum(z, 1)
    feature = first + tl.arange(0, ROWS)
    if ADD:
        y += tl.load(add + t * rows + feature)
    tl.store(out + t * rows + feature, y)


def serves(w: Matrix) -> bool:
    return w.rounds and w.type in TYPES


def aligned(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes."""
    return x if (x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0 else x.contiguous()


def _parts(w: Matrix) -> int:
    """Of a row in one pass."""
    sizes = SIZES[w.type]
    return min(int(triton.next_power_of_2(w.cols // sizes.each)), sizes.most_parts)


def _lanes(parts: int) -> int:
    """Parts in one pass where a warp has a row of its own, whose sum then crosses no warps."""
    return min(int(triton.next_power_of_2(parts)), LANES)


def _sizes(w: Matrix, rows: int, num_warps: int, maxnreg: int | None = None) -> dict[str, int | None]:
    """ROWS of a program and PARTS of a row in one pass: what each matrix of `rows` or more rows is cut in."""
    return {
        "ROWS": min(rows, 1 << (w.rows.bit_length() - 1)),
        "PARTS": _parts(w),
        "EACH": SIZES[w.type].each,
        "num_warps": num_warps,
        "maxnreg": maxnreg,
    }


def linear(x: Tensor, w: Matrix, out: Tensor, *, norm: Norm | None = None, add: Tensor | None = None) -> None:
    """out [T, rows] = rounded (norm of float32) x [T, cols] @ w^T, plus add float32 [T, rows]; the last strides are 1."""
    sizes = _sizes(w, *SIZES[w.type].linear)
    early = overlaps(x)
    x = aligned(x)
    _linear[(triton.cdiv(w.rows, sizes["ROWS"]), len(x))](
        x, x if norm is None else norm.weight, 0.0 if norm is None else norm.eps, x if add is None else add, w.raw, w.scale_or_raw, out,
        w.rows, x.stride(0), out.stride(0),
        NORM=norm is not None, ADD=add is not None, PADDED=triton.next_power_of_2(w.cols), COLS=w.cols, ROW_BYTES=w.row_bytes, TYPE=w.type, EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip


def gate_up(x: Tensor, gate: Matrix, up: Matrix, ids: Tensor | None, out: Tensor | RoundedRows) -> None:
    """out = silu(gate x) * (up x): [T, rows], or with ids int32 [T, k] [T * k, rows] of the chosen experts."""
    rounds = isinstance(out, RoundedRows)
    numbers, scales = (out.codes, out.scales) if isinstance(out, RoundedRows) else (out, out)
    num_warps, maxnreg, turns = SIZES[gate.type].gate_up
    sizes = _sizes(gate, 32, num_warps, maxnreg) if rounds else _sizes(gate, *GATE_UP)
    early = overlaps(x)
    x = aligned(x)
    _gate_up[(triton.cdiv(gate.rows, sizes["ROWS"]), len(numbers))](
        x, gate.raw, up.raw, gate.scale_or_raw, x if ids is None else ids, numbers, scales, gate.rows, x.stride(0),
        COLS=gate.cols, ROW_BYTES=gate.row_bytes, TYPE=gate.type, PER_ROW=0 if ids is None else ids.shape[1],
        ROUNDS=rounds, MIXED=isinstance(out, RoundedRows) and out.is_mixed, APART=SIZES[gate.type].is_apart,
        TURNS=turns if rounds else 1, EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip


def down(
    hidden: Tensor | RoundedRows,
    w: Matrix,
    ids: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    shared: tuple[RoundedRows, Matrix] | None = None,
    add: Tensor | None = None,
) -> None:
    """out [T, rows] = sum over a row's choices of weights [T, k] times the chosen experts' w hidden [T * k, cols], plus
    the shared experts' product of rows [T, their cols] and matrix, plus add float32 [T, rows]."""
    numbers, scales = (hidden.codes, hidden.scales) if isinstance(hidden, RoundedRows) else (hidden, hidden)
    sizes = _sizes(w, *DOWN)
    per_row = ids.shape[1]
    sizes["PARTS"] = _lanes(per_row * w.cols // SIZES[w.type].each)
    ahead, together = SIZES[w.type].ahead
    shared_codes, shared_scales, shared_w = (
        (numbers, scales, w) if shared is None else (shared[0].codes, shared[0].scales, shared[1])
    )
    early = overlaps(out)
    _down[(triton.cdiv(w.rows, sizes["ROWS"]), len(ids))](
        numbers, scales, w.raw, w.scale_or_raw, ids, weights, shared_codes, shared_scales, shared_w.raw, shared_w.scale_or_raw,
        out if add is None else add, out, w.rows,
        COLS=w.cols, ROW_BYTES=w.row_bytes, TYPE=w.type, PER_ROW=per_row, AHEAD=ahead, TOGETHER=together, ADD=add is not None,
        SHARED_COLS=0 if shared is None else shared_w.cols, SHARED_EACH=SIZES[shared_w.type].each,
        SHARED_BYTES=shared_w.row_bytes, SHARED_TYPE=shared_w.type,
        SHARED_PARTS=_lanes(shared_w.cols // SIZES[shared_w.type].each), EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip


def experts(
    x: Tensor,
    routed: Routed,
    matrices: tuple[Matrix, Matrix, Matrix],
    shared: tuple[Matrix, Matrix, Matrix] | None,
    out: Tensor,
) -> None:
    """out float32 [T, rows] = x plus the chosen experts' weighted and the shared experts' plain sum, in two launches;
    gate, up and down of each."""
    gate, up, w = matrices
    pairs, num_rows = routed.ids.numel(), len(x)
    hidden = RoundedRows.empty(pairs, gate.rows, w.type, x.device)
    s_gate, s_up, s_down = shared or matrices
    s_rows = s_gate.rows if shared else 0
    s_hidden = RoundedRows.empty(num_rows, s_rows, s_down.type, x.device)
    num_warps, maxnreg, turns = SIZES[gate.type].gate_up
    sizes = _sizes(gate, 32, num_warps, maxnreg)
    programs = num_rows * triton.cdiv(s_rows, 32) + pairs * triton.cdiv(gate.rows, 32)
    rounded = routed.rounded
    numbers, scales = (routed.normed, routed.normed) if rounded is None else (rounded.codes, rounded.scales)
    early = overlaps(x)
    _gate_up_of_all[(programs,)](
        numbers, scales, gate.raw, up.raw, gate.scale_or_raw, routed.ids, hidden.codes, hidden.scales, gate.rows,
        s_gate.raw, s_up.raw, s_gate.scale_or_raw, s_hidden.codes, s_hidden.scales, s_rows, numbers.stride(0),
        COLS=gate.cols, ROW_BYTES=gate.row_bytes, TYPE=gate.type, MIXED=hidden.is_mixed,
        SHARED_EACH=SIZES[s_gate.type].each, SHARED_BYTES=s_gate.row_bytes, SHARED_TYPE=s_gate.type,
        SHARED_PARTS=_parts(s_gate), SHARED_MIXED=s_hidden.is_mixed,
        APART=SIZES[gate.type].is_apart, SHARED_APART=SIZES[s_gate.type].is_apart,
        TURNS=turns, SHARED_TURNS=SIZES[s_gate.type].gate_up[2], TOKENS=num_rows, PER_ROW=routed.ids.shape[1], EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip
    down(hidden, w, routed.ids, routed.weights, out, shared=(s_hidden, s_down) if shared else None, add=x)
