"""How a ModelConfig is read from a config.json and from GGUF metadata.

Owns the names of the keys, their allowed values, and what a released model is where a file is silent. Opens no file.
Every value is read by name and checked before anything is derived from it: a key that asks for something kvfold does
not run is UnsupportedModel, a value that cannot be right is ModelFileError with file, key, expected and got.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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
from kvfold.errors import ModelFileError, UnsupportedModel

# No dimension of a released model is above 163,840 (Kimi's vocabulary) and no count of experts above 384. The limits
# are what keeps a damaged header from asking for absurd memory, not an opinion on models to come.
LARGEST_DIMENSION = 1 << 24
MOST_LAYERS = 1024
MOST_EXPERTS = 4096

HF_MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
GGUF_ARCHITECTURES = ("deepseek2",)


@dataclass(frozen=True)
class Released:
    """One released model: how it is recognised, and its values for keys that some converters did not write.

    Two models of this list share a shape (DeepSeek-V2-Lite and Moonlight); the choice bias tells them apart.
    """

    family: str
    title: str
    hidden_size: int
    num_heads: int
    num_experts: int
    scoring: Scoring
    num_groups: int
    num_groups_per_tok: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    rope_theta: float
    yarn: YarnConfig | None


# DeepSeek-V2.5 and Coder-V2 are V2 with mscale 1.0; only files converted before either, in May 2024, lack the key.
_YARN_V2 = YarnConfig(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)
_YARN_V3 = YarnConfig(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
_YARN_KIMI = YarnConfig(32.0, 4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)

# Values of the published config.json files (the copies of the tests are in tests/data/configs).
RELEASED = (
    Released("deepseek-v2", "DeepSeek-V2-Lite", 2048, 16, 64, Scoring.SOFTMAX, 1, 1, 1.0, False, 1e4, _YARN_V2),
    Released("deepseek-v2", "DeepSeek-V2", 5120, 128, 160, Scoring.SOFTMAX, 8, 3, 16.0, False, 1e4, _YARN_V2),
    Released("deepseek-v3", "DeepSeek-V3", 7168, 128, 256, Scoring.SIGMOID, 8, 4, 2.5, True, 1e4, _YARN_V3),
    Released("kimi-k2", "Kimi-K2", 7168, 64, 384, Scoring.SIGMOID, 1, 1, 2.827, True, 5e4, _YARN_KIMI),
    Released("moonlight", "Moonlight-16B", 2048, 16, 64, Scoring.SIGMOID, 1, 1, 2.446, True, 5e4, None),
    Released("glm-4.7-flash", "GLM-4.7-Flash", 2048, 20, 64, Scoring.SIGMOID, 1, 1, 1.8, True, 1e6, None),
)


def released_model(
    hidden_size: int, num_heads: int, num_experts: int, scoring: Scoring | None, has_choice_bias: bool
) -> Released | None:
    """The released model of this shape; `scoring` is None where the file does not say."""
    shape = (hidden_size, num_heads, num_experts)
    same = [r for r in RELEASED if (r.hidden_size, r.num_heads, r.num_experts) == shape]
    if scoring is None and len(same) > 1:
        scoring = Scoring.SIGMOID if has_choice_bias else Scoring.SOFTMAX
    return next((r for r in same if scoring in (None, r.scoring)), None)


class _Keys:
    """Typed reads from one mapping. Null counts as missing."""

    def __init__(self, values: Mapping[str, object], file: object, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix

    def get(self, key: str) -> object:
        return self.values.get(self.prefix + key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def wrong(self, key: str, expected: str, got: object) -> ModelFileError:
        return ModelFileError(self.file, f"expected {expected}, got {got!r}.", where=self.prefix + key)

    def unsupported(self, key: str, supported: str, got: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.file}: {self.prefix}{key} is {got!r}; kvfold runs {supported}. This model needs another engine."
        )

    def _missing(self, key: str, expected: str) -> ModelFileError:
        return ModelFileError(
            self.file,
            f"the key is missing, expected {expected}. The file is incomplete: fetch or convert it again.",
            where=self.prefix + key,
        )

    def count(self, key: str, default: int | None = None, *, low: int = 1, high: int = LARGEST_DIMENSION) -> int:
        """An integer from `low` to `high`; without a default the key is required."""
        value = self.get(key)
        expected = f"an integer from {low} to {high}"
        if value is None:
            if default is None:
                raise self._missing(key, expected)
            return default
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise self.wrong(key, expected, value)
        if not low <= int(value) <= high:
            raise self.wrong(key, expected, int(value))
        return int(value)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above zero (`zero`: or zero itself), the shortest decimal of a float32."""
        value = self.get(key)
        expected = "a finite number of at least 0" if zero else "a finite number above 0"
        if value is None:
            if default is None:
                raise self._missing(key, expected)
            return default
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self.wrong(key, expected, value)
        number = float(value)
        if not math.isfinite(number) or number < 0.0 or (number == 0.0 and not zero):
            raise self.wrong(key, expected, number)
        # GGUF stores float32: 1e-6 arrives as 9.999999974752427e-07. The shortest decimal that gives the same
        # float32 is what the converter read, so both formats of one model give the same configuration.
        single = np.float32(min(number, 3e38))
        return float(str(single)) if float(single) == number else number

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.wrong(key, "true or false", value)
        return bool(value)

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string", value)
        return value

    def table(self, key: str) -> Mapping[str, object] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object", value)
        return value


