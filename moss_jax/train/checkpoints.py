"""A run's checkpoints: Orbax behind one small file.

    FOLDER/STEP/            one checkpoint: a folder for each tree of arrays, record/ (JSON), checksums.json
    FOLDER/damaged/STEP/    what failed its checksums, set aside

A save copies the arrays to host memory and goes on in the background. It is written under a temporary name, every file
is summed, and only then renamed: a folder with a step's name is whole, and a save that was killed leaves the one before
it. On restore every file is read against its sum; what fails is named and set aside, and the one before it is used.
"""

import concurrent.futures
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moss_jax.checkpoint.old_names import renamed_paths, with_keys
from moss_jax.documents import parse_object, read_json
from moss_jax.errors import MossError
from moss_jax.progress import Say
from moss_jax.train.state import TrainState

CHECKPOINTS = "checkpoints"  # in the folder of a run
CHECKSUMS = "checksums.json"
STAMPED = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it after everything else
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a save that is not whole
DAMAGED = "damaged"
PIECE = 1 << 22  # bytes read at a time
THREADS = 8
TIMEOUT = 3600  # seconds that a save may take in the background


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes one and calls every method, in the same order.

    Args:
        folder: made if it is not there. All processes see the same one.
        keep: how many of the newest stay, at least 2: one may turn out to be damaged.
        say: gets a line for each damaged checkpoint.

    Raises:
        MossError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, keep: int = 3, say: Say = print):
        if keep < 2:
            raise MossError(f"keep is {keep}, expected at least 2: one checkpoint may turn out to be damaged")
        self.folder = Path(folder).absolute()
        self._say = say
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells an error once a thread; here it is one line
        self._saving: int | None = None
        self._check_writable()
        if jax.process_index() == 0:
            for part in self.folder.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(part, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT, post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, oldest first; not verified."""
        return sorted(self._manager.all_steps())

    def newest_whole(self) -> int | None:
        """The newest step whose files are all as they were written, or None.

        Newer ones that are not are named, one line each, and set aside into `damaged/`.
        """
        for step in reversed(self.steps()):
            problem = verify(self.folder / str(step))
            if problem is None:
                return step
            self._set_aside(step, problem)
        return None

    def record(self, step: int) -> dict[str, Any]:
        """The JSON that was saved beside the arrays."""
        return self._read(step, record=ocp.args.JsonRestore())["record"]

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """Trees of arrays of a step, by name.

        Args:
            like: for each name a tree of jax.ShapeDtypeStruct with shardings: what comes out, on whatever mesh it was
                saved.
        """
        restored = self._read(step, **{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
        return {name: restored[name] for name in like}

    def save(self, step: int, record: dict[str, Any], **trees: Any) -> None:
        """Begins to save trees of arrays; returns when they are in host memory, so that they may be donated.

        Raises:
            MossError: this save, or the one before it, could not be written. What was whole stays.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(record=ocp.args.JsonSave(record), **items)
        self._guarded(self._manager.wait_until_finished)
        self._saving = step
        self._guarded(self._check_room, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
        self._guarded(self._manager.save, step, args=args, force=True)

    def save_state(self, step: int, record: dict[str, Any], state: TrainState) -> None:
        """`save` of a whole state, in parts that can be read alone."""
        extra = {"extra": state.extra} if jax.tree.leaves(state.extra) else {}
        self.save(step, record, params=state.params, optimizer=(state.step, state.opt_state), **extra)

    def restore_state(self, step: int, like: TrainState, optimizer: bool = True) -> TrainState:
        """What `save_state` saved; without `optimizer` its step and optimizer state are those of `like`.

        Args:
            like: of jax.ShapeDtypeStruct with shardings.
        """
        wanted = {"params": like.params}
        wanted |= {"optimizer": (like.step, like.opt_state)} if optimizer else {}
        wanted |= {"extra": like.extra} if jax.tree.leaves(like.extra) else {}
        old_paths = renamed_paths(like.params, self._saved_paths(step))
        found = self.restore(step, **with_keys(wanted, old_paths))
        found = with_keys(found, {old: path for path, old in old_paths.items()})
        count, opt_state = found.get("optimizer", (like.step, like.opt_state))
        return TrainState(count, found["params"], opt_state, found.get("extra", like.extra))

    def _saved_paths(self, step: int) -> set[str]:
        """The paths of the parameters that `save_state` saved."""
        try:
            return set(ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "params"))
        except (ValueError, KeyError, OSError) as error:
            raise MossError(f"{self.folder / str(step)}: cannot be restored ({_first_line(error)})") from error

    def check(self) -> None:
        """Raises MossError when the save in the background has failed; never waits."""
        if not self._manager.is_saving_in_progress():
            self._guarded(self._manager.wait_until_finished)

    def wait(self) -> None:
        """Returns when the save in the background is whole on disk. Raises MossError when it failed."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guarded(self._manager.close)

    def _check_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK | os.X_OK)
            reason = "no permission to write"
        except OSError as error:
            writable = False
            reason = error.strerror
        if not writable:
            raise MossError(f"{self.folder}: cannot be written ({reason}); choose another folder for the run")

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"No space left on device: {free / 1e9:.3g} of {needed / 1e9:.3g} GB")

    def _seal(self) -> None:
        """Orbax calls it on the first process when all files of a save are there, before the rename."""
        parts = list(self.folder.glob(f"{self._saving}{UNFINISHED}*"))
        if len(parts) != 1:
            raise RuntimeError(f"{self.folder}: expected one unfinished save of step {self._saving}, found {parts}")
        files = _files(parts[0])
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            sums = list(pool.map(lambda name: checksum(parts[0] / name), files))
        text = json.dumps({"files": dict(zip(files, sums, strict=True))}, indent=1)
        path = parts[0] / CHECKSUMS
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{zlib.crc32(text.encode()):08x}\n{text}")
            file.flush()
            os.fsync(file.fileno())

    def _set_aside(self, step: int, problem: str) -> None:
        source = self.folder / str(step)
        target = self.folder / DAMAGED / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            number = 1
            while target.exists():
                target = target.with_name(f"{step}-{number}")
                number = number + 1
            try:
                source.rename(target)
            except OSError as error:
                raise MossError(f"{source}: damaged, and cannot be set aside ({error.strerror})") from error
            self._say(f"checkpoint {source} is damaged: {problem}; set aside as {target}")
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise MossError(f"{self.folder / str(step)}: cannot be restored ({_first_line(error)})") from error

    def _guarded(self, function: Callable, *args: Any, **keywords: Any) -> None:
        try:
            function(*args, **keywords)
        except MossError:
            raise
        except Exception as error:  # TensorStore raises ValueError, the file system OSError, threads what they met
            whole = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
            left = f"the newest whole checkpoint is {max(whole)}" if whole else "there is no earlier checkpoint"
            where = self.folder if self._saving is None else self.folder / str(self._saving)
            raise MossError(f"{where}: cannot be saved ({_first_line(error)}); {left}") from error


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file; of Orbax's own description without the time of the commit."""
    size = 0
    crc = 0
    if path.name == STAMPED:
        described = read_json(path) | {"commit_timestamp_nsecs": None}
        text = json.dumps(described, sort_keys=True).encode()
        return [len(text), zlib.crc32(text)]
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            size = size + len(piece)
            crc = zlib.crc32(piece, crc)
    return [size, crc]


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. The processes of a run read a share of the files each."""
    path = folder / CHECKSUMS
    try:
        own, _, text = path.read_text(encoding="utf-8").partition("\n")
        if own != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError
        expected = parse_object(text)["files"]
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, KeyError):
        return f"{CHECKSUMS} is not as it was written"
    names = list(expected)
    mine = slice(jax.process_index(), None, jax.process_count())
    verdicts = np.zeros(len(names), np.int32)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        verdicts[mine] = list(pool.map(lambda name: _verdict(folder / name, expected[name]), names[mine]))
    if jax.process_count() > 1:
        verdicts = np.asarray(multihost_utils.process_allgather(verdicts)).sum(0)
    bad = [f"{name} {VERDICTS[verdict]}" for name, verdict in zip(names, verdicts, strict=True) if verdict]
    return ", ".join(_shortened(bad)) or None


VERDICTS = ("is as it was written", "is missing or cannot be read", "has another length", "has other contents")


def _verdict(path: Path, expected: Iterable[int]) -> int:
    try:
        size, crc = checksum(path)
    except (OSError, ValueError):
        return 1
    return 2 if size != expected[0] else 3 * (crc != expected[1])


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _shortened(items: list[str], most: int = 3) -> list[str]:
    return items if len(items) <= most else [*items[:most], f"and {len(items) - most} more files"]


def _first_line(error: BaseException) -> str:
    """The part of an error that a person can use."""
    text = " ".join(str(error).split())
    for known in (
        "No space left on device",
        "File too large",
        "Disk quota exceeded",
        "Permission denied",
        "Read-only file system",
    ):
        if known in text:
            return known
    return f"{type(error).__name__}: {text[:300]}"
