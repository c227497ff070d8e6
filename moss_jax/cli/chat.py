"""Answer spoken or written questions with spoken or written replies.

  moss-jax chat --text "What is two plus three?" -o ANSWER.wav          # the bundled nano model
  moss-jax chat QUESTION.wav --model FOLDER -o ANSWER.wav
  moss-jax chat --text "How are you?" --model FOLDER --reply text
  cat QUESTION.wav | moss-jax chat - --model FOLDER -o ANSWER.wav
  moss-jax chat QUESTION.wav --model FOLDER --stream -o - | aplay -t raw -f S16_LE -r 24000
  moss-jax chat --jsonl QUESTIONS.jsonl --model FOLDER -o ANSWERS/

A written reply is printed, or written to the file given by -o. A spoken reply is written to a wav or flac file; `-o -`
writes raw 16-bit samples to standard output, with --stream while they are generated. A line of QUESTIONS.jsonl is
{"text": ...}, {"audio": FILE} or {"turns": [{"role": "user", "audio": FILE}, ...]}, each with an optional "id". The
replies are then printed as JSON lines, and spoken ones are written to ANSWERS/ID.wav. Notes and progress go to standard
error.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moss_jax.arguments import check_seed, check_whole
from moss_jax.cli.system_arguments import (
    add_audio_limit,
    add_system_arguments,
    max_audio_bytes,
    progress,
    say,
    system_folder,
)
from moss_jax.errors import MossError
from moss_jax.files import check_name, is_folder
from moss_jax.generate.settings import SAMPLING, check_sampling

if TYPE_CHECKING:  # for annotations only: importing jax takes a second, and --help needs none of it
    import numpy as np

    from moss_jax.dialogue.questions import Question
    from moss_jax.dialogue.reply import Reply
    from moss_jax.dialogue.system import System
    from moss_jax.dialogue.turns import Turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", metavar="QUESTION.wav", help="a recording, or - to read standard input")
    parser.add_argument("--text", metavar="TEXT", help="a written question instead of a recording")
    parser.add_argument("--jsonl", metavar="QUESTIONS.jsonl", help="a file of questions, answered in batches")
    add_system_arguments(parser, nano=True)
    add_audio_limit(parser)
    parser.add_argument("-o", "--out", metavar="OUT", help="where to write the reply; required for a spoken reply")
    parser.add_argument("--reply", default="speech", help="kind of reply: speech or text (default: speech)")
    parser.add_argument("--voice", help="voice of the reply: a name in the system, or a file from `moss-jax voice`")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: that of the released model)")
    parser.add_argument("--stream", action="store_true", help="write the reply while it is being generated")
    parser.add_argument("--batch-size", type=int, default=8, help="with --jsonl: questions per batch (default: 8)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed (default: 0); the same seed gives the same reply. A greedy reply uses it for the voice only",
    )
    sampling = parser.add_argument_group(
        "sampling of text and speech codes",
        "The defaults below apply unless the system has its own; the bundled nano model is greedy, for example.\n"
        "--temperature, --top-p or --top-k turns greedy decoding off if the system has it on.",
    )
    sampling.add_argument(
        "--max-new-tokens", type=int, help=f"maximum length in rows, 12.5 per second; {_range('max_new_tokens')}"
    )
    sampling.add_argument(
        "--min-new-tokens", type=int, help=f"minimum length of a spoken reply in rows; {_range('min_new_tokens')}"
    )
    sampling.add_argument("--temperature", type=float, help=_range("temperature"))
    sampling.add_argument("--top-p", type=float, help=f"{_range('top_p')}; 1 turns it off")
    sampling.add_argument("--top-k", type=int, help=f"{_range('top_k')}; 0 turns it off")
    sampling.add_argument("--repetition-penalty", type=float, help=f"{_range('repetition_penalty')}; 1 turns it off")
    sampling.add_argument(
        "--greedy",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="always take the most likely token instead of sampling",
    )


def _range(name: str) -> str:
    """Allowed values and the default of a sampling setting, which the system may replace."""
    setting = SAMPLING[name]
    limits = f"at least {setting.lowest}" if setting.whole else f"{setting.lowest:g} to {setting.highest:g}"
    return f"{limits} (default: {setting.default} unless the system has its own)"


def run(args: argparse.Namespace) -> int:
    if sum(source is not None for source in (args.question, args.text, args.jsonl)) != 1:
        raise MossError("the question: expected one of QUESTION.wav, --text and --jsonl")
    _check_out(args)
    from moss_jax.audio import check_speech, read_audio
    from moss_jax.audio.source import source_name
    from moss_jax.dialogue.questions import read_questions
    from moss_jax.dialogue.system import System
    from moss_jax.dialogue.turns import Turn, check_turns

    check_sampling(_sampling(args))
    if args.jsonl is not None:
        questions = read_questions(args.jsonl, args.system)
        return _batch(System(system_folder(args), max_audio_bytes=max_audio_bytes(args)), questions, args)
    notices: tuple[str, ...] = ()  # about the recording
    if args.question is None:
        turns = [Turn("user", text=args.text)]
    else:
        recording = read_audio(args.question, max_bytes=max_audio_bytes(args))
        check_speech(recording.wave, recording.rate, source_name(args.question))
        turns = [Turn("user", audio=recording.wave, sample_rate=recording.rate)]
        notices = recording.notices
    if args.system is not None:
        turns.insert(0, Turn("system", text=args.system))
    check_turns(turns)
    system = System(system_folder(args))
    if args.stream:
        return _stream(system, turns, notices, args)
    reply = system.reply(turns, progress=_rows_progress, **_options(args))
    if args.reply == "text":
        _write_text(reply.text, args.out)
    elif args.out == "-":
        assert reply.wave is not None  # a spoken reply has one
        _write_samples(reply.wave)
    else:
        _save(reply, args.out)
    _print_notices((*notices, *reply.notices))
    return 0


def _stream(system: "System", turns: "list[Turn]", notices: tuple[str, ...], args: argparse.Namespace) -> int:
    stream = system.stream(turns, **_options(args))
    for piece in stream:
        if args.reply == "text" and args.out in (None, "-"):
            print(piece.text, end="", flush=True)
        elif args.out == "-":
            _write_samples(piece.wave)
        elif piece.wave.size:
            progress(f"{piece.wave.size / stream.sample_rate:.2f} s of speech")
    reply = stream.reply
    assert reply is not None  # the stream has ended
    if args.reply == "text" and args.out in (None, "-"):
        print()
    elif args.reply == "text":
        _write_text(reply.text, args.out)
    elif args.out != "-":
        _save(reply, args.out)
    _print_notices((*notices, *reply.notices))
    return 0


def _batch(system: "System", questions: "Sequence[Question]", args: argparse.Namespace) -> int:
    folder = None if args.out is None else Path(args.out)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MossError(f"{folder}: cannot be created ({error.strerror})") from error
    turns = [question.turns for question in questions]
    replies = system.reply_batch(turns, batch_size=args.batch_size, progress=_rows_progress, **_options(args))
    for number, (question, reply) in enumerate(zip(questions, replies, strict=True), 1):
        answer: dict[str, Any] = {"id": question.name, "text": reply.text, "codes": reply.codes.tolist()}
        if reply.wave is not None and reply.wave.size:
            assert folder is not None  # `_check_out` requires -o for spoken replies
            answer["audio"] = str(folder / f"{question.name}.wav")
            reply.save(answer["audio"])
        print(json.dumps({**answer, "complete": reply.complete, "notices": reply.notices}, ensure_ascii=False))
        sys.stdout.flush()
        progress(f"{number} of {len(questions)} replies")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return _sampling(args) | {name: getattr(args, name) for name in ("reply", "seed", "voice")}


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given; the system decides the others."""
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


