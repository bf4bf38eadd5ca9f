"""What an op of a recording has to do in a step: multiply-adds, and bytes of weights and cache. Counts, no clocks.

Every byte counts once an op, however often it is used: what a machine with a large enough cache would read. Activations
do not count: they are a row's numbers where weights are a matrix's. Attention and its up-projections add up to what
mla/plan.py says of their path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.mla.plan import Path, query_key_pairs
from kvfold.model.program import EVERY_EXPERT, OpRecord
from kvfold.model.step import Step


@dataclass(frozen=True)
class Work:
    multiply_adds: int = 0
    nbytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.multiply_adds + other.multiply_adds, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class WeightSize:
    """A weight of a recording: all its rows, their columns and bytes."""

    rows: int
    cols: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows

    def product(self, rows: int) -> Work:
        """Of `rows` rows of activations."""
        return Work(rows * self.rows * self.cols, self.nbytes if rows else 0)


@dataclass(frozen=True)
class Attended:
    """The rows of a step that take one path: how many, over how many keys, in how many (query, key) pairs."""

    rows: int = 0
    keys: int = 0
    pairs: int = 0


def attended(step: Step, path: Path) -> Attended:
    segment = step.segment(path.value)
    if segment is None:
        return Attended()
    rows, keys, pairs = 0, 0, 0
    for sequence in segment[1]:
        span = step.rows(sequence)
        new, all_keys = span.stop - span.start, int(step.kv_lens[sequence])
        rows, keys = rows + new, keys + all_keys
        pairs += query_key_pairs(new, all_keys - new)
    return Attended(rows, keys, pairs)


def work_of(
    op: OpRecord,
    on_outputs: bool,
    step: Step,
    weights: Sequence[WeightSize],
    cache_row_bytes: int,
    experts_used: int = 0,
) -> Work:
    """Of one op in one step.

    on_outputs:      it works on the step's output rows, otherwise on all
    weights:         by handle
    cache_row_bytes: of one token in one layer
    experts_used:    experts that had rows, of an `experts` op
    """
    rows = len(step.output_rows) if on_outputs else step.num_rows

    def weight(index: int) -> WeightSize:
        return weights[op.weights[index]]

    match op.kind:
        case "embed":
            return Work(0, rows * weight(0).row_bytes)
        case "linear" | "route":
            return weight(0).product(rows)
        case "experts":
            return _experts(op, rows, weights, experts_used)
        case "append_latent":
            return Work(0, rows * cache_row_bytes)
        case "fold_q" | "attend_latent" | "unfold_v":
            return _absorbed(op, attended(step, Path.ABSORBED), weights, cache_row_bytes)
        case "attend_expanded":
            seen = attended(step, Path.DECOMPRESSED)
            return _attention(op, seen, cache_row_bytes) + _expansion(op, seen.keys, weights)
        case "append_full":
            return Work(0, rows * cache_row_bytes) + _expansion(op, rows, weights)
        case "attend_full":
            return _attention(op, attended(step, Path.STANDARD), cache_row_bytes)
    return Work()  # row by row: norm, rope, swiglu, add, take_outputs


def _experts(op: OpRecord, rows: int, weights: Sequence[WeightSize], used: int) -> Work:
    matrices = [weights[handle] for handle in op.weights[:3]]
    shared = [weights[handle] for handle in op.weights[3:] if handle >= 0]
    count = matrices[2].rows // op.inputs[0].width
    every = count if op.ints == EVERY_EXPERT else len(op.ints)
    # A subset's share of the choices is not known: what it would be if all experts were chosen equally often.
    chosen = rows * op.inputs[1].width * every // count
    routed = Work(
        chosen * sum(m.rows // count * m.cols for m in matrices), used * sum(m.nbytes // count for m in matrices)
    )
    return sum((m.product(rows) for m in shared), routed)


def _dims(op: OpRecord) -> tuple[int, int, int, int, int]:
    heads, nope, rope, v, kv_lora = op.ints[:5]
    return heads, nope, rope, v, kv_lora


def _up_bytes(op: OpRecord, weights: Sequence[WeightSize]) -> tuple[int, int]:
    """Of W_UK and W_UV."""
    _, nope, _, v, _ = _dims(op)
    kv_b, k_b, v_b = op.weights
    if kv_b < 0:
        return weights[k_b].nbytes, weights[v_b].nbytes
    key_bytes = weights[kv_b].nbytes * nope // (nope + v)
    return key_bytes, weights[kv_b].nbytes - key_bytes


def _absorbed(op: OpRecord, seen: Attended, weights: Sequence[WeightSize], cache_row_bytes: int) -> Work:
    heads, nope, rope, v, kv_lora = _dims(op)
    if not seen.rows:
        return Work()
    if op.kind == "attend_latent":
        return Work(seen.pairs * heads * (kv_lora + rope + kv_lora), seen.keys * cache_row_bytes)
    key_bytes, value_bytes = _up_bytes(op, weights)
    if op.kind == "fold_q":
        return Work(seen.rows * heads * nope * kv_lora, key_bytes)
    return Work(seen.rows * heads * v * kv_lora, value_bytes)


def _attention(op: OpRecord, seen: Attended, cache_row_bytes: int) -> Work:
    heads, nope, rope, v, _ = _dims(op)
    return Work(seen.pairs * heads * (nope + rope + v), seen.keys * cache_row_bytes)


def _expansion(op: OpRecord, keys: int, weights: Sequence[WeightSize]) -> Work:
    heads, nope, _, v, kv_lora = _dims(op)
    return Work(keys * heads * (nope + v) * kv_lora, sum(_up_bytes(op, weights)) if keys else 0)
