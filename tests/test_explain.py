"""What inspect and plan report: figures that follow from the published shapes, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold.backends import gpu, gpu_rates
from kvfold.backends.choose import native_profile
from kvfold.cache.latent import CacheType
from kvfold.explain import inspect_file, memory_of, phase, plan_report, weight_group
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.formats.synthetic import SHAPES, shape_with_layers, synthesize
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.load import MOST_TOKENS, Settings, plan_for, program_of
from kvfold.mla.plan import ARITHMETIC, CPU_CODES, MachineProfile, MlaPlan, choose, crossover_rows, multiply_adds
from kvfold.mla.plan import Path as AttentionPath
from kvfold.model.program import Buffer, Domain, OpRecord, Program, Segment, Value
from kvfold.prompt_window import step_buffer_bytes


@pytest.fixture(scope="module")
def synth_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("explain") / "tiny.gguf"
    synthesize(SHAPES["tiny"], file)
    return file


def test_a_gguf_file_shows_metadata_types_and_cache(synth_gguf: Path) -> None:
    found = inspect_file(synth_gguf)
    assert (found.refusal, found.format, found.kv_layout) == ("", "GGUF", "k_b+v_b")
    assert found.metadata["general.architecture"] == "deepseek2"
    assert found.metadata["tokenizer.ggml.tokens"] == "array of 1024 strings"
    assert {use.type for use in found.types} == {"IQ4_NL", "Q6_K", "F32"}
    assert sum(use.num_tensors for use in found.types) == len(found.tensors)
    assert sum(tensor.nbytes for tensor in found.tensors) == found.nbytes == open_checkpoint(synth_gguf).nbytes
    # 2 layers: 576 numbers as latents, 4 heads of 192 + 128 as keys and values
    assert [(c.cache_type, c.latent_bytes, c.full_bytes) for c in found.cache] == [
        ("f32", 4608, 10240),
        ("f16", 2304, 5120),
        ("bf16", 2304, 5120),
        ("q8_0", 1224, 2720),
        ("fp8", 1312, None),
    ]
    assert found.backend


def test_a_cache_type_that_a_model_cannot_have_has_no_bytes(tmp_path: Path) -> None:
    """Latents of 32 + 16 numbers fill no blocks of q8_0, heads of 24 + 16 none either, and fp8 wants groups of 128."""
    found = inspect_file(
        write_gguf(tiny_model("v2-lite", kv_lora_rank=96, qk_rope_head_dim=64), tmp_path / "m.gguf")
    )
    assert {c.cache_type: c.latent_bytes is not None for c in found.cache} == {
        "f32": True, "f16": True, "bf16": True, "q8_0": True, "fp8": False
    }  # fmt: skip
    narrow = inspect_file(write_gguf(tiny_model("v2-lite"), tmp_path / "n.gguf"))
    assert [c.cache_type for c in narrow.cache if c.latent_bytes] == ["f32", "f16", "bf16"]


def test_a_directory_shows_the_same_model(tmp_path: Path) -> None:
    directory = write_hf_dir(tiny_model("v3"), tmp_path / "hf", dtype="float8_e4m3fn", shards=2)
    found = inspect_file(directory)
    assert (found.refusal, found.format, found.kv_layout) == ("", "safetensors", "kv_b")
    assert len(found.files) == 2
    assert found.metadata["model_type"] == "deepseek_v3"
    assert {use.type for use in found.types} == {"F8_E4M3", "BF16", "F32"}
    assert found.nbytes == open_checkpoint(directory).nbytes
    assert found.config == tiny_model("v3").model_config


def test_a_directory_around_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tiny_model("v3"), tmp_path / "one.gguf")
    assert inspect_file(tmp_path).tensors == inspect_file(tmp_path / "one.gguf").tensors


def test_inspect_and_loading_agree_on_what_a_directory_is(tmp_path: Path) -> None:
    directory = write_hf_dir(tiny_model("v3"), tmp_path / "both")
    write_gguf(tiny_model("v2-lite"), directory / "other.gguf")
    checkpoint, found = open_checkpoint(directory), inspect_file(directory)
    assert (found.format, found.nbytes, found.config) == (checkpoint.format, checkpoint.nbytes, checkpoint.config)
    assert found.metadata["model_type"] == "deepseek_v3"

    two = tmp_path / "two"
    two.mkdir()
    for name in ("a", "b"):
        write_gguf(tiny_model("v2-lite"), two / f"{name}.gguf")
    found = inspect_file(two)
    assert "several models, name one of a.gguf, b.gguf" in found.refusal
    assert (found.format, found.tensors) == ("", ())


def test_spare_tensors_are_noted(tmp_path: Path) -> None:
    found = inspect_file(write_gguf(tiny_model("v3"), tmp_path / "both.gguf", include_both=True))
    assert found.refusal == ""
    assert any("attn_kv_b" in line for line in found.info)


def test_a_refused_model_shows_everything_up_to_the_refusal(tmp_path: Path) -> None:
    file = write_gguf(tiny_model("v3"), tmp_path / "llama.gguf", architecture="llama")
    found = inspect_file(file)
    assert "general.architecture is 'llama'" in found.refusal
    assert found.metadata["general.architecture"] == "llama"
    assert (found.config, found.cache) == (None, ())
    assert found.types

    tensors = {"blk.1.ffn_norm.weight": None}
    incomplete = write_gguf(tiny_model("v3"), tmp_path / "incomplete.gguf", tensors=tensors)
    found = inspect_file(incomplete)
    assert "missing: blk.1.ffn_norm.weight" in found.refusal
    assert len(found.tensors) == len(inspect_file(file).tensors) - 1


def test_a_broken_file_is_refused_with_its_reason(tmp_path: Path, synth_gguf: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(synth_gguf.read_bytes()[:5000])
    found = inspect_file(broken)
    assert str(broken) in found.refusal and "truncated" in found.refusal
    assert (found.format, found.metadata, found.tensors) == ("", {}, ())


# --- plan ------------------------------------------------------------------------------------------------------------


def settings(**chosen: object) -> Settings:
    return Settings.parse(**chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("layout", list(KvLayout))
def test_every_tensor_of_every_shape_has_its_group(shape: str, layout: KvLayout) -> None:
    config = SHAPES[shape]
    groups: dict[str, int] = {}
    for spec in expected_tensors(config, layout):
        size = 1
        for dim in spec.shape:
            size *= dim
        groups[weight_group(spec.name)] = groups.get(weight_group(spec.name), 0) + size
    moe = config.moe
    assert moe is not None
    moe_layers = config.num_layers - config.num_dense_layers
    hidden = config.hidden_size
    assert groups["embedding and head"] == 2 * config.vocab_size * hidden
    assert groups["dense layers"] == config.num_dense_layers * 3 * hidden * config.intermediate_size
    assert groups["shared experts"] == moe_layers * 3 * hidden * moe.shared_intermediate_size
    assert groups["routed experts"] == moe_layers * 3 * hidden * moe.num_experts * moe.expert_intermediate_size
    assert groups["norms and routers"] < groups["attention"]


def test_memory_adds_up_and_follows_the_settings(synth_gguf: Path) -> None:
    checkpoint = open_checkpoint(synth_gguf)
    latent = plan_report(checkpoint, settings(n_ctx=1000, workspace_bytes=5 << 20), batch_rows=512).memory
    assert latent.weight_bytes == checkpoint.nbytes
    assert (latent.latent_cache_bytes, latent.full_cache_bytes) == (2_304_000, 5_120_000)
    assert latent.cache_bytes == latent.latent_cache_bytes
    assert latent.needed_bytes == checkpoint.nbytes + 2_304_000 + (5 << 20) + latent.buffer_bytes
    full = plan_report(checkpoint, settings(n_ctx=1000, mla=0, cache_type="f32"), batch_rows=512).memory
    assert full.cache_bytes == full.full_cache_bytes == 10_240_000


def test_a_gpu_holds_two_workspaces(synth_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the room for the cache is computed with."""
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 16 << 30)
    asked = settings(n_ctx=1000, workspace_bytes=5 << 20, device="cuda")
    found = plan_report(open_checkpoint(synth_gguf), asked, batch_rows=512)
    assert (found.backend.name, found.memory.workspace_bytes) == ("cuda", 10 << 20)


