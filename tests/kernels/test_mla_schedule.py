"""The tile schedule deals every tile once, evenly, and tells the merge where the pieces are."""

import itertools
import math
import random

import pytest
import torch

from kvfold.kernels.mla_decode import DecodeWorkspace, schedule_decode
from kvfold.kernels.mla_schedule import EVEN_SHARE, MIN_TILES, SEQUENCE_COST, TILE_TOKENS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Schedule = tuple[list[list[int]], list[list[int]]]


def schedule(kv_lens: list[int], num_parts: int, heads: int = 64) -> Schedule:
    workspace = DecodeWorkspace(len(kv_lens), 1, heads, 16, DEVICE, num_parts)
    workspace.part_starts.fill_(-77)
    workspace.splits.fill_(-77)
    schedule_decode(torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE), workspace)
    return workspace.part_starts.tolist(), workspace.splits.tolist()


def stretches(kv_lens: list[int], starts: list[list[int]]) -> list[list[tuple[int, int, int]]]:
    """For each part its (sequence, first tile, end tile), by the rule the kernels follow."""
    parts = []
    for (first, first_tile), (end, end_tile) in itertools.pairwise(starts):
        part = []
        for sequence in range(first, end + (end_tile > 0)):
            num_tiles = math.ceil(kv_lens[sequence] / TILE_TOKENS)
            lo = first_tile if sequence == first else 0
            hi = end_tile if sequence == end else num_tiles
            part.append((sequence, lo, hi))
        parts.append(part)
    return parts


def ragged(seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [
        chosen.choice([0, 1, 63, 64, 65, 4097, chosen.randrange(20_000)]) for _ in range(chosen.randrange(1, 9))
    ]


@pytest.mark.parametrize(
    "kv_lens",
    [[1], [64], [4097], [0], [0, 0, 5, 0, 700, 0], [100] * 130, [1, 65536, 1, 300], *(ragged(s) for s in range(6))],
)
@pytest.mark.parametrize(("num_parts", "heads"), [(1, 64), (7, 64), (66, 64), (66, 16)])
def test_every_tile_is_dealt_once_and_found_again(kv_lens: list[int], num_parts: int, heads: int) -> None:
    starts, splits = schedule(kv_lens, num_parts, heads)
    parts = stretches(kv_lens, starts)
    dealt: list[list[tuple[int, int, int]]] = [[] for _ in kv_lens]
    for p, part in enumerate(parts):
        for sequence, lo, hi in part:
            dealt[sequence].append((lo, hi, p))
    for sequence, pieces in enumerate(dealt):
        num_tiles = math.ceil(kv_lens[sequence] / TILE_TOKENS)
        if num_tiles == 0:
            assert len(pieces) == 1, f"sequence {sequence} without keys is zeroed by parts {pieces}, expected one"
            assert splits[sequence][1] == 1
            continue
        held = [piece for piece in pieces if piece[1] > piece[0]]
        assert [lo for lo, _, _ in held] == [0, *(hi for _, hi, _ in held[:-1])]
        assert held[-1][1] == num_tiles
        assert splits[sequence] == [held[0][2], len(held)], f"sequence {sequence}: {held}"
        assert [p for _, _, p in held] == list(range(held[0][2], held[0][2] + len(held)))


@pytest.mark.parametrize(
    ("batch", "keys", "num_parts", "each"), [(64, 4096, 132, 2), (64, 4096, 66, 1), (128, 900, 66, 1)]
)
def test_equal_lengths_are_cut_into_equal_pieces_or_not_at_all(
    batch: int, keys: int, num_parts: int, each: int
) -> None:
    starts, splits = schedule([keys] * batch, num_parts)
    assert [count for _, count in splits] == [each] * batch
    sizes = {sum(hi - lo for _, lo, hi in part) for part in stretches([keys] * batch, starts)} - {0}
    assert len(sizes) == 1, f"parts of {sizes} tiles"


@pytest.mark.parametrize(
    ("batch", "tiles", "num_parts", "pieces"),
    [
        (1, 133, 66, 45),
        (1, 132, 66, 66),
        (1, 1024, 66, 64),
        (3, 5, 66, 3),
        (2, 50, 66, 25),
        (1, 256, 132, 128),
        (1, 257, 132, 86),
    ],
)
def test_no_piece_is_longer_than_most(batch: int, tiles: int, num_parts: int, pieces: int) -> None:
    """133 tiles in 66 parts would be 65 of two and one of three, which all others wait for; 257 in 132 would be 129 pieces,
    one more than are merged at once."""
    starts, splits = schedule([tiles * TILE_TOKENS] * batch, num_parts)
    assert [count for _, count in splits] == [pieces] * batch
    sizes = [sum(hi - lo for _, lo, hi in part) for part in stretches([tiles * TILE_TOKENS] * batch, starts)]
    assert max(sizes) == math.ceil(tiles / pieces)


@pytest.mark.parametrize(
    ("kv_lens", "heads", "used"),
    [([4224], 16, 66), ([4225], 16, 34), ([4224], 64, 33), ([2112] * 2, 16, 66), ([2113] * 2, 16, 34)],
)
def test_few_rows_have_a_tile_a_part_while_half_of_the_parts_are_enough(
    kv_lens: list[int], heads: int, used: int
) -> None:
    starts, _ = schedule(kv_lens, 132, heads)
    assert len({tuple(start) for start in starts[:-1]} - {tuple(starts[-1])}) == used


@pytest.mark.parametrize("kv_lens", [[65536], [8128] * 16, [1, 30_000, 64, 64, 9000], [4097] * 128])
def test_no_part_works_longer_than_its_share(kv_lens: list[int]) -> None:
    starts, _ = schedule(kv_lens, 132)
    total = sum(math.ceil(n / TILE_TOKENS) + SEQUENCE_COST for n in kv_lens)
    used = min(132, math.ceil(sum(math.ceil(n / TILE_TOKENS) for n in kv_lens) / MIN_TILES))
    longest = max(sum(hi - lo for _, lo, hi in part) for part in stretches(kv_lens, starts))
    idle = EVEN_SHARE / (EVEN_SHARE - 1)
    assert longest <= math.ceil(total / used * idle)
