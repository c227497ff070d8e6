"""The pipeline: same data for any number of processes, exact resume, weights met, and a packed loss equal to the loss
alone."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.bench import Options
from dev.bench import data as bench
from moss_jax.data import Mixture, open_batches, write_examples
from moss_jax.data.batches import GRAIN_READ_AHEAD, GRAIN_READ_THREADS
from moss_jax.data.pipeline import PackedRows
from moss_jax.data.store import Examples
from moss_jax.errors import MossError
from moss_jax.nn.tree import unflatten
from moss_jax.speech_lm import TINY, LayerSplitModel, model_shapes
from tests.data.conftest import random_example

CONTEXT = 48
BATCH = 8
KEYS = ("grid", "positions", "segment_ids", "loss_weights", "source")


@pytest.fixture(scope="module")
def mixture(two_sources):
    return Mixture(
        tuple(
            (name, str(folder), weight)
            for (name, (folder, _)), weight in zip(two_sources.items(), (3.0, 1.0), strict=True)
        ),
        seed=5,
    )


def batches(mixture, **changes):
    return open_batches(mixture, TINY, **{"context": CONTEXT, "batch_size": BATCH} | changes)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(ours, theirs):
    return all((a[key] == b[key]).all() for a, b in zip(ours, theirs, strict=True) for key in KEYS)


def test_the_schema(mixture, two_sources):
    opened = batches(mixture)
    batch = next(opened)
    assert opened.source_names == ("short", "long")
    for key, dtype, shape in (
        ("grid", np.int32, (2,)),
        ("positions", np.int32, ()),
        ("segment_ids", np.int32, ()),
        ("loss_weights", np.float32, (2,)),
        ("source", np.int32, ()),
    ):
        assert batch[key].dtype == dtype and batch[key].shape == (BATCH, CONTEXT, *shape)
    for row in range(BATCH):
        ids = batch["segment_ids"][row]
        positions = batch["positions"][row]
        real = ids > 0
        count = real.sum()
        assert real[:count].all() and not real[count:].any()  # padding is on the right
        assert set(np.diff(ids[:count])) <= {0, 1} and ids[0] == 1
        begins = np.flatnonzero(np.diff(ids[:count], prepend=0))
        assert (positions[begins] == 0).all() and (batch["loss_weights"][row][begins] == 0).all()
        inside = np.setdiff1d(np.arange(count), begins)
        assert (positions[inside] == positions[inside - 1] + 1).all()
        assert (batch["source"][row][:count] >= 0).all() and (batch["source"][row][count:] == -1).all()
        assert (batch["grid"][row][count:] == [TINY.endoftext_id, TINY.audio_pad_id]).all()
        assert not batch["loss_weights"][row][count:].any()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(mixture, processes):
    whole = take(batches(mixture), 12)
    shares = []
    for index in range(processes):
        share = batches(mixture, process_index=index, process_count=processes)
        shares.append(take(share, 12))
        share.close()
    joined = [{key: np.concatenate([part[key] for part in step]) for key in KEYS} for step in zip(*shares, strict=True)]
    assert same(joined, whole)


def test_each_process_reads_only_its_share(mixture, monkeypatch):
    original = Examples.__getitem__
    read = [set() for _ in range(4)]

    def recorded(self, index):
        read[self.about["process"]].add((self.folder.name, int(index)))
        return original(self, index)

    monkeypatch.setattr(Examples, "__getitem__", recorded)
    shares = []
    opened = [batches(mixture, process_index=index, process_count=4) for index in range(4)]
    for index, share in enumerate(opened):
        for rows in share.rows:  # what reads is a copy
            rows.examples.about["process"] = index
        take(share, 2)
        share.close()
        ahead = 2 + GRAIN_READ_AHEAD + GRAIN_READ_THREADS + 1  # batches that may have been read
        needed, allowed = (
            {place for step in range(steps) for place in places(share, step, index, 4)} for steps in (2, ahead)
        )
        assert needed <= set(read[index]) <= allowed
        shares.append(needed)
    assert not set.intersection(*shares)


def places(share, step, index, count):
    """(source, example) of what process `index` must read for a step, from the mixture's order."""
    import grain

    mixed = grain.MapDataset.mix([grain.MapDataset.source(Places(rows)) for rows in share.rows], [3.0, 1.0])
    each = BATCH // count
    return [place for row in range(each) for place in mixed[step * BATCH + index * each + row]]


