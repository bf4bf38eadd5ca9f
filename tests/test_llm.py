"""What a user holds: text in, text out, logits, errors."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold import LLM, SamplingParams
from kvfold.errors import OutOfPages, SettingError

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tiny_model("v2-lite", first_k_dense_replace=3)
    return write_gguf(tiny, tmp_path_factory.mktemp("llm") / "tiny.gguf")


@pytest.fixture(scope="module", params=["plain", "native"])
def llm(path: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(path, backend=request.param, cache_type="f32", n_ctx=512, threads=2)


def test_generate_is_argmax_of_logits(llm: LLM) -> None:
    output = llm.generate("abc", GREEDY)[0]
    assert len(output.token_ids) == 12
    assert output.finish_reason == "length"
    ids = llm.tokenizer.encode("abc")
    for token in output.token_ids:
        assert int(llm.logits(ids)[-1].argmax()) == token
        ids.append(token)
    assert output.text == llm.tokenizer.decode(output.token_ids)
    assert output.stats.prompt_tokens == len(llm.tokenizer.encode("abc"))


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, seed=11, temperature=1.0)
    whole = llm.generate("Once", params)[0]
    stream = llm.stream("Once", params)
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert stream.output.token_ids == whole.token_ids
    assert len(pieces) > 1


def test_many_prompts_are_answered_in_order(llm: LLM) -> None:
    prompts = ["ab", "hello there", "x", [3, 4, 5]]
    together = llm.generate(prompts, GREEDY)
    assert [o.token_ids for o in together] == [llm.generate([p], GREEDY)[0].token_ids for p in prompts]


def test_stop_strings_never_show(llm: LLM) -> None:
    full = llm.generate("Once", GREEDY)[0].text
    stop = full[4:6]
    output = llm.generate("Once", SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=(stop,)))[0]
    assert output.text == full[: full.index(stop)]
    assert output.finish_reason == "stop"


def test_stop_strings_end_a_prompt_of_a_batch_as_they_end_it_alone(llm: LLM) -> None:
    prompts = ["ab", "Once"]
    full = llm.generate("Once", GREEDY)[0].text
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(full[4:6],))
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    for both, one in zip(together, alone, strict=True):
        assert (both.text, both.token_ids, both.finish_reason) == (one.text, one.token_ids, one.finish_reason)
    assert together[1].finish_reason == "stop"


def test_an_abandoned_stream_works_no_more(llm: LLM) -> None:
    for _ in llm.stream("Once", SamplingParams(max_tokens=400, ignore_eos=True)):
        break
    gc.collect()
    assert llm.loaded.pool.num_free == llm.loaded.pool.num_pages
    with pytest.raises(SettingError, match="Token id 99999"):
        llm.generate([[1, 2, 3], [1, 99999]])
    assert llm.loaded.pool.num_free == llm.loaded.pool.num_pages


def test_threads_may_share_a_model(llm: LLM) -> None:
    prompts = ["ab", "hello there", "x", "Once upon", "zz", "the king"]
    alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: llm.generate(prompt, GREEDY)[0].token_ids, prompts))
    assert together == alone


def test_the_context_is_the_limit_it_says(llm: LLM) -> None:
    assert len(llm.generate([[1] * 511], GREEDY)[0].token_ids) == 1
    with pytest.raises(OutOfPages, match="512 tokens and n_ctx=512 leaves no room"):
        llm.generate([[1] * 512], GREEDY)
    with pytest.raises(OutOfPages, match="do not fit n_ctx=512"):
        llm.logits([1] * 513)


def test_a_context_beyond_the_models_own_is_said(path: Path) -> None:
    assert any("beyond the 4096 tokens" in line for line in LLM(path, n_ctx=5000).loaded.info)
    assert not any("beyond" in line for line in LLM(path, n_ctx=4096).loaded.info)


def test_a_list_that_mixes_texts_and_ids_is_refused(llm: LLM) -> None:
    for mixed in (["abc", 5, "de"], [5, "abc"]):
        with pytest.raises(SettingError, match="Prompt 1 is another kind"):
            llm.generate(mixed)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="integers"):
        llm.logits([1.7])  # type: ignore[list-item]


def test_seed_repeats_a_text_and_another_seed_does_not(llm: LLM) -> None:
    def text(seed: int) -> str:
        return llm.generate("Once", SamplingParams(max_tokens=30, seed=seed, temperature=1.5))[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_progress_of_a_prompt_grows_to_all_of_it_and_ends_with_the_first_token(llm: LLM, max_tokens: int) -> None:
    reports: list[tuple[int, int]] = []
    ids = list(range(1, 201))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    list(llm.stream(ids, params, progress=lambda *report: reports.append(report)))
    assert [total for _, total in reports] == [200] * len(reports)
    assert sorted(reports) == reports and reports[-1] == (200, 200)
    assert [done for done, _ in reports].count(200) <= 1 + (len(reports) > 1)


def test_closing_a_stream_gives_its_pages_back(llm: LLM) -> None:
    stream = llm.stream("Once", GREEDY)
    next(stream)
    stream.close()
    assert stream.output.finish_reason == "cancelled"
    assert llm.loaded.pool.num_free == llm.loaded.pool.num_pages


def test_logits_do_not_depend_on_the_row_window(path: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 256, 100)]
    whole = LLM(path, backend="plain", cache_type="f32", n_ctx=128).logits(ids)
    windows = LLM(path, backend="plain", cache_type="f32", n_ctx=128, batch_rows=7).logits(ids)
    assert whole.shape == (100, 272)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(windows, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_a_hugging_face_directory_answers_like_its_gguf(path: Path, tmp_path: Path) -> None:
    tiny = tiny_model("v2-lite", first_k_dense_replace=3)
    directory = write_hf_dir(tiny, tmp_path / "hf", tokenizer=True)
    assert LLM(directory, n_ctx=128).generate("abc", GREEDY)[0].token_ids == (
        LLM(path, n_ctx=128).generate("abc", GREEDY)[0].token_ids
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mla": "5"}, "allowed are auto, 0, 1, 2, 3"),
        ({"fa": "2"}, "allowed are auto, 0, 1"),
        ({"dtype": "float8"}, "dtype=float8: allowed are auto"),
        ({"cache_type": "q1"}, "allowed are f32, f16, bf16"),
        ({"backend": "tpu"}, "allowed are auto, cuda, native, plain"),
        ({"threads": 0}, "allowed are 1 to 1024"),
        ({"n_ctx": 0}, "allowed are 1 to 2147483647 tokens"),
        ({"n_ctx": 2**31}, "allowed are 1 to 2147483647 tokens"),
        ({"workspace_bytes": 2**41}, "allowed are 1 MiB to 1 TiB"),
        ({"batch_rows": 0}, "at least 1"),
        ({"backend": "native", "dtype": "bfloat16"}, "native: computes in"),
    ],
)
def test_a_wrong_setting_names_the_allowed_ones(path: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        LLM(path, **settings)  # type: ignore[arg-type]


def test_wrong_prompts_are_refused(llm: LLM) -> None:
    with pytest.raises(SettingError, match="Token id 272: the vocabulary has ids 0 to 271"):
        llm.generate([[1, 272]])
    with pytest.raises(SettingError, match="no tokens"):
        llm.logits([])
    assert llm.loaded.pool.num_free == llm.loaded.pool.num_pages
