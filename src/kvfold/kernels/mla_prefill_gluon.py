"""MLA prefill for Hopper in Gluon: 128 query rows a program, keys of 128 + 64 and values of 128 numbers by TMA.

Owns one kernel with the contract of mla_prefill.py for 16-bit inputs, and nothing else; the plain-Triton kernel is its
judge. Two warpgroups have 64 rows each and share every tile of 128 keys; one warp loads. A warpgroup issues the scores
of a tile, rescales its sums meanwhile, issues the values of the tile before, and takes its softmax while the tensor
cores work on those. Results leave through the queries' shared memory.

Shared memory: queries 48 KB, two stages of keys (128 * 192 * 2 B = 48 KB) and of values (32 KB): 208 KB of 227.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvfold.kernels.gluon_names import tma_load, tma_store
from kvfold.kernels.online_softmax import NO_SCORE

STAGES = gl.constexpr(2)


@gluon.jit
def _load_queries(q_desc, q_rope_desc, row, column, full, qn, qr):
    """64 rows of queries."""
    mbarrier.expect(full, 64 * 192 * 2)
    tma_load(q_desc, [row, column], full, qn)
    tma_load(q_rope_desc, [row, column + 128], full, qr)


@gluon.jit
def _load_keys(k_desc, k_rope_desc, key, column, rope_column, full, kn, kr):
    """A tile of 128 keys."""
    mbarrier.expect(full, 128 * 192 * 2)
    tma_load(k_desc, [key, column], full, kn)
    tma_load(k_rope_desc, [key, rope_column], full, kr)


@gluon.jit
def _loader(
    k_desc, k_rope_desc, v_desc, first_key, num_tiles, k_column, k_rope_column, v_column,
    kn, kr, vs, k_full, k_free, v_full, v_free,
):  # fmt: skip
    """One warp: values of every tile, the keys of the next one before them, since their stage is free earlier."""
    for j in range(1, num_tiles + 1):
        key = first_key + j * 128
        if j < num_tiles:
            stage = j % STAGES
            mbarrier.wait(k_free.index(stage), ((j // STAGES) & 1) ^ 1)
            _load_keys(
                k_desc, k_rope_desc, key, k_column, k_rope_column, k_full.index(stage), kn.index(stage), kr.index(stage)
            )  # fmt: skip
        before = (j - 1) % STAGES
        mbarrier.wait(v_free.index(before), (((j - 1) // STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(before), 128 * 128 * 2)
        tma_load(v_desc, [key - 128, v_column], v_full.index(before), vs.index(before))


@gluon.jit
def _scores(qn, qr, kn, kr, SL: gl.constexpr):
    """Scores of 64 rows and one tile of 128 keys, not waited for."""
    s = warpgroup_mma(qn, kn.permute((1, 0)), gl.zeros([64, 128], gl.float32, SL), is_async=True)
    return warpgroup_mma(qr, kr.permute((1, 0)), s, is_async=True)


@gluon.jit
def _weights(s, highest, scale_log2):
    """exp of the scaled scores below the highest, and what each of a row's four threads has of its sum: [64, 4]."""
    p = gl.exp2(s * scale_log2 - (highest * scale_log2)[:, None])
    return p, gl.sum(gl.sum(p.reshape((64, 16, 4, 2)), 3), 1)


@gluon.jit
def _highest(s):
    """Each row's highest score, as a tree: one after another, the first row's 31 maxima took 13 % of a tile's time."""
    pairs = gl.max(s.reshape((64, 4, 4, 4, 2)), 4)
    threads = gl.max(gl.max(pairs, 2), 1)
    return gl.convert_layout(gl.max(threads, 1), gl.SliceLayout(1, s.type.layout))


@gluon.jit
def _kept_below(x):
    """x. LLVM moves arithmetic up over products issued before it, which then wait; arithmetic with this x stays below."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _kept_above(weight):
    """weight, computed before what follows. ptxas moves a wait for products up over the arithmetic of its block, here over
    the whole softmax, which then has idle tensor cores beside it; not over a branch on the sum of all weights. None is negative."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; setp.lt.f32 never, $1, 0f00000000; @never nanosleep.u32 0; mov.b32 $0, $1; }",
        "=r,r", [weight], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _hide(s, key, hidden, sees):
    """Minus infinity where a row does not see one of the keys from `key` on; keys before `hidden` are seen by all."""
    if key + 128 > hidden:
        seen = (key + gl.arange(0, 128, gl.SliceLayout(0, s.type.layout)))[None, :] < sees[:, None]
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def _fold_tile(
    o, highest, weight, shrink, pb, j, key, hidden, sees, scale_log2,
    qn, qr, kn, kr, vs, k_full, k_free, v_full, v_free,
):  # fmt: skip
    """Scores and softmax of the j-th tile, keys from `key` on, and the values of the tile before it.

    o [64, 128] waits for `shrink`, weight [64, 4] has had it; pb are the weights of the tile before.
    """
    SL: gl.constexpr = o.type.layout
    stage = j % STAGES
    before = (j - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
    s = _scores(qn, qr, kn.index(stage), kr.index(stage), SL)
    o = o * _kept_below(shrink)[:, None]
    mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
    o = warpgroup_mma(pb, vs.index(before), o, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    mbarrier.arrive(k_free.index(stage), count=1)
    s = _hide(s, key, hidden, sees)
    higher = gl.maximum(highest, _highest(s))
    shrink = gl.exp2((highest - higher) * scale_log2)
    p, sums = _weights(s, higher, scale_log2)
    weight = weight * gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))[:, None] + sums
    weight = _kept_above(weight)
    o, pb = warpgroup_mma_wait(0, (o, pb))
    mbarrier.arrive(v_free.index(before), count=1)
    return o, higher, weight, shrink, gl.convert_layout(p.to(pb.dtype), pb.type.layout)


