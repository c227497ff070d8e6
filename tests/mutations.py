"""Mutation check: puts small faults into a copy of the package, one at a time; named tests must then fail.

  python -m tests.mutations                    # all, some minutes
  python -m tests.mutations "top-p off"        # some, by name
  python -m tests.mutations --list

Exit code 1: a mutant survived, a named test fails or is skipped without any mutation, or the text that a mutation
replaces is not in its file exactly once. Each mutation names the tests that must detect it; together they take a
few minutes. When the code that a mutation replaces changes, adapt the mutation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds; a mutant whose tests take longer counts as killed
# exit codes of pytest
PASSED = 0
FAILED = 1


@dataclass(frozen=True)
class Mutation:
    """A fault. `old` is in `file` exactly once and becomes `new`; some of `tests` (pytest ids) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "flow's training target has the wrong sign",
        "moss_jax/train/speech_decoder/flow.py",
        "    target = mel - (1 - sigma) * noise\n",
        "    target = (1 - sigma) * noise - mel\n",
        ("tests/train/test_objectives.py::test_the_flow_leads_from_noise_to_the_mel",),
    ),
    Mutation(
        "commitment loss has no weight",
        "moss_jax/train/speech_tokenizer/step.py",
        "jnp.asarray(step) >= objective.commitment_from, objective.commitment_weight, 0.0)",
        "jnp.asarray(step) >= objective.commitment_from, 0.0, 0.0)",
        ("tests/train/test_objectives.py::test_every_loss_of_the_speech_tokenizer_has_its_weight",),
    ),
    Mutation(
        "demo's clear leaves recordings on disk",
        "moss_jax/serve/session.py",
        "                path.unlink()\n",
        "                pass\n",
        ("tests/serve/test_limits.py::test_clear_leaves_no_recording",),
    ),
    Mutation(
        "upload limit removed",
        "moss_jax/serve/session.py",
        "    if size > limits.upload_bytes:\n",
        "    if False:\n",
        ("tests/serve/test_limits.py::test_a_recording_above_the_limit_is_refused",),
    ),
    Mutation(
        "uploads together have no limit",
        "moss_jax/serve/uploads.py",
        "            if used > self.total_bytes:\n",
        "            if False:\n",
        ("tests/serve/test_sessions.py::test_all_uploads_together_are_limited_and_old_ones_are_evicted",),
    ),
    Mutation(
        "sessions have no limit",
        "moss_jax/serve/sessions.py",
        "                if len(self._sessions) >= self.limits.sessions:\n",
        "                if False:\n",
        ("tests/serve/test_sessions.py",),
    ),
    Mutation(
        "any Host is served",
        "moss_jax/serve/request_filter.py",
        "        if host is None or not self._serves(host[0]):\n",
        "        if host is None:\n",
        ("tests/serve/test_request_filter.py",),
    ),
    Mutation(
        "loss weights ignored",
        "moss_jax/train/speech_lm/losses.py",
        "    weighted = jnp.where(weights > 0, nll, 0.0) * weights\n",
        "    weighted = nll\n",
        ("tests/train/speech_lm/test_losses.py",),
    ),
    Mutation(
        "last row predicts the first",
        "moss_jax/train/speech_lm/losses.py",
        '    weights = jnp.roll(batch["loss_weights"], -1, 1).at[:, -1].set(0)\n',
        '    weights = jnp.roll(batch["loss_weights"], -1, 1)\n',
        ("tests/train/speech_lm/test_losses.py",),
    ),
    Mutation(
        "frozen parameters are trained",
        "moss_jax/train/speech_lm/stages.py",
        "            matches = {path for path in paths if fnmatchcase(path, pattern)}\n",
        "            matches = set(paths)\n",
        ("tests/train/speech_lm/test_stages.py",),
    ),
    Mutation(
        "a bad step is taken",
        "moss_jax/train/state.py",
        "        lambda new, old: jnp.where(ok, new, old),\n",
        "        lambda new, old: new,\n",
        ("tests/train/speech_lm/test_step.py::test_a_step_that_is_not_accepted_changes_nothing",),
    ),
    Mutation(
        "resume begins the data again",
        "moss_jax/train/loop.py",
        '            self._feed.set_state(record["data"])\n',
        "            pass\n",
        ("tests/train/test_loop.py::test_a_preempted_run_resumes_exactly",),
    ),
    Mutation(
        "data state does not move the iterator",
        "moss_jax/data/batches.py",
        "        self.skip_to(step)\n",
        "        pass\n",
        ("tests/data/test_pipeline.py::test_a_restored_state_continues_exactly",),
    ),
    Mutation(
        "codebook does not follow its vectors",
        "moss_jax/nn/quantize.py",
        '    sums = decay * state["sum"] + (1 - decay) * total\n',
        '    sums = decay * state["sum"]\n',
        (
            "tests/train/speech_tokenizer/test_speech_tokenizer.py::test_the_codebook_follows_its_vectors_and_unused_codes_restart",
        ),
    ),
    Mutation(
        "old checkpoints are kept",
        "moss_jax/train/checkpoints.py",
        "            max_to_keep=keep,\n",
        "            max_to_keep=None,\n",
        ("tests/train/test_checkpoints.py::test_saved_arrays_are_restored_and_the_oldest_checkpoints_removed",),
    ),
    Mutation(
        "damaged checkpoint is used",
        "moss_jax/train/checkpoints.py",
        "            problem = verify(self.folder / str(step))\n",
        "            problem = None\n",
        ("tests/train/test_checkpoints.py::test_a_damaged_checkpoint_is_set_aside_and_an_earlier_one_used",),
    ),
    Mutation(
        "causal mask off by one",
        "moss_jax/nn/attention.py",
        "    causal = (rows[:, None] >= jnp.arange(columns)[None])[None, None]\n",
        "    causal = (rows[:, None] + 1 >= jnp.arange(columns)[None])[None, None]\n",
        ("tests/nn/test_attention.py::test_plain_attention_is_the_definition",),
    ),
    Mutation(
        "packed documents see each other",
        "moss_jax/nn/attention.py",
        "    return (segment_ids[:, :, None] == key_segment_ids[:, None])[:, None]\n",
        "    return (segment_ids[:, :, None] >= key_segment_ids[:, None])[:, None]\n",
        ("tests/speech_lm/test_model.py::test_packed_segments_do_not_see_each_other",),
    ),
    Mutation(
        "cache index off by one",
        "moss_jax/nn/qwen3.py",
        "        start = (0, 0, index, 0, 0)\n",
        "        start = (0, 0, index + 1, 0, 0)\n",
        ("tests/speech_lm/test_model.py::test_any_chunking_through_the_cache_equals_one_pass",),
    ),
    Mutation(
        "top-p off",
        "moss_jax/generate/sampling.py",
        "    return jnp.where(kept | (settings.top_p >= 1), logits, -jnp.inf)\n",
        "    return logits\n",
        ("tests/generate/test_sampling.py",),
    ),
    Mutation(
        "top-k off",
        "moss_jax/generate/sampling.py",
        "        logits = jnp.where(logits < best[..., -1:], -jnp.inf, logits)\n",
        "        pass\n",
        ("tests/generate/test_sampling.py",),
    ),
    Mutation(
        "repetition penalty off",
        "moss_jax/generate/sampling.py",
        "    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)\n",
        "    return scores\n",
        ("tests/generate/test_sampling.py",),
    ),
    Mutation(
        "forbidden ids are drawn",
        "moss_jax/generate/sampling.py",
        "    scores = jnp.where(forbidden, -jnp.inf, logits.astype(jnp.float32))\n",
        "    scores = logits.astype(jnp.float32)\n",
        ("tests/generate/test_sampling.py::test_penalty_and_masks",),
    ),
    Mutation(
        "special tokens leak from what people write",
        "moss_jax/text/tokenizer.py",
        "        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids\n",
        "        ids: list[int] = self._with_specials.encode(text, add_special_tokens=False).ids\n",
        ("tests/dialogue/test_grid.py::test_special_strings_in_a_turn_are_plain_text",),
    ),
    Mutation(
        "a file is written in place",
        "moss_jax/files.py",
        "            yield part\n            _sync(part)\n",
        "            yield path\n            os.replace(path, part)\n            _sync(part)\n",
        ("tests/test_files.py::test_a_file_appears_whole_or_not_at_all",),
    ),
    Mutation(
        "a folder's lock is not taken",
        "moss_jax/files.py",
        "            lock.acquire(timeout=0)\n",
        "            pass\n",
        ("tests/test_files.py::test_a_locked_folder_has_one_writer",),
    ),
    Mutation(
        "resampler's phase is off",
        "moss_jax/audio/resample.py",
        "    first = center // old\n",
        "    first = center // old + 1\n",
        ("tests/audio/test_wave.py::test_resample_is_the_published_formula",),
    ),
    Mutation(
        "decoded samples are not limited",
        "moss_jax/audio/recording.py",
        "        if count * channels * 4 > max_bytes:\n",
        "        if False:\n",
        ("tests/audio/test_reading.py::test_the_limits_hold_while_decoding",),
    ),
    Mutation(
        "silence passes for speech",
        "moss_jax/audio/speech.py",
        "    if level < FLOOR_DBFS:\n",
        "    if False:\n",
        ("tests/audio/test_speech.py::test_what_holds_no_speech_is_refused_with_its_level",),
    ),
    Mutation(
        "training has another default prompt than generation",
        "moss_jax/data/formats.py",
        '        turns = with_default_system(turns, "speech" if spoken else "text")\n',
        '        turns = with_default_system(turns, "text" if spoken else "speech")\n',
        ("tests/data/test_formats.py::test_a_chat_begins_as_generation_does_and_every_reply_is_scored",),
    ),
    Mutation(
        "weights of a release are carried along",
        "moss_jax/convert/files.py",
        "    skip = {_located(path) for path in used}\n",
        "    skip = set()\n",
        ("tests/convert/test_carried.py::test_no_weights_of_a_qwen3_are_carried",),
    ),
    Mutation(
        "a run does not lock its folder",
        "moss_jax/train/loop.py",
        "                stack.enter_context(folder_lock(folder))\n",
        "                pass\n",
        ("tests/test_locks.py::test_train",),
    ),
)


