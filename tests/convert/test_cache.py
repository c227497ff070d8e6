"""The cache of conversions: one writer at a time, and the remains of killed processes are removed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moss_jax.convert import resolve, system

# Resolves a pair; stops in the middle of the conversion until a file appears.
RESOLVE = """
import sys, time
from pathlib import Path
from moss_jax.convert import resolve, system

model, codec, cache, gate, begun = sys.argv[1:]
convert = system.import_language_model

def slowly(*arguments):
    Path(begun).touch()
    while not Path(gate).exists():
        time.sleep(0.02)
    return convert(*arguments)

system.import_language_model = slowly
print(resolve.resolve_system(model, codec, Path(cache), lambda line: print(line, file=sys.stderr, flush=True)))
"""


def quiet(line):
    pass


def start(released, cache, gate, started):
    arguments = [released / system.MODEL_FOLDER, released / system.CODEC_FOLDER, cache, gate, started]
    environment = os.environ | {"PYTHONPATH": str(Path(system.__file__).resolve().parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", RESOLVE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("timed out")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.slow
def test_the_second_process_uses_the_result_of_the_first(released, tmp_path):
    cache = tmp_path / "cache"
    gate = tmp_path / "gate"
    first = start(released, cache, gate, tmp_path / "first")
    second = None
    try:
        wait_for((tmp_path / "first").exists)
        second = start(released, cache, gate, tmp_path / "second")
        line = second.stderr.readline()
        assert line == f"note: another process is converting into {cache}; waiting until it has finished\n"
        gate.touch()
        outputs = [process.communicate(timeout=60) for process in (first, second)]
        assert [process.returncode for process in (first, second)] == [0, 0], outputs
        assert outputs[0][0] == outputs[1][0]
        assert outputs[1][1] == ""
        assert not (tmp_path / "second").exists()  # it converted nothing
        assert names(cache) == [Path(outputs[0][0].strip()).name]
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_the_remains_of_a_killed_conversion_are_removed(released, tmp_path):
    cache = tmp_path / "cache"
    process = start(released, cache, tmp_path / "gate", tmp_path / "begun")
    try:
        wait_for((tmp_path / "begun").exists)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    (left,) = names(cache)
    assert left.endswith(".part")
    (cache / "compiled").mkdir()
    (cache / ".mine.part").mkdir()
    result = resolve.resolve_system(released / system.MODEL_FOLDER, released / system.CODEC_FOLDER, cache, quiet)
    assert names(cache) == sorted([".mine.part", "compiled", result.name])


def test_a_conversion_that_is_running_is_not_removed(tmp_path):
    cache = tmp_path / "cache"
    part = cache / ".model-0123456789ab.89abcdef.part"
    part.mkdir(parents=True)
    hold = (
        "import sys; from moss_jax.files import folder_lock\n"
        "with folder_lock(sys.argv[1]):\n    print('locked', flush=True); sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(system.__file__).resolve().parents[2])}
    other = subprocess.Popen(
        [sys.executable, "-c", hold, cache], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    messages = []

    def release(line):
        if not messages:
            assert part.exists()
            other.communicate(b"")
        messages.append(line)

    try:
        assert other.stdout.readline() == b"locked\n"
        target = cache / "other-0123456789ab"

        def convert():
            target.mkdir()
            (target / "system.json").write_text('{"format": "moss-jax-1"}')

        assert resolve.convert_once(target, convert, release) == target
    finally:
        other.kill()
        other.communicate()
    assert messages[0].startswith("note: another process is converting")
    assert names(cache) == ["other-0123456789ab"]


def test_a_finished_conversion_needs_no_lock(tmp_path):
    """It can be used while another process converts something else, and in a cache that cannot be written."""
    from moss_jax.files import folder_lock

    target = tmp_path / "model-0123456789ab"
    target.mkdir()
    (target / "system.json").write_text('{"format": "moss-jax-1"}')
    with folder_lock(tmp_path):
        assert resolve.convert_once(target, lambda: pytest.fail("converted again"), pytest.fail) == target


def test_long_and_relative_folder_names_are_cached(released, tmp_path, monkeypatch):
    codec = released / system.CODEC_FOLDER
    model = shutil.copytree(released / system.MODEL_FOLDER, tmp_path / ("m" * 200))
    long = resolve.resolve_system(model, codec, tmp_path / "cache", quiet)
    assert long.name.startswith("m" * resolve.NAME_LENGTH + "-")
    monkeypatch.chdir(model)
    assert resolve.resolve_system(".", codec, tmp_path / "cache", quiet) == long
