"""The protocol between the network and a machine: the only operations the network may ask for.

An implementation either computes at once (backends/plain.py: V is a torch tensor) or records (model/program.py: V is
a symbolic buffer). The rules of mla/ops.py hold here too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeVar

from kvfold.config import MoeConfig
from kvfold.mla.ops import AttentionOps

V = TypeVar("V")


class Ops(AttentionOps[V], Protocol[V]):
    def embed(self, name: str, table: str) -> V:
        """Rows of the embedding table for the step's token ids: [T, hidden]."""

    def swiglu(self, name: str, gate: V, up: V) -> V:
        """silu(gate) * up."""

    def add(self, name: str, x: V, y: V) -> V:
        """x + y."""

    def route(self, name: str, x: V, weight: str, bias: str | None, moe: MoeConfig) -> tuple[V, V]:
        """Expert ids int32 [T, k] and their weights float32 [T, k] by the model's routing rule. On the CPU, NaN among the
        scores that a row chooses by makes its weights NaN."""

    def experts(
        self,
        name: str,
        x: V,
        ids: V,
        weights: V,
        gate: str,
        up: str,
        down: str,
        subset: Collection[int] | None = None,
    ) -> V:
        """sum_e weights_e * down_e(swiglu(gate_e x, up_e x)) over the chosen experts that lie in `subset`, any ids (None:
        all): a partial sum [T, hidden]. Experts outside of it are not read. Plain and native take subsets, for experts
        whose weights lie elsewhere; no model asks for one yet, and cuda takes all."""

    def take_outputs(self, name: str, x: V) -> V:
        """The step's output rows: [R, width]."""

    def output(self, name: str, x: V) -> None:
        """Hands a value to the caller of the step under this name: "hidden" or "logits"."""
