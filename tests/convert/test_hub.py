"""Names on the Hugging Face Hub, with a fake download."""

import fnmatch
import os
import shutil
from pathlib import Path

import pytest

from moss_jax.cli import main
from moss_jax.convert import resolve, system
from moss_jax.errors import MossError
from tests.convert.checkpoints import write_qwen3

WANTED = {
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "flow/flow.pt",
    "flow/campplus.onnx",
    "flow/config.yaml",
}
OTHERS = {
    "modeling_moss_speech.py",
    "pytorch_model.bin",
    "consolidated.pth",
    "tf_model.h5",
    "run.sh",
    "demo.mp4",
    "model.gguf",
    "tokenizer.py",
    "vocab.exe",
    "data.tar.gz",
    "weights.pkl",
    "flow/setup.py",
}


def quiet(line):
    pass


class Hub:
    """Stands for huggingface_hub.snapshot_download: a folder for each (repository, revision)."""

    def __init__(self, folder):
        self.folder = folder
        self.asked = []

    def put(self, name, source, revision=None):
        target = self.folder / name.replace("/", "--") / "snapshots" / (revision or "main")
        shutil.copytree(source, target)
        return target

    def __call__(self, name, revision=None, allow_patterns=None):
        self.asked.append((name, revision, tuple(allow_patterns)))
        target = self.folder / name.replace("/", "--") / "snapshots" / (revision or "main")
        if not target.is_dir():
            raise FileNotFoundError(f"404 for {name} at {revision}\nmore lines")
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    fake_hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_hub)
    monkeypatch.chdir(tmp_path)
    return fake_hub


@pytest.fixture
def pair(hub, released):
    hub.put("fnlp/MOSS-Speech", released / system.MODEL_FOLDER)
    hub.put("fnlp/MOSS-Speech", released / system.MODEL_FOLDER, "v2")
    hub.put("fnlp/MOSS-Speech-Codec", released / system.CODEC_FOLDER)
    hub.put("fnlp/MOSS-Speech-Codec", released / system.CODEC_FOLDER, "0123abc")
    return hub


def test_only_needed_files_are_downloaded():
    matched = {name for name in WANTED | OTHERS if any(fnmatch.fnmatch(name, p) for p in resolve.CODEC_FILES)}
    assert matched == WANTED
    matched = {name for name in WANTED | OTHERS if any(fnmatch.fnmatch(name, p) for p in resolve.MODEL_FILES)}
    assert matched == {name for name in WANTED if not name.startswith("flow/")}


def test_every_revision_is_downloaded_and_converted(pair, tmp_path):
    cache = tmp_path / "cache"
    names = ("fnlp/MOSS-Speech", "fnlp/MOSS-Speech-Codec")
    plain = resolve.resolve_system(*names, cache, quiet)
    assert pair.asked == [(names[0], None, resolve.MODEL_FILES), (names[1], None, resolve.CODEC_FILES)]
    pair.asked.clear()
    other = resolve.resolve_system(*names, cache, quiet, "v2")
    assert [revision for _, revision, _ in pair.asked] == ["v2", None]
    pair.asked.clear()
    third = resolve.resolve_system(*names, cache, quiet, "v2", "0123abc")
    assert [revision for _, revision, _ in pair.asked] == ["v2", "0123abc"]
    assert len({plain, other, third}) == 3
    assert resolve.resolve_system(*names, cache, quiet, "v2") == other


@pytest.mark.slow
def test_verbs_take_revisions(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOSS_JAX_CACHE", str(tmp_path / "cache"))
    names = ["--model", "fnlp/MOSS-Speech", "--codec", "fnlp/MOSS-Speech-Codec"]
    revisions = ["--revision", "v2", "--codec-revision", "0123abc"]
    assert main(["convert", *names, *revisions, "-o", "out"]) == 0
    assert [revision for _, revision, _ in pair.asked] == ["v2", "0123abc"]
    pair.asked.clear()
    assert main(["chat", "--text", "hi", "--reply", "text", "--max-new-tokens", "1", *names, *revisions]) == 0
    assert [revision for _, revision, _ in pair.asked] == ["v2", "0123abc"]
    pair.asked.clear()
    write_qwen3(tmp_path / "qwen", tied=True)
    pair.put("Qwen/Qwen3-0.6B", tmp_path / "qwen", "abc")
    arguments = ["convert", "--from-qwen3", "Qwen/Qwen3-0.6B", "--revision", "abc", "--split", "2"]
    assert main([*arguments, "--codec", "fnlp/MOSS-Speech-Codec", "-o", "from-qwen3"]) == 0
    assert pair.asked == [
        ("Qwen/Qwen3-0.6B", "abc", resolve.MODEL_FILES),
        ("fnlp/MOSS-Speech-Codec", None, resolve.CODEC_FILES),
    ]


CHAT = "chat --text hi --reply text"
NOT_FOUND = "not found locally or on the Hugging Face Hub"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{CHAT} --revision v2", "--revision: is used together with --model"),
        (f"{CHAT} --codec-revision v2", "--codec-revision: is used together with --model"),
        (f"{CHAT} --model {{model}} --codec-revision v2", "--codec-revision: is used together with --codec"),
        (f"{CHAT} --model {{model}} --codec {{codec}} --revision v2", "a revision (v2) is for names on"),
        ("convert --from-qwen3 {model} --codec-revision v2 -o out", "--codec-revision: is used together with --codec"),
        ("convert --model {model} --export qwen3 --revision v2 -o out", "--export: takes a system folder"),
        (f"{CHAT} --model typo/name", f"typo/name: {NOT_FOUND} (FileNotFoundError: 404 for typo/name at None); check"),
        (f"{CHAT} --model typo/name --revision x", f"typo/name at revision x: {NOT_FOUND}"),
        ("convert --from-qwen3 typo/name -o out", f"typo/name: {NOT_FOUND}"),
        ("convert --model {model} --codec typo/name -o out", f"typo/name: {NOT_FOUND}"),
    ],
)
def test_a_missing_model_is_a_one_line_error(hub, released, capsys, arguments, message):
    names = {"model": released / system.MODEL_FOLDER, "codec": released / system.CODEC_FOLDER}
    assert main([word.format(**names) for word in arguments.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("out").exists()


def test_a_missing_repository_is_reported_once(hub, capsys):
    with pytest.raises(MossError, match="not found locally or on the Hugging Face Hub"):
        resolve.find_folder("typo/name")
    assert capsys.readouterr() == ("", "")


def test_a_system_on_the_hub_is_used_directly(hub, random, tmp_path):
    target = hub.put("someone/system", random)
    assert resolve.resolve_system("someone/system", None, tmp_path / "cache", quiet) == target
    assert os.listdir(tmp_path) == ["hub"]
