"""Attention of one row from its projections to its heads' values is mla/reference.py's in float64, on fresh numbers every run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kernels import test_mla_reference
from kernels.test_large_pools import NUM_PAGES
from kit.interpreter import torch  # before any kernel
from kvfold.config import MlaConfig, Pairing, RopeConfig
from kvfold.kernels import row_attention
from kvfold.kernels.rows import LatentRow
from kvfold.mla.reference import attend
from kvfold.mla.rope import cos_sin, rotate

PAGE = 64
SMALL = replace(test_mla_reference.SMALL, qk_rope_head_dim=12, kv_lora_rank=96)
V2_LITE = replace(test_mla_reference.DEEPSEEK, softmax_scale=0.03)


@pytest.mark.parametrize(
    ("kv_len", "pairing"), [(1, Pairing.INTERLEAVED), (161, Pairing.HALF_SPLIT), (256, Pairing.INTERLEAVED)]
)
def test_one_launch_folds_appends_attends_and_unfolds(kv_len: int, pairing: Pairing, device: str) -> None:
    """96 columns are a block and a half."""
    check(SMALL, kv_len, pairing, torch.float16, torch.float16, device)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cached", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 129, 192, 255, 256])
def test_heads_of_v2_lite(kv_len: int, cached: torch.dtype) -> None:
    """128 programs that wait for one another. The newest row is first, last, and alone in its page."""
    check(V2_LITE, kv_len, Pairing.INTERLEAVED, torch.bfloat16, cached, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kv_len", [1, 65, 161, 256])
def test_few_columns_have_a_reader_each(kv_len: int) -> None:
    """Two programs a head, fewer words than threads: polled by two threads, a word could come for one of them alone."""
    for _ in range(20):
        check(SMALL, kv_len, Pairing.HALF_SPLIT, torch.float16, torch.float16, "cuda")


@pytest.mark.gpu
@needs_gpu
def test_one_launch_reads_and_appends_beyond_32_bits() -> None:
    check(V2_LITE, 130, Pairing.INTERLEAVED, torch.bfloat16, torch.bfloat16, "cuda", NUM_PAGES)


def check(
    mla: MlaConfig, kv_len: int, pairing: Pairing, dtype: torch.dtype, in_cache: torch.dtype, device: str,
    num_pages: int | None = None,
) -> None:  # fmt: skip
    """Twice over one exchange, the second time with queries and scale negated, so that words of the first do not count. What is
    not cached is NaN. num_pages: of the pool, whose last pages are the sequence's."""
    seed = test_mla_reference.fresh()
    rng = np.random.default_rng(seed)
    heads, nope, rope, v_dim, lora = (
        mla.num_heads, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    )  # fmt: skip
    tolerance = 4e-3 if dtype == torch.float16 else 2e-2

    def numbers(*shape: int, spread: float = 1.0) -> np.ndarray:
        """As dtype holds them."""
        x = torch.from_numpy((spread * rng.standard_normal(shape)).astype(np.float32))
        return x.to(dtype).to(in_cache).to(dtype).float().numpy()

    q, kv_a = numbers(1, heads * (nope + rope)), numbers(1, lora + rope + 7)
    w_uk, w_uv = (numbers(heads, width, lora, spread=lora**-0.5) for width in (nope, v_dim))
    weight = rng.uniform(0.5, 2, lora).astype(np.float32)
    turning, position = RopeConfig(10000.0, rope, pairing), kv_len + 2
    cos, sin = cos_sin(turning, np.arange(kv_len + 3, dtype=np.int32))
    angle = cos[position:], sin[position:], turning
    used = -(-kv_len // PAGE)
    num_pages = num_pages or used + 3
    pages = (num_pages - used - 3 + rng.permutation(used + 3)[:used]).astype(np.int32)
    at = np.arange(kv_len)
    places = torch.from_numpy(pages[at // PAGE].astype(np.int64) * PAGE + at % PAGE).to(device)
    cached = numbers(kv_len - 1, lora + rope)

    wide = kv_a.astype(np.float64)
    c_kv = wide[:, :lora] / np.sqrt((wide[:, :lora] ** 2).mean() + 1e-6) * weight
    (new,) = np.concatenate([c_kv, rotate(wide[:, lora : lora + rope], *angle)], axis=1)
    keys = np.concatenate([cached, new[None]]).astype(np.float64)
    turned = q.astype(np.float64).reshape(1, heads, -1)
    turned[..., nope:] = rotate(turned[..., nope:], *angle)
    expected = attend(
        turned, keys[:, :lora], keys[:, lora:], w_uk.astype(np.float64), w_uv.astype(np.float64), mla
    )[0]

    def on(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device, dtype)

    exchange = row_attention.Exchange(heads, lora, v_dim, device)
    arguments = on(w_uk, dtype), on(w_uv, dtype), on(np.concatenate([[0], pages]).astype(np.int32))
    starts, lens = on(np.array([1, 1 + used], np.int32)), on(np.array([kv_len], np.int32))
    pool = torch.full((num_pages * PAGE, lora + rope), torch.nan, dtype=in_cache, device=device)
    for sign in (1, -1):
        pool[places[:-1]] = on(cached, in_cache)
        row = LatentRow(
            on(kv_a, dtype), on(weight), 1e-6, on(np.array([position], np.int32)), places[-1:],
            on(cos), on(sin), pool, pairing is Pairing.HALF_SPLIT,
        )  # fmt: skip
        out = torch.full((1, heads * v_dim), torch.nan, device=device)
        row_attention.attend(
            on(q * sign, dtype), row, *arguments, starts, lens, out, exchange, scale=sign * mla.softmax_scale
        )
        error = np.linalg.norm(out.cpu().numpy().reshape(heads, v_dim) - expected, axis=-1)
        assert (error <= tolerance * np.linalg.norm(expected, axis=-1)).all(), f"seed {seed}"
        np.testing.assert_allclose(pool[places[-1]].float().cpu(), new, rtol=tolerance, atol=tolerance)
        pool[places] = torch.nan
        assert pool.isnan().all(), "wrote beside its slot"
