"""The checkpoints of a run, saved and restored with Orbax.

    FOLDER/STEP/            one checkpoint: a folder for each tree of arrays, record/ (JSON), checksums.json
    FOLDER/damaged/STEP/    checkpoints that failed their checksums

A save copies the arrays to host memory and continues in the background. It writes to a temporary name, computes the
checksum of every file, and renames the folder last: a folder that is named after a step is complete, and a save that is
killed leaves the checkpoint before it untouched. On resume every file is compared with its checksum; a damaged
checkpoint is reported and moved to damaged/, and the one before it is used.
"""

import concurrent.futures
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
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
TIMESTAMPED = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it after all other files
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of an incomplete save
DAMAGED = "damaged"
BLOCK = 1 << 22  # bytes read at a time
THREADS = 8
TIMEOUT = 3600  # seconds of a save in the background


class Checkpoints:
    """The checkpoints of one run. Every process of the run creates one and calls every method, in the same order.

    Until `close`, messages of the logger "absl" are suppressed: Orbax logs an error from each of its threads, and the
    error is raised anyway.

    Args:
        folder: created if it does not exist. It is shared by all processes.
        keep: how many of the newest checkpoints are kept, at least 2: one may turn out to be damaged.
        say: receives a line for each damaged checkpoint.

    Raises:
        MossError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, keep: int = 3, say: Say = print):
        if keep < 2:
            raise MossError(f"keep is {keep}, expected at least 2: one checkpoint may turn out to be damaged")
        self.folder = Path(folder).absolute()
        self._say = say
        self._saving: int | None = None
        self._check_writable()
        self._log_level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)
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
        """The steps of all checkpoints, oldest first; their files are not verified."""
        return sorted(self._manager.all_steps())

    def newest_complete(self) -> int | None:
        """The newest step whose files all match their checksums, or None.

        Newer checkpoints are reported, one line each, and moved to `damaged/`.
        """
        for step in reversed(self.steps()):
            problem = verify(self.folder / str(step))
            if problem is None:
                return step
            self._move_to_damaged(step, problem)
        return None

    def record(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with the arrays of a step."""
        return self._read(step, record=ocp.args.JsonRestore())["record"]

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """Restores trees of arrays of a step, by name.

        Args:
            like: for each name a tree of jax.ShapeDtypeStruct with the shardings of the result; they may differ from
                those of the save.

        Raises:
            MossError: there are no such arrays, or they have other shapes.
        """
        restored = self._read(step, **{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
        return {name: restored[name] for name in like}

    def save(self, step: int, record: dict[str, Any], **trees: Any) -> None:
        """Starts to save trees of arrays; returns when they are in host memory, so that they may be donated.

        Raises:
            MossError: this save, or the one before it, could not be written. Complete checkpoints are kept.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(record=ocp.args.JsonSave(record), **items)
        self._guarded(self._manager.wait_until_finished)
        self._saving = step
        self._guarded(self._check_free_space, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
        self._guarded(self._manager.save, step, args=args, force=True)

    def save_state(self, step: int, record: dict[str, Any], state: TrainState) -> None:
        """Saves a training state with `save`, in parts that can be restored separately."""
        extra = {"extra": state.extra} if jax.tree.leaves(state.extra) else {}
        self.save(step, record, params=state.params, optimizer=(state.step, state.opt_state), **extra)

    def restore_state(self, step: int, like: TrainState, optimizer: bool = True) -> TrainState:
        """Restores what `save_state` saved.

        Args:
            like: a state of jax.ShapeDtypeStruct with shardings.
            optimizer: whether to restore the step and the optimizer state; otherwise they are those of `like`.
        """
        wanted: dict[str, Any] = {"params": like.params}
        wanted |= {"optimizer": (like.step, like.opt_state)} if optimizer else {}
        wanted |= {"extra": like.extra} if jax.tree.leaves(like.extra) else {}
        old_paths = renamed_paths(like.params, self._saved_paths(step))
        restored = self.restore(step, **with_keys(wanted, old_paths))
        restored = with_keys(restored, {old: path for path, old in old_paths.items()})
        count, opt_state = restored.get("optimizer", (like.step, like.opt_state))
        return TrainState(count, restored["params"], opt_state, restored.get("extra", like.extra))

    def _saved_paths(self, step: int) -> set[str]:
        """The paths of the parameters that `save_state` saved."""
        try:
            return set(ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "params"))
        except (ValueError, KeyError, OSError) as error:
            raise MossError(f"{self.folder / str(step)}: cannot be restored ({_first_line(error)})") from error

    def check(self) -> None:
        """Raises MossError when the save in the background has failed; does not wait for it."""
        if not self._manager.is_saving_in_progress():
            self._guarded(self._manager.wait_until_finished)

    def wait(self) -> None:
        """Waits until the save in the background is complete. Raises MossError when it failed."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Completes the save in the background. Raises MossError when it failed."""
        try:
            self._guarded(self._manager.close)
        finally:
            logging.getLogger("absl").setLevel(self._log_level)

    def _check_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(self.folder, os.W_OK | os.X_OK) else "no permission to write"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            raise MossError(f"{self.folder}: cannot be written ({reason}); choose another folder for the run")

    def _check_free_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"No space left on device: {free / 1e9:.3g} of {needed / 1e9:.3g} GB")

    def _seal(self) -> None:
        """Writes the checksums. Orbax calls it on the first process after all files of a save, before the rename."""
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

    def _move_to_damaged(self, step: int, problem: str) -> None:
        source = self.folder / str(step)
        target = self.folder / DAMAGED / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            number = 1
            while target.exists():
                target = target.with_name(f"{step}-{number}")
                number += 1
            try:
                source.rename(target)
            except OSError as error:
                raise MossError(f"{source}: damaged, and cannot be moved to {target} ({error.strerror})") from error
            self._say(f"checkpoint {source} is damaged: {problem}; moved to {target}")
        multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
        self._manager.reload()

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise MossError(f"{self.folder / str(step)}: cannot be restored ({_first_line(error)})") from error

    def _guarded(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        """Calls a function of the manager and raises its errors as a MossError."""
        try:
            function(*args, **keywords)
        except MossError:
            raise
        except Exception as error:  # ValueError from TensorStore, OSError from the file system, anything from a thread
            steps = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
            newest = f"the newest complete checkpoint is {max(steps)}" if steps else "there is no earlier checkpoint"
            path = self.folder if self._saving is None else self.folder / str(self._saving)
            raise MossError(f"{path}: cannot be saved ({_first_line(error)}); {newest}") from error


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file. The commit time in Orbax's metadata is left out: it is written after the checksums."""
    size = 0
    crc = 0
    if path.name == TIMESTAMPED:
        metadata = read_json(path) | {"commit_timestamp_nsecs": None}
        text = json.dumps(metadata, sort_keys=True).encode()
        return [len(text), zlib.crc32(text)]
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def verify(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Each process of a run reads a share of the files."""
    path = folder / CHECKSUMS
    try:
        checksum_of_text, _, text = path.read_text(encoding="utf-8").partition("\n")
        if checksum_of_text != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError
        expected = parse_object(text)["files"]
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, KeyError):
        return f"{CHECKSUMS} is damaged"
    names = list(expected)
    share = slice(jax.process_index(), None, jax.process_count())
    verdicts = np.zeros(len(names), np.int32)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        verdicts[share] = list(pool.map(lambda name: _verdict(folder / name, expected[name]), names[share]))
    if jax.process_count() > 1:
        verdicts = np.asarray(multihost_utils.process_allgather(verdicts)).sum(0)
    bad = [f"{name} {VERDICTS[verdict]}" for name, verdict in zip(names, verdicts, strict=True) if verdict]
    return ", ".join(_shortened(bad)) or None


VERDICTS = ("is correct", "is missing or cannot be read", "has another length", "has other contents")


def _verdict(path: Path, expected: list[int]) -> int:
    """An index of VERDICTS."""
    try:
        size, crc = checksum(path)
    except (OSError, ValueError):
        return 1
    if size != expected[0]:
        return 2
    return 0 if crc == expected[1] else 3


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _shortened(items: list[str], limit: int = 3) -> list[str]:
    return items if len(items) <= limit else [*items[:limit], f"and {len(items) - limit} more files"]


def _first_line(error: BaseException) -> str:
    """The part of an error that helps a user."""
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
