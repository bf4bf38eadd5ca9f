"""Quantized products against their definition, quant/activations.py: every type on every instruction set."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold import _native
from kvfold.quant.activations import product, rounding_for
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import TYPES, BlockType, by_id, by_name

Floats = NDArray[np.float32]

ISAS = _native.isa_names()
TYPE_NAMES = [by_id(number).name for number in _native.kernel_types()]
THREADS = 2


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.force_isa(request.param)
    assert _native.isa() == request.param
    yield request.param
    _native.force_isa("auto")


every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


def random_weight(t: BlockType, rows: int, cols: int, seed: int, fill: int | None = None) -> QuantTensor:
    """Random blocks whose weights are finite and about 1 in size: float16 fields keep random signs and mantissas. With
    `fill` every other byte of a block is that one."""
    rng = np.random.default_rng([seed, t.id, rows, cols])
    if t.block_elements == 1:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        if t.name == "BF16":
            raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            raw = values.astype(np.float16 if t.name == "F16" else np.float32)
        return QuantTensor("w", t, (rows, cols), raw.view(np.uint8).reshape(rows, -1))
    blocks = rng.integers(0, 256, (rows, cols // t.block_elements, t.block_bytes), np.uint8)
    if fill is not None:
        blocks[:] = fill
    for at in HALVES.get(t.name, (0,)):
        half = rng.integers(0x2000, 0x3000, blocks.shape[:2]) | rng.integers(0, 2, blocks.shape[:2]) << 15
        blocks[..., at], blocks[..., at + 1] = half & 255, half >> 8
    if t.name == "MXFP4":
        blocks[..., 0] = rng.integers(110, 130, blocks.shape[:2])
    if t.name == "NVFP4":
        blocks[..., :4] = rng.integers(0, 127, (*blocks.shape[:2], 4))
    if t.name == "Q8_K":
        d = rng.uniform(-0.1, 0.1, blocks.shape[:2]).astype("<f4")
        blocks[..., :4] = d[..., None].view(np.uint8)
    if t.name == "IQ1_M":  # a float16 a nibble at a time, on top of four words
        for i, nibble in enumerate((0, 0, 12, 2)):
            blocks[..., 49 + 2 * i] = blocks[..., 49 + 2 * i] & 15 | nibble << 4
    return QuantTensor("w", t, (rows, cols), blocks.reshape(rows, -1))


# Where the float16 fields of a block are, if not at 0 alone.
HALVES: dict[str, tuple[int, ...]] = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "Q8_K": (), "IQ1_M": (),
}  # fmt: skip


def activations(rows: int, cols: int, seed: int = 0) -> Floats:
    """Rows of very different sizes; some blocks of 32 are larger than their neighbours, one is zero."""
    rng = np.random.default_rng([seed, rows, cols])
    x = rng.standard_normal((rows, cols)) * np.exp(rng.normal(0, 2, (rows, 1)))
    for start in range(0, cols, 96):
        x[:, start : start + 32] *= 20
    x[0, :32] = 0
    return x.astype(np.float32)


def native_product(x: Floats, weight: QuantTensor, threads: int = THREADS) -> Floats:
    """The rows of x and of the result lie apart, NaN between and after them; weights end where their memory does."""
    rows, cols = x.shape
    apart = np.full((rows, cols + 5), np.nan, np.float32)
    apart[:, :cols] = x
    out = np.full((rows + 1, weight.rows + 7), np.nan, np.float32)
    _native.Kernels(threads).linear(weight.type.id, weight.raw, apart[:, :cols], out[:rows, : weight.rows])
    assert np.isnan(out[rows:]).all() and np.isnan(out[:, weight.rows :]).all(), "written outside of the result"
    return out[:rows, : weight.rows]


def assert_close(got: Floats, want: NDArray[np.float64], where: str, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the size (root mean square) of each row."""
    size = np.sqrt((want**2).mean(1, keepdims=True)) + 1e-30
    error = np.abs(got - want) / size
    worst = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
    assert error[worst] <= tolerance, (
        f"{where}{[int(i) for i in worst]}: got {got[worst]}, expected {want[worst]}, "
        f"{error[worst]:.1e} of the row's size, tolerance {tolerance:.0e}"
    )


def shapes(t: BlockType) -> list[tuple[int, int, int]]:
    """(rows of x, rows of weights, columns)"""
    unit = t.block_elements if t.block_elements > 1 else 7
    k = [unit, 3 * unit, 17 * unit, 44 * unit] if unit <= 64 else [unit, 3 * unit]
    return [(1, 1, k[0]), (1, 67, k[-1]), (2, 33, k[1]), (3, 17, k[-1]), (4, 5, k[1]), (7, 65, k[1]), (9, 31, k[0]),
            (12, 32, k[-1]), (17, 97, k[1])]  # fmt: skip


@every_isa
@pytest.mark.parametrize("name", TYPE_NAMES)
def test_products_follow_the_definition(name: str, isa: str) -> None:
    t = by_name(name)
    for rows, n, k in shapes(t):
        weight, x = random_weight(t, n, k, seed=1), activations(rows, k)
        assert_close(native_product(x, weight), product(x, weight), f"{name} {isa} {rows}x{n}x{k}")


