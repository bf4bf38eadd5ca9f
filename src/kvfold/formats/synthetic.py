"""Random weights in a named real shape, as a GGUF file or in memory, so that a rig can be tried before 400 GB are
downloaded.

Owns the published shapes, which tensor gets which type, random blocks, and the streamed write. Names and shapes of
the tensors are formats/tensor_names.py; how a block decodes is quant/decode.py, which is measured here, not repeated.

**Random blocks.** Every byte of a quantized tensor comes from a generator of its own chunk (SFC64, seeded by the
file's seed, the tensor and the chunk), so no two chunks are alike and the bytes depend neither on threads nor on the
machine. Only a block's scale is then overwritten, by one of 256 values that this block's own random byte picks: 128
magnitudes from 0.5 to 1.5 times the wanted one, either sign. The sign takes out the mean that most code tables have
(Q4_0: -8..7), which would otherwise grow by sqrt(cols) a layer in every row alike. How large a scale must be is
found by decoding a sample with scale 1, so a type needs one line here: where its blocks keep their scales.

**Sizes.** A matrix row of `cols` weights has a standard deviation of 1 / sqrt(cols), which keeps activations at 1
after a norm; `_distribution` lists the exceptions. Norm weights are 1 +- 0.1, a softmax router is 2 / sqrt(cols), so
that some experts clearly win, and the head 3 / sqrt(cols), so that some tokens do. Measured on DeepSeek-V2-Lite in
IQ4_NL: attention scores of standard deviation 1.2 to 2.3, the residual from 1 to 6 over 27 layers, logits 2.9.

**Types.** One type for all matrices, as users' files have it with these exceptions, `_tensor_type` in this order:
vectors and the router F32; the head (tied embeddings too) Q6_K but for Q8_0; the embedding Q4_K where the type has
less than 3 bits a weight. Rows that are not a whole number of blocks: attn_k_b, whose rows are qk_nope_head_dim = 128
long, Q8_0, everything else what llama.cpp's quantizer falls back to (Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0, ternary
to Q4_0, other types to IQ4_NL; F16 where 32 does not divide the row either). Row-interleaved types (ik_llama.cpp's
_R4, _R8): their standard type for the embedding, whose rows are looked up one by one, and where rows are not whole
groups.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import BinaryIO, cast

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvfold.config import (
    GroupScore,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    Scoring,
    YarnConfig,
)
from kvfold.errors import SettingError
from kvfold.formats.checkpoint import Checkpoint, Vocabulary
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.quant.decode import decode
from kvfold.quant.tensor import QuantTensor
from kvfold.quant.types import TYPES, BlockType, by_name

Progress = Callable[[int, int], None]

# ---------------------------------------------------------------------------------------------------------------
# Shapes


def _mla(
    num_heads: int, q_lora_rank: int | None, yarn: YarnConfig | None, *, nope: int = 128, v: int = 128
) -> MlaConfig:
    """The attention all released models share but for heads, q_lora_rank and (GLM) the widths of a head."""
    rope = 64
    return MlaConfig(
        num_heads=num_heads,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v,
        kv_lora_rank=512,
        q_lora_rank=q_lora_rank,
        softmax_scale=(nope + rope) ** -0.5 * (yarn.softmax_factor if yarn else 1.0),
    )


def _softmax_moe(
    num_experts: int, per_tok: int, size: int, shared: int, *, groups: tuple[int, int] = (1, 1), scale: float
) -> MoeConfig:
    """DeepSeek-V2's router: softmax scores, unnormalised; `groups` are (all, chosen)."""
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_tok,
        expert_intermediate_size=size,
        shared_intermediate_size=shared * size,
        scoring=Scoring.SOFTMAX,
        num_groups=groups[0],
        num_groups_per_tok=groups[1],
        group_score=GroupScore.MAX,
        routed_scaling_factor=scale,
    )


def _sigmoid_moe(
    num_experts: int, per_tok: int, size: int, shared: int, *, groups: tuple[int, int] = (1, 1), scale: float
) -> MoeConfig:
    """DeepSeek-V3's router: sigmoid scores, a bias for the choice, normalised weights."""
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_tok,
        expert_intermediate_size=size,
        shared_intermediate_size=shared * size,
        scoring=Scoring.SIGMOID,
        num_groups=groups[0],
        num_groups_per_tok=groups[1],
        group_score=GroupScore.TOP2_SUM,
        norm_topk_prob=True,
        routed_scaling_factor=scale,
        has_choice_bias=True,
    )


