"""Where the weights lie: copied in their order and mapped give the same bits, every way of not copying has its sentence."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import kvfold.load
import kvfold.weight_memory
from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold import _native
from kvfold.backends import gpu, gpu_rates
from kvfold.backends.native import NativeBackend, _FirstAnswer, side_by_side
from kvfold.cache.pages import Sequence
from kvfold.config import ModelConfig
from kvfold.engine.batch import Work, build_batch
from kvfold.errors import Cancelled, ModelFileError, SettingError
from kvfold.formats.checkpoint import Checkpoint, open_checkpoint
from kvfold.formats.file_map import FileMap, map_file
from kvfold.formats.synthetic import synthesize, synthetic_checkpoint
from kvfold.formats.tensor_names import KvLayout
from kvfold.load import Loaded, Settings, in_memory_order, load, program_of
from kvfold.model.step import Step
from kvfold.prompt_window import step_buffer_bytes
from kvfold.quant.decode import decode_tensor
from kvfold.quant.interleave import deinterleave
from kvfold.quant.tensor import QuantTensor, matrices
from kvfold.quant.types import SIDE_BY_SIDE, by_name
from kvfold.weight_memory import (
    CHUNK_BYTES,
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    copied,
    huge_page_bytes,
    read_ahead,
)

SETTINGS: dict[str, Any] = {
    "backend": "native",
    "cache_type": "f32",
    "threads": 2,
    "n_ctx": 64,
    "workspace_bytes": 16 << 20,
}


def loaded(model: Path | Checkpoint, **settings: Any) -> Loaded:
    return load(model, Settings.parse(**(SETTINGS | settings)))


def all_tensors(checkpoint: Checkpoint) -> list[QuantTensor]:
    return [part for tensor in checkpoint.tensors.values() for part in matrices(tensor)]


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a file: its pages cannot be written to."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap) and base.readonly


def split_gguf(source: Path, directory: Path, count: int) -> Path:
    """The file as `count` shards. Returns the first."""
    reader = gguf.GGUFReader(source)
    shares = np.array_split(np.arange(len(reader.tensors)), count)
    for number, share in enumerate(shares):
        path = directory / f"split-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "deepseek2")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
                    continue
                kind = field.types[0]
                sub = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for index in share:
            tensor = reader.tensors[index]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return directory / f"split-00001-of-{count:05}.gguf"


FORMS = ("gguf-k_b", "gguf-kv_b", "gguf-split", "hf-fp8", "hf-fused", "hf-shards")


def written(form: str, path: Path) -> Path:
    model = tiny_model("v3")
    if form == "hf-fp8":
        return write_hf_dir(model, path / "hf", dtype="float8_e4m3fn", tokenizer=True)
    if form.startswith("hf"):
        return write_hf_dir(model, path / "hf", shards=3, fused=form == "hf-fused", tokenizer=True)
    layout = KvLayout.KV_B if form == "gguf-kv_b" else KvLayout.K_B_V_B
    file = write_gguf(model, path / "tiny.gguf", ftype="Q8_0", layout=layout)
    return split_gguf(file, path, 3) if form == "gguf-split" else file


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_the_file_bit_for_bit(form: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(form, tmp_path))
    loads = loaded(checkpoint, mmap="off", deterministic=True)
    copy = loads.checkpoint
    assert loads.weight_copy is not None and loads.weight_copy.nbytes >= copy.nbytes
    assert copy.maps == ()
    before, after = all_tensors(checkpoint), all_tensors(copy)
    assert [(t.name, t.type, t.shape) for t in before] == [(t.name, t.type, t.shape) for t in after]
    assert {len(w) for w in checkpoint.tensors.values() if isinstance(w, tuple)} == {
        len(w) for w in copy.tensors.values() if isinstance(w, tuple)
    }
    for mapped, moved in zip(before, after, strict=True):
        assert np.array_equal(mapped.raw, moved.raw), mapped.name
        assert is_mapped(mapped.raw) and not is_mapped(moved.raw), mapped.name
        assert not moved.raw.flags.writeable and moved.raw.flags.c_contiguous
        if mapped.scale is not None:
            assert moved.scale is not None and moved.scale.dtype == np.float32 and moved.scale.flags.aligned
            assert np.array_equal(mapped.scale, moved.scale) and not is_mapped(moved.scale), mapped.name
    assert any(t.scale is not None for t in before) == (form == "hf-fp8")


@pytest.mark.skipif(not _native.side_by_side_types("auto"), reason="this set multiplies rows as files have them")
def test_rows_of_products_lie_side_by_side_in_a_copy(tmp_path: Path) -> None:
    """Those of linear layers and experts; what is looked up or read along columns stays as the file has it."""
    checkpoint = open_checkpoint(written("gguf-k_b", tmp_path))
    copy = loaded(checkpoint, mmap="off").checkpoint
    kinds = set()
    for before, after in zip(all_tensors(checkpoint), all_tensors(copy), strict=True):
        stays = before.type.name != "Q8_0" or any(
            part in before.name for part in ("token_embd", "attn_k_b", "attn_v_b")
        )
        assert after.type == (before.type if stays else SIDE_BY_SIDE["Q8_0"]), before.name
        assert not after.raw.flags.writeable
        np.testing.assert_array_equal(decode_tensor(after), decode_tensor(before), before.name)
        kinds.add(stays)
    assert kinds == {True, False}


@pytest.mark.skipif(not _native.side_by_side_types("auto"), reason="this set multiplies rows as files have them")
def test_down_lies_side_by_side_where_gate_and_up_have_no_such_layout(tmp_path: Path) -> None:
    """V2-Lite in Q3_K: its experts' 1408 columns are no whole number of 256, so that down falls back to IQ4_NL."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 96, "intermediate_size": 256}
    synthesize(ModelConfig.from_hf(tiny_model("v3", **sizes).config), tmp_path / "model.gguf", type="q3_k")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    types = side_by_side(program_of(checkpoint, Settings.parse(**SETTINGS)), checkpoint.tensors, "auto")
    of_experts = {name: type.standard for name, type in types.items() if "_exps" in name or "_shexp" in name}
    assert of_experts and set(of_experts.values()) == {"IQ4_NL"}
    assert all("_down_" in name for name in of_experts)


