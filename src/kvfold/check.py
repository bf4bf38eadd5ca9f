"""Every native kernel against its definition, on the machine it is asked on: what `kvfold check` prints.

Definitions are quant/decode.py, quant/activations.py, mla/reference.py, mla/rope.py and cache/latent.py, in numpy. Sizes
are odd, inputs random and spread, memory that nothing wrote is NaN. Takes seconds; raises nothing for a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kvfold import _native
from kvfold.backends.native import CACHE_TYPES, NativeBackend
from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache, codes_and_scales, decode, encode
from kvfold.config import MlaConfig, MoeConfig, RopeConfig, Scoring
from kvfold.errors import SettingError
from kvfold.formats.synthetic import random_matrix, synthetic_types
from kvfold.mla.absorb import KvUp, split_k_b_v_b, split_kv_b
from kvfold.mla.plan import Path
from kvfold.mla.reference import attend
from kvfold.mla.rope import cos_sin, rotate
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.program import Recorder, Value
from kvfold.model.step import Step
from kvfold.quant.activations import Rounding, product, rounded, rounding_for
from kvfold.quant.attention import attend as attend_rounded
from kvfold.quant.attention import attend_codes, attend_latents
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor, Weight
from kvfold.quant.types import SIDE_BY_SIDE, by_id, by_name

Floats = NDArray[np.float32]

# The order of float32 sums is a kernel's own: 1e-5 of the root mean square of a row is 100 roundings.
PRODUCT_BOUND = 1e-5
ATTENTION_BOUND = 1e-5
# Where a kernel rounds its own intermediate numbers, a few lie across the middle between two codes.
ROUNDED_BOUND = 3e-2
ROWWISE_BOUND = 2e-6
WORKSPACE_BYTES = 16 << 20


@dataclass(frozen=True)
class Finding:
    """worst: the largest error of any number, as a share of the root mean square of its row."""

    kernel: str
    type: str
    isa: str
    worst: float
    bound: float

    @property
    def is_right(self) -> bool:
        return self.worst <= self.bound


def isas_of(setting: str) -> list[str]:
    """The instruction sets of a setting: all of this processor for auto. Raises SettingError for one it has not."""
    available = _native.isa_names()
    if setting not in ("auto", *available):
        raise SettingError(f"isa={setting}: this processor, system and build have {', '.join(available)}.")
    return available if setting == "auto" else [setting]


def check(isas: list[str], *, threads: int) -> Iterator[Finding]:
    """Every kernel of these instruction sets, one after the other. The set in use is as before when it ends."""
    yield from _decoders()
    before = _native.isa()
    try:
        for isa in isas:
            _native.force_isa(isa)
            yield from _products(isa, threads)
            yield from _ops(isa, threads)
            for name in ("IQ4_NL", "Q4_0", "Q5_0", "Q4_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"):
                yield _experts(name, isa, threads)
    finally:
        _native.force_isa(before)


def _error(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    """Infinite where a number is not finite."""
    size = np.sqrt((want.astype(np.float64) ** 2).mean(-1, keepdims=True)) + 1e-30
    worst = np.abs(got.astype(np.float64) - want) / size
    return float(np.nan_to_num(worst, nan=np.inf).max())


def _normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


# --- weights ----------------------------------------------------------------------------------------------------------


def _decoders() -> Iterator[Finding]:
    """Bit for bit, on every instruction set: they are compiled once."""
    decodable = _native.decodable_types()
    for type in map(by_name, synthetic_types()):
        if type.id not in decodable:
            continue
        cols = 5 * max(type.block_elements, 32)
        tensor = random_matrix(type, 3 * type.interleaved_rows, cols, seed=1)
        out = np.full((tensor.rows, cols), np.nan, np.float32)
        _native.decode(type.id, tensor.raw, out)
        yield Finding("decode", type.name, "any", _error(out, decode_tensor(tensor)), 0.0)


def _products(isa: str, threads: int) -> Iterator[Finding]:
    kernels = _native.Kernels(threads)
    known = set(synthetic_types())
    stored = [type for type in map(by_id, sorted(_native.kernel_types())) if type.name in known]
    in_memory = [type for type in SIDE_BY_SIDE.values() if type.id in _native.side_by_side_types(isa)]
    for type in (*stored, *in_memory):
        in_file, rows_of_weight = by_name(type.name_in_file), 67 // type.interleaved_rows * type.interleaved_rows
        weight = random_matrix(in_file, rows_of_weight, 3 * max(type.block_elements, 128), seed=2)
        raw = weight.raw.copy()
        if type.is_side_by_side:
            _native.put_side_by_side(in_file.id, raw)
        for kernel, counts in (("row dots", (1, 3)), ("tiles", (17, 300))):
            worst = 0.0
            for rows in counts:
                x = _normal(rows, weight.cols) * np.exp(_normal(rows, 1, seed=3))
                x[:, :32] *= 20
                out = np.full((rows, weight.rows), np.nan, np.float32)
                kernels.linear(type.id, raw, x, out)
                worst = max(worst, _error(out, product(x, weight)))
            yield Finding(kernel, type.name, isa, worst, PRODUCT_BOUND)


# --- ops --------------------------------------------------------------------------------------------------------------

_MLA = MlaConfig(
    num_heads=5,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    kv_lora_rank=96,
    q_lora_rank=None,
    softmax_scale=0.125,
)
_ROPE = RopeConfig(dim=32, theta=10000.0)
_LENGTHS = (1, 300, 17)
_Q = _MLA.num_heads * _MLA.qk_head_dim
_HIDDEN = _Q + _MLA.latent_dim
_EPS = 1e-6
_KV_B, _K_B_V_B = KvUp(kv_b="kv_b"), KvUp(k_b="k_b", v_b="v_b")


@dataclass(frozen=True)
class _Network:
    """What model/program.py asks of a model: an embedding of the rows of x, then ops of the caller's."""

    ops: Callable[[Recorder, Value], None]
    hidden: int

    num_segments = 2

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(hidden_size=self.hidden, rope=_ROPE)

    def segment_name(self, index: int) -> str:
        return ("embed", "head")[index]

    def run_segment(self, ops: Recorder, index: int, x: Value | None) -> Value | None:
        if x is None:
            return ops.embed("embed", "x")
        self.ops(ops, x)
        return None