@every_isa
@pytest.mark.parametrize(
    "name",
    [
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ2_XS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4"),
    ],
)
def test_sums_of_the_largest_codes_do_not_overflow(name: str, isa: str) -> None:
    """Products are added in 16 bits on AVX2: random codes average out, equal ones of one sign do not."""
    t = by_name(name)
    k = 512 // t.block_elements * t.block_elements
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        weight = random_weight(t, 33, k, seed=5, fill=fill)
        for rows in (1, 48):
            for x in (1.27, -1.27):  # codes of 127 and -127
                all_x = np.full((rows, k), x, np.float32)
                got, want = native_product(all_x, weight), product(all_x, weight)
                # of products of weights of 1: equal codes cancel, or are zero, and leave no size to compare with
                largest = max(np.abs(decode_tensor(weight)).max(), 1) * 1.27 * k
                assert np.abs(got - want).max() <= 1e-6 * largest, f"{name} {isa} {fill} {rows} {x}"


@every_isa
@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
)
def test_a_row_ends_before_the_next_rows_numbers(name: str, isa: str) -> None:
    """Rows are prepared one behind another: vectors that reach past a row's end meet no codes of -1, which are NaN."""
    t = by_name(name)
    for k in range(t.block_elements, 513, t.block_elements):
        for rows in (1, 2, 3, 4):
            x = activations(rows, k, seed=k)
            x[:, :32] = -0.01
            x[:, 31] = 1.27
            weight = random_weight(t, 5, k, seed=4)
            assert_close(native_product(x, weight), product(x, weight), f"{name} {isa} {rows}x5x{k}")


@pytest.mark.full
@every_isa
@pytest.mark.parametrize("name", TYPE_NAMES)
def test_products_follow_the_definition_at_full_size(name: str, isa: str) -> None:
    t = by_name(name)
    for rows, n, k in [(1, 300, 2048), (5, 300, 1536), (17, 300, 10752), (300, 131, 512)]:
        weight, x = random_weight(t, n, k, seed=2), activations(rows, k)
        assert_close(native_product(x, weight), product(x, weight), f"{name} {isa} {rows}x{n}x{k}")


@every_isa
@pytest.mark.parametrize("name", ["IQ4_NL", "Q4_K", "Q6_K", "Q8_0", "Q5_0", "IQ1_S", "BF16", "F16"])
def test_the_error_is_that_of_activations_alone(name: str, isa: str) -> None:
    weight = random_weight(by_name(name), 64, 2048, seed=3)
    for rows in (1, 48):
        x = np.random.default_rng(4).standard_normal((rows, 2048)).astype(np.float32)
        want = x.astype(np.float64) @ decode_tensor(weight).astype(np.float64).T
        noise = ((native_product(x, weight) - want) ** 2).mean() / (want**2).mean()
        assert noise < {"F16": 1e-12, "BF16": 1e-5}.get(name, 5e-4), f"{name} {isa}: {noise:.1e}"


@every_isa
@pytest.mark.parametrize("name", ["IQ4_NL", "Q4_K", "F32"])
def test_a_row_with_nan_stays_alone(name: str, isa: str) -> None:
    weight = random_weight(by_name(name), 40, 512, seed=5)
    for rows in (2, 20):
        x = activations(rows, 512)
        clean = native_product(x, weight)
        x[1, 300] = np.nan
        got = native_product(x, weight)
        assert np.isnan(got[1]).all()
        rest = np.arange(rows) != 1
        np.testing.assert_array_equal(got[rest], clean[rest])


@every_isa
@pytest.mark.parametrize("rows", [1, 50])
def test_results_do_not_depend_on_threads(rows: int, isa: str) -> None:
    weight, x = random_weight(by_name("IQ4_NL"), 1500, 1408, seed=6), activations(rows, 1408)
    one = native_product(x, weight, threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(native_product(x, weight, threads), one)


def test_kernels_round_activations_as_defined() -> None:
    """Every type with kernels, on every set; types without are decoded to float32, as their rounding says."""
    for name in ISAS:
        _native.force_isa(name)
        kinds = _native.kernel_types()
        assert kinds == {t.id: rounding_for(t).value for t in TYPES if t.id in kinds}
        missing = [t.name for t in TYPES if t.decodes and t.id not in kinds and rounding_for(t).value != "float32"]
        assert not missing
    _native.force_isa("auto")


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match="has no sse9"):
        _native.force_isa("sse9")


def test_wrong_shapes_are_refused() -> None:
    weight = random_weight(by_name("Q8_0"), 4, 64, seed=7)
    kernels = _native.Kernels(1)
    with pytest.raises(ValueError, match="not 96 weights"):
        kernels.linear(8, weight.raw, np.zeros((1, 96), np.float32), np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="another shape"):
        kernels.linear(8, weight.raw, np.zeros((1, 64), np.float32), np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="no kernels"):
        kernels.linear(202, weight.raw, np.zeros((1, 64), np.float32), np.zeros((1, 4), np.float32))
