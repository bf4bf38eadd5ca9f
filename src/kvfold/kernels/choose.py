"""Tokens chosen on the device as engine/sampler.py chooses them, and the next step's tokens taken from there.

So a step of generated rows can be launched before the host knows what the one before it said. How a row chooses is data
(model.step.Choice): filters, temperature and the point of the draw, so launches differ in nothing else.

A rank is a logit with its id: higher logits first, of equal ones the lower id. Many programs find the highest ranks of GROUP
logits, and of GROUP such groups. One program a row is left with the rest: of the highest groups of groups, the highest groups,
of those the highest ranks, in order. Every filter keeps a prefix of them, and one is drawn. Without top-k it goes through all
logits in two passes instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.overlap import overlaps, wait_for_inputs

BLOCK = 4096  # logits of a program that finds the highest ranks
GROUP = 16
TILE = 8192  # logits at a time where one program goes through a row
NUM_WARPS = 16  # sorting is what takes time, and is spread over them
FIELDS = 5  # of a choice

NOTHING: tl.constexpr = tl.constexpr(-(2**63))  # the rank of what is no logit, below all others


@triton.jit
def _key(x):
    """int32, ordered as float32 x; NaN and +inf are one, -0 and 0 are one."""
    x = tl.where(x < float("inf"), x, float("inf"))  # NaN is no likelihood, as +inf is none
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _rank(x, i):
    """int64, greater for a higher logit and of equal ones for the lower id."""
    return (_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64)


@triton.jit
def _id(rank):
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _children(parents, GROUP: tl.constexpr):
    """Of ranks [N], the places [N * GROUP] of what the one at place _id(rank) // GROUP of a level above stands for."""
    n = tl.arange(0, parents.shape[0] * GROUP)
    parent = tl.gather(parents, n // GROUP, 0)
    return _id(parent), n % GROUP, parent != NOTHING


@triton.jit
def _best(large, smalls, logits, vocab, GROUP: tl.constexpr, MOST: tl.constexpr):
    """The MOST highest ranks of a row, highest first. What is among them is among the groups of the MOST highest groups."""
    id, child, is_there = _children(tl.topk(large, MOST), GROUP)
    at = id // (GROUP * GROUP) * GROUP + child
    small = tl.load(smalls + at, mask=is_there, other=NOTHING)
    id, child, is_there = _children(tl.topk(small, MOST), GROUP)
    i = id // GROUP * GROUP + child
    is_there &= i < vocab
    x = tl.load(logits + i, mask=is_there, other=0.0)
    return tl.topk(tl.where(is_there, _rank(x, i), NOTHING), MOST)


@triton.jit
def _below(share, total):
    """The point at `share` of the total weight, below its end."""
    before = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    return tl.minimum(share * total, before)


@triton.jit
def _drawn_by_rank(
    large, smalls, logits, vocab, top_k, top_p, bound, highest, sharpness, point, GROUP: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """The token drawn from the top_k highest ranks, by rank: the prefix of them whose logits, without temperature, hold
    top_p of their probability, and of that the logits from `bound` on."""
    best = _best(large, smalls, logits, vocab, GROUP, MOST)
    x = _logit((best >> 32).to(tl.int32))
    is_kept = (tl.arange(0, MOST) < top_k) & (best != NOTHING)
    if top_p < 1:
        weights = tl.where(is_kept, tl.exp((x - highest).to(tl.float64)), 0.0)
        is_kept &= tl.cumsum(weights, 0) - weights < top_p * tl.sum(weights, 0)
    is_kept &= x >= bound
    weights = tl.where(is_kept, tl.exp(((x - highest) * sharpness).to(tl.float64)), 0.0)
    sums = tl.cumsum(weights, 0)
    is_before = sums <= _below(point, tl.max(sums, 0))
    drawn = tl.minimum(tl.sum(is_before.to(tl.int32), 0), tl.sum((weights > 0).to(tl.int32), 0) - 1)
    return tl.sum(tl.where(tl.arange(0, MOST) == drawn, _id(best), 0), 0)


@triton.jit
def _weights(logits, vocab, start, bound, highest, sharpness, TILE: tl.constexpr):
    i = start + tl.arange(0, TILE)
    x = tl.load(logits + i, mask=i < vocab, other=float("-inf"))
    return i, tl.where((i < vocab) & (x >= bound), tl.exp((x - highest) * sharpness), 0.0).to(tl.float64)


@triton.jit
def _drawn_by_id(logits, vocab, likeliest, bound, highest, sharpness, point, TILE: tl.constexpr):
    """The token drawn from all logits from `bound` on, in order of their ids; the likeliest where sums in two orders, equal
    but for their last bits, leave none behind the point."""
    sums = tl.zeros([TILE], tl.float64)
    for start in range(0, vocab, TILE):
        _, weights = _weights(logits, vocab, start, bound, highest, sharpness, TILE)
        sums += weights
    point = _below(point, tl.sum(sums, 0))
    before = tl.zeros((), tl.float64)
    token = vocab
    start = 0
    while (token == vocab) & (start < vocab):
        i, weights = _weights(logits, vocab, start, bound, highest, sharpness, TILE)
        behind = before + tl.sum(weights, 0)
        if behind > point:
            is_behind = (weights > 0) & (before + tl.cumsum(weights, 0) > point)
            token = tl.min(tl.where(is_behind, i, vocab), 0)
        before = behind
        start += TILE
    return tl.where(token == vocab, likeliest, token)


@triton.jit
def _highest(logits, stride, vocab, smalls, larges, BLOCK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr):
    """Program (block of logits, row): its highest ranks of GROUP logits and of GROUP such groups."""
    if EARLY:
        wait_for_inputs()
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    IN_BLOCK: tl.constexpr = BLOCK // (GROUP * GROUP)
    at_large = block * IN_BLOCK + tl.arange(0, IN_BLOCK)
    at_small = at_large[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    i = at_small[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    x = tl.load(logits + row * stride + i, mask=i < vocab, other=0.0)
    small = tl.max(tl.where(i < vocab, _rank(x, i), NOTHING), 2)
    tl.store(smalls + row * num_blocks * IN_BLOCK * GROUP + at_small, small)
    tl.store(larges + row * num_blocks * IN_BLOCK + at_large, tl.max(small, 1))


@triton.jit
def _choose(
    logits, stride, vocab, choices, smalls, larges, num_larges, out,
    GROUP: tl.constexpr, MOST: tl.constexpr, LARGES: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row): its token."""
    row = tl.program_id(0).to(tl.int64)
    choices += row * FIELDS
    top_k, top_p, depth = tl.load(choices), tl.load(choices + 1), tl.load(choices + 2)
    sharpness, point = tl.load(choices + 3).to(tl.float32), tl.load(choices + 4)
    if EARLY:
        wait_for_inputs()
    logits += row * stride
    smalls += row * num_larges * GROUP
    n = tl.arange(0, LARGES)
    large = tl.load(larges + row * num_larges + n, mask=n < num_larges, other=NOTHING)
    likeliest = tl.max(large, 0)
    highest = _logit((likeliest >> 32).to(tl.int32))
    token = _id(likeliest)
    bound = highest + depth.to(tl.float32)
    if tl.abs(highest) == float("inf"):
        token = -1
    elif top_k == 0:
        token = _drawn_by_id(logits, vocab, token, bound, highest, sharpness, point, TILE)
    elif top_k > 1:
        token = _drawn_by_rank(
            large, smalls, logits, vocab, top_k, top_p, bound, highest, sharpness, point, GROUP, MOST
        )
    tl.store(out + row, token)


@triton.jit
def _take(token_ids, chosen, num_rows, ROWS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(token_ids + i, mask=i < num_rows, other=0)
    is_chosen = (i < num_rows) & (token < 0)
    there = tl.load(chosen + (-1 - token), mask=is_chosen, other=0)
    tl.store(token_ids + i, tl.maximum(there, 0), mask=is_chosen)


def choose(logits: Tensor, choices: Tensor, most: int, out: Tensor) -> None:
    """out int32 [T]: of logits float32 [T, vocab] each row's token, -1 where the highest is not finite.

    choices: float64 [T, 5], of each row
        top_k     as many of the highest ranks stay, 1 to `most`, or 0: all
        top_p     of these the highest stay that hold this share of their probability; 1: all, as it has to be for all ranks
        depth     log(min_p): logits stay that lie no further below the highest; -inf: all
        sharpness 1 / temperature
        point     of the draw, from 0 to below 1
    most: a power of two.

    Ranks are exact, weights are not the host's to the last bit: exponentials of float32 there, of float64 here (of float32 by
    another routine for all ranks), then sums in float64. So a point within 1e-6 of the edge between two tokens, or of the one where top-p ends, may take the
    other one.
    """
    num_rows, vocab = logits.shape
    assert choices.shape == (num_rows, FIELDS) and choices.is_contiguous()
    num_blocks = triton.cdiv(vocab, BLOCK)
    num_larges = num_blocks * BLOCK // GROUP**2
    smalls, larges = (
        torch.empty(num_rows, size, dtype=torch.int64, device=logits.device)
        for size in (num_larges * GROUP, num_larges)
    )
    early = overlaps(logits)
    _highest[(num_blocks, num_rows)](
        logits, logits.stride(0), vocab, smalls, larges,
        BLOCK=BLOCK, GROUP=GROUP, num_warps=8, EARLY=early, launch_pdl=early,
    )  # fmt: skip
    _choose[(num_rows,)](
        logits, logits.stride(0), vocab, choices, smalls, larges, num_larges, out,
        GROUP=GROUP, MOST=most, LARGES=max(most, triton.next_power_of_2(num_larges)), TILE=TILE, FIELDS=FIELDS,
        num_warps=NUM_WARPS, EARLY=early, launch_pdl=early,
    )  # fmt: skip


def take_chosen(token_ids: Tensor, chosen: Tensor) -> None:
    """token_ids int32 [T], IN PLACE: -1 - i becomes chosen[i] (0 where that is -1)."""
    rows = 128
    _take[(triton.cdiv(len(token_ids), rows),)](token_ids, chosen, len(token_ids), ROWS=rows)
