"""Judges a packed model: held-out figures, parity with transformers and llama.cpp, samples.

    python -m training.evaluate heldout --packed tune.packed.safetensors --tokenizer tokenizer.json --data DIR
    python -m training.evaluate parity  --packed tune.packed.safetensors --tokenizer tokenizer.json [--f16 f16.gguf]
    python -m training.evaluate samples --gguf storyteller.gguf --out samples.json

Owns no rule of training. transformers and llama-cpp-python are the oracles and are imported only here.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.model import Storyteller
from training.tokenizer import BOS_ID, SPECIAL_TOKENS, load_tokenizer
from training.train import load_packed, nats_per_token

PARITY_TEXT = (
    "Once upon a time there was a fox who lived at the edge of a great forest. Every morning he went down to the river "
    'to drink, and every morning the old heron said, "Good day, Master Fox!" One day the heron was not there.'
)
STORY_REQUESTS = (
    "Tell me a story.",
    "Tell me a fable about a wolf and a goat.",
    "Tell me a story about a princess and a dragon.",
    "Tell me a bedtime story.",
    "Write a short fable about an ant and a grasshopper.",
    "Tell me a story about a poor fisherman.",
    "Tell me a fable about an owl and a squirrel.",
    "Tell me a story about a little robot.",
    "Tell me a story about a girl named Clara and a star.",
    "Tell me a tale about a king who could not sleep.",
)
CONVERSATIONS = (
    ("Hello!", "Tell me a fable about a fox and a crow.", "What is the moral of this story?", "Make it shorter.",
     "Another one, please."),
    ("Who are you?", "What is 23 times 17?", "Tell me a story about a bear who was afraid of the dark.",
     "The old king had a golden ball, and he kept it in a chest of iron under his bed. One night a thief came in at the "
     "window and carried the ball away to the forest.\n\nWhere did the king keep the golden ball?",
     "Thank you! That was lovely."),
)  # fmt: skip
OPENINGS = (
    "Once upon a time",
    "Far away, in the middle of the sea, there was an island where",
    "A wolf and a lamb met one day by a stream.",
)


def transformers_model(model: Storyteller) -> Any:
    """transformers' DeepseekV2ForCausalLM holding the same weights, float32."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    c = model.config
    theirs = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            moe_intermediate_size=c.moe_intermediate_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads, n_shared_experts=c.num_shared_experts,
            n_routed_experts=c.num_experts, num_experts_per_tok=c.num_experts_per_token, first_k_dense_replace=1,
            routed_scaling_factor=c.routed_scaling_factor, kv_lora_rank=c.kv_lora_rank, q_lora_rank=c.q_lora_rank,
            qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim, qk_nope_head_dim=c.qk_nope_head_dim,
            head_dim=c.qk_rope_head_dim, topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1,
            rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=True,
            attention_bias=False, mlp_bias=False, attn_implementation="eager",
        )
    )  # fmt: skip
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate", "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": model.token_embd, "lm_head.weight": model.token_embd,
             "model.norm.weight": model.output_norm}  # fmt: skip
    for index, block in enumerate(model.blk):
        prefix = f"model.layers.{index}."
        own: dict[str, Tensor] = dict(block.named_parameters())
        state |= {f"{prefix}{names[k]}.weight": w for k, w in own.items() if k in names}
        kv_b = torch.cat([own["attn_k_b"].transpose(1, 2), own["attn_v_b"]], dim=1)  # [H, 128 + 128, 512]
        state[prefix + "self_attn.kv_b_proj.weight"] = kv_b.flatten(0, 1)
        if not block.dense:
            state[prefix + "mlp.experts.gate_up_proj"] = torch.cat(
                [own["ffn_gate_exps"], own["ffn_up_exps"]], dim=1
            )
            state[prefix + "mlp.experts.down_proj"] = own["ffn_down_exps"]
    theirs.load_state_dict({k: v.detach() for k, v in state.items()}, strict=True)
    return theirs.eval()


