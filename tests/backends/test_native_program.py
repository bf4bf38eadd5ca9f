"""What a recorded Program promises beside its numbers: cuts, cancelling, moving weights, refusing what does not fit."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.harness import Harness
from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold import _native
from kvfold.backends.native import NativeBackend, NativeRun, _layout, _parts, _segment
from kvfold.cache.latent import PAGE_TOKENS
from kvfold.engine.batch import Work, build_batch
from kvfold.errors import Cancelled, SettingError
from kvfold.load import Loaded
from kvfold.model.program import record
from kvfold.model.step import Step
from kvfold.quant.tensor import QuantTensor, matrices


def ids(length: int, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 272, length)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model("v3"), tmp_path_factory.mktemp("native") / "m.gguf")


def native(path: Path, **settings: Any) -> Harness:
    return Harness(path, backend="native", **settings)


def start(harness: Harness, *texts: list[int]) -> NativeRun:
    """One step with a new sequence for each text, all rows wanted."""
    works = [Work(harness.sequence(), text, is_prompt=True, outputs=len(text)) for text in texts]
    return harness.loaded.backend.start(build_batch(works, harness.loaded.plan).step)  # type: ignore[return-value]


def finished(run: NativeRun) -> dict[str, np.ndarray]:
    run.run()
    return {name: array.copy() for name, array in run.outputs.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mla", ["0", "1", "2"])
def test_steps_interleave_at_every_cut(mla: str, path: Path) -> None:
    """A stops at a cut, B runs whole, A goes on; then both take turns segment by segment."""
    texts = [ids(50), ids(3, 1)], [ids(90, 2)]
    harness = native(path, mla=mla)
    expected = [finished(start(harness, *text)) for text in texts]
    segments = harness.loaded.model.num_segments
    for cut in range(segments + 1):
        harness = native(path, mla=mla, seed=cut)
        a = start(harness, *texts[0])
        assert a.run(cut) == cut
        assert a.position == cut
        assert same(finished(start(harness, *texts[1])), expected[1])
        assert same(finished(a), expected[0])
    harness = native(path, mla=mla)
    runs = [start(harness, *text) for text in texts]
    for cut in range(1, segments + 1):
        for run in runs:
            assert run.run(cut) == cut
    assert [same(dict(run.outputs), e) for run, e in zip(runs, expected, strict=True)] == [True, True]


def test_a_step_has_no_outputs_before_its_head(path: Path) -> None:
    harness = native(path)
    run = start(harness, ids(5))
    run.run(harness.loaded.model.num_segments - 1)
    assert run.outputs == {}
    run.run()
    assert run.outputs["logits"].shape == (5, 272)
    assert run.outputs["hidden"].shape == (5, 64)


def test_a_step_may_want_no_rows(path: Path) -> None:
    harness = native(path)
    work = Work(harness.sequence(), ids(70), is_prompt=True, outputs=0)
    run = harness.loaded.backend.start(build_batch([work], harness.loaded.plan).step)
    run.run()
    assert run.outputs["logits"].shape == (0, 272)


def test_a_row_is_the_same_whoever_else_is_wanted(path: Path) -> None:
    harness, text = native(path, deterministic=True), ids(70)
    last = Work(harness.sequence(), text, is_prompt=True, outputs=3)
    run = harness.loaded.backend.start(build_batch([last], harness.loaded.plan).step)
    run.run()
    every = finished(start(harness, text))
    assert all(np.array_equal(run.outputs[name], every[name][-3:]) for name in ("hidden", "logits"))


def test_a_cancelled_step_stops_at_its_cut_and_goes_on(path: Path) -> None:
    harness = native(path)
    expected = finished(start(harness, ids(50)))
    for cut in range(harness.loaded.model.num_segments):
        run = start(harness, ids(50))
        run.run(cut)
        run.cancel()
        with pytest.raises(Cancelled, match=f"before segment {cut}"):
            run.run()
        assert run.position == cut
        assert same(finished(run), expected)


def test_another_thread_sees_progress_and_cancels(tmp_path: Path) -> None:
    """run() holds no lock of Python: the position moves while it works, and cancel() reaches it."""
    tiny = tiny_model("v2-lite", num_hidden_layers=12)
    harness = native(write_gguf(tiny, tmp_path / "m.gguf"), mla="1", threads=1)
    run = start(harness, ids(1000))

    def watch() -> None:
        while run.position < 2:
            time.sleep(0.001)
        run.cancel()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(Cancelled):
        run.run()
    watcher.join()
    assert 2 <= run.position < harness.loaded.model.num_segments
    resumed = finished(run)
    assert same(resumed, finished(start(harness, ids(1000))))


def test_a_signal_is_handled_at_a_cut(tmp_path: Path) -> None:
    """Ctrl-C does not wait for the end of a long prompt, and the step may still go on afterwards."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    harness = native(
        write_gguf(tiny_model("v2-lite", num_hidden_layers=16), tmp_path / "m.gguf"), mla="1", threads=1
    )
    run = start(harness, ids(1500))
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        watcher = threading.Thread(target=signal_at_cut, args=(run, 2))
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            run.run()
        watcher.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert 2 <= run.position < harness.loaded.model.num_segments
    assert run.run() == harness.loaded.model.num_segments


