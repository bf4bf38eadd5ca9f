"""Token ids equal those of the published tokenizer, from every kind of file; wrong files have a name."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import tokenizers

from kvfold.errors import KvfoldError, ModelFileError, SettingError, UnsupportedModel
from kvfold.formats.gguf import open_gguf
from kvfold.text.pre_tokenizers import WORD_SPLITS, build_pre_tokenizer
from kvfold.text.tokenizer import Tokenizer
from text.vocabularies import (
    ASSISTANT,
    BOS,
    CONTROL,
    EOS,
    SCHEMES,
    UNUSED,
    USER,
    USER_DEFINED,
    Vocabulary,
    strange_strings,
    vocabulary,
)

PUBLISHED = Path(__file__).parent / "pre_tokenizers.json"


def write_hf(directory: Path, vocabulary: Vocabulary, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(vocabulary.json, encoding="utf-8")
    eos = {"__type": "AddedToken", "content": EOS}
    settings = {"bos_token": BOS, "eos_token": eos, "add_bos_token": True} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def compare(ours: Tokenizer, oracle: tokenizers.Tokenizer, strings: list[str]) -> None:
    for text in strings:
        expected = oracle.encode(text, add_special_tokens=False).ids
        got = ours.encode(text, add_bos=False)
        assert got == expected, f"{text!r}: expected {expected}, got {got}"
        assert ours.decode(got) == text
        assert ours.decode(got) == oracle.decode(expected), repr(text)


def test_the_table_holds_every_published_scheme() -> None:
    assert set(WORD_SPLITS) == set(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_spelled_as_published(scheme: str) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = build_pre_tokenizer(scheme)

    def spelled(spec: dict[str, Any]) -> str:  # a line break may be itself or an escape inside the regex
        return json.dumps(spec, sort_keys=True).replace(r"\\r", r"\r").replace(r"\\n", r"\n")

    expected = json.loads(PUBLISHED.read_text())[scheme]
    assert spelled(json.loads(backend.to_str())["pre_tokenizer"]) == spelled(expected)


def test_gguf_vocabulary_equals_the_published_one(any_vocabulary: Vocabulary) -> None:
    ours = Tokenizer.from_gguf(any_vocabulary.metadata)
    compare(ours, any_vocabulary.oracle(), strange_strings(1500, seed=1))


def test_hf_directory_equals_the_published_one(any_vocabulary: Vocabulary, tmp_path: Path) -> None:
    ours = Tokenizer.from_hf(write_hf(tmp_path, any_vocabulary))
    compare(ours, any_vocabulary.oracle(), strange_strings(500, seed=2))


@pytest.mark.full
@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_strings_equal_the_published_tokenizer(scheme: str, tmp_path: Path) -> None:
    known = vocabulary(scheme)
    strings = strange_strings(20_000, seed=3)
    compare(Tokenizer.from_gguf(known.metadata), known.oracle(), strings)
    compare(Tokenizer.from_hf(write_hf(tmp_path, known)), known.oracle(), strings)


def test_ids_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    known = vocabulary("deepseek-v3")
    write_hf(tmp_path, known, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_hf(tmp_path)
    for text in strange_strings(500, seed=4):
        assert ours.encode(text, add_bos=False, special=True) == theirs.encode(text, add_special_tokens=False), text
        ids = ours.encode(text, add_bos=False)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text


def test_any_ids_decode_as_tokenizers_decodes_them(any_vocabulary: Vocabulary) -> None:
    ours, oracle = Tokenizer.from_gguf(any_vocabulary.metadata), any_vocabulary.oracle()
    rng = random.Random(5)
    for _ in range(1000):
        ids = [rng.randrange(oracle.get_vocab_size()) for _ in range(rng.randint(0, 12))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), ids


def test_a_gguf_file_gives_the_same_tokenizer(tmp_path: Path, v3_vocabulary: Vocabulary) -> None:
    path = tmp_path / "vocabulary.gguf"
    metadata = v3_vocabulary.metadata
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        ours = Tokenizer.from_gguf(file.metadata, file=path)
    compare(ours, v3_vocabulary.oracle(), strange_strings(200, seed=6))
    assert ours.chat_template == "{{ messages }}"
    assert ours.bos_id == metadata["tokenizer.ggml.bos_token_id"]


def test_a_checkpoint_of_either_kind_gives_its_tokenizer(tmp_path: Path) -> None:
    known = vocabulary("glm4")
    files = {path.name: path for path in write_hf(tmp_path, known).iterdir()}
    text = "the fox said " + "𝔸" * 3
    expected = known.oracle().encode(text, add_special_tokens=False).ids
    for source in (SimpleNamespace(metadata=known.metadata, files={}), SimpleNamespace(metadata={}, files=files)):
        assert Tokenizer.from_vocabulary(source).encode(text, add_bos=False) == expected
    with pytest.raises(ModelFileError, match="no vocabulary"):
        Tokenizer.from_vocabulary(SimpleNamespace(metadata={}, files={}))


# ---- special tokens


def test_special_tokens_in_a_users_text_stay_text(any_vocabulary: Vocabulary) -> None:
    ours = Tokenizer.from_gguf(any_vocabulary.metadata)
    text = "".join(f"{word} and {word}" for word in CONTROL)
    ids = ours.encode(text)
    assert ids[0] == ours.bos_id
    assert not set(ids[1:]) & set(ours.special_ids.values())
    assert ours.decode(ids) == text


def test_special_tokens_of_a_rendered_prompt_are_ids(any_vocabulary: Vocabulary) -> None:
    ours = Tokenizer.from_gguf(any_vocabulary.metadata)
    ids = ours.encode(f"{BOS}{USER}Why?{ASSISTANT}{EOS}<|im_end", add_bos=False, special=True)
    expected = [ours.special_ids[text] for text in (BOS, USER)] + ours.encode("Why?", add_bos=False)
    expected += [ours.special_ids[text] for text in (ASSISTANT, EOS)] + ours.encode("<|im_end", add_bos=False)
    assert ids == expected
    assert ours.decode(ids) == "Why?<|im_end"
    assert ours.decode(ids, skip_special=False) == f"{BOS}{USER}Why?{ASSISTANT}{EOS}<|im_end"


def test_the_longest_control_token_wins(v3_vocabulary: Vocabulary) -> None:
    metadata = dict(v3_vocabulary.metadata)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|a|>", "<|a|>|>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3, 3]
    ours = Tokenizer.from_gguf(metadata)
    assert list(ours.split_special("x<|a|>|><|a|>")) == [("x", False), ("<|a|>|>", True), ("<|a|>", True)]


def test_role_markers_of_a_tokenizer_json_are_control_whatever_their_flag(tmp_path: Path) -> None:
    """DeepSeek-V3's tokenizer.json has <｜User｜> with "special": false."""
    known = vocabulary("deepseek-v3")
    spec = json.loads(known.json)
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS)
    spec_text = json.dumps(spec)
    ours = Tokenizer.from_hf(write_hf(tmp_path, Vocabulary("deepseek-v3", spec_text, {})))
    assert set(ours.special_ids) == set(CONTROL)
    assert not set(ours.encode(f"{USER}hi{ASSISTANT}", add_bos=False)) & set(ours.special_ids.values())
    assert ours.encode("<think>", add_bos=False) == [ours.token_id("<think>")]
    ours = Tokenizer.from_hf(write_hf(tmp_path, known, eos_token="<think>"))
    assert ours.token_id("<think>") not in ours.encode("<think>")
    assert ours.decode([ours.token_id("<think>")]) == ""


