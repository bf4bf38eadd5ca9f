"""Captured decode steps are kernels: no copies by the copy engine, which move data at 60 % of what a kernel does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.cuda_harness import cuda_harness, deepseeks_attention
from kit.graph_nodes import keep_graphs, node_kinds
from kit.interpreter import torch  # before any kernel
from kvfold.engine.batch import Work
from kvfold.kernels.number_product import MOST_ROWS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LAYERS = 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("ftype", "mla", "cache_type"),
    [
        *(
            (ftype, "1", cache_type)
            for ftype in ("BF16", "Q8_0")
            for cache_type in ("bf16", "f16", "f32", "q8_0", "fp8")
        ),
        *(("BF16", "0", cache_type) for cache_type in ("bf16", "f16", "f32", "q8_0")),
        *(("BF16", "2", cache_type) for cache_type in ("bf16", "f16", "f32", "q8_0", "fp8")),
        *(("Q8_0", mla, "bf16") for mla in ("0", "2")),
    ],
)
def test_decode_steps_have_no_copies(
    ftype: str, mla: str, cache_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = deepseeks_attention(tmp_path / "m.gguf", ftype)
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "rounds": ftype != "BF16", "n_ctx": 3 * 64 * 64}
    harness = cuda_harness(path, mla=mla, cache_type=cache_type, **settings)
    seen = set()
    for batch, length in ((1, 3), (1, 1100), (4, 3), (64, 3)):
        sequences = [harness.sequence() for _ in range(batch)]
        tokens = np.random.default_rng(batch).integers(0, 272, length).tolist()
        harness.step([Work(s, tokens, is_prompt=True) for s in sequences])
        if length <= MOST_ROWS:  # prompts of so few rows are captured like generated rows
            seen.add((batch, length))
        for s_q in (1, 2):
            with monkeypatch.context() as patch:
                kept = keep_graphs(patch)
                for _ in range(2):  # launched, captured
                    harness.step([Work(s, [7] * s_q, is_prompt=False) for s in sequences])
            seen.add((batch, s_q))
            for graph in kept:
                kinds = node_kinds(graph)
                what = f"{ftype}, mla={mla}, {cache_type} cache, {batch} sequences of {s_q} rows over {length} keys: {dict(kinds)}"
                print(what)
                assert kinds["memcpy"] == 0, what
                assert kinds["kernel"] >= 4 * LAYERS, what
        for s in sequences:
            s.release()
    # one graph a step, whatever the length where kernels are not chosen by it
    assert {(form.batch, form.rows) for form in harness.loaded.backend._graphs._steps} == seen
