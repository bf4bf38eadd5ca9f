"""Which recordings get their shared experts into the op of the routed ones, and what is left of the others. That such an op
computes the same is tested with the ops of the native backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends.test_kernels import random_weight
from backends.test_native_ops import tensor
from kit.harness import Harness
from kit.tiny_models import CONFIGS, tiny_model, write_hf_dir
from kvfold.backends.shared_experts import with_shared_experts_inside
from kvfold.config import MoeConfig, Scoring
from kvfold.model.moe import mixture
from kvfold.model.program import Domain, Program, Recorder, Segment, Value, record
from kvfold.quant.tensor import Weight, matrices
from kvfold.quant.types import by_name

HIDDEN, INNER, SHARED = 64, 32, 96
MOE = MoeConfig(
    num_experts=4,
    num_experts_per_tok=2,
    expert_intermediate_size=INNER,
    shared_intermediate_size=SHARED,
    scoring=Scoring.SOFTMAX,
)


class Mixture:
    """A model that is one mixture. `reads`: a buffer of the recording that something else reads too."""

    num_segments = 1
    config = type("Config", (), {"hidden_size": HIDDEN})

    def __init__(self, reads: int | None = None) -> None:
        self.reads = reads

    def segment_name(self, index: int) -> str:
        return "mixture"

    def run_segment(self, ops: Recorder, index: int, x: Value | None) -> Value:
        x = Value(0, 0, HIDDEN)
        out = mixture(ops, "blk.0", x, MOE)
        if self.reads is not None:
            seen = Value(self.reads, 0, ops._buffers[self.reads].width)
            ops.output("seen", ops.take_outputs("take", seen))
        return ops.add("add_ffn", x, out)


def weights(**types: str) -> dict[str, Weight]:
    """`types`: by part, IQ4_NL where a part is not named."""

    def matrix(part: str, rows: int, cols: int) -> Weight:
        return random_weight(by_name(types.get(part, "IQ4_NL")), rows, cols, seed=1)

    of = {"blk.0.ffn_gate_inp.weight": tensor("router", np.zeros((MOE.num_experts, HIDDEN), np.float32))}
    for kind, count, inner in (("exps", MOE.num_experts, INNER), ("shexp", 1, SHARED)):
        for part, rows, cols in (("gate", inner, HIDDEN), ("up", inner, HIDDEN), ("down", HIDDEN, inner)):
            of[f"blk.0.ffn_{part}_{kind}.weight"] = (matrix(f"{part}_{kind}", rows, cols),) * count
    return of


def recorded(model: Mixture, of: dict[str, Weight]) -> Program:
    widths = {name: sum(part.rows for part in matrices(weight)) for name, weight in of.items()}  # fmt: skip
    return record(model, widths)  # type: ignore[arg-type]


def kinds(segment: Segment) -> list[str]:
    return [op.kind for op in segment.ops]


APART = ["route", "experts", "linear", "linear", "swiglu", "linear", "add", "add"]


@pytest.mark.parametrize(
    ("types", "rounds", "together"),
    [
        ({}, True, True),
        ({"gate_shexp": "Q8_0", "up_shexp": "Q8_0", "down_shexp": "Q5_0"}, True, True),
        ({"gate_shexp": "Q8_0"}, True, False),  # gate and up meet in one pass
        ({"gate_shexp": "Q8_0"}, False, True),
        ({"gate_exps": "Q8_0"}, True, False),  # the routed ones round nothing, the shared ones do
        ({"gate_exps": "Q8_0", "gate_shexp": "F32", "up_shexp": "F32", "down_shexp": "F16"}, True, True),
    ],
)
def test_matrices_that_are_multiplied_alike_are_in_one_op(
    types: dict[str, str], rounds: bool, together: bool
) -> None:
    of = weights(**types)
    program = recorded(Mixture(), of)
    assert kinds(program.segments[0]) == APART
    joined = with_shared_experts_inside(program, of, rounds_activations=rounds)
    assert joined.weight_names == program.weight_names
    (segment,) = joined.segments
    assert kinds(segment) == (["route", "experts", "add"] if together else APART)
    if together:
        mixed = segment.ops[1]
        assert mixed.name == "blk.0.mixture"
        assert [joined.weight_names[handle] for handle in mixed.weights] == [
            f"blk.0.ffn_{part}_{kind}.weight" for kind in ("exps", "shexp") for part in ("gate", "up", "down")
        ]


def test_buffers_are_those_that_are_left_and_live_as_long_as_they_are_used() -> None:
    of = weights()
    segment = with_shared_experts_inside(recorded(Mixture(), of), of, rounds_activations=True).segments[0]
    assert [(b.width, b.domain, b.first, b.last) for b in segment.buffers] == [
        (HIDDEN, Domain.ROWS, -1, 2),  # x
        (2, Domain.ROWS, 0, 1),  # ids
        (2, Domain.ROWS, 0, 1),  # weights
        (HIDDEN, Domain.ROWS, 1, 2),
        (HIDDEN, Domain.ROWS, 2, 3),  # handed to the next segment
    ]
    assert segment.x_out == Value(4, 0, HIDDEN)


@pytest.mark.parametrize("buffer", range(3, 8))
def test_what_something_else_reads_is_computed_by_itself(buffer: int) -> None:
    """The routed experts' sum, gate, up, inner activations, down."""
    of = weights()
    program = recorded(Mixture(reads=buffer), of)
    assert with_shared_experts_inside(program, of, rounds_activations=True) == program


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_of_experts_of_a_model(kind: str, tmp_path: Path) -> None:
    loaded = Harness(write_hf_dir(tiny_model(kind), tmp_path), backend="native").loaded
    config, tensors = loaded.model.config, loaded.checkpoint.tensors
    program = record(loaded.model, {name: sum(t.rows for t in matrices(w)) for name, w in tensors.items()})  # fmt: skip
    joined = with_shared_experts_inside(program, tensors, rounds_activations=False)
    mixtures = [op.name for segment in joined.segments for op in segment.ops if op.kind == "experts"]
    has_shared = config.moe is not None and config.moe.shared_intermediate_size > 0
    layers = range(config.num_dense_layers, config.num_layers) if config.moe is not None else ()
    assert mixtures == [f"blk.{layer}.{'mixture' if has_shared else 'experts'}" for layer in layers]
