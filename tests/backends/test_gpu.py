"""What is said where a GPU cannot serve: each reason with what would, before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kit.tiny_models import tiny_model, write_gguf
from kvfold import LLM
from kvfold.backends import choose, gpu, gpu_rates
from kvfold.backends.choose import GPU_RESERVE_BYTES, Backend, Machine, Room
from kvfold.errors import KvfoldError, MissingExtra, SettingError, install_extra
from kvfold.explain import plan_report
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.load import GPU_WINDOW_ROWS, Settings, needs_of

HOPPER = gpu_rates.H200
TURING = gpu.Gpu("Tesla T4", (7, 5), 16 << 30, 40, 1_590_000, 320.064)


@pytest.mark.parametrize(
    ("driver", "device", "sentence"),
    [
        (gpu.Driver(0, ()), "cuda", "cuda: no NVIDIA driver was found"),
        (gpu.Driver(13000, ()), "cuda", "cuda: the NVIDIA driver finds no GPU"),
        (gpu.Driver(13000, (), "CUDA_ERROR_UNKNOWN (999)"), "cuda", "does not start: CUDA_ERROR_UNKNOWN"),
        (gpu.Driver(13000, (HOPPER,)), "cuda:2", "there is no GPU 2: this machine has 1, the first is cuda:0"),
        (gpu.Driver(13000, (TURING,)), "cuda", "Tesla T4 has compute capability 7.5, the kernels need 8.0"),
        (gpu.Driver(13000, (TURING, HOPPER)), "cuda:0", "Tesla T4 has compute capability 7.5"),
    ],
)
def test_a_reason_names_what_is_missing(
    driver: gpu.Driver, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: driver)
    with pytest.raises(SettingError, match=sentence + r".*, or use device=cpu\.$"):
        LLM(device=device)


CONTEXT_BYTES = 549 << 20  # an H200's


class FakeLibrary:
    """libcuda.so.1 as ctypes would load it: `fails` are the codes that functions return instead of 0.

    free:    bytes of each GPU where nobody has a context
    holders: of each GPU's primary context, those who have retained it; without any it takes no memory
    asked:   GPUs that had a context at some time
    """

    def __init__(self, gpus: list[gpu.Gpu], version: int = 13000, free: Sequence[int] = (), **fails: int) -> None:
        self.gpus, self.version, self.free, self.fails = gpus, version, free, fails
        self.holders = [0] * len(gpus)
        self.asked: set[int] = set()
        self.current: list[int] = []

    def __getattr__(self, function: str) -> Any:
        return lambda *arguments: self.fails.get(function) or getattr(self, f"_{function}")(*arguments) or 0

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDriverGetVersion(self, out: Any) -> None:
        out._obj.value = self.version

    def _cuDeviceGetCount(self, out: Any) -> None:
        out._obj.value = len(self.gpus)

    def _cuDeviceGet(self, out: Any, index: int) -> None:
        out._obj.value = index

    def _cuDeviceGetName(self, out: Any, size: int, device: Any) -> None:
        out.value = self.gpus[device.value].name.encode()

    def _cuDeviceTotalMem_v2(self, out: Any, device: Any) -> None:
        out._obj.value = self.gpus[device.value].total_bytes

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> None:
        of = self.gpus[device.value]
        major, minor = of.capability
        bus = 6016 if of is HOPPER else 256
        memory_khz = round(of.memory_gbps * 1e6 / 2 * 8 / bus)
        values = {13: of.clock_khz, 16: of.num_multiprocessors, 36: memory_khz, 37: bus, 75: major, 76: minor}
        out._obj.value = values[attribute]

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: Any) -> None:
        self.holders[device.value] += 1
        self.asked.add(device.value)
        out._obj.value = 1 + device.value

    def _cuDevicePrimaryCtxRelease_v2(self, device: Any) -> None:
        self.holders[device.value] -= 1

    def _cuCtxPushCurrent_v2(self, context: Any) -> None:
        self.current.append(context.value - 1)

    def _cuCtxPopCurrent_v2(self, out: Any) -> None:
        out._obj.value = 1 + self.current.pop()

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value = self.free[self.current[-1]] - CONTEXT_BYTES
        total._obj.value = self.gpus[self.current[-1]].total_bytes

    def _cuGetErrorName(self, error: int, out: Any) -> None:
        names = {46: b"CUDA_ERROR_DEVICE_UNAVAILABLE", 803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}
        out._obj.value = names.get(error)


def serve(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is this machine's, with a torch that can use it but may not be asked."""
    import torch

    monkeypatch.setattr(gpu, "_library", lambda: library)
    monkeypatch.setattr(gpu, "driver", cache(gpu.driver.__wrapped__))
    monkeypatch.setattr(gpu, "_version", lambda name: "")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("its context would stay"))


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (FakeLibrary([HOPPER, TURING]), gpu.Driver(13000, (HOPPER, TURING))),
        (FakeLibrary([]), gpu.Driver(13000, ())),
        (FakeLibrary([], cuInit=100), gpu.Driver(13000, ())),
        (
            FakeLibrary([], 12040, cuInit=803),
            gpu.Driver(12040, (), "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"),
        ),
        (FakeLibrary([], cuDeviceGetCount=3), gpu.Driver(13000, (), "an error without a name (3)")),
        (None, gpu.Driver(0, ())),
    ],
)
def test_the_drivers_answers_are_read_without_torch(
    library: FakeLibrary | None, expected: gpu.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> FakeLibrary:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(gpu.ctypes, "CDLL", load)
    assert gpu.driver.__wrapped__() == expected


@pytest.mark.parametrize(("name", "version", "need"), [("torch", "2.7.1+cu126", "2.8"), ("triton", "3.5.1", "3.6")])
def test_a_package_that_is_too_old_is_named_with_the_one_needed(
    name: str, version: str, need: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,)))
    monkeypatch.setattr(gpu, "_version", lambda package: version if package == name else "")
    with pytest.raises(
        MissingExtra,
        match=rf"{name} {re.escape(version)} is too old, {need} is needed: {re.escape(install_extra('cuda'))}, or use device=cpu\.$",
    ):
        LLM(device="cuda")


