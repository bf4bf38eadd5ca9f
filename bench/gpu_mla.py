"""MLA decode on a GPU: first right, then how fast beside the card's limits and a peer.

    PYTHONPATH=src python bench/gpu_mla.py check many            # against float64; few, many, triton or prefill
    PYTHONPATH=src python bench/gpu_mla.py sweep --out sweep.json        # batch 1, every length from 1k to 64k
    PYTHONPATH=src python bench/gpu_mla.py prefill --out prefill.json [--fa3 LIBRARY]
    PYTHONPATH=src python bench/gpu_mla.py time --heads 16 --out rows.json [--peer FOLDER]

Times are CUDA events around the replay of a graph of at least 20 launches (prefill: of 3 ms), the median of 5 to 20
replays. Every launch reads other pages, in random order, of a pool of random rows, so that none comes from the 60 MB of L2: the inputs rotate over
at least 320 MB. Counted bytes: latents, queries, results. Counted multiply-adds: (576 + 512) per row, head and visible
key. The schedule (once a step for all layers) is not timed, in ours as in the peer. `--peer` is a folder with a built
`flash_peer` extension that exports FlashMLA's dense_decode_fwd; every row then carries the peer's time, its replays and ours in turn.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from kvfold.cache.latent import CacheType
from kvfold.kernels import mla_decode as decode
from kvfold.kernels import mla_prefill as prefill
from kvfold.kernels.cached_blocks import Blocks, append_blocks

LATENT, KV_LORA, PAGE = 576, 512, 64
L2_BYTES = 320e6
DEVICE = "cuda"
SCALE = 1 / math.sqrt(192)


class Batch:
    """Queries, page lists and lengths for one decode step over a shared pool, `turns` times with other pages."""

    def __init__(
        self, pool: torch.Tensor, heads: int, kv_lens: list[int], s_q: int, turns: int | None = None,
        blocks: Blocks | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.heads, self.kv_lens, self.s_q, self.blocks = pool, heads, kv_lens, s_q, blocks
        self.row_bytes = pool.shape[2] * pool.element_size()
        batch = len(kv_lens)
        counts = [math.ceil(n / PAGE) for n in kv_lens]
        if turns is None:
            turns = max(1, math.ceil(L2_BYTES / (sum(kv_lens) * self.row_bytes)))
        turns = min(turns, pool.shape[0] // max(sum(counts), 1)) or 1
        pages = torch.randperm(pool.shape[0], device=DEVICE, dtype=torch.int32)
        self.pages = [pages[t * sum(counts) : (t + 1) * sum(counts)] for t in range(turns)]
        starts = [sum(counts[:i]) for i in range(batch + 1)]
        self.page_starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        self.lengths = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
        dtype = torch.bfloat16 if blocks else pool.dtype
        self.q = [torch.randn(batch * s_q, heads, LATENT, device=DEVICE).to(dtype) for _ in range(turns)]
        self.out = torch.full((batch * s_q, heads, KV_LORA), float("nan"), device=DEVICE, dtype=dtype)
        self.workspace = decode.DecodeWorkspace(batch, s_q, heads, KV_LORA, DEVICE)
        # FlashMLA's table: one padded row of pages a sequence
        width = max(counts)
        self.tables = []
        for chosen in self.pages:
            table = torch.zeros(batch, width, dtype=torch.int32, device=DEVICE)
            for i in range(batch):
                table[i, : counts[i]] = chosen[starts[i] : starts[i + 1]]
            self.tables.append(table)

    def launches(self, form: decode.Form | None) -> list[Callable[[], None]]:
        decode.schedule_decode(self.lengths, self.workspace)
        torch.cuda.synchronize()  # mla_decode reads the schedule before it waits, and `captured` has a stream of its own

        def one(turn: int) -> Callable[[], None]:
            def call() -> None:
                decode.mla_decode(
                    self.q[turn], self.pool, self.pages[turn], self.page_starts, self.lengths, self.out,
                    self.workspace, scale=SCALE, kv_lora=KV_LORA, blocks=self.blocks, form=form,
                )  # fmt: skip

            return call

        return [one(t) for t in range(len(self.pages))]

    def peer_launches(self, peer: Any) -> list[Callable[[], None]]:
        cache = self.pool.view(-1, PAGE, 1, LATENT)
        metadata = splits = None
        calls = []
        for turn, table in enumerate(self.tables):
            q = self.q[turn].view(len(self.kv_lens), self.s_q, self.heads, LATENT)

            def call(q: torch.Tensor = q, table: torch.Tensor = table) -> None:
                nonlocal metadata, splits
                _, _, metadata, splits = peer.dense_decode_fwd(
                    q, cache, KV_LORA, self.lengths, table, SCALE, True, metadata, splits
                )

            calls.append(call)
        return calls

    @property
    def num_bytes(self) -> int:
        rows = len(self.kv_lens) * self.s_q * self.heads
        return sum(self.kv_lens) * self.row_bytes + rows * (LATENT + KV_LORA) * 2

    @property
    def flops(self) -> int:
        return 2 * self.s_q * self.heads * sum(self.kv_lens) * (LATENT + KV_LORA)

    def expected(self) -> torch.Tensor:
        """Turn 0 in float64, sequence after sequence."""
        rows = []
        start = 0
        for b, length in enumerate(self.kv_lens):
            count = math.ceil(length / PAGE)
            keys = self.pool[self.pages[0][start : start + count].long()].flatten(0, 1)[:length].double()
            start += count
            for i in range(self.s_q):
                seen = keys[: max(length - self.s_q + 1 + i, 0)]
                weights = torch.softmax(self.q[0][b * self.s_q + i].double() @ seen.T * SCALE, -1)
                rows.append(weights @ seen[:, :KV_LORA])
        return torch.stack(rows)


def captured(calls: list[Callable[[], None]], least: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of at least so many of the calls in turn, replayed once, and how many there are."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    launches = calls * math.ceil(least / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in launches:
            call()
    graph.replay()
    return graph, len(launches)


def timed(
    *forms: list[Callable[[], None]], replays: int = 5, seconds: float = 0.3, launches: int = 20
) -> list[float]:
    """Microseconds of one call of each form. Their graphs are replayed in turn, `replays` times or as many more, up to
    20, as fit in `seconds`; medians."""
    graphs = [captured(calls, launches) for calls in forms]
    times: list[list[float]] = [[] for _ in forms]
    begun = time.monotonic()
    while len(times[0]) < replays or (len(times[0]) < 20 and time.monotonic() - begun < seconds):
        for (graph, count), found in zip(graphs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / count)
    return [statistics.median(found) for found in times]


def random_pool(num_tokens: int, dtype: torch.dtype = torch.bfloat16, blocks: Blocks | None = None) -> torch.Tensor:
    num_pages = math.ceil(num_tokens / PAGE)
    if blocks:
        width = CacheType(blocks).columns(LATENT)
        pool = torch.empty(num_pages, PAGE, width, dtype=torch.uint8, device=DEVICE)
        for piece in pool.flatten(0, 1).split(1 << 17):
            slots = torch.arange(len(piece), device=DEVICE)
            append_blocks(torch.randn(len(piece), LATENT, device=DEVICE), slots, piece, blocks)
        return pool
    pool = torch.empty(num_pages, PAGE, LATENT, dtype=dtype, device=DEVICE)
    for piece in pool.split(1 << 14):
        piece.normal_()
    return pool


CASES: dict[str, list[tuple[int, list[int], int]]] = {  # heads, lengths, s_q
    "few": [
        (16, [1, 63, 64, 65, 4097], 1), (16, [8192], 1), (16, [65536, 100, 0, 3000], 1), (5, [1, 65, 129], 1),
        (16, [4097, 1, 63, 130, 777], 2), (8, [65, 1000], 4), (16, [1000 + 61 * i for i in range(150)], 1), (1, [5], 1),
    ],
    "many": [
        (128, [1, 63, 64, 65, 4097], 1), (128, [8192], 1), (128, [65536, 100, 0, 3000], 1), (40, [65, 1000, 129], 1),
        (128, [4097, 1, 63, 130, 777], 2), (64, [129], 1), (128, [1000 + 61 * i for i in range(150)], 1),
        (16, [65, 4000], 4),
    ],
}  # fmt: skip


LARGE_POOL = 60_000 * PAGE  # tokens: 2.2e9 numbers, more than an int32 counts


def check(kind: str) -> bool:
    """Every case against float64, the last one in a pool of more than 2^31 numbers."""
    form: decode.Form = "triton" if kind == "triton" else "gluon"
    cases = CASES["few"][:5] + CASES["many"][:5] if kind == "triton" else CASES[kind]
    fine = True
    for dtype, tolerance in ((torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        for heads, kv_lens, s_q in cases:
            num_tokens = sum(kv_lens) + 64 * (len(kv_lens) + 20)
            fine &= check_case(form, dtype, heads, kv_lens, s_q, num_tokens, tolerance)
    heads, kv_lens, s_q = cases[0]
    return fine & check_case(form, torch.bfloat16, heads, kv_lens, s_q, LARGE_POOL, 4e-3)


def check_case(
    form: decode.Form,
    dtype: torch.dtype,
    heads: int,
    kv_lens: list[int],
    s_q: int,
    num_tokens: int,
    tolerance: float,
) -> bool:
    """Outputs and partials poisoned, unused slots and pages NaN, pages anywhere in the pool. Twelve runs."""
    pool = torch.full((math.ceil(num_tokens / PAGE), PAGE, LATENT), float("nan"), dtype=dtype, device=DEVICE)
    batch = Batch(pool, heads, kv_lens, s_q, turns=1)
    start = 0
    for length in kv_lens:
        count = math.ceil(length / PAGE)
        for i, page in enumerate(batch.pages[0][start : start + count].tolist()):
            pool[page, : min(length - i * PAGE, PAGE)].normal_()
        start += count
    expected = batch.expected()
    errors = []
    for _ in range(12):
        batch.out.fill_(float("nan"))
        batch.workspace.partial.fill_(float("nan"))
        batch.workspace.partial_lse.fill_(float("nan"))
        batch.launches(form)[0]()
        out = batch.out.double()
        row_error = (out - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-3)
        errors.append(row_error.nan_to_num(nan=9.0).max().item())
    good = max(errors) < 4 * tolerance
    shown = kv_lens if len(kv_lens) < 8 else f"{len(kv_lens)} lengths"
    print(
        f"{'ok ' if good else 'BAD'} {form} {str(dtype)[6:]} heads {heads} s_q {s_q} lens {shown} of {num_tokens} tokens: "
        f"worst row {min(errors):.2e} .. {max(errors):.2e}",
        flush=True,
    )
    return good


@triton.jit
def _sum_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * 16 + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(16):
        total += tl.load(x + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def check_prefill() -> bool:
    """Rows over cached prefixes, in one run of keys and in two merged ones, results and their logarithms, against float64."""
    fine = True
    for rows, cached, heads in ((300, 0, 16), (64, 1000, 5), (1, 4097, 16), (1030, 65, 128), (512, 8000, 16)):
        q, k_nope, k_rope, v = prefill_inputs(rows, rows + cached, heads)
        keys = rows + cached
        k = torch.cat([k_nope, k_rope.expand(-1, heads, -1)], -1).double()
        score = torch.einsum("rhd,khd->hrk", q.double(), k) * SCALE
        sees = cached + torch.arange(rows, device=DEVICE)[:, None]
        score = score.masked_fill(torch.arange(keys, device=DEVICE)[None] > sees, float("-inf"))
        expected = torch.einsum("hrk,khv->rhv", score.softmax(-1), v.double())
        expected_lse = score.logsumexp(-1)
        kinds: tuple[tuple[prefill.Form, torch.dtype], ...] = (
            ("gluon", torch.float32), ("gluon", torch.bfloat16), ("triton", torch.float32)
        )  # fmt: skip
        for (form, dtype), bounds in itertools.product(kinds, ((0, keys), (0, keys // 3, keys))):
            out = torch.full((rows, heads, 128), float("nan"), device=DEVICE, dtype=dtype)
            lse = torch.full((heads, rows), float("nan"), device=DEVICE)
            for first, last in itertools.pairwise(bounds):
                prefill.mla_prefill(
                    q, k_nope[first:last], k_rope[first:last], v[first:last], out, lse, scale=SCALE,
                    first_row=cached, first_key=first, merge=first > 0, form=form,
                )  # fmt: skip
            row_error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
            worst = row_error.nan_to_num(nan=9.0).max().item()
            lse_error = (lse.double() - expected_lse).abs().nan_to_num(nan=9.0).max().item()
            good = worst < 1.6e-2 and lse_error < 1e-4
            fine &= good
            print(
                f"{'ok ' if good else 'BAD'} {form} prefill {rows}+{cached} h{heads} {bounds} into {str(dtype)[6:]}: "
                f"{worst:.2e}, logarithm {lse_error:.1e}",
                flush=True,
            )
    return fine


def prefill_inputs(rows: int, keys: int, heads: int) -> tuple[torch.Tensor, ...]:
    """q, k_nope, k_rope, v in bf16; k_nope and v side by side as expansion leaves them."""
    q = torch.randn(rows, heads, 192, device=DEVICE, dtype=torch.bfloat16)
    expanded = torch.randn(keys, heads, 256, device=DEVICE, dtype=torch.bfloat16)
    k_rope = torch.randn(keys, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    return q, expanded[..., :128], k_rope, expanded[..., 128:]


PREFILL_SHAPES = [  # heads, rows, cached keys before them
    *((heads, rows, 0) for rows in (2048, 4096, 8192, 16384) for heads in (16, 128)),
    *((16, rows, cached) for cached in (8192, 32256) for rows in (64, 256, 512)),
    (128, 512, 7680),
]  # fmt: skip


def time_prefill(fa3: Path | None, form: prefill.Form | None = None) -> Iterator[dict[str, Any]]:
    """Prompts without a prefix beside cuDNN's attention and, with its library, FlashAttention-3, and rows over a cached
    prefix beside the latter, on the same numbers. The peers' keys are joined to 192 numbers beforehand, untimed."""
    if fa3 is not None:
        torch.ops.load_library(str(fa3))
    for heads, num_rows, cached in PREFILL_SHAPES:
        num_keys = num_rows + cached
        turns = [prefill_inputs(num_rows, num_keys, heads) for _ in range(2)]
        joined = [
            (q[None], torch.cat([k_nope, k_rope.expand(-1, heads, -1)], -1)[None], v.contiguous()[None])
            for q, k_nope, k_rope, v in turns
        ]
        out = torch.empty(num_rows, heads, 128, device=DEVICE, dtype=torch.bfloat16)
        lse = torch.empty(heads, num_rows, device=DEVICE)
        ours = functools.partial(
            prefill.mla_prefill,
            out=out,
            lse=lse,
            scale=SCALE,
            first_row=cached,
            first_key=0,
            merge=False,
            form=form,
        )
        forms = [[functools.partial(ours, *turn) for turn in turns]]
        peers = []
        if fa3 is not None:
            peers.append("FlashAttention-3")
            flash = functools.partial(torch.ops.flash_attn_3.fwd, softmax_scale=SCALE, is_causal=True)
            forms.append([functools.partial(flash, *turn) for turn in joined])
        if cached == 0:
            peers.append("cuDNN SDPA")
            heads_first = [[x.transpose(1, 2).contiguous() for x in turn] for turn in joined]
            forms.append([functools.partial(cudnn_attention, *turn) for turn in heads_first])
        flops = 2 * heads * 320 * (num_rows * cached + num_rows * num_rows // 2)
        # Once each: queries and results of 320 numbers a head, keys of 128 and 64 shared ones, values of 128, log-sum-exps.
        num_bytes = 2 * (num_rows * heads * 320 + num_keys * (heads * 256 + 64)) + 4 * num_rows * heads
        launches = max(2, min(20, int(3e-3 * 500e12 / flops)))  # 3 ms a replay at 500 TF
        us, *peers_us = timed(*forms, replays=20, launches=launches)
        for peer, peer_us in zip(peers, peers_us, strict=True):
            row = {
                "kernel": f"mla_prefill {form or 'auto'}", "heads": heads, "batch": 1, "keys": num_keys, "s_q": num_rows,
                "us": round(us, 1), "gbps": round(num_bytes / us / 1e3), "tflops": round(flops / us / 1e6, 1),
                "peer": peer, "peer_us": round(peer_us, 1), "ratio": round(peer_us / us, 3),
            }  # fmt: skip
            print(row, flush=True)
            yield row


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)


