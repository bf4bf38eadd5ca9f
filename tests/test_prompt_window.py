"""The rows of a prompt's step follow from memory, and their values are inside what is counted for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.tiny_models import tiny_model, write_gguf
from kvfold import LLM
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.load import Settings, cache_layout, program_of, prompt_window
from kvfold.mla.plan import Path as AttentionPath
from kvfold.prompt_window import (
    LEAST_WINDOW_ROWS,
    MOST_WINDOW_BYTES,
    default_workspace_bytes,
    step_buffer_bytes,
    window_rows,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model("v3"), tmp_path_factory.mktemp("m") / "m.gguf")


@pytest.mark.parametrize(
    ("free", "mib"), [(None, 256), (100 * MIB, 64), (4096 * MIB, 128), (4000 * MIB, 125), (1 << 40, 256)]
)
def test_the_workspace_is_a_32nd_of_the_free_memory_within_bounds(free: int | None, mib: int) -> None:
    assert default_workspace_bytes(free) == mib * MIB


def test_a_window_fits_its_share_whatever_memory_is_left(path: Path) -> None:
    program = program_of(open_checkpoint(path), Settings.parse())
    kind = AttentionPath.DECOMPRESSED
    head = step_buffer_bytes(program, kind, 0)
    for left in (None, 0, 64 * MIB, 300 * MIB, 1 << 40):
        rows = window_rows(program, kind, left_bytes=left, n_ctx=1 << 24)
        budget = MOST_WINDOW_BYTES if left is None else min(left // 4, MOST_WINDOW_BYTES)
        assert rows % 64 == 0 and rows >= LEAST_WINDOW_ROWS
        fits = [step_buffer_bytes(program, kind, n) - head <= budget for n in (rows, rows + 64)]
        assert fits == ([True, False] if rows > LEAST_WINDOW_ROWS else [False, False]), left
    assert window_rows(program, kind, left_bytes=None, n_ctx=1000) == 1024, "no longer than the context"


def test_weights_and_cache_are_taken_off_before_the_window(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    settings = Settings.parse(n_ctx=1 << 20, workspace_bytes=64 * MIB)
    program = program_of(checkpoint, settings)
    per_token = cache_layout(checkpoint.config, settings).bytes_per_token
    others = checkpoint.nbytes + 64 * MIB + (1 << 20) * per_token
    kind = AttentionPath.DECOMPRESSED
    for left in (100 * MIB, 400 * MIB):
        expected = window_rows(program, kind, left_bytes=left, n_ctx=1 << 20)
        assert expected > LEAST_WINDOW_ROWS
        assert prompt_window(program, checkpoint, settings, 1 << 20, others + left) == expected


def test_a_forced_number_of_rows_goes_before_the_window(path: Path) -> None:
    llm = LLM(path, n_ctx=256)
    assert llm.batch_rows == llm.loaded.window_rows == 256
    assert LLM(path, n_ctx=256, batch_rows=7).batch_rows == 7
