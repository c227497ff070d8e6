"""Encode recordings into speech codes: 12.5 per second, integers below 16384.

  moss-jax encode QUESTION.wav --model FOLDER -o CODES.jsonl
  moss-jax encode recordings/*.flac --model FOLDER > CODES.jsonl
  cat QUESTION.wav | moss-jax encode - --model FOLDER
  moss-jax encode --manifests CORPUS/asr.jsonl CORPUS/chat.jsonl --model FOLDER -o CODED

Writes a line of JSON per recording, in the given order: {"path": "QUESTION.wav", "seconds": 3.2, "codes": [512, ...]}.
Recordings may have any sample rate, length and number of channels; channels are averaged. docs/audio.md lists the
formats. The codes of a recording do not depend on the others. If a recording cannot be read, nothing is written.
`moss-jax decode` turns codes into audio again. With --manifests, the folder CODED gets the same manifests with codes in
place of recordings; each recording is encoded once. If interrupted, rerun the same command to resume.
"""

import argparse
import json
import sys
from collections.abc import Iterator

from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, max_audio_bytes, say, system_folder
from moss_jax.documents import text_of
from moss_jax.errors import MossError

BATCH_FILES = 32  # recordings that are in memory at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", nargs="*", metavar="AUDIO", help="recordings; - reads one from standard input")
    parser.add_argument("--manifests", nargs="+", metavar="FILE", help="training manifests, instead of recordings")
    add_system_arguments(parser)
    add_audio_limit(parser)
    parser.add_argument(
        "-o",
        "--out",
        metavar="CODES.jsonl",
        help="the file to write (default: standard output); with --manifests, a folder",
    )


def run(args: argparse.Namespace) -> int:
    from moss_jax.audio import read_audio, resample
    from moss_jax.files import atomic_file
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer

    if bool(args.audio) == bool(args.manifests):
        raise MossError("expected either recordings or --manifests")
    limit = max_audio_bytes(args)
    if args.manifests:
        from moss_jax.data.coded import encode_manifests

        if args.out is None:
            raise MossError("--manifests: needs -o FOLDER")
        encode_manifests(args.manifests, system_folder(args), args.out, say, limit)
        return 0
    speech_tokenizer = SpeechTokenizer.load(system_folder(args) / "speech_tokenizer")
    rate = speech_tokenizer.config.sample_rate

    def lines() -> Iterator[str]:
        done = 0.0  # seconds
        for start in range(0, len(args.audio), BATCH_FILES):
            paths = args.audio[start : start + BATCH_FILES]
            waves = []
            for path in paths:
                recording = read_audio(path, max_bytes=limit)
                waves.append(resample(recording.wave, recording.rate, rate))
                for notice in recording.notices:
                    say(f"note: {notice}")
            for path, wave, codes in zip(paths, waves, speech_tokenizer.encode(waves), strict=True):
                done += len(wave) / rate
                seconds = round(len(wave) / rate, 3)
                yield json.dumps({"path": text_of(path), "seconds": seconds, "codes": codes.tolist()}) + "\n"
            count = min(start + BATCH_FILES, len(args.audio))
            say(f"{count} of {len(args.audio)} recordings, {done:.1f} s of audio")

    if args.out is None:
        sys.stdout.write("".join(lines()))  # all at once: nothing is written if a recording cannot be read
        return 0
    with atomic_file(args.out) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(lines())
    return 0