def _check_out(args: argparse.Namespace) -> None:
    """Checks the arguments that need no model, so that errors come before the loading."""
    if args.reply not in ("speech", "text"):
        raise MossError(f"--reply {args.reply}: expected speech or text")
    check_seed(args.seed, "--seed")
    check_whole("--batch-size", args.batch_size, 1)
    if args.out is None:
        if args.reply == "speech":
            expected = "a folder" if args.jsonl is not None else "a wav or flac file, or - for raw samples on stdout"
            raise MossError(f"-o is needed for a spoken reply: {expected}")
        return
    out = Path(args.out)
    if args.out == "-" or args.jsonl is not None:
        if args.out == "-" and args.jsonl is not None:
            raise MossError("-o -: with --jsonl a folder is needed")
        return
    if args.reply == "speech" and out.suffix.lower() not in (".wav", ".flac"):
        raise MossError(f"{out}: cannot write {out.suffix or 'a file without a suffix'}, expected .wav or .flac")
    if not is_folder(out.parent):
        raise MossError(f"{out}: there is no folder {out.parent}, expected an existing one")
    if is_folder(out):
        raise MossError(f"{out}: is a folder, expected a file name")
    check_name(out)
    if not os.access(out.parent, os.W_OK):
        raise MossError(f"{out}: the folder {out.parent} is not writable, expected a writable one")


def _write_text(text: str, out: str | None) -> None:
    if out is None or out == "-":
        print(text)
        return
    from moss_jax.files import write_text

    write_text(out, text + "\n")


def _write_samples(wave: "np.ndarray") -> None:
    from moss_jax.audio.pcm import to_pcm16

    sys.stdout.buffer.write(to_pcm16(wave).tobytes())
    sys.stdout.buffer.flush()


def _save(reply: "Reply", out: str) -> None:
    reply.save(out)
    assert reply.wave is not None  # otherwise it cannot be saved
    if reply.text:
        print(reply.text)
    say(f"{out}: {reply.wave.size / reply.sample_rate:.2f} s, {len(reply.codes)} codes")


def _print_notices(notices: Iterable[str]) -> None:
    for notice in notices:
        say(f"note: {notice}")


def _rows_progress(rows: int, max_rows: int) -> None:
    """A counter that overwrites itself on a terminal."""
    if sys.stderr.isatty():
        end = "" if rows < max_rows else "\n"
        print(f"\r{rows} of at most {max_rows} rows ", end=end, file=sys.stderr, flush=True)
