"""Page accounting: nothing is lost, nothing is given twice, and the bytes are the published ones."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from kvfold.cache.latent import PAGE_TOKENS, CacheLayout, CacheType, PagedCache, parse_cache_type
from kvfold.cache.pages import WARM_PAGES, PagePool, Sequence, pages_for
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
    with pytest.raises(SettingError, match="allowed are f32, f16, bf16, q8_0, fp8"):
        parse_cache_type("q3")


def test_warm_pages_are_taken_first_and_the_rest_give_their_memory_back() -> None:
    given_back: list[list[int]] = []
    pool = PagePool(200, lambda pages: given_back.append(list(pages)))
    pages = pool.take(150)
    assert pages == list(range(150)), "neighbours, so that whole huge pages become free again"
    pool.give_back(pages[: 2 * WARM_PAGES - 1])
    assert not given_back
    pool.give_back(pages[2 * WARM_PAGES - 1 :])
    kept = set(range(200)) - set(given_back[0])
    assert len(given_back) == 1 and len(kept) == WARM_PAGES and kept < set(pages)
    assert set(pool.take(WARM_PAGES)) == kept
    assert pool.take(3) == sorted(given_back[0])[:3]
    assert pool.num_free == 200 - WARM_PAGES - 3


# --- memory ----------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts the memory of the process as Linux does")


@linux
@pytest.mark.parametrize("num_pages", [20, 2560])  # of 4 KiB pages, of 2 MiB pages
def test_memory_comes_with_the_first_write_and_goes_with_its_pages(num_pages: int) -> None:
    layers, used = 5, num_pages // 2
    before = resident_bytes()
    cache = PagedCache(CacheLayout(layers, (576,), CacheType.F16), num_pages)
    array = cache.arrays[0]
    assert resident_bytes() - before < MIB, "a context of 163,840 tokens costs nothing until it is used"
    array[:, :used] = 1
    array[:, -1] = 2
    page = 64 * 576 * 2
    written = layers * (used + 1) * page
    granule = 2 * MIB if num_pages > 100 else 4096
    edges = 2 * layers * (2 * granule)  # of two ranges in each layer
    assert written <= resident_bytes() - before <= written + edges + MIB
    cache.give_back(list(range(used)))
    assert resident_bytes() - before <= layers * page + edges + MIB
    assert (array[:, -1] == 2).all(), "a page that is in use keeps its rows"
    array[:, :used] = 3
    assert (array[:, :used] == 3).all() and (array[:, -1] == 2).all()


@linux
@pytest.mark.full
def test_32k_of_v2_lite_in_f16_are_972_mib_of_the_process() -> None:
    before = resident_bytes()
    cache = PagedCache(CacheLayout(27, (576,), CacheType.F16), 163840 // 64)
    pool = PagePool(cache.num_pages, cache.give_back)
    sequence = Sequence(pool)
    sequence.reserve(32768)
    sequence.length = 32768
    for layer in cache.arrays[0]:
        layer[sequence.pages] = 1
    taken = resident_bytes() - before
    assert 972 * MIB <= taken <= (972 + 27 * 4) * MIB, taken / MIB
    sequence.release()
    left = resident_bytes() - before
    # warm pages, and a layer's two ends of 2 MiB
    assert left <= 27 * (WARM_PAGES * 64 * 576 * 2 + 4 * MIB), left / MIB


@linux
def test_more_context_than_memory_is_address_space_only() -> None:
    layout = CacheLayout(61, (128 * 192, 128 * 128), CacheType.F32)  # V3, mla=0: 1.6 TB
    cache = PagedCache(layout, 163840 // 64)
    assert cache.nbytes > 10**12
    cache.arrays[1][60, 2559, 63, -1] = 5
    assert cache.arrays[1][60, 2559, 63, -1] == 5 and cache.arrays[0][0, 0, 0, 0] == 0
