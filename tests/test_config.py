"""Released configurations field by field, through config.json and through GGUF metadata, and every refusal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.tiny_models import CONFIGS, gguf_metadata
from kvfold.config import (
    GroupScore,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    Pairing,
    RopeConfig,
    Scoring,
    YarnConfig,
)
from kvfold.config_readers import RELEASED
from kvfold.errors import ModelFileError, UnsupportedModel
from kvfold.formats.tensor_names import KvLayout, expected_tensors

CONFIG_DIR = Path(__file__).parent / "data" / "configs"


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIG_DIR / f"{name}.json").read_text())


def mscale(factor: float, value: float) -> float:
    return 0.1 * value * math.log(factor) + 1.0


SOFTMAX = dict(scoring=Scoring.SOFTMAX, group_score=GroupScore.MAX, norm_topk_prob=False, has_choice_bias=False)
SIGMOID = dict(scoring=Scoring.SIGMOID, group_score=GroupScore.TOP2_SUM, norm_topk_prob=True, has_choice_bias=True)
YARN_40 = dict(factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0)

# name of the file -> every field of what it says
EXPECTED = {
    "deepseek-v2-lite": ModelConfig(
        family="deepseek-v2",
        name="",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_layers=27,
        num_dense_layers=1,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=MlaConfig(16, 128, 64, 128, 512, None, 192**-0.5 * mscale(40, 0.707) ** 2, 1e-6),
        rope=RopeConfig(1e4, 64, Pairing.INTERLEAVED, YarnConfig(**YARN_40, mscale=0.707, mscale_all_dim=0.707)),
        moe=MoeConfig(64, 6, 1408, 2816, num_groups=1, num_groups_per_tok=1, routed_scaling_factor=1.0, **SOFTMAX),
        tie_word_embeddings=False,
        num_mtp_layers=0,
    ),
    "deepseek-v2": ModelConfig(
        family="deepseek-v2",
        name="",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        num_layers=60,
        num_dense_layers=1,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=MlaConfig(128, 128, 64, 128, 512, 1536, 192**-0.5 * mscale(40, 0.707) ** 2, 1e-6),
        rope=RopeConfig(1e4, 64, Pairing.INTERLEAVED, YarnConfig(**YARN_40, mscale=0.707, mscale_all_dim=0.707)),
        moe=MoeConfig(
            160, 6, 1536, 3072, num_groups=8, num_groups_per_tok=3, routed_scaling_factor=16.0, **SOFTMAX
        ),
        tie_word_embeddings=False,
        num_mtp_layers=0,
    ),
    "deepseek-v3": ModelConfig(
        family="deepseek-v3",
        name="",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_layers=61,
        num_dense_layers=3,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=MlaConfig(128, 128, 64, 128, 512, 1536, 192**-0.5 * mscale(40, 1.0) ** 2, 1e-6),
        rope=RopeConfig(1e4, 64, Pairing.INTERLEAVED, YarnConfig(**YARN_40, mscale=1.0, mscale_all_dim=1.0)),
        moe=MoeConfig(256, 8, 2048, 2048, num_groups=8, num_groups_per_tok=4, routed_scaling_factor=2.5, **SIGMOID),
        tie_word_embeddings=False,
        num_mtp_layers=1,
    ),
    "kimi-k2-instruct": ModelConfig(
        family="kimi-k2",
        name="",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        num_layers=61,
        num_dense_layers=1,
        max_position=131072,
        rms_norm_eps=1e-6,
        mla=MlaConfig(64, 128, 64, 128, 512, 1536, 192**-0.5 * mscale(32, 1.0) ** 2, 1e-6),
        rope=RopeConfig(5e4, 64, Pairing.INTERLEAVED, YarnConfig(32.0, 4096, 1.0, 1.0, 1.0, 1.0)),
        moe=MoeConfig(
            384, 8, 2048, 2048, num_groups=1, num_groups_per_tok=1, routed_scaling_factor=2.827, **SIGMOID
        ),
        tie_word_embeddings=False,
        num_mtp_layers=0,
    ),
    "moonlight-16b-a3b": ModelConfig(
        family="moonlight",
        name="",
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        num_layers=27,
        num_dense_layers=1,
        max_position=8192,
        rms_norm_eps=1e-5,
        mla=MlaConfig(16, 128, 64, 128, 512, None, 192**-0.5, 1e-6),
        rope=RopeConfig(5e4, 64, Pairing.INTERLEAVED, None),
        moe=MoeConfig(
            64, 6, 1408, 2816, num_groups=1, num_groups_per_tok=1, routed_scaling_factor=2.446, **SIGMOID
        ),
        tie_word_embeddings=False,
        num_mtp_layers=0,
    ),
    "glm-4.7-flash": ModelConfig(
        family="glm-4.7-flash",
        name="",
        vocab_size=154880,
        hidden_size=2048,
        intermediate_size=10240,
        num_layers=47,
        num_dense_layers=1,
        max_position=202752,
        rms_norm_eps=1e-5,
        mla=MlaConfig(20, 192, 64, 256, 512, 768, 256**-0.5, 1e-6),
        rope=RopeConfig(1e6, 64, Pairing.INTERLEAVED, None),
        moe=MoeConfig(64, 4, 1536, 1536, num_groups=1, num_groups_per_tok=1, routed_scaling_factor=1.8, **SIGMOID),
        tie_word_embeddings=False,
        num_mtp_layers=1,
    ),
}


def shapes_of(config: ModelConfig, layout: KvLayout = KvLayout.K_B_V_B) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in expected_tensors(config, layout)}


def as_gguf(name: str, *, legacy: bool = False, without: tuple[str, ...] = (), **keys: Any) -> ModelConfig:
    """What from_gguf makes of a released model's metadata, some keys left out or replaced ("a.b" spelled a__b)."""
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(published(name), legacy=legacy)}
    metadata |= {f"deepseek2.{key.replace('__', '.')}": value for key, value in keys.items()}
    for key in without:
        del metadata[f"deepseek2.{key}"]
    return ModelConfig.from_gguf(metadata, shapes_of(EXPECTED[name]))