@pytest.mark.parametrize("function", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"])
def test_a_gpu_that_takes_no_work_says_so(function: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = FakeLibrary([HOPPER], free=[16 << 30], **{function: 46})
    serve(library, monkeypatch)
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(n_ctx=64), batch_rows=None)
    said = "NVIDIA H200 takes no work: CUDA_ERROR_DEVICE_UNAVAILABLE (46). Ask nvidia-smi, or use device=cpu"
    assert (report.backend.name, report.backend.refused) == ("native", (("cuda", (said,)),))
    assert (library.holders, library.current) == ([0], [])


def test_gpus_that_are_looked_at_keep_no_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without room in any of them all are looked at, and the CPU computes."""
    library = FakeLibrary([HOPPER, HOPPER], free=[1 << 30, 2 << 30])
    serve(library, monkeypatch)
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    assert plan_report(checkpoint, Settings.parse(n_ctx=64), batch_rows=None).backend.name == "native"
    assert (library.asked, library.holders, library.current) == ({0, 1}, [0, 0], [])


def test_a_context_that_somebody_has_stays_his(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary([HOPPER, HOPPER], free=[16 << 30, 8 << 30])
    library.holders[1], library.current = 1, [0]
    serve(library, monkeypatch)
    assert gpu.free_bytes("cuda:1") == (8 << 30) - CONTEXT_BYTES
    assert (library.holders, library.current) == ([0, 1], [0])


def test_a_gpu_is_asked_once_for_its_free_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second answer may be less: the context it was chosen for would no longer fit."""
    answers = iter([4 << 30])
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: next(answers))
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(), batch_rows=None)
    assert (report.backend.name, report.memory.free_bytes) == ("cuda", 4 << 30)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"deterministic": True}, "cuda: deterministic is for backend native, on device=cpu"),
        ({"profile": True}, "cuda: profile is for backend native"),
        ({"check_numerics": True}, "cuda: check_numerics is for backend native"),
        ({"isa": "generic", "profile": True}, "cuda: isa=generic is for backend native, on device=cpu, profile is"),
        ({"cache_type": "fp8", "mla": "0"}, "fp8 holds latents, and mla=0 caches none: use q8_0"),
        ({"cache_type": "q4_0"}, "cache_type=q4_0: allowed are f32, f16, bf16, q8_0, fp8"),
        ({"backend": "native"}, "native: computes on the CPU"),
        ({"backend": "plain"}, "plain: computes on the CPU"),
        ({"n_ctx": 1 << 24}, "of n_ctx=16777216 tokens .* fit .* with cache_type=q8_0, .* with cache_type=fp8"),
    ],
)
def test_what_cuda_cannot_serve_is_refused_before_loading(
    settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 16 << 30)
    with pytest.raises(SettingError, match=sentence):
        LLM(device="cuda", **settings)


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_missing_package_is_an_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,)))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert gpu.refusals("auto") == [f"{missing} not installed: {install_extra('cuda')}, or use device=cpu"]


