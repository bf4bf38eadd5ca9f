"""Single ops of the native backend, recorded by hand, against their definitions in numpy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold import _native, check
from kvfold.backends.native import _layout, _parts, _segment
from kvfold.backends.shared_experts import with_shared_experts_inside
from kvfold.cache.latent import CacheType, encode
from kvfold.config import GroupScore, MlaConfig, MoeConfig, Scoring
from kvfold.mla.absorb import KvUp, split_k_b_v_b, split_kv_b
from kvfold.mla.reference import attend
from kvfold.model.program import Recorder, Value, record
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import by_name

Array = NDArray[np.float32]
PAGES = 12


def tensor(name: str, array: Array) -> QuantTensor:
    raw = np.ascontiguousarray(array, np.float32).reshape(-1, array.shape[-1])
    return QuantTensor(name, by_name("F32"), array.shape, raw.view(np.uint8))


def stack(name: str, weight: Array | tuple[QuantTensor, ...]) -> tuple[QuantTensor, ...]:
    if isinstance(weight, tuple):
        return weight
    return tuple(tensor(name, part) for part in weight) if weight.ndim == 3 else (tensor(name, weight),)


@dataclass
class Bench:
    """A network of the caller's ops between an embedding and outputs, over a small cache.

    run() embeds row i of `x` as token i and returns what `network` handed to ops.output.
    """

    x: Array  # [T, hidden]
    network: Callable[[Recorder, Value], None]
    weights: dict[str, Array | tuple[QuantTensor, ...]] = field(default_factory=dict)
    cache_rows: tuple[int, ...] = (1,)
    cache_type: int = 0
    path: int = 1  # of every row
    fused: bool = True
    lengths: tuple[int, ...] = ()  # rows of each sequence; () is one sequence of all
    threads: int = 2
    workspace_bytes: int = 1 << 20
    rounds_activations: bool = False

    # What model.program.record asks of a model
    num_segments = 2

    def segment_name(self, index: int) -> str:
        return ("embed", "head")[index]

    def run_segment(self, ops: Recorder, index: int, x: Value | None) -> Value | None:
        if index == 0:
            return ops.embed("embed", "table")
        assert x is not None
        self.network(ops, x)
        return None

    @property
    def config(self) -> Any:
        return type("Config", (), {"hidden_size": self.x.shape[1]})

    def run(self) -> dict[str, Array]:
        num_rows = len(self.x)
        stored = {name: stack(name, weight) for name, weight in {"table": self.x, **self.weights}.items()}
        rows = {name: sum(part.rows for part in parts) for name, parts in stored.items()}
        self.recorded = recorded = with_shared_experts_inside(
            record(self, rows),  # type: ignore[arg-type]
            stored,
            rounds_activations=self.rounds_activations,
        )
        kind = list(CacheType)[self.cache_type]
        nan = {"float32": np.nan, "float16": np.nan, "uint16": 0xFFFF, "uint8": 0xFF}[kind.storage.name]
        self.cache = [np.full((1, PAGES, 64, kind.columns(width)), nan, kind.storage) for width in self.cache_rows]
        program = _native.Program(
            [_segment(s) for s in recorded.segments],
            [(n, *_layout(stored[n]), _parts(stored[n])) for n in recorded.weight_names],
            self.cache_type,
            [a.view(np.uint16) if a.dtype == np.float16 else a for a in self.cache],
            self.threads,
            self.workspace_bytes,
            self.rounds_activations,
        )
        outputs = {name: np.full((num_rows, width), np.nan, np.float32) for name, width in program.outputs}
        lengths = self.lengths or (num_rows,)
        pages = [-(-n // 64) for n in lengths]
        page_starts = np.cumsum([0, *pages]).astype(np.int32)
        order = np.random.default_rng(0).permutation(PAGES).astype(np.int32)[: page_starts[-1]]
        positions = np.concatenate([np.arange(n) for n in lengths])
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        run = _native.StepRun(
            program,
            token_ids=np.arange(num_rows, dtype=np.int32),
            slots=order[page_starts[sequence] + positions // 64].astype(np.int64) * 64 + positions % 64,
            row_starts=np.cumsum([0, *lengths]).astype(np.int32),
            kv_lens=np.asarray(lengths, np.int32),
            page_starts=page_starts,
            pages=order,
            segments=np.asarray([[self.path, self.fused, 0, len(lengths)]], np.int32),
            output_rows=np.arange(num_rows, dtype=np.int32),
            is_prompt=np.ones(len(lengths), np.int32),
            cos=np.zeros((num_rows, 0), np.float32),
            sin=np.zeros((num_rows, 0), np.float32),
            outputs=list(outputs.values()),
        )
        assert run.run(program.num_segments)
        return outputs


def hand_over(ops: Recorder, name: str, value: Value) -> None:
    ops.output(name, ops.take_outputs(f"take_{name}", value))


MLA = MlaConfig(
    num_heads=5,
    qk_nope_head_dim=24,
    qk_rope_head_dim=12,
    v_head_dim=20,
    kv_lora_rank=48,
    q_lora_rank=None,
    softmax_scale=0.3,
)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", [0, 1, 2])
@pytest.mark.parametrize("layout", ["kv_b", "k_b, v_b"])
def test_attention_is_the_reference(layout: str, path: int, fused: bool) -> None:
    """Every path against mla/reference.py, from the same queries and latents: three sequences, odd dimensions. 300 keys
    are two runs of pages on the absorbed path."""
    mla, lengths = MLA, (1, 300, 70)
    rng = np.random.default_rng(1)
    q_width, lora = mla.num_heads * mla.qk_head_dim, mla.kv_lora_rank
    x = rng.standard_normal((sum(lengths), q_width + mla.latent_dim)).astype(np.float32)
    x[:, :q_width] *= 1.5  # scores spread over +-10
    if layout == "kv_b":
        rows = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        weights = {"kv_b": rng.standard_normal((rows, lora)).astype(np.float32) / np.float32(np.sqrt(lora))}
        w_uk, w_uv = split_kv_b(weights["kv_b"], mla)
        up = KvUp(kv_b="kv_b")
    else:
        k_b = rng.standard_normal((mla.num_heads, lora, mla.qk_nope_head_dim)).astype(np.float32)
        v_b = rng.standard_normal((mla.num_heads, mla.v_head_dim, lora)).astype(np.float32)
        weights = {"k_b": k_b / np.float32(np.sqrt(lora)), "v_b": v_b}
        w_uk, w_uv = split_k_b_v_b(weights["k_b"], weights["v_b"], mla)
        up = KvUp(k_b="k_b", v_b="v_b")

    def network(ops: Recorder, value: Value) -> None:
        q = ops.columns(value, 0, q_width)
        c_kv, k_rope = ops.columns(value, q_width, q_width + lora), ops.columns(value, q_width + lora, value.width)
        if path == 0:
            ops.append_full("append", 0, c_kv, k_rope, up, mla)
            out = ops.attend_full("attend", 0, q, mla)
        else:
            ops.append_latent("append", 0, c_kv, k_rope)
            o_latent = ops.attend_latent("attend", 0, ops.fold_q("fold", q, up, mla), mla)
            out = ops.unfold_v("unfold", o_latent, up, mla)
            out = ops.attend_expanded("attend", 0, q, up, mla, into=out)
        hand_over(ops, "out", out)

    widths = (mla.num_heads * mla.qk_head_dim, mla.num_heads * mla.v_head_dim) if path == 0 else (mla.latent_dim,)
    bench = Bench(x, network, weights, cache_rows=widths, path=path, fused=fused, lengths=lengths)
    got = bench.run()["out"]
    start = 0
    for length in lengths:
        rows = x[start : start + length]
        expected = attend(
            rows[:, :q_width].reshape(length, mla.num_heads, -1),
            rows[:, q_width : q_width + lora],
            rows[:, q_width + lora :],
            w_uk,
            w_uv,
            mla,
        ).reshape(length, -1)
        assert np.abs(got[start : start + length] - expected).max() <= 3e-6 * np.abs(expected).max()
        start += length


def halves(cache_type: int) -> NDArray[np.uint16]:
    """Every finite number of the type, as its bits."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    return bits[np.isfinite(bits.view((None, np.float16, ml_dtypes.bfloat16)[cache_type]).astype(np.float32))]


