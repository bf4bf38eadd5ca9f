"""Number formats of cached rows: the definition itself. That C++ writes the same is tests/backends/test_native_ops.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold.cache.latent import CacheLayout, CacheType, decode, encode
from kvfold.errors import SettingError


def test_q8_0_is_llama_cpps() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((200, 576)) * np.exp(rng.normal(0, 3, (200, 1)))).astype(np.float32)
    x[0, :32], x[1, 3] = 0, 300
    x[2, :4] = 127, 0.5, 1.5, -2.5  # halves go away from zero
    raw = encode(x, CacheType.Q8_0)
    assert raw.shape == (200, CacheType.Q8_0.columns(576)) and raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, quantize(x, GGMLQuantizationType.Q8_0))
    np.testing.assert_array_equal(decode(raw, CacheType.Q8_0), dequantize(raw, GGMLQuantizationType.Q8_0))
    assert (decode(raw, CacheType.Q8_0) == 0)[0, :32].all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_poisons_its_block_and_no_other(value: float) -> None:
    x = np.ones((1, 96), np.float32)
    x[0, 40] = value
    poisoned = np.isnan(decode(encode(x, CacheType.Q8_0), CacheType.Q8_0)[0])
    assert np.flatnonzero(poisoned).tolist() == list(range(32, 64))


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-30])
def test_tiny_blocks_are_zero(largest: float) -> None:
    assert not decode(encode(np.full((1, 32), largest, np.float32), CacheType.Q8_0), CacheType.Q8_0).any()


@pytest.mark.parametrize("cache_type", list(CacheType))
def test_what_is_decoded_encodes_to_the_same_bits(cache_type: CacheType) -> None:
    stored = encode(np.random.default_rng(2).standard_normal((9, 64)).astype(np.float32), cache_type)
    assert np.array_equal(encode(decode(stored, cache_type), cache_type), stored)


def test_q8_0_of_v2_lite_takes_34_bytes_for_32_numbers() -> None:
    assert CacheLayout(27, (576,), CacheType.Q8_0).bytes_per_token == 27 * 576 // 32 * 34


@pytest.mark.parametrize(("mla", "named"), [("1", "qk_rope_head_dim"), ("0", "qk_head_dim")])
def test_a_width_without_whole_blocks_is_refused(mla: str, named: str, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("v2-lite", qk_rope_head_dim=16, kv_lora_rank=64), tmp_path / "m.gguf")
    with pytest.raises(SettingError, match=f"cache_type=q8_0: {named} of this model is .* multiple of 32"):
        Harness(path, mla=mla, cache_type="q8_0")


@pytest.mark.parametrize("cache_type", list(CacheType))
def test_no_rows_are_no_rows(cache_type: CacheType) -> None:
    stored = encode(np.empty((0, 64, 96), np.float32), cache_type)
    assert stored.shape == (0, 64, cache_type.columns(96))
    assert decode(stored, cache_type).shape == (0, 64, 96)
