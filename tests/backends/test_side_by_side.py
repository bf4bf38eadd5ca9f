"""Rows side by side in memory: the layout against its definition, products against those of the file's own blocks."""

import numpy as np
import pytest

from backends.test_kernels import activations, assert_close, every_isa, isa, native_product, random_weight
from kvfold import _native
from kvfold.quant.activations import product
from kvfold.quant.decode import decode, decode_tensor
from kvfold.quant.interleave import deinterleave
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import SIDE_BY_SIDE, by_name

__all__ = ["isa"]  # a fixture

every_type = pytest.mark.parametrize("name", SIDE_BY_SIDE)


def side_by_side(weight: QuantTensor) -> QuantTensor:
    raw = weight.raw.copy()
    _native.put_side_by_side(weight.type.id, raw, threads=2)
    return QuantTensor(weight.name, SIDE_BY_SIDE[weight.type.name], weight.shape, raw)


@every_type
def test_rows_are_put_side_by_side_as_defined(name: str) -> None:
    t = by_name(name)
    weight = random_weight(t, 48, 3 * t.block_elements, seed=1)
    moved = side_by_side(weight)
    np.testing.assert_array_equal(deinterleave(moved.type, moved.raw), weight.raw)
    assert (moved.raw != weight.raw).any()


@every_type
def test_they_decode_to_the_same_numbers(name: str) -> None:
    t = by_name(name)
    weight = random_weight(t, 32, 3 * t.block_elements, seed=2)
    moved, out = side_by_side(weight), np.empty(weight.shape, np.float32)
    _native.decode(moved.type.id, moved.raw, out)
    np.testing.assert_array_equal(out, decode_tensor(weight))
    np.testing.assert_array_equal(decode(moved.type, moved.raw), out)


@every_isa
@every_type
def test_products_follow_the_definition(name: str, isa: str) -> None:
    if SIDE_BY_SIDE[name].id not in _native.side_by_side_types(isa):
        pytest.skip(f"{isa} multiplies the blocks as files have them")
    t = by_name(name)
    for rows, n, blocks in [
        (1, 16, 1),
        (1, 48, 17),
        (1, 64, 4),  # two groups at once, twice
        (2, 32, 3),
        (3, 80, 5),  # two rows of x, then one, and a group that is left over
        (3, 16, 5),
        (4, 64, 2),
        (7, 48, 3),
        (17, 96, 3),
        (18, 48, 17),  # half of a panel
        (100, 32, 1),
    ]:
        weight, x = (
            random_weight(t, n, blocks * t.block_elements, seed=3),
            activations(rows, blocks * t.block_elements),
        )
        assert_close(native_product(x, side_by_side(weight)), product(x, weight), f"{name} {isa} {rows}x{n}")


@every_isa
@every_type
def test_sums_of_the_largest_codes_do_not_overflow(name: str, isa: str) -> None:
    if SIDE_BY_SIDE[name].id not in _native.side_by_side_types(isa):
        pytest.skip(f"{isa} multiplies the blocks as files have them")
    t, k = by_name(name), 512
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        weight = random_weight(t, 32, k, seed=5, fill=fill)
        if name == "Q6_K":  # scales of runs, which would be 0 beside codes of 0, and -1 beside those of 63
            weight.raw.reshape(-1, t.block_bytes)[:, 192:208] = 0x80 if fill < 0x80 else 0x7F
        for x in (1.27, -1.27, np.where(np.arange(k) % 2 == 0, 1.27, -1.27)):  # codes of 127 and -127
            for rows in (1, 2, 17):  # by row dots, by tiles
                all_x = np.broadcast_to(x, (rows, k)).astype(np.float32)
                got, want = native_product(all_x, side_by_side(weight)), product(all_x, weight)
                largest = max(np.abs(decode_tensor(weight)).max(), 1) * 1.27 * k
                assert np.abs(got - want).max() <= 1e-6 * largest, f"{name} {isa} {fill} {x} {rows}"


@every_isa
@every_type
@pytest.mark.parametrize("rows", [1, 3])
def test_bits_of_a_row_are_those_it_has_in_any_unit_of_any_team(rows: int, name: str, isa: str) -> None:
    """1040 rows of 1408 columns, or 1280: units of several pairs of groups, a group that is left over, and fewer rows in
    the last."""
    if SIDE_BY_SIDE[name].id not in _native.side_by_side_types(isa):
        pytest.skip(f"{isa} multiplies the blocks as files have them")
    t = by_name(name)
    cols = 1408 // t.block_elements * t.block_elements
    weight, x = random_weight(t, 1040, cols, seed=8), activations(rows, cols)
    moved = side_by_side(weight)
    one = native_product(x, moved, threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(native_product(x, moved, threads), one)
    for first in (0, 512, 1024):
        alone = QuantTensor("w", moved.type, (16, cols), moved.raw[first : first + 16])
        np.testing.assert_array_equal(native_product(x, alone), one[:, first : first + 16])


@every_type
def test_tiles_have_the_bits_of_the_files_blocks(name: str) -> None:
    if SIDE_BY_SIDE[name].id not in _native.side_by_side_types("auto"):
        pytest.skip(f"{_native.isa()} multiplies the blocks as files have them")
    t = by_name(name)
    weight, x = random_weight(t, 64, 6 * t.block_elements, seed=6), activations(40, 6 * t.block_elements)
    np.testing.assert_array_equal(native_product(x, side_by_side(weight)), native_product(x, weight))


def test_what_is_no_whole_group_is_refused() -> None:
    weight = random_weight(by_name("Q8_0"), 17, 64, seed=7)
    with pytest.raises(ValueError, match="whole groups of 16 rows"):
        _native.put_side_by_side(8, weight.raw.copy())
    with pytest.raises(ValueError, match="a type that has this layout"):
        _native.put_side_by_side(3, np.zeros((16, 20), np.uint8))
