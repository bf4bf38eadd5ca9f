"""Results as llama-bench's JSON rows, with ours beside its fields, and as a table in Markdown."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvfold import __version__
from kvfold.backends.choose import OnDevice
from kvfold.backends.profile import merged
from kvfold.bench import profile
from kvfold.bench.measure import PEAKS, Case, Sample
from kvfold.bench.profile import lines_of
from kvfold.bench.sweep import Result
from kvfold.bench.work import num_weights
from kvfold.formats.checkpoint import Checkpoint
from kvfold.mla.plan import Fa, Mla
from kvfold.quant.tensor import matrices


def row(result: Result) -> dict[str, Any]:
    """One row: the fields of llama-bench that mean something here, under its names, then ours.

    Of llama-bench's: avg_* and stddev_* are over the samples, -1 in flash_attn and mla_attn (ik_llama.cpp's field)
    means auto, n_ubatch is n_batch because a window of rows is one step, use_mmap is whether the weights lay in the map of
    their file.

    Ours: `weights` says where they lay, and of a copy which share on 2 MiB pages. Rates and shares are those of `bound_by`, multiply-adds for prompts ("int8", on a GPU "bf16" or "f32"), bytes
    "read" for generation; a share is a sample's rate over the ceiling measured beside it, and `share` the median of them. token_ms and
    read_ms pool all generated tokens, and all reads of a token's weights that were made between them. ratio_to_best is
    the median over the rounds of ours over the fastest opponent's. is_cut: an interrupt or an error came before
    the last sample.
    """
    loaded, settings, case = result.loaded, result.variant.settings, result.case
    ns = [sample.run.ns for sample in result.samples]
    shares = shares_of(result)
    gpu_name = loaded.backend.device_name if isinstance(loaded.backend, OnDevice) else ""
    values: dict[str, Any] = {
        "build_commit": f"kvfold {__version__}",
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": gpu_name,
        "backends": "CUDA" if gpu_name else "CPU",
        "model_filename": str(loaded.checkpoint.path),
        "model_type": model_type(loaded.checkpoint),
        "model_size": loaded.checkpoint.nbytes,
        "model_n_params": num_weights(loaded.checkpoint.tensors),
        "n_batch": result.variant.batch_rows,
        "n_ubatch": result.variant.batch_rows,
        "n_threads": settings.threads,
        "use_mmap": bool(loaded.checkpoint.maps),
        "type_k": settings.cache_type.value,
        "type_v": settings.cache_type.value,
        "n_gpu_layers": loaded.model.config.num_layers if gpu_name else 0,
        "flash_attn": -1 if settings.fa is Fa.AUTO else int(settings.fa.value),
        "mla_attn": -1 if settings.mla is Mla.AUTO else int(settings.mla.value),
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.mean(ns)),
        "stddev_ns": round(deviation(ns)),
        "avg_ts": statistics.mean(result.samples_ts),
        "stddev_ts": deviation(result.samples_ts),
        "samples_ns": ns,
        "samples_ts": list(result.samples_ts),
        "median_ts": statistics.median(result.samples_ts),
        "is_cut": result.is_cut,
        "backend": loaded.backend.name,
        "isa": loaded.isa,
        "dtype": loaded.dtype,
        "workspace_bytes": loaded.settings.workspace_bytes,  # of the default, what its threads need
        "deterministic": settings.deterministic,
        "weights": loaded.weight_place,
        "layers": loaded.model.config.num_layers,
        "plan": plans_of(result),
        "bound_by": bound_by(result),
        "multiply_adds": result.samples[0].run.multiply_adds,
        "bytes_read": result.samples[0].run.nbytes,
        "ceilings": ceilings_of(result),
        "share": statistics.median(shares),
        "samples_share": shares,
        "disk_reads": [asdict(sample.disk) for sample in result.samples if sample.disk],
        "discarded": [asdict(sample) for sample in result.discarded],
    }
    if case.n_gen:
        values["token_ms"] = quantiles(ns for sample in result.samples for ns in sample.run.token_ns)
        values["read_ms"] = quantiles(ns for sample in result.samples for ns in sample.ceilings.read_ns)
    if result.variant.settings.profile:
        beside = [sample.ceilings for sample in result.samples]
        values["profile"] = lines_of(merged([sample.profile for sample in result.samples]), beside)
    if result.pairs:
        values["opponents"] = [asdict(pairs) | {"median_ratio": pairs.median_ratio} for pairs in result.pairs]
        values["ratio_to_best"] = result.ratio_to_best
    return values


def bound_by(result: Result) -> str:
    """The ceiling that a case is compared with; a GPU multiplies prompts in the compute type."""
    if not result.case.n_prompt:
        return "read"
    if isinstance(result.loaded.backend, OnDevice):
        return "f32" if result.variant.settings.dtype == "float32" else "bf16"
    return "int8"


def shares_of(result: Result) -> list[float]:
    """Of each sample: its rate over the ceiling measured beside it."""

    def share(sample: Sample) -> float:
        run, ceilings = sample.run, sample.ceilings
        if result.case.n_prompt:
            return 1e9 * run.multiply_adds / run.ns / ceilings.multiply_adds[bound_by(result)]
        return 1e9 * run.nbytes / run.ns / ceilings.read_rate

    return [share(sample) for sample in result.samples]


def ceilings_of(result: Result) -> dict[str, dict[str, Any]]:
    """Median and best of all measured beside the samples: giga multiply-adds a second, and gigabytes a second."""
    beside = [sample.ceilings for sample in result.samples]
    found: dict[str, dict[str, Any]] = {}
    for kind in PEAKS:
        rates = [ceilings.multiply_adds[kind] / 1e9 for ceilings in beside]
        if max(rates):
            isa = result.peak_isa[kind]
            found[kind] = {"gmacs": statistics.median(rates), "best_gmacs": max(rates), "isa": isa}
    reads = [ceilings.read_rate / 1e9 for ceilings in beside]
    found["read"] = {"gbs": statistics.median(reads), "best_gbs": max(reads), "bytes": beside[0].read_bytes}
    return found


def plans_of(result: Result) -> list[dict[str, Any]]:
    """The plans of all steps of a sample: path, form and how many steps took them, with the reason of the last."""
    plans = result.samples[0].run.plans
    counts = Counter((plan.path, plan.fused) for plan in plans)
    reasons = {(plan.path, plan.fused): plan.reason for plan in plans}
    return [
        {"path": path.name.lower(), "fused": fused, "steps": steps, "reason": reasons[path, fused]}
        for (path, fused), steps in counts.items()
    ]


def quantiles(ns: Iterable[int]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, and how far they are apart."""
    p50, p99 = np.percentile(np.fromiter(ns, np.float64), [50, 99]) / 1e6
    return {"p50": float(p50), "p99": float(p99), "p99_over_p50": float(p99 / p50)}


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value, as llama-bench has it."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def model_type(checkpoint: Checkpoint) -> str:
    """Family, and the type that holds most of the weights: "deepseek-v2 IQ4_NL"."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        for part in matrices(tensor):
            sizes[part.type.name_in_file] += part.nbytes
    return f"{checkpoint.config.family} {sizes.most_common(1)[0][0]}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --- Markdown --------------------------------------------------------------------------------------------------------

_MACHINE = ("model", ">size", ">params", "backend", ">threads")
_BATCH = (">n_batch",)  # where it varies, as llama-bench has it
_COLUMNS = (
    "type_k",
    ">mla",
    ">fa",
    "path",
    ">test",
    ">t/s",
    ">of ceiling",
)
_TIMES = (">p99/p50", ">of reads")
_AGAINST = (">opponents t/s", ">ratio to the best")


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of llama-bench's columns and the share of the ceiling, and what was measured beside it, line by line."""
    has_times, has_pairs = (any(field in row for row in rows) for field in ("token_ms", "opponents"))
    has_batches = len({row["n_batch"] for row in rows}) > 1
    columns = (
        *_MACHINE,
        *(_BATCH if has_batches else ()),
        *_COLUMNS,
        *(_TIMES if has_times else ()),
        *(_AGAINST if has_pairs else ()),
    )
    cells = [
        [
            *_machine(row),
            *([str(row["n_batch"])] if has_batches else ()),
            *_cells(row),
            *(_times(row) if has_times else ()),
            *(_against(row) if has_pairs else ()),
        ]
        for row in rows
    ]
    yield from profile.table(columns, cells)
    yield ""
    for threads in dict.fromkeys(row["n_threads"] for row in rows):
        yield _ceilings_line(threads, [row for row in rows if row["n_threads"] == threads])
    yield from _remarks(rows)
    for row in rows:
        if "profile" in row:
            yield ""
            yield f"profile of {_name(row)}, {row['n_threads']} threads"
            yield from profile.markdown(row["profile"])
    machine = ", ".join(name for name in (rows[0]["gpu_info"], rows[0]["cpu_info"]) if name)
    yield f"build: {rows[0]['build_commit']}, {machine}"