def test_thought_tags_are_text_whatever_the_file_calls_them(tmp_path: Path) -> None:
    """Otherwise decoding would drop them and nobody could tell thought from answer."""
    known = vocabulary("deepseek-v3")
    tokens, types = known.metadata["tokenizer.ggml.tokens"], known.metadata["tokenizer.ggml.token_type"]
    as_control = [3 if text in USER_DEFINED else type for text, type in zip(tokens, types, strict=True)]
    spec = json.loads(known.json)
    for token in spec["added_tokens"]:
        token["special"] = True
    hf = Tokenizer.from_hf(write_hf(tmp_path, Vocabulary("deepseek-v3", json.dumps(spec), {})))
    for ours in (Tokenizer.from_gguf(known.metadata | {"tokenizer.ggml.token_type": as_control}), hf):
        ids = ours.encode("<think>why</think>", add_bos=False)
        assert ids[0] == ours.token_id("<think>")
        assert ours.decode(ids) == "<think>why</think>"


def test_bos_is_added_when_the_model_wants_it_and_the_caller_does(v3_vocabulary: Vocabulary) -> None:
    wanted = Tokenizer.from_gguf(v3_vocabulary.metadata)
    unwanted = Tokenizer.from_gguf(v3_vocabulary.metadata | {"tokenizer.ggml.add_bos_token": False})
    assert wanted.encode("a") == [wanted.bos_id, *wanted.encode("a", add_bos=False)]
    assert unwanted.encode("a") == wanted.encode("a", add_bos=False)


