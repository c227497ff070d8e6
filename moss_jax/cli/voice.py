"""Enrol a voice from a recording: some seconds of clear speech by one person.

  moss-jax voice RECORDING.wav --model FOLDER -o VOICE.safetensors
  moss-jax voice RECORDING.wav --model FOLDER --name anna --default

The file is for `moss-jax chat --voice VOICE.safetensors`. --name stores the voice in the system, for `--voice anna`;
with --default the system speaks so from now on. Enrol only people who agree to it.
"""

from pathlib import Path

from moss_jax.cli.system_arguments import add_audio_limit, add_system_arguments, say, system_folder
from moss_jax.errors import MossError
from moss_jax.files import check_name, is_folder


def add_arguments(parser):
    parser.add_argument("recording", metavar="RECORDING", help="a recording, or - to read one from stdin")
    add_system_arguments(parser)
    add_audio_limit(parser)
    parser.add_argument("-o", "--out", metavar="VOICE.safetensors", help="the file to write")
    parser.add_argument("--name", help="store the voice in the system under this name")
    parser.add_argument("--default", action="store_true", help="with --name: the voice of replies without --voice")


def run(args) -> int:
    if args.out is None and args.name is None:
        raise MossError("where to: expected -o VOICE.safetensors, or --name NAME to store it in the system")
    if args.default and args.name is None:
        raise MossError("--default: only a stored voice can be the default, give --name too")
    if args.out is not None:
        if not is_folder(Path(args.out).parent):
            raise MossError(f"{args.out}: there is no folder {Path(args.out).parent}, expected a place that exists")
        check_name(args.out)
    from moss_jax.audio import check_speech, read_audio
    from moss_jax.audio.source import source_name
    from moss_jax.dialogue.system import System
    from moss_jax.dialogue.voice import save_voice

    system = System(system_folder(args))
    stored = None if args.name is None else system.folder.voice_path(args.name)
    name = source_name(args.recording)
    recording = read_audio(args.recording, max_bytes=args.max_audio_mib * 2**20)
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
