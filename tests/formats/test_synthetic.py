"""Synthetic files: every type, both layouts, and nothing left behind by a write that did not finish."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from kvfold.config import ModelConfig
from kvfold.errors import SettingError
from kvfold.formats import synthetic
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.formats.gguf import GgufFile, open_gguf
from kvfold.formats.synthetic import (
    SHAPES,
    estimate_bytes,
    shape_with_layers,
    synthesize,
    synthetic_checkpoint,
    synthetic_types,
    weight_bytes,
)
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.quant.decode import decode
from kvfold.quant.tensor import matrices
from kvfold.quant.types import TYPES, by_name
from kvfold.text.tokenizer import Tokenizer

TINY = SHAPES["tiny"]
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PUBLISHED = {
    "deepseek-v2-lite": "deepseek-v2-lite",
    "deepseek-v2": "deepseek-v2",
    "deepseek-v3": "deepseek-v3",
    "kimi-k2": "kimi-k2-instruct",
    "moonlight-16b": "moonlight-16b-a3b",
    "glm-4.7-flash": "glm-4.7-flash",
}


def config_of(file: GgufFile) -> ModelConfig:
    return ModelConfig.from_gguf(file.metadata, {name: tensor.shape for name, tensor in file.tensors.items()})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def header_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of full size whose weights are one hole: they take no disk and no time."""

    def hole(file: BinaryIO, tensors: list[Any], seed: int, progress: object) -> None:
        file.truncate(file.tell() + synthetic._data_bytes(tensors))
        file.seek(0, os.SEEK_END)

    monkeypatch.setattr(synthetic, "_write_tensors", hole)
    usage = shutil.disk_usage("/")._replace(free=1 << 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    yield


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones(name: str) -> None:
    if name == "tiny":
        assert name not in PUBLISHED
        return
    published = ModelConfig.from_hf(json.loads((CONFIGS / f"{PUBLISHED[name]}.json").read_text()))
    # a synthetic file holds no MTP layer, as llama.cpp's converter wrote these models
    assert SHAPES[name] == replace(published, num_mtp_layers=0)
    assert SHAPES[name].name == name


@pytest.mark.parametrize(
    ("name", "layers", "dense"),
    [
        ("deepseek-v3", 1, 1),
        ("deepseek-v3", 2, 1),
        ("deepseek-v3", 3, 2),
        ("deepseek-v3", 4, 3),
        ("deepseek-v3", 5, 3),
        ("deepseek-v3", 61, 3),
        ("deepseek-v2-lite", 2, 1),
        ("deepseek-v2-lite", 27, 1),
    ],
)
def test_few_layers_keep_an_moe_layer(name: str, layers: int, dense: int) -> None:
    config = shape_with_layers(SHAPES[name], layers)
    assert (config.num_layers, config.num_dense_layers) == (layers, dense)
    assert (
        replace(config, num_layers=SHAPES[name].num_layers, num_dense_layers=SHAPES[name].num_dense_layers)
        == (SHAPES[name])
    )


@pytest.mark.parametrize("layers", [0, -1, 28])
def test_a_number_of_layers_the_model_lacks_is_refused(layers: int) -> None:
    with pytest.raises(SettingError, match="1 to 27"):
        shape_with_layers(SHAPES["deepseek-v2-lite"], layers)


def intended_std(name: str, shape: tuple[int, ...]) -> float:
    """Spelled out from the module's rules, not computed by it."""
    match name.split(".")[-2]:
        case "exp_probs_b":
            return 0.02
        case "token_embd":
            return 1.0
        case "output":
            return 3 / math.sqrt(shape[-1])
        case "attn_k_b":
            return 1 / math.sqrt(shape[-2])
        case _:
            return 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[-1])


def first_rows(tensor: Any, most: int = 64) -> NDArray[np.float32]:
    return decode(tensor.type, np.ascontiguousarray(tensor.raw.reshape(-1, tensor.raw.shape[-1])[:most]))


