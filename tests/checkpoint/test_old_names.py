"""Files that hold parameters under the names of version 0.1.0."""

import jax
import numpy as np
import pytest

from moss_jax.checkpoint import load_tree, open_tensors, save_tree
from moss_jax.checkpoint.old_names import old_path
from moss_jax.checkpoint.system_folder import NANO_FOLDER, SystemFolder
from moss_jax.convert.stream import exported_tensors
from moss_jax.convert.tables import flow as flow_table
from moss_jax.convert.tables import speech_tokenizer as tokenizer_table
from moss_jax.errors import MossError
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.nn.fingerprint import fingerprint
from moss_jax.nn.tree import flatten
from moss_jax.recipes.nano.sizes import SPEECH_TOKENIZER as TOKENIZER
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.speech_tokenizer.encoder import encoder_shapes


def test_only_projections_had_other_names():
    assert old_path("layers/q/kernel") == "layers/query/kernel"
    assert old_path("head/decoder_layers/cross_o/bias") == "head/decoder_layers/cross_out/bias"
    assert old_path("k/bias") == "key/bias"
    for path in ("codebook", "layers/up/kernel", "ups_0/v", "attention/bias_v", "q", "mpd_0/out/g"):
        assert old_path(path) == path


def test_the_bundled_system_has_old_names_and_loads():
    file = NANO_FOLDER / "speech_tokenizer" / "model.safetensors"
    stored = open_tensors(file)
    assert "layers/query/kernel" in stored.tensors
    params = flatten(SpeechTokenizer.load(NANO_FOLDER / "speech_tokenizer").params)
    assert set(params) == set(encoder_shapes(TOKENIZER))
    np.testing.assert_array_equal(params["layers/q/kernel"], stored.read("layers/query/kernel").astype(np.float32))
    config, parts = SystemFolder(NANO_FOLDER).load(SPEECH_DECODER)
    assert set(flatten(parts["flow"])) == set(flow_shapes(config.flow))
    vocoder = open_tensors(NANO_FOLDER / "speech_decoder" / "vocoder.safetensors")
    assert set(flatten(parts["vocoder"])) == set(vocoder.tensors)


def test_a_system_with_old_names_is_exported():
    config, _ = SystemFolder(NANO_FOLDER).load(SPEECH_DECODER)
    cases = (
        ("speech_tokenizer/model", tokenizer_table.table(TOKENIZER), encoder_shapes(TOKENIZER), "layers/value/kernel"),
        ("speech_decoder/flow", flow_table.table(config.flow), flow_shapes(config.flow), "encoder/norm/scale"),
    )
    for stem, table, shapes, path in cases:
        stored = open_tensors(NANO_FOLDER / f"{stem}.safetensors")
        assert path in stored.tensors
        source = exported_tensors(stored, table, shapes)
        assert set(source.tensors) == set(table.shapes(shapes))
        name = next(str(entry.names.flat[-1]) for entry in table.entries(shapes) if old_path(entry.path) == path)
        assert source.read(name).shape == source.tensors[name].shape


def test_the_hash_of_a_codec_is_that_of_version_0_1_0():
    files = (
        ("speech_tokenizer", "speech_tokenizer/model"),
        ("flow", "speech_decoder/flow"),
        ("vocoder", "speech_decoder/vocoder"),
    )
    stored = {}
    for part, stem in files:
        reader = open_tensors(NANO_FOLDER / f"{stem}.safetensors")
        for name in reader.tensors:
            stored[f"{part}/{name}"] = jax.numpy.asarray(reader.read(name), jax.numpy.float32)
    assert EvaluatedModel(NANO_FOLDER).codec_hash() == f"{fingerprint(stored):08x}"


def test_a_file_with_both_names_is_refused(tmp_path):
    weight = np.ones((2, 3), np.float32)
    save_tree(tmp_path, {"q": {"kernel": weight}, "query": {"kernel": weight}})
    with pytest.raises(MossError, match="unexpected: query/kernel"):
        load_tree(tmp_path, {"q/kernel": jax.ShapeDtypeStruct((2, 3), np.float32)})
