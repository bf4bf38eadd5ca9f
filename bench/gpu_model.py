"""Times whole steps of a released shape on a GPU: random weights made on the device, no file.

    PYTHONPATH=src python bench/gpu_model.py --type BF16 --batch 1,64 --depth 128,4096 --prompt 8192

Decode: median wall time from a step's arrays to its logits on the host, of the graph's replay alone by CUDA events, and of
a step in a loop that takes each step's likeliest tokens on the device (loop_us). --engine: tokens a second of requests in
engine/runner.py, in turn: greedy ones, ones with the default settings, and those sampled on the host.
floor: bytes that the step must read (weights of the experts that its rows choose, each once; cache rows) over the read-only
limit that is measured in the same run. Tokens are random, since rows of one token choose the same experts. Prompt: wall
time of one step; its floor is the model's multiply-adds at cuBLAS's bf16 rate for 8192^3, measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvfold.backends.cuda import CudaBackend
from kvfold.backends.cuda_ops import ROW_PRODUCT_ROWS
from kvfold.backends.cuda_weights import DeviceWeights, Rows, codebook_words
from kvfold.backends.gpu_rates import H200, gpu_profile
from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache
from kvfold.cache.pages import PagePool, Sequence
from kvfold.config import ModelConfig
from kvfold.engine.batch import Work, build_batch
from kvfold.engine.runner import Runner
from kvfold.engine.sampler import Sampler, SamplingParams
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.kernels import rounded_product, tile_product
from kvfold.kernels.matrix import PLANES, Matrix, padded, planes
from kvfold.mla.plan import Fa, Mla, MlaPlan, choose
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.step import LIKELIEST
from kvfold.quant.types import by_name

ROOT = Path(__file__).parents[1]
LOOP_STEPS = 40
ENGINE_TOKENS = 128
ENGINE_ROUNDS = 3


def random_matrix(
    type: str, rows: int, cols: int, device: torch.device, parts: int = 1, rounds: bool = True
) -> Matrix:
    """Of this type, or IQ4_NL (of types above 4 bits Q8_0) where a row has no whole blocks of it, with tame scales."""
    block = by_name(type)
    other = "IQ4_NL" if block.block_bytes * 8 < 4 * block.block_elements else "Q8_0"
    name = type if cols % block.block_elements == 0 else other
    if name == "BF16":
        numbers = torch.randn(parts * rows, cols, device=device, dtype=torch.bfloat16) / cols**0.5
        return Matrix(name, rows, cols, numbers.view(torch.uint8), None, parts)
    if name == "F8_E4M3":
        codes = torch.randint(0, 256, (parts * rows, cols), device=device, dtype=torch.uint8) & 0xBF  # below 2
        scale = torch.full((parts, -(-rows // 128), -(-cols // 128)), 0.01, device=device)
        return Matrix(name, rows, cols, codes, scale, parts, rounds)
    block = by_name(name)
    shape = parts * rows, cols // block.block_elements, block.block_bytes
    raw = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    small = torch.tensor([0.002], dtype=torch.float16, device=device).view(torch.uint8)
    if name in ("MXFP4", "NVFP4"):  # 2^-8, about 2
        at = slice(0, 1 if name == "MXFP4" else 4)
        raw[:, :, at] = 119 if name == "MXFP4" else raw[:, :, at] & 15
    elif name == "IQ1_M":
        raw[:, :, 55] = raw[:, :, 55] & 15 | 16
    else:
        for at in {"Q4_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "Q5_K": (0, 2)}.get(
            name, (0,)
        ):
            raw[:, :, at : at + 2] = small
    raw = raw.view(parts * rows, -1)
    raw = padded(planes(name, raw) if name in PLANES else raw)
    rounds = rounds and name in rounded_product.TYPES
    return Matrix(name, rows, cols, raw, None, parts, rounds, codebook_words(name, device))


def random_weights(model: DeepseekModel, type: str, device: torch.device, rounds: bool) -> DeviceWeights:
    """Matrices of one block type; q and kv_a, gate and up lie together as `upload` lays them."""
    config, out = model.config, DeviceWeights()
    specs = {s.name: s.shape for s in expected_tensors(config, KvLayout.KV_B)}

    def matrix(rows: int, cols: int, parts: int = 1, type: str = type) -> Matrix:
        return random_matrix(type, rows, cols, device, parts, rounds)

    pairs = {"attn_kv_a_mqa": "attn_q", "ffn_up": "ffn_gate", "ffn_up_shexp": "ffn_gate_shexp"}
    if config.mla.q_lora_rank is not None:
        pairs["attn_kv_a_mqa"] = "attn_q_a"
    is_fp8 = type == "F8_E4M3"  # such files keep embedding and head in bf16, and `upload` joins none
    if is_fp8:
        pairs = {}
    for name, shape in specs.items():
        blk, _, kind = name.removesuffix(".weight").rpartition(".")
        if name in out.rows or kind in ("attn_kv_b", *pairs):
            continue
        second = next((b for b, a in pairs.items() if a == kind and f"{blk}.{b}.weight" in specs), None)
        if len(shape) == 1:
            out.vectors[name] = torch.ones(shape, device=device)
        elif kind == "ffn_gate_inp":
            numbers = torch.randn(shape, device=device) / shape[1] ** 0.5
            out.rows[name] = Rows(Matrix("F32", *shape, numbers.view(torch.uint8)), 0, shape[0])
        elif second is not None:
            other = specs[f"{blk}.{second}.weight"][0]
            both = matrix(shape[0] + other, shape[1])
            out.rows[name] = Rows(both, 0, shape[0])
            out.rows[f"{blk}.{second}.weight"] = Rows(both, shape[0], shape[0] + other)
        else:
            parts, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
            kept = "BF16" if is_fp8 and blk == "" else type
            out.rows[name] = Rows(matrix(rows, shape[-1], parts, kept), 0, rows)
    mla = config.mla
    for layer in range(config.num_layers):
        out.up[model.kv_up(layer)] = tuple(  # type: ignore[assignment]
            torch.randn(mla.num_heads, width, mla.kv_lora_rank, device=device, dtype=torch.bfloat16) / 22
            for width in (mla.qk_nope_head_dim, mla.v_head_dim)
        )
    return out


def experts_read(backend: CudaBackend, step: Any, batch: int) -> float:
    """The share of a layer's experts that a step reads, mean over layers, from the ids of one launched op by op."""
    moe = backend.model.config.moe
    if moe is None or batch <= ROW_PRODUCT_ROWS:  # rows that choose apart, as few as they are
        return 0.0 if moe is None else 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch
    counts: list[int] = []
    original = tile_product.experts

    def watched(x: torch.Tensor, ids: torch.Tensor, *rest: Any) -> None:
        counts.append(len(ids.unique()))
        original(x, ids, *rest)

    captured, backend._graphs, backend._layers = (backend._graphs, backend._layers), None, None
    tile_product.experts = watched
    try:
        step()
    finally:
        tile_product.experts, (backend._graphs, backend._layers) = original, captured
    return statistics.mean(counts) / moe.num_experts if counts else 0.0  # all layers may be dense