@pytest.mark.parametrize("cache_type", [1, 2])
def test_every_half_is_read_exactly(cache_type: int) -> None:
    """One head, one key: its weight is 1, so attention returns the cached numbers themselves."""
    lora = 256
    mla = MlaConfig(1, 4, 2, lora, lora, None, 1.0)
    numbers = halves(cache_type).view((None, np.float16, ml_dtypes.bfloat16)[cache_type]).astype(np.float32)
    numbers = numbers[np.abs(numbers) < 2.0**100]  # times the zeros of the identity below
    for start in range(0, len(numbers), 8 * lora):
        part = np.resize(numbers[start : start + 8 * lora], (8, lora))
        x = np.concatenate([part, np.zeros((8, 2 + 6), np.float32)], axis=1)

        def network(ops: Recorder, value: Value) -> None:
            ops.append_latent("append", 0, ops.columns(value, 0, lora), ops.columns(value, lora, lora + 2))
            q = ops.fold_q("fold", ops.columns(value, lora + 2, lora + 8), KvUp(k_b="k_b", v_b="v_b"), mla)
            out = ops.unfold_v("unfold", ops.attend_latent("attend", 0, q, mla), KvUp(k_b="k_b", v_b="v_b"), mla)
            hand_over(ops, "out", out)

        weights = {"k_b": np.zeros((lora, 4), np.float32), "v_b": np.eye(lora, dtype=np.float32)}
        bench = Bench(x, network, weights, cache_rows=(lora + 2,), cache_type=cache_type, lengths=(1,) * 8)
        assert np.array_equal(bench.run()["out"], part)


