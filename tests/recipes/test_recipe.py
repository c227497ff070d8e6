"""Recipes: finished steps are skipped, interrupted ones resume, and outputs are removed before a step is run again."""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.errors import MossError
from moss_jax.files import write_text
from moss_jax.recipes.background import background_process
from moss_jax.recipes.recipe import RECIPE_FILE, RecipeStep, run_recipe

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
NAMES = ("corpus", "text", "split", "system")


class RecipeRun:
    """A recipe whose steps write a file each; `failure` has what happens to a step the next time it runs."""

    def __init__(self, folder):
        self.folder = folder
        self.made = []
        self.lines = []
        self.failure = {}
        self.steps = [RecipeStep(name, f"makes {name}", self._work(name), (folder / name,)) for name in NAMES]

    def _work(self, name):
        def work():
            self.made.append(name)
            (self.folder / f"{name}.part").mkdir(parents=True, exist_ok=True)
            failure = self.failure.pop(name, 0)
            if isinstance(failure, BaseException):
                raise failure
            if not failure:
                shutil.rmtree(self.folder / f"{name}.part")
                (self.folder / name).mkdir()
            return failure

        return work

    def run(self, from_step=None, to_step=None, quick=False):
        self.made = []
        self.lines = []
        return run_recipe(self.folder, self.steps, {"quick": quick}, from_step, to_step, self.lines.append)


def test_steps_run_in_order_and_once(tmp_path):
    recipe = RecipeRun(tmp_path / "nano")
    assert recipe.run() == 0 and recipe.made == list(NAMES)
    assert recipe.lines[0] == "[1/4] corpus: makes corpus" and recipe.lines[-1].startswith("everything is done, in ")
    assert recipe.run() == 0 and recipe.made == []
    assert [line.partition(", in ")[0] for line in recipe.lines[:-1]] == [
        f"[{i}/4] {name}: done before" for i, name in enumerate(NAMES, 1)
    ]


@given(st.lists(st.sampled_from([KeyboardInterrupt(), MossError("no"), 75, 3]), max_size=4), st.data())
@settings(max_examples=15, deadline=None)
def test_interrupted_steps_are_run_again(tmp_path_factory, troubles, data):
    """Whatever goes wrong where: every step is made to its end once, in order, and none before that of those before."""
    recipe = RecipeRun(tmp_path_factory.mktemp("kitchen") / "nano")
    finished = []
    for failure in troubles:
        name = data.draw(st.sampled_from(NAMES))
        recipe.failure = {name: failure}
        try:
            code = recipe.run()
        except (KeyboardInterrupt, MossError) as error:
            assert error is failure and recipe.made[-1] == name
            finished += recipe.made[:-1]
        else:
            met = name in recipe.made
            assert code == (failure if met else 0)
            finished += recipe.made[:-1] if met else recipe.made
    recipe.failure = {}
    assert recipe.run() == 0
    assert finished + recipe.made == list(NAMES)


def test_time_of_a_stopped_step_is_kept(tmp_path):
    recipe = RecipeRun(tmp_path / "nano")
    recipe.failure = {"text": 75}
    assert recipe.run() == 75
    journal = json.loads((tmp_path / "nano" / RECIPE_FILE).read_text())
    assert journal["done"] == ["corpus"] and set(journal["seconds"]) == {"corpus", "text"}
    journal["seconds"]["text"] = 1000.0
    (tmp_path / "nano" / RECIPE_FILE).write_text(json.dumps(journal))
    recipe.run()
    assert "[2/4] text: done in 17 min" in recipe.lines


def test_from_step_makes_anew(tmp_path):
    recipe = RecipeRun(tmp_path / "nano")
    recipe.run()
    assert recipe.run("split") == 0 and recipe.made == ["split", "system"]
    with pytest.raises(MossError, match="'sing': unknown, expected one of corpus, text, split, system"):
        recipe.run("sing")


def test_to_step_ends_there(tmp_path):
    recipe = RecipeRun(tmp_path / "nano")
    for _ in range(2):
        assert recipe.run(to_step="text") == 0
    assert (tmp_path / "nano" / "text").exists() and recipe.made == []
    assert recipe.run("corpus", "corpus") == 0 and recipe.made == ["corpus"]
    with pytest.raises(MossError, match="'sing': unknown"):
        recipe.run(to_step="sing")
    assert recipe.run() == 0 and recipe.made == ["text", "split", "system"]


