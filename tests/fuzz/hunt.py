"""Runs cases of one target in a separate process for a given time, and saves the findings.

The process writes each case into a file before it runs it, so that the case is known even if the process crashes, hangs
or uses too much memory. A new process with another seed then replaces it.
"""

import faulthandler
import hashlib
import importlib
import multiprocessing
import os
import pickle
import pprint
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

import moss_jax
from moss_jax.errors import MossError

PACKAGE = str(Path(moss_jax.__file__).parent)
HANG = 20.0  # maximum seconds of a case
WARM_UP = 120.0  # seconds until the first case has ended: imports, seeds, compilation
BATCH = 500  # cases of one seed
POLL = 0.05  # seconds between two looks at the process
GIB = 2**30
PLACELESS = ("Hang:", "Memory:", "Crash:")  # findings without a line of code


@dataclass(frozen=True)
class Finding:
    """Any outcome but success or MossError. `folder` has the case, its files and the traceback."""

    what: str
    folder: Path


@dataclass(frozen=True)
class Result:
    """The results of a run. `peak` is the largest resident memory of any of its processes, in bytes."""

    cases: int
    findings: list[Finding]
    peak: int


def hunt(module: str, seconds: float, memory: int, out: Path, first_seed: int = 0) -> Result:
    """Runs cases of a target for the given time.

    Args:
        module: a target's module, such as "tests.fuzz.audio"; its last part names the findings.
        seconds: how long, from the first case on.
        memory: maximum resident memory of the process in bytes; more is a finding.
        out: an existing folder for the findings, one folder each.
        first_seed: seed of hypothesis; following batches and processes use the next ones.
    """
    target = module.rpartition(".")[2]
    work = out / f".{target}"
    context = multiprocessing.get_context("spawn")
    end = context.Value("d", 0.0)  # set when the first case begins
    cases = context.Value("Q", 0)
    next_seed = context.Value("Q", first_seed)
    peak = 0
    while not end.value or time.monotonic() < end.value:
        began = context.Value("d", 0.0)
        work.mkdir(exist_ok=True)
        process = context.Process(target=_work, args=(module, seconds, end, memory, out, work, cases, next_seed, began))
        process.start()
        started = time.monotonic()
        what = None
        while process.is_alive() and what is None:
            process.join(POLL)
            peak = max(peak, _status(process.pid, "VmHWM"))
            waiting = time.monotonic() - (began.value or started)
            if waiting > (HANG if began.value else WARM_UP):
                what = f"Hang: more than {HANG:.0f} s"
            elif _status(process.pid, "VmRSS") > memory:
                what = f"Memory: more than {memory / GIB:.2f} GiB"
        if what is not None:
            process.kill()
        process.join()
        if what is None and process.exitcode < 0:
            what = f"Crash: signal {-process.exitcode}"
        elif what is None and process.exitcode > 0:
            what = f"Crash: exit code {process.exitcode}"
        if what is not None:
            log = (work / "stderr").read_text(errors="replace")
            _keep(out, target, what, log, work)
            if not began.value:
                break  # the target does not start at all
        shutil.rmtree(work)
    shutil.rmtree(work, ignore_errors=True)
    findings = [
        Finding((folder / "what.txt").read_text().strip(), folder)
        for folder in sorted(out.glob(f"{target}-*"))
        if folder.is_dir()
    ]
    return Result(cases.value, findings, peak)


def replay(module: str, case: Path, folder: Path) -> None:
    """Runs one saved case and lets its exceptions pass."""
    importlib.import_module(module).run(pickle.loads(case.read_bytes()), folder)


def _work(name: str, seconds: float, end, memory: int, out: Path, work: Path, cases, next_seed, began) -> None:
    """Body of the process: batches of cases until the time is over or a case used too much memory."""
    log = os.open(work / "stderr", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, sys.stderr.fileno())
    os.dup2(log, sys.stdout.fileno())
    faulthandler.enable()
    module = importlib.import_module(name)
    target = name.rpartition(".")[2]
    folder = work / "files"
    over = False

    def probe(case) -> None:
        nonlocal over
        if not end.value:
            end.value = time.monotonic() + seconds
        if over or time.monotonic() > end.value:
            over = True
            return
        folder.mkdir()
        (work / "case.pickle").write_bytes(pickle.dumps(case))
        began.value = time.monotonic()
        try:
            module.run(case, folder)
        except MossError as error:
            if not str(error):
                _keep(out, target, "MossError without a message", traceback.format_exc(), work)
        except BaseException as error:  # a panic of a Rust library is not an Exception
            _keep(out, target, _place(error), traceback.format_exc(), work)
            if isinstance(error, KeyboardInterrupt):
                raise
        cases.value += 1
        if _status(os.getpid(), "VmHWM") > memory:
            _keep(out, target, f"Memory: more than {memory / GIB:.2f} GiB", "", work)
            over = True  # the peak of a process never falls, so a new process continues
        shutil.rmtree(folder)

    while not over:
        number = next_seed.value
        next_seed.value += 1
        batch = settings(
            max_examples=BATCH,
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(number)(batch(given(module.CASES)(probe)))()


def _place(error: BaseException) -> str:
    """The type of an error and the last line of the package (or else of the target) in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    frame = (ours or frames)[-1]
    if isinstance(error, AssertionError):
        frame = frames[-1]
    name = frame.filename.removeprefix(str(Path(PACKAGE).parent) + "/")
    return f"{type(error).__name__} at {name}:{frame.lineno}: {frame.line}"


def _keep(out: Path, target: str, what: str, trace: str, work: Path) -> None:
    """Saves a finding, unless there is one of the same line already."""
    digest = hashlib.blake2b(what.encode(), digest_size=4).hexdigest()
    folder = out / f"{target}-{digest}"
    if what.startswith(PLACELESS):  # two of them may have different causes: the first few are kept
        numbers = [out / f"{target}-{digest}-{number}" for number in range(5)]
        folder = next((path for path in numbers if not path.exists()), numbers[0])
    if folder.exists():
        return
    folder.mkdir()
    (folder / "what.txt").write_text(what + "\n")
    (folder / "traceback.txt").write_text(trace)
    if (work / "case.pickle").exists():
        shutil.copy(work / "case.pickle", folder)
        (folder / "case.txt").write_text(pprint.pformat(pickle.loads((work / "case.pickle").read_bytes())) + "\n")
    if (work / "files").exists():
        shutil.copytree(work / "files", folder / "files")


def _status(pid: int, field: str) -> int:
    """A field of /proc/PID/status in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
