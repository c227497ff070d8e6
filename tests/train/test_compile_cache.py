"""A run that is started again finds its compiled step: `train` keeps compiled programs as the other verbs do."""

import os
import subprocess
import sys

import pytest

from tests.train import tiny, tones
from tests.train.speech_decoder.test_speech_decoder_runs import data as spoken  # noqa: F401, a fixture

# `moss-jax train`, which prints how many compiled programs were found and how many were not.
COUNTING = """
import collections
import sys
import jax
from moss_jax.cli import main

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **more: events.update([name.rpartition("/")[2]]))
code = main(sys.argv[1:])
print("hits", events["cache_hits"], "misses", events["cache_misses"])
sys.exit(code)
"""


def start(config, tmp_path, *settings, **environment):
    """(hits, misses) of one start."""
    sets = [word for setting in settings for word in ("--set", setting)]
    environment = tiny.environment(MOSS_JAX_CACHE=str(tmp_path / "cache"), **environment)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, "train", "--config", str(config), *sets],
        env=environment,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    return int(words[words.index("hits") + 1]), int(words[words.index("misses") + 1])


def steps_in(folder):
    return sorted(path.name for path in folder.glob("jit_step-*-cache"))


def check(config, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    _, misses = start(config, tmp_path, "steps=2", "save_every=2", "evaluate_every=0", "optimizer.total_steps=40")
    compiled = steps_in(tmp_path / "cache" / "compiled")
    assert misses and len(compiled) == 1
    hits, _ = start(config, tmp_path, "steps=4", "save_every=2", "evaluate_every=0", "optimizer.total_steps=40")
    assert hits and steps_in(tmp_path / "cache" / "compiled") == compiled


@pytest.mark.slow
def test_language_model(tmp_path, monkeypatch):
    data = tiny.write_data(tmp_path / "data")
    check(tiny.write_config(tmp_path / "run.py", data, tmp_path / "run"), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.slow
def test_speech_tokenizer(tmp_path, monkeypatch):
    data = tones.write_data(tmp_path / "data")
    check(tones.write_config(tmp_path / "run.py", data, tmp_path / "run"), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "vocoder"])
def test_speech_decoder(kind, spoken, tmp_path, monkeypatch):  # noqa: F811
    config = tmp_path / "run.py"
    config.write_text(
        f"from tests.train.speech_decoder.test_speech_decoder_runs import {kind}_run\n"
        f"RUN = {kind}_run({str(spoken)!r}, {str(tmp_path / 'run')!r})\n"
    )
    check(config, tmp_path, monkeypatch)


def test_a_cache_folder_named_by_the_user_is_kept(tmp_path):
    code = """
import jax
from moss_jax.compile_cache import enable_compile_cache
enable_compile_cache()
print(jax.config.jax_compilation_cache_dir)
"""
    found = {}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"MOSS_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
    for named in ({}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}):
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=environment | named, capture_output=True, text=True, check=True)
        found[bool(named)] = done.stdout.strip()
    assert found == {False: str(tmp_path / "compiled"), True: str(tmp_path / "mine")}
