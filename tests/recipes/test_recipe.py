"""Recipes: what is done is skipped, what was stopped goes on, what is asked for anew is taken away first."""

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

from moss_jax.checkpoint import write_text
from moss_jax.errors import MossError
from moss_jax.recipes.background import background_process
from moss_jax.recipes.recipe import RECIPE_FILE, RecipeStep, run_recipe

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
NAMES = ("corpus", "text", "split", "system")


class Kitchen:
    """A recipe whose steps write a file each; `trouble` says what happens to a step the next time it is made."""

    def __init__(self, folder):
        self.folder = folder
        self.made = []
        self.lines = []
        self.trouble = {}
        self.steps = [RecipeStep(name, f"makes {name}", self._work(name), (folder / name,)) for name in NAMES]

    def _work(self, name):
        def work():
            self.made.append(name)
            (self.folder / f"{name}.part").mkdir(parents=True, exist_ok=True)
            trouble = self.trouble.pop(name, 0)
            if isinstance(trouble, BaseException):
                raise trouble
            if not trouble:
                shutil.rmtree(self.folder / f"{name}.part")
                (self.folder / name).mkdir()
            return trouble

        return work

    def run(self, from_step=None, to_step=None, quick=False):
        self.made = []
        self.lines = []
        return run_recipe(self.folder, self.steps, {"quick": quick}, from_step, to_step, self.lines.append)


def test_steps_come_in_order_and_once(tmp_path):
    kitchen = Kitchen(tmp_path / "nano")
    assert kitchen.run() == 0 and kitchen.made == list(NAMES)
    assert kitchen.lines[0] == "[1/4] corpus: makes corpus" and kitchen.lines[-1].startswith("everything is done, in ")
    assert kitchen.run() == 0 and kitchen.made == []
    assert [line.partition(", in ")[0] for line in kitchen.lines[:-1]] == [
        f"[{i}/4] {name}: done before" for i, name in enumerate(NAMES, 1)
    ]


@given(st.lists(st.sampled_from([KeyboardInterrupt(), MossError("no"), 75, 3]), max_size=4), st.data())
@settings(max_examples=15, deadline=None)
def test_what_was_stopped_is_called_again(tmp_path_factory, troubles, data):
    """Whatever goes wrong where: every step is made to its end once, in order, and none before that of those before."""
    kitchen = Kitchen(tmp_path_factory.mktemp("kitchen") / "nano")
    finished = []
    for trouble in troubles:
        name = data.draw(st.sampled_from(NAMES))
        kitchen.trouble = {name: trouble}
        try:
            code = kitchen.run()
        except (KeyboardInterrupt, MossError) as error:
            assert error is trouble and kitchen.made[-1] == name
            finished += kitchen.made[:-1]
        else:
            met = name in kitchen.made
            assert code == (trouble if met else 0)
            finished += kitchen.made[:-1] if met else kitchen.made
    kitchen.trouble = {}
    assert kitchen.run() == 0
    assert finished + kitchen.made == list(NAMES)


def test_time_of_a_stopped_step_is_kept(tmp_path):
    kitchen = Kitchen(tmp_path / "nano")
    kitchen.trouble = {"text": 75}
    assert kitchen.run() == 75
    journal = json.loads((tmp_path / "nano" / RECIPE_FILE).read_text())
    assert journal["done"] == ["corpus"] and set(journal["seconds"]) == {"corpus", "text"}
    journal["seconds"]["text"] = 1000.0
    (tmp_path / "nano" / RECIPE_FILE).write_text(json.dumps(journal))
    kitchen.run()
    assert "[2/4] text: done in 17 min" in kitchen.lines


def test_from_step_makes_anew(tmp_path):
    kitchen = Kitchen(tmp_path / "nano")
    kitchen.run()
    assert kitchen.run("split") == 0 and kitchen.made == ["split", "system"]
    with pytest.raises(MossError, match="'sing': unknown, expected one of corpus, text, split, system"):
        kitchen.run("sing")


def test_to_step_ends_there(tmp_path):
    kitchen = Kitchen(tmp_path / "nano")
    for _ in range(2):
        assert kitchen.run(to_step="text") == 0
    assert (tmp_path / "nano" / "text").exists() and kitchen.made == []
    assert kitchen.run("corpus", "corpus") == 0 and kitchen.made == ["corpus"]
    with pytest.raises(MossError, match="'sing': unknown"):
        kitchen.run(to_step="sing")
    assert kitchen.run() == 0 and kitchen.made == ["text", "split", "system"]


