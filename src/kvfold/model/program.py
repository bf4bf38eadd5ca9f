"""Record once, replay many: the network as flat lists of ops over symbolic buffers and weight handles.

`record(model, shapes)` runs the network against a Recorder and returns a Program: one segment for the embedding, one
per layer, one for the head. Nothing in it depends on a step: row counts, page lists and the plan arrive with each
step, weights are numbered handles. backends/native.py hands it to C++.

A buffer is [rows, width] of 4-byte numbers. Rows come from a domain that a step gives a size: all T rows, the R
output rows, or the rows of the absorbed segment (a prompt that is decompressed reserves nothing for folded queries).
Within a segment a buffer lives from the op that defines it to the last op that reads it; two buffers
whose lives do not meet may share memory. x, the hidden rows, is the only value that crosses a cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvfold.config import MlaConfig, MoeConfig, Pairing, RopeConfig
from kvfold.mla.absorb import KvUp
from kvfold.model.deepseek import DeepseekModel


class Domain(Enum):
    """What the rows of a buffer are."""

    ROWS = 0  # all rows of the step
    OUTPUTS = 1  # its output rows
    ABSORBED = 2  # rows of its absorbed segment, counted from the first of them


@dataclass(frozen=True)
class Value:
    """Columns [start, start + width) of a buffer. Buffer 0 of every segment is x."""

    buffer: int
    start: int
    width: int


@dataclass(frozen=True)
class Buffer:
    width: int
    domain: Domain
    first: int  # index of the op that defines it; -1: it arrives with the segment (x)
    last: int  # index of the last op that touches it


@dataclass(frozen=True)
class OpRecord:
    """One op. `ints` and `floats` are its constants in the order of the recorder's method."""

    kind: str
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[int, ...] = ()  # handles; -1 for an absent one
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()


EVERY_EXPERT = (-1,)
"""The ints of an `experts` op that takes all; of one that takes a subset, its ids in ascending order."""


@dataclass(frozen=True)
class Segment:
    name: str
    ops: tuple[OpRecord, ...]
    buffers: tuple[Buffer, ...]
    x_out: Value | None  # the hidden rows handed to the next segment; None after the head
    outputs: tuple[tuple[str, Value], ...] = ()  # values handed to the caller of the step


@dataclass(frozen=True)
class Program:
    segments: tuple[Segment, ...]
    weight_names: tuple[str, ...]  # handle i is the weight of this name


@dataclass
class _Growing:
    width: int
    domain: Domain
    first: int
    last: int


