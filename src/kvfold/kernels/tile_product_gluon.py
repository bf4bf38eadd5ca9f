"""Experts of many rows in blocks, for Hopper in Gluon: weights become bfloat16 in the registers from which wgmma takes them.

Owns one kernel, used by tile_product.py where it `serves`. It multiplies two strips of features with the rows of an expert,
features as wgmma's M: gate and up of one network, or two neighbouring strips of `down`. TMA brings a pass of 128 weights of
each strip, as the words of the file, and of the rows into a ring; a thread reads the 16 bytes of codes that are a row's
block (a quarter of the pass) in one load, and its 32 weights are the numbers that wgmma wants from this very thread. While
the products of one strip are under way it decodes the other's. Which product of a pass a weight takes part in is thereby up
to the block format: the rows' columns are put in that order (`order`) where they are gathered, and where gate and up leave
what `down` multiplies.

A decoded weight is the definition's, rounded once to bfloat16: a block's scale is a bfloat16 and a rest, of which both
products are added before anything is rounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvfold.kernels.block_ptx import ORDERS, decoder
from kvfold.kernels.gluon_names import tma_load
from kvfold.kernels.matrix import Matrix

if TYPE_CHECKING:
    from kvfold.kernels.tile_product import Groups

MOST_ROWS = 128  # of a tile
RING_BYTES = 214 << 10  # of 227 KB of shared memory: sums leave through the rest

REGISTERS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))
# A constexpr, so that a kernel's key has the text.
DECODERS = gl.constexpr({(type, half): decoder(type, half) for type in ORDERS for half in range(2)})


@gluon.constexpr_function
def _decoder(decoders, type, half):
    return decoders[type, half]


@gluon.constexpr_function
def words_of_pass(type):
    """Words of codes a row."""
    return 32 if type == "Q8_0" else 16


@gluon.constexpr_function
def more_words(type):
    """Other words a row that TMA brings with them: the scales of a block of Q4_K, the other bits of Q5's and Q6_K's codes."""
    return {"Q4_K": 4, "Q5_0": 4, "Q5_1": 4, "Q6_K": 8}.get(type, 0)


@gluon.constexpr_function
def _raw_layout(strip, words):
    """Of words [strip, words] or [strip, 4, words / 4]: a thread has a quarter of two rows, eight apart."""
    return _flat(_block_layout(strip, words // 4))


@gluon.constexpr_function
def _flat(layout):
    """The same of the last two dimensions as one."""
    size = layout.shape[2]
    bases = [
        [[row, block * size + word] for row, block, word in part]
        for part in (layout.reg_bases, layout.lane_bases, layout.warp_bases)
    ]
    return gl.DistributedLinearLayout(*bases, [], [layout.shape[0], 4 * size])


@gluon.constexpr_function
def _scale_plane(type, cols):
    """The byte of a row at which 16-bit scales begin."""
    return {"Q5_0": cols // 8 * 5, "Q8_0": cols}.get(type, cols // 2)


@gluon.constexpr_function
def _block_layout(strip, words):
    """[strip, 4, words]: a thread has one of the four blocks of two rows, eight apart."""
    registers = [[0, 0, 1 << i] for i in range(words.bit_length() - 1)] + [[8, 0, 0]]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    rows = [[16 << i, 0, 0] for i in range(strip.bit_length() - 5)]
    return gl.DistributedLinearLayout(registers, lanes, rows, [], [strip, 4, words])


@gluon.constexpr_function
def _halves_layout(strip):
    """[strip, 2, 2, 4] of the four words of a thread's block, the first two dimensions of blocks apart."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [8, 0, 0, 0]]
    lanes = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    rows = [[16 << i, 0, 0, 0] for i in range(strip.bit_length() - 5)]
    return gl.DistributedLinearLayout(registers, lanes, rows, [], [strip, 2, 2, 4])


@gluon.constexpr_function
def _two_halves_layout(strip):
    """Of words [strip, 8], four of which both threads of two blocks want."""
    rows = [[16 << i, 0] for i in range(strip.bit_length() - 5)]
    lanes = [[0, 4], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, rows, [], [strip, 8])


