"""The cuda backend against the plain one: whole models, every path, form, cache type and chunking.

Marked gpu: what a GPU computes. The others run the same ops in Triton's interpreter, a tiny model and a few tokens.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.cuda_harness import cuda_harness, deepseeks_attention
from kit.harness import Harness, close
from kit.interpreter import torch  # before any kernel
from kit.poison import poisoned_memory  # noqa: F401
from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold import LLM, SamplingParams
from kvfold.backends import choose, cuda, cuda_layers
from kvfold.backends.cuda import _Graphs
from kvfold.backends.cuda_step import expanded_bytes
from kvfold.cache.latent import CacheType, encode
from kvfold.engine.batch import Work, build_batch
from kvfold.engine.runner import Runner
from kvfold.engine.sampler import Sampler
from kvfold.load import embedded_model
from kvfold.mla.plan import Path as AttentionPath

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def ids(length: int, vocab: int = 272, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab, length)]


def interpreted(path: Path, mla: str, fa: str) -> None:
    text = ids(4)
    expected = Harness(path, mla=mla, fa=fa).logits(text, [3, 1])
    close(cuda_harness(path, mla=mla, fa=fa).logits(text, [3, 1]), expected, 1e-5)


@pytest.mark.parametrize("mla", ["0", "2", "3"])
def test_interpreted_ops_are_the_plain_ones(mla: str, tmp_path: Path) -> None:
    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    interpreted(write_gguf(tiny, tmp_path / "m.gguf"), mla, "1")


def test_ids_that_were_chosen_are_taken_where_no_graph_serves(tmp_path: Path) -> None:
    """A step launched ahead that is launched op by op after all: of two sequences, the other way round."""
    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    harness = cuda_harness(write_gguf(tiny, tmp_path / "m.gguf"), captures=False)
    backend: Any = harness.loaded.backend
    backend.chosen[:2] = torch.tensor([17, 230])
    embedded = []
    for tokens in ([-2, -1], [230, 17]):
        works = [Work(harness.sequence(), [token], is_prompt=False) for token in tokens]
        run = backend.start(build_batch(works, harness.loaded.plan).step)
        run.run(1)
        embedded.append(run._x.tensor)
    assert torch.isfinite(embedded[0]).all() and (embedded[0][0] != embedded[0][1]).any()
    assert torch.equal(*embedded)


def test_a_step_runs_on_the_gpu_of_its_model_whatever_the_thread_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread begins with GPU 0: launches would go there, and leave a context, for a model that lies on another."""
    current = [False]

    class MadeCurrent:
        def __init__(self, tensor: Any) -> None:
            assert tensor.device == backend.device

        def __enter__(self) -> None:
            current.append(True)

        def __exit__(self, *error: object) -> None:
            current.pop()

    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    harness = cuda_harness(write_gguf(tiny, tmp_path / "m.gguf"), captures=False)
    backend: Any = harness.loaded.backend
    seen = []

    def segment(ops: object, index: int, x: object) -> object:
        seen.append(current[-1])
        return run_segment(ops, index, x)

    run_segment = backend.model.run_segment
    monkeypatch.setattr(type(backend.model), "run_segment", lambda model, *arguments: segment(*arguments))
    monkeypatch.setattr(torch.cuda, "device_of", MadeCurrent)
    monkeypatch.setattr(cuda.ceilings, "read_rate", lambda device: seen.append(current[-1]))
    monkeypatch.setattr(cuda.ceilings, "multiply_adds", lambda device, dtype: seen.append(current[-1]))
    harness.logits(ids(4))
    backend.read_rate()
    backend.multiply_adds()
    assert seen == [True] * (backend.model.num_segments + 3)
    assert current == [False]


def test_a_model_is_built_on_its_gpu_and_the_thread_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.backends import cuda_weights

    done: list[object] = []

    class Current:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            done.append(self.device)

        def __exit__(self, *error: object) -> None:
            done.append("as before")

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(cuda_weights, "upload", lambda *arguments, **settings: done.append("weights"))
    monkeypatch.setattr(cuda, "CudaBackend", lambda *arguments, **settings: done.append(settings["device"]))
    nothing: Any = None
    choose._cuda_build(nothing, {}, nothing, choose.Machine("auto", "cuda:1", threads=1, workspace_bytes=1 << 20))
    second = torch.device("cuda", 1)
    assert done == [second, "weights", second, "as before"]


