"""Word error rate of resynthesis: recording -> codes -> audio -> judge, compared with the transcript.

This is not the protocol of the paper's table of speech tokenizers, which trains a recogniser on the codes. Here an
existing recogniser measures the complete codec, including decoder and voice. Its own error on the original recordings
is measured too: the difference is the loss by the codec.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.audio.wave import save_audio
from moss_jax.errors import MossError
from moss_jax.evaluate.items import Sentence, read_sentences
from moss_jax.evaluate.judge import Judge
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, file_hash, word_error_row, write_table
from moss_jax.progress import Say
from moss_jax.speech_decoder.flow.sampler import check_codes
from moss_jax.speech_decoder.voice import Voice
from moss_jax.text.words import normalized_words, word_errors

PROTOCOL_NOTE = "Resynthesis: recording -> codes -> audio -> judge. Not a recogniser trained on the codes."
WAVE_FOLDER = "waves"


def run(
    model: EvaluatedModel,
    file: str | Path,
    out: str | Path,
    *,
    judge: Judge,
    voice: str | None = None,
    seed: int = 0,
    say: Say = lambda line: None,
) -> str:
    """Evaluates a file of {"audio": FILE, "text": ...} and writes the results to the folder `out`; returns the table.

    Args:
        judge: transcribes the originals and the resynthesized audio, which is kept in `out`/waves.
        voice: of the resynthesis; None: the system's default.
        seed: of the decoder's noise.
        say: receives progress messages.

    Raises:
        MossError: wrong lines, a text without words, a recording that cannot be read or is too long, a judge that
            fails, or a folder with results of another evaluation.
    """
    sentences = read_sentences(file, model.system.speech_decoder.config.flow.codebook_size)
    if wordless := [s.name for s in sentences if not normalized_words(s.text)]:
        raise MossError(f"{file}: no words in the text of {', '.join(wordless)}")
    used_voice, notices = model.system.voice(voice)
    about = {"task": "resynthesis", "file": file_hash(file), "judge": judge.name, "voice": voice, "seed": seed}
    about["codec"] = model.codec_hash()
    with Results(out, about) as results:
        waves = results.folder / WAVE_FOLDER
        waves.mkdir(exist_ok=True)
        remaining = [sentence for sentence in sentences if sentence.name not in results.done]
        for first in range(0, len(remaining), model.batch_size):
            group = remaining[first : first + model.batch_size]
            codes = model.codes([sentence.speech for sentence in group])
            for sentence in group:
                record = _record(model, sentence, codes[sentence.speech], used_voice, seed, judge, waves)
                results.append([record])
                say(f"{len(results.done)} of {len(sentences)} recordings")
        return write_table(results.folder, *_table([results.done[s.name] for s in sentences], notices))


def _record(
    model: EvaluatedModel, sentence: Sentence, codes: np.ndarray, voice: Voice, seed: int, judge: Judge, waves: Path
) -> dict[str, Any]:
    decoder = model.system.speech_decoder
    try:
        check_codes(decoder.config.flow, codes, len(voice.codes))
    except MossError as error:
        raise MossError(f"{sentence.name}: {error}") from error
    path = waves / f"{sentence.name}.wav"
    save_audio(path, decoder.decode(codes, voice, seed), decoder.config.sample_rate)
    reference = normalized_words(sentence.text)
    transcripts = {"resynthesis": judge(path)}
    if sentence.speech.audio is not None:
        transcripts["original"] = judge(sentence.speech.audio)
    counts = {kind: word_errors(reference, normalized_words(text)) for kind, text in transcripts.items()}
    return {"id": sentence.name, "codes": len(codes), "words": len(reference), "heard": transcripts, "errors": counts}


def _table(records: Sequence[dict[str, Any]], notices: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    rows = []
    for kind in ("resynthesis", "original"):
        measured = [record for record in records if kind in record["errors"]]
        if measured:
            rows.append(word_error_row(kind, [r["errors"][kind] for r in measured], [r["words"] for r in measured]))
    return rows, [PROTOCOL_NOTE, *(f"Note: {notice}." for notice in notices)]
