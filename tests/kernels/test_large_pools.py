"""A cache of more than 2^31 numbers: offsets are 64-bit wherever a page or a slot is multiplied. gpu only: 4 GB."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kernels.test_mla_decode import Case
from kit.interpreter import torch  # before any kernel
from kvfold.cache.latent import CacheType, decode, encode
from kvfold.kernels.cached_blocks import Blocks, append_blocks, gather_rows
from kvfold.kernels.mla_decode import Form
from kvfold.kernels.rows import LatentRow, fold_append, rope_append

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LATENT = 576
NUM_PAGES = (1 << 31) // (64 * LATENT) + 1000


@pytest.mark.parametrize(
    ("heads", "form", "blocks"),
    [
        *itertools.product([16, 128], ["triton"], [None, "q8_0", "fp8"]),
        *itertools.product([16, 128], ["gluon"], [None, "fp8"]),
    ],
)  # fmt: skip
def test_attention_reads_its_last_pages(heads: int, form: Form, blocks: Blocks | None) -> None:
    if form == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    case = Case(heads, [4097, 65, 1], kv_lora=512, rope=64, dtype=torch.bfloat16, blocks=blocks)
    case.check(4e-3, form=form, num_pages=NUM_PAGES)


@pytest.mark.parametrize("folds", [False, True])
def test_rows_are_appended_to_its_last_slots(folds: bool) -> None:
    """By the launch that rotates queries, and by the one that folds them too."""
    pool = torch.full((NUM_PAGES * 64, LATENT), torch.nan, dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([len(pool) - 1, 3, -1, (1 << 31) // LATENT + 5], device="cuda")
    q, kv_a = torch.zeros(4, 192, device="cuda"), torch.randn(4, LATENT, device="cuda")
    weight, ones = torch.ones(512, device="cuda"), torch.ones(1, 32, device="cuda")
    positions = torch.zeros(4, dtype=torch.int32, device="cuda")
    angles = ones, torch.zeros_like(ones)
    if folds:
        new = LatentRow(kv_a, weight, 1e-6, positions, slots, *angles, pool, is_half_split=False)
        fold_append(q, torch.ones(1, 128, 512, device="cuda"), torch.empty(4, 1, LATENT, device="cuda"), new)
    else:
        rope_append(
            q, kv_a, weight, 1e-6, positions, slots, *angles, pool, num_heads=1, head_dim=192, is_half_split=False
        )
    assert torch.equal(pool[slots[[0, 1, 3]]][:, 512:], kv_a[[0, 1, 3], 512:].bfloat16())
    assert int((~pool[:, 0].isnan()).sum()) == 3


@pytest.mark.parametrize("blocks", ["q8_0", "fp8"])
def test_blocks_are_appended_and_gathered_at_its_end(blocks: Blocks) -> None:
    kind = CacheType(blocks)
    num_pages = (1 << 31) // (64 * kind.columns(LATENT)) + 100
    pool = torch.full((num_pages, 64, kind.columns(LATENT)), 0xFF, dtype=torch.uint8, device="cuda")
    x = torch.randn(64, LATENT, device="cuda")
    slots = (num_pages - 1) * 64 + torch.arange(64, device="cuda")
    append_blocks(x, slots, pool.flatten(0, 1), blocks)
    out = torch.empty(64, LATENT, device="cuda")
    gather_rows(pool, torch.tensor([num_pages - 1], dtype=torch.int32, device="cuda"), out, blocks)
    expected = decode(encode(x.cpu().numpy(), kind), kind)
    np.testing.assert_array_equal(out.cpu().numpy(), expected)
    assert (pool[:-1] == 0xFF).all()