def test_one_row_over_a_short_context_attends_in_one_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 where kernels are interpreted; a step of two rows does not."""
    from kvfold.backends import cuda_ops

    attend, lengths = cuda_ops.row_attention.attend, []

    def watched(*arguments: Any, **settings: Any) -> None:
        lengths.extend(arguments[6].tolist())
        attend(*arguments, **settings)

    monkeypatch.setattr(cuda_ops.row_attention, "attend", watched)
    path = write_gguf(tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=1), tmp_path / "m.gguf")
    text, settings = ids(5), {"mla": "1", "cache_type": "f16"}
    expected = Harness(path, **settings).logits(text)
    # launched, since nobody may read lengths during a capture
    harness = cuda_harness(path, dtype=torch.float16, captures=False, **settings)
    got = harness.logits(text, [2, 1, 2], is_prompt=False)
    assert lengths == [3]
    close(got, expected, 4e-3)


BLOCKS = [("q8_0", "1"), ("q8_0", "0"), ("q8_0", "2"), ("fp8", "1"), ("fp8", "2")]


def blocks_model(**changes: Any) -> Any:
    """A tiny model whose parts of a row fill blocks of q8_0 and groups of fp8."""
    return tiny_model("v2-lite", kv_lora_rank=128, qk_rope_head_dim=32, **changes)


@pytest.mark.parametrize(("cache_type", "mla"), [BLOCKS[0], BLOCKS[-1]])
def test_interpreted_ops_keep_the_cache_in_blocks(cache_type: str, mla: str, tmp_path: Path) -> None:
    path = write_gguf(blocks_model(num_hidden_layers=1, first_k_dense_replace=0), tmp_path / "m.gguf")
    text = ids(4)
    settings: dict[str, Any] = {"mla": mla, "cache_type": cache_type}
    close(cuda_harness(path, **settings).logits(text, [3, 1]), Harness(path, **settings).logits(text, [3, 1]), 1e-5)


@pytest.mark.parametrize("name", ["Q8_0", "F8_E4M3"])
def test_rows_are_decoded_as_many_at_a_time_as_fit(name: str) -> None:
    from kvfold.backends.cuda_ops import CudaOps
    from kvfold.kernels import tile_product
    from kvfold.kernels.matrix import Matrix

    rng = np.random.default_rng(3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raw = torch.from_numpy(rng.integers(0, 0x30, (300, 272 if name == "Q8_0" else 256), np.uint8)).to(device)
    scale = torch.from_numpy(rng.uniform(1, 2, (1, 3, 2)).astype(np.float32)) if name == "F8_E4M3" else None
    w = Matrix(name, 300, 256, raw, None if scale is None else scale.to(device))
    scratch = torch.empty(4 * 256 * 140, dtype=torch.uint8, device=device)  # 140 rows: 128 at a time
    ops: Any = CudaOps(SimpleNamespace(scratch=scratch, dtype=torch.float32), SimpleNamespace(num_rows=7))  # type: ignore[arg-type]
    pieces = [(start, numbers.clone()) for start, numbers in ops._numbers(w, torch.float32)]
    assert [start for start, _ in pieces] == [0, 128, 256]
    torch.testing.assert_close(torch.cat([numbers for _, numbers in pieces]), tile_product.decode(w, torch.float32))
    x = torch.from_numpy(rng.standard_normal((7, 256)).astype(np.float32)).to(device)
    torch.testing.assert_close(ops._multiply(x, w, torch.float32), x @ tile_product.decode(w, torch.float32).T)


@pytest.mark.parametrize("pages", [[4], [4, 5, 6], [6, 5, 4], [4, 6, 5], [5, 4, 7], [4, 4, 6]], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_cached_rows_are_those_of_the_list_neighbours_or_not(pages: list[int], cache_dtype: Any) -> None:
    """Of the second sequence, behind one of two pages, from each page on and up to within each."""
    from kvfold.backends.cuda_ops import CudaOps

    pool = torch.full((2, 2, 9, 64, 3), torch.nan, dtype=cache_dtype)  # arrays, layers, pages, slots, numbers
    slots = torch.arange(64, dtype=cache_dtype)
    for page in pages:
        pool[1, 1, page] = (64 * page + slots)[:, None] * torch.tensor([1, -1, 0.5], dtype=cache_dtype)
    listed = np.array([8, 2, *pages, 2**30], np.int32)
    host = SimpleNamespace(page_starts=np.array([0, 2, 2 + len(pages)], np.int32), pages=listed)
    backend = SimpleNamespace(pools=pool, blocks=None, dtype=torch.float32)
    ops: Any = CudaOps(backend, SimpleNamespace(host=host, num_rows=1, pages=torch.from_numpy(listed)))  # type: ignore[arg-type]
    token = np.arange(64 * len(pages))
    at = torch.from_numpy(64 * np.array(pages)[token // 64] + token % 64).float()
    for start in range(0, len(token), 64):
        for stop in [*range(start + 63, len(token), 64), *range(start + 64, len(token) + 1, 64)]:
            got = ops._cached(1, 1, 1, start, stop)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got[:, 0], at[start:stop], rtol=0, atol=0)
            torch.testing.assert_close(got[:, 1:], at[start:stop, None] * torch.tensor([-1, 0.5]), rtol=0, atol=0)


@pytest.mark.parametrize("mla", ["3", "0"])
def test_padding_of_layers_changes_nothing(mla: str, tmp_path: Path) -> None:
    """Five rows of a prompt and two that generate, in a layer of 16 rows whose padding is NaN, as a graph would run it."""
    from kvfold.backends.cuda_layers import CapturedLayers

    path = write_gguf(tiny_model("v2-lite", num_hidden_layers=2, first_k_dense_replace=0), tmp_path / "m.gguf")
    harness, plain = cuda_harness(path, mla=mla), Harness(path, mla=mla)
    layers = CapturedLayers(harness.loaded.backend)
    logits = []
    for each in (harness, plain):
        generating, prompted = each.sequence(), each.sequence()
        each.step([Work(generating, ids(3), is_prompt=True)])
        if each is harness:
            each.loaded.backend._layers = layers
            layers.buffers.hidden.fill_(torch.nan)
            layers.buffers.hidden[15] = 3  # would be found where it was appended, NaN would not
            layers.buffers.queries.fill_(torch.inf)
        works = [Work(generating, [7, 9], is_prompt=False), Work(prompted, ids(5, seed=6), is_prompt=True)]
        logits.append(each.step(works))
    for pool in harness.loaded.backend.pools:
        assert (~pool.isnan().flatten(0, 2).any(1)).sum() == 2 * (3 + 7)  # padding has no slot
    assert layers.buffers.queries[:7].isfinite().all()  # the first layer ran so
    for got, expected in zip(*logits, strict=True):
        close(got, expected, 1e-5)


@pytest.mark.parametrize(
    ("cache_type", "mla"),
    [("f32", "1"), BLOCKS[2], *(pytest.param(*kind, marks=pytest.mark.full) for kind in (("f32", "2"), BLOCKS[0]))],
)
def test_a_prompt_at_fixed_places_is_plains(cache_type: str, mla: str, tmp_path: Path) -> None:
    """Prompts of a bucket of rows with padding in front, as a graph would run them, over pages of which the list behind them
    says nothing; one without an output."""
    path = write_gguf(blocks_model(num_hidden_layers=1, first_k_dense_replace=0), tmp_path / "m.gguf")
    settings: dict[str, Any] = {"mla": mla, "cache_type": cache_type}
    harness, plain = cuda_harness(path, **settings), Harness(path, **settings)
    backend: Any = harness.loaded.backend
    backend.workspace_bytes = (1 << 24) + 1  # no whole numbers
    backend._graphs = graphs = _Graphs(backend)
    graphs._buffers._device.fill_(1 << 30)
    latents = np.random.default_rng(3).standard_normal((1, 64, backend.row_dims[0])).astype(np.float32)
    latents[:, 62:] = np.nan
    stored = encode(latents, CacheType(cache_type))
    logits: list[list[np.ndarray]] = []
    for each in (harness, plain):
        sequence = each.sequence()
        sequence.reserve(62)
        sequence.length = 62
        each.loaded.cache.arrays[0][0][sequence.pages] = stored
        if each is harness:
            backend.write_pages(0, 0, sequence.pages, stored)
        # Rows of padding see no key here; below they see those that are cached.
        logits.append(each.step([Work(each.sequence(), ids(6), is_prompt=True)]))
        graphs._steps.clear()
        for rows, outputs in ((5, 1), (7, 0), (3, 1)):
            logits[-1] += each.step([Work(sequence, ids(rows, seed=rows), is_prompt=True, outputs=outputs)])
            if each is harness:
                forms = {(form.num_rows, form.num_keys) for form in graphs._steps}
                assert forms == ({(3, None)} if rows == 3 else {(16, 512 if mla == "2" else None)})
                graphs._steps.clear()  # which would capture the next of a form
    pool = backend.pools[0][0].flatten(0, 1)
    written = ~pool.isnan().any(1) if pool.is_floating_point() else (pool != 0xFF).any(1)
    assert written.sum() == 6 + 62 + 5 + 7 + 3  # padding has no slot
    for got, expected in zip(*logits, strict=True):
        assert got.shape == expected.shape
        if len(got):
            close(got, expected, 1e-5)


def test_a_form_is_launched_where_no_memory_is_left_to_capture_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0), tmp_path / "m.gguf")
    harness = cuda_harness(path, mla="1")
    backend: Any = harness.loaded.backend
    backend._graphs = graphs = _Graphs(backend)
    tried = []

    def capture(step: Any, form: Any) -> Any:
        tried.append(form)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(graphs, "_capture", capture)
    logits = [harness.step([Work(harness.sequence(), ids(3), is_prompt=True)])[0] for _ in range(3)]
    assert len(tried) == 1
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("sizes", "outputs", "settings", "expected"),
    [
        ([5], 1, {"mla": "1"}, (AttentionPath.ABSORBED, True, 4, 4, None, None)),
        ([512], 0, {"mla": "1"}, (AttentionPath.ABSORBED, True, 128, 4, None, None)),
        ([257], 1, {"mla": "2"}, (AttentionPath.DECOMPRESSED, True, 1, 384, None, 512)),
        ([4], 4, {"mla": "2"}, (AttentionPath.DECOMPRESSED, False, 1, 4, None, None)),
        ([513], 1, {"mla": "1"}, None),
        ([64], 2, {"mla": "2"}, None),
        ([64, 5], 1, {"mla": "2"}, None),
        ([64], 1, {"mla": "0"}, None),
        ([64], 1, {"mla": "1", "fa": "0"}, None),
    ],
)
def test_what_one_graph_can_hold(
    sizes: list[int], outputs: int, settings: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    harness = cuda_harness(write_gguf(tiny, tmp_path / "m.gguf"), **settings)
    backend: Any = harness.loaded.backend
    works = [Work(harness.sequence(), ids(n), is_prompt=True, outputs=outputs) for n in sizes]
    step = build_batch(works, harness.loaded.plan).step
    assert _Graphs(backend)._buffers.form(step) == expected
    if expected and expected[-1]:
        backend.workspace_bytes = expected[-1] * expanded_bytes(harness.loaded.model.config.mla, backend.dtype) - 1
        assert _Graphs(backend)._buffers.form(step) is None


def test_a_step_without_outputs_never_reads_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.backends import cuda_ops

    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    harness = cuda_harness(write_gguf(tiny, tmp_path / "m.gguf"), mla="1")
    linear, rows = cuda_ops.number_product.linear, []

    def watched(x: Any, w: Any, out: Any, **options: Any) -> None:
        rows.append(len(out))
        linear(x, w, out, **options)

    monkeypatch.setattr(cuda_ops.number_product, "linear", watched)
    (logits,) = harness.step([Work(harness.sequence(), ids(3), is_prompt=True, outputs=0)])
    assert logits.shape == (0, 272)
    assert rows and min(rows) > 0


@pytest.mark.parametrize("num_outputs", [0, 1])
@pytest.mark.parametrize("ftype", ["F32", pytest.param("Q8_0", marks=pytest.mark.full)])
@pytest.mark.parametrize("num_dense", [0, 1])
def test_behind_the_last_attention_only_output_rows_go_on(
    num_dense: int, ftype: str, num_outputs: int, tmp_path: Path
) -> None:
    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=num_dense)
    path = write_gguf(tiny, tmp_path / "m.gguf", ftype=ftype)
    logits = []
    cuda = cuda_harness(path, mla="1")
    for harness in (cuda, Harness(path, mla="1")):
        loaded = harness.loaded
        batch = build_batch([Work(harness.sequence(), ids(3), is_prompt=True, outputs=num_outputs)], loaded.plan)
        run = loaded.backend.start(batch.step)
        run.run()
        logits.append(run.outputs["logits"])
    assert (~cuda.loaded.backend.pools[0].isnan().flatten(0, 2).any(1)).sum() == 3  # appended whoever is wanted
    assert logits[0].shape == (num_outputs, 272)
    if num_outputs:
        close(logits[0], logits[1], 1e-5)


def test_generated_rows_lose_what_plain_int8_loses(tmp_path: Path) -> None:
    """Plain rounds at the up-projections too, which a GPU multiplies unrounded."""
    tiny = tiny_model("v2-lite", num_hidden_layers=1, first_k_dense_replace=0)
    path = write_gguf(tiny, tmp_path / "m.gguf", ftype="Q8_0")
    text = ids(3)
    exact = Harness(path, mla="1").logits(text, [2, 1])
    loss = rms(Harness(path, mla="1", dtype="int8").logits(text, [2, 1]) - exact)
    got = rms(cuda_harness(path, mla="1", rounds=True).logits(text, [2, 1], is_prompt=False) - exact)
    assert 0.3 * loss < got < 1.1 * loss, f"{got:.3g} of plain's {loss:.3g}"


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "mla", "fa"),
    [("v3-odd", "1", "1"), ("v3-half-split", "0", "0"), ("v2", "2", "0"), ("v3", "auto", "1")],
)
def test_interpreted_ops_of_other_families_are_too(family: str, mla: str, fa: str, tmp_path: Path) -> None:
    interpreted(write_hf_dir(tiny_model(family, num_hidden_layers=2), tmp_path / "m"), mla, fa)


def test_pieces_of_an_upload_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources smaller and larger than a piece, a buffer that ends within one, an empty one."""
    from kvfold.backends import cuda_weights

    monkeypatch.setattr(cuda_weights, "STAGE_BYTES", 10)
    monkeypatch.setattr(cuda_weights, "PIECE_BYTES", 4)
    sizes = [3, 0, 11, 4, 1, 20]
    whole = np.random.default_rng(1).integers(0, 256, sum(sizes), np.uint8)
    seen: list[int] = []
    stage = cuda_weights._Stage(torch.device("cpu"), len(whole), lambda done, total: seen.append(done))
    target = stage.empty(1, len(whole)).zero_()
    stage.copy(np.split(whole, np.cumsum(sizes)[:-1]), target)
    stage.finish()
    np.testing.assert_array_equal(target.numpy()[0], whole)
    assert seen == [0, 10, 20, 30, 39]