def problems(mutations: Sequence[Mutation]) -> list[str]:
    """Mutations that do not match the code: the text is not in the file exactly once, or a test does not exist."""
    found = []
    for mutation in mutations:
        path = ROOT / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{mutation.name}: its text occurs {count} times in {mutation.file}, expected once")
        for test in mutation.tests:
            file, _, function = test.partition("::")
            path = ROOT / file
            if not path.is_file() or (function and f"def {function}(" not in path.read_text(encoding="utf-8")):
                found.append(f"{mutation.name}: test {test} does not exist")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations, default all")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    args = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"unknown mutation {', '.join(map(repr, unknown))}; --list prints the names")
    if args.list:
        print("\n".join(known))
        return 0
    chosen = [known[name] for name in args.names or known]
    wrong = problems(chosen)
    if wrong:
        print("\n".join(wrong))
        return 1
    with tempfile.TemporaryDirectory(prefix="moss-jax-mutations-") as folder:
        return _check(chosen, Path(folder))


def _check(mutations: Sequence[Mutation], folder: Path) -> int:
    for name in ("moss_jax", "dev", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    began = time.monotonic()
    code, output = _run(tests, folder, first_failure=False)
    print(f"without mutations: {len(tests)} tests or files of tests, {time.monotonic() - began:.0f} s")
    skipped = int(ElementTree.parse(folder / "report.xml").find("testsuite").get("skipped"))
    if code != PASSED or skipped:
        print(output[-4000:])
        print(f"these tests must pass without mutations, and none may be skipped ({skipped} are)")
        return 1
    survivors = 0
    for mutation in mutations:
        path = folder / mutation.file
        whole = path.read_text(encoding="utf-8")
        path.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
        began = time.monotonic()
        code, output = _run(mutation.tests, folder, first_failure=True)
        path.write_text(whole, encoding="utf-8")
        verdict = {PASSED: "SURVIVED", FAILED: "killed", None: "killed (time)"}.get(
            code, f"BROKEN, pytest exits {code}"
        )
        survivors += not verdict.startswith("killed")
        print(f"{verdict:<14} {time.monotonic() - began:4.0f} s  {mutation.name}", flush=True)
    print(f"{len(mutations) - survivors} of {len(mutations)} mutants killed")
    return int(survivors > 0)


def _run(tests: Sequence[str], folder: Path, first_failure: bool) -> tuple[int | None, str]:
    """(exit code of pytest, its output); None after TIMEOUT seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "--junitxml", "report.xml"]
    # Python compares time (in seconds) and size of a module with its bytecode; a mutation may keep both.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    try:
        done = subprocess.run(
            [*command, *(["-x"] if first_failure else []), *tests],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT if first_failure else None,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