def test_every_published_config_has_its_expectation():
    assert {path.stem for path in CONFIG_DIR.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_released_config_is_read_field_by_field(name):
    config = ModelConfig.from_hf(published(name))
    for field in ModelConfig.__dataclass_fields__:
        if field not in ("name", "notes"):
            assert getattr(config, field) == getattr(EXPECTED[name], field), field
    assert config.notes == ()


def test_yarn_factors_of_the_released_models():
    v2, v3 = EXPECTED["deepseek-v2"].rope.yarn, EXPECTED["deepseek-v3"].rope.yarn
    assert (v2.cos_sin_factor, v3.cos_sin_factor) == (1.0, 1.0)
    assert v2.softmax_factor == pytest.approx(1.58963, abs=5e-6)
    assert v3.softmax_factor == pytest.approx(1.87385, abs=5e-6)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_gguf_metadata_says_the_same_as_config_json(name, legacy):
    # The converter leaves MTP layers out. Legacy files have no beta_fast: Kimi's 1.0 is its identity's.
    expected = replace(EXPECTED[name], num_mtp_layers=0)
    assert as_gguf(name, legacy=legacy) == expected


@pytest.mark.parametrize(
    ("name", "without", "names_key"),
    [
        *((name, ("expert_gating_func",), "expert_gating_func") for name in EXPECTED),
        ("deepseek-v2", ("expert_group_count", "expert_group_used_count"), "expert_group_count"),
        ("deepseek-v3", ("expert_group_count", "expert_group_used_count"), "expert_group_count"),
        ("kimi-k2-instruct", ("expert_group_count", "expert_group_used_count"), None),
        ("deepseek-v2", ("expert_weights_scale",), "expert_weights_scale"),
        ("deepseek-v2-lite", ("expert_weights_norm",), None),
        *((name, ("expert_weights_norm",), "expert_weights_norm") for name in list(EXPECTED)[2:]),
        ("moonlight-16b-a3b", ("rope.freq_base",), "rope.freq_base"),
        (
            "deepseek-v2",
            ("rope.scaling.yarn_log_multiplier",),
            "yarn_log_multiplier is not in the file: mscale 0.707",
        ),
        (
            "deepseek-v3",
            ("rope.scaling.yarn_log_multiplier",),
            "yarn_log_multiplier is not in the file: mscale 1.0",
        ),
        ("kimi-k2-instruct", ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"), None),
        ("deepseek-v3", ("rope.scaling.type", "rope.scaling.factor"), "rope.scaling.type"),
        ("deepseek-v3", ("rope.scaling.original_context_length",), None),
        ("deepseek-v3", ("vocab_size",), None),
        ("deepseek-v3", ("attention.head_count_kv",), None),
    ],
)
def test_a_key_the_file_lacks_comes_from_the_model_identity(name, without, names_key):
    if "rope.scaling.type" in without:
        without = tuple(
            key.removeprefix("deepseek2.") for key in gguf_metadata(published(name)) if "scaling" in key
        )
    config = as_gguf(name, without=without)
    assert config == replace(EXPECTED[name], num_mtp_layers=0)
    assert (names_key is None and not config.notes) or any(names_key in note for note in config.notes), config.notes


def test_a_scale_of_zero_counts_as_missing():
    assert as_gguf("deepseek-v3", expert_weights_scale=0.0).moe.routed_scaling_factor == 2.5


def test_v2_never_normalises_whatever_the_file_says():
    assert as_gguf("deepseek-v2", expert_weights_norm=True) == EXPECTED["deepseek-v2"]
    assert ModelConfig.from_hf(published("deepseek-v2") | {"norm_topk_prob": True}) == EXPECTED["deepseek-v2"]


def test_v2_lite_does_not_look_at_groups():
    config = ModelConfig.from_hf(published("deepseek-v2-lite") | {"n_group": 7, "topk_group": None})
    assert config == EXPECTED["deepseek-v2-lite"]


def test_kimi_and_moonlight_are_known_under_the_model_type_of_v3():
    assert ModelConfig.from_hf(published("kimi-k2-instruct") | {"model_type": "deepseek_v3"}).family == "kimi-k2"
    assert ModelConfig.from_hf(published("moonlight-16b-a3b")).family == "moonlight"
    assert ModelConfig.from_hf(CONFIGS["v3"]).family == "deepseek-v3"


def test_the_table_of_released_models_repeats_their_files():
    files = {"DeepSeek-V2-Lite": "deepseek-v2-lite", "DeepSeek-V2": "deepseek-v2", "DeepSeek-V3": "deepseek-v3"}
    files |= {"Kimi-K2": "kimi-k2-instruct", "Moonlight-16B": "moonlight-16b-a3b", "GLM-4.7-Flash": "glm-4.7-flash"}
    assert {model.title for model in RELEASED} == set(files)
    for model in RELEASED:
        config = EXPECTED[files[model.title]]
        moe = config.moe
        assert (model.family, model.hidden_size, model.num_heads) == (
            config.family,
            config.hidden_size,
            config.mla.num_heads,
        )
        assert (model.num_experts, model.scoring, model.num_groups, model.num_groups_per_tok) == (
            moe.num_experts,
            moe.scoring,
            moe.num_groups,
            moe.num_groups_per_tok,
        )
        assert (model.routed_scaling_factor, model.norm_topk_prob) == (
            moe.routed_scaling_factor,
            moe.norm_topk_prob,
        )
        assert (model.rope_theta, model.yarn) == (config.rope.theta, config.rope.yarn)


def test_rope_parameters_and_rope_scaling_mean_the_same():
    old = published("deepseek-v3")
    new = {key: value for key, value in old.items() if key not in ("rope_scaling", "rope_theta")}
    yarn = {key: value for key, value in old["rope_scaling"].items() if key != "type"}
    new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


def test_yarn_without_mscale_scales_cos_and_sin_and_not_the_softmax():
    values = published("deepseek-v3")
    for key in ("mscale", "mscale_all_dim"):
        del values["rope_scaling"][key]
    config = ModelConfig.from_hf(values)
    assert config.rope.yarn.cos_sin_factor == pytest.approx(1.36889, abs=5e-6)
    assert config.mla.softmax_scale == pytest.approx(192**-0.5, rel=1e-15)


def test_half_split_pairs_are_a_different_model():
    assert ModelConfig.from_hf(CONFIGS["v3-half-split"]).rope.pairing is Pairing.HALF_SPLIT
    assert ModelConfig.from_hf(CONFIGS["v3-half-split"]) != ModelConfig.from_hf(CONFIGS["v3"])


def test_dense_layers_come_from_either_key():
    glm = published("glm-4.7-flash")
    del glm["first_k_dense_replace"]
    assert ModelConfig.from_hf(glm).num_dense_layers == 1
    assert ModelConfig.from_hf(glm | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 44}).num_dense_layers == 3


def test_a_model_without_experts_is_dense_throughout():
    values = {key: value for key, value in CONFIGS["v2-lite"].items() if key != "n_routed_experts"}
    config = ModelConfig.from_hf(values)
    assert config.moe is None and config.num_dense_layers == config.num_layers == 3


def test_tied_embeddings_are_seen_by_the_missing_head():
    config = EXPECTED["deepseek-v3"]
    shapes = shapes_of(config)
    del shapes["output.weight"]
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(published("deepseek-v3"))}
    assert ModelConfig.from_gguf(metadata, shapes).tie_word_embeddings
    assert not ModelConfig.from_gguf(metadata, shapes_of(config)).tie_word_embeddings


