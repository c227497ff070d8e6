"""The launch scripts: dry runs print what docs/launch.md shows, flags exist, several hosts start and stop together."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("gpu_host.sh", "gpu_ssh.sh", "slurm.sbatch", "tpu_gke.sh", "tpu_queued.sh")]
CLEAN = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def examples():
    """(command, output) of every console block of the page."""
    page = (ROOT / "docs" / "launch.md").read_text()
    for block in re.findall(r"^( *)```console\n(.*?)^ *```", page, re.S | re.M):
        text = re.sub(rf"^{block[0]}", "", block[1], flags=re.M)
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def flag_sets():
    sys.path.insert(0, str(LAUNCH))
    try:
        import xla_flags
    finally:
        sys.path.remove(str(LAUNCH))
    return xla_flags


@pytest.mark.parametrize(("command", "output"), list(examples()))
def test_a_dry_run_prints_the_output_in_the_docs(command, output):
    assert "--dry-run" in command
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == output


def test_the_docs_show_every_script_and_verb():
    commands = [command for command, _ in examples()]
    for script in SCRIPTS:
        assert any(script.name in command for command in commands), script.name
    for name in ("tpu_queued.sh", "tpu_gke.sh"):
        verbs = re.findall(r"^  (\w+)\)$", (LAUNCH / name).read_text(), re.M)
        assert len(verbs) > 4
        shown = {verb for verb in verbs if any(f"{name} --dry-run {verb}" in command for command in commands)}
        assert set(verbs) - shown <= {"list"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_have_help(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    if script.suffix == ".sh":
        assert os.access(script, os.X_OK)
        output = subprocess.run([str(script), "--help"], env=CLEAN, capture_output=True, text=True, check=True).stdout
        assert f"launch/{script.name}" in output and "set -euo" not in output


def test_missing_arguments_are_reported():
    for words, output in (
        (["launch/tpu_queued.sh", "create"], "tpu_queued.sh: set PROJECT: the cloud project"),
        (["launch/gpu_ssh.sh", "--config", "c.py"], "gpu_ssh.sh: set HOSTS: the hosts, such as 'gpu1 gpu2'"),
    ):
        run = subprocess.run(words, cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=False)
        assert run.returncode == 2 and run.stderr.strip() == output


def test_arguments_survive_the_shells():
    words = ["a b", "it's", '"x"', "$HOME", "--set", "n=1"]
    script = f'source {LAUNCH}/common.sh; quoted "$@"'
    line = subprocess.run(["bash", "-c", script, "x", *words], capture_output=True, text=True, check=True).stdout
    again = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert again.splitlines() == words


def test_existing_flags_are_kept():
    xla_flags = flag_sets()
    line = xla_flags.export_line("cpu-8", {"XLA_FLAGS": "--xla_dump_to=/tmp/x"})
    assert line == "export XLA_FLAGS='--xla_force_host_platform_device_count=8 --xla_dump_to=/tmp/x'"
    assert all(flag.reason for chosen in xla_flags.SETS.values() for flag in chosen.flags)
    listing = subprocess.run([sys.executable, LAUNCH / "xla_flags.py"], capture_output=True, text=True, check=True)
    assert all(str(flag) in listing.stdout for chosen in xla_flags.SETS.values() for flag in chosen.flags)


def child(code, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


DEVICES = "import jax; print(jax.devices())"
# libtpu also reads its flags when it describes the topology of absent chips.
TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}
TOPOLOGY = """
from jax.experimental import topologies
print(len(topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices))
"""


def test_xla_knows_the_flags():
    chosen = [s for s in flag_sets().SETS.values() if s.variable == "XLA_FLAGS"]
    flags = " ".join(str(flag) for s in chosen for flag in s.flags)
    assert child(DEVICES, XLA_FLAGS=flags).returncode == 0
    run = child(DEVICES, XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=1")
    assert run.returncode != 0 and "no_such_flag" in run.stderr


def test_libtpu_knows_the_flags():
    pytest.importorskip("libtpu")
    chosen = [s for s in flag_sets().SETS.values() if s.variable == "LIBTPU_INIT_ARGS"]
    flags = " ".join(str(flag) for s in chosen for flag in s.flags)
    run = child(TOPOLOGY, LIBTPU_INIT_ARGS=flags, **TPU)
    assert run.stdout.split() == ["8"], run.stderr
    run = child(TOPOLOGY, LIBTPU_INIT_ARGS=f"{flags} --xla_tpu_no_such_flag=1", **TPU)
    assert "8" not in run.stdout.split() and "no_such_flag" in run.stderr


def test_a_mesh_over_two_slices():
    pytest.importorskip("libtpu")
    code = """
