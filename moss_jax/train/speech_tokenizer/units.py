"""Text units: transcripts as numbers and back."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moss_jax.documents import located, read_text
from moss_jax.errors import MossError
from moss_jax.text.tokenizer import build_tokenizer
from moss_jax.text.words import normalized_words

BLANK = 0  # of CTC; with the attention head it begins and ends a transcript
UNKNOWN = 1


class Units:
    """Words or characters of the training transcripts, the most frequent first. 0 is CTC's blank, 1 an unknown unit.

    Args:
        texts: the transcripts.
        kind: "words" or "characters".
        max_units: the rest is unknown.

    Attributes:
        names: of the units, by number.
    """

    def __init__(self, texts: Sequence[str], kind: str, max_units: int):
        self._characters = kind == "characters"
        counts = Counter(piece for text in texts for piece in self._pieces(text))
        kept = sorted(counts, key=lambda piece: (-counts[piece], piece))[: max_units - 2]
        self.names = ["", "<unknown>", *kept]
        self._numbers = {piece: number for number, piece in enumerate(self.names)}

    @property
    def count(self) -> int:
        """The number of units, blank and unknown included."""
        return len(self.names)

    def __call__(self, text: str) -> list[int]:
        """The numbers of a transcript."""
        return [self._numbers.get(piece, UNKNOWN) for piece in self._pieces(text)]

    def text(self, numbers: Sequence[int]) -> str:
        """The transcript of some numbers."""
        return ("" if self._characters else " ").join(self.names[number] for number in numbers)

    def _pieces(self, text: str) -> Sequence[str]:
        return " ".join(normalized_words(text)) if self._characters else normalized_words(text)


class WhisperUnits:
    """The units of the tokenizer.json of a Whisper.

    Args:
        folder: of the Whisper.
        count: the size of its vocabulary.

    Raises:
        MossError: there is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, folder: str | Path, count: int):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise MossError(f"{path}: no such file, expected it for units 'whisper'")
        with located(path):
            self._tokenizer = build_tokenizer(read_text(path))
        self.count = count

    def __call__(self, text: str) -> list[int]:
        """The numbers of a transcript."""
        return self._tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids

    def text(self, numbers: Sequence[int]) -> str:
        """The transcript of some numbers."""
        return self._tokenizer.decode([int(number) for number in numbers], skip_special_tokens=True)
