"""The pieces of a stream are the whole decode; no piece is half a character or the beginning of a stop string."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.text.streaming import DetokenizeStream, StopStrings
from kvfold.text.tokenizer import Tokenizer
from text.vocabularies import Vocabulary, strange_strings, vocabulary


def byte_stream(**kwargs: object) -> DetokenizeStream:
    """Every id is one byte: the hardest vocabulary for a stream."""
    return DetokenizeStream(lambda id, skip_special: bytes([id]), **kwargs)  # type: ignore[arg-type]


def run(stream: DetokenizeStream, ids: list[int]) -> list[str]:
    return [*(stream.push(id) for id in ids), stream.finish()]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.integers(0, 255) | st.sampled_from(list("🦊é狐".encode())), max_size=40))
def test_any_bytes_stream_as_they_decode(ids: list[int]) -> None:
    pieces = run(byte_stream(), ids)
    assert "".join(pieces) == bytes(ids).decode("utf-8", "replace")
    for piece in pieces:
        piece.encode()  # no lone surrogates


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30))
def test_text_streams_without_a_replacement_character(text: str) -> None:
    pieces = run(byte_stream(), list(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert pieces[-1] == ""  # nothing was late


def test_random_ids_stream_as_they_decode(any_vocabulary: Vocabulary) -> None:
    tokenizer = Tokenizer.from_gguf(any_vocabulary.metadata)
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randint(0, 30))]
        for skip in (True, False):
            whole = tokenizer.decode(ids, skip)
            assert "".join(run(tokenizer.stream(skip_special=skip), ids)) == whole, ids


def test_real_text_streams_as_it_was_written(any_vocabulary: Vocabulary) -> None:
    tokenizer = Tokenizer.from_gguf(any_vocabulary.metadata)
    for text in strange_strings(300, seed=2):
        pieces = run(tokenizer.stream(), tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The definition: read character by character until a stop string has just been completed."""
    for end in range(len(text) + 1):
        done = [word for word in stop if text[:end].endswith(word)]
        if done:
            word = max(done, key=len)
            return text[: end - len(word)], word
    return text, None


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.text("ab🦊\n", max_size=4), max_size=8),
    st.lists(st.text("ab🦊\n", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    expected = first_stop(text, stop)
    stops = StopStrings(stop)
    shown = ""
    for i, piece in enumerate(pieces):
        shown += stops.push(piece)
        assert expected[0].startswith(shown)  # never takes text back
        if stops.matched is None:  # and holds no more than it must
            held = len("".join(pieces[: i + 1])) - len(shown)
            assert held <= max((len(word) for word in stop), default=1) - 1
            rest = "".join(pieces[: i + 1])[len(shown) :]
            assert rest == "" or any(word.startswith(rest) for word in stop)
    shown += stops.finish()
    assert (shown, stops.matched) == expected


@settings(deadline=None, max_examples=200)
@given(st.text("ab狐🦊", max_size=20), st.lists(st.sampled_from(["狐🦊", "🦊a", "b"]), max_size=2))
def test_a_stop_string_across_tokens_ends_the_stream(text: str, stop: list[str]) -> None:
    stream = byte_stream(stop=stop)
    assert ("".join(run(stream, list(text.encode()))), stream.stopped_by) == first_stop(text, stop)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = byte_stream(stop=["\n\n"])
    assert "".join(run(stream, list(b"a\nb\n\nc\n\nd"))) == "a\nb"
    assert stream.push(ord("x")) == ""
    assert stream.finish() == ""
    assert stream.stopped_by == "\n\n"


@pytest.mark.parametrize("stop", [[], ["x" * 64, "xy", "\n"]])
def test_streaming_is_cheap(stop: list[str]) -> None:
    """Under 50 us a token, so that a hundred streams of 50 tokens/s cost a quarter of a core."""
    tokenizer = Tokenizer.from_gguf(vocabulary("deepseek-v3").metadata)
    ids = tokenizer.encode("the fox and the grapes " * 200)
    start = time.process_time()
    run(tokenizer.stream(stop=stop), ids)
    assert (time.process_time() - start) / len(ids) < 50e-6
