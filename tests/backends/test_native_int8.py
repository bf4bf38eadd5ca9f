"""Backend native with rounded activations: its ops against quant/activations.py, whole models against float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backends.test_kernels import ISAS, assert_close, random_weight
from backends.test_native import WIDE
from backends.test_native_ops import UNREAD, Bench, hand_over, unread_attention
from backends.test_side_by_side import side_by_side
from kit.harness import Harness
from kit.tiny_models import tiny_model
from kvfold import _native
from kvfold.backends.native import NativeBackend
from kvfold.config import ModelConfig, MoeConfig, Scoring
from kvfold.engine.batch import Work, build_batch
from kvfold.formats.synthetic import synthesize
from kvfold.mla.plan import Path as MlaPath
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.program import Domain, Recorder, Value
from kvfold.quant.activations import BLOCK, product
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import SIDE_BY_SIDE, by_name

Array = NDArray[np.float32]

NUM_EXPERTS, PER_TOKEN, HIDDEN, INNER = 9, 3, 256, 288
MOE = MoeConfig(
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=PER_TOKEN,
    expert_intermediate_size=INNER,
    shared_intermediate_size=0,
    scoring=Scoring.SOFTMAX,
)


def inputs(rows: int, hidden: int = HIDDEN) -> Array:
    """The last six columns are zero: they are what unread_attention reads."""
    x = np.random.default_rng(rows).standard_normal((rows, hidden)).astype(np.float32)
    x[:, -6:] = 0
    return x


def stack_of(name: str, rows: int, cols: int, scale: float = 1.0) -> tuple[QuantTensor, ...]:
    return tuple(random_weight(by_name(name), rows, cols, seed=seed) for seed in range(NUM_EXPERTS))


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 17, 300])
@pytest.mark.parametrize("name", ["IQ4_NL", "Q4_K", "BF16"])
def test_linear_follows_the_definition(name: str, rows: int) -> None:
    """1 MiB of workspace cuts 300 rows into windows."""
    x, weight = inputs(rows), random_weight(by_name(name), 77, HIDDEN, seed=1)

    def network(ops: Recorder, value: Value) -> None:
        hand_over(ops, "y", ops.linear("linear", value, "w"))
        unread_attention(ops, value)

    outputs = Bench(
        x, network, {"w": (weight,), **UNREAD}, cache_rows=(6,), rounds_activations=True, workspace_bytes=400_000
    ).run()
    assert_close(outputs["y"], product(x, weight), f"{name} {rows}")


SUBSETS: dict[str, Collection[int] | None] = {
    "all": None,
    "some": range(2, 5),
    "every second": range(0, NUM_EXPERTS, 2),
    "any, in any order": (7, 0, 3, 4),
    "none": range(4, 4),
}
SHARED_INNER = 416


def routed_weights(gate_up: str, down: str, hidden: int = HIDDEN) -> dict[str, Any]:
    return {
        "router": np.random.default_rng(1).standard_normal((NUM_EXPERTS, hidden)).astype(np.float32),
        "gate": stack_of(gate_up, INNER, hidden),
        "up": stack_of(gate_up, INNER, hidden)[::-1],
        "down": stack_of(down, hidden, INNER),
        **UNREAD,
    }


def shared_weights(gate_up: str, down: str, hidden: int = HIDDEN) -> dict[str, QuantTensor]:
    shapes = {"gate": (SHARED_INNER, hidden), "up": (SHARED_INNER, hidden), "down": (hidden, SHARED_INNER)}
    types = {"gate": gate_up, "up": gate_up, "down": down}
    return {
        f"shared_{part}": random_weight(by_name(types[part]), *shape, seed=seed)
        for seed, (part, shape) in enumerate(shapes.items(), 30)
    }


def choose(ops: Recorder, value: Value) -> tuple[Value, Value]:
    """Ids and weights, handed over too."""
    chosen = ops.route("route", value, "router", None, MOE)
    for name, made in zip(("ids", "weights"), chosen, strict=True):
        hand_over(ops, name, made)
    return chosen


def add_shared(ops: Recorder, name: str, value: Value, routed: Value) -> Value:
    gate, up = (ops.linear(f"{name} {part}", value, f"shared_{part}") for part in ("gate", "up"))
    down = ops.linear(f"{name} down", ops.swiglu(f"{name} swiglu", gate, up), "shared_down")
    return ops.add(f"{name} add", routed, down)


def inner(x: Array, gate: QuantTensor, up: QuantTensor) -> NDArray[np.float64]:
    of_gate = product(x, gate)
    with np.errstate(over="ignore"):
        return of_gate / (1 + np.exp(-of_gate)) * product(x, up)


def gated(x: Array, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> NDArray[np.float64]:
    return product(inner(x, gate, up).astype(np.float32), down)


def from_a_middle(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row the least distance of a value from the middle between two codes of its block, a code being 1."""
    blocks = np.abs(values).reshape(len(values), -1, BLOCK)
    codes = blocks / blocks.max(-1, keepdims=True) * 127
    return np.abs(codes - np.floor(codes) - 0.5).min((1, 2))