def test_a_torch_that_cannot_use_the_driver_says_which_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(12020, (HOPPER,)))
    monkeypatch.setattr(gpu, "_version", lambda name: "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in (said := gpu.refusals("cuda")[0]) and said.endswith(", or use device=cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver serves CUDA 12.2 and torch was built for 13.0" in (said := gpu.refusals("cuda")[0])
    assert said.endswith("update the driver, install a torch for CUDA 12.2, or use device=cpu")


@pytest.fixture
def old_card_first(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A T4 as GPU 0 and an H200 as GPU 1, which has 16 GiB free beside a context."""
    library = FakeLibrary([TURING, HOPPER], free=[16 << 30, (16 << 30) + CONTEXT_BYTES])
    serve(library, monkeypatch)
    return library


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_card_too_old_in_front_is_passed_over(device: str, old_card_first: FakeLibrary, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(device=device, n_ctx=64), batch_rows=None)
    assert (report.backend.name, report.memory.cache_type) == ("cuda", "bf16")
    assert "(H200 profile, measured)" in report.phases[0].reason
    assert report.memory.free_bytes == 16 << 30
    assert old_card_first.asked == {1}


def test_a_card_asked_for_by_number_is_not_passed_over(old_card_first: FakeLibrary) -> None:
    assert "Tesla T4 has compute capability 7.5" in gpu.refusals("cuda:0")[0]
    assert old_card_first.asked == set()


@pytest.fixture
def full_card_first(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Two H200, the first of which has 1 GiB free. Returns the free bytes by GPU."""
    free = {0: 1 << 30, 1: 16 << 30}
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER, HOPPER)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: free[gpu.device_index(device)])
    # The default follows the free memory, and with it the tokens that fit.
    monkeypatch.setattr("kvfold.load.default_workspace_bytes", lambda free_bytes: 64 << 20)
    return free


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_card_without_room_is_passed_over(device: str, full_card_first: dict[int, int], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(device=device), batch_rows=None)
    assert (report.backend.name, report.weight_place) == ("cuda", "in the memory of cuda:1")
    ((name, (reason,)),) = report.backend.refused
    assert name == "cuda on cuda:0" and "and 1.07 GB are free" in reason
    assert (report.memory.free_bytes, report.n_ctx) == (16 << 30, checkpoint.config.max_position)


