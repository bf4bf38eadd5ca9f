"""Backend native gives plain's logits: every path, form, layout, weight type, cache type and mixture of sequences."""

from __future__ import annotations

from collections.abc import Collection
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.harness import Harness, Logits, close
from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold import _native
from kvfold.cache.latent import PAGE_TOKENS
from kvfold.config import ModelConfig
from kvfold.engine.batch import Work
from kvfold.formats.synthetic import synthesize, synthetic_types
from kvfold.formats.tensor_names import KvLayout
from kvfold.mla.plan import Fa, Mla, MlaPlan, choose
from kvfold.model.step import Step

# Of the largest logit. A narrow cache rounds latents that differ in their last float32 bit to different neighbours at
# times: four halves of a unit in the last place of 11 and 8 significant bits, and dense layers only, for a router near
# a tie turns a rounding into another expert. That numbers are read and written exactly is in test_native_ops.py.
RELATIVE = {"f32": 1e-5, "f16": 4 * 4.9e-4, "bf16": 4 * 3.9e-3, "q8_0": 4 * 3.9e-3}
FAMILIES = ("v2-lite-yarn", "v2", "v3", "v3-yarn", "v3-half-split", "v3-tied", "v3-odd", "glm4-moe-lite")
SETTINGS = [(mla, fa) for mla in ("0", "1", "2", "auto") for fa in ("0", "1")]
MATRIX = [(family, mla, fa, cache) for family in FAMILIES for mla, fa in SETTINGS for cache in RELATIVE]
# 24 draws with this seed meet every family, path, form and cache type.
SAMPLE = [MATRIX[i] for i in np.random.default_rng(4).choice(len(MATRIX), 24, replace=False)]


def ids(length: int, vocab: int = 272, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab, length)]


def judge(path: Path, **settings: Any) -> Harness:
    # One thread: the teams of torch under several test processes spend the time waiting for each other.
    return Harness(path, backend="plain", threads=1, **settings)


def check_model(
    path: Path, *, lengths: tuple[int, ...] = (1, 17, 300), relative: float = 1e-5, **settings: Any
) -> None:
    """Prompts of these lengths, then 20 tokens generated after a prompt that ends inside a page."""
    native, plain = Harness(path, backend="native", **settings), judge(path, seed=1, **settings)
    vocab = native.loaded.model.config.vocab_size
    for length in lengths:
        close(native.logits(ids(length, vocab)), plain.logits(ids(length, vocab)), relative)
    text, chunks = ids(140, vocab), [120] + [1] * 20
    close(native.logits(text, chunks, is_prompt=False), plain.logits(text, chunks, is_prompt=False), relative)