def step_bytes(weights: DeviceWeights, layout: CacheLayout, batch: int, depth: int, experts: float) -> float:
    """What one decode step must read: this share of all experts, each once, and cached rows."""
    total = 0.0
    for name, rows in weights.rows.items():
        nbytes = rows.matrix.raw.nbytes * (rows.stop - rows.start) / rows.matrix.rows
        if rows.matrix.parts > 1:
            nbytes = rows.matrix.raw.nbytes * experts
        if name != "token_embd.weight":
            total += nbytes
    total += sum(a.nbytes + b.nbytes for a, b in weights.up.values())
    return total + batch * depth * layout.bytes_per_token


def prompt_multiply_adds(model: DeepseekModel, weights: DeviceWeights, rows: int) -> float:
    """Of a prompt with one output row: behind the last attention nothing else is computed."""
    config, each = model.config, 0.0
    behind = tuple(f"blk.{model.config.num_layers - 1}.{kind}" for kind in ("attn_output", "ffn_"))
    for name, part in weights.rows.items():
        count = (part.stop - part.start) * part.matrix.cols
        if part.matrix.parts > 1:
            assert config.moe is not None
            count *= config.moe.num_experts_per_tok
        if name not in ("token_embd.weight", "output.weight") and not name.startswith(behind):
            each += count
    mla = config.mla
    up = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
    attention = mla.num_heads * rows / 2 * (mla.qk_head_dim + mla.v_head_dim)
    return rows * (each + config.num_layers * (up + attention))


