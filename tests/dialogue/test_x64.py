"""JAX_ENABLE_X64 changes no result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def results(folder: Path, tiny: Path) -> dict:
    """Replies of the bundled system and of a tiny one, as JSON values. `folder` is empty."""
    import moss_jax
    from moss_jax.checkpoint.system_folder import NANO_FOLDER

    nano = moss_jax.load()
    asked = [moss_jax.Turn("user", audio=NANO_FOLDER / "question.wav")]
    written = nano.reply(asked, reply="text")
    spoken = nano.reply(asked, seed=2**32 - 1, max_new_tokens=12)
    drawn = nano.reply(asked, reply="text", temperature=1.5, seed=2**32 - 1, max_new_tokens=8)
    written.conversation.save(folder / "talk.safetensors")
    more = nano.reply(asked, reply="text", conversation=nano.resume(folder / "talk.safetensors"), max_new_tokens=8)
    stream = nano.stream(asked, max_new_tokens=12)
    pieces = [piece.wave for piece in stream]
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    voice = moss_jax.load(tiny).enrol((noise, 16000))
    waves = {"spoken": spoken.wave, "streamed": np.concatenate(pieces), "embedding": voice.embedding}
    return {
        "texts": [written.text, drawn.text, more.text],
        "codes": [spoken.codes.tolist(), stream.reply.codes.tolist(), voice.codes.tolist()],
        "asked": nano.encode([(noise, 16000)])[0].tolist(),
        "fingerprint": nano.language_model.fingerprint,
        "waves": {name: [len(wave), float(np.abs(wave).sum())] for name, wave in waves.items()},
    }


@pytest.mark.slow
def test_the_same_with_64_bits(tmp_path):
    from moss_jax.convert.random_system import init_random

    init_random(tmp_path / "tiny", say=lambda line: None)
    folders = [tmp_path / "ordinary", tmp_path / "x64"]
    for folder in folders:
        folder.mkdir()
    arguments = [str(folders[1]), str(tmp_path / "tiny")]
    run = subprocess.run(
        [sys.executable, "-m", "tests.dialogue.test_x64", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    expected = results(folders[0], tmp_path / "tiny")
    for name, (length, total) in expected.pop("waves").items():
        assert found["waves"][name][0] == length
        assert found["waves"][name][1] == pytest.approx(total, rel=1e-5)
    assert {name: found[name] for name in expected} == expected


if __name__ == "__main__":
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.numpy.zeros(1).dtype == "float64"
    print(json.dumps(results(*map(Path, sys.argv[1:]))))