def _yarn(factor: float, mscale: float, beta_fast: float = 32.0) -> YarnConfig:
    return YarnConfig(
        factor=factor, original_max_position=4096, beta_fast=beta_fast, mscale=mscale, mscale_all_dim=mscale
    )


def _shapes() -> Iterator[ModelConfig]:
    """Values of the config.json published with each model; `name` is what `kvfold synth` calls it."""
    yarn = _yarn(40.0, 0.707)
    yield ModelConfig(
        family="deepseek-v2",
        name="deepseek-v2-lite",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_layers=27,
        num_dense_layers=1,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=_mla(16, None, yarn),
        rope=RopeConfig(theta=10000.0, dim=64, yarn=yarn),
        moe=_softmax_moe(64, 6, 1408, 2, scale=1.0),
    )
    yield ModelConfig(
        family="deepseek-v2",
        name="deepseek-v2",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        num_layers=60,
        num_dense_layers=1,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=_mla(128, 1536, yarn),
        rope=RopeConfig(theta=10000.0, dim=64, yarn=yarn),
        moe=_softmax_moe(160, 6, 1536, 2, groups=(8, 3), scale=16.0),
    )
    yarn = _yarn(40.0, 1.0)
    yield ModelConfig(
        family="deepseek-v3",
        name="deepseek-v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_layers=61,
        num_dense_layers=3,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=_mla(128, 1536, yarn),
        rope=RopeConfig(theta=10000.0, dim=64, yarn=yarn),
        moe=_sigmoid_moe(256, 8, 2048, 1, groups=(8, 4), scale=2.5),
    )
    yarn = _yarn(32.0, 1.0, beta_fast=1.0)
    yield ModelConfig(
        family="kimi-k2",
        name="kimi-k2",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        num_layers=61,
        num_dense_layers=1,
        max_position=131072,
        rms_norm_eps=1e-6,
        mla=_mla(64, 1536, yarn),
        rope=RopeConfig(theta=50000.0, dim=64, yarn=yarn),
        moe=_sigmoid_moe(384, 8, 2048, 1, scale=2.827),
    )
    yield ModelConfig(
        family="moonlight",
        name="moonlight-16b",
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        num_layers=27,
        num_dense_layers=1,
        max_position=8192,
        rms_norm_eps=1e-5,
        mla=_mla(16, None, None),
        rope=RopeConfig(theta=50000.0, dim=64),
        moe=_sigmoid_moe(64, 6, 1408, 2, scale=2.446),
    )
    yield ModelConfig(
        family="glm-4.7-flash",
        name="glm-4.7-flash",
        vocab_size=154880,
        hidden_size=2048,
        intermediate_size=10240,
        num_layers=47,
        num_dense_layers=1,
        max_position=202752,
        rms_norm_eps=1e-5,
        mla=_mla(20, 768, None, nope=192, v=256),
        rope=RopeConfig(theta=1000000.0, dim=64),
        moe=_sigmoid_moe(64, 4, 1536, 1, scale=1.8),
    )
    # Ours: DeepSeek-V3's structure and heads, every row a whole number of 256-weight blocks but those of attn_k_b.
    yarn = _yarn(40.0, 1.0)
    yield ModelConfig(
        family="deepseek-v3",
        name="tiny",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_dense_layers=1,
        max_position=163840,
        rms_norm_eps=1e-6,
        mla=_mla(4, 256, yarn),
        rope=RopeConfig(theta=10000.0, dim=64, yarn=yarn),
        moe=_sigmoid_moe(8, 2, 256, 1, groups=(4, 2), scale=2.5),
    )


SHAPES: Mapping[str, ModelConfig] = MappingProxyType({config.name: config for config in _shapes()})


def shape_with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """`config` with only `layers` layers: at most its dense ones first, at least one MoE layer where layers >= 2.

    DeepSeek-V3 (3 dense) with 2 layers: 1 dense + 1 MoE; with 3: 2 + 1; with 5: 3 + 2. Raises SettingError for a
    number of layers that the model does not have.
    """
    if not 1 <= layers <= config.num_layers:
        raise SettingError(
            f"layers = {layers}: {config.name} has {config.num_layers}, so 1 to {config.num_layers}."
        )
    dense = min(config.num_dense_layers, max(1, layers - 1))
    name = config.name if layers == config.num_layers else f"{config.name}-{layers}-layers"
    return replace(config, name=name, num_layers=layers, num_dense_layers=dense)


def named_shape(name: str, layers: int | None = None) -> ModelConfig:
    """One of SHAPES, with only `layers` layers where given. Raises SettingError with the names there are."""
    if name not in SHAPES:
        raise SettingError(f"{name}: there is no such shape; those there are: {', '.join(SHAPES)}.")
    return SHAPES[name] if layers is None else shape_with_layers(SHAPES[name], layers)


