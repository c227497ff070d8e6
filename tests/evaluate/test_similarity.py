"""The layer-similarity analysis: alignment against brute force, layer outputs against the model's stacks, the verb."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.cli import main
from moss_jax.errors import MossError
from moss_jax.evaluate.alignment import best_match, best_path, cosines
from moss_jax.evaluate.curves import Curves
from moss_jax.evaluate.similarity import layer_outputs, other_text
from moss_jax.speech_lm import LayerSplitModel
from tests.evaluate.conftest import tone

best_path = jax.jit(best_path)
best_match = jax.jit(best_match)


def every_path(speech, text, path=((0, 0),)):
    s, t = path[-1]
    if (s, t) == (speech - 1, text - 1):
        yield path
        return
    for step in ((s + 1, t), (s, t + 1), (s + 1, t + 1)):
        if step[0] < speech and step[1] < text:
            yield from every_path(speech, text, (*path, step))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_path_and_match_equal_brute_force_whatever_the_padding(speech, text, seed):
    rng = np.random.default_rng(seed)
    c = rng.uniform(-1, 1, (7, 6)).astype(np.float32)
    means = [np.mean([c[cell] for cell in path]) for path in every_path(speech, text)]
    costs = [sum(1 - c[cell] for cell in path) for path in every_path(speech, text)]
    assert best_path(c, speech, text) == pytest.approx(means[int(np.argmin(costs))], abs=1e-5)
    assert best_match(c, speech, text) == pytest.approx(c[:speech, :text].max(0).mean(), abs=1e-6)


def test_a_path_finds_the_order():
    rng = np.random.default_rng(0)
    text = rng.standard_normal((6, 32)).astype(np.float32)
    speech = np.repeat(text, 3, 0)
    c = cosines(speech, text)
    assert best_path(c, 18, 6) == pytest.approx(1, abs=1e-5) and best_match(c, 18, 6) == pytest.approx(1, abs=1e-5)
    backwards = cosines(speech[::-1], text)
    assert best_match(backwards, 18, 6) == pytest.approx(1, abs=1e-5) and best_path(backwards, 18, 6) < 0.7


def test_layers_are_those_of_the_model(model):
    config = model.config
    params = model.system.language_model.params
    grid = np.random.default_rng(0).integers(0, 256, (2, 9, 2)).astype(np.int32)
    grid[:, 4:, 0] = config.modality_pad_id
    outputs = layer_outputs(params, grid, config=config)
    assert {name: len(x) for name, x in outputs.items()} == {"shared": 3, "text": 2, "audio": 2}
    call = lambda *args, **kw: LayerSplitModel(config).apply({"params": params}, *args, **kw)  # noqa: E731
    positions = np.broadcast_to(np.arange(9), (2, 9))
    x = call(grid, method="embed")
    shared = call("shared", x, positions, method="block")
    np.testing.assert_allclose(outputs["shared"][-1], shared, atol=1e-5)
    for branch in ("text", "audio"):
        np.testing.assert_allclose(outputs[branch][-1], call(branch, shared, positions, method="block"), atol=1e-5)
    assert not np.allclose(outputs["shared"][0], outputs["shared"][1])


def test_the_floor_is_as_much_text_of_others():
    for lengths in ((3, 9), (5, 2, 4), range(1, 12)):
        text = [np.full((length, 2), i) for i, length in enumerate(lengths)]
        others = other_text(text)
        assert list(map(len, others)) == list(lengths)
        assert all(i not in other for i, other in enumerate(others))
        assert len({int(other[0, 0]) for other in others}) == len(text)  # each begins another floor


def test_where_the_plateau_ends():
    rise = np.array([0.0, 0.5, 0.9, 1.0, 0.95, 0.92])
    values = {"shared": rise, "text": np.array([0.5, 0.2]), "audio": np.array([0.4, 0.1])}
    scores = {(block, "centred", "path"): own[:, None] + np.array([0.01, -0.01]) for block, own in values.items()}
    curves = Curves("m", scores, {key: np.zeros_like(value) for key, value in scores.items()}, {})
    np.testing.assert_allclose(curves.depth().mean(1), [*rise, 0.45, 0.15])
    assert curves.split() == (6, 2) and "after layer 6; 2 layers" in curves.verdict()
    noise = {key: value + np.array([3.0, -3.0]) for key, value in scores.items()}
    noisy = Curves("m", noise, curves.floors, {})
    assert noisy.split() is None and noisy.verdict().startswith("No effect")
    rising = {key: value[::-1] * (0.5 if key[0] == "shared" else 3) for key, value in scores.items()}
    rising = Curves("m", rising, curves.floors, {})
    assert rising.split() is None and "does not fall again" in rising.verdict()


def test_the_verb_on_a_model_that_hears_what_it_reads(model, folder, tmp_path, capsys):
    """Code i gets the embedding of a text id, so that speech that spells the text has the hidden states of the text."""
    import shutil

    from moss_jax.checkpoint import save_tree
    from moss_jax.nn.tree import flatten

    flat = dict(flatten(model.system.language_model.params))
    table = np.array(flat["audio/embed/embedding"])
    texts = ["the cat sat", "a quick fox jumps over", "zebra", "12 34 56"]
    spelled = [model.text_tokenizer.encode(text) for text in texts]
    ids = np.unique(np.concatenate(spelled))  # code i stands for the i-th of them
    table[: len(ids)] = np.asarray(flat["text/embed/embedding"])[ids]
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    (twin / "transformer" / "model.safetensors").unlink()
    save_tree(twin / "transformer", flat | {"audio/embed/embedding": table})
    lines = [
        {"text": text, "codes": np.searchsorted(ids, own).tolist(), "id": f"s{i}"}
        for i, (text, own) in enumerate(zip(texts, spelled, strict=True))
    ]
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = ["similarity", str(file), "--model", str(twin), "--control", str(folder), "-o", str(out)]
    assert main([*arguments, "--heatmaps", "1", "--batch-size", "3"]) == 0
    table = capsys.readouterr().out
    assert "| shared | 3 |" in table and "| audio | 5 |" in table
    ours, control = json.loads((out / "similarity.json").read_text())
    assert ours["sentences"] == ["s0", "s1", "s2", "s3"] and set(ours["blocks"]) == {"shared", "text", "audio"}
    for centre in ("raw", "centred"):
        for score in ("match", "path"):
            first = ours["blocks"]["shared"][centre][score]
            assert first["effect"]["mean"][0] > 0.05 + control["blocks"]["shared"][centre][score]["effect"]["mean"][0]
            effect = np.array(first["score"]["mean"]) - first["floor"]["mean"]
            np.testing.assert_allclose(first["effect"]["mean"], effect, atol=1e-5)
    assert (out / "similarity.png").stat().st_size > 20_000 and (out / "heatmap-s0.png").is_file()


@pytest.mark.slow
def test_batches_do_not_matter_and_recordings_are_encoded(model, tmp_path):
    from moss_jax.evaluate.items import read_sentences
    from moss_jax.evaluate.scoring import Scorer
    from moss_jax.evaluate.similarity import measure

    lines = [
        {"text": f"number {i} " * (i + 1), "audio": tone(tmp_path / f"{i}.wav", 0.3 + i / 4, 200 + 90 * i)}
        for i in range(3)
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sentences = read_sentences(tmp_path / "s.jsonl")
    found = model.codes([sentence.speech for sentence in sentences])
    codes = [found[sentence.speech] for sentence in sentences]
    language_model = model.system.language_model
    one, two = (
        measure(
            "m",
            Scorer(language_model.config, language_model.params, batch_size=size),
            model.text_tokenizer,
            sentences,
            codes,
        )
        for size in (1, 2)
    )
    for key, values in one.scores.items():
        np.testing.assert_allclose(two.scores[key], values, atol=1e-4)
        np.testing.assert_allclose(two.floors[key], one.floors[key], atol=1e-4)


def test_a_plain_qwen3_as_control(model, folder, tmp_path):
    """It is converted once; its text path is unchanged, codes get new vectors."""
    from moss_jax.convert.system import export_text_path
    from moss_jax.evaluate.model import EvaluatedModel, control_folder

    export_text_path(folder, tmp_path / "qwen3", lambda line: None)
    made = []
    messages = []
    for _ in range(2):
        made.append(control_folder(tmp_path / "qwen3", model.code_count, tmp_path / "cache", messages.append))
    assert made[0] == made[1] and len([line for line in messages if "this is done once" in line]) == 1
    control = EvaluatedModel(made[0])
    assert control.code_count == model.code_count
    config = control.config
    params = control.system.language_model.params
    grid = np.random.default_rng(0).integers(0, 256, (1, 9, 2)).astype(np.int32)
    grid[..., 1] = config.audio_pad_id
    ours = layer_outputs(params, grid, config=config)
    theirs = layer_outputs(model.system.language_model.params, grid, config=model.config)
    depth = [np.concatenate([x["shared"], x["text"]]) for x in (ours, theirs)]
    np.testing.assert_allclose(*depth, atol=1e-5)
    with pytest.raises(MossError, match="neither a system folder"):
        control_folder(tmp_path, 256, tmp_path / "cache", messages.append)
