"""quant/activations.py: the rounding itself. That kernels follow it is tests/backends/test_kernels.py."""

import numpy as np
import pytest

from kvfold.quant.activations import BLOCK, Rounding, product, quantize, rounded, rounding_for
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import TYPES, by_name


def test_codes_fill_the_range_and_ties_go_to_even() -> None:
    x = np.zeros((1, BLOCK), np.float32)
    x[0, :6] = 127, -127, 0.5, 1.5, 2.5, -2.5
    codes, scales = quantize(x)
    assert codes[0, :6].tolist() == [127, -127, 0, 2, 2, -2]
    assert scales.tolist() == [[1.0]]


def test_every_block_has_its_own_scale() -> None:
    x = np.repeat(np.float32([1.0, 1000.0, 0.0]), BLOCK).reshape(1, -1)
    codes, scales = quantize(x)
    assert codes.reshape(3, BLOCK)[:, 0].tolist() == [127, 127, 0]
    np.testing.assert_array_equal(scales[0], np.float32([1.0, 1000.0, 0.0]) / np.float32(127))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_poisons_its_block_and_no_other(value: float) -> None:
    x = np.ones((2, 2 * BLOCK), np.float32)
    x[1, 3] = value
    codes, scales = quantize(x)
    assert np.isnan(scales[1, 0]) and not codes[1, :BLOCK].any()
    assert np.isfinite(scales[0]).all() and np.isfinite(scales[1, 1])


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 2.0**-121])
def test_tiny_blocks_are_zero(largest: float) -> None:
    codes, scales = quantize(np.full((1, BLOCK), largest, np.float32))
    assert not codes.any() and scales.tolist() == [[0.0]]


@pytest.mark.parametrize("largest", [2.0**-119, 3e38])
def test_the_ends_of_the_range_keep_their_values(largest: float) -> None:
    x = np.full((1, BLOCK), largest, np.float32)
    np.testing.assert_allclose(rounded(x, Rounding.INT8), x, rtol=1e-6)


def test_noise_is_that_of_eight_bits() -> None:
    x = np.random.default_rng(1).standard_normal((64, 2048)).astype(np.float32)
    noise = ((rounded(x, Rounding.INT8) - x) ** 2).mean() / (x.astype(np.float64) ** 2).mean()
    assert 1e-5 < noise < 5e-5  # steps of 2.2 sigma / 127: 1/12 of their square is 2.5e-5


def test_bf16_rounds_to_the_nearest_even() -> None:
    x = np.float32([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, np.inf])
    want = [1.0, 1.0, 1 + 2**-6, -1 - 2**-7, np.inf]
    assert rounded(x, Rounding.BF16).tolist() == want
    assert np.isnan(rounded(np.float32([np.nan]), Rounding.BF16)).all()


def test_every_type_that_decodes_has_a_rounding() -> None:
    kinds = {t.name: rounding_for(t) for t in TYPES if t.decodes}
    assert kinds["IQ4_NL"] is kinds["Q6_K"] is kinds["IQ1_M"] is Rounding.INT8
    assert kinds["BF16"] is Rounding.BF16
    assert kinds["F32"] is kinds["F16"] is kinds["F8_E4M3"] is kinds["Q4_0_R8"] is Rounding.NONE


def test_product_is_the_product_of_what_is_rounded() -> None:
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (5, 3 * 34), np.uint8)
    raw[:, 1::34] = 0x2C  # scales near 1/16
    weight = QuantTensor("w", by_name("Q8_0"), (5, 96), raw)
    x = rng.standard_normal((4, 96)).astype(np.float32)
    codes, scales = quantize(x)
    want = (codes.reshape(4, 3, 32) * scales.astype(np.float64)[..., None]).reshape(4, 96) @ decode_tensor(weight).T
    np.testing.assert_allclose(product(x, weight), want, rtol=1e-12)
