"""Which NVIDIA GPUs there are and what is free on them, asked of the driver itself: without torch, and nothing stays behind.

Owns the reasons why a GPU cannot serve, each with what would. Everything that computes there is backends/cuda.py.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache

from kvfold.errors import SettingError, install_extra

SMALLEST_CAPABILITY = (8, 0)  # bf16 on the matrix units, asynchronous copies
OLDEST = {"torch": (2, 8), "triton": (3, 6)}  # torch.mm into another type; Gluon for Hopper
# CU_DEVICE_ATTRIBUTE_*: clocks in kHz, the bus in bits
_CLOCK, _MULTIPROCESSORS, _MEMORY_CLOCK, _BUS, _MAJOR, _MINOR = 13, 16, 36, 37, 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
OR_CPU = ", or use device=cpu"  # ends every sentence about a GPU that cannot serve


@dataclass(frozen=True)
class Gpu:
    """capability: (9, 0) is Hopper. total_bytes: all of its memory, used or not. clock_khz: at its highest.
    memory_gbps: 10^9 bytes a second by the memory's clock and bus."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    num_multiprocessors: int
    clock_khz: int
    memory_gbps: float


@dataclass(frozen=True)
class Driver:
    """version: the newest CUDA it serves, 13000 for 13.0; 0 without a driver. failure: why one that is there does not
    start, in its own words; empty if it does."""

    version: int
    gpus: tuple[Gpu, ...]
    failure: str = ""


class TakesNoWork(SettingError):
    """A GPU that is there and of the right kind makes no context. In words, with the driver's own reason."""


def _library() -> ctypes.CDLL:
    """The driver's. OSError where it is not installed."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@cache
def driver() -> Driver:
    """What the NVIDIA driver of this machine reports; no GPUs where there is none. It takes 0.1 s to start with an H200."""
    try:
        cuda = _library()
    except OSError:
        return Driver(0, ())
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))  # needs no start
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error:
        return Driver(version.value, (), "" if error == _NO_DEVICE else _error_name(cuda, error))
    return Driver(version.value, tuple(_gpu(cuda, index) for index in range(count.value)))


def _error_name(cuda: ctypes.CDLL, error: int) -> str:
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(error, ctypes.byref(name))
    return (name.value or b"an error without a name").decode(errors="replace") + f" ({error})"


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    label = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(label, len(label), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Gpu(
        label.value.decode(errors="replace"),
        (attribute(_MAJOR), attribute(_MINOR)),
        total.value,
        attribute(_MULTIPROCESSORS),
        attribute(_CLOCK),
        2 * attribute(_MEMORY_CLOCK) * 1e3 * attribute(_BUS) / 8 / 1e9,  # two transfers a clock
    )


def check_device(device: str) -> None:
    """SettingError unless auto, cpu, cuda or cuda:N."""
    head, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (head == "cuda" and number.isdecimal()):
        raise SettingError(f"device={device}: allowed are auto, cpu, cuda, cuda:0 and so on.")


def is_wanted(device: str) -> bool:
    """Whether a GPU would compute: asked for, or found where anything may. Imports nothing."""
    if device != "auto":
        return device.startswith("cuda")
    packages = (importlib.util.find_spec(name) is not None for name in ("torch", "triton"))
    return any(map(_has_kernels, driver().gpus)) and all(packages)


def devices(device: str) -> list[str]:
    """Those that a setting may mean, in the order in which they are tried. auto and cuda: every GPU that has kernels."""
    if device not in ("auto", "cuda"):
        return [device]
    return [f"cuda:{index}" for index, found in enumerate(driver().gpus) if _has_kernels(found)] or [device]


def device_index(device: str) -> int:
    """The number of a GPU. auto and cuda: the first that has kernels, 0 where none has."""
    number = device.partition(":")[2]
    if number:
        return int(number)
    return next((index for index, found in enumerate(driver().gpus) if _has_kernels(found)), 0)


def in_words(devices: list[str]) -> str:
    """GPUs in ascending order: "cuda:0 to cuda:3, cuda:6"."""
    runs: list[list[str]] = []
    for device in devices:
        if runs and device_index(device) == device_index(runs[-1][-1]) + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _has_kernels(found: Gpu) -> bool:
    return found.capability >= SMALLEST_CAPABILITY


def refusals(device: str) -> list[str]:
    """Why no kernel can run on this device (auto, cuda or cuda:N), with what would serve; empty where one can, if the GPU
    takes work (free_bytes). Imports torch only where there is a GPU of the right kind."""
    reason = _refusal(device)
    return [reason + OR_CPU] if reason else []


def _refusal(device: str) -> str:
    found = driver()
    if not found.version:
        return "no NVIDIA driver was found: install one"
    if found.failure:
        return f"the NVIDIA driver is there but does not start: {found.failure}. Ask nvidia-smi"
    if not found.gpus:
        return "the NVIDIA driver finds no GPU: look whether CUDA_VISIBLE_DEVICES hides it"
    index = device_index(device)
    if index >= len(found.gpus):
        return f"there is no GPU {index}: this machine has {len(found.gpus)}, the first is cuda:0. Use that"
    gpu = found.gpus[index]
    if not _has_kernels(gpu):
        have, need = (".".join(map(str, c)) for c in (gpu.capability, SMALLEST_CAPABILITY))
        return f"{gpu.name} has compute capability {have}, the kernels need {need} (Ampere, 2020) or newer: use another"
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: {install_extra('cuda')}"
    for name, oldest in OLDEST.items():
        installed = _version(name)
        if installed and _numbers(installed) < oldest:
            need = ".".join(map(str, oldest))
            return f"{name} {installed} is too old, {need} is needed: {install_extra('cuda')}"
    import torch

    if torch.version.cuda is None:
        return (
            "this torch was built without CUDA: pip install --force-reinstall torch --index-url "
            "https://download.pytorch.org/whl/cu130"
        )
    if not torch.cuda.is_available():
        serves = f"{found.version // 1000}.{found.version % 1000 // 10}"
        return (
            f"the NVIDIA driver serves CUDA {serves} and torch was built for {torch.version.cuda}: update the driver, "
            f"install a torch for CUDA {serves}"
        )
    return ""


def _version(name: str) -> str:
    """Empty where a package comes under another name, as nightly builds do."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 11, 0) of 2.11.0+cu130."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def free_bytes(device: str) -> int:
    """Free memory of a GPU that `refusals` has none against, beside a context of this process. Raises TakesNoWork.

    The context is the GPU's primary one, which torch computes in too. Where nobody else in this process has it, it is made
    for the question and given back: 0.55 GB and 150 ms on an H200. torch.cuda.mem_get_info would leave it there.
    """
    index = device_index(device)
    cuda, gpu = _library(), ctypes.c_int()
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(gpu), index)
    error = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
    if not error:
        error = cuda.cuCtxPushCurrent_v2(context)
        if not error:
            error = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
        cuda.cuDevicePrimaryCtxRelease_v2(gpu)
    if error:
        found = driver().gpus[index]
        raise TakesNoWork(f"{found.name} takes no work: {_error_name(cuda, error)}. Ask nvidia-smi{OR_CPU}")
    return free.value
