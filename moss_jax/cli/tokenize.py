"""Turn a manifest into a data set to train on.

  moss-jax tokenize podcasts.jsonl --model FOLDER --format interleaved -o DATA/podcasts
  moss-jax tokenize books.jsonl --model FOLDER --format text -o DATA/books

A manifest has one JSON object a line, with the paths of recordings relative to it:
  {"text": "Good morning."}                                                          text
  {"audio": "a.wav"}                                                                 speech, continuation
  {"audio": "a.wav", "text": "Good day.", "words": [["Good", 0.1, 0.4], ["day", 0.5, 0.9]]}  interleaved, asr, tts
  {"turns": [{"role": "user", "audio": "q.wav"}, {"role": "assistant", "text": "Yes."}]}     chat
"codes": [...] may stand for "audio", "shard": "x.tar" beside "audio" names a tar file that holds it, and "id" a name.

  moss-jax tokenize voice.jsonl --model FOLDER --format decoder -o DATA/voice
makes what the speech decoder is trained on: codes, mel, wave and F0 of recordings, or of an assistant's spoken turns.

All bad lines are listed by number, and then the exit code is 2. Recordings are encoded on every local device. Killed or
failed, the same command goes on where it was (in DATA.part); DATA appears when it is whole. On several hosts with a
common file system run the same command everywhere with --process 0/4, 1/4, ... or with --distributed. A second process
that asks for the same share ends at once with exit code 2.
"""

import sys
import time
from pathlib import Path

from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, say, system_folder
from moss_jax.errors import MossError

EVERY = 30.0  # seconds between two lines of progress where nobody watches


def add_arguments(parser):
    from moss_jax.data.manifest import FORMATS

    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="JSON lines")
    add_system_arguments(parser)
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DATA", help="the data set's folder")
    parser.add_argument("--seed", type=int, default=0, help="of random cuts (default 0)")
    parser.add_argument("--variants", type=int, default=1, help="examples a document with other cuts (default 1)")
    parser.add_argument("--system", metavar="TEXT", help="a system turn, for asr, tts and chat")
    parser.add_argument(
        "--aligner",
        type=Path,
        metavar="FOLDER",
        help="a Hugging Face CTC checkpoint, to find word times that are not given",
    )
    parser.add_argument(
        "--shard-documents", type=int, default=4096, metavar="N", help="documents in a shard (default 4096)"
    )
    add_audio_limit(parser)
    parser.add_argument("--process", metavar="I/N", help="this process's share: number I of N, from 0 (default 0/1)")
    parser.add_argument(
        "--distributed", action="store_true", help="ask jax.distributed which process of how many this is"
    )


def run(args) -> int:
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
        max_audio_bytes=args.max_audio_mib * 2**20,
    )
    about = tokenize(request, _teller())
    if about is None:
        say(f"process {index} of {count}: its shards are there")
        while args.distributed and not args.out.exists():  # whoever leaves early makes jax.distributed end the others
            time.sleep(1)
        return 0
    print(
        f"{args.out}: {about['examples']} examples, {about['rows']} rows, "
        f"{about['text_targets']:.0f} text and {about['audio_targets']:.0f} audio targets"
    )
    return 0


def _decoder(args) -> int:
    from moss_jax.data.decoder_data import DecoderDataRequest, build_decoder_data

    if args.variants != 1 or args.system or args.aligner or args.process or args.distributed:
        raise MossError("--format decoder takes no --variants, --system, --aligner, --process and --distributed")
    limit = args.max_audio_mib * 2**20
    request = DecoderDataRequest(args.manifest, system_folder(args), args.out, args.shard_documents, limit)
    about = build_decoder_data(request, _teller())
    seconds = about["frames"] * about["hop"] / about["sample_rate"]
    print(f"{args.out}: {about['documents']} recordings, {seconds / 60:.1f} minutes")
    return 0


def _process(args) -> tuple[int, int]:
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


def _teller():
    """Every line where a person watches; one now and then where the output is kept."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if line.startswith("note:"):
            say(line)
        elif sys.stderr.isatty() or time.monotonic() - last >= EVERY:
            say(line)
            last = time.monotonic()

    return tell
