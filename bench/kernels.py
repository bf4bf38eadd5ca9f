"""Speed of the quantized products alone: GB/s of row dots, GMAC/s of tiles, and their shares of ceilings.

    python bench/kernels.py dot  [--types IQ4_NL,Q6_K] [--threads 2] [--isa avx512]
    python bench/kernels.py tile [--types IQ4_NL] [--rows 48,512] [--shapes 1408x2048]

Each round times every ceiling and every kernel once, so that a noisy neighbour hits all of them; a share is the median of a
round's ratios. Weights are random, in 2 MiB pages, and larger than the caches.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvfold import _native
from kvfold.quant.types import BlockType, by_name

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def huge_weights(t: BlockType, rows: int, cols: int) -> Bytes:
    """Random blocks of finite scales, uint8 [rows, row_bytes], in anonymous 2 MiB pages."""
    size = rows * t.row_bytes(cols)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    some = np.random.default_rng(1).integers(0, 0x3C, 1 << 20, np.uint8)  # no byte makes a float16 special
    for start in range(0, size, len(some)):
        raw[start : start + len(some)] = some[: size - start]
    return raw.reshape(rows, -1)


class Clock:
    """Seconds of a call: on the wall, or of this process's own computing, which a busy neighbour does not add to."""

    def __init__(self, cpu: bool) -> None:
        self._now = time.process_time if cpu else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        start = self._now()
        call()
        return self._now() - start


def bench_dot(kernels: _native.Kernels, clock: Clock, args: argparse.Namespace) -> None:
    types = [by_name(name) for name in args.types.split(",")]
    matrices = {}
    for t in types:
        cols = args.cols
        matrices[t.name] = (t, huge_weights(t, args.megabytes * 1_000_000 // t.row_bytes(cols), cols))
    for count in args.rows or [1]:
        x = np.random.default_rng(2).standard_normal((count, args.cols)).astype(np.float32)
        samples: dict[str, list[float]] = {name: [] for name in matrices}
        ceiling: dict[str, list[float]] = {name: [] for name in matrices}
        for _ in range(args.repeat):
            for name, (t, raw) in matrices.items():
                out = np.empty((count, len(raw)), np.float32)
                meter = _native.Meter([raw.reshape(-1)], args.threads)
                first = np.zeros(1, np.int32)
                ceiling[name].append(raw.nbytes / clock(partial(meter.read, first)) / 1e9)
                samples[name].append(raw.nbytes / clock(partial(kernels.linear, t.id, raw, x, out)) / 1e9)
        print(f"\nrow dots, {count} row(s) of x, {args.cols} columns, {args.threads} threads, {_native.isa()}")
        print("| type | GB/s median | best | read GB/s median | best | median share | \n|---|---|---|---|---|---|")
        for name, values in samples.items():
            read = ceiling[name]
            share = statistics.median(v / c for v, c in zip(values, read, strict=True))
            print(
                f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} | {statistics.median(read):.1f} | {max(read):.1f} | {share:.0%} |"
            )


def all_of(kernels: _native.Kernels, t: BlockType, weights: Bytes, x: Floats, out: Floats) -> None:
    for matrix in weights:
        kernels.linear(t.id, matrix, x, out)


def shapes_of(text: str) -> Iterator[tuple[int, int]]:
    for shape in text.split(","):
        n, k = shape.split("x")
        yield int(n), int(k)


def bench_tile(kernels: _native.Kernels, clock: Clock, args: argparse.Namespace) -> None:
    meter = _native.Meter([], args.threads)
    print(f"tiles, {args.threads} threads, {_native.isa()}")
    print(
        "| type | N x K | rows of x | GMAC/s median | best | ceiling median | best | median share |\n|---|---|---|---|---|---|---|---|"
    )
    for name in args.types.split(","):
        t = by_name(name)
        for n, k in shapes_of(args.shapes):
            for count in args.rows or [48, 512]:
                # As many matrices as 64 MB hold, one after the other, as experts follow each other.
                copies = max(1, 64_000_000 // (n * t.row_bytes(k))) if count < 1024 else 1
                weights = huge_weights(t, copies * n, k).reshape(copies, n, -1)
                x = np.random.default_rng(2).standard_normal((count, k)).astype(np.float32)
                out = np.empty((count, n), np.float32)
                what = {"int8": "int8", "bf16": "bf16", "float32": "bf16"}[_native.kernel_types()[t.id]]
                values, ceiling = [], []
                for _ in range(args.repeat):
                    ceiling.append(meter.multiply_adds(what, 0.05)[1] / 1e9)
                    seconds = clock(partial(all_of, kernels, t, weights, x, out))
                    values.append(copies * n * k * count / seconds / 1e9)
                share = statistics.median(v / c for v, c in zip(values, ceiling, strict=True))
                print(
                    f"| {name} | {n} x {k} | {count} | {statistics.median(values):.0f} | {max(values):.0f} | {statistics.median(ceiling):.0f} | {max(ceiling):.0f} | {share:.0%} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["dot", "tile"])
    parser.add_argument("--types", default="IQ4_NL,Q4_0,Q4_K,Q6_K,Q8_0,F16,BF16,F32")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], help="rows of x")
    parser.add_argument("--cols", type=int, default=2048, help="of row dots")
    parser.add_argument("--shapes", default="1408x2048,2048x1408", help="N x K of tiles")
    parser.add_argument("--megabytes", type=int, default=256, help="of weights a type, for row dots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for one thread beside a busy neighbour"
    )
    parser.add_argument("--isa", default="auto")
    args = parser.parse_args()
    _native.force_isa(args.isa)
    kernels = _native.Kernels(args.threads)
    (bench_dot if args.form == "dot" else bench_tile)(kernels, Clock(args.clock == "cpu"), args)


if __name__ == "__main__":
    main()
