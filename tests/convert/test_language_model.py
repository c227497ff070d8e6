"""Import and export of the released language model and of Qwen3."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moss_jax.checkpoint import load_tree, open_tensors, save_tensors
from moss_jax.convert.language_model import export_language_model, import_language_model
from moss_jax.convert.qwen3 import export_qwen3, import_qwen3
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.config import TINY
from tests.convert.checkpoints import read_tensors, same_tensors, write_language_model, write_qwen3


def quiet(line):
    pass


def test_released_round_trip(tmp_path):
    tensors = write_language_model(tmp_path / "released")
    messages = []
    config = import_language_model(tmp_path / "released", tmp_path / "system", messages.append)
    assert config == TINY.__class__(**{**TINY.__dict__, "dtype": "bfloat16", "param_dtype": "bfloat16"})
    ours = flatten(load_tree(tmp_path / "system" / "transformer", model_shapes(config)))
    name = "model.text_block.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(ours["text/layers/mlp/up/kernel"][1], tensors[name].T)
    (tmp_path / "again").mkdir()
    export_language_model(tmp_path / "system", tmp_path / "again", quiet)
    same_tensors(read_tensors(tmp_path / "again"), tensors)
    for file in ("config.json", "tokenizer.json", "generation_config.json", "modeling.py"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "released" / file).read_bytes()
    assert messages == []


def test_a_changed_config_is_exported(tmp_path):
    write_language_model(tmp_path / "released")
    import_language_model(tmp_path / "released", tmp_path / "system", quiet)
    path = tmp_path / "system" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e5}))
    (tmp_path / "again").mkdir()
    export_language_model(tmp_path / "system", tmp_path / "again", quiet)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("released", "again"))
    assert after == before | {"rope_theta": 5e5}


def test_unknown_config_keys_are_reported_and_kept(tmp_path):
    write_language_model(tmp_path / "released")
    _change(tmp_path / "released", emotion_vocab_size=7)
    messages = []
    import_language_model(tmp_path / "released", tmp_path / "system", messages.append)
    assert "emotion_vocab_size" in messages[-1]
    assert json.loads((tmp_path / "system/carried/model/config.json").read_text())["emotion_vocab_size"] == 7


def _change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v != "DELETE"}))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"id": 288', '"id": 289', 1))


SHARD = "model-00002-of-00003.safetensors"
DAMAGE = {
    "missing shard": (lambda f: (f / SHARD).unlink(), f"1 shard is missing: {SHARD}"),
    "shard cut in half": (lambda f: _cut(f / SHARD), "model-00002-of-00003.safetensors: cut short"),
    "missing config key": (lambda f: _change(f, head_dim="DELETE"), "missing: head_dim"),
    "wrong hidden size": (lambda f: _change(f, hidden_size=48), "tensors do not fit the model its config describes"),
    "one layer more": (lambda f: _change(f, num_shared_layers=4), "num_hidden_layers = 5, but 6"),
    "heads": (lambda f: _change(f, num_key_value_heads=3), "4 attention heads do not divide into 3"),
    "another model": (lambda f: _change(f, attention_bias=True), "attention_bias = True"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "special ids": (_tokenizer, "text tokenizer and config contradict"),
    "id outside": (lambda f: _change(f, eosp_token_id=96), "eosp_id is 96, expected an id below the vocabulary's 96"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_release_is_refused(tmp_path, kind):
    folder = tmp_path / "released"
    write_language_model(folder)
    if kind == "special ids":
        _change(folder, im_start_token_id=288)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(MossError, match=message) as caught:
        import_language_model(folder, tmp_path / "system", quiet)
    assert "released" in str(caught.value).splitlines()[0] or "transformer config" in str(caught.value)


def test_unmapped_missing_and_misshapen_tensors_are_reported_together(tmp_path):
    from tests.convert.checkpoints import write_shards

    folder = tmp_path / "released"
    tensors = write_language_model(folder)
    tensors["model.surprise.weight"] = np.zeros(3, np.float32)
    del tensors["model.text_norm.weight"]
    tensors["audio_lm_head.weight"] = tensors["audio_lm_head.weight"][:, :5].copy()
    write_shards(folder, tensors, 3)
    with pytest.raises(MossError) as caught:
        import_language_model(folder, tmp_path / "system", quiet)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["misshapen", "missing", "unmapped"]


def test_full_size_names_and_shapes():
    """All 446 names of the released model and 399 of Qwen3-8B, with their shapes, from our parameters and back."""
    from moss_jax.convert.tables import qwen3, speech_lm
    from moss_jax.speech_lm.config import MOSS_SPEECH_8B, QWEN3_8B

    released = speech_lm.table(MOSS_SPEECH_8B).shapes(model_shapes(MOSS_SPEECH_8B))
    assert len(released) == 446 and sum(np.prod(shape) for shape in released.values()) == 9_095_694_336
    blocks = {"shared": 32, "text": 4, "audio": 4}
    layers = {f"model.{block}_block.layers.{i}." for block, count in blocks.items() for i in range(count)}
    parts = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "mlp.gate_proj": (12288, 4096),
        "mlp.up_proj": (12288, 4096),
        "mlp.down_proj": (4096, 12288),
        "input_layernorm": (4096,),
        "post_attention_layernorm": (4096,),
    }
    others = {
        "model.embed_tokens": (151680, 4096),
        "text_lm_head": (151680, 4096),
        "model.audio_embed": (16512, 4096),
        "audio_lm_head": (16512, 4096),
        "model.text_norm": (4096,),
        "model.audio_norm": (4096,),
    }
    expected = {f"{layer}{part}.weight": shape for layer in layers for part, shape in parts.items()}
    assert released == expected | {f"{name}.weight": shape for name, shape in others.items()}
    plain = qwen3.table(QWEN3_8B).shapes(model_shapes(QWEN3_8B))
    assert len(plain) == 399 and plain["lm_head.weight"] == (151936, 4096)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", [None, 2])
def test_qwen3_round_trip(tmp_path, tied, split):
    tensors, _ = write_qwen3(tmp_path / "qwen", tied)
    config = import_qwen3(tmp_path / "qwen", tmp_path / "system", split, codes=80)
    branch = 1 if split is None else split
    assert (config.num_shared_layers, config.num_modality_layers) == (5 - branch, branch)
    assert (config.text_vocab_size, config.audio_vocab_size, config.eosp_id) == (384, 128, 80)
    assert (config.sosp_id, config.modality_pad_id) == (TINY.sosp_id, TINY.modality_pad_id)
    ours = flatten(load_tree(tmp_path / "system" / "transformer", model_shapes(config)))
    last = tensors["model.layers.4.mlp.down_proj.weight"].T
    for name in ("text", "audio"):
        np.testing.assert_array_equal(ours[f"{name}/layers/mlp/down/kernel"][-1], last)
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    np.testing.assert_array_equal(ours["text/head/kernel"], head[:384].T)
    assert 0.015 < float(np.asarray(ours["audio/embed/embedding"], np.float32).std()) < 0.025
    (tmp_path / "again").mkdir()
    export_qwen3(tmp_path / "system", tmp_path / "again")
    same_tensors(read_tensors(tmp_path / "again"), tensors)
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "qwen/config.json").read_bytes()


def test_qwen3_random_audio_branch(tmp_path):
    write_qwen3(tmp_path / "qwen", True)
    for name in ("one", "two"):
        import_qwen3(tmp_path / "qwen", tmp_path / name, 2, codes=80, audio_branch="random")
    one, two = (read_tensors(tmp_path / name / "transformer") for name in ("one", "two"))
    same_tensors(one, two)
    audio = one["audio/layers/mlp/up/kernel"].astype(np.float32)
    assert not np.array_equal(audio, one["text/layers/mlp/up/kernel"]) and 0.015 < audio.std() < 0.025
    assert np.all(one["audio/layers/mlp_norm/scale"] == 1)


def test_the_text_path_of_a_released_model_is_a_qwen3(tmp_path):
    tensors = write_language_model(tmp_path / "released")
    import_language_model(tmp_path / "released", tmp_path / "system", quiet)
    (tmp_path / "qwen").mkdir()
    export_qwen3(tmp_path / "system", tmp_path / "qwen")
    result = read_tensors(tmp_path / "qwen")
    assert len(result) == 11 * 5 + 3
    for ours, theirs in (
        ("model.layers.2.", "model.shared_block.layers.2."),
        ("model.layers.4.", "model.text_block.layers.1."),
    ):
        for part in ("self_attn.o_proj.weight", "mlp.gate_proj.weight"):
            assert result[ours + part].tobytes() == tensors[theirs + part].tobytes()
    assert result["lm_head.weight"].dtype == ml_dtypes.bfloat16
    config = json.loads((tmp_path / "qwen/config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (5, 320, False)


def test_an_unknown_audio_branch_is_refused(tmp_path):
    with pytest.raises(MossError, match="audio branch is 'both', expected one of copy, random"):
        import_qwen3(tmp_path, tmp_path / "system", audio_branch="both")


@pytest.mark.parametrize(("split", "message"), [(-1, "-1 layers for each branch"), (5, "expected 0 to 4 of its 5")])
def test_an_impossible_split_is_refused(tmp_path, split, message):
    write_qwen3(tmp_path / "qwen", True)
    with pytest.raises(MossError, match=message):
        import_qwen3(tmp_path / "qwen", tmp_path / "system", split, codes=80)


DTYPES = ("float32", "bfloat16", "float16")
PARTS = ("text/embed", "text/head", "text/layers", "shared/layers", "text/norm", "audio/")
MIXED = st.tuples(*[st.sampled_from(DTYPES)] * len(PARTS))
UNIFORM = st.sampled_from(DTYPES).map(lambda dtype: (dtype,) * len(PARTS))


def with_dtypes(system, dtypes):
    """The transformer of a system with other dtypes, as trainings leave it that keep a part in fewer bits."""
    reader = open_tensors(system / "transformer")
    prefix = dict(zip(PARTS, dtypes, strict=True))
    tensors = {}
    for path in reader.tensors:
        dtype = next(dtype for part, dtype in prefix.items() if path.startswith(part))
        tensors[path] = np.array(reader.read(path)).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    for file in reader.files():
        file.unlink()
    save_tensors(system / "transformer" / "model.safetensors", tensors)
    return tensors


@pytest.fixture(scope="module")
def qwen3_systems(tmp_path_factory):
    """{(dtype, tied): (folder, tensors of the Qwen3)}; the vocabulary of the Qwen3 has padding rows."""
    folder = tmp_path_factory.mktemp("qwen3")
    result = {}
    for dtype in DTYPES:
        for tied in (False, True):
            name = f"{dtype}-{tied}"
            tensors, _ = write_qwen3(folder / name / "qwen", tied, dtype=dtype)
            import_qwen3(folder / name / "qwen", folder / name / "system", 2, codes=80)
            result[dtype, tied] = (folder / name / "system", tensors)
    return result


@settings(max_examples=25, deadline=None)
@given(
    original=st.sampled_from(DTYPES),
    tied=st.booleans(),
    dtypes=MIXED | UNIFORM,
)
def test_a_trained_qwen3_is_exported_with_any_dtypes(qwen3_systems, original, tied, dtypes):
    source, _ = qwen3_systems[original, tied]
    with tempfile.TemporaryDirectory() as name:
        system = shutil.copytree(source, Path(name) / "system")
        ours = with_dtypes(system, dtypes)
        (Path(name) / "again").mkdir()
        export_qwen3(system, Path(name) / "again")
        result = read_tensors(Path(name) / "again")
        config = json.loads((Path(name) / "again" / "config.json").read_text())
    kinds = {}
    for key, tensor in result.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", key), set()).add(str(tensor.dtype))
    assert all(len(kind) == 1 for kind in kinds.values())
    if len(set(dtypes)) == 1 or dtypes[2] != dtypes[3]:
        assert len({str(tensor.dtype) for tensor in result.values()}) == 1
    names = {str(tensor.dtype) for tensor in result.values()}
    # Where they differ and none is the original one, the widest is named: a loader then loses nothing.
    assert config["torch_dtype"] in names or (len(names) > 1 and config["torch_dtype"] == "float32")
    assert result["model.embed_tokens.weight"].shape == (400, 32)
    table = ours["text/embed/embedding"].astype(np.float32)
    np.testing.assert_array_equal(result["model.embed_tokens.weight"][:384].astype(np.float32), table)
    if "lm_head.weight" in result:
        head = ours["text/head/kernel"].astype(np.float32)
        np.testing.assert_array_equal(result["lm_head.weight"][:384].astype(np.float32), head.T)


def test_a_tied_qwen3_whose_head_was_trained_is_written_untied(qwen3_systems, tmp_path):
    source, tensors = qwen3_systems["float32", True]
    system = shutil.copytree(source, tmp_path / "system")
    path = next(iter(open_tensors(system / "transformer").files()))
    ours = load_file(path)
    ours["text/head/kernel"] = ours["text/head/kernel"] + np.float32(1)
    save_tensors(path, ours)
    (tmp_path / "again").mkdir()
    messages = []
    export_qwen3(system, tmp_path / "again", messages.append)
    assert any("written untied" in line for line in messages)
    result = read_tensors(tmp_path / "again")
    rows = tensors["model.embed_tokens.weight"][384:]
    np.testing.assert_array_equal(result["lm_head.weight"][384:], rows)
    np.testing.assert_array_equal(result["lm_head.weight"][:384], ours["text/head/kernel"].T)


def test_padding_rows_of_another_model_are_refused(qwen3_systems, tmp_path):
    system = shutil.copytree(qwen3_systems["float32", False][0], tmp_path / "system")
    path = system / "carried" / "qwen3" / "dropped_rows.safetensors"
    save_tensors(path, {name: rows[:, :-1] for name, rows in load_file(path).items()})
    (tmp_path / "again").mkdir()
    with pytest.raises(MossError, match="expected 32 columns each"):
        export_qwen3(system, tmp_path / "again")
