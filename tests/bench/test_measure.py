"""Samples: what is run, what counts, what is cached before, and the ceilings measured beside them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvfold import _native
from kvfold.bench.measure import (
    MOST_DISCARDED,
    READ_EVERY,
    Case,
    Ceilings,
    DiskReads,
    Rig,
    Run,
    ceilings_now,
    context_for,
    disk_reads,
    undisturbed,
)
from kvfold.bench.report import markdown, row
from kvfold.bench.sweep import Result, Variant
from kvfold.cache.latent import decode
from kvfold.formats.checkpoint import Checkpoint
from kvfold.formats.synthetic import SHAPES, synthetic_checkpoint
from kvfold.load import Loaded, Settings, load
from kvfold.mla.plan import Path, multiply_adds
from kvfold.model.step import Step, StepRun


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return synthetic_checkpoint(SHAPES["tiny"])


def rig(checkpoint: Checkpoint, cases: list[Case], *, batch_rows: int = 2048, **settings: str) -> Rig:
    chosen = Settings.parse(threads=1, n_ctx=context_for(cases), backend="native", **settings)
    return Rig(load(checkpoint, chosen), cases, batch_rows=batch_rows)


# --- what is run ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_run_in_windows_and_counted(checkpoint: Checkpoint) -> None:
    case = Case(50, 0, 70)
    run = rig(checkpoint, [case], batch_rows=32, mla="1").run(case)  # auto: by the rates of the processor
    mla = checkpoint.config.mla
    assert [plan.path for plan in run.plans] == [Path.ABSORBED, Path.ABSORBED]
    attention = 2 * (multiply_adds(Path.ABSORBED, mla, 32, 70) + multiply_adds(Path.ABSORBED, mla, 18, 102))
    hidden, experts = 256, 2 + 1
    before, out = hidden * 256 + 256 * 4 * 192 + hidden * 576, 4 * 128 * hidden
    dense, mixture = 3 * hidden * 512, experts * 3 * hidden * 256 + 8 * hidden
    once = out + mixture + 1024 * hidden  # behind the last attention, and the head
    assert run.multiply_adds == 50 * (2 * before + out + dense) + once + attention
    assert run.nbytes == 0 and run.token_ns == ()
    assert run.ns > 0


def test_generated_tokens_are_timed_one_by_one_and_their_bytes_counted(checkpoint: Checkpoint) -> None:
    case = Case(0, 5, 100)
    found = rig(checkpoint, [case], cache_type="bf16")
    run = found.run(case)
    assert len(run.plans) == len(run.token_ns) == 5
    assert sum(run.token_ns) == run.ns
    assert {plan.path for plan in run.plans} == {Path.ABSORBED}
    cached = 101 + 102 + 103 + 104 + 105
    assert run.nbytes == 5 * found.meter.weights.nbytes + cached * 2 * 576 * 2


@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("mla", ["auto", "0"])
def test_every_row_of_the_depth_is_random_and_no_case_changes_them(
    checkpoint: Checkpoint, mla: str, cache_type: str
) -> None:
    cases = [Case(0, 3, 0), Case(30, 0, 150), Case(0, 3, 100)]
    found = rig(checkpoint, cases, mla=mla, cache_type=cache_type)
    cache = found.loaded.cache
    for array in cache.arrays:
        untouched = [page for page in range(array.shape[1]) if page not in found._deep]
        array[:, untouched] = 0

    def rows(pages: list[int]) -> np.ndarray:
        return decode(cache.arrays[0][:, pages], cache.layout.cache_type)

    before = rows(found._deep)
    assert abs(before.mean()) < 0.02 and abs(before.std() - 1) < 0.02
    assert len(np.unique(before[:, :, :, 0])) > before[:, :, :, 0].size // 2  # rows differ
    for case in cases:
        found.run(case)
    assert np.array_equal(rows(found._deep), before)
    # 100 = one deep page and 36 rows of the first tail page, behind which the three tokens were written
    tail = rows(found._tail[:1])[:, 0]
    assert (np.abs(tail[:, :39]).max(axis=-1) > 0).all()


def test_the_context_holds_the_depth_and_the_longest_case() -> None:
    assert context_for([Case(512, 0, 0)]) == 512
    assert context_for([Case(0, 1, 64)]) == 128
    assert context_for([Case(0, 2, 63)]) == 128
    assert context_for([Case(0, 128, 4096), Case(512, 0, 0)]) == 4096 + 512


# --- what counts ------------------------------------------------------------------------------------------------------


class Disk:
    """Counters that grow by what each run in turn reads."""

    def __init__(self, *reads: DiskReads) -> None:
        self.reads = iter(reads)
        self.total = DiskReads(10_000, 10)
        self.runs = 0

    def run(self) -> Run:
        read = next(self.reads)
        self.total = DiskReads(self.total.nbytes + read.nbytes, self.total.major_faults + read.major_faults)
        self.runs += 1
        return Run(self.runs, (), (), 0, 0)


QUIET, READ, FAULT = DiskReads(), DiskReads(4096, 0), DiskReads(0, 1)


def test_a_quiet_sample_counts_at_once() -> None:
    disk = Disk(QUIET)
    run, read, discarded = undisturbed(disk.run, lambda: disk.total)
    assert (run.ns, bool(read), discarded) == (1, False, ())


@pytest.mark.parametrize("disturbed", [READ, FAULT])
def test_samples_that_read_the_disk_are_discarded_and_taken_again(disturbed: DiskReads) -> None:
    disk = Disk(disturbed, disturbed, QUIET, QUIET)
    run, read, discarded = undisturbed(disk.run, lambda: disk.total)
    assert (run.ns, bool(read)) == (3, False)
    assert [(sample.ns, sample.disk) for sample in discarded] == [(1, disturbed), (2, disturbed)]


def test_a_model_that_always_reads_the_disk_is_measured_all_the_same() -> None:
    disk = Disk(*itertools.repeat(READ, 100))
    run, read, discarded = undisturbed(disk.run, lambda: disk.total)
    assert len(discarded) == MOST_DISCARDED
    assert (run.ns, read) == (MOST_DISCARDED + 1, READ)


def test_the_systems_counters_only_grow() -> None:
    first = disk_reads()
    second = disk_reads()
    assert second.nbytes >= first.nbytes >= 0 and second.major_faults >= first.major_faults >= 0
    assert first.since(first) == QUIET


# --- ceilings ---------------------------------------------------------------------------------------------------------


def test_the_weights_are_read_between_tokens_as_often_as_these(checkpoint: Checkpoint) -> None:
    case = Case(0, 2 * READ_EVERY + 1, 0)
    found = rig(checkpoint, [case])
    backend, calls = found.loaded.backend, list[str]()

    class Steps:
        def start(self, step: Step) -> StepRun:
            calls.append("token")
            return backend.start(step)

    class Meter:
        weights, peak_isa, read_every, read_bytes = found.meter.weights, found.meter.peak_isa, READ_EVERY, 1000

        def peaks(self) -> dict[str, float]:
            calls.append("peaks")
            return {"int8": 2e9 * calls.count("peaks")}

        def read(self) -> int:
            calls.append("read")
            return calls.count("read")

    found.loaded, found.meter = replace(found.loaded, backend=Steps()), Meter()  # type: ignore[arg-type]
    sample, _ = found.sample(case)
    turn = ["token"] * READ_EVERY + ["read"] * READ_EVERY
    assert calls == ["peaks", *turn, *turn, "token", "read", "peaks"]
    assert sample.ceilings == Ceilings({"int8": 3e9}, tuple(range(1, case.n_gen + 1)), 1000)
    assert sample.ceilings.read_rate == pytest.approx(1e9 * 1000 * 9 / 45)  # of all reads together


def test_ceilings_read_the_weights_of_a_token_and_know_every_peak(checkpoint: Checkpoint) -> None:
    case = Case(0, 3, 0)
    found = rig(checkpoint, [case])
    sample, discarded = found.sample(case)
    assert all(one.disk for one in discarded)
    ceilings = sample.ceilings
    assert len(ceilings.read_ns) == 3 and min(ceilings.read_ns) > 0
    embedding_row = found.meter.weights.nbytes - ceilings.read_bytes
    assert embedding_row == 256 // 32 * 18
    assert ceilings.multiply_adds["int8"] > ceilings.multiply_adds["f32"] > 0
    assert found.meter.peak_isa["int8"] and found.meter.peak_isa["f32"]
    has_tiles = "amx" in _native.isa_names()
    assert (ceilings.multiply_adds["int8_tiles"] > ceilings.multiply_adds["int8"]) == has_tiles
    assert (ceilings.multiply_adds["bf16"] > 0) == bool(found.meter.peak_isa["bf16"])
    assert len(ceilings_now(found.meter, 2).read_ns) == 2
    assert len(found.sample(Case(2, 0, 0))[0].ceilings.read_ns) == 1


def words(array: np.ndarray) -> int:
    """The sum of the 64-bit words of each MiB, without what is left over of 512 bytes at the end."""
    flat = array.reshape(-1)
    pieces = (flat[start : start + (1 << 20)] for start in range(0, len(flat), 1 << 20))
    return sum(int(piece[: len(piece) // 512 * 512].view(np.uint64).sum()) for piece in pieces)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_meter_reads_every_byte_of_what_it_is_told(threads: int) -> None:
    rng = np.random.default_rng(threads)
    sizes = ((100,), (3, 1 << 20), (0,), (7, 12345))
    arrays = [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]
    meter = _native.Meter(arrays, threads)
    assert meter.streams in (1, 4)
    assert meter.checksum == 0
    expected = 0
    for indices in ([0], [], [2, 1], [3, 1, 3]):
        assert meter.read(np.array(indices, np.int32)) >= 0
        expected += sum(words(arrays[i]) for i in indices)
        assert meter.checksum == expected % 2**64
    four_times, once = (min(meter.read(np.array(i, np.int32)) for _ in range(5)) for i in ([1, 1, 1, 1], [1]))
    assert four_times > once > 0


def test_a_meter_refuses_what_it_does_not_have() -> None:
    meter = _native.Meter([np.zeros(8, np.uint8)], 1)
    for wrong in (1, -1):
        with pytest.raises(ValueError, match=f"index {wrong}, expected 0 to 1"):
            meter.read(np.array([0, wrong], np.int32))
    with pytest.raises(ValueError, match="kind is 'fp4', expected int8, int8_tiles, bf16 or f32"):
        meter.multiply_adds("fp4", 0.001)
    with pytest.raises(ValueError, match="threads is 0"):
        _native.Meter([], 0)
    with pytest.raises(TypeError):
        meter.read(np.array([0], np.int64))


# --- a device ---------------------------------------------------------------------------------------------------------


class Device:
    """A native backend that says its cache lies on a device, and takes its rows as one would."""

    device_name = "NVIDIA H200"

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.written: set[tuple[int, int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded.backend, name)

    def write_pages(self, array: int, layer: int, pages: list[int], stored: np.ndarray) -> None:
        self._loaded.cache.arrays[array][layer][pages] = stored
        self.written.add((array, layer))

    def read_rate(self) -> float:
        return 4.5e12

    def multiply_adds(self) -> dict[str, float]:
        return {"bf16": 350e12, "f32": 25e12}


def test_a_device_warms_up_twice(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it captures, it captures the second time: no sample of a prompt holds a capture."""
    case = Case(40, 0, 0)
    runs: list[str] = []
    for name in ("native", "cuda"):
        settings = Settings.parse(threads=1, n_ctx=context_for([case]), backend="native", cache_type="bf16")
        loaded = load(checkpoint, settings)
        backend = Device(loaded) if name == "cuda" else loaded.backend
        rig = Rig(replace(loaded, backend=backend), [case], batch_rows=64)  # type: ignore[arg-type]
        monkeypatch.setattr(rig, "run", lambda case, name=name: runs.append(name))
        rig.warm_up(case)
    assert runs == ["native", "cuda", "cuda"]


