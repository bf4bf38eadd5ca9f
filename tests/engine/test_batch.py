"""Steps are laid out so that every row, slot and output stands where its work says."""

from __future__ import annotations

import numpy as np
import pytest

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.cache.pages import PagePool, Sequence
from kvfold.config import MlaConfig
from kvfold.engine.batch import Work, build_batch
from kvfold.mla.plan import Fa, Mla, MlaPlan, Path, choose

MLA = MlaConfig(4, 16, 8, 16, 32, None, 24**-0.5)


def _split(new: int, cached: int, is_prompt: bool) -> MlaPlan:
    return choose(MLA, new_rows=new, cached_rows=cached, is_prompt=is_prompt, setting=Mla.SPLIT, fa=Fa.AUTO)


def test_mixed_batch_groups_paths_and_keeps_outputs_in_caller_order() -> None:
    pool = PagePool(20)
    sequences = [Sequence(pool) for _ in range(4)]
    for sequence, cached in zip(sequences, (0, 70, 5, 130), strict=True):
        sequence.reserve(cached)
        sequence.length = cached
    works = [
        Work(sequences[0], list(range(100, 170)), is_prompt=True, outputs=2),
        Work(sequences[1], [7], is_prompt=False),
        Work(sequences[2], [8, 9, 10], is_prompt=True, outputs=0),
        Work(sequences[3], [11], is_prompt=False),
    ]
    batch = build_batch(works, _split)
    step = batch.step

    assert [tuple(s) for s in step.segments.tolist()] == [
        (Path.ABSORBED.value, 1, 0, 2),
        (Path.DECOMPRESSED.value, 1, 2, 4),
    ]
    assert step.segment(Path.STANDARD.value) is None
    assert step.token_ids.tolist() == [7, 11, *range(100, 170), 8, 9, 10]
    assert step.kv_lens.tolist() == [71, 131, 70, 8]
    assert step.positions.tolist() == [70, 130, *range(70), 5, 6, 7]
    rows_of_outputs = [step.output_rows[s].tolist() for s in batch.output_slices]
    assert rows_of_outputs == [[70, 71], [0], [], [1]]
    for number, work in enumerate([works[1], works[3], works[0], works[2]]):
        pages = work.sequence.pages
        assert step.page_list(number).tolist() == pages
        positions = step.positions[step.rows(number)]
        expected = [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in positions.tolist()]
        assert step.slots[step.rows(number)].tolist() == expected

    batch.commit()
    assert [s.length for s in sequences] == [70, 71, 8, 131]


def test_every_row_has_its_own_slot() -> None:
    pool = PagePool(64)
    sequences = [Sequence(pool) for _ in range(5)]
    taken: set[int] = set()
    rng = np.random.default_rng(3)
    for _ in range(8):
        works = [Work(s, [1] * int(rng.integers(1, 90)), is_prompt=True) for s in sequences]
        batch = build_batch(works, _split)
        slots = batch.step.slots.tolist()
        assert not taken.intersection(slots)
        taken.update(slots)
        assert len(set(slots)) == len(slots)
        batch.commit()


def test_a_sequence_with_too_few_pages_never_writes_to_those_of_its_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = PagePool(8)
    short, neighbour = Sequence(pool), Sequence(pool)
    for sequence in (short, neighbour):
        sequence.reserve(PAGE_TOKENS)
        sequence.length = PAGE_TOKENS
    monkeypatch.setattr(Sequence, "reserve", lambda self, count: None)
    with pytest.raises(AssertionError, match="too few pages"):
        build_batch([Work(short, [1], is_prompt=False), Work(neighbour, [2], is_prompt=False)], _split)
