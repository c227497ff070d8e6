"""Word error rate of the recognition head that a speech tokenizer was trained with, from its codes."""

from collections.abc import Sequence
from pathlib import Path

from moss_jax.errors import MossError
from moss_jax.evaluate.results import markdown_table, word_error_row
from moss_jax.progress import Say
from moss_jax.train.export import load_checkpoint
from moss_jax.train.preemption import Preemption
from moss_jax.train.run_file import read_run
from moss_jax.train.speech_tokenizer.run import SpeechTokenizerRun
from moss_jax.train.speech_tokenizer.task import SpeechTokenizerTask


def recognition(folder: str | Path, files: Sequence[str | Path], say: Say) -> str:
    """A Markdown table of word error rates, with a row for each manifest.

    Args:
        folder: run folder of a speech tokenizer; its newest complete checkpoint is evaluated.
        files: manifests with audio and text.
        say: receives progress messages.

    Raises:
        MossError: the run is of another kind, has no checkpoint, or a manifest is wrong.
    """
    run = read_run(folder)
    if not isinstance(run, SpeechTokenizerRun):
        raise MossError(f"{folder}: is a run of kind {run.kind}, expected a run of a speech tokenizer")
    task, state = load_checkpoint(folder, say=say)
    assert isinstance(task, SpeechTokenizerTask)
    rows = []
    for file in files:
        evaluation = task.evaluation_on((str(file),))
        evaluation(state, Preemption())
        rows.append(word_error_row(Path(file).stem, *zip(*evaluation.by_clip, strict=True)))
    return markdown_table(rows)
