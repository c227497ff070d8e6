"""Checkpoints on disk: what is saved comes back, what is damaged is named, a full disk costs nothing."""

import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.checkpoint.old_names import old_path, with_keys
from moss_jax.errors import MossError
from moss_jax.train.checkpoints import Checkpoints, verify
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.state import init_state


def tree(step):
    return {"a": jnp.arange(3000.0).reshape(30, 100) + step, "b": {"c": jnp.full((5,), step, jnp.int32)}}


def like():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree(0))


def save(folder, *steps, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, {"step": step}, params=tree(step), optimizer={"m": tree(-step)})
        checkpoints.wait()
    return checkpoints


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "saved"
    save(folder, 1, 2).close()
    return folder


def test_saved_arrays_are_restored_and_the_oldest_checkpoints_removed(tmp_path):
    checkpoints = save(tmp_path / "c", 1, 2, 3, keep=2)
    assert checkpoints.steps() == [2, 3] and checkpoints.newest_complete() == 3
    assert checkpoints.record(3) == {"step": 3}
    restored = checkpoints.restore(3, params=like())["params"]
    jax.tree.map(np.testing.assert_array_equal, restored, tree(3))


def test_a_state_saved_under_old_parameter_names_is_restored(tmp_path):
    current = {"encoder/layers/q/kernel": jnp.zeros((2, 4, 2, 3)), "encoder/layers/cross_o/bias": jnp.zeros((2, 4))}
    wanted = init_state(current, OptimizerConfig(method="muon"))
    ones = jax.tree.map(jnp.ones_like, wanted)
    old = {path: old_path(path) for path in current}
    saved = ones.replace(params=with_keys(ones.params, old), opt_state=with_keys(ones.opt_state, old))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save_state(1, {}, saved)
    checkpoints.wait()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), wanted)
    state = checkpoints.restore_state(1, like)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, state, ones)
    without = checkpoints.restore_state(1, like, optimizer=False)
    assert set(without.params) == set(current)
    np.testing.assert_array_equal(without.params["encoder/layers/q/kernel"], 1.0)


def test_a_save_in_progress_is_not_affected_by_later_updates(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    state = tree(1)
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for step in (1, 2, 3):
        checkpoints.save(step, {}, params=state)
        state = update(state)
    checkpoints.wait()
    for step in (1, 2, 3):
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(step, params=like())["params"], tree(step))


def test_every_changed_or_missing_file_is_detected(saved, tmp_path):
    """All but Orbax's own marker of the commit, which holds nothing of ours."""
    names = [str(path.relative_to(saved / "2")) for path in files(saved / "2")]
    assert len(names) > 8
    for name in names:
        if name == "commit_success.txt":
            continue
        for damage in ("flip", "cut", "gone"):
            folder = tmp_path / "copy"
            shutil.copytree(saved / "2", folder)
            content = bytearray((folder / name).read_bytes())
            if damage == "flip":
                content[len(content) // 3] ^= 1
            elif damage == "cut":
                del content[-1:]
            (folder / name).unlink()
            if damage != "gone":
                (folder / name).write_bytes(content)
            problem = verify(folder)
            assert problem and name in problem, (name, damage)
            shutil.rmtree(folder)
    assert verify(saved / "2") is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no checksums"])
def test_a_damaged_checkpoint_is_set_aside_and_an_earlier_one_used(saved, tmp_path, damage):
    folder = tmp_path / "c"
    lines = []
    shutil.copytree(saved, folder)
    largest = max(files(folder / "2"), key=os.path.getsize)
    content = bytearray(largest.read_bytes())
    if damage == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 64
        largest.write_bytes(content)
    else:
        (folder / "2/checksums.json").unlink()
    checkpoints = Checkpoints(folder, say=lines.append)
    assert checkpoints.newest_complete() == 1
    named = "checksums.json" if damage == "no checksums" else largest.name
    assert len(lines) == 1 and named in lines[0] and str(folder / "damaged/2") in lines[0]
    assert files(folder / "damaged/2") and checkpoints.steps() == [1]
    checkpoints.save(2, {}, params=tree(2))
    checkpoints.wait()
    assert checkpoints.newest_complete() == 2


def test_remains_of_a_killed_save_are_removed(saved, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    assert Checkpoints(folder).newest_complete() == 1
    assert not list(folder.glob("*tmp*"))


def test_no_complete_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "c").newest_complete() is None


def test_a_file_too_large_for_the_disk(tmp_path):
    """The limit of the process on the size of a file stands in for a full disk: the write itself fails."""
    checkpoints = save(tmp_path / "c", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"a": jax.random.normal(jax.random.key(0), (300, 1000))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MossError) as caught:
            checkpoints.save(2, {}, params=noise)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "c/2: cannot be saved (File too large); the newest complete checkpoint is 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Checkpoints(tmp_path / "c").newest_complete() == 1


def test_another_tree_is_an_error_of_one_line(saved):
    with pytest.raises(MossError, match="cannot be restored") as caught:
        Checkpoints(saved).restore(2, params={"a": like()["a"]})
    assert "\n" not in str(caught.value)


def test_keep_and_folder_are_checked(tmp_path):
    with pytest.raises(MossError, match="keep is 1, expected at least 2"):
        Checkpoints(tmp_path / "c", keep=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(MossError, match=r"file/c: cannot be written \(Not a directory\)"):
        Checkpoints(tmp_path / "file/c")
