"""What is cached per token: the latent row, or (mla=0 only) per-head keys and values.

Owns layouts, number formats and the arrays; never decides which page belongs to whom (cache/pages.py).

One latent layout serves every latent path, on every backend:

    latent  [num_layers, num_pages, PAGE_TOKENS, kv_lora + rope]     c_kv first, rotated k_rope last

q8_0 holds 32 numbers of a row as a float16 scale and 32 signed bytes, 34 bytes in all: llama.cpp's block of that name.

fp8 is for latents alone: every whole 128 numbers of a row, so c_kv, as bytes e4m3 (1 sign, 4 exponent, 3 mantissa bits)
under a float32 scale, and what is left over, k_rope, as bfloat16. DeepSeek's row of 576 numbers takes 656 bytes:

    [512 codes | 4 scales | 64 bfloat16]     512 + 16 + 128 bytes

Scales are powers of two, so that code times scale is exact in bfloat16, and rounding a row again changes nothing.

`encode` and `decode` are the definition of every number format; csrc/kernels/cache_rows.cpp and
kernels/cached_blocks.py are equal bit for bit.

Page p, slot s of a sequence's page list is token p * PAGE_TOKENS + s. Memory is reserved as address space and
committed by the system when first written (cache/address_space.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvfold.cache.address_space import HUGE_PAGE_BYTES, AddressSpace
from kvfold.config import MlaConfig, ModelConfig
from kvfold.errors import SettingError

Floats = NDArray[np.float32]

PAGE_TOKENS = 64

Q8_BLOCK = 32
"""Numbers of a row that share a scale in q8_0: whole blocks in every part of a row that is read by itself."""

FP8_GROUP = 128
"""Numbers of a row that share a scale in fp8."""

FP8_MOST_LEFT = 64
"""Numbers that fp8 may leave to bfloat16: so many take fewer bytes than a group, and bytes alone tell what a row is."""

_Q8_BYTES = 2 + Q8_BLOCK
_Q8_TINY = np.float32(2.0**-120)  # below it 127 / largest is not finite; a float16 scale is 0 far above it
_FP8_TINY = np.float32(2.0**-118)  # its scale is 2^-126, the least normal number; a group below it is zero
_FP8_GROUP_BYTES = FP8_GROUP + 4
_FP8_LARGEST = 448  # of e4m3


class CacheType(Enum):
    """The number format of cached rows."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    FP8 = "fp8"

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The numpy type of the array; bfloat16 is held as its 16 bits, q8_0 and fp8 as bytes."""
        types = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.uint8, "fp8": np.uint8}
        return np.dtype(types[self.value])

    def columns(self, count: int) -> int:
        """How many of `storage` hold this many numbers of a row; of a block, all."""
        if self is CacheType.Q8_0:
            return -(-count // Q8_BLOCK) * _Q8_BYTES
        if self is CacheType.FP8:
            return count // FP8_GROUP * _FP8_GROUP_BYTES + count % FP8_GROUP * 2
        return count

    @property
    def is_latent_only(self) -> bool:
        """Whether mla=0, which caches keys and values of every head, cannot use it."""
        return self is CacheType.FP8

    def row_bytes(self, count: int) -> int:
        return self.columns(count) * self.storage.itemsize


def encode(values: Floats, cache_type: CacheType) -> NDArray[np.generic]:
    """float32 [.., n] -> `storage` [.., columns(n)], rounded to nearest even.

    q8_0: scale = largest / 127 in float32, kept as float16; code = value * (1 / scale in float32), a half away from
    zero. fp8: scale = the least power of two with largest / scale <= 448, 0 where largest < 2^-118. A value that is not finite makes the scale of
    its block or group NaN.
    """
    if cache_type is CacheType.BF16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if cache_type is CacheType.FP8:
        return _encode_fp8(values)
    if cache_type is not CacheType.Q8_0:
        return values.astype(cache_type.storage)
    blocks = np.ascontiguousarray(values).reshape(*values.shape[:-1], values.shape[-1] // Q8_BLOCK, Q8_BLOCK)
    largest = np.abs(blocks).max(-1, keepdims=True)
    finite = np.isfinite(largest)
    used = finite & (largest >= _Q8_TINY)
    scale = np.where(used, largest, 127) / np.float32(127)
    exact = np.where(used, blocks, 0) * (np.float32(1) / scale)
    raw = np.empty((*blocks.shape[:-1], _Q8_BYTES), np.uint8)
    with np.errstate(over="ignore"):
        half = np.where(finite, np.where(used, scale, 0), np.nan).astype("<f2")
    raw[..., :2] = half.view(np.uint8)
    # |exact| <= 127.00001: halves are exact in float32, and so are these sums
    raw[..., 2:] = (np.sign(exact) * np.floor(np.abs(exact) + np.float32(0.5))).astype(np.int8).view(np.uint8)
    return raw.reshape(*values.shape[:-1], blocks.shape[-2] * _Q8_BYTES)


def _encode_fp8(values: Floats) -> NDArray[np.uint8]:
    coded = values.shape[-1] // FP8_GROUP * FP8_GROUP
    assert values.shape[-1] - coded <= FP8_MOST_LEFT
    groups = np.ascontiguousarray(values[..., :coded]).reshape(*values.shape[:-1], coded // FP8_GROUP, FP8_GROUP)
    largest = np.abs(groups).max(-1, keepdims=True)
    finite = np.isfinite(largest)
    used = finite & (largest >= _FP8_TINY)
    # largest / 448 = fraction * 2^exponent with 0.5 <= fraction < 1; one half is a power of two itself
    fraction, exponent = np.frexp(np.where(used, largest, _FP8_LARGEST).astype(np.float64) / _FP8_LARGEST)
    scale = np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent))
    codes = (np.where(used, groups, 0) / scale).astype(ml_dtypes.float8_e4m3fn)
    parts = (
        codes.view(np.uint8).reshape(*values.shape[:-1], coded),
        np.where(finite, np.where(used, scale, 0), np.nan).astype("<f4")[..., 0].view(np.uint8),
        np.ascontiguousarray(values[..., coded:]).astype(ml_dtypes.bfloat16).view(np.uint8),
    )
    return np.concatenate(parts, axis=-1)


def _decode_fp8(stored: NDArray[np.uint8]) -> Floats:
    num_groups = stored.shape[-1] // _FP8_GROUP_BYTES
    codes, scales, rest = np.split(stored, [num_groups * FP8_GROUP, num_groups * _FP8_GROUP_BYTES], axis=-1)
    groups = codes.reshape(*stored.shape[:-1], num_groups, FP8_GROUP).view(ml_dtypes.float8_e4m3fn)
    values = groups.astype(np.float32) * np.ascontiguousarray(scales).view("<f4")[..., None]
    halves = np.ascontiguousarray(rest).view(ml_dtypes.bfloat16).astype(np.float32)
    return np.concatenate([values.reshape(*stored.shape[:-1], num_groups * FP8_GROUP), halves], axis=-1)


def decode(stored: NDArray[np.generic], cache_type: CacheType) -> Floats:
    """`storage` [.., columns(n)] -> float32 [.., n], exact."""
    if cache_type is CacheType.BF16:
        widened: Floats = stored.view(ml_dtypes.bfloat16).astype(np.float32)
        return widened
    if cache_type is CacheType.FP8:
        return _decode_fp8(np.ascontiguousarray(stored).view(np.uint8))
    if cache_type is not CacheType.Q8_0:
        return stored.astype(np.float32)
    codes, scales = codes_and_scales(stored)
    values: Floats = codes * scales.repeat(Q8_BLOCK, axis=-1)
    return values


def codes_and_scales(stored: NDArray[np.generic]) -> tuple[NDArray[np.int8], Floats]:
    """q8_0 as it is stored, [.., columns(n)]: int8 [.., n] and float32 [.., n / 32]."""
    blocks = np.ascontiguousarray(stored).reshape(*stored.shape[:-1], stored.shape[-1] // _Q8_BYTES, _Q8_BYTES)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)[..., 0]
    return codes.reshape(*stored.shape[:-1], blocks.shape[-2] * Q8_BLOCK), scales


def parse_cache_type(value: str) -> CacheType:
    """`f32`, `f16`, `bf16`, `q8_0` or `fp8`. Raises SettingError."""
    try:
        return CacheType(value.lower())
    except ValueError:
        allowed = ", ".join(t.value for t in CacheType)
        raise SettingError(f"cache_type={value}: allowed are {allowed}.") from None


@dataclass(frozen=True)
class CacheLayout:
    """Shapes and bytes of a cache before it is allocated.

    `row_dims` are the numbers per token and layer of each array: (latent_dim,) for latents, and
    (H * qk_head_dim, H * v_head_dim) for the standard cache of mla=0.
    """

    num_layers: int
    row_dims: tuple[int, ...]
    cache_type: CacheType

    @classmethod
    def latent(cls, config: ModelConfig, cache_type: CacheType) -> CacheLayout:
        return cls(config.num_layers, (config.mla.latent_dim,), cache_type)

    @classmethod
    def standard(cls, config: ModelConfig, cache_type: CacheType) -> CacheLayout:
        mla = config.mla
        return cls(config.num_layers, (mla.num_heads * mla.qk_head_dim, mla.num_heads * mla.v_head_dim), cache_type)

    def check_blocks(self, mla: MlaConfig) -> None:
        """SettingError where the parts of a row do not fill blocks: c_kv and k_rope, or a head's keys and its values."""
        latent = {"kv_lora_rank": mla.kv_lora_rank, "qk_rope_head_dim": mla.qk_rope_head_dim}
        full = {"qk_head_dim": mla.qk_head_dim, "v_head_dim": mla.v_head_dim}
        for name, width in (latent if len(self.row_dims) == 1 else full).items():
            if self.cache_type is CacheType.Q8_0 and width % Q8_BLOCK:
                raise SettingError(
                    f"cache_type=q8_0: {name} of this model is {width}, expected a multiple of {Q8_BLOCK}: blocks of "
                    f"that many numbers share a scale. Use f16 or bf16."
                )
        if self.cache_type.is_latent_only and len(self.row_dims) > 1:
            raise SettingError("cache_type=fp8 holds latents, and mla=0 caches none: use q8_0, f16 or bf16 there.")
        if self.cache_type is CacheType.FP8 and (
            mla.kv_lora_rank % FP8_GROUP or mla.qk_rope_head_dim > FP8_MOST_LEFT
        ):
            raise SettingError(
                f"cache_type=fp8: kv_lora_rank of this model is {mla.kv_lora_rank} and qk_rope_head_dim "
                f"{mla.qk_rope_head_dim}, expected a multiple of {FP8_GROUP} and at most {FP8_MOST_LEFT}. Use q8_0, "
                f"f16 or bf16."
            )

    def holds(self, mla: MlaConfig) -> bool:
        """Whether `check_blocks` has nothing against it."""
        try:
            self.check_blocks(mla)
        except SettingError:
            return False
        return True

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * sum(self.cache_type.row_bytes(dim) for dim in self.row_dims)