@gluon.jit
def _worker(
    half: gl.constexpr, first_key, num_tiles, last_key, row0, num_rows, ahead, scale_log2, out_desc, out_column, out, lse,
    out_stride, qn, qr, kn, kr, vs, q_full, k_full, k_free, v_full, v_free, BOXED: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows over all tiles, the running softmax in registers."""
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    DL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SL, k_width=2)
    VL: gl.constexpr = gl.SliceLayout(1, SL)
    first_row = row0 + half * 64
    i = first_row + gl.arange(0, 64, VL)
    sees = gl.minimum(ahead + i + 1, last_key)  # keys each row sees; none where it is not positive
    hidden = gl.minimum(ahead + first_row + 1, last_key)
    my_qn = qn.index(half)
    my_qr = qr.index(half)
    o = gl.zeros([64, 128], gl.float32, SL)
    mbarrier.wait(q_full.index(half), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = _scores(my_qn, my_qr, kn.index(0), kr.index(0), SL)
    s = warpgroup_mma_wait(0, (s,))
    mbarrier.arrive(k_free.index(0), count=1)
    s = _hide(s, first_key, hidden, sees)
    highest = gl.maximum(_highest(s), NO_SCORE)
    p, weight = _weights(s, highest, scale_log2)
    pb = gl.convert_layout(p.to(qn.dtype), DL)
    shrink = gl.full([64], 1.0, gl.float32, VL)
    for j in range(1, num_tiles):
        o, highest, weight, shrink, pb = _fold_tile(
            o, highest, weight, shrink, pb, j, first_key + j * 128, hidden, sees, scale_log2,
            my_qn, my_qr, kn, kr, vs, k_full, k_free, v_full, v_free,
        )  # fmt: skip
    last = (num_tiles - 1) % STAGES
    o = o * shrink[:, None]
    mbarrier.wait(v_full.index(last), ((num_tiles - 1) // STAGES) & 1)
    o = warpgroup_mma(pb, vs.index(last), o, is_async=True)
    total = gl.convert_layout(gl.sum(weight, 1), VL)
    o, pb = warpgroup_mma_wait(0, (o, pb))

    some = total > 0
    o = o * gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)[:, None]
    own = gl.where(some, highest * scale_log2 + gl.log2(gl.where(some, total, 1.0)), float("-inf"))
    real = i < num_rows
    column = gl.arange(0, 128, gl.SliceLayout(0, SL))
    out_at = out + i.to(gl.int64)[:, None] * out_stride + column[None, :]
    if MERGE:
        old_lse = gl.load(lse + i, mask=real, other=float("-inf")) * 1.4426950408889634
        top = gl.maximum(gl.maximum(old_lse, own), NO_SCORE)
        old_share = gl.exp2(old_lse - top)
        own_share = gl.exp2(own - top)
        both = old_share + own_share
        safe = gl.where(both > 0, both, 1.0)
        old = gl.load(out_at, mask=real[:, None], other=0).to(gl.float32)
        o = old * (old_share / safe)[:, None] + o * (own_share / safe)[:, None]
        own = gl.where(both > 0, top + gl.log2(safe), float("-inf"))
    gl.store(lse + i, own * 0.6931471805599453, mask=real)
    if BOXED:
        my_qn.store(o.to(out.dtype.element_ty))
        fence_async_shared()
        tma_store(out_desc, [first_row, out_column], my_qn)
        tma.store_wait(0)
    else:
        gl.store(out_at, o.to(out.dtype.element_ty), mask=real[:, None])


@gluon.jit(do_not_specialize=["num_rows", "num_keys", "ahead", "num_parts", "out_part_stride", "lse_part_stride"])
def _prefill_kernel(
    q_desc, q_rope_desc,  # boxes [64, 128] and [64, 64] over [R, all heads]
    k_desc, k_rope_desc, v_desc,  # boxes [128, 128], [128, 64] and [128, 128] over [K, all heads]; zeros past the end
    out_desc,  # if BOXED: boxes [64, 128] over [R, all heads]
    out, lse, kv_len, scale_log2, num_rows, num_keys, ahead, num_parts,
    q_head_stride, k_head_stride, k_rope_head_stride, v_head_stride,
    out_stride, out_head_stride, out_part_stride, lse_head_stride, lse_part_stride,
    PARTED: gl.constexpr, BOXED: gl.constexpr, MERGE: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """Program: 128 rows and a head, if PARTED a part of their keys. Launched as (heads that run together, times parts;
    row blocks, the longest first; the rest of the heads). `ahead`: keys of this run before the first row's own."""
    if COUNTED:
        num_keys = gl.load(kv_len)
        ahead = num_keys - num_rows
    head = gl.program_id(0)
    heads_together = gl.num_programs(0)
    row0 = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    num_tiles = (gl.maximum(gl.minimum(ahead + row0 + 128, num_keys), 0) + 127) // 128
    first_key = 0
    last_key = num_keys
    if PARTED:
        part = head % num_parts
        head = head // num_parts
        heads_together = heads_together // num_parts
        out += part.to(gl.int64) * out_part_stride
        lse += part.to(gl.int64) * lse_part_stride
        first_key = num_tiles * part // num_parts * 128
        last_key = gl.minimum(num_tiles * (part + 1) // num_parts * 128, num_keys)
        num_tiles = (last_key - first_key + 127) // 128
    num_tiles = gl.maximum(num_tiles, 1)  # the one of a program whose rows see no key is hidden whole
    head += gl.program_id(2) * heads_together
    out_column = head * out_head_stride
    out += head.to(gl.int64) * out_head_stride
    lse += head.to(gl.int64) * lse_head_stride
    dtype: gl.constexpr = q_desc.dtype
    TL: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    qn = gl.allocate_shared_memory(dtype, [2, 64, 128], TL)
    qr = gl.allocate_shared_memory(dtype, [2, 64, 64], TL)
    kn = gl.allocate_shared_memory(dtype, [STAGES, 128, 128], TL)
    kr = gl.allocate_shared_memory(dtype, [STAGES, 128, 64], TL)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 128, 128], TL)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BL)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_free.index(n), count=2)  # both warpgroups
        mbarrier.init(v_free.index(n), count=2)
    fence_async_shared()
    # Before the warps part, which takes about as long as these loads.
    q_column = head * q_head_stride
    k_column = head * k_head_stride
    k_rope_column = head * k_rope_head_stride
    _load_queries(q_desc, q_rope_desc, row0, q_column, q_full.index(0), qn.index(0), qr.index(0))
    _load_keys(k_desc, k_rope_desc, first_key, k_column, k_rope_column, k_full.index(0), kn.index(0), kr.index(0))
    _load_queries(q_desc, q_rope_desc, row0 + 64, q_column, q_full.index(1), qn.index(1), qr.index(1))
    gl.warp_specialize(
        [
            (_worker, (
                0, first_key, num_tiles, last_key, row0, num_rows, ahead, scale_log2, out_desc, out_column, out, lse,
                out_stride, qn, qr, kn, kr, vs, q_full, k_full, k_free, v_full, v_free, BOXED, MERGE,
            )),
            (_worker, (
                1, first_key, num_tiles, last_key, row0, num_rows, ahead, scale_log2, out_desc, out_column, out, lse,
                out_stride, qn, qr, kn, kr, vs, q_full, k_full, k_free, v_full, v_free, BOXED, MERGE,
            )),
            (_loader, (
                k_desc, k_rope_desc, v_desc, first_key, num_tiles, k_column, k_rope_column, head * v_head_stride,
                kn, kr, vs, k_full, k_free, v_full, v_free,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _flat(x: torch.Tensor, box: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """A box over x [rows, heads, numbers] as [rows, from the first head's first number to the last one's last]."""
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], box, layout)


def launch(
    q: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor,  # [parts, R, H, 128]
    lse: torch.Tensor,  # [parts, H, R]
    scale_log2: float, ahead: int, heads_together: int, merge: bool, kv_len: torch.Tensor | None,
) -> None:  # fmt: skip
    """The contract of `mla_prefill`, the keys in as many parts as `out` has; `merge` with one part."""
    num_rows, num_heads, _ = q.shape
    num_parts = out.shape[0]
    element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], element)
    q_desc = _flat(q, [64, 128], layout)
    # Through the queries' shared memory, as TMA can address it: by 4 bytes a thread a program takes 2 us longer.
    boxed = (
        num_parts == 1
        and not merge
        and out.dtype == q.dtype
        and out.data_ptr() % 16 == 0
        and out.stride(1) % 8 == 0
        and out.stride(2) % 8 == 0
    )
    _prefill_kernel[heads_together * num_parts, triton.cdiv(num_rows, 128), num_heads // heads_together](
        q_desc, _flat(q, [64, 64], layout),
        _flat(k_nope, [128, 128], layout), _flat(k_rope, [128, 64], layout), _flat(v, [128, 128], layout),
        _flat(out[0], [64, 128], layout) if boxed else q_desc,
        out, lse, lse if kv_len is None else kv_len, scale_log2, num_rows, k_nope.shape[0], ahead, num_parts,
        q.stride(1), k_nope.stride(1), k_rope.stride(1) if k_rope.shape[1] > 1 else 0, v.stride(1),
        out.stride(1), out.stride(2), out.stride(0), lse.stride(1), lse.stride(0),
        PARTED=num_parts > 1, BOXED=boxed, MERGE=merge, COUNTED=kv_len is not None, num_warps=4,
    )  # fmt: skip
