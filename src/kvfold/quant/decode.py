"""From the blocks of a file to float32: the definition of every tensor type, in numpy.

Owns what each bit of a block means. csrc/kernels/decode.cpp is the same at speed, and equal bit for bit. Both agree
with gguf-py (`gguf.quants.dequantize`) wherever that decodes a type, infinite scales included. Rows that are stored
interleaved are put in order by quant/interleave.py first.

Common to the formats below: numbers are little-endian; a run of weights packed k to a byte fills its bytes in planes,
so byte j of a run of 16 holds weight j in its low nibble and weight j + 16 in its high nibble. Products of a
float16 scale, a sub-scale and a level fit 24 bits, so only formats with a minimum round, once, when it is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import UnsupportedType
from kvfold.quant.interleave import deinterleave
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import TYPES, BlockType, by_name

Bytes = NDArray[np.uint8]
Codes = NDArray[np.integer[Any]]  # levels, indices, sign bytes: small and not negative, of any width
Floats = NDArray[np.float32]
Blocks = NDArray[np.void]  # [n], one record per block, fields as the format lists them

# Temporaries of a decoder take up to 12 bytes a weight: 3 MB at this size, which stays near the core.
_CHUNK_WEIGHTS = 1 << 18

# fp8 checkpoints have one multiplier for each square of this many rows and columns (`weight_block_size`).
FP8_BLOCK = 128

_DECODERS: dict[str, tuple[np.dtype[np.void], Callable[[Blocks], Floats]]] = {}


def decode(type: BlockType, raw: Bytes) -> Floats:
    """uint8 [..., rows, row_bytes] -> float32 [..., rows, cols].

    Rows of an interleaved type must come in whole groups. UnsupportedType for a type that does not decode, for bytes
    that are no whole number of blocks, and for rows that are no whole number of groups.
    """
    if not type.decodes:
        raise type.refusal("decode")
    *outer, row_bytes = raw.shape
    data_bytes = row_bytes - type.row_meta_bytes
    if raw.dtype != np.uint8 or data_bytes < 0 or data_bytes % type.block_bytes:
        raise UnsupportedType(
            f"decode {type.name}: rows of {row_bytes} {raw.dtype} values, expected uint8 and a multiple of "
            f"{type.block_bytes} after {type.row_meta_bytes}."
        )
    group = type.interleaved_rows
    if group > 1 and (len(outer) == 0 or outer[-1] % group):
        raise UnsupportedType(f"decode {type.name}: shape {raw.shape}, expected whole groups of {group} rows.")
    cols = data_bytes // type.block_bytes * type.block_elements
    rows = raw.reshape(-1, row_bytes)
    out = np.empty((len(rows), cols), np.float32)
    step = max(group, _CHUNK_WEIGHTS // max(cols, 1) // group * group)
    # 0 x infinity and float64 beyond float32 are values here, not accidents.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(rows), step):
            out[start : start + step] = _decode_rows(type, rows[start : start + step], cols)
    return out.reshape(*outer, cols)


def decode_tensor(tensor: QuantTensor) -> Floats:
    """float32 of `tensor.shape`; an fp8 tensor's block scales are applied. Raises as decode()."""
    out = decode(tensor.type, tensor.raw)
    if tensor.scale is not None:
        rows, cols = out.shape
        tiles = tensor.scale.repeat(FP8_BLOCK, axis=0)[:rows].repeat(FP8_BLOCK, axis=1)[:, :cols]
        with np.errstate(invalid="ignore", over="ignore"):
            out *= tiles
    return out.reshape(tensor.shape)


def _decode_rows(type: BlockType, rows: Bytes, cols: int) -> Floats:
    """rows: uint8 [n, row_bytes], whole groups -> float32 [n, cols]."""
    if type.standard:
        return _decode_rows(by_name(type.standard), deinterleave(type, rows), cols)
    if type.interleaved_rows > 1:
        return _GROUP_DECODERS[type.name](rows, cols)
    fields, function = _DECODERS[type.name]
    blocks = np.ascontiguousarray(rows).reshape(-1, type.block_bytes).view(fields)[:, 0]
    return function(blocks).reshape(len(rows), cols)