@pytest.mark.parametrize("type_name", synthetic_types())
def test_every_type_decodes_finite_and_of_the_intended_size(type_name: str, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    written = synthesize(TINY, out, type=type_name.lower())
    assert written == out.stat().st_size
    assert open_checkpoint(out).config == TINY  # nothing missing, nothing left over, every shape and type runs
    with open_gguf(out) as file:
        expected = {spec.name: spec.shape for spec in expected_tensors(TINY, KvLayout.K_B_V_B)}
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == expected
        assert file.tensors["blk.1.ffn_down_exps.weight"].type.name == type_name
        for name, tensor in file.tensors.items():
            weights = first_rows(tensor)
            where = f"{name} {tensor.type.name}"
            assert np.isfinite(weights).all(), where
            std, intended = float(weights.std()), intended_std(name, tensor.shape)
            # 2.0 for the few 8 values of exp_probs_b and blocks of one scale; most are within 3 %
            assert intended / 2 < std < intended * 2, f"{where}: std {std}, intended {intended}"
            mean = 1.0 if name.endswith("_norm.weight") else 0.0
            assert abs(float(weights.mean()) - mean) < intended, f"{where}: mean {weights.mean()}"
        # 524,288 weights: a mean grows by sqrt(cols) a layer, so scales of either sign must take it out (Q4_0: -0.11)
        weights = first_rows(file.tensors["blk.1.ffn_down_exps.weight"], most=8 * 256)
        assert abs(float(weights.mean())) < 0.03 * float(weights.std())


@pytest.mark.parametrize("legacy_kv_b", [False, True])
def test_another_reader_sees_the_same_file(legacy_kv_b: bool, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    synthesize(TINY, out, legacy_kv_b=legacy_kv_b)
    reader = gguf.GGUFReader(out)
    specs = expected_tensors(TINY, KvLayout.KV_B if legacy_kv_b else KvLayout.K_B_V_B)
    assert [(t.name, tuple(t.shape.tolist()[::-1])) for t in reader.tensors] == [(s.name, s.shape) for s in specs]
    with open_gguf(out) as file:
        for theirs, ours in zip(reader.tensors, file.tensors.values(), strict=True):
            assert theirs.tensor_type == ours.type.id, theirs.name
            assert theirs.data_offset == ours.offset, theirs.name
            assert theirs.data.tobytes() == ours.raw.tobytes(), theirs.name
    assert open_checkpoint(out).config == TINY
    name = reader.fields["general.name"].contents()
    assert "synthetic" in name and "tiny" in name


def test_layouts_state_what_llama_cpp_states(tmp_path: Path) -> None:
    def attention(legacy_kv_b: bool) -> dict[str, Any]:
        out = tmp_path / f"{legacy_kv_b}.gguf"
        synthesize(TINY, out, legacy_kv_b=legacy_kv_b)
        with open_gguf(out) as file:
            prefix = "deepseek2.attention."
            keys = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
            shapes = {n.split(".")[2]: t.shape for n, t in file.tensors.items() if n.startswith("blk.0.attn_")}
        return {k: v for k, v in keys.items() if "length" in k or "kv" in k} | {
            k: v for k, v in shapes.items() if k in ("attn_kv_b", "attn_k_b", "attn_v_b")
        }

    assert attention(True) == {
        "head_count_kv": 4,
        "kv_lora_rank": 512,
        "key_length": 192,
        "value_length": 128,
        "attn_kv_b": (4 * (128 + 128), 512),
    }
    assert attention(False) == {
        "head_count_kv": 1,
        "kv_lora_rank": 512,
        "key_length": 576,
        "value_length": 512,
        "key_length_mla": 192,
        "value_length_mla": 128,
        "attn_k_b": (4, 512, 128),
        "attn_v_b": (4, 128, 512),
    }


@pytest.mark.usefixtures("header_only")
@pytest.mark.parametrize("legacy_kv_b", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_header_says_what_the_shape_is(name: str, legacy_kv_b: bool, tmp_path: Path) -> None:
    config = shape_with_layers(SHAPES[name], 2)
    if legacy_kv_b:  # the layouts have the same vocabulary; reading 163,840 tokens once is enough
        config = replace(config, vocab_size=1024)
    out = tmp_path / "two_layers.gguf"
    written = synthesize(config, out, legacy_kv_b=legacy_kv_b)
    estimated = estimate_bytes(config, legacy_kv_b=legacy_kv_b)
    assert 0 <= estimated - written <= 4096
    with open_gguf(out) as file:
        assert config_of(file) == config
        assert config_of(file).notes == ()  # no key had to be filled in
        assert file.metadata["deepseek2.block_count"] == 2
        assert file.metadata["deepseek2.leading_dense_block_count"] == 1
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == len(set(tokens)) == config.vocab_size


def test_deepseek_v2_lite_is_as_large_as_users_files() -> None:
    assert 8.85e9 < estimate_bytes(SHAPES["deepseek-v2-lite"], type="iq4_nl") < 8.95e9


@pytest.mark.usefixtures("header_only")
def test_rows_that_are_no_whole_blocks_take_a_smaller_block(tmp_path: Path) -> None:
    def types_of(config: ModelConfig, type_name: str) -> dict[str, str]:
        out = tmp_path / f"{config.name}-{type_name}.gguf"
        synthesize(config, out, type=type_name)
        with open_gguf(out) as file:
            return {name: tensor.type.name for name, tensor in file.tensors.items()}

    # expert rows of 1408 = 5.5 * 256
    lite = replace(shape_with_layers(SHAPES["deepseek-v2-lite"], 2), vocab_size=1024)
    types = types_of(lite, "q4_k")
    assert types["blk.1.ffn_gate_exps.weight"] == types["token_embd.weight"] == "Q4_K"
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.0.ffn_down.weight"] == "Q5_0"
    assert types["blk.1.attn_k_b.weight"] == "Q8_0"
    assert types["blk.1.attn_v_b.weight"] == "Q4_K"
    assert types["output.weight"] == "Q6_K"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.attn_norm.weight"] == "F32"

    types = types_of(lite, "iq2_xxs")
    assert types["token_embd.weight"] == "Q4_K"
    assert types["blk.1.ffn_down_exps.weight"] == "IQ4_NL"
    assert types_of(lite, "iq4_nl")["blk.1.attn_k_b.weight"] == "IQ4_NL"
    assert types_of(lite, "q8_0")["output.weight"] == "Q8_0"
    assert types_of(lite, "bf16")["output.weight"] == "BF16"

    types = types_of(lite, "q4_k_r4")
    assert types["blk.1.ffn_gate_exps.weight"] == "Q4_K_R4"
    assert types["token_embd.weight"] == "Q4_K"
    assert types["blk.1.ffn_down_exps.weight"] == "Q5_0"

    odd = replace(TINY, name="odd", hidden_size=2 * 24, tie_word_embeddings=True)
    types = types_of(odd, "q8_0")
    assert types["token_embd.weight"] == types["blk.0.attn_q_a.weight"] == "F16"
    assert "output.weight" not in types


def test_the_seed_decides_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {}
    for label, seed, threads in (("a", 7, 2), ("b", 7, 1), ("c", 8, 2)):
        monkeypatch.setattr(synthetic, "_DRAWING_THREADS", threads)
        synthesize(TINY, tmp_path / label, seed=seed)
        digests[label] = sha256(tmp_path / label)
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize(("type_name", "legacy_kv_b"), [("iq4_nl", False), ("q4_k_r4", True), ("bf16", False)])
def test_in_memory_it_is_the_same_model_as_in_a_file(type_name: str, legacy_kv_b: bool, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"type": type_name, "legacy_kv_b": legacy_kv_b, "seed": 3}
    synthesize(SHAPES["tiny"], tmp_path / "tiny.gguf", **chosen)
    seen: list[tuple[int, int]] = []
    made = synthetic_checkpoint(SHAPES["tiny"], **chosen, progress=lambda *at: seen.append(at))
    file = open_checkpoint(tmp_path / "tiny.gguf")
    assert (made.config, made.kv_layout, made.nbytes) == (file.config, file.kv_layout, file.nbytes)
    assert list(made.tensors) == list(file.tensors)
    for name in file.tensors:
        for here, there in zip(matrices(made.tensors[name]), matrices(file.tensors[name]), strict=True):
            assert (here.name, here.type, here.shape) == (there.name, there.type, there.shape)
            assert np.array_equal(here.raw, there.raw), name
            assert not here.raw.flags.writeable
    total = weight_bytes(SHAPES["tiny"], type=type_name, legacy_kv_b=legacy_kv_b)
    assert seen[-1] == (total, total) and total >= made.nbytes


def test_no_block_occurs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK_BYTES", 1 << 14)
    synthesize(TINY, tmp_path / "tiny.gguf", type="q8_0")
    with open_gguf(tmp_path / "tiny.gguf") as file:
        codes = [t.raw.reshape(-1, 34)[:, 2:] for t in file.tensors.values() if t.type.name == "Q8_0"]
    blocks = np.concatenate(codes)
    assert len(blocks) > 100_000
    assert len(np.unique(np.ascontiguousarray(blocks).view("S32"))) > len(blocks) * 0.999999


def test_text_goes_through_the_vocabulary_and_back(tmp_path: Path) -> None:
    synthesize(TINY, tmp_path / "tiny.gguf")
    with open_gguf(tmp_path / "tiny.gguf") as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
        tokens, merges = (list(file.metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "merges"))
    text = " bakato dizu\nÆther 12,5 €  \t 龍🐉 <｜end▁of▁sentence｜>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id == 0
    assert tokenizer.eos_ids == {1}
    assert 1 not in ids  # what a user types is never a control token
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(tokenizer.encode(" bakato")[1:2]) == " baka"  # merges are used
    known = set(tokens)
    assert all({*merge.split(" "), merge.replace(" ", "")} <= known for merge in merges)
    assert len(merges) == len(tokens) - 256 - 3


def test_progress_ends_at_the_size_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(synthetic, "_FLUSH_BYTES", 1 << 18)
    calls: list[tuple[int, int]] = []
    written = synthesize(TINY, tmp_path / "tiny.gguf", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {written}
    assert calls[-1][0] == written
    assert len(calls) > 40


@contextmanager
def nothing_left_in(directory: Path) -> Iterator[None]:
    yield
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_no_file(error: type[BaseException], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert (tmp_path / "tiny.gguf.partial").exists()
        if done > total // 2:
            raise error

    with nothing_left_in(tmp_path), pytest.raises(error):
        synthesize(TINY, tmp_path / "tiny.gguf", progress=stop)


def test_a_failing_disk_is_a_typed_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with nothing_left_in(tmp_path), pytest.raises(SettingError, match=r"tiny\.gguf.*No space left"):
        synthesize(TINY, tmp_path / "tiny.gguf")


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        nothing_left_in(tmp_path),
        pytest.raises(SettingError, match=r"8,904,79\d,\d{3} bytes.*5,000,000,000 free"),
    ):
        synthesize(SHAPES["deepseek-v2-lite"], tmp_path / "lite.gguf")


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "DeepSeek-V3.gguf"
    out.write_bytes(b"400 GB of somebody's download")
    with pytest.raises(SettingError, match="exists already"):
        synthesize(TINY, out)
    assert out.read_bytes() == b"400 GB of somebody's download"


def test_the_leftover_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf.partial").write_bytes(b"x" * 5_000_000)
    synthesize(TINY, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    with open_gguf(tmp_path / "tiny.gguf") as file:
        assert config_of(file) == TINY


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no directory .*nowhere"):
        synthesize(TINY, tmp_path / "nowhere" / "tiny.gguf")


@pytest.mark.parametrize("type_name", ["q4", "iq4_k", "i32", "f8_e4m3", "iq1_s_r4", ""])
def test_a_type_without_random_blocks_is_refused_with_those_that_have_them(type_name: str, tmp_path: Path) -> None:
    with nothing_left_in(tmp_path), pytest.raises(SettingError, match="IQ4_NL"):
        synthesize(TINY, tmp_path / "tiny.gguf", type=type_name)


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path: Path) -> None:
    synthesize(replace(TINY, vocab_size=259), tmp_path / "bytes.gguf")
    with pytest.raises(SettingError, match="259"):
        synthesize(replace(TINY, vocab_size=258), tmp_path / "tiny.gguf")


def test_every_type_a_gguf_can_hold_weights_in_is_offered() -> None:
    not_weights = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}  # integers and intermediates
    other = {"F8_E4M3", "IQ1_S_R4", "IQ1_M_R4"}  # not of GGUF; one scale a row instead of one a block
    decoded = {type.name for type in TYPES if type.decodes}
    assert set(synthetic_types()) == decoded - not_weights - other
    assert all(by_name(name).decodes for name in synthetic_types())
