"""Decode speech codes into audio: 24 kHz, 1920 samples per code.

  moss-jax decode CODES.jsonl --model FOLDER --voice VOICE -o OUT.wav
  moss-jax decode CODES.npy --model FOLDER -o OUT.wav --stream

CODES is the output of `moss-jax encode`, or a .npy file with a one-dimensional array of integers. For several
recordings, -o names a new folder, which gets one wav file per recording. Without --voice, the default voice of the
system is used, or the zero voice if it has none. With --stream, codes are decoded chunk by chunk as in a conversation,
which takes longer and sounds slightly different.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jax.arguments import check_seed
from moss_jax.cli.system_arguments import add_system_arguments, say, system_folder
from moss_jax.errors import MossError

if TYPE_CHECKING:  # for annotations only: importing jax takes a second, and --help needs none of it
    import numpy as np

    from moss_jax.speech_decoder.stream import CachedStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codes", metavar="CODES", help="JSON lines from `moss-jax encode`, or a .npy file")
    add_system_arguments(parser)
    parser.add_argument("--voice", help="a name in the system, or a file from `moss-jax voice`")
    parser.add_argument("-o", "--out", required=True, metavar="OUT.wav", help="a wav or flac file, or a new folder")
    parser.add_argument("--stream", action="store_true", help="decode chunk by chunk")
    parser.add_argument("--chunk", type=int, help="with --stream: codes per chunk, 5 or 25 in the released system")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")


def run(args: argparse.Namespace) -> int:
    from moss_jax.audio.wave import WRITABLE, save_audio
    from moss_jax.dialogue.system import System
    from moss_jax.files import atomic_folder
    from moss_jax.speech_decoder.codes import read_codes
    from moss_jax.speech_decoder.flow.sampler import check_codes

    items = read_codes(args.codes)
    out = Path(args.out)
    check_seed(args.seed, "--seed")
    if args.chunk is not None and not args.stream:
        raise MossError("--chunk: is used together with --stream, which is missing")
    if len(items) == 1 and out.suffix.lower() not in WRITABLE:
        raise MossError(f"{out}: expected the name of a .wav or .flac file")
    if len(items) > 1 and (out.suffix.lower() in WRITABLE or out.exists()):
        raise MossError(f"{out}: {len(items)} recordings in {args.codes}, expected the name of a new folder")
    system = System(system_folder(args))
    decoder = system.speech_decoder
    voice, notices = system.voice(args.voice)
    for name, codes in items:  # all are checked before the first is decoded
        try:
            check_codes(decoder.config.flow, codes, len(voice.codes))
        except MossError as error:
            raise MossError(f"{args.codes}, {name}: {error}") from error

    def decode(index: int) -> "tuple[np.ndarray, int]":
        codes = items[index][1]
        if args.stream:
            wave = _stream(decoder.stream(voice, args.seed, chunk=args.chunk), codes, decoder.config.code_rate)
        else:
            wave = decoder.decode(codes, voice, args.seed)
        say(f"{index + 1} of {len(items)}: {len(wave) / decoder.config.sample_rate:.2f} s")
        return wave, decoder.config.sample_rate

    if len(items) == 1:
        save_audio(out, *decode(0))
    else:
        digits = len(str(len(items)))
        with atomic_folder(out) as part:
            for index, (name, _) in enumerate(items):
                save_audio(part / f"{index + 1:0{digits}}-{name}.wav", *decode(index))
    for notice in notices:
        say(f"note: {notice}")
    return 0


def _stream(stream: "CachedStream", codes: "np.ndarray", code_rate: float) -> "np.ndarray":
    """Decodes codes int32 [T], pushing one second at a time."""
    import numpy as np

    step = max(int(code_rate), 1)
    waves = []
    for start in range(0, len(codes), step):
        waves.append(stream.push(codes[start : start + step]))
        say(f"{min(start + step, len(codes)) / code_rate:.1f} of {len(codes) / code_rate:.1f} s")
    return np.concatenate([*waves, stream.finish()])
