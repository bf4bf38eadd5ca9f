"""The command line in this process: what the console script runs, with its exit code and both streams."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.command_line import Done, Kvfold
from kit.tiny_models import tiny_model, write_gguf
from kvfold.cli.main import main


@pytest.fixture
def kvfold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Kvfold]:
    """kvfold("run", "-n", "4", "text", stdin=b"..."): a Done."""
    for name in [name for name in os.environ if name.startswith("KVFOLD_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3-shaped model of three layers with a byte-level vocabulary, in F32."""
    return write_gguf(tiny_model("v3"), tmp_path_factory.mktemp("cli") / "tiny.gguf")
