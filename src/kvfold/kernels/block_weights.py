"""One weight of a block format, in Triton: quant/decode.py said once more, for any grid of (row, column).

Owns what each bit means on a GPU. Rows of the types in matrix.PLANES have the fields of their blocks apart. `weight` serves
every kernel that wants a tile of weights; rounded_product.py and block_levels.py read whole blocks by the word instead.
Every type of quant/decode.py is here but for interleaved ones, which are put apart when they are uploaded. A codebook is a table on the device, as codebooks.py lays it.
"""

from __future__ import annotations

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no inline assembly


@triton.jit
def u8(raw, at, mask):
    """The byte at `at`, int32."""
    return tl.load(raw + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def u16(raw, at, mask):
    """The two bytes at `at`, which may be odd, int32."""
    return u8(raw, at, mask) | (u8(raw, at + 1, mask) << 8)


@triton.jit
def i8(raw, at, mask):
    return u8(raw, at, mask).to(tl.int8).to(tl.float32)


@triton.jit
def f16(raw, at, mask):
    """The float16 at `at` (even), float32."""
    return tl.load((raw + at).to(tl.pointer_type(tl.float16), bitcast=True), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_word(address, ALIGN: tl.constexpr):
    """The word at `address`, a multiple of ALIGN: of halves, or of bytes, where no word lies so."""
    if not COMPILED:
        half = address.to(tl.pointer_type(tl.uint16), bitcast=True)
        return tl.load(half).to(tl.int32) | (tl.load(half + 1).to(tl.int32) << 16)
    elif ALIGN % 4 == 0:
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    elif ALIGN % 2 == 1:
        return (
            load_byte(address)
            | (load_byte(address + 1) << 8)
            | (load_byte(address + 2) << 16)
            | (load_byte(address + 3) << 24)
        )
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b16 a, b; ld.global.b16 a, [$1]; ld.global.b16 b, [$1 + 2]; mov.b32 $0, {a, b};}",
            "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_byte(address):
    """The byte at `address`, int32."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ld.global.u8 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.load(address.to(tl.pointer_type(tl.uint8), bitcast=True)).to(tl.int32)


@triton.jit
def load_u16(address, ALIGN: tl.constexpr):
    """The two bytes at `address`, a multiple of ALIGN, int32."""
    if ALIGN % 2 == 1:
        return load_byte(address) | (load_byte(address + 1) << 8)
    elif COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b16 h; ld.global.b16 h, [$1]; cvt.u32.u16 $0, h;}",
            "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(address.to(tl.pointer_type(tl.uint16), bitcast=True)).to(tl.int32)


@triton.jit
def load2(address, ALIGN: tl.constexpr):
    """Two words at `address`, a multiple of ALIGN."""
    if COMPILED and ALIGN % 8 == 0:
        return tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [address],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return load_word(address, ALIGN), load_word(address + 4, ALIGN)


@triton.jit
def load4(address, ALIGN: tl.constexpr):
    """Four words at `address` (int64, a multiple of ALIGN). Loads of assembly have no layout of their own, so that a
    thread gets all of a block; they are not pure, so that none moves above a wait."""
    if COMPILED and ALIGN % 16 == 0:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [address],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        a, b = load2(address, ALIGN)
        c, d = load2(address + 8, ALIGN)
        return a, b, c, d


@triton.jit
def load_f16(address):
    """The float16 at `address`, float32."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.f16 $0, h;}",
            "=f,l", [address], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(address.to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)


@triton.jit
def number(raw, row, col, mask, row_bytes, NUMBER: tl.constexpr):
    """Numbers of a type of numbers, as they are. Neighbours in steps of one number, not of its bytes: else the compiler
    sees no neighbours and loads each by itself."""
    SIZE: tl.constexpr = NUMBER.primitive_bitwidth // 8
    at = raw.to(tl.pointer_type(NUMBER), bitcast=True) + row * (row_bytes // SIZE) + col
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def whole(q):
    """A whole number from 0 below 2^23 in float32: two plain operations, where a conversion takes a slow one."""
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _four_of_word(word, ASSEMBLY: tl.constexpr):
    """The float32 that `ASSEMBLY` leaves in $0 to $3 for a word in $4."""
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        "=&f,=&f,=&f,=&f,r",
        [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def iq4_of_word(word):
    """The levels of the four lower nibbles of a word, float32."""
    if COMPILED:
        # A byte permutation looks four nibbles up at once, twice for the halves of the codebook, and picks by bit 3; then
        # each byte goes below the exponent of 2^23. 14 instructions for four weights, where selects take 56.
        return _four_of_word(
            word,
            """{
            .reg .b32 s, t, low, high, a, b, magic;
            and.b32 s, $4, 0x7777;
            mov.b32 a, 0x3E2C1700;
            mov.b32 b, 0x75695C4E;
            prmt.b32 low, a, b, s;
            mov.b32 a, 0xA5988C80;
            mov.b32 b, 0xF0D8C4B4;
            prmt.b32 high, a, b, s;
            shr.u32 t, $4, 1;
            and.b32 t, t, 0x4444;
            or.b32 t, t, 0x3210;
            prmt.b32 t, low, high, t;
            mov.b32 magic, 0x4B000000;
            prmt.b32 $0, t, magic, 0x7650;
            prmt.b32 $1, t, magic, 0x7651;
            prmt.b32 $2, t, magic, 0x7652;
            prmt.b32 $3, t, magic, 0x7653;
            sub.f32 $0, $0, 0f4B00007F;
            sub.f32 $1, $1, 0f4B00007F;
            sub.f32 $2, $2, 0f4B00007F;
            sub.f32 $3, $3, 0f4B00007F;
            }""",
        )
    else:
        return iq4(word & 15), iq4((word >> 4) & 15), iq4((word >> 8) & 15), iq4((word >> 12) & 15)


@triton.jit
def iq4(q):
    """Level q of IQ4_NL's codebook: four of its sixteen bytes, 127 added, in each word."""
    low = tl.where(q < 4, 0x3E2C1700, 0x75695C4E)
    high = tl.where(q < 12, -0x5A677380, -0xF273B4C)
    word = tl.where(q < 8, low, high)
    return whole((word >> ((q & 3) * 8)) & 255) - 127.0


@triton.jit
def e4m3(code):
    """F8_E4M3fn of uint8: exponent and mantissa in a float32's place are the value times 2^-120, subnormals included."""
    code = code.to(tl.int32)
    magnitude = ((code & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    magnitude = tl.where((code & 127) == 127, float("nan"), magnitude)
    return tl.where(code < 128, magnitude, -magnitude)


@triton.jit
def e4m3_of_word(word, HARDWARE: tl.constexpr):
    """The four F8_E4M3 of a word, float32. HARDWARE: the GPU converts two at once, as sm_89 and newer do."""
    if COMPILED and HARDWARE:
        return _four_of_word(
            word,
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 p, q;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 p, low;
            cvt.rn.f16x2.e4m3x2 q, high;
            mov.b32 {a, b}, p;
            mov.b32 {c, d}, q;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
        )
    else:
        return e4m3(word & 255), e4m3((word >> 8) & 255), e4m3((word >> 16) & 255), e4m3((word >> 24) & 255)


@triton.jit
def to_e4m3(x):
    """float32 of at most 448 to the nearest F8_E4M3, ties to even."""
    if COMPILED:
        return x.to(tl.float8e4nv)
    else:  # the interpreter loses the carry from mantissa to exponent
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 120 * 8
        below = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15
        code = tl.where(size < 0x3C800000, below, normal) | ((bits >> 24) & 128)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def k_scale(raw, at, run, mask):
    """Scale and minimum of run 0 to 7 of Q4_K and Q5_K, from the 12 bytes at `at`: float32 each."""
    is_low = run < 4
    first = u8(raw, at + (run & 3), mask)
    second = u8(raw, at + 4 + (run & 3), mask)
    low = u8(raw, at + 8 + (run & 3), mask)
    scale = tl.where(is_low, first & 63, (low & 15) | ((first >> 6) << 4))
    minimum = tl.where(is_low, second & 63, (low >> 4) | ((second >> 6) << 4))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def mxfp4_scale(code):
    """Half of 2^(code - 127), float32: code - 1 in the exponent's place, subnormal below 2."""
    bits = tl.where(code < 2, 0x200000 << (code & 1), (code - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nvfp4_scale(code):
    """Half of an F8_E4M3 without sign (bit 7 is ignored), where 0x7f alone means 0."""
    half = ((code & 127) << 20).to(tl.float32, bitcast=True) * 6.64613997892458e35  # 2^119
    return tl.where(code == 127, 0.0, half)


@triton.jit
def e2m1(q):
    """Twice the F4_E2M1 of a nibble, float32."""
    size = q & 7
    doubled = tl.where(size < 4, size, (2 + (size & 1)) << (size >> 1) >> 1)
    return tl.where(q < 8, doubled, -doubled).to(tl.float32)


@triton.jit
def even_sign(sevens, place):
    """Sign 0 to 7 of seven bits: the eighth makes the number of minus signs even."""
    odd = sevens ^ (sevens >> 4)
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1)
    return tl.where(place < 7, sevens >> place, odd) & 1


@triton.jit
def iq2_size(word, place):
    """8, 25 or 43 by digit `place` of a word of the codebook, int32."""
    digit = (word >> (place * 4)) & 15
    return 8 + digit * 17 + (digit >> 1)


@triton.jit
def _signed(size, is_minus):
    """float32"""
    size = size.to(tl.float32)
    return tl.where(is_minus != 0, -size, size)


@triton.jit
def _iq1_level(word, place, is_minus):
    """-1, 0 or 1, with 1/8 added or subtracted, by digit `place` of a word of the codebook."""
    return ((word >> (place * 4)) & 15).to(tl.float32) - tl.where(is_minus != 0, 1.125, 0.875)


@triton.jit
def weight(raw, scale, row, col, mask, row_bytes, scale_cols, TYPE: tl.constexpr):
    """Weights at (row, col), float32 of their broadcast shape; 0 where not `mask`.

    raw: uint8, the first row's first block; row_bytes: int64. row: int64. scale: float32 [.., scale_cols] of F8_E4M3, of a
    type with a codebook its words, int32.
    """
    start = row * row_bytes
    if TYPE == "F32":
        return number(raw, row, col, mask, row_bytes, tl.float32)
    elif TYPE == "F16":
        return number(raw, row, col, mask, row_bytes, tl.float16).to(tl.float32)
    elif TYPE == "BF16":
        return number(raw, row, col, mask, row_bytes, tl.bfloat16).to(tl.float32)
    elif TYPE == "F64":
        return number(raw, row, col, mask, row_bytes, tl.float64).to(tl.float32)
    elif TYPE == "I8":
        return number(raw, row, col, mask, row_bytes, tl.int8).to(tl.float32)
    elif TYPE == "I16":
        return number(raw, row, col, mask, row_bytes, tl.int16).to(tl.float32)
    elif TYPE == "I32":
        return number(raw, row, col, mask, row_bytes, tl.int32).to(tl.float32)
    elif TYPE == "I64":
        return number(raw, row, col, mask, row_bytes, tl.int64).to(tl.float32)
    elif TYPE == "F8_E4M3":
        factor = tl.load(scale + row // 128 * scale_cols + col // 128, mask=mask, other=0.0)
        return e4m3(tl.load(raw + start + col, mask=mask, other=0)) * factor
    elif TYPE == "Q8_0":
        d = f16(raw, start + row_bytes // 34 * 32 + col // 32 * 2, mask)
        return d * i8(raw, start + col, mask)
    elif TYPE == "Q4_0" or TYPE == "IQ4_NL":  # noqa: PLR1714 (a set is no constant to Triton)
        d = f16(raw, start + row_bytes // 18 * 16 + col // 32 * 2, mask)
        q = (u8(raw, start + col // 32 * 16 + col % 16, mask) >> (col % 32 // 16 * 4)) & 15
        if TYPE == "IQ4_NL":
            return d * iq4(q)
        else:
            return d * (q.to(tl.float32) - 8.0)
    elif TYPE == "Q4_1":
        at = start + col // 32 * 20
        q = (u8(raw, at + 4 + col % 16, mask) >> (col % 32 // 16 * 4)) & 15
        return f16(raw, at, mask) * q.to(tl.float32) + f16(raw, at + 2, mask)
    elif TYPE == "Q5_0" or TYPE == "Q5_1":  # noqa: PLR1714
        blocks = row_bytes // (22 if TYPE == "Q5_0" else 24)
        q = (u8(raw, start + col // 32 * 16 + col % 16, mask) >> (col % 32 // 16 * 4)) & 15
        q = q | (((u8(raw, start + blocks * 16 + col // 8, mask) >> (col % 8)) & 1) << 4)
        at = start + blocks * 20 + col // 32 * (2 if TYPE == "Q5_0" else 4)
        if TYPE == "Q5_0":
            return f16(raw, at, mask) * (q.to(tl.float32) - 16.0)
        else:
            return f16(raw, at, mask) * q.to(tl.float32) + f16(raw, at + 2, mask)
    elif TYPE == "Q2_K":
        at, j = start + col // 256 * 84, col % 256
        q = (u8(raw, at + 16 + j // 128 * 32 + j % 32, mask) >> (j % 128 // 32 * 2)) & 3
        packed = u8(raw, at + j // 16, mask)
        d = f16(raw, at + 80, mask) * (packed & 15).to(tl.float32)
        return d * q.to(tl.float32) - f16(raw, at + 82, mask) * (packed >> 4).to(tl.float32)
    elif TYPE == "Q3_K":
        blocks, j = row_bytes // 110, col % 256
        at = start + blocks * 96 + col // 256 * 12
        q = (u8(raw, start + col // 128 * 32 + j % 32, mask) >> (j % 128 // 32 * 2)) & 3
        q = q | (((u8(raw, start + blocks * 64 + col // 256 * 32 + j % 32, mask) >> (j // 32)) & 1) << 2)
        run = j // 16
        level = (u8(raw, at + run % 8, mask) >> (run // 8 * 4)) & 15
        level = level | (((u8(raw, at + 8 + run % 4, mask) >> (run // 4 * 2)) & 3) << 4)
        d = f16(raw, start + blocks * 108 + col // 256 * 2, mask)
        return d * (level - 32).to(tl.float32) * (q - 4).to(tl.float32)
    elif TYPE == "Q4_K":
        at, j = start + col // 256 * 144, col % 256
        q = (u8(raw, at + 16 + j // 64 * 32 + j % 32, mask) >> (j % 64 // 32 * 4)) & 15
        level, minimum = k_scale(raw, at + 4, j // 32, mask)
        return f16(raw, at, mask) * level * q.to(tl.float32) - f16(raw, at + 2, mask) * minimum
    elif TYPE == "Q5_K":
        at, j = start + col // 256 * 176, col % 256
        q = (u8(raw, at + 48 + j // 64 * 32 + j % 32, mask) >> (j % 64 // 32 * 4)) & 15
        q = q | (((u8(raw, at + 16 + j % 32, mask) >> (j // 32)) & 1) << 4)
        level, minimum = k_scale(raw, at + 4, j // 32, mask)
        return f16(raw, at, mask) * level * q.to(tl.float32) - f16(raw, at + 2, mask) * minimum
    elif TYPE == "Q6_K":
        blocks = row_bytes // 210
        q = (u8(raw, start + col // 128 * 64 + col % 64, mask) >> (col % 128 // 64 * 4)) & 15
        top = u8(raw, start + blocks * 128 + col // 128 * 32 + col % 32, mask)
        q = q | (((top >> (col % 128 // 32 * 2)) & 3) << 4)
        d = f16(raw, start + blocks * 208 + col // 256 * 2, mask)
        return d * i8(raw, start + blocks * 192 + col // 16, mask) * (q - 32).to(tl.float32)
    elif TYPE == "IQ4_XS":
        at, j = start + col // 256 * 136, col % 256
        run = j // 32
        level = (u8(raw, at + 4 + run // 2, mask) >> (run % 2 * 4)) & 15
        level = level | (((u8(raw, at + 2 + run // 4, mask) >> (run % 4 * 2)) & 3) << 4)
        q = (u8(raw, at + 8 + run * 16 + j % 16, mask) >> (j % 32 // 16 * 4)) & 15
        return f16(raw, at, mask) * (level - 32).to(tl.float32) * iq4(q)
    elif TYPE == "Q6_0":
        blocks = row_bytes // 26
        q = (u8(raw, start + col // 32 * 16 + col % 16, mask) >> (col % 32 // 16 * 4)) & 15
        top = u8(raw, start + blocks * 16 + col // 32 * 8 + col % 8, mask)
        q = q | (((top >> (col % 32 // 16 * 2 + col % 16 // 8 * 4)) & 3) << 4)
        return f16(raw, start + blocks * 24 + col // 32 * 2, mask) * (q.to(tl.float32) - 32.0)
    elif TYPE == "Q8_1":
        at = start + col // 32 * 36
        return f16(raw, at, mask) * i8(raw, at + 4 + col % 32, mask)
    elif TYPE == "Q8_K":
        at = start + col // 256 * 292
        d = tl.load((raw + at).to(tl.pointer_type(tl.float32), bitcast=True), mask=mask, other=0.0)
        return d * i8(raw, at + 4 + col % 256, mask)
    elif TYPE == "Q1_0":
        d = f16(raw, start + row_bytes // 18 * 16 + col // 128 * 2, mask)
        return tl.where(((u8(raw, start + col // 8, mask) >> (col % 8)) & 1) != 0, d, -d)
    elif TYPE == "Q2_0":
        d = f16(raw, start + row_bytes // 18 * 16 + col // 64 * 2, mask)
        return d * (((u8(raw, start + col // 4, mask) >> (col % 4 * 2)) & 3).to(tl.float32) - 1.0)
    elif TYPE == "TQ1_0":
        block, j = col // 256, col % 256
        k = j - 160
        in_last = j >= 240
        place = tl.where(j < 160, block * 48 + j % 32, block * 48 + 32 + k % 16)
        place = tl.where(in_last, row_bytes // 54 * 48 + block * 4 + j % 4, place)
        digit = tl.where(j < 160, j // 32, tl.where(in_last, (j - 240) // 4, k // 16))
        power = tl.where(digit < 2, 1 + 2 * digit, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81)))
        trit = (((u8(raw, start + place, mask) * power) & 255) * 3) >> 8
        return f16(raw, start + row_bytes // 54 * 52 + block * 2, mask) * (trit.to(tl.float32) - 1.0)
    elif TYPE == "TQ2_0":
        block, j = col // 256, col % 256
        q = (u8(raw, start + block * 64 + j // 128 * 32 + j % 32, mask) >> (j % 128 // 32 * 2)) & 3
        return f16(raw, start + row_bytes // 66 * 64 + block * 2, mask) * (q.to(tl.float32) - 1.0)
    elif TYPE == "MXFP4":
        q = (u8(raw, start + col // 32 * 16 + col % 16, mask) >> (col % 32 // 16 * 4)) & 15
        return mxfp4_scale(u8(raw, start + row_bytes // 17 * 16 + col // 32, mask)) * e2m1(q)
    elif TYPE == "NVFP4":
        q = (u8(raw, start + col // 16 * 8 + col % 8, mask) >> (col % 16 // 8 * 4)) & 15
        return nvfp4_scale(u8(raw, start + row_bytes // 36 * 32 + col // 16, mask)) * e2m1(q)
    elif TYPE == "IQ2_XXS":
        at = start + col // 32 * 8
        packed = u16(raw, at + 4, mask) | (u16(raw, at + 6, mask) << 16)
        word = tl.load(scale + u8(raw, at + col % 32 // 8, mask), mask=mask, other=0)
        d = f16(raw, start + row_bytes // 66 * 64 + col // 256 * 2, mask)
        is_minus = even_sign((packed >> (col % 32 // 8 * 7)) & 127, col % 8)
        return d * (((packed >> 28) & 15).to(tl.float32) + 0.5) * 0.25 * _signed(iq2_size(word, col % 8), is_minus)
    elif TYPE == "IQ2_XS":
        blocks = row_bytes // 74
        packed = u16(raw, start + col // 8 * 2, mask)
        level = (u8(raw, start + blocks * 64 + col // 32, mask) >> (col % 32 // 16 * 4)) & 15
        word = tl.load(scale + (packed & 511), mask=mask, other=0)
        d = f16(raw, start + blocks * 72 + col // 256 * 2, mask)
        return (
            d
            * (level.to(tl.float32) + 0.5)
            * 0.25
            * _signed(iq2_size(word, col % 8), even_sign(packed >> 9, col % 8))
        )
    elif TYPE == "IQ2_S":
        blocks = row_bytes // 82
        index = (u8(raw, start + blocks * 64 + col // 32, mask) >> (col % 32 // 8 * 2)) & 3
        word = tl.load(scale + (u8(raw, start + col // 8, mask) | (index << 8)), mask=mask, other=0)
        level = (u8(raw, start + blocks * 72 + col // 32, mask) >> (col % 32 // 16 * 4)) & 15
        is_minus = (u8(raw, start + blocks * 32 + col // 8, mask) >> (col % 8)) & 1
        d = f16(raw, start + blocks * 80 + col // 256 * 2, mask)
        return d * (level.to(tl.float32) + 0.5) * 0.25 * _signed(iq2_size(word, col % 8), is_minus)
    elif TYPE == "IQ3_XXS":
        blocks = row_bytes // 98
        at = start + blocks * 64 + col // 32 * 4
        packed = u16(raw, at, mask) | (u16(raw, at + 2, mask) << 16)
        word = tl.load(scale + u8(raw, start + col // 4, mask), mask=mask, other=0)
        d = f16(raw, start + blocks * 96 + col // 256 * 2, mask)
        is_minus = even_sign((packed >> (col % 32 // 8 * 7)) & 127, col % 8)
        return (
            d
            * (((packed >> 28) & 15).to(tl.float32) + 0.5)
            * 0.5
            * _signed((word >> (col % 4 * 8)) & 255, is_minus)
        )
    elif TYPE == "IQ3_S":
        blocks = row_bytes // 110
        ninth = (u8(raw, start + blocks * 96 + col // 32, mask) >> (col % 32 // 4)) & 1
        word = tl.load(scale + (u8(raw, start + col // 4, mask) | (ninth << 8)), mask=mask, other=0)
        level = (u8(raw, start + blocks * 104 + col // 64, mask) >> (col % 64 // 32 * 4)) & 15
        is_minus = (u8(raw, start + blocks * 64 + col // 8, mask) >> (col % 8)) & 1
        d = f16(raw, start + blocks * 108 + col // 256 * 2, mask)
        return d * (level * 2 + 1).to(tl.float32) * _signed((word >> (col % 4 * 8)) & 255, is_minus)
    elif TYPE == "IQ1_S" or TYPE == "IQ1_S_R4":  # noqa: PLR1714
        if TYPE == "IQ1_S":
            high = start + row_bytes // 50 * 32
            d = f16(raw, start + row_bytes // 50 * 48 + col // 256 * 2, mask)
        else:
            high = start + (row_bytes - 2) // 6 * 4
            d = f16(raw, start + (row_bytes - 2) + 0 * col, mask)
        qh = u16(raw, high + col // 32 * 2, mask)
        index = u8(raw, start + col // 8, mask) | (((qh >> (col % 32 // 8 * 3)) & 7) << 8)
        level = _iq1_level(tl.load(scale + index, mask=mask, other=0), col % 8, qh >> 15)
        return d * (((qh >> 12) & 7) * 2 + 1).to(tl.float32) * level
    elif TYPE == "IQ1_M":
        at, j = start + col // 256 * 56, col % 256
        high = (u8(raw, at + 32 + j // 16, mask) >> (j % 16 // 8 * 4)) & 15
        index = u8(raw, at + j // 8, mask) | ((high & 7) << 8)
        word = u16(raw, at + 48 + j // 64 * 2, mask)
        d = (u16(raw, at + 48, mask) >> 12) | ((u16(raw, at + 50, mask) >> 12) << 4)
        d = d | ((u16(raw, at + 52, mask) >> 12) << 8) | ((u16(raw, at + 54, mask) >> 12) << 12)
        factor = d.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        factor = factor * (((word >> (j % 64 // 16 * 3)) & 7) * 2 + 1).to(tl.float32)
        return factor * _iq1_level(tl.load(scale + index, mask=mask, other=0), col % 8, high >> 3)
    else:
        tl.static_assert(TYPE == "IQ1_M_R4", "a type of quant/decode.py")
        runs = (row_bytes - 2) // 7
        high = (u8(raw, start + runs * 4 + col // 16, mask) >> (col % 16 // 8 * 4)) & 15
        index = u8(raw, start + col // 8, mask) | ((high & 7) << 8)
        level = (u8(raw, start + runs * 6 + col // 32, mask) >> (col % 32 // 16 * 4)) & 15
        half = u16(raw, start + runs * 7 + 0 * col, mask)
        d = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return d * level.to(tl.float32) * _iq1_level(tl.load(scale + index, mask=mask, other=0), col % 8, high >> 3)
