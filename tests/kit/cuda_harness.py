"""A model on the cuda backend, with its cache full of NaN and its pages scrambled. Without a GPU the kernels run in
Triton's interpreter, which TRITON_INTERPRET=1 must ask for before they are imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf


def cuda_harness(
    path: Path, *, dtype: torch.dtype = torch.float32, rounds: bool = False, captures: bool = True, **settings: Any
) -> Harness:
    from kvfold.backends.cuda import CudaBackend
    from kvfold.backends.cuda_weights import upload

    harness = Harness(path, **settings)
    loaded = harness.loaded
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backend = CudaBackend(
        loaded.model,
        upload(loaded.model, loaded.checkpoint.tensors, device, dtype, rounds=rounds),
        loaded.cache,
        device=device,
        dtype=dtype,
        workspace_bytes=loaded.settings.workspace_bytes,
        captures=captures,
    )
    for pool in backend.pools:
        pool.fill_(torch.nan if pool.is_floating_point() else 0xFF)  # of bytes, every scale is NaN
    harness.loaded = dataclasses.replace(loaded, backend=backend)
    return harness


def deepseeks_attention(path: Path, ftype: str, num_layers: int = 2, num_heads: int = 16) -> Path:
    """A small model whose attention has DeepSeek's sizes, so that it takes the kernels made for them."""
    sizes = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    tiny = tiny_model("v2-lite", num_hidden_layers=num_layers, first_k_dense_replace=1, **sizes)
    return write_gguf(tiny, path, ftype=ftype)