def routed_sum(
    x: Array, weights: Mapping[str, Any], outputs: Mapping[str, Array], subset: Collection[int] | None
) -> NDArray[np.float64]:
    """Of the experts of a subset, chosen and weighed as `choose` handed over."""
    ids, total = outputs["ids"].view(np.int32), np.zeros(x.shape)
    for e in subset if subset is not None else range(NUM_EXPERTS):
        factor = (outputs["weights"] * (ids == e)).sum(-1, keepdims=True)
        total += gated(x, *(weights[part][e] for part in ("gate", "up", "down"))) * factor
    return total


def assert_experts_close(got: Array, want: NDArray[np.float64], what: str) -> None:
    """Inner activations agree to some 1e-7, which at times is across the middle between two codes: one step of 1/127 of
    the largest of 32 values, in a sum over 288 or more."""
    assert_close(got, want, what, tolerance=2e-2)
    size = np.sqrt((want**2).mean(1, keepdims=True)) + 1e-30
    assert np.median(np.abs(got - want) / size) <= 1e-5


@pytest.mark.parametrize("rows", [1, 2, 25, 200])
@pytest.mark.parametrize(
    ("gate_up", "down"),
    [("IQ4_NL", "IQ4_NL"), ("Q4_K", "Q5_0"), ("Q4_K", "Q8_0"), ("Q6_K", "Q5_1"), ("F16", "BF16")],
)
def test_experts_follow_the_definition(gate_up: str, down: str, rows: int) -> None:
    """Few rows go by row dots, many by tiles, and experts with few and many rows meet in one op."""
    x, weights = inputs(rows), routed_weights(gate_up, down)

    def network(ops: Recorder, value: Value) -> None:
        chosen = choose(ops, value)
        for name, subset in SUBSETS.items():
            hand_over(ops, name, ops.experts(name, value, *chosen, "gate", "up", "down", subset))
        unread_attention(ops, value)

    outputs = Bench(x, network, weights, cache_rows=(6,), rounds_activations=True, workspace_bytes=3 << 20).run()
    for name, subset in SUBSETS.items():
        assert_experts_close(outputs[name], routed_sum(x, weights, outputs, subset), f"{name} {rows}")


@pytest.mark.parametrize("rows", [1, 2, 25, 200, 600])
@pytest.mark.parametrize(
    ("routed", "shared"),
    [
        (("IQ4_NL", "IQ4_NL"), ("IQ4_NL", "IQ4_NL")),
        (("Q4_K", "Q5_0"), ("Q6_K", "Q8_0")),
        (("IQ4_NL", "Q8_0"), ("F16", "BF16")),
    ],
)
def test_shared_experts_in_the_op_of_routed_ones_follow_the_definition(
    routed: tuple[str, str], shared: tuple[str, str], rows: int
) -> None:
    """Of another width and other types, beside all routed experts, some or none; 25 rows go by tiles through the shared
    ones and by row dots through routed ones, 600 in two windows through the shared ones."""
    x, weights, of_all = inputs(rows), routed_weights(*routed), shared_weights(*shared)

    def network(ops: Recorder, value: Value) -> None:
        chosen = choose(ops, value)
        for name, subset in SUBSETS.items():
            out = ops.experts(name, value, *chosen, "gate", "up", "down", subset)
            hand_over(ops, name, add_shared(ops, name, value, out))
        unread_attention(ops, value)

    every = {**weights, **{name: (weight,) for name, weight in of_all.items()}}
    bench = Bench(
        x, network, every, cache_rows=(6,), rounds_activations=True, workspace_bytes=max(4 << 20, rows << 15)
    )
    outputs = bench.run()
    assert [op.kind for op in bench.recorded.segments[1].ops].count("experts") == len(SUBSETS)
    assert not {"linear", "swiglu", "add"} & {op.kind for op in bench.recorded.segments[1].ops}
    for name, subset in SUBSETS.items():
        want = gated(x, *of_all.values()) + routed_sum(x, weights, outputs, subset)
        assert_experts_close(outputs[name], want, f"{name} {rows}")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [25, 600])
