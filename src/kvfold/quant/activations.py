"""What the native kernels make of activations before a product: the definition, in numpy.

Owns the rounding of x in y = x W^T, nothing else: weights are never rounded. A product in mode `int8` is

    y[m, n] = sum over blocks b of  scale[m, b] * sum over i in b of  codes[m, i] * W[n, i]

with W as quant/decode.py defines it. Kernels write W[n, i] as a whole number times the file's own scale (plus its
minimum), so their inner sums are exact in integers; the outer sums are float32 in any order. They agree with
`product`, which adds in float64, to 1e-5 of the size of a row of y.

A block with a value that is not finite gets the scale NaN: every output it takes part in is NaN. A block whose values are all
below 2^-120 counts as zeros, because 127 / largest would overflow below 2^-121.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvfold.quant.decode import FP8_BLOCK, decode_tensor
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import BlockType

Floats = NDArray[np.float32]

BLOCK = 32
"""Consecutive values that share a scale."""

_TINY = np.float32(2.0**-120)

_E4M3_MOST = np.float32(448)


class Rounding(Enum):
    """What becomes of activations that meet weights of a type."""

    INT8 = "int8"  # whole numbers of -127..127 times a scale for each 32 values
    BF16 = "bf16"  # to the nearest bfloat16
    NONE = "float32"


def rounding_for(type: BlockType) -> Rounding:
    """INT8 where a weight is a whole number of -128..127 times a scale (plus a minimum) of at least 16 neighbours."""
    if type.name == "BF16":
        return Rounding.BF16
    return Rounding.NONE if type.block_elements < BLOCK or _is_mixed(type) else Rounding.INT8


def _is_mixed(type: BlockType) -> bool:
    """Rows that are decoded to float32 first."""
    return type.interleaved_rows > 1 and not type.is_side_by_side


def experts_round(gate: BlockType, up: BlockType, down: BlockType) -> bool:
    """Whether a mixture of experts rounds its activations at all.

    All of its matrices do as their types ask, or none does: gate and up are multiplied in one pass, so they are of one
    type, and a type that is decoded to float32 first (interleaved rows, fp8) takes the whole mixture with it.
    """
    return gate == up and not any(_is_mixed(t) or t.name.startswith("F8") for t in (gate, down))


def quantize(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """float32 [..., K] -> codes int8 [..., K], scales float32 [..., K / 32]. K is a multiple of 32.

    scale = largest / 127 and code = x * (127 / largest) to the nearest, ties to even, every step in float32.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(-1)  # NaN where any is
    finite = np.isfinite(largest)
    used = finite & (largest >= _TINY)
    inverse = np.float32(127) / np.where(used, largest, np.float32(127))
    codes = np.rint(np.where(used[..., None], blocks, 0) * inverse[..., None]).astype(np.int8)
    scales = np.where(finite, np.where(used, largest / np.float32(127), 0), np.nan).astype(np.float32)
    return codes.reshape(x.shape), scales


def quantize_e4m3(x: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """float32 [..., K] -> codes of F8_E4M3 [..., K], scales float32 [..., ceil(K / 128)]: what meets block-scaled fp8
    weights on a GPU in products of many rows.

    scale = largest / 448, the largest of 128 values, and code = x * (448 / largest) to the nearest, ties to even. Values
    that are not finite, and tiny ones, as in `quantize`.
    """
    padding = -x.shape[-1] % FP8_BLOCK
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]).reshape(*x.shape[:-1], -1, FP8_BLOCK)
    largest = np.abs(blocks).max(-1)
    finite = np.isfinite(largest)
    used = finite & (largest >= _TINY)
    inverse = _E4M3_MOST / np.where(used, largest, _E4M3_MOST)
    scaled = np.where(used[..., None], blocks, 0) * inverse[..., None]
    # Three bits of mantissa, from 2^-6 on; below that all steps are 2^-9.
    exponent = np.maximum(np.frexp(np.abs(scaled))[1] - 1, -6)
    level = np.rint(np.abs(np.ldexp(scaled, 3 - exponent))).astype(np.int32)  # 8 to 16 above 2^-6
    code = np.where(level < 8, level, (exponent + 6) * 8 + level) | np.where(scaled < 0, 128, 0)
    codes = code.astype(np.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    scales = np.where(finite, np.where(used, largest / _E4M3_MOST, 0), np.nan).astype(np.float32)
    return codes, scales


def rounded(x: Floats, rounding: Rounding) -> NDArray[np.float64]:
    """The numbers a kernel multiplies weights by: float64 [..., K]."""
    if rounding is Rounding.NONE:
        return x.astype(np.float64)
    if rounding is Rounding.BF16:
        return to_bf16(x).astype(np.float64)
    codes, scales = quantize(x)
    return codes.astype(np.float64) * scales.astype(np.float64).repeat(BLOCK, axis=-1)


def product(x: Floats, weight: QuantTensor) -> NDArray[np.float64]:
    """x [M, K] times the transpose of weight [N, K], x rounded as the type asks: float64 [M, N]."""
    wide = decode_tensor(weight).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return rounded(x, rounding_for(weight.type)) @ wide.T


def to_bf16(x: Floats) -> Floats:
    """To the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, nearest.view(np.float32))
