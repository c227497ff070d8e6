"""Turn recordings into codes: 12.5 a second, numbers below 16384.

  moss-jax encode QUESTION.wav --model FOLDER -o CODES.jsonl
  moss-jax encode recordings/*.flac --model FOLDER > CODES.jsonl
  cat QUESTION.wav | moss-jax encode - --model FOLDER
  moss-jax encode --manifests CORPUS/asr.jsonl CORPUS/chat.jsonl --model FOLDER -o CODED

One line of JSON for each recording, in the order given: {"path": "QUESTION.wav", "seconds": 3.2, "codes": [512, ...]}.
Recordings of any rate, length and channel count are read (docs/audio.md lists the containers); several channels are
averaged. A recording gets the same codes in any company. When one cannot be read, nothing is written. `moss-jax decode`
turns codes into sound again. With --manifests the folder CODED gets the same manifests with codes in the place of
recordings, each recording encoded once; run the same command again to resume.
"""

import json
import sys

from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, say, system_folder
from moss_jax.errors import MossError

FILES = 32  # read and encoded at a time


def add_arguments(parser):
    parser.add_argument("audio", nargs="*", metavar="AUDIO", help="recordings; - reads one from stdin")
    parser.add_argument("--manifests", nargs="+", metavar="FILE", help="of training data, in place of recordings")
    add_system_arguments(parser)
    add_audio_limit(parser)
    parser.add_argument(
        "-o",
        "--out",
        metavar="CODES.jsonl",
        help="the file to write (default: standard output); a folder with --manifests",
    )


def run(args) -> int:
    from moss_jax.audio import read_audio, resample
    from moss_jax.checkpoint import atomic_file
    from moss_jax.speech_tokenizer.encode import SpeechTokenizer

    if bool(args.audio) == bool(args.manifests):
        raise MossError("expected recordings or --manifests, one of them")
    if args.manifests:
        from moss_jax.data.coded import encode_manifests

        if args.out is None:
            raise MossError("--manifests needs -o FOLDER")
        encode_manifests(args.manifests, system_folder(args), args.out, say, args.max_audio_mib * 2**20)
        return 0
    limit = args.max_audio_mib * 2**20
    speech_tokenizer = SpeechTokenizer.load(system_folder(args) / "speech_tokenizer")
    rate = speech_tokenizer.config.sample_rate

    def lines():
        done = 0.0
        for start in range(0, len(args.audio), FILES):
            paths = args.audio[start : start + FILES]
            waves = []
            for path in paths:
                recording = read_audio(path, max_bytes=limit)
                waves.append(resample(recording.wave, recording.rate, rate))
                for notice in recording.notices:
                    say(f"note: {notice}")
            for path, wave, codes in zip(paths, waves, speech_tokenizer.encode(waves), strict=True):
                done += len(wave) / rate
                yield json.dumps({"path": path, "seconds": round(len(wave) / rate, 3), "codes": codes.tolist()}) + "\n"
            count = min(start + FILES, len(args.audio))
            say(f"{count} of {len(args.audio)} recordings, {done:.1f} s of sound")

    if args.out is None:
        sys.stdout.write("".join(lines()))
        return 0
    with atomic_file(args.out) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(lines())
    return 0
