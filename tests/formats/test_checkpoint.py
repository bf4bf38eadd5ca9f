"""One model through every file form: the same weights under the same names, and a sentence for every file that is not
one."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kit.tiny_models import (
    CONFIGS,
    VOCAB_SIZE,
    TinyModel,
    gguf_tensors,
    hf_model,
    split_kv_b,
    tiny_model,
    vocabulary,
    write_gguf,
    write_hf_dir,
)
from kvfold.errors import ModelFileError, UnsupportedModel, UnsupportedType
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import matrices


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor in float32, 3-D ones stacked again."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        parts = [decode_tensor(part).reshape(part.shape) for part in matrices(tensor)]
        found[name] = np.stack(parts) if isinstance(tensor, tuple) else parts[0]
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name], array), name


GGUF_FORMS = {
    "kv_b": ({"layout": KvLayout.KV_B}, KvLayout.KV_B),
    "k_b/v_b": ({"layout": KvLayout.K_B_V_B}, KvLayout.K_B_V_B),
    "k_b/v_b flat": ({"layout": KvLayout.K_B_V_B, "flat": True, "legacy_keys": True}, KvLayout.K_B_V_B),
    "both": ({"include_both": True}, KvLayout.KV_B),
    "both, flat": ({"include_both": True, "flat": True, "legacy_keys": True}, KvLayout.KV_B),
}


@pytest.mark.parametrize("form", GGUF_FORMS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "v3-half-split"])
def test_gguf_forms_hold_the_same_weights(name, form, tmp_path):
    tiny = tiny_model(name)
    options, layout = GGUF_FORMS[form]
    checkpoint = open_checkpoint(write_gguf(tiny, tmp_path / "model.gguf", **options))
    assert (checkpoint.format, checkpoint.kv_layout) == ("GGUF", layout)
    assert_same(values(checkpoint), gguf_tensors(tiny, layout=layout))
    assert replace(checkpoint.config, family="") == replace(tiny.model_config, family="")
    assert list(checkpoint.tensors) == [spec.name for spec in expected_tensors(checkpoint.config, layout)]
    assert bool(checkpoint.info) == form.startswith("both")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_directories_hold_the_same_weights(name, fused, tmp_path):
    tiny = tiny_model(name)
    checkpoint = open_checkpoint(write_hf_dir(tiny, tmp_path / "Some-Model", fused=fused))
    assert (checkpoint.format, checkpoint.kv_layout) == ("safetensors", KvLayout.KV_B)
    assert_same(values(checkpoint), tiny.weights)
    assert checkpoint.config == tiny.model_config
    assert checkpoint.config.name == "Some-Model"
    assert checkpoint.info == ()


@pytest.mark.parametrize("name", ["v2", "v3-tied", "glm4-moe-lite"])
def test_what_transformers_saves_is_read(name, tmp_path):
    hf_model(name, seed=3).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tiny = tiny_model(name, seed=3)
    assert_same(values(checkpoint), tiny.weights)
    # transformers declares one MTP layer in every V3 configuration and writes none
    assert replace(checkpoint.config, num_mtp_layers=0) == tiny.model_config


def test_quantized_gguf_is_the_quantizers_numbers(tmp_path):
    import gguf

    tiny = tiny_model("v2")
    checkpoint = open_checkpoint(write_gguf(tiny, tmp_path / "model.gguf", ftype="Q8_0"))
    q8 = gguf.GGMLQuantizationType.Q8_0
    found = values(checkpoint)
    k_b, _ = split_kv_b(tiny.weights["blk.0.attn_kv_b.weight"], tiny.model_config)
    assert np.array_equal(found["blk.0.attn_k_b.weight"], gguf.dequantize(gguf.quantize(k_b, q8), q8))
    experts = checkpoint.tensors["blk.1.ffn_up_exps.weight"]
    assert {part.type.name for part in experts} == {"Q8_0"} and len(experts) == 16
    assert checkpoint.tensors["blk.1.ffn_gate_inp.weight"].type.name == "F32"
    assert checkpoint.nbytes < sum(weight.nbytes for weight in tiny.weights.values()) * 0.3


def test_fp8_directory_is_within_its_precision(tmp_path):
    tiny = tiny_model("v3-odd")
    checkpoint = open_checkpoint(write_hf_dir(tiny, tmp_path, dtype="float8_e4m3fn"))
    for name, found in values(checkpoint).items():
        expected = tiny.weights[name]
        assert np.abs(found - expected).max() <= np.abs(expected).max() / 16, name
    assert all(part.scale is not None for part in checkpoint.tensors["blk.1.ffn_up_exps.weight"])


def test_nothing_is_copied(tmp_path):
    tiny = tiny_model("v3")
    for path in (write_gguf(tiny, tmp_path / "model.gguf"), write_hf_dir(tiny, tmp_path / "hf")):
        for tensor in open_checkpoint(path).tensors.values():
            for part in matrices(tensor):
                base = part.raw
                while isinstance(base, np.ndarray):
                    base = base.base
                assert isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)
                assert part.raw.flags.c_contiguous and not part.raw.flags.writeable


def test_both_forms_in_one_file_are_told(tmp_path):
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", include_both=True)
    (sentence,) = open_checkpoint(path).info
    assert sentence == "6 tensors ignored: attn_k_b and attn_v_b, as attn_kv_b holds the same weights."


def test_kv_b_of_some_layers_only_is_ignored(tmp_path):
    tiny = tiny_model("v3")
    path = write_gguf(tiny, tmp_path / "model.gguf", include_both=True, tensors={"blk.1.attn_kv_b.weight": None})
    checkpoint = open_checkpoint(path)
    assert checkpoint.kv_layout is KvLayout.K_B_V_B
    assert_same(values(checkpoint), gguf_tensors(tiny))
    assert checkpoint.info == ("2 tensors ignored: attn_kv_b, as attn_k_b and attn_v_b hold the same weights.",)


def test_mtp_layers_and_rotary_tables_are_ignored_and_told(tmp_path):
    tiny = tiny_model("v3")
    extra = {
        f"blk.3.{name}": weight
        for name, weight in (
            (key.removeprefix("blk.2."), value) for key, value in gguf_tensors(tiny).items() if key[:6] == "blk.2."
        )
    }
    extra |= {
        "blk.3.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
        "rope_freqs.weight": np.ones(8, np.float32),
    }
    keys = {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    checkpoint = open_checkpoint(write_gguf(tiny, tmp_path / "model.gguf", keys=keys, tensors=extra))
    assert_same(values(checkpoint), gguf_tensors(tiny))
    assert checkpoint.config.num_mtp_layers == 1
    assert [line.split(":")[0] for line in checkpoint.info] == [
        f"{len(extra) - 1} tensors ignored",
        "1 tensor ignored",
    ]
    assert "MTP" in checkpoint.info[0] and "rotary" in checkpoint.info[1]


def test_defaults_by_identity_are_told(tmp_path):
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", keys={"deepseek2.expert_gating_func": None})
    (sentence,) = open_checkpoint(path).info
    assert "expert_gating_func is not in the file: sigmoid" in sentence


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("blk.1.attn_kv_b.weight", (128, 32), "shape (128, 32), expected (256, 32) for 4 heads."),
        ("blk.0.attn_q_b.weight", (192, 32), "shape (192, 32), expected (192, 64) for 4 heads."),
        ("blk.2.attn_kv_a_norm.weight", (48,), "shape (48,), expected (32,)."),
        ("blk.2.ffn_up_exps.weight", (8, 32, 64), "shape (8, 32, 64), expected (16, 32, 64) for 16 experts."),
        ("blk.2.exp_probs_b.bias", (8,), "shape (8,), expected (16,) for 16 experts."),
        ("blk.0.ffn_down.weight", (160, 64), "shape (160, 64), expected (64, 160)."),
        ("output.weight", (271, 64), "shape (271, 64), expected (272, 64) for a vocabulary of 272."),
    ],
)
def test_a_wrong_shape_says_what_was_expected_and_why(name, shape, sentence, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("v3"), path, layout=KvLayout.KV_B, tensors={name: np.zeros(shape, np.float32)})
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {name}: {sentence}")
    assert caught.value.offset > 0


def test_a_wrong_shape_in_a_directory_is_named_as_the_file_names_it(tmp_path):
    tiny = tiny_model("v3")
    write_hf_dir(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"v_head_dim": 16}))
    with pytest.raises(
        ModelFileError, match=r"layers\.0\.self_attn\.kv_b_proj\.weight: shape \(256, 32\), expected "
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("flat_shape", [(4 * 32, 31), (4 * 31, 32), (32, 4 * 32)])
def test_flat_k_b_is_taken_only_where_it_splits_into_heads(flat_shape, tmp_path):
    changes = {"blk.0.attn_k_b.weight": np.zeros(flat_shape, np.float32)}
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", tensors=changes)
    with pytest.raises(ModelFileError, match=r"attn_k_b\.weight: shape .* expected \(4, 32, 32\) for 4 heads"):
        open_checkpoint(path)


def test_missing_and_left_over_tensors_are_listed_together(tmp_path):
    changes = {
        "blk.0.attn_norm.weight": None,
        "blk.2.ffn_down_exps.weight": None,
        "blk.2.extra.weight": np.zeros(3, np.float32),
        "blk.7.attn_norm.weight": np.zeros(64, np.float32),
    }
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", tensors=changes)
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    assert (
        "missing: blk.0.attn_norm.weight, blk.2.ffn_down_exps.weight (2); "
        "left over: blk.2.extra.weight, blk.7.attn_norm.weight (2)."
    ) in str(caught.value)


@pytest.mark.parametrize(
    "extra", ["blk.2.ffn_gate_shexp.bias", "blk.3.attn_norm.weight", "blk.0.ffn_gate_inp.weight"]
)
def test_a_tensor_too_many_is_refused(extra, tmp_path):
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", tensors={extra: np.zeros(64, np.float32)})
    with pytest.raises(ModelFileError, match=rf"layers\. left over: {extra} \(1\)\."):
        open_checkpoint(path)


def test_a_long_list_is_counted(tmp_path):
    path = write_hf_dir(tiny_model("v3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelFileError, match=r"model\.layers\.3\..* and \d+ more \(\d+\)") as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("missing", ["blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight"])
def test_half_of_a_pair_is_missing(missing, tmp_path):
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", tensors={missing: None})
    with pytest.raises(ModelFileError, match=rf"missing: {missing} \(1\)\."):
        open_checkpoint(path)


def test_a_vocabulary_of_another_size(tmp_path):
    tokens, types, _ = vocabulary()
    keys = {"tokenizer.ggml.tokens": tokens[:-1], "tokenizer.ggml.token_type": types[:-1]}
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", keys=keys)
    with pytest.raises(ModelFileError, match=f"ggml.tokens: {VOCAB_SIZE - 1} tokens, expected {VOCAB_SIZE}"):
        open_checkpoint(path)


def test_a_model_without_vocabulary_opens(tmp_path):
    keys = dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"))
    checkpoint = open_checkpoint(write_gguf(tiny_model("v3"), tmp_path / "model.gguf", keys=keys))
    assert "tokenizer.ggml.tokens" not in checkpoint.vocabulary.metadata


def test_where_the_vocabulary_is(tmp_path):
    tiny = tiny_model("v3")
    metadata = open_checkpoint(write_gguf(tiny, tmp_path / "model.gguf")).vocabulary.metadata
    assert list(metadata["tokenizer.ggml.tokens"]) == vocabulary()[0]
    assert all(key.startswith("tokenizer.") for key in metadata)
    path = write_hf_dir(tiny, tmp_path / "hf", tokenizer=True)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "modeling_deepseek.py").write_text("raise SystemExit")
    found = open_checkpoint(path).vocabulary
    assert dict(found.files) == {name: path / name for name in ("tokenizer.json", "chat_template.jinja")}
    assert not found.metadata


def test_a_type_that_is_not_decoded_is_refused_with_what_to_use(tmp_path):
    path = write_gguf(tiny_model("v2", kv_lora_rank=256), tmp_path / "model.gguf", layout=KvLayout.KV_B)
    with_type(path, "blk.0.attn_kv_b.weight", 139)  # ik_llama.cpp's IQ4_K, whose rows are shorter than F32's
    with pytest.raises(UnsupportedType, match=r"blk\.0\.attn_kv_b\.weight: type IQ4_K \(number 139\).*Q4_K"):
        open_checkpoint(path)


def with_type(path: Path, name: str, number: int) -> Path:
    """Writes another type number over a tensor's."""
    data = path.read_bytes()
    at = data.index(name.encode()) + len(name)
    dimensions = int.from_bytes(data[at : at + 4], "little")
    at += 4 + 8 * dimensions
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    return path


