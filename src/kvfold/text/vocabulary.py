"""What a vocabulary file says, checked: a GGUF's metadata, a tokenizer.json or a tiktoken.model.

Builds the `tokenizers` object, sorts out which tokens are control tokens and which ids end an answer. Reads files
in words: what is not understood is refused with the key's name. Encodes and decodes nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.errors import ModelFileError, UnsupportedModel
from kvfold.text.pre_tokenizers import CHAR_OF, build_pre_tokenizer, word_split

if TYPE_CHECKING:
    import tokenizers

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# DeepSeek-V3's tokenizer.json calls <｜User｜> an ordinary added token ("special": false), and a user could then
# write a turn of the assistant. Converters mark what is bracketed like this as control; so do we.
_LOOKS_LIKE_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)

# Never control tokens, whatever a file says: reasoning.py reads them in the text.
_VISIBLE = ("<think>", "</think>")

_TIKTOKEN_RESERVED = 256  # ids after the ranks, named by added_tokens_decoder (Moonshot's tokenization_kimi.py)


@dataclass(frozen=True, eq=False)
class ParsedVocabulary:
    """One vocabulary file, understood.

    backend:       splits and merges; matches user-defined tokens in a text, control tokens never
    vocab_size:    ids the file names; a model's logits may have more (padding)
    special_ids:   control tokens by their text
    added_bytes:   tokens that stand for other bytes than their text in the byte alphabet says: control and
                   user-defined ones (their own text), unused ones (nothing), single bytes
    bos_id:        id put before a prompt, or None; add_bos says whether the model wants it there
    eos_id:        the end of a text, which chat templates write after an answer; None without
    eos_ids:       ids that end an answer: end of text and end of turn
    chat_template: Jinja source, or None
    """

    backend: tokenizers.Tokenizer
    vocab_size: int
    special_ids: Mapping[str, int]
    added_bytes: Mapping[int, bytes]
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    chat_template: str | None


_Bad = Callable[[str, str], ModelFileError]  # (key, reason) -> the error that names file and key


def _merge_model(
    vocab: dict[str, int], merges: list[tuple[str, str]], bad: _Bad, *, ignore_merges: bool = False
) -> tokenizers.models.BPE:
    """ignore_merges: a word that is a token is that token, without merging (tiktoken's rule)."""
    from tokenizers import models

    try:
        return models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:
        for rank, (left, right) in enumerate(merges):
            for text in (left, right, left + right):
                if text not in vocab:
                    raise bad(
                        "merges",
                        f"merge {rank} is {f'{left} {right}'!r:.60}, expected two tokens with a space between that "
                        f"together are a third; {text!r:.60} is no token",
                    ) from error
        raise bad("merges", f"the vocabulary cannot be built: {error}") from error


def _new_backend(model: tokenizers.models.BPE, pre: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders

    backend = Tokenizer(model)
    backend.pre_tokenizer = build_pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, control: Iterable[str], user_defined: Iterable[str]) -> None:
    """Both are in the model's vocabulary already and keep their ids. Control tokens in a text are spelled out."""
    from tokenizers import AddedToken

    backend.encode_special_tokens = True
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in user_defined])


# ---- GGUF


