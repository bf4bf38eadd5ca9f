"""Number formats of cached rows: the definition itself. That C++ writes the same is tests/backends/test_native_ops.py."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kit.harness import Harness, close
from kit.tiny_models import tiny_model, write_gguf
from kvfold import LLM
from kvfold.backends import gpu
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


def test_fp8_of_576_numbers_is_codes_scales_and_bfloat16() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((50, 576)) * np.exp(rng.normal(0, 3, (50, 1)))).astype(np.float32)
    raw = encode(x, CacheType.FP8)
    assert raw.shape == (50, 512 + 16 + 128) and raw.dtype == np.uint8
    codes = raw[:, :512].view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(50, 4, 128)
    scales = raw[:, 512:528].view("<f4")
    largest = np.abs(x[:, :512]).reshape(50, 4, 128).max(-1)
    assert (largest / scales <= 448).all() and (largest / scales > 224).all()
    assert (np.frexp(scales)[0] == 0.5).all(), "a scale is a power of two"
    values = decode(raw, CacheType.FP8)
    np.testing.assert_array_equal(values[:, :512], (codes * scales[:, :, None]).reshape(50, 512))
    np.testing.assert_array_equal(values[:, 512:], x[:, 512:].astype(ml_dtypes.bfloat16).astype(np.float32))
    # 3 mantissa bits: half a step is 1/16 of a number at most, or of 2^-6 of its scale
    error = np.abs(values[:, :512] - x[:, :512]).reshape(50, 4, 128)
    bound = np.maximum(np.abs(x[:, :512].reshape(50, 4, 128)) / 16, scales[:, :, None] * 2.0**-10)
    assert (error <= bound).all()
    np.testing.assert_array_equal(values[:, :512].astype(ml_dtypes.bfloat16).astype(np.float32), values[:, :512])


def test_fp8_parts_of_a_row_are_read_by_themselves() -> None:
    x = np.random.default_rng(3).standard_normal((5, 576)).astype(np.float32)
    raw, cut = encode(x, CacheType.FP8), CacheType.FP8.columns(512)
    whole = decode(raw, CacheType.FP8)
    np.testing.assert_array_equal(decode(raw[:, :cut], CacheType.FP8), whole[:, :512])
    np.testing.assert_array_equal(decode(raw[:, cut:], CacheType.FP8), whole[:, 512:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fp8_poisons_one_group(value: float) -> None:
    x = np.ones((1, 256), np.float32)
    x[0, 140] = value
    poisoned = np.isnan(decode(encode(x, CacheType.FP8), CacheType.FP8)[0])
    assert np.flatnonzero(poisoned).tolist() == list(range(128, 256))


def test_fp8_of_v2_lite_takes_656_bytes_a_token_and_layer() -> None:
    assert CacheLayout(27, (576,), CacheType.FP8).bytes_per_token == 27 * 656


@pytest.mark.parametrize(
    ("mla", "widths", "sentence"),
    [
        ("0", {"kv_lora_rank": 128}, "cache_type=fp8 holds latents, and mla=0 caches none"),
        ("1", {"kv_lora_rank": 96}, "kv_lora_rank of this model is 96 .* multiple of 128"),
        ("1", {"kv_lora_rank": 128, "qk_rope_head_dim": 72}, "qk_rope_head_dim 72, expected .* at most 64"),
    ],
)
def test_what_fp8_cannot_hold_is_refused(mla: str, widths: dict[str, int], sentence: str, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("v2-lite", **widths), tmp_path / "m.gguf")
    with pytest.raises(SettingError, match=sentence):
        Harness(path, mla=mla, cache_type="fp8")


def test_native_has_no_fp8_and_names_what_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(0, ()))
    path = write_gguf(tiny_model("v2-lite", kv_lora_rank=128), tmp_path / "m.gguf")
    with pytest.raises(
        SettingError, match=r"native: keeps its cache in f16, q8_0 \(smaller and more exact than fp8\)"
    ):
        LLM(path, backend="native", cache_type="fp8")
    with pytest.raises(
        SettingError, match=r"native: .* q8_0 \(smaller .* plain: .* only where backend=plain is asked for"
    ):
        LLM(path, cache_type="fp8", n_ctx=64)
    assert LLM(path, backend="plain", cache_type="fp8", n_ctx=64).loaded.choice.candidate.name == "plain"


@pytest.mark.parametrize("mla", ["1", "2", "3"])
def test_plain_reads_fp8_on_every_latent_path(mla: str, tmp_path: Path) -> None:
    """Logits are those of a float32 cache that holds what fp8 decodes to, whatever path reads it."""
    path = write_gguf(tiny_model("v2-lite", kv_lora_rank=128), tmp_path / "m.gguf")
    ids = list(range(40, 75))
    first = Harness(path, mla="1", cache_type="fp8").logits(ids, [30, 5])
    close(Harness(path, mla=mla, fa="0", cache_type="fp8").logits(ids, [17, 1, 17]), first, 2e-3)
    exact = Harness(path, mla="1").logits(ids)
    error = np.abs(first - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.2, f"e4m3 rounds by up to 1/16: {error:.2g}"


@pytest.mark.parametrize("cache_type", [t for t in CacheType if t is not CacheType.FP8])
def test_what_is_decoded_encodes_to_the_same_bits(cache_type: CacheType) -> None:
    stored = encode(np.random.default_rng(2).standard_normal((9, 64)).astype(np.float32), cache_type)
    assert np.array_equal(encode(decode(stored, cache_type), cache_type), stored)


def test_what_fp8_decodes_to_encodes_to_the_same_numbers() -> None:
    x = np.random.default_rng(2).standard_normal((99, 160)).astype(np.float32)
    numbers = decode(encode(x, CacheType.FP8), CacheType.FP8)
    np.testing.assert_array_equal(decode(encode(numbers, CacheType.FP8), CacheType.FP8), numbers)


def test_q8_0_of_v2_lite_takes_34_bytes_for_32_numbers() -> None:
    assert CacheLayout(27, (576,), CacheType.Q8_0).bytes_per_token == 27 * 576 // 32 * 34


@pytest.mark.parametrize(("mla", "named"), [("1", "qk_rope_head_dim"), ("0", "qk_head_dim")])
def test_a_width_without_whole_blocks_is_refused(mla: str, named: str, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("v2-lite", qk_rope_head_dim=16, kv_lora_rank=64), tmp_path / "m.gguf")
    with pytest.raises(SettingError, match=f"cache_type=q8_0: {named} of this model is .* multiple of 32"):
        Harness(path, mla=mla, cache_type="q8_0")


@pytest.mark.parametrize("cache_type", list(CacheType))
def test_no_rows_are_no_rows(cache_type: CacheType) -> None:
    stored = encode(np.empty((0, 64, 160), np.float32), cache_type)
    assert stored.shape == (0, 64, cache_type.columns(160))
    assert decode(stored, cache_type).shape == (0, 64, 160)