def test_an_interrupted_removal_is_completed(tmp_path, monkeypatch):
    """The next call removes the rest and runs these steps again, with or without --from-step."""
    recipe = RecipeRun(tmp_path / "nano")
    recipe.run()
    whole = shutil.rmtree

    def killed(path):
        whole(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.run("text")
    monkeypatch.setattr(shutil, "rmtree", whole)
    assert not (tmp_path / "nano" / "text").exists() and (tmp_path / "nano" / "system").exists()
    assert recipe.run() == 0 and recipe.made == ["text", "split", "system"]


def test_another_recipe_in_the_folder(tmp_path):
    recipe = RecipeRun(tmp_path / "nano")
    recipe.run()
    with pytest.raises(MossError, match=r'was started with \{"quick": false\}, now it is \{"quick": true\}'):
        recipe.run(quick=True)


class BackgroundSteps(RecipeRun):
    """The recipe with the background steps "flow" and "vocoder", which sleep, then end with an exit code."""

    def __init__(self, folder, flow=(time.sleep, 0.3), vocoder=(time.sleep, 0.1)):
        super().__init__(folder)
        corpus, text, split, system = self.steps
        self.processes = {}
        self.targets = {"flow": flow, "vocoder": vocoder}
        background_process = [
            RecipeStep(name, f"makes {name}", self._work(name), start=functools.partial(self._start, name))
            for name in self.targets
        ]
        self.steps = [corpus, *background_process, text, split, replace(system, needs_background=True)]

    def _start(self, name):
        target, *args = self.targets[name]
        self.made.append(name)
        self.processes[name] = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
        self.processes[name].start()
        return self.processes[name]

    @property
    def done(self):
        return json.loads((self.folder / RECIPE_FILE).read_text())["done"]


def test_background_steps_are_done_before_a_step_that_needs_them(tmp_path):
    recipe = BackgroundSteps(tmp_path / "nano")
    assert recipe.run() == 0
    assert recipe.done == ["corpus", "text", "split", "flow", "vocoder", "system"]
    assert recipe.made[-2:] == ["vocoder", "system"] and sorted(recipe.made) == sorted([*NAMES, "flow", "vocoder"])
    journal = json.loads((tmp_path / "nano" / RECIPE_FILE).read_text())
    assert journal["seconds"]["flow"] > 0.3 and journal["wall"] > journal["seconds"]["flow"]
    assert recipe.run() == 0 and recipe.made == []
    assert recipe.run("vocoder") == 0 and sorted(recipe.made) == ["split", "system", "text", "vocoder"]
    assert recipe.run("corpus", "flow") == 0 and recipe.made == ["corpus", "flow"] and recipe.done == recipe.made


@pytest.mark.parametrize("code", [1, 3, 75])
def test_a_background_step_that_stops_stops_the_recipe(tmp_path, code):
    recipe = BackgroundSteps(tmp_path / "nano", flow=(os._exit, code))
    if code == 1:
        with pytest.raises(MossError, match=r"step flow: failed \(exit code 1\)"):
            recipe.run()
    else:
        assert recipe.run() == code
    assert "vocoder" not in recipe.made and "flow" not in recipe.done and "system" not in recipe.made
    recipe.targets["flow"] = (time.sleep, 0)
    assert recipe.run() == 0 and set(recipe.made) >= {"flow", "vocoder", "system"} and "corpus" not in recipe.made


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MossError("no"), 75])
def test_background_steps_are_stopped_when_the_recipe_ends(tmp_path, failure):
    recipe = BackgroundSteps(tmp_path / "nano", flow=(time.sleep, 60))
    recipe.failure = {"split": failure}
    *others, split, system = recipe.steps

    def in_the_middle():
        end = time.monotonic() + 60
        while "flow" not in recipe.processes and time.monotonic() < end:
            time.sleep(0.05)
        return split.work()

    recipe.steps = [*others, replace(split, work=in_the_middle), system]
    if isinstance(failure, int):
        assert recipe.run() == failure
    else:
        with pytest.raises(type(failure)):
            recipe.run()
    assert not recipe.processes["flow"].is_alive() and recipe.processes.keys() == {"flow"}
    assert recipe.done == ["corpus", "text"]


@needs_two_cores
def test_each_of_two_processes_is_bound_to_half_of_the_cores(tmp_path, capfd):
    recipe = BackgroundSteps(tmp_path / "nano")
    all_cores = os.sched_getaffinity(0)
    seen = []
    corpus, flow, vocoder, text, *others = recipe.steps

    def look():
        while not (tmp_path / "nano" / "half").exists():
            time.sleep(0.05)
        seen.append(os.sched_getaffinity(0))
        return 0

    work = functools.partial(half_of_the_cores, tmp_path / "nano" / "half")
    flow = replace(flow, start=background_process(work, "flow"))
    recipe.steps = [corpus, flow, vocoder, replace(text, work=look), *others]
    assert recipe.run() == 0
    (here,) = seen
    there = set(json.loads((tmp_path / "nano" / "half").read_text()))
    assert here | there == all_cores == os.sched_getaffinity(0) and not here & there
    assert "flow | looked" in capfd.readouterr().err


def half_of_the_cores(path, say):
    write_text(path, json.dumps(sorted(os.sched_getaffinity(0))))
    say("looked")
    time.sleep(0.5)  # the other one looks too
    return 0


def test_preemption_while_waiting_stops_background_steps(tmp_path):
    recipe = BackgroundSteps(tmp_path / "nano", flow=(time.sleep, 60))
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert recipe.run() == 75
    assert not recipe.processes["flow"].is_alive() and recipe.done == ["corpus", "text", "split"]