def _machine(row: dict[str, Any]) -> list[str]:
    return [
        row["model_type"],
        _in_units(row["model_size"], (2**30, "GiB"), (2**20, "MiB")),
        _in_units(row["model_n_params"], (10**9, "B"), (10**6, "M")),
        row["backend"],
        str(row["n_threads"]),
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["type_k"],
        _setting(row["mla_attn"]),
        _setting(row["flash_attn"]),
        " + ".join(dict.fromkeys(plan["path"] for plan in row["plan"])),
        _name(row),
        f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        f"{100 * row['share']:.1f} % of {row['bound_by']}",
    ]


def _times(row: dict[str, Any]) -> list[str]:
    """Of a generated token, and of reading the weights of one."""
    if "token_ms" not in row:
        return ["", ""]
    return [f"{row[field]['p99_over_p50']:.2f}" for field in ("token_ms", "read_ms")]


def _against(row: dict[str, Any]) -> list[str]:
    if "opponents" not in row:
        return ["", ""]
    theirs = [one["samples_ts"] for one in row["opponents"]]
    rates = [f"{statistics.mean(samples):.2f} ± {deviation(samples):.2f}" for samples in theirs]
    return [", ".join(rates), f"{row['ratio_to_best']:.2f} x"]


def _in_units(value: int, large: tuple[int, str], small: tuple[int, str]) -> str:
    size, unit = large if value >= large[0] else small
    return f"{value / size:.2f} {unit}"