def test_an_answer_ends_at_every_end_of_turn(tmp_path: Path) -> None:
    known = vocabulary("kimi-k2")
    ours = Tokenizer.from_gguf(known.metadata)
    assert ours.eos_ids == {ours.special_ids[EOS], ours.special_ids["<|im_end|>"]}
    with_eot = known.metadata | {"tokenizer.ggml.eot_token_id": ours.special_ids["<|EOT|>"]}
    assert Tokenizer.from_gguf(with_eot).eos_ids == ours.eos_ids | {ours.special_ids["<|EOT|>"]}
    write_hf(tmp_path, known)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, ours.special_ids[EOS]]}))
    assert Tokenizer.from_hf(tmp_path).eos_ids == {5, ours.special_ids[EOS]}


def test_padding_and_unused_ids_are_empty_text(v3_vocabulary: Vocabulary) -> None:
    ours = Tokenizer.from_gguf(v3_vocabulary.metadata)
    unused = [ours.token_id(text) for text in UNUSED]
    assert ours.decode([*unused, ours.vocab_size, ours.vocab_size + 10**6]) == ""
    assert ours.token_text(ours.vocab_size) is None
    assert ours.token_text(unused[0]) == "[PAD0]"
    assert ours.decode([ours.token_id(text) for text in USER_DEFINED]) == "".join(USER_DEFINED)


