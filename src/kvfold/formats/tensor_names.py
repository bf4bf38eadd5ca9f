"""ONE table of tensors: what a model of a given configuration consists of, and what each file format calls it.

Owns names and shapes; never opens a file and never reads a byte of weights. Everything that loads, lists, checks or
writes a checkpoint goes through `expected_tensors`, so a name is spelled once in this project.

Our canonical names are the GGUF names of the `deepseek2` architecture. A shape is written in numpy order, the
contiguous dimension last, which is the order of safetensors and the reverse of the `ne` that GGUF stores.
Letters: E experts, H heads, I expert_intermediate_size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from kvfold.config import ModelConfig


class KvLayout(Enum):
    """The two ways files store the up-projection of the latent (W_UK and W_UV of the paper)."""

    # one matrix [H * (nope + v), kv_lora], rows of head h: [k_nope | v]. Every Hugging Face file, older GGUF files
    KV_B = "kv_b"
    # W_UK already transposed for the absorbed query, [H, kv_lora, nope], beside W_UV [H, v, kv_lora]. Newer GGUF files
    K_B_V_B = "k_b+v_b"


@dataclass(frozen=True)
class FusedPart:
    """A second place where files keep the matrices of all experts: one tensor [E, parts * rows, cols], of which ours
    are the rows from part * rows on.

    llama.cpp's converter joins gate and up on request (`--fuse-gate-up-exps`); transformers holds its weights so.
    """

    gguf_name: str  # empty where GGUF has no name of its own for it
    hf_name: str
    part: int
    parts: int


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a model must have.

    name:     canonical name
    shape:    numpy order: (n,), (rows, cols), or (count, rows, cols) for one matrix per expert or per head
    hf_names: the Hugging Face tensors that hold it: one, or one per expert; empty where that format has no such tensor
    fused:    where else it may be
    """

    name: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    fused: FusedPart | None = None