def read_gguf(metadata: Mapping[str, Any], file: object) -> ParsedVocabulary:
    """From the `tokenizer.*` keys of a GGUF; `file` is named in errors.

    UnsupportedModel: not a byte-level BPE, or a pre-tokenizer kvfold does not know.
    ModelFileError: a key is missing or the arrays do not fit together.
    """

    def key(name: str) -> str:
        return f"tokenizer.ggml.{name}"

    def bad(name: str, reason: str) -> ModelFileError:
        return ModelFileError(file, reason, where=key(name))

    model = metadata.get(key("model"))
    if model != "gpt2":
        raise UnsupportedModel(
            f"{file}: tokenizer.ggml.model is {model!r}; kvfold runs 'gpt2' (byte-level BPE), "
            "which every DeepSeek-family model uses"
        )
    split = word_split(str(metadata.get(key("pre"))))

    tokens = _strings(metadata, key("tokens"), file)
    ids = {text: id for id, text in enumerate(tokens)}
    if not tokens:
        raise bad("tokens", "the vocabulary is empty")
    if "" in ids:
        raise bad("tokens", f"token {ids['']} is empty")
    if len(ids) != len(tokens):
        first = next(id for id, text in enumerate(tokens) if ids[text] != id)
        raise bad("tokens", f"tokens {first} and {ids[tokens[first]]} are both {tokens[first]!r}")

    types = (
        _integers(metadata, key("token_type"), file) if key("token_type") in metadata else [_NORMAL] * len(tokens)
    )
    if len(types) != len(tokens):
        raise bad("token_type", f"expected one type for each of {len(tokens)} tokens, got {len(types)}")
    odd_types = set(types) - set(range(_NORMAL, _BYTE + 1))
    if odd_types:
        raise bad("token_type", f"expected types {_NORMAL} to {_BYTE}, got {min(odd_types)}")

    bos_id = _token_id(metadata, key("bos_token_id"), len(tokens), file)
    ends = [_token_id(metadata, key(f"{name}_token_id"), len(tokens), file) for name in ("eos", "eot", "eom")]
    eos_ids = {id for id in ends if id is not None} | {ids[text] for text in split.end_of_turn if text in ids}
    add_bos = metadata.get(key("add_bos_token"), False)
    if not isinstance(add_bos, bool):
        raise bad("add_bos_token", f"expected a boolean, got {add_bos!r}")

    named = eos_ids | ({bos_id} if bos_id is not None else set())
    control: dict[str, int] = {}
    added_bytes: dict[int, bytes] = {}
    user_defined: list[str] = []
    for id, type in enumerate(types):
        if type == _NORMAL and id not in named:
            continue
        text = tokens[id]
        if (type in (_CONTROL, _UNKNOWN) or id in named) and text not in _VISIBLE:
            control[text] = id
            added_bytes[id] = text.encode()
        elif type == _USER_DEFINED or text in _VISIBLE:
            user_defined.append(text)
            added_bytes[id] = text.encode()
        elif type == _BYTE:
            added_bytes[id] = _byte_token(text, id, bad)
        else:
            added_bytes[id] = b""

    halves = (merge.partition(" ") for merge in _strings(metadata, key("merges"), file))
    merges = [(left, right) for left, _, right in halves]
    backend = _new_backend(_merge_model(ids, merges, bad), metadata[key("pre")])
    _add_tokens(backend, control, user_defined)

    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(file, f"expected a string, got {template!r:.60}", where="tokenizer.chat_template")
    return ParsedVocabulary(
        backend=backend,
        vocab_size=len(tokens),
        special_ids=control,
        added_bytes=added_bytes,
        bos_id=bos_id,
        eos_id=ends[0],
        eos_ids=frozenset(eos_ids),
        add_bos=add_bos,
        chat_template=template,
    )


def _strings(metadata: Mapping[str, Any], key: str, file: object) -> list[str]:
    value = metadata.get(key)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ModelFileError(file, f"expected an array of strings, got {value!r:.60}", where=key)
    strings = list(value)
    if any(type(text) is not str for text in strings):
        wrong = next(i for i, text in enumerate(strings) if type(text) is not str)
        raise ModelFileError(file, f"expected strings, element {wrong} is {strings[wrong]!r:.60}", where=key)
    return strings


def _integers(metadata: Mapping[str, Any], key: str, file: object) -> list[int]:
    value = metadata[key]
    values = value.tolist() if hasattr(value, "tolist") else value  # a numpy array, or a sequence
    if not isinstance(values, Sequence) or any(type(number) is not int for number in values):
        raise ModelFileError(file, f"expected an array of integers, got {value!r:.60}", where=key)
    return list(values)


def _token_id(metadata: Mapping[str, Any], key: str, count: int, file: object) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    try:
        id = operator.index(value)
    except TypeError:
        raise ModelFileError(file, f"expected an integer, got {value!r:.60}", where=key) from None
    if isinstance(value, bool) or not 0 <= id < count:
        raise ModelFileError(file, f"expected an id below {count}, the vocabulary's size, got {value!r}", where=key)
    return id