FORMS = [(mla, fa) for mla in ("0", "1", "2", "3", "auto") for fa in ("0", "1")]
CHUNKS = {"whole": [150], "around page edges": [63, 1, 1, 64, 21], "pairs and ones": [100, *[2] * 20, *[1] * 10]}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["v2-lite-yarn", "v2", "v3-odd", "v3-half-split", "glm4-moe-lite"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_float32_is_plain_float64(family: str, chunks: str, tmp_path: Path) -> None:
    path = write_hf_dir(tiny_model(family), tmp_path / family)
    text = ids(150)
    # In float64: plain's float32 is off by 5e-5 where a process happens to add up in another order at a router's near tie.
    expected = Harness(path, mla="2", dtype="float64").logits(text)
    for mla, fa in FORMS:
        got = cuda_harness(path, mla=mla, fa=fa, workspace_bytes=1 << 20).logits(
            text, CHUNKS[chunks], is_prompt=False
        )
        close(got, expected, 5e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("cache_type", "mla"), [*BLOCKS, ("f16", "1"), ("bf16", "2"), ("f16", "0")])
@pytest.mark.parametrize("fa", ["0", "1"])
def test_every_cache_type_is_plains_in_float32(cache_type: str, mla: str, fa: str, tmp_path: Path) -> None:
    """What is cached is rounded alike, but for the few numbers in 100,000 that lie so near the middle of two that sums in
    another order decide. One such number is off by a step of its type: 2^-4 of it in e4m3, below 2^-7 elsewhere."""
    path = write_gguf(blocks_model(), tmp_path / "m.gguf")
    text = ids(150)
    settings: dict[str, Any] = {"mla": mla, "fa": fa, "cache_type": cache_type}
    expected = Harness(path, **settings).logits(text)
    for chunks in CHUNKS.values():
        got = cuda_harness(path, workspace_bytes=1 << 20, **settings).logits(text, chunks, is_prompt=False)
        error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
        bound = 8e-3 if cache_type == "fp8" else 1e-3
        assert np.isfinite(got).all() and error < bound, f"{error:.2g} of the logits, root mean square"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("mla", ["0", "1", "2"])
def test_bfloat16_rounds_and_no_more(cache_type: str, mla: str, tmp_path: Path) -> None:
    # Dense layers only: a router near a tie turns a rounding into another expert.
    path = write_gguf(tiny_model("v2", first_k_dense_replace=3), tmp_path / "m.gguf")
    text = ids(100)
    expected = Harness(path, mla=mla).logits(text)
    settings: dict[str, Any] = {"mla": mla, "cache_type": cache_type}
    got = cuda_harness(path, dtype=torch.bfloat16, **settings).logits(text, [80, 18, 1, 1], is_prompt=False)
    # Roundings of 3.9e-3 of a value; the bound that plain's bfloat16 has in test_plain.py.
    spread = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) / 3.9e-3
    assert spread < 5.8, f"root mean square of the error: {spread:.3g} roundings"


