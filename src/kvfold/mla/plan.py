"""Which attention path a sequence takes in a step, what it costs, and why. Pure arithmetic: no arrays, no clocks.

Costs count multiply-adds of attention and of the up-projections (mla/absorb.py) for R new rows over C cached keys,
H heads; rates turn them into seconds. With equal rates and 128/64/128/512 heads the paths cross at R = 171 for
large C, 159 at C = 1024, and at C = 0 decompressed never loses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from kvfold.config import MlaConfig
from kvfold.errors import PlanError


class Path(Enum):
    """How one sequence of a step attends. The values are the numbers in Step.segments."""

    STANDARD = 0  # over its own cache of per-head K and V (mla=0)
    ABSORBED = 1  # over latents, W_UK folded into the query, W_UV unfolded after
    DECOMPRESSED = 2  # latents expanded to K and V, then ordinary attention


class Mla(Enum):
    """The `--mla` setting. AUTO, ABSORBED, DECOMPRESSED and SPLIT share one latent cache and may change every step."""

    AUTO = "auto"
    STANDARD = "0"
    ABSORBED = "1"
    DECOMPRESSED = "2"
    SPLIT = "3"  # decompressed for prompts, absorbed for generation


class Fa(Enum):
    """The `--fa` setting: UNFUSED stores the scores of a row tile, FUSED runs an online softmax over key tiles."""

    AUTO = "auto"
    UNFUSED = "0"
    FUSED = "1"


def parse_mla(value: str | int) -> Mla:
    """`auto`, 0, 1, 2 or 3. Raises PlanError."""
    try:
        return Mla(str(value).lower())
    except ValueError:
        raise PlanError(f"mla={value}: allowed are auto, 0, 1, 2, 3.") from None


def parse_fa(value: str | int) -> Fa:
    """`auto`, 0 or 1. Raises PlanError."""
    try:
        return Fa(str(value).lower())
    except ValueError:
        raise PlanError(f"fa={value}: allowed are auto, 0, 1.") from None


@dataclass(frozen=True)
class MachineProfile:
    """What the plan knows of a machine: multiply-adds a second of each product, all in one unit, and what a layer's attention
    takes besides, in the time that this unit makes (10^9 a second: nanoseconds).

    Equal rates make the plan a pure count; measured profiles replace them. origin: how a backend came by them, where machines
    of a kind differ.
    """

    name: str = "arithmetic"
    latents: float = 1.0  # scores and values over latents
    folding: float = 1.0  # W_UK into a query row, and W_UV after it
    expansion: float = 1.0  # keys and values out of latents
    heads: float = 1.0  # scores and values over the keys and values of heads
    cached: float = math.inf  # numbers of latent rows that absorbed attention reads, once for all heads and rows
    absorbed_start: float = 0.0  # launches and their ends, however little they do
    decompressed_start: float = 0.0
    few_rows: int = 0  # of a sequence, up to which absorbed attention has launches of its own: few_start
    few_start: float = 0.0
    head_lanes: int = 1  # heads of a row that absorbed attention computes at once, present or not
    origin: str = ""

    @property
    def title(self) -> str:
        """As reasons name it: H200 profile, measured."""
        return f"{self.name} profile" + (f", {self.origin}" if self.origin else "")

    @property
    def in_words(self) -> str:
        """Its rates, where they are of a machine: in 10^9 a second, and us."""
        tiles = f"; absorbed in tiles of {self.head_lanes} heads" if self.head_lanes > 1 else ""
        if self.name == MachineProfile.name:
            return f"{self.title}: multiply-adds are counted, all at one rate{tiles}"
        products = {
            "over latents": self.latents,
            "folding": self.folding,
            "expanding": self.expansion,
            "over heads": self.heads,
        }
        words = ", ".join(f"{what} {rate:,.0f}" for what, rate in products.items())
        besides = {"numbers of latent rows": self.cached} if self.cached < math.inf else {}
        words += "".join(f", {what} {rate:,.0f}" for what, rate in besides.items())
        absorbed = f"{self.absorbed_start / 1e3:.1f}" + (
            f" ({self.few_start / 1e3:.1f} of few rows)" if self.few_rows else ""
        )
        starts = f"; a layer besides {absorbed} us absorbed, {self.decompressed_start / 1e3:.1f} decompressed"
        return (
            f"{self.title}: 10^9 multiply-adds a second {words}" + (starts if self.absorbed_start else "") + tiles
        )

    def seconds(self, path: Path, work: AttentionWork) -> float:
        """Up to the unit of the rates."""
        if path is Path.ABSORBED:
            lanes = -(-work.heads // self.head_lanes) * self.head_lanes
            over = work.pairs * lanes / work.heads / self.latents + work.cached / self.cached
            start = self.few_start if work.rows <= self.few_rows else self.absorbed_start
            return start + over + work.up / self.folding
        return self.decompressed_start + work.pairs / self.heads + work.up / self.expansion


ARITHMETIC = MachineProfile()

# GMAC/s of one thread in dtype int8, by instruction set: bench/kernels.py paths, docs/notes/cpu-attention.md. Latents of a q8_0
# cache are multiplied in whole numbers.
CPU_CODES = {
    "avx2": MachineProfile("AVX2", latents=48.0, folding=21.0, expansion=56.0, heads=54.0),
    "avx512": MachineProfile("AVX-512", latents=72.0, folding=20.0, expansion=133.0, heads=74.0),
    "amx": MachineProfile("AMX", latents=105.0, folding=20.0, expansion=190.0, heads=130.0),
}
# Those of any other cache become pairs of bfloat16, while keys and values are expanded out of either as fast. AVX-512 and AMX: by
# the op's own times over both caches.
CPU_PAIRS = {
    "avx2": replace(CPU_CODES["avx2"], latents=24.0),
    "avx512": replace(CPU_CODES["avx512"], latents=50.0),
    "amx": replace(CPU_CODES["amx"], latents=77.0),
}


@dataclass(frozen=True)
class MlaPlan:
    """The choice for one sequence of one step. `costs` are multiply-adds per layer of every path considered."""

    path: Path
    fused: bool
    reason: str
    costs: tuple[tuple[Path, int], ...]


def query_key_pairs(new_rows: int, cached_rows: int) -> int:
    """Causal (query, key) pairs of R new rows over C cached ones: R C + R (R + 1) / 2."""
    return new_rows * cached_rows + new_rows * (new_rows + 1) // 2


@dataclass(frozen=True)
class AttentionWork:
    """Of one layer: multiply-adds over (query, key) pairs, and of the up-projections; heads; numbers of the latent rows
    attended to; query rows."""

    pairs: int
    up: int
    heads: int
    cached: int = 0
    rows: int = 0


def attention_work(path: Path, mla: MlaConfig, new_rows: int, cached_rows: int) -> AttentionWork:
    pairs = mla.num_heads * query_key_pairs(new_rows, cached_rows)
    # 131,072 a head: per key, or per query row
    up = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
    if path is Path.ABSORBED:
        cached = (new_rows + cached_rows) * mla.latent_dim
        latents = pairs * (mla.latent_dim + mla.kv_lora_rank)
        return AttentionWork(latents, new_rows * up, mla.num_heads, cached, new_rows)
    keys_expanded = new_rows + (cached_rows if path is Path.DECOMPRESSED else 0)
    over_heads = pairs * (mla.qk_head_dim + mla.v_head_dim)
    return AttentionWork(over_heads, keys_expanded * up, mla.num_heads)


def multiply_adds(path: Path, mla: MlaConfig, new_rows: int, cached_rows: int) -> int:
    """Multiply-adds of one layer's attention and up-projections."""
    work = attention_work(path, mla, new_rows, cached_rows)
    return work.pairs + work.up