def sweep_keys(heads: int, form: decode.Form | None) -> dict[str, Any]:
    """Batch 1 at every length from 1k to 64k in steps of 64, one captured graph: only lengths and schedule change.

    `dips` lists the lengths whose time lies more than 5 % and more than a tile's time above the line through their
    neighbours; each is then measured 5 times again, with its neighbours, and stays only if the median of those does.
    `humps` has what no neighbour shows: first and last length of each stretch that takes 5 % longer than some longer one.
    """
    pool = random_pool(64 * 65536 + 64)
    batch = Batch(pool, heads, [65536], 1, turns=64)  # 1k keys of 64 lists are 75 MB: past L2
    calls = batch.launches(form)
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def time_of(keys: int) -> float:
        batch.lengths.fill_(keys)
        decode.schedule_decode(batch.lengths, batch.workspace)
        times = []
        for _ in range(3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(times)

    points = {keys: time_of(keys) for keys in range(1024, 65536 + 1, PAGE)}
    tiles_of_a_part = 512 / batch.workspace.num_parts  # more at 64k than at 32k
    tile_us = (points[65536] - points[32768]) / tiles_of_a_part

    def excess(before: float, here: float, after: float) -> float:
        line = (before + after) / 2
        return here - line - max(0.05 * line, tile_us)

    flagged = [
        keys
        for keys in range(1024 + PAGE, 65536, PAGE)
        if excess(points[keys - PAGE], points[keys], points[keys + PAGE]) > 0
    ]
    dips = [
        keys
        for keys in flagged
        if statistics.median(excess(*(time_of(keys + d) for d in (-PAGE, 0, PAGE))) for _ in range(5)) > 0
    ]
    humps: list[tuple[int, int]] = []
    fastest = math.inf  # of the longer ones
    for keys, us in reversed(points.items()):
        if us > 1.05 * fastest:
            last = humps.pop()[1] if humps and humps[-1][0] == keys + PAGE else keys
            humps.append((keys, last))
        fastest = min(fastest, us)
    return {
        "heads": heads, "tile_us": round(tile_us, 2), "flagged": flagged, "dips": dips, "humps": humps[::-1],
        "keys_us": [(keys, round(us, 2)) for keys, us in points.items()],
    }  # fmt: skip


def limits() -> dict[str, int]:
    """The card's ceilings: read-only bandwidth over 4 GiB (GB/s), cuBLAS's rate at 8192^3 in bf16 (TF)."""
    x = torch.randn(1 << 30, device=DEVICE)
    programs = x.numel() // (16 * 2048)
    out = torch.empty(programs, device=DEVICE)
    (read_us,) = timed([lambda: _sum_kernel[(programs,)](x, out, BLOCK=2048, num_warps=8)])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    (matmul_us,) = timed([lambda: torch.mm(a, b, out=c)])
    return {
        "read_gbps": round(4 * (1 << 30) / read_us / 1e3),
        "cublas_tflops": round(2 * 8192**3 / matmul_us / 1e6),
    }


def measure(batch: Batch, label: str, keys: int, form: decode.Form | None, peer: Any) -> dict[str, Any]:
    forms = [batch.launches(form)] + ([batch.peer_launches(peer)] if peer is not None else [])
    ours, *theirs = timed(*forms, replays=20)
    row: dict[str, Any] = {
        "kernel": label, "heads": batch.heads, "batch": len(batch.kv_lens), "keys": keys, "s_q": batch.s_q,
        "us": round(ours, 2), "gbps": round(batch.num_bytes / ours / 1e3), "tflops": round(batch.flops / ours / 1e6, 1),
    }  # fmt: skip
    if theirs:
        row.update(peer="FlashMLA", peer_us=round(theirs[0], 2), ratio=round(theirs[0] / ours, 3))
    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def count(text: str) -> int:
    """At least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1 is expected")
    return number


def file_to_write(text: str) -> Path:
    """Refused before the first measurement, not when its result is to be written."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder")
    return path


