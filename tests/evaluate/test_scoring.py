"""Log-likelihoods equal those computed from the model's logits, for any batch and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.dialogue.grid import speech_rows, text_rows
from moss_jax.evaluate.scoring import Passage, Scorer, log_likelihoods, next_log_probabilities, padded_length
from moss_jax.speech_lm import LayerSplitModel


@pytest.fixture(scope="module")
def passages(model):
    config = model.config
    rng = np.random.default_rng(0)
    made = []
    for text, codes in ((5, 0), (30, 0), (3, 20), (0, 50), (66, 10), (12, 70), (2, 1)):
        rows = [text_rows(rng.integers(0, 256, text), config)]
        rows += [speech_rows(rng.integers(0, 256, codes), config)] if codes else []
        rows = np.concatenate(rows)
        made.append(Passage(rows, rng.random(len(rows)) < 0.7))
    return made


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, grid):
    return LayerSplitModel(config).apply({"params": params}, grid, jnp.arange(grid.shape[1])[None])


def direct(model, passage):
    """The sum from the whole logits, one row after the other, in float64."""
    config = model.config
    rows = passage.rows
    grid = np.random.default_rng(2).integers(0, 256, (1, 100, 2))  # what comes after the rows does not matter
    grid[0, : len(rows)] = rows
    logits = [np.asarray(x) for x in forward(config, model.system.language_model.params, grid)]
    total = 0.0
    for t in range(1, len(rows)):
        if passage.scored[t]:
            channel = int(rows[t, 0] == config.modality_pad_id)
            z = np.asarray(logits[channel][0, t - 1], np.float64)
            total += z[rows[t, channel]] - z.max() - np.log(np.exp(z - z.max()).sum())
    return total


@pytest.mark.slow
def test_sums_equal_a_direct_computation_in_any_batch(model, passages):
    expected = [direct(model, passage) for passage in passages]
    assert len({round(value) for value in expected}) == len(expected)
    language_model = model.system.language_model
    scorer = Scorer(language_model.config, language_model.params, batch_size=4)
    for groups in [[p] for p in passages], [passages[:3], passages[3:]], [[p] for p in passages for _ in range(3)]:
        result = {i: sums for complete in scorer.likelihoods(groups) for i, sums in complete}
        assert sorted(result) == list(range(len(groups)))
        sums = [value for i in range(len(groups)) for value in result[i]]
        repeated = np.repeat(expected, len(sums) // len(expected))
        np.testing.assert_allclose(sums, repeated, rtol=1e-5, atol=1e-3)


def test_one_compilation_for_a_length_and_its_branches(model, passages):
    scorer = Scorer(model.config, model.system.language_model.params, batch_size=4)
    groups = [[passages[0]], [passages[1]], [passages[2]]]
    list(scorer.likelihoods(groups))
    before = log_likelihoods._cache_size()
    list(scorer.likelihoods([*groups, *reversed(groups)] * 3))
    assert log_likelihoods._cache_size() == before


def test_letters_after_a_prompt(model):
    config = model.config
    rng = np.random.default_rng(1)
    prompts = [text_rows(rng.integers(0, 256, n), config) for n in (3, 64, 70, 9, 11)]
    candidates = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10], [1, 2, 3], [4, 4]]
    result = dict(pair for call in model.scorer.choices(prompts, candidates) for pair in call)
    before = next_log_probabilities._cache_size()
    for index, (prompt, ids) in enumerate(zip(prompts, candidates, strict=True)):
        for value, own in zip(result[index], ids, strict=True):
            rows = np.concatenate([prompt, text_rows([own], config)])
            scored = np.arange(len(rows)) == len(prompt)
            assert value == pytest.approx(direct(model, Passage(rows, scored)), abs=1e-3)
    list(model.scorer.choices(prompts * 2, candidates * 2))
    assert next_log_probabilities._cache_size() == before


def test_padded_lengths():
    assert [padded_length(n) for n in (1, 64, 65, 96, 97, 129, 193)] == [64, 64, 96, 96, 128, 192, 256]
    assert all(padded_length(n) % 32 == 0 and n <= padded_length(n) < 1.51 * n + 64 for n in range(1, 4000, 7))
