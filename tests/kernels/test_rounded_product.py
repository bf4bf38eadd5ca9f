"""Products of rows rounded to 8 bits against quant/activations.py: through the launchers that the cuda backend calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_linear import matrix, same

from kvfold.kernels import block_levels, rounded_product, row_product, tile_product
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.number_product import Norm, Routed, route
from kvfold.kernels.rounding import RoundedRows, is_mixed
from kvfold.kernels.rows import RoutingRule
from kvfold.quant.activations import quantize, quantize_e4m3
from kvfold.quant.decode import decode
from kvfold.quant.types import by_name

RNG = np.random.default_rng
TYPES = sorted(rounded_product.TYPES)


def rounded(x: torch.Tensor) -> np.ndarray:
    """The numbers that rounding leaves: float64."""
    codes, scales = quantize(x.float().cpu().numpy())
    return codes.astype(np.float64) * scales.repeat(32, axis=-1)


def activations(rows: int, cols: int, device: str, seed: int = 1) -> torch.Tensor:
    """Rows of a wider tensor, of the type that the device is good at."""
    x = torch.from_numpy(RNG(seed).standard_normal((rows, cols + 32)).astype(np.float32)).to(device)
    x[0, :32] = 0.0  # a block of zeros
    x[-1, 40] = 2.0**-130  # lost beside others
    return (x if device == "cpu" else x.bfloat16())[:, :cols]


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_rounded_as_the_definition_says(name: str, device: str) -> None:
    """Row counts that no program divides; widths of one pass, of several, and that no pass divides."""
    # interpreted, one type of each kind of loop has two rows there
    two = 2 if device != "cpu" or name in ("Q4_0", "Q5_K", "MXFP4") else 1
    for num_rows, rows, cols in ((two, 5, 1280),) if name in block_levels.TYPES else ((2, 5, 256), (two, 9, 2304)):
        w, dense = matrix(name, rows, cols, device, seed=3, rounds=True)
        x = activations(num_rows, cols, device)
        out = torch.full((num_rows, rows + 2), torch.nan, device=device)
        row_product.linear(x, w, out)
        same(out[:, :rows], rounded(x) @ dense[0].T.astype(np.float64), 1e-6)
        assert out[:, rows:].isnan().all()


def test_what_is_not_finite_spoils_its_row_alone(device: str) -> None:
    w, dense = matrix("IQ4_NL", 8, 256, device, rounds=True)
    x = activations(3, 256, device)
    x[0, 77], x[2, 5] = torch.inf, torch.nan
    out = torch.zeros(3, 8, device=device)
    row_product.linear(x, w, out)
    assert out[0].isnan().all() and out[2].isnan().all()
    same(out[1:2], rounded(x[1:2]) @ dense[0].T.astype(np.float64), 1e-6)


@pytest.mark.parametrize(("name", "down_name", "ahead"), [("Q4_K", "Q8_0", (3, 2)), ("IQ4_NL", "IQ4_NL", (1, 1))])
def test_experts_round_their_rows(
    name: str, down_name: str, ahead: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four passes over the parts of both experts: the weights of three asked for at once, and of one after the other."""
    monkeypatch.setattr(rounded_product, "LANES", 1)
    sizes = rounded_product.SIZES
    monkeypatch.setitem(sizes, down_name, sizes[down_name]._replace(ahead=ahead))
    num_experts, k, hidden, width, out_rows = 3, 2, 256, 64, 7
    gate, gate_dense = matrix(name, width, hidden, device, num_experts, 1, rounds=True)
    up, up_dense = matrix(name, width, hidden, device, num_experts, 2, rounds=True)
    down, down_dense = matrix(down_name, out_rows, width, device, num_experts, 3, rounds=True)
    x = activations(2, hidden, device)
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device=device)
    weights = torch.from_numpy(RNG(5).uniform(0.1, 1, (2, k)).astype(np.float32)).to(device)
    pairs = row_product.gate_up(x, gate, up, ids, torch.float32)
    assert isinstance(pairs, torch.Tensor)
    values = rounded(x)
    for pair, expert in enumerate(ids.flatten().tolist()):
        g = gate_dense[expert].astype(np.float64) @ values[pair // k]
        u = up_dense[expert].astype(np.float64) @ values[pair // k]
        same(pairs[pair], g / (1 + np.exp(-g)) * u, 1e-5)
    out = torch.full((2, out_rows), torch.nan, device=device)
    row_product.down(pairs if device == "cpu" else pairs.bfloat16(), down, ids, weights, out)
    values = rounded(pairs if device == "cpu" else pairs.bfloat16())
    expected = np.zeros((2, out_rows))
    for pair, expert in enumerate(ids.flatten().tolist()):
        expected[pair // k] += float(weights.flatten()[pair]) * (
            down_dense[expert].astype(np.float64) @ values[pair]
        )
    same(out, expected, 1e-6)
    # The production form: rounded where they are made, from the same float32.
    between = row_product.gate_up(x, gate, up, ids, x.dtype, down)
    assert isinstance(between, RoundedRows)
    row_product.down(between, down, ids, weights, out)
    values, expected = rounded(pairs), np.zeros((2, out_rows))
    for pair, expert in enumerate(ids.flatten().tolist()):
        expected[pair // k] += float(weights.flatten()[pair]) * (
            down_dense[expert].astype(np.float64) @ values[pair]
        )
    same(out, expected, 1e-6)


@pytest.mark.parametrize(
    ("types", "shared_types", "shared_width"),
    [
        (("IQ4_NL", "IQ4_NL"), ("IQ4_NL", "IQ4_NL"), 96),
        (("Q4_K", "Q8_0"), ("Q4_K", "Q4_K"), 256),
        (("Q8_0", "IQ4_NL"), None, 0),
        # The interpreter takes minutes.
        pytest.param(("IQ2_XXS", "MXFP4"), ("IQ3_S", "Q2_K"), 256, marks=pytest.mark.full),
    ],
)
def test_shared_experts_come_along(
    types: tuple[str, str], shared_types: tuple[str, str] | None, shared_width: int, device: str
) -> None:
    """Experts and shared experts of their own types and widths, added to the hidden rows."""
    num_experts, k, cols, width, out_rows = 3, 2, 256, 64, 7

    def network(name: str, down_name: str, width: int, parts: int, seed: int) -> tuple[tuple, tuple]:
        gate, gate_dense = matrix(name, width, cols, device, parts, seed, rounds=True)
        up, up_dense = matrix(name, width, cols, device, parts, seed + 1, rounds=True)
        down, down_dense = matrix(down_name, out_rows, width, device, parts, seed + 2, rounds=True)
        return (gate, up, down), (gate_dense, up_dense, down_dense)

    def of_row(dense: tuple, part: int, row: np.ndarray) -> np.ndarray:
        gate, up, down = (d[part].astype(np.float64) for d in dense)
        g = gate @ row
        between = torch.from_numpy((g / (1 + np.exp(-g)) * (up @ row)).astype(np.float32))
        return down @ rounded(between[None])[0]

    matrices, dense = network(*types, width, num_experts, 1)
    shared, shared_dense = network(*shared_types, shared_width, 1, 7) if shared_types else (None, None)
    x = activations(2, cols, device)
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device=device)
    weights = torch.from_numpy(RNG(5).uniform(0.1, 1, (2, k)).astype(np.float32)).to(device)
    hidden_rows = torch.from_numpy(RNG(6).standard_normal((2, out_rows)).astype(np.float32)).to(device)
    expected = hidden_rows.double().cpu().numpy()
    for t, row in enumerate(rounded(x)):
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            expected[t] += weight * of_row(dense, expert, row)
        if shared_dense:
            expected[t] += of_row(shared_dense, 0, row)
    codes, scales = quantize(x.float().cpu().numpy())
    before = RoundedRows(
        torch.from_numpy(in_order(codes, types[0])).to(device), torch.from_numpy(scales).to(device), types[0]
    )
    for routed in (
        Routed(x, ids, weights),
        Routed(x[:, :0], ids, weights, before),
    ):
        out = torch.full((2, out_rows), torch.nan, device=device)
        rounded_product.experts(hidden_rows, routed, matrices, shared, out)
        same(out, expected, 1e-4)  # a sum in another order may round to the next of 255 steps


def in_order(codes: np.ndarray, name: str) -> np.ndarray:
    """Codes of blocks as kernels of this type find them: mixed are the numbers j, j + 16, j + 1, j + 17 in a word."""
    if not is_mixed(name):
        return codes
    halves = codes.reshape(len(codes), -1, 2, 8, 2)  # half of a block, pair, number
    return np.ascontiguousarray(halves.transpose(0, 1, 3, 4, 2)).reshape(codes.shape)


@pytest.mark.parametrize("name", ["IQ4_NL", "Q4_K"])
def test_normed_rows_are_rounded_with_the_routing(name: str, device: str) -> None:
    cols, experts = 96, 5
    x = torch.from_numpy(RNG(2).standard_normal((3, cols)).astype(np.float32)).to(device)
    weight = torch.from_numpy(RNG(3).uniform(0.5, 2, cols).astype(np.float32)).to(device)
    router = Matrix.of(torch.from_numpy(RNG(4).standard_normal((experts, cols)).astype(np.float32)).to(device))
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    rule = RoutingRule(2, 1, 1, is_sigmoid=False, is_top2=False, is_normed=False, factor=1.0)
    routed = route(x, Norm(weight, 1e-6), router, None, rule, arrived, torch.float32, name)
    assert routed.rounded is not None
    exact = x.double().cpu().numpy()
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6) * weight.double().cpu().numpy()
    codes, scales = quantize(exact.astype(np.float32))
    np.testing.assert_allclose(routed.rounded.scales.cpu(), scales, rtol=1e-5)
    # a norm in another order of sums may fall to the other side of a half
    off = np.abs(routed.rounded.codes.cpu().numpy().astype(int) - in_order(codes, name))
    assert off.max() <= 1 and (off > 0).mean() < 0.02


