"""Every path, form, chunking and neighbourhood gives the same logits; so does every file layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kit.harness import Harness, Logits, close
from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold.engine.batch import Work
from kvfold.formats.tensor_names import KvLayout
from kvfold.mla.plan import Fa, Mla, MlaPlan, choose

LENGTH = 150  # three pages, the last one partly filled
SETTINGS = [(mla, fa) for mla in ("0", "1", "2", "3", "auto") for fa in ("0", "1")]
CHUNKS = {
    "whole": [LENGTH],
    "one by one": [1] * LENGTH,
    "around page edges": [63, 1, 1, 64, 21],
    "sevens": [7] * 21 + [3],
}
# Every family once with a setting and a chunking in the default run, all combinations in the full one.
MATRIX = [(f, s, c) for f in ("v2-lite-yarn", "v2", "v3-odd", "v3-half-split") for s in SETTINGS for c in CHUNKS]
SAMPLE = [MATRIX[i] for i in np.random.default_rng(2026).choice(len(MATRIX), 16, replace=False)]


def _ids(vocab: int, length: int = LENGTH, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab, length)]


def _expected(path: Path) -> tuple[list[int], np.ndarray]:
    harness = Harness(path, mla="2", fa="1")
    ids = _ids(harness.loaded.model.config.vocab_size)
    return ids, harness.logits(ids)


@dataclass(frozen=True)
class Exact:
    """What a text gives where nothing is rounded, and how far float32 may be from it."""

    path: Path
    ids: list[int]
    logits: Logits  # [150, vocab] in float64
    rounding: Logits  # [150]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exact]:
    """By family. A row's rounding is the most that it moves in 8 runs in float64 in which what every op makes is off by
    sqrt(n) 2^-24 of its root mean square, as sums of n float32 numbers are, n being hidden_size, the longest. Half the
    rows of a family have less than 8e-6 of the largest logit, one of v2, whose factor of 16 makes experts of rounding
    errors, has 4e-5."""

    @functools.cache
    def of(family: str) -> Exact:
        path = write_hf_dir(tiny_model(family), tmp_path_factory.mktemp(family))
        harness = Harness(path, mla="2", fa="1", dtype="float64", threads=1)
        config = harness.loaded.model.config
        ids = _ids(config.vocab_size)
        logits = harness.logits(ids)
        generator = torch.Generator().manual_seed(0)
        relative = config.hidden_size**0.5 * 2.0**-24

        def be_off(name: str, value: torch.Tensor) -> None:
            if value.is_floating_point():  # not the ids of experts
                size = value.square().mean(-1, keepdim=True).sqrt()
                value += relative * size * torch.randn(value.shape, dtype=value.dtype, generator=generator)

        harness.tap(be_off)
        rounding = np.max([np.abs(harness.logits(ids) - logits).max(axis=1) for _ in range(8)], axis=0)
        return Exact(path, ids, logits, rounding)

    return of


def _check(exact: Exact, setting: tuple[str, str], chunks: str) -> None:
    def logits(dtype: str) -> Logits:
        harness = Harness(exact.path, mla=setting[0], fa=setting[1], dtype=dtype, threads=1)
        # Less than a setting may ask for: three tiles of keys, heads in groups, rows in tiles of 3 to 32.
        harness.loaded.backend.workspace_bytes = 1 << 16  # type: ignore[attr-defined]
        return harness.logits(exact.ids, CHUNKS[chunks])

    close(logits("float64"), exact.logits, 1e-12)  # measured: 1.4e-14
    share = np.abs(logits("float32") - exact.logits).max(axis=1) / exact.rounding  # measured: up to 0.55
    assert share.max() <= 1, f"row {share.argmax()}: {share.max():.2f} of what rounding does"


@pytest.mark.parametrize(("family", "setting", "chunks"), SAMPLE)
def test_path_form_and_chunking_change_nothing(
    family: str, setting: tuple[str, str], chunks: str, exact: Callable[[str], Exact]
) -> None:
    _check(exact(family), setting, chunks)


@pytest.mark.full
@pytest.mark.parametrize(("family", "setting", "chunks"), MATRIX)
def test_path_form_and_chunking_change_nothing_anywhere(
    family: str, setting: tuple[str, str], chunks: str, exact: Callable[[str], Exact]
) -> None:
    _check(exact(family), setting, chunks)


@pytest.mark.parametrize("family", ["v2-lite", "v3"])
def test_a_step_may_mix_paths_forms_and_sequences(family: str, tmp_path: Path) -> None:
    """Six sequences of different lengths grow in random pieces side by side, each under a plan of its own."""
    harness = Harness(write_gguf(tiny_model(family), tmp_path / "m.gguf"), seed=3)
    mla = harness.loaded.model.config.mla
    vocab = harness.loaded.model.config.vocab_size
    rng = np.random.default_rng(7)
    texts = [_ids(vocab, length, seed=length) for length in (1, 17, 64, 65, 128, 200)]
    alone = [harness.logits(ids) for ids in texts]

    def planner(new: int, cached: int, is_prompt: bool) -> MlaPlan:
        setting = (Mla.ABSORBED, Mla.DECOMPRESSED)[int(rng.integers(2))]
        return choose(mla, new_rows=new, cached_rows=cached, is_prompt=is_prompt, setting=setting, fa=Fa.FUSED)

    sequences = [harness.sequence() for _ in texts]
    got: list[list[np.ndarray]] = [[] for _ in texts]
    while any(s.length < len(ids) for s, ids in zip(sequences, texts, strict=True)):
        works, owners = [], []
        for i, (sequence, ids) in enumerate(zip(sequences, texts, strict=True)):
            new = ids[sequence.length : sequence.length + int(rng.integers(1, 40))]
            if new:
                works.append(Work(sequence, new, is_prompt=True, outputs=len(new)))
                owners.append(i)
        for i, logits in zip(owners, harness.step(works, planner), strict=True):
            got[i].append(logits)
    for parts, expected in zip(got, alone, strict=True):
        close(np.concatenate(parts), expected, 1e-5)


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "q8_0"])
def test_a_narrow_cache_rounds_and_no_more(cache_type: str, tmp_path: Path) -> None:
    # Dense layers only: a router near a tie may turn a rounding into another expert.
    whole_blocks = {"kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    path = write_gguf(tiny_model("v2", first_k_dense_replace=3, **whole_blocks), tmp_path / "m.gguf")
    ids, expected = _expected(path)
    # 11 and 8 significant bits: half a unit in the last place is 4.9e-4 and 3.9e-3 of a value, and
    # half a step of q8_0 3.9e-3 of the largest of 32, some 2.5 times a value.
    bound = {"f16": 4 * 4.9e-4, "bf16": 4 * 3.9e-3, "q8_0": 4 * 9.8e-3}[cache_type]
    for mla in ("0", "1", "2"):
        close(Harness(path, mla=mla, cache_type=cache_type).logits(ids), expected, bound)


@pytest.mark.parametrize("family", ["v2-lite", "v2", "v3-yarn", "v3-tied", "glm4-moe-lite"])
def test_every_container_of_the_same_weights_agrees(family: str, tmp_path: Path) -> None:
    tiny = tiny_model(family)
    paths = [
        write_hf_dir(tiny, tmp_path / "hf"),
        write_gguf(tiny, tmp_path / "legacy.gguf", layout=KvLayout.KV_B),
        write_gguf(tiny, tmp_path / "split.gguf", layout=KvLayout.K_B_V_B),
        write_gguf(tiny, tmp_path / "both.gguf", include_both=True),
    ]
    ids = _ids(tiny.model_config.vocab_size, 40)
    first, *others = [Harness(path, mla="1").logits(ids) for path in paths]
    for other in others:
        close(other, first, 1e-6)


@pytest.mark.parametrize("mla", ["1", "2"])
def test_plain_attention_is_the_reference(mla: str, tmp_path: Path) -> None:
    """One layer's attention against mla/reference.py, from the values the ops themselves saw."""
    from kvfold.mla.absorb import split_kv_b
    from kvfold.mla.reference import attend

    tiny = tiny_model("v3-odd")
    harness = Harness(write_hf_dir(tiny, tmp_path / "hf"), mla=mla)
    config = harness.loaded.model.config
    seen: dict[str, np.ndarray] = {}
    harness.tap(lambda name, value: seen.__setitem__(name, value.float().numpy().copy()))
    ids = _ids(config.vocab_size, 70)
    harness.logits(ids, [30, 40])
    sequence = harness.sequence()
    harness.step([Work(sequence, ids, is_prompt=True)])
    latent = harness.cached_rows(sequence, 1)
    w_uk, w_uv = split_kv_b(tiny.weights["blk.1.attn_kv_b.weight"], config.mla)
    q = seen["blk.1.q_rope"].reshape(70, config.mla.num_heads, -1)
    lora = config.mla.kv_lora_rank
    expected = attend(q, latent[:, :lora], latent[:, lora:], w_uk, w_uv, config.mla)
    name = "unfold_v" if mla == "1" else "attend_expanded"
    close(seen[f"blk.1.{name}"].reshape(expected.shape), expected, 1e-5)