def told(model: LLM) -> str:
    return model.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))[0].text


@pytest.mark.gpu
@needs_gpu
def test_what_one_thread_launched_another_captures() -> None:
    """A thread that has not multiplied yet has no handle of cuBLAS, and must not make it in the capture."""
    model = LLM(device="cuda:0", n_ctx=256)
    texts = [told(model)]
    for _ in range(2):
        other = threading.Thread(target=lambda: texts.append(told(model)))
        other.start()
        other.join()
    assert len(texts) == 3 and len({*texts, told(model)}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_models_on_two_gpus_tell_the_same() -> None:
    """Each captures on a stream of its own GPU."""
    models = [LLM(device=f"cuda:{index}", n_ctx=256) for index in (0, 1)]
    assert len({told(model) for _ in range(3) for model in models}) == 1 and torch.cuda.current_device() == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mla", ["0", "2", "3"])
def test_a_ragged_batch_is_its_sequences_alone(mla: str, tmp_path: Path) -> None:
    """Five sequences of different lengths generate side by side in a captured step with padding, and one by one."""
    path = write_gguf(tiny_model("v3"), tmp_path / "m.gguf")
    harness = cuda_harness(path, mla=mla)
    texts = [ids(n, seed=n) for n in (1, 63, 64, 65, 200)]
    alone = [Harness(path, mla=mla).logits([*text, 7, 9])[-2:] for text in texts]
    sequences = [harness.sequence() for _ in texts]
    harness.step([Work(s, t, is_prompt=True) for s, t in zip(sequences, texts, strict=True)])
    for place, token in enumerate((7, 9)):
        logits = harness.step([Work(s, [token], is_prompt=False) for s in sequences])
        for got, expected in zip(logits, alone, strict=True):
            close(got, expected[place : place + 1], 5e-5)


def model_file(model: str, folder: Path) -> Path:
    """tiny, or one whose attention has DeepSeek's sizes, of 16 heads or of 128."""
    if model == "tiny":
        return write_gguf(blocks_model(), folder / "m.gguf")
    return deepseeks_attention(folder / "m.gguf", "BF16", num_heads=128 if model == "128 heads" else 16)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("mla", "cache_type", "model"),
    [
        *[("3", "bf16", "tiny"), ("0", "bf16", "tiny"), ("0", "q8_0", "tiny"), ("0", "f32", "tiny")],
        *[("2", "bf16", "tiny"), ("2", "q8_0", "tiny"), ("2", "fp8", "tiny"), ("3", "fp8", "128 heads")],
    ],
)
def test_replayed_steps_are_launched_ones_bit_for_bit(
    mla: str, cache_type: str, model: str, tmp_path: Path
) -> None:
    """One and two rows a sequence. Every step behind the prompt is replayed."""
    path = model_file(model, tmp_path)
    text = ids(96)
    said = []
    for captures in (True, False):
        harness = cuda_harness(path, dtype=torch.bfloat16, mla=mla, cache_type=cache_type, captures=captures)
        said.append(harness.logits(text, [64, *[1] * 12, *[2] * 10], is_prompt=False))
        if captures:
            assert {(form.path.value, form.rows) for form in harness.loaded.backend._graphs._captured} == {
                (1 if mla == "3" else int(mla), rows) for rows in (1, 2)
            }
    np.testing.assert_array_equal(*said)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cache_type", ["bf16", "q8_0", "fp8"])
