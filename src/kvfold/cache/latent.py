"""What is cached per token: the latent row, or (mla=0 only) per-head keys and values.

Owns layouts, number formats and the arrays; never decides which page belongs to whom (cache/pages.py).

One latent layout serves every latent path, on every backend:

    latent  [num_layers, num_pages, PAGE_TOKENS, kv_lora + rope]     c_kv first, rotated k_rope last

Page p, slot s of a sequence's page list is token p * PAGE_TOKENS + s. Memory is reserved as address space and
committed by the kernel page by page when first written.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvfold.config import ModelConfig
from kvfold.errors import SettingError

PAGE_TOKENS = 64


class CacheType(Enum):
    """The number format of cached rows."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"

    @property
    def nbytes(self) -> int:
        return 4 if self is CacheType.F32 else 2

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The numpy type of the array; bfloat16 is held as its 16 bits."""
        return np.dtype({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[self.value])


def parse_cache_type(value: str) -> CacheType:
    """`f32`, `f16` or `bf16`. Raises SettingError."""
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

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * sum(self.row_dims) * self.cache_type.nbytes


class PagedCache:
    """The arrays of one cache: `arrays[i]` is [num_layers, num_pages, PAGE_TOKENS, row_dims[i]]."""

    def __init__(self, layout: CacheLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.arrays: tuple[NDArray[np.generic], ...] = tuple(
            np.empty((layout.num_layers, num_pages, PAGE_TOKENS, dim), layout.cache_type.storage)
            for dim in layout.row_dims
        )
