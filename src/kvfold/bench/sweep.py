"""Which cases are run, under which settings, in which order: round after round, in turn with opponents.

A round takes one sample of every case, so a machine that slows down slows all of them. Opponents say whose turn it is, so
the two of a pair follow each other and saw the same machine.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import product

from kvfold.bench.measure import Case, Discarded, Rig, Sample, context_for
from kvfold.bench.opponent import Opponent
from kvfold.errors import SettingError
from kvfold.formats.checkpoint import Checkpoint
from kvfold.formats.synthetic import named_shape, synthetic_checkpoint, weight_bytes
from kvfold.load import Loaded, Progress, Settings, backend_for, cache_layout, load
from kvfold.machine import available_memory_bytes

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
MOST_COUNTS = 10_000  # in one list: longer ones are a slip

Notice = Callable[[str], None]
"""Called with one line whenever a sample is there, and with each finding of load() once."""


def parse_counts(text: str) -> list[int]:
    """llama-bench's lists: "512", "512,2048", "64-256+64" (steps of 64), "1-64*2" (doubling), "1-4" (steps of 1).

    Raises SettingError.
    """
    counts: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise SettingError(
                f"{text}: {item!r} is not a number such as 512 or a range such as 64-256+64 or 1-64*2."
            )
        count, last = int(match[1]), int(match[2] or match[1])
        grows_by, step = match[3] or "+", int(match[4] or 1)
        if count > last:
            raise SettingError(f"{text}: {item!r} ends before it begins.")
        while count <= last:
            counts.append(count)
            larger = count + step if grows_by == "+" else count * step
            if larger <= count or len(counts) > MOST_COUNTS:
                raise SettingError(f"{text}: {item!r} does not reach its end within {MOST_COUNTS} steps.")
            count = larger
    return counts


def cases_of(prompts: list[int], generated: list[int], depths: list[int]) -> list[Case]:
    """llama-bench's order: at every depth all prompts, then all generations, each once. A 0 takes a kind out."""
    cases = [
        case
        for depth in depths
        for case in (*(Case(n, 0, depth) for n in prompts), *(Case(0, n, depth) for n in generated))
        if case.num_tokens
    ]
    if not cases:
        raise SettingError("Nothing to measure: -p and -n are both 0.")
    return list(dict.fromkeys(cases))


@dataclass(frozen=True)
class Variant:
    """Settings that a row of the table was measured with. batch_rows: prompt rows in one step; None, before the model
    is loaded: what memory allows."""

    settings: Settings
    batch_rows: int | None


def made_in_memory(
    shape: str,
    *,
    layers: int | None,
    type: str,
    legacy_kv_b: bool,
    seed: int,
    variants: Iterable[Variant],
    progress: Progress | None = None,
) -> Checkpoint:
    """Random weights of a named shape.

    Raises SettingError where there is none, or they do not fit the memory, and as sweep() does where one of the variants
    cannot run beside them; all before a weight is made.
    """
    config = named_shape(shape, layers)
    needed = weight_bytes(config, type=type, legacy_kv_b=legacy_kv_b)
    free = available_memory_bytes()
    if free is not None and needed > free:
        raise SettingError(
            f"{config.name} in {type} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free. "
            f"Choose fewer layers or a smaller type."
        )

    left = None if free is None else free - needed
    return synthetic_checkpoint(
        config,
        type=type,
        legacy_kv_b=legacy_kv_b,
        seed=seed,
        progress=progress,
        check=lambda checkpoint: _check(checkpoint, variants, left),
    )


def variants(
    cases: list[Case],
    *,
    mla: list[str],
    fa: list[str],
    cache_type: list[str],
    threads: list[int | None],
    batch_rows: list[int] | list[None],
    dtype: str,
    backend: str,
    workspace_bytes: int | None,
    device: str = "auto",
    mmap: str = "auto",
    isa: str = "auto",
    deterministic: bool = False,
    check_numerics: bool = False,
    profile: bool = False,
) -> list[Variant]:
    """Every combination once, with room for the cases. Raises SettingError for any that cannot be."""
    every = [
        Variant(
            Settings.parse(
                mla=one_mla,
                fa=one_fa,
                dtype=dtype,
                cache_type=one_type,
                backend=backend,
                device=device,
                threads=one_threads,
                n_ctx=context_for(cases),
                workspace_bytes=workspace_bytes,
                mmap=mmap,
                isa=isa,
                deterministic=deterministic,
                check_numerics=check_numerics,
                profile=profile,
            ),
            rows,
        )
        for rows, one_type, one_mla, one_fa, one_threads in product(batch_rows, cache_type, mla, fa, threads)
    ]
    found: dict[Variant, Variant] = {}
    for (
        variant
    ) in every:  # the default workspace follows the free memory, which changes between two that are asked for alike
        alike = replace(variant, settings=replace(variant.settings, workspace_bytes=0))
        found.setdefault(alike, variant)
    return list(found.values())


