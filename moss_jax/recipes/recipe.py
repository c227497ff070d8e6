"""A recipe: steps in a fixed order, each done once. The same call resumes an interrupted recipe.

FOLDER/recipe.json records the arguments of the recipe, the steps that are done, and the seconds that each has taken. An
interrupted step is run again; it has to resume by itself, as training and tokenizing do.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.checkpoint.config_io import read_config
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import folder_lock, write_text
from moss_jax.progress import Say, duration
from moss_jax.recipes.background import BackgroundRunner, BackgroundStep, StartProcess

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class RecipeStep:
    """One step.

    Attributes:
        name: as in --from-step and the journal.
        description: one line for people.
        work: does the step; returns 0, or the exit code that the recipe ends with (75: preempted, saved).
        outputs: paths that it writes. They and their unfinished forms (NAME.part) are removed before it is run anew.
        start: starts `work` in a background process, whose exit code is what `work` returns. Later steps do not wait
            for it, unless they need it. None: the step runs in this process.
        needs_background: whether the step needs the results of the background steps.
    """

    name: str
    description: str
    work: Callable[[], int]
    outputs: tuple[Path, ...] = ()
    start: StartProcess | None = None
    needs_background: bool = False


def run_recipe(
    folder: str | Path,
    steps: Sequence[RecipeStep],
    arguments: Mapping[str, Any],
    from_step: str | None = None,
    to_step: str | None = None,
    say: Say = print,
) -> int:
    """Runs every step that is not done, in order. All background steps are stopped before this returns or raises.

    Args:
        folder: receives the journal.
        arguments: of the recipe, JSON values; all calls for one folder must have the same.
        from_step: this step and those after it are run anew.
        to_step: the last step of this call.
        say: receives a line before and after each step.

    Returns:
        0, or the exit code of the step that stopped.

    Raises:
        MossError: the folder belongs to a recipe with other arguments, another process works in it, there is no such
            step, or a step failed.
    """
    folder = Path(folder)
    names = [step.name for step in steps]
    for name in (from_step, to_step):
        if name is not None and name not in names:
            raise MossError(f"step {name!r}: unknown, expected one of {', '.join(names)}")
    with folder_lock(folder):
        return _run_locked(steps, _Journal(folder, arguments), from_step, to_step, say)


def _run_locked(
    steps: Sequence[RecipeStep], journal: "_Journal", from_step: str | None, to_step: str | None, say: Say
) -> int:
    names = [step.name for step in steps]
    if from_step is not None:
        journal.again = names[names.index(from_step) :]
        journal.write()
    _remove_outputs(journal, steps)
    headings = {step.name: f"[{number}/{len(steps)}] {step.name}" for number, step in enumerate(steps, 1)}

    def on_end(step: RecipeStep | BackgroundStep, seconds: float, exit_code: int) -> None:
        journal.record(step.name, seconds, done=exit_code == 0)
        if exit_code == 0:
            say(f"{headings[step.name]}: done in {duration(journal.seconds[step.name])}")

    background = BackgroundRunner(on_end)
    try:
        for step in steps:
            heading = headings[step.name]
            if step.name in journal.done:
                say(f"{heading}: done before, in {duration(journal.seconds.get(step.name, 0))}")
            else:
                if step.start is None:
                    background.start()
                # A background step that has failed ends the recipe here.
                if (step.needs_background or background.exit_code) and (exit_code := background.wait()):
                    return exit_code
                elapsed = journal.wall
                say(f"{heading}: {step.description}" + (f" ({duration(elapsed)} so far)" if elapsed >= 1 else ""))
                if step.start is not None:
                    background.add(step)
                elif exit_code := _run_step(step, on_end):
                    return exit_code
            if step.name == to_step:
                break
        background.start()
        if exit_code := background.wait():
            return exit_code
    finally:
        background.stop()
    if to_step is None:
        say(f"everything is done, in {duration(journal.wall)}")
    return 0


def _run_step(step: RecipeStep, on_end: Callable[[RecipeStep, float, int], None]) -> int:
    """Runs a step in this process. The time of a step that raises is recorded too."""
    start = time.monotonic()
    exit_code = 1
    try:
        exit_code = step.work()
    finally:
        on_end(step, time.monotonic() - start, exit_code)
    return exit_code


@dataclass(frozen=True)
class _JournalFields:
    """The fields of recipe.json that are read when a recipe is resumed; `wall` is missing in files of old versions."""

    done: tuple[str, ...]
    again: tuple[str, ...]
    seconds: dict
    wall: float | None = None


class _Journal:
    def __init__(self, folder: Path, arguments: Mapping[str, Any]):
        self.path = folder / RECIPE_FILE
        self.arguments = dict(arguments)
        self.done: list[str] = []
        self.again: list[str] = []  # steps whose outputs are being removed
        self.seconds: dict[str, float] = {}
        self._wall_before = 0.0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        if self.path.is_file():
            values = read_json(self.path)
            if values.get("about") != self.arguments:
                raise MossError(
                    f"{folder}: was started with {json.dumps(values.get('about'))}, now it is "
                    f"{json.dumps(self.arguments)}; use the same arguments, another folder, or remove this one"
                )
            fields = read_config(_JournalFields, values, self.path, foreign=True)
            self.done = list(fields.done)
            self.again = list(fields.again)
            self.seconds = fields.seconds
            self._wall_before = sum(self.seconds.values()) if fields.wall is None else fields.wall

    @property
    def wall(self) -> float:
        """Seconds of all calls together; less than the sum of the steps' where some ran in the background."""
        return self._wall_before + time.monotonic() - self._start

    def record(self, name: str, seconds: float, done: bool) -> None:
        """Records that a step has ended after this many more seconds."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0) + seconds
            if done:
                self.done.append(name)
            self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "about": self.arguments,
            "done": self.done,
            "again": self.again,
            "seconds": self.seconds,
            "wall": self.wall,
        }
        write_text(self.path, json.dumps(values, indent=1) + "\n")


def _remove_outputs(journal: _Journal, steps: Sequence[RecipeStep]) -> None:
    """Removes the outputs of the steps in `journal.again`. If interrupted, the next call completes the removal."""
    if not journal.again:
        return
    for step in steps:
        if step.name in journal.again:
            for path in step.outputs:
                for output in (path, path.with_name(path.name + ".part")):
                    if output.is_dir():
                        shutil.rmtree(output)
                    else:
                        output.unlink(missing_ok=True)
    journal.done = [name for name in journal.done if name not in journal.again]
    journal.seconds = {name: seconds for name, seconds in journal.seconds.items() if name not in journal.again}
    journal.again = []
    journal.write()