@triton.jit
def _total(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * 16 + tl.arange(0, BLOCK)
    s = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(16):
        s += tl.load(x + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(s, 0))


def read_limit(device: torch.device) -> float:
    """Bytes a second of a plain sum over 4 GB."""
    x = torch.ones(1 << 30, dtype=torch.int32, device=device)
    blocks = len(x) // (4096 * 16)
    out = torch.empty(blocks, dtype=torch.int32, device=device)
    return x.nbytes / timed(lambda: _total[(blocks,)](x, out, BLOCK=4096, num_warps=8))


def matmul_rate(device: torch.device) -> float:
    """Multiply-adds a second of cuBLAS in bf16, 8192^3."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 8192**3 / timed(lambda: a @ a)


def timed(work: Any, repeats: int = 10) -> float:
    """Median seconds on the device."""
    work()
    spans = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        spans.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(spans)


def engine_rates(
    backend: CudaBackend, planner: Any, num_pages: int, batch: int, depth: int
) -> dict[str, list[float]]:
    """Tokens a second of `batch` requests from the moment when all have one: of each kind, one round after the other."""
    vocab, pool = backend.model.config.vocab_size, PagePool(num_pages)
    kinds = {"greedy": {"temperature": 0}, "default": {}, "default_on_host": {}}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round in range(ENGINE_ROUNDS + 1):
        for kind, settings in kinds.items():
            runner = Runner(backend, pool, planner, num_segments=backend.model.num_segments, max_prompt_rows=2048)
            requests = []
            for seed in range(batch):
                sampler = Sampler(SamplingParams(**settings, seed=seed), vocab)
                prompt = np.random.default_rng(seed).integers(0, vocab, depth - ENGINE_TOKENS // 2).tolist()
                choices = None if kind.endswith("host") else sampler
                requests.append(runner.submit(prompt, sampler.sample, ENGINE_TOKENS, frozenset(), choices=choices))
            while not all(request.token_ids for request in requests):
                runner.step()
            start, first = time.perf_counter(), sum(len(request.token_ids) for request in requests)
            while not runner.is_idle:
                runner.step()
            assert all(len(request.token_ids) == ENGINE_TOKENS for request in requests)
            if round:  # the first captures
                rates[kind].append((batch * ENGINE_TOKENS - first) / (time.perf_counter() - start))
    return rates


def print_profile(what: str, work: Any) -> None:
    """Device time of each kernel of one run of `work`."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda k: -k.device_time_total)
    print(f"{what}: {sum(k.device_time_total for k in kernels):.0f} us in {sum(k.count for k in kernels)} launches")
    for k in kernels[:20]:
        print(f"  {k.device_time_total:9.1f} us {k.count:5d} x {k.device_time_total / k.count:8.2f}  {k.key[:70]}")


def print_ends(what: str, work: Any) -> None:
    """Time from the end of one kernel to that of the next, mean of all pairs of these two: kernels overlap, so their own
    spans add up to more than the step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ends = sorted((e.time_range.end, e.name[:26]) for e in kernels)
    apart: dict[tuple[str, str], list[float]] = {}
    for (end, name), (next_end, next_name) in itertools.pairwise(ends):
        apart.setdefault((name, next_name), []).append(next_end - end)
    print(f"{what}: ends of {len(ends)} kernels")
    for (name, next_name), spans in apart.items():
        if len(spans) > 3:
            print(f"  {statistics.mean(spans):6.2f} us x {len(spans):3d}  {name} -> {next_name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--type", default="BF16")
    parser.add_argument("--dtype", default="int8", choices=["int8", "bfloat16"])
    parser.add_argument("--batch", default="1")
    parser.add_argument("--depth", default="128")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--mla", default="auto", choices=[m.value for m in Mla])
    parser.add_argument("--launched", action="store_true", help="op by op: no graphs, so wall time alone")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the kernels of each case, and of steps what lies between their ends",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    read = json.loads((ROOT / "tests/data/configs" / f"{options.config}.json").read_text())
    if options.layers:
        read["num_hidden_layers"] = options.layers
    setting = Mla(options.mla)
    is_standard = setting is Mla.STANDARD
    model = DeepseekModel(ModelConfig.from_hf(read), splits_kv_b=False, standard=is_standard)
    batches, depths = ([int(n) for n in text.split(",")] for text in (options.batch, options.depth))
    prompts = [int(n) for n in options.prompt.split(",") if n]
    weights = random_weights(model, options.type, device, options.dtype == "int8")
    tokens = max([b * (d + 256) for b in batches for d in depths] + [p + 64 for p in prompts])
    layout = (CacheLayout.standard if is_standard else CacheLayout.latent)(model.config, CacheType.BF16)
    cache = PagedCache(layout, tokens // PAGE_TOKENS + max(batches))
    backend = CudaBackend(
        model,
        weights,
        cache,
        device=device,
        dtype=torch.bfloat16,
        workspace_bytes=1 << 30,
        captures=not options.launched,
    )
    for pool in backend.pools:
        pool.normal_()
    limit = read_limit(device)
    cublas = matmul_rate(device)
    print(
        f"read-only limit {limit / 1e12:.2f} TB/s, cuBLAS {2 * cublas / 1e12:.0f} TFLOP/s, weights {weights.nbytes / 1e9:.2f} GB"
    )

    def planner(new: int, cached: int, is_prompt: bool) -> MlaPlan:
        return choose(model.config.mla, new_rows=new, cached_rows=cached, is_prompt=is_prompt, setting=setting,
                      fa=Fa.AUTO, machine=gpu_profile(H200, CacheType.BF16, options.dtype))  # fmt: skip

    results = []
    for batch in batches:
        for depth in depths:
            pool = PagePool(cache.num_pages)
            sequences = [Sequence(pool) for _ in range(batch)]
            for sequence in sequences:
                sequence.reserve(depth)
                sequence.length = depth

            first = np.random.default_rng(1).integers(0, model.config.vocab_size, batch).tolist()

            def step(sequences: list[Sequence] = sequences, tokens: list[int] = first) -> np.ndarray:
                works = [Work(s, [t], is_prompt=False) for s, t in zip(sequences, tokens, strict=True)]
                built = build_batch(works, planner)
                run = backend.start(built.step)
                run.run()
                built.commit()
                return run.outputs["logits"]

            assert np.isfinite(step()).all()
            walls = []
            for _ in range(20):
                start = time.perf_counter()
                step()
                walls.append(time.perf_counter() - start)
            wall = statistics.median(walls)
            if backend._graphs is None:
                row = {"what": "decode, launched", "mla": options.mla, "type": options.type, "batch": batch, "depth": depth,
                       "wall_us": wall * 1e6, "tokens_per_s": batch / wall}  # fmt: skip
                results.append(row)
                print(
                    json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True
                )
                continue
            work = [Work(s, [17], is_prompt=False) for s in sequences]
            graph = backend._graphs.graph(build_batch(work, planner).step)
            assert graph is not None
            replay = timed(graph.replay)
            if options.profile:
                print_profile(f"decode {batch} x {depth}", graph.replay)
                print_ends(f"decode {batch} x {depth}", graph.replay)

            def loop(sequences: list[Sequence] = sequences, tokens: list[int] = first) -> tuple[float, list[int]]:
                """(seconds a step, the last tokens) where each takes the tokens of the one before it from the device, and
                they come to the host when the next is under way: the engine's loop when all take the likeliest token."""
                before = None
                start = time.perf_counter()
                for _ in range(LOOP_STEPS):
                    works = [
                        Work(s, [t], is_prompt=False, choice=LIKELIEST)
                        for s, t in zip(sequences, tokens, strict=True)
                    ]
                    built = build_batch(works, planner)
                    run = backend.start(built.step)
                    run.run()
                    built.commit()
                    if before is not None:
                        assert (before.chosen >= 0).all()
                    tokens, before = [-1 - i for i in range(len(tokens))], run
                assert before is not None and (before.chosen >= 0).all()
                return (time.perf_counter() - start) / LOOP_STEPS, before.chosen.tolist()

            loop_step, last = loop()
            # Rows of one token choose alike, so each of the two has its own floor.
            experts, loop_experts = (
                experts_read(backend, lambda tokens=tokens: step(tokens=tokens), batch) for tokens in (first, last)
            )
            floor, loop_floor = (
                step_bytes(weights, layout, batch, depth, e) / limit for e in (experts, loop_experts)
            )
            row = {
                "what": "decode", "mla": options.mla, "type": options.type, "batch": batch, "depth": depth, "experts_read": experts,
                "loop_experts_read": loop_experts, "wall_us": wall * 1e6,
                "replay_us": replay * 1e6, "tokens_per_s": batch / wall, "floor_us": floor * 1e6,
                "share_of_floor": floor / wall, "loop_us": loop_step * 1e6, "loop_tokens_per_s": batch / loop_step,
                "loop_share_of_floor": loop_floor / loop_step,
            }  # fmt: skip
            if options.engine:
                for kind, rates in engine_rates(backend, planner, cache.num_pages, batch, depth).items():
                    row[f"engine_{kind}_tokens_per_s"] = [round(rate, 1) for rate in rates]
            results.append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    for rows in prompts:
        pool = PagePool(cache.num_pages)

        def prompt(rows: int = rows, pool: PagePool = pool) -> np.ndarray:
            sequence = Sequence(pool)
            tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, rows).tolist()
            built = build_batch([Work(sequence, tokens, is_prompt=True)], planner)
            run = backend.start(built.step)
            run.run()
            logits = run.outputs["logits"]
            built.commit()
            sequence.release()
            return logits

        for _ in range(2):  # launched, captured
            prompt()
        walls = []
        for _ in range(4):
            start = time.perf_counter()
            prompt()
            walls.append(time.perf_counter() - start)
        wall = statistics.median(walls)
        if options.profile:
            print_profile(f"prompt {rows}", prompt)
        floor = prompt_multiply_adds(model, weights, rows) / cublas
        row = {"what": "prompt", "type": options.type, "rows": rows, "wall_us": wall * 1e6, "tokens_per_s": rows / wall,
               "floor_us": floor * 1e6, "share_of_floor": floor / wall}  # fmt: skip
        results.append(row)
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if options.out:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "read_tbs": limit / 1e12,
                   "cublas_tflops": 2 * cublas / 1e12, "config": options.config, "results": results}  # fmt: skip
        options.out.write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
