"""Products with blocks, and experts, against quant/decode.py: through the launchers that the cuda backend calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvfold.backends.cuda_weights import codebook_words
from kvfold.kernels import block_levels, row_product, tile_product
from kvfold.kernels.matrix import PLANES, Matrix, padded, planes
from kvfold.quant.decode import decode
from kvfold.quant.interleave import separate
from kvfold.quant.types import TYPES, by_name

RNG = np.random.default_rng


def blocks(name: str, rows: int, cols: int, parts: int = 1, seed: int = 0) -> np.ndarray:
    """Random bytes whose float16 scales are tame: [parts * rows, row_bytes]."""
    type = by_name(name)
    rng = RNG(seed)
    if name[0] == "I" and name[1:].isdigit():
        return rng.integers(-100, 100, (parts * rows, cols)).astype(f"int{name[1:]}").view(np.uint8)
    if name in ("F64", "F32", "F16", "BF16"):
        values = rng.standard_normal((parts * rows, cols)).astype(np.float32)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(parts * rows, -1)
        return values.astype(f"float{name[1:]}").view(np.uint8)
    raw = rng.integers(0, 256, (parts * rows, cols // type.block_elements, type.block_bytes), dtype=np.uint8)
    if name == "F8_E4M3":
        return (raw & 0xBF).reshape(parts * rows, -1)  # below 2
    if name == "MXFP4":
        raw[:, :, 0] = rng.integers(118, 128, raw.shape[:2])
        raw[0, 0, 0] = 1  # a subnormal scale
    if name == "Q8_K":
        raw[:, :, :4] = (rng.standard_normal((*raw.shape[:2], 1)) / 64).astype(np.float32).view(np.uint8)
    if name == "IQ1_M":  # the top of a float16 below 2^-5
        raw[:, :, 55] = raw[:, :, 55] & 15 | 32
    if name in ("MXFP4", "NVFP4", "Q8_K", "IQ1_M"):
        return raw.reshape(parts * rows, -1)
    if type.row_meta_bytes:
        d = (rng.standard_normal((parts * rows, 1)) / 64).astype(np.float16).view(np.uint8)
        return np.concatenate([d.reshape(-1, 4 * 2), raw.reshape(parts * rows // 4, -1)], axis=1).reshape(
            parts * rows, -1
        )
    scale = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64]}
    for at in scale.get(name, [0, 2] if name in ("Q4_K", "Q5_K", "Q4_1", "Q5_1") else [0]):
        d = (rng.standard_normal(raw.shape[:2]) / 64).astype(np.float16)
        raw[:, :, at : at + 2] = d[..., None].view(np.uint8)
    return raw.reshape(parts * rows, -1)


def matrix(
    name: str, rows: int, cols: int, device: str, parts: int = 1, seed: int = 0, rounds: bool = False
) -> tuple[Matrix, np.ndarray]:
    """On the device, and decoded: float32 [parts, rows, cols]."""
    type = by_name(name)
    raw = blocks(name, -(-rows // type.interleaved_rows) * type.interleaved_rows, cols, parts, seed)
    dense = decode(type, raw).reshape(parts, -1, cols)[:, :rows]
    if type.interleaved_rows > 1:
        raw = separate(type, raw)[1]
    raw = np.ascontiguousarray(raw.reshape(parts, -1, raw.shape[1])[:, :rows]).reshape(parts * rows, -1)
    scale = None
    if name == "F8_E4M3":
        values = RNG(seed).uniform(0.5, 2, (parts, -(-rows // 128), -(-cols // 128))).astype(np.float32)
        dense = dense * values.repeat(128, 1)[:, :rows].repeat(128, 2)[:, :, :cols]
        scale = torch.from_numpy(values).to(device)
    laid = torch.from_numpy(raw).to(device)
    laid = planes(name, laid) if name in PLANES else laid
    laid = padded(laid) if type.block_elements > 1 and not type.row_meta_bytes else laid
    return Matrix(name, rows, cols, laid, scale, parts, rounds, codebook_words(name, device)), dense


def same(actual: torch.Tensor, expected: np.ndarray, relative: float) -> None:
    got = actual.float().cpu().numpy()
    assert np.isfinite(got).all()
    worst = np.abs(got - expected).max()
    assert worst <= relative * np.abs(expected).max(), f"off by {worst:.3g}, largest {np.abs(expected).max():.3g}"


EVERY_TYPE = sorted(t.name for t in TYPES if t.decodes and not t.standard)
ON_CPU = [name for name in EVERY_TYPE if name != "BF16"]


@pytest.mark.parametrize("name", ON_CPU)
def test_decoding_is_the_definition(name: str, device: str) -> None:
    """Bit for bit."""
    w, dense = matrix(name, 5, 512, device)
    np.testing.assert_array_equal(tile_product.decode(w, torch.float32).cpu(), dense[0])
    ids = torch.tensor([4, 0, 4], dtype=torch.int32, device=device)
    np.testing.assert_array_equal(tile_product.embed(ids, w).cpu(), dense[0][[4, 0, 4]])


@pytest.mark.parametrize("name", [name for name in ON_CPU if name not in block_levels.TYPES or name == "IQ3_S"])
def test_a_few_rows_times_blocks(name: str, device: str) -> None:
    """A row count that no tile divides, and a width that one pass does not hold."""
    rows, cols = 5, 1280
    w, dense = matrix(name, rows, cols, device, seed=3)
    x = RNG(1).standard_normal((2, cols + 8)).astype(np.float32)
    x_device = torch.from_numpy(x).to(device)[:, :cols]
    out = torch.full((2, rows + 2), torch.nan, device=device)
    row_product.linear(x_device, w, out)
    same(out[:, :rows], x[:, :cols] @ dense[0].T, 1e-5)
    assert out[:, rows:].isnan().all()


@pytest.mark.parametrize("cols", [136, 2064, 18448])
def test_rows_of_fp8_in_any_number_of_passes(cols: int, device: str) -> None:
    """Of numbers one by one, sixteen by sixteen in a few passes, and in a loop."""
    rows = 3
    w, dense = matrix("F8_E4M3", rows, cols, device, seed=4)
    x = RNG(1).standard_normal((2, cols + 16)).astype(np.float32)
    for dtype in (torch.float32, torch.bfloat16)[: 1 if device == "cpu" else 2]:
        numbers = torch.from_numpy(x).to(device, dtype)[:, :cols]
        out = torch.full((2, rows), torch.nan, device=device)
        row_product.linear(numbers, w, out)
        same(out, numbers.float().cpu().numpy() @ dense[0].T, 1e-5)


@pytest.mark.parametrize(
    ("num_rows", "name", "down_name", "hidden", "width"),
    [
        (1, "Q6_K", "IQ4_NL", 256, 32),
        (3, "F16", "F16", 40, 24),
        (1, "F8_E4M3", "F8_E4M3", 136, 12),
        (70, "Q4_0", "Q8_0", 64, 32),
    ],
)
def test_experts_are_the_weighted_sum(
    num_rows: int, name: str, down_name: str, hidden: int, width: int, device: str
) -> None:
    num_experts, k, out_rows = 5, 2, 9
    gate, gate_dense = matrix(name, width, hidden, device, num_experts, 1)
    up, up_dense = matrix(name, width, hidden, device, num_experts, 2)
    down, down_dense = matrix(down_name, out_rows, width, device, num_experts, 3)
    rng = RNG(5)
    x = (rng.standard_normal((num_rows, hidden)) / 16).astype(np.float32)
    # nobody chooses the last expert
    ids = np.stack([rng.choice(num_experts - 1, k, replace=False) for _ in range(num_rows)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (num_rows, k)).astype(np.float32)
    expected = np.zeros((num_rows, out_rows), np.float64)
    for t in range(num_rows):
        for choice in range(k):
            e = ids[t, choice]
            g = np.clip(gate_dense[e].astype(np.float64) @ x[t], -80, None)
            h = g / (1 + np.exp(-g)) * (up_dense[e] @ x[t])
            expected[t] += weights[t, choice] * (down_dense[e] @ h)
    on = [torch.from_numpy(a).to(device) for a in (x, ids, weights)]
    out = torch.full((num_rows, out_rows), torch.nan, device=device)
    scratch = torch.full((2 * 4 * (2 * hidden + out_rows) * width,), 0xFF, dtype=torch.uint8, device=device)
    tile_product.experts(*on, gate, up, down, out, scratch)
    same(out, expected, 2e-5)
    if num_rows < 9:
        out.fill_(torch.nan)
        pairs = row_product.gate_up(on[0], gate, up, on[1], torch.float32)
        row_product.down(pairs, down, on[1], on[2], out)
        same(out, expected, 2e-5)


def test_gate_and_up_of_one_network(device: str) -> None:
    gate, gate_dense = matrix("Q5_K", 6, 256, device, seed=1)
    up, up_dense = matrix("Q4_K", 6, 256, device, seed=2)
    x = (RNG(5).standard_normal((2, 256)) / 16).astype(np.float32)
    g, u = x @ gate_dense[0].T, x @ up_dense[0].T
    got = row_product.gate_up(torch.from_numpy(x).to(device), gate, up, None, torch.float32)
    same(got, g / (1 + np.exp(-g)) * u, 2e-5)


@pytest.mark.parametrize("num_rows", [1, 40, 400])
def test_groups_are_a_stable_sort(num_rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, with experts that nobody chose, first and last ones among them."""
    monkeypatch.setattr(tile_product, "COUNTED_PAIRS", 300)
    ids = RNG(0).integers(1, 11, (num_rows, 3)).astype(np.int32)
    groups = tile_product.group_by_expert(torch.from_numpy(ids).to(device), 12, 16)
    flat = ids.ravel()
    np.testing.assert_array_equal(groups.pairs.cpu(), np.argsort(flat, kind="stable"))
    starts = np.searchsorted(np.sort(flat), np.arange(13))
    np.testing.assert_array_equal(groups.starts.cpu(), starts)
    tiles = [(e, at) for e in range(12) for at in range(starts[e], starts[e + 1], groups.rows)]
    got = groups.tiles.cpu().numpy()
    np.testing.assert_array_equal(got[: len(tiles)], tiles)
    assert (got[len(tiles) :, 0] == 12).all()


