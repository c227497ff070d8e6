import os
import stat
import subprocess
import sys

import pytest

from moss_jax.errors import MossError
from moss_jax.files import atomic_file, atomic_folder, folder_lock, link_or_copy, replace_folder, write_text


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
    with pytest.raises(MossError, match="already exists"), atomic_folder(path):
        pass


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "export"
    for text in ("1", "2"):
        with replace_folder(path) as part:
            (part / "x").write_text(text)
        assert (path / "x").read_text() == text
    with pytest.raises(RuntimeError), replace_folder(path) as part:
        (part / "x").write_text("3")
        raise RuntimeError
    assert (path / "x").read_text() == "2"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_copied_where_links_are_not_supported(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.write_text("1")
    link_or_copy(source, tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == source.stat().st_ino

    def refuse(*paths):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, tmp_path / "c")
    assert (tmp_path / "c").read_text() == "1"
    assert (tmp_path / "c").stat().st_ino != source.stat().st_ino


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


def test_the_umask_applies_and_is_never_set(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask of the process was set"))
        write_text(tmp_path / "a.txt", "one")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_names_too_long_for_the_file_system(tmp_path):
    write_text(tmp_path / ("a" * 255), "one")
    assert (tmp_path / ("a" * 255)).read_text() == "one"
    for name in ("a" * 256, "a" * 5000):
        with pytest.raises(MossError, match="cannot be written"):
            write_text(tmp_path / name, "")
        with pytest.raises(MossError, match="cannot be written"), atomic_folder(tmp_path / name):
            pass


HOLD = """
import sys
from moss_jax.files import folder_lock
with folder_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_locked_folder_has_one_writer(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(MossError, match="another process is writing to this folder"), folder_lock(folder):
            pass
        other.kill()
        other.wait()
        with folder_lock(folder):
            pass
    finally:
        other.kill()
        other.communicate()


def test_a_device_or_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/null", tmp_path / "null")
    for name in ("pipe", "null"):
        with pytest.raises(MossError, match="is a device or a pipe"), atomic_file(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "pipe"]
