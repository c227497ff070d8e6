"""The whole loss of a speech tokenizer is the weighted sum of its parts."""

import jax.numpy as jnp
import pytest

from moss_jax.train.speech_tokenizer.run import Objective
from moss_jax.train.speech_tokenizer.step import loss_of


def test_every_part_of_the_loss_has_its_weight():
    objective = Objective(asr_weight=2.0, mel_weight=3.0, commitment_weight=5.0, commitment_from=10)
    sums = {"asr": (7.0, 7.0), "mel": (22.0, 2.0), "commitment": (39.0, 3.0)}
    loss, parts = loss_of(sums, objective, jnp.int32(10))
    assert {name: float(value) for name, value in parts.items()} == {
        "asr_loss": 1.0,
        "mel_loss": 11.0,
        "commitment_loss": 13.0,
    }
    assert float(loss) == pytest.approx(2 * 1 + 3 * 11 + 5 * 13)
    before, _ = loss_of(sums, objective, jnp.int32(9))
    assert float(before) == pytest.approx(2 * 1 + 3 * 11)
