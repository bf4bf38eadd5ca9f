"""A thread's 32 weights of a row, from a block's bits to bfloat16 in the registers of wgmma: what tile_product_gluon.py is made of.

quant/decode.py said in PTX, for blocks that matrix.py lays. No module of Triton is needed, so that a test can evaluate it.

Of a row's 128 weights each of four threads has 32: a quarter of the codes, 16 or 32 bytes. Which of wgmma's columns they become is
free as long as the other matrix has its columns in the same order, so a thread keeps what it has read.

A weight is the definition's, rounded to bfloat16 once: a scale is a bfloat16 and a rest, and what both make of a code is added before
it is rounded. Q4_K and Q5_1 add their minima in between and so are off by one step at times.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

# Of the 128 columns of a pass, which bit of a column's number each bit of its place among wgmma's columns is, lowest first:
# the two of a register, the thread of four, the register of a product, the product.
ORDERS = {
    "Q4_0": (1, 5, 6, 4, 0, 2, 3),
    "Q5_0": (1, 5, 6, 4, 0, 2, 3),
    "Q5_1": (1, 5, 6, 4, 0, 2, 3),
    "IQ4_NL": (0, 5, 6, 4, 1, 2, 3),
    "Q8_0": (1, 5, 6, 0, 2, 3, 4),
    "Q4_K": (1, 4, 6, 5, 0, 2, 3),
    "Q6_K": (1, 4, 5, 6, 0, 2, 3),
}

# A thread's 16 weights of a row in PTX, of one half of a pass: four words of codes in $8 to $11, of which two are meant (of Q8_0
# four of eight), what stands beside them in $12 to $15 and a scale in $16; eight pairs of bfloat16 in $0 to $7, four of the first
# product's registers, then four of the second's.
_DECLARED = """
.reg .b32 t, u, s, mask, magic, middle, one, high, low, high1, low1, below, less, below1, less1;
.reg .f32 f, g, d, m;
.reg .b16 half, other;
.reg .pred p;
mov.b32 one, 0x3F803F80;
mov.b32 magic, 0x43004300;
"""


def _split(value: str, high: str, low: str) -> str:
    """Both halves of `high` the upper bits of a float32, of `low` its rest."""
    return f"""