def check_family(folder: Path, family: str, mla: str, fa: str, cache: str) -> None:
    overrides: dict[str, Any] = {}
    if family == "v2":  # 16.0 among 160 experts; among 16 it would magnify every rounding tenfold
        overrides["routed_scaling_factor"] = 1.6
    if cache == "q8_0":  # whole blocks of 32 in c_kv, k_rope and every head
        overrides |= {"kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    if cache != "f32":
        overrides |= (
            {"mlp_layer_types": ["dense"] * 3} if family.startswith("glm4") else {"first_k_dense_replace": 3}
        )
    tiny = tiny_model(family, **overrides)
    if family in ("v3-half-split", "v3-odd"):  # GGUF has no key for half-split pairs
        path = write_hf_dir(tiny, folder / family)
    else:
        path = write_gguf(tiny, folder / f"{family}.gguf", layout=KvLayout.K_B_V_B)
    check_model(path, mla=mla, fa=fa, cache_type=cache, relative=RELATIVE[cache])


def test_the_sample_meets_every_choice() -> None:
    for i in range(4):
        assert {sample[i] for sample in SAMPLE} == {entry[i] for entry in MATRIX}


@pytest.mark.parametrize(("family", "mla", "fa", "cache"), SAMPLE)
def test_logits_are_plains(family: str, mla: str, fa: str, cache: str, tmp_path: Path) -> None:
    check_family(tmp_path, family, mla, fa, cache)


@pytest.mark.full
@pytest.mark.parametrize(("family", "mla", "fa", "cache"), MATRIX)
def test_logits_are_plains_everywhere(family: str, mla: str, fa: str, cache: str, tmp_path: Path) -> None:
    check_family(tmp_path, family, mla, fa, cache)


@pytest.mark.parametrize("mla", ["0", "1", "2"])
@pytest.mark.parametrize("layout", list(KvLayout))
def test_both_layouts_of_the_up_projection(layout: KvLayout, mla: str, tmp_path: Path) -> None:
    tiny = tiny_model("v2", routed_scaling_factor=1.6)  # 5 heads, kv_lora 96; the factor as in check_family
    path = write_gguf(tiny, tmp_path / "m.gguf", layout=layout)
    check_model(path, lengths=(17, 70), mla=mla)


# Every dimension that a block runs along is a whole number of 256-weight blocks but the columns of k_b (64).
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_hidden_layers": 2,
}
TYPES = synthetic_types()
TYPE_SAMPLE = ("F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "MXFP4", "Q4_0_R8", "BF16_R16")


def check_type(folder: Path, type: str, *, legacy: bool) -> None:
    config = ModelConfig.from_hf(tiny_model("v3", **WIDE).config)
    path = folder / f"{type}.gguf"
    synthesize(config, path, type=type, legacy_kv_b=legacy)
    for mla in ("0", "1", "2"):
        native, plain = Harness(path, backend="native", mla=mla), judge(path, mla=mla)
        text = ids(20, config.vocab_size)
        close(native.logits(text, [17, 1, 1, 1]), plain.logits(text, [17, 1, 1, 1]), 1e-5)


@pytest.mark.parametrize(("type", "legacy"), [(t, i % 2 == 0) for i, t in enumerate(TYPE_SAMPLE)])
def test_weights_in_the_blocks_of_their_file(type: str, legacy: bool, tmp_path: Path) -> None:
    check_type(tmp_path, type, legacy=legacy)


@pytest.mark.full
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("type", TYPES)
def test_weights_of_every_type(type: str, legacy: bool, tmp_path: Path) -> None:
    check_type(tmp_path, type, legacy=legacy)


def test_fp8_weights_with_their_block_scales(tmp_path: Path) -> None:
    # Squares of 128 that end inside a matrix (160 rows) and inside a head (160 = 96 + 64 rows of kv_b a head).
    dims = WIDE | {"hidden_size": 320, "moe_intermediate_size": 160, "qk_nope_head_dim": 96, "kv_lora_rank": 160}
    path = write_hf_dir(tiny_model("v3", **dims), tmp_path / "hf", dtype="float8_e4m3fn")
    for mla in ("0", "1", "2"):
        check_model(path, lengths=(17, 70), mla=mla)


def mixed_steps(harness: Harness, texts: list[list[int]], seed: int) -> list[Logits]:
    """Sequences grow in random pieces side by side, each piece on a random latent path; logits at every position."""
    rng = np.random.default_rng(seed)
    mla = harness.loaded.model.config.mla

    def planner(new: int, cached: int, is_prompt: bool) -> MlaPlan:
        setting = (Mla.ABSORBED, Mla.DECOMPRESSED)[int(rng.integers(2))]
        return choose(mla, new_rows=new, cached_rows=cached, is_prompt=is_prompt, setting=setting, fa=Fa.FUSED)

    sequences = [harness.sequence() for _ in texts]
    got: list[list[Logits]] = [[] for _ in texts]
    while any(s.length < len(text) for s, text in zip(sequences, texts, strict=True)):
        owners, works = [], []
        for i, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
            new = text[sequence.length : sequence.length + int(rng.integers(1, 40))]
            if new:
                owners.append(i)
                works.append(Work(sequence, new, is_prompt=True, outputs=len(new)))
        for i, logits in zip(owners, harness.step(works, planner), strict=True):
            got[i].append(logits)
    return [np.concatenate(parts) for parts in got]


@pytest.mark.parametrize("subset", [range(0, 8, 2), (7, 0, 3), ()], ids=str)
def test_experts_of_any_subset_are_plains(
    subset: Collection[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tiles (10 rows) and by rows (1); outside of it nothing is added."""
    from kvfold.backends.plain import PlainOps
    from kvfold.model.program import Recorder

    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    path, text = write_gguf(tiny, tmp_path / "m.gguf"), ids(11)
    every = Harness(path).logits(text, [10, 1])
    for ops in (PlainOps, Recorder):
        monkeypatch.setattr(ops, "experts", partialmethod(ops.experts, subset=subset))  # type: ignore[attr-defined]
    expected = Harness(path).logits(text, [10, 1])
    assert np.abs(expected - every).max() > 1e-2 * np.abs(every).max()
    close(Harness(path, backend="native").logits(text, [10, 1]), expected, 1e-5)


@pytest.mark.parametrize("family", ["v2-lite", "v3-odd"])
def test_a_step_may_mix_sequences_lengths_and_paths(family: str, tmp_path: Path) -> None:
    path = write_hf_dir(tiny_model(family), tmp_path / family)
    texts = [ids(length, seed=length) for length in (1, 17, 64, 65, 128, 200)]
    plain = judge(path)
    for got, text in zip(mixed_steps(Harness(path, backend="native", seed=3), texts, 7), texts, strict=True):
        close(got, plain.logits(text), 1e-5)


@pytest.mark.parametrize("fa", ["0", "1"])
@pytest.mark.parametrize("mla", ["0", "1", "2"])
def test_no_bit_depends_on_chunks_neighbours_pages_or_threads(mla: str, fa: str, tmp_path: Path) -> None:
    """700 keys: the absorbed path goes through them in four runs of pages, of 192 keys."""
    path = write_gguf(tiny_model("v2"), tmp_path / "m.gguf")
    text = ids(700)
    expected = Harness(path, backend="native", mla=mla, fa=fa, threads=1).logits(text)
    for threads, seed, chunks in ((1, 1, [1, 63, 300, 336]), (2, 2, [640] + [1] * 60), (3, 3, [699, 1])):
        harness = Harness(path, backend="native", mla=mla, fa=fa, threads=threads, seed=seed)
        assert np.array_equal(harness.logits(text, chunks), expected)
        other = harness.sequence()
        harness.step([Work(other, ids(100, seed=9), is_prompt=True)])
        beside = harness.step(
            [Work(other, ids(3, seed=8), True), Work(harness.sequence(), text, True, outputs=700)]
        )
        assert np.array_equal(beside[1], expected)


def rows_at(lengths: list[tuple[int, int]], first_page: int = 0) -> Step:
    """The last `rows` of `keys` for every (rows, keys), absorbed: each sequence on pages of its own."""
    rows, keys = (np.asarray(column, np.int32) for column in zip(*lengths, strict=True))
    page_starts = np.cumsum([0, *-(-keys // PAGE_TOKENS)]).astype(np.int32)
    positions = np.concatenate([np.arange(k - r, k, dtype=np.int32) for r, k in zip(rows, keys, strict=True)])
    token_ids = (positions % 271).astype(np.int32)
    return Step(
        token_ids=token_ids,
        positions=positions,
        slots=(first_page + np.repeat(page_starts[:-1], rows)).astype(np.int64) * PAGE_TOKENS + positions,
        row_starts=np.cumsum([0, *rows]).astype(np.int32),
        kv_lens=keys,
        page_starts=page_starts,
        pages=np.arange(first_page, first_page + page_starts[-1], dtype=np.int32),
        segments=np.asarray([[1, 1, 0, len(rows)]], np.int32),
        output_rows=np.arange(len(positions), dtype=np.int32),
        is_prompt=np.ones(len(rows), np.int32),
    )


# A row's runs of pages do not grow with its keys: 512 pages are 64 runs, 513 are 57, 576 are 64, 577 are 58.
# (rows, keys) of sequences, and the runs of the shortest and of the longest row.
RUN_EDGES = {
    "one row each over the first edge": ([(1, 32768), (1, 32769)], (64, 57)),
    "one row each over the second edge": ([(1, 36864), (1, 36865)], (64, 58)),
    "a chunk over the first edge": ([(8, 32772)], (64, 57)),
    "a chunk over the second edge": ([(8, 36868)], (64, 58)),
}


@pytest.mark.parametrize("threads", [2, 64])  # 64: every row's runs are spread over members, whatever is beside it
@pytest.mark.parametrize("edge", list(RUN_EDGES))
def test_rows_of_more_keys_in_fewer_runs(edge: str, threads: int, tmp_path: Path) -> None:
    """A row of 64 runs beside a longer one of fewer: each as plain has it, and every bit as without the other."""
    lengths, runs_of_ends = RUN_EDGES[edge]
    ends = lengths[0][1] - lengths[0][0] + 1, lengths[-1][1]
    assert tuple(-(-keys // _native.absorbed_run_keys(keys)) for keys in ends) == runs_of_ends
    path = write_gguf(tiny_model("v2-lite", num_hidden_layers=2), tmp_path / "m.gguf")
    num_pages = sum(-(-keys // PAGE_TOKENS) for _, keys in lengths)
    settings: dict[str, Any] = {"mla": "1", "n_ctx": num_pages * PAGE_TOKENS}
    native = Harness(path, backend="native", threads=threads, **settings)
    plain = judge(path, **settings)

    def logits(harness: Harness, *steps: Step) -> Logits:
        """Over random keys: scores are spread, and no run weighs nothing."""
        rng = np.random.default_rng(3)
        for array in harness.loaded.cache.arrays:
            array[:] = rng.standard_normal(array.shape, np.float32)
        runs = [harness.loaded.backend.start(step) for step in steps]
        for run in runs:
            run.run()
        return np.concatenate([run.outputs["logits"] for run in runs])

    first_pages = np.cumsum([0, *(-(-keys // PAGE_TOKENS) for _, keys in lengths[:-1])])
    one_by_one = [
        rows_at([(1, keys - rows + 1 + row)], int(first_page))
        for (rows, keys), first_page in zip(lengths, first_pages, strict=True)
        for row in range(rows)
    ]
    alone = logits(native, *one_by_one)
    together = logits(native, rows_at(lengths))
    close(together, logits(plain, rows_at(lengths)), 1e-5)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("fa", ["0", "1"])
def test_paths_agree_over_many_keys(fa: str, tmp_path: Path) -> None:
    """1200 keys are two tiles of expanded keys where fused, and with 1 MiB several tiles either way."""
    path = write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf")
    text = ids(1200)
    expected = Harness(path, backend="native", mla="1", fa="1").logits(text, [700, 500])
    for mla, size in (("0", 64 << 20), ("1", 64 << 20), ("2", 64 << 20), ("2", 1 << 20)):
        harness = Harness(path, backend="native", mla=mla, fa=fa, workspace_bytes=size)
        close(harness.logits(text, [700, 500]), expected, 1e-5)


@pytest.mark.parametrize(("mla", "fa"), [(mla, fa) for mla in ("0", "1", "2") for fa in ("0", "1")])
def test_the_smallest_workspace_gives_the_same_bits(mla: str, fa: str, tmp_path: Path) -> None:
    """1 MiB: heads, keys, rows of scores and rows of experts go in several tiles."""
    path = write_gguf(tiny_model("v2", num_attention_heads=20, num_key_value_heads=20), tmp_path / "m.gguf")
    text = ids(400)
    small, large = (
        Harness(path, backend="native", mla=mla, fa=fa, workspace_bytes=size).logits(text, [380, 20])
        for size in (1 << 20, 64 << 20)
    )
    assert np.array_equal(small, large)


@pytest.mark.parametrize("mla", ["0", "1", "2"])
def test_a_later_token_cannot_reach_an_earlier_one(mla: str, tmp_path: Path) -> None:
    """A row of NaN leaves the rows before it in its own step as they are without it."""
    tiny, bad = tiny_model("v2-lite"), 271
    text = [i for i in ids(40) if i != bad]
    tiny.weights["token_embd.weight"][bad] = np.nan
    path = write_hf_dir(tiny, tmp_path / "hf")
    logits = Harness(path, backend="native", mla=mla).logits([*text, bad])
    assert np.isnan(logits[-1]).all()
    assert np.array_equal(logits[:-1], Harness(path, backend="native", mla=mla).logits(text))