class Places:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        epoch, row = self.rows.locate(index)
        return [(self.rows.examples.folder.name, example) for example, _, _ in self.rows.plan(epoch).row(row)]


@pytest.fixture(scope="module")
def first_steps(mixture):
    return take(batches(mixture), 60)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_restored_state_continues_exactly(mixture, first_steps, jumps):
    opened = batches(mixture)
    for step, more in jumps:
        before = batches(mixture)
        before.skip_to(step)
        take(before, more)
        state = before.get_state()
        before.close()
        opened.set_state(state)
        assert opened.step == step + more
        assert same(take(opened, 3), first_steps[step + more : step + more + 3])
    opened.close()


def test_a_state_goes_on_with_another_number_of_processes_and_workers(mixture, first_steps):
    one = batches(mixture)
    take(one, 7)
    for index, workers in enumerate((2, 0)):
        half = batches(mixture, process_index=index, process_count=2, workers=workers)
        half.set_state(one.get_state())
        share = slice(index * BATCH // 2, (index + 1) * BATCH // 2)
        expected = [{key: batch[key][share] for key in KEYS} for batch in first_steps[7:10]]
        assert same(take(half, 3), expected)
        half.close()


def test_an_epoch_has_every_row_once_and_the_next_one_another_order(two_sources):
    folder, examples = two_sources["long"]
    rows = PackedRows(folder, TINY, CONTEXT, seed=3, index=0)
    expected = sorted(
        tuple(map(tuple, example.grid[start : start + CONTEXT]))
        for example in examples
        for start in range(0, len(example.grid), CONTEXT)
    )
    orders = []
    index = 0
    for epoch in range(3):
        segments = []
        count = 0
        for _ in range(len(rows.plan(epoch))):
            row = rows[index]
            assert rows.locate(index)[0] == epoch
            for segment in range(1, row["segment_ids"].max() + 1):
                segments.append(tuple(map(tuple, row["grid"][row["segment_ids"] == segment])))
            count += int((row["segment_ids"] > 0).sum())
            index += 1
        assert sorted(segments) == expected and count == sum(len(example.grid) for example in examples)
        orders.append(segments)
    assert orders[0] != orders[1] != orders[2]


def test_the_seed_changes_the_order(mixture):
    other = Mixture(mixture.sources, seed=6)
    assert same(take(batches(mixture), 2), take(batches(mixture), 2))
    assert not same(take(batches(mixture), 2), take(batches(other), 2))


@settings(deadline=None, max_examples=10)
@given(st.floats(0.2, 5), st.floats(0.2, 5))
def test_the_weights_are_met(two_sources, one, other):
    sources = (("short", str(two_sources["short"][0]), one), ("long", str(two_sources["long"][0]), other))
    opened = open_batches(Mixture(sources), TINY, context=CONTEXT, batch_size=50)
    steps = take(opened, 4)
    opened.close()
    for count in range(1, 5):
        drawn = np.concatenate([batch["source"][:, 0] for batch in steps[:count]])
        assert abs((drawn == 0).mean() - one / (one + other)) <= 1 / len(drawn) + 0.01


MODEL = LayerSplitModel(TINY)


@jax.jit
def weighed_losses(params, grid, positions, segment_ids, weights):
    """Losses [B, T, 2] times weights; the logits of row t-1 against row t."""
    logits = MODEL.apply({"params": params}, grid, positions, segment_ids)
    losses = []
    for channel, values in enumerate(logits):
        picked = jnp.take_along_axis(jax.nn.log_softmax(values[:, :-1]), grid[:, 1:, channel, None], -1)[..., 0]
        losses.append(jnp.pad(-picked, ((0, 0), (1, 0))))
    return jnp.stack(losses, -1) * weights


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    return unflatten(
        {
            path: jnp.asarray(path.endswith("scale") + 0.1 * random.normal(size=leaf.shape), jnp.float32)
            for path, leaf in model_shapes(TINY).items()
        }
    )


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10_000))
def test_a_document_has_the_same_loss_packed_and_alone(params, tmp_path_factory, seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 12))
    examples = [random_example(random, int(n), str(i)) for i, n in enumerate(random.integers(3, CONTEXT, count))]
    folder = tmp_path_factory.mktemp("packed") / "data"
    write_examples(folder, examples, TINY)
    rows = PackedRows(folder, TINY, CONTEXT, seed, 0)
    found = {}
    for index in range(len(rows.plan(0))):
        row = rows[index]
        losses = np.asarray(weighed_losses(params, *(row[key][None] for key in KEYS[:4])))[0]
        for segment, (example, start, _) in enumerate(rows.plan(0).row(index), 1):
            assert start == 0
            found[example] = losses[row["segment_ids"] == segment].sum(0)
        assert (losses[row["segment_ids"] == 0] == 0).all()
    assert sorted(found) == list(range(count))
    for number, example in enumerate(examples):
        n = len(example.grid)
        padded = np.zeros((1, CONTEXT, 2), np.int32), np.zeros((1, CONTEXT, 2), np.float32)
        padded[0][0, :n] = example.grid
        padded[1][0, :n] = example.loss_weights
        ids = np.arange(CONTEXT)[None]
        alone = weighed_losses(params, padded[0], ids, (ids < n).astype(np.int32), padded[1])
        np.testing.assert_allclose(found[number], np.asarray(alone)[0].sum(0), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 is not a multiple of the 4 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2, expected 0 to 1"),
        ({"context": 1}, "context is 1, expected at least 2"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_numbers_that_do_not_fit(mixture, change, message):
    with pytest.raises(MossError, match=message):
        batches(mixture, **change)


def test_bad_mixtures(two_sources, tmp_path):
    folder = str(two_sources["short"][0])
    for sources, message in (
        ((), "no source"),
        ((("a", folder, 0.0),), "weight 0.0, expected a number > 0"),
        ((("a", folder, 1.0), ("a", folder, 1.0)), "expected different names"),
    ):
        with pytest.raises(MossError, match=message):
            Mixture(sources)
    with pytest.raises(MossError, match=r"no source.json in it, expected a data set"):
        batches(Mixture((("a", str(tmp_path), 1.0),)))


def test_another_vocabulary_is_refused(mixture):
    other = dataclasses.replace(TINY, audio_vocab_size=128, eosp_id=100)
    with pytest.raises(
        MossError, match=r"made for another vocabulary .audio_vocab_size is 96, the model's is 128"
    ) as error:
        open_batches(mixture, other, context=CONTEXT, batch_size=BATCH)
    assert "eosp_id is 80, the model's is 100" in str(error.value)


def test_states_of_other_data_are_refused(mixture):
    opened = batches(mixture)
    other = batches(Mixture(mixture.sources, seed=9))
    for state, message in (
        (other.get_state(), "other data, seed"),
        ("[]", "invalid data state"),
        ('{"step": 1}', "invalid data state"),
    ):
        with pytest.raises(MossError, match=message):
            opened.set_state(state)
    with pytest.raises(MossError, match="step -1"):
        opened.skip_to(-1)
    assert json.loads(opened.get_state())["step"] == 0


def test_worker_processes_do_not_start_an_accelerator(mixture, tmp_path):
    """A worker that started JAX would take the TPU away from the one who trains."""
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "from moss_jax.data import Mixture, open_batches\n"
        "from moss_jax.speech_lm import TINY\n"
        "if __name__ == '__main__':\n"
        f"    it = open_batches(Mixture({mixture.sources!r}, 5), TINY, context=48, batch_size=8, workers=1)\n"
        "    print(next(it)['grid'].sum()); it.close()\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "nonsense", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == next(batches(mixture))["grid"].sum()


def test_the_bench_runs():
    row = next(bench.run(Options(size="tiny", repeats=1)))
    assert re.search(r"^[\d,]+ packed tokens per second, [\d,]+ per second and core$", row.note) and len(row.ours) == 1
