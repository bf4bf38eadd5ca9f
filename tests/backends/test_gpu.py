"""What is said where a GPU cannot serve: each reason with what would, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.tiny_models import tiny_model, write_gguf
from kvfold import LLM
from kvfold.backends import choose, gpu
from kvfold.backends.choose import Room
from kvfold.errors import KvfoldError, SettingError
from kvfold.explain import plan_report
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.load import GPU_WINDOW_ROWS, Settings

HOPPER = gpu.Gpu("NVIDIA H200", (9, 0), 141 << 30)
TURING = gpu.Gpu("Tesla T4", (7, 5), 16 << 30)


@pytest.mark.parametrize(
    ("driver", "device", "sentence"),
    [
        (gpu.Driver(0, ()), "cuda", "cuda: no NVIDIA driver was found"),
        (gpu.Driver(13000, ()), "cuda", "cuda: the NVIDIA driver finds no GPU"),
        (gpu.Driver(13000, (HOPPER,)), "cuda:2", "there is no GPU 2: this machine has 1, the first is cuda:0"),
        (gpu.Driver(13000, (TURING,)), "cuda:0", "Tesla T4 has compute capability 7.5, the kernels need 8.0"),
    ],
)
def test_a_reason_names_what_is_missing(
    driver: gpu.Driver, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: driver)
    with pytest.raises(SettingError, match=sentence):
        LLM(device=device)


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_missing_package_is_an_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,)))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert gpu.refusals("auto") == [f"{missing} not installed: pip install 'kvfold[cuda]'"]


def test_a_torch_that_cannot_use_the_driver_says_which_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(12020, (HOPPER,)))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in gpu.refusals("cuda")[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver serves CUDA 12.2 and torch was built for 13.0" in gpu.refusals("cuda")[0]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda1"])
def test_a_device_of_another_name_lists_the_allowed_ones(device: str) -> None:
    with pytest.raises(SettingError, match=f"device={device}: allowed are auto, cpu, cuda, cuda:0"):
        LLM(device=device)


def test_too_little_memory_says_what_would_fit() -> None:
    room = Room(weight_bytes=6 << 30, workspace_bytes=1 << 30, bytes_per_token=1 << 20, n_ctx=4096)
    assert choose._room_refusals(room, 16 << 30) == []
    assert "of n_ctx=4096 tokens 1024 fit" in choose._room_refusals(room, 10 << 30)[0]
    assert "device=cpu" in choose._room_refusals(room, 9 << 30)[0]


def test_auto_without_a_gpu_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(0, ()))
    llm = LLM(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"), n_ctx=64)
    assert llm.loaded.choice.candidate.name == "native"
    assert ("cuda", ("no NVIDIA driver was found",)) in llm.loaded.choice.refused
    assert llm.loaded.settings.cache_type.value == "f16"


def test_backends_and_devices_that_exclude_each_other() -> None:
    for settings in ({"backend": "cuda", "device": "cpu"}, {"backend": "native", "device": "cuda"}):
        with pytest.raises(KvfoldError, match=r"device=cpu was asked for|computes on the CPU|no NVIDIA"):
            LLM(**settings)  # type: ignore[arg-type]


def test_a_plan_for_a_gpu_has_its_memory_and_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: (2 << 30) + (1 << 29))
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(device="cuda", workspace_bytes=1 << 28), batch_rows=None)
    assert (report.backend.name, report.memory.cache_type) == ("cuda", "bf16")
    assert report.memory.free_bytes == (2 << 30) + (1 << 29)
    assert report.batch_rows == GPU_WINDOW_ROWS
    assert "H200 profile" in report.phases[0].reason