def test_without_an_identity_the_choice_bias_decides_the_scores():
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(CONFIGS["v3"])}
    del metadata["deepseek2.expert_gating_func"]
    shapes = shapes_of(ModelConfig.from_hf(CONFIGS["v3"]))
    assert ModelConfig.from_gguf(metadata, shapes).moe == ModelConfig.from_hf(CONFIGS["v3"]).moe
    unbiased = {name: shape for name, shape in shapes.items() if "exp_probs_b" not in name}
    moe = ModelConfig.from_gguf(metadata, unbiased).moe
    assert (moe.scoring, moe.has_choice_bias, moe.norm_topk_prob) == (Scoring.SOFTMAX, False, False)


def test_a_released_model_without_its_choice_bias_expects_it():
    shapes = {
        name: shape for name, shape in shapes_of(EXPECTED["deepseek-v3"]).items() if "exp_probs_b" not in name
    }
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(published("deepseek-v3"))}
    assert ModelConfig.from_gguf(metadata, shapes).moe.has_choice_bias


@pytest.mark.parametrize(
    ("block_count", "declared", "stored"), [(62, 1, [61]), (61, 1, [61]), (62, 1, []), (62, None, [61])]
)
def test_mtp_layers_are_counted_apart(block_count, declared, stored):
    """Newer files count them in block_count, older ones do not; some are stripped of the tensors."""
    shapes = shapes_of(EXPECTED["deepseek-v3"])
    shapes |= {f"blk.{layer}.nextn.eh_proj.weight": (7168, 14336) for layer in stored}
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(published("deepseek-v3"))}
    metadata["deepseek2.block_count"] = block_count
    if declared is not None:
        metadata["deepseek2.nextn_predict_layers"] = declared
    config = ModelConfig.from_gguf(metadata, shapes)
    assert (config.num_layers, config.num_mtp_layers) == (61, 1)
    assert config == EXPECTED["deepseek-v3"]


