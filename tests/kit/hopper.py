"""What a Hopper kernel needs, found by compiling it for sm_90a in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

HOPPER_SHARED_BYTES = 232_448  # what one block may have


@functools.cache
def compiler() -> tuple[subprocess.Popen[str], IO[bytes]]:
    """One for all kernels, since it takes 4 s until it has imported torch and Triton; and the file that it writes errors to."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "kernels" / "compile_gluon.py"
    said = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
        env=environment,
    )  # fmt: skip
    return process, said


def compiled(kind: str) -> dict[str, int]:
    process, said = compiler()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{kind}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        compiler.cache_clear()  # it has ended
        process.communicate()
        said.seek(0)
        error = said.read().decode()
        if "No module named 'triton.experimental.gluon" in error:
            pytest.skip("this Triton has no Gluon for Hopper: 3.6 or later is needed")
        raise AssertionError(error[-2000:])
    found: dict[str, int] = json.loads(line)
    return found