@pytest.mark.skipif(not _native.side_by_side_types("auto"), reason="this set multiplies rows as files have them")
def test_weights_that_share_a_byte_stay_as_the_file_has_them(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written("gguf-k_b", tmp_path))
    program = program_of(checkpoint, Settings.parse(**SETTINGS))
    types = side_by_side(program, checkpoint.tensors, "auto")
    first, second = [name for name in types if name.endswith("attn_q_a.weight")][:2]
    ours = checkpoint.tensors[first]
    assert isinstance(ours, QuantTensor)
    bytes_of_both = np.zeros(ours.nbytes + 1, np.uint8)
    overlapping = {
        name: replace(ours, raw=bytes_of_both[start:][: ours.nbytes].reshape(ours.raw.shape))
        for name, start in ((first, 0), (second, 1))
    }
    left = side_by_side(program, {**checkpoint.tensors, **overlapping}, "auto")
    assert set(types) - set(left) == {first, second}


def assert_same(got: np.ndarray, want: np.ndarray, settings: dict[str, Any]) -> None:
    """The same bits where order is kept, and else as close as sums in another order are after three layers."""
    assert np.isfinite(want).all()
    if settings.get("deterministic"):
        np.testing.assert_array_equal(got, want)
    else:
        assert np.abs(got - want).max() <= 1e-3 * np.sqrt((want**2).mean())


BOTH_ORDERS = pytest.mark.parametrize(
    "order", [{"deterministic": True}, {}], ids=["as in the file", "side by side"]
)


@BOTH_ORDERS
@pytest.mark.parametrize("form", ["gguf-split", "hf-fp8"])
def test_a_copied_model_computes_what_a_mapped_one_does(form: str, order: dict[str, Any], tmp_path: Path) -> None:
    from kvfold import LLM

    path = written(form, tmp_path)
    ids = [1, 5, 9, 200, 3]
    logits = {way: LLM(path, mmap=way, **SETTINGS, **order).logits(ids) for way in ("on", "off", "auto")}
    assert_same(logits["off"], logits["on"], order)
    assert_same(logits["auto"], logits["on"], order)


def test_a_second_load_of_a_copy_copies_nothing(tmp_path: Path) -> None:
    first = loaded(written("gguf-k_b", tmp_path))
    second = loaded(first.checkpoint)
    assert second.weight_copy is None and second.weight_place == "in memory already"
    assert second.checkpoint is first.checkpoint
    with pytest.raises(SettingError, match="mmap=on: these weights are in memory"):
        loaded(first.checkpoint, mmap="on")