def names_of(variants: Sequence[Variant]) -> list[str]:
    """What tells each from the others, as flags: "-t 2 -b 64"; "" where there is one."""
    flags = [
        {
            "-b": "auto" if variant.batch_rows is None else variant.batch_rows,
            "-ctk": variant.settings.cache_type.value,
            "-mla": variant.settings.mla.value,
            "-fa": variant.settings.fa.value,
            "-t": variant.settings.threads,
        }
        for variant in variants
    ]
    varied = [flag for flag in flags[0] if len({found[flag] for found in flags}) > 1]
    return [" ".join(f"{flag} {found[flag]}" for flag in varied) for found in flags]


@dataclass(frozen=True)
class Pairs:
    """An opponent's tokens a second in each round, beside ours of the same round."""

    command: str
    samples_ts: tuple[float, ...]
    ratios: tuple[float, ...]  # ours / theirs

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Result:
    """All samples of one case under one variant. pairs: of each opponent that ran the case in every round. is_cut: an
    interrupt or an error came before the last sample."""

    variant: Variant
    loaded: Loaded
    peak_isa: dict[str, str]
    case: Case
    samples: tuple[Sample, ...]
    discarded: tuple[Discarded, ...]
    pairs: tuple[Pairs, ...]
    is_cut: bool = False

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens a second."""
        return tuple(1e9 * self.case.num_tokens / sample.run.ns for sample in self.samples)

    @property
    def ratio_to_best(self) -> float:
        """Median over the rounds of ours over the fastest opponent's of that round. ValueError without pairs."""
        rounds = zip(*(pairs.ratios for pairs in self.pairs), strict=True)
        worst: list[float] = [min(ratios) for ratios in rounds]
        return statistics.median(worst)


def sweep(
    checkpoint: Checkpoint,
    variants: Iterable[Variant],
    cases: list[Case],
    *,
    repetitions: int,
    opponents: Sequence[Opponent] = (),
    seed: int = 0,
    notice: Notice = lambda line: None,
) -> Iterator[Result]:
    """The results of every variant, one after the other, each when its last round is over.

    Opponents lead: where one has printed a row it is stopped until ours has run the same case. A command that lists a case
    once is started for every round; one that lists it `repetitions` times (-p 512,512,512) is loaded once. Raises as
    load() and Opponent.rows() do, and SettingError for cases whose cache the free memory does not hold and for an opponent
    that runs none of the cases. What ends it early, an error or an interrupt, is raised behind the results of what was
    sampled until then.
    """
    variants = list(variants)
    _check(checkpoint, variants, available_memory_bytes())
    said: set[str] = set()
    for variant, name in zip(variants, names_of(variants), strict=True):
        loaded = load(checkpoint, variant.settings)
        for line in loaded.info:
            if line not in said:
                notice(f"note: {line}")
        said.update(loaded.info)
        checkpoint = loaded.checkpoint  # its copy of the weights serves the other variants too
        yield from _measure(loaded, variant, name, cases, repetitions, opponents, seed, notice)


def _check(checkpoint: Checkpoint, variants: Iterable[Variant], free_bytes: int | None) -> None:
    """That a backend runs each, and that the cache fits the system's memory: its rows are all written, where others reserve
    them and write what they come to. A GPU's is taken whole by load(), which asks for a backend again: less may be free then.

    free_bytes: None where the system does not tell.
    """
    for settings in (variant.settings for variant in variants):
        has_own_memory = backend_for(checkpoint, settings).candidate.free_bytes is not None
        if has_own_memory or settings.n_ctx is None or free_bytes is None:
            continue
        needed = settings.n_ctx * cache_layout(checkpoint.config, settings).bytes_per_token
        if needed > free_bytes:
            raise SettingError(
                f"{settings.n_ctx} cached tokens take {needed / 2**30:.1f} GiB and {free_bytes / 2**30:.1f} are free: "
                f"shorten -p, -n or -d."
            )