mov.b32 t, {value};
prmt.b32 {high}, t, t, 0x3232;
and.b32 t, t, 0xFFFF0000;
mov.b32 f, t;
sub.f32 f, {value}, f;
cvt.rn.bf16x2.f32 {low}, f, f;
"""


def _scaled(to: int, high: str = "high", low: str = "low") -> str:
    """The pair `t` times a scale."""
    return f"mul.rn.bf16x2 u, t, {low}; fma.rn.bf16x2 ${to}, t, {high}, u;"


def _shifted(register: str, bits: int) -> str:
    return f"shr.u32 s, {register}, {bits};" if bits else f"mov.b32 s, {register};"


def _q4_0(half: int) -> str:
    lines = ["mov.b32 {half, other}, $16; cvt.f32.f16 d, half;", _split("d", "high", "low")]
    lines += ["mov.b32 mask, 0x000F000F; mov.b32 middle, 0xC308C308;"]  # -136
    for word in (2 * half, 2 * half + 1):
        for nibble in range(4):
            lines += [_shifted(f"${8 + word}", 4 * nibble), "lop3.b32 t, s, mask, magic, 0xEA;"]  # 128 + code
            lines += ["fma.rn.bf16x2 t, t, one, middle;", _scaled(word % 2 * 4 + nibble)]
    return "\n".join(lines)


def _q5(half: int, is_signed: bool) -> str:
    """$12: the fifth bits of 32 weights; $16: d, of Q5_1 d and the minimum."""
    lines = [".reg .b32 bits;", "mov.b32 {half, other}, $16; cvt.f32.f16 d, half;", _split("d", "high", "low")]
    if not is_signed:
        lines += ["cvt.f32.f16 m, other;", _split("m", "below", "less")]
    middle = "0xC310C310" if is_signed else "0xC300C300"  # -144, -128
    lines += [f"mov.b32 mask, 0x000F000F; mov.b32 middle, {middle};"]
    for word in (2 * half, 2 * half + 1):
        for run in range(2):
            # Four bits of neighbours: the first and third, then the second and fourth, to bit 4 of both halves.
            lines += [
                f"bfe.u32 bits, $12, {16 * run + 4 * word}, 4; mul.lo.u32 bits, bits, {(1 << 4) + (1 << 18)};"
            ]
            for pair in range(2):
                to = word % 2 * 4 + 2 * pair + run
                lines += [_shifted(f"${8 + word}", 8 * pair + 4 * run), "lop3.b32 t, s, mask, magic, 0xEA;"]
                lines += [_shifted("bits", pair), "and.b32 s, s, 0x00100010; or.b32 t, t, s;"]
                lines += ["fma.rn.bf16x2 t, t, one, middle;"]
                if is_signed:
                    lines += [_scaled(to)]
                else:
                    lines += ["fma.rn.bf16x2 u, t, low, less; fma.rn.bf16x2 t, t, high, below;"]
                    lines += [f"fma.rn.bf16x2 ${to}, t, one, u;"]
    return "\n".join(lines)


def _iq4_nl(half: int) -> str:
    """Both bytes of a level's bfloat16 are looked up, each in two halves of a table of 16 bytes."""
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    numbers = [struct.unpack("<I", struct.pack("<f", level))[0] >> 16 for level in levels]
    lines = [".reg .b32 sel, pick, a, b, lower, upper;", ".reg .b32 " + ", ".join(f"c{i}" for i in range(8)) + ";"]
    for i, shift in enumerate((0, 8)):
        for part in range(4):
            word = sum(((numbers[4 * part + k] >> shift) & 255) << (8 * k) for k in range(4))
            lines.append(f"mov.b32 c{4 * i + part}, {word:#010x};")
    lines += ["mov.b32 {half, other}, $16; cvt.f32.f16 d, half;", _split("d", "high", "low")]
    for word in (2 * half, 2 * half + 1):
        lines += [f"and.b32 sel, ${8 + word}, 0x77777777;", f"shr.u32 pick, ${8 + word}, 1;"]
        lines += ["and.b32 pick, pick, 0x44444444; or.b32 pick, pick, 0x32103210;"]
        for part in range(2):
            if part:
                lines += ["shr.u32 sel, sel, 16; shr.u32 pick, pick, 16;"]
            for i, name in enumerate(("lower", "upper")):
                lines += [f"prmt.b32 a, c{4 * i}, c{4 * i + 1}, sel; prmt.b32 b, c{4 * i + 2}, c{4 * i + 3}, sel;"]
                lines += [f"prmt.b32 {name}, a, b, pick;"]
            for pair, places in enumerate(("0x6240", "0x7351")):
                lines += [f"prmt.b32 t, lower, upper, {places};", _scaled(word % 2 * 4 + 2 * part + pair)]
    return "\n".join(lines)