def test_killed_while_it_takes_away(tmp_path, monkeypatch):
    """Then the next call takes the rest away, asked or not, and makes it all anew."""
    kitchen = Kitchen(tmp_path / "nano")
    kitchen.run()
    whole = shutil.rmtree

    def killed(path):
        whole(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        kitchen.run("text")
    monkeypatch.setattr(shutil, "rmtree", whole)
    assert not (tmp_path / "nano" / "text").exists() and (tmp_path / "nano" / "system").exists()
    assert kitchen.run() == 0 and kitchen.made == ["text", "split", "system"]


def test_another_recipe_in_the_folder(tmp_path):
    kitchen = Kitchen(tmp_path / "nano")
    kitchen.run()
    with pytest.raises(MossError, match=r'was started with \{"quick": false\}, now it is \{"quick": true\}'):
        kitchen.run(quick=True)


class TwoLanes(Kitchen):
    """The recipe with "flow" and "vocoder" beside "text"; they sleep, then end with a code."""

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


def test_what_is_made_beside_is_there_when_it_is_gathered(tmp_path):
    kitchen = TwoLanes(tmp_path / "nano")
    assert kitchen.run() == 0
    assert kitchen.done == ["corpus", "text", "split", "flow", "vocoder", "system"]
    assert kitchen.made[-2:] == ["vocoder", "system"] and sorted(kitchen.made) == sorted([*NAMES, "flow", "vocoder"])
    journal = json.loads((tmp_path / "nano" / RECIPE_FILE).read_text())
    assert journal["seconds"]["flow"] > 0.3 and journal["wall"] > journal["seconds"]["flow"]
    assert kitchen.run() == 0 and kitchen.made == []
    assert kitchen.run("vocoder") == 0 and sorted(kitchen.made) == ["split", "system", "text", "vocoder"]
    assert kitchen.run("corpus", "flow") == 0 and kitchen.made == ["corpus", "flow"] and kitchen.done == kitchen.made


@pytest.mark.parametrize("code", [1, 3, 75])
def test_what_stops_beside_stops_the_recipe(tmp_path, code):
    kitchen = TwoLanes(tmp_path / "nano", flow=(os._exit, code))
    if code == 1:
        with pytest.raises(MossError, match=r"step flow: failed \(exit code 1\)"):
            kitchen.run()
    else:
        assert kitchen.run() == code
    assert "vocoder" not in kitchen.made and "flow" not in kitchen.done and "system" not in kitchen.made
    kitchen.targets["flow"] = (time.sleep, 0)
    assert kitchen.run() == 0 and set(kitchen.made) >= {"flow", "vocoder", "system"} and "corpus" not in kitchen.made


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), MossError("no"), 75])
def test_nothing_goes_on_beside_when_the_recipe_ends(tmp_path, trouble):
    kitchen = TwoLanes(tmp_path / "nano", flow=(time.sleep, 60))
    kitchen.trouble = {"split": trouble}
    *others, split, system = kitchen.steps

    def in_the_middle():
        end = time.monotonic() + 60
        while "flow" not in kitchen.processes and time.monotonic() < end:
            time.sleep(0.05)
        return split.work()

    kitchen.steps = [*others, replace(split, work=in_the_middle), system]
    if isinstance(trouble, int):
        assert kitchen.run() == trouble
    else:
        with pytest.raises(type(trouble)):
            kitchen.run()
    assert not kitchen.processes["flow"].is_alive() and kitchen.processes.keys() == {"flow"}
    assert kitchen.done == ["corpus", "text"]


@needs_two_cores
def test_each_of_two_keeps_to_half_of_the_cores(tmp_path, capfd):
    kitchen = TwoLanes(tmp_path / "nano")
    all_cores = os.sched_getaffinity(0)
    seen = []
    corpus, flow, vocoder, text, *others = kitchen.steps

    def look():
        while not (tmp_path / "nano" / "half").exists():
            time.sleep(0.05)
        seen.append(os.sched_getaffinity(0))
        return 0

    work = functools.partial(half_of_the_cores, tmp_path / "nano" / "half")
    flow = replace(flow, start=background_process(work, "flow"))
    kitchen.steps = [corpus, flow, vocoder, replace(text, work=look), *others]
    assert kitchen.run() == 0
    (here,) = seen
    there = set(json.loads((tmp_path / "nano" / "half").read_text()))
    assert here | there == all_cores == os.sched_getaffinity(0) and not here & there
    assert "flow | looked" in capfd.readouterr().err


def half_of_the_cores(path, say):
    write_text(path, json.dumps(sorted(os.sched_getaffinity(0))))
    say("looked")
    time.sleep(0.5)  # the other one looks too
    return 0


def test_a_notice_while_it_waits_ends_what_is_beside(tmp_path):
    kitchen = TwoLanes(tmp_path / "nano", flow=(time.sleep, 60))
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert kitchen.run() == 75
    assert not kitchen.processes["flow"].is_alive() and kitchen.done == ["corpus", "text", "split"]