@pytest.mark.parametrize("cache_type", [1, 2])
def test_cached_numbers_are_rounded_to_nearest_even(cache_type: int) -> None:
    dtype = (None, np.float16, ml_dtypes.bfloat16)[cache_type]
    exact = halves(cache_type).view(dtype).astype(np.float64)
    ties = (np.sort(exact)[:-1] + np.sort(exact)[1:]) / 2
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, 65519.996, 65520.0, 1e30, 1e-30, 1e-45, 3.3e38]
    with np.errstate(over="ignore"):
        numbers = np.concatenate([ties, np.nextafter(ties, 0), rng.standard_normal(4096), special]).astype(
            np.float32
        )
        width = -(-len(numbers) // 500)
        x = np.resize(numbers, (500, width))
        expected = x.astype(dtype)

    def network(ops: Recorder, value: Value) -> None:
        ops.append_latent("append", 0, ops.columns(value, 0, width - 2), ops.columns(value, width - 2, width))
        # A program has attention; this one's is not looked at.
        q = ops.fold_q("fold", ops.columns(value, 0, 6), KvUp(k_b="k_b", v_b="v_b"), mla)
        hand_over(ops, "out", ops.unfold_v("unfold", ops.attend_latent("attend", 0, q, mla), up, mla))

    mla, up = MlaConfig(1, 4, 2, 1, width - 2, None, 1.0), KvUp(k_b="k_b", v_b="v_b")
    weights = {"k_b": np.zeros((width - 2, 4), np.float32), "v_b": np.zeros((1, width - 2), np.float32)}
    bench = Bench(x, network, weights, cache_rows=(width,), cache_type=cache_type, workspace_bytes=8 << 20)
    bench.run()
    order = np.random.default_rng(0).permutation(PAGES)
    written = np.concatenate([bench.cache[0][0, page] for page in order])[:500]
    assert np.array_equal(written.view(np.uint16), expected.view(np.uint16))


def test_q8_0_rows_are_written_as_defined() -> None:
    """Rows of very different sizes, zeros, tiny blocks, halves between two codes, and blocks that are not finite."""
    lora, rope, mla = 96, 32, MlaConfig(1, 4, 32, 1, 96, None, 1.0)
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((400, lora + rope)) * np.exp(rng.normal(0, 8, (400, 4))).repeat(32, 1)).astype(
        np.float32
    )
    x[0], x[1] = 0, 1e-41
    x[2:300:3] = np.round(x[2:300:3] / np.abs(x[2:300:3]).max(1, keepdims=True) * 254) / 2
    x[300, 5], x[301, 40], x[302, 127] = np.nan, np.inf, 1e9

    def network(ops: Recorder, value: Value) -> None:
        ops.append_latent("append", 0, ops.columns(value, 0, lora), ops.columns(value, lora, lora + rope))
        q = ops.fold_q("fold", ops.columns(value, 0, 36), KvUp(k_b="k_b", v_b="v_b"), mla)
        out = ops.attend_latent("attend", 0, q, mla)
        hand_over(ops, "out", ops.unfold_v("unfold", out, KvUp(k_b="k_b", v_b="v_b"), mla))

    weights = {"k_b": np.zeros((lora, 4), np.float32), "v_b": np.zeros((1, lora), np.float32)}
    bench = Bench(x, network, weights, cache_rows=(lora + rope,), cache_type=3, workspace_bytes=8 << 20)
    bench.run()
    order = np.random.default_rng(0).permutation(PAGES)
    written = np.concatenate([bench.cache[0][0, page] for page in order])[:400]
    np.testing.assert_array_equal(written, encode(x, CacheType.Q8_0))


