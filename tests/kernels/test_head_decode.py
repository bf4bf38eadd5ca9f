"""Decode over keys and values of heads, cached (mla=0) or expanded where they are needed (mla=2), is mla/reference.py's."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from kit.interpreter import torch  # before any kernel
from kvfold.cache.latent import CacheType, decode, encode
from kvfold.config import MlaConfig
from kvfold.kernels.head_decode import attend_cached, attend_expanding, head_workspace
from kvfold.kernels.mla_decode import schedule_decode
from kvfold.mla.reference import attend

SMALL = MlaConfig(
    num_heads=3, qk_nope_head_dim=24, qk_rope_head_dim=32, v_head_dim=20, kv_lora_rank=96, q_lora_rank=None,
    softmax_scale=0.2, lora_norm_eps=1e-6,
)  # fmt: skip
BLOCKY = dataclasses.replace(
    SMALL, qk_nope_head_dim=64, v_head_dim=32, kv_lora_rank=128
)  # parts of a row fill blocks
DEEPSEEK = MlaConfig(
    num_heads=16, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, q_lora_rank=None,
    softmax_scale=0.1, lora_norm_eps=1e-6,
)  # fmt: skip
NUMBERS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Array = np.ndarray


class Case:
    """Random queries of the last s_q tokens of each sequence, over a scattered cache whose unused slots and pages are NaN."""

    def __init__(
        self,
        mla: MlaConfig,
        kv_lens: list[int],
        s_q: int,
        cache: str,
        dtype: torch.dtype,
        device: str,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.mla, self.kv_lens, self.s_q, self.dtype, self.device = mla, kv_lens, s_q, dtype, device
        self.cache = CacheType(cache)
        heads, lora = mla.num_heads, mla.kv_lora_rank

        def numbers(*shape: int, spread: float = 1.0) -> torch.Tensor:
            return torch.from_numpy((spread * rng.standard_normal(shape)).astype(np.float32)).to(dtype)

        self.q = numbers(len(kv_lens) * s_q, heads, mla.qk_head_dim, spread=1.5)
        self.w_uk = numbers(heads, mla.qk_nope_head_dim, lora, spread=lora**-0.5)
        self.w_uv = numbers(heads, mla.v_head_dim, lora, spread=lora**-0.5)
        self.latents = [rng.standard_normal((n, mla.latent_dim)).astype(np.float32) for n in kv_lens]
        counts = [-(-n // 64) for n in kv_lens]
        order = list(range(sum(counts) + 3))
        random.Random(seed).shuffle(order)
        self.page_starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.pages = order[: sum(counts)] + [2**30] * 2  # unused entries of a page list are absurd

    def pool(self, rows: list[Array]) -> tuple[torch.Tensor, list[Array]]:
        """Rows of every sequence cached; and as they are read, of the compute type."""
        width = rows[0].shape[1]
        pool = np.full((len(self.pages) + 1, 64, width), np.nan, np.float32)
        for sequence, of_sequence in enumerate(rows):
            for at in range(0, len(of_sequence), 64):
                piece = of_sequence[at : at + 64]
                pool[self.pages[self.page_starts[sequence] + at // 64], : len(piece)] = piece
        read = [
            torch.from_numpy(decode(encode(x, self.cache), self.cache)).to(self.dtype).double().numpy()
            for x in rows
        ]
        if self.cache.value in NUMBERS:
            return torch.from_numpy(pool).to(NUMBERS[self.cache.value]).to(self.device), read
        return torch.from_numpy(encode(pool, self.cache)).to(self.device), read

    def launched(self, expands: bool, num_parts: int | None = None) -> tuple[Array, Array]:
        """(what a launch says, the reference), [B * s_q, H, v]."""
        mla, device, s_q = self.mla, self.device, self.s_q
        heads, lora = mla.num_heads, mla.kv_lora_rank
        workspace = head_workspace(len(self.kv_lens), s_q, heads, mla.v_head_dim, device, num_parts)
        workspace.partial.fill_(torch.nan)
        workspace.partial_lse.fill_(torch.nan)
        lens, starts, pages = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in (self.kv_lens, self.page_starts, self.pages)
        )
        schedule_decode(lens, workspace)
        out = torch.full((len(self.q), heads, mla.v_head_dim), torch.nan, dtype=self.dtype, device=device)
        lists = pages, starts, lens, out, workspace
        blocks: Any = None if self.cache.value in NUMBERS else self.cache.value
        settings = {"scale": mla.softmax_scale, "blocks": blocks}
        q, w_uk, w_uv = (x.to(device) for x in (self.q, self.w_uk, self.w_uv))
        exact_q, exact_uk, exact_uv = (x.double().numpy() for x in (self.q, self.w_uk, self.w_uv))
        queries = np.split(exact_q, len(self.kv_lens))
        if expands:
            pool, latents = self.pool(self.latents)
            attend_expanding(q, pool, w_uk, w_uv, *lists, **settings)
            expected = [
                self.attended(rows, x[:, :lora], x[:, lora:], exact_uk, exact_uv, mla)
                for rows, x in zip(queries, latents, strict=True)
            ]
        else:
            keys, values = [], []
            for x in self.latents:
                # optimized: by BLAS, without which 128 heads take minutes
                k_nope, v = (np.einsum("lc,hnc->lhn", x[:, :lora], w, optimize=True) for w in (exact_uk, exact_uv))
                k = np.concatenate([k_nope, x[:, None, lora:].repeat(heads, 1)], 2)
                keys.append(k.reshape(len(x), heads * mla.qk_head_dim).astype(np.float32))
                values.append(v.reshape(len(x), heads * mla.v_head_dim).astype(np.float32))
            (key_pool, keys), (value_pool, values) = self.pool(keys), self.pool(values)
            attend_cached(q, key_pool, value_pool, *lists, **settings)
            expected = [
                self.over_heads(rows, k.reshape(len(k), heads, -1), v.reshape(len(k), heads, -1))
                if len(k)
                else np.zeros((s_q, heads, mla.v_head_dim))
                for rows, k, v in zip(queries, keys, values, strict=True)
            ]
        return out.double().cpu().numpy(), np.concatenate(expected)

    def over_heads(self, q: Array, k: Array, v: Array) -> Array:
        """The reference, of keys [L, H, qk] and values [L, H, v]: each head's are its latents, up-projected by ones."""
        nope, v_dim = self.mla.qk_nope_head_dim, v.shape[2]
        ones = np.eye(nope + v_dim)
        mla = dataclasses.replace(self.mla, num_heads=1, kv_lora_rank=nope + v_dim)
        each = [
            self.attended(
                q[:, h : h + 1], np.concatenate([k[:, h, :nope], v[:, h]], 1), k[:, h, nope:], ones[None, :nope],
                ones[None, nope:], mla,
            )
            for h in range(q.shape[1])
        ]  # fmt: skip
        return np.concatenate(each, 1)

    def attended(self, q: Array, c_kv: Array, k_rope: Array, w_uk: Array, w_uv: Array, mla: MlaConfig) -> Array:
        """Rows before the first key see none: zeros."""
        num_keys = len(c_kv)
        seeing = min(num_keys, len(q))
        out = np.zeros((len(q), q.shape[1], w_uv.shape[1]))
        if seeing:
            out[len(q) - seeing :] = attend(q[len(q) - seeing :], c_kv, k_rope, w_uk, w_uv, mla)
        return out


