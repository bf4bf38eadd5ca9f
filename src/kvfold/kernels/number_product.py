"""Products of up to four rows with matrices of numbers (float32, float16, bfloat16), and what a step does around them.

The kernels of generated rows whose weights are not in blocks: bounded by the bytes of the weights, each of which is read
once for all rows. Norms, additions and routing are part of a product, because a launch between two products costs as much
as 10 MB of weights. A program owns a few output features, asks for their weights before its inputs are there, and sums
within itself, so the same input gives the same bits.

A product takes its rows normed where `norm` says so: every program norms them again, which are 8 KB a row from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.matrix import Matrix
from kvfold.kernels.memory_split import prefers_shared
from kvfold.kernels.overlap import let_next_start, overlaps, wait_for_inputs
from kvfold.kernels.rounding import SHARED_PERCENT, RoundedRows, code, mixed_place, scale_of
from kvfold.kernels.rows import RoutingRule, choose_experts, silu

MOST_ROWS = 4
TYPES = frozenset(["F32", "F16", "BF16"])

# Numbers of a weight row in one pass, and what a program may hold of them while it waits: 128 registers of a thread.
PASS = 2048
THREADS = 128
HELD_BYTES = 4 * 128 * THREADS
# Passes of _down, 16 bytes of a thread each, that are asked for before the wait: with 7 a thread needs 64 registers and 8
# programs share a multiprocessor, with all 12 of V2-Lite 110, and a step took 1917 us of replay instead of 1863.
DOWN_HELD = 7


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm: weight float32 [width]."""

    weight: Tensor
    eps: float


@triton.jit
def _held(w, at, COLS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr):
    """The first HELD passes of rows that begin at `at` int64 [ROWS]: tiles [ROWS, WIDTH]."""
    tiles = ()
    col = tl.arange(0, WIDTH)
    for i in tl.static_range(HELD):
        c = i * WIDTH + col
        tile = tl.load(w + at[:, None] + c[None, :], mask=(c < COLS)[None, :], other=0.0)
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def one_over_rms(x, eps, COLS: tl.constexpr, PADDED: tl.constexpr):
    i = tl.arange(0, PADDED)
    v = tl.load(x + i, mask=i < COLS, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(v * v, 0) / COLS + eps)


@triton.jit
def _row_products(
    x, norm, tiles, w, at, COLS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, WIDTH] of x [COLS] with rows at `at`, not summed yet; x times norm where NORM."""
    col = tl.arange(0, WIDTH)
    y = tl.zeros([at.shape[0], WIDTH], tl.float32)
    for i in tl.static_range((COLS + WIDTH - 1) // WIDTH):
        c = i * WIDTH + col
        v = tl.load(x + c, mask=c < COLS, other=0.0).to(tl.float32)
        if NORM:
            v *= tl.load(norm + c, mask=c < COLS, other=0.0)
        if i < HELD:  # noqa: SIM108 (a constant to Triton, which a conditional expression is not)
            tile = tiles[i]
        else:
            tile = tl.load(w + at[:, None] + c[None, :], mask=(c < COLS)[None, :], other=0.0)
        y += tile.to(tl.float32) * v[None, :]
    return y


@triton.jit
def _linear(
    x, x_stride, norm, eps, add, w, out, out_stride, rows, head_rows,
    COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Feature f takes COLS numbers of x from f // head_rows * COLS on."""
    if EARLY:
        let_next_start()
    first = tl.program_id(0) * ROWS
    feature = first + tl.arange(0, ROWS)
    at = tl.minimum(feature, rows - 1).to(tl.int64) * COLS
    tiles = _held(w, at, COLS, WIDTH, HELD)
    if EARLY:
        wait_for_inputs()
    x += first // head_rows * COLS
    for t in tl.static_range(TOKENS):
        y = tl.sum(_row_products(x + t * x_stride, norm, tiles, w, at, COLS, WIDTH, HELD, NORM), 1)
        if NORM:
            y *= one_over_rms(x + t * x_stride, eps, COLS, PADDED)
        if ADD:
            y += tl.load(add + t * rows + feature, mask=feature < rows, other=0.0)
        tl.store(out + t * out_stride + feature, y, mask=feature < rows)