def test_text_that_cannot_be_encoded_is_refused_not_shortened(v3_vocabulary: Vocabulary) -> None:
    ours = Tokenizer.from_gguf(v3_vocabulary.metadata)
    with pytest.raises(SettingError, match=r"U\+D800.* character 2"):
        ours.encode("ab\ud800")
    metadata = dict(v3_vocabulary.metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = ["[gone]" if text == "ó" else text for text in tokens]  # stands for 0xF3
    metadata["tokenizer.ggml.merges"] = [merge for merge in metadata["tokenizer.ggml.merges"] if "ó" not in merge]
    without = Tokenizer.from_gguf(metadata)
    assert without.decode(without.encode("🦊")) == "🦊"
    with pytest.raises(SettingError, match="0xF3"):
        without.encode("\U000e0067")


# ---- tiktoken


def bytes_of(text: str) -> bytes:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    direct = [c for c in alphabet if ord(c) < 256]
    others = [byte for byte in range(256) if chr(byte) not in direct]
    table = {c: ord(c) for c in direct} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(table[c] for c in text)


def tiktoken_reference(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a known word is one token; else join the neighbours whose joint ranks lowest, leftmost first."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joints = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joints:
            return [ranks[part] for part in parts]
        i = min(joints)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def kimi_directory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, int]]:
    directory = tmp_path_factory.mktemp("kimi")
    tokens = [t for t in vocabulary("kimi-k2").metadata["tokenizer.ggml.tokens"]]
    words = [bytes_of(text) for text in tokens if text not in (*CONTROL, *USER_DEFINED, *UNUSED)]
    ranks = {word: rank for rank, word in enumerate(words)}
    lines = [f"{base64.b64encode(word).decode()} {rank}" for word, rank in ranks.items()]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    names = {
        len(ranks): "[BOS]",
        len(ranks) + 1: "[EOS]",
        len(ranks) + 2: "<|im_end|>",
        len(ranks) + 9: "<|im_user|>",
    }
    config = {
        "added_tokens_decoder": {str(id): {"content": text, "special": True} for id, text in names.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory, ranks


def test_tiktoken_vocabulary_follows_its_ranks(kimi_directory: tuple[Path, dict[bytes, int]]) -> None:
    directory, ranks = kimi_directory
    ours = Tokenizer.from_hf(directory)
    splitter = vocabulary("kimi-k2").oracle().pre_tokenizer
    for text in strange_strings(300, seed=7, words=("[BOS]", "<|im_user|>")):
        words = [bytes_of(word) for word, _ in splitter.pre_tokenize_str(text)]
        expected = [id for word in words for id in tiktoken_reference(word, ranks)]
        assert ours.encode(text) == expected, repr(text)
        assert ours.decode(expected) == text
    assert ours.vocab_size == len(ranks) + 256
    assert ours.special_ids["<|im_user|>"] == len(ranks) + 9
    assert ours.special_ids[f"<|reserved_token_{len(ranks) + 20}|>"] == len(ranks) + 20
    assert ours.eos_ids == {len(ranks) + 1, len(ranks) + 2}
    assert not ours.add_bos


@pytest.mark.parametrize("line", [b"!!! 5", b"YQ==", b"YQ== x", b"YQ== 99999", b"YQ== 0"])
def test_a_damaged_tiktoken_file_is_named(
    line: bytes, kimi_directory: tuple[Path, dict[bytes, int]], tmp_path: Path
) -> None:
    lines = (kimi_directory[0] / "tiktoken.model").read_bytes().splitlines()
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join([*lines[:100], line, *lines[101:]]))
    with pytest.raises(ModelFileError, match=r"tiktoken\.model"):
        Tokenizer.from_hf(tmp_path)


# ---- wrong files

Change = Callable[[dict[str, Any]], Any]


def put(key: str, value: Any) -> Change:
    return lambda m: m.update({f"tokenizer.ggml.{key}": value})


def change(key: str, edit: Callable[[list[Any]], Any]) -> Change:
    return lambda m: m.update({f"tokenizer.ggml.{key}": edit(list(m[f"tokenizer.ggml.{key}"]))})


WRONG: dict[str, tuple[Change, type[KvfoldError], str]] = {
    "model missing": (lambda m: m.pop("tokenizer.ggml.model"), UnsupportedModel, "gpt2"),
    "sentencepiece": (put("model", "llama"), UnsupportedModel, "byte-level BPE"),
    "pre missing": (lambda m: m.pop("tokenizer.ggml.pre"), UnsupportedModel, "deepseek-llm"),
    "pre unknown": (put("pre", "deepseek-v9"), UnsupportedModel, "deepseek-coder.*glm4.*kimi-k2"),
    "tokens missing": (lambda m: m.pop("tokenizer.ggml.tokens"), ModelFileError, "array of strings"),
    "tokens a string": (put("tokens", "abc"), ModelFileError, "array of strings"),
    "tokens empty": (put("tokens", []), ModelFileError, "empty"),
    "token a number": (change("tokens", lambda t: [*t[:9], 9, *t[10:]]), ModelFileError, "element 9"),
    "token without text": (change("tokens", lambda t: [*t[:9], "", *t[10:]]), ModelFileError, "token 9 is empty"),
    "token twice": (change("tokens", lambda t: [*t[:9], t[3], *t[10:]]), ModelFileError, "tokens 3 and 9"),
    "types too short": (change("token_type", lambda t: t[:-1]), ModelFileError, "one type for each"),
    "types too long": (change("token_type", lambda t: [*t, 1]), ModelFileError, "one type for each"),
    "type unknown": (change("token_type", lambda t: [*t[:-1], 7]), ModelFileError, "got 7"),
    "type zero": (change("token_type", lambda t: [0, *t[1:]]), ModelFileError, "got 0"),
    "types floats": (change("token_type", lambda t: [float(x) for x in t]), ModelFileError, "integers"),
    "types booleans": (change("token_type", lambda t: [True for _ in t]), ModelFileError, "integers"),
    "types a string": (put("token_type", "1"), ModelFileError, "integers"),
    "byte token": (change("token_type", lambda t: [6, *t[1:]]), ModelFileError, "<0x00>"),
    "merges missing": (lambda m: m.pop("tokenizer.ggml.merges"), ModelFileError, "array of strings"),
    "merge of one": (change("merges", lambda t: ["abc", *t]), ModelFileError, "merge 0 is 'abc"),
    "merge of three": (change("merges", lambda t: [*t[:5], "a b c"]), ModelFileError, "merge 5 is 'a b c'"),
    "merge of strangers": (change("merges", lambda t: ["qq zz", *t]), ModelFileError, "'qq' is no token"),
    "merge to a stranger": (change("merges", lambda t: ["Z Q", *t]), ModelFileError, "'ZQ' is no token"),
    "bos too high": (put("bos_token_id", 10**6), ModelFileError, "bos_token_id"),
    "bos negative": (put("bos_token_id", -1), ModelFileError, "bos_token_id"),
    "eos a string": (put("eos_token_id", "1"), ModelFileError, "integer"),
    "eot a boolean": (put("eot_token_id", True), ModelFileError, "eot_token_id"),
    "add_bos a number": (put("add_bos_token", 1), ModelFileError, "boolean"),
    "template a list": (lambda m: m.update({"tokenizer.chat_template": []}), ModelFileError, "chat_template"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_vocabulary_is_named(name: str, v3_vocabulary: Vocabulary) -> None:
    edit, error, message = WRONG[name]
    metadata = dict(v3_vocabulary.metadata)
    edit(metadata)
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(metadata, file="model.gguf")


def test_wrong_hf_directories_are_named(tmp_path: Path) -> None:
    known = vocabulary("glm4")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json or tiktoken\.model"):
        Tokenizer.from_hf(tmp_path)
    spec = json.loads(known.json)
    cases: list[tuple[dict[str, Any] | str, type[KvfoldError], str]] = [
        ("{", ModelFileError, "not valid JSON"),
        ("[" * 100_000, ModelFileError, "not valid JSON"),
        ("[]", ModelFileError, "JSON object"),
        (spec | {"decoder": None}, UnsupportedModel, "byte-level"),
        (spec | {"model": {"type": "Unigram", "vocab": []}}, UnsupportedModel, "Unigram"),
        (spec | {"model": spec["model"] | {"vocab": {"a": 0}}}, ModelFileError, "dense from 0"),
        (spec | {"model": spec["model"] | {"merges": [["a", "qq"]]}}, ModelFileError, "'qq' is no token"),
        (spec | {"model": spec["model"] | {"continuing_subword_prefix": "#"}}, UnsupportedModel, "prefix"),
        (spec | {"normalizer": {"type": "NFC"}}, UnsupportedModel, "NFC"),
        (spec | {"pre_tokenizer": {"type": "Guess"}}, ModelFileError, "refuses"),
        (spec | {"added_tokens": [{"content": "x"}]}, ModelFileError, "added_tokens"),
        (spec | {"added_tokens": [{**spec["added_tokens"][0], "lstrip": True}]}, UnsupportedModel, "spaces"),
    ]
    for content, error, message in cases:
        (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(error, match=message):
            Tokenizer.from_hf(tmp_path)
    with pytest.raises(ModelFileError, match="eos_token"):
        Tokenizer.from_hf(write_hf(tmp_path, known, eos_token="<nowhere>"))


def mutate(value: Any, rng: random.Random) -> Any:
    """One leaf or branch of a JSON value replaced; entries of long containers are picked, not walked."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        copy = value.copy()
        at = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.1:
            del copy[at]
        else:
            copy[at] = mutate(copy[at], rng)
        return copy
    return rng.choice(
        (None, True, -1, 0, 2**31, 2**65, 1.5, "", "a", "\ud800", "(", "[a&&]", [], {}, [[]], "ByteLevel")
    )


def test_mutated_tokenizer_files_fail_with_a_name_or_work(tmp_path: Path) -> None:
    """300 tokenizer.json wrong in one to three places: nothing but our errors comes out, each within a second."""
    original = json.loads(vocabulary("deepseek-v3", 400).json)
    rng = random.Random(88)
    write_hf(tmp_path, vocabulary("deepseek-v3", 400))
    outcomes = {"works": 0, "refused": 0}
    for _ in range(300):
        spec = original
        for _ in range(rng.randint(1, 3)):
            spec = mutate(spec, rng)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        start = time.perf_counter()
        try:
            Tokenizer.from_hf(tmp_path).encode("Once upon a time")
            outcomes["works"] += 1
        except KvfoldError:
            outcomes["refused"] += 1
        assert time.perf_counter() - start < 1
    assert min(outcomes.values()) > 20, outcomes


# ---- speed


def large_metadata(count: int, num_control: int) -> dict[str, Any]:
    """A vocabulary of `count` tokens in the shape of a released one: 256 bytes, merges, then control tokens."""
    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for i in range(count - num_control - 256):
        left, right = tokens[i // 256], tokens[i % 256]  # all pairs of bytes, then triples
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    return vocabulary("deepseek-v3").metadata | {
        "tokenizer.ggml.tokens": tokens + [f"<｜reserved▁{i}｜>" for i in range(num_control)],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * num_control,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


# CPU time, so that a busy machine changes nothing
@pytest.mark.parametrize(("count", "num_control", "limit_s"), [(129_280, 1_280, 1.5), (8_192, 4, 0.05)])
def test_a_vocabulary_is_built_in_time(count: int, num_control: int, limit_s: float) -> None:
    metadata = large_metadata(count, num_control)
    times = []
    for _ in range(3):
        start = time.process_time()
        ours = Tokenizer.from_gguf(metadata)
        times.append(time.process_time() - start)
    assert ours.vocab_size == count
    assert min(times) < limit_s, f"{min(times):.3f} s"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, kvfold.text.tokenizer; print(sorted({'tokenizers', 'jinja2', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