@pytest.mark.parametrize(("down", "shared_down"), [("IQ4_NL", "IQ4_NL"), ("Q5_0", "Q8_0"), ("BF16", "IQ4_NL")])
def test_units_of_several_panels_of_down_follow_the_definition(
    down: str, shared_down: str, rows: int, threads: int
) -> None:
    """608 outputs, with panels of 32 rows: one thread takes them in four units of three panels of 32 and seven of one, two threads in seven of two and five
    of one. 600 rows are two tiles of results of the shared experts."""
    hidden = 608
    x, weights = inputs(rows, hidden), routed_weights("IQ4_NL", down, hidden)
    of_shared = shared_weights("IQ4_NL", shared_down, hidden)

    def network(ops: Recorder, value: Value) -> None:
        out = ops.experts("experts", value, *choose(ops, value), "gate", "up", "down")
        hand_over(ops, "sum", add_shared(ops, "shared", value, out))
        unread_attention(ops, value)

    every = {**weights, **{name: (weight,) for name, weight in of_shared.items()}}
    outputs = Bench(
        x, network, every, cache_rows=(6,), rounds_activations=True, workspace_bytes=64 << 20, threads=threads
    ).run()
    want = gated(x, *of_shared.values()) + routed_sum(x, weights, outputs, None)
    assert_experts_close(outputs["sum"], want, f"{rows} {threads}")


@pytest.mark.skipif(not _native.side_by_side_types("auto"), reason="this set multiplies rows as files have them")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 25])
@pytest.mark.parametrize(
    ("routed", "shared"),
    [
        (("Q4_1", "Q4_1"), ("Q8_0", "Q8_0")),
        (("Q4_K", "Q5_0"), ("Q6_K", "Q4_1")),
        (("Q5_0", "Q4_1"), ("Q4_K", "IQ4_NL")),
    ],
)
def test_rows_side_by_side_beside_rows_that_are_not(
    routed: tuple[str, str], shared: tuple[str, str], rows: int, threads: int
) -> None:
    """Rows of a network, of its down alone, or of its gate and up alone lie side by side, others as the file has them.

    Both orders add differently, by 1e-7. Where an inner number lies that near to a middle its code may differ: one row of 25 did on AMX
    (2.1e-4 of its size), that with a number 4.2e-5 of a code from a middle, three times nearer than any other row has.
    """

    def network(ops: Recorder, value: Value) -> None:
        out = ops.experts("experts", value, *choose(ops, value), "gate", "up", "down")
        hand_over(ops, "sum", add_shared(ops, "shared", value, out))
        unread_attention(ops, value)

    x = inputs(rows)
    in_file = routed_weights(*routed) | {name: (weight,) for name, weight in shared_weights(*shared).items()}

    def run(weights: dict[str, Any]) -> Mapping[str, Array]:
        bench = Bench(
            x, network, weights, cache_rows=(6,), rounds_activations=True, workspace_bytes=8 << 20, threads=threads
        )
        outputs = bench.run()
        assert "linear" not in {op.kind for op in bench.recorded.segments[1].ops}
        return outputs

    in_memory = {
        name: tuple(side_by_side(w) if w.type.name in SIDE_BY_SIDE else w for w in parts)
        for name, parts in in_file.items()
        if isinstance(parts, tuple)
    }
    assert sum(w.type.is_side_by_side for parts in in_memory.values() for w in parts) > 0
    got, want = run(in_file | in_memory), run(in_file)
    gate, up = (in_file[f"shared_{part}"][0] for part in ("gate", "up"))
    distance = from_a_middle(inner(x, gate, up))
    for e in range(NUM_EXPERTS):
        of_expert = from_a_middle(inner(x, in_file["gate"][e], in_file["up"][e]))
        chosen = (want["ids"].view(np.int32) == e).any(-1)
        distance = np.where(chosen, np.minimum(distance, of_expert), distance)
    is_clear = distance > 1e-4
    assert_close(got["sum"][is_clear], want["sum"][is_clear], f"{rows} {threads}", tolerance=1e-5)
    assert_close(got["sum"], want["sum"], f"{rows} {threads}", tolerance=1e-3)
    assert is_clear.sum() >= 0.8 * rows