@triton.jit
def _gate_up_features(
    x, x_stride, norm, eps, gate, up, out, rows, first,
    COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Features [first, first + ROWS) of silu(gate x) * (up x) for every row."""
    feature = first + tl.arange(0, ROWS)
    at = tl.minimum(feature, rows - 1).to(tl.int64) * COLS
    gates = _held(gate, at, COLS, WIDTH, HELD)
    ups = _held(up, at, COLS, WIDTH, HELD)
    if EARLY:
        wait_for_inputs()
    for t in tl.static_range(TOKENS):
        x_t = x + t * x_stride
        g = tl.sum(_row_products(x_t, norm, gates, gate, at, COLS, WIDTH, HELD, NORM), 1)
        u = tl.sum(_row_products(x_t, norm, ups, up, at, COLS, WIDTH, HELD, NORM), 1)
        if NORM:
            scale = one_over_rms(x_t, eps, COLS, PADDED)
            g *= scale
            u *= scale
        tl.store(out + t * rows + feature, silu(g) * u, mask=feature < rows)


@triton.jit
def _gate_up(
    x, x_stride, norm, eps, gate, up, out, rows,
    COLS: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        let_next_start()
    _gate_up_features(x, x_stride, norm, eps, gate, up, out, rows, tl.program_id(0) * ROWS, COLS, TOKENS, NORM, PADDED,
                      ROWS, WIDTH, HELD, EARLY)  # fmt: skip


@triton.jit
def _route(
    x, x_stride, norm, eps, router, logits, bias, ids, weights, arrived, normed, scales,
    num_experts, per_group, num_groups, groups_kept, per_row, factor,
    COLS: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, ROUNDS: tl.constexpr, MIXED: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PLACES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. num_experts - 1: one expert's logit each, and the last of them to end chooses the experts of every
    row. The one behind them writes the normed rows, in codes and scales where ROUNDS."""
    if EARLY:
        let_next_start()
    program = tl.program_id(0)
    if program < num_experts:
        at = program.to(tl.int64) * COLS + tl.arange(0, 1)
        tiles = _held(router, at, COLS, WIDTH, HELD)
        if EARLY:
            wait_for_inputs()
        for t in tl.static_range(TOKENS):
            x_t = x + t * x_stride
            y = tl.sum(_row_products(x_t, norm, tiles, router, at, COLS, WIDTH, HELD, True), 1)
            y *= one_over_rms(x_t, eps, COLS, PADDED)
            tl.store(logits + t * num_experts + program + tl.arange(0, 1), y)
        tl.debug_barrier()  # every thread has stored before one of them counts
        if tl.atomic_add(arrived, 1, sem="acq_rel") == num_experts - 1:
            tl.store(arrived, 0)
            for t in tl.static_range(TOKENS):
                choose_experts(t, logits, bias, ids, weights, num_experts, per_group, num_groups, groups_kept, per_row,
                               factor, SIGMOID, BIAS, TOP2, NORM, GROUPS, EACH, PLACES)  # fmt: skip
    else:
        block = tl.arange(0, PADDED // 32)
        i = tl.arange(0, 32)
        col = block[:, None] * 32 + i[None, :]
        g = tl.load(norm + col, mask=col < COLS, other=0.0)
        if EARLY:
            wait_for_inputs()
        for t in tl.static_range(TOKENS):
            x_t = x + t * x_stride
            v = tl.load(x_t + col, mask=col < COLS, other=0.0).to(tl.float32)
            v = v * one_over_rms(x_t, eps, COLS, PADDED) * g
            if ROUNDS:
                inverse, scale = scale_of(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
                place = block[:, None] * 32 + (mixed_place(i) if MIXED else i)[None, :]
                tl.store(normed + t * COLS + place, code(v, inverse[:, None]).to(tl.int8), mask=col < COLS)
                tl.store(scales + t * (COLS // 32) + block, scale, mask=block < COLS // 32)
            else:
                tl.store(normed + t * COLS + col, v, mask=col < COLS)


_rounding_route = prefers_shared(SHARED_PERCENT)(_route)


@triton.jit
def _gate_up_of_all(
    x, gate, up, ids, out, rows, shared_gate, shared_up, shared_out, shared_rows,
    COLS: tl.constexpr, TOKENS: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The first programs own ROWS features of the shared experts, whose weights need no choice and come early; the others
    those of a pair: pair p is row p // PER_ROW of x with expert ids[p]. The next kernel starts when the choice is there."""
    program = tl.program_id(0)
    each = tl.cdiv(shared_rows, ROWS)
    if program < each:
        _gate_up_features(x, COLS, x, 0.0, shared_gate, shared_up, shared_out, shared_rows, program * ROWS, COLS, TOKENS,
                          False, COLS, ROWS, WIDTH, HELD, EARLY)  # fmt: skip
    else:
        if EARLY:
            wait_for_inputs()
        program -= each
        each = tl.cdiv(rows, ROWS)
        feature = program % each * ROWS + tl.arange(0, ROWS)
        pair = (program // each).to(tl.int64)
        expert = tl.load(ids + pair).to(tl.int64)
        at = (expert * rows + tl.minimum(feature, rows - 1)) * COLS
        gates = _held(gate, at, COLS, WIDTH, HELD)
        ups = _held(up, at, COLS, WIDTH, HELD)
        x += pair // PER_ROW * COLS
        g = _row_products(x, x, gates, gate, at, COLS, WIDTH, HELD, False)
        u = _row_products(x, x, ups, up, at, COLS, WIDTH, HELD, False)
        y = silu(tl.sum(g, 1)) * tl.sum(u, 1)  # both after all loads: a sum across threads waits for all of them
        tl.store(out + pair * rows + feature, y, mask=feature < rows)


@triton.jit
def _chosen_pass(
    w, ids, rows, feature, first, COLS: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr
):
    """(weights [PARTS, EACH], choices [PARTS]) from part `first` on of a feature's rows of all chosen experts, which
    count as one row."""
    NUM: tl.constexpr = COLS // EACH
    part = first + tl.arange(0, PARTS)
    is_part = part < PER_ROW * NUM
    choice = tl.minimum(part // NUM, PER_ROW - 1)
    at = (tl.load(ids + choice).to(tl.int64) * rows + feature) * COLS + part % NUM * EACH
    return tl.load(w + at[:, None] + tl.arange(0, EACH)[None, :], mask=is_part[:, None], other=0.0), choice


@triton.jit
def _numbers_pass(x, first, COLS: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr):
    """[PARTS, EACH] of a row of COLS numbers from part `first` on."""
    part = first + tl.arange(0, PARTS)
    at = part[:, None] * EACH + tl.arange(0, EACH)[None, :]
    return tl.load(x + at, mask=(part * EACH < COLS)[:, None], other=0.0)


@triton.jit
def _down(
    hidden, w, ids, weights, shared_hidden, shared, add, out, rows,
    COLS: tl.constexpr, SHARED_COLS: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr,
    HELD: tl.constexpr, SHARED_HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (feature, row). A row's chosen experts count as one long row, in passes of PARTS x EACH numbers: one expert's
    1408 would leave a third of 2048 lanes idle. ids and weights are of two kernels ago, so they may be read early."""
    if EARLY:
        let_next_start()
    feature = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    ids += t * PER_ROW
    weights += t * PER_ROW
    shared += feature.to(tl.int64) * SHARED_COLS
    shared_tiles = ()
    for i in tl.static_range(SHARED_HELD):
        shared_tiles += (_numbers_pass(shared, i * PARTS, SHARED_COLS, PARTS, EACH),)  # type: ignore[assignment]
    tiles = ()
    for i in tl.static_range(HELD):
        tiles += (_chosen_pass(w, ids, rows, feature, i * PARTS, COLS, PER_ROW, PARTS, EACH),)  # type: ignore[assignment]
    if EARLY:
        wait_for_inputs()
    hidden += t * PER_ROW * COLS
    shared_hidden += t * SHARED_COLS
    y = tl.zeros([PARTS, EACH], tl.float32)
    for i in tl.static_range((SHARED_COLS + PARTS * EACH - 1) // (PARTS * EACH)):
        if i < SHARED_HELD:  # noqa: SIM108 (a constant to Triton, which a conditional expression is not)
            tile = shared_tiles[i]  # type: ignore[var-annotated]
        else:
            tile = _numbers_pass(shared, i * PARTS, SHARED_COLS, PARTS, EACH)
        y += tile.to(tl.float32) * _numbers_pass(shared_hidden, i * PARTS, SHARED_COLS, PARTS, EACH).to(tl.float32)
    for i in tl.static_range((PER_ROW * COLS + PARTS * EACH - 1) // (PARTS * EACH)):
        if i < HELD:
            tile, choice = tiles[i]  # type: ignore[var-annotated]
        else:
            tile, choice = _chosen_pass(w, ids, rows, feature, i * PARTS, COLS, PER_ROW, PARTS, EACH)
        x = _numbers_pass(hidden, i * PARTS, PER_ROW * COLS, PARTS, EACH).to(tl.float32)
        y += tl.load(weights + choice)[:, None] * (tile.to(tl.float32) * x)
    at = t * rows + feature
    tl.store(out + at, tl.load(add + at) + tl.sum(tl.sum(y, 1), 0))


def serves(num_rows: int, *weights: Matrix) -> bool:
    return num_rows <= MOST_ROWS and all(w.type in TYPES for w in weights)


def _width(cols: int) -> int:
    return min(PASS, int(triton.next_power_of_2(cols)))


def _rows(w: Matrix) -> int:
    """Features of a program: 8 KB of weights."""
    return max(1, 8192 // (_width(w.cols) * w.plain().element_size()))


def _held_passes(w: Matrix, rows: int, share: int = 1) -> int:
    """Passes of `rows` features that fit a share of the registers, of those there are."""
    each = rows * _width(w.cols) * w.plain().element_size()
    return min(-(-w.cols // _width(w.cols)), max(1, HELD_BYTES // share // each))


def linear(x: Tensor, w: Matrix, out: Tensor, *, norm: Norm | None = None, add: Tensor | None = None) -> None:
    """out [T, rows] = (norm of) x [T, cols] @ w^T, plus add float32 [T, rows].

    x [T, heads * cols] with w.rows / heads features a head multiplies each head by itself.
    """
    rows = _rows(w)
    head_rows = w.rows // (x.shape[1] // w.cols)
    while head_rows % rows:
        rows //= 2
    early = overlaps(x)
    _linear[(triton.cdiv(w.rows, rows),)](
        x, x.stride(0), x if norm is None else norm.weight, 0.0 if norm is None else norm.eps, x if add is None else add,
        w.plain(), out, out.stride(0), w.rows, head_rows,
        COLS=w.cols, TOKENS=len(x), NORM=norm is not None, ADD=add is not None, PADDED=triton.next_power_of_2(w.cols),
        ROWS=rows, WIDTH=_width(w.cols), HELD=_held_passes(w, rows), EARLY=early, launch_pdl=early,
    )  # fmt: skip


def gate_up(x: Tensor, gate: Matrix, up: Matrix, out: Tensor, norm: Norm | None = None) -> None:
    """out [T, rows] = silu(gate x) * (up x) of (normed) x [T, cols]."""
    rows = max(1, _rows(gate) // 2)
    early = overlaps(x)
    _gate_up[(triton.cdiv(gate.rows, rows),)](
        x, x.stride(0), x if norm is None else norm.weight, 0.0 if norm is None else norm.eps, gate.plain(), up.plain(),
        out, gate.rows,
        COLS=gate.cols, TOKENS=len(x), NORM=norm is not None, PADDED=triton.next_power_of_2(gate.cols), ROWS=rows,
        WIDTH=_width(gate.cols), HELD=_held_passes(gate, rows, 2), EARLY=early, launch_pdl=early,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Routed:
    """normed [T, cols] of the compute type, or of width 0 and `rounded` instead; ids int32 and weights float32 [T, k]."""

    normed: Tensor
    ids: Tensor
    weights: Tensor
    rounded: RoundedRows | None = None


def route(
    x: Tensor,
    norm: Norm,
    router: Matrix,
    bias: Tensor | None,
    rule: RoutingRule,
    arrived: Tensor,
    dtype: torch.dtype,
    rounds_for: str | None = None,
) -> Routed:
    """Norm and routing of x float32 [T, cols] in one launch. rounds_for: the type of the matrices that the normed rows
    meet, rounded, next. arrived: int32 [1], zero before and after; launches that share it run one after another."""
    num_rows, device = len(x), x.device
    rounded = None if rounds_for is None else RoundedRows.empty(num_rows, x.shape[1], rounds_for, device)
    out = Routed(
        torch.empty(num_rows, 0 if rounded else x.shape[1], dtype=dtype, device=device),
        torch.empty(num_rows, rule.per_row, dtype=torch.int32, device=device),
        torch.empty(num_rows, rule.per_row, dtype=torch.float32, device=device),
        rounded,
    )
    logits = torch.empty(num_rows, router.rows, device=device)
    early = overlaps(x)
    (_rounding_route if rounded else _route)[(router.rows + 1,)](
        x, x.stride(0), norm.weight, norm.eps, router.plain(), logits, x if bias is None else bias, out.ids, out.weights,
        arrived, rounded.codes if rounded else out.normed, rounded.scales if rounded else out.normed,
        *rule.arguments(router.rows),
        COLS=router.cols, TOKENS=num_rows, PADDED=triton.next_power_of_2(router.cols), WIDTH=_width(router.cols),
        HELD=_held_passes(router, 1), ROUNDS=rounded is not None, MIXED=rounded is not None and rounded.is_mixed,
        **rule.constants(router.rows, bias is not None), EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return out


def experts(
    x: Tensor,
    routed: Routed,
    matrices: tuple[Matrix, Matrix, Matrix],
    shared: tuple[Matrix, Matrix, Matrix] | None,
    out: Tensor,
) -> None:
    """out float32 [T, rows] = x plus the chosen experts' weighted and the shared experts' plain sum, in two launches;
    gate, up and down of each."""
    gate, up, down = matrices
    s_gate, s_up, s_down = shared or matrices
    pairs, per_row = routed.ids.numel(), routed.ids.shape[1]
    hidden = torch.empty(pairs, gate.rows, dtype=routed.normed.dtype, device=x.device)
    s_hidden = torch.empty(len(x), s_gate.rows if shared else 0, dtype=hidden.dtype, device=x.device)
    rows = max(1, _rows(gate) // 2)
    early = overlaps(x)
    programs = triton.cdiv(s_hidden.shape[1], rows) + pairs * triton.cdiv(gate.rows, rows)
    _gate_up_of_all[(programs,)](
        routed.normed, gate.plain(), up.plain(), routed.ids, hidden, gate.rows, s_gate.plain(), s_up.plain(), s_hidden,
        s_hidden.shape[1],
        COLS=gate.cols, TOKENS=len(x), PER_ROW=per_row, ROWS=rows, WIDTH=_width(gate.cols),
        HELD=_held_passes(gate, rows, 2), EARLY=early, launch_pdl=early,
    )  # fmt: skip
    size = 16 // down.plain().element_size()
    s_cols = s_down.cols if shared else 0
    each = size if (down.cols | s_cols) % size == 0 else 1
    passes, s_passes = (triton.cdiv(cols, THREADS * each) for cols in (per_row * down.cols, s_cols))
    s_held = min(s_passes, DOWN_HELD)
    _down[(down.rows, len(x))](
        hidden, down.plain(), routed.ids, routed.weights, s_hidden, s_down.plain(), x, out, down.rows,
        COLS=down.cols, SHARED_COLS=s_cols, PER_ROW=per_row, PARTS=THREADS, EACH=each,
        HELD=min(passes, DOWN_HELD - s_held), SHARED_HELD=s_held, EARLY=early, launch_pdl=early,
    )  # fmt: skip
