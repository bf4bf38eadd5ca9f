"""Page accounting: nothing is lost, nothing is given twice, and the bytes are the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache, parse_cache_type
from kvfold.cache.pages import PagePool, Sequence, pages_for
from kvfold.errors import OutOfPages, SettingError


def test_random_growth_and_release_never_shares_a_page() -> None:
    rng = np.random.default_rng(0)
    pool = PagePool(40)
    sequences = [Sequence(pool) for _ in range(6)]
    for _ in range(2000):
        sequence = sequences[rng.integers(len(sequences))]
        if rng.random() < 0.2:
            sequence.release()
            continue
        new = int(rng.integers(1, 150))
        before = (list(sequence.pages), pool.num_free)
        try:
            sequence.reserve(new)
            sequence.length += new
        except OutOfPages:
            assert (list(sequence.pages), pool.num_free) == before, "a refused reservation changes nothing"
        used = [page for s in sequences for page in s.pages]
        assert len(used) == len(set(used)), "a page has two owners"
        assert len(used) + pool.num_free == pool.num_pages
        assert all(len(s.pages) == pages_for(s.length) for s in sequences)


def test_out_of_pages_says_what_is_missing() -> None:
    with pytest.raises(OutOfPages, match="needs 3 more pages of 64 tokens and has 2 free of 2"):
        PagePool(2).take(3)


def test_32k_of_v2_lite_in_f16_is_972_mib() -> None:
    layout = CacheLayout(27, (576,), CacheType.F16)
    assert layout.bytes_per_token * 32768 == 972 << 20


@pytest.mark.parametrize("cache_type", list(CacheType))
def test_the_arrays_have_the_layout_bytes(cache_type: CacheType) -> None:
    layout = CacheLayout(3, (96, 32), cache_type)
    cache = PagedCache(layout, 5)
    assert sum(a.nbytes for a in cache.arrays) == layout.bytes_per_token * 5 * PAGE_TOKENS
    assert parse_cache_type(cache_type.value.upper()) is cache_type


def test_unknown_cache_type_lists_the_allowed() -> None:
    with pytest.raises(SettingError, match="allowed are f32, f16, bf16, q8_0"):
        parse_cache_type("q3")
