"""How one decode step's keys are dealt to a fixed grid: the tile schedule, as arithmetic and as one GPU launch.

A sequence of L keys is ceil(L / 64) tiles. Laid end to end, each sequence with SEQUENCE_COST tiles of fixed cost in
front (loading its queries, writing its result), the tiles of a batch form one line. Part p of P takes the stretch from
W p // P to W (p + 1) // P of that line, whatever sequences it crosses, so no part has over one tile more than another:
no context length is worse than its neighbours, and a ragged batch is as even as a uniform one. Short steps take fewer
parts, since a part under MIN_TILES tiles costs more to merge than it saves, but for few rows, where the second tile of a part
costs more: they have a tile a part while half of the parts are enough for that. Where all lengths are equal, a part takes
whole sequences or one piece of one, and a few parts stay idle: cuts cost more than that. Pieces are as many as the longest
of them makes necessary: 8512 keys of 128 heads took 22.8 us as 65 pieces of two tiles and one of three, 20.0 as 45 of three.
They are no more than are merged at once: of 16 heads 129 pieces of two tiles took 14.7 us, 89 of three, for 512 keys more, 12.7.

A part may cut a sequence at both of its ends and nowhere else. So it has two slots for partial results: slot 2p for the
sequence it continues, slot 2p + 1 for the one it begins and does not finish. What it holds whole it writes as the result.
Nothing here grows with the batch but one (first part, parts) pair a sequence, and no host value is needed to replay.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_TOKENS = 64  # a page
SEQUENCE_COST = 4  # in tiles, queries read and result written: of 2 to 5 the best at 128 heads; 16 differ by 1 %
EVEN_SHARE = 16  # equal lengths are not cut across parts if fewer than one part in 16 stays idle for it
MIN_TILES = 2  # the fewest tiles worth a part of their own
MOST_SPLITS = 128  # merged at once: the 66 parts of 128 heads in one turn, where 64 + 2 took 3 us more
FEW_ROWS = 32  # of a sequence, heads times rows: of one launch's program, in which tiles come one after another

BATCH_BLOCK = 32  # sequences the schedule kernel sums at a time


@triton.jit
def schedule_kernel(
    kv_lens,  # int32 [batch]
    part_starts,  # int32 [num_parts + 1, 2]  (sequence, tile) where each part begins; the next one's begin is its end
    splits,  # int32 [batch, 2]  (first part, number of parts) that hold tiles of a sequence
    batch,
    num_parts,
    SEQUENCE_COST: tl.constexpr,
    EVEN_SHARE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    IS_FEW: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    PART_BLOCK: tl.constexpr,
):
    """One program: a batch is at most some hundred lengths."""
    lane = tl.arange(0, BATCH_BLOCK)
    part = tl.arange(0, PART_BLOCK)
    num_tiles = 0
    longest = 0
    for start in range(0, batch, BATCH_BLOCK):
        b = start + lane
        tiles = (tl.load(kv_lens + b, mask=b < batch, other=0) + 63) // 64
        num_tiles += tl.sum(tiles, 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))

    # Equal lengths: whole sequences a part, or equal pieces of one sequence, if that leaves few parts idle.
    each = (batch + num_parts - 1) // num_parts
    even = tl.where(each > 1, batch // each, num_parts // batch * batch)
    fits = (
        (num_tiles == longest * batch) & (even * EVEN_SHARE >= num_parts * (EVEN_SHARE - 1)) & (batch % each == 0)
    )
    used = tl.where(fits, even, num_parts)
    fixed_cost = tl.where(fits, 0, SEQUENCE_COST)
    fewest = tl.where(IS_FEW & (2 * num_tiles <= num_parts), 1, MIN_TILES)  # tiles of a part
    used = tl.maximum(tl.minimum(used, (num_tiles + fewest - 1) // fewest), 1)
    if fits & (each == 1):  # as few pieces as the longest of them allows
        most = tl.minimum(even // batch, MOST_SPLITS)
        pieces = tl.maximum(tl.minimum(most, (longest + fewest - 1) // fewest), 1)
        longest_piece = tl.maximum((longest + pieces - 1) // pieces, 1)
        used = tl.maximum((longest + longest_piece - 1) // longest_piece, 1) * batch
    total = 0
    for start in range(0, batch, BATCH_BLOCK):
        b = start + lane
        tiles = (tl.load(kv_lens + b, mask=b < batch, other=0) + 63) // 64
        total += tl.sum(tl.where(tiles > 0, tiles + fixed_cost, 0), 0)

    # Where part p begins on the line, and how many sequences end at or before that point.
    cut = tl.where(part < used, part.to(tl.int64) * total // used, total).to(tl.int32)
    sequence = tl.zeros([PART_BLOCK], tl.int32)
    tile = tl.zeros([PART_BLOCK], tl.int32)
    begin = 0
    for start in range(0, batch, BATCH_BLOCK):
        b = start + lane
        tiles = (tl.load(kv_lens + b, mask=b < batch, other=0) + 63) // 64
        cost = tl.where(tiles > 0, tiles + fixed_cost, 0)
        end = begin + tl.cumsum(cost, 0)
        first = end - cost
        inside = (first[None, :] <= cut[:, None]) & (cut[:, None] < end[None, :])
        sequence += tl.sum(((end[None, :] <= cut[:, None]) & (b < batch)[None, :]).to(tl.int32), 1)
        tile += tl.sum(tl.where(inside, tl.maximum(cut[:, None] - first[None, :] - fixed_cost, 0), 0), 1)

        # Tile t of a sequence lies at first + fixed_cost + t; position y lies in part ((y + 1) used - 1) // total.
        zeroth = (first + fixed_cost).to(tl.int64)
        safe_total = tl.maximum(total, 1)
        first_part = ((zeroth + 1) * used - 1) // safe_total
        last_part = ((zeroth + tiles) * used - 1) // safe_total
        held = tiles > 0
        tl.store(splits + 2 * b, tl.where(held, first_part, 0).to(tl.int32), mask=b < batch)
        tl.store(splits + 2 * b + 1, tl.where(held, last_part - first_part + 1, 1).to(tl.int32), mask=b < batch)
        begin += tl.sum(cost, 0)

    # Sequences without keys are zeroed by whichever part passes them: the first part begins at the first of them.
    sequence = tl.where(part == 0, 0, sequence)
    in_grid = part <= num_parts
    tl.store(part_starts + 2 * part, sequence, mask=in_grid)
    tl.store(part_starts + 2 * part + 1, tile, mask=in_grid)


@triton.jit
def part_bounds(part_starts, part):
    """(first sequence, its tile, end sequence, end tile): a part has tiles of the end sequence where end tile is not 0."""
    start = part_starts + 2 * part
    return tl.load(start), tl.load(start + 1), tl.load(start + 2), tl.load(start + 3)


@triton.jit
def stretch(kv_lens, first_sequence, first_tile, end_sequence, end_tile, step, TILE: tl.constexpr):
    """(sequence, kv_len, first tile, end tile, number of tiles) of the step-th sequence of a part of these bounds."""
    sequence = first_sequence + step
    kv_len = tl.load(kv_lens + sequence)
    num_tiles = (kv_len + TILE - 1) // TILE
    lo = tl.where(sequence == first_sequence, first_tile, 0)
    hi = tl.where(sequence == end_sequence, end_tile, num_tiles)
    return sequence, kv_len, lo, hi, num_tiles