def _attention(ops: Recorder, x: Value, path: Path, up: KvUp = _KV_B) -> Value:
    """x is [q | c_kv | k_rope], the rope parts still to be rotated."""
    lora = _MLA.kv_lora_rank
    q = ops.rope("q_rope", ops.columns(x, 0, _Q), _ROPE, head_dim=_MLA.qk_head_dim)
    c_kv = ops.columns(x, _Q, _Q + lora)
    k_rope = ops.rope("k_rope", ops.columns(x, _Q + lora, _HIDDEN), _ROPE, head_dim=_MLA.qk_rope_head_dim)
    if path is Path.STANDARD:
        ops.append_full("append", 0, c_kv, k_rope, up, _MLA)
        return ops.attend_full("attend", 0, q, _MLA)
    ops.append_latent("append", 0, c_kv, k_rope)
    o_latent = ops.attend_latent("attend", 0, ops.fold_q("fold", q, up, _MLA), _MLA)
    return ops.attend_expanded("expanded", 0, q, up, _MLA, into=ops.unfold_v("unfold", o_latent, up, _MLA))


def _run(
    network: Callable[[Recorder, Value], None],
    x: Floats,
    weights: dict[str, Weight],
    *,
    threads: int,
    path: Path = Path.ABSORBED,
    fused: bool = True,
    cache_type: CacheType = CacheType.F32,
    rounds_activations: bool = False,
) -> tuple[dict[str, Floats], PagedCache]:
    """What the ops handed over for rows of x, [T, width] each. Pages lie in another order than sequences."""
    widths = (_Q, _MLA.num_heads * _MLA.v_head_dim) if path is Path.STANDARD else (_MLA.latent_dim,)
    pages = [-(-length // PAGE_TOKENS) for length in _LENGTHS]
    cache = PagedCache(CacheLayout(1, widths, cache_type), sum(pages))
    for array in cache.arrays:
        array.view(np.uint8).fill(0xFF)  # NaN in every type
    backend = NativeBackend(
        cast(DeepseekModel, _Network(network, x.shape[1])),
        {"x": _float_weight("x", x), **weights},
        cache,
        threads=threads,
        workspace_bytes=WORKSPACE_BYTES,
        rounds_activations=rounds_activations,
    )
    order = np.random.default_rng(0).permutation(sum(pages)).astype(np.int32)
    page_starts = np.cumsum([0, *pages]).astype(np.int32)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in _LENGTHS])
    sequence = np.repeat(np.arange(len(_LENGTHS)), _LENGTHS)
    page = order[page_starts[sequence] + positions // PAGE_TOKENS].astype(np.int64)
    rows = np.arange(len(x), dtype=np.int32)
    step = Step(
        token_ids=rows,
        positions=positions,
        slots=page * PAGE_TOKENS + positions % PAGE_TOKENS,
        row_starts=np.cumsum([0, *_LENGTHS]).astype(np.int32),
        kv_lens=np.asarray(_LENGTHS, np.int32),
        page_starts=page_starts,
        pages=order,
        segments=np.asarray([[path.value, fused, 0, len(_LENGTHS)]], np.int32),
        output_rows=rows,
        is_prompt=np.ones(len(_LENGTHS), np.int32),
    )
    run = backend.start(step)
    run.run()
    return dict(run.outputs), cache


def _float_weight(name: str, values: Floats) -> QuantTensor:
    return QuantTensor(name, by_name("F32"), values.shape, np.ascontiguousarray(values).view(np.uint8))


@dataclass(frozen=True)
class _Up:
    """An up-projection in the blocks of a type, as one matrix or two, and what native rounds before it meets them
    (backends/plain.py)."""

    names: KvUp
    parts: tuple[QuantTensor, ...]  # kv_b, or k_b and v_b

    @classmethod
    def random(cls, names: KvUp, type_name: str) -> _Up:
        heads, lora, nope, v = _MLA.num_heads, _MLA.kv_lora_rank, _MLA.qk_nope_head_dim, _MLA.v_head_dim
        shapes = {"kv_b": (heads * (nope + v), lora), "k_b": (heads * lora, nope), "v_b": (heads * v, lora)}
        used = [name for name in shapes if getattr(names, name)]
        parts = (random_matrix(by_name(type_name), *shapes[name], seed=8 + at) for at, name in enumerate(used))
        return cls(names, tuple(replace(part, name=name) for part, name in zip(parts, used, strict=True)))

    @property
    def weights(self) -> dict[str, Weight]:
        return {part.name: part for part in self.parts}

    @property
    def split(self) -> tuple[Floats, Floats]:
        """W_UK [H, nope, lora] and W_UV [H, v, lora]."""
        decoded = [cast(Any, decode_tensor(part)) for part in self.parts]
        w_uk, w_uv = split_k_b_v_b(decoded[0], decoded[1], _MLA) if self.names.k_b else split_kv_b(decoded[0], _MLA)
        return w_uk, w_uv

    def rounded(self, x: Floats) -> NDArray[np.float64]:
        """What meets the rows of its blocks."""
        return rounded(np.ascontiguousarray(x), rounding_for(self.parts[-1].type))

    def folded(self, q_nope: Floats, w_uk: Floats) -> Floats:
        """Columns of kv_b have no scale in common to round for."""
        meeting = self.rounded(q_nope) if self.names.k_b else q_nope
        out: Floats = np.einsum("rhn,hnc->rhc", meeting, w_uk).astype(np.float32)
        return out

    def keys(self, c_kv: Floats, w_uk: Floats) -> Floats:
        """Columns of k_b are met in bfloat16."""
        left, right = (_bf16(c_kv), _bf16(w_uk)) if self.names.k_b else (self.rounded(c_kv), w_uk)
        keys: Floats = np.einsum("lc,hnc->lhn", left, right).astype(np.float32)
        return keys


def _bf16(x: Floats) -> Floats:
    return rounded(np.ascontiguousarray(x), Rounding.BF16).astype(np.float32)


def _rotated(x: Floats) -> tuple[Floats, Floats]:
    """(q [T, H, nope + rope], k_rope [T, rope]) of rows of x."""
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in _LENGTHS])
    cos, sin = cos_sin(_ROPE, positions)
    q = x[:, :_Q].reshape(len(x), _MLA.num_heads, -1).copy()
    q[..., _MLA.qk_nope_head_dim :] = rotate(q[..., _MLA.qk_nope_head_dim :], cos, sin, _ROPE)
    return q, rotate(x[:, -_MLA.qk_rope_head_dim :], cos, sin, _ROPE)