def routed(moe: MoeConfig, logits: Array, bias: Array | None) -> tuple[NDArray[np.int32], Array]:
    """The op's choice where its weight matrix is the identity, so that x are the logits."""

    def network(ops: Recorder, value: Value) -> None:
        experts = ops.columns(value, 0, moe.num_experts)
        ids, weights = ops.route("route", experts, "router", None if bias is None else "bias", moe)
        hand_over(ops, "ids", ids)
        hand_over(ops, "weights", weights)
        unread_attention(ops, value)

    weights = {"router": np.eye(moe.num_experts, dtype=np.float32), **UNREAD}
    if bias is not None:
        weights["bias"] = bias
    x = np.concatenate([logits, np.zeros((len(logits), 6), np.float32)], axis=1)
    outputs = Bench(x, network, weights, cache_rows=(6,)).run()
    return outputs["ids"].view(np.int32), outputs["weights"]


UNREAD = {"unread_k_b": np.zeros((4, 4), np.float32), "unread_v_b": np.zeros((1, 4), np.float32)}


def unread_attention(ops: Recorder, x: Value) -> None:
    """A program has attention; tests of other ops record one that nobody looks at."""
    mla, up = MlaConfig(1, 4, 2, 1, 4, None, 1.0), KvUp(k_b="unread_k_b", v_b="unread_v_b")
    six = ops.columns(x, x.width - 6, x.width)
    ops.append_latent("append", 0, ops.columns(six, 0, 4), ops.columns(six, 4, 6))
    o_latent = ops.attend_latent("attend", 0, ops.fold_q("fold", six, up, mla), mla)
    hand_over(ops, "unread", ops.unfold_v("unfold", o_latent, up, mla))


def moe_config(rule: str) -> MoeConfig:
    sizes = {
        "num_experts": 24,
        "num_experts_per_tok": 5,
        "expert_intermediate_size": 1,
        "shared_intermediate_size": 0,
    }
    if rule == "greedy":
        return MoeConfig(**sizes, scoring=Scoring.SOFTMAX)
    if rule == "group limited":
        return MoeConfig(
            **sizes, scoring=Scoring.SOFTMAX, num_groups=6, num_groups_per_tok=2, routed_scaling_factor=16.0
        )
    return MoeConfig(
        **sizes,
        scoring=Scoring.SIGMOID,
        num_groups=6,
        num_groups_per_tok=2,
        group_score=GroupScore.TOP2_SUM,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        has_choice_bias=True,
    )


