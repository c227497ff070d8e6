"""Word times by forced alignment: the most likely path of a transcript through the output of a CTC model.

The probabilities come from a Hugging Face CTC checkpoint (wav2vec 2.0, HuBERT, ...), which transformers and PyTorch run
on the CPU or a GPU; the path is computed here, with numpy.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moss_jax.data.manifest import Word
from moss_jax.documents import read_json
from moss_jax.errors import MossError

IMPOSSIBLE = -np.inf
MAX_CELLS = 4e8  # frames times states of one alignment, each of which takes a byte
# Seconds of a window of the acoustic model, and of the context that it gets in addition on each side.
WINDOW_SECONDS = 30.0
CONTEXT_SECONDS = 2.0
WORD_DELIMITER = "|"  # the token of wav2vec 2.0 checkpoints
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without spaces: a character is a word


def forced_alignment(log_probs: np.ndarray, tokens: Sequence[int], blank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The most likely alignment of tokens to frames under CTC.

    Every token takes one frame or more, in order. Blanks may be anywhere between, and must be between equal tokens.

    Args:
        log_probs: float [T, V], natural logarithms; V tokens, blank included.
        tokens: ids, without blanks.
        blank: the id of the blank.

    Returns:
        (start int [tokens], end int [tokens], log probability): token i has the frames start[i] .. end[i] - 1.

    Raises:
        MossError: there is no token, or there are fewer frames than the tokens need.
    """
    ids = np.asarray(tokens, np.int64)
    T = len(log_probs)
    count = len(ids)
    if count == 0:
        raise MossError("alignment: the text has no token to align")
    needed = count + int((ids[1:] == ids[:-1]).sum())
    if needed > T:
        raise MossError(f"alignment: the audio has {T} frames, the text needs {needed}; they do not belong together")
    # States: blank, token, blank, token, ..., blank. Even states are blanks.
    states = np.full(2 * count + 1, blank, np.int64)
    states[1::2] = ids
    may_skip_blank = np.zeros(2 * count + 1, bool)
    may_skip_blank[3::2] = ids[1:] != ids[:-1]
    # Viterbi: from one frame to the next the path stays, moves on by one state, or skips a blank.
    best = np.full(2 * count + 1, IMPOSSIBLE)
    best[:2] = log_probs[0, states[:2]]
    steps = np.zeros((T, 2 * count + 1), np.int8)
    for t in range(1, T):
        by_one = np.full_like(best, IMPOSSIBLE)
        by_two = np.full_like(best, IMPOSSIBLE)
        by_one[1:] = best[:-1]
        by_two[2:] = np.where(may_skip_blank[2:], best[:-2], IMPOSSIBLE)
        choices = np.stack([best, by_one, by_two])
        steps[t] = choices.argmax(0)
        best = choices.max(0) + log_probs[t, states]
    state = 2 * count if best[2 * count] > best[2 * count - 1] else 2 * count - 1
    score = float(best[state])
    path = np.empty(T, np.int64)
    for t in range(T - 1, -1, -1):
        path[t] = state
        state -= steps[t, state]
    token_states = 2 * np.arange(count) + 1
    start = np.searchsorted(path, token_states, "left")
    end = np.searchsorted(path, token_states, "right")
    return start, end, score


def split_words(text: str) -> list[str]:
    """The words of a text, with punctuation: split at white space, and single characters in scripts without it."""
    return re.findall(rf"[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+", text)


def align_words(
    log_probs: np.ndarray, words: Sequence[str], ids: dict[str, int], blank: int, delimiter: str, seconds: float
) -> list[Word]:
    """Times of words, by a CTC model whose tokens are characters.

    Args:
        log_probs: float [T, V].
        ids: of the characters. A character that is not in it is tried in the other case, then ignored. A word without
            any known character starts and ends where the word before it ends.
        delimiter: the token between words, used if it is in `ids`.
        seconds: of a frame.
    """
    tokens: list[int] = []
    owners: list[int] = []  # the word of each token, -1 for delimiters
    for owner, word in enumerate(words):
        spelled = [ids[form] for letter in word if (form := _known_form(letter, ids)) is not None]
        if spelled and tokens and delimiter in ids:
            tokens.append(ids[delimiter])
            owners.append(-1)
        tokens += spelled
        owners += [owner] * len(spelled)
    if len(log_probs) * (2 * len(tokens) + 1) > MAX_CELLS:
        raise MossError(
            f"alignment: {len(log_probs) * seconds:.0f} s of audio with {len(tokens)} characters is too long; "
            "expected shorter recordings"
        )
    start, end, _ = forced_alignment(log_probs, tokens, blank)
    times: dict[int, list[float]] = {}
    for owner, begin, stop in zip(owners, start * seconds, end * seconds, strict=True):
        times.setdefault(owner, [float(begin), 0.0])[1] = float(stop)
    aligned: list[Word] = []
    for owner, word in enumerate(words):
        previous_end = aligned[-1].end if aligned else 0.0
        start_time, end_time = times.get(owner, (previous_end, previous_end))
        aligned.append(Word(word, start_time, end_time))
    return aligned


def _known_form(letter: str, ids: dict[str, int]) -> str | None:
    return next((form for form in (letter, letter.upper(), letter.lower()) if form in ids), None)


class CTCAligner:
    """A CTC checkpoint that finds the times of a transcript's words.

    Args:
        folder: with config.json, weights, preprocessor_config.json and vocab.json, as
            `transformers.AutoModelForCTC` loads it. Nothing is downloaded.

    Attributes:
        sample_rate: Hz, of its input.

    Raises:
        MossError: transformers or torch is missing, or the folder is not such a checkpoint.
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
        except Exception as error:  # two libraries raise many types for files that are missing or malformed
            raise MossError(f"{folder}: not a CTC checkpoint ({str(error).splitlines()[0]})") from error
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.eval().to(self._device)
        self.sample_rate = int(self._features.sampling_rate)
        self._samples_per_frame = int(np.prod(self._model.config.conv_stride))
        self._blank = int(self._model.config.pad_token_id)

    def log_probs(self, wave: np.ndarray) -> np.ndarray:
        """float32 [samples] at `sample_rate` -> float32 [T, V]; long waves are processed in overlapping windows."""
        core = round(WINDOW_SECONDS * self.sample_rate / self._samples_per_frame)  # frames
        context = round(CONTEXT_SECONDS * self.sample_rate / self._samples_per_frame)
        parts = []
        total = max(1, len(wave) // self._samples_per_frame)
        for begin in range(0, total, core):
            first = max(0, begin - context)
            piece = wave[first * self._samples_per_frame : (begin + core + context) * self._samples_per_frame]
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
            raise MossError("alignment: the CTC model has none of the text's characters")
        seconds = self._samples_per_frame / self.sample_rate
        return align_words(self.log_probs(wave), words, self._ids, self._blank, WORD_DELIMITER, seconds)