def paths_of(setting: Mla) -> tuple[Path, ...]:
    """All that `choose` may take under a setting."""
    forced = {
        Mla.STANDARD: Path.STANDARD,
        Mla.ABSORBED: Path.ABSORBED,
        Mla.DECOMPRESSED: Path.DECOMPRESSED,
    }
    return (forced[setting],) if setting in forced else (Path.ABSORBED, Path.DECOMPRESSED)


def choose(
    mla: MlaConfig,
    *,
    new_rows: int,
    cached_rows: int,
    is_prompt: bool,
    setting: Mla = Mla.AUTO,
    fa: Fa = Fa.AUTO,
    machine: MachineProfile = ARITHMETIC,
    by_role: bool = False,
) -> MlaPlan:
    """The path for one sequence with `new_rows` rows in this step over `cached_rows` keys already cached.

    by_role: AUTO decides by is_prompt alone, so how a prompt was cut changes no bit.
    """
    fused = fa is not Fa.UNFUSED
    considered = (Path.STANDARD,) if setting is Mla.STANDARD else (Path.ABSORBED, Path.DECOMPRESSED)
    costs = tuple((path, multiply_adds(path, mla, new_rows, cached_rows)) for path in considered)

    def plan(path: Path, reason: str) -> MlaPlan:
        return MlaPlan(path, fused, reason, costs)

    if setting is Mla.STANDARD:
        return plan(Path.STANDARD, "mla=0: the cache holds per-head K and V")
    if setting is Mla.ABSORBED:
        return plan(Path.ABSORBED, "forced by mla=1")
    if setting is Mla.DECOMPRESSED:
        return plan(Path.DECOMPRESSED, "forced by mla=2")
    if setting is Mla.SPLIT:
        return plan(Path.DECOMPRESSED if is_prompt else Path.ABSORBED, "mla=3: by role of the rows")
    if by_role:
        return plan(Path.DECOMPRESSED if is_prompt else Path.ABSORBED, "deterministic: by role of the rows")

    seconds = {path: machine.seconds(path, attention_work(path, mla, new_rows, cached_rows)) for path in considered}
    best = min(considered, key=lambda path: seconds[path])
    other = max(considered, key=lambda path: seconds[path])
    ratio = seconds[other] / seconds[best]
    rows = f"{new_rows} new over {cached_rows} cached rows"
    return plan(best, f"{rows}: {other.name.lower()} costs {ratio:.2f} x ({machine.title})")


def crossover_rows(mla: MlaConfig, cached_rows: int, machine: MachineProfile = ARITHMETIC) -> int | None:
    """The smallest number of new rows at which decompressed is the cheaper path; None if there is none below 2^20."""

    def decompressed_wins(rows: int) -> bool:
        absorbed, decompressed = (
            machine.seconds(path, attention_work(path, mla, rows, cached_rows))
            for path in (Path.ABSORBED, Path.DECOMPRESSED)
        )
        return decompressed < absorbed

    low, high = 1, 1 << 20
    if not decompressed_wins(high):
        return None
    while low < high:  # monotonic: each further row saves time per key, expansion is paid once
        middle = (low + high) // 2
        low, high = (low, middle) if decompressed_wins(middle) else (middle + 1, high)
    return low
