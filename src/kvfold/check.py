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
from kvfold.config import GroupScore, MlaConfig, MoeConfig, RopeConfig, Scoring
from kvfold.errors import SettingError
from kvfold.formats.synthetic import random_matrix, synthetic_types
from kvfold.mla.absorb import KvUp, split_k_b_v_b, split_kv_b
from kvfold.mla.plan import Path
from kvfold.mla.reference import attend
from kvfold.mla.rope import cos_sin, rotate
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.program import Recorder, Value
from kvfold.model.step import Int32, Step
from kvfold.quant.activations import product, rounded, rounding_for
from kvfold.quant.attention import Numbers, attend_codes, attend_latents, dots
from kvfold.quant.attention import attend as attend_rounded
from kvfold.quant.decode import FP8_BLOCK, decode_tensor
from kvfold.quant.tensor import QuantTensor, Weight
from kvfold.quant.types import SIDE_BY_SIDE, TYPES, BlockType, by_id, by_name

Floats = NDArray[np.float32]

# The order of float32 sums is a kernel's own: 1e-5 of the root mean square of a row is 100 roundings.
PRODUCT_BOUND = 1e-5
ATTENTION_BOUND = 1e-5
# Where a kernel rounds its own intermediate numbers, a few lie across the middle between two codes.
ROUNDED_BOUND = 3e-2
ROWWISE_BOUND = 2e-6
WORKSPACE_BYTES = 16 << 20
MEMBER_BYTES = 256 << 10  # of workspace for each thread: the largest program takes 120 KiB


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
    attended: _Attended = {}
    mixed: _Mixed = {}
    try:
        for isa in isas:
            _native.force_isa(isa)
            yield from _products(isa, threads)
            yield from _float_products(isa, threads)
            yield from _ops(isa, threads, attended)
            yield from _routes(isa, threads)
            for mixture in _mixtures(isa):
                yield _experts(mixture, isa, threads, mixed)
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


# Of types that random files are not written in: number and form of the scales that a block, or a group of interleaved rows,
# begins with.
_SCALES = {"Q8_1": (2, "<f2"), "Q8_K": (1, "<f4"), "IQ1_S_R4": (4, "<f2"), "IQ1_M_R4": (4, "<f2")}
_FP8_NAN = 0x7F


def _matrix(type: BlockType, rows: int, cols: int, *, seed: int) -> QuantTensor:
    """Random weights of any type that decodes; whole numbers of every size, others of about 1."""
    if type.name in synthetic_types():
        return random_matrix(type, rows, cols, seed=seed)
    rng = np.random.default_rng([seed, type.id % 2**32])
    raw = rng.integers(0, 256, (rows, type.row_bytes(cols)), np.uint8)
    if type.name in _SCALES:
        count, form = _SCALES[type.name]
        in_unit = type.block_bytes if not type.row_meta_bytes else type.interleaved_rows * raw.shape[1]
        units = raw.reshape(-1, in_unit)
        scales = rng.uniform(-0.02, 0.02, (len(units), count)).astype(form).view(np.uint8)
        units[:, : scales.shape[1]] = scales
    elif type.name == "F64":
        raw = rng.standard_normal((rows, cols)).view(np.uint8)
    elif type.name == "F8_E4M3":
        raw[raw & _FP8_NAN == _FP8_NAN] = 0
        tiles = -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)
        return QuantTensor("random", type, (rows, cols), raw, rng.uniform(0.5, 2, tiles).astype(np.float32))
    return QuantTensor("random", type, (rows, cols), raw)


def _decoders() -> Iterator[Finding]:
    """Bit for bit, on every instruction set: they are compiled once."""
    decodable = _native.decodable_types()
    for type in TYPES:
        if type.id not in decodable:
            continue
        cols = 5 * max(type.block_elements, 32)
        tensor = _matrix(type, 3 * type.interleaved_rows, cols, seed=1)
        out = np.full((tensor.rows, cols), np.nan, np.float32)
        if tensor.scale is None:
            _native.decode(type.id, tensor.raw, out)
        else:
            _native.decode_fp8(tensor.raw, tensor.scale, out)
        yield Finding("decode", type.name, "any", _error(out, decode_tensor(tensor)), 0.0)