def signal_at_cut(run: NativeRun, cut: int) -> None:
    while run.position < cut:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_two_threads_may_run_steps_at_once(path: Path) -> None:
    harness = native(path)
    texts = [ids(80, seed) for seed in range(6)]
    expected = [finished(start(harness, text)) for text in texts]
    harness = native(path)
    runs = [start(harness, text) for text in texts]
    threads = [threading.Thread(target=run.run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [same(dict(run.outputs), e) for run, e in zip(runs, expected, strict=True)] == [True] * 6


def copied(weight: QuantTensor | tuple[QuantTensor, ...]) -> QuantTensor | tuple[QuantTensor, ...]:
    parts = tuple(
        replace(t, raw=t.raw.copy(), scale=None if t.scale is None else t.scale.copy()) for t in matrices(weight)
    )
    return parts if isinstance(weight, tuple) else parts[0]


def destroyed(weight: QuantTensor | tuple[QuantTensor, ...]) -> None:
    """Every number NaN."""
    for part in matrices(weight):
        part.raw.fill(0xFF)
        if part.scale is not None:
            part.scale.fill(np.nan)


@pytest.mark.parametrize("file", ["gguf", "fp8"])
def test_weights_move_while_a_step_is_under_way(file: str, tmp_path: Path) -> None:
    """At every cut all weights go to new memory and the old memory becomes NaN."""
    tiny = tiny_model("v3")
    if file == "gguf":
        path = write_gguf(tiny, tmp_path / "m.gguf")
    else:
        path = write_hf_dir(tiny, tmp_path / "hf", dtype="float8_e4m3fn")
    harness = native(path)
    expected = finished(start(harness, ids(50), ids(7)))

    loaded = harness.loaded
    present = {name: copied(weight) for name, weight in loaded.checkpoint.tensors.items()}
    backend = NativeBackend(loaded.model, present, loaded.cache, threads=2, workspace_bytes=1 << 20)
    harness.loaded = replace(loaded, backend=backend)
    run = start(harness, ids(50), ids(7))
    for cut in range(1, loaded.model.num_segments + 1):
        moved = {name: copied(weight) for name, weight in present.items()}
        backend.move_weights(moved)
        for weight in present.values():
            destroyed(weight)
        present = moved
        run.run(cut)
    assert same(dict(run.outputs), expected)
    assert same(finished(start(harness, ids(50), ids(7))), expected)


def test_of_two_moves_at_once_the_kept_arrays_are_the_ones_read(path: Path) -> None:
    """Two threads move one weight while a step runs; a third keeps Python's lock, so that what follows the change of
    the pointers waits for it, in any order."""
    harness = native(path)
    backend = harness.loaded.backend
    assert isinstance(backend, NativeBackend)
    name = "token_embd.weight"
    weight = harness.loaded.checkpoint.tensors[name]
    assert isinstance(weight, QuantTensor)
    long, short = (
        build_batch([Work(harness.sequence(), ids(n), is_prompt=True)], harness.loaded.plan).step for n in (100, 3)
    )
    others = [replace(weight, raw=np.roll(weight.raw, shift, axis=0)) for shift in (1, 2)]
    expected = []
    for other in others:
        backend.move_weights({name: other})
        expected.append(finished(backend.start(short)))
    ended = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(ended.is_set, True)])
    busy.start()
    try:
        for _ in range(30):
            copies = [replace(other, raw=other.raw.copy()) for other in others]
            alive = [weakref.ref(copy.raw) for copy in copies]
            movers = [threading.Thread(target=backend.move_weights, args=({name: copy},)) for copy in copies]
            del copies
            run = backend.start(long)
            for mover in movers:
                mover.start()
            run.run()
            for mover in movers:
                mover.join()
            del movers, mover
            kept = [i for i, reference in enumerate(alive) if reference() is not None]
            assert len(kept) == 1
            assert same(finished(backend.start(short)), expected[kept[0]])
    finally:
        ended.set()
        busy.join()


