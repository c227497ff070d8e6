"""What a speech tokenizer's codes are good for, measured by the recogniser that it was trained with."""

from collections.abc import Callable, Sequence
from pathlib import Path

from moss_jax.errors import MossError
from moss_jax.evaluate.results import markdown_table, word_error_row
from moss_jax.train.export import restored
from moss_jax.train.preemption import Preemption
from moss_jax.train.run import read_run
from moss_jax.train.speech_tokenizer.run import SpeechTokenizerRun


def recognition(folder: str | Path, files: Sequence[str | Path], say: Callable[[str], None]) -> str:
    """A table of word error rates, a row a manifest.

    Args:
        folder: of a speech tokenizer's run; its newest whole checkpoint is taken.
        files: manifests with audio and text.

    Raises:
        MossError: it is another run, has no checkpoint, or a manifest is bad.
    """
    run = read_run(folder)
    if not isinstance(run, SpeechTokenizerRun):
        raise MossError(f"{folder}: is a run of kind {run.kind}, expected one of a speech tokenizer")
    rows = []
    task, state = restored(folder, say=say)
    for file in files:
        evaluation = task.evaluation_on((str(file),))
        evaluation(state, Preemption())
        rows.append(word_error_row(Path(file).stem, *zip(*evaluation.by_clip, strict=True)))
    return markdown_table(rows)
