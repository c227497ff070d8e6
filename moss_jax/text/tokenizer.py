"""The text tokenizer: a byte-level BPE from a `tokenizer.json`, and a copy of it without special tokens."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moss_jax.documents import located, parse_object, read_text, shown
from moss_jax.errors import MossError

# Field of the language model's config: the string that the stock vocabulary has at this id.
SPECIAL_STRINGS = {
    "endoftext_id": "<|endoftext|>",
    "im_start_id": "<|im_start|>",
    "im_end_id": "<|im_end|>",
    "sosp_id": "<|object_ref_start|>",
    "modality_pad_id": "<think>",
}


class SpecialIds(Protocol):
    """The config of a language model, as far as its text tokenizer must agree with it."""

    @property
    def text_vocab_size(self) -> int: ...
    @property
    def endoftext_id(self) -> int: ...
    @property
    def im_start_id(self) -> int: ...
    @property
    def im_end_id(self) -> int: ...
    @property
    def sosp_id(self) -> int: ...
    @property
    def modality_pad_id(self) -> int: ...


INVALID = "not a tokenizer.json of the `tokenizers` library"


def token_ids(description: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of the vocabulary and of the added tokens, from the content of a `tokenizer.json`.

    Raises:
        MossError: it lacks them, or is not a byte-level BPE. The message does not name the file.
    """
    model = description.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        raise MossError(f"{INVALID}: its model is not a BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise MossError(f"{INVALID} that is byte-level: {key} is {shown(model[key])}")
    vocabulary = model.get("vocab")
    entries = description.get("added_tokens")
    if not isinstance(vocabulary, Mapping) or not vocabulary or not isinstance(entries, list):
        raise MossError(f"{INVALID}: it lacks a vocabulary or added tokens")
    added: dict[str, Any] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise MossError(f"{INVALID}: {shown(entry)} is not an added token")
        added[entry["content"]] = entry.get("id")
    for token, i in (*vocabulary.items(), *added.items()):
        if type(i) is not int or not 0 <= i < 2**31:
            raise MossError(f"{INVALID}: token {shown(token)} has id {shown(i)}, expected a whole number from 0")
    return dict(vocabulary), added


def build_tokenizer(description: str) -> Any:
    """A tokenizer of the `tokenizers` library, without truncation or padding, from the content of a `tokenizer.json`.

    Raises:
        MossError: the library refuses it. The message does not name the file.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(description)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some of the content is only used, and so checked, when something is encoded and decoded.
        tokenizer.decode(tokenizer.encode("Hello.", add_special_tokens=False).ids)
    except BaseException as error:
        # The library raises a bare Exception, or PanicException: a BaseException that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MossError(f"{INVALID} ({' '.join(str(error).split())[:200]})") from error
    return tokenizer


class TextTokenizer:
    """Text <-> ids of the text channel.

    What a person wrote is plain text: `encode` turns even `<|im_end|>` or `<think>` in it into ordinary characters,
    with a copy of the tokenizer from which the added tokens are removed. `encode_template` keeps them special; it is
    meant for the pieces of the chat template.

    Args:
        description: the content of a `tokenizer.json`.
        where: the start of error messages.

    Attributes:
        size: number of ids, gaps included.

    Raises:
        MossError: `description` is not a valid `tokenizer.json`.
    """

    def __init__(self, description: str, where: str = "text tokenizer"):
        with located(where):
            parsed = parse_object(description)
            vocabulary, added = token_ids(parsed)
            self._with_specials = build_tokenizer(description)
            parsed["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token not in added}
            parsed["added_tokens"] = []
            parsed["post_processor"] = None
            self._plain = build_tokenizer(json.dumps(parsed))
        self.size = 1 + max(self._with_specials.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_file(cls, path: str | Path, config: SpecialIds | None = None) -> "TextTokenizer":
        """Reads a `tokenizer.json`, and with a `config` checks it against that model's ids, see `check`.

        Raises:
            MossError: the file is missing or damaged, or does not fit the model.
        """
        tokenizer = cls(read_text(path), str(path))
        if config is not None:
            tokenizer.check(config, str(path))
        return tokenizer

    def check(self, config: SpecialIds, where: str = "text tokenizer") -> None:
        """Checks that the special strings have the ids of the model's config, and that all ids fit its vocabulary.

        Raises:
            MossError: they do not.
        """
        for field, string in SPECIAL_STRINGS.items():
            found = self._with_specials.token_to_id(string)
            expected = getattr(config, field)
            if found != expected:
                raise MossError(f"{where}: {string} has id {found}, but the model's config says {field} = {expected}")
            if self.encode_template(string) != [expected]:
                raise MossError(
                    f"{where}: {string} is not among the added tokens, expected it there with id {expected}"
                )
        if self.size > config.text_vocab_size:
            raise MossError(f"{where}: ids reach {self.size - 1}, but text_vocab_size is {config.text_vocab_size}")

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; no string in it is special."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_template(self, text: str) -> list[int]:
        """The ids of a piece of the chat template, in which the special strings are special."""
        ids: list[int] = self._with_specials.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and without ids that have no token."""
        text: str = self._with_specials.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


class TextStream:
    """Decodes ids that arrive in portions; a character is held back until all its bytes have arrived."""

    def __init__(self, text_tokenizer: TextTokenizer):
        self._text_tokenizer = text_tokenizer
        self._ids: list[int] = []
        self._length = 0  # of the text that has been returned

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        self._ids.extend(ids)
        text = self._text_tokenizer.decode(self._ids)
        # The replacement character at the end may stand for the first bytes of a character.
        ready = max(self._length, len(text.rstrip("\ufffd")))
        piece = text[self._length : ready]
        self._length = ready
        return piece

    def finish(self) -> str:
        """The remaining text. All returned strings together are `decode` of all ids."""
        return self._text_tokenizer.decode(self._ids)[self._length :]