def _q8_0(half: int) -> str:
    """A byte is 16 times its upper nibble and the lower one."""
    lines = [".reg .b32 sixteen; mov.b32 sixteen, 0x41804180;"]
    lines += ["mov.b32 {half, other}, $16; cvt.f32.f16 d, half;", _split("d", "high", "low")]
    lines += ["mov.b32 mask, 0x000F000F;"]
    for word in range(4 * half, 4 * half + 4):  # two of them are a product's four pairs
        for pair in range(2):
            lines += [_shifted(f"${8 + word}", 8 * pair), "lop3.b32 t, s, mask, magic, 0xEA;"]
            lines += ["xor.b32 s, s, 0x00800080; shr.u32 s, s, 4; lop3.b32 u, s, mask, magic, 0xEA;"]
            lines += ["mov.b32 middle, 0xC300C300; fma.rn.bf16x2 t, t, one, middle;"]  # -128
            lines += ["mov.b32 middle, 0xC308C308; fma.rn.bf16x2 u, u, one, middle;"]  # -136
            lines += ["fma.rn.bf16x2 t, u, sixteen, t;", _scaled(word // 2 % 2 * 4 + word % 2 * 2 + pair)]
    return "\n".join(lines)


def _q4_k(half: int) -> str:
    """$12: d and dmin, $13 to $15: six bits each of 8 scales and minima; $16: whether these are runs 4 to 7, and in bits 3
    and 4 how far to shift for the two of this thread."""
    lines = [".reg .b32 scales, minima, later, far;"]
    lines += ["and.b32 later, $16, 1; setp.ne.s32 p, later, 0; and.b32 far, $16, 24;"]
    lines += ["and.b32 s, $13, 0x3F3F3F3F; shr.u32 t, $13, 2; and.b32 t, t, 0x30303030;"]
    lines += ["mov.b32 mask, 0x0F0F0F0F; lop3.b32 t, $15, mask, t, 0xEA; selp.b32 scales, t, s, p;"]
    lines += ["and.b32 s, $14, 0x3F3F3F3F; shr.u32 t, $14, 2; and.b32 t, t, 0x30303030; shr.u32 u, $15, 4;"]
    lines += ["lop3.b32 t, u, mask, t, 0xEA; selp.b32 minima, t, s, p;"]
    lines += ["shr.u32 scales, scales, far; shr.u32 minima, minima, far;"]
    lines += ["mov.b32 {half, other}, $12; cvt.f32.f16 d, half; cvt.f32.f16 m, other;"]
    for run, (high, low, below, less) in enumerate(
        (("high", "low", "below", "less"), ("high1", "low1", "below1", "less1"))
    ):
        lines += [
            f"bfe.u32 s, scales, {8 * run}, 8; or.b32 s, s, 0x4B000000; mov.b32 g, s; sub.f32 g, g, 0f4B000000;"
        ]
        lines += ["mul.f32 g, g, d;", _split("g", high, low)]
        lines += [
            f"bfe.u32 s, minima, {8 * run}, 8; or.b32 s, s, 0x4B000000; mov.b32 g, s; sub.f32 g, 0f4B000000, g;"
        ]
        lines += ["mul.f32 g, g, m;", _split("g", below, less)]
    lines += ["mov.b32 mask, 0x000F000F; mov.b32 middle, 0xC300C300;"]  # -128
    for word in (2 * half, 2 * half + 1):
        for nibble in range(4):
            end = "1" if nibble % 2 else ""
            lines += [_shifted(f"${8 + word}", 4 * nibble), "lop3.b32 t, s, mask, magic, 0xEA;"]
            lines += [f"fma.rn.bf16x2 t, t, one, middle; fma.rn.bf16x2 u, t, low{end}, less{end};"]
            lines += [
                f"fma.rn.bf16x2 t, t, high{end}, below{end}; fma.rn.bf16x2 ${word % 2 * 4 + nibble}, t, one, u;"
            ]
    return "\n".join(lines)


def _q6_k(half: int) -> str:
    """$12 to $15: two more bits of low nibbles in bits 0 and 1 of a byte, of high ones in bits 4 and 5; $16: d and the levels of
    this thread's two runs."""
    lines = [".reg .b32 q, v; .reg .s32 level;"]
    lines += ["mov.b32 {other, half}, $16; cvt.f32.f16 d, half;"]
    for run, (high, low) in enumerate((("high", "low"), ("high1", "low1"))):
        lines += [
            f"bfe.s32 level, $16, {8 * run}, 8; cvt.rn.f32.s32 g, level; mul.f32 g, g, d;",
            _split("g", high, low),
        ]
    lines += ["mov.b32 middle, 0xC320C320;"]  # -160
    for word in (2 * half, 2 * half + 1):
        for run in range(2):
            end = "1" if run else ""
            if run:
                lines += [f"shr.u32 s, ${8 + word}, 4; mov.b32 v, ${12 + word};"]
            else:
                lines += [f"mov.b32 s, ${8 + word}; shl.b32 v, ${12 + word}, 4;"]
            lines += ["and.b32 v, v, 0x30303030; mov.b32 mask, 0x0F0F0F0F; lop3.b32 q, s, mask, v, 0xEA;"]
            lines += ["mov.b32 mask, 0x003F003F;"]
            for pair in range(2):
                lines += [
                    _shifted("q", 8 * pair),
                    "lop3.b32 t, s, mask, magic, 0xEA; fma.rn.bf16x2 t, t, one, middle;",
                ]
                lines += [_scaled(word % 2 * 4 + 2 * pair + run, "high" + end, "low" + end)]
    return "\n".join(lines)


_BODIES: dict[str, Callable[[int], str]] = {
    "Q4_0": _q4_0,
    "Q5_0": partial(_q5, is_signed=True),
    "Q5_1": partial(_q5, is_signed=False),
    "IQ4_NL": _iq4_nl,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def decoder(type: str, half: int) -> str:
    """PTX of one thread's part of a row in one half of a pass."""
    return "{" + _DECLARED + _BODIES[type](half) + "}"
