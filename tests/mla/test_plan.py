"""The plan: design.md's arithmetic, forced modes, and reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvfold.backends.choose import native_profile
from kvfold.cache.latent import CacheType
from kvfold.config import MlaConfig
from kvfold.errors import PlanError
from kvfold.mla.plan import (
    Fa,
    MachineProfile,
    Mla,
    Path,
    attention_work,
    choose,
    crossover_rows,
    multiply_adds,
    parse_fa,
    parse_mla,
    paths_of,
    query_key_pairs,
)

V3 = MlaConfig(128, 128, 64, 128, 512, 1536, 192**-0.5)
LITE = MlaConfig(16, 128, 64, 128, 512, None, 192**-0.5)
LATENT_SETTINGS = (Mla.AUTO, Mla.ABSORBED, Mla.DECOMPRESSED, Mla.SPLIT)


def test_multiply_adds_are_those_of_a_loop_over_rows() -> None:
    rows, cached = 7, 13
    keys_seen = [cached + i + 1 for i in range(rows)]
    assert query_key_pairs(rows, cached) == sum(keys_seen)
    absorbed = sum(k * (576 + 512) for k in keys_seen) + rows * 131_072
    decompressed = sum(k * 320 for k in keys_seen) + (rows + cached) * 131_072
    standard = sum(k * 320 for k in keys_seen) + rows * 131_072
    assert multiply_adds(Path.ABSORBED, LITE, rows, cached) == 16 * absorbed
    assert multiply_adds(Path.DECOMPRESSED, LITE, rows, cached) == 16 * decompressed
    assert multiply_adds(Path.STANDARD, LITE, rows, cached) == 16 * standard


@pytest.mark.parametrize(("cached", "expected"), [(1024, 159), (1 << 24, 171)])
def test_crossover_is_where_the_design_says(cached: int, expected: int) -> None:
    crossover = crossover_rows(V3, cached)
    assert crossover is not None
    assert abs(crossover - expected) <= 1
    below = choose(V3, new_rows=crossover - 1, cached_rows=cached, is_prompt=True)
    at = choose(V3, new_rows=crossover, cached_rows=cached, is_prompt=True)
    assert (below.path, at.path) == (Path.ABSORBED, Path.DECOMPRESSED)


def test_decompressed_never_loses_without_a_cache() -> None:
    assert all(
        choose(V3, new_rows=rows, cached_rows=0, is_prompt=True).path is Path.DECOMPRESSED
        for rows in (1, 2, 63, 64, 511, 8192)
    )


def test_a_measured_profile_moves_the_crossover() -> None:
    slow_expansion = MachineProfile("measured", latents=2.0, folding=2.0)
    even, moved = crossover_rows(V3, 4096), crossover_rows(V3, 4096, slow_expansion)
    assert even is not None
    assert moved is not None
    assert moved > 2 * even


@pytest.mark.parametrize(("heads", "computed"), [(1, 16), (4, 16), (16, 16), (17, 32), (128, 128)])
def test_absorbed_attention_pays_for_whole_tiles_of_heads(heads: int, computed: int) -> None:
    """Folding, expansion and attention over heads have no lanes to fill."""
    tiles, mla = MachineProfile("tiles", folding=1e30, expansion=2.0, head_lanes=16), replace(LITE, num_heads=heads)
    absorbed, decompressed = (attention_work(path, mla, 7, 100) for path in (Path.ABSORBED, Path.DECOMPRESSED))
    pairs = query_key_pairs(7, 100)
    assert tiles.seconds(Path.ABSORBED, absorbed) == pytest.approx(computed * pairs * (576 + 512))
    expected = heads * (pairs * 320 + 107 * 131_072 / 2)
    assert tiles.seconds(Path.DECOMPRESSED, decompressed) == pytest.approx(expected)


# heads, cache, cached rows, new rows; ms of a layer absorbed and decompressed: bench/kernels.py paths --types IQ4_NL, two threads
# of a Zen 3 (AVX2), 30 November 2026.
MEASURED = (
    (4, "f16", 1500, 8, 4.71, 8.16),
    (4, "f16", 1500, 32, 18.93, 9.12),
    (4, "f16", 1500, 64, 36.59, 9.67),
    (4, "f16", 4096, 8, 11.36, 19.69),
    (4, "f16", 4096, 24, 33.47, 20.62),
    (4, "q8_0", 1500, 16, 5.09, 8.35),
    (4, "q8_0", 1500, 64, 19.91, 9.96),
    (4, "q8_0", 4096, 24, 16.31, 20.32),
    (16, "f16", 256, 64, 9.55, 6.94),
    (16, "f16", 1500, 32, 22.84, 36.99),
    (16, "f16", 2048, 96, 71.59, 47.07),
    (16, "q8_0", 512, 64, 9.66, 14.44),
    (16, "q8_0", 512, 128, 22.49, 18.40),
    (16, "q8_0", 2048, 96, 37.53, 47.84),
    (128, "f16", 512, 32, 62.44, 90.47),
    (128, "f16", 1500, 128, 504.48, 296.38),
    (128, "q8_0", 1500, 64, 170.87, 286.70),
    (128, "q8_0", 512, 128, 167.56, 133.65),
)


@pytest.mark.parametrize(("heads", "cache", "cached", "rows", "absorbed", "decompressed"), MEASURED)
def test_avx2_takes_the_path_that_was_the_faster(
    heads: int, cache: str, cached: int, rows: int, absorbed: float, decompressed: float
) -> None:
    """Of measured points at which the other path takes at least a fifth longer."""
    ms = {Path.ABSORBED: absorbed, Path.DECOMPRESSED: decompressed}
    assert max(ms.values()) >= 1.2 * min(ms.values())
    plan = choose(
        replace(LITE, num_heads=heads),
        new_rows=rows,
        cached_rows=cached,
        is_prompt=True,
        machine=native_profile(CacheType(cache), "avx2"),
    )
    assert ms[plan.path] == min(ms.values())


@pytest.mark.parametrize("setting", Mla)
def test_paths_of_a_setting_are_those_that_it_takes(setting: Mla) -> None:
    """One new row and 300, over none and 5000, of a prompt and generated."""
    cases = [(rows, cached, is_prompt) for rows in (1, 300) for cached in (0, 5000) for is_prompt in (False, True)]
    taken = {
        choose(V3, new_rows=rows, cached_rows=cached, is_prompt=is_prompt, setting=setting).path
        for rows, cached, is_prompt in cases
    }
    assert taken == set(paths_of(setting))


def test_split_goes_by_role_not_by_count() -> None:
    for rows in (1, 300):
        assert choose(V3, new_rows=rows, cached_rows=9, is_prompt=True, setting=Mla.SPLIT).path is Path.DECOMPRESSED
        assert choose(V3, new_rows=rows, cached_rows=9, is_prompt=False, setting=Mla.SPLIT).path is Path.ABSORBED


@pytest.mark.parametrize("setting", LATENT_SETTINGS)
@pytest.mark.parametrize("fa", list(Fa))
def test_every_latent_setting_shares_the_latent_cache(setting: Mla, fa: Fa) -> None:
    plan = choose(LITE, new_rows=40, cached_rows=5000, is_prompt=True, setting=setting, fa=fa)
    assert plan.path is not Path.STANDARD
    assert plan.fused == (fa is not Fa.UNFUSED)
    assert plan.reason
    assert dict(plan.costs)[plan.path] > 0


def test_the_reason_names_rows_and_ratio() -> None:
    plan = choose(V3, new_rows=1, cached_rows=4096, is_prompt=False)
    assert plan.path is Path.ABSORBED
    assert "1 new over 4096 cached rows" in plan.reason
    assert "decompressed costs" in plan.reason


@pytest.mark.parametrize("value", ["4", "-1", "", "fast", 7])
def test_wrong_settings_list_the_allowed_ones(value: str | int) -> None:
    with pytest.raises(PlanError, match="allowed are auto, 0, 1, 2, 3"):
        parse_mla(value)
    with pytest.raises(PlanError, match="allowed are auto, 0, 1"):
        parse_fa(value)


def test_settings_parse_from_numbers_and_text() -> None:
    assert [parse_mla(v) for v in ("auto", 0, "1", 2, "3")] == list(Mla)
    assert [parse_fa(v) for v in ("AUTO", "0", 1)] == list(Fa)