def test_what_is_loaded_is_loaded_where_there_was_room(
    full_card_first: dict[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Built(Exception): ...

    def build(model: object, weights: object, cache: object, machine: Machine) -> Backend:
        raise Built(machine.device)

    candidate = dataclasses.replace(choose.CANDIDATES[0], build=build)
    monkeypatch.setattr(choose, "CANDIDATES", (candidate, *choose.CANDIDATES[1:]))
    with pytest.raises(Built, match=r"^cuda:1$"):
        LLM(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"), n_ctx=64)


def test_where_no_card_has_room_auto_is_the_cpu_and_cuda_refuses(
    full_card_first: dict[int, int], tmp_path: Path
) -> None:
    full_card_first[1] = 2 << 30
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(device="auto", n_ctx=64), batch_rows=None)
    assert report.backend.name == "native"
    assert [name for name, _ in report.backend.refused] == ["cuda on cuda:0, cuda:1"]
    report = plan_report(checkpoint, Settings.parse(device="cuda", n_ctx=64), batch_rows=None)
    assert "cuda on cuda:0, cuda:1: weights and workspace" in report.refusal
    report = plan_report(checkpoint, Settings.parse(device="cuda:0", n_ctx=64), batch_rows=None)
    assert report.refusal.startswith("No backend can run this model: cuda: weights and workspace")
    report = plan_report(checkpoint, Settings.parse(device="auto", profile=True, n_ctx=64), batch_rows=None)
    assert report.backend.refused == (("cuda", ("profile is for backend native, on device=cpu",)),)


def free_for_tokens(checkpoint: Checkpoint, *tokens: int) -> dict[int, int]:
    """Free bytes of GPUs that hold the model and so many tokens each."""
    room = needs_of(checkpoint, Settings.parse()).room
    assert room is not None
    without = room.weight_bytes + room.scratch_bytes + GPU_RESERVE_BYTES
    return {gpu: without + count * room.bytes_per_token for gpu, count in enumerate(tokens)}


@pytest.mark.parametrize(
    ("tokens", "n_ctx", "serves"),
    [
        ((64, 1 << 20), None, "cuda:1"),
        ((64, 1 << 20), 64, "cuda:0"),
        ((64, 1 << 20), 128, "cuda:1"),
        ((64, 256, 128), None, "cuda:1"),
        ((128, 128), None, "cuda:0"),
        ((0, 64), None, "cuda:1"),
        ((1 << 20, 1 << 21), None, "cuda:0"),
    ],
)
def test_the_first_card_with_room_for_the_whole_context_serves_else_the_one_with_most(
    tokens: tuple[int, ...], n_ctx: int | None, serves: str, full_card_first: dict[int, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    full_card_first.update(free_for_tokens(checkpoint, *tokens))
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,) * len(tokens)))
    report = plan_report(checkpoint, Settings.parse(n_ctx=n_ctx), batch_rows=None)
    held = tokens[int(serves.removeprefix("cuda:"))]
    assert report.weight_place == f"in the memory of {serves}"
    assert report.n_ctx == (n_ctx or min(held, checkpoint.config.max_position))


def test_a_plan_says_why_a_card_with_less_room_is_passed_over(
    full_card_first: dict[int, int], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    own = checkpoint.config.max_position
    for more, held in ((192, 192), (1 << 20, own)):
        full_card_first.update(free_for_tokens(checkpoint, 64, more))
        ((name, (reason,)),) = plan_report(checkpoint, Settings.parse(), batch_rows=None).backend.refused
        assert (name, reason) == (
            "cuda on cuda:0",
            f"of the model's own {own} tokens 64 fit the {full_card_first[0] / 1e9:.3g} GB of GPU memory that are free, "
            f"{held} fit cuda:1",
        )
    report = plan_report(checkpoint, Settings.parse(device="cuda:0"), batch_rows=None)
    assert (report.weight_place, report.n_ctx) == ("in the memory of cuda:0", 64)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda1"])
def test_a_device_of_another_name_lists_the_allowed_ones(device: str) -> None:
    with pytest.raises(SettingError, match=f"device={device}: allowed are auto, cpu, cuda, cuda:0"):
        LLM(device=device)


def shortage(room: Room, *free: int) -> str:
    """What is said about GPUs that all lack the same."""
    ((_, sentence),) = choose._shortages(room, {f"cuda:{index}": free for index, free in enumerate(free)}, None)
    return sentence


def test_too_little_memory_says_what_would_fit() -> None:
    room = Room(6 << 30, workspace_bytes=1 << 30, bytes_per_token=1 << 20, wanted_tokens=4096, least_tokens=4096)
    assert "of n_ctx=4096 tokens 1024 fit" in shortage(room, 11 << 30)
    smaller = dataclasses.replace(room, smaller=(("q8_0", 1 << 19),))
    assert shortage(smaller, 11 << 30).endswith("that are free, 2048 with cache_type=q8_0")
    # 10 GiB: 2 are reserved, 2 are workspaces, 64 MiB the smallest cache
    assert shortage(room, 10 << 30).endswith("at most 6.38 GB fits, or use device=cpu")
    assert "no model fits" in shortage(room, 2 << 30)


def test_what_many_cards_lack_is_said_once_with_what_fits_the_largest() -> None:
    room = Room(6 << 30, 1 << 30, 1 << 20, wanted_tokens=4096, least_tokens=4096, smaller=(("q8_0", 1 << 19),))
    assert shortage(room, 9 << 30, 10 << 30, 8 << 30) == (
        "weights and workspace take 10.7 GB of GPU memory and 8.59 to 10.7 GB are free on each: a type of the model of at "
        "most 6.38 GB fits, or use device=cpu"
    )
    assert "and 10.7 GB are free on each: " in shortage(room, 10 << 30, (10 << 30) - 1)
    assert shortage(room, 12 << 30, 11 << 30) == (
        "of n_ctx=4096 tokens 1024 to 2048 fit the 11.8 to 12.9 GB of GPU memory that are free, 4096 with cache_type=q8_0"
    )


def test_eight_cards_without_room_are_one_refusal(
    full_card_first: dict[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,) * 8))
    full_card_first.update({index: (1 << 30) + (index << 24) for index in range(8)})
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(), batch_rows=None)
    ((name, (reason,)),) = report.backend.refused
    assert (report.backend.name, name) == ("native", "cuda on cuda:0 to cuda:7")
    assert "and 1.07 to 1.19 GB are free on each: no model fits" in reason
    full_card_first[3] = 16 << 30
    report = plan_report(checkpoint, Settings.parse(), batch_rows=None)
    assert [name for name, _ in report.backend.refused] == ["cuda on cuda:0 to cuda:2"]
    full_card_first.update(free_for_tokens(checkpoint, 64, 128, 192, 0, 0, 64, 128))
    report = plan_report(checkpoint, Settings.parse(n_ctx=192, device="cuda"), batch_rows=None)
    assert report.weight_place == "in the memory of cuda:2"
    report = plan_report(checkpoint, Settings.parse(n_ctx=256, device="cuda"), batch_rows=None)
    assert "cuda on cuda:3, cuda:4, cuda:7: weights and workspace" in report.refusal
    assert "; cuda on cuda:0 to cuda:2, cuda:5, cuda:6: of n_ctx=256 tokens 64 to 192 fit" in report.refusal


