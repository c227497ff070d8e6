"""Word error rate of resynthesis: recording -> codes -> sound -> judge, against the transcript.

This is not the protocol of the paper's table of speech tokenizers, which trains a recogniser on the codes and measures
that. Here the whole codec is measured, decoder and voice included, by a recogniser that exists. The judge's own error
on the original recordings is measured beside it: the difference is what the codec costs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moss_jax.audio.wave import save_audio
from moss_jax.errors import MossError
from moss_jax.evaluate.items import Sentence, read_sentences
from moss_jax.evaluate.judge import Judge
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, file_hash, word_error_row, write_table
from moss_jax.speech_decoder.flow.sampler import check_codes
from moss_jax.text.words import normalized_words, word_errors

PROTOCOL = "Resynthesis: recording -> codes -> sound -> judge. Not a recogniser trained on the codes."
WAVES = "waves"


def run(
    model: EvaluatedModel,
    file: str | Path,
    out: str | Path,
    *,
    judge: Judge,
    voice: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Evaluates a file of {"audio": FILE, "text": ...} into the folder `out`; returns the table.

    Args:
        judge: hears the originals and what comes back, which stays in `out`/waves.
        voice: speaks; None for the system's default.
        seed: of the noise in the voice.
    """
    sentences = read_sentences(file, model.system.speech_decoder.config.flow.codebook_size)
    if wordless := [s.name for s in sentences if not normalized_words(s.text)]:
        raise MossError(f"{file}: no words in the text of {', '.join(wordless)}")
    spoken, notices = model.system.voice(voice)
    about = {"task": "resynthesis", "file": file_hash(file), "judge": judge.name, "voice": voice, "seed": seed}
    about["codec"] = model.codec_hash()
    with Results(out, about) as results:
        waves = results.folder / WAVES
        waves.mkdir(exist_ok=True)
        left = [sentence for sentence in sentences if sentence.name not in results.done]
        for first in range(0, len(left), model.batch_size):
            group = left[first : first + model.batch_size]
            codes = model.codes([sentence.speech for sentence in group])
            for sentence in group:
                record = _record(model, sentence, codes[sentence.speech], spoken, seed, judge, waves)
                results.append([record])
                say(f"{len(results.done)} of {len(sentences)} recordings")
        return write_table(results.folder, *_table([results.done[s.name] for s in sentences], notices))


def _record(
    model: EvaluatedModel, sentence: Sentence, codes, voice, seed: int, judge: Judge, waves: Path
) -> dict[str, Any]:
    decoder = model.system.speech_decoder
    try:
        check_codes(decoder.config.flow, codes, len(voice.codes))
    except MossError as error:
        raise MossError(f"{sentence.name}: {error}") from error
    path = waves / f"{sentence.name}.wav"
    save_audio(path, decoder.decode(codes, voice, seed), decoder.config.sample_rate)
    wanted = normalized_words(sentence.text)
    heard = {"resynthesis": judge(path)}
    if sentence.speech.audio is not None:
        heard["original"] = judge(sentence.speech.audio)
    counts = {kind: word_errors(wanted, normalized_words(text)) for kind, text in heard.items()}
    return {"id": sentence.name, "codes": len(codes), "words": len(wanted), "heard": heard, "errors": counts}


def _table(records: Sequence[dict[str, Any]], notices: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    rows = []
    for kind in ("resynthesis", "original"):
        own = [record for record in records if kind in record["errors"]]
        if own:
            rows.append(word_error_row(kind, [r["errors"][kind] for r in own], [r["words"] for r in own]))
    return rows, [PROTOCOL, *(f"Note: {notice}." for notice in notices)]
