"""One model, run and timed: a case is a prompt or a number of generated tokens, over a cache filled to some depth.

Owns the clock, the ceilings measured beside every sample and between its tokens, and the verdict that a sample does not
count because the disk was read meanwhile. Knows no formats of output and no other programs.

Tests are llama-bench's: random tokens, no sampler, logits of the last row of a prompt and of every generated token. A
depth is not computed: its cached rows are random numbers of the size that norms give latents, written before the
clock starts.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kvfold import _native
from kvfold.backends.choose import OnDevice
from kvfold.backends.profile import Totals
from kvfold.bench.work import LinearWork, TokenWeights, linear_work
from kvfold.cache.latent import PAGE_TOKENS, encode
from kvfold.cache.pages import Sequence, pages_for
from kvfold.engine.batch import Work, build_batch
from kvfold.errors import SettingError
from kvfold.load import Loaded
from kvfold.mla.plan import MlaPlan, multiply_adds

# Of one sample; then it is kept as it is. A model that does not fit the memory reads the disk in every sample.
MOST_DISCARDED = 3
# Tokens of a prompt that warm a processor up. A first sample of 8192 behind it was no slower than those that followed (two layers of
# V2-Lite, Zen 3: 9.5 s, then 10.3, 11.1 and 10.6), and all of it takes as long as a sample: minutes.
MOST_WARM_UP = 2048
# A peak of 20 ms is exact to 1 % on an idle machine, and three of them cost less than a generated token of V3.
PEAK_SECONDS = 0.02
# Tokens between which the weights are read as often, for the ceiling. What a virtual machine's host lets two threads read
# changes within half a second: reads 0.2 s apart correlate by 0.7, 0.7 s apart by 0.27, 1.5 s apart by 0.06 (Zen 3, 971 reads of
# 1.5 GB, 25 to 45 GB/s). After every single token they would clear the caches that the next one begins with.
READ_EVERY = 4
# Prompts are compared with int8, dots of bytes in vectors, on every set; whole tiles are faster where scales do not change
# every 32 columns.
PEAKS = ("int8", "int8_tiles", "bf16", "f32")


@dataclass(frozen=True)
class Case:
    """n_prompt tokens in one prompt, or n_gen generated one by one (the other is 0), after n_depth cached ones."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def num_tokens(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def name(self) -> str:
        """As llama-bench prints it: "pp512", "tg128 @ d4096"."""
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{what} @ d{self.n_depth}" if self.n_depth else what


@dataclass(frozen=True)
class Run:
    """One timed pass of a case.

    token_ns:      of each generated token
    plans:         of each step, in order
    multiply_adds: that the steps' plans ask for, logits included
    nbytes:        of weights and cache that generated tokens read at least; 0 for a prompt
    """

    ns: int
    token_ns: tuple[int, ...]
    plans: tuple[MlaPlan, ...]
    multiply_adds: int
    nbytes: int


@dataclass(frozen=True)
class DiskReads:
    """Bytes this process read from a disk, and its page faults that waited for one."""

    nbytes: int = 0
    major_faults: int = 0

    def __bool__(self) -> bool:
        return self != DiskReads()

    def since(self, before: DiskReads) -> DiskReads:
        return DiskReads(self.nbytes - before.nbytes, self.major_faults - before.major_faults)


@dataclass(frozen=True)
class Discarded:
    """A sample that does not count."""

    ns: int
    disk: DiskReads


@dataclass(frozen=True)
class Ceilings:
    """What the machine, or the GPU, did at most beside a sample, with as many threads.

    multiply_adds: a second, by kind of operand, the mean of before and after; 0 where the machine has no instruction for it
    read_ns:       of each read of the weights of one token, between its tokens; the experts are drawn anew each time
    read_bytes:    of one such read
    """

    multiply_adds: dict[str, float]
    read_ns: tuple[int, ...]
    read_bytes: int

    @property
    def read_rate(self) -> float:
        """Bytes a second of all reads together, as tokens a second are of all tokens."""
        return 1e9 * self.read_bytes / statistics.mean(self.read_ns)


@dataclass(frozen=True)
class Sample:
    """disk: not empty only where every attempt read the disk. profile: empty where ops are not timed."""

    run: Run
    disk: DiskReads
    ceilings: Ceilings
    profile: Totals


