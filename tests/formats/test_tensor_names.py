"""The one table of tensors, judged by those who write the files: transformers and llama.cpp's converter (gguf)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import pytest
from safetensors import safe_open

from kit.tiny_models import CONFIGS, hf_model
from kvfold.config import ModelConfig
from kvfold.formats.tensor_names import KvLayout, expected_tensors, ignored_reason, layer_index

CONFIG_DIR = Path(__file__).parents[1] / "data" / "configs"


def published(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((CONFIG_DIR / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", ["v2-lite", "v3", "v3-tied", "glm4-moe-lite"])
def test_transformers_writes_exactly_these_tensors(name, tmp_path):
    model = hf_model(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {}
    for spec in expected_tensors(ModelConfig.from_hf(CONFIGS[name]), KvLayout.KV_B):
        expected |= dict.fromkeys(spec.hf_names, spec.shape[1:] if spec.fused else spec.shape)
    assert written == expected


@pytest.mark.parametrize("name", ["v2-lite", "v3", "glm4-moe-lite"])
def test_transformers_holds_experts_in_the_fused_form(name):
    state = {key: tuple(value.shape) for key, value in hf_model(name).state_dict().items()}
    for spec in expected_tensors(ModelConfig.from_hf(CONFIGS[name]), KvLayout.KV_B):
        if spec.fused:
            experts, rows, cols = spec.shape
            assert state[spec.fused.hf_name] == (experts, spec.fused.parts * rows, cols)


@pytest.mark.parametrize("layout", KvLayout)
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "glm-4.7-flash"])
def test_gguf_knows_every_name(name, layout):
    config = published(name)
    known = {
        pattern.format(bid=layer) + suffix
        for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DEEPSEEK2]
        for pattern in [gguf.TENSOR_NAMES[tensor]]
        for layer in range(config.num_layers)
        for suffix in (".weight", ".bias")
    }
    names = [spec.name for spec in expected_tensors(config, layout)]
    assert set(names) <= known
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_llama_cpp_maps_each_hugging_face_name_to_ours(name):
    config = published(name)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_layers)
    for spec in expected_tensors(config, KvLayout.KV_B):
        # its converter joins experts under the name without a number, and spells the bias with a dot
        theirs = {part.replace(f".experts.{i}.", ".experts.") for i, part in enumerate(spec.hf_names)}
        (theirs_name,) = {part.replace("correction_bias", "correction.bias") for part in theirs}
        assert mapping.get_name(theirs_name, try_suffixes=(".weight", ".bias")) == spec.name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v3", 671_026_419_200),  # the main model; 685 B with its MTP layer
        ("kimi-k2-instruct", 1_026_408_232_448),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    for layout in KvLayout:
        assert sum(math.prod(spec.shape) for spec in expected_tensors(published(name), layout)) == parameters


def test_shapes_of_both_kv_forms():
    config = published("glm-4.7-flash")
    whole = {spec.name: spec.shape for spec in expected_tensors(config, KvLayout.KV_B)}
    split = {spec.name: spec.shape for spec in expected_tensors(config, KvLayout.K_B_V_B)}
    assert whole["blk.3.attn_kv_b.weight"] == (20 * (192 + 256), 512)
    assert split["blk.3.attn_k_b.weight"] == (20, 512, 192)
    assert split["blk.3.attn_v_b.weight"] == (20, 256, 512)
    assert len(split) == len(whole) + config.num_layers


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rope_freqs.weight", "rotary"),
        ("blk.0.attn_rot_embd.weight", "rotary"),
        ("model.layers.60.self_attn.rotary_emb.inv_freq", "rotary"),
        ("blk.61.nextn.eh_proj.weight", "MTP"),
        ("blk.61.attn_norm.weight", "MTP"),
        ("model.layers.61.mlp.experts.7.up_proj.weight", "MTP"),
        ("model.layers.61.self_attn.kv_b_proj.weight", "MTP"),
    ],
)
def test_what_may_lie_unused_in_a_file(name, reason):
    assert reason in ignored_reason(name, published("deepseek-v3"))


@pytest.mark.parametrize(
    "name",
    ["blk.62.attn_norm.weight", "blk.60.extra.weight", "output.bias", "lm_head.weight", "inv_freq", "v.blk.61.x"],
)
def test_what_may_not(name):
    assert ignored_reason(name, published("deepseek-v3")) is None


def test_a_second_head_is_ignored_when_tied():
    config = ModelConfig.from_hf(CONFIGS["v3-tied"])
    assert "tied" in ignored_reason("lm_head.weight", config)


def test_layer_of_a_name():
    assert layer_index("blk.17.attn_q.weight") == layer_index("model.layers.17.mlp.gate.weight") == 17
    assert layer_index("token_embd.weight") is None
