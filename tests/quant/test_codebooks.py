"""The committed codebooks of the compiled decoder are those of the installed gguf package."""

import importlib.util
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"


def test_codebooks_inc_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_codebooks", KERNELS / "make_codebooks.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (KERNELS / "codebooks.inc").read_text() == script.generate()