def _blocks_of(
    name: str, *fields: tuple[str, str] | tuple[str, str, int | tuple[int, ...]]
) -> Callable[[Callable[[Blocks], Floats]], Callable[[Blocks], Floats]]:
    """Enter a decoder, blocks [n] -> weights, under its type's name. The fields are the block, in order."""

    def enter(function: Callable[[Blocks], Floats]) -> Callable[[Blocks], Floats]:
        layout = np.dtype(list(fields))
        assert layout.itemsize == by_name(name).block_bytes, name
        _DECODERS[name] = (layout, function)
        return function

    return enter


def _f32(scale: NDArray[np.float16]) -> Floats:
    """One scale a block, float16 [n] -> float32 [n, 1]."""
    return scale.astype(np.float32)[:, None]


def _planes(packed: Bytes, bits: int) -> Bytes:
    """Bytes [..., k] cut in fields of `bits`, lowest first: [..., 8 // bits, k]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None, :] >> shifts[:, None]) & np.uint8((1 << bits) - 1)


def _bits(packed: Bytes) -> Bytes:
    """Bytes [..., k] -> their bits, lowest first: [..., 8 k]."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little")


def _look_up(table: Floats, codes: Codes) -> Floats:
    """float32 [entries, ...], codes [...] -> the entries [..., ...]."""
    entries: Floats = table[codes]
    return entries


# Plain numbers: one weight a block.


def _number(name: str, kind: str) -> None:
    @_blocks_of(name, ("x", kind))
    def decode_number(b: Blocks) -> Floats:
        return np.asarray(b["x"].astype(np.float32))


for _name, _kind in (
    ("F32", "<f4"), ("F16", "<f2"), ("F64", "<f8"), ("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8"),
):  # fmt: skip
    _number(_name, _kind)


@_blocks_of("BF16", ("x", "<u2"))
def _bf16(b: Blocks) -> Floats:
    """The upper half of a float32."""
    return (b["x"].astype(np.uint32) << 16).view(np.float32)