def wide_model() -> ModelConfig:
    return ModelConfig.from_hf(tiny_model("v3", **WIDE).config)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", ["IQ4_NL", "Q8_0"])
def test_a_model_is_that_of_float32_up_to_the_noise_of_activations(type: str, isa: str, tmp_path: Path) -> None:
    config = wide_model()
    path = tmp_path / "model.gguf"
    synthesize(config, path, type=type)
    text = [int(i) for i in np.random.default_rng(5).integers(0, config.vocab_size, 60)]
    _native.force_isa(isa)
    try:
        rounded, exact = (Harness(path, backend="native", dtype=dtype) for dtype in ("int8", "float32"))
        for chunks in ([60], [40] + [1] * 20):
            want, got = exact.logits(text, chunks), rounded.logits(text, chunks)
            noise = ((got - want) ** 2).mean() / (want**2).mean()
            assert 0 < noise < 1e-2, f"{type} {isa}: {noise:.1e}"
    finally:
        _native.force_isa("auto")


class Watched:
    """A model as one segment that hands every op's result over as an output of the step.

    Implements model.ops.Ops[Value] around a recorder, for rows of the step; values of absorbed rows alone have no way out.
    """

    num_segments = 2

    def __init__(self, model: DeepseekModel) -> None:
        self.model = model
        self.config = model.config

    def segment_name(self, index: int) -> str:
        return ("embed", "network")[index]

    def run_segment(self, ops: Recorder, index: int, x: Value | None) -> Value | None:
        if index == 0:
            return self.model.run_segment(ops, 0, None)
        watch = WatchedOps(ops)
        for segment in range(1, self.model.num_segments):
            x = self.model.run_segment(watch, segment, x)  # type: ignore[arg-type]
        return None


class WatchedOps:
    KEPT = ("norm", "linear", "rope", "unfold_v", "attend_expanded", "attend_full", "swiglu", "add", "experts")

    def __init__(self, ops: Recorder) -> None:
        self._ops = ops

    def _hand_over(self, name: str, value: Value) -> Value:
        domain = self._ops._buffers[value.buffer].domain
        if domain is Domain.ROWS:
            hand_over(self._ops, name, value)
        elif domain is Domain.OUTPUTS and name.startswith("blk."):  # the head hands its own over
            self._ops.output(name, value)
        return value

    def output(self, name: str, value: Value) -> None:
        self._ops.output(name, value)

    def route(self, name: str, *rest: Any) -> tuple[Value, Value]:
        ids, weights = self._ops.route(name, *rest)
        return self._hand_over(f"{name}.ids", ids), self._hand_over(name, weights)

    def __getattr__(self, op: str) -> Any:
        method = getattr(self._ops, op)
        if op not in self.KEPT:
            return method
        return lambda name, *rest, **more: self._hand_over(name, method(name, *rest, **more))