def test_weights_made_in_memory_lie_as_the_copy_of_their_file_does(tmp_path: Path) -> None:
    config, settings = ModelConfig.from_hf(tiny_model("v3").config), Settings.parse(**SETTINGS)
    synthesize(config, tmp_path / "model.gguf", type="q8_0", seed=3)
    copy = loaded(tmp_path / "model.gguf", mmap="off").checkpoint
    made = in_memory_order(synthetic_checkpoint(config, type="q8_0", seed=3), settings)
    for name, weight in copy.tensors.items():
        for there, here in zip(matrices(weight), matrices(made.tensors[name]), strict=True):
            assert here.type == there.type and not here.raw.flags.writeable, name
            np.testing.assert_array_equal(here.raw, there.raw, name)
    assert load(made, settings).weight_place == "in memory already"


# --- what fits -------------------------------------------------------------------------------------------------------


def needed_bytes(model: Loaded) -> int:
    layout = model.cache.layout
    cache = model.cache.num_pages * 64 * layout.bytes_per_token
    path = model.plan(model.window_rows, 0, True).path
    values = step_buffer_bytes(program_of(model.checkpoint, model.settings), path, model.window_rows)
    return model.checkpoint.nbytes + cache + model.settings.workspace_bytes + values


def test_auto_copies_what_fits_and_maps_what_is_a_byte_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written("gguf-k_b", tmp_path)
    needed = needed_bytes(loaded(path))
    monkeypatch.setattr(kvfold.load, "available_memory_bytes", lambda: needed)
    assert loaded(path).weight_copy is not None
    monkeypatch.setattr(kvfold.load, "available_memory_bytes", lambda: needed - 1)
    left = loaded(path)
    assert left.weight_copy is None and left.weight_place.startswith("mapped")
    assert all(is_mapped(tensor.raw) for tensor in all_tensors(left.checkpoint))
    assert any("stay mapped" in line for line in left.info)


def test_off_names_both_numbers_where_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("gguf-k_b", tmp_path)
    monkeypatch.setattr(kvfold.load, "available_memory_bytes", lambda: 1_230_000)
    with pytest.raises(SettingError, match=r"mmap=off.*take 0\.\d+ GB and 0\.00123 GB of memory are available"):
        loaded(path, mmap="off")


def test_a_system_that_gives_no_memory_leaves_auto_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    path = written("gguf-k_b", tmp_path)
    monkeypatch.setattr(kvfold.load, "copied", refuse)
    assert "Cannot allocate memory" in loaded(path).weight_place
    with pytest.raises(SettingError, match="Cannot allocate memory"):
        loaded(path, mmap="off")


def test_unknown_memory_is_mapped_unless_off_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("gguf-k_b", tmp_path)
    monkeypatch.setattr(kvfold.load, "available_memory_bytes", lambda: None)
    assert loaded(path, n_ctx=64).weight_copy is None
    assert loaded(path, mmap="off").weight_copy is not None


def test_on_stays_mapped_and_says_so(tmp_path: Path) -> None:
    left = loaded(written("gguf-k_b", tmp_path), mmap="on")
    assert left.weight_copy is None and left.weight_place == "mapped: requested"
    assert left.checkpoint.maps and left.info == left.checkpoint.info


@pytest.mark.parametrize("mmap", ["on", "off"])
def test_a_gpu_has_neither_map_nor_copy(mmap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "driver", lambda: gpu.Driver(13000, (gpu_rates.H200,)))
    monkeypatch.setattr(gpu, "refusals", lambda device: [])
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 16 << 30)
    with pytest.raises(
        SettingError, match=f"mmap={mmap}: backend cuda reads the weights into the memory of the GPU"
    ):
        load(written("gguf-k_b", tmp_path), Settings.parse(device="cuda", n_ctx=64, mmap=mmap))


def test_other_words_are_refused() -> None:
    with pytest.raises(SettingError, match="mmap=0: allowed are auto, on, off"):
        Settings.parse(mmap="0")


# --- the reader ------------------------------------------------------------------------------------------------------


def random_map(path: Path, nbytes: int) -> FileMap:
    path.write_bytes(np.random.default_rng(nbytes).bytes(nbytes))
    with path.open("rb") as file:
        return map_file(path, file)


