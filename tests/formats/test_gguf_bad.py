"""No GGUF file crashes the reader, hangs it or fills the memory: what is wrong with it is said in a typed error."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.bad_gguf import (
    BAD_FILES,
    BAD_MODELS,
    BOOL,
    FLOAT64,
    INT16,
    UINT8,
    BadFile,
    document,
    key,
    model_file,
    numbers,
    tensor,
    vocabulary,
)
from kvfold.errors import KvfoldError, ModelFileError
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.formats.gguf import StringArray, open_gguf


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(BAD_FILES) >= 120
    assert len(BAD_MODELS) >= 40
    names = [case.name for case in BAD_FILES + BAD_MODELS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", BAD_FILES, ids=lambda case: case.name)
def test_bad_files_are_refused_by_file_and_reason(case: BadFile, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    with pytest.raises(case.error) as caught:
        open_gguf(path)
    assert type(caught.value) is case.error
    assert str(tmp_path) in str(caught.value)
    assert case.reason in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("case", BAD_MODELS, ids=lambda case: case.name)
def test_models_that_cannot_be_are_refused_by_file_and_key(case: BadFile, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    open_gguf(path)  # the file itself is good
    with pytest.raises(case.error) as caught:
        open_checkpoint(path)
    assert path.name in str(caught.value)
    assert case.reason in str(caught.value)


# Opens the whole corpus in one process and prints, for each file, the time and by how much the peak memory grew. Time
# is the processor's: other tests run beside this one. A reader that waits for something meets the timeout.
MEASURE = """
import json, sys, tempfile, time
from pathlib import Path
from kit.bad_gguf import BAD_FILES
from kvfold.errors import KvfoldError
from kvfold.formats.gguf import open_gguf

def peak_mb():  # not ru_maxrss: a child starts with its parent's
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

paths = json.loads(sys.stdin.read())
before = peak_mb()
for name, path in paths:
    start = time.process_time()
    try:
        open_gguf(path)
        raise SystemExit(f"{name} opened")
    except KvfoldError:
        pass
    print(json.dumps([name, time.process_time() - start, peak_mb() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_no_bad_file_takes_a_second_or_200_mb(tmp_path: Path) -> None:
    paths = []
    for index, case in enumerate(BAD_FILES):
        folder = tmp_path / str(index)
        folder.mkdir()
        paths.append((case.name, os.fspath(case.build(folder))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment,
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in measured] == [case.name for case in BAD_FILES]
    slowest, largest = max(measured, key=lambda m: m[1]), max(measured, key=lambda m: m[2])
    assert slowest[1] < 1.0, slowest
    assert largest[2] < 200, largest


def header_bytes(content: bytes, path: Path) -> int:
    """Where the data section of a good file begins."""
    path.write_bytes(content)
    with open_gguf(path) as file:
        return min(tensor.offset for tensor in file.tensors.values())


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    content = model_file()
    header = header_bytes(content, tmp_path / "whole.gguf")
    assert 4096 <= header <= 5000
    assert len(content) > 20 * header
    # the last tensor ends with the file, so every cut takes something from somewhere
    cuts = [*range(header + 1), *random.Random(7).sample(range(header + 1, len(content)), 200), len(content) - 1]
    path = tmp_path / "cut.gguf"
    for length in cuts:
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError) as caught:
            open_gguf(path)
        assert str(path) in str(caught.value), length
        assert caught.value.offset in range(length + 1), f"cut at {length}: {caught.value}"


# What the fields of a hostile header hold rather than random bits.
EDGES = [
    0,
    1,
    2,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**61,
    2**62,
    2**63 - 1,
]
EDGES += [2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1]


def mutate(content: bytes, header: int, rng: random.Random) -> bytes:
    """One to four edits, most of them in the header: bits, fields, and pieces that are lost, doubled or moved."""
    mutant = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(header, len(mutant)) if rng.random() < 0.95 else len(mutant))
        length = rng.choice((1, 4, 8, 8, 24, 200))
        match rng.randrange(7):
            case 0:
                mutant[at] ^= 1 << rng.randrange(8)
            case 1:
                mutant[at] = rng.randrange(256)
            case 2:
                mutant[at : at + 8] = rng.choice(EDGES).to_bytes(8, "little")
            case 3:
                mutant[at : at + 4] = (rng.choice(EDGES) % 2**32).to_bytes(4, "little")
            case 4:
                del mutant[at : at + length]
            case 5:
                mutant[at:at] = mutant[at : at + length]
            case 6:
                source = rng.randrange(len(mutant))
                mutant[at : at + length] = mutant[source : source + length]
        mutant = mutant or bytearray(1)
    return bytes(mutant)


def seeds_of_mutants() -> list[bytes]:
    model = model_file(shapes={"token_embd.weight": (40, 4), "output.weight": (40, 4)})
    small = document(
        [
            key("general.alignment", 8),
            key("s", "text"),
            key("b", True),
            key("d", 2.5, FLOAT64),
            numbers("bools", BOOL, [0, 1, 1]),
            numbers("shorts", INT16, [-1, 2]),
            *vocabulary(4, type=6, first="<0x00>")[:2],
            key("split.no", 0),
            key("split.count", 1),
        ],
        [tensor("a", (8, 2), offset=0), tensor("q", (32, 2), 2, 64), tensor("r", (32, 8), 202, 104)],
        bytes(248),
        alignment=8,
    )
    tiny = document([numbers("a", UINT8, [1])], [tensor("t", (8,))], bytes(32))
    return [model, small, tiny]


def assert_mutants_are_read_or_refused(folder: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    bases = [(content, header_bytes(content, folder / "base.gguf")) for content in seeds_of_mutants()]
    refused = 0
    for number in range(count):
        content, header = bases[number % len(bases)]
        mutant = mutate(content, header, rng)
        path = folder / f"{number}.gguf"  # a new file each time: the last one may still be mapped
        path.write_bytes(mutant)
        start = time.process_time()
        try:
            with open_gguf(path) as file:
                for value in file.metadata.values():
                    if isinstance(value, StringArray):
                        assert len(list(value)) == len(value)
                for t in file.tensors.values():
                    assert t.offset + t.nbytes <= len(mutant)
                    t.raw.sum()  # outside the file, this read would end the process
        except KvfoldError as error:
            refused += 1
            assert str(path) in str(error)
        except Exception as error:
            raise AssertionError(f"mutant {number} of seed {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < 1.0, f"mutant {number} of seed {seed}"
        path.unlink()
    assert count * 0.3 < refused < count, f"{refused} of {count} mutants were refused: the mutations are too tame"


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    assert_mutants_are_read_or_refused(tmp_path, 2_000, seed=8)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_many_mutated_files_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    assert_mutants_are_read_or_refused(tmp_path, 2_000, seed=100 + seed)