# --- config.json -----------------------------------------------------------------------------------------------------


def read_hf(config: Mapping[str, object], *, file: object, name: str) -> ModelConfig:
    """The body of ModelConfig.from_hf."""
    keys = _Keys(config, file)
    model_type = keys.text("model_type", "")
    if model_type not in HF_MODEL_TYPES:
        raise UnsupportedModel(f"{file}: model_type is {model_type!r}; kvfold runs {', '.join(HF_MODEL_TYPES)}.")
    is_v2 = model_type == "deepseek_v2"
    _refuse_hf_options(keys)

    num_layers = keys.count("num_hidden_layers", high=MOST_LAYERS)
    num_heads = keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", num_heads)
    if kv_heads != num_heads:
        raise keys.unsupported("num_key_value_heads", f"the number of query heads, {num_heads}", kv_heads)
    nope, rope_dim = keys.count("qk_nope_head_dim"), _even(keys, "qk_rope_head_dim")
    qk_head_dim = keys.count("qk_head_dim", nope + rope_dim)
    if qk_head_dim != nope + rope_dim:
        raise keys.wrong("qk_head_dim", f"qk_nope_head_dim + qk_rope_head_dim = {nope + rope_dim}", qk_head_dim)

    rope = _hf_rope(keys, rope_dim, has_pairing=not is_v2)
    mla = MlaConfig(
        num_heads=num_heads,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=keys.count("v_head_dim"),
        kv_lora_rank=keys.count("kv_lora_rank"),
        q_lora_rank=keys.count("q_lora_rank") if keys.has("q_lora_rank") else None,
        softmax_scale=_softmax_scale(qk_head_dim, rope.yarn),
    )
    moe = _hf_moe(keys, is_v2) if keys.has("n_routed_experts") else None
    hidden = keys.count("hidden_size")
    released = moe and released_model(hidden, num_heads, moe.num_experts, moe.scoring, moe.has_choice_bias)
    family = {"deepseek_v2": "deepseek-v2", "deepseek_v3": "deepseek-v3", "kimi_k2": "kimi-k2"}.get(
        model_type, "glm-4.7-flash"
    )
    if released and model_type == "deepseek_v3":  # Kimi and Moonlight also publish themselves under this type
        family = released.family
    return ModelConfig(
        family=family,
        name=name or keys.text("_name_or_path", "") or family,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=num_layers,
        num_dense_layers=_hf_dense_layers(keys, model_type, num_layers) if moe else num_layers,
        max_position=keys.count("max_position_embeddings", high=1 << 31),
        rms_norm_eps=keys.number("rms_norm_eps"),
        mla=mla,
        rope=rope,
        moe=moe,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        num_mtp_layers=keys.count(
            "num_nextn_predict_layers", keys.count("num_mtp_layers", 0, low=0), low=0, high=MOST_LAYERS
        ),
    )


