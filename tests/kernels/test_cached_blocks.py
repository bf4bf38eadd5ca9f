"""Cached rows in blocks on a GPU: what is appended is the definition's bits, what is gathered its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from kit.interpreter import torch  # before any kernel
from kvfold.cache.latent import CacheType, decode, encode
from kvfold.kernels.cached_blocks import Blocks, append_blocks, gather_rows

KINDS = [("q8_0", 576), ("q8_0", 96), ("q8_0", 1536), ("fp8", 576), ("fp8", 128), ("fp8", 256 + 12)]


def rows(count: int, width: int) -> np.ndarray:
    """Rows of very different sizes, with zeros, halves, tiny blocks and numbers that are not finite."""
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((count, width)) * np.exp(rng.normal(0, 4, (count, 1)))).astype(np.float32)
    x[0, :64] = 0
    x[1, :8] = 127, 0.5, 1.5, -2.5, 63.5, -0.5, 0.49999997, 1e-3
    x[1, 8:64] = 1
    x[2] *= np.float32(1e-36)
    x[3, 5], x[3, 70] = np.nan, -np.inf
    x[4, :64] = np.exp2(np.linspace(-20, 8.8, 64))  # every exponent of e4m3, and below
    x[5, -3:] = np.nan, 1e30, -1e-30
    for i, largest in enumerate(
        (2**-120, 1.8 * 2**-120, 2**-119, 1.9 * 2**-119, 2**-118, 1.8 * 2**-118)
    ):  # near a zero scale
        x[7 + i] = np.linspace(-largest, largest, width, dtype=np.float32)
    x[6, 0], x[6, 1:64] = 447.9, np.linspace(-448, 448, 63)
    return x


@pytest.mark.parametrize(("blocks", "width"), KINDS)
def test_what_is_appended_is_the_definition_bit_for_bit(blocks: Blocks, width: int, device: str) -> None:
    kind = CacheType(blocks)
    x = rows(40, width)
    pool = torch.full((100, kind.columns(width)), 0xFF, dtype=torch.uint8, device=device)
    slots = np.random.default_rng(1).permutation(100)[:40]
    slots[13] = -1  # padding
    wide = torch.zeros(40, width + 5, device=device)  # rows of a wider matrix
    wide[:, :width] = torch.from_numpy(x)
    append_blocks(wide[:, :width], torch.from_numpy(slots).to(device), pool, blocks)
    expected = np.full((100, kind.columns(width)), 0xFF, np.uint8)
    kept = slots >= 0
    expected[slots[kept]] = encode(x[kept], kind)
    np.testing.assert_array_equal(pool.cpu().numpy(), expected)


@pytest.mark.parametrize(("blocks", "width"), KINDS)
@pytest.mark.parametrize("count", [1, 63, 65, 130])
def test_what_is_gathered_is_the_definition(blocks: Blocks, width: int, count: int, device: str) -> None:
    kind = CacheType(blocks)
    pool = torch.full((9, 64, kind.columns(width)), 0xFF, dtype=torch.uint8, device=device)  # NaN
    pages = [7, 2, 5]
    x = np.random.default_rng(2).standard_normal((192, width)).astype(np.float32)
    stored = encode(x, kind).reshape(3, 64, -1)
    for page, part in zip(pages, stored, strict=True):
        pool[page] = torch.from_numpy(part)
    pool[5, 2:] = 0xFF  # behind row 130
    out = torch.full((count, width), torch.nan, device=device)
    gather_rows(pool, torch.tensor(pages, dtype=torch.int32, device=device), out, blocks)
    np.testing.assert_array_equal(out.cpu().numpy(), decode(encode(x[:count], kind), kind))


@pytest.mark.parametrize(("blocks", "width"), [*KINDS[:1], KINDS[-1], (None, 72)])
@pytest.mark.parametrize("held", [0, 3, 64, 130])
def test_behind_what_is_held_are_zeros(blocks: Blocks | None, width: int, held: int, device: str) -> None:
    """Whatever lies in the page that is held in part, and whatever the list says behind it."""
    x = np.random.default_rng(2).standard_normal((192, width)).astype(np.float32)
    kind = CacheType(blocks) if blocks else CacheType.F16
    stored = torch.from_numpy(encode(x, kind)).to(device)
    nothing = 0xFF if blocks else torch.nan
    pool = torch.full((9, 64, kind.columns(width)), nothing, dtype=stored.dtype, device=device)
    for page, part in zip([7, 2, 5], stored.unflatten(0, (3, 64)), strict=True):
        pool[page] = part
    pool[[7, 2, 5][held // 64], held % 64 :] = nothing
    pages = [7, 2, 5][: -(-held // 64)] + [1 << 30] * 4
    out = torch.full((256, width), torch.nan, device=device)
    count = torch.tensor([held], dtype=torch.int32, device=device)
    gather_rows(pool, torch.tensor(pages, dtype=torch.int32, device=device), out, blocks, count)
    expected = np.zeros((256, width), np.float32)
    expected[:held] = decode(encode(x[:held], kind), kind)
    np.testing.assert_array_equal(out.cpu().numpy(), expected)