@pytest.mark.parametrize("mla", ["1", "2"])
@pytest.mark.parametrize("model", ["tiny", "deepseeks attention"])
def test_replayed_prompts_are_launched_ones_bit_for_bit(
    model: str, mla: str, cache_type: str, tmp_path: Path
) -> None:
    """Prompts in slices that fill buckets of rows and of keys: launched, captured and replayed, with a generated row between."""
    path = model_file(model, tmp_path)
    said = []
    for captures in (True, False):
        harness = cuda_harness(path, dtype=torch.bfloat16, mla=mla, cache_type=cache_type, captures=captures)
        got = []
        for turn in range(4):
            sequence = harness.sequence()
            for rows in (512, 512, 1):
                got += harness.step([Work(sequence, ids(rows, seed=turn), is_prompt=rows > 1)])
            sequence.release()
        said.append(got)
        if captures:
            forms = harness.loaded.backend._graphs._captured
            assert {form.num_rows for form in forms} == {1, 512}
    np.testing.assert_array_equal(*said)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0", "fp8"])
@pytest.mark.parametrize("mla", ["1", "2", "auto"])
def test_replayed_prompts_are_plain_float32(mla: str, cache_type: str, tmp_path: Path) -> None:
    """Slices that fill no bucket, of two sequences in turn, so that a replay finds another's pages and lengths."""
    path = write_gguf(blocks_model(), tmp_path / "m.gguf")
    settings: dict[str, Any] = {"mla": mla, "cache_type": cache_type}
    harness, plain = cuda_harness(path, **settings), Harness(path, **settings)
    slices = (5, 17, 63, 1, 65, 1, 6, 100, 33, 21)
    said: list[list[np.ndarray]] = []
    for each in (harness, plain):
        logits: list[np.ndarray] = []
        for turn in range(2 if each is plain else 3):
            pair = each.sequence(), each.sequence()
            for seed, rows in enumerate(slices):
                for sequence in pair:
                    tokens = ids(rows + turn % 2, seed=10 * seed + (sequence is pair[0]))
                    logits += each.step([Work(sequence, tokens, is_prompt=rows > 1)])
            for sequence in pair:
                sequence.release()
        said.append(logits)
    assert any(form.is_prompt for form in harness.loaded.backend._graphs._captured)  # type: ignore[attr-defined]
    said[1] += said[1][: 2 * len(slices)]  # the third turn is the first again
    got, expected = (np.concatenate(logits) for logits in said)
    assert np.isfinite(got).all()
    error = np.sqrt(np.mean((got - expected) ** 2, 1) / np.mean(expected**2, 1))
    # as test_float32_is_plain_float64 and test_every_cache_type_is_plains_in_float32
    bound = {"f32": 5e-5, "fp8": 8e-3}.get(cache_type, 1e-3)
    assert np.sqrt(np.mean(error**2)) < bound, f"{error.max():.2g} of the logits of step {error.argmax()}"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("mla", "cache_type"), [("3", "bf16"), ("3", "q8_0"), ("0", "bf16"), ("0", "q8_0")])
