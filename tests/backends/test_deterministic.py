"""`deterministic`: the logits of a row depend on its own sequence and role alone, bit for bit, on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backends.test_native import WIDE
from kit.harness import Harness, Logits
from kit.tiny_models import tiny_model
from kvfold import _native
from kvfold.cache.pages import Sequence
from kvfold.config import ModelConfig
from kvfold.engine.batch import Work
from kvfold.errors import SettingError
from kvfold.formats.synthetic import synthesize
from kvfold.mla.plan import Path as MlaPath

# Five pages: absorbed attention goes through them in runs of two, of a q8_0 cache both at once.
PROMPT, GENERATED = 300, 6
CONTEXT = 4096
CACHE_TYPES = ("f16", "q8_0", "bf16", "f32")


def num_variations(isa: str, cache_type: str) -> int:
    """200; on generic, which takes seconds for each where AVX2 takes 0.3, of one cache type."""
    return 200 if isa != "generic" or cache_type == "f16" else 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts: rows that choose the same expert are computed together. Whole blocks of q8_0 in a row of the
    cache."""
    file = tmp_path_factory.mktemp("deterministic") / "m.gguf"
    synthesize(ModelConfig.from_hf(tiny_model("v3", **WIDE, qk_rope_head_dim=32).config), file, type="IQ4_NL")
    return file


def harness(path: Path, mla: str, cache_type: str, isa: str, threads: int, seed: int = 0) -> Harness:
    return Harness(
        path, backend="native", dtype="int8", mla=mla, isa=isa, threads=threads, n_ctx=CONTEXT, seed=seed,
        deterministic=True, cache_type=cache_type,
    )  # fmt: skip


def pieces(rng: np.random.Generator, total: int, most: int) -> Iterator[int]:
    while total:
        size = min(total, int(rng.integers(1, most + 1)))
        yield size
        total -= size


class Neighbour:
    """A sequence beside ours: a prompt in pieces, then generated tokens."""

    def __init__(self, harness: Harness, rng: np.random.Generator) -> None:
        self._rng, self._sequence = rng, Sequence(harness.loaded.pool)
        self._prompt_left = int(rng.integers(1, 120))
        self._vocab = harness.loaded.model.config.vocab_size

    def work(self) -> Work:
        is_prompt = self._prompt_left > 0
        size = int(self._rng.integers(1, 40 if is_prompt else 4))
        self._prompt_left -= size
        ids = self._rng.integers(0, self._vocab, size).tolist()
        return Work(self._sequence, ids, is_prompt, int(self._rng.integers(0, size + 1)))


def logits(harness: Harness, ids: list[int], seed: int | None) -> Logits:
    """Of every row: the prompt at once and tokens one by one, alone; or, with a seed, in random pieces beside others.
    Several generated rows in one step are guessed tokens that are checked."""
    rng = np.random.default_rng(seed)
    sequence, found, at = harness.sequence(), [], 0
    prompt = [PROMPT] if seed is None else list(pieces(rng, PROMPT, int(rng.choice([7, 70, PROMPT]))))
    generated = (
        [1] * GENERATED if seed is None else list(pieces(rng, GENERATED, int(rng.choice([1, 4, GENERATED]))))
    )
    neighbours = [Neighbour(harness, rng) for _ in range(0 if seed is None else rng.integers(0, 4))]
    for number, size in enumerate([*prompt, *generated]):
        ours = Work(sequence, ids[at : at + size], number < len(prompt), outputs=size)
        works = [neighbour.work() for neighbour in neighbours]
        place = int(rng.integers(0, len(works) + 1))
        found.append(harness.step([*works[:place], ours, *works[place:]])[place])
        at += size
    return np.concatenate(found)


def check(path: Path, mla: str, cache_type: str, isa: str, seeds: range) -> None:
    first = harness(path, mla, cache_type, isa, threads=1)
    ids = np.random.default_rng(7).integers(0, first.loaded.model.config.vocab_size, PROMPT + GENERATED).tolist()
    expected = logits(first, ids, None)
    for seed in seeds:
        other = harness(path, mla, cache_type, isa, threads=seed % 4 + 1, seed=seed)
        got = logits(other, ids, seed)
        differ = np.flatnonzero((got != expected).any(axis=1))
        assert not len(differ), f"seed {seed}: rows {differ.tolist()} of {len(expected)}"


@pytest.fixture(params=_native.isa_names())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    _native.force_isa("auto")


@pytest.mark.parametrize(("mla", "cache_type"), [("auto", "f16"), ("1", "q8_0"), ("auto", "bf16")])
def test_no_bit_depends_on_what_is_beside_a_row(mla: str, cache_type: str, isa: str, path: Path) -> None:
    check(path, mla, cache_type, isa, range(2 if isa == "generic" else 4))


@pytest.mark.full
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("mla", ["auto", "0", "1", "2"])
def test_no_bit_depends_on_what_is_beside_a_row_in_200_variations(
    mla: str, cache_type: str, isa: str, path: Path
) -> None:
    check(path, mla, cache_type, isa, range(num_variations(isa, cache_type)))


def test_auto_decides_by_role_alone(path: Path) -> None:
    plan = harness(path, "auto", "f16", "auto", threads=1).loaded.plan
    for new, cached in ((1, 0), (1, 4000), (2000, 0)):
        assert plan(new, cached, True).path is MlaPath.DECOMPRESSED
        assert plan(new, cached, False).path is MlaPath.ABSORBED
    assert "deterministic" in plan(1, 0, True).reason


def test_plain_promises_no_such_thing(path: Path) -> None:
    with pytest.raises(SettingError, match="plain: deterministic is for backend native"):
        Harness(path, backend="plain", deterministic=True)
