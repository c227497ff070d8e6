"""The judge: pocketsphinx with its own English model, which hears one of the answers that nano's domain could give.

`answers.jsgf` is the grammar, frozen beside this file. It lets wrong answers through ("seven plus five is six"), but it
knows nothing else, so it would make an answer of a cough as well. Hence two checks of the sound that do not listen to
words: it has to be as long as the sentence that was heard takes to say, and neither silent nor steady. Their limits
were set on 523 answers of the answering voice before anything was trained:

- length of what is not silent, over -0.037 + 0.0416 letters + 0.168 words + 0.230 commas seconds (a least-squares fit):
  0.78 to 1.21 there; 0.65 to 1.45 is let through;
- level, the 95th percentile of the power in 20 ms: -19 to -12 dBFS there; -45 is let through;
- spread of the level, 10th to 90th percentile: 11.9 dB at least there, 0.9 dB in white noise; 8 dB are let through.

Before it is heard the sound loses the silence at its ends and gets the same power, 0.15 s of silence at both ends and a
little noise, always the same: on sound that begins and ends with digital silence the recogniser drops last words
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
from moss_jax.evaluate.words import words
from moss_jax.recipes.nano import domain

GRAMMAR = Path(__file__).with_name("answers.jsgf")
FRAME = 50  # a second, of the checks
FLOOR = 35.0  # dB below the level: what is quieter at the ends is silence
SECONDS = (-0.0369, 0.0416, 0.1679, 0.2304)  # constant, a letter, a word, a comma
LENGTHS = (0.65, 1.45)  # measured over expected
# dBFS and dB, at least
LEVEL = -45.0
SPREAD = 8.0
MARGIN = 0.1  # seconds that stay around what is not silent
# root mean square; seconds; root mean square
POWER = 0.1
PAUSE = 0.15
NOISE = 0.002


def grammar() -> str:
    """The content of `answers.jsgf`: every answer, right or wrong, of the domain."""

    def either(texts: Iterable[str]) -> str:
        return " | ".join(dict.fromkeys(" ".join(words(text)) for text in texts))

    numbers = domain.NUMBERS[: domain.MOST + 1]
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
class Heard:
    """What the judge makes of a sound.

    Attributes:
        text: lower-case words; empty when nothing was understood.
        refused: why the sound is no speech of these words; empty when it may be.
    """

    text: str
    refused: str = ""

    def says(self, answer: str) -> bool:
        """Whether these are the words of the answer, all of them and no other, in a sound that may be speech."""
        return not self.refused and words(self.text) == words(answer)


class NanoJudge:
    """Hears answers of nano's domain. Needs the extra `judge`; one thread at a time."""

    def __init__(self):
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

        mark = hashlib.sha256(GRAMMAR.read_bytes()).hexdigest()[:8]
        return f"pocketsphinx {version('pocketsphinx')}, grammar {mark}"

    def __call__(self, wav: Path) -> str:
        """What is said in a file; empty when it is no speech."""
        heard = self.hear(*load_audio(wav))
        return "" if heard.refused else heard.text

    def hear(self, wave: np.ndarray, rate: int) -> Heard:
        """Sound float32 [samples] -> what it says. The same sound is always heard the same."""
        level, spread, begin, end = measure(wave, rate)
        if level < LEVEL:
            return Heard("", f"silence ({level:.0f} dBFS)")
        said = wave[max(0, round((begin - MARGIN) * rate)) : round((end + MARGIN) * rate)]
        text = self._recognise(resample(said, rate, JUDGE_SAMPLE_RATE))
        if not text:
            return Heard("", "nothing understood")
        expected = expected_seconds(text)
        if spread < SPREAD:
            return Heard(text, f"steady ({spread:.1f} dB)")
        if not LENGTHS[0] <= (end - begin) / expected <= LENGTHS[1]:
            return Heard(text, f"{end - begin:.2f} s long, expected {expected:.2f} s")
        return Heard(text)

    def _recognise(self, wave: np.ndarray) -> str:
        pause = np.zeros(round(PAUSE * JUDGE_SAMPLE_RATE), np.float32)
        wave = np.concatenate([pause, wave, pause])
        wave = wave * (POWER / np.sqrt(np.mean(np.square(wave)) + 1e-12))
        wave = wave + np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32) * NOISE
        self._decoder.start_utt()
        self._decoder.process_raw(to_pcm16(wave).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


def measure(wave: np.ndarray, rate: int) -> tuple[float, float, float, float]:
    """(level in dBFS, its spread in dB, begin, end in seconds) of a sound without the silence at its ends."""
    size = rate // FRAME
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    if not len(frames):
        return -100.0, 0.0, 0.0, 0.0
    power = 10 * np.log10(np.square(frames, dtype=np.float64).mean(1) + 1e-10)
    level = float(np.percentile(power[power > power.max() - FLOOR], 95))
    loud = np.flatnonzero(power > level - FLOOR)
    said = power[loud[0] : loud[-1] + 1]
    spread = float(np.percentile(said, 90) - np.percentile(said, 10))
    return level, spread, float(loud[0]) / FRAME, float(loud[-1] + 1) / FRAME


def expected_seconds(text: str) -> float:
    """How long the answering voice takes to say what was heard; the grammar has no commas, so they are put back."""
    commas = sum(text.startswith(start) for start in ("yes ", "no ")) + _COMMAS.get(text, 0)
    counts = (1, sum(map(str.isalpha, text)), len(text.split()), commas)
    return float(np.dot(SECONDS, counts))


_COMMAS = {" ".join(words(answer)): answer.count(",") for answer in domain.SOCIAL.values()}