def test_one_network_without_choices(device: str) -> None:
    gate, gate_dense = matrix("Q8_0", 10, 320, device, seed=1, rounds=True)
    up, up_dense = matrix("Q8_0", 10, 320, device, seed=2, rounds=True)
    x = activations(2, 320, device) / 16
    g, u = (rounded(x) @ dense[0].T.astype(np.float64) for dense in (gate_dense, up_dense))
    got = row_product.gate_up(x, gate, up, None, torch.float32)
    same(got, g / (1 + np.exp(-g)) * u, 1e-5)


def rounded_e4m3(x: torch.Tensor) -> np.ndarray:
    codes, scales = quantize_e4m3(x.float().cpu().numpy())
    return decode(by_name("F8_E4M3"), codes).astype(np.float64) * scales.repeat(128, axis=-1)[:, : x.shape[1]]


def test_many_rows_meet_fp8_in_fp8(device: str) -> None:
    """Squares that end early in both directions, rows that no tile divides."""
    w, dense = matrix("F8_E4M3", 136, 320, device, seed=3, rounds=True)
    x = activations(5, 320, device)
    out = torch.full((5, 138), torch.nan, device=device)
    tile_product.linear(x, w, out)
    same(out[:, :136], rounded_e4m3(x) @ dense[0].T.astype(np.float64), 1e-6)
    assert out[:, 136:].isnan().all()


