"""Enrol a voice from a recording of several seconds of clear speech by one person.

  moss-jax voice RECORDING.wav --model FOLDER -o VOICE.safetensors
  moss-jax voice RECORDING.wav --model FOLDER --name anna --default

The file is for `moss-jax chat --voice VOICE.safetensors`. --name stores the voice in the system, for `--voice anna`;
--default makes it the default voice of the system. Enrol only people who have consented.
"""

import argparse
from pathlib import Path

from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, max_audio_bytes, say, system_folder
from moss_jax.errors import MossError
from moss_jax.files import check_name, is_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recording", metavar="RECORDING", help="a recording, or - to read standard input")
    add_system_arguments(parser)
    add_audio_limit(parser)
    parser.add_argument("-o", "--out", metavar="VOICE.safetensors", help="write the voice to this file")
    parser.add_argument("--name", help="store the voice in the system under this name")
    parser.add_argument("--default", action="store_true", help="with --name: make it the default voice of the system")


def run(args: argparse.Namespace) -> int:
    if args.out is None and args.name is None:
        raise MossError("no destination: expected -o VOICE.safetensors, or --name NAME to store it in the system")
    if args.default and args.name is None:
        raise MossError("--default: is used together with --name, which is missing")
    if args.out is not None:
        if not is_folder(Path(args.out).parent):
            raise MossError(f"{args.out}: there is no folder {Path(args.out).parent}, expected an existing one")
        check_name(args.out)
    from moss_jax.audio import check_speech, read_audio
    from moss_jax.audio.source import source_name
    from moss_jax.dialogue.system import System
    from moss_jax.dialogue.voice import save_voice

    system = System(system_folder(args))
    stored = None if args.name is None else system.folder.voice_path(args.name)
    name = source_name(args.recording)
    recording = read_audio(args.recording, max_bytes=max_audio_bytes(args))
    check_speech(recording.wave, recording.rate, name)
    try:
        voice = system.enrol((recording.wave, recording.rate))
    except MossError as error:
        raise MossError(f"{name}: {error}") from error
    for notice in recording.notices:
        say(f"note: {notice}")
    for path in filter(None, (args.out, stored)):
        save_voice(path, voice)
        say(f"{path}: {len(voice.codes)} codes, {len(voice.codes) / system.speech_decoder.config.code_rate:.1f} s")
    if args.default:
        system.folder.set_default_voice(args.name)
    return 0
