"""What a model is, as frozen values. No file is opened here: `from_hf` reads a config.json already parsed,
`from_gguf` a metadata mapping. Every dimension comes from the checkpoint; none is a constant in the code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Pairing(Enum):
    """Which two numbers of a rope vector form one rotated pair."""

    INTERLEAVED = "interleaved"  # (0, 1) (2, 3) ...: V2, V3 (rope_interleave), every GGUF
    HALF_SPLIT = "half_split"  # (0, d/2) (1, d/2 + 1) ...: rope_interleave = False


class Scoring(Enum):
    """How router logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class GroupScore(Enum):
    """How a group of experts is ranked before its experts are."""

    MAX = "max"  # DeepSeek-V2: group_limited_greedy
    TOP2_SUM = "top2_sum"  # DeepSeek-V3: noaux_tc, scores with the bias added


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) with DeepSeek's two mscale keys."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @staticmethod
    def mscale_term(factor: float, mscale: float) -> float:
        """0.1 * mscale * ln(factor) + 1 for factor > 1, else 1 (yarn_get_mscale of the released code)."""
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    @property
    def cos_sin_factor(self) -> float:
        """Multiplier on cos and sin: the ratio of the two terms; 1.36889 at factor 40 when both keys are missing."""
        if self.mscale and self.mscale_all_dim:
            return self.mscale_term(self.factor, self.mscale) / self.mscale_term(self.factor, self.mscale_all_dim)
        return self.mscale_term(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """Multiplier on the softmax scale: mscale(factor, mscale_all_dim)^2, 1.58963 at factor 40 and 0.707."""
        return self.mscale_term(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class RopeConfig:
    theta: float
    dim: int  # qk_rope_head_dim
    pairing: Pairing = Pairing.INTERLEAVED
    yarn: YarnConfig | None = None


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None
    softmax_scale: float  # 1 / sqrt(qk_head_dim), times YarnConfig.softmax_factor
    # q_a_layernorm and kv_a_layernorm use 1e-6 in the reference, whatever rms_norm_eps says
    lora_norm_eps: float = 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: c_kv and k_rope, 512 + 64 in every released model."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoeConfig:
    num_experts: int
    num_experts_per_tok: int
    expert_intermediate_size: int
    shared_intermediate_size: int  # all shared experts as one wide one; 0 without
    scoring: Scoring
    num_groups: int = 1
    num_groups_per_tok: int = 1
    group_score: GroupScore = GroupScore.MAX
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    has_choice_bias: bool = False  # e_score_correction_bias / exp_probs_b


@dataclass(frozen=True)
class ModelConfig:
    family: str  # "deepseek-v2", "deepseek-v3", "kimi-k2", "moonlight", "glm-4.7-flash"
    name: str = field(compare=False)  # what the file calls itself; says nothing about what the model is
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the dense layers
    num_layers: int
    num_dense_layers: int  # the first ones; the rest are MoE
    max_position: int
    rms_norm_eps: float
    mla: MlaConfig
    rope: RopeConfig
    moe: MoeConfig | None
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0  # multi-token-prediction layers the checkpoint declares behind the last one; not run
    # what was filled in or left out while reading, one sentence each
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, file: object = "config.json", name: str = "") -> ModelConfig:
        """Reads a parsed config.json: deepseek_v2, deepseek_v3, kimi_k2 or glm4_moe_lite.

        `file` and `name` only label errors and the result. Raises UnsupportedModel for another architecture or an
        option that is not implemented, ModelFileError for a value that cannot be right.
        """
        from kvfold.config_readers import read_hf

        return read_hf(config, file=file, name=name)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        tensor_shapes: Mapping[str, tuple[int, ...]],
        *,
        file: object = "GGUF",
    ) -> ModelConfig:
        """Reads the metadata of a GGUF file of architecture `deepseek2`.

        `tensor_shapes` (name -> shape in numpy order) decides what metadata cannot: tied embeddings, the choice bias,
        MTP layers. Keys that older converters did not write are filled in by model identity, each with a note.
        Raises UnsupportedModel and ModelFileError as `from_hf` does.
        """
        from kvfold.config_readers import read_gguf

        return read_gguf(metadata, tensor_shapes, file=file)

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.num_dense_layers
