"""The judge: pocketsphinx with its own English model and a grammar of the answers that nano's domain has.

The grammar, `answers.jsgf` in this folder, is frozen. It accepts wrong answers ("seven plus five is six") but nothing
else, so any sound, even a cough, is recognised as an answer. Hence two checks of the sound that do not depend on its
words: its length must fit the recognised sentence, and it must be neither silent nor steady. The limits were set on 523
answers of the answering voice before anything was trained:

- length without the silence at the ends, divided by -0.037 + 0.0416 letters + 0.168 words + 0.230 commas seconds (a
  least-squares fit): 0.78 to 1.21 in these answers; 0.65 to 1.45 is accepted;
- level, the 95th percentile of the power in 20 ms: -19 to -12 dBFS in these answers; -45 and more is accepted;
- spread of the level, from the 10th to the 90th percentile: at least 11.9 dB in these answers, 0.9 dB in white noise; 8
  dB and more is accepted.

Before recognition the silence at the ends is removed, the power is normalised, and 0.15 s of silence at both ends and a
little constant noise are added: if a recording begins and ends with digital silence the recogniser drops the last words
("nineteen" becomes "nine").
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moss_jax.audio import load_audio, resample, to_pcm16
from moss_jax.errors import MossError
from moss_jax.evaluate.judge import JUDGE_SAMPLE_RATE
from moss_jax.recipes.nano import domain
from moss_jax.text.words import normalized_words

GRAMMAR = Path(__file__).with_name("answers.jsgf")
FRAME_RATE = 50  # frames per second in the checks
SILENCE_BELOW_LEVEL = 35.0  # dB; quieter frames at the ends are silence
SECONDS_MODEL = (-0.0369, 0.0416, 0.1679, 0.2304)  # constant, per letter, per word, per comma
LENGTH_RANGE = (0.65, 1.45)  # accepted ratio of measured to expected seconds
MIN_LEVEL = -45.0  # dBFS
MIN_SPREAD = 8.0  # dB
MARGIN = 0.1  # seconds that are kept around the part that is not silent
# Of the input of the recogniser: root mean square, seconds of silence at each end, root mean square of the noise.
SPEECH_RMS = 0.1
PAUSE_SECONDS = 0.15
NOISE_RMS = 0.002


def grammar() -> str:
    """The content of `answers.jsgf`: every answer of the domain, right or wrong."""

    def either(texts: Iterable[str]) -> str:
        return " | ".join(dict.fromkeys(" ".join(normalized_words(text)) for text in texts))

    numbers = domain.NUMBERS[: domain.MAX_NUMBER + 1]
    rules = {
        "digit": either(numbers[:10]),
        "number": f"<digit> | {either(numbers[10:])}",
        "calculation": "<number> ( plus | minus ) <number> is <number>",
        "comparison": "( yes | no ) <number> is ( greater | less ) than <number>",
        "capital": f"the capital of ( {either(domain.CAPITALS)} ) is ( {either(domain.CAPITALS.values())} )",
        "colour": f"( {either(domain.COLOURS)} ) is ( {either(domain.COLOURS.values())} )",
        "digits": "you said <digit> <digit> <digit>",
        "social": either(domain.SOCIAL.values()),
    }
    kinds = ("calculation", "comparison", "capital", "colour", "digits", "social")
    lines = ["#JSGF V1.0;", "grammar answers;", *(f"<{name}> = {rule};" for name, rule in rules.items())]
    return "\n".join([*lines, f"public <answer> = {' | '.join(f'<{kind}>' for kind in kinds)};", ""])


@dataclass(frozen=True)
class Recognition:
    """The judge's result for a recording.

    Attributes:
        text: lower-case words; empty if nothing was recognised.
        refused: why the sound cannot be speech of these words; empty if it can.
    """

    text: str
    refused: str = ""

    def says(self, answer: str) -> bool:
        """Whether these are exactly the words of the answer, in a sound that can be speech."""
        return not self.refused and normalized_words(self.text) == normalized_words(answer)


class NanoJudge:
    """Recognises answers of nano's domain. Needs the extra `judge`. Not thread-safe."""

    def __init__(self) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise MossError("the judge needs pocketsphinx: pip install 'moss-jax[judge]'") from error
        self._decoder = pocketsphinx.Decoder(
            samprate=float(JUDGE_SAMPLE_RATE), lm=None, jsgf=str(GRAMMAR), cmn="batch", loglevel="FATAL"
        )

    @cached_property
    def name(self) -> str:
        from importlib.metadata import version

        digest = hashlib.sha256(GRAMMAR.read_bytes()).hexdigest()[:8]
        return f"pocketsphinx {version('pocketsphinx')}, grammar {digest}"

    def __call__(self, wav: Path) -> str:
        """The words in a file; empty if it is not speech."""
        result = self.recognize(*load_audio(wav))
        return "" if result.refused else result.text

    def recognize(self, wave: np.ndarray, rate: int) -> Recognition:
        """Recognises a wave float32 [samples]. The result is deterministic."""
        level, spread, begin, end = measure(wave, rate)
        if level < MIN_LEVEL:
            return Recognition("", f"silence ({level:.0f} dBFS)")
        speech = wave[max(0, round((begin - MARGIN) * rate)) : round((end + MARGIN) * rate)]
        text = self._decode(resample(speech, rate, JUDGE_SAMPLE_RATE))
        if not text:
            return Recognition("", "nothing understood")
        expected = expected_seconds(text)
        if spread < MIN_SPREAD:
            return Recognition(text, f"steady ({spread:.1f} dB)")
        if not LENGTH_RANGE[0] <= (end - begin) / expected <= LENGTH_RANGE[1]:
            return Recognition(text, f"{end - begin:.2f} s long, expected {expected:.2f} s")
        return Recognition(text)

    def _decode(self, wave: np.ndarray) -> str:
        pause = np.zeros(round(PAUSE_SECONDS * JUDGE_SAMPLE_RATE), np.float32)
        wave = np.concatenate([pause, wave, pause])
        wave = wave * (SPEECH_RMS / np.sqrt(np.mean(np.square(wave)) + 1e-12))
        wave = wave + np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32) * NOISE_RMS
        self._decoder.start_utt()
        self._decoder.process_raw(to_pcm16(wave).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return "" if hypothesis is None else hypothesis.hypstr


def measure(wave: np.ndarray, rate: int) -> tuple[float, float, float, float]:
    """(level in dBFS, its spread in dB, begin, end in seconds) of a wave without the silence at its ends."""
    size = rate // FRAME_RATE
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    if not len(frames):
        return -100.0, 0.0, 0.0, 0.0
    power = 10 * np.log10(np.square(frames, dtype=np.float64).mean(1) + 1e-10)
    level = float(np.percentile(power[power > power.max() - SILENCE_BELOW_LEVEL], 95))
    loud = np.flatnonzero(power > level - SILENCE_BELOW_LEVEL)
    speech = power[loud[0] : loud[-1] + 1]
    spread = float(np.percentile(speech, 90) - np.percentile(speech, 10))
    return level, spread, float(loud[0]) / FRAME_RATE, float(loud[-1] + 1) / FRAME_RATE


def expected_seconds(text: str) -> float:
    """How long the answering voice takes for a recognised text. The grammar has no commas, so they are added here."""
    commas = sum(text.startswith(start) for start in ("yes ", "no ")) + _COMMAS.get(text, 0)
    counts = (1, sum(map(str.isalpha, text)), len(text.split()), commas)
    return float(np.dot(SECONDS_MODEL, counts))


_COMMAS = {" ".join(normalized_words(answer)): answer.count(",") for answer in domain.SOCIAL.values()}