def _byte_token(text: str, id: int, bad: _Bad) -> bytes:
    if not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
        raise bad(
            "tokens", f"token {id} stands for one byte and should read <0x00> to <0xFF>, it reads {text!r:.60}"
        )
    return bytes([int(text[3:5], 16)])


# ---- Hugging Face directories


def read_hf(files: Mapping[str, Path]) -> ParsedVocabulary:
    """From the files of a Hugging Face directory, by name: tokenizer.json, or Moonshot's tiktoken.model; with
    tokenizer_config.json, special_tokens_map.json, generation_config.json and chat_template.jinja where they exist."""
    config = _read_json(files, "special_tokens_map.json") | _read_json(files, "tokenizer_config.json")
    generation = _read_json(files, "generation_config.json")
    if "tokenizer.json" in files:
        backend, control, plain, vocab_size = _read_tokenizer_json(files)
        end_of_turn: tuple[str, ...] = ()
    elif "tiktoken.model" in files:
        backend, control, plain, vocab_size = _read_tiktoken(files["tiktoken.model"], config)
        end_of_turn = word_split("kimi-k2").end_of_turn
    else:
        where = next((path.parent for path in files.values()), "the checkpoint")
        raise ModelFileError(where, "no vocabulary: expected tokenizer.json or tiktoken.model in it")

    bos_id, eos_id = (_named_token(config, name, backend, files) for name in ("bos_token", "eos_token"))
    eos_ids = {eos_id} if eos_id is not None else set()
    eos_ids |= _generation_ends(generation, vocab_size, files)
    eos_ids |= {control[text] for text in end_of_turn if text in control}

    for id in eos_ids | ({bos_id} if bos_id is not None else set()):  # control, whatever its flag says
        text = backend.id_to_token(id)
        if text is not None and text not in control:
            control[text] = id
            plain.pop(text, None)
    _add_tokens(backend, control, plain)

    add_bos = config.get("add_bos_token")
    if add_bos is None:  # then the post-processor of tokenizer.json decides
        add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    return ParsedVocabulary(
        backend=backend,
        vocab_size=vocab_size,
        special_ids=control,
        added_bytes={id: text.encode() for text, id in (control | plain).items()},
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=frozenset(eos_ids),
        add_bos=bool(add_bos),
        chat_template=_hf_template(files, config),
    )