def test_whether_it_fits_is_a_comparison_with_free_memory(
    synth_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(synth_gguf)
    for free, fits in ((1 << 40, True), (1 << 20, False), (None, None)):
        monkeypatch.setattr("kvfold.explain.available_memory_bytes", lambda free=free: free)
        assert plan_report(checkpoint, settings(n_ctx=64), batch_rows=512).memory.fits is fits


def test_the_buffers_of_a_step_are_those_alive_at_its_fullest_op() -> None:
    """By hand: an op reads [T, 8] and writes [T, 30]; the next reads that and writes x; the head has one row."""

    def op(inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> OpRecord:
        return OpRecord("linear", "", inputs, outputs)

    x, normed, wide, out = Value(0, 0, 8), Value(1, 0, 8), Value(2, 0, 30), Value(3, 0, 8)
    folded, logits = Value(4, 0, 100), Value(1, 0, 50)
    buffers = (
        Buffer(8, Domain.ROWS, -1, 0),
        Buffer(8, Domain.ROWS, 0, 1),
        Buffer(30, Domain.ROWS, 1, 3),
        Buffer(8, Domain.ROWS, 3, 4),
        Buffer(100, Domain.ABSORBED, 2, 3),
    )
    ops = (op((x,), (normed,)), op((normed,), (wide,)), op((wide,), (folded,)), op((wide, folded), (out,)))
    layer = Segment("blk.0", ops, buffers, out)
    head = Segment(
        "head", (op((x,), (logits,)),), (buffers[0], Buffer(50, Domain.OUTPUTS, 0, 1)), None, (("logits", logits),)
    )
    program = Program((layer, head), ())
    assert step_buffer_bytes(program, AttentionPath.DECOMPRESSED, 7) == 4 * (7 * (8 + 30) + 2 * 7 * 8 + 50)
    assert step_buffer_bytes(program, AttentionPath.ABSORBED, 7) == 4 * (7 * (30 + 100) + 2 * 7 * 8 + 50)


def test_plan_counts_the_buffers_of_the_path_it_takes(synth_gguf: Path) -> None:
    checkpoint = open_checkpoint(synth_gguf)

    def buffers(mla: int, batch_rows: int, n_ctx: int = 4096) -> int:
        return plan_report(checkpoint, settings(n_ctx=n_ctx, mla=mla), batch_rows=batch_rows).memory.buffer_bytes

    # folded queries and latent outputs, 4 heads of 576 and 512, are alive together; so are q and an output of 192 + 128
    assert buffers(1, 1024) > 1024 * 4 * (576 + 512) * 4 > buffers(2, 1024) > 1024 * 4 * (192 + 128) * 4
    head = 4 * (SHAPES["tiny"].vocab_size + SHAPES["tiny"].hidden_size)
    assert buffers(1, 2048) - head == 2 * (buffers(1, 1024) - head)
    assert buffers(1, 2048, n_ctx=1024) == buffers(1, 1024)  # a step is no longer than the context


def test_plan_counts_the_buffers_of_the_path_that_this_machine_takes(synth_gguf: Path) -> None:
    checkpoint = open_checkpoint(synth_gguf)

    def buffers(machine: MachineProfile, mla: int | None = None) -> int:
        chosen = settings(n_ctx=4096) if mla is None else settings(n_ctx=4096, mla=mla)
        return memory_of(program_of(checkpoint, chosen), checkpoint, chosen, 4096, 1024, None, machine).buffer_bytes

    slow, fast = 1e-3, 1e3
    absorbing = MachineProfile("absorbs", latents=fast, folding=fast, expansion=slow, heads=slow)
    expanding = MachineProfile("expands", latents=slow, folding=slow, expansion=fast, heads=fast)
    assert buffers(absorbing) == buffers(ARITHMETIC, mla=1) > buffers(expanding) == buffers(ARITHMETIC, mla=2)


def test_what_fits_without_the_buffers_of_a_step_does_not_fit(
    synth_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(synth_gguf)
    memory = plan_report(checkpoint, settings(n_ctx=4096, mla=1), batch_rows=2048).memory
    monkeypatch.setattr("kvfold.explain.available_memory_bytes", lambda: memory.needed_bytes - 1)
    assert plan_report(checkpoint, settings(n_ctx=4096, mla=1), batch_rows=2048).memory.fits is False
    assert plan_report(checkpoint, settings(n_ctx=4096, mla=1), batch_rows=1024).memory.fits is True


def test_phases_count_every_step_of_every_layer() -> None:
    config = SHAPES["deepseek-v3"]
    found = phase("", config, settings(), 5000, 100, is_prompt=True, batch_rows=2048, machine=ARITHMETIC)
    windows = [(2048, 100), (2048, 2148), (904, 4196)]
    assert found.steps == ((AttentionPath.DECOMPRESSED, 3),)
    for path, macs in found.forced:
        assert macs == 61 * sum(multiply_adds(path, config.mla, *window) for window in windows)
    assert found.macs == dict(found.forced)[AttentionPath.DECOMPRESSED]
    assert found.reason == choose(config.mla, new_rows=904, cached_rows=4196, is_prompt=True).reason


def test_a_phase_may_change_its_path_between_steps() -> None:
    config = SHAPES["deepseek-v3"]
    found = phase("", config, settings(), 2048 + 100, 0, is_prompt=True, batch_rows=2048, machine=ARITHMETIC)
    assert found.steps == ((AttentionPath.DECOMPRESSED, 1), (AttentionPath.ABSORBED, 1))
    assert found.macs < min(macs for path, macs in found.forced if path is not AttentionPath.STANDARD)


@pytest.mark.parametrize(
    "machine", [ARITHMETIC, CPU_CODES["avx512"], gpu_rates.gpu_profile(gpu_rates.H200, CacheType.BF16, "int8")]
)
@pytest.mark.parametrize(
    ("new_rows", "cached_rows", "batch_rows"),
    [
        (5000, 0, 171),
        (40_000, 0, 160),
        (3000, 7, 1),
        (1, 4095, 512),
        (1000, 300, 150),
        (4096, 0, 512),
        (90_000, 0, 75),
    ],
)
def test_a_phase_is_the_sum_of_its_steps(
    machine: MachineProfile, new_rows: int, cached_rows: int, batch_rows: int
) -> None:
    """Walked one by one, where the report finds by bisection which step changes the path."""
    config = SHAPES["deepseek-v3"]
    found = phase(
        "", config, settings(), new_rows, cached_rows, is_prompt=True, batch_rows=batch_rows, machine=machine
    )
    steps: dict[AttentionPath, int] = {}
    macs = dict.fromkeys((None, *AttentionPath), 0)
    for start in range(0, new_rows, batch_rows):
        window = min(batch_rows, new_rows - start), cached_rows + start
        plan = choose(config.mla, new_rows=window[0], cached_rows=window[1], is_prompt=True, machine=machine)
        steps[plan.path] = steps.get(plan.path, 0) + 1
        for path in macs:
            macs[path] += config.num_layers * multiply_adds(path or plan.path, config.mla, *window)
    assert found.steps == tuple(steps.items())
    assert {None: found.macs, **dict(found.forced)} == macs
    assert found.reason == plan.reason


def test_the_longest_context_takes_no_longer_to_plan(synth_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32,768 steps; 15 halvings find where the path changes."""
    asked = 0

    def counted(*arguments: object, **named: object) -> MlaPlan:
        nonlocal asked
        asked += 1
        assert asked < 1000
        return plan_for(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("kvfold.explain.plan_for", counted)
    report = plan_report(open_checkpoint(synth_gguf), settings(n_ctx=MOST_TOKENS), batch_rows=1 << 16)
    assert sum(count for _, count in report.phases[2].steps) == 1 << 15


def test_a_v3_file_of_two_layers_plans_as_the_paper_counts(tmp_path: Path) -> None:
    """Without its 4 GB: the vocabulary and the experts are cut, which attention does not see."""
    whole = shape_with_layers(SHAPES["deepseek-v3"], 2)
    assert whole.moe is not None
    moe = replace(whole.moe, num_experts=8, num_groups=4, num_groups_per_tok=2, num_experts_per_tok=2)
    config = replace(
        whole,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        moe=replace(moe, expert_intermediate_size=256, shared_intermediate_size=256),
    )
    file = tmp_path / "v3.gguf"
    synthesize(config, file, legacy_kv_b=True)
    report = plan_report(open_checkpoint(file), settings(n_ctx=163840), batch_rows=2048)
    assert report.memory.latent_cache_bytes == 163840 * 2 * 576 * 2
    assert report.crossovers[0].rows == 1  # tests/mla/test_plan.py has the paper's numbers, this machine its own
    assert [c.rows for c in report.crossovers] == [
        crossover_rows(config.mla, c.depth, native_profile(CacheType.F16)) for c in report.crossovers
    ]
    first, half, whole_context, generation = report.phases
    assert (first.new_rows, half.cached_rows, whole_context.new_rows) == (512, 81920, 163840)
    assert generation.steps == ((AttentionPath.ABSORBED, 1),)
    # one row over 163,840 keys: 128 heads x (576 + 512) a key, and folding and unfolding 131,072 each head
    assert generation.macs == 2 * 128 * (163840 * 1088 + 131072)
    assert whole_context.steps == ((AttentionPath.DECOMPRESSED, 80),)
    assert report.backend.name


@pytest.mark.parametrize(
    ("chosen", "head_lanes"), [({"isa": "generic"}, 16), ({"dtype": "float32", "backend": "native"}, 1)]
)
def test_a_plan_has_measured_rates_only_for_what_was_measured(
    chosen: dict[str, str], head_lanes: int, synth_gguf: Path
) -> None:
    """Whatever instruction set is in use. Tiles of heads are of all where products round."""
    report = plan_report(open_checkpoint(synth_gguf), settings(**chosen), batch_rows=64)
    counted = replace(ARITHMETIC, head_lanes=head_lanes)
    assert all(c.rows == crossover_rows(report.config.mla, c.depth, counted) for c in report.crossovers)
    assert "arithmetic profile" in report.phases[0].reason
    assert ("in tiles of 16 heads" in report.rates) == (head_lanes == 16)


@pytest.mark.parametrize(("cache_type", "latents"), [("q8_0", "48"), ("f16", "24"), ("bf16", "24")])
def test_a_plan_says_the_rates_of_its_cache_and_the_tiles_it_pays_for(
    cache_type: str, latents: str, synth_gguf: Path
) -> None:
    report = plan_report(
        open_checkpoint(synth_gguf), settings(backend="native", cache_type=cache_type), batch_rows=64
    )
    assert report.rates == native_profile(CacheType(cache_type)).in_words
    words = native_profile(CacheType(cache_type), "avx2").in_words
    assert f"over latents {latents}," in words
    assert "absorbed in tiles of 16 heads" in words


def test_a_context_of_one_token_has_a_plan(synth_gguf: Path) -> None:
    report = plan_report(open_checkpoint(synth_gguf), settings(n_ctx=1), batch_rows=2048)
    assert [p.new_rows for p in report.phases] == [1, 1, 1, 1]


def test_a_backend_that_cannot_run_is_part_of_the_report(synth_gguf: Path) -> None:
    report = plan_report(open_checkpoint(synth_gguf), settings(backend="native", dtype="bfloat16"), batch_rows=64)
    assert report.backend.name == ""
    assert "float32 only" in report.backend.reason
