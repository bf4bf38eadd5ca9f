"""`kvfold inspect`, `plan` and `synth`: what they print, in words and as JSON. Figures are tests/test_explain.py's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.command_line import Kvfold
from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold.backends import gpu, gpu_rates
from kvfold.formats.synthetic import SHAPES


def test_inspect_says_dimensions_cache_types_and_verdict(kvfold: Kvfold, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    assert kvfold("synth", "tiny", file).code == 0
    done = kvfold("inspect", file)
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == f"{file}: GGUF, 1 file, 34 tensors, 2.67 MiB"
    for line in (
        "general.architecture deepseek2",
        "family deepseek-v3",
        "experts 2 of 8, from 2 of 4 groups, sigmoid scores",
        "heads 4, key 128 nope + 64 rope, value 128",
        "latent 512 (kv_lora_rank) + 64 (rope) = 576 numbers a token and layer",
        "type latent full K and V ratio",
        "f16 2,304 5,120 2.2",
        "IQ4_NL 22 2.44 MiB",
    ):
        assert line in lines, line
    assert lines[-1].startswith("loads, backend ")
    assert not any(line.startswith("blk.") for line in lines)

    listed = kvfold("inspect", file, "--tensors").out
    assert sum(line.startswith(("blk.", "token_embd", "output")) for line in listed.splitlines()) == 34


def test_inspect_as_json(kvfold: Kvfold, tmp_path: Path) -> None:
    directory = write_hf_dir(tiny_model("v2-lite"), tmp_path / "hf", dtype="bfloat16")
    found = json.loads(kvfold("inspect", "--json", directory).out)
    assert (found["format"], found["refusal"], found["tensors"]) == ("safetensors", "", [])
    assert found["config"]["mla"]["latent_dim"] == 48
    assert found["cache"][0] == {"cache_type": "f32", "latent_bytes": 3 * 48 * 4, "full_bytes": 3 * 4 * 80 * 4}
    assert found["nbytes"] == sum(use["nbytes"] for use in found["types"])
    tensors = json.loads(kvfold("inspect", "--json", "--tensors", directory).out)["tensors"]
    assert {"name", "type", "shape", "nbytes", "file", "offset"} == set(tensors[0])


@pytest.mark.parametrize("as_json", [False, True])
def test_inspect_of_a_refused_file_is_exit_code_1_and_the_reason(
    kvfold: Kvfold, tmp_path: Path, as_json: bool
) -> None:
    refused = {
        write_gguf(tiny_model("v3"), tmp_path / "llama.gguf", architecture="llama"): "'llama'",
        tmp_path / "broken.gguf": "GGUF",
        tmp_path / "model.bin": "pickle",
    }
    for file, reason in refused.items():
        if not file.exists():
            file.write_bytes(b"no model at all")
        done = kvfold("inspect", file, *["--json"] * as_json)
        assert (done.code, done.err) == (1, "")
        said = json.loads(done.out)["refusal"] if as_json else done.out.splitlines()[-1]
        assert reason in said and str(file) in said


def test_what_is_not_there_cannot_be_inspected(kvfold: Kvfold) -> None:
    done = kvfold("inspect", "/no/such.gguf")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("kvfold: /no/such.gguf: there is no such file")


def test_plan_says_memory_phases_crossovers_and_backend(kvfold: Kvfold, tiny_gguf: Path) -> None:
    done = kvfold("plan", tiny_gguf, "-c", "2K", "--workspace", "64M")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == f"{tiny_gguf}: deepseek-v3, 3 layers, context 2,048 tokens"
    assert "workspace 64 MiB" in lines
    assert any(line.startswith("buffers of a step, 2,048 rows ") for line in lines)
    assert any(line.startswith("Fits: ") for line in lines)
    for start in (
        "routed experts ",
        "cache, 2,048 tokens in f16 ",
        "prompt of 512 at 1,024 ",
        "generation at 2,047 ",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert any("absorbed, fused" in line and "costs" in line for line in lines)
    assert lines[-1].startswith("backend ")


def test_plan_says_what_a_setting_changes(kvfold: Kvfold, tiny_gguf: Path) -> None:
    def phases(*arguments: str) -> list[list[object]]:
        report = json.loads(kvfold("plan", tiny_gguf, "-c", "3000", "--json", *arguments).out)
        return [phase["steps"] for phase in report["phases"]]

    assert phases("-mla", "1", "-b", "2048") == [
        [["absorbed", 1]],
        [["absorbed", 1]],
        [["absorbed", 2]],
        [["absorbed", 1]],
    ]
    assert phases("-mla", "2", "-b", "1K")[2] == [["decompressed", 3]]
    assert phases("-mla", "0")[3] == [["standard", 1]]


def test_plan_is_by_the_rates_of_a_forced_instruction_set(kvfold: Kvfold, tiny_gguf: Path) -> None:
    done = kvfold("plan", tiny_gguf, "--isa", "generic", "--device", "cpu")
    assert "(arithmetic profile)" in done.out and "(AVX" not in done.out
    assert "isa=neon: allowed are" in kvfold("plan", tiny_gguf, "--isa", "neon").err


def test_plan_says_when_nothing_fits(kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.explain.available_memory_bytes", lambda: 70 << 20)
    shown = kvfold("plan", tiny_gguf, "-c", "100K", "--workspace", "1M", "-t", "2", "--backend", "native")
    assert shown.code == 0
    assert "The cache alone is too large" not in shown.out
    monkeypatch.setattr("kvfold.explain.available_memory_bytes", lambda: 2 << 20)
    assert (
        "Does not fit" in (out := kvfold("plan", tiny_gguf, "-c", "1M").out)
        and "The cache alone is too large" in out
    )


@pytest.mark.parametrize(
    "settings",
    [("--workspace", "1M", "-t", "100"), ("--workspace", "1M", "-fa", "0", "-mla", "1", "-t", "1", "-c", "100K")],
    ids=["threads", "scores"],
)
def test_plan_refuses_a_workspace_that_run_refuses(
    settings: tuple[str, ...], kvfold: Kvfold, tiny_gguf: Path
) -> None:
    few = ("--device", "cpu", *settings)
    planned, ran = kvfold("plan", tiny_gguf, *few), kvfold("run", "-m", tiny_gguf, *few, "hi")
    assert (planned.code, planned.err, ran.code, ran.out) == (1, "", 1, "")
    sentence = " ".join(ran.err.removeprefix("kvfold: ").split())
    assert sentence.startswith("workspace=1048576 bytes: ") and sentence in " ".join(planned.out.split())
    assert "Fits" not in planned.out and "weights: " not in planned.out
    assert json.loads(kvfold("plan", tiny_gguf, *few, "--json").out)["refusal"] == sentence


def test_plan_says_where_the_weights_go(kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("plan", tiny_gguf, "--device", "cpu", "-c", "64", "--workspace", "1M", "-t", "2")
    copied, mapped = "weights: copied into memory, on 2 MiB pages", "weights: mapped: "
    memory = json.loads(kvfold(*few, "--json").out)["memory"]
    for missing, way, verdict, place, code in (
        (0, "auto", "Fits: ", copied, 0),
        (0, "off", "Fits: ", copied, 0),
        (0, "on", "Fits: ", mapped + "requested", 0),
        (1, "auto", "Does not fit: ", mapped + "weights, cache and a step take ", 0),
        (1, "on", "Does not fit: ", mapped + "requested", 0),
        (1, "off", "Does not fit: ", "mmap=off: the weights cannot be copied into memory, ", 1),
    ):
        monkeypatch.setattr(
            "kvfold.explain.available_memory_bytes", lambda missing=missing: memory["needed_bytes"] - missing
        )
        done = kvfold(*few, "--mmap", way)
        lines = done.out.splitlines()
        assert (done.code, done.err) == (code, ""), way
        assert any(line.startswith(verdict) for line in lines), (way, missing)
        (said,) = [line for line in lines if line.startswith(("weights", "mmap"))]
        assert said.startswith(place), (way, missing)
        assert ("It runs all the same" in done.out) == (missing and not code), way
        assert bool(json.loads(kvfold(*few, "--mmap", way, "--json").out)["refusal"]) == bool(code), way


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--device", "cuda"), "cuda: no NVIDIA driver was found"),
        (("--device", "cuda:7"), "cuda: no NVIDIA driver was found"),
        (("--backend", "native", "--dtype", "bfloat16"), "native: computes in int8 and float32 only"),
    ],
)
def test_a_plan_that_no_backend_runs_is_exit_code_1_and_promises_no_room(
    kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], reason: str
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(0, ()))
    done = kvfold("plan", tiny_gguf, "-c", "64", *arguments)
    assert (done.code, done.err) == (1, "")
    assert done.out.splitlines()[-1].startswith(f"No backend can run this model: {reason}")
    assert "fit" not in done.out.lower() and "memory is free" not in done.out
    told = kvfold("plan", tiny_gguf, "-c", "64", "--json", *arguments)
    found = json.loads(told.out)
    assert (told.code, found["memory"]["free_bytes"], found["backend"]["name"]) == (1, None, "")
    assert reason in found["backend"]["reason"]


def test_plan_refuses_a_map_on_a_gpu_as_loading_does(
    kvfold: Kvfold, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 16 << 30)
    done = kvfold("plan", tiny_gguf, "--device", "cuda", "-c", "64", "--mmap", "on")
    assert (done.code, done.err) == (1, "")
    assert done.out.splitlines()[-1].startswith(
        "mmap=on: backend cuda reads the weights into the memory of the GPU once"
    )
    assert "weights: in the memory of cuda:0\n" in kvfold("plan", tiny_gguf, "--device", "cuda", "-c", "64").out


def test_synth_writes_what_inspect_reads(kvfold: Kvfold, tmp_path: Path) -> None:
    file = tmp_path / "one-layer.gguf"
    done = kvfold("synth", "tiny", file, "--layers", "1", "--type", "q8_0", "--legacy-kv-b", "--seed", "7")
    assert (done.code, done.out) == (0, "")
    size, written = done.err.splitlines()
    assert size.startswith(f"{file}: about 2.0") and size.endswith(" MiB to write")
    assert written.startswith(f"{file}: 1 layers, ")
    found = json.loads(kvfold("inspect", "--json", file).out)
    assert (found["refusal"], found["kv_layout"]) == ("", "kv_b")
    assert found["types"][0]["type"] == "Q8_0"
    again = kvfold("synth", "tiny", file)
    assert again.code == 1 and "exists already" in again.err


def test_synth_help_names_every_shape(kvfold: Kvfold) -> None:
    text = " ".join(kvfold("synth", "--help").out.split())
    assert all(shape in text for shape in SHAPES)