def test_rows_of_bfloat16_times_blocks(device: str) -> None:
    """Loads and conversions that the interpreter does not have."""
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    for name in EVERY_TYPE:
        w, dense = matrix(name, 70, 2304, device, seed=3)
        x = torch.randn(2, 2304, device=device, dtype=torch.bfloat16)
        out = torch.full((2, 70), torch.nan, device=device)
        row_product.linear(x, w, out)
        same(out, x.float().cpu().numpy() @ dense[0].T, 1e-5)
        same(tile_product.decode(w, torch.bfloat16), dense[0], 4e-3)


def nearest_bfloat16(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)


@pytest.mark.parametrize("name", sorted(tile_product.GLUON_TYPES))
@pytest.mark.parametrize("num_rows", [5, 100])
def test_weights_in_registers_are_the_definition_rounded_once(name: str, num_rows: int, device: str) -> None:
    """Rows of zeros and a one pick single weights. Two row widths: of blocks of 18 bytes one has a multiple of 16 and one has not."""
    if device == "cpu":
        pytest.skip("wgmma is Hopper's")
    from kvfold.kernels import tile_product_gluon

    for cols in (512, 768) if by_name(name).block_elements == 256 else (512, 640):
        for seed in range(2):
            w, dense = matrix(name, 384, cols, device, seed=seed)
            picked = RNG(seed).choice(cols, num_rows, replace=False)
            x = torch.zeros(num_rows, cols, dtype=torch.bfloat16, device=device)
            x[torch.arange(num_rows), torch.from_numpy(picked)] = 1
            groups = tile_product.group_by_expert(torch.zeros(num_rows, 1, dtype=torch.int32, device=device), 1, 32)
            out = torch.full((num_rows, 384), torch.nan, dtype=torch.bfloat16, device=device)
            tile_product_gluon.multiply(tile_product_gluon.gathered(x, 1, w, groups), w, groups, out)
            expected = nearest_bfloat16(dense[0].T[picked])
            wrong = (out.cpu() != expected).nonzero()
            off = (out.cpu().float() - expected.float()).abs()
            # One step of bfloat16, or where a minimum is added of either term.
            assert (off <= 2.0**-7 * expected.float().abs() + 2.0**-14 * np.abs(dense).max()).all(), (
                cols,
                wrong[:4],
            )
            most = 0.3 if name in ("Q4_K", "Q5_1") else 4e-3
            assert len(wrong) <= most * out.numel(), f"{len(wrong)} of {out.numel()} lie beside the nearest"


