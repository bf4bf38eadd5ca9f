"""Rows that ik_llama.cpp stores interleaved ("_R4", "_R8", "_R16"), and rows that lie side by side in memory, put back in
standard blocks, bit for bit.

Owns where each bit of an interleaved group lies; decoding is quant/decode.py. A group of 4, 8 or 16 rows has the size
of its rows. It is a sequence of mixed blocks, each with one standard block's worth of weights of every row of the
group, so that a vector register takes the same few columns of all rows. Nothing is lost in either direction; read
from ik_llama.cpp `ggml/src/iqk/iqk_quantize.cpp` (the repack and dequantize functions), August 2026.

Axes below: g mixed blocks, k row of the group, i one of 4 consecutive weights. Within 32 weights of one row the
number of a weight is spelled in digits: w = 16 a + 8 h + 4 b + i.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvfold.quant.types import ROWS_SIDE_BY_SIDE, SIDE_BY_SIDE, TYPES, BlockType

Bytes = NDArray[np.uint8]
Blocks = NDArray[np.void]

_UNMIXERS: dict[str, tuple[np.dtype[np.void], Callable[[Blocks], Bytes]]] = {}


def deinterleave(type: BlockType, rows: Bytes) -> Bytes:
    """uint8 [n, row_bytes] of an interleaved type, n whole groups -> [n, row_bytes] of `type.standard`."""
    num_rows, row_bytes = rows.shape
    group = type.interleaved_rows
    fields, unmix = _UNMIXERS[type.name]
    mixed = np.ascontiguousarray(rows).reshape(-1, group * type.block_bytes).view(fields)[:, 0]
    blocks = unmix(mixed).reshape(num_rows // group, -1, group, type.block_bytes)
    return blocks.swapaxes(1, 2).reshape(num_rows, row_bytes)


def separate(type: BlockType, rows: Bytes) -> tuple[str, Bytes]:
    """Rows uint8 [n, row_bytes] of an interleaved type, n whole groups: the name of a type, and the same bits row by row.

    Of types without a standard one their own name: a row has the index bytes of all its blocks, then qh, scales where there
    are any, and d last.
    """
    if type.standard:
        return type.standard, deinterleave(type, rows)
    fields = _OWN_FIELDS[type.name]
    groups = np.ascontiguousarray(rows).reshape(len(rows) // 4, -1)
    blocks = groups[:, 8:].reshape(len(groups), -1, sum(count for count, _ in fields) * 4)
    parts, start = [], 0
    for count, size in fields:  # `count` bytes of each row, `size` of one row together
        field = blocks[:, :, start : start + 4 * count].reshape(*blocks.shape[:2], count // size, 4, size)
        parts.append(np.moveaxis(field, 3, 1).reshape(len(groups), 4, -1))
        start += 4 * count
    parts.append(groups[:, :8].reshape(len(groups), 4, 2))
    return type.name, np.concatenate(parts, axis=2).reshape(len(rows), -1)


# Fields of a block, in order: bytes of a row, and how many of them lie together before the next row's.
_OWN_FIELDS = {
    "IQ1_S_R4": ((4, 1), (2, 2)),
    "IQ1_M_R4": ((4, 1), (2, 1), (1, 1)),
}


def _mixed(
    name: str, *fields: tuple[str, str, int | tuple[int, ...]]
) -> Callable[[Callable[[Blocks], Bytes]], Callable[[Blocks], Bytes]]:
    """Enter an unmixer, mixed blocks [g] -> standard blocks uint8 [g, k, block_bytes], under its type's name."""

    def enter(function: Callable[[Blocks], Bytes]) -> Callable[[Blocks], Bytes]:
        _UNMIXERS[name] = (np.dtype(list(fields)), function)
        return function

    return enter


def _join(*parts: NDArray[np.generic]) -> Bytes:
    """Fields [g, k, ...] of a standard block -> their bytes one after another, [g, k, bytes]."""
    g, k = parts[0].shape[:2]
    return np.concatenate([np.ascontiguousarray(p).reshape(g, k, -1).view(np.uint8) for p in parts], axis=2)


def _digits(packed: Bytes, bits: int) -> Bytes:
    """Bytes [...] -> their fields of `bits`, lowest first, on a new last axis."""
    return packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)


def _pack(fields: Bytes, bits: int) -> Bytes:
    """The opposite: fields on the last axis, lowest first -> bytes."""
    packed: Bytes = np.bitwise_or.reduce(fields << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)
    return packed


