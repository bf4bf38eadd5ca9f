"""Products of a few rows, rounded to 8 bits, with matrices in blocks: four multiply-adds an instruction.

The rounding is quant/activations.py's: 32 neighbours of x share a scale. Sums inside a block of 32 are exact in whole
numbers; a weight costs 1.5 to 2.5 instructions, where decoding it to float32 takes 8. A thread holds whole blocks and
rounds its part of x itself, once for all rows of its program, so no launch and no barrier comes before the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.block_weights import COMPILED
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.overlap import overlaps, wait_for_inputs
from kvfold.kernels.rows import silu

TYPES = frozenset(["Q4_0", "IQ4_NL", "Q8_0", "Q4_K", "Q6_K"])

# Weights that a thread holds of a row. Q4_K: low and high nibbles of 32 bytes. Q6_K: half a block.
_EACH = {"Q4_0": 32, "IQ4_NL": 32, "Q8_0": 32, "Q4_K": 64, "Q6_K": 128}


@triton.jit
def _load4(address, ALIGN: tl.constexpr):
    """Four words at `address` (int64, a multiple of ALIGN). Loads of assembly have no layout of their own, so that a
    thread gets all of a block; `volatile`, so that none moves above a wait."""
    if COMPILED:
        if ALIGN % 16 == 0:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
        elif ALIGN % 8 == 0:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v2.b32 {$0, $1}, [$4]; ld.global.nc.v2.b32 {$2, $3}, [$4 + 8];",
                "=&r,=&r,=r,=r,l", [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
        elif ALIGN % 4 == 0:
            return tl.inline_asm_elementwise(
                """ld.global.nc.b32 $0, [$4]; ld.global.nc.b32 $1, [$4 + 4];
                ld.global.nc.b32 $2, [$4 + 8]; ld.global.nc.b32 $3, [$4 + 12];""",
                "=&r,=&r,=&r,=r,l", [address],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
        else:
            return _load4_by1(address, ALIGN)
    else:
        return _load4_by1(address, ALIGN)


@triton.jit
def _load4_by1(address, ALIGN: tl.constexpr):
    return (
        _load1(address, ALIGN),
        _load1(address + 4, ALIGN),
        _load1(address + 8, ALIGN),
        _load1(address + 12, ALIGN),
    )


@triton.jit
def _load1(address, ALIGN: tl.constexpr):
    """The word at `address`, of halves where ALIGN is 2."""
    if not COMPILED:
        half = address.to(tl.pointer_type(tl.uint16), bitcast=True)
        return tl.load(half).to(tl.int32) | (tl.load(half + 1).to(tl.int32) << 16)
    elif ALIGN % 4 == 0:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b16 a, b; ld.global.nc.b16 a, [$1]; ld.global.nc.b16 b, [$1 + 2]; mov.b32 $0, {a, b};}",
            "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _load_f16(address):
    """The float16 at `address`, float32."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.f32.f16 $0, h;}",
            "=f,l", [address], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(address.to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)


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
        c += _byte(a, 0) * _byte(b, 0) + _byte(a, 1) * _byte(b, 1)
        return c + _byte(a, 2) * _byte(b, 2) + _byte(a, 3) * _byte(b, 3)


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
def _iq4_level(q):
    low = tl.where(q < 4, 0x3E2C1700, 0x75695C4E)
    high = tl.where(q < 12, -0x5A677380, -0xF273B4C)
    return ((tl.where(q < 8, low, high) >> ((q & 3) * 8)) & 255) - 127


@triton.jit
def _iq4_dot8(word, near, far, c, low, high):
    """c plus the products of eight levels with codes in the order of their nibbles.

    A byte permutation looks four nibbles up in eight levels; a nibble of 8 or more gets the sign of a level instead: -1
    from the lower half of the codebook, whose levels are negative, 0 from the upper half, looked up with bit 3 turned.
    So the upper half holds 1 more than its levels, and both go into the sum. low, high: of `_iq4_tables`.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 v, s, a, b;
            xor.b32 v, $1, 0x88888888;
            prmt.b32 a, $5, 0xF6EADDCF, $1;
            prmt.b32 b, $6, 0x725A4636, v;
            dp4a.s32.s32 $0, a, $2, $4;
            dp4a.s32.s32 $0, b, $2, $0;
            shr.u32 s, $1, 16;
            shr.u32 v, v, 16;
            prmt.b32 a, $5, 0xF6EADDCF, s;
            prmt.b32 b, $6, 0x725A4636, v;
            dp4a.s32.s32 $0, a, $3, $0;
            dp4a.s32.s32 $0, b, $3, $0;
            }""",
            "=&r,r,r,r,r,r,r", [word, near, far, c, low, high], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for i in tl.static_range(4):
            c += _iq4_level((word >> (4 * i)) & 15) * _byte(near, i)
            c += _iq4_level((word >> (16 + 4 * i)) & 15) * _byte(far, i)
        return c


