"""Text to token ids and back, for the byte-level BPE vocabularies of the DeepSeek family.

`tokenizers` splits and merges; this module decides where special tokens may come from. A control token written in a
user's text is text, unless `special=True` says the caller vouches for the string. Decoding goes through bytes
(`token_bytes`), so that a stream and a whole decode are one thing. Never renders a chat template, never samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvfold.errors import SettingError
from kvfold.text.pre_tokenizers import BYTE_OF, CHAR_OF
from kvfold.text.streaming import DetokenizeStream
from kvfold.text.vocabulary import ParsedVocabulary, read_gguf, read_hf

if TYPE_CHECKING:
    import tokenizers


class VocabularySource(Protocol):
    """Where a checkpoint's vocabulary is: the `tokenizer.*` keys of a GGUF, or files by name. One is empty."""

    @property
    def metadata(self) -> Mapping[str, object]: ...
    @property
    def files(self) -> Mapping[str, Path]: ...


class Tokenizer:
    """One model's vocabulary. Attributes as in ParsedVocabulary: vocab_size, special_ids, bos_id, eos_id, eos_ids, add_bos,
    chat_template."""

    def __init__(self, vocabulary: ParsedVocabulary) -> None:
        self._backend = vocabulary.backend
        self._added_bytes = vocabulary.added_bytes
        self._control_ids = frozenset(vocabulary.special_ids.values())
        self._bytes: dict[int, bytes] = {}
        known = (byte for byte, char in CHAR_OF.items() if self._backend.token_to_id(char) is not None)
        self._encodable = bytes(known)
        self.vocab_size = vocabulary.vocab_size
        self.special_ids = vocabulary.special_ids
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos
        self.chat_template = vocabulary.chat_template

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, file: object = "GGUF metadata") -> Tokenizer:
        """From a GGUF's metadata; see vocabulary.read_gguf."""
        return cls(read_gguf(metadata, file))

    @classmethod
    def from_hf(cls, directory: str | Path) -> Tokenizer:
        """From a Hugging Face directory; see vocabulary.read_hf."""
        return cls(read_hf({path.name: path for path in Path(directory).iterdir() if path.is_file()}))

    @classmethod
    def from_vocabulary(cls, source: VocabularySource) -> Tokenizer:
        """From whichever of the two an open checkpoint has."""
        return cls(read_gguf(source.metadata, "the GGUF file") if source.metadata else read_hf(source.files))

    # ---- both directions

    def encode(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`. add_bos: put the BOS id first if this model wants one. special: control tokens in the
        text become their ids (a rendered chat template); otherwise they are spelled out like any text.

        SettingError: the text has a lone surrogate, or a byte this vocabulary has no token for.
        """
        ids = [self.bos_id] if add_bos and self.add_bos and self.bos_id is not None else []
        if not special:
            return ids + self._encode_text(text)
        for part, is_control in self.split_special(text):
            ids += [self.special_ids[part]] if is_control else self._encode_text(part)
        return ids

    def split_special(self, text: str) -> Iterator[tuple[str, bool]]:
        """`text` in order as (part, is a control token); longest control token first, no empty parts."""
        _utf8(text)
        end = 0
        for start, stop in self._splitter.encode(text, add_special_tokens=False).offsets:
            if start > end:
                yield text[end:start], False
            yield text[start:stop], True
            end = stop
        if end < len(text):
            yield text[end:], False

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Ids past the vocabulary (padding) are empty."""
        return b"".join(self.token_bytes(id, skip_special) for id in ids).decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True, stop: Sequence[str] = ()) -> DetokenizeStream:
        """Decodes one id at a time; the pieces together are `decode` of all ids, cut before the first stop string."""
        return DetokenizeStream(self.token_bytes, skip_special=skip_special, stop=stop)

    # ---- single tokens

    def token_bytes(self, id: int, skip_special: bool = True) -> bytes:
        """The bytes one token stands for; often no whole character."""
        if skip_special and id in self._control_ids:
            return b""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._spelled(id)
        return known

    def token_text(self, id: int) -> str | None:
        """The entry of the vocabulary as the file spells it (`Ġthe`), None past its end."""
        return self._backend.id_to_token(id)

    def token_id(self, text: str) -> int | None:
        """The id of an entry spelled like that, or None."""
        return self._backend.token_to_id(text)

    # ---- inside

    def _encode_text(self, text: str) -> list[int]:
        lost = _utf8(text).translate(None, self._encodable)
        if lost:
            raise SettingError(
                f"the text has byte 0x{lost[0]:02X}, for which this vocabulary has no token; "
                "it would be dropped without a word"
            )
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _spelled(self, id: int) -> bytes:
        added = self._added_bytes.get(id)
        if added is not None:
            return added
        text = self._backend.id_to_token(id)
        if text is None:
            return b""
        try:
            return bytes(BYTE_OF[char] for char in text)
        except KeyError:
            return text.encode()

    @cached_property
    def _splitter(self) -> tokenizers.Tokenizer:
        """Knows the control tokens and nothing else: what it finds are they, in time linear in the text whatever
        the text is (1 MB of "<" takes 0.3 s)."""
        from tokenizers import AddedToken, Tokenizer, models

        splitter = Tokenizer(models.BPE())
        splitter.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.special_ids])
        return splitter


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
            "which no UTF-8 can carry; remove it"
        ) from error
