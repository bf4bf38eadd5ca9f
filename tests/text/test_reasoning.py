"""Thought and answer are told apart the same way wherever the pieces end."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.text.reasoning import ThoughtSplitter, opens_thought

CASES = [
    # text, inside, thought, answer
    ("<think>\nwhy\n</think>\n\nBecause.", False, "why", "Because."),
    ("\n <think>a</think>b", False, "a", "b"),
    ("a\n\nb\n</think>\nc\n", True, "a\n\nb", "c\n"),
    ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
    ("Hi <think>not</think>", False, "", "Hi <think>not</think>"),
    ("Hi</think>", False, "", "Hi</think>"),
    ("\n\nHi", False, "", "\n\nHi"),
    ("<think>cut sh", False, "cut sh", ""),
    ("cut </thi", True, "cut </thi", ""),
    ("<thi", False, "", "<thi"),
    ("<thinker>", False, "", "<thinker>"),
    ("a</think>b</think>c<think>d", True, "a", "b</think>c<think>d"),
    ("< /think></ think></think>x", True, "< /think></ think>", "x"),
    ("</think>x", True, "", "x"),
    ("", False, "", ""),
    ("", True, "", ""),
]


def split(pieces: list[str], inside: bool) -> tuple[str, str]:
    splitter = ThoughtSplitter(inside=inside)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.finish()]
    return "".join(part.thought for part in parts), "".join(part.answer for part in parts)


@pytest.mark.parametrize(("text", "inside", "thought", "answer"), CASES)
def test_tags_across_pieces(text: str, inside: bool, thought: str, answer: str) -> None:
    assert split([text], inside) == (thought, answer)
    assert split(list(text), inside) == (thought, answer)
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]], inside) == (thought, answer)


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "think>", "a", "\n", " ", "<", "🦊"]),
        max_size=10,
    ),
    st.booleans(),
)
def test_pieces_change_nothing(pieces: list[str], inside: bool) -> None:
    text = "".join(pieces)
    whole = (
        re.fullmatch(r"\s*<think>(.*)", text, re.DOTALL) if not inside else re.fullmatch(r"(.*)", text, re.DOTALL)
    )
    if whole is None:
        expected = ("", text)
    else:
        thought, tag, answer = whole[1].partition("</think>")
        expected = (thought.strip("\n"), answer.lstrip("\n") if tag else "")
    assert split(pieces, inside) == expected


def test_an_answer_is_shown_as_soon_as_it_can_be() -> None:
    splitter = ThoughtSplitter()
    assert splitter.push("Hello") == ("", "Hello")
    assert splitter.push(" <") == ("", " <")
    splitter = ThoughtSplitter(inside=True)
    assert splitter.push("so <") == ("so ", "")
    assert splitter.push("b") == ("<b", "")


def test_a_prompt_that_opens_a_thought_is_seen() -> None:
    assert opens_thought("<｜Assistant｜><think>\n")
    assert opens_thought("<｜Assistant｜><think>")
    assert not opens_thought("<｜Assistant｜></think>")
    assert not opens_thought("<｜Assistant｜>")