@pytest.mark.parametrize(("stored", "declared"), [([30], 1), ([61], 2), ([59, 61], 2)])
def test_mtp_layers_elsewhere_are_refused(stored, declared):
    shapes = shapes_of(EXPECTED["deepseek-v3"])
    shapes |= {f"blk.{layer}.nextn.eh_proj.weight": (7168, 14336) for layer in stored}
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(published("deepseek-v3"))}
    metadata |= {"deepseek2.block_count": 62, "deepseek2.nextn_predict_layers": declared}
    with pytest.raises(ModelFileError, match=r"block_count|nextn_predict_layers"):
        ModelConfig.from_gguf(metadata, shapes)


YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "deepseek_v32"}, "deepseek_v32.*deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite"),
        ({"model_type": "llama"}, "llama"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"index_topk": 2048}, "index_topk is 2048"),
        ({"index_n_heads": 64}, "index_n_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "rope_parameters.rope_type is 'llama3'"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "attention_factor is 1.2"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.from_hf(published("deepseek-v3") | change)


@pytest.mark.parametrize(
    "change", [{"scoring_func": "sigmoid"}, {"topk_method": "noaux_tc"}, {"rope_interleave": False}]
)
def test_v2_is_not_v3(change):
    with pytest.raises(UnsupportedModel, match=next(iter(change))):
        ModelConfig.from_hf(published("deepseek-v2") | change)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("hidden_size", "num_hidden_layers", "kv_lora_rank", "v_head_dim", "vocab_size")),
        *(
            (key, 0)
            for key in ("hidden_size", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "n_routed_experts")
        ),
        ("num_attention_heads", -1),
        ("hidden_size", 2**40),
        ("num_hidden_layers", 10**6),
        ("n_routed_experts", 10**6),
        ("num_experts_per_tok", 257),
        ("num_experts_per_tok", 0),
        ("n_group", 7),
        ("n_group", None),
        ("topk_group", 9),
        ("qk_rope_head_dim", 63),
        ("qk_head_dim", 200),
        ("vocab_size", "129280"),
        ("vocab_size", 129280.0),
        ("vocab_size", True),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", math.inf),
        ("rope_theta", "10000"),
        ("routed_scaling_factor", math.nan),
        ("norm_topk_prob", 1),
        ("first_k_dense_replace", 62),
        ("mlp_layer_types", ["dense"]),
        ("rope_scaling", [1]),
        ("hidden_act", 3),
    ],
)
def test_a_value_that_cannot_be_right_names_its_key(key, value):
    with pytest.raises(ModelFileError, match="expected") as caught:
        ModelConfig.from_hf(published("deepseek-v3") | {key: value}, file="some/config.json")
    assert caught.value.where == key
    assert str(caught.value).startswith(f"some/config.json: {key}:")


