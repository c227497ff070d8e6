"""Turn a manifest into a training data set.

  moss-jax tokenize podcasts.jsonl --model FOLDER --format interleaved -o DATA/podcasts
  moss-jax tokenize books.jsonl --model FOLDER --format text -o DATA/books
  moss-jax tokenize voice.jsonl --model FOLDER --format decoder -o DATA/voice

A manifest has one JSON object per line; paths of recordings are relative to it:
  {"text": "Good morning."}                                                          text
  {"audio": "a.wav"}                                                                 speech, continuation
  {"audio": "a.wav", "text": "Good day.", "words": [["Good", 0.1, 0.4], ["day", 0.5, 0.9]]}  interleaved, asr, tts
  {"turns": [{"role": "user", "audio": "q.wav"}, {"role": "assistant", "text": "Yes."}]}     chat
"codes": [...] can replace "audio"; "shard": "x.tar" names a tar file that contains the recording; "id" is optional. The
format `decoder` makes the training data of the speech decoder (codes, mel, wave and F0) from recordings, or from the
spoken turns of an assistant.

All invalid lines are listed with their numbers (exit code 2). Recordings are encoded on all local devices. If
interrupted, rerun the same command to resume; DATA is created when it is complete. On several hosts with a shared file
system, run the same command on each, with --process 0/4, 1/4, ... or with --distributed. A second process with the same
share ends immediately with exit code 2.
"""

import argparse
import sys
import time
from pathlib import Path

from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, max_audio_bytes, say, system_folder
from moss_jax.errors import MossError
from moss_jax.progress import Progress

LOG_INTERVAL = 30.0  # seconds between two lines of progress if standard error is not a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from moss_jax.data.manifest import FORMATS

    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a file of JSON lines")
    add_system_arguments(parser)
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DATA", help="the folder of the data set")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cuts (default: 0)")
    parser.add_argument(
        "--variants", type=int, default=1, help="examples per document, each cut differently (default: 1)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt, for asr, tts and chat")
    parser.add_argument(
        "--aligner",
        type=Path,
        metavar="FOLDER",
        help="a CTC checkpoint of Hugging Face transformers that computes missing word times",
    )
    parser.add_argument(
        "--shard-documents", type=int, default=4096, metavar="N", help="documents per shard (default: 4096)"
    )
    add_audio_limit(parser)
    parser.add_argument("--process", metavar="I/N", help="the share of this process: I of N, from 0 (default: 0/1)")
    parser.add_argument("--distributed", action="store_true", help="get the share of this process from jax.distributed")


def run(args: argparse.Namespace) -> int:
    if args.format == "decoder":
        return _decoder(args)
    from moss_jax.data.tokenize import TokenizeRequest, tokenize

    index, count = _process(args)
    request = TokenizeRequest(
        manifest=args.manifest,
        model=system_folder(args),
        format=args.format,
        out=args.out,
        seed=args.seed,
        variants=args.variants,
        system=args.system,
        aligner=args.aligner,
        shard_documents=args.shard_documents,
        process_index=index,
        process_count=count,
        max_audio_bytes=max_audio_bytes(args),
    )
    about = tokenize(request, _progress())
    if about is None:
        say(f"process {index} of {count}: its shards are complete")
        # A process that leaves early makes jax.distributed end the others.
        while args.distributed and not args.out.exists():
            time.sleep(1)
        return 0
    print(
        f"{args.out}: {about['examples']} examples, {about['rows']} rows, "
        f"{about['text_targets']:.0f} text and {about['audio_targets']:.0f} audio targets"
    )
    return 0


def _decoder(args: argparse.Namespace) -> int:
    from moss_jax.data.decoder_data import DecoderDataRequest, build_decoder_data

    if args.variants != 1 or args.system or args.aligner or args.process or args.distributed:
        raise MossError("--format decoder takes no --variants, --system, --aligner, --process and --distributed")
    request = DecoderDataRequest(
        args.manifest, system_folder(args), args.out, args.shard_documents, max_audio_bytes(args)
    )
    about = build_decoder_data(request, _progress())
    seconds = about["frames"] * about["hop"] / about["sample_rate"]
    print(f"{args.out}: {about['documents']} recordings, {seconds / 60:.1f} minutes")
    return 0


def _process(args: argparse.Namespace) -> tuple[int, int]:
    """Index of this process and number of processes."""
    if args.distributed:
        import jax

        if args.process:
            raise MossError("--process and --distributed: expected one of them")
        jax.distributed.initialize()
        return jax.process_index(), jax.process_count()
    if not args.process:
        return 0, 1
    index, slash, count = args.process.partition("/")
    if not slash or not index.isdigit() or not count.isdigit():
        raise MossError(f"--process is {args.process!r}, expected I/N such as 0/4")
    return int(index), int(count)


def _progress() -> Progress:
    """Every line on a terminal; few lines in a log."""
    return Progress(say, 0.0 if sys.stderr.isatty() else LOG_INTERVAL)