def _attended(x: Floats, up: _Up, cache_type: CacheType, path: Path, rounds: bool) -> NDArray[np.floating]:
    """The definition over what the cache returns: latents, or for mla=0 keys and values. rounds: keys and values that are
    expanded are attended on bfloat16 (quant/attention.py)."""

    def cached(numbers: Floats) -> Floats:
        return decode(encode(numbers, cache_type), cache_type)

    q, k_rope = _rotated(x)
    c_kv = x[:, _Q : _Q + _MLA.kv_lora_rank]
    parts = []
    for start, length in zip(np.cumsum([0, *_LENGTHS]), _LENGTHS, strict=False):
        rows = slice(start, start + length)
        if path is Path.STANDARD:
            parts.append(_ordinary(q[rows], *_expanded(c_kv[rows], k_rope[rows], up, cached), rounds))
        elif path is Path.DECOMPRESSED and rounds:
            latents = cached(c_kv[rows]), cached(k_rope[rows])
            parts.append(_ordinary(q[rows], *_expanded(*latents, up, lambda numbers: numbers), rounds))
        elif rounds:
            joined = np.concatenate([c_kv[rows], k_rope[rows]], -1)
            parts.append(_absorbed(q[rows], encode(joined, cache_type), cache_type, up))
        else:
            parts.append(attend(q[rows], cached(c_kv[rows]), cached(k_rope[rows]), *up.split, _MLA))
    return np.concatenate(parts).reshape(len(x), -1)


