"""What weights take in the memory of a GPU is said before it is uploaded, and is what the upload takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kit.interpreter import torch  # before any kernel
from kit.tiny_models import tiny_model, write_hf_dir
from kvfold.backends import gpu, gpu_rates
from kvfold.backends.choose import GPU_RESERVE_BYTES, choose_backend
from kvfold.cache.latent import PAGE_TOKENS
from kvfold.errors import SettingError
from kvfold.explain import plan_report
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.formats.synthetic import SHAPES, synthetic_checkpoint
from kvfold.formats.tensor_names import KvLayout
from kvfold.load import Settings, needs_of
from kvfold.model.deepseek import DeepseekModel
from kvfold.quant.decode import decode_tensor

if TYPE_CHECKING:
    from kvfold.backends.cuda_weights import DeviceWeights

WORKSPACE_BYTES = 1 << 20


def made(type: str, **form: Any) -> Checkpoint:
    return synthetic_checkpoint(SHAPES["tiny"], type=type, **form)


def settings(**values: Any) -> Settings:
    return Settings.parse(device="cuda", workspace_bytes=WORKSPACE_BYTES, **values)


def uploaded(checkpoint: Checkpoint, dtype: torch.dtype) -> DeviceWeights:
    from kvfold.backends.cuda_weights import upload

    splits_kv_b = checkpoint.kv_layout is KvLayout.K_B_V_B
    model = DeepseekModel(checkpoint.config, splits_kv_b=splits_kv_b, standard=False)
    return upload(model, checkpoint.tensors, torch.device("cpu"), dtype)


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


def test_a_matrix_decoded_at_upload_has_the_weights_of_its_file() -> None:
    checkpoint = made("mxfp4")
    rows = uploaded(checkpoint, torch.float32).rows["blk.1.ffn_down_exps.weight"]
    experts = checkpoint.tensors["blk.1.ffn_down_exps.weight"]
    expected = torch.cat([torch.from_numpy(decode_tensor(expert)) for expert in experts])
    assert rows.matrix.parts == len(experts) and torch.equal(rows.matrix.plain(), expected)


def free_for(monkeypatch: pytest.MonkeyPatch, weight_bytes: int, checkpoint: Checkpoint) -> None:
    """A GPU with memory for weights of this size and one page of cache."""
    room = needs_of(checkpoint, settings()).room
    assert room is not None
    free = weight_bytes + room.scratch_bytes + GPU_RESERVE_BYTES + room.bytes_per_token * PAGE_TOKENS
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: free)


def test_a_file_that_fits_and_grows_is_refused_with_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made("mxfp4")
    room = needs_of(checkpoint, settings()).room
    assert room is not None and room.grown is not None and room.grown.types == ("MXFP4",)
    # 17 bytes of 32 weights become 64
    assert room.grown.device_bytes * 17 == room.grown.stored_bytes * 64
    free_for(monkeypatch, checkpoint.nbytes, checkpoint)
    with pytest.raises(
        SettingError, match=r"GB in MXFP4, which the GPU has as bf16, .* that the GPU keeps \(Q2_K to"
    ):
        choose_backend("auto", needs_of(checkpoint, settings()))
    with pytest.raises(SettingError, match="which the GPU has as float32"):
        choose_backend("auto", needs_of(checkpoint, settings(dtype="float32")))
    free_for(monkeypatch, room.weight_bytes, checkpoint)
    assert choose_backend("auto", needs_of(checkpoint, settings())).candidate.name == "cuda"
    with pytest.raises(SettingError, match=r"of n_ctx=4096 tokens 64 fit .*MXFP4, which the GPU has as bf16"):
        choose_backend("auto", needs_of(checkpoint, settings(n_ctx=4096)))


def test_plain_types_take_what_their_file_has(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made("bf16")
    room = needs_of(checkpoint, settings()).room
    assert room is not None and (room.weight_bytes, room.grown) == (checkpoint.nbytes, None)
    free_for(monkeypatch, checkpoint.nbytes, checkpoint)
    assert choose_backend("auto", needs_of(checkpoint, settings())).candidate.name == "cuda"
    free_for(monkeypatch, checkpoint.nbytes - 1, checkpoint)
    with pytest.raises(SettingError, match=r"GB of GPU memory and .* a type of the model of at most .* GB fits"):
        choose_backend("auto", needs_of(checkpoint, settings()))


def test_a_plan_has_the_bytes_of_the_device_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made("mxfp4")
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 16 << 30)
    on_gpu = plan_report(checkpoint, settings(n_ctx=64), batch_rows=512)
    assert on_gpu.backend.name == "cuda"
    assert on_gpu.memory.weight_bytes == room_bytes(checkpoint, "auto") > 1.5 * checkpoint.nbytes
    on_cpu = plan_report(checkpoint, Settings.parse(device="cpu", n_ctx=64), batch_rows=512)
    assert on_cpu.memory.weight_bytes == checkpoint.nbytes