def _e4m3_values() -> Floats:
    """All 256 values of F8_E4M3fn: sign, 4 exponent bits (bias 7), 3 of mantissa; no infinity, NaN is all ones."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value[code & 127 == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)


_E4M3 = _e4m3_values()


@_blocks_of("F8_E4M3", ("x", "u1"))
def _f8_e4m3(b: Blocks) -> Floats:
    return _look_up(_E4M3, b["x"])


# 32 weights with one scale d. *_0: weight = d * (level - middle). *_1: weight = d * level + m.


@_blocks_of("Q4_0", ("d", "<f2"), ("qs", "u1", 16))
def _q4_0(b: Blocks) -> Floats:
    q = _planes(b["qs"], 4).reshape(-1, 32)
    return _f32(b["d"]) * (q.astype(np.float32) - np.float32(8))


@_blocks_of("Q4_1", ("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16))
def _q4_1(b: Blocks) -> Floats:
    q = _planes(b["qs"], 4).reshape(-1, 32)
    return _f32(b["d"]) * q.astype(np.float32) + _f32(b["m"])


@_blocks_of("Q5_0", ("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16))
def _q5_0(b: Blocks) -> Floats:
    """qh: the fifth bit of weight j is bit j."""
    q = _planes(b["qs"], 4).reshape(-1, 32) | _bits(b["qh"]) << 4
    return _f32(b["d"]) * (q.astype(np.float32) - np.float32(16))


@_blocks_of("Q5_1", ("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16))
def _q5_1(b: Blocks) -> Floats:
    q = _planes(b["qs"], 4).reshape(-1, 32) | _bits(b["qh"]) << 4
    return _f32(b["d"]) * q.astype(np.float32) + _f32(b["m"])


@_blocks_of("Q6_0", ("d", "<f2"), ("qh", "u1", 8), ("qs", "u1", 16))
def _q6_0(b: Blocks) -> Floats:
    """qh: two upper bits each. Byte j has those of the weights j, j + 16, j + 8, j + 24, in this order."""
    high = _planes(b["qh"], 2)[:, [0, 2, 1, 3]].reshape(-1, 32)
    q = _planes(b["qs"], 4).reshape(-1, 32) | high << 4
    return _f32(b["d"]) * (q.astype(np.float32) - np.float32(32))


@_blocks_of("Q8_0", ("d", "<f2"), ("qs", "i1", 32))
def _q8_0(b: Blocks) -> Floats:
    return _f32(b["d"]) * b["qs"].astype(np.float32)


@_blocks_of("Q8_1", ("d", "<f2"), ("sum", "<f2"), ("qs", "i1", 32))
def _q8_1(b: Blocks) -> Floats:
    """Q8_0 with d * (sum of levels), which products with *_1 types need and the weights do not."""
    return _f32(b["d"]) * b["qs"].astype(np.float32)


@_blocks_of("Q8_K", ("d", "<f4"), ("qs", "i1", 256), ("sums", "<i2", 16))
def _q8_k(b: Blocks) -> Floats:
    return b["d"][:, None] * b["qs"].astype(np.float32)


# One and two bits a weight.


@_blocks_of("Q1_0", ("d", "<f2"), ("qs", "u1", 16))
def _q1_0(b: Blocks) -> Floats:
    """Bit 1: d, bit 0: -d. Not in planes: weight j is bit j."""
    d = _f32(b["d"])
    return np.where(_bits(b["qs"]) != 0, d, -d)


@_blocks_of("Q2_0", ("d", "<f2"), ("qs", "u1", 16))
def _q2_0(b: Blocks) -> Floats:
    """d * (level - 1). Not in planes: byte j holds the weights 4 j to 4 j + 3."""
    q = _planes(b["qs"][:, :, None], 2).reshape(-1, 64)
    return _f32(b["d"]) * (q.astype(np.float32) - np.float32(1))


_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


def _trits(packed: Bytes, count: int) -> Bytes:
    """Bytes [n, k] -> `count` trits of each, in planes: [n, count k].

    A byte is the fraction 0.abcde of base 3 in 256ths. Times 3^i modulo 256 drops the first i digits; the next digit
    is then the whole part of three times the fraction.
    """
    shifted = packed[:, None, :] * _POWERS_OF_3[:count, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


@_blocks_of("TQ1_0", ("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2"))
def _tq1_0(b: Blocks) -> Floats:
    """Ternary, d * (trit - 1): 5 trits a byte in a run of 32 bytes and one of 16, 4 trits a byte in qh."""
    q = np.concatenate([_trits(b["qs"][:, :32], 5), _trits(b["qs"][:, 32:], 5), _trits(b["qh"], 4)], axis=1)
    return _f32(b["d"]) * (q.astype(np.float32) - np.float32(1))


@_blocks_of("TQ2_0", ("qs", "u1", (2, 32)), ("d", "<f2"))
def _tq2_0(b: Blocks) -> Floats:
    """d * (level - 1), level of two bits: two runs of 32 bytes, 128 weights each."""
    q = _planes(b["qs"], 2).reshape(-1, 256)
    return _f32(b["d"]) * (q.astype(np.float32) - np.float32(1))


# 4-bit floats. A level is E2M1 (sign, 2 exponent bits, 1 of mantissa), listed doubled so that all are whole numbers;
# the scales below are halved to match.

_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


@_blocks_of("MXFP4", ("e", "u1"), ("qs", "u1", 16))
def _mxfp4(b: Blocks) -> Floats:
    """The scale is a power of two, 2^(e - 127), halved: e - 1 in a float32's exponent; e < 2 gives a subnormal."""
    e = b["e"].astype(np.uint32)
    half_scale = np.where(e < 2, np.uint32(0x200000) << e % 2, (np.maximum(e, 1) - np.uint32(1)) << 23)
    return half_scale.view(np.float32)[:, None] * _look_up(_E2M1_DOUBLED, _planes(b["qs"], 4).reshape(-1, 32))


