"""What weights take in the memory of a GPU is said before it is uploaded, and is what the upload takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kit.interpreter import torch  # before any kernel
from kit.tiny_models import tiny_model, write_hf_dir
from kvfold.backends import gpu, gpu_rates
from kvfold.backends.choose import GPU_RESERVE_BYTES, choose_backend
from kvfold.backends.gpu_weights import device_bytes, is_up
from kvfold.cache.latent import PAGE_TOKENS
from kvfold.errors import SettingError
from kvfold.explain import plan_report
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.formats.synthetic import SHAPES, synthetic_checkpoint
from kvfold.formats.tensor_names import KvLayout
from kvfold.load import Settings, needs_of
from kvfold.model.deepseek import DeepseekModel
from kvfold.quant.decode import decode_tensor
from kvfold.quant.tensor import QuantTensor, matrices
from kvfold.quant.types import TYPES, by_name

if TYPE_CHECKING:
    from kvfold.backends.cuda_weights import DeviceWeights

WORKSPACE_BYTES = 1 << 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels run


def made(type: str, **form: Any) -> Checkpoint:
    return synthetic_checkpoint(SHAPES["tiny"], type=type, **form)


def settings(**values: Any) -> Settings:
    return Settings.parse(device="cuda", workspace_bytes=WORKSPACE_BYTES, **values)


def uploaded(checkpoint: Checkpoint, dtype: torch.dtype) -> DeviceWeights:
    from kvfold.backends.cuda_weights import upload

    splits_kv_b = checkpoint.kv_layout is KvLayout.K_B_V_B
    model = DeepseekModel(checkpoint.config, splits_kv_b=splits_kv_b, standard=False)
    return upload(model, checkpoint.tensors, DEVICE, dtype)


def room_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    room = needs_of(checkpoint, settings(dtype=dtype)).room
    assert room is not None
    return room.weight_bytes


@pytest.mark.parametrize(
    ("type", "legacy_kv_b", "dtype"),
    [
        ("bf16", False, "auto"),
        pytest.param("q4_k", True, "auto", marks=pytest.mark.full),
        ("mxfp4", False, "auto"),
        ("iq2_xxs", True, "float32"),
        ("iq4_nl_r4", False, "float32"),
    ],
)
def test_the_upload_takes_the_bytes_that_were_said(type: str, legacy_kv_b: bool, dtype: str) -> None:
    checkpoint = made(type, legacy_kv_b=legacy_kv_b)
    compute = torch.float32 if dtype == "float32" else torch.bfloat16
    assert uploaded(checkpoint, compute).nbytes == room_bytes(checkpoint, dtype)


def test_scales_of_fp8_are_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf_dir(tiny_model("v3"), tmp_path / "m", dtype="float8_e4m3fn"))
    assert any(w.scale is not None for w in checkpoint.tensors.values() if not isinstance(w, tuple))
    assert uploaded(checkpoint, torch.float32).nbytes == room_bytes(checkpoint, "float32")


# Fields apart, a codebook, rows put apart, interleaved rows that have no plain type. The others: the interpreter takes half a
# minute each.
SAMPLE = ("Q5_1", "IQ2_XXS", "Q4_0_R8", "IQ1_S_R4")


@pytest.mark.parametrize(
    "name",
    [
        t.name if t.name in SAMPLE else pytest.param(t.name, marks=pytest.mark.full)
        for t in TYPES
        if t.decodes and t.name not in ("BF16", "BF16_R16", "F8_E4M3")
    ],
)
def test_every_type_keeps_its_bytes_and_its_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts, uploaded a group of rows at a time; rows that their file has interleaved too."""
    from kvfold.backends import cuda_weights
    from kvfold.kernels import tile_product

    type = by_name(name)
    rows, cols = 2 * type.interleaved_rows, 256
    monkeypatch.setattr(cuda_weights, "PIECE_BYTES", type.interleaved_rows * type.row_bytes(cols))
    monkeypatch.setattr(cuda_weights, "STAGE_BYTES", 3 * type.interleaved_rows * type.row_bytes(cols))
    raw = np.random.default_rng(1).integers(0, 256, (2, rows, type.row_bytes(cols)), np.uint8)
    experts = tuple(QuantTensor("exps", type, (rows, cols), part) for part in raw)
    stage = cuda_weights._Stage(DEVICE, raw.nbytes, None)
    matrix = cuda_weights._matrix([experts], stage)
    stage.finish()
    assert matrix.raw.nbytes == device_bytes("exps", experts, "float32") < raw.nbytes + 16 * 2 * rows
    assert matrix.parts == 2
    expected = np.concatenate([decode_tensor(expert) for expert in experts])
    np.testing.assert_array_equal(tile_product.decode(matrix, torch.float32).cpu(), expected)


def free_for(monkeypatch: pytest.MonkeyPatch, weight_bytes: int, checkpoint: Checkpoint) -> None:
    """A GPU with memory for weights of this size and one page of cache."""
    room = needs_of(checkpoint, settings()).room
    assert room is not None
    free = weight_bytes + room.scratch_bytes + GPU_RESERVE_BYTES + room.bytes_per_token * PAGE_TOKENS
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: free)


def test_what_does_not_fit_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made("bf16")
    room = needs_of(checkpoint, settings()).room
    assert room is not None and room.weight_bytes == checkpoint.nbytes
    free_for(monkeypatch, checkpoint.nbytes, checkpoint)
    assert choose_backend("auto", needs_of(checkpoint, settings())).candidate.name == "cuda"
    free_for(monkeypatch, checkpoint.nbytes - 1, checkpoint)
    with pytest.raises(SettingError, match=r"GB of GPU memory and .* a type of the model of at most .* GB fits"):
        choose_backend("auto", needs_of(checkpoint, settings()))


def test_a_plan_has_the_bytes_of_the_device_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made("iq2_xxs")
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 16 << 30)
    on_gpu = plan_report(checkpoint, settings(n_ctx=64), batch_rows=512)
    assert on_gpu.backend.name == "cuda"
    up = sum(part.nbytes for name, w in checkpoint.tensors.items() if is_up(name) for part in matrices(w))
    assert on_gpu.memory.weight_bytes == room_bytes(checkpoint, "auto")
    assert checkpoint.nbytes < on_gpu.memory.weight_bytes < checkpoint.nbytes + 16 * up  # all else keeps its blocks
    on_cpu = plan_report(checkpoint, Settings.parse(device="cpu", n_ctx=64), batch_rows=512)
    assert on_cpu.memory.weight_bytes == checkpoint.nbytes