def _setting(value: int) -> str:
    return "auto" if value == -1 else str(value)


def _name(row: dict[str, Any]) -> str:
    return Case(row["n_prompt"], row["n_gen"], row["n_depth"]).name


def _ceilings_line(threads: int, rows: list[dict[str, Any]]) -> str:
    """Medians over all rows of what was measured beside their samples."""
    parts = []
    for kind in PEAKS:
        found = [row["ceilings"][kind] for row in rows if kind in row["ceilings"]]
        if found:
            rate = statistics.median(one["gmacs"] for one in found)
            parts.append(
                f"{kind} {rate:.0f} GMAC/s ({found[0]['isa']}, best {max(f['best_gmacs'] for f in found):.0f})"
            )
    reads = [row["ceilings"]["read"] for row in rows]
    rate = statistics.median(one["gbs"] for one in reads)
    parts.append(f"read {rate:.1f} GB/s (best {max(one['best_gbs'] for one in reads):.1f})")
    where = rows[0]["gpu_info"] or f"{threads} threads"
    return f"ceilings of {where}, measured beside the samples: {', '.join(parts)}"


def _remarks(rows: list[dict[str, Any]]) -> Iterator[str]:
    if any("token_ms" in row for row in rows):
        yield "p99/p50: of the times of generated tokens; of reads: of reading the weights of a token in the same run"
    for number, row in enumerate(rows, 1):
        if row["is_cut"]:
            yield f"row {number}, {_name(row)}: cut short, samples: {len(row['samples_ts'])}"
        if row["discarded"]:
            yield f"row {number}, {_name(row)}: {len(row['discarded'])} samples discarded, the disk was read meanwhile"
        if row["disk_reads"]:
            kept = len(row["disk_reads"])
            yield f"row {number}, {_name(row)}: {kept} samples count although the disk was read: it always is"
