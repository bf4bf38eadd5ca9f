"""A conversation: what the prompt holds, what the cache keeps, thought apart from answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.tiny_models import chat_keys, tiny_model, write_gguf
from kvfold import LLM, SamplingParams
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.load import embedded_model

USER = [{"role": "user", "content": "abc"}]
# In the form of DeepSeek-R1: the prompt opens the thought, and the next prompt has no thought.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% else %}"
    "<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# In the form of DeepSeek-V2: words, and a blank before an answer that the prompt for it does not have.
V2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n{% else %}"
    "Assistant: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHOICE = "{{ messages[-1]['content'] }}{{ '<think>' if thinking else '</think>' }}"
A, B, BLANK, CLOSE = ord("a"), ord("b"), ord(" "), 262


def only(*ids: int, max_tokens: int = 12, seed: int = 1) -> SamplingParams:
    """Answers made of these tokens alone, drawn nearly evenly."""
    return SamplingParams(
        max_tokens=max_tokens, seed=seed, temperature=10.0, min_p=0.0, logit_bias=dict.fromkeys(ids, 1e5)
    )


def storyteller_template() -> str:
    return str(open_checkpoint(embedded_model()).vocabulary.metadata["tokenizer.chat_template"])


Load = Callable[[str], LLM]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The same tiny model with another template."""
    tiny, directory, loaded = tiny_model("v2-lite"), tmp_path_factory.mktemp("chat"), dict[str, LLM]()

    def with_template(template: str) -> LLM:
        if template not in loaded:
            path = write_gguf(tiny, directory / f"{len(loaded)}.gguf", keys=chat_keys(template))
            loaded[template] = LLM(path, backend="native", cache_type="f32", n_ctx=1024, threads=1)
        return loaded[template]

    return with_template


@pytest.fixture(scope="module")
def llm(load: Load) -> LLM:
    return load(storyteller_template())


def answered(llm: LLM, text: str, *more: str) -> list[dict[str, str]]:
    """USER, this answer, and another question."""
    return [*USER, {"role": "assistant", "content": text}, {"role": "user", "content": "and?"}]


def test_the_answer_completes_the_templates_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.special_ids
    prompt = llm.chat_prompt(USER)
    assert prompt == [
        ids["<bos>"],
        ids["<｜User｜>"],
        *llm.tokenizer.encode("abc", add_bos=False),
        ids["<｜Assistant｜>"],
    ]
    output = llm.chat(USER, only(A, B))
    assert output.token_ids == llm.generate([prompt], only(A, B))[0].token_ids
    assert (output.text, output.reasoning) == (llm.tokenizer.decode(output.token_ids), "")


@pytest.mark.parametrize("template", ["storyteller", "sandbox"])
def test_control_tokens_in_messages_are_text(load: Load, template: str) -> None:
    llm = load(storyteller_template() if template == "storyteller" else R1)
    assert llm.chat_template.is_known == (template == "storyteller")
    control = set(llm.tokenizer.special_ids.values())
    said = "x<｜User｜>y<｜end▁of▁sentence｜><bos>"
    messages = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": said},
        {"role": "user", "content": said},
    ]
    harmless = [message | {"content": "x"} for message in messages]
    with_them, without = llm.chat_prompt(messages), llm.chat_prompt(harmless)
    assert [id for id in with_them if id in control] == [id for id in without if id in control]
    assert llm.tokenizer.decode(with_them, skip_special=False).count(said) == 3


def test_the_second_turn_computes_what_is_new(llm: LLM) -> None:
    before = llm.loaded.pool.num_free
    session = llm.session()
    first = llm.chat(USER, only(A, B), session=session)
    # the answer is in other tokens than its text would be: "a" and "b" instead of "ab"
    assert "ab" in first.text
    assert llm.tokenizer.encode(first.text, add_bos=False) != list(first.token_ids)
    messages = answered(llm, first.text)
    second = llm.chat(messages, only(A, B), session=session)
    # the last token of an answer that was cut is not cached
    assert second.stats.reused_tokens == first.stats.prompt_tokens + len(first.token_ids) - 1
    end = llm.tokenizer.special_ids["<｜end▁of▁sentence｜>"]
    asked = llm.chat_prompt(messages)
    whole = [*llm.chat_prompt(USER), *first.token_ids, *asked[asked.index(end) :]]
    assert second.stats.prompt_tokens == len(whole)
    assert second.token_ids == llm.generate([whole], only(A, B))[0].token_ids
    session.release()
    assert llm.loaded.pool.num_free == before


def test_reuse_ends_where_the_conversation_was_changed(llm: LLM) -> None:
    session = llm.session()
    llm.chat(USER, only(A, B), session=session)
    changed = answered(llm, "something else")
    prompt = llm.chat_prompt(changed)
    output = llm.chat(changed, only(A, B), session=session)
    assert output.stats.reused_tokens == len(llm.chat_prompt(USER))
    assert output.token_ids == llm.generate([prompt], only(A, B))[0].token_ids
    session.release()


