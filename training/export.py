"""Wraps the packed weights and the tokenizer into one GGUF, as llama.cpp's convert_hf_to_gguf lays out `deepseek2`.

    python -m training.export --packed tune.packed.safetensors --tokenizer tokenizer.json --out storyteller.gguf
    python -m training.export --unpack storyteller.gguf --out base.packed.safetensors
    python -m training.export ... --dtype F16 --out storyteller-f16.gguf   # the same weights decoded, for comparisons

Owns metadata keys and tensor names. The packed blocks are written as they are: nothing is quantized here.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from safetensors import safe_open
from safetensors.numpy import save_file

from training.model import StorytellerConfig, weight_type
from training.quantize import decode
from training.tokenizer import BOS_ID, CHAT_TEMPLATE, EOS_ID, SPECIAL_TOKENS

MAX_BYTES = 15 * 1024 * 1024


def write_gguf(packed: Path, tokenizer: Path, out: Path, dtype: str = "packed") -> None:
    """`dtype`: 'packed' (the blocks), or 'F16' / 'F32' (matrices decoded; norms and router stay F32)."""
    with safe_open(str(packed), "np") as file:
        config = StorytellerConfig(**json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    temporary = out.with_suffix(".tmp")
    writer = GGUFWriter(temporary, "deepseek2")
    c = config
    writer.add_name("kvfold storyteller")
    writer.add_description(
        "A very small DeepSeek-V2 model that tells tales and fables. Trained by kvfold/training."
    )
    writer.add_license("apache-2.0")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(1)  # MLA as multi-query attention over the latent
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_token)
    writer.add_expert_shared_count(c.num_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(False)
    writer.add_uint32("deepseek2.expert_gating_func", 1)  # 1 softmax, 2 sigmoid
    writer.add_file_type(25 if dtype == "packed" else {"F16": 1, "F32": 0}[dtype])  # 25: mostly IQ4_NL

    vocabulary = json.loads(tokenizer.read_text())["model"]
    tokens = [t for t, _ in sorted(vocabulary["vocab"].items(), key=lambda item: item[1])]
    types = [TokenType.CONTROL if t in SPECIAL_TOKENS else TokenType.NORMAL for t in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_pad_token_id(EOS_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    for name, array in tensors.items():
        kind = weight_type(name)
        if kind == "F32":
            writer.add_tensor(name, array.astype(np.float32))
        elif dtype == "packed":
            writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[kind])
        else:
            import torch

            weights = decode(torch.from_numpy(array), kind).numpy()
            writer.add_tensor(name, weights.astype(np.float16 if dtype == "F16" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    size = temporary.stat().st_size
    if dtype == "packed" and size > MAX_BYTES:
        raise ValueError(f"{out}: {size} bytes, at most {MAX_BYTES}; shrink StorytellerConfig")
    temporary.rename(out)


def unpack_gguf(gguf_file: Path, out: Path) -> None:
    """The reverse: a shipped file's blocks as a .packed.safetensors, for `train --init`."""
    reader = GGUFReader(gguf_file)
    value = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    config = StorytellerConfig(
        vocab_size=value["deepseek2.vocab_size"],
        hidden_size=value["deepseek2.embedding_length"],
        num_layers=value["deepseek2.block_count"],
        num_heads=value["deepseek2.attention.head_count"],
        q_lora_rank=value["deepseek2.attention.q_lora_rank"],
        intermediate_size=value["deepseek2.feed_forward_length"],
        moe_intermediate_size=value["deepseek2.expert_feed_forward_length"],
        num_experts=value["deepseek2.expert_count"],
        num_experts_per_token=value["deepseek2.expert_used_count"],
        num_shared_experts=value["deepseek2.expert_shared_count"],
        routed_scaling_factor=value["deepseek2.expert_weights_scale"],
    )
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    save_file(tensors, out, {"config": json.dumps(dataclasses.asdict(config))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--unpack", type=Path, help="a GGUF to turn back into --out FILE.packed.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("packed", "F16", "F32"), default="packed")
    args = parser.parse_args()
    if args.unpack:
        unpack_gguf(args.unpack, args.out)
        return
    if not args.packed or not args.tokenizer:
        parser.error("--packed and --tokenizer are needed unless --unpack is given")
    write_gguf(args.packed, args.tokenizer, args.out, args.dtype)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
