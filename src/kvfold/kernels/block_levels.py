"""Runs of 32 weights of a block as whole numbers: eight words of four signed bytes, and a factor for each half of the run.

A weight is its level times the factor of its half, less the minimum of its half in types that have one. rounded_product.py multiplies levels by codes, four an instruction;
tile_product.py writes them as numbers. `run_words` loads what a run has, `run_levels` makes its levels, so that loads may come
long before. Levels are in the order of the row. Owns the types of TYPES; codebooks.py explains the codebook.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfold.kernels.block_weights import (
    COMPILED,
    load2,
    load4,
    load_byte,
    load_f16,
    load_u16,
    load_word,
    mxfp4_scale,
    nvfp4_scale,
)

TYPES = frozenset(
    [
        "IQ1_S",
        "IQ1_M",
        "IQ1_S_R4",
        "IQ1_M_R4",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_XS",
        "MXFP4",
        "NVFP4",
        "Q2_K",
        "Q3_K",
        "Q5_K",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q6_0",
        "Q1_0",
        "Q2_0",
    ]
)


@triton.jit
def _permute(low, high, word):
    """The bytes of low and high that the four lower digits of `word` pick, 0 to 7 each."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        picked = 0 * word
        for i in tl.static_range(4):
            digit = (word >> (4 * i)) & 7
            picked |= ((tl.where(digit < 4, low, high) >> ((digit & 3) * 8)) & 255) << (8 * i)
        return picked


@triton.jit
def _of_digits(word, low, high):
    """The bytes that the eight digits of `word` pick: two words."""
    return _permute(low, high, word), _permute(low, high, word >> 16)


