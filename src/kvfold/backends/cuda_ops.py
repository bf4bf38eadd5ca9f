"""The ops of one step on a GPU. Implements model.ops.Ops[Value].

A value is a promise: an op says what is wanted, and whatever needs the numbers launches the kernel. So a sum waits for the
norm behind it, both projections of a gated network for their swiglu, rotations and the latent's norm for the append to the
cache, and each such group is one launch. Nothing here waits for the device, so a step can be captured.

Hidden rows are float32; what products read has the backend's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvfold.backends.cuda_step import MOST_ROWS, DecodeLaunch, DeviceStep, PromptKeys, expanded_bytes
from kvfold.backends.cuda_weights import Rows
from kvfold.cache.latent import PAGE_TOKENS
from kvfold.config import GroupScore, MlaConfig, MoeConfig, Pairing, RopeConfig, Scoring
from kvfold.kernels import (
    merged_unfold,
    number_product,
    rounded_product,
    row_attention,
    row_product,
    rows,
    tile_product,
)
from kvfold.kernels.cached_blocks import append_blocks, gather_rows
from kvfold.kernels.choose import take_chosen
from kvfold.kernels.head_decode import attend_cached, attend_expanding
from kvfold.kernels.matrix import SCALE_ROWS, Matrix
from kvfold.kernels.mla_decode import mla_decode
from kvfold.kernels.mla_prefill import mla_prefill
from kvfold.kernels.number_product import Norm
from kvfold.kernels.rounding import is_mixed
from kvfold.kernels.rows import LatentRow, RoutingRule
from kvfold.mla.absorb import KvUp
from kvfold.mla.plan import Path

if TYPE_CHECKING:
    from kvfold.backends.cuda import CudaBackend

# Up to so many rows a product reads each weight once a row (from L2 after the first); above, weights are decoded once and
# multiplied by cuBLAS. Decoded in tiles on matrix units instead, V2-Lite's matrices of Q4_0, 57 programs each, made a step of
# 16 rows 12.5 ms instead of 8.2 and one of 64 rows 20.4 instead of 15.0.
ROW_PRODUCT_ROWS = 4


class Value:
    """Numbers [rows, width], made when first asked for. What they are made of is forgotten then."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            assert self._make is not None
            self.set(self._make())
        assert self._tensor is not None
        return self._tensor

    def set(self, tensor: Tensor) -> None:
        """A kernel that computed more than it was asked for has made this value too."""
        self._tensor, self._make = tensor, None

    @property
    def is_made(self) -> bool:
        return self._tensor is not None


def made(tensor: Tensor) -> Value:
    value = Value(lambda: tensor)
    value.set(tensor)
    return value


class Normed(Value):
    """The RMS norm of rows; a product of few rows takes them as they are and norms them itself."""

    def __init__(self, x: Value, norm: Norm, make: Callable[[], Tensor]) -> None:
        super().__init__(make)
        self.x = x
        self.norm = norm


class Product(Value):
    """x @ W^T, not multiplied yet."""

    def __init__(self, x: Value, weight: Rows, make: Callable[[], Tensor]) -> None:
        super().__init__(make)
        self.x: Value | None = x
        self.weight = weight

    def set(self, tensor: Tensor) -> None:
        super().set(tensor)
        self.x = None


class Gated(Value):
    """silu(gate) * up."""

    def __init__(self, gate: Value, up: Value, make: Callable[[], Tensor]) -> None:
        super().__init__(make)
        self.gate = gate
        self.up = up


class Choice(Value):
    """Expert ids of rows x."""

    def __init__(
        self, x: Value, router: Matrix, bias: Tensor | None, rule: RoutingRule, make: Callable[[], Tensor]
    ) -> None:
        super().__init__(make)
        self.x = x
        self.router = router
        self.bias = bias
        self.rule = rule


class Experts(Value):
    """The chosen experts' weighted sum; matrices: gate, up, down."""

    def __init__(self, choice: Value, matrices: tuple[Matrix, Matrix, Matrix], make: Callable[[], Tensor]) -> None:
        super().__init__(make)
        self.choice = choice
        self.matrices = matrices


class Folded(Value):
    """Queries against latents, of rows whose append is left to the launch that makes them; q: [T, H * qk_head_dim] before."""

    def __init__(self, q: Tensor, new: LatentRow, make: Callable[[], Tensor]) -> None:
        super().__init__(make)
        self.q = q
        self.new = new