def _low_nibbles(qs: Bytes) -> Bytes:
    """[g, runs, b, a, k, i], h in the nibbles -> levels [g, k, runs, a, h, b, i]. All _R4 types of 4 bits and more."""
    return _digits(qs, 4).transpose(0, 4, 1, 3, 6, 2, 5)


def _halves(levels: Bytes) -> Bytes:
    """Levels [g, k, runs, a, h, b, i] below 16 -> the standard's bytes for 32 weights, a in the nibbles."""
    g, k, runs = levels.shape[:3]
    return _pack(np.moveaxis(levels & np.uint8(15), 3, -1), 4).reshape(g, k, runs, 16)


@_mixed("IQ4_NL_R4", ("d", "<u2", 4), ("qs", "u1", (1, 2, 2, 4, 4)))
def _iq4_nl_r4(m: Blocks) -> Bytes:
    return _join(m["d"], _halves(_low_nibbles(m["qs"])))


@_mixed("Q5_0_R4", ("d", "<u2", 4), ("qh", "u1", (4, 4)), ("qs", "u1", (1, 2, 2, 4, 4)))
def _q5_0_r4(m: Blocks) -> Bytes:
    """qh[k][i]: bit 4 h + 2 b + a."""
    high = _digits(m["qh"], 1).reshape(-1, 4, 4, 2, 2, 2).transpose(0, 1, 5, 3, 4, 2)
    qh = _pack(high.reshape(-1, 4, 4, 8), 1)
    return _join(m["d"], qh, _halves(_low_nibbles(m["qs"])))


@_mixed("Q6_0_R4", ("d", "<u2", 4), ("qh", "u1", (2, 4, 4)), ("qs", "u1", (1, 2, 2, 4, 4)))
def _q6_0_r4(m: Blocks) -> Bytes:
    """qh[a][k][i]: two bits at 4 h + 2 b. The standard has them for 8 weights 4 b + i at 4 h + 2 a."""
    high = _digits(m["qh"], 2).reshape(-1, 2, 4, 4, 2, 2)
    qh = _pack(high.transpose(0, 2, 5, 3, 4, 1).reshape(-1, 4, 8, 4), 2)
    return _join(m["d"], qh, _halves(_low_nibbles(m["qs"])))


@_mixed("Q4_0_R8", ("d", "<u2", 8), ("qs", "u1", (4, 8, 4)))
def _q4_0_r8(m: Blocks) -> Bytes:
    """Whole bytes of the standard, four at a time."""
    return _join(m["d"], m["qs"].swapaxes(1, 2))


@_mixed("MXFP4_R8", ("e", "u1", 8), ("qs", "u1", (4, 8, 4)))
def _mxfp4_r8(m: Blocks) -> Bytes:
    return _join(m["e"], m["qs"].swapaxes(1, 2))


@_mixed("Q8_0_R8", ("d", "<u2", 8), ("qs", "u1", (8, 8, 4)))
def _q8_0_r8(m: Blocks) -> Bytes:
    return _join(m["d"], m["qs"].swapaxes(1, 2))


@_mixed("BF16_R16", ("x", "<u2", (16, 2)))
def _bf16_r16(m: Blocks) -> Bytes:
    """Pairs of columns."""
    return _join(m["x"])


# k-quants: 8 runs of 32 weights, or 16 of 16.


@_mixed("Q2_K_R4", ("d", "<u2", (2, 4)), ("scales", "u1", (16, 4)), ("qs", "u1", (8, 2, 4, 4)))
def _q2_k_r4(m: Blocks) -> Bytes:
    qs = _pack_four_runs(_digits(m["qs"], 2).transpose(0, 3, 1, 2, 5, 4).reshape(-1, 4, 2, 4, 32))
    return _join(m["scales"].swapaxes(1, 2), qs, m["d"].swapaxes(1, 2))


def _pack_four_runs(levels: Bytes) -> Bytes:
    """Two-bit levels [g, k, 2, 4, 32] -> the standard's bytes [g, k, 2, 32], the four runs in 2-bit planes."""
    return _pack(levels.swapaxes(3, 4), 2)


