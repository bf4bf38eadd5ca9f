"""README.md says what is so: its example runs, its table names every type, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from kit.tiny_models import tiny_model, write_gguf
from kvfold.cli.later import LATER_FLAGS
from kvfold.cli.main import app
from kvfold.errors import install_extra
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


@pytest.mark.parametrize("extra", ["cuda", "torch"])
def test_what_an_error_says_to_install_is_what_the_readme_installs(extra: str) -> None:
    command = install_extra(extra).removesuffix(" where kvfold was cloned")
    assert command in README
    assert "kvfold[" not in README  # no registry has it
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert extra in found["project"]["optional-dependencies"]


def test_answers_shown_in_pages_are_those_given() -> None:
    answers = {f"{flag.names[0]} is not there yet. Today: {flag.today}." for flag in LATER_FLAGS}
    shown = [
        line
        for page in (ROOT / "docs").glob("*.md")
        for line in re.findall("kvfold: (-.* is not there yet.*)", page.read_text())
    ]
    assert shown and set(shown) <= answers


def test_links_lead_somewhere() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "*.md"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.splitlines()
    pages = ("ARCHITECTURE", "first-ten-minutes", "storyteller")
    assert {"README.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in pages)} <= set(names)
    missing = []
    for name in names:
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
        here = (ROOT / name).parent
        missing += [f"{name}: {link}" for link in links if "://" not in link and not (here / link).exists()]
    assert not missing, f"links that lead nowhere: {missing}"


def test_every_command_shown_is_understood() -> None:
    """Verbs and options as the command line has them; nothing is run."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    (commands,) = re.findall(r"## Command line\n+```sh\n(.*?)```", README, re.DOTALL)
    shown = re.findall(r"^(?:.*\| )?kvfold (\S+)([^#\n]*)", commands, re.MULTILINE)
    assert {"run", "chat", "inspect", "plan", "bench", "synth"} <= {verb for verb, _ in shown}
    for verb, rest in shown:
        known = {name for option in verbs[verb].params for name in option.opts}
        written = [word for word in shlex.split(rest) if re.match(r"--?[a-z]", word)]
        assert set(written) <= known, f"kvfold {verb}{rest}"


@pytest.mark.parametrize("page", ["README.md", "docs/ARCHITECTURE.md", "docs/notes/loading.md"])
def test_every_option_named_is_there(page: str) -> None:
    """Between backticks, an option that some verb has, or answers by what to use today."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {name for verb in verbs.values() for option in verb.params for name in option.opts}
    known |= {name for flag in LATER_FLAGS for name in flag.names}
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", (ROOT / page).read_text()))
    assert named and named <= known, f"{page}: {sorted(named - known)}"


def test_the_transcript_is_there() -> None:
    (region,) = re.findall(r"<!-- transcript -->(.*?)<!-- /transcript -->", README, re.DOTALL)
    assert '$ kvfold run "Once upon a time"' in region
    assert "t/s" in region
