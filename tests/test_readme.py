"""README.md says what is so: its example runs, its table names every type, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from kit.tiny_models import tiny_model, write_gguf
from kvfold.quant.types import TYPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    write_gguf(tiny_model("v3"), tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-c", example.replace("n_ctx=8192", "n_ctx=1024")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r" (stop|length) [\d.]+\n", done.stdout)


def test_the_table_names_every_type_that_decodes() -> None:
    words = set(re.findall(r"\w+", README))
    assert {t.name for t in TYPES if t.decodes and t.interleaved_rows == 1} <= words


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
        assert links
        missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
        assert not missing, f"{name} links to {missing}"
