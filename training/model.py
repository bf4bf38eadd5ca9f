"""The storyteller: DeepSeek-V2-Lite's network at 1/600 of its size, written for training.

Owns the architecture, its parameters (named and laid out as the GGUF file has them) and the loss. Never reads files.
Checked against transformers' DeepseekV2ForCausalLM by training/evaluate.py.

Shapes: B rows, T tokens, H heads, E experts, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.quantize import fake_quant


@dataclass(frozen=True)
class StorytellerConfig:
    vocab_size: int = 4096
    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 4
    q_lora_rank: int = 192
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 1280  # dense first layer
    moe_intermediate_size: int = 96
    num_experts: int = 8
    num_experts_per_token: int = 4
    num_shared_experts: int = 3
    # softmax over 8 experts gives each of the 4 chosen about 0.125..0.25 and norm_topk_prob is False: times 4
    # brings a chosen expert near the weight 1 of a shared one.
    routed_scaling_factor: float = 4.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    dropout: float = 0.0
    quantized: bool = True


def weight_type(name: str) -> str:
    """The block type a tensor has in the file. Norms and the router stay F32: 0.3 % of the bytes, and sensitive."""
    if "norm" in name or "gate_inp" in name:
        return "F32"
    # the embedding is also the output head, whose every row is compared with every other: one more bit
    return "Q5_0" if name.startswith("token_embd") else "IQ4_NL"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def rope_tables(config: StorytellerConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, rope/2] of interleaved pairs."""
    pairs = torch.arange(0, config.qk_rope_head_dim, 2, device=device, dtype=torch.float32)
    inverse = 1.0 / config.rope_theta ** (pairs / config.qk_rope_head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, rope]: element pairs (2i, 2i+1) turned by the angle of their position."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """One layer: MLA, then a dense feed-forward or shared plus routed experts."""

    def __init__(self, config: StorytellerConfig, dense: bool) -> None:
        super().__init__()
        c, self.config, self.dense = config, config, dense
        d, heads = c.hidden_size, c.num_heads

        def matrix(*shape: int, zero: bool = False) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape) * 0.5 * shape[-1] ** -0.5)

        def ones(size: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(size))

        self.attn_norm, self.ffn_norm = ones(d), ones(d)
        self.attn_q_a, self.attn_q_a_norm = matrix(c.q_lora_rank, d), ones(c.q_lora_rank)
        self.attn_q_b = matrix(heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank)
        self.attn_kv_a_mqa = matrix(c.kv_lora_rank + c.qk_rope_head_dim, d)
        self.attn_kv_a_norm = ones(c.kv_lora_rank)
        # kv_b in the file's layout, so that its quantization blocks are the file's: k_b runs along nope, v_b along lora
        self.attn_k_b = nn.Parameter(
            torch.randn(heads, c.kv_lora_rank, c.qk_nope_head_dim) * 0.5 * c.kv_lora_rank**-0.5
        )
        self.attn_v_b = matrix(heads, c.v_head_dim, c.kv_lora_rank)
        self.attn_output = matrix(d, heads * c.v_head_dim, zero=True)
        if dense:
            self.ffn_gate, self.ffn_up = matrix(c.intermediate_size, d), matrix(c.intermediate_size, d)
            self.ffn_down = matrix(d, c.intermediate_size, zero=True)
        else:
            m, shared = c.moe_intermediate_size, c.moe_intermediate_size * c.num_shared_experts
            self.ffn_gate_inp = nn.Parameter(torch.randn(c.num_experts, d) * 0.02)
            self.ffn_gate_exps, self.ffn_up_exps = matrix(c.num_experts, m, d), matrix(c.num_experts, m, d)
            self.ffn_down_exps = matrix(c.num_experts, d, m, zero=True)
            self.ffn_gate_shexp, self.ffn_up_shexp = matrix(shared, d), matrix(shared, d)
            self.ffn_down_shexp = matrix(d, shared, zero=True)

    def w(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        return fake_quant(weight, weight_type(name)) if self.config.quantized else weight

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        q = F.linear(
            rms_norm(F.linear(x, self.w("attn_q_a")), self.attn_q_a_norm, c.rms_norm_eps), self.w("attn_q_b")
        )
        q = q.view(batch, length, c.num_heads, -1).transpose(1, 2)  # [B, H, T, 192]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        kv = F.linear(x, self.w("attn_kv_a_mqa"))
        c_kv, k_rope = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        c_kv = rms_norm(c_kv, self.attn_kv_a_norm, c.rms_norm_eps)
        # one product for k_nope [B, T, H * 128] and v [B, T, H * 128]
        kv_b = torch.cat([self.w("attn_k_b").transpose(1, 2).flatten(0, 1), self.w("attn_v_b").flatten(0, 1)])
        k_nope, v = F.linear(c_kv, kv_b).unflatten(-1, (2 * c.num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        k_rope = rotate(k_rope, cos, sin).unsqueeze(1).expand(-1, c.num_heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        if not x.is_cuda:  # the CPU's fused kernel wants one head size: 128 -> 192
            v = F.pad(v, (0, c.qk_rope_head_dim))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : c.v_head_dim]
        return F.linear(out.transpose(1, 2).flatten(2), self.w("attn_output"))

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and the load-balancing loss (0 for the dense layer)."""
        c = self.config
        if self.dense:
            h = F.silu(F.linear(x, self.w("ffn_gate"))) * F.linear(x, self.w("ffn_up"))
            return F.linear(h, self.w("ffn_down")), x.new_zeros((), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.ffn_gate_inp).softmax(dim=-1)  # [B, T, E]
        ids = scores.topk(c.num_experts_per_token, dim=-1).indices
        chosen = torch.zeros_like(scores).scatter(-1, ids, 1.0)
        weights = scores * chosen * c.routed_scaling_factor
        # Switch Transformer eq. 4: experts * sum(share of tokens * mean score), 1 when balanced
        balance = (chosen.mean((0, 1)) / c.num_experts_per_token * scores.mean((0, 1))).sum() * c.num_experts
        # All experts for all tokens, the unchosen times 0: at 96 columns an expert one dense product is faster than
        # gathering, and costs 11 / 7 of the multiply-adds. The shared experts are columns with weight 1.
        gate = torch.cat([self.w("ffn_gate_exps").flatten(0, 1), self.w("ffn_gate_shexp")])
        up = torch.cat([self.w("ffn_up_exps").flatten(0, 1), self.w("ffn_up_shexp")])
        down = torch.cat([self.w("ffn_down_exps").transpose(0, 1).flatten(1), self.w("ffn_down_shexp")], dim=1)
        h = F.silu(F.linear(x, gate)) * F.linear(x, up)
        scale = torch.cat([weights, weights.new_ones(*weights.shape[:-1], c.num_shared_experts)], dim=-1)
        h = (h.unflatten(-1, (-1, c.moe_intermediate_size)) * scale.to(h.dtype).unsqueeze(-1)).flatten(-2)
        return F.linear(h, down), balance

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        x = x + F.dropout(
            self.attention(rms_norm(x, self.attn_norm, c.rms_norm_eps), cos, sin), c.dropout, self.training
        )
        out, balance = self.feed_forward(rms_norm(x, self.ffn_norm, c.rms_norm_eps))
        return x + F.dropout(out, c.dropout, self.training), balance