def with_fused_experts(tiny: TinyModel) -> dict[str, np.ndarray | None]:
    """Changes that make gate and up of each layer one tensor, as llama.cpp's --fuse-gate-up-exps does."""
    changes = {}
    for layer in (1, 2):
        gate, up = f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight"
        both = np.concatenate([tiny.weights[gate], tiny.weights[up]], axis=1)
        changes |= {gate: None, up: None, f"blk.{layer}.ffn_gate_up_exps.weight": both}
    return changes


def test_fused_gate_and_up_of_llama_cpp(tmp_path):
    tiny = tiny_model("v3")
    changes = with_fused_experts(tiny)
    path = write_gguf(tiny, tmp_path / "model.gguf", layout=KvLayout.KV_B, tensors=changes)
    assert_same(values(open_checkpoint(path)), tiny.weights)


def test_interleaved_rows_split_at_whole_groups_only(tmp_path):
    """Q4_0_R8 mixes eight rows. Of 40 fused rows the first 20, the gate's, would share a group with the next."""
    for rows, is_whole in ((16, True), (20, False)):
        tiny = tiny_model("v3", moe_intermediate_size=rows)
        changes = with_fused_experts(tiny)
        path = write_gguf(tiny, tmp_path / f"{rows}.gguf", layout=KvLayout.KV_B, ftype="Q4_0", tensors=changes)
        with_type(path, "blk.1.ffn_gate_up_exps.weight", 202)
        if is_whole:
            experts = open_checkpoint(path).tensors["blk.1.ffn_up_exps.weight"]
            assert {(part.type.name, part.shape) for part in experts} == {("Q4_0_R8", (16, 64))}
        else:
            with pytest.raises(ModelFileError, match=r"gate_up_exps\.weight: 20 rows in type Q4_0_R8.*groups of 8"):
                open_checkpoint(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_never_opened(suffix, tmp_path):
    file = tmp_path / f"pytorch_model{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    for path in (file, tmp_path):
        with pytest.raises(ModelFileError, match=r"pickle, which can run any code.*safetensors"):
            open_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["v3"]))
    with pytest.raises(ModelFileError, match="pickle"):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ModelFileError, match="cannot be opened: No such file"):
        open_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match=r"holds no model: expected config\.json"):
        open_checkpoint(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("once upon a time there was a model")
    with pytest.raises(ModelFileError):
        open_checkpoint(text)
    write_hf_dir(tiny_model("v3"), tmp_path / "hf")
    with pytest.raises(ModelFileError, match=r"open its directory instead, .*hf: "):
        open_checkpoint(tmp_path / "hf" / "model.safetensors")


def test_a_directory_with_one_gguf_model_opens_it(tmp_path):
    tiny = tiny_model("v3")
    write_gguf(tiny, tmp_path / "one.gguf")
    (tmp_path / "config.json").write_text("{}")  # repositories of GGUF files often carry one
    assert open_checkpoint(tmp_path).format == "GGUF"
    write_gguf(tiny, tmp_path / "two.gguf")
    with pytest.raises(ModelFileError, match=r"several models, name one of one\.gguf, two\.gguf"):
        open_checkpoint(tmp_path)


def test_another_architecture_is_refused_before_its_tensors_are_looked_at(tmp_path):
    path = write_gguf(tiny_model("v3"), tmp_path / "model.gguf", architecture="llama")
    with pytest.raises(UnsupportedModel, match="'llama'"):
        open_checkpoint(path)


@pytest.mark.peer
@pytest.mark.parametrize("layout", KvLayout)
@pytest.mark.parametrize("name", ["v3", "v3-yarn", "v3-odd", "glm4-moe-lite"])
def test_llama_cpp_reads_the_kits_files_as_transformers_does(name, layout, tmp_path):
    """The judge of the kit itself: what write_gguf writes is what llama.cpp understands. Float32 cache.

    Not v2: llama.cpp ranks its groups by the sum of two. Not v2-lite: it wants attention.q_lora_rank of all but a few
    layer counts.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    import torch

    path: Path = write_gguf(tiny_model(name), tmp_path / "model.gguf", layout=layout)
    ids = [(7 * i + 3) % 257 for i in range(150)]
    f32 = 0  # ggml type
    llama = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False, type_k=f32, type_v=f32
    )
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    with torch.no_grad():
        expected = hf_model(name)(torch.tensor([ids])).logits[0].numpy()
    # GLM: its q_a and kv_a norms use 1e-6 in transformers and rms_norm_eps, 1e-5, in llama.cpp
    tolerance = 1e-4 if name == "glm4-moe-lite" else 2e-5
    assert np.abs(theirs - expected).max() <= tolerance * np.abs(expected).max()
