"""Products of one row with matrices in blocks on a GPU: GB/s by type and shape of DeepSeek-V2-Lite; and its experts of many rows.

    PYTHONPATH=src python bench/gpu_products.py --types BF16,IQ4_NL,Q4_K
    PYTHONPATH=src python bench/gpu_products.py --types Q4_0,Q4_K --rows 64,512

With --rows a layer's experts are timed in both forms of kernels/tile_product.py, of random rows whose experts are chosen by chance; two
layers in turn, 311 MB each in four bits.

A replayed graph walks matrices of 300 MB, so none is in L2; times are medians of CUDA events, for one launch. What the
products compute is judged by tests/kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_model import random_matrix, read_limit, timed

from kvfold.kernels import row_product, tile_product
from kvfold.kernels.matrix import Matrix

EXPERTS, PER_TOKEN = 64, 6
HIDDEN, WIDTH, VOCABULARY = 2048, 1408, 102400
DEVICE = torch.device("cuda", 0)


def microseconds(launches: list[Callable[[], object]]) -> float:
    """Of one of the launches, back to back in a graph."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return timed(graph.replay) * 1e6 / len(launches)


def linear(type: str, rows: int) -> tuple[float, int]:
    """(microseconds, bytes) of a product with [rows, HIDDEN]."""
    first = random_matrix(type, rows, HIDDEN, DEVICE)
    matrices = [first] + [
        random_matrix(type, rows, HIDDEN, DEVICE) for _ in range(max(1, 300_000_000 // first.raw.nbytes))
    ]
    x = torch.randn(1, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(1, rows, device=DEVICE)
    launches = [lambda w=w: row_product.linear(x, w, out) for w in matrices]
    return microseconds(launches), first.raw.nbytes


def experts(type: str) -> dict[str, tuple[float, int]]:
    """The same of the two kernels of a token's experts: ten sets of six in turn."""
    gate, up = (random_matrix(type, WIDTH, HIDDEN, DEVICE, EXPERTS) for _ in range(2))
    down = random_matrix(type, HIDDEN, WIDTH, DEVICE, EXPERTS)
    x = torch.randn(1, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.arange(60, device=DEVICE, dtype=torch.int32).view(10, 1, PER_TOKEN)
    weights = torch.rand(1, PER_TOKEN, device=DEVICE)
    out = torch.empty(1, HIDDEN, device=DEVICE)
    hidden = row_product.gate_up(x, gate, up, ids[0], torch.bfloat16, down)

    def share(w: Matrix) -> int:
        return w.raw.nbytes * PER_TOKEN // EXPERTS

    gate_up = [lambda i=i: row_product.gate_up(x, gate, up, i, torch.bfloat16, down) for i in ids]
    return {
        "gate and up of 6": (microseconds(gate_up), share(gate) + share(up)),
        f"down of 6 ({down.type})": (
            microseconds([lambda i=i: row_product.down(hidden, down, i, weights, out) for i in ids]),
            share(down),
        ),
    }


def _run_layers(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layers: list[tuple[Matrix, Matrix, Matrix]],
    out: torch.Tensor, scratch: torch.Tensor, form: tile_product.Form,
) -> None:  # fmt: skip
    for layer in layers:
        tile_product.experts(x, ids, weights, *layer, out, scratch, form=form)


def experts_of_rows(type: str, rows: list[int]) -> Iterator[dict[str, object]]:
    """Microseconds of a layer's experts by form ("us"), and the bytes of all of them."""
    layers = [
        (
            *(random_matrix(type, WIDTH, HIDDEN, DEVICE, EXPERTS) for _ in range(2)),
            random_matrix(type, HIDDEN, WIDTH, DEVICE, EXPERTS),
        )
        for _ in range(2)
    ]
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    for count in rows:
        x = torch.randn(count, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        ids = torch.rand(count, EXPERTS, device=DEVICE).topk(PER_TOKEN).indices.int()
        weights = torch.rand(count, PER_TOKEN, device=DEVICE)
        out = torch.empty_like(x)
        run = partial(_run_layers, x, ids, weights, layers, out, scratch)
        forms: tuple[tile_product.Form, ...] = ("triton", "gluon")
        us = {form: microseconds([partial(run, form)]) / len(layers) for form in forms}
        yield {"type": type, "rows": count, "bytes": sum(w.raw.nbytes for w in layers[0]), "us": us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="BF16,IQ4_NL,Q4_0,Q8_0,Q4_K,Q6_K")
    parser.add_argument("--rows", help="of a layer's experts, in place of products of one row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limit = read_limit(DEVICE) / 1e9
    print(f"read-only limit {limit:.0f} GB/s")
    results: list[dict[str, object]] = []
    for type in options.types.split(","):
        if options.rows:
            for case in experts_of_rows(type, [int(n) for n in options.rows.split(",")]):
                results.append(case)
                print(case, flush=True)
            continue
        cases = {f"{rows} x {HIDDEN}": linear(type, rows) for rows in (2048, VOCABULARY)} | experts(type)
        for shape, (us, nbytes) in cases.items():
            results.append({"type": type, "shape": shape, "us": us, "gbps": nbytes / us / 1e3})
            print(f"{type:8} {shape:20} {us:8.2f} us {nbytes / us / 1e3:6.0f} GB/s", flush=True)
    if options.out:
        machine = {"gpu": torch.cuda.get_device_name(), "read_gbps": limit, "results": results}
        options.out.write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