def _measure(
    loaded: Loaded,
    variant: Variant,
    name: str,
    cases: list[Case],
    repetitions: int,
    opponents: Sequence[Opponent],
    seed: int,
    notice: Notice,
) -> Iterator[Result]:
    rows = variant.batch_rows or loaded.window_rows
    variant = replace(variant, batch_rows=rows)
    rig = Rig(loaded, cases, batch_rows=rows, seed=seed)
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    discarded: dict[Case, list[Discarded]] = {case: [] for case in cases}
    theirs: dict[Case, dict[Opponent, list[float]]] = {case: {} for case in cases}
    ended_by: BaseException | None = None
    try:
        with closing(_turns(opponents, cases, repetitions)) as turns:
            for case, rates in turns:
                for opponent, rate in rates.items():
                    notice(f"opponent {opponent.argv[0]}: {case.name} {rate:.2f} t/s")
                if not samples[case]:
                    rig.warm_up(case)
                sample, failed = rig.sample(case)
                discarded[case] += failed
                for opponent, rate in rates.items():
                    theirs[case].setdefault(opponent, []).append(rate)
                samples[case].append(sample)  # the last: what is cut in between has rates too many, not too few
                rate = 1e9 * case.num_tokens / sample.run.ns
                under = f" with {name}" if name else ""
                notice(f"{len(samples[case])} of {repetitions}: {case.name} {rate:.2f} t/s{under}")
    except BaseException as found:
        ended_by = found
    for case in cases:
        count = len(samples[case])
        if not count:
            continue
        result = Result(
            variant,
            loaded,
            rig.meter.peak_isa,
            case,
            tuple(samples[case]),
            tuple(discarded[case]),
            pairs=(),
            is_cut=count < repetitions,
        )
        pairs = (
            _beside(opponent, rates[:count], result.samples_ts)
            for opponent, rates in theirs[case].items()
            if len(rates) >= count
        )
        yield replace(result, pairs=tuple(pairs))
    if ended_by is not None:
        raise ended_by


def _beside(opponent: Opponent, theirs: list[float], ours: tuple[float, ...]) -> Pairs:
    ratios = tuple(mine / other for mine, other in zip(ours, theirs, strict=True))
    return Pairs(opponent.command, tuple(theirs), ratios)


def _turns(
    opponents: Sequence[Opponent], cases: list[Case], repetitions: int
) -> Generator[tuple[Case, dict[Opponent, float]]]:
    """Every case `repetitions` times: when ours is to run it, with the rates that opponents have just reached in it.

    The first opponent that runs a case says when it is its turn; the others go on to their next row of it.
    """
    left = dict.fromkeys(cases, repetitions)
    with ExitStack() as stack:
        runs = [stack.enter_context(closing(_Runs(opponent, cases))) for opponent in opponents]
        for number, lead in enumerate(runs):
            while (wanted := [case for case in left if left[case]]) and (found := lead.next_of(wanted)) is not None:
                case, rate = found
                rates = {lead.opponent: rate}
                for other in runs[number + 1 :]:
                    if (beside := other.next_of([case])) is not None:
                        rates[other.opponent] = beside[1]
                left[case] -= 1
                yield case, rates
        for number in range(repetitions, 0, -1):
            yield from ((case, {}) for case in cases if left[case] >= number)


class _Runs:
    """An opponent's command, started again whenever it has come to its end."""

    def __init__(self, opponent: Opponent, cases: list[Case]) -> None:
        self.opponent = opponent
        self._cases = cases
        self._rows: Generator[tuple[Case, float]] | None = None
        self._ran: dict[Case, None] = {}
        self._ran_all = False  # a whole run is over, so there are no others

    def next_of(self, wanted: Sequence[Case]) -> tuple[Case, float] | None:
        """The next row of one of these cases; None where it runs none of them. SettingError: it runs none of ours."""
        for _ in range(2):  # what is left of a run, and a whole one
            if self._rows is None:
                if self._ran_all and not self._ran.keys() & set(wanted):
                    return None
                self._rows = self.opponent.rows()
            for case, rate in self._rows:
                self._ran[case] = None
                if case in wanted:
                    return case, rate
            self._rows, self._ran_all = None, True
            if not self._ran.keys() & set(self._cases):
                raise SettingError(
                    f"opponent {self.opponent.command}: ran {', '.join(case.name for case in self._ran)}, and none of "
                    f"{', '.join(case.name for case in self._cases)}. Give both the same -p, -n and -d."
                )
        return None

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
