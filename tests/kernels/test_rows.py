"""Row-wise kernels against numpy: odd widths, padding rows, strided inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvfold.config import Pairing, RopeConfig
from kvfold.kernels import rows
from kvfold.mla.rope import cos_sin, rotate

RNG = np.random.default_rng


def on(device: str, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(device)


@pytest.mark.parametrize("num_adds", [0, 1, 2])
def test_norm_takes_the_additions_before_it(num_adds: int, device: str) -> None:
    x, *adds = (RNG(i).standard_normal((3, 100)).astype(np.float32) for i in range(num_adds + 1))
    weight = RNG(9).uniform(0.5, 2, 100).astype(np.float32)
    total, normed = rows.add_norm(
        on(device, x), tuple(on(device, y) for y in adds), on(device, weight), 1e-5, torch.float32
    )
    expected = x + sum(adds)
    np.testing.assert_allclose(total.cpu(), expected, rtol=1e-6, atol=1e-6)
    norm = expected / np.sqrt((expected**2).mean(1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(normed.cpu(), norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairing", list(Pairing))
def test_rotation_norm_and_append_in_one(pairing: Pairing, device: str) -> None:
    """Five heads of 24 + 12, a latent of 48 + 12; the second row is padding and writes nothing."""
    num_heads, head_dim, lora, rope_dim = 5, 36, 48, 12
    rope = RopeConfig(10000.0, rope_dim, pairing)
    q = RNG(0).standard_normal((3, num_heads * head_dim)).astype(np.float32)
    kv_a = RNG(1).standard_normal((3, lora + rope_dim + 7)).astype(np.float32)
    weight = RNG(2).uniform(0.5, 2, lora).astype(np.float32)
    positions = np.array([5, 0, 77], np.int32)
    cos, sin = cos_sin(rope, np.arange(100, dtype=np.int32))
    pool = torch.full((9, lora + rope_dim), torch.nan, device=device)
    q_device = on(device, q)
    rows.rope_append(
        q_device, on(device, kv_a), on(device, weight), 1e-6, on(device, positions),
        on(device, np.array([4, -1, 8], np.int64)), on(device, cos), on(device, sin), pool,
        num_heads=num_heads, head_dim=head_dim, is_half_split=pairing is Pairing.HALF_SPLIT,
    )  # fmt: skip
    cos, sin = cos_sin(rope, positions)
    heads = q.reshape(3, num_heads, head_dim)
    expected = np.concatenate([heads[..., :-rope_dim], rotate(heads[..., -rope_dim:], cos, sin, rope)], -1)
    np.testing.assert_allclose(q_device.cpu(), expected.reshape(3, -1), atol=1e-6)
    c_kv = kv_a[:, :lora] / np.sqrt((kv_a[:, :lora] ** 2).mean(1, keepdims=True) + 1e-6) * weight
    latent = np.concatenate([c_kv, rotate(kv_a[:, lora : lora + rope_dim], cos, sin, rope)], 1)
    np.testing.assert_allclose(pool[[4, 8]].cpu(), latent[[0, 2]], rtol=1e-5, atol=1e-6)
    assert pool[[0, 1, 2, 3, 5, 6, 7]].isnan().all()


@pytest.mark.parametrize("pairing", list(Pairing))
@pytest.mark.parametrize("num_rows", [1, 3])
def test_folding_rotation_and_append_in_one(pairing: Pairing, num_rows: int, device: str) -> None:
    """What rope_append and per_head do in two launches, and q stays."""
    num_heads, nope, lora, rope_dim = 5, 24, 48, 12
    q = on(device, RNG(0).standard_normal((num_rows, num_heads * (nope + rope_dim))).astype(np.float32))
    kv_a = on(device, RNG(1).standard_normal((num_rows, lora + rope_dim + 7)).astype(np.float32))
    weight = on(device, RNG(2).uniform(0.5, 2, lora).astype(np.float32))
    w_uk = on(device, RNG(3).standard_normal((num_heads, nope, lora)).astype(np.float32))
    positions = on(device, np.array([5, 0, 77], np.int32)[:num_rows])
    slots = on(device, np.array([4, -1, 8], np.int64)[:num_rows])
    cos, sin = (
        on(device, a) for a in cos_sin(RopeConfig(10000.0, rope_dim, pairing), np.arange(100, dtype=np.int32))
    )
    is_half_split = pairing is Pairing.HALF_SPLIT
    pools = [torch.full((9, lora + rope_dim), torch.nan, device=device) for _ in range(2)]
    outs = [torch.full((num_rows, num_heads, lora + rope_dim), torch.nan, device=device) for _ in range(2)]
    before = q.clone()
    new = rows.LatentRow(kv_a, weight, 1e-6, positions, slots, cos, sin, pools[0], is_half_split)
    rows.fold_append(q, w_uk, outs[0], new)
    assert torch.equal(q, before)
    rows.rope_append(q, kv_a, weight, 1e-6, positions, slots, cos, sin, pools[1], num_heads=num_heads,
                     head_dim=nope + rope_dim, is_half_split=is_half_split)  # fmt: skip
    rows.per_head(q.view(num_rows, num_heads, -1), w_uk, outs[1], depth=nope, width=lora, extra=rope_dim)
    np.testing.assert_allclose(outs[0].cpu(), outs[1].cpu(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pools[0].cpu(), pools[1].cpu())


def routed(
    logits: np.ndarray, bias: np.ndarray | None, k: int, groups: int, kept: int, rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and scores by the released code, one row at a time."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    scores = e / e.sum(1, keepdims=True) if rule != "top2" else 1 / (1 + np.exp(-logits))
    choice = scores if bias is None else scores + bias
    ids = []
    for row in choice:
        by_group = row.reshape(groups, -1).copy()
        if groups > 1:
            rank = np.sort(by_group, 1)[:, -2:].sum(1) if rule == "top2" else by_group.max(1)
            by_group[np.argsort(-rank, kind="stable")[kept:]] = -np.inf if rule == "top2" else 0.0
        ids.append(np.argsort(-by_group.ravel(), kind="stable")[:k])
    return np.array(ids), scores


@pytest.mark.parametrize(
    ("experts", "k", "groups", "kept", "rule"),
    [(64, 6, 1, 1, "max"), (160, 6, 8, 3, "max"), (9, 3, 3, 2, "top2"), (256, 8, 8, 4, "top2")],
)
def test_routing_is_the_released_rule(experts: int, k: int, groups: int, kept: int, rule: str, device: str) -> None:
    logits = (2 * RNG(0).standard_normal((17, experts))).astype(np.float32)
    bias = RNG(1).standard_normal(experts).astype(np.float32) / 4 if rule == "top2" else None
    is_v3 = rule == "top2"
    ids, weights = rows.route(
        on(device, logits),
        None if bias is None else on(device, bias),
        rows.RoutingRule(k, groups, kept, is_sigmoid=is_v3, is_top2=is_v3, is_normed=is_v3, factor=2.5),
    )
    expected, scores = routed(logits, bias, k, groups, kept, rule)
    np.testing.assert_array_equal(ids.cpu(), expected)
    chosen = np.take_along_axis(scores, expected, 1)
    if rule == "top2":
        chosen /= chosen.sum(1, keepdims=True)
    np.testing.assert_allclose(weights.cpu(), 2.5 * chosen, rtol=1e-5)


def test_of_equal_experts_the_first_are_chosen(device: str) -> None:
    logits = np.float32([[0, 1, 1, -2, 1, 0], [-3, -3, -3, -3, -3, -3]])
    rule = rows.RoutingRule(4, 1, 1, is_sigmoid=False, is_top2=False, is_normed=False, factor=1.0)
    ids, weights = rows.route(on(device, logits), None, rule)
    np.testing.assert_array_equal(ids.cpu(), [[1, 2, 4, 0], [0, 1, 2, 3]])
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(
        weights.cpu(), np.take_along_axis(scores, ids.cpu().numpy().astype(int), 1), rtol=1e-5
    )


def test_routing_of_nan_stays_inside(device: str) -> None:
    rule = rows.RoutingRule(3, 3, 2, is_sigmoid=True, is_top2=True, is_normed=True, factor=1.0)
    ids, _ = rows.route(torch.full((2, 9), torch.nan, device=device), None, rule)
    assert ((ids >= 0) & (ids < 9)).all()


@pytest.mark.parametrize("num_rows", [1, 21])
def test_folding_and_unfolding(num_rows: int, device: str) -> None:
    heads, nope, rope, lora = 5, 24, 12, 48
    q = RNG(0).standard_normal((num_rows, heads, nope + rope)).astype(np.float32)
    w = RNG(1).standard_normal((heads, nope, lora)).astype(np.float32)
    out = torch.full((num_rows, heads, lora + rope), torch.nan, device=device)
    rows.per_head(on(device, q), on(device, w), out, depth=nope, width=lora, extra=rope)
    expected = np.concatenate([np.einsum("thn,hnc->thc", q[..., :nope], w), q[..., nope:]], -1)
    np.testing.assert_allclose(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    back = torch.full((num_rows, heads, nope), torch.nan, device=device)
    rows.per_head(out, on(device, w).transpose(1, 2), back, depth=lora, width=nope)
    np.testing.assert_allclose(back.cpu(), np.einsum("thc,hnc->thn", expected[..., :lora], w), rtol=1e-4, atol=1e-4)


def test_swiglu_of_neighbouring_columns(device: str) -> None:
    x = RNG(0).standard_normal((3, 34)).astype(np.float32)
    both = on(device, x)
    got = rows.swiglu(both[:, :17], both[:, 17:])
    np.testing.assert_allclose(got.cpu(), x[:, :17] / (1 + np.exp(-x[:, :17])) * x[:, 17:], rtol=1e-5)