def test_replayed_layers_are_launched_ones_bit_for_bit(mla: str, cache_type: str, tmp_path: Path) -> None:
    """Prompts of whole buckets, three times: launched, captured, replayed; in steps beside generated rows, too."""
    path = write_gguf(blocks_model(), tmp_path / "m.gguf")
    said = []
    for captures in (True, False):
        harness = cuda_harness(path, dtype=torch.bfloat16, mla=mla, cache_type=cache_type, captures=captures)
        got = []
        for turn in range(4):
            got.append(harness.logits(ids(64 + 256, seed=turn), [64, 256]))
            generating, prompted = harness.sequence(), harness.sequence()
            harness.step([Work(generating, ids(64, seed=turn), is_prompt=True)])
            works = [Work(generating, [7], is_prompt=False), Work(prompted, ids(63, seed=turn), is_prompt=True)]
            got += harness.step(works)
            for sequence in (generating, prompted):
                sequence.release()
        said.append(got)
    for captured, launched in zip(*said, strict=True):
        np.testing.assert_array_equal(captured, launched)


@pytest.mark.gpu
@needs_gpu
def test_layers_go_on_where_another_step_came_between(tmp_path: Path) -> None:
    """A prompt stops at every cut, where another of the same bucket and generated rows run; replayed and launched."""
    path = write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf")
    harness = cuda_harness(path, mla="3")
    text, other = ids(100), ids(120, seed=9)
    expected = Harness(path, mla="3").logits(text, [100])[-2:]
    loaded = harness.loaded
    generating = harness.sequence()
    harness.step([Work(generating, ids(30, seed=3), is_prompt=True)])
    for _ in range(3):
        prompted = harness.sequence()
        batch = build_batch([Work(prompted, text, is_prompt=True, outputs=2)], loaded.plan)  # no graph has two
        run = loaded.backend.start(batch.step)
        while run.run(run.position + 1) < loaded.model.num_segments:
            between = harness.sequence()
            harness.step([Work(between, other, is_prompt=True), Work(generating, [7], is_prompt=False)])
            harness.step([Work(generating, [9], is_prompt=False)])
            between.release()
        close(run.outputs["logits"], expected, 5e-5)
        batch.commit()
        prompted.release()