def bytes_of(map: FileMap, start: int, stop: int) -> QuantTensor:
    raw = map.data[start:stop].reshape(1, -1)
    return QuantTensor("x", by_name("F32"), ((stop - start) // 4,), raw)


def test_ranges_over_chunks_files_and_holes_arrive_in_place(tmp_path: Path) -> None:
    """Unaligned ends, a hole that is skipped, equal bytes asked for twice, more bytes than one chunk."""
    large = random_map(tmp_path / "large", CHUNK_BYTES + 3 * PAGE_BYTES + 12)
    small = random_map(tmp_path / "small", 4 * PAGE_BYTES)
    cuts = [(0, 400), (300, 800), (3 * PAGE_BYTES + 4, CHUNK_BYTES + 3 * PAGE_BYTES + 12)]
    weights = {str(cut): bytes_of(large, *cut) for cut in cuts} | {"small": bytes_of(small, 12, 4 * PAGE_BYTES)}
    reports: list[tuple[int, int]] = []
    # the order of the maps is that of the files, not of their addresses
    for maps in ([large, small], [small, large]):
        moved, copy = copied(weights, maps, readers=3, progress=lambda *report: reports.append(report))
        for name, weight in weights.items():
            found = moved[name]
            assert isinstance(found, QuantTensor) and np.array_equal(found.raw, weight.raw), name
            place = found.raw.__array_interface__["data"][0] - weight.raw.__array_interface__["data"][0]
            assert place % PAGE_BYTES == 0, "a number keeps its alignment"
        assert copy.nbytes == 800 + (CHUNK_BYTES + 8) + (4 * PAGE_BYTES - 12)
        assert reports[0] == (0, copy.nbytes) and reports[-1] == (copy.nbytes, copy.nbytes)
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)
        reports.clear()


def test_readers_pause_before_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvfold.weight_memory, "CHUNK_BYTES", PAGE_BYTES)
    map = random_map(tmp_path / "file", 9 * PAGE_BYTES)
    asked: list[None] = []
    copied({"x": bytes_of(map, 0, 9 * PAGE_BYTES)}, [map], readers=2, pause=lambda: asked.append(None))
    assert len(asked) == 9


@pytest.mark.parametrize("chunk_bytes", [1000, PAGE_BYTES, CHUNK_BYTES])
def test_rows_are_put_side_by_side_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """In groups whatever is cut: experts that lie together, another type between them, bytes before and behind."""
    monkeypatch.setattr(kvfold.weight_memory, "CHUNK_BYTES", chunk_bytes)
    map = random_map(tmp_path / "file", 14 * PAGE_BYTES)
    layouts = [
        ("Q8_0", 32, 3),
        ("Q8_0", 32, 3),
        ("F32", 1, 40),
        ("Q4_0", 48, 5),
        ("IQ4_NL", 16, 64),
        ("Q4_K", 32, 3),
        ("Q6_K", 16, 2),
    ]
    weights, at = {}, 100
    for number, (name, rows, blocks) in enumerate(layouts):
        type = by_name(name)
        nbytes = rows * blocks * type.block_bytes
        raw = map.data[at : at + nbytes].reshape(rows, -1)
        weights[str(number)] = QuantTensor(str(number), type, (rows, blocks * type.block_elements), raw)
        at += nbytes
    types = {name: SIDE_BY_SIDE[weight.type.name] for name, weight in weights.items() if weight.type.name != "F32"}
    moved, _ = copied(weights, [map], readers=3, memory_types=types)
    for name, weight in weights.items():
        found = moved[name]
        assert isinstance(found, QuantTensor) and found.type == types.get(name, weight.type)
        raw = deinterleave(found.type, found.raw) if name in types else found.raw
        np.testing.assert_array_equal(raw, weight.raw, name)


def test_arrays_outside_the_maps_stay_what_they_are(tmp_path: Path) -> None:
    map = random_map(tmp_path / "file", PAGE_BYTES)
    elsewhere = QuantTensor("y", bytes_of(map, 0, 4).type, (4,), np.zeros((1, 16), np.uint8))
    moved, _ = copied({"x": bytes_of(map, 0, 64), "y": elsewhere}, [map], readers=1)
    kept = moved["y"]
    assert isinstance(kept, QuantTensor) and kept.raw is elsewhere.raw


@pytest.mark.parametrize("left", [0, 100, PAGE_BYTES + 1])
def test_a_file_that_became_shorter_is_named_with_the_byte(tmp_path: Path, left: int) -> None:
    map = random_map(tmp_path / "weights", 3 * PAGE_BYTES)
    os.truncate(map.path, left)
    with pytest.raises(ModelFileError, match="something shortened it") as failure:
        copied({"x": bytes_of(map, 0, 3 * PAGE_BYTES)}, [map], readers=2)
    assert failure.value.file == str(map.path) and failure.value.offset == left