def test_a_weight_moves_only_to_its_equal(path: Path) -> None:
    harness = native(path)
    backend = harness.loaded.backend
    assert isinstance(backend, NativeBackend)
    name = "blk.0.attn_q_a.weight"
    weight = harness.loaded.checkpoint.tensors[name]
    assert isinstance(weight, QuantTensor)
    with pytest.raises(ValueError, match=r"expected \(0, 64, 64\)"):
        backend.move_weights({name: weight.row_slice(0, 32)})
    with pytest.raises(ValueError, match="C-contiguous"):
        backend.move_weights({name: replace(weight, raw=np.asfortranarray(weight.raw))})
    with pytest.raises(ValueError, match=r"bytes \(64, 255\), expected \(64, 256\)"):
        backend.move_weights({name: replace(weight, raw=np.ascontiguousarray(weight.raw[:, :255]))})
    with pytest.raises(ValueError, match="2 parts, expected 1"):
        backend.move_weights({name: (weight, weight)})
    with pytest.raises(KeyError):
        backend.move_weights({"blk.9.attn_q_a.weight": weight})


def int32(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


# A step of sequences of 5 and 2 new rows, 2 pages each of a pool of 32: what is wrong, and what the error says.
BAD_STEPS: dict[str, tuple[Callable[[Step], dict[str, Any]], str]] = {
    "token id below 0": (lambda s: {"token_ids": s.token_ids - 300}, "token_ids: an entry is -"),
    "token id past the vocabulary": (lambda s: {"token_ids": s.token_ids + 272}, "expected 0 to 271"),
    "no rows": (lambda s: {"token_ids": int32(), "positions": int32()}, "token_ids: no rows"),
    "float ids": (lambda s: {"token_ids": s.token_ids.astype(np.float32)}, "token_ids: .*expected .*int32"),
    "strided ids": (lambda s: {"token_ids": np.repeat(s.token_ids, 2)[::2]}, "token_ids: .*C-contiguous"),
    "int32 slots": (lambda s: {"slots": s.slots.astype(np.int32)}, "slots: .*expected .*int64"),
    "too few slots": (lambda s: {"slots": s.slots[:-1].copy()}, "slots: length is 6, expected 7"),
    "slot below 0": (lambda s: {"slots": s.slots - 10**6}, "slots: an entry is -"),
    "slot past the pool": (
        lambda s: {"slots": s.slots + 32 * PAGE_TOKENS},
        "slots: an entry is .*expected 0 to 2047",
    ),
    "too few positions": (lambda s: {"positions": s.positions[:-1].copy()}, "positions: shape"),
    "page below 0": (lambda s: {"pages": s.pages - 100}, "pages: an entry is -"),
    "page past the pool": (lambda s: {"pages": s.pages + 32}, "pages: an entry is .*expected 0 to 31"),
    "page starts past the pages": (lambda s: {"page_starts": int32(0, 2, 9)}, "page_starts: last entry is 9"),
    "page starts that fall": (lambda s: {"page_starts": int32(0, 9, 4)}, "page_starts: entry 2 is 4 after 9"),
    "too few page starts": (lambda s: {"page_starts": int32(0, 4)}, "page_starts: length is 2, expected 3"),
    "row starts that do not end": (
        lambda s: {"row_starts": int32(0, 5, 6)},
        "row_starts: last entry is 6, expected 7",
    ),
    "row starts that fall": (lambda s: {"row_starts": int32(0, 9, 7)}, "row_starts: entry 2 is 7 after 9"),
    "a sequence of no rows": (lambda s: {"row_starts": int32(0, 7, 7)}, "row_starts: entry 2 is 7 after 7"),
    "row starts from 1": (lambda s: {"row_starts": int32(1, 5, 7)}, "row_starts: first entry is 1, expected 0"),
    "fewer keys than rows": (lambda s: {"kv_lens": int32(4, 2)}, "kv_lens of sequence 0: keys is 4, expected 5"),
    "more keys than pages": (lambda s: {"kv_lens": int32(5, 129)}, "kv_lens of sequence 1: .*expected 2 to 128"),
    "an output row past the rows": (lambda s: {"output_rows": int32(7)}, "output_rows: an entry is 7"),
    "an output row below 0": (lambda s: {"output_rows": int32(-1)}, "output_rows: an entry is -1"),
    "a path of another cache": (
        lambda s: {"segments": int32(0, 1, 0, 2).reshape(1, 4)},
        "segments: path 0, expected 1",
    ),
    "an unknown path": (lambda s: {"segments": int32(3, 1, 0, 2).reshape(1, 4)}, "segments: path 3"),
    "fused 2": (lambda s: {"segments": int32(1, 2, 0, 2).reshape(1, 4)}, "fused"),
    "no segments": (
        lambda s: {"segments": np.zeros((0, 4), np.int32)},
        "segments: sequences covered is 0, expected 2",
    ),
    "a segment short": (lambda s: {"segments": int32(1, 1, 0, 1).reshape(1, 4)}, "covered is 1, expected 2"),
    "a segment too long": (lambda s: {"segments": int32(1, 1, 0, 3).reshape(1, 4)}, "segments: last sequence"),
    "a segment twice": (lambda s: {"segments": int32(1, 1, 0, 1, 1, 1, 1, 2).reshape(2, 4)}, "path 1 twice"),
    "segments of 3": (lambda s: {"segments": int32(1, 1, 2).reshape(1, 3)}, r"segments: shape \(1, 3\)"),
}


@pytest.fixture(scope="module")
def two_sequences(path: Path) -> tuple[Harness, Step]:
    harness = native(path, mla="1")
    sequences = [harness.sequence(), harness.sequence()]
    for sequence in sequences:
        sequence.reserve(2 * PAGE_TOKENS)
    works = [Work(s, ids(n), is_prompt=True) for s, n in zip(sequences, (5, 2), strict=True)]
    return harness, build_batch(works, harness.loaded.plan).step


@pytest.mark.parametrize("case", list(BAD_STEPS))
def test_a_bad_step_is_refused_in_words(case: str, two_sequences: tuple[Harness, Step]) -> None:
    harness, step = two_sequences
    harness.loaded.backend.start(step).run()
    change, message = BAD_STEPS[case]
    with pytest.raises(ValueError, match=message):
        harness.loaded.backend.start(replace(step, **change(step)))


def test_a_cut_past_the_end_is_refused(path: Path) -> None:
    run = start(native(path), ids(3))
    for last in (-1, 99):
        with pytest.raises(ValueError, match=f"last: {last}, expected 0 to 5"):
            run.run(last)


def test_threads_and_workspace_are_checked(path: Path) -> None:
    loaded = native(path).loaded
    arguments: dict[str, Any] = {"threads": 1, "workspace_bytes": 1 << 20}
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match=f"threads: {threads}, expected 1 to 1024"):
            NativeBackend(loaded.model, loaded.checkpoint.tensors, loaded.cache, **arguments | {"threads": threads})
    for size in (-1, 0, 1000):
        with pytest.raises(SettingError, match=rf"workspace_bytes: {size}, expected at least \d+ for 1 threads"):
            NativeBackend(
                loaded.model, loaded.checkpoint.tensors, loaded.cache, **arguments | {"workspace_bytes": size}
            )