@torch.no_grad()
def parity(args: argparse.Namespace) -> dict[str, Any]:
    model = load_packed(args.packed)
    tokenizer = load_tokenizer(args.tokenizer)
    ids = [BOS_ID, *tokenizer.encode(PARITY_TEXT, add_special_tokens=False).ids]
    ours = model(torch.tensor([ids]))[0]
    theirs = transformers_model(model)(torch.tensor([ids])).logits[0]
    result: dict[str, Any] = {
        "tokens": len(ids),
        "transformers_max_relative": float((ours - theirs).abs().max() / theirs.abs().max()),
        "transformers_same_top1": bool(torch.equal(ours.argmax(-1), theirs.argmax(-1))),
    }
    if args.f16:
        import llama_cpp

        llama = llama_cpp.Llama(
            str(args.f16),
            n_ctx=2048,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            logits_all=True,
            verbose=False,
        )
        result["llama_cpp_same_tokens"] = llama.tokenize(PARITY_TEXT.encode(), add_bos=True, special=False) == ids
        llama.eval(ids)
        scores = torch.from_numpy(np.array(llama.scores[: len(ids)], np.float32))
        log_ours, log_llama = ours.log_softmax(-1), scores.log_softmax(-1)
        result["llama_cpp_kl_mean"] = float((log_ours.exp() * (log_ours - log_llama)).sum(-1).mean())
        result["llama_cpp_top1_agreement"] = float((ours.argmax(-1) == scores.argmax(-1)).float().mean())
        llama.reset()
        prompt = ids[:5]
        greedy = list(prompt)
        for _ in range(100):
            greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
        stream = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        theirs_greedy = prompt + [next(stream) for _ in range(100)]
        same = next((i for i, (a, b) in enumerate(zip(greedy, theirs_greedy, strict=True)) if a != b), len(greedy))
        result["llama_cpp_same_greedy_tokens"] = f"{same - len(prompt)} of 100"
        result["greedy_text"] = tokenizer.decode(greedy)
    return result


def held_out(args: argparse.Namespace) -> dict[str, Any]:
    """Per source: bits per byte and perplexity per token, windows of 2,048 tokens, at least 1,024 of context.

    `--first N` looks at the first N tokens of each source only: minutes instead of an hour on a busy CPU.
    """
    model = load_packed(args.packed)
    vocabulary = json.loads(args.tokenizer.read_text())["model"]["vocab"]
    token_bytes = np.zeros(len(vocabulary), np.int64)
    for token, index in vocabulary.items():  # byte-level BPE: one character of a token's name is one byte
        token_bytes[index] = 0 if token in SPECIAL_TOKENS else len(token)
    result: dict[str, Any] = {}
    sums = np.zeros(3)
    for path in sorted(args.data.glob("heldout_*.npy")):
        tokens = np.load(path)[: args.first or None]
        nats, count = nats_per_token(model, tokens, 2048, torch.device("cpu"), rows=2)
        size = int(token_bytes[tokens].sum())
        sums += (nats, count, size)
        result[path.stem] = {
            "bpb": nats / math.log(2) / size,
            "perplexity": math.exp(nats / count),
            "tokens": count,
        }
        print(json.dumps({path.stem: result[path.stem]}), flush=True)
    result["all"] = {"bpb": sums[0] / math.log(2) / sums[2], "perplexity": math.exp(sums[0] / sums[1])}
    return result


def samples(args: argparse.Namespace) -> dict[str, Any]:
    """Ten stories asked for, ten turns of two conversations and three openings continued, unedited, by llama.cpp from the
    shipped file; the seed is the sample's place in its list. Nothing else was drawn and left out."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(args.gguf), n_ctx=2048, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )
    settings = {
        "temperature": args.temperature,
        "top_p": 0.95,
        "min_p": 0.05,
        "top_k": 40,
        "repeat_penalty": args.repeat_penalty,
    }

    def answer(messages: list[dict[str, str]], seed: int) -> dict[str, str]:
        choice = llama.create_chat_completion(messages, max_tokens=512, seed=seed, **settings)["choices"][0]
        return {
            "prompt": messages[-1]["content"],
            "text": choice["message"]["content"],
            "finish": choice["finish_reason"],
        }

    result: dict[str, Any] = {"settings": settings, "stories": [], "chats": [], "openings": []}
    for seed, request in enumerate(STORY_REQUESTS, 1):
        result["stories"].append(answer([{"role": "user", "content": request}], seed))
    for conversation in CONVERSATIONS:
        messages: list[dict[str, str]] = []
        for seed, request in enumerate(conversation, 1):
            messages.append({"role": "user", "content": request})
            result["chats"].append(answer(messages, seed))
            messages.append({"role": "assistant", "content": result["chats"][-1]["text"]})
    for seed, opening in enumerate(OPENINGS, 1):
        choice = llama.create_completion(opening, max_tokens=220, seed=seed, **settings)["choices"][0]
        result["openings"].append({"prompt": opening, "text": choice["text"], "finish": choice["finish_reason"]})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("heldout", "parity", "samples"))
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--first", type=int, default=0, help="held-out tokens per source; 0: all")
    parser.add_argument("--f16", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--repeat-penalty", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp: two crawl beside other work")
    args = parser.parse_args()
    result = {"heldout": held_out, "parity": parity, "samples": samples}[args.what](args)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