def disk_reads() -> DiskReads:
    """Counters of this process, all threads: they only grow. Bytes are 0 where the system does not tell."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return DiskReads(0, faults)
    return DiskReads(next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), faults)


def undisturbed(
    run: Callable[[], Run], counters: Callable[[], DiskReads] = disk_reads
) -> tuple[Run, DiskReads, tuple[Discarded, ...]]:
    """A run during which the disk was not read, and those before it that do not count. After MOST_DISCARDED of them
    the next one counts anyway, with what it read."""
    discarded: list[Discarded] = []
    while True:
        before = counters()
        done = run()
        disk = counters().since(before)
        if not disk or len(discarded) == MOST_DISCARDED:
            return done, disk, tuple(discarded)
        discarded.append(Discarded(done.ns, disk))


class Meter(Protocol):
    """The ceilings of the machine for one loaded model.

    weights:    that a generated token reads
    peak_isa:   by kind of operand, what multiplies them at the peak
    read_every: the tokens after which they are read as often; 0: a read after the sample is enough
    read_bytes: of one read
    """

    weights: TokenWeights
    peak_isa: dict[str, str]
    read_every: int
    read_bytes: int

    def peaks(self) -> dict[str, float]:
        """Multiply-adds a second, by kind of operand."""
        ...

    def read(self) -> int:
        """ns of a read of the weights of a token."""
        ...


def ceilings_now(meter: Meter, num_reads: int) -> Ceilings:
    """With no sample beside them."""
    return Ceilings(meter.peaks(), tuple(meter.read() for _ in range(num_reads)), meter.read_bytes)


def meter_of(loaded: Loaded, *, seed: int = 0) -> Meter:
    if isinstance(loaded.backend, OnDevice):
        return DeviceMeter(loaded, loaded.backend)
    return CpuMeter(loaded, seed=seed)


class DeviceMeter:
    """Of a GPU: what a kernel that only reads reaches on a buffer past its caches, and the library's matrix products. Both
    raise SettingError where too little memory is free."""

    read_every = 0  # one read after a sample: nobody else uses the card

    def __init__(self, loaded: Loaded, device: OnDevice) -> None:
        self.weights = TokenWeights(loaded.model.config, loaded.checkpoint.tensors)
        self.read_bytes = self.weights.nbytes
        self.peak_isa = dict.fromkeys(PEAKS, "cuBLAS")
        self._device = device

    def peaks(self) -> dict[str, float]:
        with _setting_errors():
            return dict.fromkeys(PEAKS, 0.0) | self._device.multiply_adds()

    def read(self) -> int:
        """In the time that the weights of a token would take."""
        with _setting_errors():
            return round(1e9 * self.read_bytes / self._device.read_rate())


@contextmanager
def _setting_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise SettingError(str(error)) from error


class CpuMeter:
    """Of a processor: reads of the model's own weights where they lie, on as many threads."""

    read_every = READ_EVERY

    def __init__(self, loaded: Loaded, *, seed: int = 0) -> None:
        self.weights = TokenWeights(loaded.model.config, loaded.checkpoint.tensors)
        self._rng = np.random.default_rng(seed)
        self._meter = _native.Meter(self.weights.arrays, loaded.settings.threads)
        # all but the row of the embedding
        self.read_bytes = sum(self.weights.arrays[i].nbytes for i in self.weights.draw(self._rng))
        self.peak_isa = {kind: self._meter.multiply_adds(kind, 0.0)[0] for kind in PEAKS}

    def peaks(self) -> dict[str, float]:
        return {kind: self._meter.multiply_adds(kind, PEAK_SECONDS)[1] for kind in PEAKS}

    def read(self) -> int:
        return round(1e9 * self._meter.read(self.weights.draw(self._rng)))


def context_for(cases: list[Case]) -> int:
    """Tokens of cache that a Rig needs for these cases."""
    return PAGE_TOKENS * (_deep_pages(cases) + _tail_pages(cases))


