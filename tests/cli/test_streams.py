"""A command line that cannot write, or whose backend cannot start: one line and a code, in a real process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NANO = ROOT / "moss_jax" / "assets" / "nano"
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a shell command in which `$moss` is the command line."""
    moss = f"{sys.executable} -m moss_jax"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "moss": moss, "nano": str(NANO)} | environment
    return subprocess.run(["bash", "-c", command], env=variables, capture_output=True, check=False, timeout=300)


def one_line(text: bytes) -> str:
    line = text.decode()
    assert line.endswith("\n") and line.count("\n") == 1 and "Traceback" not in line, line
    return line


@needs_full
@pytest.mark.parametrize("verb", ["info $nano", "--version", "--help", "info --help"])
def test_a_full_stdout_is_one_line(verb):
    done = shell(f"$moss {verb} > /dev/full")
    assert done.returncode == 2
    assert "No space left on device" in one_line(done.stderr)


def test_a_closed_stdout_is_one_line():
    done = shell("$moss info $nano >&-")
    assert done.returncode == 2
    assert "Bad file descriptor" in one_line(done.stderr)


def test_a_reader_that_stops_is_no_error():
    done = shell("$moss info $nano | true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 1) and done.stderr == b""


@pytest.mark.parametrize("target", ["2>&-", pytest.param("2>/dev/full", marks=needs_full)])
def test_a_stderr_that_cannot_be_written_changes_nothing(target):
    assert shell(f"$moss info nowhere {target}").returncode == 2
    done = shell(f"$moss info $nano {target}")
    assert done.returncode == 0 and b"a moss_jax system" in done.stdout
    assert shell(f"$moss info nowhere {target}").stdout == b""


def test_a_name_that_is_not_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9")
    os.symlink(NANO, folder)
    done = shell("$moss info $folder", folder=folder)
    assert done.returncode == 0 and b"caf\\udce9: a moss_jax system" in done.stdout and done.stderr == b""
    done = shell("$moss info $folder/none", folder=folder)
    assert done.returncode == 2 and r"caf\udce9/none" in one_line(done.stderr)


def test_a_terminal_that_lacks_a_character(tmp_path):
    os.symlink(NANO, tmp_path / "größe")
    done = shell("$moss info $folder", folder=str(tmp_path / "größe"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and b"gr\\xf6\\xdfe" in done.stdout and done.stderr == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "reason"),
    [("nonsense", "not in the list of known backends"), ("cuda", "cuda"), ("rocm", "rocm")],
)
def test_a_backend_that_cannot_start_is_one_line(platform, reason):
    done = shell("$moss chat --text hi --reply text", JAX_PLATFORMS=platform)
    if done.returncode == 0:
        pytest.skip(f"this machine has {platform}")
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith(f"moss-jax chat: JAX cannot start its {platform} backend: ") and reason in last
    assert b"Traceback" not in done.stderr and not done.stdout


def test_not_enough_memory_is_one_line(monkeypatch, capsys):
    from moss_jax import cli
    from moss_jax.cli import info

    def fails(args):
        raise MemoryError("Unable to allocate 3.00 TiB")

    monkeypatch.setattr(info, "run", fails)
    assert cli.main(["info", "x"]) == 2
    assert capsys.readouterr().err == "moss-jax info: not enough memory (Unable to allocate 3.00 TiB)\n"


def test_not_enough_memory_on_the_device_is_one_line(monkeypatch, capsys):
    import jax.numpy as jnp

    from moss_jax import cli
    from moss_jax.cli import info

    monkeypatch.setattr(info, "run", lambda args: jnp.zeros(2**44).block_until_ready())  # 64 TiB
    assert cli.main(["info", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moss-jax info: not enough memory on the device: Out of memory allocating")
    assert error.count("\n") == 1


def test_other_errors_of_the_device_keep_their_traceback(monkeypatch):
    import jax

    from moss_jax import cli
    from moss_jax.cli import info

    def fails(args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(info, "run", fails)
    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.main(["info", "x"])


def test_an_error_of_the_file_system_is_one_line(monkeypatch, capsys):
    from moss_jax import cli
    from moss_jax.cli import info

    def fails(args):
        os.stat("x" * 300)

    monkeypatch.setattr(info, "run", fails)
    assert cli.main(["info", "x"]) == 2
    assert capsys.readouterr().err == f"moss-jax info: {'x' * 300}: File name too long\n"