def _ue4m3_halves() -> Floats:
    """Half of each of the 256 scales of NVFP4: E4M3 without sign (bit 7 is ignored), where 0x7f alone means 0."""
    halves = _look_up(_E4M3, np.arange(256) & 127) * np.float32(0.5)
    halves[0x7F], halves[0xFF] = 0, 240
    return halves


_UE4M3_HALVES = _ue4m3_halves()


@_blocks_of("NVFP4", ("d", "u1", 4), ("qs", "u1", (4, 8)))
def _nvfp4(b: Blocks) -> Floats:
    """Four runs of 16 weights, each with an 8-bit float for scale."""
    levels = _look_up(_E2M1_DOUBLED, _planes(b["qs"], 4)).reshape(-1, 4, 16)
    return (_look_up(_UE4M3_HALVES, b["d"])[:, :, None] * levels).reshape(-1, 64)


# k-quants: 256 weights in runs of 16 or 32. Each run has a small whole-number scale (and minimum), the block has one
# float16 for all scales (and one for all minimums).


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minimums of Q4_K and Q5_K: uint8 [n, 12] -> two of uint8 [n, 8].

    Low 6 bits of bytes 0-3: scales 0-3; of bytes 4-7: minimums 0-3. Bytes 8-11: low nibbles of the scales 4-7 and,
    above, of the minimums 4-7, whose upper two bits are on top of bytes 0-3 and 4-7.
    """
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (low & 15) | (first >> 6) << 4], axis=1)
    mins = np.concatenate([second & 63, (low >> 4) | (second >> 6) << 4], axis=1)
    return scales, mins


@_blocks_of("Q2_K", ("scales", "u1", 16), ("qs", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2"))
def _q2_k(b: Blocks) -> Floats:
    """16 runs of 16, scale in the low and minimum in the high nibble of scales[run]."""
    scale = _f32(b["d"]) * (b["scales"] & 15).astype(np.float32)
    minimum = _f32(b["dmin"]) * (b["scales"] >> 4).astype(np.float32)
    q = _planes(b["qs"], 2).reshape(-1, 16, 16).astype(np.float32)
    return (scale[:, :, None] * q - minimum[:, :, None]).reshape(-1, 256)


def _q3_k_scales(packed: Bytes) -> Codes:
    """The 16 scales of Q3_K, still with 32 added: uint8 [n, 12] -> uint8 [n, 16].

    Low nibbles in the nibble planes of bytes 0-7, two upper bits in the 2-bit planes of bytes 8-11.
    """
    return _planes(packed[:, :8], 4).reshape(-1, 16) | _planes(packed[:, 8:], 2).reshape(-1, 16) << 4


@_blocks_of("Q3_K", ("hmask", "u1", 32), ("qs", "u1", (2, 32)), ("scales", "u1", 12), ("d", "<f2"))
def _q3_k(b: Blocks) -> Floats:
    """16 runs of 16. The third bit, in eight planes of hmask, subtracts 4 where it is 0."""
    scale: Floats = _f32(b["d"]) * (_q3_k_scales(b["scales"]).astype(np.float32) - np.float32(32))
    q = _planes(b["qs"], 2).reshape(-1, 256) | _planes(b["hmask"], 1).reshape(-1, 256) << 2
    levels = q.reshape(-1, 16, 16).astype(np.float32) - np.float32(4)
    return (scale[:, :, None] * levels).reshape(-1, 256)


def _scaled_runs_of_32(b: Blocks, q: Codes) -> Floats:
    """Q4_K and Q5_K: 8 runs of 32, weight = d * scale * level - dmin * minimum."""
    scales, mins = _k_scales(b["scales"])
    scale = _f32(b["d"]) * scales.astype(np.float32)
    minimum = _f32(b["dmin"]) * mins.astype(np.float32)
    levels = q.reshape(-1, 8, 32).astype(np.float32)
    return (scale[:, :, None] * levels - minimum[:, :, None]).reshape(-1, 256)


@_blocks_of("Q4_K", ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32)))
def _q4_k(b: Blocks) -> Floats:
    return _scaled_runs_of_32(b, _planes(b["qs"], 4))


@_blocks_of("Q5_K", ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32)))
def _q5_k(b: Blocks) -> Floats:
    """qh: the fifth bits, eight planes."""
    return _scaled_runs_of_32(b, _planes(b["qs"], 4).reshape(-1, 8, 32) | _planes(b["qh"], 1) << 4)


@_blocks_of("Q6_K", ("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2"))
def _q6_k(b: Blocks) -> Floats:
    """16 runs of 16, no minimum: d * scale * (level - 32). Low nibbles in ql, two upper bits in qh."""
    q = _planes(b["ql"], 4).reshape(-1, 256) | _planes(b["qh"], 2).reshape(-1, 256) << 4
    scale = _f32(b["d"]) * b["scales"].astype(np.float32)
    levels = q.reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    return (scale[:, :, None] * levels).reshape(-1, 256)


# 4-bit codebook: levels spaced as a bell curve wants them.

_NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@_blocks_of("IQ4_NL", ("d", "<f2"), ("qs", "u1", 16))
def _iq4_nl(b: Blocks) -> Floats:
    return _f32(b["d"]) * _look_up(_NONLINEAR, _planes(b["qs"], 4).reshape(-1, 32))


@_blocks_of("IQ4_XS", ("d", "<f2"), ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", (8, 16)))
def _iq4_xs(b: Blocks) -> Floats:
    """8 runs of 32 with 6-bit scales, 32 added. Not in planes: run j has nibble j of scales_l, bits 2 j of scales_h."""
    low = _planes(b["scales_l"][:, :, None], 4).reshape(-1, 8)
    high = _planes(b["scales_h"][:, :, None], 2).reshape(-1, 8)
    scale = _f32(b["d"]) * ((low | high << 4).astype(np.float32) - np.float32(32))
    levels = _look_up(_NONLINEAR, _planes(b["qs"], 4)).reshape(-1, 8, 32)
    return (scale[:, :, None] * levels).reshape(-1, 256)


# Codebooks of 8 (or 4) weights at once. An index picks the magnitudes, a byte of signs goes with each 8 weights. The
# tables are those of the gguf package: float32 [entries, 8 or 4].

_SIGNS = np.where(_bits(np.arange(256, dtype=np.uint8)[:, None]) == 0, np.float32(1), np.float32(-1))  # [256, 8]

# A format that stores 7 signs makes the eighth so that the number of minus signs is even.
_EVEN_SIGNS = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)


@lru_cache(maxsize=6)
def codebook(name: str) -> Floats:
    """The codebook of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S or IQ1_S: float32 [entries, 8 or 4]."""
    import gguf.quants  # 40 ms, paid only by files with these types

    table = getattr(gguf.quants, name)
    table.init_grid()
    return np.ascontiguousarray(table.grid[0, 0], np.float32)


def _sevens(packed: NDArray[np.uint32]) -> Codes:
    """Four groups of 7 sign bits from the low 28 bits: [...] -> whole sign bytes [..., 4]."""
    signs: Bytes = _EVEN_SIGNS[packed[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127]
    return signs


def _signed(name: str, index: Codes, signs: Codes, scale: Floats) -> Floats:
    """index [n, i] into the codebook, signs [n, 32], scale [n, runs] over runs of equal length -> [n, 256]."""
    magnitudes = _look_up(codebook(name), index).reshape(*scale.shape, -1)
    return (scale[:, :, None] * magnitudes * _look_up(_SIGNS, signs).reshape(magnitudes.shape)).reshape(-1, 256)


@_blocks_of("IQ2_XXS", ("d", "<f2"), ("runs", "u1", (8, 8)))
def _iq2_xxs(b: Blocks) -> Floats:
    """8 runs of 32: four indices, four groups of 7 signs, and on top of these a 4-bit scale s: d (s + 1/2) / 4."""
    index = b["runs"][:, :, :4].reshape(-1, 32)
    packed = np.ascontiguousarray(b["runs"][:, :, 4:]).view("<u4")[:, :, 0]
    scale = _f32(b["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.25)
    return _signed("IQ2_XXS", index, _sevens(packed).reshape(-1, 32), scale)


def _scales_of_16(d: NDArray[np.float16], packed: Bytes) -> Floats:
    """IQ2_XS and IQ2_S: 16 runs of 16, byte j has the 4-bit scales s of the runs 2 j and 2 j + 1: d (s + 1/2) / 4."""
    scales = _planes(packed[:, :, None], 4).reshape(-1, 16)
    return _f32(d) * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(0.25)


@_blocks_of("IQ2_XS", ("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8))
def _iq2_xs(b: Blocks) -> Floats:
    """A 16-bit word for 8 weights: 9 bits of index, 7 of signs."""
    qs = b["qs"]
    return _signed("IQ2_XS", qs & np.uint16(511), _EVEN_SIGNS[qs >> 9], _scales_of_16(b["d"], b["scales"]))


@_blocks_of("IQ2_S", ("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8))
def _iq2_s(b: Blocks) -> Floats:
    """10 bits of index, the upper two from qh (not in planes), all 8 signs stored."""
    high = _planes(b["qh"][:, :, None], 2).reshape(-1, 32).astype(np.uint16)
    return _signed("IQ2_S", b["qs"] | high << 8, b["signs"], _scales_of_16(b["d"], b["scales"]))


@_blocks_of("IQ3_XXS", ("d", "<f2"), ("qs", "u1", 64), ("signs", "<u4", 8))
def _iq3_xxs(b: Blocks) -> Floats:
    """8 runs of 32: eight indices of 4 weights; signs and scale as IQ2_XXS, d (s + 1/2) / 2."""
    scale = _f32(b["d"]) * (np.float32(0.5) + (b["signs"] >> 28).astype(np.float32)) * np.float32(0.5)
    return _signed("IQ3_XXS", b["qs"], _sevens(b["signs"]).reshape(-1, 32), scale)


@_blocks_of("IQ3_S", ("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4))
def _iq3_s(b: Blocks) -> Floats:
    """8 runs of 32: 9 bits of index for 4 weights, the ninth from qh; 4-bit scales s (not in planes): d (2 s + 1)."""
    index = b["qs"] | _bits(b["qh"]).astype(np.uint16) << 8
    scales = _planes(b["scales"][:, :, None], 4).reshape(-1, 8)
    return _signed("IQ3_S", index, b["signs"], _f32(b["d"]) * (scales.astype(np.float32) * 2 + 1))


# Below two bits: an 11-bit index picks 8 weights of -1, 0 or 1, then 1/8 is added to all of them, or subtracted.

_DELTA = np.array([0.125, -0.125], np.float32)


def _shifted(index: Codes, minus: Codes, scale: Floats) -> Floats:
    """index [n, i], each of 8 weights; minus (0 or 1) and scale [n, runs] over runs of equal length -> [n, 8 i]."""
    levels = _look_up(codebook("IQ1_S"), index).reshape(*scale.shape, -1) + _look_up(_DELTA, minus)[:, :, None]
    return (scale[:, :, None] * levels).reshape(len(index), -1)


@_blocks_of("IQ1_S", ("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8))
def _iq1_s(b: Blocks) -> Floats:
    """8 runs of 32. qh[run]: four times 3 upper index bits, a 3-bit scale s for d (2 s + 1), and the sign of 1/8."""
    qh = b["qh"]
    high = qh[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    scale = _f32(b["d"]) * ((qh >> 12 & 7) * 2 + 1).astype(np.float32)
    return _shifted(b["qs"] | high.reshape(-1, 32) << 8, qh >> 15, scale)


@_blocks_of("IQ1_M", ("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4))
def _iq1_m(b: Blocks) -> Floats:
    """32 runs of 8: a nibble of qh (not in planes) has 3 upper index bits and the sign of 1/8.

    Each word of scales has four 3-bit scales of 16 weights and, on top, a quarter of the float16 d: the lowest nibble
    of d is in the first word.
    """
    words = b["scales"]
    d = (words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1, dtype=np.uint16).view(np.float16)
    scales = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16)
    scale = _f32(d) * (scales * 2 + 1).astype(np.float32)
    nibbles = _planes(b["qh"][:, :, None], 4).reshape(-1, 32)
    index = b["qs"] | (nibbles & 7).astype(np.uint16) << 8
    return _shifted(index, nibbles >> 3, scale.repeat(2, axis=1))


# ik_llama.cpp's R4 types without a standard twin: four rows together, blocks of 32 weights, one float16 scale a row,
# and those of a group's four rows in front of its blocks.


def _group_parts(rows: Bytes, cols: int, fields: list[tuple[str, str, tuple[int, ...]]]) -> tuple[Floats, Blocks]:
    """Rows [4 g, row_bytes] -> scales float32 [g, 4] and blocks [g, cols / 32] of the given fields."""
    groups = np.ascontiguousarray(rows).reshape(len(rows) // 4, -1)
    scales = np.ascontiguousarray(groups[:, :8]).view("<f2").astype(np.float32)
    blocks = np.ascontiguousarray(groups[:, 8:]).view(np.dtype(fields))
    assert blocks.shape[1] * 32 == cols
    return scales, blocks


def _iq1_s_r4(rows: Bytes, cols: int) -> Floats:
    """qh[row] as in IQ1_S; index byte i of row k is qs[i][k]."""
    d, b = _group_parts(rows, cols, [("qs", "u1", (4, 4)), ("qh", "<u2", (4,))])
    qh = b["qh"].swapaxes(1, 2)  # [g, row, block]
    low = b["qs"].transpose(0, 3, 1, 2)  # [g, row, block, i]
    index = low | (qh[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7) << 8
    scale = d[:, :, None] * ((qh >> 12 & 7) * 2 + 1).astype(np.float32)
    return _shifted(index.reshape(-1, 4), (qh >> 15).reshape(-1, 1), scale.reshape(-1, 1)).reshape(-1, cols)


def _iq1_m_r4(rows: Bytes, cols: int) -> Floats:
    """4-bit scales, one of 16 weights: weight = d * scale * (level +- 1/8), without IQ1_M's 2 s + 1.

    Half h of a block has two index bytes a row, qs[h][i][row], whose nibble i of qh[h][row] is as in IQ1_M.
    """
    d, b = _group_parts(rows, cols, [("qs", "u1", (2, 2, 4)), ("qh", "u1", (2, 4)), ("scales", "u1", (4,))])
    low = b["qs"].transpose(0, 4, 1, 2, 3)  # [g, row, block, h, i]
    nibbles = _planes(b["qh"].transpose(0, 3, 1, 2)[..., None], 4)[..., 0]  # [g, row, block, h, i]
    index = low | (nibbles & 7).astype(np.uint16) << 8
    scales = _planes(b["scales"].swapaxes(1, 2)[..., None], 4)[..., 0]  # [g, row, block, h]
    scale = (d[:, :, None, None] * scales.astype(np.float32)).repeat(2, axis=-1)
    return _shifted(index.reshape(-1, 4), (nibbles >> 3).reshape(-1, 4), scale.reshape(-1, 4)).reshape(-1, cols)


_GROUP_DECODERS: dict[str, Callable[[Bytes, int], Floats]] = {"IQ1_S_R4": _iq1_s_r4, "IQ1_M_R4": _iq1_m_r4}

assert {t.name for t in TYPES if t.decodes and not t.standard} == _DECODERS.keys() | _GROUP_DECODERS.keys()
