"""Language model and codec have the same number of speech codes; the codec of a system can be copied."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moss_jax.checkpoint.config_io import write_config
from moss_jax.checkpoint.system_folder import NANO_FOLDER, SystemFolder
from moss_jax.cli import main
from moss_jax.components import check_codes
from moss_jax.convert import system
from moss_jax.convert.language_model import read_speech_lm_config
from moss_jax.convert.random_system import SYSTEM_SIZES, write_random
from moss_jax.errors import MossError
from tests.convert.checkpoints import read_tensors, same_tensors, write_qwen3

OTHER = 96  # codes; the tiny system has 256


def quiet(line):
    pass


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A system with a codec of its own, and voices."""
    folder = tmp_path_factory.mktemp("other") / "system"
    folder.mkdir()
    tiny = SYSTEM_SIZES["tiny"]
    sizes = replace(
        tiny,
        transformer=replace(tiny.transformer, audio_vocab_size=128, eosp_id=OTHER, audio_pad_id=OTHER - 1),
        tokenizer=replace(tiny.tokenizer, quantize_vocab_size=OTHER),
        decoder=replace(tiny.decoder, flow=replace(tiny.decoder.flow, codebook_size=OTHER)),
    )
    write_random(folder, sizes, 5, quiet)
    (folder / "voices" / "anna.safetensors").write_bytes(b"a voice")
    (folder / "carried" / "codec").mkdir(parents=True)
    (folder / "carried" / "codec" / "notes.txt").write_text("carried")
    (folder / "carried" / "codec.json").write_text("{}")
    (folder / "system.json").write_text('{"format": "moss-jax-1", "default_voice": "anna"}')
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "qwen"
    write_qwen3(folder, tied=False)
    return folder


@pytest.fixture(scope="module")
def started(other, qwen, tmp_path_factory):
    """A system from the Qwen3 with the codec of the other system."""
    folder = tmp_path_factory.mktemp("started") / "system"
    arguments = ["--from-qwen3", str(qwen), "--split", "2", "--codec", str(other), "-o", str(folder)]
    assert main(["convert", *arguments]) == 0
    return folder


@pytest.fixture
def mismatched(random, tmp_path):
    """A system whose language model has another number of codes than its codec."""
    folder = shutil.copytree(random, tmp_path / "mismatched")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eosp_id": 200}))
    return folder


def test_the_codec_of_a_system_is_copied(other, started):
    for part in ("speech_tokenizer", "speech_decoder", "voices", "carried/codec"):
        assert contents(started / part) == contents(other / part), part
    assert (started / "carried" / "codec.json").read_text() == "{}"
    assert json.loads((started / "system.json").read_text()) == {"format": "moss-jax-1", "default_voice": "anna"}
    config = read_speech_lm_config(started)
    assert (config.eosp_id, config.audio_vocab_size) == (OTHER, 128)
    check_codes(SystemFolder(started))


def test_a_copied_codec_is_exported_like_the_original(random, released, qwen, tmp_path):
    system.convert_released(released / system.MODEL_FOLDER, released / system.CODEC_FOLDER, tmp_path / "one", quiet)
    system.convert_qwen3(qwen, tmp_path / "two", quiet, 2, tmp_path / "one")
    system.convert_released(released / system.MODEL_FOLDER, tmp_path / "two", tmp_path / "three", quiet)
    for name in ("one", "three"):
        system.export_released(tmp_path / name, tmp_path / f"{name}-export", quiet)
    one, three = (contents(tmp_path / f"{name}-export" / system.CODEC_FOLDER) for name in ("one", "three"))
    assert one.keys() == three.keys()
    # torch puts the name of the file into it
    assert [name for name in one if one[name] != three[name] and not name.endswith(".pt")] == []
    for part in ("speech_tokenizer", "speech_decoder"):
        assert contents(tmp_path / "one" / part) == contents(tmp_path / "three" / part)
    same_tensors(*(read_tensors(tmp_path / name / "transformer") for name in ("one", "three")))


def test_tokenize_and_train_work_with_a_copied_codec(started, qwen, tmp_path):
    """A data set made with the system is one for a run that starts from the Qwen3 and names the system."""
    from moss_jax.data.store import vocabulary
    from moss_jax.sharding import make_mesh
    from moss_jax.train.run_file import load_run
    from moss_jax.train.speech_lm.initial import starting_parameters
    from tests.train.tiny import write_config as write_run

    (tmp_path / "speech.jsonl").write_text(json.dumps({"codes": [0, 1, OTHER - 1] * 5}) + "\n")
    data = tmp_path / "data"
    arguments = [str(tmp_path / "speech.jsonl"), "--model", str(started), "--format", "speech", "-o", str(data)]
    assert main(["tokenize", *arguments]) == 0
    made = json.loads((data / "source.json").read_text())["vocabulary"]
    for init, more in ((qwen, ["model=None", f"system={started}", "split=2"]), (started, ["model=None"])):
        run = load_run(write_run(tmp_path / "run.py", data, tmp_path / "run"), [f"init={init}", *more])
        config, _, _ = starting_parameters(run, make_mesh())
        assert vocabulary(config) == made
    (tmp_path / "bad.jsonl").write_text(json.dumps({"codes": [OTHER]}) + "\n")
    arguments = [str(tmp_path / "bad.jsonl"), "--model", str(started), "--format", "speech", "-o", str(data) + "2"]
    assert main(["tokenize", *arguments]) == 2