# ---------------------------------------------------------------------------------------------------------------
# Random blocks


class _Form(Enum):
    """How a block writes its scale."""

    F16 = "two bytes, little-endian float16"
    # lowest nibble first, in the upper halves of four bytes two apart; the lower halves are scales of sub-blocks
    F16_NIBBLES = "float16 in four upper nibbles"
    E8M0 = "one byte, 2^(byte - 127)"
    E4M3 = "one byte, float8 e4m3 without sign"


@dataclass(frozen=True)
class _Scales:
    """Byte offsets of the scales in one block, or in the mixed block of all interleaved rows.

    d:    what multiplies the codes
    dmin: what is added or taken away besides, one for each d; empty for types without
    """

    d: tuple[int, ...]
    dmin: tuple[int, ...] = ()
    form: _Form = _Form.F16


# ggml-common.h, block_*
_SCALES: Mapping[str, _Scales] = {
    "Q4_0": _Scales((0,)),
    "Q4_1": _Scales((0,), (2,)),
    "Q5_0": _Scales((0,)),
    "Q5_1": _Scales((0,), (2,)),
    "Q6_0": _Scales((0,)),
    "Q8_0": _Scales((0,)),
    "Q2_K": _Scales((80,), (82,)),
    "Q3_K": _Scales((108,)),
    "Q4_K": _Scales((0,), (2,)),
    "Q5_K": _Scales((0,), (2,)),
    "Q6_K": _Scales((208,)),
    "IQ2_XXS": _Scales((0,)),
    "IQ2_XS": _Scales((0,)),
    "IQ2_S": _Scales((0,)),
    "IQ3_XXS": _Scales((0,)),
    "IQ3_S": _Scales((0,)),
    "IQ1_S": _Scales((0,)),
    "IQ1_M": _Scales((49,), form=_Form.F16_NIBBLES),
    "IQ4_NL": _Scales((0,)),
    "IQ4_XS": _Scales((0,)),
    "TQ1_0": _Scales((52,)),
    "TQ2_0": _Scales((64,)),
    "MXFP4": _Scales((0,), form=_Form.E8M0),
    "NVFP4": _Scales((0, 1, 2, 3), form=_Form.E4M3),
    "Q1_0": _Scales((0,)),
    "Q2_0": _Scales((0,)),
}
_FLOATS: Mapping[str, DTypeLike] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Two-bit codes 0, 1, 2 for -1, 0, 1: no writer stores a 3, though it would decode. Bytes of the codes in a block.
_TERNARY_CODES: Mapping[str, slice] = {"TQ2_0": slice(0, 64)}


def _scales(type: BlockType) -> _Scales:
    """Mixed blocks of interleaved rows begin with the scales of all rows, then come their minimums."""
    if not type.standard:
        return _SCALES[type.name]
    one, rows = _SCALES[type.standard], type.interleaved_rows
    width = 1 if one.form is _Form.E8M0 else 2
    d, dmin = (tuple(range(i * width * rows, (i + 1) * width * rows, width)) for i in (0, 1))
    return _Scales(d, dmin if one.dmin else (), one.form)


def _float_dtype(type: BlockType) -> DTypeLike | None:
    return _FLOATS.get(type.standard or type.name)


def synthetic_types() -> tuple[str, ...]:
    """Names of the types `synthesize` accepts, in any case."""
    known = {*_FLOATS, *_SCALES}
    return tuple(type.name for type in TYPES if (type.standard or type.name) in known)


@dataclass(frozen=True)
class _Write:
    """256 values for the byte or the two bytes at `offset` of a block; bits of `kept` stay as they were drawn."""

    offset: int
    values: NDArray[np.uint8] | NDArray[np.uint16]
    kept: int = 0


def _writes(form: _Form, offset: int, scales: NDArray[np.float64]) -> list[_Write]:
    """What puts one of 256 `scales` at `offset`. Forms without a sign take the magnitude."""
    if form is _Form.F16:
        return [_Write(offset, scales.astype("<f2").view("<u2"))]
    if form is _Form.F16_NIBBLES:
        bits = scales.astype("<f2").view("<u2")
        return [_Write(offset + 2 * i, ((bits >> (4 * i) & 15) << 4).astype(np.uint8), kept=0x0F) for i in range(4)]
    if form is _Form.E8M0:
        return [_Write(offset, (np.rint(np.log2(np.abs(scales))) + 127).astype(np.uint8))]
    return [_Write(offset, np.abs(scales).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))]


