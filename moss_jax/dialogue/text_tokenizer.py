"""The text tokenizer: a byte-level BPE read from `tokenizer.json`, with a twin that knows no special tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

from moss_jax.errors import MossError

SPECIAL_STRINGS = {
    "endoftext_id": "<|endoftext|>",
    "im_start_id": "<|im_start|>",
    "im_end_id": "<|im_end|>",
    "sosp_id": "<|object_ref_start|>",
    "modality_pad_id": "<think>",
}  # config field -> the string that the stock vocabulary has at this id


class TextTokenizer:
    """Text <-> ids of the text channel.

    What people write is plain text: `encode` turns even `<|im_end|>` or `<think>` inside it into ordinary characters,
    by a twin of the tokenizer whose JSON has lost its added tokens. `encode_template` honours them; it is meant for the
    pieces of the chat template and for the reference's behaviour.
    """

    def __init__(self, description: str, where: str = "text tokenizer"):
        """`description` is the content of a `tokenizer.json`; raises MossError when it is not one."""
        from tokenizers import Tokenizer

        try:
            parsed = json.loads(description)
            self._with_specials = Tokenizer.from_str(description)
            added = {token["content"] for token in parsed["added_tokens"]}
            vocabulary = parsed["model"]["vocab"]
            parsed["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token not in added}
            parsed["added_tokens"], parsed["post_processor"] = [], None
            self._plain = Tokenizer.from_str(json.dumps(parsed))
        except Exception as error:  # the library raises bare Exception
            raise MossError(f"{where}: not a tokenizer.json of the `tokenizers` library ({error})") from error
        self.size = 1 + max(self._with_specials.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        path = Path(path)
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise MossError(f"{path}: cannot be read ({error.strerror}); expected a tokenizer.json") from error
        except UnicodeDecodeError as error:
            raise MossError(f"{path}: not UTF-8 text ({error}); expected a tokenizer.json") from error

    def check(self, config, where: str = "text tokenizer") -> None:
        """Raises MossError when the special strings do not have the ids of the model's config, or ids do not fit."""
        for field, string in SPECIAL_STRINGS.items():
            found, expected = self._with_specials.token_to_id(string), getattr(config, field)
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
        self._text_tokenizer, self._ids, self._told = text_tokenizer, [], 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        self._ids.extend(ids)
        text = self._text_tokenizer.decode(self._ids)
        ready = max(self._told, len(text.rstrip("\ufffd")))  # the bytes of a character may be half here
        piece, self._told = text[self._told : ready], ready
        return piece

    def finish(self) -> str:
        """What is left; all strings together are `decode` of all ids."""
        return self._text_tokenizer.decode(self._ids)[self._told :]
