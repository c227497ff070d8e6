"""Complete systems: random, converted, resolved and described, from Python and from the command line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from moss_jax.checkpoint import load_tree, open_tensors
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.cli import main
from moss_jax.convert import resolve, system
from moss_jax.convert.codec import read_codec_configs
from moss_jax.convert.describe import describe
from moss_jax.convert.language_model import read_speech_lm_config
from moss_jax.convert.random_system import SYSTEM_SIZES, SystemConfigs, init_random, random_parameter
from moss_jax.convert.text_tokenizer import SPECIAL_TOKENS, write_text_tokenizer
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.speaker import speaker_shapes
from moss_jax.speech_decoder.vocoder import vocoder_shapes
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.config import MOSS_SPEECH_8B, TINY
from moss_jax.speech_tokenizer.encoder import encoder_shapes
from moss_jax.text.tokenizer import TextTokenizer
from tests.convert.checkpoints import read_tensors, same_tensors, write_language_model, write_qwen3


def quiet(line):
    pass


def same_files(one, two, skip=()):
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    names = [[name for name in each if not name.startswith(skip)] for each in names]
    assert names[0] == names[1]
    assert [name for name in names[0] if (one / name).read_bytes() != (two / name).read_bytes()] == []


def test_a_random_system_is_complete(random, tmp_path):
    config = read_speech_lm_config(random)
    codec = read_codec_configs(random)
    assert SystemConfigs(config, codec.tokenizer, codec.decoder) == SYSTEM_SIZES["tiny"]
    shapes = {
        "transformer": model_shapes(config),
        "speech_tokenizer": encoder_shapes(codec.tokenizer),
        **{
            f"speech_decoder/{stem}.safetensors": flow_shapes(codec.decoder.flow)
            for stem in ("flow", "flow_chunk_5", "flow_chunk_25")
        },
        "speech_decoder/vocoder.safetensors": vocoder_shapes(codec.decoder.vocoder),
        "speech_decoder/speaker.safetensors": speaker_shapes(codec.decoder.speaker),
    }
    for part, expected in shapes.items():
        for path, leaf in flatten(load_tree(random / part, expected)).items():
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), path
    TextTokenizer.from_file(random / "text_tokenizer" / "tokenizer.json").check(config)
    assert config.eosp_id == codec.tokenizer.quantize_vocab_size == codec.decoder.flow.codebook_size
    init_random(tmp_path / "again", say=quiet)
    same_files(random, tmp_path / "again")
    init_random(tmp_path / "other", seed=1, say=quiet)
    name = "transformer/model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (random / name).read_bytes()


def test_the_full_size_is_consistent():
    """446 names of the released language model; what belongs together in all sizes has the same sizes."""
    for sizes in SYSTEM_SIZES.values():
        assert sizes.transformer.eosp_id == sizes.tokenizer.quantize_vocab_size == sizes.decoder.flow.codebook_size
        assert sizes.decoder.flow.speaker_size == sizes.decoder.speaker.embedding_size
        assert sizes.tokenizer.code_rate == sizes.decoder.code_rate
    assert SYSTEM_SIZES["8b"].transformer == MOSS_SPEECH_8B


def test_random_weights_are_drawn_layer_by_layer(monkeypatch):
    from moss_jax.convert.tables import speech_lm as table

    shapes = model_shapes(TINY)
    entry = next(e for e in table.table(TINY).entries(shapes) if e.path == "shared/layers/mlp/down/kernel")
    value = random_parameter(entry, "0 x")
    assert value.shape == (3, 160, 64) and value.std() == pytest.approx(160**-0.5, rel=0.05)
    assert not np.array_equal(value[0], value[1])


@pytest.mark.parametrize("config", [TINY, MOSS_SPEECH_8B])
def test_text_tokenizer(tmp_path, config):
    write_text_tokenizer(tmp_path / "tokenizer.json", config)
    tokenizer = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    tokenizer.check(config)
    ids = tokenizer.encode_template("".join(SPECIAL_TOKENS))
    assert ids == list(range(config.endoftext_id, config.endoftext_id + 26))
    text = "Grüße, 世界! the user <think> <|im_end|>\n"
    plain = tokenizer.encode(text)
    assert max(plain) < 256 + 31 and tokenizer.decode(plain) == text
    assert len(tokenizer.encode("the user")) < len("the user")


def test_released_round_trip_of_a_system(random, released, tmp_path):
    """random -> released layout -> ours -> released layout: the same bytes everywhere."""
    system.convert_released(released / system.MODEL_FOLDER, released / system.CODEC_FOLDER, tmp_path / "system", quiet)
    same_files(random, tmp_path / "system", skip=("carried",))
    system.export_released(tmp_path / "system", tmp_path / "again", quiet)
    for path in sorted(p for p in released.rglob("*") if p.suffix in (".safetensors", ".json", ".yaml", ".onnx")):
        assert (tmp_path / "again" / path.relative_to(released)).read_bytes() == path.read_bytes(), path
    import torch

    for name in ("flow.pt", "hift.pt"):
        states = [
            torch.load(f / "MOSS-Speech-Codec/flow" / name, weights_only=True) for f in (released, tmp_path / "again")
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] | states[1])


def test_resolve(random, released, tmp_path):
    messages = []
    assert resolve.resolve_system(random, None, tmp_path, messages.append) == random
    model = released / system.MODEL_FOLDER
    codec = released / system.CODEC_FOLDER
    first = resolve.resolve_system(model, codec, tmp_path / "cache", messages.append)
    assert (first / "system.json").is_file() and first.parent == tmp_path / "cache"
    messages.clear()
    assert resolve.resolve_system(model, codec, tmp_path / "cache", messages.append) == first and messages == []
    other = tmp_path / "other"
    shutil.copytree(model, other)
    assert resolve.resolve_system(other, codec, tmp_path / "cache", messages.append) != first


def _offline(name, **options):
    raise ConnectionError("no route to host\nmore")


@pytest.mark.parametrize(
    ("model", "codec", "message"),
    [
        ("nowhere", None, "no such folder, and not a name on the Hugging Face Hub"),
        ("a/b/c", None, "no such folder, and not a name on the Hugging Face Hub"),
        ("owner/name", None, r"not found locally or on the Hugging Face Hub \(ConnectionError: no route to host\)"),
        ("{random}", "x", "is a complete system with its own codec"),
        ("{released}/MOSS-Speech", None, "which needs a codec: add --codec"),
        ("{released}/MOSS-Speech", "{released}/MOSS-Speech", "not a complete released codec, missing: flow/flow.pt"),
        ("{released}/MOSS-Speech-Codec", "{released}/MOSS-Speech-Codec", "tokenizer.json: no such file"),
        ("{released}", None, "neither a system folder"),
        ("{random}/system.json", None, "is a file, expected a folder"),
    ],
)
def test_resolve_errors(random, released, tmp_path, monkeypatch, model, codec, message):
    monkeypatch.setattr("huggingface_hub.snapshot_download", _offline)
    names = {"random": random, "released": released}
    codec = codec and codec.format(**names)
    with pytest.raises(MossError, match=message):
        resolve.resolve_system(model.format(**names), codec, tmp_path / "cache", quiet)
    assert not (tmp_path / "cache").exists() or [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_hub_names_are_fetched(tmp_path, monkeypatch):
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / "snapshot"))
    assert resolve.find_folder("fnlp/MOSS-Speech") == tmp_path / "snapshot"


def test_different_numbers_of_codes_are_refused(released, tmp_path):
    write_language_model(tmp_path / "lm")
    with pytest.raises(MossError, match="the language model has 80, the speech tokenizer has 256"):
        system.convert_released(tmp_path / "lm", released / system.CODEC_FOLDER, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("text", ['{"format": "moss-jax-9"}', "{}"])
def test_another_format_is_refused(tmp_path, text):
    (tmp_path / "system.json").write_text(text)
    with pytest.raises(MossError, match="expected 'moss-jax-1'"):
        SystemFolder(tmp_path)


def test_qwen3_system(released, tmp_path, capsys):
    tensors, _ = write_qwen3(tmp_path / "qwen", tied=True)
    codec = str(released / system.CODEC_FOLDER)
    arguments = ["--from-qwen3", str(tmp_path / "qwen"), "--split", "2", "--codec", codec]
    assert main(["convert", *arguments, "-o", str(tmp_path / "system")]) == 0
    config = read_speech_lm_config(tmp_path / "system")
    assert (config.num_shared_layers, config.eosp_id) == (3, 256)
    assert main(["convert", "--model", str(tmp_path / "system"), "--export", "qwen3", "-o", str(tmp_path / "q")]) == 0
    same_tensors(read_tensors(tmp_path / "q"), tensors)
    system.export_released(tmp_path / "system", tmp_path / "r", quiet)
    folders = [tmp_path / "r" / name for name in (system.MODEL_FOLDER, system.CODEC_FOLDER)]
    system.convert_released(*folders, tmp_path / "again", quiet)
    assert read_speech_lm_config(tmp_path / "again") == config
    same_tensors(*(read_tensors(tmp_path / name / "transformer") for name in ("system", "again")))


def test_verbs(tmp_path, capsys):
    folder = str(tmp_path / "random")
    assert main(["init-random", folder]) == 0
    assert capsys.readouterr() == (folder + "\n", "")
    assert main(["init-random", folder]) == 2
    assert "already exists" in capsys.readouterr().err.splitlines()[0]
    assert main(["init-random", folder + "2", "--size", "9b"]) == 2
    assert capsys.readouterr().err == "moss-jax init-random: size is '9b', expected one of tiny, 0.6b, 8b\n"
    assert main(["info", folder]) == 0
    text = capsys.readouterr().out
    assert "392,416" in text and "The released files were not available to this project" in text
    assert main(["info", str(tmp_path)]) == 2
    assert main(["convert", "--model", folder, "-o", folder + "3"]) == 2
    assert "give --model and --codec" in capsys.readouterr().err
    assert main(["convert", "--model", folder, "--codec", "x", "--export", "released", "-o", folder + "3"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["random"]


def test_info_on_a_release(released):
    lines = list(describe(released / system.CODEC_FOLDER, names=True))
    assert any(line.startswith("flow/hift.pt") for line in lines)
    assert any("flow: printed from the reference class" in line and "148 of 148" in line for line in lines)
    assert not any("not seen: encoder_proj" in line for line in lines)
    lines = list(describe(released / system.MODEL_FOLDER, names=True))
    assert any("not seen: encoder_proj.weight" in line for line in lines)


def test_a_failed_conversion_leaves_nothing(released, tmp_path):
    broken = tmp_path / "codec"
    shutil.copytree(released / system.CODEC_FOLDER, broken)
    path = broken / "flow" / "flow-chunk-5.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MossError, match=r"flow-chunk-5\.pt"):
        system.convert_released(released / system.MODEL_FOLDER, broken, tmp_path / "out", quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["codec"]


def test_exporting_a_small_codebook_is_refused(random, tmp_path):
    folder = tmp_path / "system"
    shutil.copytree(random, folder)
    path = folder / "speech_tokenizer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalize_codes": True}))
    with pytest.raises(MossError, match="no field for a projected or normalised codebook"):
        system.export_released(folder, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_dtypes_are_kept(tmp_path):
    sizes = SYSTEM_SIZES["tiny"]
    tensors = write_language_model(tmp_path / "lm", replace(sizes.transformer))
    from moss_jax.convert.language_model import import_language_model

    import_language_model(tmp_path / "lm", tmp_path / "system", quiet)
    result = {str(t.dtype) for t in open_tensors(tmp_path / "system" / "transformer").tensors.values()}
    assert result == {str(t.dtype) for t in tensors.values()} == {"bfloat16"}