@pytest.mark.parametrize("num_rows", [5, 24, 90, 300])
@pytest.mark.parametrize(
    ("name", "down_name"),
    [
        ("Q4_0", "Q4_0"),
        ("IQ4_NL", "IQ4_NL"),
        ("Q4_K", "Q8_0"),
        ("Q6_K", "Q6_K"),
        ("Q8_0", "Q5_1"),
        ("Q4_K", "Q5_0"),
        ("Q4_0", "Q4_K"),
    ],
)
def test_experts_in_registers_are_the_weighted_sum(num_rows: int, name: str, down_name: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("wgmma is Hopper's")
    num_experts, k, hidden, out_rows = 6, 2, 1024, 416
    width = 256 if by_name(down_name).block_elements == 256 else 384
    gate, gate_dense = matrix(name, width, hidden, device, num_experts, 1)
    up, up_dense = matrix(name, width, hidden, device, num_experts, 2)
    down, down_dense = matrix(down_name, out_rows, width, device, num_experts, 3)
    rng = RNG(5)
    x = nearest_bfloat16(rng.standard_normal((num_rows, hidden)) / 4)
    ids = np.stack([rng.choice(num_experts - 1, k, replace=False) for _ in range(num_rows)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (num_rows, k)).astype(np.float32)
    dense = [nearest_bfloat16(w).double().numpy() for w in (gate_dense, up_dense, down_dense)]
    expected = np.zeros((num_rows, out_rows))
    for t in range(num_rows):
        for choice in range(k):
            e = ids[t, choice]
            g, u = dense[0][e] @ x[t].double().numpy(), dense[1][e] @ x[t].double().numpy()
            h = nearest_bfloat16(g / (1 + np.exp(-g)) * u).double().numpy()
            expected[t] += weights[t, choice] * (dense[2][e] @ h)
    out = torch.full((num_rows, out_rows), torch.nan, dtype=torch.bfloat16, device=device)
    on = x.to(device), torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device)
    tile_product.experts(*on, gate, up, down, out, None, form="gluon")
    same(
        out, expected, 2.0**-7
    )  # four roundings of 2^-9 each: Q4_K's weights once more, hidden rows, a pair's sum, their sum