@triton.jit
def _four_of_nibbles(word, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """The bytes that the four lower nibbles of `word` pick of four words, 0 to 15 each."""
    picks = word & 0x7777
    low, high = _permute(A + 0 * word, B + 0 * word, picks), _permute(C + 0 * word, D + 0 * word, picks)
    return _permute(low, high, ((word >> 1) & 0x4444) | 0x3210)


@triton.jit
def _of_nibbles(word, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """(levels of the low nibbles of a word's bytes, of the high ones)."""
    near, far = _four_of_nibbles(word, A, B, C, D), _four_of_nibbles(word >> 16, A, B, C, D)
    return _permute(near, far, 0x6420 + 0 * word), _permute(near, far, 0x7531 + 0 * word)


@triton.jit
def _e2m1(word):
    """Twice the F4_E2M1 of each nibble."""
    return _of_nibbles(word, 0x03020100, 0x0C080604, -0x2010100, -0xB070504)


@triton.jit
def _iq4(word):
    """The levels of IQ4_NL's codebook."""
    return _of_nibbles(word, -0x4052677F, -0x9152231, 0x26190D01, 0x71594535)


@triton.jit
def _ones(bits, AT: tl.constexpr):
    """Four neighbours of `bits` from bit AT on, as bytes of 0 or 1."""
    return (((bits >> AT) & 15) * 0x204081) & 0x01010101


@triton.jit
def _even_signs(sevens):
    """Bytes of seven signs and of an eighth that makes the number of minus signs even."""
    odd = sevens ^ (sevens >> 4)
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1)
    return sevens | ((odd & 0x01010101) << 7)


@triton.jit
def _sevens(packed):
    """Four groups of seven bits to the bytes of a word."""
    return (packed & 0x7F) | ((packed << 1) & 0x7F00) | ((packed << 2) & 0x7F0000) | ((packed << 3) & 0x7F000000)


@triton.jit
def _entry(codebook, index):
    return load_word((codebook + index).to(tl.int64), 4)


@triton.jit
def _iq2(codebook, index, signs):
    """Eight levels of eight signs (in the lowest byte): the third bit of a digit picks the negative ones."""
    signs = signs & 255
    signs = (signs | (signs << 12)) & 0x000F000F
    signs = (signs | (signs << 6)) & 0x03030303
    signs = (signs | (signs << 3)) & 0x11111111
    digits = _entry(codebook, index) | (signs << 2)
    return _of_digits(digits, 0x002B1908 + 0 * digits, 0x00D5E7F8 + 0 * digits)


@triton.jit
def _iq3(codebook, index, signs, AT: tl.constexpr):
    """Four levels, none of them 0, of the signs from bit AT on."""
    minus = _ones(signs, AT)
    return (_entry(codebook, index) ^ (minus * 255)) + minus


@triton.jit
def _iq1(codebook, index, is_minus):
    """Eight levels of -1, 0 and 1, eight times, 1 added or subtracted."""
    digits = _entry(codebook, index)
    levels = tl.where(is_minus != 0, 0x0007FFF7, 0x000901F9)
    return _of_digits(digits, levels, levels)


@triton.jit
def _less(levels, BY: tl.constexpr):
    """Four bytes below 128, less BY each."""
    return ((levels | -0x7F7F7F80) - BY * 0x01010101) ^ -0x7F7F7F80


@triton.jit
def _half(bits):
    """float16 in the lower half of a word, float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def run_words(start, b, COLS: tl.constexpr, ROW_BYTES: tl.constexpr, TYPE: tl.constexpr):
    """What runs `b` int32 of the rows at `start` int64 have, of their broadcast shape; words first."""
    BLOCKS: tl.constexpr = COLS // 256
    RUNS: tl.constexpr = COLS // 32
    if TYPE == "IQ2_XXS":
        index, packed = load2(start + b * 8, ROW_BYTES)
        return index, packed, load_f16(start + BLOCKS * 64 + b // 8 * 2)
    elif TYPE == "IQ2_XS":
        near, far = load2(start + b * 8, ROW_BYTES)
        return near, far, load_byte(start + BLOCKS * 64 + b), load_f16(start + BLOCKS * 72 + b // 8 * 2)
    elif TYPE == "IQ2_S":
        index, signs = load_word(start + b * 4, ROW_BYTES), load_word(start + BLOCKS * 32 + b * 4, ROW_BYTES)
        top, scales = load_byte(start + BLOCKS * 64 + b), load_byte(start + BLOCKS * 72 + b)
        return index, signs, top, scales, load_f16(start + BLOCKS * 80 + b // 8 * 2)
    elif TYPE == "IQ3_XXS":
        near, far = load2(start + b * 8, ROW_BYTES)
        return (
            near,
            far,
            load_word(start + BLOCKS * 64 + b * 4, ROW_BYTES),
            load_f16(start + BLOCKS * 96 + b // 8 * 2),
        )
    elif TYPE == "IQ3_S":
        near, far = load2(start + b * 8, ROW_BYTES)
        signs, top = load_word(start + BLOCKS * 64 + b * 4, ROW_BYTES), load_byte(start + BLOCKS * 96 + b)
        return (
            near,
            far,
            signs,
            top,
            load_byte(start + BLOCKS * 104 + b // 2),
            load_f16(start + BLOCKS * 108 + b // 8 * 2),
        )
    elif TYPE == "IQ1_S":
        index, top = load_word(start + b * 4, ROW_BYTES), load_u16(start + BLOCKS * 32 + b * 2, ROW_BYTES)
        return index, top, load_f16(start + BLOCKS * 48 + b // 8 * 2)
    elif TYPE == "IQ1_S_R4":
        index, top = load_word(start + b * 4, ROW_BYTES), load_u16(start + RUNS * 4 + b * 2, ROW_BYTES)
        return index, top, load_f16(start + RUNS * 6 + 0 * b)
    elif TYPE == "IQ1_M":
        at = start + b // 8 * 56
        index, top = load_word(at + b % 8 * 4, 4), load_u16(at + 32 + b % 8 * 2, 2)
        near, far = load2(at + 48, ROW_BYTES)
        return index, top, near, far
    elif TYPE == "IQ1_M_R4":
        index, top = load_word(start + b * 4, ROW_BYTES), load_u16(start + RUNS * 4 + b * 2, ROW_BYTES)
        return index, top, load_byte(start + RUNS * 6 + b), load_u16(start + RUNS * 7 + 0 * b, RUNS)
    elif TYPE == "IQ4_XS":
        at = start + b // 8 * 136
        w0, w1, w2, w3 = load4(at + 8 + b % 8 * 16, 8)
        both, low = load2(at, 8)
        return w0, w1, w2, w3, both, low
    elif TYPE == "MXFP4":
        w0, w1, w2, w3 = load4(start + b * 16, ROW_BYTES)
        return w0, w1, w2, w3, load_byte(start + RUNS * 16 + b)
    elif TYPE == "NVFP4":
        w0, w1, w2, w3 = load4(start + b * 16, ROW_BYTES)
        return w0, w1, w2, w3, load_u16(start + RUNS * 16 + b * 2, ROW_BYTES)
    elif TYPE == "Q2_K":
        # Four runs share the bytes of their levels: lanes beside each other ask for the same ones.
        at = start + b // 8 * 84
        near, far = at + 16 + b % 8 // 4 * 32, at + 32 + b % 8 // 4 * 32
        w0, w1, w2, w3 = load4(near, 4)
        w4, w5, w6, w7 = load4(far, 4)
        return w0, w1, w2, w3, w4, w5, w6, w7, load_u16(at + b % 8 * 2, 2), load_word(at + 80, 4)
    elif TYPE == "Q3_K":
        near = start + b // 4 * 32
        w0, w1, w2, w3 = load4(near, ROW_BYTES)
        w4, w5, w6, w7 = load4(near + 16, ROW_BYTES)
        top = start + BLOCKS * 64 + b // 8 * 32
        h0, h1, h2, h3 = load4(top, ROW_BYTES)
        h4, h5, h6, h7 = load4(top + 16, ROW_BYTES)
        at = start + BLOCKS * 96 + b // 8 * 12
        low, pairs = load_u16(at + b % 4 * 2, 2), load_u16(at + 8 + b % 2 * 2, 2)
        d = load_f16(start + BLOCKS * 108 + b // 8 * 2)
        return w0, w1, w2, w3, w4, w5, w6, w7, h0, h1, h2, h3, h4, h5, h6, h7, low, pairs, d
    elif TYPE == "Q5_K":
        at = start + b // 8 * 176
        d, s0, s1, s2 = load4(at, 16)
        h0, h1, h2, h3 = load4(at + 16, 16)
        h4, h5, h6, h7 = load4(at + 32, 16)
        w0, w1, w2, w3 = load4(at + 48 + b % 8 // 2 * 32, 16)
        w4, w5, w6, w7 = load4(at + 64 + b % 8 // 2 * 32, 16)
        return w0, w1, w2, w3, w4, w5, w6, w7, h0, h1, h2, h3, h4, h5, h6, h7, d, s0, s1, s2
    elif TYPE == "Q4_1":
        at = start + b * 20
        w0, w1, w2, w3 = load4(at + 4, 4)
        return w0, w1, w2, w3, load_word(at, 4)
    elif TYPE == "Q5_0":
        w0, w1, w2, w3 = load4(start + b * 16, ROW_BYTES)
        return w0, w1, w2, w3, load_word(start + RUNS * 16 + b * 4, ROW_BYTES), load_f16(start + RUNS * 20 + b * 2)
    elif TYPE == "Q5_1":
        w0, w1, w2, w3 = load4(start + b * 16, ROW_BYTES)
        return (
            w0,
            w1,
            w2,
            w3,
            load_word(start + RUNS * 16 + b * 4, ROW_BYTES),
            load_word(start + RUNS * 20 + b * 4, ROW_BYTES),
        )
    elif TYPE == "Q6_0":
        w0, w1, w2, w3 = load4(start + b * 16, ROW_BYTES)
        near, far = load2(start + RUNS * 16 + b * 8, ROW_BYTES)
        return w0, w1, w2, w3, near, far, load_f16(start + RUNS * 24 + b * 2)
    elif TYPE == "Q1_0":
        return load_word(start + b * 4, ROW_BYTES), load_f16(start + RUNS * 4 + b // 4 * 2)
    else:
        tl.static_assert(TYPE == "Q2_0", "a type of TYPES")
        near, far = load2(start + b * 8, ROW_BYTES)
        return near, far, load_f16(start + RUNS * 8 + b // 2 * 2)


@triton.jit
def _q3(low, top, shift, bit):
    """Levels of Q3_K: two bits from `shift` on, and a third that takes 4 away where it is 0."""
    return _less(((low >> shift) & 0x03030303) | (((top >> bit) & 0x01010101) << 2), 4)


@triton.jit
def _q5(low, top, nibble, bit):
    """Levels of Q5_K."""
    return ((low >> nibble) & 0x0F0F0F0F) | (((top >> bit) & 0x01010101) << 4)


@triton.jit
def _nibble_and_bits(w, bits, K: tl.constexpr):
    """Levels 4 K to 4 K + 3 of Q5_1; of Q5_0 with 16 added."""
    return ((w >> (K // 4 * 4)) & 0x0F0F0F0F) | (_ones(bits, 4 * K) << 4)


@triton.jit
def _nibble_and_pair(w, top, K: tl.constexpr):
    """The same of Q6_0, whose pairs of bits belong to weights j, j + 16, j + 8, j + 24."""
    return ((w >> (K // 4 * 4)) & 0x0F0F0F0F) | (((top >> (K % 4 // 2 * 4 + K // 4 * 2)) & 0x03030303) << 4)


@triton.jit
def _pairs(word, AT: tl.constexpr):
    """Four pairs of bits of a byte, less 1."""
    bits = (word >> AT) & 255
    return _less((bits & 3) | ((bits << 6) & 0x300) | ((bits << 12) & 0x30000) | ((bits << 18) & 0x3000000), 1)


@triton.jit
def run_levels(w, b, codebook, TYPE: tl.constexpr):
    """w: of `run_words` for runs b. Eight words of levels, the factors float32 of the first and of the last 16, and what is
    taken away from these, in types with a minimum."""
    none = tl.zeros(w[0].shape, tl.float32)
    if TYPE == "IQ2_XXS":
        index, packed, d = w
        signs = _even_signs(_sevens(packed))
        a0, a1 = _iq2(codebook, index & 255, signs)
        b0, b1 = _iq2(codebook, (index >> 8) & 255, signs >> 8)
        c0, c1 = _iq2(codebook, (index >> 16) & 255, signs >> 16)
        d0, d1 = _iq2(codebook, (index >> 24) & 255, signs >> 24)
        factor = d * ((((packed >> 28) & 15).to(tl.float32) + 0.5) * 0.25)
        return a0, a1, b0, b1, c0, c1, d0, d1, factor, factor, none, none
    elif TYPE == "IQ2_XS":
        near, far, scales, d = w
        signs = _even_signs(((near >> 9) & 0x7F007F) | (((far >> 9) & 0x7F007F) << 8))
        a0, a1 = _iq2(codebook, near & 511, signs)
        b0, b1 = _iq2(codebook, (near >> 16) & 511, signs >> 16)
        c0, c1 = _iq2(codebook, far & 511, signs >> 8)
        d0, d1 = _iq2(codebook, (far >> 16) & 511, signs >> 24)
        first, last = (scales & 15).to(tl.float32), (scales >> 4).to(tl.float32)
        return a0, a1, b0, b1, c0, c1, d0, d1, d * ((first + 0.5) * 0.25), d * ((last + 0.5) * 0.25), none, none
    elif TYPE == "IQ2_S":
        index, signs, top, scales, d = w
        a0, a1 = _iq2(codebook, (index & 255) | ((top << 8) & 0x300), signs)
        b0, b1 = _iq2(codebook, ((index >> 8) & 255) | ((top << 6) & 0x300), signs >> 8)
        c0, c1 = _iq2(codebook, ((index >> 16) & 255) | ((top << 4) & 0x300), signs >> 16)
        d0, d1 = _iq2(codebook, ((index >> 24) & 255) | ((top << 2) & 0x300), signs >> 24)
        first, last = (scales & 15).to(tl.float32), (scales >> 4).to(tl.float32)
        return a0, a1, b0, b1, c0, c1, d0, d1, d * ((first + 0.5) * 0.25), d * ((last + 0.5) * 0.25), none, none
    elif TYPE == "IQ3_XXS":
        near, far, packed, d = w
        signs = _even_signs(_sevens(packed))
        factor = d * ((((packed >> 28) & 15).to(tl.float32) + 0.5) * 0.5)
        return (
            _iq3(codebook, near & 255, signs, 0), _iq3(codebook, (near >> 8) & 255, signs, 4),
            _iq3(codebook, (near >> 16) & 255, signs, 8), _iq3(codebook, (near >> 24) & 255, signs, 12),
            _iq3(codebook, far & 255, signs, 16), _iq3(codebook, (far >> 8) & 255, signs, 20),
            _iq3(codebook, (far >> 16) & 255, signs, 24), _iq3(codebook, (far >> 24) & 255, signs, 28),
            factor, factor, none, none,
        )  # fmt: skip
    elif TYPE == "IQ3_S":
        near, far, signs, top, scales, d = w
        factor = d * (((scales >> (b % 2 * 4)) & 15) * 2 + 1).to(tl.float32)
        return (
            _iq3(codebook, (near & 255) | ((top << 8) & 256), signs, 0),
            _iq3(codebook, ((near >> 8) & 255) | ((top << 7) & 256), signs, 4),
            _iq3(codebook, ((near >> 16) & 255) | ((top << 6) & 256), signs, 8),
            _iq3(codebook, ((near >> 24) & 255) | ((top << 5) & 256), signs, 12),
            _iq3(codebook, (far & 255) | ((top << 4) & 256), signs, 16),
            _iq3(codebook, ((far >> 8) & 255) | ((top << 3) & 256), signs, 20),
            _iq3(codebook, ((far >> 16) & 255) | ((top << 2) & 256), signs, 24),
            _iq3(codebook, ((far >> 24) & 255) | ((top << 1) & 256), signs, 28),
            factor, factor, none, none,
        )  # fmt: skip
    elif TYPE == "IQ1_S" or TYPE == "IQ1_S_R4":  # noqa: PLR1714
        index, top, d = w
        is_minus = top & 0x8000
        a0, a1 = _iq1(codebook, (index & 255) | ((top << 8) & 0x700), is_minus)
        b0, b1 = _iq1(codebook, ((index >> 8) & 255) | ((top << 5) & 0x700), is_minus)
        c0, c1 = _iq1(codebook, ((index >> 16) & 255) | ((top << 2) & 0x700), is_minus)
        d0, d1 = _iq1(codebook, ((index >> 24) & 255) | ((top >> 1) & 0x700), is_minus)
        factor = d * ((((top >> 12) & 7) * 2 + 1).to(tl.float32) * 0.125)
        return a0, a1, b0, b1, c0, c1, d0, d1, factor, factor, none, none
    elif TYPE == "IQ1_M" or TYPE == "IQ1_M_R4":  # noqa: PLR1714
        if TYPE == "IQ1_M":
            index, top, near, far = w
            d = ((near >> 12) & 0x000F) | ((near >> 24) & 0x00F0) | ((far >> 4) & 0x0F00) | ((far >> 16) & 0xF000)
            # Four scales of three bits in a word's 12 lower ones; two for a run.
            scales = (tl.where(b % 8 < 4, near, far) >> (b % 4 // 2 * 16 + b % 2 * 6)) & 63
            first, last = ((scales & 7) * 2 + 1).to(tl.float32), ((scales >> 3) * 2 + 1).to(tl.float32)
        else:
            index, top, scales, d = w
            first, last = (scales & 15).to(tl.float32), (scales >> 4).to(tl.float32)
        a0, a1 = _iq1(codebook, (index & 255) | ((top << 8) & 0x700), top & 8)
        b0, b1 = _iq1(codebook, ((index >> 8) & 255) | ((top << 4) & 0x700), top & 0x80)
        c0, c1 = _iq1(codebook, ((index >> 16) & 255) | (top & 0x700), top & 0x800)
        d0, d1 = _iq1(codebook, ((index >> 24) & 255) | ((top >> 4) & 0x700), top & 0x8000)
        return a0, a1, b0, b1, c0, c1, d0, d1, _half(d) * (first * 0.125), _half(d) * (last * 0.125), none, none
    elif TYPE == "IQ4_XS":
        w0, w1, w2, w3, both, low = w
        a, e = _iq4(w0)
        c, f = _iq4(w1)
        g, h = _iq4(w2)
        i, j = _iq4(w3)
        level = ((low >> (b % 8 * 4)) & 15) | (((both >> (16 + b % 8 * 2)) & 3) << 4)
        factor = _half(both) * (level - 32).to(tl.float32)
        return a, c, g, i, e, f, h, j, factor, factor, none, none
    elif TYPE == "MXFP4":
        w0, w1, w2, w3, e = w
        a0, b0 = _e2m1(w0)
        a1, b1 = _e2m1(w1)
        a2, b2 = _e2m1(w2)
        a3, b3 = _e2m1(w3)
        factor = mxfp4_scale(e)
        return a0, a1, a2, a3, b0, b1, b2, b3, factor, factor, none, none
    elif TYPE == "NVFP4":
        w0, w1, w2, w3, e = w
        a0, b0 = _e2m1(w0)
        a1, b1 = _e2m1(w1)
        a2, b2 = _e2m1(w2)
        a3, b3 = _e2m1(w3)
        return a0, a1, b0, b1, a2, a3, b2, b3, nvfp4_scale(e & 255), nvfp4_scale(e >> 8), none, none
    elif TYPE == "Q2_K":
        both, pair = w[9], w[8]
        shift = b % 4 * 2
        d, m = _half(both), _half(both >> 16)
        return (
            (w[0] >> shift) & 0x03030303, (w[1] >> shift) & 0x03030303, (w[2] >> shift) & 0x03030303,
            (w[3] >> shift) & 0x03030303, (w[4] >> shift) & 0x03030303, (w[5] >> shift) & 0x03030303,
            (w[6] >> shift) & 0x03030303, (w[7] >> shift) & 0x03030303,
            d * (pair & 15).to(tl.float32), d * ((pair >> 8) & 15).to(tl.float32),
            m * ((pair >> 4) & 15).to(tl.float32), m * (pair >> 12).to(tl.float32),
        )  # fmt: skip
    elif TYPE == "Q3_K":
        low, pairs, d = w[16], w[17], w[18]
        shift, bit = b % 4 * 2, b % 8
        # Of scales r and r + 1 with r = 2 b, bytes r % 8 and r % 4: a nibble each, and two bits each.
        low, pairs = low >> (b % 8 // 4 * 4), pairs >> (b % 8 // 2 * 2)
        first = (low & 15) | ((pairs & 3) << 4)
        last = ((low >> 8) & 15) | (((pairs >> 8) & 3) << 4)
        return (
            _q3(w[0], w[8], shift, bit), _q3(w[1], w[9], shift, bit), _q3(w[2], w[10], shift, bit),
            _q3(w[3], w[11], shift, bit), _q3(w[4], w[12], shift, bit), _q3(w[5], w[13], shift, bit),
            _q3(w[6], w[14], shift, bit), _q3(w[7], w[15], shift, bit),
            d * (first - 32).to(tl.float32), d * (last - 32).to(tl.float32), none, none,
        )  # fmt: skip
    elif TYPE == "Q5_K":
        both, s0, s1, s2 = w[16], w[17], w[18], w[19]
        shift, bit, nibble = b % 4 * 8, b % 8, b % 2 * 4
        f, g, h = s0 >> shift, s1 >> shift, s2 >> shift
        is_first = b % 8 < 4
        scale = tl.where(is_first, f & 63, (h & 15) | ((f >> 2) & 48))
        minimum = tl.where(is_first, g & 63, ((h >> 4) & 15) | ((g >> 2) & 48))
        factor, less = _half(both) * scale.to(tl.float32), _half(both >> 16) * minimum.to(tl.float32)
        return (
            _q5(w[0], w[8], nibble, bit), _q5(w[1], w[9], nibble, bit), _q5(w[2], w[10], nibble, bit),
            _q5(w[3], w[11], nibble, bit), _q5(w[4], w[12], nibble, bit), _q5(w[5], w[13], nibble, bit),
            _q5(w[6], w[14], nibble, bit), _q5(w[7], w[15], nibble, bit), factor, factor, less, less,
        )  # fmt: skip
    elif TYPE == "Q4_1":
        w0, w1, w2, w3, both = w
        d, less = _half(both), -_half(both >> 16)
        return (
            w0 & 0x0F0F0F0F, w1 & 0x0F0F0F0F, w2 & 0x0F0F0F0F, w3 & 0x0F0F0F0F,
            (w0 >> 4) & 0x0F0F0F0F, (w1 >> 4) & 0x0F0F0F0F, (w2 >> 4) & 0x0F0F0F0F, (w3 >> 4) & 0x0F0F0F0F,
            d, d, less, less,
        )  # fmt: skip
    elif TYPE == "Q5_1":
        w0, w1, w2, w3, bits, both = w
        d, less = _half(both), -_half(both >> 16)
        return (
            _nibble_and_bits(w0, bits, 0), _nibble_and_bits(w1, bits, 1), _nibble_and_bits(w2, bits, 2),
            _nibble_and_bits(w3, bits, 3), _nibble_and_bits(w0, bits, 4), _nibble_and_bits(w1, bits, 5),
            _nibble_and_bits(w2, bits, 6), _nibble_and_bits(w3, bits, 7), d, d, less, less,
        )  # fmt: skip
    elif TYPE == "Q5_0":
        w0, w1, w2, w3, bits, d = w
        return (
            _less(_nibble_and_bits(w0, bits, 0), 16), _less(_nibble_and_bits(w1, bits, 1), 16),
            _less(_nibble_and_bits(w2, bits, 2), 16), _less(_nibble_and_bits(w3, bits, 3), 16),
            _less(_nibble_and_bits(w0, bits, 4), 16), _less(_nibble_and_bits(w1, bits, 5), 16),
            _less(_nibble_and_bits(w2, bits, 6), 16), _less(_nibble_and_bits(w3, bits, 7), 16), d, d, none, none,
        )  # fmt: skip
    elif TYPE == "Q6_0":
        w0, w1, w2, w3, near, far, d = w
        return (
            _less(_nibble_and_pair(w0, near, 0), 32), _less(_nibble_and_pair(w1, far, 1), 32),
            _less(_nibble_and_pair(w2, near, 2), 32), _less(_nibble_and_pair(w3, far, 3), 32),
            _less(_nibble_and_pair(w0, near, 4), 32), _less(_nibble_and_pair(w1, far, 5), 32),
            _less(_nibble_and_pair(w2, near, 6), 32), _less(_nibble_and_pair(w3, far, 7), 32), d, d, none, none,
        )  # fmt: skip
    elif TYPE == "Q1_0":
        bits, d = w
        return (
            (_ones(bits, 0) * 254) ^ -1, (_ones(bits, 4) * 254) ^ -1, (_ones(bits, 8) * 254) ^ -1,
            (_ones(bits, 12) * 254) ^ -1, (_ones(bits, 16) * 254) ^ -1, (_ones(bits, 20) * 254) ^ -1,
            (_ones(bits, 24) * 254) ^ -1, (_ones(bits, 28) * 254) ^ -1, d, d, none, none,
        )  # fmt: skip
    else:
        tl.static_assert(TYPE == "Q2_0", "a type of TYPES")
        near, far, d = w
        return (
            _pairs(near, 0), _pairs(near, 8), _pairs(near, 16), _pairs(near, 24),
            _pairs(far, 0), _pairs(far, 8), _pairs(far, 16), _pairs(far, 24), d, d, none, none,
        )  # fmt: skip