def test_too_few_experts_in_the_chosen_groups():
    with pytest.raises(ModelFileError, match="enough groups of 2 experts to choose 8 from, got 2"):
        ModelConfig.from_hf(published("deepseek-v3") | {"n_group": 128, "topk_group": 2})


def test_groups_of_one_expert_have_no_sum_of_two():
    alone = "groups of at least 2 of the 256 experts, by whose sum they rank, got 256"
    with pytest.raises(ModelFileError, match=f"n_group: expected {alone}"):
        ModelConfig.from_hf(published("deepseek-v3") | {"n_group": 256, "topk_group": 8})
    with pytest.raises(ModelFileError, match=f"expert_group_count: expected {alone}"):
        as_gguf("deepseek-v3", expert_group_count=256, expert_group_used_count=8)
    # V2 ranks groups by their maximum
    v2 = ModelConfig.from_hf(published("deepseek-v2") | {"n_group": 160, "topk_group": 6})
    assert v2.moe is not None and v2.moe.num_groups == 160


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 10**6),
        ("embedding_length", 0),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 7),
        ("attention.kv_lora_rank", 0),
        ("attention.q_lora_rank", 0),
        ("attention.key_length", 192),
        ("attention.value_length", 128),
        ("attention.key_length_mla", 64),
        ("attention.value_length_mla", 0),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("rope.dimension_count", 33),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", -40.0),
        ("rope.scaling.factor", None),
        ("expert_count", 0),
        ("expert_count", 10**6),
        ("expert_count", None),
        ("expert_used_count", 257),
        ("expert_used_count", 0),
        ("expert_group_count", 7),
        ("expert_group_used_count", 9),
        ("expert_feed_forward_length", 0),
        ("feed_forward_length", [18432] * 61),
        ("leading_dense_block_count", 62),
        ("context_length", 0),
        ("vocab_size", 0),
        ("nextn_predict_layers", 61),
    ],
)
def test_gguf_metadata_that_cannot_be_right_names_its_key(key, value):
    metadata = {"general.architecture": "deepseek2", **gguf_metadata(published("deepseek-v3"))}
    metadata[f"deepseek2.{key}"] = value
    with pytest.raises(ModelFileError, match="expected") as caught:
        ModelConfig.from_gguf(metadata, shapes_of(EXPECTED["deepseek-v3"]), file="model.gguf")
    assert caught.value.where == f"deepseek2.{key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_gating_func", 4),
        ("attention.temperature_scale", 0.1),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.type", "linear"),
        ("rope.scaling.yarn_attn_factor", 0.5),
        ("rope.scaling.yarn_ext_factor", 0.0),
    ],
)
def test_gguf_options_that_are_not_implemented_are_refused(key, value):
    with pytest.raises(UnsupportedModel, match=key):
        as_gguf("deepseek-v3", **{key.replace(".", "__"): value})


def test_softmax_with_a_choice_bias_is_refused():
    with pytest.raises(UnsupportedModel, match="expert_gating_func"):
        as_gguf("deepseek-v3", expert_gating_func=1)


@pytest.mark.parametrize("architecture", ["llama", "deepseek32", "", None])
def test_another_architecture_is_named_with_what_runs(architecture):
    with pytest.raises(UnsupportedModel, match=rf"'{architecture or ''}'; kvfold runs deepseek2"):
        ModelConfig.from_gguf({"general.architecture": architecture}, {})


def test_float32_of_a_gguf_is_read_as_the_decimal_it_was_written_from():
    import numpy as np

    stored = {"attention__layer_norm_rms_epsilon": float(np.float32(1e-6)), "expert_weights_scale": np.float32(2.5)}
    stored["rope__scaling__yarn_log_multiplier"] = float(np.float32(0.1))
    assert as_gguf("deepseek-v3", **stored) == replace(EXPECTED["deepseek-v3"], num_mtp_layers=0)