@pytest.mark.parametrize("settings", [{"profile": True}, {"deterministic": True}, {"isa": "generic"}])
def test_what_is_for_native_alone_asks_no_gpu(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A native run imports no torch, however many GPUs there are."""
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER, HOPPER)))
    monkeypatch.setattr(gpu, "refusals", lambda device: pytest.fail("imports torch"))
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(n_ctx=64, **settings), batch_rows=None)
    ((name, (reason,)),) = report.backend.refused
    assert (report.backend.name, name) == ("native", "cuda")
    assert reason.endswith("is for backend native, on device=cpu")


def test_auto_without_a_gpu_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(0, ()))
    llm = LLM(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"), n_ctx=64)
    assert llm.loaded.choice.candidate.name == "native"
    assert ("cuda", ("no NVIDIA driver was found: install one, or use device=cpu",)) in llm.loaded.choice.refused
    assert llm.loaded.settings.cache_type.value == "f16"


def test_backends_and_devices_that_exclude_each_other() -> None:
    for settings in ({"backend": "cuda", "device": "cpu"}, {"backend": "native", "device": "cuda"}):
        with pytest.raises(KvfoldError, match=r"device=cpu was asked for|computes on the CPU|no NVIDIA"):
            LLM(**settings)  # type: ignore[arg-type]


def test_a_plan_for_a_gpu_has_its_memory_and_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (HOPPER,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: (2 << 30) + (3 << 28))
    checkpoint = open_checkpoint(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"))
    report = plan_report(checkpoint, Settings.parse(device="cuda", workspace_bytes=1 << 28), batch_rows=None)
    assert (report.backend.name, report.memory.cache_type) == ("cuda", "bf16")
    assert report.memory.free_bytes == (2 << 30) + (3 << 28)
    assert report.batch_rows == GPU_WINDOW_ROWS
    assert "(H200 profile, measured)" in report.phases[0].reason