def test_a_file_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    map = random_map(tmp_path / "weights", 64)
    (tmp_path / "new").write_bytes(bytes(64))
    os.replace(tmp_path / "new", map.path)
    with pytest.raises(ModelFileError, match="another file has taken its place"):
        copied({"x": bytes_of(map, 0, 64)}, [map], readers=1)
    map.path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read any more"):
        copied({"x": bytes_of(map, 0, 64)}, [map], readers=1)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages by madvise are Linux's")
def test_the_copy_begins_on_a_huge_page_and_their_count_is_that_of_the_system(tmp_path: Path) -> None:
    map = random_map(tmp_path / "file", 2 * HUGE_PAGE_BYTES)
    moved, copy = copied({"x": bytes_of(map, 0, 2 * HUGE_PAGE_BYTES)}, [map], readers=1)
    tensor = moved["x"]
    assert isinstance(tensor, QuantTensor)
    assert tensor.raw.__array_interface__["data"][0] % HUGE_PAGE_BYTES == 0
    assert copy.huge_bytes == huge_page_bytes(tensor.raw.reshape(-1))
    assert copy.huge_bytes is not None and copy.huge_bytes % HUGE_PAGE_BYTES == 0
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.exists() and "[never]" not in enabled.read_text():
        assert copy.huge_bytes > 0, "two free huge pages in all of the memory"
    assert huge_page_bytes(map.data) == 0, "a file map has none"


def test_reading_ahead_asks_for_every_byte_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = open_checkpoint(written("gguf-split", tmp_path)).maps
    assert len(maps) == 3
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: asked.append((start, size)))
    monkeypatch.setattr(kvfold.weight_memory, "_READ_AHEAD_BYTES", 50_000)
    maps[1].path.unlink()  # what cannot be opened any more is left to whoever reads it
    read_ahead(maps).join()
    expected = [(0, 0)]  # _reopened: sequential reads
    for map in (maps[0], maps[2]):
        expected += [(start, 50_000) for start in range(0, map.data.nbytes, 50_000)]
    assert [one for one in asked if one != (0, 0)] == expected[1:]


# --- answers from the map while a copy is made -------------------------------------------------------------------------


