"""What the Hopper kernels of MLA decode are made of: a part's way through its sequences, and hand-offs between warpgroups.

Owns no kernel and no launch: mla_decode_gluon.py and mla_decode_fp8_gluon.py do.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def stretch(part_starts, kv_lens, part, step):
    """(sequence, kv_len, first tile, end tile, number of tiles) of the step-th sequence of a part."""
    first_sequence = gl.load(part_starts + 2 * part)
    sequence = first_sequence + step
    kv_len = gl.load(kv_lens + sequence)
    num_tiles = (kv_len + 63) // 64
    lo = gl.where(step == 0, gl.load(part_starts + 2 * part + 1), 0)
    hi = gl.where(sequence == gl.load(part_starts + 2 * part + 2), gl.load(part_starts + 2 * part + 3), num_tiles)
    return sequence, kv_len, lo, hi, num_tiles


@gluon.jit
def num_stretches(part_starts, part):
    end_partial = (gl.load(part_starts + 2 * part + 3) > 0).to(gl.int32)
    return gl.load(part_starts + 2 * part + 2) + end_partial - gl.load(part_starts + 2 * part)


@triton.constexpr_function
def tell(barrier: int, warpgroups: int = 2) -> str:
    """PTX: a warpgroup arrives at a named barrier, of two with the one that hears, and goes on. Triton has those from 0 on, five
    of them where there are four partitions; a barrier is told again only after it was heard."""
    return f"bar.arrive {barrier}, {128 * warpgroups}; mov.u32 $0, $1;"


@triton.constexpr_function
def hear(barrier: int, warpgroups: int = 2) -> str:
    """PTX: another one waits there until all have told, and may then read what they wrote before."""
    return f"bar.sync {barrier}, {128 * warpgroups}; mov.u32 $0, $1;"


@gluon.jit
def meet(barrier: gl.constexpr, nothing):
    """Tells or hears. nothing: any number of the kernel's."""
    gl.inline_asm_elementwise(barrier, "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fresh_zero(nothing):
    """0, of which the compiler does not know that it is the same in every turn of a loop.

    Addresses that depend on it are computed in each turn, in 1 or 2 uniform instructions a product. Else the descriptors
    of all 80 products are computed before the loop, do not fit the registers, and are read back from local memory,
    for which 222 KB of shared memory leave almost no L1.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1)