from jax.experimental import topologies
from moss_jax.errors import MossError
from moss_jax.sharding import make_mesh
devices = topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu", num_slices=2).devices
mesh = make_mesh(data=4, fsdp=2, sequence=2, devices=devices)
print([sorted({device.slice_index for device in part.flatten()}) for part in mesh.devices], dict(mesh.shape))
try:
    make_mesh(fsdp=16, devices=devices)
except MossError as error:
    print(error)
"""
    run = child(code, **TPU, PYTHONPATH=str(ROOT))
    assert run.stdout.splitlines() == [
        "[[0], [0], [1], [1]] {'data': 4, 'fsdp': 2, 'tensor': 1, 'sequence': 2}",
        "mesh: data is 1, expected a multiple of the number of TPU slices, 2",
    ], run.stderr


def project():
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dockerfile():
    """{instruction: [rest of the line, ...]} with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (LAUNCH / "Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: [rest for other, _, rest in lines if other == name] for name, _, _ in lines}


def test_the_image_runs_as_a_user_and_has_the_documented_extras():
    instructions = dockerfile()
    assert instructions["USER"] == ["moss"]
    (install,) = (line for line in instructions["RUN"] if line.startswith("pip install"))
    assert "-c launch/constraints.txt" in install and ".[train,convert$(" in install
    extras = re.search(r"--build-arg EXTRA=(\w+)", (ROOT / "docs/launch.md").read_text())[1]
    assert any(line.startswith(f"jax[{extras}") for line in project()["optional-dependencies"][extras])


def test_the_image_is_pinned():
    instructions = dockerfile()
    (python,) = (line.partition("=")[2] for line in instructions["ARG"] if line.startswith("PYTHON="))
    assert re.fullmatch(r"3\.1[12]\.\d+", python)
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+", instructions["FROM"][0])
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project()["optional-dependencies"]
    needed = [Requirement(text) for text in (*project()["dependencies"], *extras["convert"], *extras["train"])]
    assert len(needed) > 12
    for requirement in needed:
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert version in requirement.specifier, requirement
    assert pinned["libtpu"] == pages_libtpu()


def pages_libtpu():
    """The one version of libtpu that the pages and scripts name."""
    named = set()
    for path in (ROOT / "docs/launch.md", LAUNCH / "xla_flags.py"):
        named |= set(re.findall(r"libtpu (\d[\d.]*\d)", path.read_text()))
    (version,) = named
    return version


def test_the_docker_daemon_receives_only_what_is_copied():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {source.partition("/")[0] for line in dockerfile()["COPY"] for source in line.split()[:-1]}
    assert allowed == copied
    assert all((ROOT / name).exists() for name in allowed)


@pytest.fixture
def hosts(tmp_path):
    """An environment where ssh runs the command here, and moss-jax records its arguments, then waits as instructed."""
    fakes = {
        "ssh": 'shift; exec bash -c "$1"',
        "moss-jax": f"""
echo "$*" >{tmp_path}/arguments.${{!#}}
leave() {{ echo "process $1 saved"; exit 75; }}
trap 'for pid in $(cat /tmp/moss-jax-$PORT-*); do [[ $pid == $$ ]] || kill -USR1 $pid; done; leave ${{!#}}' TERM
trap 'leave ${{!#}}' USR1
for i in $(seq ${{WAIT:-0}}); do sleep 0.1; done
echo "process ${{!#}} ends"
[[ ${{!#}} != ${{FAILS:-none}} ]] || exit 3""",
    }
    (tmp_path / "bin").mkdir()
    for name, script in fakes.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    port = str(20000 + os.getpid() % 20000)
    yield CLEAN | {
        "PATH": f"{tmp_path / 'bin'}:{CLEAN['PATH']}",
        "HOSTS": "one two",
        "REPOSITORY": str(ROOT),
        "PORT": port,
    }
    for path in Path("/tmp").glob(f"moss-jax-{port}-*"):
        path.unlink()


COMMAND = [str(LAUNCH / "gpu_ssh.sh"), "--config", "c.py", "--set", "name=it's two words"]


def test_two_hosts_are_started_and_their_exit_code_is_returned(hosts, tmp_path):
    run = subprocess.run(COMMAND, env=hosts, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for i in range(2):
        output = (tmp_path / f"arguments.{i}").read_text().strip()
        assert output == (
            "train --config c.py --set name=it's two words --distributed "
            f"--coordinator one:{hosts['PORT']} --processes 2 --process {i}"
        )
    assert "0 one: process 0 ends" in run.stdout and "1 two: process 1 ends" in run.stdout
    assert subprocess.run(COMMAND, env=hosts | {"FAILS": "1"}, capture_output=True, check=False).returncode == 3


def test_ctrl_c_lets_all_hosts_save(hosts, tmp_path):
    process = subprocess.Popen(
        COMMAND,
        env=hosts | {"WAIT": "300"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    )
    while len(list(tmp_path.glob("arguments.*"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "0 one: process 0 saved" in output and "1 two: process 1 saved" in output and "ends" not in output