class PagedCache:
    """One cache: its shape, and its arrays for backends that compute where those lie."""

    def __init__(self, layout: CacheLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self._page_bytes = [PAGE_TOKENS * layout.cache_type.row_bytes(dim) for dim in layout.row_dims]

    @cached_property
    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """`arrays[i]` is [num_layers, num_pages, PAGE_TOKENS, columns(row_dims[i])]; address space, reserved when first
        asked for, whose memory is committed as rows are written. A backend with memory of its own never asks.

        Raises MemoryError where there is no address space.
        """
        return tuple(space.array for space in self._spaces)

    @cached_property
    def _spaces(self) -> list[AddressSpace]:
        layout, pages = self.layout, self.num_pages
        return [
            AddressSpace(
                (layout.num_layers, pages, PAGE_TOKENS, layout.cache_type.columns(dim)),
                layout.cache_type.storage,
                huge=pages * page_bytes >= HUGE_PAGE_BYTES,  # a layer fills one
            )
            for dim, page_bytes in zip(layout.row_dims, self._page_bytes, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """When every row is written."""
        return self.num_pages * PAGE_TOKENS * self.layout.bytes_per_token

    def give_back(self, pages: list[int]) -> None:
        """Nobody needs the rows of these pages: their memory goes back to the system, but what lies in a 2 MiB page
        with rows of others."""
        if "arrays" not in vars(self):
            return
        runs = _runs(sorted(pages))
        for space, page_bytes in zip(self._spaces, self._page_bytes, strict=True):
            layers = range(0, self.layout.num_layers * self.num_pages, self.num_pages)
            space.give_back(
                ((layer + first) * page_bytes, (layer + last) * page_bytes)
                for layer in layers
                for first, last in runs
            )


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as [first, last) ranges."""
    cuts = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1), len(numbers)]
    return [(numbers[i], numbers[j - 1] + 1) for i, j in pairwise(cuts) if j > i]