@_mixed(
    "Q3_K_R4",
    ("d", "<u2", 4),
    ("scales_h", "u1", 16),
    ("scales_l", "u1", 32),
    ("qh", "u1", (8, 4, 4)),
    ("qs", "u1", (8, 2, 4, 4)),
)
def _q3_k_r4(m: Blocks) -> Bytes:
    """qh[run][k][i]: bit w >> 2 of a run of 32. Scale of run r of 16 and row k: number 4 r + k in planes."""
    qs = _pack_four_runs(_digits(m["qs"], 2).transpose(0, 3, 1, 2, 5, 4).reshape(-1, 4, 2, 4, 32))
    high = _digits(m["qh"], 1).transpose(0, 2, 1, 4, 3).reshape(-1, 4, 8, 32)
    low4 = _digits(m["scales_l"], 4).swapaxes(1, 2).reshape(-1, 16, 4).swapaxes(1, 2)
    high2 = _digits(m["scales_h"], 2).swapaxes(1, 2).reshape(-1, 16, 4).swapaxes(1, 2)
    scales_l = _pack(low4.reshape(-1, 4, 2, 8).swapaxes(2, 3), 4)
    scales_h = _pack(high2.reshape(-1, 4, 4, 4).swapaxes(2, 3), 2)
    return _join(_pack(high.swapaxes(2, 3), 1), qs, scales_l, scales_h, m["d"])


def _k_scales(m: Blocks) -> Bytes:
    """The 12 bytes of scales of Q4_K and Q5_K: [g, 4, 12].

    scales_l[run][k]: low nibbles of scale and minimum. scales_h: their upper 2 + 2 bits, number 4 run + k in nibble
    planes.
    """
    scale, minimum = np.moveaxis(_digits(m["scales_l"], 4).transpose(0, 2, 1, 3), 3, 0)
    upper = _digits(m["scales_h"], 4).swapaxes(1, 2).reshape(-1, 8, 4).swapaxes(1, 2)
    return _packed_k_scales(scale | (upper & 3) << 4, minimum | upper >> 2 << 4)


def _packed_k_scales(scale: Bytes, minimum: Bytes) -> Bytes:
    """Scales and minimums of six bits, [g, k, 8 runs] -> the standard's 12 bytes."""
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = minimum[..., :4] | minimum[..., 4:] >> 4 << 6
    return np.concatenate([first, second, (scale[..., 4:] & 15) | minimum[..., 4:] << 4], axis=2)


def _nibble_planes(levels: Bytes) -> Bytes:
    """Levels below 16 [g, k, 8 runs, 32] -> the standard's bytes of Q4_K and Q5_K, two runs in nibble planes."""
    return _pack(levels.reshape(len(levels), -1, 4, 2, 32).swapaxes(3, 4), 4)


@_mixed(
    "Q4_K_R4",
    ("d", "<u2", (2, 4)),
    ("scales_h", "u1", 16),
    ("scales_l", "u1", (8, 4)),
    ("qs", "u1", (8, 2, 2, 4, 4)),
)
def _q4_k_r4(m: Blocks) -> Bytes:
    qs = _nibble_planes(_low_nibbles(m["qs"]).reshape(-1, 4, 8, 32))
    return _join(m["d"].swapaxes(1, 2), _k_scales(m), qs)


@_mixed(
    "Q5_K_R4",
    ("d", "<u2", (2, 4)),
    ("scales_h", "u1", 16),
    ("scales_l", "u1", (8, 4)),
    ("qh", "u1", (8, 4, 4)),
    ("qs", "u1", (8, 2, 2, 4, 4)),
)
def _q5_k_r4(m: Blocks) -> Bytes:
    """qh[run][k][i]: bit 4 a + 2 b + h."""
    high = _digits(m["qh"], 1).reshape(-1, 8, 4, 4, 2, 2, 2).transpose(0, 2, 1, 4, 6, 5, 3)
    qh = _pack(high.reshape(-1, 4, 8, 32).swapaxes(2, 3), 1)
    qs = _nibble_planes(_low_nibbles(m["qs"]).reshape(-1, 4, 8, 32))
    return _join(m["d"].swapaxes(1, 2), _k_scales(m), qh, qs)