def test_nothing_is_collected_during_a_capture() -> None:
    """And after it, also one that failed, as before."""
    with pytest.raises(RuntimeError), cuda_layers.uncollected:
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()


def test_nothing_is_collected_until_the_last_capture_ends() -> None:
    """Two threads capture at once, and the one that came first ends first."""
    both, first_left, checked = threading.Barrier(2), threading.Event(), []

    def first() -> None:
        with cuda_layers.uncollected:
            both.wait(10)
        first_left.set()

    def second() -> None:
        with cuda_layers.uncollected:
            both.wait(10)
            assert first_left.wait(10)
            checked.append(gc.isenabled())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checked == [False] and gc.isenabled()


@pytest.mark.gpu
@needs_gpu
def test_others_may_take_memory_while_a_step_is_captured(tmp_path: Path) -> None:
    """Another thread asks the driver for memory and gives it back, over and over."""
    harness = cuda_harness(write_gguf(blocks_model(), tmp_path / "m.gguf"), dtype=torch.bfloat16, mla="3")
    is_over, taken = threading.Event(), []

    def take() -> None:
        while not is_over.is_set():
            taken.append(len(torch.empty(64 << 20, dtype=torch.uint8, device="cuda")))
            torch.cuda.empty_cache()

    other = threading.Thread(target=take)
    other.start()
    try:
        for size in (16, 32, 64):
            for _ in range(3):  # launched, captured, replayed
                harness.logits(ids(size), [size])
                sequence = harness.sequence()
                harness.step([Work(sequence, ids(size), is_prompt=True)])
                sequence.release()
            harness.logits(ids(size), [size - 1, 1], is_prompt=False)
    finally:
        is_over.set()
        other.join()
    assert len(taken) > 3