class Storyteller(nn.Module):
    def __init__(self, config: StorytellerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.02)
        self.blk = nn.ModuleList(Block(config, dense=i == 0) for i in range(config.num_layers))
        self.output_norm = nn.Parameter(torch.ones(config.hidden_size))

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Final normed rows [B, T, D], the tied head [V, D] and the mean balance loss."""
        c = self.config
        embedding = fake_quant(self.token_embd, weight_type("token_embd")) if c.quantized else self.token_embd
        cos, sin = rope_tables(c, tokens.shape[1], tokens.device)
        x = F.dropout(F.embedding(tokens, embedding), c.dropout, self.training)
        total = x.new_zeros((), dtype=torch.float32)
        for block in self.blk:
            x, balance = block(x, cos, sin)
            total = total + balance
        return rms_norm(x, self.output_norm, c.rms_norm_eps), embedding, total / max(1, c.num_layers - 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits float32 [B, T, V]."""
        x, head, _ = self.hidden(tokens)
        return F.linear(x, head.to(x.dtype)).float()

    def gguf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(GGUF name, weight in the file's layout) of every parameter."""
        for name, weight in self.named_parameters():
            yield name + ".weight", weight


def prefer_cudnn_attention() -> None:
    """cuDNN takes heads of 192 for q, k and 128 for v. H200, forward and backward of 64 x 1024 x 4 heads: 1.19 ms;
    the flash kernel, which needs v padded to 192, 2.29 ms."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
