"""Where the time of steps goes: sums of op times by phase and group of ops, with the work they did.

Owns sums alone. Times come from the backend, counts from model/op_work.py; what a machine could do at most is
bench/profile.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvfold.model.op_work import WeightSize, Work, work_of
from kvfold.model.program import Domain, OpRecord, Program, Segment
from kvfold.model.step import Step

# Ops of a layer by the last part of their names; one that is not here is a group of its own.
_GROUPS = {
    "norm": ("attn_norm", "ffn_norm", "q_a_norm", "kv_a_norm", "output_norm"),
    "q": ("q", "q_a", "q_b"),
    "rope": ("q_rope", "k_rope"),
    "append": ("append_latent", "append_full"),
    "attend": ("attend_latent", "attend_full"),
    "expand + attend": ("attend_expanded",),
    "fold": ("fold_q",),
    "unfold": ("unfold_v",),
    "out": ("attn_output",),
    "dense gate + up": ("ffn_gate", "ffn_up", "swiglu"),
    "dense down": ("ffn_down",),
    "experts + shared": ("mixture",),
    "shared gate + up": ("ffn_gate_shexp", "ffn_up_shexp", "swiglu_shexp"),
    "shared down": ("ffn_down_shexp",),
    "add": ("add_attn", "add_ffn", "add_shared"),
    "take outputs": ("take_hidden", "take_attended"),
}
_GROUP_OF = {part: group for group, parts in _GROUPS.items() for part in parts}

_PATH_OPS = ("fold_q", "attend_latent", "unfold_v", "attend_expanded", "attend_full")

BETWEEN = "between ops"
"""The group of what a step took beside its ops: buffers, cuts, the way through Python."""


def group_of(name: str) -> str:
    part = name.rsplit(".", 1)[-1]
    return _GROUP_OF.get(part, part)


def phase_of(step: Step) -> str:
    """ "prompt", "generation", or "mixed" where a step has rows of both."""
    if step.is_prompt.all():
        return "prompt"
    return "mixed" if step.is_prompt.any() else "generation"


@dataclass(frozen=True)
class Total:
    """calls: of ops; of BETWEEN: steps."""

    calls: int = 0
    ns: int = 0
    work: Work = field(default_factory=Work)

    def __add__(self, other: Total) -> Total:
        return Total(self.calls + other.calls, self.ns + other.ns, self.work + other.work)


Totals = dict[tuple[str, str], Total]
"""By (phase, group), in the order of the network."""


def merged(parts: Sequence[Totals]) -> Totals:
    totals: Totals = {}
    for part in parts:
        for key, total in part.items():
            totals[key] = totals.get(key, Total()) + total
    return totals


def _on_outputs(op: OpRecord, segment: Segment) -> bool:
    return bool(op.inputs) and segment.buffers[op.inputs[0].buffer].domain is Domain.OUTPUTS


class Profile:
    """Grows with every step that ran to its end."""

    def __init__(self, program: Program, weights: Sequence[WeightSize], cache_row_bytes: int) -> None:
        # with each, whether it works on output rows
        self._ops = [(op, _on_outputs(op, segment)) for segment in program.segments for op in segment.ops]
        self._weights, self._cache_row_bytes = weights, cache_row_bytes
        self._totals: Totals = {}

    def add(self, step: Step, ns: int, times: Sequence[tuple[int, int]]) -> None:
        """A step that took `ns` in all; times: (nanoseconds, experts that had rows) of every op, in order."""
        phase = phase_of(step)
        for (op, on_outputs), (op_ns, experts) in zip(self._ops, times, strict=True):
            work = work_of(op, on_outputs, step, self._weights, self._cache_row_bytes, experts)
            if op.kind in _PATH_OPS and not work.multiply_adds:
                continue  # no row of this step takes its path
            self._count(phase, group_of(op.name), Total(1, op_ns, work))
            ns -= op_ns
        self._count(phase, BETWEEN, Total(1, ns))

    def take(self) -> Totals:
        """The sums since the last call."""
        taken, self._totals = self._totals, {}
        return taken

    def _count(self, phase: str, group: str, total: Total) -> None:
        self._totals[phase, group] = self._totals.get((phase, group), Total()) + total
