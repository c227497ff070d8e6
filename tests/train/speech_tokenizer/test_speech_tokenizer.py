"""Training of the speech tokenizer: what a step does, what a run leaves, that it resumes exactly and exports itself."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.cli import main
from moss_jax.data.clips import ClipBatches, ClipOrder, Clips
from moss_jax.errors import MossError
from moss_jax.nn.quantize import ema_update, new_codebook
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.progress import silent
from moss_jax.sharding import make_mesh
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.speech_tokenizer.encoder import Encoder
from moss_jax.speech_tokenizer.stream import LogMelStream
from moss_jax.train import loop, tasks
from moss_jax.train.run_file import load_run, override, read_run
from moss_jax.train.speech_tokenizer.step import log_mel, perplexity
from moss_jax.train.speech_tokenizer.units import UNKNOWN, Units
from tests.train import tiny, tones


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Every run here compiles the same few programs: once is enough."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tones.write_data(tmp_path_factory.mktemp("tones") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run and its progress lines."""
    folder = tmp_path_factory.mktemp("whole")
    lines = []
    run = load_run(tones.write_config(folder / "run.py", data, folder / "run"))
    assert loop.train(run, lines.append) == loop.DONE
    return run, lines


def entries(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


@pytest.mark.long
@pytest.mark.slow
def test_the_files_of_a_run(whole, tmp_path, capsys):
    run, lines = whole
    steps = entries(run.folder)
    evaluations = entries(run.folder, "evaluations.jsonl")
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4] and [e["step"] for e in evaluations] == [4]
    for key in ("asr_loss", "mel_loss", "commitment_loss", "perplexity", "code_use", "grad_norm"):
        assert all(np.isfinite(entry[key]) for entry in steps)
    assert steps[-1]["asr_loss"] < 0.6 * steps[0]["asr_loss"] and steps[-1]["mel_loss"] < steps[1]["mel_loss"]
    # Commitment counts from the third batch on.
    parts = [entry["loss"] - entry["asr_loss"] - entry["mel_loss"] for entry in steps]
    assert abs(parts[1]) < 1e-5 < 0.2 * steps[2]["commitment_loss"] < parts[2]
    assert evaluations[-1]["words"] == sum(
        len(json.loads(line)["text"].split()) for line in Path(run.held_out[0]).read_text().splitlines()
    )
    assert any("ctc over words" in line for line in lines) and any("wer" in line for line in lines)
    assert read_run(run.folder) == run and override(run, ["objective.mel_weight=2"]).objective.mel_weight == 2.0
    capsys.readouterr()
    assert main(["eval", "tokenizer", run.folder, *run.held_out]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert f"| {evaluations[-1]['words']} | {100 * evaluations[-1]['wer']:.1f} |" in row
    assert main(["plot", run.folder, "-o", str(tmp_path / "curves.png")]) == 0
    assert main(["export", run.folder, "--step", "2", "-o", str(tmp_path / "first")]) == 0
    assert main(["export", run.folder, "-o", str(tmp_path / "last")]) == 0
    last, first = ((tmp_path / name / "speech_tokenizer/model.safetensors").read_bytes() for name in ("last", "first"))
    assert last == (Path(run.folder) / "exports/4/speech_tokenizer/model.safetensors").read_bytes() != first


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_lost_its_last_steps_repeats_them_exactly(whole, tmp_path):
    run, _ = whole
    again = replace(run, folder=str(tmp_path / "again"))
    shutil.copytree(run.folder, again.folder)
    for part in ("checkpoints/4", "exports/4"):
        shutil.rmtree(f"{again.folder}/{part}")
    lines = []
    assert loop.train(again, lines.append) == loop.DONE and any("resuming after step 2" in line for line in lines)
    timed = ("seconds", "share", "memory", "tokens_per")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        one, other = (
            [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in entries(folder, name)]
            for folder in (run.folder, again.folder)
        )
        assert one == other
    one, other = (Path(f, "exports/4/speech_tokenizer/model.safetensors") for f in (run.folder, again.folder))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.long
@pytest.mark.slow
def test_the_export_gives_the_codes_of_training_offline_and_streaming(whole):
    run, _ = whole
    mesh = make_mesh(devices=jax.devices()[:1])
    task, parameters = tasks.prepare(run, mesh, silent)
    state = jax.jit(task.new_state)(parameters)
    task.export(state, Path(run.folder) / "untrained")
    codebook = state.extra["codebook"]
    encoder = unflatten(state.params)["encoder"] | {"codebook": codebook}
    tokenizer = SpeechTokenizer.load(Path(run.folder) / "untrained/speech_tokenizer")
    feed = task.feed()
    seen = set()
    for _ in range(2):
        batch = next(feed)
        frames, lengths = log_mel(run.model, batch)
        codes = np.asarray(Encoder(run.model).apply({"params": encoder}, frames, method="vectors")[1])
        for row, clip in enumerate(np.asarray(batch["clip"])):
            expected = codes[row, : lengths[row]]
            (found,) = tokenizer.encode([task.clips.wave(clip)])
            np.testing.assert_array_equal(found, expected)
            stream = LogMelStream(run.model, tokenizer.params, chunk=1)
            alone = np.asarray(frames[row, : int(lengths[row]) * run.model.frames_per_code])
            streamed = [stream.push(alone[i : i + 7]) for i in range(0, len(alone), 7)]
            np.testing.assert_array_equal(np.concatenate([*streamed, stream.finish()]), expected)
            seen |= set(expected.tolist())
    feed.close()
    assert len(seen) > 1


def test_the_codebook_follows_its_vectors_and_unused_codes_restart():
    update = partial(ema_update, max_decay=0.75, restart_below=0.3)
    random = np.random.default_rng(0)
    vectors = random.normal(size=(2, 5, 3)).astype(np.float32)
    codes = np.array([[0, 0, 1, 1, 3], [0, 1, 1, 3, 3]])
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    book = {
        "codebook": random.normal(size=(4, 3)).astype(np.float32),
        "count": np.array([2.0, 1.0, 0.5, 1.0]),
        "sum": random.normal(size=(4, 3)).astype(np.float32),
        "age": np.float32(1000),
    }
    found = update(book, jnp.asarray(vectors), jnp.asarray(codes), jnp.asarray(valid), jax.random.key(0))
    chosen = np.array([3, 3, 0, 1])
    count = 0.75 * book["count"] + 0.25 * chosen
    total = np.stack([vectors[valid & (codes == code)].sum(0) for code in range(4)])
    sums = 0.75 * book["sum"] + 0.25 * total
    alive = [0, 1, 3]  # code 2 has a count of 0.375, less than 0.3 of the usual 7 / 4
    np.testing.assert_allclose(found["count"][np.array(alive)], count[alive], rtol=1e-6)
    np.testing.assert_allclose(found["codebook"][np.array(alive)], (sums / count[:, None])[alive], rtol=1e-5)
    assert found["count"][2] == 7 / 4 and any(np.allclose(found["codebook"][2], row) for row in vectors[valid])
    fresh = update(
        new_codebook(jnp.asarray(book["codebook"]), False),
        jnp.asarray(vectors),
        jnp.asarray(codes),
        jnp.asarray(valid),
        jax.random.key(1),
    )
    assert all(any(np.allclose(row, other) for other in vectors[valid]) for row in fresh["codebook"])
    early = update(book | {"age": np.float32(2)}, *map(jnp.asarray, (vectors, codes, valid)), jax.random.key(0))
    assert early["count"][0] == pytest.approx(3 / 12 * 2 + 9 / 12 * 3)  # over a tenth of the steps, not over four
    assert perplexity(jnp.ones(7)) == pytest.approx(7) and perplexity(jnp.eye(7)[0]) == pytest.approx(1)


@pytest.mark.long
@pytest.mark.slow
def test_the_gradient_passes_the_quantiser_and_padding_has_none(whole):
    run, _ = whole
    task, parameters = tasks.prepare(run, make_mesh(devices=jax.devices()[:1]), silent)
    state = jax.jit(task.new_state)(parameters)
    clips = task.clips
    batch = dict(next(ClipBatches(clips, task.units, 4, 0)))

    def loss(params, batch):
        sums = task.recogniser.sums(params, state.extra["codebook"], batch)
        return sums["asr"][0] + sums["mel"][0]

    one = jax.jit(jax.grad(loss))(state.params, batch)
    assert all(float(jnp.abs(one[path]).max()) > 0 for path in one if path != "encoder/layers/k/kernel")
    louder = dict(batch, wave=np.array(batch["wave"]), labels=np.array(batch["labels"]))
    for row in range(4):
        padded = -(-batch["samples"][row] // run.model.samples_per_code) * run.model.samples_per_code
        louder["wave"][row, padded:] = 0.5
        louder["labels"][row, batch["label_count"][row] :] = 1
    other = jax.jit(jax.grad(loss))(state.params, louder)
    for path in one:
        np.testing.assert_allclose(other[path], one[path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_an_epoch_has_every_clip_once_and_any_step_can_be_next(data):
    clips = Clips([data / "train.jsonl"], tones.RATE, (0.8, 1.6), tones.MODEL.samples_per_code)
    units = Units(clips.texts, "words", 10)
    order = ClipOrder(clips.bucket, 4, seed=3)
    batches = [order.batch(step) for step in range(order.per_epoch)]
    kept = np.concatenate([members[weights > 0] for members, weights in batches])
    assert sorted(kept) == list(range(18)) and all(len(set(clips.bucket[m])) == 1 for m, _ in batches)
    assert not all(np.array_equal(a[0], order.batch(order.per_epoch + i)[0]) for i, a in enumerate(batches))
    everything = ClipBatches(clips, units, 4, 3)
    halves = [ClipBatches(clips, units, 4, 3, index, 2, workers=0) for index in range(2)]
    found = [next(everything) for _ in range(7)]
    for half in halves:
        half.skip_to(5)
    parts = list(map(next, halves))
    for name, value in found[5].items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
    state = everything.get_state()
    everything.skip_to(0)
    np.testing.assert_array_equal(next(everything)["wave"], found[0]["wave"])
    everything.set_state(state)
    assert everything.step == 7
    with pytest.raises(MossError, match="other data"):
        ClipBatches(clips, units, 4, 5).set_state(state)
    shorter = Clips([data / "train.jsonl"], tones.RATE, (0.8,), 1280)
    assert shorter.skipped + len(shorter) == 18 and shorter.skipped
    for batches in (everything, *halves):
        batches.close()


def test_units():
    units = Units(["One two.", "One, three!"], "words", 4)
    assert units.names == ["", "<unknown>", "one", "three"] and units("three TWO one") == [3, UNKNOWN, 2]
    assert units.text([2, 3]) == "one three"
    letters = Units(["ab a"], "characters", 9)
    assert letters.text(letters("A b")) == "a b"


@pytest.mark.long
@pytest.mark.slow
def test_the_attention_head_learns_to_end(data, tmp_path):
    run = load_run(tones.write_config(tmp_path / "run.py", data, tmp_path / "run"))
    objective = replace(run.objective, head="attention", decoder_layers=1, max_units=16)
    run = replace(run, objective=objective, buckets=(1.6,), steps=2, save_every=2, evaluate_every=2)
    assert loop.train(run, lambda line: None) == loop.DONE
    (evaluation,) = entries(run.folder, "evaluations.jsonl")
    assert evaluation["wer"] > 0 and evaluation["asr_loss"] < 1.5 * np.log(6)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, says",
    [
        (["objective.head=rnn"], "head is 'rnn', expected one of ctc, attention"),
        (["objective.units=whisper"], "are for the head 'attention'"),
        (["buckets=(3.0,)"], "expected at most a segment of the model, 1.6 s"),
        (["data=()"], "data has no manifest"),
        (["init=nowhere"], "nowhere: no config.json"),
        (["model.quantize_vocab_size=14"], "of another architecture (quantize_vocab_size is 12, this run's is 14)"),
        (["objective.layers=2"], "of another objective (layers is 1, this run's is 2)"),
    ],
)
def test_bad_input_is_one_line(whole, settings, says):
    with pytest.raises(MossError) as caught:
        loop.train(override(whole[0], settings), lambda line: None)
    assert says in str(caught.value).partition("\n")[0]


def test_nano_has_its_size():
    from moss_jax.recipes.nano.sizes import SPEECH_TOKENIZER
    from moss_jax.speech_tokenizer.encoder import encoder_shapes

    assert 1e6 < sum(np.prod(shape.shape) for shape in encoder_shapes(SPEECH_TOKENIZER).values()) < 1.5e6
    assert SPEECH_TOKENIZER.code_rate == 12.5


@pytest.mark.long
@pytest.mark.slow
def test_rows_over_two_devices_give_the_same_losses(whole, data, tmp_path):
    run, _ = whole
    config = tones.write_config(tmp_path / "run.py", data, tmp_path / "two")
    done = tiny.run(config, "mesh.data=2", "mesh.fsdp=1", "held_out=()", devices=2)
    assert done.returncode == 0, done.stderr
    one, two = ([entry["loss"] for entry in entries(folder)] for folder in (run.folder, tmp_path / "two"))
    np.testing.assert_allclose(two, one, rtol=2e-4)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_can_start_from_a_speech_tokenizer(whole, tmp_path):
    run, _ = whole
    exported = Path(run.folder) / "exports/4"
    task, parameters = tasks.prepare(replace(run, init=str(exported)), make_mesh(devices=jax.devices()[:1]), silent)
    state = jax.jit(task.new_state)(parameters)
    expected = flatten(SpeechTokenizer.load(exported / "speech_tokenizer").params)
    np.testing.assert_array_equal(state.extra["codebook"], expected["codebook"])
    np.testing.assert_array_equal(state.params["encoder/conv1/kernel"], expected["conv1/kernel"])
    assert float(state.extra["count"].min()) > 0  # its codes are alive
