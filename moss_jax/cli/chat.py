"""Ask a question, spoken or written, and get a spoken or written answer.

  moss-jax chat --text "What is two plus three?" -o ANSWER.wav          # nano, which comes along
  moss-jax chat QUESTION.wav --model FOLDER -o ANSWER.wav
  moss-jax chat --text "How are you?" --model FOLDER --reply text
  cat QUESTION.wav | moss-jax chat - --model FOLDER -o ANSWER.wav
  moss-jax chat QUESTION.wav --model FOLDER --stream -o - | aplay -t raw -f S16_LE -r 24000
  moss-jax chat --jsonl QUESTIONS.jsonl --model FOLDER -o ANSWERS/

A written reply goes to stdout (or to the file of -o), a spoken one to a wav or flac file; `-o -` writes raw 16-bit
samples to stdout, with --stream as they come. A line of QUESTIONS.jsonl is {"text": ...}, {"audio": FILE} or
{"turns": [{"role": "user", "audio": FILE}, ...]}, each with an optional "id"; the answers are JSON lines on stdout, and
spoken ones lie in ANSWERS/ID.wav. Everything that is not the answer goes to stderr.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from moss_jax.arguments import check_seed, check_whole
from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, progress, say, system_folder
from moss_jax.errors import MossError
from moss_jax.files import check_name, is_folder
from moss_jax.generate.settings import SAMPLING, check_sampling


def add_arguments(parser):
    parser.add_argument("question", nargs="?", metavar="QUESTION.wav", help="a recording, or - to read one from stdin")
    parser.add_argument("--text", metavar="TEXT", help="a written question in place of a recording")
    parser.add_argument("--jsonl", metavar="QUESTIONS.jsonl", help="many questions, answered in batches")
    add_system_arguments(parser, nano=True)
    add_audio_limit(parser)
    parser.add_argument("-o", "--out", metavar="OUT", help="where the reply goes; needed for a spoken one")
    parser.add_argument("--reply", default="speech", help="speech (default) or text")
    parser.add_argument("--voice", help="of the reply: a name in the system, or a file that `moss-jax voice` wrote")
    parser.add_argument("--system", metavar="TEXT", help="the system turn, in place of the released driver's")
    parser.add_argument("--stream", action="store_true", help="speak and write while the rest is being thought of")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time with --jsonl, default 8")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same reply, default 0; the words of a greedy reply do not depend on it",
    )
    sampling = parser.add_argument_group(
        "sampling, for text and codes alike",
        "A system may have its own defaults; the bundled nano model is greedy, for example. A given --temperature, "
        "--top-p or --top-k switches a system's greedy off.",
    )
    sampling.add_argument("--max-new-tokens", type=int, help=f"rows at most, 12.5 a second; {_range('max_new_tokens')}")
    sampling.add_argument("--min-new-tokens", type=int, help=f"speech does not end before; {_range('min_new_tokens')}")
    sampling.add_argument("--temperature", type=float, help=_range("temperature"))
    sampling.add_argument("--top-p", type=float, help=f"{_range('top_p')}; 1 is off")
    sampling.add_argument("--top-k", type=int, help=f"{_range('top_k')}; 0 is off")
    sampling.add_argument("--repetition-penalty", type=float, help=f"{_range('repetition_penalty')}; 1 is off")
    sampling.add_argument(
        "--greedy", action=argparse.BooleanOptionalAction, default=None, help="always the most likely, no sampling"
    )


def _range(name: str) -> str:
    setting = SAMPLING[name]
    limits = f"at least {setting.lowest}" if setting.whole else f"{setting.lowest:g} to {setting.highest:g}"
    return f"{limits}; {setting.default} unless the system has its own"


def run(args) -> int:
    if sum(x is not None for x in (args.question, args.text, args.jsonl)) != 1:
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
        return _batch(System(system_folder(args), max_audio_bytes=args.max_audio_mib * 2**20), questions, args)
    heard: tuple[str, ...] = ()
    if args.question is None:
        turns = [Turn("user", text=args.text)]
    else:
        recording = read_audio(args.question, max_bytes=args.max_audio_mib * 2**20)
        check_speech(recording.wave, recording.rate, source_name(args.question))
        turns = [Turn("user", audio=recording.wave, sample_rate=recording.rate)]
        heard = recording.notices
    if args.system is not None:
        turns.insert(0, Turn("system", text=args.system))
    check_turns(turns)
    system = System(system_folder(args))
    if args.stream:
        return _stream(system, turns, heard, args)
    reply = system.reply(turns, progress=_progress, **_options(args))
    if args.reply == "text":
        _write_text(reply.text, args.out)
    elif args.out == "-":
        _write_samples(reply.wave)
    else:
        _save(reply, args.out)
    _tell((*heard, *reply.notices))
    return 0


def _stream(system, turns, heard, args) -> int:
    stream = system.stream(turns, **_options(args))
    for piece in stream:
        if args.reply == "text" and args.out in (None, "-"):
            print(piece.text, end="", flush=True)
        elif args.out == "-":
            _write_samples(piece.wave)
        elif piece.wave.size:
            progress(f"{piece.wave.size / stream.sample_rate:.2f} s of speech")
    reply = stream.reply
    if args.reply == "text" and args.out in (None, "-"):
        print()
    elif args.reply == "text":
        _write_text(reply.text, args.out)
    elif args.out != "-":
        _save(reply, args.out)
    _tell((*heard, *reply.notices))
    return 0


def _batch(system, questions, args) -> int:
    folder = None if args.out is None else Path(args.out)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MossError(f"{folder}: cannot be made ({error.strerror})") from error
    turns = [question.turns for question in questions]
    replies = system.reply_batch(turns, batch_size=args.batch_size, progress=_progress, **_options(args))
    for number, (question, reply) in enumerate(zip(questions, replies, strict=True), 1):
        answer = {"id": question.name, "text": reply.text, "codes": reply.codes.tolist()}
        if args.reply == "speech" and reply.wave.size:
            answer["audio"] = str(folder / f"{question.name}.wav")
            reply.save(answer["audio"])
        print(json.dumps({**answer, "complete": reply.complete, "notices": reply.notices}, ensure_ascii=False))
        sys.stdout.flush()
        progress(f"{number} of {len(questions)} replies")
    return 0


def _options(args) -> dict:
    return _sampling(args) | {name: getattr(args, name) for name in ("reply", "seed", "voice")}


def _sampling(args) -> dict:
    """What was given; the rest is for the system to say."""
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


def _check_out(args) -> None:
    """Before anything is loaded: a place where the reply can go."""
    if args.reply not in ("speech", "text"):
        raise MossError(f"--reply {args.reply}: expected speech or text")
    check_seed(args.seed, "--seed")
    check_whole("--batch-size", args.batch_size, 1)
    if args.out is None:
        if args.reply == "speech":
            what = "a folder" if args.jsonl is not None else "a wav or flac file, or - for raw samples on stdout"
            raise MossError(f"-o is needed for a spoken reply: {what}")
        return
    out = Path(args.out)
    if args.out == "-" or args.jsonl is not None:
        if args.out == "-" and args.jsonl is not None:
            raise MossError("-o -: with --jsonl a folder is needed")
        return
    if args.reply == "speech" and out.suffix.lower() not in (".wav", ".flac"):
        raise MossError(f"{out}: cannot write {out.suffix or 'a file without an ending'}, expected .wav or .flac")
    if not is_folder(out.parent):
        raise MossError(f"{out}: there is no folder {out.parent}, expected a place that exists")
    if is_folder(out):
        raise MossError(f"{out}: is a folder, expected a file name")
    check_name(out)
    if not os.access(out.parent, os.W_OK):
        raise MossError(f"{out}: the folder {out.parent} is not writable, expected a place that is")


def _write_text(text: str, out: str | None) -> None:
    if out in (None, "-"):
        print(text)
        return
    from moss_jax.checkpoint import write_text

    write_text(out, text + "\n")


def _write_samples(wave) -> None:
    from moss_jax.audio.pcm import to_pcm16

    sys.stdout.buffer.write(to_pcm16(wave).tobytes())
    sys.stdout.buffer.flush()


def _save(reply, out: str) -> None:
    reply.save(out)
    if reply.text:
        print(reply.text)
    say(f"{out}: {reply.wave.size / reply.sample_rate:.2f} s, {len(reply.codes)} codes")


def _tell(notices) -> None:
    for notice in notices:
        say(f"note: {notice}")


def _progress(rows: int, most: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{rows} of at most {most} rows ", end="" if rows < most else "\n", file=sys.stderr, flush=True)
