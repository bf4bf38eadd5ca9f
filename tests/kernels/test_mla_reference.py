"""Attention by the kernels of a GPU, from projections to values, is mla/reference.py's in float64, on fresh numbers every run.

A seed is drawn for each case and named where it fails. What the cache rounds, the reference is given rounded.
"""

from __future__ import annotations

import dataclasses
import os
from functools import cached_property

import numpy as np
import pytest

from kit.interpreter import torch  # before any kernel
from kvfold.cache.latent import CacheType, decode, encode
from kvfold.config import MlaConfig
from kvfold.kernels import mla_prefill, rows
from kvfold.kernels.cached_blocks import append_blocks, gather_rows
from kvfold.kernels.mla_decode import DecodeWorkspace, Form, mla_decode, schedule_decode
from kvfold.mla.reference import attend

SMALL = MlaConfig(
    num_heads=3, qk_nope_head_dim=24, qk_rope_head_dim=32, v_head_dim=20, kv_lora_rank=128, q_lora_rank=None,
    softmax_scale=0.2, lora_norm_eps=1e-6,
)  # fmt: skip
DEEPSEEK = MlaConfig(
    num_heads=16, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, q_lora_rank=None,
    softmax_scale=0.1, lora_norm_eps=1e-6,
)  # fmt: skip
NUMBERS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Sequence:
    """Random queries of the last `num_rows` of `num_keys` tokens, up-projections, and latents in a scattered cache whose
    other rows are NaN."""

    def __init__(
        self, mla: MlaConfig, num_keys: int, num_rows: int, cache: str, dtype: torch.dtype, device: str, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        self.mla, self.num_rows, self.dtype, self.device = mla, num_rows, dtype, device
        heads, lora = mla.num_heads, mla.kv_lora_rank

        def numbers(*shape: int, spread: float = 1.0) -> torch.Tensor:
            return torch.from_numpy((spread * rng.standard_normal(shape)).astype(np.float32)).to(dtype).to(device)

        self.q = numbers(num_rows, heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim, spread=1.5)
        self.w_uk = numbers(heads, mla.qk_nope_head_dim, lora, spread=lora**-0.5)
        self.w_uv = numbers(heads, mla.v_head_dim, lora, spread=lora**-0.5)
        kind = CacheType(cache)
        latents = rng.standard_normal((num_keys, mla.latent_dim)).astype(np.float32)
        num_pages = -(-num_keys // 64)
        self.pages = torch.from_numpy(rng.permutation(num_pages + 3)[:num_pages].astype(np.int32)).to(device)
        at = np.arange(num_keys)
        slots = torch.from_numpy(self.pages.cpu().numpy().astype(np.int64)[at // 64] * 64 + at % 64).to(device)
        shape = (num_pages + 3, 64, kind.columns(mla.latent_dim))
        self.blocks = cache if cache in ("q8_0", "fp8") else None
        if self.blocks is None:
            self.pool = torch.full(shape, torch.nan, dtype=NUMBERS[cache], device=device)
            self.pool.flatten(0, 1)[slots] = torch.from_numpy(latents).to(device).to(NUMBERS[cache])
        else:
            self.pool = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
            append_blocks(torch.from_numpy(latents).to(device), slots, self.pool.flatten(0, 1), self.blocks)
        self.latents = torch.from_numpy(decode(encode(latents, kind), kind)).to(dtype).double().numpy()

    @cached_property
    def expected(self) -> np.ndarray:
        q, w_uk, w_uv = (x.double().cpu().numpy() for x in (self.q, self.w_uk, self.w_uv))
        lora = self.mla.kv_lora_rank
        return attend(q, self.latents[:, :lora], self.latents[:, lora:], w_uk, w_uv, self.mla)

    def absorbed(self, form: Form, rows_at_once: int) -> torch.Tensor:
        """rows_at_once: query rows of a launch, which share the tiles they all see."""
        mla, q, dtype, device = self.mla, self.q, self.dtype, self.device
        lora, nope, rope = mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim

        def unwritten(*shape: int) -> torch.Tensor:
            return torch.full(shape, torch.nan, dtype=dtype, device=device)

        folded = unwritten(self.num_rows, mla.num_heads, mla.latent_dim)
        rows.per_head(q, self.w_uk, folded, depth=nope, width=lora, extra=rope)
        batch = self.num_rows // rows_at_once
        before = len(self.latents) - self.num_rows
        kv_lens = torch.tensor([before + rows_at_once * (i + 1) for i in range(batch)], dtype=torch.int32)
        kv_lens = kv_lens.to(device)
        starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        workspace = DecodeWorkspace(batch, rows_at_once, mla.num_heads, lora, device)
        workspace.partial.fill_(torch.nan)
        workspace.partial_lse.fill_(torch.nan)
        schedule_decode(kv_lens, workspace)
        weighted = unwritten(self.num_rows, mla.num_heads, lora)
        mla_decode(
            folded, self.pool, self.pages, starts, kv_lens, weighted, workspace, scale=mla.softmax_scale,
            kv_lora=lora, blocks=self.blocks, form=form,
        )  # fmt: skip
        out = unwritten(self.num_rows, mla.num_heads, mla.v_head_dim)
        rows.per_head(weighted, self.w_uv.transpose(1, 2), out, depth=lora, width=mla.v_head_dim)
        return out

    def decompressed(self, form: mla_prefill.Form, tile: int) -> torch.Tensor:
        """tile: keys that are expanded at a time, a multiple of a page."""
        mla, lora, heads = self.mla, self.mla.kv_lora_rank, self.mla.num_heads
        num_keys = len(self.latents)
        if self.blocks is None:
            cached = self.pool[self.pages.long()].flatten(0, 1)[:num_keys].to(self.dtype)
        else:
            cached = torch.full((num_keys, mla.latent_dim), torch.nan, dtype=self.dtype, device=self.device)
            gather_rows(self.pool, self.pages, cached, self.blocks)
        out = torch.full((self.num_rows, heads, mla.v_head_dim), torch.nan, device=self.device)
        lse = torch.full((heads, self.num_rows), torch.nan, device=self.device)
        for first in range(0, num_keys, tile):
            keys = cached[first : first + tile]
            k_nope, v = (
                torch.mm(keys[:, :lora], w.flatten(0, 1).T).view(len(keys), heads, -1)
                for w in (self.w_uk, self.w_uv)
            )
            mla_prefill.mla_prefill(
                self.q, k_nope, keys[:, None, lora:], v, out, lse, scale=mla.softmax_scale,
                first_row=num_keys - self.num_rows, first_key=first, merge=first > 0, form=form,
            )  # fmt: skip
        return out

    def check(self, out: torch.Tensor, tolerance: float, what: str) -> None:
        expected = self.expected
        got = out.double().cpu().numpy()
        assert np.isfinite(got).all(), f"{what}: unwritten or poisoned output"
        error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        row, head = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= tolerance, (
            f"{what}: row {row}, head {head} off by {error.max():.2e} > {tolerance:.0e}"
        )


def fresh() -> int:
    return int.from_bytes(os.urandom(4), "little")


@pytest.mark.parametrize("cache", ["f32", "q8_0", "fp8"])
@pytest.mark.parametrize(("num_keys", "num_rows"), [(1, 1), (63, 3), (65, 2), (130, 65)])
def test_both_paths_are_the_reference(num_keys: int, num_rows: int, cache: str, device: str) -> None:
    seed = fresh()
    case = Sequence(SMALL, num_keys, num_rows, cache, torch.float32, device, seed)
    at_once = next(n for n in (4, 3, 2, 1, 5) if num_rows % n == 0)
    case.check(case.absorbed("triton", at_once), 1e-5, f"absorbed, seed {seed}")
    case.check(case.decompressed("triton", 64), 1e-5, f"decompressed, seed {seed}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cache", ["bf16", "f16", "q8_0", "fp8"])
@pytest.mark.parametrize("heads", [5, 16, 40])
@pytest.mark.parametrize(("num_keys", "num_rows"), [(1, 1), (63, 1), (65, 2), (4097, 1), (4097, 68)])
def test_deepseeks_sizes_are_the_reference(num_keys: int, num_rows: int, heads: int, cache: str) -> None:
    """Every form that serves, in bf16 (fp16 over a cache of it): each intermediate is rounded once."""
    seed = fresh()
    dtype = torch.float16 if cache == "f16" else torch.bfloat16
    mla = dataclasses.replace(DEEPSEEK, num_heads=heads)
    case = Sequence(mla, num_keys, num_rows, cache, dtype, "cuda", seed)
    tolerance = 5e-3 if cache == "f16" else 4e-2  # of a row and head; bf16 rounds by 2^-9 at four places
    hopper = torch.cuda.get_device_capability() == (9, 0)
    forms: list[Form] = ["triton", "gluon"] if hopper and case.blocks != "q8_0" else ["triton"]
    for form in forms:
        case.check(case.absorbed(form, 2 - num_rows % 2), tolerance, f"absorbed, {form}, seed {seed}")
    for prompt_form in ("triton", "gluon") if hopper and dtype == torch.bfloat16 else ("triton",):
        out = case.decompressed(prompt_form, 1024)  # type: ignore[arg-type]
        case.check(out, tolerance, f"decompressed, {prompt_form}, seed {seed}")
