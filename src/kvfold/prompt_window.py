"""How many prompt rows one step takes, and what its values need: arithmetic over a recorded program.

A window is as large as memory allows, because weights are read, and cached latents expanded, once a window:

    workspace = free memory / 32, from 64 to 256 MiB               tiles of weights, keys and scores; --workspace.
                                                                   More where the threads and the context need it
    left      = free memory - weights - cache (n_ctx tokens) - workspace
    window    = min(left / 4, 2 GiB) / bytes of a row              at least 512 rows, whole pages; -b bounds it

The bytes of a row are those alive at the fullest op of a layer, and x twice: 156 kB for V2-Lite, whose dense layer has two
values of 10,944 numbers, so 2 GiB hold 13,760 rows.
More would let others wait longer (engine/runner.py cuts between layers) and gains little: at 8192 rows a prompt of twice
that length expands its first half once more, 5 % of the work.
"""

from __future__ import annotations

from kvfold.cache.latent import PAGE_TOKENS
from kvfold.mla.plan import Path
from kvfold.model.program import Domain, Program

LEAST_WORKSPACE_BYTES = 64 << 20
MOST_WORKSPACE_BYTES = 256 << 20
MOST_WINDOW_BYTES = 2 << 30
LEAST_WINDOW_ROWS = 512


def default_workspace_bytes(free_bytes: int | None) -> int:
    """Scratch memory of a step; free_bytes None: the system does not tell."""
    if free_bytes is None:
        return MOST_WORKSPACE_BYTES
    return min(max(free_bytes // 32 >> 20 << 20, LEAST_WORKSPACE_BYTES), MOST_WORKSPACE_BYTES)


def window_rows(program: Program, path: Path, *, left_bytes: int | None, n_ctx: int) -> int:
    """Prompt rows of a step on this path. left_bytes: memory beside weights, cache and workspace, None: not known."""
    budget = MOST_WINDOW_BYTES if left_bytes is None else min(left_bytes // 4, MOST_WINDOW_BYTES)
    # between two large steps: what does not grow with the rows falls out
    row_bytes = (step_buffer_bytes(program, path, 8192) - step_buffer_bytes(program, path, 4096)) // 4096
    rows = max(budget // row_bytes, LEAST_WINDOW_ROWS)
    return min(rows, n_ctx + PAGE_TOKENS - 1) // PAGE_TOKENS * PAGE_TOKENS


def step_buffer_bytes(program: Program, path: Path, rows: int) -> int:
    """Bytes of what a step of `rows` rows on one path holds at its fullest op: the buffers alive there, the hidden rows
    of this segment and the next, and what the head hands over for one output row."""
    num_rows = {
        Domain.ROWS: rows,
        Domain.OUTPUTS: 1,
        Domain.ABSORBED: rows if path is Path.ABSORBED else 0,
    }
    fullest = 0
    for segment in program.segments:
        x_out = segment.x_out.buffer if segment.x_out else 0
        elsewhere = {0, x_out, *(value.buffer for _, value in segment.outputs)}
        buffers = [buffer for index, buffer in enumerate(segment.buffers) if index not in elsewhere]
        for op in range(len(segment.ops)):
            alive = (b.width * num_rows[b.domain] for b in buffers if b.first <= op <= b.last)
            fullest = max(fullest, sum(alive))
    hidden = rows * program.segments[0].buffers[0].width
    outputs = sum(value.width for segment in program.segments for _, value in segment.outputs)
    return 4 * (fullest + 2 * hidden + outputs)