def _refuse_hf_options(keys: _Keys) -> None:
    """Options of these architectures that change the arithmetic and are not implemented."""
    for key in ("attention_bias", "mlp_bias"):
        if keys.flag(key, False):
            raise keys.unsupported(key, "projections without bias", True)
    act = keys.text("hidden_act", "silu")
    if act != "silu":
        raise keys.unsupported("hidden_act", "'silu'", act)
    frequency = keys.count("moe_layer_freq", 1, low=0)
    if frequency != 1:
        raise keys.unsupported("moe_layer_freq", "1 (experts in every layer after the dense ones)", frequency)
    for key in ("index_topk", "index_n_heads"):  # DeepSeek Sparse Attention, V3.2 on
        if keys.has(key):
            raise keys.unsupported(key, "attention over all keys (no sparse index)", keys.get(key))


def _even(keys: _Keys, key: str) -> int:
    value = keys.count(key, low=2)
    if value % 2:
        raise keys.wrong(key, "an even number (rotary pairs)", value)
    return value


def _softmax_scale(qk_head_dim: int, yarn: YarnConfig | None) -> float:
    return math.pow(qk_head_dim, -0.5) * (yarn.softmax_factor if yarn else 1.0)


def _hf_rope(keys: _Keys, rope_dim: int, *, has_pairing: bool) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and the released `rope_scaling` beside `rope_theta`."""
    key = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    values = keys.table(key) or {}
    rope = _Keys(values, keys.file, "")
    theta_in_table = rope.has("rope_theta")
    theta = (rope if theta_in_table else keys).number("rope_theta", 10000.0)
    partial = (rope if rope.has("partial_rotary_factor") else keys).number("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise keys.unsupported("partial_rotary_factor", "1.0: all of qk_rope_head_dim rotates", partial)
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    yarn = None
    if rope_type == "yarn":
        yarn = _hf_yarn(keys, rope)
    elif rope_type != "default":
        raise keys.unsupported(f"{key}.rope_type", "'default' and 'yarn'", rope_type)

    interleaved = keys.flag("rope_interleave", True)
    if not interleaved and not has_pairing:
        raise keys.unsupported("rope_interleave", "DeepSeek-V2 with interleaved pairs, as it is defined", False)
    pairing = Pairing.INTERLEAVED if interleaved else Pairing.HALF_SPLIT
    return RopeConfig(theta=theta, dim=rope_dim, pairing=pairing, yarn=yarn)


def _hf_yarn(keys: _Keys, rope: _Keys) -> YarnConfig:
    original = rope.count(
        "original_max_position_embeddings", keys.count("max_position_embeddings", high=1 << 31), high=1 << 31
    )
    yarn = YarnConfig(
        factor=rope.number("factor"),
        original_max_position=original,
        # transformers reads 0 as "not given" in these two
        beta_fast=rope.number("beta_fast", 32.0, zero=True) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0, zero=True) or 1.0,
        mscale=rope.number("mscale", 0.0, zero=True),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0, zero=True),
    )
    attention_factor = rope.number("attention_factor", yarn.cos_sin_factor)
    if abs(attention_factor - yarn.cos_sin_factor) > 1e-6:
        raise rope.unsupported(
            "attention_factor", f"the factor that follows from mscale, {yarn.cos_sin_factor}", attention_factor
        )
    if not rope.flag("truncate", True):
        raise rope.unsupported("truncate", "True: the correction range in whole dimensions", False)
    return yarn


def _hf_dense_layers(keys: _Keys, model_type: str, num_layers: int) -> int:
    """The dense layers come first: `first_k_dense_replace`, or the list `mlp_layer_types` of newer configurations."""
    # what transformers takes where the key is missing
    default = {"deepseek_v2": 0, "glm4_moe_lite": 1}.get(model_type, 3)
    kinds = keys.get("mlp_layer_types")
    if kinds is None:
        return keys.count("first_k_dense_replace", min(default, num_layers), low=0, high=num_layers)
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        raise keys.wrong("mlp_layer_types", f"{num_layers} times 'dense' or 'sparse'", kinds)
    dense = kinds.count("dense")
    if "sparse" in kinds[:dense]:
        raise keys.unsupported("mlp_layer_types", "dense layers first, then experts", kinds)
    stated = keys.count("first_k_dense_replace", dense, low=0)
    if stated != dense:
        raise keys.wrong("first_k_dense_replace", f"the {dense} dense layers of mlp_layer_types", stated)
    return dense


def _hf_moe(keys: _Keys, is_v2: bool) -> MoeConfig:
    scoring = Scoring.SOFTMAX if is_v2 else Scoring.SIGMOID
    stated = keys.text("scoring_func", scoring.value)
    if stated != scoring.value:
        raise keys.unsupported("scoring_func", f"'{scoring.value}' for this model_type", stated)
    methods = ("greedy", "group_limited_greedy") if is_v2 else ("noaux_tc",)
    method = keys.text("topk_method", methods[0])
    if method not in methods:
        raise keys.unsupported("topk_method", " and ".join(methods) + " for this model_type", method)

    experts = keys.count("n_routed_experts", high=MOST_EXPERTS)
    per_tok = keys.count("num_experts_per_tok", high=experts)
    if method == "greedy":  # V2-Lite: the groups its file may name are not looked at
        groups = groups_per_tok = 1
    else:
        groups, groups_per_tok = keys.count("n_group"), keys.count("topk_group")
    group_score = GroupScore.MAX if is_v2 else GroupScore.TOP2_SUM
    _check_groups(keys, ("n_group", "topk_group"), experts, per_tok, groups, groups_per_tok, group_score)
    width = keys.count("moe_intermediate_size")
    return MoeConfig(
        num_experts=experts,
        num_experts_per_tok=per_tok,
        expert_intermediate_size=width,
        shared_intermediate_size=keys.count("n_shared_experts", 0, low=0, high=MOST_EXPERTS) * width,
        scoring=scoring,
        num_groups=groups,
        num_groups_per_tok=groups_per_tok,
        group_score=group_score,
        # the V2 router never normalises, whatever its file says (transformers, modeling_deepseek_v2)
        norm_topk_prob=False if is_v2 else keys.flag("norm_topk_prob", True),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0 if is_v2 else 2.5),
        has_choice_bias=not is_v2,
    )


def _check_groups(
    keys: _Keys,
    names: tuple[str, str],
    experts: int,
    per_tok: int,
    groups: int,
    groups_per_tok: int,
    group_score: GroupScore,
) -> None:
    """Groups must divide the experts, hold the two that TOP2_SUM adds up, and the chosen ones enough to choose from."""
    if experts % groups:
        raise keys.wrong(names[0], f"a divisor of the {experts} experts", groups)
    if groups > 1 and group_score is GroupScore.TOP2_SUM and experts // groups < 2:
        raise keys.wrong(names[0], f"groups of at least 2 of the {experts} experts, by whose sum they rank", groups)
    if groups_per_tok > groups:
        raise keys.wrong(names[1], f"at most the {groups} groups", groups_per_tok)
    if groups_per_tok * (experts // groups) < per_tok:
        raise keys.wrong(
            names[1], f"enough groups of {experts // groups} experts to choose {per_tok} from", groups_per_tok
        )


# --- GGUF ------------------------------------------------------------------------------------------------------------

_GATING = {1: Scoring.SOFTMAX, 2: Scoring.SIGMOID}  # llama.cpp's numbers; 0 means "not given"


def read_gguf(
    metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], *, file: object
) -> ModelConfig:
    """The body of ModelConfig.from_gguf."""
    general = _Keys(metadata, file)
    architecture = general.text("general.architecture", "")
    if architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedModel(
            f"{file}: general.architecture is {architecture!r}; kvfold runs {', '.join(GGUF_ARCHITECTURES)} (DeepSeek "
            f"V2, V2.5, V3, R1, V3.1, Kimi-K2, Moonlight, GLM-4.7-Flash)."
        )
    keys = _Keys(metadata, file, f"{architecture}.")
    notes: list[str] = []
    if keys.number("attention.temperature_scale", 0.0, zero=True):
        raise keys.unsupported(
            "attention.temperature_scale",
            "attention without temperature tuning",
            keys.get("attention.temperature_scale"),
        )

    block_count = keys.count("block_count", high=MOST_LAYERS)
    num_layers, num_mtp = _gguf_layers(keys, block_count, shapes)
    hidden = keys.count("embedding_length")
    num_heads = keys.count("attention.head_count")
    kv_lora = keys.count("attention.kv_lora_rank")
    rope_dim = _even(keys, "rope.dimension_count")
    qk_head_dim, v_head_dim = _gguf_head_dims(keys, num_heads, kv_lora, rope_dim)

    num_experts = keys.count("expert_count", high=MOST_EXPERTS) if keys.has("expert_count") else 0
    biased = any(name.endswith(".exp_probs_b.bias") for name in shapes)
    gating = keys.count("expert_gating_func", 0, low=0)
    if gating not in (0, *_GATING):
        raise keys.unsupported("expert_gating_func", "1 (softmax) and 2 (sigmoid)", gating)
    released = released_model(hidden, num_heads, num_experts, _GATING.get(gating), biased)
    dense_layers = keys.count("leading_dense_block_count", low=0, high=num_layers)
    if dense_layers < num_layers and not num_experts:
        raise keys.wrong(
            "expert_count", f"experts for the {num_layers - dense_layers} layers after the dense ones", None
        )
    moe = None
    if dense_layers < num_layers:
        moe = _gguf_moe(keys, num_experts, _GATING.get(gating), biased, released, notes)

    rope = _gguf_rope(keys, rope_dim, released, notes)
    mla = MlaConfig(
        num_heads=num_heads,
        qk_nope_head_dim=qk_head_dim - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=v_head_dim,
        kv_lora_rank=kv_lora,
        q_lora_rank=_gguf_q_lora(keys, shapes),
        softmax_scale=_softmax_scale(qk_head_dim, rope.yarn),
    )
    is_v2 = moe is None or moe.scoring is Scoring.SOFTMAX
    family = released.family if released else ("deepseek-v2" if is_v2 else "deepseek-v3")
    return ModelConfig(
        family=family,
        name=general.text("general.name", "") or family,
        vocab_size=_gguf_vocab(keys, shapes),
        hidden_size=hidden,
        intermediate_size=keys.count("feed_forward_length"),
        num_layers=num_layers,
        num_dense_layers=dense_layers,
        max_position=keys.count("context_length", high=1 << 31),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        mla=mla,
        rope=rope,
        moe=moe,
        tie_word_embeddings="output.weight" not in shapes,
        num_mtp_layers=num_mtp,
        notes=tuple(notes),
    )


def _gguf_layers(keys: _Keys, block_count: int, shapes: Mapping[str, object]) -> tuple[int, int]:
    """(layers of the model, MTP layers behind them).

    Newer files count the MTP layers in block_count (llama.cpp: n_layer = block_count - nextn_predict_layers), older
    ones with such tensors do not. The tensors decide where there are any: an MTP layer has `blk.N.nextn.*`.
    """
    declared = keys.count("nextn_predict_layers", 0, low=0, high=block_count - 1)
    pattern = re.compile(r"blk\.(\d+)\.nextn\.")
    stored = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if not stored:
        return block_count - declared, declared
    first, last = min(stored), max(stored)
    if first not in (block_count, block_count - len(stored)) or last - first + 1 != len(stored):
        raise keys.wrong(
            "block_count",
            f"MTP layers (blk.N.nextn.*) behind the last layer, found in {sorted(stored)}",
            block_count,
        )
    if keys.has("nextn_predict_layers") and declared != len(stored):
        raise keys.wrong("nextn_predict_layers", f"{len(stored)}, the MTP layers stored", declared)
    return first, len(stored)


def _gguf_head_dims(keys: _Keys, num_heads: int, kv_lora: int, rope_dim: int) -> tuple[int, int]:
    """(qk_head_dim, v_head_dim). Newer files describe the cache in key_length and the heads in key_length_mla:
    576 and 192 for V3, with head_count_kv 1. Legacy files have the heads in key_length, and head_count_kv of them."""
    if keys.has("attention.key_length_mla"):
        qk, v = keys.count("attention.key_length_mla"), keys.count("attention.value_length_mla")
        stored, latent = keys.count("attention.key_length", kv_lora + rope_dim), kv_lora + rope_dim
        if stored != latent:
            raise keys.wrong("attention.key_length", f"kv_lora_rank + rope.dimension_count = {latent}", stored)
        stored = keys.count("attention.value_length", kv_lora)
        if stored != kv_lora:
            raise keys.wrong("attention.value_length", f"kv_lora_rank = {kv_lora}", stored)
        qk_key, kv_heads = "attention.key_length_mla", 1
    else:
        qk, v = keys.count("attention.key_length"), keys.count("attention.value_length")
        qk_key, kv_heads = "attention.key_length", num_heads
    if qk <= rope_dim:
        raise keys.wrong(qk_key, f"more than the rotary part, rope.dimension_count = {rope_dim}", qk)
    stored = keys.count("attention.head_count_kv", kv_heads)
    if stored not in (1, num_heads):
        raise keys.wrong("attention.head_count_kv", f"1 or the number of heads, {num_heads}", stored)
    return qk, v


def _gguf_q_lora(keys: _Keys, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """None where the query has one matrix: the tensors decide, whatever the key says."""
    if "blk.0.attn_q.weight" in shapes:
        return None
    return keys.count("attention.q_lora_rank")


def _gguf_vocab(keys: _Keys, shapes: Mapping[str, tuple[int, ...]]) -> int:
    embedding = shapes.get("token_embd.weight")
    if keys.has("vocab_size") or not embedding:
        return keys.count("vocab_size")
    return embedding[0]


def _gguf_moe(
    keys: _Keys,
    experts: int,
    scoring: Scoring | None,
    biased: bool,
    released: Released | None,
    notes: list[str],
) -> MoeConfig:
    if scoring is None:
        if released:
            scoring, why = released.scoring, f"as {released.title}"
        else:
            scoring = Scoring.SIGMOID if biased else Scoring.SOFTMAX
            why = f"as the file has {'a' if biased else 'no'} choice bias (exp_probs_b)"
        notes.append(f"{keys.prefix}expert_gating_func is not in the file: {scoring.value}, {why}.")
    is_v2 = scoring is Scoring.SOFTMAX
    if is_v2 and biased:
        raise keys.unsupported("expert_gating_func", "a choice bias (exp_probs_b) with sigmoid scores only", 1)

    def filled(key: str, value: object) -> None:
        origin = f"{value}, as in {released.title}" if released else f"{value}, which changes nothing"
        notes.append(f"{keys.prefix}{key} is not in the file: {origin}.")

    groups = keys.count("expert_group_count", 0, low=0)
    groups_per_tok = keys.count("expert_group_used_count", 0, low=0)
    if not groups or not groups_per_tok:  # older converters did not write them
        groups, groups_per_tok = (released.num_groups, released.num_groups_per_tok) if released else (1, 1)
        if groups > 1:
            filled("expert_group_count", f"{groups} groups of which {groups_per_tok} are used")
    per_tok = keys.count("expert_used_count", high=experts)
    group_score = GroupScore.MAX if is_v2 else GroupScore.TOP2_SUM
    names = ("expert_group_count", "expert_group_used_count")
    _check_groups(keys, names, experts, per_tok, groups, groups_per_tok, group_score)

    scale = keys.number("expert_weights_scale", 0.0, zero=True)
    if not scale:  # missing or 0: llama.cpp then skips the multiplication
        scale = released.routed_scaling_factor if released else 1.0
        filled("expert_weights_scale", scale)
    # Converters write the flag only when it is true, and files of V3 from before it existed have none.
    normalize = keys.flag("expert_weights_norm", bool(released and released.norm_topk_prob))
    if normalize and not is_v2 and not keys.has("expert_weights_norm"):
        filled("expert_weights_norm", True)
    width = keys.count("expert_feed_forward_length")
    return MoeConfig(
        num_experts=experts,
        num_experts_per_tok=per_tok,
        expert_intermediate_size=width,
        shared_intermediate_size=keys.count("expert_shared_count", 0, low=0, high=MOST_EXPERTS) * width,
        scoring=scoring,
        num_groups=groups,
        num_groups_per_tok=groups_per_tok,
        group_score=group_score,
        norm_topk_prob=normalize and not is_v2,  # the V2 router never normalises
        routed_scaling_factor=scale,
        # a released sigmoid model without its bias would run and be wrong: let the loader report it missing
        has_choice_bias=biased or (released is not None and not is_v2),
    )


def _gguf_rope(keys: _Keys, rope_dim: int, released: Released | None, notes: list[str]) -> RopeConfig:
    """GGUF keeps the interleaved pairs of the Hugging Face weights; it has no key for half-split ones."""
    theta = keys.number("rope.freq_base", released.rope_theta if released else 10000.0)
    if not keys.has("rope.freq_base"):
        notes.append(f"{keys.prefix}rope.freq_base is not in the file: {theta}.")
    kind = keys.text("rope.scaling.type", "")
    if kind not in ("", "none", "yarn", "linear"):
        raise keys.unsupported("rope.scaling.type", "'none' and 'yarn'", kind)
    yarn = None
    if kind == "yarn":
        yarn = _gguf_yarn(keys, released, notes)
    elif keys.number("rope.scaling.factor", 1.0, zero=True) not in (0.0, 1.0):
        # llama.cpp takes a factor without a type for linear interpolation
        raise keys.unsupported("rope.scaling.type", "a scaling factor with type 'yarn' only", kind or "missing")
    elif not kind and released and released.yarn:
        yarn = released.yarn
        notes.append(
            f"{keys.prefix}rope.scaling.type is not in the file: YaRN with factor {yarn.factor}, as in {released.title}."
        )
    return RopeConfig(theta=theta, dim=rope_dim, pairing=Pairing.INTERLEAVED, yarn=yarn)


def _gguf_yarn(keys: _Keys, released: Released | None, notes: list[str]) -> YarnConfig:
    known = released.yarn if released else None
    for key in ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor"):
        value = keys.number(key, 1.0, zero=True)
        if value != 1.0:
            raise keys.unsupported(key, "1.0", value)
    if keys.has("rope.scaling.yarn_log_multiplier"):
        # Stored as 0.1 * mscale_all_dim. Ten times 0.0707 is 0.7070000000000001: round to what was multiplied.
        mscale = round(keys.number("rope.scaling.yarn_log_multiplier", zero=True) * 10.0, 9)
    else:
        mscale = known.mscale_all_dim if known else 0.0
        origin = f"mscale {mscale}, as in {released.title}" if known and released else "no mscale"
        notes.append(f"{keys.prefix}rope.scaling.yarn_log_multiplier is not in the file: {origin}.")
    original = known.original_max_position if known else keys.count("context_length", high=1 << 31)
    return YarnConfig(
        factor=keys.number("rope.scaling.factor"),
        original_max_position=keys.count("rope.scaling.original_context_length", original, high=1 << 31),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", known.beta_fast if known else 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", known.beta_slow if known else 1.0),
        # The format has one number for the two keys of config.json. They agree in every released model, so cos and
        # sin get the factor 1; llama.cpp assumes the same of this architecture.
        mscale=mscale,
        mscale_all_dim=mscale,
    )