@pytest.mark.parametrize("rule", ["greedy", "group limited", "sigmoid with bias"])
def test_routing_is_the_released_rule(rule: str) -> None:
    moe = moe_config(rule)
    rng = np.random.default_rng(2)
    logits = (2 * rng.standard_normal((200, moe.num_experts))).astype(np.float32)
    bias = rng.normal(0, 0.3, (1, moe.num_experts)).astype(np.float32) if moe.has_choice_bias else None
    ids, weights = routed(moe, logits, bias)
    expected_ids, expected = check.routed(logits.astype(np.float64), bias, moe)
    assert np.array_equal(ids, expected_ids)
    assert np.abs(weights - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("rule", ["greedy", "group limited", "sigmoid with bias"])
def test_a_row_with_nan_among_its_scores_has_no_weights(rule: str) -> None:
    moe = moe_config(rule)
    logits = np.random.default_rng(4).standard_normal((60, moe.num_experts)).astype(np.float32)
    logits[5, 0], logits[9, -1], logits[11, 7] = np.nan, -np.nan, np.nan
    for bias in (None, np.zeros((1, moe.num_experts), np.float32)) if moe.has_choice_bias else (None,):
        ids, weights = routed(moe, logits, bias)
        expected_ids, expected = check.routed(logits.astype(np.float64), bias, moe)
        assert np.isnan(weights[[5, 9, 11]]).all() and np.isnan(expected[[5, 9, 11]]).all()
        assert (ids >= 0).all() and (ids < moe.num_experts).all()
        others = np.delete(np.arange(60), [5, 9, 11])
        assert np.array_equal(ids[others], expected_ids[others])
        assert np.abs(weights - expected)[others].max() <= 1e-6 * np.abs(expected[others]).max()


@pytest.mark.parametrize("rule", ["greedy", "group limited", "sigmoid with bias"])
def test_equal_scores_go_to_the_lower_expert(rule: str) -> None:
    moe = moe_config(rule)
    rng = np.random.default_rng(3)
    logits = rng.integers(0, 3, (200, moe.num_experts)).astype(np.float32)  # ties among experts and among groups
    bias = np.zeros((1, moe.num_experts), np.float32) if moe.has_choice_bias else None
    assert np.array_equal(routed(moe, logits, bias)[0], check.routed(logits.astype(np.float64), bias, moe)[0])


def test_subsets_of_experts_add_up_to_all() -> None:
    """Each subset against float64; their union is the whole mixture. 1 MiB makes several windows of rows. Two of them
    beside shared experts, which are wider."""
    moe, hidden, inner, rows = moe_config("sigmoid with bias"), 32, 200, 400
    rng = np.random.default_rng(4)
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    x[:, -6:] = 0
    arrays = {
        "router": rng.standard_normal((moe.num_experts, hidden)).astype(np.float32),
        "bias": np.zeros((1, moe.num_experts), np.float32),
        "gate": rng.standard_normal((moe.num_experts, inner, hidden)).astype(np.float32) * np.float32(0.2),
        "up": rng.standard_normal((moe.num_experts, inner, hidden)).astype(np.float32) * np.float32(0.2),
        "down": rng.standard_normal((moe.num_experts, hidden, inner)).astype(np.float32) * np.float32(0.1),
        "shared_gate": rng.standard_normal((300, hidden)).astype(np.float32) * np.float32(0.2),
        "shared_up": rng.standard_normal((300, hidden)).astype(np.float32) * np.float32(0.2),
        "shared_down": rng.standard_normal((hidden, 300)).astype(np.float32) * np.float32(0.1),
        **UNREAD,
    }
    subsets: dict[str, Collection[int] | None] = {
        "all": None,
        "some": range(3, 11),
        "none": range(4, 4),
        "even": range(0, 24, 2),
        "odd": range(23, 0, -2),
        "any": (20, 1, 2, 17),
    }
    beside_shared = ("some", "none", "any")

    def network(ops: Recorder, value: Value) -> None:
        ids, weights = ops.route("route", value, "router", "bias", moe)
        hand_over(ops, "ids", ids)
        hand_over(ops, "weights", weights)
        for name, subset in subsets.items():
            out = ops.experts(name, value, ids, weights, "gate", "up", "down", subset)
            if name in beside_shared:
                gate, up = (ops.linear(f"{name} {part}", value, f"shared_{part}") for part in ("gate", "up"))
                inside = ops.swiglu(f"{name} swiglu", gate, up)
                out = ops.add(f"{name} add", out, ops.linear(f"{name} down", inside, "shared_down"))
            hand_over(ops, name, out)
        unread_attention(ops, value)

    bench = Bench(x, network, arrays, cache_rows=(6,))
    outputs = bench.run()
    assert not {"linear", "swiglu", "add"} & {op.kind for op in bench.recorded.segments[1].ops}
    ids = outputs["ids"].view(np.int32)

    def network_of(gate: Array, up: Array, down: Array) -> Any:
        gated = x.astype(np.float64) @ gate.T
        return (gated / (1 + np.exp(-gated)) * (x.astype(np.float64) @ up.T)) @ down.T

    for name, subset in subsets.items():
        expected = np.zeros((rows, hidden))
        if name in beside_shared:
            expected += network_of(*(arrays[f"shared_{part}"] for part in ("gate", "up", "down")))
        for e in subset if subset is not None else range(moe.num_experts):
            y = network_of(*(arrays[part][e] for part in ("gate", "up", "down")))
            expected += y * (outputs["weights"] * (ids == e)).sum(-1, keepdims=True)
        assert np.abs(outputs[name] - expected).max() <= 3e-6 * max(np.abs(expected).max(), 1e-30), name
