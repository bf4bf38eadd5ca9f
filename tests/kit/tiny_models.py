"""Tiny models of every family, as transformers runs them, as Hugging Face directories and as GGUF files.

The weights of one (name, seed) are the same numbers whichever way they are written. A GGUF file carries the keys and
tensors that llama.cpp's converter writes for architecture `deepseek2`, so llama.cpp loads it as well.

Weights are scaled so that a test can fail: attention scores have a standard deviation of 1.5 to 3 and router logits of
2 (neither softmax nor top-k is flat), norm weights spread around 1, rows differ in size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from kvfold.config import ModelConfig
from kvfold.formats.tensor_names import KvLayout, expected_tensors

Array = NDArray[np.float32]

# Byte-level vocabulary of 256, one merged token, end and begin of text, and a few unused ones.
VOCAB_SIZE = 272

_V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 258,
    "eos_token_id": 257,
}
_V3: dict[str, Any] = _V2 | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
}


def _yarn(mscale: float) -> dict[str, Any]:
    # Trained length 96, so that prompts of 300 tokens lie beyond it. Real ramps: of 16 rotary dims at theta 10,000 the
    # first pair turns 15 times in 96 tokens, the last 0.005 times.
    return {
        "max_position_embeddings": 3840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 96,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale,
        },
    }


# Dims are multiples of 32 unless the name says odd, so that Q8_0 and the other 32-weight blocks fit every matrix.
CONFIGS: dict[str, dict[str, Any]] = {
    "v2-lite": _V2,
    "v2-lite-yarn": _V2 | _yarn(0.707),
    # hidden_size: transformers wants a multiple of the heads here
    "v2": _V2
    | {
        "hidden_size": 160,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 96,
        "kv_lora_rank": 96,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "v3": _V3,
    "v3-yarn": _V3 | _yarn(1.0),
    "v3-half-split": _V3 | {"rope_interleave": False},
    "v3-tied": _V3 | {"tie_word_embeddings": True},
    # no dimension a power of two, five heads, one expert per group chosen of few
    "v3-odd": _V3
    | {
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 40,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 12,
        "v_head_dim": 20,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 2,
    },
    # GLM-4.7-Flash: v_head_dim is wider than qk_nope_head_dim, as 256 is than 192
    "glm4-moe-lite": {
        key: value
        for key, value in _V3.items()
        if key not in ("first_k_dense_replace", "topk_method", "scoring_func", "rope_theta")
    }
    | {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
        "rms_norm_eps": 1e-5,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


@dataclass(frozen=True)
class TinyModel:
    """config: a Hugging Face config.json. weights: float32 by canonical name, experts as [E, rows, cols], kv_b whole."""

    config: dict[str, Any]
    weights: dict[str, Array]

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.config)


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> TinyModel:
    """CONFIGS[name] with keys overridden, and random weights. Only numpy."""
    config = json.loads(json.dumps(CONFIGS[name] | overrides))
    rng = np.random.default_rng([seed, *name.encode()])
    specs = expected_tensors(ModelConfig.from_hf(config), KvLayout.KV_B)
    weights = {spec.name: _random_weight(spec.name, spec.shape, rng) for spec in specs}
    if config["tie_word_embeddings"]:  # rows of norm 1 as in an untied head, so that logits stay of order 1
        weights["token_embd.weight"] /= np.float32(math.sqrt(config["hidden_size"]))
    return TinyModel(config, weights)


def _random_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if name.endswith("exp_probs_b.bias"):
        return rng.normal(0.0, 0.15, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    kind = name.split(".")[-2]
    gain = {"attn_q": 2.0, "attn_q_b": 2.0, "ffn_gate_inp": 2.0, "token_embd": math.sqrt(shape[-1])}.get(kind, 1.0)
    rows = np.exp(rng.normal(0.0, 0.3, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * rows * (gain / math.sqrt(shape[-1]))).astype(np.float32)


def hf_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model (float32, eager attention, eval) that holds exactly the weights of `tiny_model`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = tiny_model(name, seed, **overrides)
    settings = {key: value for key, value in tiny.config.items() if key != "model_type"}
    config = AutoConfig.for_model(tiny.config["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    state = {key: torch.from_numpy(value) for key, value in _in_memory_state(tiny).items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def _in_memory_state(tiny: TinyModel) -> dict[str, Array]:
    """Names as transformers holds them: all experts of a layer in gate_up_proj [E, 2I, hidden] and down_proj."""
    state: dict[str, Array] = {}
    for spec in expected_tensors(tiny.model_config, KvLayout.KV_B):  # gate comes before up
        weight, fused = tiny.weights[spec.name], spec.fused
        if fused is None:
            state[spec.hf_names[0]] = weight
        elif fused.part == 0:
            state[fused.hf_name] = weight
        else:
            state[fused.hf_name] = np.concatenate([state[fused.hf_name], weight], axis=1)
    return state


def from_hf_model(model: Any) -> TinyModel:
    """The weights of a transformers model under canonical names."""
    config = model.config.to_dict()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    weights: dict[str, Array] = {}
    for spec in expected_tensors(ModelConfig.from_hf(config), KvLayout.KV_B):
        if spec.fused is None:
            weights[spec.name] = state[spec.hf_names[0]]
        else:
            weights[spec.name] = np.split(state[spec.fused.hf_name], spec.fused.parts, axis=1)[spec.fused.part]
    return TinyModel(config, weights)


def _tiny(model: Any) -> TinyModel:
    return model if isinstance(model, TinyModel) else from_hf_model(model)


# --- Hugging Face directories ----------------------------------------------------------------------------------------

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FP8_BLOCK = 128


def write_hf_dir(
    model: Any, path: Path, *, dtype: str = "float32", shards: int = 1, fused: bool = False, tokenizer: bool = False
) -> Path:
    """config.json and safetensors with the names of released checkpoints.

    dtype: float32, float16, bfloat16, or float8_e4m3fn with `weight_scale_inv` in blocks of 128 x 128 for the matrices
    that DeepSeek-V3 stores so (all but embedding, head and router). fused: experts as transformers holds them.
    """
    tiny = _tiny(model)
    config = tiny.model_config
    if fused:
        tensors = _in_memory_state(tiny)
    else:
        tensors = {}
        for spec in expected_tensors(config, KvLayout.KV_B):
            weight = tiny.weights[spec.name]
            parts = [weight] if len(spec.hf_names) == 1 and weight.ndim < 3 else list(weight)
            tensors |= dict(zip(spec.hf_names, parts, strict=True))

    written: dict[str, NDArray[Any]] = {}
    for name, weight in tensors.items():
        if dtype == "float8_e4m3fn":
            written |= _fp8(name, weight)
        else:
            bias = name.endswith("e_score_correction_bias")  # float32 in released checkpoints of every dtype
            written[name] = weight if bias else weight.astype(_DTYPES[dtype])

    path.mkdir(parents=True, exist_ok=True)
    described = dict(tiny.config)
    if dtype == "float8_e4m3fn":
        described["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    (path / "config.json").write_text(json.dumps(described, indent=2))
    names = list(written)
    files = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        files |= dict.fromkeys(part, file)
        save_file({name: written[name] for name in part}, path / file, {"format": "pt"})
    if shards > 1:
        total = sum(array.nbytes for array in written.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        _write_tokenizer_json(path / "tokenizer.json")
    return path


def _fp8(name: str, weight: Array) -> dict[str, NDArray[Any]]:
    if weight.ndim != 2 or name in ("model.embed_tokens.weight", "lm_head.weight") or name.endswith(".gate.weight"):
        bias = name.endswith("e_score_correction_bias")
        return {name: weight if bias else weight.astype(ml_dtypes.bfloat16)}
    rows, cols = weight.shape
    scale = np.zeros((-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)), np.float32)
    stored = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(scale.shape):
        block = np.s_[i * FP8_BLOCK : (i + 1) * FP8_BLOCK, j * FP8_BLOCK : (j + 1) * FP8_BLOCK]
        scale[i, j] = np.abs(weight[block]).max() / 448.0  # the largest e4m3 number
        stored[block] = (weight[block] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale}


# --- vocabulary ------------------------------------------------------------------------------------------------------


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges) of the smallest vocabulary llama.cpp accepts."""
    tokens = [*_byte_characters(), "ab", "<eos>", "<bos>"]
    types = [int(gguf.TokenType.NORMAL)] * 257 + [int(gguf.TokenType.CONTROL)] * 2
    unused = VOCAB_SIZE - len(tokens)
    return (
        tokens + [f"<unused{i}>" for i in range(unused)],
        types + [int(gguf.TokenType.UNUSED)] * unused,
        ["a b"],
    )


