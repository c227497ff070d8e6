"""Judges: what hears a recording and says what is spoken in it. Anything that is called so may be one."""

import shlex
import subprocess
from pathlib import Path
from typing import Protocol

from moss_jax.audio.wave import load_audio, resample
from moss_jax.errors import MossError

PLACE = "{wav}"
JUDGE_SAMPLE_RATE = 16000  # Hz, of what the recognisers here hear


class Judge(Protocol):
    """`name` says which judge it was, in the results; a call turns a wav file into text."""

    name: str

    def __call__(self, wav: Path) -> str: ...


class CommandJudge:
    """Any program: it gets the name of a wav file and prints what it hears.

    Args:
        command: such as "whisper-cli -nt -f {wav}"; split as a shell does, but no shell runs it.
        seconds: how long it may take for one file.
    """

    def __init__(self, command: str, seconds: float = 600):
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise MossError(f"judge command {command!r}: {error}") from error
        if not any(PLACE in word for word in self._words):
            raise MossError(f"judge command {command!r}: expected {PLACE} in it, where the file's name goes")
        self.name = f"command {command}"
        self._seconds = seconds

    def __call__(self, wav: Path) -> str:
        words = [word.replace(PLACE, str(wav)) for word in self._words]
        try:
            run = subprocess.run(words, capture_output=True, timeout=self._seconds, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = getattr(error, "strerror", None) or f"took longer than {self._seconds:.0f} s"
            raise MossError(f"judge {words[0]}: {reason}, for {wav}") from error
        if run.returncode:
            told = run.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise MossError(f"judge {words[0]}: exit code {run.returncode} for {wav} ({told[-1][:300]})")
        return run.stdout.decode(errors="replace").strip()


class TransformersJudge:
    """A speech recogniser of Hugging Face transformers (Whisper, wav2vec2, ...) from a folder; needs torch.

    Nothing is downloaded, and no code in the folder is run.
    """

    def __init__(self, folder: str | Path):
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
        except Exception as error:  # whatever transformers raises about a folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise MossError(f"judge {folder}: transformers cannot open it ({reason})") from error
        self._folder = folder
        self.name = f"transformers {Path(folder).name}"

    def __call__(self, wav: Path) -> str:
        wave, rate = load_audio(wav)
        try:
            said = self._pipeline(
                {"raw": resample(wave, rate, JUDGE_SAMPLE_RATE), "sampling_rate": JUDGE_SAMPLE_RATE}, chunk_length_s=30
            )
        except Exception as error:
            raise MossError(f"judge {self._folder}: failed on {wav} ({error})") from error
        return said["text"].strip()


def open_judge(folder: str | Path | None, command: str | None) -> Judge:
    """The judge that --judge or --judge-command mean; exactly one of them is needed."""
    if (folder is None) == (command is None):
        raise MossError("a judge is needed: expected one of --judge FOLDER and --judge-command 'PROGRAM {wav}'")
    return CommandJudge(command) if folder is None else TransformersJudge(folder)
