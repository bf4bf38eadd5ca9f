"""What a model has to do at least: multiply-adds of a row, bytes of a generated token. Counts, no clocks.

Owns what a speed is divided by. Attention and the up-projections depend on the path a step takes: mla/plan.py counts
them. DeepSeek-V2-Lite in IQ4_NL: 2185 M multiply-adds a row (attention projections 315, dense layer 67, experts 1803; 74 of
them only for rows whose logits are wanted), 210 M for each row of logits, and 1.459 GB of weights read for each generated token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.config import ModelConfig
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.quant.tensor import Weights, matrices


@dataclass(frozen=True)
class LinearWork:
    """Multiply-adds of one row in all layers, without attention itself and its up-projections.

    attention: the projections of queries, latents and outputs. experts: the chosen ones, the shared ones, the router.
    head: of a row whose logits are wanted. outputs: the part of the three before that only such a row has, behind the
    attention of the last layer.
    """

    attention: int
    dense: int
    experts: int
    head: int
    outputs: int

    def total(self, rows: int, outputs: int) -> int:
        """Of `rows` rows, the logits of `outputs` of them wanted."""
        every = self.attention + self.dense + self.experts - self.outputs
        return rows * every + outputs * (self.outputs + self.head)


def linear_work(config: ModelConfig) -> LinearWork:
    """Counted from the shapes of the tensors: a matrix multiplies once for each of its weights, an expert for the
    share of rows that choose it."""
    sums = dict.fromkeys(("attention", "dense", "experts", "head", "outputs", "none"), 0)
    last = f"blk.{config.num_layers - 1}."
    for spec in expected_tensors(config, KvLayout.KV_B):
        part = _part(_stem(spec.name), is_vector=len(spec.shape) == 1, tied=config.tie_word_embeddings)
        count = math.prod(spec.shape)
        if len(spec.shape) == 3:
            assert config.moe is not None
            count = count // config.moe.num_experts * config.moe.num_experts_per_tok
        sums[part] += count
        if spec.name.startswith(last) and (part in ("dense", "experts") or _stem(spec.name) == "attn_output"):
            sums["outputs"] += count
    del sums["none"]
    return LinearWork(**sums)


def _stem(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`."""
    return name.split(".")[-2]


def _part(stem: str, *, is_vector: bool, tied: bool) -> str:
    """The field of LinearWork that a tensor counts in, or "none"."""
    if stem == "output" or (tied and stem == "token_embd"):
        return "head"
    if is_vector or stem in ("token_embd", "attn_kv_b"):
        return "none"  # an embedding is looked up; the up-projections are mla/plan.py's
    if stem.startswith("attn_"):
        return "attention"
    return "experts" if stem.endswith(("_exps", "_shexp", "_inp")) else "dense"


def num_weights(weights: Weights) -> int:
    return sum(part.rows * part.cols for tensor in weights.values() for part in matrices(tensor))


class TokenWeights:
    """The weights that one generated token reads: every matrix once, of the experts those chosen, one row of the
    embedding. `arrays` are views of the weights where they lie."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        moe, tied = config.moe, config.tie_word_embeddings
        self.arrays: list[NDArray[np.uint8]] = []
        self.nbytes = 0  # of one token; the experts of a layer are of equal size
        self._chosen = moe.num_experts_per_tok if moe else 0
        always: list[int] = []
        experts: dict[str, list[list[int]]] = {}  # of a layer: for each of its matrices the experts' indices
        for name, tensor in weights.items():
            parts = matrices(tensor)
            indices = list(range(len(self.arrays), len(self.arrays) + len(parts)))
            if _stem(name) == "token_embd" and not tied:
                self.nbytes += parts[0].nbytes // parts[0].rows
                continue
            self.arrays += [part.raw for part in parts]
            if _stem(name).endswith("_exps"):
                experts.setdefault(name.rsplit(".", 2)[0], []).append(indices)
                self.nbytes += self._chosen * parts[0].nbytes
            else:
                always += indices
                self.nbytes += sum(part.nbytes for part in parts)
        self._always = np.asarray(always, np.int32)
        # [MoE layers, experts, matrices of an expert]
        self._experts = np.asarray(list(experts.values()), np.int32).swapaxes(1, 2) if experts else None

    def draw(self, rng: np.random.Generator) -> NDArray[np.int32]:
        """Indices into `arrays` of what a token reads that happens to choose these experts."""
        if self._experts is None:
            return self._always
        layers, count, _ = self._experts.shape
        chosen = rng.random((layers, count)).argsort(axis=1)[:, : self._chosen]
        return np.concatenate([self._always, self._experts[np.arange(layers)[:, None], chosen].ravel()])