@pytest.fixture
def may_copy(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What every copy waits for."""
    event = threading.Event()
    copy = kvfold.weight_memory.copied

    def later(*arguments: Any, **settings: Any) -> Any:
        event.wait()
        return copy(*arguments, **settings)

    monkeypatch.setattr(kvfold.weight_memory, "copied", later)
    return event


@BOTH_ORDERS
def test_a_large_model_answers_from_its_map_and_moves_meanwhile(
    order: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_copy: threading.Event
) -> None:
    from kvfold import LLM

    path = written("gguf-k_b", tmp_path)
    ids = [1, 5, 9, 200, 3]
    may_copy.set()
    expected = LLM(path, **SETTINGS, **order).logits(ids)
    may_copy.clear()
    monkeypatch.setattr(kvfold.load, "EARLY_ANSWER_BYTES", 1)
    llm = LLM(path, **SETTINGS, **order)
    moving = llm.loaded.moving
    assert moving is not None and "meanwhile" in moving.place and "meanwhile" in llm.loaded.weight_place
    assert_same(llm.logits(ids), expected, order)  # before it has moved
    may_copy.set()
    made = moving.wait()
    assert made is not None and made.nbytes > 0 and moving.place.startswith("copied into memory at")
    os.truncate(path, 0)  # SIGBUS, if a weight were still read through the map
    assert_same(llm.logits(ids), expected, order)


@pytest.fixture
def moving_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_copy: threading.Event) -> Loaded:
    monkeypatch.setattr(kvfold.load, "EARLY_ANSWER_BYTES", 1)
    monkeypatch.setattr(kvfold.weight_memory, "BEGIN_SECONDS", 0.0)
    return load(written("gguf-k_b", tmp_path), Settings.parse(**SETTINGS | {"n_ctx": 256}), answers_early=True)


def step_of(model: Loaded, *, outputs: int) -> Step:
    return build_batch([Work(Sequence(model.pool), [1, 5, 9], is_prompt=True, outputs=outputs)], model.plan).step


def test_the_copy_gives_way_to_the_first_answer_and_to_no_other(
    moving_model: Loaded, monkeypatch: pytest.MonkeyPatch, may_copy: threading.Event
) -> None:
    """Beside the copy a first token of a large model took 2 to 4 times as long as from the map alone."""
    monkeypatch.setattr(_FirstAnswer, "GAP_SECONDS", 60.0)
    backend, moving = moving_model.backend, moving_model.moving
    assert isinstance(backend, NativeBackend) and moving is not None
    assert not backend.is_answering_first
    window, last = (backend.start(step_of(moving_model, outputs=outputs)) for outputs in (0, 1))
    for run, cut in ((window, 2), (window, None), (last, 2)):
        run.run(cut)
        assert backend.is_answering_first
        may_copy.set()
        time.sleep(0.1)  # a copy that does not wait takes 10 ms
        assert "meanwhile" in moving.place
    last.run()
    assert moving.wait() is not None
    backend.start(step_of(moving_model, outputs=1)).run(1)
    assert not backend.is_answering_first


def test_the_copy_does_not_wait_for_an_answer_that_never_comes(
    moving_model: Loaded, may_copy: threading.Event
) -> None:
    backend, moving = moving_model.backend, moving_model.moving
    assert isinstance(backend, NativeBackend) and moving is not None
    run = backend.start(step_of(moving_model, outputs=1))
    run.run(2)
    run.cancel()
    with pytest.raises(Cancelled):
        run.run()
    may_copy.set()
    assert moving.wait() is not None
    assert run.position == 2


LEAVES_EARLY = """
import sys, threading
import kvfold.load, kvfold.weight_memory
from kvfold import LLM
kvfold.load.EARLY_ANSWER_BYTES = 1
kvfold.weight_memory.CHUNK_BYTES = 4096
read, many = kvfold.weight_memory._read, threading.Semaphore(0)
def slow(*arguments):
    many.acquire(timeout=0.05)
    read(*arguments)
kvfold.weight_memory._read = slow
llm = LLM(sys.argv[1], backend="native", n_ctx=64, threads=2)
print(llm.logits([1, 2, 3]).shape, llm.loaded.moving.place)
"""


def test_a_process_that_ends_does_not_wait_for_the_copy_and_leaks_nothing(tmp_path: Path) -> None:
    path = written("gguf-k_b", tmp_path)
    command = [sys.executable, "-c", LEAVES_EARLY, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "meanwhile" in done.stdout and done.stderr == ""


def test_a_copy_that_fails_leaves_the_weights_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(kvfold.load, "EARLY_ANSWER_BYTES", 1)
    monkeypatch.setattr(kvfold.weight_memory, "copied", refuse)
    settings = Settings.parse(**SETTINGS)
    left = load(written("gguf-k_b", tmp_path), settings, answers_early=True)
    assert left.moving is not None and left.moving.wait() is None
    assert "Cannot allocate memory" in left.moving.place
    assert load(left.checkpoint.path, settings).moving is None, "who measures waits for the copy"


# --- a file that is shortened while it is mapped -----------------------------------------------------------------------

TRUNCATED = """
import os, signal, sys
from pathlib import Path
from kvfold import LLM
if sys.argv[2] == "handled":
    import faulthandler
    faulthandler.enable()
llm = LLM(sys.argv[1], mmap="on", backend="native", n_ctx=64, threads=2)
if sys.argv[2] == "elsewhere":
    import mmap
    Path(sys.argv[1] + "x").write_bytes(bytes(8192))
    with open(sys.argv[1] + "x", "rb") as file:
        other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(sys.argv[1] + "x", 0)
    print(other[5000])
elif sys.argv[2] != "gone":
    os.truncate(sys.argv[1], 4096)
    llm.logits([1, 2, 3])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="SIGBUS is what Linux answers with")
@pytest.mark.parametrize(("case", "code"), [("weights", 1), ("handled", 1), ("elsewhere", -7), ("gone", 0)])
def test_a_file_truncated_under_its_map_is_named_and_nothing_else_is(tmp_path: Path, case: str, code: int) -> None:
    path = written("gguf-k_b", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED, path, case], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    if code == 1:
        assert done.stderr.startswith(f"kvfold: {path}: byte "), done.stderr
        assert done.stderr.count("\n") == 1 and "shortened the file" in done.stderr
    else:
        assert "kvfold" not in done.stderr