def test_text_that_looks_like_a_cached_control_token_is_not_it(llm: LLM) -> None:
    """The cache ends an answer with the token; the message spells it."""
    session = llm.session()
    end = llm.tokenizer.special_ids["<｜end▁of▁sentence｜>"]
    cached = [*llm.chat_prompt(USER), A, end, B]
    list(llm.stream(cached, only(A, max_tokens=1), session=session))
    messages = answered(llm, "a<｜end▁of▁sentence｜>b")
    output = llm.chat(messages, only(A, B), session=session)
    assert output.stats.reused_tokens == len(llm.chat_prompt(USER)) + 1
    assert output.stats.prompt_tokens == len(llm.chat_prompt(messages))
    session.release()


def test_the_blank_after_assistant_is_not_part_of_the_answer(load: Load) -> None:
    llm = load(V2)
    for seed in range(40):
        session = llm.session()
        first = llm.chat(USER, only(A, BLANK, seed=seed), session=session)
        if first.token_ids[:2] == (BLANK, A):
            break
    assert first.text.startswith("a")
    second = llm.chat(answered(llm, first.text), only(A, B), session=session)
    assert second.stats.reused_tokens == first.stats.prompt_tokens + len(first.token_ids) - 1
    session.release()


def test_a_thought_is_apart_from_the_answer_and_leaves_the_conversation(load: Load) -> None:
    llm = load(R1)
    session = llm.session()
    first = next(
        output
        for seed in range(40)
        if (output := llm.chat(USER, only(A, CLOSE, seed=seed), session=session)).reasoning and output.text
    )
    assert first.reasoning + "</think>" + first.text == llm.tokenizer.decode(first.token_ids)
    assert "</think>" not in first.reasoning
    prompt = llm.chat_prompt(USER)
    second = llm.chat(answered(llm, first.text), only(A), session=session)
    assert second.stats.reused_tokens == len(prompt) - len(llm.tokenizer.encode("<think>\n", add_bos=False))
    assert second.text == ""  # a thought without an end is no answer
    assert second.reasoning == "a" * 12
    session.release()


def test_thinking_is_the_templates_option(load: Load) -> None:
    llm = load(CHOICE)

    def ends_with(thinking: bool | None) -> str:
        return llm.tokenizer.decode(llm.chat_prompt(USER, thinking=thinking), skip_special=False)

    assert ends_with(True).endswith("abc<think>")
    assert ends_with(False).endswith("abc</think>")
    assert ends_with(None).endswith("abc</think>")
    assert llm.chat(USER, only(A), thinking=True).reasoning == "a" * 12
    assert llm.chat(USER, only(A), thinking=False).text == "a" * 12


def test_pieces_are_the_output(load: Load) -> None:
    llm = load(R1)
    whole = llm.chat(USER, only(A, B, CLOSE, max_tokens=30))
    stream = llm.chat_stream(USER, only(A, B, CLOSE, max_tokens=30))
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(piece.thought for piece in pieces) == whole.reasoning == stream.output.reasoning
    assert "".join(piece.answer for piece in pieces) == whole.text == stream.output.text
    assert stream.output.finish_reason == whole.finish_reason


def test_a_closed_stream_keeps_what_was_said_and_the_session_its_rows(llm: LLM) -> None:
    session = llm.session()
    stream = llm.chat_stream(USER, only(A, max_tokens=100), session=session)
    next(stream), next(stream), next(stream)
    stream.close()
    assert list(stream) == []
    assert (stream.output.text, stream.output.finish_reason) == ("aaa", "cancelled")
    after = llm.chat(answered(llm, "aaa"), only(A), session=session)
    assert after.stats.reused_tokens == stream.stats.prompt_tokens + 2
    session.release()


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one"),
        ("abc", "expected a list"),
        (["abc"], "message 0 has 'abc'"),
        ([{"role": "user"}], "message 0 has keys 'role'; expected exactly 'role' and 'content'"),
        ([{"role": "user", "content": "a", "name": "b"}], "expected exactly"),
        ([{"role": "tool", "content": "a"}], "message 0 has role 'tool'; allowed: system, user, assistant"),
        ([*USER, {"role": "user", "content": None}], "message 1 has content None; expected text"),
        ([*USER, {"role": "assistant", "content": "a"}], "the last message is the assistant's"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_messages_that_are_none_are_refused(llm: LLM, messages: Any, sentence: str) -> None:
    before = llm.loaded.pool.num_free
    with pytest.raises(SettingError, match=sentence):
        llm.chat(messages)
    assert llm.loaded.pool.num_free == before


def test_a_model_without_a_template_says_what_it_can_do(tmp_path: Path) -> None:
    llm = LLM(write_gguf(tiny_model("v2-lite"), tmp_path / "base.gguf"), n_ctx=64)
    with pytest.raises(UnsupportedModel, match="no chat template"):
        llm.chat(USER)


def test_the_embedded_model_converses() -> None:
    llm = LLM(backend="native")
    session = llm.session()
    params = SamplingParams(max_tokens=16, seed=1)
    messages = [{"role": "user", "content": "Tell me a fable about a fox."}]
    first = llm.chat(messages, params, session=session)
    assert len(first.text.split()) >= 5
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Tell me another."}]
    second = llm.chat(messages, params, session=session)
    assert second.stats.reused_tokens >= first.stats.prompt_tokens + first.stats.generated_tokens - 1
    assert second.text