def assert_op_by_op(path: Path, chunks: list[int], **settings: Any) -> set[str]:
    """Both backends run the same steps; plain's results are judged and then replaced by native's, so that every op of
    plain starts from what native's started from. Returns the names of the ops judged."""
    native, plain = (Harness(path, backend=b, dtype="int8", **settings) for b in ("native", "plain"))
    loaded = native.loaded
    watched = NativeBackend(
        Watched(loaded.model),  # type: ignore[arg-type]
        loaded.checkpoint.tensors,
        loaded.cache,
        threads=2,
        workspace_bytes=64 << 20,
        rounds_activations=True,
    )
    judged: set[str] = set()
    ids = np.random.default_rng(6).integers(0, loaded.model.config.vocab_size, sum(chunks)).tolist()
    sequences = native.sequence(), plain.sequence()
    for start, length in zip(np.cumsum([0, *chunks]), chunks, strict=False):
        batches = [
            build_batch(
                [Work(sequence, ids[start : start + length], is_prompt=True, outputs=length)], harness.loaded.plan
            )
            for sequence, harness in zip(sequences, (native, plain), strict=True)
        ]
        run = watched.start(batches[0].step)
        run.run()
        absorbed = batches[0].step.segment(MlaPath.ABSORBED.value) is not None

        def judge(
            name: str, value: Any, results: Mapping[str, Array] = run.outputs, absorbed: bool = absorbed
        ) -> None:
            if name not in results or (name.endswith(".unfold_v") and not absorbed):
                return
            got, want = results[name], value.numpy()
            if name.endswith(".ids"):
                np.testing.assert_array_equal(got.view(np.int32), want, name)
                return
            size = np.sqrt((want.astype(np.float64) ** 2).mean(1, keepdims=True)) + 1e-30
            # The inner activations of experts and the latents that come out of attention are rounded inside of these
            # ops: of values that agree to 1e-7 some lie across the middle between two codes.
            if any(part in name for part in ROUND_INSIDE):
                assert np.median(np.abs(got - want) / size) <= 1e-5, name
                assert_close(got, want, name, tolerance=2e-2)
            else:
                assert_close(got, want, name)
            value.copy_(torch.from_numpy(got.copy()))
            judged.add(name.rsplit(".", maxsplit=1)[-1])

        plain.tap(judge)
        plain.loaded.backend.start(batches[1].step).run()
        for batch in batches:
            batch.commit()
    return judged


ROUND_INSIDE = ("experts", "unfold_v", "attend_expanded", "attend_full")


@pytest.mark.parametrize(
    ("type", "mla", "cache_type"),
    [("IQ4_NL", "1", "q8_0"), ("Q8_0", "1", "f16"), ("Q6_K", "2", "f32"), ("BF16", "0", "f32")],
)
def test_every_op_is_plains(type: str, mla: str, cache_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = ModelConfig.from_hf(tiny_model("v3", **WIDE, qk_rope_head_dim=32).config)
    synthesize(config, path, type=type, legacy_kv_b=type == "IQ4_NL")
    judged = assert_op_by_op(path, [66, 1], mla=mla, cache_type=cache_type)
    assert judged >= {"q_a", "kv_a", "kv_a_norm", "q_rope", "k_rope", "attn_output", "route"}, judged


@pytest.mark.parametrize("name", ["IQ4_NL", "Q8_0", "BF16"])
@pytest.mark.parametrize("rows", [513, 520, 700])
def test_rows_do_not_depend_on_how_windows_are_cut(rows: int, name: str) -> None:
    """A window is 512 rows of 4096 columns at most. First and last rows have the bits that they have among a hundred: a rest
    of one or eight rows does not go by dots."""
    cols = 4096
    x = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)
    weight = random_weight(by_name(name), 40, cols, seed=1)

    def network(ops: Recorder, value: Value) -> None:
        hand_over(ops, "y", ops.linear("linear", value, "w"))
        unread_attention(ops, value)

    def run(some: Array) -> Array:
        x6 = some.copy()
        x6[:, -6:] = 0
        bench = Bench(
            x6,
            network,
            {"w": (weight,), **UNREAD},
            cache_rows=(6,),
            rounds_activations=True,
            workspace_bytes=16 << 20,
        )
        return bench.run()["y"]

    whole = run(x)
    assert np.array_equal(whole[-100:], run(x[-100:])) and np.array_equal(whole[:100], run(x[:100]))
