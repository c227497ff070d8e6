import pytest

from moss_jax.checkpoint import atomic_file, atomic_folder, write_text
from moss_jax.errors import MossError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(RuntimeError), atomic_file(path) as part:
        part.write_text("two, half writ")
        raise RuntimeError
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(path) as part:
        (part / "x").write_text("1")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    path.mkdir()
    with atomic_folder(path) as part:
        (part / "x").write_text("1")
    assert (path / "x").read_text() == "1"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(MossError, match="already there"), atomic_folder(path):
        pass


def test_unwritable_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("nowhere/a.txt", tmp_path / "nowhere" / "a.txt"):
        with pytest.raises(MossError, match="cannot be written"):
            write_text(path, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(MossError, match="is a folder"):
        write_text(tmp_path, "")
    with pytest.raises(MossError, match="cannot be written"), atomic_folder("file/x"):
        pass
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path.parent / "nowhere" / "else").read_text()