def _expanded(c_kv: Floats, k_rope: Floats, up: _Up, cached: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
    """Per-head keys and values, as the cache returns them: [L, H, nope + rope], [L, H, v]."""
    w_uk, w_uv = up.split
    k_nope = up.keys(c_kv, w_uk)
    k = cached(np.concatenate([k_nope, np.broadcast_to(k_rope[:, None], (*k_nope.shape[:2], k_rope.shape[1]))], -1))
    return k, cached(np.einsum("lc,hvc->lhv", up.rounded(c_kv), w_uv).astype(np.float32))


def _absorbed(q: Floats, stored: NDArray[np.generic], cache_type: CacheType, up: _Up) -> NDArray[np.floating]:
    """Causal attention of folded queries over rows of the cache, in the numbers of quant/attention.py: [T, H, v]."""
    lora, scale = _MLA.kv_lora_rank, _MLA.softmax_scale

    def over(row: Floats, seen: NDArray[np.generic]) -> NDArray[np.floating]:
        if cache_type is CacheType.Q8_0:
            return attend_codes(row, *codes_and_scales(seen), lora, scale)
        return attend_latents(row, decode(seen, cache_type), lora, scale)

    nope, (w_uk, w_uv) = _MLA.qk_nope_head_dim, up.split
    folded = np.concatenate([up.folded(q[..., :nope], w_uk), q[..., nope:]], -1)
    means = [over(row, stored[: i + 1]) for i, row in enumerate(folded)]
    out: NDArray[np.floating] = np.einsum("rhc,hvc->rhv", up.rounded(np.stack(means).astype(np.float32)), w_uv)
    return out


def _ordinary(q: Floats, k: Floats, v: Floats, rounds: bool) -> NDArray[np.floating]:
    """Causal attention over per-head keys and values: [T, H, v]."""
    if rounds:
        heads = [attend_rounded(q[:, h], k[:, h], v[:, h], _MLA.softmax_scale) for h in range(q.shape[1])]
        return np.stack(heads, 1)
    scores = np.einsum("rhd,lhd->hrl", q, k) * np.float32(_MLA.softmax_scale)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Floats = np.einsum("hrl,lhv->rhv", weights / weights.sum(-1, keepdims=True), v)
    return out


def _ops(isa: str, threads: int) -> Iterator[Finding]:
    x = _normal(sum(_LENGTHS), _HIDDEN)
    x[:, :_Q] *= 2  # scores spread over +-10
    lora, heads = _MLA.kv_lora_rank, _MLA.num_heads
    kv_b = _normal(heads * (_MLA.qk_nope_head_dim + _MLA.v_head_dim), lora, seed=4) / np.float32(np.sqrt(lora))
    gain = _normal(1, lora, seed=5)
    up = _Up(_KV_B, (_float_weight("kv_b", kv_b),))

    def rowwise(ops: Recorder, value: Value) -> None:
        latent, other = ops.columns(value, _Q, _Q + lora), ops.columns(value, 0, lora)
        for name, made in (
            ("norm", ops.norm("norm", latent, "gain", _EPS)),
            ("swiglu", ops.swiglu("swiglu", latent, other)),
            ("add", ops.add("add", latent, other)),
        ):
            ops.output(name, ops.take_outputs(f"take_{name}", made))
        ops.output("attention", ops.take_outputs("take", _attention(ops, value, Path.ABSORBED)))
        ops.output("rope", ops.take_outputs("take_rope", ops.columns(value, 0, _Q)))

    got, _ = _run(rowwise, x, up.weights | {"gain": _float_weight("gain", gain)}, threads=threads)
    latent, other = x[:, _Q : _Q + lora].astype(np.float64), x[:, :lora].astype(np.float64)
    wanted = {
        "norm": latent / np.sqrt((latent**2).mean(-1, keepdims=True) + _EPS) * gain,
        "swiglu": latent / (1 + np.exp(-latent)) * other,
        "add": latent + other,
        "rope": _rotated(x)[0].reshape(len(x), -1),
    }
    for name, want in wanted.items():
        yield Finding(name, "f32", isa, _error(got[name], want), ROWWISE_BOUND)

    for path in Path:
        for cache_type in CACHE_TYPES:
            for fused in (True, False):
                for rounds in (False, True):
                    yield _attention_finding(path, cache_type, fused, rounds, x, up, isa, threads)
    x[:, _Q : _Q + lora] /= np.float32(np.sqrt(lora))  # weights of blocks have the size of one
    for type_name in ("IQ4_NL", "Q4_0", "Q8_0", "F16", "BF16"):
        for names in (_KV_B, _K_B_V_B):
            for path in (Path.ABSORBED, Path.DECOMPRESSED):
                up = _Up.random(names, type_name)
                yield _attention_finding(path, CacheType.F16, True, True, x, up, isa, threads)


def _attention_finding(
    path: Path,
    cache_type: CacheType,
    fused: bool,
    rounds: bool,
    x: Floats,
    up: _Up,
    isa: str,
    threads: int,
) -> Finding:
    def network(ops: Recorder, value: Value) -> None:
        ops.output("out", ops.take_outputs("take", _attention(ops, value, path, up.names)))

    got, _ = _run(
        network,
        x,
        up.weights,
        threads=threads,
        path=path,
        fused=fused,
        cache_type=cache_type,
        rounds_activations=rounds,
    )
    # mla=0 rounds what it has expanded.
    exact = not rounds and (cache_type is CacheType.F32 or path is not Path.STANDARD)
    type = up.parts[0].type.name
    how = "int8" if rounds else "float32"
    name = f"attention, {path.name.lower()}, {'fused' if fused else 'unfused'}, {how}"
    if type != "F32":
        name = f"attention, {path.name.lower()}, {' and '.join(part.name for part in up.parts)}"
    worst = _error(got["out"], _attended(x, up, cache_type, path, rounds))
    shown = cache_type.value if type == "F32" else type
    return Finding(name, shown, isa, worst, ATTENTION_BOUND if exact else ROUNDED_BOUND)


def _experts(type_name: str, isa: str, threads: int) -> Finding:
    """Few rows for one expert and many for another, all of them for the shared ones, which are wider; all of one type."""
    type, inner, wide, hidden = by_name(type_name), 256, 512, 768
    moe = MoeConfig(
        num_experts=5,
        num_experts_per_tok=2,
        expert_intermediate_size=inner,
        shared_intermediate_size=wide,
        scoring=Scoring.SOFTMAX,
    )
    x = _normal(sum(_LENGTHS), hidden, seed=6)
    x[:, :_HIDDEN] = _normal(len(x), _HIDDEN, seed=6)
    router = _normal(moe.num_experts, hidden, seed=7) * np.float32(0.1)
    stacks = {
        name: tuple(random_matrix(type, rows, cols, seed=10 * seed + e) for e in range(moe.num_experts))
        for seed, (name, rows, cols) in enumerate(
            (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)), 1
        )
    }
    shared = {
        f"shared_{name}": random_matrix(type, rows, cols, seed=seed)
        for seed, (name, rows, cols) in enumerate(
            (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)), 41
        )
    }

    def network(ops: Recorder, value: Value) -> None:
        ids, weights = ops.route("route", value, "router", None, moe)
        out = ops.experts("experts", value, ids, weights, "gate", "up", "down")
        gate, up = (ops.linear(name, value, name) for name in ("shared_gate", "shared_up"))
        inside = ops.linear("shared_down", ops.swiglu("swiglu", gate, up), "shared_down")
        out = ops.add("add_shared", out, inside)
        for name, made in (("ids", ids), ("weights", weights), ("out", out)):
            ops.output(name, ops.take_outputs(f"take_{name}", made))
        attention = _attention(ops, ops.columns(value, 0, _HIDDEN), Path.ABSORBED)
        ops.output("attention", ops.take_outputs("take", attention))

    kv_b = _normal(_MLA.num_heads * (_MLA.qk_nope_head_dim + _MLA.v_head_dim), _MLA.kv_lora_rank)
    got, _ = _run(
        network,
        x,
        {"router": _float_weight("router", router), "kv_b": _float_weight("kv_b", kv_b), **stacks, **shared},
        threads=threads,
        rounds_activations=True,
    )
    ids, chosen = got["ids"].view(np.int32), got["weights"]
    scores = np.exp((logits := x.astype(np.float64) @ router.T) - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    routed = np.take_along_axis(scores, np.argsort(-scores, axis=-1)[:, :2], axis=-1)

    def gated(gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> NDArray[np.float64]:
        of_gate = product(x, gate)
        inside = (of_gate / (1 + np.exp(-of_gate)) * product(x, up)).astype(np.float32)
        return rounded(inside, rounding_for(type)) @ decode_tensor(down).astype(np.float64).T

    want = gated(*shared.values())
    for e in range(moe.num_experts):
        want += gated(*(stack[e] for stack in stacks.values())) * (chosen * (ids == e)).sum(-1, keepdims=True)
    worst = max(_error(got["out"], want), _error(chosen, routed))
    return Finding("experts", type_name, isa, worst, PRODUCT_BOUND if type_name == "F32" else ROUNDED_BOUND)