def test_experts_meet_fp8_in_fp8(device: str) -> None:
    num_experts, k, hidden, width, out_rows = 3, 2, 256, 136, 24
    gate, gate_dense = matrix("F8_E4M3", width, hidden, device, num_experts, 1, rounds=True)
    up, up_dense = matrix("F8_E4M3", width, hidden, device, num_experts, 2, rounds=True)
    down, down_dense = matrix("F8_E4M3", out_rows, width, device, num_experts, 3, rounds=True)
    x = activations(6, hidden, device) / 16
    ids = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2], [2, 0], [2, 1]], dtype=torch.int32, device=device)
    weights = torch.from_numpy(RNG(5).uniform(0.1, 1, (6, k)).astype(np.float32)).to(device)
    out = torch.full((6, out_rows), torch.nan, device=device)
    tile_product.experts(x, ids, weights, gate, up, down, out, torch.empty(1, dtype=torch.uint8, device=device))
    values, expected = rounded_e4m3(x), np.zeros((6, out_rows))
    between = np.zeros((12, width))
    for pair, expert in enumerate(ids.flatten().tolist()):
        g = gate_dense[expert].astype(np.float64) @ values[pair // k]
        between[pair] = g / (1 + np.exp(-g)) * (up_dense[expert].astype(np.float64) @ values[pair // k])
    again = rounded_e4m3(torch.from_numpy(between).to(x.dtype))
    for pair, expert in enumerate(ids.flatten().tolist()):
        factor = float(weights.flatten()[pair])
        expected[pair // k] += factor * (down_dense[expert].astype(np.float64) @ again[pair])
    # a sum of float32 in another order may round to the next of 16 steps
    same(out, expected, 2e-3 if device == "cpu" else 1e-2)


@pytest.mark.parametrize("name", ["IQ4_NL", "Q6_K"])
def test_norm_and_addition_come_along(name: str, device: str) -> None:
    rows, cols = 7, 256
    w, dense = matrix(name, rows, cols, device, seed=3, rounds=True)
    x = torch.from_numpy(RNG(2).standard_normal((2, cols)).astype(np.float32)).to(device)
    norm = Norm(torch.from_numpy(RNG(3).uniform(0.5, 2, cols).astype(np.float32)).to(device), 1e-6)
    add = torch.from_numpy(RNG(4).standard_normal((2, rows)).astype(np.float32)).to(device)
    for dtype in (torch.float32, torch.bfloat16)[: 1 if device == "cpu" else 2]:
        numbers = x.to(dtype)
        out = torch.full((2, rows), torch.nan, device=device)
        rounded_product.linear(numbers, w, out, norm=norm, add=add)
        scale = 1 / np.sqrt(np.mean(numbers.double().cpu().numpy() ** 2, -1, keepdims=True) + 1e-6)
        expected = scale * (rounded(numbers.float() * norm.weight) @ dense[0].T.astype(np.float64))
        same(out, expected + add.double().cpu().numpy(), 1e-5)
