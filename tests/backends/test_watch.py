"""What a run looks at beside computing: NaN and infinity by layer and op, and times that are sums of what ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf
from kvfold.backends.native import NativeBackend
from kvfold.backends.profile import BETWEEN, Profile, group_of
from kvfold.engine.batch import Work
from kvfold.errors import NumericsError
from kvfold.mla.plan import Path as MlaPath
from kvfold.mla.plan import multiply_adds
from kvfold.model.op_work import Work as OpWork


def model(folder: Path, **tensors: Any) -> Path:
    return write_gguf(tiny_model("v3"), folder / "m.gguf", **({"tensors": tensors} if tensors else {}))


def native(path: Path, **settings: Any) -> Harness:
    return Harness(path, backend="native", **settings)


IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def spoiled(path: Path, folder: Path, name: str, value: float) -> Path:
    """The file with the last number of a float32 tensor changed."""
    loaded = native(path).loaded
    tensor = loaded.checkpoint.tensors[name]
    assert not isinstance(tensor, tuple)
    values = tensor.raw.view(np.float32).reshape(tensor.shape).copy()
    values[..., -1] = value
    return write_gguf(tiny_model("v3"), folder / "spoiled.gguf", tensors={name: values})


@pytest.mark.parametrize(
    ("weight", "value", "sentence"),
    [
        ("blk.1.ffn_norm.weight", np.nan, r"blk\.1\.ffn_norm: 1 of \d+ values are NaN in row 0"),
        ("blk.0.attn_norm.weight", np.inf, r"blk\.0\.attn_norm: 1 of \d+ values are infinite in row 0"),
        ("blk.1.exp_probs_b.bias", np.nan, r"blk\.1\.route: (\d+) of \1 values are NaN in row 0"),
        ("output_norm.weight", np.nan, r"output_norm: 1 of \d+ values are NaN in row 0"),
    ],
)
def test_the_op_that_made_it_is_named(weight: str, value: float, sentence: str, tmp_path: Path) -> None:
    path = spoiled(model(tmp_path), tmp_path, weight, value)
    for mla in ("0", "1", "2"):
        with pytest.raises(NumericsError, match=sentence):
            native(path, mla=mla, check_numerics=True).logits(IDS)
    assert not np.isfinite(native(path).logits(IDS)).all(), "off, it is not looked for"


@pytest.mark.parametrize("backend", ["native", "plain"])
def test_a_router_that_compares_with_nan_answers_with_nan(backend: str, tmp_path: Path) -> None:
    """A bias only chooses: its NaN reaches no weight by itself, and an expert would be gone in silence."""
    path = spoiled(model(tmp_path), tmp_path, "blk.1.exp_probs_b.bias", np.nan)
    assert np.isnan(Harness(path, backend=backend).logits(IDS)).all()


@pytest.mark.parametrize("mla", ["0", "1", "2", "3"])
def test_memory_that_no_op_wrote_is_not_looked_at(mla: str, tmp_path: Path) -> None:
    """Rows of the other path in shared buffers are garbage until they are written."""
    harness = native(model(tmp_path), mla=mla, check_numerics=True)
    first, second = harness.sequence(), harness.sequence()
    harness.step([Work(first, IDS, True), Work(second, IDS[:3], True)])
    harness.step([Work(first, [1], False), Work(second, IDS, True)])
    harness.step([Work(first, [1], False), Work(second, [2], False)])


def profiled(path: Path, **settings: Any) -> tuple[Harness, Profile]:
    harness = native(path, profile=True, **settings)
    backend = harness.loaded.backend
    assert isinstance(backend, NativeBackend) and backend.profile is not None
    return harness, backend.profile


@pytest.mark.parametrize("mla", list("0123"))
def test_the_work_of_ops_is_that_of_the_plan(mla: str, tmp_path: Path) -> None:
    harness, profile = profiled(model(tmp_path), mla=mla)
    config = harness.loaded.model.config
    sequence = harness.sequence()
    for rows, phase in ((8, "prompt"), (3, "prompt"), (1, "generation")):
        path = harness.loaded.plan(rows, sequence.length, phase == "prompt").path
        expected = config.num_layers * multiply_adds(path, config.mla, rows, sequence.length)
        harness.step([Work(sequence, IDS[:rows], phase == "prompt")])
        totals = profile.take()
        assert {key[0] for key in totals} == {phase}
        attention = ("fold", "attend", "unfold", "expand + attend", "append")
        counted = sum(total.work.multiply_adds for (_, group), total in totals.items() if group in attention)
        assert counted == expected


@pytest.mark.parametrize("outputs", [0, 1, 8])
def test_behind_the_last_attention_only_output_rows_go_on(outputs: int, tmp_path: Path) -> None:
    harness, profile = profiled(model(tmp_path))
    config = harness.loaded.model.config
    assert config.moe is not None and config.is_moe_layer(config.num_layers - 1)
    harness.step([Work(harness.sequence(), IDS[:8], True, outputs)])
    done = {group: total.work.multiply_adds for (_, group), total in profile.take().items()}
    rows = 8 * (config.num_layers - 1) + outputs
    assert done["out"] == rows * config.mla.num_heads * config.mla.v_head_dim * config.hidden_size
    inner = (
        config.moe.num_experts_per_tok * config.moe.expert_intermediate_size + config.moe.shared_intermediate_size
    )
    expert_rows = rows - 8 * config.num_dense_layers
    assert done["experts + shared"] == expert_rows * 3 * config.hidden_size * inner
    assert done["head"] == outputs * config.vocab_size * config.hidden_size


def test_bytes_are_those_of_the_weights_and_rows_that_were_read(tmp_path: Path) -> None:
    harness, profile = profiled(model(tmp_path), mla="1", cache_type="f32")
    loaded = harness.loaded
    config, tensors = loaded.model.config, loaded.checkpoint.tensors
    sequence = harness.sequence()
    harness.step([Work(sequence, IDS, True)])
    profile.take()
    harness.step([Work(sequence, [7], False)])
    totals = profile.take()
    by_group = {group: total.work.nbytes for (_, group), total in totals.items()}
    assert by_group["attend"] == config.num_layers * 9 * config.mla.latent_dim * 4
    assert by_group["head"] == tensors["output.weight"].nbytes  # type: ignore[union-attr]
    assert config.moe is not None
    moe_layers = config.num_layers - config.num_dense_layers
    expert = 3 * config.hidden_size * config.moe.expert_intermediate_size
    shared = 3 * config.hidden_size * config.moe.shared_intermediate_size
    assert by_group["experts + shared"] == moe_layers * (config.moe.num_experts_per_tok * expert + shared) * 4
    assert totals["generation", "experts + shared"].work.multiply_adds == by_group["experts + shared"] // 4
    assert by_group[BETWEEN] == by_group["norm"] == 0


def test_times_and_calls_add_up(tmp_path: Path) -> None:
    harness, profile = profiled(model(tmp_path), mla="3")
    first, second = harness.sequence(), harness.sequence()
    harness.step([Work(first, IDS, True)])
    harness.step([Work(first, [1], False), Work(second, IDS, True)])
    harness.step([Work(first, [1], False)])
    totals = profile.take()
    layers = harness.loaded.model.config.num_layers
    assert [phase for phase, group in totals if group == "embed"] == ["prompt", "mixed", "generation"]
    assert totals["prompt", "expand + attend"].calls == totals["mixed", "attend"].calls == layers
    assert ("generation", "expand + attend") not in totals and ("prompt", "fold") not in totals
    assert all(total.ns > 0 for total in totals.values())
    assert profile.take() == {}


def test_without_it_nothing_is_timed(tmp_path: Path) -> None:
    harness = native(model(tmp_path))
    assert harness.loaded.backend.profile is None  # type: ignore[attr-defined]
    assert harness.loaded.plan(1, 0, False).path in MlaPath


def test_groups_are_by_the_last_part_of_a_name() -> None:
    assert group_of("blk.12.ffn_gate_shexp") == "shared gate + up"
    assert group_of("head") == "head"
    assert group_of("blk.0.something_new") == "something_new"
    assert OpWork(1, 2) + OpWork(3, 4) == OpWork(4, 6)
