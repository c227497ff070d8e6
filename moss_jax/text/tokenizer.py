"""The text tokenizer: a byte-level BPE read from `tokenizer.json`, with a twin that knows no special tokens."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moss_jax.documents import located, parse_object, read_text, shown
from moss_jax.errors import MossError

SPECIAL_STRINGS = {
    "endoftext_id": "<|endoftext|>",
    "im_start_id": "<|im_start|>",
    "im_end_id": "<|im_end|>",
    "sosp_id": "<|object_ref_start|>",
    "modality_pad_id": "<think>",
}  # config field -> the string that the stock vocabulary has at this id


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


NOT_ONE = "not a tokenizer.json of the `tokenizers` library"


def token_ids(description: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of the vocabulary and of the added tokens in the content of a `tokenizer.json`.

    Raises:
        MossError: it does not have them, or is not a byte-level BPE; without a place in its message.
    """
    model = description.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        raise MossError(f"{NOT_ONE}: its model is not a BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise MossError(f"{NOT_ONE} that is byte-level: {key} is {shown(model[key])}")
    vocabulary = model.get("vocab")
    entries = description.get("added_tokens")
    if not isinstance(vocabulary, Mapping) or not vocabulary or not isinstance(entries, list):
        raise MossError(f"{NOT_ONE}: it lacks a vocabulary or added tokens")
    added = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise MossError(f"{NOT_ONE}: {shown(entry)} is not an added token")
        added[entry["content"]] = entry.get("id")
    for token, i in (*vocabulary.items(), *added.items()):
        if type(i) is not int or not 0 <= i < 2**31:
            raise MossError(f"{NOT_ONE}: token {shown(token)} has id {shown(i)}, expected a whole number from 0")
    return dict(vocabulary), added


def build_tokenizer(description: str) -> Any:
    """A tokenizer of the `tokenizers` library, which does not cut or pad, from the content of a `tokenizer.json`.

    Raises:
        MossError: the library does not take it; without a place in its message.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(description)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some of what the file says is first used here.
        tokenizer.decode(tokenizer.encode("Hello.", add_special_tokens=False).ids)
    except BaseException as error:
        # The library raises bare Exception, and PanicException, a BaseException that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MossError(f"{NOT_ONE} ({' '.join(str(error).split())[:200]})") from error
    return tokenizer


class TextTokenizer:
    """Text <-> ids of the text channel.

    What people write is plain text: `encode` turns even `<|im_end|>` or `<think>` inside it into ordinary characters,
    by a twin of the tokenizer whose JSON has lost its added tokens. `encode_template` honours them; it is meant for the
    pieces of the chat template and for the reference's behaviour.
    """

    def __init__(self, description: str, where: str = "text tokenizer"):
        """`description` is the content of a `tokenizer.json`; raises MossError when it is not one."""
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
        """Raises MossError when the special strings do not have the ids of the model's config, or ids do not fit."""
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
        """Ids of plain text; no string in it is special."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of text in which the special strings are special."""
        return self._with_specials.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and without ids that no token has."""
        return self._with_specials.decode([int(i) for i in ids], skip_special_tokens=True)


class TextStream:
    """Text of ids that arrive in portions; a character is held back until all its bytes are there."""

    def __init__(self, text_tokenizer: TextTokenizer):
        self._text_tokenizer = text_tokenizer
        self._ids = []
        self._told = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        self._ids.extend(ids)
        text = self._text_tokenizer.decode(self._ids)
        ready = max(self._told, len(text.rstrip("\ufffd")))  # the bytes of a character may be half here
        piece = text[self._told : ready]
        self._told = ready
        return piece

    def finish(self) -> str:
        """What is left; all strings together are `decode` of all ids."""
        return self._text_tokenizer.decode(self._ids)[self._told :]