@gluon.constexpr_function
def _store_layout(strip, inner):
    """Of [tokens, outer, inner]: eight neighbours of `inner` in a thread, where there are so many, so that they leave together."""
    width = min(8, inner)
    lanes = min(32, inner // width)
    return gl.BlockedLayout([1, 1, width], [1, 32 // lanes, lanes], [strip // 16, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _inner(order, strip):
    """Columns of a strip that stay neighbours in the order of columns."""
    return 128 if strip == 128 else 1 << order.index(6)


@gluon.constexpr_function
def _bit_order(order, strip):
    """Of sums [one dimension for each bit of a feature, the highest first, tokens]: tokens, then those bits in the order of columns."""
    bits = strip.bit_length() - 1
    return (bits, *(bits - 1 - bit for bit in reversed(order) if bit < bits))


@gluon.jit
def _numbers(pair):
    """Two bfloat16 of a register, as a dimension behind the others."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1; // $2", "=r,r,r", [gl.join(pair, pair)], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _words(raw, more, TYPE: gl.constexpr, STRIP: gl.constexpr):
    """(a thread's words of codes, what stands beside them), [STRIP, 4, 4] each, of a strip in shared memory."""
    B: gl.constexpr = _block_layout(STRIP, 4)
    if TYPE == "Q8_0":
        words = raw.load(_raw_layout(STRIP, 32)).reshape((STRIP, 4, 2, 4)).permute((0, 1, 3, 2))
        words, side = gl.split(words)
        words = gl.convert_layout(words, B, assert_trivial=True)
        side = gl.convert_layout(side, B, assert_trivial=True)
    else:
        words = gl.convert_layout(raw.load(_raw_layout(STRIP, 16)).reshape((STRIP, 4, 4)), B, assert_trivial=True)
        if TYPE == "Q4_K":
            side = gl.expand_dims(more.load(gl.SliceLayout(1, B)), 1)
            side, words = gl.broadcast(side, words)
        elif more_words(TYPE) == 4:
            side = gl.expand_dims(more.load(gl.SliceLayout(2, B)), 2)
            side, words = gl.broadcast(side, words)
        elif TYPE == "Q6_K":
            H: gl.constexpr = _halves_layout(STRIP)
            bits = more.load(_two_halves_layout(STRIP)).reshape((STRIP, 2, 4))
            bits = gl.expand_dims(gl.convert_layout(bits, gl.SliceLayout(1, H), assert_trivial=True), 1)
            upper = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, H))))
            upper = gl.expand_dims(gl.expand_dims(gl.expand_dims(upper, 0), 2), 3)
            side = gl.convert_layout((bits >> (upper * 2)).reshape((STRIP, 4, 4)), B, assert_trivial=True)
        else:
            side = words
    return words, side