def arguments() -> argparse.Namespace:
    """Of the command line. Ends with code 2 for what cannot be measured; `shapes` are those of `time`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("kind", choices=["few", "many", "triton", "prefill"])
    sweep, prompts, timing = (commands.add_parser(name) for name in ("sweep", "prefill", "time"))
    sweep.add_argument("--heads", type=count, nargs="+", default=[16, 128])
    sweep.add_argument("--out", type=file_to_write, required=True)
    prompts.add_argument("--out", type=file_to_write, required=True)
    prompts.add_argument("--fa3", type=Path, help="library that registers torch.ops.flash_attn_3, run in turn")
    for parser_of_rows in (prompts, timing):
        parser_of_rows.add_argument(
            "--no-limits", action="store_true", help="do not measure the card's ceilings first"
        )
    timing.add_argument("--heads", type=count, nargs="+", default=[16, 128])
    timing.add_argument("--batches", type=count, nargs="+", default=[1, 4, 16, 64, 128])
    timing.add_argument("--keys", type=count, nargs="+", default=[1024, 4096, 8192, 16384, 32768, 65536])
    timing.add_argument("--s-q", type=count, nargs="+", default=[1])
    timing.add_argument("--form", choices=["triton", "gluon"])
    timing.add_argument("--blocks", choices=["q8_0", "fp8"], help="the format of the cache; left out: bf16")
    timing.add_argument("--ragged", action="store_true", help="lengths from 1 to twice --keys in one batch")
    timing.add_argument("--max-tokens", type=count, default=1 << 22, help="shapes with more tokens are left out")
    timing.add_argument("--peer", type=Path)
    timing.add_argument("--seconds", type=float, default=600, help="no shape is begun after this many")
    timing.add_argument("--out", type=file_to_write)
    args = parser.parse_args()
    if args.command == "prefill" and args.fa3 is not None and not args.fa3.is_file():
        prompts.error(f"--fa3: there is no file {args.fa3}")
    if args.command == "time":
        if args.form == "gluon" and args.blocks not in decode.GLUON_BLOCKS:
            timing.error(f"--form gluon reads no {args.blocks}: leave --form out, or use --form triton")
        if args.peer is not None and args.blocks is not None:
            timing.error(f"--peer reads no {args.blocks}: leave --blocks out, or --peer")
        if args.peer is not None and PathFinder.find_spec("flash_peer", [str(args.peer)]) is None:
            timing.error(f"--peer: there is no flash_peer in {args.peer}")
        args.shapes = [
            shape
            for shape in itertools.product(args.heads, args.s_q, args.batches, args.keys)
            if shape[2] * shape[3] <= args.max_tokens
        ]
        if not args.shapes:
            timing.error(f"every shape of --batches and --keys has more tokens than --max-tokens {args.max_tokens}")
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed, and torch finds none")
    is_gluon = args.kind != "triton" if args.command == "check" else args.command == "time" and args.form == "gluon"
    if is_gluon and (found := torch.cuda.get_device_capability()) != (9, 0):
        parser.error(
            f"kernels in Gluon are for compute capability 9.0 (Hopper), and this GPU has {found[0]}.{found[1]}"
        )
    return args


def main() -> int:
    args = arguments()
    begun = time.monotonic()
    torch.manual_seed(0)
    if args.command == "check":
        fine = check_prefill() if args.kind == "prefill" else check(args.kind)
        return 0 if fine else 1
    stamp: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}",
        "command": " ".join(sys.argv),
    }
    if args.command == "sweep":
        found = []
        for heads in args.heads:
            found.append(stamp | sweep_keys(heads, None))
            print({name: value for name, value in found[-1].items() if name != "keys_us"}, flush=True)
            args.out.write_text(json.dumps(found) + "\n")
        return 0
    if not args.no_limits:
        stamp |= limits()
        print(stamp, flush=True)
    if args.command == "prefill":
        rows = []
        for row in time_prefill(args.fa3):
            rows.append(stamp | row)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
        return 0
    peer = None
    if args.peer is not None:
        sys.path.insert(0, str(args.peer))
        import flash_peer as peer
    rows = []
    most = max(batch * (keys + 64) * (2 if args.ragged else 1) for _, _, batch, keys in args.shapes)
    pool = random_pool(max(most, int(L2_BYTES / LATENT)), blocks=args.blocks)
    for heads, s_q, size, keys in args.shapes:
        if time.monotonic() - begun > args.seconds:
            break
        kv_lens = [keys] * size
        if args.ragged:
            kv_lens = [1 + int(x) for x in torch.rand(size) * (2 * keys - 1)]
        batch = Batch(pool, heads, kv_lens, s_q, blocks=args.blocks)
        label = f"mla_decode {args.form or 'auto'} {args.blocks or 'bf16'}{' ragged' if args.ragged else ''}"
        rows.append(stamp | measure(batch, label, keys, args.form, peer))
        if args.out is not None:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