def check(case: Case, expands: bool, tolerance: float, num_parts: int | None = None) -> None:
    got, expected = case.launched(expands, num_parts)
    assert np.isfinite(got).all(), "unwritten or poisoned output"
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(got - expected, axis=-1) / np.where(norm > 0, norm, 1)
    row, head = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= tolerance, f"row {row}, head {head} off by {error.max():.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("expands", [False, True], ids=["cached", "expanding"])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_any_lengths_side_by_side(s_q: int, expands: bool, device: str) -> None:
    """Padding without keys between them, and sequences that begin with these rows."""
    lens = [1, 0, 63, 64, 65, 0, 130] if s_q == 1 else [s_q, 0, 63, 130]
    check(Case(SMALL, lens, s_q, "f32", torch.float32, device), expands, 1e-5)


@pytest.mark.parametrize("expands", [False, True], ids=["cached", "expanding"])
@pytest.mark.parametrize("num_parts", [1, 3, 8])
def test_keys_in_any_number_of_parts(num_parts: int, expands: bool, device: str) -> None:
    check(Case(SMALL, [190, 330], 1, "f32", torch.float32, device), expands, 1e-5, num_parts)


@pytest.mark.parametrize(("expands", "cache"), [(False, "q8_0"), (True, "q8_0"), (True, "fp8"), (False, "f16")])
def test_caches_of_other_types(cache: str, expands: bool, device: str) -> None:
    check(Case(BLOCKY, [65, 3], 2, cache, torch.float32, device), expands, 1e-5)


@pytest.mark.parametrize("expands", [False, True], ids=["cached", "expanding"])
def test_half_precision_rounds_and_no_more(expands: bool, device: str) -> None:
    check(Case(SMALL, [100], 1, "f16", torch.float16, device), expands, 3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("heads", [5, 16, 128])
@pytest.mark.parametrize(
    ("expands", "cache"),
    [(False, "bf16"), (False, "q8_0"), (False, "f16"), (True, "bf16"), (True, "q8_0"), (True, "fp8")],
)
def test_deepseeks_sizes(cache: str, expands: bool, heads: int) -> None:
    mla = dataclasses.replace(DEEPSEEK, num_heads=heads)
    dtype = torch.float16 if cache == "f16" else torch.bfloat16
    for lens, s_q in (([1], 1), ([4097], 1), ([700, 0, 64, 2049], 2), ([65, 129], 4)):
        check(Case(mla, lens, s_q, cache, dtype, "cuda"), expands, 5e-3 if cache == "f16" else 4e-2)