@dataclass
class Recorder:
    """An implementation of Ops[Value]. `widths` is the number of output features (rows) of every weight. Segments are
    recorded in order: x arrives with the rows that the one before handed over."""

    widths: Mapping[str, int]
    handles: dict[str, int] = field(default_factory=dict)
    _ops: list[OpRecord] = field(default_factory=list)
    _buffers: list[_Growing] = field(default_factory=list)
    _outputs: list[tuple[str, Value]] = field(default_factory=list)
    _x_domain: Domain = Domain.ROWS

    def segment(self, model: DeepseekModel, index: int, hidden: int) -> Segment:
        self._ops, self._outputs = [], []
        self._buffers = [_Growing(hidden, self._x_domain, -1, -1)]
        x = model.run_segment(self, index, Value(0, 0, hidden) if index else None)
        if x is not None:
            self._buffers[x.buffer].last = len(self._ops)  # alive past the last op
            self._x_domain = self._buffers[x.buffer].domain
        for _, value in self._outputs:
            self._buffers[value.buffer].last = len(self._ops)
        buffers = tuple(Buffer(b.width, b.domain, b.first, b.last) for b in self._buffers)
        return Segment(model.segment_name(index), tuple(self._ops), buffers, x, tuple(self._outputs))

    def _handle(self, weight: str | None) -> int:
        return -1 if weight is None else self.handles.setdefault(weight, len(self.handles))

    def _kv(self, kv_up: KvUp) -> tuple[int, int, int]:
        return self._handle(kv_up.kv_b), self._handle(kv_up.k_b), self._handle(kv_up.v_b)

    def _record(
        self,
        kind: str,
        name: str,
        inputs: tuple[Value, ...],
        widths: tuple[int, ...] = (),
        *,
        weights: tuple[int, ...] = (),
        ints: tuple[int, ...] = (),
        floats: tuple[float, ...] = (),
        domain: Domain | None = None,
        into: Value | None = None,
    ) -> tuple[Value, ...]:
        now = len(self._ops)
        if domain is None:
            domain = self._buffers[inputs[0].buffer].domain if inputs else Domain.ROWS
        outputs = (into,) if into is not None else tuple(self._new(w, domain, now) for w in widths)
        for value in (*inputs, *outputs):
            self._buffers[value.buffer].last = now
        self._ops.append(OpRecord(kind, name, inputs, outputs, weights, ints, floats))
        return outputs

    def _new(self, width: int, domain: Domain, now: int) -> Value:
        self._buffers.append(_Growing(width, domain, now, now))
        return Value(len(self._buffers) - 1, 0, width)

    # The ops, in the order of model/ops.py and mla/ops.py.

    def embed(self, name: str, table: str) -> Value:
        # The embedding defines x itself: segment 0 has no other buffer.
        return self._record(
            "embed", name, (), weights=(self._handle(table),), into=Value(0, 0, self._buffers[0].width)
        )[0]

    def norm(self, name: str, x: Value, weight: str, eps: float) -> Value:
        return self._record("norm", name, (x,), (x.width,), weights=(self._handle(weight),), floats=(eps,))[0]

    def linear(self, name: str, x: Value, weight: str) -> Value:
        return self._record("linear", name, (x,), (self.widths[weight],), weights=(self._handle(weight),))[0]

    def columns(self, x: Value, start: int, stop: int) -> Value:
        return Value(x.buffer, x.start + start, stop - start)

    def rope(self, name: str, x: Value, rope: RopeConfig, *, head_dim: int) -> Value:
        half_split = int(rope.pairing is Pairing.HALF_SPLIT)
        return self._record("rope", name, (x,), ints=(head_dim, rope.dim, half_split), into=x)[0]

    def append_latent(self, name: str, layer: int, c_kv: Value, k_rope: Value) -> None:
        self._record("append_latent", name, (c_kv, k_rope), ints=(layer,))

    def fold_q(self, name: str, q: Value, kv_up: KvUp, mla: MlaConfig) -> Value:
        return self._record(
            "fold_q",
            name,
            (q,),
            (mla.num_heads * mla.latent_dim,),
            weights=self._kv(kv_up),
            ints=_dims(mla),
            domain=Domain.ABSORBED,
        )[0]

    def attend_latent(self, name: str, layer: int, q_latent: Value, mla: MlaConfig) -> Value:
        return self._record(
            "attend_latent",
            name,
            (q_latent,),
            (mla.num_heads * mla.kv_lora_rank,),
            ints=(*_dims(mla), layer),
            floats=(mla.softmax_scale,),
        )[0]

    def unfold_v(self, name: str, o_latent: Value, kv_up: KvUp, mla: MlaConfig) -> Value:
        return self._record(
            "unfold_v",
            name,
            (o_latent,),
            (mla.num_heads * mla.v_head_dim,),
            weights=self._kv(kv_up),
            ints=_dims(mla),
            domain=Domain.ROWS,
        )[0]

    def attend_expanded(self, name: str, layer: int, q: Value, kv_up: KvUp, mla: MlaConfig, into: Value) -> Value:
        return self._record(
            "attend_expanded",
            name,
            (q,),
            weights=self._kv(kv_up),
            ints=(*_dims(mla), layer),
            floats=(mla.softmax_scale,),
            into=into,
        )[0]

    def append_full(self, name: str, layer: int, c_kv: Value, k_rope: Value, kv_up: KvUp, mla: MlaConfig) -> None:
        self._record("append_full", name, (c_kv, k_rope), weights=self._kv(kv_up), ints=(*_dims(mla), layer))

    def attend_full(self, name: str, layer: int, q: Value, mla: MlaConfig) -> Value:
        return self._record(
            "attend_full",
            name,
            (q,),
            (mla.num_heads * mla.v_head_dim,),
            ints=(*_dims(mla), layer),
            floats=(mla.softmax_scale,),
        )[0]

    def swiglu(self, name: str, gate: Value, up: Value) -> Value:
        return self._record("swiglu", name, (gate, up), (gate.width,))[0]

    def add(self, name: str, x: Value, y: Value) -> Value:
        return self._record("add", name, (x, y), (x.width,))[0]

    def route(self, name: str, x: Value, weight: str, bias: str | None, moe: MoeConfig) -> tuple[Value, Value]:
        k = moe.num_experts_per_tok
        ids, weights = self._record(
            "route",
            name,
            (x,),
            (k, k),
            weights=(self._handle(weight), self._handle(bias)),
            ints=(
                moe.num_experts,
                k,
                moe.num_groups,
                moe.num_groups_per_tok,
                int(moe.scoring.value == "sigmoid"),
                int(moe.group_score.value == "top2_sum"),
                int(moe.norm_topk_prob),
            ),
            floats=(moe.routed_scaling_factor,),
        )
        return ids, weights

    def experts(
        self,
        name: str,
        x: Value,
        ids: Value,
        weights: Value,
        gate: str,
        up: str,
        down: str,
        subset: Collection[int] | None = None,
    ) -> Value:
        assert subset is None or min(subset, default=0) >= 0, subset  # -1 is every expert
        return self._record(
            "experts",
            name,
            (x, ids, weights),
            (x.width,),
            # gate, up and down of shared experts in the same op: backends/shared_experts.py
            weights=(self._handle(gate), self._handle(up), self._handle(down), -1, -1, -1),
            ints=EVERY_EXPERT if subset is None else tuple(sorted(set(subset))),
        )[0]

    def take_outputs(self, name: str, x: Value) -> Value:
        return self._record("take_outputs", name, (x,), (x.width,), domain=Domain.OUTPUTS)[0]

    def output(self, name: str, x: Value) -> None:
        self._outputs.append((name, x))


def _dims(mla: MlaConfig) -> tuple[int, int, int, int, int]:
    return mla.num_heads, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim, mla.kv_lora_rank


def record(model: DeepseekModel, widths: Mapping[str, int]) -> Program:
    """The program of a model. `widths`: output features of every weight that `linear` uses, by name."""
    recorder = Recorder(widths)
    segments = tuple(recorder.segment(model, i, model.config.hidden_size) for i in range(model.num_segments))
    return Program(segments, tuple(recorder.handles))