def _deep_pages(cases: list[Case]) -> int:
    return max(case.n_depth // PAGE_TOKENS for case in cases)


def _tail_pages(cases: list[Case]) -> int:
    return max(pages_for(case.n_depth % PAGE_TOKENS + case.num_tokens) for case in cases)


class Rig:
    """A loaded model whose cache holds random rows for the deepest case, and the ceilings of its machine.

    A case at depth d reads the first d / 64 of the deep pages and writes the tail pages, so no case changes what
    another one finds.
    """

    def __init__(self, loaded: Loaded, cases: list[Case], *, batch_rows: int, seed: int = 0) -> None:
        self.loaded = loaded
        self.batch_rows = batch_rows
        self.meter = meter_of(loaded, seed=seed)
        self._rng = np.random.default_rng(seed)
        self._linear: LinearWork = linear_work(loaded.model.config)
        self._deep = loaded.pool.take(_deep_pages(cases))
        self._tail = loaded.pool.take(_tail_pages(cases))
        self._fill(self._deep)

    def warm_up(self, case: Case) -> None:
        """A prompt, so that its buffers exist, whole on a GPU; one token of generation. Twice on a GPU, which captures a
        step the second time: of generation the first, so a sample holds a capture where contexts grow beyond 256 or 1024 keys."""
        on_device = isinstance(self.loaded.backend, OnDevice)
        n_prompt = case.n_prompt if on_device else min(case.n_prompt, MOST_WARM_UP)
        for _ in range(2 if on_device else 1):
            self.run(Case(n_prompt, min(case.n_gen, 1), case.n_depth))
        self._profile()

    def sample(self, case: Case) -> tuple[Sample, tuple[Discarded, ...]]:
        """A run, and ceilings measured before, between its tokens and after: peaks twice, a read for each token."""
        meter, reads = self.meter, list[int]()
        before = meter.peaks()

        def read_between(done: int) -> None:
            if meter.read_every and (done % meter.read_every == 0 or done == case.n_gen):
                reads.extend(meter.read() for _ in range(done - len(reads)))

        def run() -> Run:
            reads.clear()
            return self.run(case, read_between)

        found, disk, discarded = undisturbed(run)
        if not reads:
            reads.append(meter.read())
        peaks = {kind: (before[kind] + after) / 2 for kind, after in meter.peaks().items()}
        ceilings = Ceilings(peaks, tuple(reads), meter.read_bytes)
        return Sample(found, disk, ceilings, self._profile()), discarded

    def run(self, case: Case, between: Callable[[int], None] = lambda done: None) -> Run:
        """between: called behind every generated token with their number so far; what it takes counts nowhere."""
        if case.n_depth % PAGE_TOKENS:
            self._fill(self._tail[:1])
        pages = [*self._deep[: case.n_depth // PAGE_TOKENS], *self._tail]
        sequence = Sequence(self.loaded.pool, pages, case.n_depth)
        tokens = self._rng.integers(0, self.loaded.model.config.vocab_size, case.num_tokens).tolist()
        is_prompt = case.n_prompt > 0
        rows = self.batch_rows if is_prompt else 1
        plans: list[MlaPlan] = []
        step_ns: list[int] = []
        for start in range(0, len(tokens), rows):
            began = time.perf_counter_ns()
            window = tokens[start : start + rows]
            outputs = int(not is_prompt or start + rows >= len(tokens))
            batch = build_batch([Work(sequence, window, is_prompt, outputs)], self.loaded.plan)
            step = self.loaded.backend.start(batch.step)
            step.run()
            step.outputs["logits"]  # a GPU computes until somebody wants them
            batch.commit()
            plans += batch.plans
            step_ns.append(time.perf_counter_ns() - began)
            if not is_prompt:
                between(len(step_ns))
        return Run(
            ns=sum(step_ns),
            token_ns=() if is_prompt else tuple(step_ns),
            plans=tuple(plans),
            multiply_adds=self._multiply_adds(case, plans, rows),
            nbytes=0 if is_prompt else self._bytes_read(case),
        )

    def _profile(self) -> Totals:
        """Of what ran since the last call; empty where ops are not timed."""
        profile = getattr(self.loaded.backend, "profile", None)
        return profile.take() if profile is not None else {}

    def _multiply_adds(self, case: Case, plans: list[MlaPlan], rows: int) -> int:
        config = self.loaded.model.config
        total = self._linear.total(case.num_tokens, max(case.n_gen, 1))
        for number, plan in enumerate(plans):
            start = number * rows
            new = min(rows, case.num_tokens - start)
            total += config.num_layers * multiply_adds(plan.path, config.mla, new, case.n_depth + start)
        return total

    def _bytes_read(self, case: Case) -> int:
        """Token i reads the weights, and the cached rows of the depth, of the tokens before it and its own."""
        rows = case.n_gen * case.n_depth + case.n_gen * (case.n_gen + 1) // 2
        return case.n_gen * self.meter.weights.nbytes + rows * self.loaded.cache.layout.bytes_per_token

    def _fill(self, pages: list[int]) -> None:
        """Normal numbers in these pages of every layer: c_kv is normed, and k_rope of a like size."""
        cache = self.loaded.cache
        if not pages:
            return
        for array, dim in enumerate(cache.layout.row_dims):
            for layer in range(cache.layout.num_layers):
                values = self._rng.standard_normal((len(pages), PAGE_TOKENS, dim), np.float32)
                stored = encode(values, cache.layout.cache_type)
                if isinstance(self.loaded.backend, OnDevice):
                    self.loaded.backend.write_pages(array, layer, pages, stored)
                else:
                    cache.arrays[array][layer][pages] = stored
