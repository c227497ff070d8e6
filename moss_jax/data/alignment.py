"""Word times by forced alignment: the likeliest path of a transcript through the output of a CTC model.

The path is ours (numpy); the probabilities come from a Hugging Face CTC checkpoint (wav2vec 2.0, HuBERT, ...), which
transformers and PyTorch run on the CPU or a GPU.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moss_jax.data.manifest import Word
from moss_jax.documents import read_json
from moss_jax.errors import MossError

IMPOSSIBLE = -np.inf
MOST_CELLS = 4e8  # frames times states of one alignment: bytes that it remembers
# seconds that the acoustic model sees at once, and those it sees on each side besides
WINDOW = 30.0
MARGIN = 2.0
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without spaces: a character is a word


def forced_alignment(log_probs: np.ndarray, tokens: Sequence[int], blank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The likeliest alignment of tokens to frames under CTC.

    Every token takes one frame or more, in order; blanks may lie anywhere between, and must between two equal tokens.

    Args:
        log_probs: float [T, V], natural logarithms.
        tokens: N ids, without blanks.
        blank: the id of the blank.

    Returns:
        (start int [N], end int [N], log probability): token n has the frames start[n] .. end[n] - 1.

    Raises:
        MossError: there is no token, or there are fewer frames than the tokens need.
    """
    tokens = np.asarray(tokens, np.int64)
    T = len(log_probs)
    N = len(tokens)
    if N == 0:
        raise MossError("alignment: there is nothing to align")
    needed = N + int((tokens[1:] == tokens[:-1]).sum())
    if needed > T:
        raise MossError(f"alignment: the sound has {T} frames, the text needs {needed}; they do not belong together")
    # States: blank, token, blank, token, ..., blank.
    states = np.full(2 * N + 1, blank, np.int64)
    states[1::2] = tokens
    may_skip = np.zeros(2 * N + 1, bool)
    may_skip[3::2] = tokens[1:] != tokens[:-1]
    best = np.full(2 * N + 1, IMPOSSIBLE)
    best[:2] = log_probs[0, states[:2]]
    steps = np.zeros((T, 2 * N + 1), np.int8)
    for t in range(1, T):
        one = np.full_like(best, IMPOSSIBLE)
        two = np.full_like(best, IMPOSSIBLE)
        one[1:] = best[:-1]
        two[2:] = np.where(may_skip[2:], best[:-2], IMPOSSIBLE)
        choices = np.stack([best, one, two])
        steps[t] = choices.argmax(0)
        best = choices.max(0) + log_probs[t, states]
    state = 2 * N if best[2 * N] > best[2 * N - 1] else 2 * N - 1
    score = float(best[state])
    path = np.empty(T, np.int64)
    for t in range(T - 1, -1, -1):
        path[t] = state
        state -= steps[t, state]
    start, end = (np.searchsorted(path, 2 * np.arange(N) + 1, side) for side in ("left", "right"))
    return start, end, score


def split_words(text: str) -> list[str]:
    """Words as they stand in the text: between white space, and single characters of scripts without it."""
    return re.findall(rf"[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+", text)


def align_words(
    log_probs: np.ndarray, words: Sequence[str], ids: dict[str, int], blank: int, delimiter: str, seconds: float
) -> list[Word]:
    """Times of words whose characters are a CTC model's tokens.

    Args:
        log_probs: float [T, V].
        ids: of the characters. A character that is not there is tried in the other case, then left out; a
            word without any known character gets no time of its own: it begins and ends where the word before it ends.
        delimiter: the token between words, if `ids` has it.
        seconds: of a frame.
    """
    tokens = []
    owners = []
    for owner, word in enumerate(words):
        spelled = [ids[form] for letter in word if (form := _known_form(letter, ids)) is not None]
        if spelled and tokens and delimiter in ids:
            tokens.append(ids[delimiter])
            owners.append(-1)
        tokens += spelled
        owners += [owner] * len(spelled)
    if len(log_probs) * (2 * len(tokens) + 1) > MOST_CELLS:
        raise MossError(
            f"alignment: {len(log_probs) * seconds:.0f} s of sound with {len(tokens)} characters is too long; "
            "expected shorter recordings"
        )
    start, end, _ = forced_alignment(log_probs, tokens, blank)
    times: dict[int, list[float]] = {}
    for owner, begin, stop in zip(owners, start * seconds, end * seconds, strict=True):
        times.setdefault(owner, [float(begin), 0.0])[1] = float(stop)
    aligned = []
    last = 0.0
    for owner, word in enumerate(words):
        begin, last = times.get(owner, (last, last))
        aligned.append(Word(word, begin, last))
    return aligned


def _known_form(letter: str, ids: dict[str, int]) -> str | None:
    return next((form for form in (letter, letter.upper(), letter.lower()) if form in ids), None)


class CTCAligner:
    """A CTC checkpoint that tells when the words of a transcript are said.

    Args:
        folder: with config.json, weights, preprocessor_config.json and vocab.json, as
            `transformers.AutoModelForCTC` loads it. Nothing is downloaded.

    Raises:
        MossError: transformers or torch is missing, or the folder does not hold such a checkpoint.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            import torch
            from transformers import AutoFeatureExtractor, AutoModelForCTC
        except ImportError as error:
            raise MossError(
                f"alignment needs PyTorch and transformers: pip install torch transformers ({error})"
            ) from error
        try:
            self._ids = read_json(self.folder / "vocab.json")
            self._features = AutoFeatureExtractor.from_pretrained(self.folder, local_files_only=True)
            self._model = AutoModelForCTC.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # of two libraries, about many files
            raise MossError(f"{folder}: not a CTC checkpoint ({str(error).splitlines()[0]})") from error
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.eval().to(self._device)
        self.sample_rate = int(self._features.sampling_rate)
        self._ratio = int(np.prod(self._model.config.conv_stride))  # samples a frame
        self._blank = int(self._model.config.pad_token_id)

    def log_probs(self, wave: np.ndarray) -> np.ndarray:
        """float32 [samples] at `sample_rate` -> float32 [T, V]; long waves go through in overlapping windows."""
        core, margin = (round(s * self.sample_rate / self._ratio) for s in (WINDOW, MARGIN))  # frames
        parts = []
        total = max(1, len(wave) // self._ratio)
        for begin in range(0, total, core):
            first = max(0, begin - margin)
            piece = wave[first * self._ratio : (begin + core + margin) * self._ratio]
            inputs = self._features(piece, sampling_rate=self.sample_rate, return_tensors="pt").to(self._device)
            with self._torch.inference_mode():
                logits = self._model(**inputs).logits[0].float()
            frames = self._torch.log_softmax(logits, -1).cpu().numpy()
            last = len(frames) if begin + core >= total else begin - first + core
            parts.append(frames[begin - first : last])
        return np.concatenate(parts)

    def words(self, wave: np.ndarray, text: str) -> list[Word]:
        """The words of `text` with their times in `wave`, float32 [samples] at `sample_rate`."""
        words = split_words(text)
        if not any(_known_form(letter, self._ids) for word in words for letter in word):
            raise MossError("alignment: the model knows none of the text's characters")
        delimiter = "|"
        return align_words(
            self.log_probs(wave), words, self._ids, self._blank, delimiter, self._ratio / self.sample_rate
        )
