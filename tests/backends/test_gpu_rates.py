"""Which rates the plan gets for a GPU, and that it says whence."""

from __future__ import annotations

import dataclasses

import pytest

from kvfold.backends import choose, gpu, gpu_rates
from kvfold.backends.gpu_rates import H200, gpu_profile
from kvfold.cache.latent import CacheType
from kvfold.config import MlaConfig
from kvfold.mla.plan import ARITHMETIC, Path
from kvfold.mla.plan import choose as choose_path

LITE = MlaConfig(16, 128, 64, 128, 512, None, 192**-0.5)
A100 = gpu.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30, 108, 1_410_000, 2039.0)
H20 = gpu.Gpu("NVIDIA H20", (9, 0), 96 << 30, 78, 1_980_000, 4814.304)


def test_the_card_that_was_measured_has_its_rates() -> None:
    profile = gpu_profile(H200, CacheType.BF16, "auto")
    assert profile == gpu_rates.NUMBERS
    reason = choose_path(LITE, new_rows=1, cached_rows=4096, is_prompt=False, machine=profile).reason
    assert reason.endswith("(H200 profile, measured)")


def test_another_hopper_has_its_share_of_them() -> None:
    """A card with 78 of 132 multiprocessors and the same memory: products slower, reading as fast."""
    profile, measured = gpu_profile(H20, CacheType.BF16, "auto"), gpu_rates.NUMBERS
    for name in ("latents", "folding", "expansion", "heads"):
        assert getattr(profile, name) == pytest.approx(getattr(measured, name) * 78 / 132)
    assert profile.cached == pytest.approx(measured.cached)
    assert profile.absorbed_start == measured.absorbed_start
    reason = choose_path(LITE, new_rows=1, cached_rows=4096, is_prompt=False, machine=profile).reason
    assert reason.endswith("(NVIDIA H20 profile, scaled from an H200's by multiprocessors, clock and memory)")


def test_a_card_without_hoppers_kernels_has_the_rates_of_plain_triton() -> None:
    profile, measured = gpu_profile(A100, CacheType.F16, "auto"), gpu_rates.TRITON
    products = 108 * 1410 * 1024 / (132 * 1980 * 2048)
    assert profile.heads == pytest.approx(measured.heads * products)
    assert profile.cached == pytest.approx(measured.cached * 2039.0 / 4814.304)


def test_fp8_has_the_rates_of_its_kernel_on_hopper_alone() -> None:
    assert gpu_profile(H200, CacheType.FP8, "auto") == gpu_rates.FP8
    assert gpu_profile(H200, CacheType.Q8_0, "auto") == gpu_rates.BYTES
    assert gpu_profile(A100, CacheType.FP8, "auto") == gpu_profile(A100, CacheType.Q8_0, "auto")


def test_a_capability_nobody_listed_is_the_next_older_one() -> None:
    newer = dataclasses.replace(H200, name="GPU", capability=(10, 3))
    profile = gpu_profile(newer, CacheType.BF16, "auto")
    assert profile.latents == pytest.approx(2 * gpu_rates.TRITON.latents)


def test_what_a_driver_does_not_tell_is_left_out() -> None:
    assert gpu_profile(dataclasses.replace(A100, clock_khz=0), CacheType.BF16, "auto") is ARITHMETIC
    profile = gpu_profile(dataclasses.replace(A100, memory_gbps=0.0), CacheType.BF16, "auto")
    choice = choose_path(LITE, new_rows=1, cached_rows=4096, is_prompt=False, machine=profile)
    assert choice.path is Path.ABSORBED


@pytest.mark.parametrize("cache_type", list(CacheType))
@pytest.mark.parametrize("dtype", choose.DTYPES)
@pytest.mark.parametrize("card", [H200, A100, H20])
def test_long_contexts_are_absorbed_and_long_prompts_are_not(
    card: gpu.Gpu, dtype: str, cache_type: CacheType
) -> None:
    profile = gpu_profile(card, cache_type, dtype)
    assert choose_path(LITE, new_rows=1, cached_rows=65536, is_prompt=False, machine=profile).path is Path.ABSORBED
    assert (
        choose_path(LITE, new_rows=4096, cached_rows=0, is_prompt=True, machine=profile).path is Path.DECOMPRESSED
    )
