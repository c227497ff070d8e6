"""Data sets on disk: what is written is read again, and damage is reported."""

import json
import pickle
import shutil

import numpy as np
import pytest

from moss_jax.data import Example, Mixture, open_batches, write_examples
from moss_jax.data.store import Examples
from moss_jax.errors import MossError
from moss_jax.speech_lm import TINY
from tests.data.conftest import random_example


def test_what_is_written_comes_back_in_order(tmp_path):
    random = np.random.default_rng(1)
    examples = [random_example(random, int(n), f"é{n}") for n in random.integers(3, 40, 70)]
    write_examples(tmp_path / "data", iter(examples), TINY, kind="chat", examples_per_shard=30)
    data = pickle.loads(pickle.dumps(Examples(tmp_path / "data", TINY)))
    assert len(data) == 70 and data.about["kind"] == "chat" and len(list((tmp_path / "data").glob("*of-00003"))) == 3
    for i, example in enumerate(examples):
        assert data[i].name == example.name and data.lengths[i] == len(example.grid)
        assert (data[i].grid == example.grid).all() and (data[i].loss_weights == example.loss_weights).all()
    with pytest.raises(MossError, match="already exists"):
        write_examples(tmp_path / "data", examples, TINY)


def test_what_is_no_example_is_not_written(tmp_path):
    good = random_example(np.random.default_rng(0), 5, "good")
    far = Example(good.grid + np.int32(TINY.text_vocab_size), good.loss_weights, "far")
    for examples, message in (
        ([], "no example to write"),
        ([good, far], "example 'far': its ids do not fit the vocabularies of 320 and 96"),
        ([Example(good.grid[:0], good.loss_weights[:0])], r"grid \[0, 2\] int32"),
    ):
        with pytest.raises(MossError, match=message):
            write_examples(tmp_path / "data", examples, TINY)
        assert not list(tmp_path.iterdir())


SHARD = "examples-train.array_record-00001-of-00003"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / SHARD).unlink(), f"1 shard files are missing\n.*{SHARD}"),
        (lambda at: (at / "lengths.npy").unlink(), "cannot be opened"),
        (lambda at: (at / "features.json").unlink(), "cannot be opened"),
        (
            lambda at: np.save(at / "lengths.npy", np.ones(5, np.int32)),
            "90 examples and 5 lengths, its source.json says 90",
        ),
        (lambda at: (at / "source.json").write_text(json.dumps({"format": "x"})), "format is 'x', expected"),
    ],
)
def test_damage_is_reported(two_sources, tmp_path, damage, message):
    folder = tmp_path / "data"
    shutil.copytree(two_sources["short"][0], folder)
    damage(folder)
    with pytest.raises(MossError, match=message):
        Examples(folder, TINY)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_shard_is_reported_when_it_is_read(two_sources, tmp_path, workers):
    folder = tmp_path / "data"
    shutil.copytree(two_sources["short"][0], folder)
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    batches = open_batches(Mixture((("short", str(folder), 1.0),)), TINY, context=48, batch_size=8, workers=workers)
    with pytest.raises(MossError, match=r"data: example \d+ cannot be read"):
        for _ in range(40):
            next(batches)
    batches.close()