@dataclass(frozen=True)
class _RandomBlocks:
    """Draws blocks of a quantized type.

    unit_bytes: bytes drawn as one: a block, or the blocks of all interleaved rows
    scales:     per scale, the random byte that picks its value and the writes that put it there
    ternary:    bytes that hold two-bit codes without 3
    """

    unit_bytes: int
    scales: tuple[tuple[int, tuple[_Write, ...]], ...]
    ternary: slice | None = None

    def draw(self, source: np.random.SFC64, count: int) -> NDArray[np.uint8]:
        """uint8 [count * unit_bytes]."""
        total = count * self.unit_bytes
        words = np.asarray(source.random_raw(-(-total // 8)), dtype="<u8")
        blocks = words.view(np.uint8)[:total].reshape(count, self.unit_bytes)
        for pick_at, writes in self.scales:
            picked = blocks[:, pick_at].copy()
            for write in writes:
                values = write.values.take(picked)
                if write.values.itemsize == 2:  # blocks with float16 scales are of even size, their scales aligned
                    blocks.view("<u2")[:, write.offset // 2] = values
                else:
                    blocks[:, write.offset] = blocks[:, write.offset] & write.kept | values
        if self.ternary is not None:
            codes = blocks[:, self.ternary]
            codes ^= (codes & codes >> 1 & 0x55) << 1  # 3 -> 1, the code of 0
        return blocks.reshape(-1)


@dataclass(frozen=True)
class _RandomFloats:
    """Draws floats out of 65,536 quantiles of a normal distribution, one per random 16 bits.

    bits: the quantiles as the unsigned integers of their size: 0.5 GB/s a thread for 16-bit floats, where drawing
          normal numbers and rounding them gives 0.14
    """

    bits: NDArray[np.uint16] | NDArray[np.uint32]

    @property
    def unit_bytes(self) -> int:
        return self.bits.itemsize

    def draw(self, source: np.random.SFC64, count: int) -> NDArray[np.uint8]:
        """uint8 [count * unit_bytes]."""
        words = np.asarray(source.random_raw(-(-count // 4)), dtype="<u8")
        drawn: NDArray[np.uint8] = self.bits[words.view("<u2")[:count]].view(np.uint8)
        return drawn


_Random = _RandomBlocks | _RandomFloats


@cache
def _normal_quantiles() -> NDArray[np.float64]:
    """The 65,536 quantiles (i + 1/2) / 65,536 of N(0, 1): +-4.3 at the ends, standard deviation 1 to 1e-5."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / 65536) for i in range(65536)])


def _scale_levels() -> NDArray[np.float64]:
    """256 factors of mean 0 and root mean square 1: 128 magnitudes spaced evenly from 0.5 to 1.5, either sign."""
    magnitudes = np.linspace(0.5, 1.5, 128)
    levels = np.concatenate([magnitudes, -magnitudes])
    return levels / math.sqrt(float(np.mean(levels**2)))


def _blocks_with_scales(type: BlockType, d: NDArray[np.float64], dmin: NDArray[np.float64]) -> _RandomBlocks:
    """Random blocks whose scales are one of the 256 pairs (d, dmin)."""
    where = _scales(type)
    scales = []
    for i, at in enumerate(where.d):
        writes = _writes(where.form, at, d)
        if where.dmin:
            writes += _writes(where.form, where.dmin[i], dmin)
        scales.append((at, tuple(writes)))
    return _RandomBlocks(type.block_bytes * type.interleaved_rows, tuple(scales), _TERNARY_CODES.get(type.name))


@cache
def _unit_scale(type: BlockType) -> tuple[float, float]:
    """(root mean square of weights with d = 1, the dmin that gives them mean 0 beside d = 1), by decoding a sample.

    65,536 weights give the first to 2 % (256-weight blocks). The sample's seed is fixed, so the answer is constant.
    """
    ones, zeros = np.ones(256), np.zeros(256)
    count = 65536 // (type.block_elements * type.interleaved_rows)

    def sample(d: NDArray[np.float64], dmin: NDArray[np.float64]) -> NDArray[np.float64]:
        raw = _blocks_with_scales(type, d, dmin).draw(np.random.SFC64(0), count)
        return decode(type, raw.reshape(type.interleaved_rows, -1)).astype(np.float64)

    dmin = 0.0
    if _scales(type).dmin:
        dmin = -float(sample(ones, zeros).mean() / sample(zeros, ones).mean())
    return math.sqrt(float(np.mean(sample(ones, dmin * ones) ** 2))), dmin


def _random(type: BlockType, mean: float, std: float) -> _Random:
    """A source of weights of this type. Only float types have a mean other than 0."""
    dtype = _float_dtype(type)
    if dtype is not None:
        values = (mean + std * _normal_quantiles()).astype(dtype)
        return _RandomFloats(values.view(f"<u{values.itemsize}"))
    assert mean == 0.0
    unit, dmin = _unit_scale(type)
    d = _scale_levels() * (std / unit)
    return _blocks_with_scales(type, d, d * dmin)


def random_matrix(type: BlockType, rows: int, cols: int, *, seed: int = 0) -> QuantTensor:
    """Weights of mean 0 and standard deviation 1. `type`: one of synthetic_types(), rows and cols of whole blocks."""
    random = _random(type, 0.0, 1.0)
    raw = random.draw(np.random.SFC64([seed, type.id % 2**32]), rows * type.row_bytes(cols) // random.unit_bytes)
    return QuantTensor("random", type, (rows, cols), raw.reshape(rows, -1))


# ---------------------------------------------------------------------------------------------------------------
# Which tensor gets what


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # numpy order
    type: BlockType
    mean: float
    std: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


_FALLBACK: Mapping[str, str] = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}


def _stem(name: str) -> str:
    """`attn_k_b` of `blk.3.attn_k_b.weight`."""
    return name.split(".")[-2]


def _tensor_type(name: str, shape: tuple[int, ...], wanted: BlockType, tied: bool) -> BlockType:
    """The type of one tensor, by the rules at the top of this file."""
    stem = _stem(name)
    if len(shape) == 1 or stem == "ffn_gate_inp":
        return by_name("F32")
    type = wanted
    if type.standard and (stem == "token_embd" or shape[-2] % type.interleaved_rows):
        type = by_name(type.standard)
    if _float_dtype(wanted) is None:
        is_head = stem == "output" or (tied and stem == "token_embd")
        if is_head and (type.standard or type.name) != "Q8_0":
            type = by_name("Q6_K")
        elif stem == "token_embd" and type.block_bytes * 8 < 3 * type.block_elements:
            type = by_name("Q4_K")
    if shape[-1] % type.block_elements:
        standard = type.standard or type.name
        type = by_name("Q8_0" if stem == "attn_k_b" else _FALLBACK.get(standard, "IQ4_NL"))
    return by_name("F16") if shape[-1] % type.block_elements else type


def _distribution(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor's weights."""
    stem = _stem(name)
    if stem == "exp_probs_b":
        return 0.0, 0.02  # the best 8 of 256 scores lie within 0.08: the bias decides close calls only
    if len(shape) == 1:
        return 1.0, 0.1
    if stem == "token_embd" and not config.tie_word_embeddings:
        return 0.0, 1.0
    inputs, gain = shape[-1], 1.0
    if stem == "attn_k_b":
        inputs = shape[-2]  # it is stored transposed: keys are made from kv_lora_rank latents
    elif stem in ("output", "token_embd"):
        gain = 3.0
    elif stem == "ffn_gate_inp" and config.moe is not None and config.moe.scoring is Scoring.SOFTMAX:
        gain = 2.0  # not for sigmoids: with 2 the best are all 1.0 but for 2 %
    return 0.0, gain / math.sqrt(inputs)


def _plan(config: ModelConfig, type_name: str, legacy_kv_b: bool) -> list[_Tensor]:
    """Every tensor of the file in order, with its type. SettingError for a type without random blocks."""
    if type_name.upper() not in (name.upper() for name in synthetic_types()):
        raise SettingError(f"type = {type_name!r}: expected one of {', '.join(synthetic_types())}.")
    wanted = by_name(type_name)
    return [
        _Tensor(
            spec.name,
            spec.shape,
            _tensor_type(spec.name, spec.shape, wanted, config.tie_word_embeddings),
            *_distribution(spec.name, spec.shape, config),
        )
        for spec in expected_tensors(config, KvLayout.KV_B if legacy_kv_b else KvLayout.K_B_V_B)
    ]


# ---------------------------------------------------------------------------------------------------------------
# Vocabulary


@dataclass(frozen=True)
class _Vocabulary:
    """A byte-level BPE: three control tokens, the 256 bytes, then one token per merge."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]

    BOS, EOS, PAD = 0, 1, 2

    @property
    def nbytes(self) -> int:
        """What it takes in a GGUF file: each string with its length, and an int32 type for each token."""
        strings = (*self.tokens, *self.merges)
        return sum(len(text.encode()) for text in strings) + 8 * len(strings) + 4 * len(self.tokens)


_CONTROL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")


def _words() -> Iterator[tuple[str, str]]:
    """(left, right) of every merge: syllables, then ever longer words of them, each with a space in front and without.

    The space comes first, so that the encoder meets it before it can join the syllables of " bakato" otherwise.
    """
    space = "Ġ"  # the byte 0x20 in the alphabet of byte-level BPE
    pairs = [(consonant, vowel) for consonant in "bcdfghjklmnpqrstvwxyz" for vowel in "aeiou"]
    syllables = [left + right for left, right in pairs]
    yield from pairs
    yield from ((space, syllable) for syllable in syllables)
    words = syllables
    while True:
        for prefix in (space, ""):
            yield from ((prefix + word, syllable) for word in words for syllable in syllables)
        words = [word + syllable for word in words for syllable in syllables]


def _vocabulary(size: int) -> _Vocabulary:
    """`size` tokens, so that any text encodes and every token prints. SettingError below 259."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    fixed = (*_CONTROL_TOKENS, *alphabet)
    if size < len(fixed):
        raise SettingError(f"vocab_size = {size}: a byte-level vocabulary needs at least {len(fixed)}.")
    merges = list(islice(_words(), size - len(fixed)))
    return _Vocabulary((*fixed, *(a + b for a, b in merges)), tuple(f"{a} {b}" for a, b in merges))


# ---------------------------------------------------------------------------------------------------------------
# The file

_ALIGNMENT = 32  # GGUF's default
# Drawn at once: 8 MiB take 3 to 16 ms (0.5 to 3 GB/s a thread, by type; IQ4_NL 1.3 GB/s), long beside the hand-over
# from thread to thread, small beside the memory of any machine.
_CHUNK_BYTES = 8 << 20
_DRAWING_THREADS = 2
_CHUNKS_AHEAD = 4
# Sent to the disk while the next ones are drawn: without it a fifth of the machine's memory would be flushed at the
# very end, after the progress bar had reached 100 %.
_FLUSH_BYTES = 256 << 20


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _data_bytes(tensors: list[_Tensor]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _header_bytes(tensors: list[_Tensor], vocabulary: _Vocabulary) -> int:
    """Upper bound of the header: exact for tensors and vocabulary, 4 KiB for some 50 keys of up to 60 bytes."""
    infos = sum(8 + len(tensor.name) + 4 + 8 * len(tensor.shape) + 12 for tensor in tensors)
    return 4096 + vocabulary.nbytes + infos


def estimate_bytes(config: ModelConfig, *, type: str = "iq4_nl", legacy_kv_b: bool = False) -> int:
    """Bytes of the file `synthesize` would write, at most 4 KiB too many. Raises SettingError as it does."""
    tensors = _plan(config, type, legacy_kv_b)
    return _header_bytes(tensors, _vocabulary(config.vocab_size)) + _data_bytes(tensors)


def synthesize(
    config: ModelConfig,
    out: str | os.PathLike[str],
    *,
    type: str = "iq4_nl",
    legacy_kv_b: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """Writes a GGUF file of `config` with random weights and returns its size in bytes.

    type:        of the matrices, one of `synthetic_types()` in any case; the exceptions are at the top of this file
    legacy_kv_b: one attn_kv_b a layer, as llama.cpp's converter wrote before April 2025, instead of attn_k_b and v_b
    seed:        the same seed gives the same bytes
    progress:    called with (bytes done, bytes in all) about every 8 MiB

    The weights go to `OUT.partial`, which becomes `out` when it is complete and on the disk; whatever ends the write
    early removes it (all but a kill: then the next run replaces it). An existing `out` is never overwritten. Holds about 50 MB of chunks, whatever the model.
    Raises SettingError for a type without random blocks, a vocabulary below 259 tokens, an `out` that exists or
    cannot be written, and a disk with too little room.
    """
    out = Path(out)
    if seed < 0:
        raise SettingError(f"seed = {seed}: expected 0 or more.")
    tensors = _plan(config, type, legacy_kv_b)
    vocabulary = _vocabulary(config.vocab_size)
    _check_target(out, _header_bytes(tensors, vocabulary) + _data_bytes(tensors))
    partial = out.with_name(out.name + ".partial")
    try:
        _write_header(partial, config, tensors, vocabulary, type, legacy_kv_b, seed)
        with partial.open("ab") as file:
            _pad(file)
            _write_tensors(file, tensors, seed, progress)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
        partial.rename(out)
        _sync_directory(out.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SettingError(f"{out}: cannot be written: {error.strerror or error}. Choose another place.") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return written


def _check_target(out: Path, needed: int) -> None:
    """SettingError for an `out` that must not or cannot be written, before anything is."""
    if out.exists():
        raise SettingError(f"{out}: exists already. Remove it or choose another name; nothing was written.")
    if not out.parent.is_dir():
        raise SettingError(f"{out}: there is no directory {out.parent}. Create it or choose another place.")
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise SettingError(
            f"{out}: needs {needed:,} bytes ({needed / 1e9:.1f} GB), the disk has {free:,} free ({free / 1e9:.1f} GB). "
            f"Choose another disk, fewer layers or a smaller type."
        )


def _sync_directory(directory: Path) -> None:
    """Makes the new name itself survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))


def _write_tensors(file: BinaryIO, tensors: list[_Tensor], seed: int, progress: Progress | None) -> None:
    """Draws on two threads, writes on this one, flushes on a fourth, all at once."""
    start = flushed = file.tell()
    total = start + _data_bytes(tensors)
    pool = ThreadPoolExecutor(_DRAWING_THREADS)
    flusher = ThreadPoolExecutor(1)
    flush: Future[None] | None = None
    try:
        for chunk, ends_tensor in _chunks(tensors, seed, pool):
            file.write(chunk.data)
            if ends_tensor:
                _pad(file)
            done = file.tell()
            if done - flushed >= _FLUSH_BYTES:
                if flush is not None:
                    flush.result()
                file.flush()
                flush, flushed = flusher.submit(os.fsync, file.fileno()), done
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
        flusher.shutdown()
    if flush is not None:
        flush.result()
    assert file.tell() == total


def _chunks(
    tensors: list[_Tensor], seed: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[NDArray[np.uint8], bool]]:
    """(bytes, whether a tensor ends with them) in file order, a few drawn ahead."""
    ahead: deque[tuple[Future[NDArray[np.uint8]], bool]] = deque()

    def draw(random: _Random, count: int, *key: int) -> NDArray[np.uint8]:
        return random.draw(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=key)), count)

    for index, tensor in enumerate(tensors):
        random = _random(tensor.type, tensor.mean, tensor.std)
        units = tensor.nbytes // random.unit_bytes
        per_chunk = _CHUNK_BYTES // random.unit_bytes
        for number, first in enumerate(range(0, units, per_chunk)):
            count = min(per_chunk, units - first)
            if len(ahead) == _CHUNKS_AHEAD:
                future, ends_tensor = ahead.popleft()
                yield future.result(), ends_tensor
            ahead.append((pool.submit(draw, random, count, index, number), first + count == units))
    for future, ends_tensor in ahead:
        yield future.result(), ends_tensor


# ---------------------------------------------------------------------------------------------------------------
# In memory


def weight_bytes(config: ModelConfig, *, type: str = "iq4_nl", legacy_kv_b: bool = False) -> int:
    """Bytes of memory that `synthetic_checkpoint` takes. Raises SettingError as it does."""
    return _data_bytes(_plan(config, type, legacy_kv_b))


def synthetic_checkpoint(
    config: ModelConfig,
    *,
    type: str = "iq4_nl",
    legacy_kv_b: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    check: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Checkpoint:
    """The model that `synthesize` would write, in memory instead: the same bytes, no file and no vocabulary.

    The weights lie one after the other in one anonymous map, on 2 MiB pages where the system gives them (Linux).
    check: called with the model before its weights are drawn, the map being untouched; what it raises ends all.
    Raises SettingError for a type without random blocks.
    """
    tensors = _plan(config, type, legacy_kv_b)
    total = _data_bytes(tensors)
    memory = np.frombuffer(_anonymous_map(total), np.uint8)
    weights = memory.view()
    weights.flags.writeable = False
    checkpoint = _laid_out(config, tensors, weights, legacy_kv_b, seed)
    check(checkpoint)
    done = 0
    with ThreadPoolExecutor(_DRAWING_THREADS) as pool:
        for chunk, ends_tensor in _chunks(tensors, seed, pool):
            memory[done : done + chunk.nbytes] = chunk
            done += chunk.nbytes
            if ends_tensor:
                done = _aligned(done)
            if progress is not None:
                progress(done, total)
    return checkpoint


def _laid_out(
    config: ModelConfig, tensors: list[_Tensor], memory: NDArray[np.uint8], legacy_kv_b: bool, seed: int
) -> Checkpoint:
    """Names the parts of `memory`, which holds the tensors one after the other."""
    named: dict[str, QuantTensor | tuple[QuantTensor, ...]] = {}
    start = 0
    for tensor in tensors:
        raw = memory[start : start + tensor.nbytes]
        start += _aligned(tensor.nbytes)
        *count, rows, cols = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
        by_matrix = raw.reshape(*count, rows, tensor.type.row_bytes(cols))
        if count:
            named[tensor.name] = tuple(QuantTensor(tensor.name, tensor.type, (rows, cols), m) for m in by_matrix)
        else:
            named[tensor.name] = QuantTensor(tensor.name, tensor.type, tensor.shape, by_matrix)
    return Checkpoint(
        path=Path(config.name),
        format="synthetic",
        files=(),
        config=config,
        kv_layout=KvLayout.KV_B if legacy_kv_b else KvLayout.K_B_V_B,
        tensors=MappingProxyType(named),
        vocabulary=Vocabulary(MappingProxyType({}), MappingProxyType({})),
        info=(f"Random weights in the shape of {config.name}, seed {seed}, in memory.",),
    )


def _anonymous_map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


# ---------------------------------------------------------------------------------------------------------------
# The header

# llama.cpp's `llama_ftype` where the type's own name is not one of its names. Its _S recipes are the uniform ones.
_FILE_TYPES: Mapping[str, str] = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}


def _write_header(
    path: Path,
    config: ModelConfig,
    tensors: list[_Tensor],
    vocabulary: _Vocabulary,
    type_name: str,
    legacy_kv_b: bool,
    seed: int,
) -> None:
    """Everything before the data section, with the keys of llama.cpp's converter (conversion/deepseek.py and base.py).

    Only what describes the cache differs between the layouts: legacy files (the converter of February 2025) state
    the heads, newer ones the latent row, which llama.cpp treats as one key-value head, and the heads under *_mla.
    """
    import gguf  # 0.2 s: only a write needs it

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(f"{config.name} (synthetic, random weights)")
        writer.add_description(
            f"Random weights in the shape of {config.name}, written by kvfold synth, seed {seed}."
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        type_name = type_name.upper()
        file_type = _FILE_TYPES.get(type_name, f"MOSTLY_{type_name}")
        if file_type in gguf.LlamaFileType.__members__:
            writer.add_file_type(gguf.LlamaFileType[file_type])

        mla, rope = config.mla, config.rope
        writer.add_block_count(config.num_layers)
        writer.add_context_length(config.max_position)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count(mla.num_heads)
        if mla.q_lora_rank is not None:
            writer.add_q_lora_rank(mla.q_lora_rank)
        writer.add_kv_lora_rank(mla.kv_lora_rank)
        if legacy_kv_b:
            writer.add_head_count_kv(mla.num_heads)
            writer.add_key_length(mla.qk_head_dim)
            writer.add_value_length(mla.v_head_dim)
        else:
            writer.add_head_count_kv(1)
            writer.add_key_length(mla.latent_dim)
            writer.add_value_length(mla.kv_lora_rank)
            writer.add_key_length_mla(mla.qk_head_dim)
            writer.add_value_length_mla(mla.v_head_dim)

        writer.add_rope_dimension_count(rope.dim)
        writer.add_rope_freq_base(rope.theta)
        if rope.yarn is not None:
            yarn = rope.yarn
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(yarn.factor)
            writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position)
            writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
            writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)  # this factor is deepseek2's alone

        writer.add_leading_dense_block_count(config.num_dense_layers)
        if config.moe is not None:
            moe = config.moe
            writer.add_expert_count(moe.num_experts)
            writer.add_expert_used_count(moe.num_experts_per_tok)
            writer.add_expert_group_count(moe.num_groups)
            writer.add_expert_group_used_count(moe.num_groups_per_tok)
            writer.add_expert_feed_forward_length(moe.expert_intermediate_size)
            writer.add_expert_shared_count(moe.shared_intermediate_size // moe.expert_intermediate_size)
            writer.add_expert_weights_scale(moe.routed_scaling_factor)
            writer.add_expert_weights_norm(moe.norm_topk_prob)
            gating = gguf.ExpertGatingFuncType
            writer.add_expert_gating_func(gating.SIGMOID if moe.scoring is Scoring.SIGMOID else gating.SOFTMAX)

        control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
        num_normal = len(vocabulary.tokens) - len(_CONTROL_TOKENS)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("deepseek-v3")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types([control] * len(_CONTROL_TOKENS) + [normal] * num_normal)
        writer.add_token_merges(vocabulary.merges)
        writer.add_bos_token_id(vocabulary.BOS)
        writer.add_eos_token_id(vocabulary.EOS)
        writer.add_pad_token_id(vocabulary.PAD)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)

        for tensor in tensors:
            # dtype: anything but uint8 says that the shape counts weights. The number is written as it is, so those
            # of ik_llama.cpp, which gguf-py's enum lacks, can be too.
            number = cast(gguf.GGMLQuantizationType, tensor.type.id)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
