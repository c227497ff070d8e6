"""A conversion copies the files that it does not convert, from any working directory, and nothing else."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from moss_jax.cli import main
from moss_jax.convert import files as convert_files
from moss_jax.convert import resolve, system
from moss_jax.convert.qwen3 import import_qwen3
from moss_jax.errors import MossError
from tests.convert.checkpoints import write_language_model, write_qwen3

MODEL = {"config.json", "tokenizer.json"}
CODEC = {"config.json", "preprocessor_config.json", "flow/campplus.onnx", "flow/config.yaml"}


def quiet(line):
    pass


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def hub_like(folder, repository):
    """The folder as a snapshot in the cache of huggingface_hub: links into `blobs`."""
    snapshot = repository / "snapshots" / "0123abcd"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(sorted(files(folder))):
        shutil.copyfile(folder / name, blobs / f"{number:064x}")
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:064x}", link.parent))
    return snapshot


def spelled(kind, folder):
    """Another way to name `folder`, which is below the current folder; and a copy of it for the last one."""
    relative = os.path.relpath(folder)
    if kind == "link":
        Path("link").symlink_to(folder, target_is_directory=True)
        return "link"
    if kind == "hub":
        return str(hub_like(folder, Path("models--owner--name")))
    names = {
        "absolute": str(folder),
        "relative": relative,
        "dots": f"./{relative}/../{folder.name}",
        "slash": relative + "/",
        "dot": ".",
    }
    return names[kind]


SPELLINGS = ("absolute", "relative", "dots", "slash", "link", "hub")


@pytest.mark.parametrize("kind", SPELLINGS)
def test_no_weights_of_a_release_are_carried(released, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    both = shutil.copytree(released, tmp_path / "both")
    (both / "MOSS-Speech" / "README.md").write_text("hello")
    model, codec = (both / name for name in (system.MODEL_FOLDER, system.CODEC_FOLDER))
    model_name = spelled(kind, model)
    codec_name = os.path.relpath(codec) if kind != "absolute" else str(codec)
    assert main(["convert", "--model", model_name, "--codec", codec_name, "-o", "out"]) == 0
    assert files(tmp_path / "out" / "carried" / "model") == MODEL | {"README.md"}
    assert files(tmp_path / "out" / "carried" / "codec") == CODEC


@pytest.mark.parametrize("kind", SPELLINGS)
def test_no_weights_of_a_codec_are_carried(released, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    codec = shutil.copytree(released / system.CODEC_FOLDER, tmp_path / "codec")
    write_qwen3(tmp_path / "qwen", tied=True)
    arguments = ["convert", "--from-qwen3", "qwen", "--codec", spelled(kind, codec), "-o", "out"]
    assert main(arguments) == 0
    assert files(tmp_path / "out" / "carried" / "codec") == CODEC


@pytest.mark.parametrize("kind", (*SPELLINGS, "dot"))
def test_no_weights_of_a_qwen3_are_carried(tmp_path, monkeypatch, kind):
    folder = tmp_path / "qwen"
    write_qwen3(folder, tied=False)
    (folder / "merges.txt").write_text("a b")
    monkeypatch.chdir(folder if kind == "dot" else tmp_path)
    import_qwen3(spelled(kind, folder), tmp_path / "system", 2, codes=80)
    carried = tmp_path / "system" / "carried" / "qwen3"
    assert files(carried) == {"config.json", "tokenizer.json", "merges.txt", "dropped_rows.safetensors"}


def test_no_weights_are_carried_from_a_pair_that_a_verb_converts(released, tmp_path, monkeypatch):
    monkeypatch.chdir(released)
    result = resolve.resolve_system(system.MODEL_FOLDER, system.CODEC_FOLDER, tmp_path / "cache", quiet)
    assert files(result / "carried" / "model") == MODEL
    assert files(result / "carried" / "codec") == CODEC


def test_a_hub_snapshot_is_converted_like_a_plain_folder(released, tmp_path):
    """Two names with equal contents are one blob: the one that is not used is carried all the same."""
    codec = shutil.copytree(released / system.CODEC_FOLDER, tmp_path / "plain")
    shutil.copyfile(codec / "flow" / "flow.pt", codec / "flow" / "spare.pt")
    snapshot = hub_like(codec, tmp_path / "models--owner--codec")
    (snapshot / "flow" / "spare.pt").unlink()
    (snapshot / "flow" / "spare.pt").symlink_to(os.readlink(snapshot / "flow" / "flow.pt"))
    for name, folder in (("one", codec), ("two", snapshot)):
        system.convert_released(released / system.MODEL_FOLDER, folder, tmp_path / name, quiet)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert "flow/spare.pt" in files(tmp_path / "two" / "carried" / "codec")


@pytest.fixture
def secret(tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "key").write_text("private")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda path, secret: path.symlink_to(secret / "key"),
        lambda path, secret: path.symlink_to("../secret/key"),
        lambda path, secret: path.symlink_to("/etc/hostname"),
        lambda path, secret: path.symlink_to("/dev/zero"),
        lambda path, secret: path.symlink_to("/proc/self/environ"),
        lambda path, secret: path.symlink_to(secret, target_is_directory=True),
        lambda path, secret: path.symlink_to("..", target_is_directory=True),
        lambda path, secret: path.symlink_to(path),
        lambda path, secret: path.symlink_to("nowhere"),
        lambda path, secret: (path.parent / "a").symlink_to(secret) or path.symlink_to("a/key"),
        lambda path, secret: os.mkfifo(path),
    ],
    ids=[
        "absolute",
        "relative",
        "system file",
        "device",
        "process",
        "folder",
        "parent",
        "loop",
        "dangling",
        "two links",
        "fifo",
    ],
)
@pytest.mark.parametrize("kind", ["model", "qwen3"])
def test_links_out_of_a_release_are_refused(tmp_path, secret, kind, make):
    release = tmp_path / "release"
    if kind == "model":
        write_language_model(release)
    else:
        write_qwen3(release, tied=True)
    make(release / "notes.txt", secret)
    with pytest.raises(MossError) as caught:
        if kind == "model":
            system.import_language_model(release, tmp_path / "system", quiet)
        else:
            import_qwen3(release, tmp_path / "system", codes=80)
    assert "\n" not in str(caught.value)
    assert str(release) in str(caught.value)
    assert not (tmp_path / "system").exists()


def test_a_link_out_of_a_codec_is_refused_before_anything_is_written(released, tmp_path, secret, capsys):
    codec = shutil.copytree(released / system.CODEC_FOLDER, tmp_path / "codec")
    (codec / "flow" / "notes.txt").symlink_to(secret / "key")
    model = str(released / system.MODEL_FOLDER)
    assert main(["convert", "--model", model, "--codec", str(codec), "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "notes.txt: a symbolic link to" in lines[0] and "only links inside that folder are followed" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["carried/model/notes.txt", "carried/model", "carried/codec/flow", "carried/codec/x"])
def test_a_link_out_of_a_system_is_not_exported(released, tmp_path, secret, place):
    folder = tmp_path / "system"
    system.convert_released(released / system.MODEL_FOLDER, released / system.CODEC_FOLDER, folder, quiet)
    if (folder / place).is_dir():
        shutil.copytree(folder / place, secret, dirs_exist_ok=True)
        shutil.rmtree(folder / place)
        (folder / place).symlink_to(secret, target_is_directory=True)
    else:
        (folder / place).symlink_to(secret / "key")
    with pytest.raises(MossError, match=r"a symbolic link to .*secret"):
        system.export_released(folder, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_a_linked_text_tokenizer_is_not_exported(random, tmp_path, secret):
    folder = shutil.copytree(random, tmp_path / "system")
    (folder / "text_tokenizer" / "tokenizer.json").unlink()
    (folder / "text_tokenizer" / "tokenizer.json").symlink_to(secret / "key")
    for export in (system.export_released, system.export_text_path):
        with pytest.raises(MossError, match=r"tokenizer\.json: a symbolic link to"):
            export(folder, tmp_path / "out", quiet)


def test_links_inside_a_release_are_followed(tmp_path):
    release = tmp_path / "release"
    (release / "v2").mkdir(parents=True)
    (release / "v2" / "a").write_text("a")
    (release / "b").symlink_to("v2/a")
    (release / "latest").symlink_to("v2", target_is_directory=True)
    convert_files.carry_files(release, tmp_path / "out")
    assert files(tmp_path / "out") == {"v2/a", "b", "latest/a"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (release / "v2" / "again").symlink_to("../v2", target_is_directory=True)
    with pytest.raises(MossError, match="inside a linked folder"):
        convert_files.files_to_carry(release)


def test_links_out_of_the_blobs_of_a_snapshot_are_refused(tmp_path, secret):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("a")
    snapshot = hub_like(source, tmp_path / "models--owner--name")
    assert convert_files.files_to_carry(snapshot) == [Path("a")]
    other = tmp_path / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    (other / "1").write_text("of another repository")
    (snapshot / "b").symlink_to(other / "1")
    with pytest.raises(MossError, match="b: a symbolic link to"):
        convert_files.files_to_carry(snapshot)
    (snapshot / "b").unlink()
    shutil.rmtree(tmp_path / "models--owner--name" / "blobs")
    (tmp_path / "models--owner--name" / "blobs").symlink_to(secret, target_is_directory=True)
    (snapshot / "a").unlink()
    (snapshot / "a").symlink_to("../../blobs/key")
    with pytest.raises(MossError, match="a: a symbolic link to"):
        convert_files.files_to_carry(snapshot)


def test_hidden_files_are_ignored(tmp_path, secret):
    (tmp_path / "release" / ".git").mkdir(parents=True)
    (tmp_path / "release" / ".git" / "x").symlink_to(secret / "key")
    (tmp_path / "release" / ".hidden").symlink_to(secret / "key")
    assert convert_files.files_to_carry(tmp_path / "release") == []


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    closed = tmp_path / "release" / "closed"
    closed.mkdir(parents=True)
    (closed / "a").write_text("a")

    def refuse(path, *rest):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)
        with pytest.raises(MossError, match=r"closed/a: cannot be read \(Input/output error\)"):
            convert_files.carry_files(tmp_path / "release", tmp_path / "out")
    iterdir = Path.iterdir
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda path: refuse(path) if path == closed else iterdir(path))
        with pytest.raises(MossError, match=r"closed: cannot be read \(Input/output error\)"):
            convert_files.carry_files(tmp_path / "release", tmp_path / "out")