def test_the_language_model_of_the_codecs_system_is_ignored(mismatched, qwen, tmp_path):
    system.convert_qwen3(qwen, tmp_path / "one", quiet, 2, mismatched)
    assert read_speech_lm_config(tmp_path / "one").eosp_id == 256
    path = mismatched / "speech_decoder" / "config.json"
    config = json.loads(path.read_text())
    config["flow"]["codebook_size"] = OTHER
    path.write_text(json.dumps(config))
    with pytest.raises(MossError, match="mismatched: different numbers of speech codes"):
        system.convert_qwen3(qwen, tmp_path / "two", quiet, 2, mismatched)


@pytest.mark.parametrize("component", ["speech_tokenizer", "speech_decoder"])
def test_a_system_without_a_codec_is_refused_as_a_codec(other, qwen, tmp_path, component, capsys):
    folder = shutil.copytree(other, tmp_path / "half")
    shutil.rmtree(folder / component)
    assert main(["convert", "--from-qwen3", str(qwen), "--codec", str(folder), "-o", str(tmp_path / "out")]) == 2
    assert f"has no {component}/config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_links_out_of_a_copied_codec_are_refused(other, qwen, tmp_path):
    folder = shutil.copytree(other, tmp_path / "linked")
    (tmp_path / "key").write_text("private")
    (folder / "voices" / "bob.safetensors").symlink_to(tmp_path / "key")
    with pytest.raises(MossError, match=r"bob\.safetensors: a symbolic link"):
        system.convert_qwen3(qwen, tmp_path / "out", quiet, codec=folder)


def test_different_numbers_of_codes_are_refused_by_convert(released, other, tmp_path, capsys):
    model = str(released / system.MODEL_FOLDER)
    assert main(["convert", "--model", model, "--codec", str(other), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the language model has 256, the speech tokenizer has 96, the speech decoder has 96" in line
    assert str(other) in line and ".part" not in line
    assert not (tmp_path / "out").exists()


def test_different_numbers_of_codes_are_reported_by_info(mismatched, capsys):
    assert main(["info", str(mismatched)]) == 2
    out, err = capsys.readouterr()
    assert "200 codes" in out
    assert f"{mismatched}: different numbers of speech codes" in err
    assert "the language model has 200, the speech tokenizer has 256" in err


@pytest.mark.parametrize("kind", ["text", "speech", "chat"])
def test_different_numbers_of_codes_are_refused_by_tokenize(mismatched, tmp_path, capsys, kind):
    line = {
        "text": {"text": "hello"},
        "speech": {"codes": [1, 2, 3]},
        "chat": {"turns": [{"role": "user", "text": "a"}, {"role": "assistant", "codes": [1, 2]}]},
    }[kind]
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    arguments = [str(tmp_path / "a.jsonl"), "--model", str(mismatched), "--format", kind, "-o", str(tmp_path / "data")]
    assert main(["tokenize", *arguments]) == 2
    assert "different numbers of speech codes" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "settings", [("init={bad}",), ("init={good}", "system={bad}"), ("init=random", "system={bad}")]
)
def test_different_numbers_of_codes_are_refused_by_train(random, other, tmp_path, capsys, settings):
    """Whether the language model is that of the system with the codec or another one."""
    from tests.train.tiny import write_config as write_run
    from tests.train.tiny import write_data

    bad = other
    if len(settings) == 1:
        bad = shutil.copytree(random, tmp_path / "bad")
        (bad / "speech_tokenizer" / "config.json").write_bytes((other / "speech_tokenizer/config.json").read_bytes())
    config = write_run(tmp_path / "run.py", write_data(tmp_path / "data"), tmp_path / "run")
    sets = [setting.format(bad=bad, good=random) for setting in settings]
    sets += ["model=None"] if "random" not in settings[0] else ["model.eosp_id=80"]
    arguments = [word for setting in sets for word in ("--set", setting)]
    assert main(["train", "--config", str(config), *arguments]) == 2
    assert "different numbers of speech codes" in capsys.readouterr().err


def test_different_numbers_of_codes_are_refused_by_an_export(mismatched, tmp_path):
    with pytest.raises(MossError, match="different numbers of speech codes"):
        system.export_released(mismatched, tmp_path / "out", quiet)


@pytest.mark.parametrize("component", ["transformer", "speech_tokenizer", "speech_decoder"])
def test_every_pair_of_components_is_compared(random, tmp_path, component):
    folder = shutil.copytree(random, tmp_path / "system")
    check_codes(SystemFolder(folder))
    config = write_config(SYSTEM_SIZES["tiny"].decoder)
    if component != "speech_decoder":
        config["flow"]["codebook_size"] = OTHER
        (folder / "speech_decoder" / "config.json").write_text(json.dumps(config))
        shutil.rmtree(folder / ("speech_tokenizer" if component == "transformer" else "transformer"))
    else:
        path = folder / "speech_tokenizer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantize_vocab_size": OTHER}))
        shutil.rmtree(folder / "transformer")
    with pytest.raises(MossError, match="different numbers of speech codes"):
        check_codes(SystemFolder(folder))


def test_a_language_model_without_speech_has_no_codes(random, tmp_path):
    folder = shutil.copytree(random, tmp_path / "system")
    path = folder / "transformer" / "config.json"
    config = replace(SYSTEM_SIZES["tiny"].transformer, audio_vocab_size=0, eosp_id=200)
    path.write_text(json.dumps(write_config(config)))
    check_codes(SystemFolder(folder))


def test_the_components_of_the_bundled_system_agree():

    check_codes(SystemFolder(Path(NANO_FOLDER)))