@gluon.jit
def _decode(
    words, side, scale, half: gl.constexpr, DOT: gl.constexpr, TYPE: gl.constexpr, STRIP: gl.constexpr
):  # fmt: skip
    """Half of a strip's weights of a pass, [STRIP, 64] in wgmma's order."""
    scale, words = gl.broadcast(scale, words)
    p0, p1 = gl.inline_asm_elementwise(
        _decoder(DECODERS, TYPE, half),
        REGISTERS,
        [words, side, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=4,
    )
    w = gl.join(_numbers(p0), _numbers(p1)).reshape((STRIP, 4, 2, 2, 2, 2))
    return gl.convert_layout(w.permute((0, 5, 2, 3, 1, 4)).reshape((STRIP, 64)), DOT)


@gluon.jit
def _scales(row_at, step, TYPE: gl.constexpr, COLS: gl.constexpr, STRIP: gl.constexpr):
    """$16 of a pass's decoders, int32 [STRIP or 1, 4, 1], of the rows at `row_at` [STRIP]."""
    BLOCKS: gl.constexpr = gl.SliceLayout(2, _block_layout(STRIP, 4))
    block = gl.arange(0, 4, gl.SliceLayout(0, BLOCKS))[None, :]
    rows = row_at[:, None]
    if TYPE == "Q4_K":
        scale = block // 2 * 16 | (step % 2)
    elif TYPE == "Q6_K":
        level = (rows + (COLS // 4 * 3 + step * 8) + block).to(gl.pointer_type(gl.uint8), bitcast=True)
        d = (rows + (COLS // 256 * 208 + step // 2 * 2) + block * 0).to(gl.pointer_type(gl.uint16), bitcast=True)
        scale = gl.load(level).to(gl.int32) | gl.load(level + 4).to(gl.int32) << 8 | gl.load(d).to(gl.int32) << 16
    elif TYPE == "Q5_1":
        scale = gl.load(
            (rows + (COLS // 8 * 5 + step * 16) + block * 4).to(gl.pointer_type(gl.int32), bitcast=True)
        )
    else:
        at = rows + (_scale_plane(TYPE, COLS) + step * 8) + block * 2
        scale = gl.load(at.to(gl.pointer_type(gl.uint16), bitcast=True)).to(gl.int32)
    return gl.expand_dims(scale, 2)


@gluon.jit
def _load_strip(desc, more_desc, row, step, bar, raw, more, COLS: gl.constexpr, TYPE: gl.constexpr):
    """A strip's words of a pass."""
    word = step // 2 * 36 + step % 2 * 16 + 4 if TYPE == "Q4_K" else step * words_of_pass(TYPE)
    tma_load(desc, [row, word], bar, raw)
    if more_words(TYPE) > 0:
        word = step // 2 * 36 if TYPE == "Q4_K" else COLS // 8 + step * more_words(TYPE)
        tma_load(more_desc, [row, word], bar, more)


@gluon.jit
def _loader(
    x_desc, w0_desc, w1_desc, more0_desc, more1_desc, m, row0, row1, xs, raw0, raw1, more0, more1, full, empty,
    COLS: gl.constexpr, TYPE: gl.constexpr, STRIP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: passes of both strips and of the rows, in order, into a ring of STAGES."""
    for step in range(0, COLS // 128):
        slot = step % STAGES
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, TOKENS * 256 + 8 * STRIP * (words_of_pass(TYPE) + more_words(TYPE)))
        _load_strip(w0_desc, more0_desc, row0, step, bar, raw0.index(slot), more0.index(slot), COLS, TYPE)
        tma_load(x_desc, [m, step * 128], bar, xs.index(slot))
        _load_strip(w1_desc, more1_desc, row1, step, bar, raw1.index(slot), more1.index(slot), COLS, TYPE)


@gluon.jit
def _worker(
    w0, w1, out, pairs, m, end, strip, row0, row1, last_row, rows, row_bytes, xs, raw0, raw1, more0, more1, full, empty,
    COLS: gl.constexpr, TYPE: gl.constexpr, ORDER: gl.constexpr, GATED: gl.constexpr,
    STRIP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The other warps, four to 64 rows of each strip."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[STRIP // 16, 1], instr_shape=[16, TOKENS, 16]
    )
    DOT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    STEPS: gl.constexpr = COLS // 128
    j = gl.arange(0, STRIP, gl.SliceLayout(1, gl.SliceLayout(2, _block_layout(STRIP, 4))))
    at0 = w0 + gl.minimum(row0 + j, last_row).to(gl.int64) * row_bytes
    at1 = w1 + gl.minimum(row1 + j, last_row).to(gl.int64) * row_bytes
    scale0 = _scales(at0, 0, TYPE, COLS, STRIP)
    scale1 = _scales(at1, 0, TYPE, COLS, STRIP)
    acc0 = gl.zeros([STRIP, TOKENS], gl.float32, ACC)
    acc1 = warpgroup_mma_init(gl.zeros([STRIP, TOKENS], gl.float32, ACC))
    b = gl.zeros([STRIP, 64], gl.bfloat16, DOT)
    for step in range(0, STEPS):
        slot = step % STAGES
        following = gl.minimum(step + 1, STEPS - 1)
        next0 = _scales(at0, following, TYPE, COLS, STRIP)
        next1 = _scales(at1, following, TYPE, COLS, STRIP)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        words0, side0 = _words(raw0.index(slot), more0.index(slot), TYPE, STRIP)
        words1, side1 = _words(raw1.index(slot), more1.index(slot), TYPE, STRIP)
        for half in gl.static_range(2):
            x = xs.index(slot).slice(half * 64, 64, dim=1).permute((1, 0))
            a = _decode(words0, side0, scale0, half, DOT, TYPE, STRIP)
            token = warpgroup_mma(a, x, acc0, is_async=True)
            acc1, b = warpgroup_mma_wait(1, (acc1, b))
            if half == 0:  # the pass before has been multiplied, and its place is free
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            b = _decode(words1, side1, scale1, half, DOT, TYPE, STRIP)
            acc1 = warpgroup_mma(b, x, acc1, is_async=True)
            acc0, a = warpgroup_mma_wait(1, (token, a))
        scale0 = next0
        scale1 = next1
    acc1, b = warpgroup_mma_wait(0, (acc1, b))
    if GATED:
        acc0 = acc0 * (1.0 / (1.0 + gl.exp(-acc0))) * acc1
    _store(acc0, out, pairs, m, end, strip, rows, ORDER, GATED, STRIP, TOKENS)
    if not GATED:
        _store(acc1, out, pairs, m, end, strip + STRIP, rows, ORDER, GATED, STRIP, TOKENS)


@gluon.jit
def _experts_kernel(
    x_desc, w0_desc, w1_desc, more0_desc, more1_desc, w0, w1, out, pairs, starts, tiles, num_experts, rows, row_bytes,
    COLS: gl.constexpr, TYPE: gl.constexpr, ORDER: gl.constexpr, GATED: gl.constexpr,
    STRIP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (strips, tile). GATED: out[place in pairs] = silu(w0 x) * (w1 x), columns in ORDER; else out[pair] = w0 x."""
    tile = gl.program_id(1)
    expert = gl.load(tiles + tile * 2)
    if expert >= num_experts:
        return
    m = gl.load(tiles + tile * 2 + 1)
    end = gl.load(starts + expert + 1)
    strip = gl.program_id(0) * (1 if GATED else 2) * STRIP
    first_row = expert * rows
    row0 = first_row + strip
    row1 = row0 if GATED else row0 + STRIP
    WORDS: gl.constexpr = words_of_pass(TYPE)
    WL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=4 * WORDS, element_bitwidth=32, rank=2)
    MORE: gl.constexpr = more_words(TYPE)
    ML: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=MORE // 8 * 32, element_bitwidth=32, rank=2)
    XL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, 128], XL)
    raw0 = gl.allocate_shared_memory(gl.int32, [STAGES, STRIP, WORDS], WL)
    raw1 = gl.allocate_shared_memory(gl.int32, [STAGES, STRIP, WORDS], WL)
    if MORE > 0:
        more0 = gl.allocate_shared_memory(gl.int32, [STAGES, STRIP, MORE], ML)
        more1 = gl.allocate_shared_memory(gl.int32, [STAGES, STRIP, MORE], ML)
    else:
        more0 = raw0
        more1 = raw1
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_worker, (
                w0, w1, out, pairs, m, end, strip, row0, row1, first_row + rows - 1, rows, row_bytes,
                xs, raw0, raw1, more0, more1, full, empty, COLS, TYPE, ORDER, GATED, STRIP, TOKENS, STAGES,
            )),
            (_loader, (
                x_desc, w0_desc, w1_desc, more0_desc, more1_desc, m, row0, row1,
                xs, raw0, raw1, more0, more1, full, empty, COLS, TYPE, STRIP, TOKENS, STAGES,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


@gluon.jit
def _store(
    y, out, pairs, m, end, strip, rows,
    ORDER: gl.constexpr, GATED: gl.constexpr, STRIP: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Sums [STRIP, TOKENS]: GATED, columns in ORDER and rows by place; else columns as they are and rows by pair."""
    y = y.to(gl.bfloat16)
    INNER: gl.constexpr = _inner(ORDER, STRIP) if GATED else STRIP
    if GATED:
        B: gl.constexpr = _bit_order(ORDER, STRIP)
        if STRIP == 64:
            y = y.reshape((2, 2, 2, 2, 2, 2, TOKENS)).permute((B[0], B[1], B[2], B[3], B[4], B[5], B[6]))
        else:
            y = y.reshape((2, 2, 2, 2, 2, 2, 2, TOKENS)).permute((B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7]))
        y = y.reshape((TOKENS, STRIP // INNER, INNER))
    else:
        y = y.permute((1, 0)).reshape((TOKENS, 1, STRIP))
    L: gl.constexpr = _store_layout(STRIP, INNER)
    y = gl.convert_layout(y, L)
    token = m + gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    outer = gl.arange(0, STRIP // INNER, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    inner = gl.arange(0, INNER, gl.SliceLayout(0, gl.SliceLayout(0, L)))
    is_row = token < end
    if GATED:
        row = token
        # The bit that tells two strips of 64 apart is among a pass's columns wherever ORDER has it.
        first = strip // 128 * 128 + strip % 128 // STRIP * INNER
        start = first + outer * (INNER * 128 // STRIP)
    else:
        row = gl.load(pairs + token, mask=is_row, other=0)
        start = strip + outer
    row_at = gl.expand_dims(gl.expand_dims(out + row.to(gl.int64) * rows, 1), 2)
    row_is = gl.expand_dims(gl.expand_dims(is_row, 1), 2)
    col = gl.expand_dims(gl.expand_dims(start, 0), 2) + gl.expand_dims(gl.expand_dims(inner, 0), 0)
    gl.store(row_at + col, y, mask=row_is & (col < rows))


@triton.jit
def _gather(x, out, pairs, cols, x_stride, PER_ROW: tl.constexpr, SHIFTS: tl.constexpr, WIDTH: tl.constexpr):
    """out[place] = row pairs[place] // PER_ROW of x, columns in an order: SHIFTS, seven bits of a column's number."""
    place = tl.program_id(0).to(tl.int64)
    to = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    col = to // 128 * 128
    for bit in tl.static_range(7):
        col += ((to >> bit) & 1) << SHIFTS[bit]
    row = tl.load(pairs + place) // PER_ROW
    v = tl.load(x + row.to(tl.int64) * x_stride + col, mask=to < cols, other=0.0)
    tl.store(out + place * cols + to, v, mask=to < cols)


def rows_of_tile(num_pairs: int, num_experts: int) -> int:
    """Pairs of a tile: most experts have one, as their numbers of pairs are spread by chance."""
    mean = max(1.0, num_pairs / num_experts)
    return min(MOST_ROWS, max(16, 1 << math.ceil(math.log2(mean + math.sqrt(mean)))))


def experts(x: Tensor, per_row: int, gate: Matrix, up: Matrix, down: Matrix, groups: Groups, y: Tensor) -> None:
    """y [P, rows of down] = down(silu(gate x) * up x) of every pair, whose row of x [T, cols] is pair // per_row."""
    hidden = torch.empty(len(groups.pairs), gate.rows, dtype=x.dtype, device=x.device)
    _launch(gathered(x, per_row, gate, groups), gate, up, groups, hidden, ORDERS[down.type])
    multiply(hidden, down, groups, y)


def gathered(x: Tensor, per_row: int, meets: Matrix, groups: Groups) -> Tensor:
    """Row pair // per_row of x [T, cols] for each of the groups' pairs in their order, its columns in the order of `meets`."""
    out = torch.empty(len(groups.pairs), x.shape[1], dtype=x.dtype, device=x.device)
    _gather[(len(out), triton.cdiv(x.shape[1], 1024))](
        x, out, groups.pairs, x.shape[1], x.stride(0), PER_ROW=per_row, SHIFTS=ORDERS[meets.type], WIDTH=1024
    )
    return out


def multiply(x: Tensor, w: Matrix, groups: Groups, out: Tensor) -> None:
    """out[pair] = w x[place of pair], as `gathered` has x: [P, cols], and out: [P, rows]."""
    _launch(x, w, None, groups, out, ORDERS[w.type])


def _launch(
    x: Tensor, w: Matrix, other: Matrix | None, groups: Groups, out: Tensor, order: tuple[int, ...]
) -> None:
    second = w if other is None else other
    tile, options = sizes(w.type, groups.rows)
    strip = tile["STRIP"]

    def boxes(words: int) -> list[TensorDescriptor]:
        """Over each of the two matrices as words."""
        layout = gl.NVMMASharedLayout(swizzle_byte_width=4 * words // 32 * 32, element_bitwidth=32, rank=2)
        return [TensorDescriptor.from_tensor(m.raw.view(torch.int32), [strip, words], layout) for m in (w, second)]

    codes = boxes(words_of_pass(w.type))
    more = boxes(more_words(w.type)) if more_words(w.type) else codes
    x_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    strips = strip * (2 if other is None else 1)
    _experts_kernel[(triton.cdiv(w.rows, strips), len(groups.tiles))](
        TensorDescriptor.from_tensor(x, [groups.rows, 128], x_layout), *codes, *more, w.raw, second.raw, out,
        groups.pairs, groups.starts, groups.tiles, w.parts, w.rows, w.row_bytes,
        COLS=w.cols, TYPE=w.type, ORDER=order, GATED=other is not None, **tile, **options,
    )  # fmt: skip


def sizes(type: str, tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of tiles of so many rows: what the kernel is compiled for, and its launch's options. maxnreg: registers a thread has
    before the loading warps give theirs to the others."""
    warps, registers = (4, 80) if tokens <= 32 else (8, 168)
    strip = 16 * warps
    stage_bytes = 256 * tokens + 8 * strip * (words_of_pass(type) + more_words(type))
    stages = min(4, RING_BYTES // stage_bytes)
    return {"STRIP": strip, "TOKENS": tokens, "STAGES": stages}, {"num_warps": warps, "maxnreg": registers}
