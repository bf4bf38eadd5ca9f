"""The GPU's attention benchmark refuses what it cannot measure before it measures anything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kit.interpreter import torch  # before any kernel


@pytest.fixture(scope="module")
def gpu_mla() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_mla", Path(__file__).parents[2] / "bench" / "gpu_mla.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["time", "--form", "gluon", "--blocks", "q8_0"], "--form gluon reads no q8_0: leave --form out"),
        (["time", "--blocks", "fp8", "--peer", "."], "--peer reads no fp8: leave --blocks out"),
        (["time", "--peer", "{tmp}"], "there is no flash_peer in {tmp}"),
        (
            ["time", "--max-tokens", "1023"],
            "every shape of --batches and --keys has more tokens than --max-tokens 1023",
        ),
        (["time", "--keys", "0"], "argument --keys: at least 1 is expected"),
        (["time", "--heads", "-1"], "argument --heads: at least 1 is expected"),
        (["sweep", "--heads", "0", "--out", "{tmp}/o.json"], "argument --heads: at least 1 is expected"),
        (["sweep", "--out", "{tmp}/none/o.json"], "argument --out: {tmp}/none is no folder"),
        (["prefill", "--out", "{tmp}/o.json", "--fa3", "{tmp}/no.so"], "--fa3: there is no file {tmp}/no.so"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    gpu_mla: ModuleType, hopper: None, arguments: list[str], sentence: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu_mla.py", *(word.format(tmp=tmp_path) for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        gpu_mla.main()
    assert ended.value.code == 2
    assert sentence.format(tmp=tmp_path) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["check", "many"], "kernels in Gluon are for compute capability 9.0 (Hopper), and this GPU has 8.0"),
        (["time", "--form", "gluon"], "and this GPU has 8.0"),
        (["time"], ""),
        (["check", "triton"], ""),
    ],
)
def test_gluon_is_refused_where_it_does_not_compile(
    gpu_mla: ModuleType, hopper: None, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(sys, "argv", ["gpu_mla.py", *arguments])
    if not sentence:
        assert gpu_mla.arguments().command == arguments[0]
        return
    with pytest.raises(SystemExit, match="2"):
        gpu_mla.arguments()
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("blocks", [[], ["--blocks", "fp8"]])
def test_what_can_be_measured_is_not_refused(
    gpu_mla: ModuleType, hopper: None, blocks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [
        "time",
        "--form",
        "gluon",
        "--heads",
        "16",
        "--batches",
        "1",
        "4",
        "--keys",
        "1024",
        "--max-tokens",
        "2048",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_mla.py", *line, *blocks])
    assert gpu_mla.arguments().shapes == [(16, 1, 1, 1024)]


def test_without_a_gpu_it_says_so(
    gpu_mla: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_mla.py", "check", "few"])
    with pytest.raises(SystemExit, match="2"):
        gpu_mla.main()
    assert "an NVIDIA GPU is needed, and torch finds none" in capsys.readouterr().err