class Attended(Value):
    """Values of decode attention of q; launch(False) leaves what several parts hold of a row unmerged."""

    def __init__(self, q: Value, launch: Callable[[bool], Tensor]) -> None:
        super().__init__(lambda: launch(True))
        self.q = q
        self.launch = launch


class Sum(Value):
    """Two or three values, float32; the first is the hidden rows."""

    def __init__(self, terms: tuple[Value, ...], make: Callable[[], Tensor]) -> None:
        super().__init__(make)
        self.terms = terms

    def set(self, tensor: Tensor) -> None:
        super().set(tensor)
        self.terms = ()


class Columns(Value):
    def __init__(self, x: Value, start: int, stop: int) -> None:
        super().__init__(lambda: x.tensor[:, start:stop])
        self.x = x
        self.start = start


@dataclass(eq=False)
class Latent:
    """What append_latent needs, left undone until then: c_kv's norm and the rotations of k_rope and q."""

    weight: str = ""
    eps: float = 0.0
    q: Value | None = None
    head_dim: int = 0
    kv_a: Tensor | None = None  # with pool: left to the launch that folds q too
    pool: Tensor | None = None


class CudaOps:
    def __init__(self, backend: CudaBackend, step: DeviceStep) -> None:
        self._backend = backend
        self.step = step
        self._dtype = backend.dtype
        self._latent = Latent()
        self._num_rows = step.num_rows  # of hidden rows; behind the last attention the step's output rows
        # (x, matrix) by identity -> x, which keeps that identity, and the whole product
        self._products: dict[tuple[int, int], tuple[Value, Tensor]] = {}
        self.outputs: dict[str, Tensor] = {}

    # Products

    def _rows(self, name: str) -> Rows:
        return self._backend.weights.rows[name]

    def _multiply(self, x: Tensor, w: Matrix, dtype: torch.dtype) -> Tensor:
        """x @ w^T, [T, rows] of dtype: the compute type or float32."""
        out = torch.empty(len(x), w.rows, dtype=dtype, device=x.device)
        if not len(x):  # the head of a step without outputs: no reason to read 0.4 GB (V2-Lite in bf16)
            return out
        if number_product.serves(len(x), w):
            number_product.linear(x, w, out)
        elif len(x) <= ROW_PRODUCT_ROWS and not w.is_plain(x.dtype):
            row_product.linear(x, w, out)
        elif tile_product.rounds(w):
            tile_product.linear(x, w, out)
        else:
            to_type = {} if dtype == x.dtype else {"out_dtype": dtype}
            for start, numbers in self._numbers(w, x.dtype):
                torch.mm(x, numbers.T, **to_type, out=out[:, start : start + len(numbers)])
        return out

    def _numbers(self, w: Matrix, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first row, these rows) of one matrix in numbers of dtype, as many rows at a time as fit the scratch."""
        if w.is_plain(dtype):
            yield 0, w.plain()
            return
        scratch = self._backend.scratch
        size = max(1, len(scratch) // (w.cols * dtype.itemsize) // SCALE_ROWS) * SCALE_ROWS
        for start in range(0, w.rows, size):
            yield start, tile_product.decode(w.some(start, min(start + size, w.rows)), dtype, scratch)

    def _is_few(self, *weights: Matrix) -> bool:
        """Whether products of the hidden rows with these take norms, additions and routing along."""
        return self._num_rows > 0 and number_product.serves(self._num_rows, *weights)

    def _rounds_few(self, *weights: Matrix) -> bool:
        """The same of products that round: they take norms and additions along."""
        return 0 < self._num_rows <= ROW_PRODUCT_ROWS and all(rounded_product.serves(w) for w in weights)

    def linear(self, name: str, x: Value, weight: str) -> Value:
        part = self._rows(weight)
        dtype = torch.float32 if name == "head" else self._dtype

        def make() -> Tensor:
            key = id(x), id(part.matrix)
            if key not in self._products:
                w = part.matrix
                if isinstance(x, Normed) and not x.is_made and not len(x.x.tensor):
                    out = torch.empty(0, w.rows, dtype=dtype, device=self._backend.device)
                elif isinstance(x, Normed) and not x.is_made and self._is_few(w):
                    out = torch.empty(len(x.x.tensor), w.rows, dtype=dtype, device=self._backend.device)
                    number_product.linear(x.x.tensor, w, out, norm=x.norm)
                elif isinstance(x, Normed) and not x.is_made and self._rounds_few(w):
                    out = torch.empty(len(x.x.tensor), w.rows, dtype=dtype, device=self._backend.device)
                    rounded_product.linear(x.x.tensor, w, out, norm=x.norm)
                else:
                    out = self._multiply(x.tensor, w, dtype)
                self._products[key] = x, out
            return self._products[key][1][:, part.start : part.stop]

        return Product(x, part, make)

    def swiglu(self, name: str, gate: Value, up: Value) -> Value:
        def make() -> Tensor:
            if isinstance(gate, Product) and isinstance(up, Product) and gate.x is not None:
                x, w_gate, w_up = gate.x, _alone(gate.weight), _alone(up.weight)
                if self._is_few(w_gate, w_up):
                    source, norm = (x.x, x.norm) if isinstance(x, Normed) and not x.is_made else (x, None)
                    out = torch.empty(
                        len(source.tensor), w_gate.rows, dtype=self._dtype, device=self._backend.device
                    )
                    number_product.gate_up(source.tensor, w_gate, w_up, out, norm)
                    return out
                if 0 < len(x.tensor) <= ROW_PRODUCT_ROWS:
                    return row_product.gate_up(x.tensor, w_gate, w_up, None, self._dtype)
            return rows.swiglu(gate.tensor, up.tensor)

        return Gated(gate, up, make)

    # Row-wise ops

    def embed(self, name: str, table: str) -> Value:
        self._products.clear()
        take_chosen(self.step.token_ids, self._backend.chosen)
        return made(tile_product.embed(self.step.token_ids, self._rows(table).matrix))

    def norm(self, name: str, x: Value, weight: str, eps: float) -> Value:
        if isinstance(x, Columns) and x.start == 0:  # c_kv: append_latent norms it
            self._latent.weight, self._latent.eps = weight, eps
            return x
        norm = Norm(self._backend.weights.vectors[weight], eps)

        def make() -> Tensor:
            if isinstance(x, Sum) and not x.is_made and self._sum_in_product(x.terms) is None:
                first, *others = (term.tensor for term in x.terms)
                total, normed = rows.add_norm(first, tuple(others), norm.weight, eps, self._dtype)
                x.set(total)
                return normed
            return rows.add_norm(x.tensor, (), norm.weight, eps, self._dtype)[1]

        return Normed(x, norm, make)

    def columns(self, x: Value, start: int, stop: int) -> Value:
        return Columns(x, start, stop)

    def rope(self, name: str, x: Value, rope: RopeConfig, *, head_dim: int) -> Value:
        if not isinstance(x, Columns):
            self._latent.q, self._latent.head_dim = x, head_dim
        return x  # append rotates both

    def add(self, name: str, x: Value, y: Value) -> Value:
        terms = (x, *y.terms) if isinstance(y, Sum) and not y.is_made else (x, y)
        self._products.clear()  # of the half layer that ends here

        def make() -> Tensor:
            sum_in_product = self._sum_in_product(terms)
            if sum_in_product is not None:
                return sum_in_product()
            first, *others = (term.tensor for term in terms)
            return rows.add_norm(first, tuple(others), None, 0.0, torch.float32)[0]

        return Sum(terms, make)

    def _sum_in_product(self, terms: tuple[Value, ...]) -> Callable[[], Tensor] | None:
        """Launches the last product of a half layer of few rows so that it adds the hidden rows; None where it cannot."""
        x, last, *more = terms
        if isinstance(last, Product) and not more and last.x is not None:
            source, w = last.x, _alone(last.weight)
            if self._is_few(w):
                multiply = number_product.linear
            elif self._rounds_few(w):
                multiply = rounded_product.linear
            else:
                return None

            def product() -> Tensor:
                out = torch.empty(self._num_rows, w.rows, device=self._backend.device)
                multiply(source.tensor, w, out, add=x.tensor)
                return out

            return product
        if isinstance(last, Experts) and not last.is_made:
            return self._mixture(x, last, *more)
        return None

    def _mixture(self, x: Value, experts: Experts, shared: Value | None = None) -> Callable[[], Tensor] | None:
        """x plus routed and shared experts of few rows in three launches, norm and routing among them."""
        choice = experts.choice
        if not isinstance(choice, Choice) or not isinstance(choice.x, Normed) or choice.x.x is not x:
            return None
        w_shared: tuple[Matrix, Matrix, Matrix] | None = None
        if shared is not None:
            gated = shared.x if isinstance(shared, Product) else None
            if not isinstance(shared, Product) or not isinstance(gated, Gated):
                return None
            gate, up = gated.gate, gated.up
            if not isinstance(gate, Product) or not isinstance(up, Product) or gate.x is not choice.x:
                return None
            w_shared = _alone(gate.weight), _alone(up.weight), _alone(shared.weight)
        norm = choice.x.norm
        networks = (experts.matrices, w_shared) if w_shared else (experts.matrices,)
        is_paired = all(gate.type == up.type for gate, up, _ in networks)
        if (
            self._is_few(choice.router)
            and is_paired
            and self._rounds_few(*(w for network in networks for w in network))
        ):
            return lambda: self._rounded_mixture(x.tensor, norm, choice, experts.matrices, w_shared)
        if not self._is_few(choice.router, *(w for network in networks for w in network)):
            return None

        def mixture() -> Tensor:
            hidden_rows = x.tensor
            routed = number_product.route(
                hidden_rows, norm, choice.router, choice.bias, choice.rule, self._backend.arrived, self._dtype
            )
            out = torch.empty_like(hidden_rows)
            number_product.experts(hidden_rows, routed, experts.matrices, w_shared, out)
            return out

        return mixture

    def _rounded_mixture(
        self,
        x: Tensor,
        norm: Norm,
        choice: Choice,
        matrices: tuple[Matrix, Matrix, Matrix],
        shared: tuple[Matrix, Matrix, Matrix] | None,
    ) -> Tensor:
        """The same where the experts round their rows."""
        # Rounded once, where both networks want the codes in the same order.
        orders = {is_mixed(network[0].type) for network in (matrices, shared) if network is not None}
        routed = number_product.route(
            x, norm, choice.router, choice.bias, choice.rule, self._backend.arrived, self._dtype,
            matrices[0].type if len(orders) == 1 else None,
        )  # fmt: skip
        out = torch.empty_like(x)
        rounded_product.experts(x, routed, matrices, shared, out)
        return out

    def take_outputs(self, name: str, x: Value) -> Value:
        output_rows = self.step.output_rows
        if output_rows is None:
            return x
        self._num_rows = len(output_rows)
        return Value(lambda: x.tensor[output_rows])

    def output(self, name: str, x: Value) -> None:
        self.outputs[name] = x.tensor

    # Experts

    def route(self, name: str, x: Value, weight: str, bias: str | None, moe: MoeConfig) -> tuple[Value, Value]:
        router = self._rows(weight).matrix
        vector = None if bias is None else self._backend.weights.vectors[bias]
        rule = RoutingRule(
            per_row=moe.num_experts_per_tok,
            num_groups=moe.num_groups,
            groups_kept=moe.num_groups_per_tok,
            is_sigmoid=moe.scoring is Scoring.SIGMOID,
            is_top2=moe.group_score is GroupScore.TOP2_SUM,
            is_normed=moe.norm_topk_prob,
            factor=moe.routed_scaling_factor,
        )

        @cache
        def ids_and_weights() -> tuple[Tensor, Tensor]:
            if self._is_few(router):
                logits = torch.empty(len(x.tensor), router.rows, device=x.tensor.device)
                number_product.linear(x.tensor, router, logits)
            else:
                logits = torch.mm(x.tensor.float(), router.plain().T)
            return rows.route(logits, vector, rule)

        ids = Choice(x, router, vector, rule, lambda: ids_and_weights()[0])
        return ids, Value(lambda: ids_and_weights()[1])

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
        assert subset is None, "kernels of experts on a GPU take all of them"
        w_gate, w_up, w_down = (self._rows(w).matrix for w in (gate, up, down))

        def make() -> Tensor:
            out = torch.empty(len(x.tensor), w_down.rows, dtype=self._dtype, device=x.tensor.device)
            if not len(x.tensor):
                return out
            chosen, factors = ids.tensor, weights.tensor
            if len(x.tensor) <= ROW_PRODUCT_ROWS:
                hidden = row_product.gate_up(x.tensor, w_gate, w_up, chosen, self._dtype, w_down)
                row_product.down(hidden, w_down, chosen, factors, out)
            else:
                as_they_are = all(tile_product.multiplies_as_it_is(w, self._dtype) for w in (w_gate, w_up, w_down))
                scratch = None if as_they_are else self._backend.scratch
                tile_product.experts(x.tensor, chosen, factors, w_gate, w_up, w_down, out, scratch)
            return out

        return Experts(ids, (w_gate, w_up, w_down), make)

    # The cache

    def _append(self, c_kv: Value, pool: Tensor, slots: Tensor, mla: MlaConfig) -> None:
        """Rotates the waiting q, and writes the rows' latents to `slots` of pool [.., latent_dim]."""
        assert isinstance(c_kv, Columns) and self._latent.q is not None
        # Together where they lie in one matrix, so that one launch serves both.
        q, kv_a = self._latent.q.tensor, c_kv.x.tensor
        backend, rope = self._backend, self._backend.model.config.rope
        rows.rope_append(
            q,
            kv_a,
            backend.weights.vectors[self._latent.weight],
            self._latent.eps,
            self.step.positions,
            slots,
            backend.cos,
            backend.sin,
            pool,
            num_heads=mla.num_heads,
            head_dim=self._latent.head_dim,
            is_half_split=rope.pairing is Pairing.HALF_SPLIT,
        )
        self._latent = Latent()

    def _latents(self, c_kv: Value, dtype: torch.dtype, mla: MlaConfig) -> Tensor:
        """The rows' latents beside the cache: [T, latent_dim]."""
        latents = torch.empty(self.step.num_rows, mla.latent_dim, dtype=dtype, device=self._backend.device)
        slots = torch.arange(self.step.num_rows, device=latents.device)
        self._append(c_kv, latents, slots, mla)
        return latents

    def append_latent(self, name: str, layer: int, c_kv: Value, k_rope: Value) -> None:
        mla, step = self._backend.model.config.mla, self.step
        pool = self._backend.pools[0][layer].flatten(0, 1)
        is_few = step.num_rows <= number_product.MOST_ROWS and step.absorbed == slice(0, step.num_rows)
        if self._backend.blocks is None and is_few:
            assert isinstance(c_kv, Columns)
            self._latent.kv_a, self._latent.pool = c_kv.x.tensor, pool
        elif self._backend.blocks is None:
            self._append(c_kv, pool, step.slots, mla)
        else:
            latents = self._latents(c_kv, torch.float32, mla)
            append_blocks(latents, self.step.slots, pool, self._backend.blocks)

    def append_full(self, name: str, layer: int, c_kv: Value, k_rope: Value, kv_up: KvUp, mla: MlaConfig) -> None:
        latents = self._latents(c_kv, self._dtype, mla)
        k_nope, v = self._expand(latents, kv_up, mla)
        rotated = latents[:, mla.kv_lora_rank :]
        key_pool, value_pool = (array[layer].flatten(0, 1) for array in self._backend.pools)
        if self._backend.blocks is None:
            rows.append_heads(k_nope, rotated, v, self.step.slots, key_pool, value_pool)
            return
        k = torch.cat([k_nope, rotated[:, None].expand(-1, mla.num_heads, -1)], dim=-1)
        for pool, new in ((key_pool, k), (value_pool, v)):
            append_blocks(new.flatten(1), self.step.slots, pool, self._backend.blocks)

    # Attention

    def _expand(
        self, latents: Tensor, kv_up: KvUp, mla: MlaConfig, room: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """k_nope [K, H, nope] and v [K, H, v] of latents [K, latent_dim] of the compute type; room: where they are put, numbers of that
        type, as many as they have, or more."""
        weights = [w.flatten(0, 1) for w in self._backend.weights.up[kv_up]]
        sizes = [len(latents) * len(w) for w in weights]
        if room is None:
            parts = [latents.new_empty(size) for size in sizes]
        else:
            parts = list(room[: sum(sizes)].split(sizes))
        k_nope, v = (
            torch.mm(latents[:, : mla.kv_lora_rank], w.T, out=part.view(len(latents), -1))
            for w, part in zip(weights, parts, strict=True)
        )
        return k_nope.view(len(latents), mla.num_heads, -1), v.view(len(latents), mla.num_heads, -1)

    def fold_q(self, name: str, q: Value, kv_up: KvUp, mla: MlaConfig) -> Value:
        w_uk, _ = self._backend.weights.up[kv_up]

        def fold(num_rows: int) -> Tensor:
            return torch.empty(
                num_rows, mla.num_heads, mla.latent_dim, dtype=self._dtype, device=self._backend.device
            )

        latent = self._latent
        if latent.pool is not None and latent.kv_a is not None:
            backend = self._backend
            new = LatentRow(
                latent.kv_a,
                backend.weights.vectors[latent.weight],
                latent.eps,
                self.step.positions,
                self.step.slots,
                backend.cos,
                backend.sin,
                latent.pool,
                backend.model.config.rope.pairing is Pairing.HALF_SPLIT,
            )
            self._latent = Latent()
            q_rows = q.tensor  # of one product with kv_a, which `add` forgets

            def fold_append() -> Tensor:
                out = fold(self.step.num_rows)
                rows.fold_append(q_rows, w_uk, out, new)
                return out.flatten(1)

            return Folded(q_rows, new, fold_append)

        def make() -> Tensor:
            """Absorbed rows only: [rows, H * latent_dim]."""
            per_head = q.tensor[self.step.absorbed].unflatten(1, (mla.num_heads, mla.qk_head_dim))
            out = fold(len(per_head))
            rows.per_head(
                per_head, w_uk, out, depth=mla.qk_nope_head_dim, width=mla.kv_lora_rank, extra=mla.qk_rope_head_dim
            )
            return out.flatten(1)

        return Value(make)

    def attend_latent(self, name: str, layer: int, q_latent: Value, mla: MlaConfig) -> Value:
        def launch_all(merges: bool) -> Tensor:
            q = q_latent.tensor.unflatten(1, (mla.num_heads, mla.latent_dim))
            out = torch.empty(len(q), mla.num_heads, mla.kv_lora_rank, dtype=self._dtype, device=q.device)
            first = self.step.absorbed.start
            pool = self._backend.pools[0][layer]
            for launch in self.step.launches:
                part = slice(launch.start - first, launch.stop - first)
                mla_decode(
                    q[part],
                    pool,
                    self.step.pages,
                    launch.page_starts,
                    launch.kv_lens,
                    out[part],
                    launch.workspace,
                    scale=mla.softmax_scale,
                    kv_lora=mla.kv_lora_rank,
                    blocks=self._backend.blocks,
                    merges=merges,
                )
            if not self.step.launches:
                for sequence, part, _ in self._sequences(Path.ABSORBED):
                    latents = self._cached(0, layer, sequence, 0, self._kv_len(sequence))[:, None]
                    keys = latents.expand(-1, mla.num_heads, -1)
                    local = slice(part.start - first, part.stop - first)
                    out[local] = self._unfused(q[local], keys, keys[..., : mla.kv_lora_rank], mla.softmax_scale)
            return out.flatten(1)

        return Attended(q_latent, launch_all)

    def unfold_v(self, name: str, o_latent: Value, kv_up: KvUp, mla: MlaConfig) -> Value:
        def make() -> Tensor:
            device, num_rows = self._backend.device, self.step.num_rows
            out = torch.empty(num_rows, mla.num_heads * mla.v_head_dim, dtype=self._dtype, device=device)
            absorbed, launches = self.step.absorbed, self.step.launches
            w_uk, w_uv = self._backend.weights.up[kv_up]
            per_head = mla.num_heads, mla.kv_lora_rank
            is_all = absorbed == slice(0, num_rows)
            folded = o_latent.q if isinstance(o_latent, Attended) else None
            if (
                is_all
                and self.step.most_tokens == row_attention.MOST_KEYS
                and len(launches) == 1
                and isinstance(folded, Folded)
                and row_attention.serves(num_rows, *per_head, self._dtype, folded.new.pool)
            ):
                row_attention.attend(
                    folded.q,
                    folded.new,
                    w_uk,
                    w_uv,
                    self.step.pages,
                    launches[0].page_starts,
                    launches[0].kv_lens,
                    out,
                    self._backend.exchange,
                    scale=mla.softmax_scale,
                )
            elif (
                is_all
                and self.step.most_tokens is not None
                and len(launches) == 1
                and isinstance(o_latent, Attended)
                and merged_unfold.serves(num_rows, mla.num_heads)
            ):
                whole = o_latent.launch(False).unflatten(1, per_head)
                merged_unfold.merge_unfold(whole, launches[0].workspace, w_uv, out)
            elif is_all and num_rows <= number_product.MOST_ROWS:
                number_product.linear(o_latent.tensor, Matrix.of(w_uv.flatten(0, 1)), out)
            elif absorbed.stop > absorbed.start:
                rows.per_head(
                    o_latent.tensor.unflatten(1, per_head),
                    w_uv.transpose(1, 2),
                    out[absorbed].unflatten(1, (mla.num_heads, mla.v_head_dim)),
                    depth=mla.kv_lora_rank,
                    width=mla.v_head_dim,
                )
            return out

        return Value(make)

    def attend_expanded(self, name: str, layer: int, q: Value, kv_up: KvUp, mla: MlaConfig, into: Value) -> Value:
        prompt = self.step.prompt
        if prompt is not None:
            self._attend_prompt(layer, q, kv_up, mla, prompt, into)
            return into
        per_key = expanded_bytes(mla, self._dtype)
        size = max(1, self._backend.workspace_bytes // per_key // PAGE_TOKENS) * PAGE_TOKENS

        def tiles(sequence: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
            for start in range(0, stop, size):
                latents = self._cached(0, layer, sequence, start, min(start + size, stop))
                k_nope, v = self._expand(latents, kv_up, mla)
                yield start, k_nope, latents[:, None, mla.kv_lora_rank :], v

        def decode(queries: Tensor, target: Tensor, launch: DecodeLaunch) -> None:
            attend_expanding(
                queries,
                self._backend.pools[0][layer],
                *self._backend.weights.up[kv_up],
                self.step.pages,
                launch.page_starts,
                launch.kv_lens,
                target,
                launch.workspace,
                scale=mla.softmax_scale,
                blocks=self._backend.blocks,
            )

        self._attend(Path.DECOMPRESSED, q, tiles, decode, mla, into)
        return into

    def _attend_prompt(
        self, layer: int, q: Value, kv_up: KvUp, mla: MlaConfig, prompt: PromptKeys, into: Value
    ) -> None:
        """All rows over all keys of their sequence, which stand in one list of pages; rows before the first see none."""
        pool = self._backend.pools[0][layer]
        latents = torch.empty(prompt.num_keys, mla.latent_dim, dtype=self._dtype, device=pool.device)
        gather_rows(pool, self.step.pages, latents, self._backend.blocks, prompt.kv_len)
        # Keys and values where other ops have decoded weights: a graph takes no memory of its own for them.
        room = self._backend.scratch[: prompt.num_keys * expanded_bytes(mla, self._dtype)].view(self._dtype)
        k_nope, v = self._expand(latents, kv_up, mla, room)
        queries = q.tensor.unflatten(1, (mla.num_heads, mla.qk_head_dim))
        mla_prefill(
            queries,
            k_nope,
            latents[:, None, mla.kv_lora_rank :],
            v,
            into.tensor.unflatten(1, (mla.num_heads, mla.v_head_dim)),
            torch.empty(mla.num_heads, len(queries), dtype=torch.float32, device=pool.device),
            scale=mla.softmax_scale,
            first_row=0,
            first_key=0,
            merge=False,
            kv_len=prompt.kv_len,
        )

    def attend_full(self, name: str, layer: int, q: Value, mla: MlaConfig) -> Value:
        def tiles(sequence: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
            k = self._cached(0, layer, sequence, 0, stop).unflatten(1, (mla.num_heads, mla.qk_head_dim))
            v = self._cached(1, layer, sequence, 0, stop).unflatten(1, (mla.num_heads, mla.v_head_dim))
            yield 0, k[..., : mla.qk_nope_head_dim], k[..., mla.qk_nope_head_dim :], v

        def decode(queries: Tensor, target: Tensor, launch: DecodeLaunch) -> None:
            key_pool, value_pool = (pool[layer] for pool in self._backend.pools)
            attend_cached(
                queries,
                key_pool,
                value_pool,
                self.step.pages,
                launch.page_starts,
                launch.kv_lens,
                target,
                launch.workspace,
                scale=mla.softmax_scale,
                blocks=self._backend.blocks,
            )

        width = mla.num_heads * mla.v_head_dim
        into = made(torch.empty(self.step.num_rows, width, dtype=self._dtype, device=self._backend.device))
        self._attend(Path.STANDARD, q, tiles, decode, mla, into)
        return into

    def _attend(
        self,
        path: Path,
        q: Value,
        tiles: Callable[[int, int], Iterator[tuple[int, Tensor, Tensor, Tensor]]],
        decode: Callable[[Tensor, Tensor, DecodeLaunch], None],
        mla: MlaConfig,
        into: Value,
    ) -> None:
        """Rows of this path over their sequences' keys: few of a sequence by `decode`, more over (first key, k_nope, k_rope, v) of
        a tile at a time."""

        def rows_of(part: slice) -> tuple[Tensor, Tensor]:
            queries = q.tensor[part].unflatten(1, (mla.num_heads, mla.qk_head_dim))
            return queries, into.tensor[part].unflatten(1, (mla.num_heads, mla.v_head_dim))

        for launch in self.step.head_launches:
            decode(*rows_of(slice(launch.start, launch.stop)), launch)
        for sequence, part, fused in self._sequences(path):
            if fused and part.stop - part.start <= MOST_ROWS:
                continue  # decoded
            num_keys = self._kv_len(sequence)
            queries, target = rows_of(part)
            if not fused:
                keys, values = [], []
                for _, k_nope, k_rope, v in tiles(sequence, num_keys):
                    keys.append(torch.cat([k_nope, k_rope.expand(-1, mla.num_heads, -1)], dim=-1))
                    values.append(v)
                whole = self._unfused(queries, torch.cat(keys), torch.cat(values), mla.softmax_scale)
                target.copy_(whole)
                continue
            num_rows = len(queries)
            out = torch.empty(target.shape, dtype=torch.float32, device=target.device)
            lse = torch.empty(mla.num_heads, num_rows, dtype=torch.float32, device=target.device)
            for first_key, k_nope, k_rope, v in tiles(sequence, num_keys):
                only = first_key == 0 and len(v) == num_keys
                mla_prefill(
                    queries,
                    k_nope,
                    k_rope,
                    v,
                    target if only else out,
                    lse,
                    scale=mla.softmax_scale,
                    first_row=num_keys - num_rows,
                    first_key=first_key,
                    merge=first_key > 0,
                )
                if not only and first_key + len(v) == num_keys:
                    target.copy_(out)

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """fa=0: the scores of a row tile that fits the workspace, a two-pass softmax: [R, H, v]."""
        num_rows, num_keys = len(q), len(k)
        out = torch.empty(num_rows, q.shape[1], v.shape[-1], dtype=q.dtype, device=q.device)
        size = max(1, self._backend.workspace_bytes // (8 * q.shape[1] * num_keys))
        position = torch.arange(num_keys - num_rows, num_keys, device=q.device)
        keys = torch.arange(num_keys, device=q.device)
        k_heads, v_heads = k.permute(1, 2, 0), v.transpose(0, 1)
        for start in range(0, num_rows, size):
            tile = slice(start, start + size)
            scores = torch.matmul(q[tile].transpose(0, 1), k_heads).float() * scale
            scores.masked_fill_(keys[None, :] > position[tile][:, None], -math.inf)
            out[tile] = torch.matmul(scores.softmax(-1).to(v.dtype), v_heads).transpose(0, 1)
        return out

    def _sequences(self, path: Path) -> Iterator[tuple[int, slice, bool]]:
        """(sequence, its rows, fused) of the segment that takes this path."""
        step = self.step.host
        segment = None if step is None else step.segment(path.value)
        if step is not None and segment is not None:
            for sequence in segment[1]:
                yield sequence, step.rows(sequence), segment[0]

    def _kv_len(self, sequence: int) -> int:
        assert self.step.host is not None
        return int(self.step.host.kv_lens[sequence])

    def _cached(self, array: int, layer: int, sequence: int, start: int, stop: int) -> Tensor:
        """Cached rows of tokens [start, stop) of a sequence, `start` at a page, in the compute type: [.., width]."""
        step = self.step.host
        assert step is not None
        at = int(step.page_starts[sequence])
        listed = slice(at + start // PAGE_TOKENS, at - (-stop // PAGE_TOKENS))
        pool = self._backend.pools[array][layer]
        if self._backend.blocks is None:
            # Neighbours, as a new sequence's pages mostly are, are read where they lie: no launch, and less for the host to do.
            first, last = int(step.pages[listed.start]), int(step.pages[listed.stop - 1])
            are_neighbours = np.array_equal(step.pages[listed], np.arange(first, last + 1))
            held = pool[first : last + 1] if are_neighbours else pool[self.step.pages[listed]]
            return held.flatten(0, 1)[: stop - start].to(self._dtype)
        pages = self.step.pages[listed]
        width = self._backend.row_dims[array]
        picked = torch.empty(stop - start, width, dtype=self._dtype, device=pool.device)
        gather_rows(pool, pages, picked, self._backend.blocks)
        return picked


def _alone(part: Rows) -> Matrix:
    """A matrix of these rows only, sharing memory."""
    if (part.start, part.stop) == (0, part.matrix.rows):
        return part.matrix
    m = part.matrix
    return replace(m, rows=part.stop - part.start, raw=m.raw[part.start : part.stop])
