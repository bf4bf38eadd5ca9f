"""Times both paths of attention on a GPU, over new rows and cached keys, and says what the plan's arithmetic loses by its choice.

    PYTHONPATH=src python bench/gpu_profile.py measure --out profile.json
    PYTHONPATH=src python bench/gpu_profile.py report profile.json            (needs no GPU)

measure: attention of a layer as the engine runs it (mla/attention.py on backends/cuda_ops.py), between projections and output:
rotation and append; folding, decode over latents, unfolding; or expansion and attention over keys and values. Device time of a
CUDA graph over several layers of distinct weights and caches, more bytes than L2 holds. `parts` has each product by itself.
report: fits a MachineProfile (mla/plan.py) to what was measured, and prints for it and for the profile in use how long the
chosen path takes beside the better one (regret: that ratio minus 1).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from kvfold.backends.gpu_rates import H200, gpu_profile
from kvfold.cache.latent import CacheType
from kvfold.config import MlaConfig, ModelConfig
from kvfold.mla.plan import ARITHMETIC, MachineProfile, attention_work, choose
from kvfold.mla.plan import Path as Route

ROOT = Path(__file__).parents[1]
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512)
CACHED = (0, 128, 512, 1024, 4096, 16384, 65536)
FEW_ROWS = (1, 4, 16, 64, 128, 192, 512)
FEW_CACHED = (0, 1024, 4096, 16384, 65536)
PART_ROWS, PART_CACHED = (1, 4, 64, 512), (0, 1024, 16384, 65536)
LAYERS = {16: 12, 128: 3}  # 50 and 100 MB of W_UK and W_UV, beside the caches
PATHS = ("absorbed", "decompressed")


@dataclass(frozen=True)
class Kind:
    """What a profile is for. form: of both kernels, auto where None."""

    heads: int
    cache: str
    dtype: str
    form: str | None

    @property
    def name(self) -> str:
        return f"{self.heads} heads, {self.cache} cache, {self.dtype}, {self.form or 'kernels of this card'}"


KINDS = (
    Kind(16, "bf16", "bfloat16", None),
    Kind(128, "bf16", "bfloat16", None),
    Kind(16, "fp8", "bfloat16", None),
    Kind(16, "q8_0", "bfloat16", None),
    Kind(16, "bf16", "bfloat16", "triton"),
    Kind(128, "fp8", "bfloat16", None),
    Kind(128, "q8_0", "bfloat16", None),
    Kind(128, "bf16", "bfloat16", "triton"),
    Kind(16, "f32", "float32", None),
    Kind(16, "fp8", "bfloat16", "triton"),
    Kind(16, "q8_0", "bfloat16", "triton"),
)
GROUPS = tuple(dict.fromkeys((kind.cache, kind.dtype, kind.form) for kind in KINDS))  # a profile each
RATES = ("latents", "folding", "expansion", "heads", "cached", "absorbed_start", "decompressed_start", "few_start")


class Layers:
    """Attention of one sequence in several layers, with random queries, weights and cached rows."""

    def __init__(self, kind: Kind, most_tokens: int) -> None:
        import torch

        from kvfold.backends.cuda import CudaBackend
        from kvfold.backends.cuda_weights import DeviceWeights
        from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache
        from kvfold.config import ModelConfig
        from kvfold.model.deepseek import DeepseekModel

        self.kind, self.device, self.dtype = kind, torch.device("cuda", 0), getattr(torch, kind.dtype)
        read = json.loads((ROOT / "tests/data/configs/deepseek-v2-lite.json").read_text())
        read |= {"num_attention_heads": kind.heads, "num_key_value_heads": kind.heads}
        read |= {"num_hidden_layers": LAYERS[kind.heads]}
        model = DeepseekModel(ModelConfig.from_hf(read), splits_kv_b=False, standard=False)
        self.mla, self.num_layers = model.config.mla, model.config.num_layers
        weights = DeviceWeights()
        for layer in range(self.num_layers):
            weights.up[model.kv_up(layer)] = tuple(
                torch.randn(kind.heads, width, self.mla.kv_lora_rank, device=self.device, dtype=self.dtype) / 22
                for width in (self.mla.qk_nope_head_dim, self.mla.v_head_dim)
            )
        layout = CacheLayout.latent(model.config, CacheType(kind.cache))
        cache = PagedCache(layout, -(-most_tokens // PAGE_TOKENS) + 1)
        self.backend = CudaBackend(
            model, weights, cache, device=self.device, dtype=self.dtype, workspace_bytes=256 << 20, captures=False
        )
        for pool in self.backend.pools:
            if pool.is_floating_point():
                pool.normal_()
            else:
                pool.random_(0, 0x30)
        for layer in range(self.num_layers):
            weights.vectors[f"blk.{layer}.attn_kv_a_norm.weight"] = torch.ones(
                self.mla.kv_lora_rank, device=self.device
            )
        widths = kind.heads * self.mla.qk_head_dim, self.mla.latent_dim
        self.queries, self.latents = (
            torch.randn(ROWS[-1], width, device=self.device, dtype=self.dtype) for width in widths
        )

    def work(self, path: str, rows: int, cached: int) -> Callable[[], None]:
        """Launches attention of every layer for `rows` new rows over `cached` ones."""
        from kvfold.backends.cuda_ops import CudaOps, Value, made
        from kvfold.backends.cuda_step import on_device
        from kvfold.cache.pages import PagePool, Sequence
        from kvfold.engine.batch import Work, build_batch
        from kvfold.mla.attention import attention
        from kvfold.mla.plan import Mla, choose

        setting = Mla.ABSORBED if path == "absorbed" else Mla.DECOMPRESSED

        def planner(new: int, old: int, is_prompt: bool) -> Any:
            return choose(self.mla, new_rows=new, cached_rows=old, is_prompt=is_prompt, setting=setting)

        sequence = Sequence(PagePool(self.backend.num_pages))
        sequence.reserve(cached)
        sequence.length = cached
        step = build_batch([Work(sequence, [0] * rows, is_prompt=True)], planner).step
        projected = {"q": made(self.queries[:rows]), "kv_a": made(self.latents[:rows])}

        class Projected(CudaOps):
            def linear(self, name: str, x: Value, weight: str) -> Value:
                return projected[name.rpartition(".")[2]]

        ops = Projected(self.backend, on_device(step, self.mla, self.device))
        model = self.backend.model

        def launch() -> None:
            for layer in range(self.num_layers):
                attended = attention(ops, layer, projected["q"], model.config, model.kv_up(layer), standard=False)
                attended.tensor  # noqa: B018  made now

        return launch

    def parts(self, rows: int, cached: int) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each product of both paths by itself, in every layer."""
        import torch

        from kvfold.backends import cuda_ops
        from kvfold.kernels import rows as row_kernels
        from kvfold.kernels.mla_decode import DecodeWorkspace, schedule_decode

        mla, device, dtype = self.mla, self.device, self.dtype
        keys = rows + cached
        ups = [self.backend.weights.up[self.backend.model.kv_up(layer)] for layer in range(self.num_layers)]
        q = self.queries[:rows].unflatten(1, (mla.num_heads, mla.qk_head_dim))
        folded = torch.randn(rows, mla.num_heads, mla.latent_dim, device=device, dtype=dtype)
        weighted = torch.empty(rows, mla.num_heads, mla.kv_lora_rank, device=device, dtype=dtype)
        out = torch.empty(rows, mla.num_heads, mla.v_head_dim, device=device, dtype=dtype)
        each = min(rows, 4)
        workspace = DecodeWorkspace(rows // each, each, mla.num_heads, mla.kv_lora_rank, device)
        lens = cached + each * torch.arange(1, rows // each + 1, dtype=torch.int32, device=device)
        pages = torch.arange(self.backend.num_pages, dtype=torch.int32, device=device)
        starts = torch.zeros(rows // each + 1, dtype=torch.int32, device=device)
        schedule_decode(lens, workspace)
        torch.cuda.synchronize()  # decode reads the schedule before it waits

        def fold() -> None:
            for w_uk, _ in ups:
                row_kernels.per_head(
                    q, w_uk, folded, depth=mla.qk_nope_head_dim, width=mla.kv_lora_rank, extra=mla.qk_rope_head_dim
                )

        def unfold() -> None:
            for _, w_uv in ups:
                row_kernels.per_head(
                    weighted, w_uv.transpose(1, 2), out, depth=mla.kv_lora_rank, width=mla.v_head_dim
                )

        def decode() -> None:
            for layer in range(self.num_layers):
                cuda_ops.mla_decode(
                    folded, self.backend.pools[0][layer], pages, starts, lens, weighted, workspace,
                    scale=mla.softmax_scale, kv_lora=mla.kv_lora_rank, blocks=self.backend.blocks,
                )  # fmt: skip

        yield "fold", fold
        yield "decode", decode
        yield "unfold", unfold
        held = min(keys, self.backend.workspace_bytes // (mla.num_heads * 256 * dtype.itemsize) // 64 * 64)
        latents = torch.randn(held, mla.latent_dim, device=device, dtype=dtype)
        expanded = [torch.empty(held, mla.num_heads * w.shape[1], device=device, dtype=dtype) for w in ups[0]]
        lse = torch.empty(mla.num_heads, rows, device=device)

        def expand() -> None:
            for up in ups:
                for w, into in zip(up, expanded, strict=True):
                    torch.mm(latents[:, : mla.kv_lora_rank], w.flatten(0, 1).T, out=into)

        def prefill() -> None:
            k, v = (x.unflatten(1, (mla.num_heads, -1)) for x in expanded)
            for _ in ups:
                cuda_ops.mla_prefill(
                    q, k, latents[:, None, mla.kv_lora_rank :], v, out, lse, scale=mla.softmax_scale,
                    first_row=held - rows, first_key=0, merge=False,
                )  # fmt: skip

        if held >= rows:
            yield f"expand {held}", expand
            yield f"prefill {held}", prefill


@contextmanager
def forced(form: str | None) -> Iterator[None]:
    """Both attention kernels in this form."""
    from kvfold.backends import cuda_ops

    before = cuda_ops.mla_decode, cuda_ops.mla_prefill
    if form is not None:
        cuda_ops.mla_decode, cuda_ops.mla_prefill = (partial(kernel, form=form) for kernel in before)
    try:
        yield
    finally:
        cuda_ops.mla_decode, cuda_ops.mla_prefill = before


def device_us(launch: Callable[[], None], memory: Any) -> float:
    """Median of five replays of what this launches, three where they are long."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        launch()
    graph.replay()
    spans: list[float] = []
    while len(spans) < (5 if sum(spans) < 40e3 else 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        spans.append(start.elapsed_time(stop) * 1e3)
    del graph
    return statistics.median(spans)


def measure(options: argparse.Namespace) -> None:
    """Kinds one by one until the time is up; what was measured is in the file whenever a kind ends."""
    import torch
    import triton

    begun = time.monotonic()
    props = torch.cuda.get_device_properties(0)
    measured: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{props.name}, torch {torch.__version__}, triton {triton.__version__}",
        "command": "python bench/gpu_profile.py " + " ".join(sys.argv[1:]),
        "note": "us a layer, of a graph over layers with their own weights and caches",
        "points": [],
        "parts": [],
    }
    gc.disable()
    memory = torch.cuda.graph_pool_handle()
    keeper = torch.cuda.CUDAGraph()  # the memory of graphs is given up with the last of them
    with torch.cuda.graph(keeper, pool=memory):
        torch.zeros(1, device="cuda")

    def us(launch: Callable[[], None], layers: Layers) -> float:
        if options.warm:
            launch()
            return 0.0
        return round(device_us(launch, memory) / layers.num_layers, 2)

    for index in map(int, options.kinds.split(",")):
        kind = KINDS[index]
        is_whole = index < options.whole
        cases = product(ROWS if is_whole else FEW_ROWS, CACHED if is_whole and not options.warm else FEW_CACHED)
        layers = Layers(kind, CACHED[-1] + ROWS[-1])
        with torch.inference_mode(), forced(kind.form):
            for rows, cached in cases:
                if time.monotonic() - begun > options.seconds:
                    print("time is up", flush=True)
                    break
                try:
                    timed = {path: us(layers.work(path, rows, cached), layers) for path in PATHS}
                    measured["points"].append(vars(kind) | {"rows": rows, "cached": cached} | timed)
                    if options.parts and rows in PART_ROWS and cached in PART_CACHED:
                        timed = {name: us(launch, layers) for name, launch in layers.parts(rows, cached)}
                        measured["parts"].append({"heads": kind.heads, "rows": rows, "cached": cached} | timed)
                except (RuntimeError, triton.TritonError) as error:
                    print(f"{kind.name}, {rows} over {cached}: {error!r}"[:300], flush=True)
        torch.cuda.synchronize()
        print(f"{kind.name}: {len(measured['points'])} points, {time.monotonic() - begun:.1f} s", flush=True)
        if options.out:
            options.out.write_text(json.dumps(measured) + "\n")
        del layers
        gc.collect()
        torch.cuda.empty_cache()


Point = tuple[int, int, dict[str, float]]
"""(new rows, cached rows, us of each path)."""


def points_of(measured: dict[str, Any], kind: Kind) -> list[Point]:
    wanted = vars(kind)
    return [
        (p["rows"], p["cached"], {path: p[path] for path in PATHS})
        for p in measured["points"]
        if all(p[name] == value for name, value in wanted.items())
    ]


def mla_of(heads: int) -> MlaConfig:
    read = json.loads((ROOT / "tests/data/configs/deepseek-v2-lite.json").read_text())
    return replace(ModelConfig.from_hf(read).mla, num_heads=heads)


def regrets(profile: MachineProfile, heads: int, points: list[Point]) -> list[tuple[float, int, int]]:
    """(time of the path that this profile chooses over that of the better one, minus 1; new rows, cached rows)."""
    mla, found = mla_of(heads), []
    for rows, cached, us in points:
        plan = choose(mla, new_rows=rows, cached_rows=cached, is_prompt=True, machine=profile)
        found.append((us[plan.path.name.lower()] / min(us.values()) - 1, rows, cached))
    return found


def in_use(group: tuple[str, str, str | None]) -> MachineProfile:
    """The profile that the backend takes on an H200; of plain Triton, that of a card of another kind with an H200's rates."""
    cache, dtype, form = group
    gpu = H200 if form is None else replace(H200, capability=(8, 0), clock_khz=2 * H200.clock_khz)
    return gpu_profile(gpu, CacheType(cache), dtype)


def fitted(groups: list[tuple[int, list[Point]]], start: MachineProfile) -> MachineProfile:
    """The rates that make the logarithms of predicted and measured times of (heads, points) differ least in the square, each
    group of equal weight: a search along one rate at a time."""

    def error(profile: MachineProfile) -> float:
        total = 0.0
        for heads, points in groups:
            mla = mla_of(heads)
            for rows, cached, us in points:
                for path in (Route.ABSORBED, Route.DECOMPRESSED):
                    ns = profile.seconds(path, attention_work(path, mla, rows, cached))
                    total += math.log(ns / (1e3 * us[path.name.lower()])) ** 2 / len(points)
        return total

    best, least = start, error(start)
    step = 2.0
    while step > 1.005:
        before = least
        for name in RATES:
            for factor in (step, 1 / step):
                tried = replace(best, **{name: getattr(best, name) * factor})
                wrong = error(tried)
                if wrong < least:
                    best, least = tried, wrong
        if least > before * 0.999:
            step = math.sqrt(step)
    return best


def report(options: argparse.Namespace) -> None:
    measured = json.loads(options.measured.read_text())
    for group in GROUPS:
        kinds = [kind for kind in KINDS if (kind.cache, kind.dtype, kind.form) == group]
        sets = [(kind.heads, points_of(measured, kind)) for kind in kinds]
        sets = [(heads, points) for heads, points in sets if points]
        if not sets:
            continue
        fit = fitted(sets, replace(ARITHMETIC, latents=3e5, folding=1e5, expansion=3e5, heads=3e5, cached=2e3,
                                   absorbed_start=8e3, decompressed_start=8e3, few_rows=4, few_start=8e3))  # fmt: skip
        print(
            f"{group[0]} cache, {group[1]}, {group[2] or 'kernels of this card'}: "
            + ", ".join(f"{name}={getattr(fit, name):.3g}" for name in RATES)
        )
        profiles = {"fitted": fit, "arithmetic": ARITHMETIC, "in use": in_use(group)}
        for heads, points in sets:
            for name, profile in profiles.items():
                found = regrets(profile, heads, points)
                worst = max(found)
                print(
                    f"  {heads} heads, {name}: regret mean {sum(f[0] for f in found) / len(found):.2%}, max {worst[0]:.1%} at "
                    f"{worst[1]} over {worst[2]}; wrong by more than 5 %: {sum(f[0] > 0.05 for f in found)} of {len(found)}"
                )
            if options.grid:
                print_grid(heads, points, fit)


def print_grid(heads: int, points: list[Point], profile: MachineProfile) -> None:
    """Absorbed over decompressed, measured, and the choice where it loses."""
    rows = sorted({r for r, _, _ in points})
    lost = {(r, c): regret for regret, r, c in regrets(profile, heads, points) if regret > 0}
    print("  cached | " + " | ".join(f"{r:5d}" for r in rows))
    for cached in sorted({c for _, c, _ in points}):
        us = {r: p for r, c, p in points if c == cached}
        cells = [
            f"{us[r]['absorbed'] / us[r]['decompressed']:5.2f}{'*' if (r, cached) in lost else ' '}"
            for r in rows
            if r in us
        ]
        print(f"  {cached:6d} | " + " | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("measure")
    verb.add_argument("--out", type=Path)
    verb.add_argument("--kinds", default=",".join(map(str, range(len(KINDS)))), help="of KINDS, by number")
    verb.add_argument(
        "--whole", type=int, default=2, help="so many kinds over the whole grid, others over a coarse one"
    )
    verb.add_argument("--seconds", type=float, default=600)
    verb.add_argument("--parts", action="store_true", help="each product by itself, too")
    verb.add_argument("--warm", action="store_true", help="compile only")
    verb = verbs.add_parser("report")
    verb.add_argument("measured", type=Path)
    verb.add_argument(
        "--grid", action="store_true", help="absorbed over decompressed; * where the fitted profile loses"
    )
    options = parser.parse_args()
    {"measure": measure, "report": report}[options.verb](options)


if __name__ == "__main__":
    main()
