"""A forced instruction set is the one that runs: shown by the bits that it alone gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvfold
from backends.test_kernels import native_product
from backends.test_native import WIDE
from kit.harness import Harness
from kit.tiny_models import tiny_model
from kvfold import _native
from kvfold.config import ModelConfig
from kvfold.engine.batch import Work, build_batch
from kvfold.errors import SettingError
from kvfold.formats.synthetic import synthesize
from kvfold.load import Settings
from kvfold.quant.tensor import QuantTensor, matrices

ISAS = _native.isa_names()


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    _native.force_isa("auto")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("isa") / "m.gguf"
    synthesize(ModelConfig.from_hf(tiny_model("v3", **WIDE).config), file, type="IQ4_NL")
    return file


@pytest.mark.parametrize("isa", ISAS)
def test_the_head_has_the_bits_of_the_forced_kernels(isa: str, path: Path) -> None:
    """Sums of products are added in another order by each set, so most of the bits are its own, of row dots (3 rows)
    and tiles (20 rows). For Q6_K, which the head is, AMX has AVX-512's kernels for both. Rows stay in the file's order,
    which every set multiplies."""
    same = {other: True for other in ISAS}
    for num_rows in (3, 20):
        harness = Harness(path, backend="native", dtype="int8", isa=isa, mmap="on")
        assert harness.loaded.backend.isa == _native.isa() == isa  # type: ignore[attr-defined]
        weight = harness.loaded.checkpoint.tensors["output.weight"]
        assert isinstance(weight, QuantTensor)
        tokens = list(range(1, num_rows + 1))
        batch = build_batch([Work(harness.sequence(), tokens, True, outputs=num_rows)], harness.loaded.plan)
        _native.force_isa("auto")  # a loaded model keeps its kernels
        run = harness.loaded.backend.start(batch.step)
        run.run()
        hidden, logits = np.ascontiguousarray(run.outputs["hidden"]), run.outputs["logits"]
        for other in ISAS:
            _native.force_isa(other)
            same[other] &= np.array_equal(native_product(hidden, weight), logits)
    assert weight.type.name == "Q6_K"
    shared = {"amx", "avx512"}
    assert {other for other in ISAS if same[other]} == (shared & set(ISAS) if isa in shared else {isa})


@pytest.mark.parametrize("isa", ISAS)
def test_every_weight_has_the_kernels_of_the_forced_set(isa: str, path: Path) -> None:
    """By the functions themselves: of AMX, tiles of types whose blocks share a scale over 32 weights or more are its own,
    row dots and Q6_K's tiles AVX-512's."""
    loaded = Harness(path, backend="native", dtype="int8", isa=isa).loaded
    _native.force_isa("auto")
    kernels = loaded.backend._program.kernels  # type: ignore[attr-defined]
    types = {name: matrices(loaded.checkpoint.tensors[name])[0].type.name_in_file for name in kernels}
    assert {"IQ4_NL", "Q6_K"} <= set(types.values())
    for name, (dots, tiles) in kernels.items():
        if isa == "amx":
            has_own = types[name] in ("IQ4_NL", "Q8_0")
            assert (dots, tiles) == ("avx512", "amx" if has_own else "avx512"), (name, types[name])
        else:
            assert (dots, tiles) == (isa, isa), (name, types[name])


def test_float32_has_the_same_bits_on_every_set(path: Path) -> None:
    """The order of sums in float32 tiles is fixed: kernels/tile.h."""
    results = [Harness(path, backend="native", dtype="float32", isa=isa).logits(list(range(30))) for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        assert np.array_equal(result, results[0]), isa


SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
from kvfold import _native
print(*_native.isa_names())
"""


@pytest.mark.skipif("amx" not in ISAS, reason="needs a processor with AMX, and a Linux that grants tiles")
def test_where_linux_refuses_tiles_avx512_runs() -> None:
    """A thread whose stack for signals does not hold 8 KiB of tiles is refused them."""
    environment = os.environ | {"PYTHONPATH": str(Path(kvfold.__file__).parents[1])}
    command = [sys.executable, "-c", SMALL_SIGNAL_STACK]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["avx512", "avx2", "generic"]


def test_a_set_that_is_not_there_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"isa=sse9: allowed are auto, generic, avx2, avx512, amx\."):
        Settings.parse(isa="sse9")
    monkeypatch.setattr(_native, "isa_names", lambda: ["avx2", "generic"])
    with pytest.raises(
        SettingError, match="native: isa=avx512: this processor, system and build have avx2, generic"
    ):
        Harness(path, backend="native", isa="avx512")
    with pytest.raises(SettingError, match="plain: isa=generic is for backend native"):
        Harness(path, backend="plain", isa="generic")
