"""Rows as ik_llama.cpp interleaves them, built here bit by bit from standard blocks, must decode as those do.

The position of every bit is spelled out from ik_llama.cpp's own decoders, weight by weight, where quant/interleave.py
permutes axes: two descriptions of one layout.
"""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold import _native
from kvfold.quant.decode import codebook, decode
from kvfold.quant.interleave import deinterleave
from kvfold.quant.types import TYPES, by_name

Bytes = NDArray[np.uint8]


class Moves:
    """Where the bits of one row's standard block go in a mixed block."""

    def __init__(self, standard_bytes: int) -> None:
        self.to = np.full(8 * standard_bytes, -1)

    def bits(self, byte: int, shift: int, count: int, mixed_byte: int, mixed_shift: int) -> None:
        for bit in range(count):
            assert self.to[8 * byte + shift + bit] == -1
            self.to[8 * byte + shift + bit] = 8 * mixed_byte + mixed_shift + bit

    def copy(self, byte: int, count: int, mixed_byte: int) -> None:
        self.bits(byte, 0, 8 * count, mixed_byte, 0)


def nibble(w: int) -> tuple[int, int]:
    """Weight w of 32: byte (without 4 k) and shift in the 64 bytes of four rows."""
    base = {0: 0, 4: 32, 8: 0, 12: 32, 16: 16, 20: 48, 24: 16, 28: 48}[w // 4 * 4]
    return base + w % 4, 4 if w // 8 % 2 else 0


def place(w: int) -> tuple[int, int]:
    """The quarter q and half h in which ik_llama.cpp has w: w = 16 (q % 2) + 4 (q // 2) + 8 h + w % 4."""
    return next((q, h) for q in range(4) for h in range(2) if w - w % 4 == 16 * (q % 2) + 4 * (q // 2) + 8 * h)


def iq4_nl_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for w in range(32):
        byte, shift = nibble(w)
        m.bits(2 + w % 16, 4 * (w // 16), 4, 8 + 4 * k + byte, shift)


def q5_0_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for w in range(32):
        byte, shift = nibble(w)
        q, h = place(w)
        m.bits(2 + w // 8, w % 8, 1, 8 + 4 * k + w % 4, q + 4 * h)
        m.bits(6 + w % 16, 4 * (w // 16), 4, 24 + 4 * k + byte, shift)


def q6_0_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for w in range(32):
        byte, shift = nibble(w)
        q, h = place(w)
        m.bits(
            2 + w % 8,
            4 * (w % 16 // 8) + 2 * (w // 16),
            2,
            8 + 4 * k + w % 4 + 16 * (q % 2),
            2 * (q // 2) + 4 * h,
        )
        m.bits(10 + w % 16, 4 * (w // 16), 4, 40 + 4 * k + byte, shift)


def whole_bytes(header: int, data: int) -> Callable[[Moves, int], None]:
    """Q4_0_R8, MXFP4_R8, Q8_0_R8: four bytes of each of the eight rows in turn."""

    def moves(m: Moves, k: int) -> None:
        m.copy(0, header, header * k)
        for j in range(data):
            m.copy(header + j, 1, 8 * header + 32 * (j // 4) + 4 * k + j % 4)

    return moves


def two_bits(m: Moves, k: int, at: int, mixed_at: int) -> None:
    for w in range(256):
        run, r = divmod(w, 32)
        byte = mixed_at + 32 * run + 4 * k + r % 4 + 16 * (r // 16)
        m.bits(at + 32 * (w // 128) + w % 32, 2 * (w % 128 // 32), 2, byte, 2 * (r % 16 // 4))


def q2_k_r4(m: Moves, k: int) -> None:
    m.copy(80, 2, 2 * k)
    m.copy(82, 2, 2 * (4 + k))
    for run in range(16):
        m.copy(run, 1, 16 + 8 * (run // 2) + k + 4 * (run % 2))
    two_bits(m, k, 16, 80)


def q3_k_r4(m: Moves, k: int) -> None:
    m.copy(108, 2, 2 * k)
    for run in range(16):
        number = 8 * (run // 2) + k + 4 * (run % 2)
        m.bits(96 + run % 8, 4 * (run // 8), 4, 24 + number % 32, 4 * (number // 32))
        m.bits(104 + run % 4, 2 * (run // 4), 2, 8 + number % 16, 2 * (number // 16))
    for w in range(256):
        m.bits(w % 32, w // 32, 1, 56 + 16 * (w // 32) + 4 * k + w % 4, w % 32 // 4)
    two_bits(m, k, 32, 184)


def k_scales(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    m.copy(2, 2, 2 * (4 + k))
    for run in range(8):
        number = 4 * run + k
        low, high, high_shift = 32 + number, 16 + number % 16, 4 * (number // 16)
        for which in range(2):  # scale, minimum
            if run < 4:
                m.bits(4 + 4 * which + run, 0, 4, low, 4 * which)
                m.bits(4 + 4 * which + run, 4, 2, high, high_shift + 2 * which)
            else:
                m.bits(12 + run - 4, 4 * which, 4, low, 4 * which)
                m.bits(4 + 4 * which + run - 4, 6, 2, high, high_shift + 2 * which)


def k_nibbles(m: Moves, k: int, at: int, mixed_at: int) -> None:
    for w in range(256):
        byte, shift = nibble(w % 32)
        m.bits(at + 32 * (w // 64) + w % 32, 4 * (w % 64 // 32), 4, mixed_at + 64 * (w // 32) + 4 * k + byte, shift)


def q4_k_r4(m: Moves, k: int) -> None:
    k_scales(m, k)
    k_nibbles(m, k, 16, 64)


def q5_k_r4(m: Moves, k: int) -> None:
    k_scales(m, k)
    shift = {0: 0, 8: 1, 4: 2, 12: 3, 16: 4, 24: 5, 20: 6, 28: 7}
    for w in range(256):
        m.bits(16 + w % 32, w // 32, 1, 64 + 16 * (w // 32) + 4 * k + w % 4, shift[w % 32 // 4 * 4])
    k_nibbles(m, k, 48, 192)


def q6_k_r4(m: Moves, k: int) -> None:
    m.copy(208, 2, 2 * k)
    for run in range(16):
        m.copy(192 + run, 1, 8 + 8 * (run // 2) + k + 4 * (run % 2))
    high_shift = {0: 0, 8: 2, 4: 4, 12: 6}
    for w in range(256):
        run, r = divmod(w, 32)
        byte, shift = nibble(r)
        m.bits(64 * (w // 128) + w % 64, 4 * (w % 128 // 64), 4, 328 + 64 * run + 4 * k + byte, shift)
        mixed = 72 + 32 * run + 4 * k + w % 4 + (16 if r >= 16 else 0)
        m.bits(128 + 32 * (w // 128) + w % 32, 2 * (w % 128 // 32), 2, mixed, high_shift[r % 16 // 4 * 4])


def iq4_xs_r8(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for run in range(8):
        number = 8 * run + k
        m.bits(4 + run // 2, 4 * (run % 2), 4, 32 + number % 32, 4 * (number // 32))
        m.bits(2 + run // 4, 2 * (run % 4), 2, 16 + number % 16, 2 * (number // 16))
    for w in range(256):
        run, r = divmod(w, 32)
        m.bits(
            8 + 16 * run + w % 16, 4 * (r // 16), 4, 64 + 128 * run + 4 * k + w % 4 + 32 * (r // 8), r % 8 // 4 * 4
        )


def xxs_words(m: Moves, k: int, at: int, step: int) -> None:
    for run in range(8):
        for i in range(4):
            mixed = 8 + 4 * (4 * run + k) + i
            m.bits(at + step * run, 28 + i, 1, mixed, 0)
            m.bits(at + step * run, 7 * i, 7, mixed, 1)


def iq2_xxs_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for run in range(8):
        m.copy(2 + 8 * run, 4, 136 + 16 * run + 4 * k)
    xxs_words(m, k, 6, 8)


def iq3_xxs_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for run in range(8):
        m.copy(2 + 8 * run, 8, 136 + 32 * run + 8 * k)
    xxs_words(m, k, 66, 4)


def iq2_xs_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for run in range(8):
        m.copy(2 + 8 * run, 8, 8 + 2 * (16 * run + 4 * k))
        m.copy(66 + run, 1, 264 + 4 * run + k)


def iq2_s_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for run in range(8):
        m.copy(2 + 4 * run, 4, 8 + 16 * run + 4 * k)
        m.copy(34 + 4 * run, 4, 168 + 16 * run + 4 * k)
        m.copy(66 + run, 1, 136 + 4 * run + k)
        m.copy(74 + run, 1, 296 + 4 * run + k)


def iq3_s_r4(m: Moves, k: int) -> None:
    m.copy(0, 2, 2 * k)
    for run in range(8):
        for i in range(4):
            m.copy(2 + 8 * run + i, 1, 8 + 32 * run + k + 8 * i)
            m.copy(2 + 8 * run + 4 + i, 1, 8 + 32 * run + k + 8 * i + 4)
        m.copy(66 + run, 1, 264 + 4 * run + k)
        for i in range(4):
            for j in range(4):
                for half in range(2):
                    w = 32 * run + 4 * i + 16 * half + j
                    m.bits(74 + w // 8, w % 8, 1, 296 + 16 * run + 4 * k + j, i + 4 * half)
        number = 4 * run + k
        m.bits(106 + run // 2, 4 * (run % 2), 4, 424 + number % 16, 4 * (number // 16))


def bf16_r16(m: Moves, k: int) -> None:
    m.copy(0, 4, 4 * k)


LAYOUTS: dict[str, Callable[[Moves, int], None]] = {
    "Q4_0_R8": whole_bytes(2, 16),
    "MXFP4_R8": whole_bytes(1, 16),
    "Q8_0_R8": whole_bytes(2, 32),
    "Q5_0_R4": q5_0_r4,
    "Q6_0_R4": q6_0_r4,
    "Q2_K_R4": q2_k_r4,
    "Q3_K_R4": q3_k_r4,
    "Q4_K_R4": q4_k_r4,
    "Q5_K_R4": q5_k_r4,
    "Q6_K_R4": q6_k_r4,
    "IQ4_NL_R4": iq4_nl_r4,
    "IQ4_XS_R8": iq4_xs_r8,
    "IQ2_XXS_R4": iq2_xxs_r4,
    "IQ2_XS_R4": iq2_xs_r4,
    "IQ2_S_R4": iq2_s_r4,
    "IQ3_XXS_R4": iq3_xxs_r4,
    "IQ3_S_R4": iq3_s_r4,
    "BF16_R16": bf16_r16,
}

# Seven sign bits s are stored as u with s = u ^ (u << 1), in all types whose eighth sign follows from the others.
RECODED_SIGNS = np.zeros(128, np.uint32)
RECODED_SIGNS[[(u ^ u << 1) & 127 for u in range(128)]] = range(128)


def recode_signs(name: str, blocks: Bytes) -> Bytes:
    """Standard blocks [..., bytes] with their 7-bit signs as the interleaved type stores them."""
    blocks = blocks.copy()
    if name == "IQ2_XS_R4":
        words = blocks[..., 2:66].view("<u2")
        words[...] = words & 511 | RECODED_SIGNS[words >> 9].astype(np.uint16) << 9
    elif name in ("IQ2_XXS_R4", "IQ3_XXS_R4"):
        at, step = (6, 8) if name == "IQ2_XXS_R4" else (66, 4)
        for run in range(8):
            word = blocks[..., at + step * run : at + step * run + 4].copy().view("<u4")
            coded = word & np.uint32(0xF0000000)
            for i in range(4):
                coded |= RECODED_SIGNS[word >> np.uint32(7 * i) & 127] << np.uint32(7 * i)
            blocks[..., at + step * run : at + step * run + 4] = coded.view(np.uint8)
    return blocks


def interleave(name: str, rows: Bytes) -> Bytes:
    """Rows [n, row_bytes] of the standard type as ik_llama.cpp repacks them."""
    t = by_name(name)
    group = t.interleaved_rows
    blocks = rows.reshape(len(rows) // group, group, -1, t.block_bytes)
    bits = np.unpackbits(recode_signs(name, blocks), axis=-1, bitorder="little")
    mixed = np.full((len(blocks), blocks.shape[2], 8 * group * t.block_bytes), 2, np.uint8)
    for k in range(group):
        moves = Moves(t.block_bytes)
        LAYOUTS[name](moves, k)
        assert (mixed[..., moves.to] == 2).all(), "two bits in one place"
        mixed[..., moves.to] = bits[:, k]
    assert (mixed < 2).all(), "a place without a bit"
    return np.packbits(mixed, axis=-1, bitorder="little").reshape(rows.shape)


def test_every_interleaved_type_is_tested() -> None:
    assert LAYOUTS.keys() == {t.name for t in TYPES if t.standard}


@pytest.mark.parametrize("name", LAYOUTS)
def test_interleaved_rows_decode_as_the_standard_rows_they_came_from(name: str) -> None:
    t = by_name(name)
    standard = by_name(t.standard)
    rows, cols = 3 * t.interleaved_rows, 5 * t.block_elements
    rng = np.random.default_rng(t.id)
    plain = rng.integers(0, 256, (rows, t.row_bytes(cols)), np.uint8)
    mixed = interleave(name, plain)
    assert np.array_equal(deinterleave(t, mixed), plain)
    want = decode(standard, plain)
    np.testing.assert_array_equal(decode(t, mixed), want)
    out = np.full((rows, cols), np.nan, np.float32)
    _native.decode(t.id, mixed, out)
    np.testing.assert_array_equal(out, want)


def test_iq1_s_r4_weight_by_weight() -> None:
    """Scales of four rows, then blocks of 16 index bytes and four words; see decode.py."""
    t, cols = by_name("IQ1_S_R4"), 96
    raw = np.random.default_rng(1).integers(0, 256, (4, t.row_bytes(cols)), np.uint8)
    flat = raw.reshape(-1)
    d, blocks = flat[:8].view(np.float16).astype(np.float32), flat[8:].reshape(3, 24)
    want = np.empty((4, cols), np.float32)
    with np.errstate(invalid="ignore"):
        for k in range(4):
            for block in range(3):
                word = int(blocks[block, 16:].view(np.uint16)[k])
                scale = d[k] * np.float32(2 * (word >> 12 & 7) + 1)
                for i in range(4):
                    levels = codebook("IQ1_S")[int(blocks[block, 4 * i + k]) | (word >> 3 * i & 7) << 8]
                    shifted = levels + np.float32(-0.125 if word & 0x8000 else 0.125)
                    want[k, 32 * block + 8 * i :][:8] = scale * shifted
    np.testing.assert_array_equal(decode(t, raw), want)


def test_iq1_m_r4_weight_by_weight() -> None:
    """Scales of four rows, then blocks of 16 index bytes, 8 bytes of upper bits, four of scales."""
    t, cols = by_name("IQ1_M_R4"), 96
    raw = np.random.default_rng(2).integers(0, 256, (4, t.row_bytes(cols)), np.uint8)
    flat = raw.reshape(-1)
    d, blocks = flat[:8].view(np.float16).astype(np.float32), flat[8:].reshape(3, 28)
    want = np.empty((4, cols), np.float32)
    with np.errstate(invalid="ignore"):
        for k in range(4):
            for block in range(3):
                low, high, packed = blocks[block, :16], blocks[block, 16:24], int(blocks[block, 24 + k])
                for half in range(2):
                    scale = d[k] * np.float32(packed >> 4 * half & 15)
                    for i in range(2):
                        upper = int(high[4 * half + k]) >> 4 * i
                        levels = codebook("IQ1_S")[int(low[8 * half + 4 * i + k]) | (upper & 7) << 8]
                        shifted = levels + np.float32(-0.125 if upper & 8 else 0.125)
                        want[k, 32 * block + 16 * half + 8 * i :][:8] = scale * shifted
    np.testing.assert_array_equal(decode(t, raw), want)
