"""What a longer context takes on native beside its cached rows: page lists, and what lies inside of the workspace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backends.test_native_team import run_alone
from kit.tiny_models import tiny_model, write_gguf

MIB = 1 << 20
WORKSPACE_BYTES = 16 * MIB
DEPTHS = 100, 32_000

# One token behind 100 cached ones, then one behind 32,000: prints what the second added to the memory of the process, and
# how much of that are rows of the cache. Every row is written before it is read, as a prompt does.
GROWTH = """
import mmap, sys
from pathlib import Path
import numpy as np
from kvfold.cache.pages import Sequence
from kvfold.engine.batch import Work, build_batch
from kvfold.load import Settings, load

path, mla, fa, cache_type, workspace_bytes, *depths = sys.argv[1:]
shallow, deep = map(int, depths)
loaded = load(path, Settings.parse(
    backend="native", dtype="int8", threads=2, n_ctx=deep + 64, workspace_bytes=int(workspace_bytes),
    mla=mla, fa=fa, cache_type=cache_type,
))
sequence = Sequence(loaded.pool)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

def token_at(depth):
    sequence.reserve(depth + 1)
    for array in loaded.cache.arrays:
        for layer in array:
            layer[sequence.pages] = 0
    sequence.length = depth
    batch = build_batch([Work(sequence, [7], False, outputs=1)], loaded.plan)
    run = loaded.backend.start(batch.step)
    run.run()
    assert np.isfinite(run.outputs["logits"]).all()
    sequence.length = 0

token_at(shallow)
before, pages_before = resident(), len(sequence.pages)
token_at(deep)
page_bytes = loaded.cache.nbytes // loaded.cache.num_pages
print(resident() - before, (len(sequence.pages) - pages_before) * page_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the memory of the process as Linux does")
@pytest.mark.parametrize(
    ("mla", "fa", "cache_type"),
    [("1", "1", "f16"), ("1", "1", "q8_0"), ("1", "0", "q8_0"), ("2", "1", "f16"), ("2", "0", "bf16"), ("0", "1", "f16")],
)  # fmt: skip
def test_a_deep_token_takes_cache_rows_and_workspace_alone(
    mla: str, fa: str, cache_type: str, tmp_path: Path
) -> None:
    """16 heads of the released sizes: scores of 32,000 keys without fusing are 2 MiB a layer, expanded keys and values
    650 MiB."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 2}
    path = write_gguf(tiny_model("v2-lite", **sizes, **heads), tmp_path / "m.gguf")
    ((grown, row_bytes),) = (
        map(int, line.split())
        for line in run_alone(GROWTH, str(path), mla, fa, cache_type, str(WORKSPACE_BYTES), *map(str, DEPTHS))
    )
    print(f"grown {grown / MIB:.2f} MiB, rows {row_bytes / MIB:.2f} MiB")
    assert row_bytes > 0.9 * 32_000 * 2 * 576 * 1.0625
    assert grown <= row_bytes + WORKSPACE_BYTES + MIB
