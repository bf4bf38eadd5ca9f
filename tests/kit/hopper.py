"""What a Hopper kernel needs, found by compiling it for sm_90a in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 232_448  # what one block may have


def compiled(kind: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "kernels" / "compile_gluon.py"
    done = subprocess.run(
        [sys.executable, str(script), kind], capture_output=True, text=True, env=environment, check=False
    )
    if "No module named 'triton.experimental.gluon" in done.stderr:
        pytest.skip("this Triton has no Gluon for Hopper: 3.6 or later is needed")
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
