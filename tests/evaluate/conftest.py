"""A tiny random system, recordings of tones, and a judge command."""

import sys

import numpy as np
import pytest
import soundfile

from moss_jax.convert.random_system import init_random
from moss_jax.evaluate.model import EvaluatedModel

JUDGE = """import sys, soundfile
wave, rate = soundfile.read(sys.argv[1])
open(sys.argv[2], "a").write(sys.argv[1] + "\\n")
print("I think it is Paris." if len(wave) / rate > 0.5 else "a short one")
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("systems") / "tiny"
    init_random(path, say=lambda line: None)
    return path


@pytest.fixture(scope="session")
def model(folder):
    return EvaluatedModel(folder, batch_size=4)


@pytest.fixture
def judge_command(tmp_path):
    """A command line, and the file in which it writes down what it was given."""
    program = tmp_path / "judge.py"
    judged_log = tmp_path / "judged.txt"
    program.write_text(JUDGE)
    return f"{sys.executable} {program} {{wav}} {judged_log}", judged_log


def tone(path, seconds, pitch=220):
    time = np.arange(int(16000 * seconds)) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time), 16000)
    return path.name