def _products(isa: str, threads: int) -> Iterator[Finding]:
    kernels = _native.Kernels(threads)
    stored = map(by_id, sorted(_native.kernel_types()))
    in_memory = [type for type in SIDE_BY_SIDE.values() if type.id in _native.side_by_side_types(isa)]
    for type in (*stored, *in_memory):
        in_file, rows_of_weight = by_name(type.name_in_file), 67 // type.interleaved_rows * type.interleaved_rows
        weight = _matrix(in_file, rows_of_weight, 3 * max(type.block_elements, 128), seed=2)
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
_LENGTHS = (1, 300, 17)  # a sequence of one row comes first
_STARTS = np.cumsum([0, *_LENGTHS[:-1]], dtype=np.int32)
_LAST_ROWS = np.cumsum(_LENGTHS) - 1
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
    x: Floats | QuantTensor,
    weights: dict[str, Weight],
    *,
    threads: int,
    path: Path = Path.ABSORBED,
    fused: bool = True,
    cache_type: CacheType = CacheType.F32,
    rounds_activations: bool = False,
    generates: bool = False,
) -> tuple[dict[str, Floats], PagedCache]:
    """What the ops handed over for rows of x, [T, width] each. Pages lie in another order than sequences, and rows in the
    table of the embedding. generates: the last row of each sequence (_LAST_ROWS) in a step behind the others', and what the ops
    handed over for those."""
    widths = (_Q, _MLA.num_heads * _MLA.v_head_dim) if path is Path.STANDARD else (_MLA.latent_dim,)
    pages = [-(-length // PAGE_TOKENS) for length in _LENGTHS]
    cache = PagedCache(CacheLayout(1, widths, cache_type), sum(pages))
    for array in cache.arrays:
        array.view(np.uint8).fill(0xFF)  # NaN in every type
    table = _float_weight("x", x) if isinstance(x, np.ndarray) else x
    backend = NativeBackend(
        cast(DeepseekModel, _Network(network, table.cols)),
        {"x": table, **weights},
        cache,
        threads=threads,
        workspace_bytes=max(WORKSPACE_BYTES, threads * MEMBER_BYTES),
        rounds_activations=rounds_activations,
    )
    order = np.random.default_rng(0).permutation(sum(pages)).astype(np.int32)
    page_starts = np.cumsum([0, *pages]).astype(np.int32)

    def outputs_of(begins: Int32, ends: Int32, is_prompt: bool) -> dict[str, Floats]:
        """Of the rows from begins to ends of each sequence."""
        counts, sequences = ends - begins, np.arange(len(_LENGTHS))
        positions = np.concatenate(
            [np.arange(*of_one, dtype=np.int32) for of_one in zip(begins, ends, strict=True)]
        )
        page = order[page_starts[np.repeat(sequences, counts)] + positions // PAGE_TOKENS].astype(np.int64)
        some = sequences[counts > 0]
        run = backend.start(
            Step(
                token_ids=positions + np.repeat(_STARTS, counts),
                positions=positions,
                slots=page * PAGE_TOKENS + positions % PAGE_TOKENS,
                row_starts=np.cumsum([0, *counts[some]]).astype(np.int32),
                kv_lens=ends[some],
                page_starts=page_starts[some[0] :] - page_starts[some[0]],
                pages=order[page_starts[some[0]] :],
                segments=np.asarray([[path.value, fused, 0, len(some)]], np.int32),
                output_rows=np.arange(len(positions), dtype=np.int32),
                is_prompt=np.full(len(some), is_prompt, np.int32),
            )
        )
        run.run()
        return dict(run.outputs)

    lengths, none = np.asarray(_LENGTHS, np.int32), np.zeros(len(_LENGTHS), np.int32)
    if not generates:
        return outputs_of(none, lengths, True), cache
    outputs_of(none, lengths - 1, True)
    return outputs_of(lengths - 1, lengths, False), cache


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
        """Columns of k_b are met in the numbers of scores."""
        if self.names.k_b:
            return np.stack([dots(c_kv, of_head, _numbers()) for of_head in w_uk], 1).astype(np.float32)
        keys: Floats = np.einsum("lc,hnc->lhn", self.rounded(c_kv), w_uk).astype(np.float32)
        return keys


def _numbers() -> Numbers:
    """Of the instruction set in use."""
    return Numbers(_native.attention_numbers())


_Attended = dict[tuple[Path, CacheType, Numbers | None, str, KvUp], NDArray[np.floating]]
"""What attention gives by its definition, once for all forms and the instruction sets of the same numbers: by path, cache
type, numbers where activations are rounded, and the type and parts of the up-projection."""


def _rotated(x: Floats) -> tuple[Floats, Floats]:
    """(q [T, H, nope + rope], k_rope [T, rope]) of rows of x."""
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in _LENGTHS])
    cos, sin = cos_sin(_ROPE, positions)
    q = x[:, :_Q].reshape(len(x), _MLA.num_heads, -1).copy()
    q[..., _MLA.qk_nope_head_dim :] = rotate(q[..., _MLA.qk_nope_head_dim :], cos, sin, _ROPE)
    return q, rotate(x[:, -_MLA.qk_rope_head_dim :], cos, sin, _ROPE)


def _attended(x: Floats, up: _Up, cache_type: CacheType, path: Path, rounds: bool) -> NDArray[np.floating]:
    """The definition over what the cache returns: latents, or for mla=0 keys and values. rounds: keys and values that are
    expanded are attended as quant/attention.py says."""

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
        heads = [
            attend_rounded(q[:, h], k[:, h], v[:, h], _MLA.softmax_scale, _numbers()) for h in range(q.shape[1])
        ]
        return np.stack(heads, 1)
    scores = np.einsum("rhd,lhd->hrl", q, k) * np.float32(_MLA.softmax_scale)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Floats = np.einsum("hrl,lhv->rhv", weights / weights.sum(-1, keepdims=True), v)
    return out


def _ops(isa: str, threads: int, attended: _Attended) -> Iterator[Finding]:
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
    yield from _embeddings(isa, threads)

    for path in Path:
        for cache_type in CACHE_TYPES:
            for fused in (True, False):
                for rounds in (False, True):
                    for generates in (False, True):
                        yield _attention_finding(
                            path, cache_type, fused, rounds, generates, x, up, isa, threads, attended
                        )
    x[:, _Q : _Q + lora] /= np.float32(np.sqrt(lora))  # weights of blocks have the size of one
    for type_name in ("IQ4_NL", "Q4_0", "Q8_0", "F16", "BF16"):
        for names in (_KV_B, _K_B_V_B):
            for path in (Path.ABSORBED, Path.DECOMPRESSED):
                up = _Up.random(names, type_name)
                for generates in (False, True):
                    yield _attention_finding(
                        path, CacheType.F16, True, True, generates, x, up, isa, threads, attended
                    )


def _attention_finding(
    path: Path,
    cache_type: CacheType,
    fused: bool,
    rounds: bool,
    generates: bool,
    x: Floats,
    up: _Up,
    isa: str,
    threads: int,
    attended: _Attended,
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
        generates=generates,
    )
    # mla=0 rounds what it has expanded.
    exact = not rounds and (cache_type is CacheType.F32 or path is not Path.STANDARD)
    type = up.parts[0].type.name
    how = "int8" if rounds else "float32"
    name = f"attention, {path.name.lower()}, {'fused' if fused else 'unfused'}, {how}"
    if type != "F32":
        name = f"attention, {path.name.lower()}, {' and '.join(part.name for part in up.parts)}"
    if generates:
        name += ", a row over cached ones"
    key = path, cache_type, _numbers() if rounds else None, type, up.names
    if key not in attended:
        attended[key] = _attended(x, up, cache_type, path, rounds)
    worst = _error(got["out"], attended[key][_LAST_ROWS] if generates else attended[key])
    shown = cache_type.value if type == "F32" else type
    return Finding(name, shown, isa, worst, ATTENTION_BOUND if exact else ROUNDED_BOUND)


def _unseen() -> dict[str, Weight]:
    """The up-projection of `_attends_too`."""
    kv_b = _normal(_MLA.num_heads * (_MLA.qk_nope_head_dim + _MLA.v_head_dim), _MLA.kv_lora_rank)
    return {"kv_b": _float_weight("kv_b", kv_b)}


def _attends_too(ops: Recorder, x: Value) -> None:
    """A program has attention: one that nobody looks at, over the first columns of x."""
    attention = _attention(ops, ops.columns(x, 0, _HIDDEN), Path.ABSORBED)
    ops.output("attention", ops.take_outputs("take_attention", attention))


def _embeddings(isa: str, threads: int) -> Iterator[Finding]:
    """Rows of a table in blocks, bit for bit."""

    def network(ops: Recorder, value: Value) -> None:
        ops.output("out", ops.take_outputs("take", value))
        _attends_too(ops, value)

    for name in ("Q4_K", "Q6_K", "Q8_0", "IQ4_NL", "BF16"):
        table = replace(random_matrix(by_name(name), sum(_LENGTHS), 512, seed=3), name="x")
        got, _ = _run(network, table, _unseen(), threads=threads)
        yield Finding("embed", name, isa, _error(got["out"], decode_tensor(table)), 0.0)


def _exact_product(x: Floats, weight: QuantTensor) -> NDArray[np.float64]:
    return x.astype(np.float64) @ decode_tensor(weight).astype(np.float64).T


def _float_products(isa: str, threads: int) -> Iterator[Finding]:
    """Weights of every type that decodes become panels of float32, interleaved rows and scales of tiles among them."""
    cols = 768  # whole blocks of any type, and what `_attends_too` wants
    x = _normal(sum(_LENGTHS), cols, seed=9)
    for type in TYPES:
        if not type.decodes:
            continue
        weight = replace(
            _matrix(type, 67 // type.interleaved_rows * type.interleaved_rows, cols, seed=2), name="weight"
        )

        def network(ops: Recorder, value: Value) -> None:
            ops.output("out", ops.take_outputs("take", ops.linear("linear", value, "weight")))
            _attends_too(ops, value)

        got, _ = _run(network, x, {"weight": weight, **_unseen()}, threads=threads)
        yield Finding("panels", type.name, isa, _error(got["out"], _exact_product(x, weight)), PRODUCT_BOUND)


# --- experts ----------------------------------------------------------------------------------------------------------

_GREEDY = MoeConfig(
    num_experts=5,
    num_experts_per_tok=2,
    expert_intermediate_size=256,
    shared_intermediate_size=512,
    scoring=Scoring.SOFTMAX,
)
_IN_GROUPS = replace(_GREEDY, num_experts=24, num_experts_per_tok=5, num_groups=6, num_groups_per_tok=2)
_RULES = {
    "softmax": replace(_GREEDY, num_experts=24, num_experts_per_tok=5),
    "softmax, groups": replace(_IN_GROUPS, routed_scaling_factor=16.0),
    "sigmoid, groups, bias": replace(
        _IN_GROUPS,
        scoring=Scoring.SIGMOID,
        group_score=GroupScore.TOP2_SUM,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        has_choice_bias=True,
    ),
}


def _routes(isa: str, threads: int) -> Iterator[Finding]:
    """Every released rule. The experts have to be the same; the error is that of their weights."""
    x = _normal(sum(_LENGTHS), 512, seed=6)
    for name, moe in _RULES.items():
        router = _normal(moe.num_experts, x.shape[1], seed=7) * np.float32(0.1)
        bias = _normal(1, moe.num_experts, seed=8) * np.float32(0.3) if moe.has_choice_bias else None

        def network(ops: Recorder, value: Value, moe: MoeConfig = moe, biased: bool = bias is not None) -> None:
            made = ops.route("route", value, "router", "bias" if biased else None, moe)
            for what, of_route in zip(("ids", "weights"), made, strict=True):
                ops.output(what, ops.take_outputs(f"take_{what}", of_route))
            _attends_too(ops, value)

        weights = {"router": _float_weight("router", router), **_unseen()}
        if bias is not None:
            weights["bias"] = _float_weight("bias", bias)
        got, _ = _run(network, x, weights, threads=threads)
        ids, factors = routed(x.astype(np.float64) @ router.T, bias, moe)
        are_the_same = np.array_equal(got["ids"].view(np.int32), ids)
        worst = _error(got["weights"], factors) if are_the_same else np.inf
        yield Finding(f"route, {name}", "f32", isa, worst, PRODUCT_BOUND)


def routed(
    logits: NDArray[np.float64], bias: Floats | None, moe: MoeConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The released rules (model/ops.py, `route`), equal scores by the lower index: ids [T, k] and weights [T, k], NaN where a
    score of the row is."""
    if moe.scoring is Scoring.SIGMOID:
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    choice = scores if bias is None else scores + bias
    spoiled = np.isnan(choice).any(-1)
    if moe.num_groups > 1:
        groups = choice.reshape(len(choice), moe.num_groups, -1)
        sums_two = moe.group_score is GroupScore.TOP2_SUM
        rank = np.sort(groups, -1)[..., -2:].sum(-1) if sums_two else groups.max(-1)
        refused = np.argsort(-rank, axis=-1, kind="stable")[:, moe.num_groups_per_tok :]
        groups = groups.copy()
        np.put_along_axis(groups, refused[..., None], -np.inf if sums_two else 0.0, axis=1)
        choice = groups.reshape(choice.shape)
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, : moe.num_experts_per_tok]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if moe.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    weights[spoiled] = np.nan
    return ids, weights * moe.routed_scaling_factor


@dataclass(frozen=True)
class _Mixture:
    """Routed experts beside shared ones, which are wider. Types: of gate and up, and of down."""

    routed: tuple[str, str]
    shared: tuple[str, str]
    subset: tuple[int, ...] | None = None
    is_side_by_side: bool = False
    rounds: bool = True

    @property
    def kernel(self) -> str:
        if not self.rounds:
            return "experts, float32"
        if self.is_side_by_side:
            return "experts, rows side by side"
        if self.subset is not None:
            return f"experts, {len(self.subset)} of {_GREEDY.num_experts}"
        return "experts" if self.routed == self.shared else "experts beside shared ones of other types"

    @property
    def type(self) -> str:
        return ", ".join(dict.fromkeys((*self.routed, *self.shared)))


def _mixtures(isa: str) -> Iterator[_Mixture]:
    for name in ("IQ4_NL", "Q4_0", "Q5_0", "Q4_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"):
        yield _Mixture((name, name), (name, name))
    yield _Mixture(("Q4_K", "Q5_0"), ("Q6_K", "Q8_0"))
    yield _Mixture(("IQ4_NL", "Q8_0"), ("F16", "BF16"))
    for name in ("IQ4_NL", "F32"):
        yield _Mixture((name, name), (name, name), subset=(0, 3))
        yield _Mixture((name, name), (name, name), rounds=False)
    in_memory = _native.side_by_side_types(isa)
    for name, type in SIDE_BY_SIDE.items():
        if type.id in in_memory:
            yield _Mixture((name, name), (name, name), is_side_by_side=True)


_Mixed = dict[tuple[tuple[str, str], tuple[str, str], tuple[int, ...] | None, bool], NDArray[np.float64]]
"""What mixtures give by their definition, once for all instruction sets: by the types of routed and shared experts, the
subset, and whether activations are rounded."""


def _experts(mixture: _Mixture, isa: str, threads: int, mixed: _Mixed) -> Finding:
    """Few rows for one expert and many for another, all of them for the shared ones."""
    moe, hidden = _GREEDY, 512
    x = _normal(sum(_LENGTHS), hidden, seed=6)
    x[:, :_HIDDEN] = _normal(len(x), _HIDDEN, seed=6)
    router = _normal(moe.num_experts, hidden, seed=7) * np.float32(0.1)

    def network_of(types: tuple[str, str], inner: int, seed: int) -> tuple[QuantTensor, ...]:
        """gate, up and down."""
        gate_up, down = map(by_name, types)
        shapes = ((gate_up, inner, hidden), (gate_up, inner, hidden), (down, hidden, inner))
        return tuple(random_matrix(*shape, seed=seed + 10 * at) for at, shape in enumerate(shapes))

    def placed(weight: QuantTensor) -> QuantTensor:
        if not mixture.is_side_by_side:
            return weight
        raw = weight.raw.copy()
        _native.put_side_by_side(weight.type.id, raw)
        return replace(weight, type=SIDE_BY_SIDE[weight.type.name], raw=raw)

    networks = [network_of(mixture.routed, moe.expert_intermediate_size, 10 + e) for e in range(moe.num_experts)]
    shared = network_of(mixture.shared, moe.shared_intermediate_size, 41)
    names = ("gate", "up", "down")
    stacks: dict[str, Weight] = {
        name: tuple(map(placed, parts)) for name, parts in zip(names, zip(*networks, strict=True), strict=True)
    }
    wide = {f"shared_{name}": placed(weight) for name, weight in zip(names, shared, strict=True)}

    def network(ops: Recorder, value: Value) -> None:
        ids, weights = ops.route("route", value, "router", None, moe)
        out = ops.experts("experts", value, ids, weights, "gate", "up", "down", mixture.subset)
        gate, up = (ops.linear(name, value, name) for name in ("shared_gate", "shared_up"))
        inside = ops.linear("shared_down", ops.swiglu("swiglu", gate, up), "shared_down")
        out = ops.add("add_shared", out, inside)
        ops.output("out", ops.take_outputs("take", out))
        _attends_too(ops, value)

    weights = {"router": _float_weight("router", router), **_unseen(), **stacks, **wide}
    got, _ = _run(network, x, weights, threads=threads, rounds_activations=mixture.rounds)

    def multiplied(x: Floats, weight: QuantTensor) -> NDArray[np.float64]:
        return product(x, weight) if mixture.rounds else _exact_product(x, weight)

    def gated(x: Floats, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> NDArray[np.float64]:
        of_gate = multiplied(x, gate)
        return multiplied((of_gate / (1 + np.exp(-of_gate)) * multiplied(x, up)).astype(np.float32), down)

    key = mixture.routed, mixture.shared, mixture.subset, mixture.rounds
    if key not in mixed:
        ids, factors = routed(x.astype(np.float64) @ router.T, None, moe)
        mixed[key] = gated(x, *shared)
        for e in range(moe.num_experts) if mixture.subset is None else mixture.subset:
            rows = (ids == e).any(-1)
            mixed[key][rows] += gated(x[rows], *networks[e]) * (factors * (ids == e)).sum(-1, keepdims=True)[rows]
    bound = PRODUCT_BOUND if mixture.type == "F32" or not mixture.rounds else ROUNDED_BOUND
    return Finding(mixture.kernel, mixture.type, isa, _error(got["out"], mixed[key]), bound)
