"""Components and system folders with a component that the package does not have."""

import json
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from moss_jax.checkpoint import save_tensors
from moss_jax.checkpoint.component import MODEL_FILE, Component
from moss_jax.checkpoint.system_folder import SYSTEM_FILE, SYSTEM_FORMAT, SystemFolder
from moss_jax.components import COMPONENTS
from moss_jax.errors import MossError
from moss_jax.sharding import make_mesh


@dataclass(frozen=True)
class FilterConfig:
    width: int


def files(config):
    shapes = {"a/kernel": jax.ShapeDtypeStruct((config.width,), np.float32)}
    return {MODEL_FILE: lambda: shapes, "extra": lambda: shapes}


FILTER = Component(
    name="filter",
    title="filter",
    config_type=FilterConfig,
    files=files,
    code_count=lambda config: None,
    axes=lambda config: {"a/kernel": ("embed",)},
    dtype="float32",
)


@pytest.fixture
def system(tmp_path):
    folder = tmp_path / "filter"
    folder.mkdir()
    (tmp_path / SYSTEM_FILE).write_text(json.dumps({"format": SYSTEM_FORMAT}))
    (folder / "config.json").write_text('{"width": 3}')
    save_tensors(folder / "model.safetensors", {"a/kernel": np.arange(3, dtype=np.float16)})
    return SystemFolder(tmp_path)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_component_is_loaded(system, on_mesh):
    assert system.has(FILTER)
    config, params = system.load(FILTER, make_mesh(data=1) if on_mesh else None)
    assert config == FilterConfig(3) == system.config(FILTER)
    kernel = params[MODEL_FILE]["a"]["kernel"]
    assert kernel.dtype == np.float32 and kernel.tolist() == [0, 1, 2]
    assert params[MODEL_FILE]["a"]["kernel"] is kernel


def test_files_that_are_missing_or_damaged(system):
    _, params = system.load(FILTER)
    assert list(params) == [MODEL_FILE] and len(params) == 1 and "other" not in params
    with pytest.raises(KeyError, match="extra"):
        params["extra"]
    (system.path / "filter" / "extra.safetensors").write_bytes(b"")
    assert list(params) == [MODEL_FILE, "extra"]  # nothing is read before the parameters are used
    with pytest.raises(MossError, match=r"extra\.safetensors: not a safetensors file"):
        params["extra"]


def test_a_system_without_a_component(system):
    for component in COMPONENTS:
        assert not system.has(component)
        with pytest.raises(MossError, match=f"has no {component.name}/config.json"):
            system.load(component)


def test_names_of_components_differ():
    assert len({component.name for component in COMPONENTS}) == len({component.title for component in COMPONENTS}) == 3
