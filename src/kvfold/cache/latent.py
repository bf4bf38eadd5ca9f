"""What is cached per token: the latent row, or (mla=0 only) per-head keys and values.

Owns layouts, number formats and the arrays; never decides which page belongs to whom (cache/pages.py).

One latent layout serves every latent path, on every backend:

    latent  [num_layers, num_pages, PAGE_TOKENS, kv_lora + rope]     c_kv first, rotated k_rope last

q8_0 holds 32 numbers of a row as a float16 scale and 32 signed bytes, 34 bytes in all: llama.cpp's block of that name.
`encode` and `decode` are the definition of every number format; csrc/kernels/cache_rows.cpp is equal bit for bit.

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

_Q8_BYTES = 2 + Q8_BLOCK
_TINY = np.float32(2.0**-120)  # below it 127 / largest is not finite; a float16 scale is 0 far above it


class CacheType(Enum):
    """The number format of cached rows."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The numpy type of the array; bfloat16 is held as its 16 bits, q8_0 as bytes."""
        types = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.uint8}
        return np.dtype(types[self.value])

    def columns(self, count: int) -> int:
        """How many of `storage` hold this many numbers of a row; of a block, all."""
        return -(-count // Q8_BLOCK) * _Q8_BYTES if self is CacheType.Q8_0 else count

    def row_bytes(self, count: int) -> int:
        return self.columns(count) * self.storage.itemsize


def encode(values: Floats, cache_type: CacheType) -> NDArray[np.generic]:
    """float32 [.., n] -> `storage` [.., columns(n)], rounded to nearest even.

    q8_0: scale = largest / 127 in float32, kept as float16; code = value * (1 / scale in float32), a half away from
    zero. A value that is not finite makes its block's scale NaN.
    """
    if cache_type is CacheType.BF16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if cache_type is not CacheType.Q8_0:
        return values.astype(cache_type.storage)
    blocks = np.ascontiguousarray(values).reshape(*values.shape[:-1], values.shape[-1] // Q8_BLOCK, Q8_BLOCK)
    largest = np.abs(blocks).max(-1, keepdims=True)
    finite = np.isfinite(largest)
    used = finite & (largest >= _TINY)
    scale = np.where(used, largest, 127) / np.float32(127)
    exact = np.where(used, blocks, 0) * (np.float32(1) / scale)
    raw = np.empty((*blocks.shape[:-1], _Q8_BYTES), np.uint8)
    with np.errstate(over="ignore"):
        half = np.where(finite, np.where(used, scale, 0), np.nan).astype("<f2")
    raw[..., :2] = half.view(np.uint8)
    # |exact| <= 127.00001: halves are exact in float32, and so are these sums
    raw[..., 2:] = (np.sign(exact) * np.floor(np.abs(exact) + np.float32(0.5))).astype(np.int8).view(np.uint8)
    return raw.reshape(*values.shape[:-1], blocks.shape[-2] * _Q8_BYTES)


def decode(stored: NDArray[np.generic], cache_type: CacheType) -> Floats:
    """`storage` [.., columns(n)] -> float32 [.., n], exact."""
    if cache_type is CacheType.BF16:
        widened: Floats = stored.view(ml_dtypes.bfloat16).astype(np.float32)
        return widened
    if cache_type is not CacheType.Q8_0:
        return stored.astype(np.float32)
    blocks = np.ascontiguousarray(stored).reshape(*stored.shape[:-1], stored.shape[-1] // _Q8_BYTES, _Q8_BYTES)
    scale = blocks[..., :2].view("<f2").astype(np.float32)
    values: Floats = blocks[..., 2:].view(np.int8) * scale
    return values.reshape(*stored.shape[:-1], blocks.shape[-2] * Q8_BLOCK)


def parse_cache_type(value: str) -> CacheType:
    """`f32`, `f16`, `bf16` or `q8_0`. Raises SettingError."""
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
        """SettingError where q8_0 has no whole blocks in a part of a row: c_kv, k_rope, a head's keys or its values."""
        latent = {"kv_lora_rank": mla.kv_lora_rank, "qk_rope_head_dim": mla.qk_rope_head_dim}
        full = {"qk_head_dim": mla.qk_head_dim, "v_head_dim": mla.v_head_dim}
        for name, width in (latent if len(self.row_dims) == 1 else full).items():
            if self.cache_type is CacheType.Q8_0 and width % Q8_BLOCK:
                raise SettingError(
                    f"cache_type=q8_0: {name} of this model is {width}, expected a multiple of {Q8_BLOCK}: blocks of "
                    f"that many numbers share a scale. Use f16 or bf16."
                )

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
