"""Products of a few rows with norms, additions and routing in them, against numpy: odd widths, several passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvfold.kernels import number_product
from kvfold.kernels.matrix import Matrix
from kvfold.kernels.number_product import Norm
from kvfold.kernels.rows import RoutingRule, route

RNG = np.random.default_rng


def numbers(seed: int, *shape: int) -> np.ndarray:
    return RNG(seed).standard_normal(shape).astype(np.float32)


def on(device: str, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(device)


def normed(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * weight


def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.float().cpu(), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("rows", "cols"), [(5, 36), (7, 2048), (3, 4500)])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_product_norms_its_rows_and_adds_others(num_rows: int, rows: int, cols: int, device: str) -> None:
    """4500 numbers are three passes. x is part of a wider array."""
    x, w, add = numbers(0, num_rows, cols + 3), numbers(1, rows, cols), numbers(2, num_rows, rows)
    weight = RNG(3).uniform(0.5, 2, cols).astype(np.float32)
    x_device = on(device, x)[:, :cols]
    x = x[:, :cols]
    matrix = Matrix.of(on(device, w))
    out = torch.full((num_rows, rows + 2), torch.nan, device=device)
    number_product.linear(x_device, matrix, out)
    close(out[:, :rows], x @ w.T)
    assert out[:, rows:].isnan().all()
    number_product.linear(x_device, matrix, out, norm=Norm(on(device, weight), 1e-5))
    close(out[:, :rows], normed(x, weight) @ w.T)
    number_product.linear(x_device, matrix, out, add=on(device, add))
    close(out[:, :rows], x @ w.T + add)


def test_each_head_is_multiplied_by_itself(device: str) -> None:
    """Three heads of 6 features: a program of 8 KB would cross two of them."""
    x, w = numbers(0, 2, 3, 20), numbers(1, 3, 6, 20)
    out = torch.full((2, 18), torch.nan, device=device)
    number_product.linear(on(device, x).flatten(1), Matrix.of(on(device, w).flatten(0, 1)), out)
    close(out, np.einsum("thc,hvc->thv", x, w).reshape(2, 18))


def test_gate_and_up_of_normed_rows(device: str) -> None:
    x, gate, up = numbers(0, 3, 2100), numbers(1, 5, 2100) / 40, numbers(2, 5, 2100) / 40
    weight = RNG(3).uniform(0.5, 2, 2100).astype(np.float32)
    matrices = [Matrix.of(on(device, w)) for w in (gate, up)]
    out = torch.full((3, 5), torch.nan, device=device)
    for norm in (None, Norm(on(device, weight), 1e-5)):
        number_product.gate_up(on(device, x), *matrices, out, norm)
        rows = x if norm is None else normed(x, weight)
        close(out, gated(rows @ gate.T, rows @ up.T))


V2 = RoutingRule(3, 1, 1, is_sigmoid=False, is_top2=False, is_normed=False, factor=1.0)
V3 = RoutingRule(3, 4, 2, is_sigmoid=True, is_top2=True, is_normed=True, factor=2.5)


@pytest.mark.parametrize("shared_width", [0, 13])
@pytest.mark.parametrize("rule", [V2, V3])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_mixture_adds_experts_to_its_rows(
    num_rows: int, rule: RoutingRule, shared_width: int, device: str
) -> None:
    experts, cols, width = 12, 40, 9
    x = numbers(0, num_rows, cols)
    weight = RNG(1).uniform(0.5, 2, cols).astype(np.float32)
    router = numbers(2, experts, cols)
    bias = numbers(3, experts) / 4 if rule is V3 else None
    gate, up, down = (
        numbers(4, experts, width, cols),
        numbers(5, experts, width, cols),
        numbers(6, experts, cols, width),
    )
    arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def matrix(w: np.ndarray) -> Matrix:
        return Matrix("F32", *w.shape[-2:], on(device, w).flatten(0, -2).view(torch.uint8), None, w[..., 0, 0].size)

    shared = [numbers(7, shared_width, cols), numbers(8, shared_width, cols), numbers(9, cols, shared_width)]
    bias_device = None if bias is None else on(device, bias)
    for _ in range(2):  # the count of arrived programs is zero again after the first
        routed = number_product.route(
            on(device, x), Norm(on(device, weight), 1e-5), matrix(router), bias_device, rule, arrived, torch.float32
        )
    rows = normed(x, weight)
    close(routed.normed, rows)
    ids, weights = (a.cpu() for a in route(on(device, (rows @ router.T)), bias_device, rule))
    np.testing.assert_array_equal(routed.ids.cpu(), ids)
    np.testing.assert_allclose(routed.weights.cpu(), weights, rtol=1e-4)
    expected = x + gated(rows @ shared[0].T, rows @ shared[1].T) @ shared[2].T
    for t, chosen in enumerate(ids.tolist()):
        for e, share in zip(chosen, weights[t].tolist(), strict=True):
            expected[t] += share * (down[e] @ gated(gate[e] @ rows[t], up[e] @ rows[t]))
    out = torch.full((num_rows, cols), torch.nan, device=device)
    matrices = matrix(gate), matrix(up), matrix(down)
    of_all = (matrix(shared[0]), matrix(shared[1]), matrix(shared[2])) if shared_width else None
    number_product.experts(on(device, x), routed, matrices, of_all, out)
    close(out, expected)