def chat_keys(template: str) -> dict[str, Any]:
    """GGUF keys of a model that converses: DeepSeek's markers in place of unused tokens, and a chat template."""
    tokens, types, _ = vocabulary()
    control, user_defined = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)
    marks = {
        259: ("<｜User｜>", control),
        260: ("<｜Assistant｜>", control),
        261: ("<think>", user_defined),
        262: ("</think>", user_defined),
        263: ("<｜end▁of▁sentence｜>", control),
    }
    for id, (text, kind) in marks.items():
        tokens[id], types[id] = text, kind
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": 263,
        "tokenizer.chat_template": template,
    }


def _write_tokenizer_json(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types, _ = vocabulary()
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind != gguf.TokenType.NORMAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(path))


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_metadata(config: Mapping[str, Any], *, legacy: bool = False) -> dict[str, Any]:
    """The `deepseek2.*` keys llama.cpp's converter writes for a config.json.

    legacy: as before the absorbed layout (April 2025): heads in key_length, as many K and V heads as query heads. The
    group counts, which real files of that age lack, are written always: nobody knows a tiny model's by its shape.
    int is written as uint32, float as float32.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kv_lora, rope_dim = config["kv_lora_rank"], config["qk_rope_head_dim"]
    qk, v = config["qk_nope_head_dim"] + rope_dim, config["v_head_dim"]
    dense = config.get("first_k_dense_replace")
    if dense is None:
        dense = config["mlp_layer_types"].count("dense")
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_attention_heads"] if legacy else 1,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta")),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "expert_used_count": config["num_experts_per_tok"],
        "leading_dense_block_count": dense,
        "vocab_size": config["vocab_size"],
        "attention.kv_lora_rank": kv_lora,
        "attention.key_length": qk if legacy else kv_lora + rope_dim,
        "attention.value_length": v if legacy else kv_lora,
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "rope.dimension_count": rope_dim,
    }
    if config["q_lora_rank"] is not None:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if not legacy:
        keys |= {"attention.key_length_mla": qk, "attention.value_length_mla": v}
    if config.get("n_group") is not None:
        keys |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    is_softmax = config["model_type"] == "deepseek_v2"
    gating = gguf.ExpertGatingFuncType.SOFTMAX if is_softmax else gguf.ExpertGatingFuncType.SIGMOID
    keys["expert_gating_func"] = int(gating)
    if rope.get("rope_type", rope.get("type")) == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
        if not legacy:
            keys |= {
                "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
                "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
            }
    return {f"deepseek2.{key}": value for key, value in keys.items()}


def split_kv_b(kv_b: Array, config: ModelConfig) -> tuple[Array, Array]:
    """kv_b [H * (nope + v), kv_lora] -> k_b [H, kv_lora, nope] and v_b [H, v, kv_lora]."""
    mla = config.mla
    heads = kv_b.reshape(mla.num_heads, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
    k_b = np.ascontiguousarray(heads[:, : mla.qk_nope_head_dim].transpose(0, 2, 1))
    return k_b, np.ascontiguousarray(heads[:, mla.qk_nope_head_dim :])


def gguf_tensors(
    model: Any, *, layout: KvLayout = KvLayout.K_B_V_B, include_both: bool = False, flat: bool = False
) -> dict[str, Array]:
    """Float32 tensors under GGUF names. flat: k_b and v_b as matrices [H * rows, cols], as early converters wrote."""
    tiny = _tiny(model)
    config = tiny.model_config
    tensors: dict[str, Array] = {}
    for name, weight in tiny.weights.items():
        if not name.endswith("attn_kv_b.weight"):
            tensors[name] = weight
            continue
        if layout is KvLayout.KV_B or include_both:
            tensors[name] = weight
        if layout is KvLayout.K_B_V_B or include_both:
            k_b, v_b = split_kv_b(weight, config)
            if flat:
                k_b, v_b = k_b.reshape(-1, k_b.shape[-1]), v_b.reshape(-1, v_b.shape[-1])
            tensors |= {name.replace("kv_b", "k_b"): k_b, name.replace("kv_b", "v_b"): v_b}
    return tensors


def write_gguf(
    model: Any,
    path: Path,
    *,
    layout: KvLayout = KvLayout.K_B_V_B,
    ftype: str = "F32",
    include_both: bool = False,
    flat: bool = False,
    legacy_keys: bool | None = None,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
    architecture: str = "deepseek2",
) -> Path:
    """A GGUF file of a TinyModel or a transformers model, tokenizer included.

    legacy_keys: metadata from before the absorbed layout; by default with a file that has only kv_b.
    keys, tensors: replace, add, or (None) leave out. Vectors and the router stay F32, as llama.cpp keeps them; a matrix
    whose columns are no multiple of the block is written in F16.
    """
    tiny = _tiny(model)
    assert tiny.config.get("rope_interleave", True), "GGUF has no key for half-split rotary pairs"
    legacy = (layout is KvLayout.KV_B and not include_both) if legacy_keys is None else legacy_keys
    metadata = {"general.name": "tiny", **gguf_metadata(tiny.config, legacy=legacy)}
    token_list, token_types, merges = vocabulary()
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": token_list,
        "tokenizer.ggml.token_type": token_types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 257,
    }
    metadata |= dict(keys or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            _add_key(writer, key, value)
    wanted = gguf.GGMLQuantizationType[ftype]
    stored: dict[str, Any] = gguf_tensors(tiny, layout=layout, include_both=include_both, flat=flat)
    for name, weight in (stored | dict(tensors or {})).items():
        if weight is None:
            continue
        kind = wanted
        if weight.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            kind = gguf.GGMLQuantizationType.F32
        elif weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
