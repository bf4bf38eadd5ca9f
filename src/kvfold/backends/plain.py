"""Backend `plain`: every op at once, in torch. The readable definition, the fallback, and the judge of the others.

Weights stay in the blocks of their file and are decoded at use; nothing is cached between ops. Keys, values and scores
of attention fit `workspace_bytes`: heads go in groups. fa=1 holds a tile of keys at a time, so a long prompt needs no more
scratch than a short one. fa=0 holds the scores of a tile of rows and the keys of one group for the whole sequence: at
least those of one head (mla=1: the latents) and one row, whatever the bound is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold import _native
from kvfold.cache.latent import PAGE_TOKENS, CacheType, PagedCache, codes_and_scales, decode, encode
from kvfold.config import GroupScore, MlaConfig, MoeConfig, RopeConfig, Scoring
from kvfold.errors import Cancelled
from kvfold.mla.absorb import KvUp, split_k_b_v_b, split_kv_b
from kvfold.mla.plan import Path
from kvfold.mla.rope import cos_sin, pair_columns
from kvfold.model.deepseek import DeepseekModel
from kvfold.model.step import Step
from kvfold.quant.activations import experts_round, rounded, rounding_for
from kvfold.quant.attention import Numbers, attend, attend_codes, attend_latents, dots
from kvfold.quant.tensor import QuantTensor, Weights
from kvfold.quant.types import BlockType

Tap = Callable[[str, Tensor], None]


class PlainBackend:
    """dtype: float32, bfloat16 (products of bf16 values; norms, softmax, routing and sums over experts in float32), or
    float64, which no setting names: nothing is rounded to less, and the arrays of the cache, float64 as well, hold what
    they are given. There two ways to compute the same differ by 1e-13 of it, so a comparison is of the ways alone.

    rounds_activations: with float32, linear layers and experts round what they multiply weights by as
    quant/activations.py says, and attention rounds as quant/attention.py says, ordinary attention in
    attention_numbers: what native computes in dtype int8, op by op to 1e-5 of a row.
    tap: called with the name and the value of every op's result; it may overwrite the value, as a comparison does that
    replays another engine's expert ids where a router is undecided.
    """

    name = "plain"

    def __init__(
        self,
        model: DeepseekModel,
        weights: Weights,
        cache: PagedCache,
        *,
        dtype: torch.dtype = torch.float32,
        rounds_activations: bool = False,
        attention_numbers: Numbers = Numbers.WHOLE,
        threads: int = 1,
        workspace_bytes: int = 256 << 20,
        tap: Tap | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.cache = cache
        self.dtype = dtype
        self.rounds_activations = rounds_activations
        self.attention_numbers = attention_numbers
        self.threads = threads
        self.workspace_bytes = workspace_bytes
        self.tap = tap

    def start(self, step: Step) -> PlainRun:
        """ValueError where one path comes in two forms: an op works on one range of rows."""
        seen: set[int] = set()
        for path, *_ in step.segments.tolist():
            if path in seen:
                raise ValueError(f"segments: path {path} twice, expected once.")
            seen.add(path)
        return PlainRun(self.model, PlainOps(self, step))


class PlainRun:
    """Implements model.step.StepRun."""

    def __init__(self, model: DeepseekModel, ops: PlainOps) -> None:
        self._model = model
        self._ops = ops
        self._x: Tensor | None = None
        self._cancelled = False
        self.position = 0

    @property
    def outputs(self) -> Mapping[str, NDArray[np.float32]]:
        return {name: self._ops.wide(x).numpy() for name, x in self._ops.outputs.items()}

    def cancel(self) -> None:
        self._cancelled = True

    def run(self, last: int | None = None) -> int:
        stop = self._model.num_segments if last is None else last
        with torch.inference_mode():
            while self.position < stop:
                if self._cancelled:
                    self._cancelled = False
                    raise Cancelled(f"The step was cancelled before segment {self.position}.")
                self._x = self._model.run_segment(self._ops, self.position, self._x)
                self.position += 1
        return self.position


@dataclass
class _Online:
    """Softmax over key tiles that arrive one after another: running maximum, sum and weighted values, float32 or 64."""

    maximum: Tensor  # [H, R, 1]
    total: Tensor  # [H, R, 1]
    values: Tensor  # [H, R, v]

    @classmethod
    def empty(cls, heads: int, rows: int, width: int, dtype: torch.dtype) -> _Online:
        maximum = torch.full((heads, rows, 1), -math.inf, dtype=dtype)
        return cls(maximum, torch.zeros_like(maximum), torch.zeros(heads, rows, width, dtype=dtype))

    def absorb(self, scores: Tensor, values: Tensor) -> None:
        """scores [H, R, K], -inf where masked; every row must see at least one key of its first tile."""
        maximum = torch.maximum(self.maximum, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - maximum)
        shrink = torch.exp(self.maximum - maximum)
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)
        self.values = self.values * shrink + (weights.to(values.dtype) @ values).to(self.values.dtype)
        self.maximum = maximum

    def result(self) -> Tensor:
        return self.values / self.total


class PlainOps:
    """The ops of one step, computed eagerly. Implements model.ops.Ops[Tensor]."""

    def __init__(self, backend: PlainBackend, step: Step) -> None:
        self._backend = backend
        self._step = step
        self._dtype = backend.dtype
        self._wide_dtype = torch.promote_types(backend.dtype, torch.float32)
        self._rope_tables: dict[RopeConfig, tuple[Tensor, Tensor]] = {}
        self.outputs: dict[str, Tensor] = {}

    def _done(self, name: str, x: Tensor) -> Tensor:
        if self._backend.tap is not None:
            self._backend.tap(name, x)
        return x

    def wide(self, x: Tensor) -> Tensor:
        """At least float32."""
        return x.to(self._wide_dtype)

    # Weights

    def _matrix(self, name: str) -> Tensor:
        tensor = self._backend.weights[name]
        if isinstance(tensor, tuple):  # one matrix per head: stacked rows
            return torch.cat([self._decode(t) for t in tensor])
        return self._decode(tensor)

    def _stack(self, name: str) -> tuple[QuantTensor, ...]:
        """One matrix per expert."""
        tensor = self._backend.weights[name]
        assert isinstance(tensor, tuple), name
        return tensor

    def _decode(self, tensor: QuantTensor) -> Tensor:
        out = np.empty((tensor.rows, tensor.cols), np.float32)
        if tensor.scale is None:
            _native.decode(tensor.type.id, tensor.raw, out, self._backend.threads)
        else:
            _native.decode_fp8(tensor.raw, tensor.scale, out, self._backend.threads)
        return self.wide(torch.from_numpy(out)).reshape(tensor.shape)

    def _up(self, kv_up: KvUp, mla: MlaConfig) -> tuple[Tensor, Tensor]:
        """w_uk [H, nope, kv_lora], w_uv [H, v, kv_lora] in the compute type."""
        if kv_up.kv_b is not None:
            return split_kv_b(self._matrix(kv_up.kv_b).to(self._dtype), mla)
        assert kv_up.k_b is not None and kv_up.v_b is not None
        k_b, v_b = self._matrix(kv_up.k_b), self._matrix(kv_up.v_b)
        return split_k_b_v_b(k_b.to(self._dtype), v_b.to(self._dtype), mla)

    # Row-wise ops

    def embed(self, name: str, table: str) -> Tensor:
        tensor = self._backend.weights[table]
        assert isinstance(tensor, QuantTensor)
        out = np.empty((self._step.num_rows, tensor.cols), np.float32)
        _native.decode_rows(tensor.type.id, tensor.raw, self._step.token_ids, out)
        return self._done(name, torch.from_numpy(out).to(self._dtype))

    def norm(self, name: str, x: Tensor, weight: str, eps: float) -> Tensor:
        wide = self.wide(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return self._done(name, (wide * self._matrix(weight)).to(self._dtype))

    def _rounded(self, x: Tensor, type: BlockType) -> Tensor:
        """What weights of a type are multiplied by."""
        if not self._backend.rounds_activations:
            return x
        return torch.from_numpy(rounded(x.numpy(), rounding_for(type)).astype(np.float32))

    def _type(self, weight: str | None) -> BlockType:
        assert weight is not None
        tensor = self._backend.weights[weight]
        return (tensor[0] if isinstance(tensor, tuple) else tensor).type

    def linear(self, name: str, x: Tensor, weight: str) -> Tensor:
        x = self._rounded(x, self._type(weight))
        return self._done(name, x @ self._matrix(weight).to(self._dtype).T)

    def columns(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, start:stop]

    def rope(self, name: str, x: Tensor, rope: RopeConfig, *, head_dim: int) -> Tensor:
        if rope not in self._rope_tables:
            cos, sin = cos_sin(rope, self._step.positions)
            self._rope_tables[rope] = torch.from_numpy(cos)[:, None, :], torch.from_numpy(sin)[:, None, :]
        cos_t, sin_t = self._rope_tables[rope]
        part = x.view(x.shape[0], -1, head_dim)[..., head_dim - rope.dim :]
        first, second = pair_columns(rope)
        a, b = self.wide(part[..., first]), self.wide(part[..., second])
        part[..., first], part[..., second] = (
            (a * cos_t - b * sin_t).to(x.dtype),
            (a * sin_t + b * cos_t).to(x.dtype),
        )
        return self._done(name, x)

    def swiglu(self, name: str, gate: Tensor, up: Tensor) -> Tensor:
        return self._done(name, torch.nn.functional.silu(gate) * up)

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self._done(name, x + y)

    def take_outputs(self, name: str, x: Tensor) -> Tensor:
        return self._done(name, x[torch.from_numpy(self._step.output_rows).long()])

    def output(self, name: str, x: Tensor) -> None:
        self.outputs[name] = x

    # Experts

    def route(self, name: str, x: Tensor, weight: str, bias: str | None, moe: MoeConfig) -> tuple[Tensor, Tensor]:
        logits = self.wide(x) @ self._matrix(weight).T
        scores = logits.softmax(-1) if moe.scoring is Scoring.SOFTMAX else logits.sigmoid()
        choice = scores if bias is None else scores + self._matrix(bias).reshape(1, -1)
        self._done(f"{name}.choice", choice)
        is_spoiled = choice.isnan().any(-1, keepdim=True)
        if moe.num_groups > 1:
            groups = choice.view(len(x), moe.num_groups, -1)
            if moe.group_score is GroupScore.TOP2_SUM:
                rank, refused = groups.topk(2, dim=-1).values.sum(-1), -math.inf
            else:
                rank, refused = groups.amax(-1), 0.0  # the released V2 code fills 0.0, V3 -inf
            kept = torch.zeros_like(rank, dtype=torch.bool)
            kept.scatter_(1, rank.topk(moe.num_groups_per_tok, dim=-1).indices, True)
            choice = groups.masked_fill(~kept[..., None], refused).view(len(x), -1)
        ids = self._done(f"{name}.ids", choice.topk(moe.num_experts_per_tok, dim=-1).indices)
        weights = scores.gather(1, ids)
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = (weights * moe.routed_scaling_factor).masked_fill(is_spoiled, math.nan)
        return ids, self._done(name, weights)

    def experts(
        self,
        name: str,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate: str,
        up: str,
        down: str,
        subset: Collection[int] | None = None,
    ) -> Tensor:
        stacks = [self._stack(w) for w in (gate, up, down)]
        types = [stack[0].type for stack in stacks]

        def product(x: Tensor, weight: QuantTensor) -> Tensor:
            if experts_round(*types):
                x = self._rounded(x, weight.type)
            return x @ self._decode(weight).to(self._dtype).T

        out = torch.zeros(x.shape, dtype=self._wide_dtype)
        for expert in np.unique(ids.numpy()).tolist():
            if subset is not None and expert not in subset:
                continue
            rows, choices = (ids == expert).nonzero(as_tuple=True)
            w_gate, w_up, w_down = (stack[expert] for stack in stacks)
            hidden = torch.nn.functional.silu(product(x[rows], w_gate)) * product(x[rows], w_up)
            out.index_add_(0, rows, self.wide(product(hidden, w_down)) * weights[rows, choices, None])
        return self._done(name, out.to(self._dtype))

    # The cache

    def _cached(self, array: int, layer: int) -> NDArray[np.generic]:
        """[num_pages * PAGE_TOKENS, columns] of one layer, sharing memory with the cache."""
        rows: NDArray[np.generic] = self._backend.cache.arrays[array][layer]
        return rows.reshape(-1, rows.shape[-1])

    def _write(self, array: int, layer: int, rows: Tensor) -> None:
        values = self.wide(rows).numpy()
        if self._dtype is not torch.float64:
            values = encode(values, self._backend.cache.layout.cache_type)
        self._cached(array, layer)[self._step.slots] = values

    def _keys(
        self, array: int, layer: int, sequence: int, start: int, stop: int, columns: slice = slice(None)
    ) -> Tensor:
        """Columns of the cached rows of tokens [start, stop) of a sequence, `start` at a page: [stop - start, ..]."""
        stored = self._stored(array, layer, sequence, start, stop, columns)
        if self._dtype is not torch.float64:
            stored = decode(stored, self._backend.cache.layout.cache_type)
        return torch.from_numpy(stored).to(self._dtype)

    def _stored(
        self, array: int, layer: int, sequence: int, start: int, stop: int, columns: slice = slice(None)
    ) -> NDArray[np.generic]:
        pages = self._step.page_list(sequence)[start // PAGE_TOKENS : -(-stop // PAGE_TOKENS)]
        slots = pages.astype(np.int64)[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)
        cache_type = self._backend.cache.layout.cache_type
        stored = slice(*(None if at is None else cache_type.columns(at) for at in (columns.start, columns.stop)))
        picked: NDArray[np.generic] = self._cached(array, layer)[:, stored][slots.reshape(-1)[: stop - start]]
        return picked

    def append_latent(self, name: str, layer: int, c_kv: Tensor, k_rope: Tensor) -> None:
        self._write(0, layer, self._done(name, torch.cat([c_kv, k_rope], dim=-1)))

    def append_full(self, name: str, layer: int, c_kv: Tensor, k_rope: Tensor, kv_up: KvUp, mla: MlaConfig) -> None:
        k, v = self._expand(c_kv, k_rope, *self._up(kv_up, mla), kv_up)
        self._write(0, layer, self._done(f"{name}.k", k.transpose(0, 1).flatten(1)))
        self._write(1, layer, self._done(f"{name}.v", v.transpose(0, 1).flatten(1)))

    # Attention. Queries are [H, R, d], keys [H or 1, K, d], so that one matrix product serves all heads.

    def fold_q(self, name: str, q: Tensor, kv_up: KvUp, mla: MlaConfig) -> Tensor:
        out = q.new_empty(len(q), mla.num_heads * mla.latent_dim)
        rows = self._rows(Path.ABSORBED)
        if rows is not None:
            w_uk, _ = self._up(kv_up, mla)
            per_head = q[rows].view(-1, mla.num_heads, mla.qk_head_dim)
            q_nope = per_head[..., : mla.qk_nope_head_dim]
            if kv_up.k_b is not None:  # columns of kv_b have no scale in common to round for
                q_nope = self._rounded(q_nope, self._type(kv_up.k_b))
            folded = torch.einsum("rhn,hnc->rhc", q_nope, w_uk)
            out[rows] = torch.cat([folded, per_head[..., mla.qk_nope_head_dim :]], dim=-1).flatten(1)
        return self._done(name, out)

    def attend_latent(self, name: str, layer: int, q_latent: Tensor, mla: MlaConfig) -> Tensor:
        out = q_latent.new_empty(len(q_latent), mla.num_heads * mla.kv_lora_rank)
        for sequence, rows, fused in self._sequences(Path.ABSORBED):
            if self._backend.rounds_activations:
                out[rows] = self._attend_latents_rounded(q_latent[rows], layer, sequence, mla)
                continue

            def latents(start: int, stop: int, sequence: int = sequence) -> tuple[Tensor, Tensor]:
                keys = self._keys(0, layer, sequence, start, stop)[None]
                return keys, keys[..., : mla.kv_lora_rank]

            q = q_latent[rows].view(-1, mla.num_heads, mla.latent_dim).transpose(0, 1)
            out[rows] = self._attend(q, latents, sequence, mla.softmax_scale, fused, mla.latent_dim)
        return self._done(name, out)

    def _attend_latents_rounded(self, q_latent: Tensor, layer: int, sequence: int, mla: MlaConfig) -> Tensor:
        """quant/attention.py, row by row: [R, H * kv_lora]."""
        num_keys = int(self._step.kv_lens[sequence])
        stored = self._stored(0, layer, sequence, 0, num_keys)
        cache_type, lora, scale = self._backend.cache.layout.cache_type, mla.kv_lora_rank, mla.softmax_scale
        first = num_keys - len(q_latent)  # of these rows; each sees itself
        rows = list(enumerate(q_latent.view(len(q_latent), mla.num_heads, -1).numpy(), first + 1))
        if cache_type is CacheType.Q8_0:
            codes, scales = codes_and_scales(stored)
            means = [attend_codes(q, codes[:seen], scales[:seen], lora, scale) for seen, q in rows]
        else:
            latents = decode(stored, cache_type)
            means = [attend_latents(q, latents[:seen], lora, scale) for seen, q in rows]
        return torch.from_numpy(np.stack(means)).flatten(1).to(self._dtype)

    def unfold_v(self, name: str, o_latent: Tensor, kv_up: KvUp, mla: MlaConfig) -> Tensor:
        out = o_latent.new_empty(len(o_latent), mla.num_heads * mla.v_head_dim)
        rows = self._rows(Path.ABSORBED)
        if rows is not None:
            _, w_uv = self._up(kv_up, mla)
            per_head = o_latent[rows].view(-1, mla.num_heads, mla.kv_lora_rank)
            per_head = self._rounded(per_head, self._type(kv_up.kv_b or kv_up.v_b))
            out[rows] = torch.einsum("rhc,hvc->rhv", per_head, w_uv).flatten(1)
        return self._done(name, out)

    def attend_expanded(
        self, name: str, layer: int, q: Tensor, kv_up: KvUp, mla: MlaConfig, into: Tensor
    ) -> Tensor:
        if self._rows(Path.DECOMPRESSED) is None:
            return into
        w_uk, w_uv = self._up(kv_up, mla)
        for sequence, rows, fused in self._sequences(Path.DECOMPRESSED):
            per_head = q[rows].view(-1, mla.num_heads, mla.qk_head_dim).transpose(0, 1)
            for heads in self._head_groups(mla, sequence, fused):

                def expanded(
                    start: int, stop: int, sequence: int = sequence, heads: slice = heads
                ) -> tuple[Tensor, Tensor]:
                    latents = self._keys(0, layer, sequence, start, stop)
                    c_kv, k_rope = latents[:, : mla.kv_lora_rank], latents[:, mla.kv_lora_rank :]
                    return self._expand(c_kv, k_rope, w_uk[heads], w_uv[heads], kv_up)

                width = (heads.stop - heads.start) * (mla.qk_head_dim + mla.v_head_dim)
                columns = slice(heads.start * mla.v_head_dim, heads.stop * mla.v_head_dim)
                into[rows, columns] = self._attend(
                    per_head[heads], expanded, sequence, mla.softmax_scale, fused, width
                )
        return self._done(name, into)

    def attend_full(self, name: str, layer: int, q: Tensor, mla: MlaConfig) -> Tensor:
        out = q.new_empty(len(q), mla.num_heads * mla.v_head_dim)
        for sequence, rows, fused in self._sequences(Path.STANDARD):
            per_head = q[rows].view(-1, mla.num_heads, mla.qk_head_dim).transpose(0, 1)
            for heads in self._head_groups(mla, sequence, fused):
                size = heads.stop - heads.start
                k_columns = slice(heads.start * mla.qk_head_dim, heads.stop * mla.qk_head_dim)
                v_columns = slice(heads.start * mla.v_head_dim, heads.stop * mla.v_head_dim)

                def cached(
                    start: int,
                    stop: int,
                    sequence: int = sequence,
                    size: int = size,
                    k_columns: slice = k_columns,
                    v_columns: slice = v_columns,
                ) -> tuple[Tensor, Tensor]:
                    k = self._keys(0, layer, sequence, start, stop, k_columns).view(-1, size, mla.qk_head_dim)
                    v = self._keys(1, layer, sequence, start, stop, v_columns).view(-1, size, mla.v_head_dim)
                    return k.transpose(0, 1), v.transpose(0, 1)

                width = size * (mla.qk_head_dim + mla.v_head_dim)
                out[rows, v_columns] = self._attend(
                    per_head[heads], cached, sequence, mla.softmax_scale, fused, width
                )
        return self._done(name, out)

    def _expand(
        self, c_kv: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, kv_up: KvUp
    ) -> tuple[Tensor, Tensor]:
        """Latents to K [H, L, nope + rope] and V [H, L, v]; the rope part is shared by all heads."""
        rounded = self._rounded(c_kv, self._type(kv_up.kv_b or kv_up.v_b))
        if self._backend.rounds_activations and kv_up.k_b is not None:
            numbers, latents = self._backend.attention_numbers, c_kv.numpy()
            products = np.stack([dots(latents, of_head, numbers) for of_head in w_uk.numpy()])
            k_nope = torch.from_numpy(products).to(self._dtype)
        else:
            k_nope = torch.einsum("lc,hnc->hln", rounded, w_uk)
        k = torch.cat([k_nope, k_rope[None].expand(len(w_uk), -1, -1)], dim=-1)
        return k, torch.einsum("lc,hvc->hlv", rounded, w_uv)

    def _attend(
        self,
        q: Tensor,  # [H, R, d]
        keys_values: Callable[[int, int], tuple[Tensor, Tensor]],  # token range -> [H or 1, K, d], [H or 1, K, v]
        sequence: int,
        scale: float,
        fused: bool,
        key_width: int,  # numbers that keys_values holds per key
    ) -> Tensor:
        """Causal attention of a sequence's last R tokens, tile by tile: [R, H * v]."""
        num_heads, num_rows, _ = q.shape
        num_keys = int(self._step.kv_lens[sequence])
        first_row = num_keys - num_rows
        if self._backend.rounds_activations:
            return self._attend_rounded(q, *keys_values(0, num_keys), scale)

        def scores(rows: slice, k: Tensor, start: int) -> Tensor:
            s = self.wide(q[:, rows] @ k.transpose(1, 2)) * scale
            keys = torch.arange(start, start + k.shape[1])
            future = keys[None, :] > (first_row + torch.arange(rows.start, rows.stop))[:, None]
            return s.masked_fill(future, -math.inf)

        if not fused:
            k, v = keys_values(0, num_keys)
            parts = []
            for rows in self._row_tiles(num_rows, num_heads * num_keys):
                weights = scores(rows, k, 0).softmax(-1).to(v.dtype)
                parts.append(self.wide(weights @ v))
            return torch.cat(parts, dim=1).transpose(0, 1).flatten(1).to(self._dtype)

        key_tile = self._tile(self._backend.workspace_bytes // 2, key_width, PAGE_TOKENS, 8 * PAGE_TOKENS)
        tiles = [slice(a, min(a + key_tile, num_keys)) for a in range(0, num_keys, key_tile)]
        row_tiles = list(self._row_tiles(num_rows, num_heads * key_tile))
        state: list[_Online | None] = [None] * len(row_tiles)
        for tile in tiles:
            k, v = keys_values(tile.start, tile.stop)
            for i, rows in enumerate(row_tiles):
                if tile.start > first_row + rows.stop - 1:
                    continue  # every key of this tile lies in the future of every row
                online = state[i] or _Online.empty(num_heads, rows.stop - rows.start, v.shape[-1], self._wide_dtype)
                online.absorb(scores(rows, k, tile.start), v)
                state[i] = online
        results = [online.result() for online in state if online is not None]
        return torch.cat(results, dim=1).transpose(0, 1).flatten(1).to(self._dtype)

    def _attend_rounded(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """quant/attention.py: q [H, R, d], k [H, L, d], v [H, L, v]. [R, H * v]."""
        (_, num_rows, _), num_keys = q.shape, k.shape[1]
        out = np.empty((num_rows, len(q), v.shape[-1]), np.float32)
        for head, (q_head, k_head, v_head) in enumerate(zip(q.numpy(), k.numpy(), v.numpy(), strict=True)):
            for rows in self._row_tiles(num_rows, 8 * num_keys):  # scores and what becomes of them, in float64
                seen = num_keys - num_rows + rows.stop
                out[rows, head] = attend(
                    q_head[rows], k_head[:seen], v_head[:seen], scale, self._backend.attention_numbers
                )
        return torch.from_numpy(out).flatten(1).to(self._dtype)

    # Ranges and tiles

    def _rows(self, path: Path) -> slice | None:
        """The rows of the segment that takes this path."""
        segment = self._step.segment(path.value)
        if segment is None:
            return None
        _, sequences = segment
        return slice(int(self._step.row_starts[sequences.start]), int(self._step.row_starts[sequences.stop]))

    def _sequences(self, path: Path) -> Iterator[tuple[int, slice, bool]]:
        """(sequence, its rows, fused) of the segment that takes this path."""
        segment = self._step.segment(path.value)
        if segment is not None:
            for sequence in segment[1]:
                yield sequence, self._step.rows(sequence), segment[0]

    def _head_groups(self, mla: MlaConfig, sequence: int, fused: bool) -> Iterator[slice]:
        """Heads whose keys and values fit half of the workspace: all keys without fusing or where attention rounds, else a
        tile of 512."""
        tiled = fused and not self._backend.rounds_activations
        keys = 8 * PAGE_TOKENS if tiled else int(self._step.kv_lens[sequence])
        per_head = keys * (mla.qk_head_dim + mla.v_head_dim)
        size = self._tile(self._backend.workspace_bytes // 2, per_head, 1, mla.num_heads)
        for start in range(0, mla.num_heads, size):
            yield slice(start, min(start + size, mla.num_heads))

    def _row_tiles(self, num_rows: int, floats_per_row: int) -> Iterator[slice]:
        """Rows whose scores fit half of the workspace."""
        size = self._tile(self._backend.workspace_bytes // 2, floats_per_row, 1, num_rows)
        for start in range(0, num_rows, size):
            yield slice(start, min(start + size, num_rows))

    @staticmethod
    def _tile(nbytes: int, floats_each: int, step: int, most: int) -> int:
        """The largest multiple of `step` up to `most` of which `floats_each` numbers fit; at least one step."""
        return max(step, min(most, nbytes // (4 * floats_each) // step * step))