def _read_json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    """The object in the file called `name`; empty where there is no such file."""
    if name not in files:
        return {}
    path = files[name]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def _read_tokenizer_json(
    files: Mapping[str, Path],
) -> tuple[tokenizers.Tokenizer, dict[str, int], dict[str, int], int]:
    """(backend without added tokens, control tokens, other added tokens, vocabulary size).

    `tokenizers` aborts the process on some wrong model sections (a subword prefix, for one), so the vocabulary is
    read and checked here and only the small rest of the file goes through its own reader.
    """
    from tokenizers import Tokenizer

    path = files["tokenizer.json"]

    def bad(key: str, reason: str) -> ModelFileError:
        return ModelFileError(path, reason, where=key)

    spec = _read_json(files, "tokenizer.json")
    model, decoder = spec.get("model"), spec.get("decoder")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if (
        not isinstance(model, dict)
        or kind != "BPE"
        or not isinstance(decoder, dict)
        or decoder.get("type") != "ByteLevel"
    ):
        raise UnsupportedModel(
            f"{path}: model {kind!r:.40} with decoder {decoder!r:.80}; kvfold runs byte-level BPE, "
            "which every DeepSeek-family model uses"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedModel(
                f"{path}: model.{option} is {model[option]!r:.60}; kvfold runs vocabularies without"
            )

    if spec.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise UnsupportedModel(
            f"{path}: normalizer {spec['normalizer']!r:.60}; kvfold runs vocabularies that take the text as it is"
        )

    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or any(type(id) is not int for id in vocab.values()):
        raise bad("model.vocab", "expected an object of token text to integer id")
    pairs = [
        tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in _list(merges, bad, "model.merges")
    ]
    if any(
        len(_list(pair, bad, "model.merges")) != 2 or not all(isinstance(t, str) for t in pair) for pair in pairs
    ):
        raise bad("model.merges", "expected pairs of token texts")
    control: dict[str, int] = {}
    plain: dict[str, int] = {}
    for token in _list(spec.get("added_tokens", []), bad, "added_tokens"):
        if (
            not isinstance(token, dict)
            or type(token.get("id")) is not int
            or not isinstance(token.get("content"), str)
        ):
            raise bad("added_tokens", f"no content and id in {token!r:.80}")
        text, id = token["content"], token["id"]
        if vocab.get(text, id) != id:
            raise bad("added_tokens", f"{text!r:.60} has id {id}, and {vocab[text]} in model.vocab")
        if any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
            raise UnsupportedModel(f"{path}: added token {text!r:.60} takes in the spaces or words around it")
        is_control = (token.get("special") or _LOOKS_LIKE_CONTROL.fullmatch(text)) and text not in _VISIBLE
        (control if is_control else plain)[text] = id

    ids = vocab | control | plain
    size = max(ids.values(), default=-1) + 1
    if not ids or len(set(ids.values())) != len(ids) or min(ids.values()) < 0 or size > 2 * len(ids) + 1024:
        raise bad("model.vocab", f"the ids of {len(ids)} tokens are not distinct and dense from 0")
    rest = {key: spec.get(key) for key in ("pre_tokenizer", "post_processor", "decoder")}
    try:
        backend = Tokenizer.from_str(json.dumps(rest | {"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    except Exception as error:
        raise ModelFileError(path, f"`tokenizers` refuses it: {error}") from error
    backend.model = _merge_model(
        ids, [(a, b) for a, b in pairs], bad, ignore_merges=bool(model.get("ignore_merges"))
    )
    return backend, control, plain, size


def _list(value: object, bad: _Bad, key: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise bad(key, f"expected a list, got {value!r:.60}")
    return value


def _read_tiktoken(
    path: Path, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, int], dict[str, int], int]:
    """Moonshot's vocabulary: lines `base64 rank`, then 256 special ids. tiktoken joins the neighbours whose joint
    has the lowest rank; the merges that do the same are all ways to split each token into two, in rank order."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelFileError(path, f"line {number + 1} is not `base64 rank`: {line[:60]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ModelFileError(path, f"the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once")

    spelled = {token: "".join(map(CHAR_OF.__getitem__, token)) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[a], spelled[b]) for a, b in pairs]

    names = config.get("added_tokens_decoder") or {}
    control: dict[str, int] = {}
    for id in range(len(ranks), len(ranks) + _TIKTOKEN_RESERVED):
        entry = names.get(str(id))
        control[entry["content"] if isinstance(entry, dict) else f"<|reserved_token_{id}|>"] = id
    plain = {text: control.pop(text) for text in _VISIBLE if text in control}
    vocab = {text: ranks[token] for token, text in spelled.items()} | control | plain
    if len(vocab) != len(ranks) + _TIKTOKEN_RESERVED:
        raise ModelFileError(path.with_name("tokenizer_config.json"), "two special tokens share one name")

    def bad(key: str, reason: str) -> ModelFileError:
        return ModelFileError(path, reason, where=key)

    backend = _new_backend(_merge_model(vocab, merges, bad, ignore_merges=True), "kimi-k2")
    return backend, control, plain, len(vocab)


def _named_token(
    config: Mapping[str, Any],
    name: str,
    backend: tokenizers.Tokenizer,
    files: Mapping[str, Path],
) -> int | None:
    value = config.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    id = backend.token_to_id(text) if isinstance(text, str) else None
    if id is None:
        file = files.get("tokenizer_config.json") or files["special_tokens_map.json"]
        raise ModelFileError(file, f"{text!r:.60} is no token of this vocabulary", where=name)
    return id


def _generation_ends(generation: Mapping[str, Any], vocab_size: int, files: Mapping[str, Path]) -> set[int]:
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(id) is not int or not 0 <= id < vocab_size for id in ids):
        raise ModelFileError(
            files["generation_config.json"],
            f"expected ids below {vocab_size}, got {value!r:.60}",
            where="eos_token_id",
        )
    return set(ids)


def _hf_template(files: Mapping[str, Path], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: [{"name": ..., "template": ...}]
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