def least_workspace(loaded: Loaded) -> int:
    """What the error for a workspace of 0 asks for, with 2 threads."""
    with pytest.raises(SettingError) as error:
        NativeBackend(loaded.model, loaded.checkpoint.tensors, loaded.cache, threads=2, workspace_bytes=0)
    match = re.search(r"at least (\d+)", str(error.value))
    assert match is not None
    return int(match[1])


THREADS = 64  # whose own tiles are more than the least setting of 1 MiB


def needed_at_load(path: Path, **settings: Any) -> int:
    """Bytes that the refusal of a workspace of 1 MiB names."""
    with pytest.raises(SettingError, match=r"^workspace=1048576 bytes: .* Raise --workspace") as error:
        native(path, threads=THREADS, workspace_bytes=1 << 20, **settings)
    match = re.search(r" this model needs (\d+)\.", str(error.value))
    assert match is not None
    return int(match[1])


@pytest.mark.parametrize("fa", ["0", "1"])
@pytest.mark.parametrize("mla", ["0", "1", "2", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_asked_for_at_load_is_enough_for_the_whole_context(
    dtype: str, mla: str, fa: str, path: Path
) -> None:
    """With fa=0 the scores of one member fit then, not those of 64."""
    settings: dict[str, Any] = {"dtype": dtype, "mla": mla, "fa": fa, "n_ctx": 704, "deterministic": True}
    least = needed_at_load(path, **settings)
    with pytest.raises(SettingError, match=rf"workspace={least - 1} bytes: .* needs {least}\."):
        native(path, threads=THREADS, workspace_bytes=least - 1, **settings)
    text, steps = ids(704), [690, 13, 1]
    small = native(path, threads=THREADS, workspace_bytes=least, **settings).logits(text, steps)
    assert np.array_equal(small, native(path, threads=2, workspace_bytes=64 << 20, **settings).logits(text, steps))


def test_stored_scores_of_a_longer_context_need_more(path: Path) -> None:
    """4 bytes each, and of 16 heads at a time where latents round. A member's are not counted 64 times."""
    for dtype, each in (("float32", 4), ("int8", 64)):
        of_ctx = {n: needed_at_load(path, fa="0", mla="1", dtype=dtype, n_ctx=n) for n in (1 << 16, 1 << 17)}
        assert of_ctx[1 << 17] - of_ctx[1 << 16] == each << 16


def test_a_workspace_nobody_asked_for_is_as_large_as_the_threads_need(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = needed_at_load(path)
    monkeypatch.setattr("kvfold.load.default_workspace_bytes", lambda free: 1 << 20)
    harness = native(path, threads=THREADS)
    assert harness.loaded.settings.workspace_bytes == least
    assert np.isfinite(harness.logits(ids(20))).all()
    assert native(path, threads=2).loaded.settings.workspace_bytes == 1 << 20


@pytest.mark.parametrize("mla", ["0", "1", "2"])
def test_scores_that_do_not_fit_are_refused_before_the_step_runs(mla: str, path: Path) -> None:
    """fa=0 stores a row's scores: 26 kB for 6400 keys, with one member of the team or all."""
    loaded = native(path, mla=mla, fa="0", n_ctx=6400).loaded
    num_pages = 6400 // PAGE_TOKENS
    step = Step(
        token_ids=int32(1),
        positions=int32(6399),
        slots=np.asarray([6399], np.int64),
        row_starts=int32(0, 1),
        kv_lens=int32(6400),
        page_starts=int32(0, num_pages),
        pages=np.arange(num_pages, dtype=np.int32),
        segments=int32(int(mla), 0, 0, 1).reshape(1, 4),
        output_rows=int32(0),
        is_prompt=int32(0),
    )
    size = least_workspace(loaded)
    backend = NativeBackend(loaded.model, loaded.checkpoint.tensors, loaded.cache, threads=2, workspace_bytes=size)
    with pytest.raises(
        SettingError, match=r"needs \d+ bytes of workspace .* raise workspace_bytes \(--workspace\) by \d+"
    ):
        backend.start(step)
    size += 500_000
    NativeBackend(loaded.model, loaded.checkpoint.tensors, loaded.cache, threads=2, workspace_bytes=size).start(
        step
    ).run()


def test_the_least_workspace_is_enough(path: Path) -> None:
    harness = native(path, mla="1", threads=2)
    expected = finished(start(harness, ids(200)))
    loaded = harness.loaded
    backend = NativeBackend(
        loaded.model, loaded.checkpoint.tensors, loaded.cache, threads=2, workspace_bytes=least_workspace(loaded)
    )
    harness.loaded = replace(loaded, backend=backend)
    assert same(finished(start(harness, ids(200))), expected)


# Ways in which a recording could be wrong: a change to one segment's tuple, and what the error says.
def change_op(kind: str, index: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Field `index` of the first op of this kind, in the order (kind, name, inputs, outputs, weights, ints, floats)."""

    def apply(segment: Any) -> Any:
        name, ops, *rest = segment
        at = next(i for i, op in enumerate(ops) if op[0] == kind)
        op = list(ops[at])
        op[index] = change(op[index])
        return (name, [*ops[:at], tuple(op), *ops[at + 1 :]], *rest)

    return apply


BAD_RECORDINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unknown op": (change_op("add", 0, lambda _: "subtract"), "subtract: the native backend has no such op"),
    "handle past the weights": (change_op("linear", 4, lambda _: [999]), "weight handle is 999"),
    "absent weight": (change_op("linear", 4, lambda _: [-1]), "an absent weight"),
    "other weight": (change_op("linear", 4, lambda _: [0]), r"has shape \(272, 64\), expected"),
    "buffer past the buffers": (change_op("norm", 2, lambda _: [(99, 0, 64)]), "buffer is 99"),
    "columns past the buffer": (change_op("norm", 2, lambda v: [(v[0][0], 1, 64)]), "columns 1 to 65 of a buffer"),
    "no inputs": (change_op("add", 2, lambda _: []), "no inputs"),
    "one input": (change_op("add", 2, lambda v: v[:1]), "number of inputs is 1, expected 2"),
    "layer past the cache": (change_op("append_latent", 5, lambda _: [99]), "layer is 99, expected 0 to 2"),
    "latent of another width": (
        change_op("append_latent", 2, lambda v: [v[0], (v[1][0], v[1][1], 8)]),
        "columns of a cache array is 48, expected 40",
    ),
    "heads of another number": (change_op("fold_q", 5, lambda d: [3, *d[1:]]), "other dimensions of attention"),
    "a dimension of 0": (change_op("fold_q", 5, lambda d: [*d[:3], 0, *d[4:]]), "a dimension of attention below 1"),
    "rope of odd width": (change_op("rope", 5, lambda d: [d[0], 15, d[2]]), "15 rotated numbers"),
    "a scale of 0": (change_op("attend_latent", 6, lambda _: [0.0]), "softmax scale"),
    "more experts a token than experts": (
        change_op("route", 5, lambda d: [d[0], 99, *d[2:]]),
        "99 experts a token",
    ),
    "groups that do not divide": (change_op("route", 5, lambda d: [*d[:2], 5, *d[3:]]), "groups a token of 5"),
    "ids from elsewhere": (change_op("experts", 2, lambda v: [v[0], v[2], v[2]]), "not those of a route op"),
    "experts past the last": (change_op("experts", 5, lambda _: [0, 16]), "an expert is 16, expected 1 to 15"),
    "an expert twice": (change_op("experts", 5, lambda _: [3, 3]), "an expert is 3, expected 4 to 15"),
    "all experts and one": (change_op("experts", 5, lambda _: [-1, 3]), "an expert is -1, expected 0 to 15"),
    "too many floats": (change_op("norm", 6, lambda f: [*f, 1.0]), "number of floats is 2, expected 1"),
    "unknown domain": (lambda s: (s[0], s[1], [(b[0], 3, b[2], b[3]) for b in s[2]], *s[3:]), "domain 3"),
    "a life too short": (
        lambda s: (s[0], s[1], [(b[0], b[1], b[2], min(b[3], max(b[2], 2))) for b in s[2]], *s[3:]),
        "a buffer that is not alive",
    ),
    "x not handed over": (lambda s: (*s[:3], None, s[4]), "hands no x over"),
    "x of one path's rows": (
        lambda s: (*s[:3], next(op[3][0] for op in s[1] if op[0] == "fold_q"), s[4]),
        "hands over the rows of one path alone",
    ),
    "x of other rows": (
        lambda s: (*s[:2], [(b[0], 1, *b[2:]) if i == 0 else b for i, b in enumerate(s[2])], *s[3:]),
        "x is not of the rows",
    ),
    "shared experts without gate": (
        change_op("experts", 4, lambda w: [*w[:3], -1, 0, -1]),
        "shared experts without gate",
    ),
    "shared gate alone": (change_op("experts", 4, lambda w: [*w[:3], 0, -1, -1]), "an absent weight"),
    "outputs too early": (lambda s: (*s[:4], [("early", (0, 0, 64))]), "outputs before the last segment"),
}


@pytest.mark.parametrize("case", list(BAD_RECORDINGS))
def test_a_bad_recording_is_refused_in_words(case: str, path: Path) -> None:
    loaded = native(path).loaded
    tensors = loaded.checkpoint.tensors
    recorded = record(loaded.model, {name: sum(t.rows for t in matrices(w)) for name, w in tensors.items()})
    weights = [(name, *_layout(tensors[name]), _parts(tensors[name])) for name in recorded.weight_names]
    segments = [_segment(s) for s in recorded.segments]
    arguments = (weights, 0, list(loaded.cache.arrays), 1, 1 << 20)
    _native.Program(segments, *arguments)
    change, message = BAD_RECORDINGS[case]
    segments[2] = change(segments[2])  # a MoE layer
    with pytest.raises(ValueError, match=message):
        _native.Program(segments, *arguments)


def test_weights_of_another_model_are_refused(path: Path, tmp_path: Path) -> None:
    loaded = native(path).loaded
    other = native(write_gguf(tiny_model("v3", intermediate_size=96), tmp_path / "other.gguf")).loaded
    name = "blk.0.ffn_down.weight"
    with pytest.raises(
        ValueError, match=r"blk.0.ffn_down: blk.0.ffn_down.weight has shape \(64, 96\), expected \(64, 160\)"
    ):
        NativeBackend(
            loaded.model,
            {**loaded.checkpoint.tensors, name: other.checkpoint.tensors[name]},
            loaded.cache,
            threads=1,
            workspace_bytes=1 << 20,
        )
