"""Judges: speech recognisers that transcribe recordings for an evaluation."""

import shlex
import subprocess
from pathlib import Path
from typing import Any, Protocol

from moss_jax.audio.wave import load_audio, resample
from moss_jax.errors import MossError

FILE_PLACEHOLDER = "{wav}"
JUDGE_SAMPLE_RATE = 16000  # Hz, of the audio that the recognisers receive


class Judge(Protocol):
    """Transcribes a wav file when called; `name` identifies the judge in the results."""

    name: str

    def __call__(self, wav: Path) -> str: ...


class CommandJudge:
    """A program that receives the name of a wav file and prints the transcript.

    Args:
        command: such as "whisper-cli -nt -f {wav}"; split into words like in a shell, but not run by a shell.
        seconds: time limit for one file.

    Raises:
        MossError: the command cannot be split, or lacks {wav}; when called: it fails or takes too long.
    """

    def __init__(self, command: str, seconds: float = 600) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise MossError(f"judge command {command!r}: {error}") from error
        if not any(FILE_PLACEHOLDER in word for word in self._words):
            raise MossError(
                f"judge command {command!r}: expected {FILE_PLACEHOLDER} in it, which stands for the file name"
            )
        self.name = f"command {command}"
        self._seconds = seconds

    def __call__(self, wav: Path) -> str:
        words = [word.replace(FILE_PLACEHOLDER, str(wav)) for word in self._words]
        try:
            run = subprocess.run(words, capture_output=True, timeout=self._seconds, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = getattr(error, "strerror", None) or f"took longer than {self._seconds:.0f} s"
            raise MossError(f"judge {words[0]}: {reason}, for {wav}") from error
        if run.returncode:
            lines = run.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
            raise MossError(f"judge {words[0]}: exit code {run.returncode} for {wav} ({lines[-1][:300]})")
        return run.stdout.decode(errors="replace").strip()


class TransformersJudge:
    """A speech recogniser of Hugging Face transformers (Whisper, wav2vec2, ...) in a folder; needs torch.

    Nothing is downloaded, and no code in the folder is executed.
    """

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise MossError(f"judge {folder}: no such folder, expected a speech recogniser saved by transformers")
        try:
            from transformers import pipeline
            from transformers.utils import logging
        except ImportError as error:
            raise MossError("a judge folder needs transformers and torch: pip install transformers torch") from error
        logging.disable_progress_bar()
        try:
            self._pipeline = pipeline("automatic-speech-recognition", model=str(folder), trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds of errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise MossError(f"judge {folder}: transformers cannot open it ({reason})") from error
        self._folder = folder
        self.name = f"transformers {Path(folder).name}"

    def __call__(self, wav: Path) -> str:
        wave, rate = load_audio(wav)
        audio = {"raw": resample(wave, rate, JUDGE_SAMPLE_RATE), "sampling_rate": JUDGE_SAMPLE_RATE}
        try:
            result: Any = self._pipeline(audio, chunk_length_s=30)
        except Exception as error:  # transformers and torch raise many kinds of errors
            raise MossError(f"judge {self._folder}: failed on {wav} ({error})") from error
        return result["text"].strip()


def open_judge(folder: str | Path | None, command: str | None) -> Judge:
    """The judge for the arguments --judge and --judge-command. Raises MossError unless exactly one is given."""
    if folder is not None and command is None:
        return TransformersJudge(folder)
    if command is not None and folder is None:
        return CommandJudge(command)
    raise MossError("a judge is needed: expected one of --judge FOLDER and --judge-command 'PROGRAM {wav}'")
