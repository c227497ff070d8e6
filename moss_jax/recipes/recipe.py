"""A recipe: steps in a fixed order, each done once. The same call goes on where it was stopped.

FOLDER/recipe.json says with what the recipe was begun, which steps are done, and the seconds that each has taken. A
step that was stopped is called again; it has to go on by itself from what it left, as training and tokenizing do.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moss_jax.checkpoint import write_text
from moss_jax.checkpoint.config_io import read_config
from moss_jax.documents import read_json
from moss_jax.errors import MossError
from moss_jax.files import folder_lock
from moss_jax.progress import Say, duration
from moss_jax.recipes.background import Lane

JOURNAL = "recipe.json"


@dataclass(frozen=True)
class RecipeStep:
    """One step.

    Attributes:
        name: what --from-step and the journal call it.
        what: a line for people.
        work: makes it; returns 0, or the exit code that the whole recipe ends with (75: called to stop, saved).
        makes: paths that it writes; they, and what lies beside them unfinished (NAME.part), go when it is made anew.
        start: begins `work` in a process of its own, whose exit code is what `work` returns. Then the steps after it do
            not wait for it, but one that gathers does. None: it is made here.
        gathers: whether it needs what was begun beside.
    """

    name: str
    what: str
    work: Callable[[], int]
    makes: tuple[Path, ...] = ()
    start: Callable[[], BaseProcess] | None = None
    gathers: bool = False


def run_recipe(
    folder: str | Path,
    steps: Sequence[RecipeStep],
    about: Mapping[str, Any],
    from_step: str | None = None,
    to_step: str | None = None,
    say: Say = print,
) -> int:
    """Makes every step that is not done, in order; returns 0, or the code of the step that stopped. Whatever ends it,
    no step goes on behind its back.

    Args:
        folder: gets the journal.
        about: what all calls must agree in, JSON.
        from_step: this step and those after it are made anew.
        to_step: the last one of this call.
        say: gets a line before and after each step.

    Raises:
        MossError: the folder is of a recipe with another `about`, another process works in it, there is no such
            step, or a step failed.
    """
    folder = Path(folder)
    names = [step.name for step in steps]
    for name in (from_step, to_step):
        if name is not None and name not in names:
            raise MossError(f"step {name!r}: unknown, there are {', '.join(names)}")
    with folder_lock(folder):
        return _run_locked(steps, _Journal(folder, about), from_step, to_step, say)


def _run_locked(
    steps: Sequence[RecipeStep], journal: "_Journal", from_step: str | None, to_step: str | None, say: Say
) -> int:
    names = [step.name for step in steps]
    if from_step is not None:
        journal.again = names[names.index(from_step) :]
        journal.write()
    _forget(journal, steps)
    heads = {step.name: f"[{number}/{len(steps)}] {step.name}" for number, step in enumerate(steps, 1)}

    def ended(step: RecipeStep, seconds: float, code: int) -> None:
        journal.took(step.name, seconds, done=not code)
        if not code:
            say(f"{heads[step.name]}: done in {duration(journal.seconds[step.name])}")

    lane = Lane(ended)
    try:
        for step in steps:
            head = heads[step.name]
            if step.name in journal.done:
                say(f"{head}: done before, in {duration(journal.seconds.get(step.name, 0))}")
            else:
                if step.start is None:
                    lane.begin()
                if (step.gathers or lane.code) and (code := lane.wait()):
                    return code
                so_far = journal.wall
                say(f"{head}: {step.what}" + (f" ({duration(so_far)} so far)" if so_far >= 1 else ""))
                if step.start is not None:
                    lane.add(step)
                elif code := _made(step, ended):
                    return code
            if step.name == to_step:
                break
        lane.begin()
        if code := lane.wait():
            return code
    finally:
        lane.stop()
    if to_step is None:
        say(f"everything is done, in {duration(journal.wall)}")
    return 0


def _made(step: RecipeStep, ended: Callable[[RecipeStep, float, int], None]) -> int:
    """Makes a step here. A step that raises has not ended well, but its time counts."""
    begin = time.monotonic()
    code = 1
    try:
        code = step.work()
    finally:
        ended(step, time.monotonic() - begin, code)
    return code


@dataclass(frozen=True)
class _Known:
    """The fields of a journal that are used when its recipe is started again."""

    done: tuple[str, ...]
    again: tuple[str, ...]
    seconds: dict
    wall: float | None = None


class _Journal:
    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.path = folder / JOURNAL
        self.about = dict(about)
        self.done: list[str] = []
        self.again: list[str] = []  # steps whose outputs are being taken away
        self.seconds: dict[str, float] = {}
        self._before = 0.0
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        if self.path.is_file():
            found = read_json(self.path)
            if found.get("about") != self.about:
                raise MossError(
                    f"{folder}: was begun with {json.dumps(found.get('about'))}, expected {json.dumps(self.about)}; "
                    "remove it or run elsewhere"
                )
            known = read_config(_Known, found, self.path, foreign=True)
            self.done = list(known.done)
            self.again = list(known.again)
            self.seconds = known.seconds
            self._before = sum(self.seconds.values()) if known.wall is None else known.wall

    @property
    def wall(self) -> float:
        """Seconds of all calls together; less than the steps' sum where some were made beside others."""
        return self._before + time.monotonic() - self._begin

    def took(self, name: str, seconds: float, done: bool) -> None:
        """Notes that a step ended, after so many seconds more."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0) + seconds
            if done:
                self.done.append(name)
            self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "about": self.about,
            "done": self.done,
            "again": self.again,
            "seconds": self.seconds,
            "wall": self.wall,
        }
        write_text(self.path, json.dumps(values, indent=1) + "\n")


def _forget(journal: _Journal, steps: Sequence[RecipeStep]) -> None:
    """Takes away what the steps in `again` made. Stopped, the next call finishes it."""
    if not journal.again:
        return
    for step in steps:
        if step.name in journal.again:
            for path in step.makes:
                for place in (path, path.with_name(path.name + ".part")):
                    if place.is_dir():
                        shutil.rmtree(place)
                    else:
                        place.unlink(missing_ok=True)
    journal.done = [name for name in journal.done if name not in journal.again]
    journal.seconds = {name: taken for name, taken in journal.seconds.items() if name not in journal.again}
    journal.again = []
    journal.write()