@triton.jit
def _iq4_tables(b):
    """The lower four levels of each half of the codebook, per thread: as constants each use would move them anew."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero;
            popc.b32 zero, $2;
            shr.u32 zero, zero, 6;
            or.b32 $0, zero, 0xBFAD9881;
            or.b32 $1, zero, 0x271A0E02;
            }""",
            "=r,=r,r", [b], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return b, b


@triton.jit
def _codes(x0, x1, x2, x3, inverse):
    """x times inverse, to the nearest whole number, ties to even: four bytes of a word. |x * inverse| <= 127.

    Adding 1.5 * 2^23 leaves the number in the lowest byte; product and sum round each, as the definition does.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b, c, d;
            .reg .b32 p, q;
            mul.rn.f32 a, $1, $5;
            mul.rn.f32 b, $2, $5;
            mul.rn.f32 c, $3, $5;
            mul.rn.f32 d, $4, $5;
            add.rn.f32 a, a, 0f4B400000;
            add.rn.f32 b, b, 0f4B400000;
            add.rn.f32 c, c, 0f4B400000;
            add.rn.f32 d, d, 0f4B400000;
            prmt.b32 p, a, b, 0x0040;
            prmt.b32 q, c, d, 0x0040;
            prmt.b32 $0, p, q, 0x5410;
            }""",
            "=r,f,f,f,f,f", [x0, x1, x2, x3, inverse], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a = (x0 * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
        b = (x1 * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
        c = (x2 * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
        return a | (b << 8) | (c << 16) | ((x3 * inverse + 12582912.0).to(tl.int32, bitcast=True) << 24)


@triton.jit
def _code(x, inverse):
    """One number's code, a byte of int32."""
    return _codes(x, x, x, x, inverse) & 255


@triton.jit
def _own4(address):
    """Four words at `address` (a multiple of 16) that an earlier kernel wrote, which may still run when this one starts."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [address],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return _load4_by1(address, 4)


@triton.jit
def _numbers16(x, at):
    """Sixteen neighbours of x from number `at` on as the bits of float32, and the bits of the largest size.

    As whole numbers the bits of sizes order like the sizes, and what is not finite comes last.
    """
    address = (x + at).to(tl.int64)
    if x.dtype.element_ty == tl.bfloat16:
        a, b, c, d = _own4(address)
        e, f, g, h = _own4(address + 16)
        most = _larger(_larger(_larger(a, b), _larger(c, d)), _larger(_larger(e, f), _larger(g, h)))
        most = tl.maximum(most << 16, most & 0x7FFF0000)
        return (
            a << 16, a & -65536, b << 16, b & -65536, c << 16, c & -65536, d << 16, d & -65536,
            e << 16, e & -65536, f << 16, f & -65536, g << 16, g & -65536, h << 16, h & -65536, most,
        )  # fmt: skip
    else:
        a0, a1, a2, a3 = _own4(address)
        b0, b1, b2, b3 = _own4(address + 16)
        c0, c1, c2, c3 = _own4(address + 32)
        d0, d1, d2, d3 = _own4(address + 48)
        most = tl.maximum(
            tl.maximum(_most(a0, a1, a2, a3), _most(b0, b1, b2, b3)),
            tl.maximum(_most(c0, c1, c2, c3), _most(d0, d1, d2, d3)),
        )
        return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, most


@triton.jit
def _larger(a, b):
    """The larger sizes of two pairs of bfloat16; what is NaN stays so."""
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a & 0x7FFF7FFF, b & 0x7FFF7FFF], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _most(a, b, c, d):
    """The largest size of four numbers, as bits."""
    return tl.maximum(tl.maximum(a & 0x7FFFFFFF, b & 0x7FFFFFFF), tl.maximum(c & 0x7FFFFFFF, d & 0x7FFFFFFF))


@triton.jit
def _scale_of(largest):
    """(127 / largest, largest / 127) of the bits of a block's largest size, as quant/activations.py rounds them."""
    is_finite = largest < 0x7F800000
    is_used = is_finite & (largest >= 0x03800000)  # 2^-120
    size = tl.where(is_used, largest, 0x42FE0000).to(tl.float32, bitcast=True)  # 127
    most = tl.full(size.shape, 127.0, tl.float32)
    inverse = tl.where(is_used, tl.div_rn(most, size), 0.0)
    scale = tl.where(is_used, tl.div_rn(size, most), 0.0)
    return inverse, tl.where(is_finite, scale, float("nan"))


@triton.jit
def _rounded(x, at, inside, MIXED: tl.constexpr):
    """The block of 32 numbers from x + at on: eight words of codes, and the scale (0 where not inside).

    MIXED: a word has the numbers j, j + 16, j + 1, j + 17, the order of nibbles in two bytes.
    """
    at = tl.where(inside, at, 0)
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, near = _numbers16(x, at)
    e0, e1, e2, e3, f0, f1, f2, f3, g0, g1, g2, g3, h0, h1, h2, h3, far = _numbers16(x, at + 16)
    inverse, scale = _scale_of(tl.maximum(near, far))
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
    return _codes(
        a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True), c.to(tl.float32, bitcast=True),
        d.to(tl.float32, bitcast=True), inverse,
    )  # fmt: skip


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
        w0, w1, w2, w3 = _load4(start + b * 16, ROW_BYTES)
        return w0, w1, w2, w3, _load_f16(start + COLS // 2 + b * 2)
    elif TYPE == "Q8_0":
        w0, w1, w2, w3 = _load4(start + b * 32, ROW_BYTES)
        w4, w5, w6, w7 = _load4(start + b * 32 + 16, ROW_BYTES)
        return w0, w1, w2, w3, w4, w5, w6, w7, _load_f16(start + COLS + b * 2)
    elif TYPE == "Q4_K":
        block = start + b // 4 * 144
        d, s0, s1, s2 = _load4(block, 16)
        w0, w1, w2, w3 = _load4(block + 16 + b % 4 * 32, 16)
        w4, w5, w6, w7 = _load4(block + 32 + b % 4 * 32, 16)
        return w0, w1, w2, w3, w4, w5, w6, w7, d, s0, s1, s2
    else:
        tl.static_assert(TYPE == "Q6_K")
        near = start + b * 64
        a0, a1, a2, a3 = _load4(near, ROW_BYTES)
        b0, b1, b2, b3 = _load4(near + 16, ROW_BYTES)
        c0, c1, c2, c3 = _load4(near + 32, ROW_BYTES)
        d0, d1, d2, d3 = _load4(near + 48, ROW_BYTES)
        top = start + COLS // 2 + b * 32
        e0, e1, e2, e3 = _load4(top, ROW_BYTES)
        f0, f1, f2, f3 = _load4(top + 16, ROW_BYTES)
        levels = start + COLS // 4 * 3 + b * 8
        s0, s1 = _load1(levels, ROW_BYTES), _load1(levels + 4, ROW_BYTES)
        d = _load_f16(start + COLS // 256 * 208 + b // 2 * 2)
        return (
            a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, e0, e1, e2, e3, f0, f1, f2, f3, s0, s1, d
        )  # fmt: skip


@triton.jit
def _block(x, scales, at, inside, MIXED: tl.constexpr):
    """A block of x as `_rounded` makes it; x of bytes is rounded already, its words in the order of MIXED."""
    if x.dtype.element_ty == tl.int8:
        at = tl.where(inside, at, 0)
        p0, p1, p2, p3 = _own4((x + at).to(tl.int64))
        p4, p5, p6, p7 = _own4((x + at + 16).to(tl.int64))
        return p0, p1, p2, p3, p4, p5, p6, p7, tl.where(inside, tl.load(scales + at // 32), 0.0)
    else:
        return _rounded(x, at, inside, MIXED)


@triton.jit
def _activations(x, scales, b, COLS: tl.constexpr, TYPE: tl.constexpr):
    """The blocks of x that parts b [B] meet: for each eight words, the scale, and what the type's minimum takes."""
    if TYPE == "IQ4_NL":
        return _block(x, scales, b * 32, b < COLS // 32, True)
    elif TYPE == "Q8_0":
        return _block(x, scales, b * 32, b < COLS // 32, False)
    elif TYPE == "Q4_0":
        p0, p1, p2, p3, p4, p5, p6, p7, scale = _block(x, scales, b * 32, b < COLS // 32, False)
        return p0, p1, p2, p3, p4, p5, p6, p7, scale, 8.0 * _sum8(p0, p1, p2, p3, p4, p5, p6, p7)
    elif TYPE == "Q4_K":
        inside = b < COLS // 64
        p0, p1, p2, p3, p4, p5, p6, p7, s = _block(x, scales, b * 64, inside, False)
        q0, q1, q2, q3, q4, q5, q6, q7, t = _block(x, scales, b * 64 + 32, inside, False)
        m, n = s * _sum8(p0, p1, p2, p3, p4, p5, p6, p7), t * _sum8(q0, q1, q2, q3, q4, q5, q6, q7)
        return p0, p1, p2, p3, p4, p5, p6, p7, q0, q1, q2, q3, q4, q5, q6, q7, s, t * 0.0625, m, n
    else:
        return (
            _block_q6(x, scales, b * 128, b < COLS // 128), _block_q6(x, scales, b * 128 + 32, b < COLS // 128),
            _block_q6(x, scales, b * 128 + 64, b < COLS // 128), _block_q6(x, scales, b * 128 + 96, b < COLS // 128),
        )  # fmt: skip


@triton.jit
def _block_q6(x, scales, at, inside):
    """The block, and -32 times the sums of its halves: levels are 32 too large."""
    p0, p1, p2, p3, p4, p5, p6, p7, scale = _block(x, scales, at, inside, False)
    less = tl.full(p0.shape, -0x1F1F1F20, tl.int32)  # four times -32
    first = _dot4(p3, less, _dot4(p2, less, _dot4(p1, less, _dot4(p0, less, 0 * p0))))
    second = _dot4(p7, less, _dot4(p6, less, _dot4(p5, less, _dot4(p4, less, 0 * p0))))
    return p0, p1, p2, p3, p4, p5, p6, p7, scale, first, second


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
def _q6_plane(n0, n1, n2, n3, m0, m1, m2, m3, w, scales, PLANE: tl.constexpr, x):
    p0, p1, p2, p3, p4, p5, p6, p7, s, first, second = x
    c = _q6_dot16(n0, n1, n2, n3, w[16], w[17], w[18], w[19], PLANE,
                  p0[None, :], p1[None, :], p2[None, :], p3[None, :], first[None, :] + 0 * n0)  # fmt: skip
    d = _q6_dot16(m0, m1, m2, m3, w[20], w[21], w[22], w[23], PLANE,
                  p4[None, :], p5[None, :], p6[None, :], p7[None, :], second[None, :] + 0 * n0)  # fmt: skip
    c = c * _byte(scales, 2 * PLANE % 4) + d * _byte(scales, 2 * PLANE % 4 + 1)
    return s[None, :] * c.to(tl.float32)


@triton.jit
def _times(w, x, b, TYPE: tl.constexpr):
    """float32 [R, B]: products of parts of rows with what they meet of x, in sums of a thread."""
    if TYPE == "IQ4_NL":
        w0, w1, w2, w3, d = w
        p0, p1, p2, p3, p4, p5, p6, p7, scale = x
        low, high = _iq4_tables(b[None, :])
        c = _iq4_dot8(w0, p0[None, :], p1[None, :], 0 * w0, low, high)
        c = _iq4_dot8(w1, p2[None, :], p3[None, :], c, low, high)
        c = _iq4_dot8(w2, p4[None, :], p5[None, :], c, low, high)
        c = _iq4_dot8(w3, p6[None, :], p7[None, :], c, low, high)
        return d * scale[None, :] * c.to(tl.float32)
    elif TYPE == "Q4_0":
        w0, w1, w2, w3, d = w
        p0, p1, p2, p3, p4, p5, p6, p7, scale, eight = x
        high = _high_dot16(w0, w1, w2, w3, p4, p5, p6, p7, 0 * w0)
        c = _low_dot16(w0, w1, w2, w3, p0, p1, p2, p3, high >> 4)
        return d * scale[None, :] * (c.to(tl.float32) - eight[None, :])
    elif TYPE == "Q8_0":
        w0, w1, w2, w3, w4, w5, w6, w7, d = w
        p0, p1, p2, p3, p4, p5, p6, p7, scale = x
        c = _dot4(w3, p3[None, :], _dot4(w2, p2[None, :], _dot4(w1, p1[None, :], _dot4(w0, p0[None, :], 0 * w0))))
        c = _dot4(w7, p7[None, :], _dot4(w6, p6[None, :], _dot4(w5, p5[None, :], _dot4(w4, p4[None, :], c))))
        return d * scale[None, :] * c.to(tl.float32)
    elif TYPE == "Q4_K":
        w0, w1, w2, w3, w4, w5, w6, w7, d, s0, s1, s2 = w
        p0, p1, p2, p3, p4, p5, p6, p7, q0, q1, q2, q3, q4, q5, q6, q7, s, t, m, n = x
        low = _low_dot16(w4, w5, w6, w7, p4, p5, p6, p7, _low_dot16(w0, w1, w2, w3, p0, p1, p2, p3, 0 * w0))
        high = _high_dot16(w4, w5, w6, w7, q4, q5, q6, q7, _high_dot16(w0, w1, w2, w3, q0, q1, q2, q3, 0 * w0))
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
    else:
        a, c, d, e = x
        y = _q6_plane(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w, w[24], 0, a)
        y += _q6_plane(w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], w, w[24], 1, c)
        y += _q6_plane(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w, w[25], 2, d)
        y += _q6_plane(w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], w, w[25], 3, e)
        return w[26] * y


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


@triton.jit
def _linear(
    x, raw, out, rows, x_stride, out_stride,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first, start = _start(raw, tl.program_id(0), rows, ROWS, ROW_BYTES)
    b, near = _part(0, COLS // EACH, PARTS)
    w = _weights(start, near[None, :], COLS, ROW_BYTES, TYPE)  # on their way while the kernel before this one ends
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(1).to(tl.int64)
    x += t * x_stride
    y = _times(w, _activations(x, x, b, COLS, TYPE), near, TYPE)
    for part in tl.static_range(PARTS, COLS // EACH, PARTS):
        b, near = _part(part, COLS // EACH, PARTS)
        w = _weights(start, near[None, :], COLS, ROW_BYTES, TYPE)
        y += _times(w, _activations(x, x, b, COLS, TYPE), near, TYPE)
    tl.store(out + t * out_stride + first + tl.arange(0, ROWS), tl.sum(y, 1))


@triton.jit
def _gate_up(
    x, gate, up, ids, out, scales, rows, x_stride,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr, MIXED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Pair p is row p // PER_ROW of x with expert ids[p] (PER_ROW 0: row p, the only matrix). ROUNDS: of each ROWS = 32
    numbers to codes and a scale, in the order that `_rounded` gives a block."""
    pair = tl.program_id(1).to(tl.int64)
    if PER_ROW > 0:
        if EARLY:
            wait_for_inputs()
        expert = tl.load(ids + pair).to(tl.int64)
        x += pair // PER_ROW * x_stride
        gate += expert * rows * ROW_BYTES
        up += expert * rows * ROW_BYTES
    else:
        x += pair * x_stride
    first, g_start = _start(gate, tl.program_id(0), rows, ROWS, ROW_BYTES)
    _, u_start = _start(up, tl.program_id(0), rows, ROWS, ROW_BYTES)
    b, near = _part(0, COLS // EACH, PARTS)
    g_w = _weights(g_start, near[None, :], COLS, ROW_BYTES, TYPE)
    u_w = _weights(u_start, near[None, :], COLS, ROW_BYTES, TYPE)
    if EARLY and PER_ROW == 0:
        wait_for_inputs()
    a = _activations(x, x, b, COLS, TYPE)
    g, u = _times(g_w, a, near, TYPE), _times(u_w, a, near, TYPE)
    for part in tl.static_range(PARTS, COLS // EACH, PARTS):
        b, near = _part(part, COLS // EACH, PARTS)
        g_w = _weights(g_start, near[None, :], COLS, ROW_BYTES, TYPE)
        u_w = _weights(u_start, near[None, :], COLS, ROW_BYTES, TYPE)
        a = _activations(x, x, b, COLS, TYPE)
        g += _times(g_w, a, near, TYPE)
        u += _times(u_w, a, near, TYPE)
    y = silu(tl.sum(g, 1)) * tl.sum(u, 1)
    i = tl.arange(0, ROWS)
    if ROUNDS:
        inverse, factor = _scale_of(tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        if MIXED:
            i = i // 16 + i % 16 // 4 * 8 + i % 4 // 2 * 4 + i % 2 * 2
        tl.store(out + pair * rows + first + i, _code(y, inverse).to(tl.int8))
        tl.store(scales + (pair * rows + first) // 32, factor)
    else:
        tl.store(out + pair * rows + first + i, y)


@triton.jit
def _down(
    hidden, scales, raw, ids, weights, out, rows,
    COLS: tl.constexpr, EACH: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        wait_for_inputs()
    t = tl.program_id(1).to(tl.int64)
    first, start = _start(raw, tl.program_id(0), rows, ROWS, ROW_BYTES)
    y = tl.zeros([ROWS, PARTS], tl.float32)
    for choice in tl.static_range(PER_ROW):
        pair = t * PER_ROW + choice
        expert = tl.load(ids + pair).to(tl.int64)
        weight = tl.load(weights + pair)
        for part in tl.static_range(0, COLS // EACH, PARTS):
            b, near = _part(part, COLS // EACH, PARTS)
            w = _weights(start + expert * rows * ROW_BYTES, near[None, :], COLS, ROW_BYTES, TYPE)
            x = _activations(hidden + pair * COLS, scales + pair * (COLS // 32), b, COLS, TYPE)
            y += weight * _times(w, x, near, TYPE)
    tl.store(out + t * rows + first + tl.arange(0, ROWS), tl.sum(y, 1))


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """codes int8 [T, cols] and scales float32 [T, cols / 32] of rows that meet a matrix of `type`, whose kernels want the
    codes of a block in an order of their own."""

    codes: Tensor
    scales: Tensor
    type: str

    @classmethod
    def empty(cls, rows: int, cols: int, type: str, device: torch.device) -> RoundedRows:
        codes = torch.empty(rows, cols, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(rows, cols // 32, device=device), type)


def _sizes(w: Matrix, rows: int, num_warps: int) -> dict[str, int]:
    """ROWS of a program and PARTS of a row in one pass: what each matrix of `rows` or more rows is cut in."""
    each = _EACH[w.type]
    return {
        "ROWS": min(rows, 1 << (w.rows.bit_length() - 1)),
        "PARTS": min(triton.next_power_of_2(w.cols // each), 2048 // each),
        "EACH": each,
        "num_warps": num_warps,
    }


def linear(x: Tensor, w: Matrix, out: Tensor, *, rows: int = 16, num_warps: int = 2) -> None:
    """out [T, rows] = rounded x [T, cols] @ w^T; the last stride of both is 1."""
    sizes = _sizes(w, rows, num_warps)
    early = overlaps(x)
    _linear[(triton.cdiv(w.rows, sizes["ROWS"]), len(x))](
        x, w.raw, out, w.rows, x.stride(0), out.stride(0),
        COLS=w.cols, ROW_BYTES=w.row_bytes, TYPE=w.type, EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip


def gate_up(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    ids: Tensor | None,
    out: Tensor | RoundedRows,
    *,
    rows: int = 16,
    num_warps: int = 4,
) -> None:
    """out = silu(gate x) * (up x): [T, rows], or with ids int32 [T, k] [T * k, rows] of the chosen experts."""
    rounds = isinstance(out, RoundedRows)
    numbers, scales = (out.codes, out.scales) if isinstance(out, RoundedRows) else (out, out)
    sizes = _sizes(gate, 32, 8) if rounds else _sizes(gate, rows, num_warps)
    early = overlaps(x)
    _gate_up[(triton.cdiv(gate.rows, sizes["ROWS"]), len(numbers))](
        x, gate.raw, up.raw, x if ids is None else ids, numbers, scales, gate.rows, x.stride(0),
        COLS=gate.cols, ROW_BYTES=gate.row_bytes, TYPE=gate.type, PER_ROW=0 if ids is None else ids.shape[1],
        ROUNDS=rounds, MIXED=isinstance(out, RoundedRows) and out.type == "IQ4_NL",
        EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip


def down(
    hidden: Tensor | RoundedRows,
    w: Matrix,
    ids: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    rows: int = 8,
    num_warps: int = 4,
) -> None:
    """out [T, rows] = sum over a row's choices of weights [T, k] times the chosen experts' w hidden [T * k, cols]."""
    numbers, scales = (hidden.codes, hidden.scales) if isinstance(hidden, RoundedRows) else (hidden, hidden)
    sizes = _sizes(w, rows, num_warps)
    early = overlaps(out)
    _down[(triton.cdiv(w.rows, sizes["ROWS"]), len(ids))](
        numbers, scales, w.raw, ids, weights, out, w.rows,
        COLS=w.cols, ROW_BYTES=w.row_bytes, TYPE=w.type, PER_ROW=ids.shape[1], EARLY=early, launch_pdl=early, **sizes,
    )  # fmt: skip