@_mixed(
    "Q6_K_R4",
    ("d", "<u2", 4),
    ("scales", "u1", (16, 4)),
    ("qh", "u1", (8, 2, 4, 4)),
    ("ql", "u1", (8, 2, 2, 4, 4)),
)
def _q6_k_r4(m: Blocks) -> Bytes:
    """qh[run][a][k][i]: two bits at 4 b + 2 h."""
    high = _digits(m["qh"], 2).reshape(-1, 8, 2, 4, 4, 2, 2).transpose(0, 3, 1, 2, 6, 5, 4)
    qh = _pack_four_runs(high.reshape(-1, 4, 2, 4, 32))
    ql = _pack(_low_nibbles(m["ql"]).reshape(-1, 4, 2, 2, 64).swapaxes(3, 4), 4)
    return _join(ql, qh, m["scales"].swapaxes(1, 2), m["d"])


@_mixed("IQ4_XS_R8", ("d", "<u2", 8), ("scales_h", "u1", 16), ("scales_l", "u1", 32), ("qs", "u1", (8, 4, 8, 4)))
def _iq4_xs_r8(m: Blocks) -> Bytes:
    """qs[run][w >> 3][k][i], bit 2 of w in the nibbles. Scale of run r and row k: number 8 r + k in planes."""
    levels = _digits(m["qs"], 4).transpose(0, 3, 1, 2, 5, 4).reshape(-1, 8, 8, 2, 16)
    low = _digits(m["scales_l"], 4).swapaxes(1, 2).reshape(-1, 8, 8).swapaxes(1, 2)
    high = _digits(m["scales_h"], 2).swapaxes(1, 2).reshape(-1, 8, 8).swapaxes(1, 2)
    scales_l = _pack(low.reshape(-1, 8, 4, 2), 4)
    scales_h = _pack(high.reshape(-1, 8, 2, 4), 2)
    return _join(m["d"], scales_h, scales_l, _pack(levels.swapaxes(3, 4), 4))


# Codebook types: whole bytes move, signs and scales are coded anew.


def _signs_and_scales(packed: Bytes) -> NDArray[np.uint32]:
    """IQ2_XXS and IQ3_XXS: [g, run, k, 4] -> the standard's words [g, k, run], 4 x 7 signs and a 4-bit scale.

    Bit 0 of the four bytes: the scale. The other seven, t: signs = t ^ (t >> 1), whose eighth follows from the rest.
    """
    packed = packed.swapaxes(1, 2)
    t = packed & 254
    signs = (t ^ t >> 1) & 127
    shifts = np.arange(0, 28, 7, dtype=np.uint32)
    scale = (packed & 1).astype(np.uint32) << np.arange(28, 32, dtype=np.uint32)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(signs.astype(np.uint32) << shifts | scale, axis=3)
    return words


@_mixed("IQ2_XXS_R4", ("d", "<u2", 4), ("signs", "u1", (8, 4, 4)), ("qs", "u1", (8, 4, 4)))
def _iq2_xxs_r4(m: Blocks) -> Bytes:
    words = _signs_and_scales(m["signs"])[..., None].view(np.uint8)
    return _join(m["d"], np.concatenate([m["qs"].swapaxes(1, 2), words], axis=3))


@_mixed("IQ3_XXS_R4", ("d", "<u2", 4), ("signs", "u1", (8, 4, 4)), ("qs", "u1", (8, 4, 8)))
def _iq3_xxs_r4(m: Blocks) -> Bytes:
    return _join(m["d"], m["qs"].swapaxes(1, 2), _signs_and_scales(m["signs"]))


@_mixed("IQ2_XS_R4", ("d", "<u2", 4), ("qs", "<u2", (8, 4, 4)), ("scales", "u1", (8, 4)))
def _iq2_xs_r4(m: Blocks) -> Bytes:
    """Upper 7 bits s of a word: signs = s ^ (s << 1), of which the standard keeps the lower 7."""
    qs = m["qs"].swapaxes(1, 2)
    s = qs >> 9
    words = (qs & np.uint16(511)) | ((s ^ s << 1) & np.uint16(127)) << 9
    return _join(m["d"], words, m["scales"].swapaxes(1, 2))


@_mixed(
    "IQ2_S_R4",
    ("d", "<u2", 4),
    ("qs", "u1", (8, 4, 4)),
    ("qh", "u1", (8, 4)),
    ("signs", "u1", (8, 4, 4)),
    ("scales", "u1", (8, 4)),
)
def _iq2_s_r4(m: Blocks) -> Bytes:
    return _join(m["d"], *(m[field].swapaxes(1, 2) for field in ("qs", "signs", "qh", "scales")))


