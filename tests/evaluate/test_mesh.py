"""Eight devices give the scores of one, in a separate process: `python -m tests.evaluate.test_mesh FOLDER`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags


@pytest.mark.slow
def test_eight_devices_give_the_scores_of_one(folder):
    run = subprocess.run(
        [sys.executable, "-m", "tests.evaluate.test_mesh", str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": flags.devices(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal"]


def main(folder: str) -> None:
    import jax
    import numpy as np

    from moss_jax.dialogue.grid import speech_rows, text_rows
    from moss_jax.dialogue.system import System
    from moss_jax.evaluate.items import ContentPart, Sentence
    from moss_jax.evaluate.model import EvaluatedModel
    from moss_jax.evaluate.scoring import Passage, Scorer
    from moss_jax.evaluate.similarity import measure

    jax.config.update("jax_default_matmul_precision", "highest")
    language_model = System(folder).language_model
    config = language_model.config
    rng = np.random.default_rng(0)
    groups = []
    for length in (3, 9, 30, 12, 20):
        rows = np.concatenate(
            [text_rows(rng.integers(0, 256, length), config), speech_rows(rng.integers(0, 256, 5), config)]
        )
        groups.append([Passage(rows, np.arange(len(rows)) > 1)])
    one = Scorer(config, language_model.params, batch_size=4)
    expected = dict(pair for call in one.likelihoods(groups) for pair in call)
    model = EvaluatedModel(folder, fsdp=2, tensor=2)  # and two copies
    sentences = [Sentence(text, text, ContentPart(codes=(1,))) for text in ("one two three", "four", "five six")]
    codes = [rng.integers(0, 256, n) for n in (9, 4, 7)]
    curves = measure("one", one, language_model.text_tokenizer, sentences, codes)
    assert len(model.scorer.mesh.devices.flatten()) == 8
    result = dict(pair for call in model.scorer.likelihoods(groups) for pair in call)
    np.testing.assert_allclose([result[i] for i in range(5)], [expected[i] for i in range(5)], rtol=1e-5)
    assert model.language_model_hash() == language_model.fingerprint
    ours = measure("eight", model.scorer, model.text_tokenizer, sentences, codes)
    for key, values in curves.scores.items():
        np.testing.assert_allclose(ours.scores[key], values, atol=1e-4)
    print("equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