def expected_tensors(config: ModelConfig, layout: KvLayout) -> list[TensorSpec]:
    """Every tensor a checkpoint of `config` must hold, in file order: embedding, layers, final norm, head.

    With tied embeddings there is no `output.weight`: the head reads `token_embd.weight`.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    specs = [TensorSpec("token_embd.weight", (vocab, hidden), ("model.embed_tokens.weight",))]
    for layer in range(config.num_layers):
        specs += _attention(config, layer, layout)
        specs += _moe(config, layer) if config.is_moe_layer(layer) else _dense(config, layer)
    specs.append(TensorSpec("output_norm.weight", (hidden,), ("model.norm.weight",)))
    if not config.tie_word_embeddings:
        specs.append(TensorSpec("output.weight", (vocab, hidden), ("lm_head.weight",)))
    return specs


def _attention(config: ModelConfig, layer: int, layout: KvLayout) -> list[TensorSpec]:
    mla, hidden = config.mla, config.hidden_size
    heads, nope, v, kv_lora = mla.num_heads, mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    blk, hf = f"blk.{layer}.", f"model.layers.{layer}.self_attn."
    norm = TensorSpec(f"{blk}attn_norm.weight", (hidden,), (f"model.layers.{layer}.input_layernorm.weight",))
    q_rows = heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        query = [TensorSpec(f"{blk}attn_q.weight", (q_rows, hidden), (f"{hf}q_proj.weight",))]
    else:
        q_lora = mla.q_lora_rank
        query = [
            TensorSpec(f"{blk}attn_q_a.weight", (q_lora, hidden), (f"{hf}q_a_proj.weight",)),
            TensorSpec(f"{blk}attn_q_a_norm.weight", (q_lora,), (f"{hf}q_a_layernorm.weight",)),
            TensorSpec(f"{blk}attn_q_b.weight", (q_rows, q_lora), (f"{hf}q_b_proj.weight",)),
        ]
    latent = [
        TensorSpec(f"{blk}attn_kv_a_mqa.weight", (mla.latent_dim, hidden), (f"{hf}kv_a_proj_with_mqa.weight",)),
        TensorSpec(f"{blk}attn_kv_a_norm.weight", (kv_lora,), (f"{hf}kv_a_layernorm.weight",)),
    ]
    if layout is KvLayout.KV_B:
        up = [TensorSpec(f"{blk}attn_kv_b.weight", (heads * (nope + v), kv_lora), (f"{hf}kv_b_proj.weight",))]
    else:
        up = [
            TensorSpec(f"{blk}attn_k_b.weight", (heads, kv_lora, nope), ()),
            TensorSpec(f"{blk}attn_v_b.weight", (heads, v, kv_lora), ()),
        ]
    output = TensorSpec(f"{blk}attn_output.weight", (hidden, heads * v), (f"{hf}o_proj.weight",))
    return [norm, *query, *latent, *up, output]


def _ffn_norm(config: ModelConfig, layer: int) -> TensorSpec:
    hf = f"model.layers.{layer}.post_attention_layernorm.weight"
    return TensorSpec(f"blk.{layer}.ffn_norm.weight", (config.hidden_size,), (hf,))


def _dense(config: ModelConfig, layer: int) -> list[TensorSpec]:
    hidden, wide = config.hidden_size, config.intermediate_size
    blk, hf = f"blk.{layer}.", f"model.layers.{layer}.mlp."
    return [
        _ffn_norm(config, layer),
        TensorSpec(f"{blk}ffn_gate.weight", (wide, hidden), (f"{hf}gate_proj.weight",)),
        TensorSpec(f"{blk}ffn_up.weight", (wide, hidden), (f"{hf}up_proj.weight",)),
        TensorSpec(f"{blk}ffn_down.weight", (hidden, wide), (f"{hf}down_proj.weight",)),
    ]


def _moe(config: ModelConfig, layer: int) -> list[TensorSpec]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None  # is_moe_layer
    experts, wide, shared = moe.num_experts, moe.expert_intermediate_size, moe.shared_intermediate_size
    blk, hf = f"blk.{layer}.", f"model.layers.{layer}.mlp."

    def per_expert(projection: str) -> tuple[str, ...]:
        return tuple(f"{hf}experts.{expert}.{projection}.weight" for expert in range(experts))

    def in_gate_up(part: int) -> FusedPart:
        return FusedPart(f"{blk}ffn_gate_up_exps.weight", f"{hf}experts.gate_up_proj", part, parts=2)

    in_down = FusedPart("", f"{hf}experts.down_proj", part=0, parts=1)
    specs = [
        _ffn_norm(config, layer),
        TensorSpec(f"{blk}ffn_gate_inp.weight", (experts, hidden), (f"{hf}gate.weight",)),
    ]
    if moe.has_choice_bias:
        specs.append(TensorSpec(f"{blk}exp_probs_b.bias", (experts,), (f"{hf}gate.e_score_correction_bias",)))
    specs += [
        TensorSpec(f"{blk}ffn_gate_exps.weight", (experts, wide, hidden), per_expert("gate_proj"), in_gate_up(0)),
        TensorSpec(f"{blk}ffn_up_exps.weight", (experts, wide, hidden), per_expert("up_proj"), in_gate_up(1)),
        TensorSpec(f"{blk}ffn_down_exps.weight", (experts, hidden, wide), per_expert("down_proj"), in_down),
    ]
    if shared:
        hf += "shared_experts."
        specs += [
            TensorSpec(f"{blk}ffn_gate_shexp.weight", (shared, hidden), (f"{hf}gate_proj.weight",)),
            TensorSpec(f"{blk}ffn_up_shexp.weight", (shared, hidden), (f"{hf}up_proj.weight",)),
            TensorSpec(f"{blk}ffn_down_shexp.weight", (hidden, shared), (f"{hf}down_proj.weight",)),
        ]
    return specs


_LAYER = re.compile(r"(?:blk|model\.layers)\.(\d+)\.")
# Tables of angles that converters and old checkpoints store; the configuration defines them already.
_ROPE_TABLE = re.compile(
    r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(?:\.weight)?|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def layer_index(name: str) -> int | None:
    """The layer a tensor belongs to by its name, in either format; None for tensors outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def ignored_reason(name: str, config: ModelConfig) -> str | None:
    """Why a tensor that is not expected may lie in the file unused, as half a sentence; None when it may not.

    Multi-token-prediction layers follow the last layer of the model: index num_layers and up, as many as the
    configuration declares.
    """
    if _ROPE_TABLE.fullmatch(name):
        return "rotary frequencies are computed from the configuration"
    if config.tie_word_embeddings and name == "lm_head.weight":
        return "the head is tied to the embedding"
    layer = layer_index(name)
    if layer is not None and config.num_layers <= layer < config.num_layers + config.num_mtp_layers:
        return f"layer {layer} predicts a further token (MTP) and is not part of the model itself"
    return None