@_mixed(
    "IQ3_S_R4",
    ("d", "<u2", 4),
    ("qs", "u1", (8, 4, 2, 4)),
    ("qh", "u1", (8, 4)),
    ("signs", "u1", (8, 4, 4)),
    ("scales", "u1", 16),
)
def _iq3_s_r4(m: Blocks) -> Bytes:
    """qs[run][i][half][k]; signs[run][k][i]: bit w >> 2. Scale of run r and row k: number 4 r + k in nibble planes."""
    qs = m["qs"].transpose(0, 4, 1, 3, 2)
    signs = _digits(m["signs"], 1).transpose(0, 2, 1, 4, 3).reshape(-1, 4, 32, 8)
    scales = _digits(m["scales"], 4).swapaxes(1, 2).reshape(-1, 8, 4).swapaxes(1, 2)
    return _join(m["d"], qs, m["qh"].swapaxes(1, 2), _pack(signs, 1), _pack(scales.reshape(-1, 4, 4, 2), 4))


def _enter_side_by_side(type: BlockType) -> None:
    """Types of one float16 and codes: the scales of all rows, then words of four bytes [word][row]."""
    num_words = (type.block_bytes - 2) // 4

    @_mixed(type.name, ("d", "<u2", ROWS_SIDE_BY_SIDE), ("words", "u1", (num_words, ROWS_SIDE_BY_SIDE, 4)))
    def unmix(m: Blocks) -> Bytes:
        return _join(m["d"], m["words"].swapaxes(1, 2))


for _type in SIDE_BY_SIDE.values():
    if _type.block_elements == 32:
        _enter_side_by_side(_type)


@_mixed(
    "Q4_K side by side",
    ("d", "<u2", (2, 16)),
    ("upper", "u1", (4, 16)),
    ("lower", "u1", (8, 16)),
    ("words", "u1", (8, 4, 16, 4)),
)
def _q4_k_side_by_side(m: Blocks) -> Bytes:
    """words[run][q][k][i]: weights 4 q + i and 16 + 4 q + i in the nibbles. lower[run][k]: low nibbles of scale and minimum.

    upper[r][k]: their upper 2 + 2 bits of run r, then of run 4 + r.
    """
    lower = np.moveaxis(_digits(m["lower"], 4), 3, 0)
    upper = _digits(m["upper"], 2).reshape(-1, 4, 16, 2, 2).transpose(4, 0, 3, 1, 2).reshape(2, -1, 8, 16)
    scale, minimum = (lower | upper << 4).swapaxes(2, 3)
    levels = _digits(m["words"], 4).transpose(0, 3, 1, 5, 2, 4)
    return _join(
        m["d"].swapaxes(1, 2), _packed_k_scales(scale, minimum), _nibble_planes(levels.reshape(-1, 16, 8, 32))
    )


@_mixed(
    "Q6_K side by side",
    ("d", "<u2", 16),
    ("scales", "u1", (16, 16)),
    ("words", "<u4", (16, 3, 16)),
)
def _q6_k_side_by_side(m: Blocks) -> Bytes:
    """words[run][q][k]: weights 4 q to 4 q + 3 of a run in the lower six bits of its bytes. Weights 12 to 15 are in the lower
    six bits of words[0] >> 2 ^ words[1] >> 4 ^ words[2] >> 6, which the upper two of the three are chosen for.
    """
    three = m["words"]
    fourth = three[:, :, 0] >> 2 ^ three[:, :, 1] >> 4 ^ three[:, :, 2] >> 6
    words = np.concatenate([three, fourth[:, :, None]], axis=2) & 0x3F3F3F3F
    codes = words.transpose(0, 3, 1, 2).copy().view(np.uint8)  # [block, row, run, weight]
    low = (codes & np.uint8(15)).reshape(-1, 16, 2, 2, 64)
    high = (codes >> np.uint8(4)).reshape(-1, 16, 2, 4, 32)
    return _join(_pack(low.swapaxes(3, 4), 4), _pack_four_runs(high), m["scales"].swapaxes(1, 2), m["d"])


_MIXED_TYPES = [t for t in (*TYPES, *SIDE_BY_SIDE.values()) if t.standard]
assert {t.name for t in _MIXED_TYPES} == _UNMIXERS.keys()
assert all(t.interleaved_rows * t.block_bytes == _UNMIXERS[t.name][0].itemsize for t in _MIXED_TYPES)