def test_a_processor_warms_up_by_a_part_of_a_long_prompt(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up of all of it would take as long as a sample: minutes of a real model."""
    cases = [Case(8192, 0, 0), Case(40, 0, 0)]
    settings = Settings.parse(threads=1, n_ctx=context_for(cases), backend="native", cache_type="bf16")
    for on_device, tokens in ((False, [2048, 40]), (True, [8192, 8192, 40, 40])):
        loaded, runs = load(checkpoint, settings), list[int]()
        backend = Device(loaded) if on_device else loaded.backend
        rig = Rig(replace(loaded, backend=backend), cases, batch_rows=64)  # type: ignore[arg-type]
        monkeypatch.setattr(rig, "run", lambda case, runs=runs: runs.append(case.n_prompt))
        for case in cases:
            rig.warm_up(case)
        assert runs == tokens


def test_a_device_is_given_its_cached_rows_and_measured_by_its_own_ceilings(checkpoint: Checkpoint) -> None:
    cases = [Case(40, 0, 0), Case(0, 2, 100)]
    settings = Settings.parse(threads=1, n_ctx=context_for(cases), backend="native", cache_type="bf16")
    loaded = load(checkpoint, settings)
    device = Device(loaded)
    rig = Rig(replace(loaded, backend=device), cases, batch_rows=64)  # type: ignore[arg-type]
    assert device.written == {(0, layer) for layer in range(checkpoint.config.num_layers)}
    prompt, generated = (rig.sample(case)[0] for case in cases)
    assert generated.ceilings.read_rate == pytest.approx(4.5e12, rel=1e-3)
    assert prompt.ceilings.multiply_adds == {"int8": 0.0, "int8_tiles": 0.0, "bf16": 350e12, "f32": 25e12}
    found = [
        row(Result(Variant(settings, 64), rig.loaded, rig.meter.peak_isa, case, (sample,), (), ()))
        for case, sample in zip(cases, (prompt, generated), strict=True)
    ]
    assert [one["bound_by"] for one in found] == ["bf16", "read"]
    assert found[0]["share"] == pytest.approx(1e9 * prompt.run.multiply_adds / prompt.run.ns / 350e12)
    assert (found[0]["backends"], found[0]["gpu_info"]) == ("CUDA", "NVIDIA H200")
    lines = list(markdown(found))
    assert any("ceilings of NVIDIA H200" in line and "bf16 350000 GMAC/s" in line for line in lines)
    assert "int8" not in "".join(lines)
