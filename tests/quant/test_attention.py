"""The numbers of attention where products round: what they lose beside exact attention over the same cache."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold.cache.latent import PAGE_TOKENS, CacheType, codes_and_scales, decode, encode
from kvfold.quant.attention import PAGE_KEYS, Numbers, attend, attend_codes, attend_latents

HEADS, KEYS, LATENT, LORA = 8, 500, 160, 96


def exact(q: NDArray[np.float32], latents: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
    scores = q.astype(np.float64) @ latents.T.astype(np.float64) * scale
    weights = np.exp(scores - scores.max(1, keepdims=True))
    mean: NDArray[np.float64] = weights @ latents[:, :LORA].astype(np.float64) / weights.sum(1, keepdims=True)
    return mean


@pytest.mark.parametrize("spread", [1, 3, 6])
@pytest.mark.parametrize("mean", [0, 1], ids=["values around zero", "values with a mean"])
@pytest.mark.parametrize("sink", [False, True], ids=["", "one key above all"])
def test_whole_weights_lose_no_more_than_bfloat16(spread: float, mean: float, sink: bool) -> None:
    """attend_codes over q8_0, beside attend_latents over the same numbers: queries are rounded to 8 bits in one and
    values and weights to bfloat16 in the other, so queries are made of what 8 bits hold."""
    rng = np.random.default_rng(3)
    latents = (rng.standard_normal((KEYS, LATENT)) + mean * rng.standard_normal(LATENT)).astype(np.float32)
    q = rng.integers(-15, 16, (HEADS, LATENT)).astype(np.float32)
    q[:, ::32] = 127  # the largest of each 32: scale 1, whole numbers are themselves, in bfloat16 too
    if sink:
        latents[0] = 3 * np.sign(q.sum(0))
    stored = encode(latents, CacheType.Q8_0)
    cached = decode(stored, CacheType.Q8_0)
    scale = float(spread / (q.astype(np.float64) @ cached[1:].T).std())
    want = exact(q, cached, scale)

    def error(got: NDArray[np.float64]) -> float:
        return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))

    whole = error(attend_codes(q, *codes_and_scales(stored), LORA, scale))
    halves = error(attend_latents(q, cached, LORA, scale))
    assert whole <= max(halves, 1e-4) and whole <= 2e-3, f"int16 weights {whole:.1e}, bfloat16 {halves:.1e}"


def test_weights_share_a_scale_within_a_page_of_the_cache() -> None:
    assert PAGE_KEYS == PAGE_TOKENS


@pytest.mark.parametrize("spread", [1, 2, 5])
@pytest.mark.parametrize("outliers", [False, True], ids=["", "columns that outweigh the others"])
def test_whole_numbers_of_16_bits_lose_less_than_bfloat16(spread: float, outliers: bool) -> None:
    """Ordinary attention over 512 keys, columns judged one by one."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 192), (512, 192), (512, 128)))
    if outliers:
        k[:, 150:152] *= 6
        v[:, 3] *= 20
    products = q.astype(np.float64) @ k.T.astype(np.float64)
    scale = float(spread / products.std())
    products[np.arange(512)[None, :] > (np.arange(32) + 480)[:, None]] = -np.inf
    weights = np.exp((products - products.max(1, keepdims=True)) * scale)
    want = weights @ v.astype(np.float64) / weights.sum(1, keepdims=True)

    def error(numbers: Numbers) -> float:
        off = attend(q, k, v, scale, numbers) - want
        return float(np.sqrt((off**2).mean(0) / (want**2).mean(0)).mean())

    whole, halves = error(Numbers.WHOLE), error(Numbers.BF16)
    assert whole <= 0.6 * halves and whole <= 3e-3, f"int16 {whole:.1e}, bfloat16 {halves:.1e}"
