"""Speed of the quantized products alone: GB/s of row dots, GMAC/s of tiles, and their shares of ceilings.

    python bench/kernels.py dot  [--types IQ4_NL,Q6_K] [--threads 2] [--isa avx512] [--side-by-side]
    python bench/kernels.py tile [--types IQ4_NL] [--rows 48,512] [--shapes 1408x2048] [--side-by-side]
    python bench/kernels.py absorbed [--types IQ4_NL] [--layout kv_b] [--cache f16,q8_0] [--depths 1024,4096,8192] [--rows 1]
    python bench/kernels.py paths [--types IQ4_NL] [--cache f16,q8_0] [--depths 0,1024,4096,8192] [--rows 1,16,256]
    python bench/kernels.py prompt [--types IQ4_NL] [--rows 512,2048,8192] [--heads 16] [--layout kv_b]

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
from itertools import product

import numpy as np
from numpy.typing import NDArray

from kvfold import _native
from kvfold.backends.choose import native_profile
from kvfold.backends.native import _segment
from kvfold.cache.latent import PAGE_TOKENS, CacheType, encode
from kvfold.config import MlaConfig
from kvfold.mla.absorb import KvUp
from kvfold.mla.plan import Path, choose
from kvfold.model.program import Program, Recorder, Value, record
from kvfold.quant.types import ROWS_SIDE_BY_SIDE, SIDE_BY_SIDE, BlockType, by_name

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


def type_number(t: BlockType, raw: Bytes, args: argparse.Namespace) -> int:
    """Of the rows as a product takes them, which --side-by-side puts in order first, in place."""
    if not args.side_by_side:
        return t.id
    _native.put_side_by_side(t.id, raw, args.threads)
    return SIDE_BY_SIDE[t.name].id


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
        raw = huge_weights(
            t, args.megabytes * 1_000_000 // t.row_bytes(cols) // ROWS_SIDE_BY_SIDE * ROWS_SIDE_BY_SIDE, cols
        )
        matrices[t.name] = (type_number(t, raw, args), raw)
    for count in args.rows or [1]:
        x = np.random.default_rng(2).standard_normal((count, args.cols)).astype(np.float32)
        samples: dict[str, list[float]] = {name: [] for name in matrices}
        ceiling: dict[str, list[float]] = {name: [] for name in matrices}
        for _ in range(args.repeat):
            for name, (number, raw) in matrices.items():
                out = np.empty((count, len(raw)), np.float32)
                meter = _native.Meter([raw.reshape(-1)], args.threads)
                first = np.zeros(1, np.int32)
                ceiling[name].append(raw.nbytes / clock(partial(meter.read, first)) / 1e9)
                samples[name].append(raw.nbytes / clock(partial(kernels.linear, number, raw, x, out)) / 1e9)
        print(f"\nrow dots, {count} row(s) of x, {args.cols} columns, {args.threads} threads, {_native.isa()}")
        print("| type | GB/s median | best | read GB/s median | best | median share | \n|---|---|---|---|---|---|")
        for name, values in samples.items():
            read = ceiling[name]
            share = statistics.median(v / c for v, c in zip(values, read, strict=True))
            print(
                f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} | {statistics.median(read):.1f} | {max(read):.1f} | {share:.0%} |"
            )


def float_peak(meter: _native.Meter) -> float:
    """GMAC/s of bfloat16, or of float32 where the machine has no instruction for it."""
    return (meter.multiply_adds("bf16", 0.05)[1] or meter.multiply_adds("f32", 0.05)[1]) / 1e9


def all_of(kernels: _native.Kernels, type_id: int, weights: Bytes, x: Floats, out: Floats) -> None:
    for matrix in weights:
        kernels.linear(type_id, matrix, x, out)


def program_of(
    recorded: Program,
    stored: dict[str, tuple[object, ...]],
    cache_type: CacheType,
    cache: NDArray[np.generic],
    args: argparse.Namespace,
) -> _native.Program:
    """The recording over one cache array. stored: by weight name its type number, rows, columns and parts."""
    return _native.Program(
        [_segment(s) for s in recorded.segments],
        [(name, *stored[name]) for name in recorded.weight_names],
        list(CacheType).index(cache_type),
        [cache.view(np.uint16) if cache_type is CacheType.F16 else cache],
        args.threads,
        args.workspace << 20,
        args.dtype == "int8",
    )


class Prompt:
    """append_latent and attend_expanded of one layer, recorded by themselves. V2-Lite: 16 heads of 128 + 64 and 128,
    512 latents."""

    num_segments = 2
    layers = 4  # the memory of a step is new to the first one, as in a model

    def __init__(
        self, t: BlockType, rows: int, args: argparse.Namespace, cache_type: CacheType = CacheType.F32
    ) -> None:
        self.mla = mla = MlaConfig(args.heads, 128, 64, 128, 512, None, 0.1)
        self.config = argparse.Namespace(hidden_size=mla.num_heads * mla.qk_head_dim + mla.latent_dim)
        self.up = KvUp(kv_b="kv_b") if args.layout == "kv_b" else KvUp(k_b="k_b", v_b="v_b")
        nope, v, lora = mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
        shapes = {"kv_b": (nope + v, lora)} if self.up.kv_b else {"k_b": (lora, nope), "v_b": (v, lora)}
        raws = {name: huge_weights(t, mla.num_heads * n, k) for name, (n, k) in shapes.items()}
        x = np.random.default_rng(1).standard_normal((rows, self.config.hidden_size), np.float32)
        sizes = {"table": rows} | {name: len(raw) for name, raw in raws.items()}
        recorded = record(self, sizes)  # type: ignore[arg-type]
        stored = {"table": (0, rows, x.shape[1], [(x.view(np.uint8), None)])} | {
            name: (t.id, len(raw), shapes[name][1], [(raw, None)]) for name, raw in raws.items()
        }
        self.rows, self.pages = rows, -(-rows // 64)
        cache = np.empty((1, self.pages, 64, cache_type.columns(mla.latent_dim)), cache_type.storage)
        self.program = program_of(recorded, stored, cache_type, cache, args)

    def segment_name(self, index: int) -> str:
        return ("embed", "attend")[index]

    def run_segment(self, ops: Recorder, index: int, x: Value | None) -> Value | None:
        if index == 0:
            return ops.embed("embed", "table")
        assert x is not None
        mla, width, end = self.mla, x.width - self.mla.latent_dim, x.width - self.mla.qk_rope_head_dim
        ops.append_latent("append", 0, ops.columns(x, width, end), ops.columns(x, end, x.width))
        q = ops.columns(x, 0, width)
        for layer in range(self.layers):  # of which a step runs one path, and the other has no rows
            o_latent = ops.attend_latent("latent", 0, ops.fold_q("fold", q, self.up, mla), mla)
            out = ops.unfold_v("unfold", o_latent, self.up, mla)
            out = ops.attend_expanded(f"attend.{layer}", 0, q, self.up, mla, into=out)
        ops.output("out", ops.take_outputs("take", out))
        return None

    def seconds(
        self, clock: Clock, count: int, *, keys: int | None = None, path: Path = Path.DECOMPRESSED
    ) -> float:
        """Of the last `count` rows over `keys` (None: all), a layer."""
        keys = self.rows if keys is None else keys
        at = np.arange(keys - count, keys)
        run = _native.StepRun(
            self.program,
            token_ids=at.astype(np.int32),
            slots=at.astype(np.int64),
            row_starts=np.asarray([0, count], np.int32),
            kv_lens=np.asarray([keys], np.int32),
            page_starts=np.asarray([0, self.pages], np.int32),
            pages=np.arange(self.pages, dtype=np.int32),
            segments=np.asarray([[path.value, 1, 0, 1]], np.int32),
            output_rows=np.asarray([0], np.int32),
            is_prompt=np.ones(1, np.int32),
            cos=np.zeros((count, 0), np.float32),
            sin=np.zeros((count, 0), np.float32),
            outputs=[np.empty((1, self.mla.num_heads * self.mla.v_head_dim), np.float32)],
        )
        run.run(1)
        return clock(partial(run.run, 2)) / self.layers


def bench_paths(clock: Clock, args: argparse.Namespace) -> None:
    """Rows over cached keys by both latent paths, and which of them the plan takes."""
    print(f"paths, {args.heads} heads, {args.layout}, {args.threads} threads, {args.dtype}, {_native.isa()}")
    print(
        "| type | cache | cached | rows | absorbed ms | decompressed ms | the plan takes | beside the faster |\n|---|---|---|---|---|---|---|---|"
    )
    most = max(args.rows or [256])
    depths = [int(depth) for depth in args.depths.split(",")]
    for name, cache in product(args.types.split(","), args.cache.split(",")):
        rig = Prompt(by_name(name), max(depths) + most, args, CacheType(cache))
        rig.seconds(clock, rig.rows)  # fills the cache
        for cached, rows in product(depths, args.rows or [1, 4, 16, 32, 64, 96, 128, 192, 256]):
            took: dict[Path, list[float]] = {Path.ABSORBED: [], Path.DECOMPRESSED: []}
            for _, (path, seconds) in product(range(args.repeat), took.items()):
                seconds.append(rig.seconds(clock, rows, keys=cached + rows, path=path))
            ms = {path: 1e3 * statistics.median(seconds) for path, seconds in took.items()}
            machine = native_profile(CacheType(cache))
            plan = choose(rig.mla, new_rows=rows, cached_rows=cached, is_prompt=True, machine=machine)
            print(
                f"| {name} | {cache} | {cached} | {rows} | {ms[Path.ABSORBED]:.2f} | {ms[Path.DECOMPRESSED]:.2f} | {plan.path.name.lower()} | {ms[plan.path] / min(ms.values()):.2f} |",
                flush=True,
            )


def bench_prompt(clock: Clock, args: argparse.Namespace) -> None:
    meter = _native.Meter([], args.threads)
    print(f"prompts, {args.heads} heads, {args.layout}, {args.threads} threads, {args.dtype}, {_native.isa()}")
    print(
        "| type | rows | expand GMAC/s | share of int8 | attend useful GMAC/s | share of bf16 or f32 | both ms |\n|---|---|---|---|---|---|---|"
    )
    for name in args.types.split(","):
        for rows in args.rows or [512, 2048, 8192]:
            prompt = Prompt(by_name(name), rows, args)
            prompt.seconds(clock, rows)  # fills the cache
            expands, attends, int8, bf16 = [], [], [], []
            for _ in range(args.repeat):
                int8.append(meter.multiply_adds("int8", 0.05)[1] / 1e9)
                expands.append(prompt.seconds(clock, 1))  # one row: all of the expansion, next to no attention
                bf16.append(float_peak(meter))
                attends.append(prompt.seconds(clock, rows) - expands[-1])
            heads = args.heads
            expand, attend = rows * heads * 256 * 512 / 1e9, rows * (rows + 1) / 2 * heads * 320 / 1e9
            share = statistics.median(expand / s / c for s, c in zip(expands, int8, strict=True))
            share_bf16 = statistics.median(attend / s / c for s, c in zip(attends, bf16, strict=True))
            print(
                f"| {name} | {rows} | {expand / statistics.median(expands):.0f} | {share:.0%} | {attend / statistics.median(attends):.0f} | {share_bf16:.0%} | {1e3 * (statistics.median(expands) + statistics.median(attends)):.1f} |",
                flush=True,
            )


class Absorbed:
    """fold_q, attend_latent and unfold_v of all layers, each with weights and cached rows of its own, so that nothing
    stays near the core from one token to the next but what would."""

    num_segments = 2

    def __init__(self, t: BlockType, cache_type: CacheType, depth: int, args: argparse.Namespace) -> None:
        self.mla = mla = MlaConfig(args.heads, 128, 64, 128, 512, None, 0.1)
        self.config = argparse.Namespace(hidden_size=mla.num_heads * mla.qk_head_dim)
        self.layers, self.depth = args.layers, depth
        nope, v, lora = mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
        shapes = {"kv_b": (nope + v, lora)} if args.layout == "kv_b" else {"k_b": (lora, nope), "v_b": (v, lora)}
        most = max(args.rows or [1])
        x = np.random.default_rng(1).standard_normal((most, self.config.hidden_size), np.float32)
        stored = {"table": (0, most, x.shape[1], [(x.view(np.uint8), None)])}
        for name, (n, k) in shapes.items():
            raw = huge_weights(t, self.layers * mla.num_heads * n, k).reshape(self.layers, mla.num_heads * n, -1)
            stored |= {f"{i}.{name}": (t.id, len(raw[i]), k, [(raw[i], None)]) for i in range(self.layers)}
        self.ups = [KvUp(**{name: f"{i}.{name}" for name in shapes}) for i in range(self.layers)]
        recorded = record(self, {name: rows for name, (_, rows, _, _) in stored.items()})  # type: ignore[arg-type]
        self.pages = -(-depth // PAGE_TOKENS)
        page = np.random.default_rng(2).standard_normal((PAGE_TOKENS, mla.latent_dim), np.float32)
        shape = (self.layers, self.pages, PAGE_TOKENS, cache_type.columns(mla.latent_dim))
        cache = np.empty(shape, cache_type.storage)
        cache[:] = encode(page, cache_type)
        self.program = program_of(recorded, stored, cache_type, cache, args)

    def segment_name(self, index: int) -> str:
        return ("embed", "attend")[index]

    def run_segment(self, ops: Recorder, index: int, x: Value | None) -> Value | None:
        if index == 0:
            return ops.embed("embed", "table")
        assert x is not None
        for layer, up in enumerate(self.ups):
            o_latent = ops.attend_latent("attend", layer, ops.fold_q("fold", x, up, self.mla), self.mla)
            out = ops.unfold_v("unfold", o_latent, up, self.mla)
        ops.output("out", ops.take_outputs("take", out))
        return None

    def seconds(self, clock: Clock, count: int, depth: int) -> float:
        """Of `count` sequences of one row each, all over the same `depth` cached rows."""
        ones = np.ones(count, np.int32)
        pages = -(-depth // PAGE_TOKENS)
        run = _native.StepRun(
            self.program,
            token_ids=np.arange(count, dtype=np.int32),
            slots=np.arange(count, dtype=np.int64),
            row_starts=np.arange(count + 1, dtype=np.int32),
            kv_lens=depth * ones,
            page_starts=pages * np.arange(count + 1, dtype=np.int32),
            pages=np.tile(np.arange(pages, dtype=np.int32), count),
            segments=np.asarray([[1, 1, 0, count]], np.int32),
            output_rows=np.asarray([0], np.int32),
            is_prompt=0 * ones,
            cos=np.zeros((count, 0), np.float32),
            sin=np.zeros((count, 0), np.float32),
            outputs=[np.empty((1, self.mla.num_heads * self.mla.v_head_dim), np.float32)],
        )
        run.run(1)
        return clock(partial(run.run, 2))


def bench_absorbed(clock: Clock, args: argparse.Namespace) -> None:
    meter = _native.Meter([], args.threads)
    print(
        f"absorbed, {args.heads} heads, {args.layers} layers, {args.layout}, {args.threads} threads, {args.dtype}, {_native.isa()}"
    )
    print(
        "| type | cache | rows | depth | fold and unfold ms | attend ms | GMAC/s | share of bf16 or f32 |\n|---|---|---|---|---|---|---|---|"
    )
    for name, cache in product(args.types.split(","), args.cache.split(",")):
        depths = [int(depth) for depth in args.depths.split(",")]
        rig = Absorbed(by_name(name), CacheType(cache), max(depths), args)
        for rows, depth in product(args.rows or [1], depths):
            folds, attends, bf16 = [], [], []
            rig.seconds(clock, rows, depth)
            for _ in range(args.repeat):
                bf16.append(float_peak(meter))
                folds.append(rig.seconds(clock, rows, 1))  # one key is next to no attention
                attends.append(rig.seconds(clock, rows, depth) - folds[-1])
            work = rows * depth * args.heads * args.layers * (576 + 512) / 1e9
            share = statistics.median(work / s / c for s, c in zip(attends, bf16, strict=True))
            print(
                f"| {name} | {cache} | {rows} | {depth} | {1e3 * statistics.median(folds):.2f} | {1e3 * statistics.median(attends):.2f} | {work / statistics.median(attends):.0f} | {share:.0%} |",
                flush=True,
            )


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
                raw = huge_weights(t, copies * n, k)
                number, weights = type_number(t, raw, args), raw.reshape(copies, n, -1)
                x = np.random.default_rng(2).standard_normal((count, k)).astype(np.float32)
                out = np.empty((count, n), np.float32)
                is_int8 = _native.kernel_types()[t.id] == "int8"
                values, ceiling = [], []
                for _ in range(args.repeat):
                    ceiling.append(meter.multiply_adds("int8", 0.05)[1] / 1e9 if is_int8 else float_peak(meter))
                    seconds = clock(partial(all_of, kernels, number, weights, x, out))
                    values.append(copies * n * k * count / seconds / 1e9)
                share = statistics.median(v / c for v, c in zip(values, ceiling, strict=True))
                print(
                    f"| {name} | {n} x {k} | {count} | {statistics.median(values):.0f} | {max(values):.0f} | {statistics.median(ceiling):.0f} | {max(ceiling):.0f} | {share:.0%} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["dot", "tile", "absorbed", "prompt", "paths"])
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
    parser.add_argument("--side-by-side", action="store_true", help="rows as loading puts them in memory")
    parser.add_argument("--heads", type=int, default=16, help="of attention")
    parser.add_argument("--layout", choices=["kv_b", "k_b"], default="kv_b", help="of attention's up-projections")
    parser.add_argument("--layers", type=int, default=27, help="of the absorbed path")
    parser.add_argument("--cache", default="f16,q8_0", help="types, of the absorbed path")
    parser.add_argument("--depths", default="1024,4096,8192", help="cached rows, of the absorbed path")
    parser.add_argument("--workspace", type=int, default=64, help="MiB, of attention")
    parser.add_argument("--dtype", choices=["int8", "float32"], default="int8", help="of attention")
    args = parser.parse_args()
    _native.force_isa(args.isa)
    clock = Clock(args.clock == "cpu")
    if args.form == "prompt":
        return bench_prompt(clock, args)
    if args.form == "paths":
        return bench_paths(clock, args)
    if args.form == "absorbed":
        return bench_absorbed(clock, args)
    kernels = _native.Kernels(args.threads)
    (bench_dot if args.form == "dot" else bench_tile)(kernels, clock, args)


if __name__ == "__main__":
    main()