@pytest.mark.gpu
@needs_gpu
def test_a_graph_writes_only_what_it_keeps(tmp_path: Path) -> None:
    """Whatever was freed once a step was captured belongs to others: a replay leaves it as they filled it."""
    harness = cuda_harness(write_gguf(tiny_model("v2-lite"), tmp_path / "m.gguf"), mla="3")

    def prompt_and_token() -> None:
        sequence = harness.sequence()
        harness.step([Work(sequence, ids(90), is_prompt=True)])
        harness.step([Work(sequence, [7], is_prompt=False)])
        sequence.release()

    for _ in range(2):  # launched, captured
        prompt_and_token()
    torch.cuda.synchronize()
    taken = [torch.full((size // 4,), 7.0, device="cuda") for size in [512] * 600 + [2**16] * 100 + [2**20] * 60]
    prompt_and_token()
    assert all(bool((x == 7.0).all()) for x in taken)


@pytest.mark.gpu
@needs_gpu
def test_the_embedded_model_tells_the_same_story() -> None:
    """Greedy float32 text is the CPU's for 200 tokens. In bfloat16, told the same text, KL stays below 1e-3 and the token
    of most weight is the same wherever float32 puts it 0.2 before the next, on every path and cache type."""
    settings: dict[str, Any] = {"dtype": "float32", "cache_type": "f32", "n_ctx": 512}
    greedy = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    cpu = LLM(backend="native", threads=2, **settings)
    expected = cpu.generate(["Once upon a time"], greedy)[0].token_ids
    gpu = LLM(device="cuda", **settings)
    assert gpu.generate(["Once upon a time"], greedy)[0].token_ids == expected
    text = [*gpu.tokenizer.encode("Once upon a time"), *expected]
    exact = torch.from_numpy(cpu.logits(text)).double().log_softmax(-1)
    best, second = exact.topk(2).values.unbind(-1)
    clear = best - second > 0.2
    assert clear.float().mean() > 0.8
    cases = [(mla, cache) for mla in ("0", "1", "2", "auto") for cache in ("bf16", "f16", "q8_0")]
    for mla, cache_type in [*cases, ("1", "fp8"), ("2", "fp8")]:
        rounded = LLM(device="cuda", dtype="bfloat16", cache_type=cache_type, mla=mla, n_ctx=512).logits(text)
        other = torch.from_numpy(rounded).double().log_softmax(-1)
        kl = (exact.exp() * (exact - other)).sum(-1).mean()
        assert kl < 1e-3, f"mla={mla}, {cache_type}: KL {kl:.3g}"
        differs = clear & (other.argmax(-1) != exact.argmax(-1))
        assert not differs.any(), (
            f"mla={mla}, {cache_type}: another token at {differs.nonzero().flatten().tolist()}"
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", ["cuda:99", "cuda"])
def test_what_a_gpu_cannot_serve_is_said_before_loading(device: str) -> None:
    n_ctx = 512 if device == "cuda:99" else (1 << 31) - 1
    with pytest.raises(Exception, match="there is no GPU 99" if device == "cuda:99" else "tokens .* fit the"):
        LLM(embedded_model(), device=device, n_ctx=n_ctx)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mla", ["3", "0"])
def test_tokens_chosen_in_the_graph_are_the_samplers(mla: str, tmp_path: Path) -> None:
    """Requests of eight lengths, filters and temperatures, greedy ones among them, that end at different tokens: steps
    launched ahead say what steps taken one by one say, with the same seeds."""
    path = write_gguf(tiny_model("v3"), tmp_path / "m.gguf")
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 1.5, "top_k": 64, "min_p": 0.0},
        {"temperature": 2.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 3.0, "top_k": 30, "top_p": 0.5, "min_p": 0.0},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {},
    ]
    lengths = (1, 63, 64, 65, 200, 7, 30, 7)
    said = []
    for ahead in (False, True):
        loaded = cuda_harness(path, mla=mla).loaded
        runner = Runner(
            loaded.backend,
            loaded.pool,
            loaded.plan,
            num_segments=loaded.model.num_segments,
            max_prompt_rows=256,
        )
        requests = []
        for seed, (n, changes) in enumerate(zip(lengths, settings, strict=True)):
            sampler = Sampler(SamplingParams(**changes, seed=seed), 272)
            choices = sampler if ahead else None
            requests.append(runner.submit(ids(n, seed=n), sampler.sample, 20 + n % 7, frozenset(), choices=choices))
        num_ahead = 0
        while not runner.is_idle:
            runner.step()
            num_ahead += runner._ahead is not None
        assert (num_ahead > 10) == ahead
        assert all(r.error is None for r in requests)
        said.append([r.token_ids for r in requests])
    assert said[0] == said[1]
