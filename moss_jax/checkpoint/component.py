"""Components: the models of a system, each a folder with a `config.json` and safetensors files.

Every model package declares its component in `component.py`; `moss_jax.components` lists them. Nothing here depends on
a model, so that a system folder can hold new kinds of components.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax

from moss_jax.checkpoint.config_io import read_config
from moss_jax.checkpoint.store import load_tree
from moss_jax.documents import read_json
from moss_jax.files import is_file
from moss_jax.nn.precision import in_32_bits
from moss_jax.sharding import Axes, shardings_for

C = TypeVar("C")
Params = dict[str, Any]  # nested dictionaries of jax arrays
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # of a parameter tree, by flat path

MODEL_FILE = "model"  # stem of the only parameter file of most components


@dataclass(frozen=True)
class Component(Generic[C]):
    """A kind of component.

    Attributes:
        name: of its folder in a system folder.
        title: its name in messages.
        config_type: the dataclass that its `config.json` describes.
        files: for a config, {stem of a safetensors file: function that returns the shapes of the parameters in it}. A
            component with several files may lack some of them. The file MODEL_FILE may be sharded.
        code_count: for a config, the number of speech codes; None where the model has no speech.
        axes: for a config, the logical axes of the parameters in MODEL_FILE, for loading on a mesh; None: the component
            is never sharded.
        dtype: floating-point parameters are converted to it; None keeps the dtype of the file.
    """

    name: str
    title: str
    config_type: type[C]
    files: Callable[[C], Mapping[str, Callable[[], Shapes]]]
    code_count: Callable[[C], int | None]
    axes: Callable[[C], Mapping[str, Axes]] | None = None
    dtype: str | None = None

    def read_config(self, folder: str | Path) -> C:
        """The config in the component's folder.

        Raises:
            MossError: the file is missing or damaged, or does not describe a valid config.
        """
        path = Path(folder) / "config.json"
        return read_config(self.config_type, read_json(path), path)

    def load(self, folder: str | Path, mesh: jax.sharding.Mesh | None = None) -> tuple[C, "ComponentParams"]:
        """The config and the parameters in the component's folder.

        Args:
            mesh: shards the parameters in MODEL_FILE over these devices; None: the default device.

        Returns:
            The config, and {stem of a file: nested parameters}, each file loaded when it is first used.

        Raises:
            MossError: as `read_config`.
        """
        config = self.read_config(folder)
        return config, ComponentParams(self, Path(folder), config, mesh)


class ComponentParams(Mapping[str, Params]):
    """The parameters of a loaded component by file stem. A file is read when its parameters are first used; then a
    damaged file, or one that does not fit the config, raises MossError."""

    def __init__(self, component: Component[Any], folder: Path, config: Any, mesh: jax.sharding.Mesh | None):
        self._component = component
        self._folder = folder
        self._mesh = mesh
        self._config = config
        self._files = component.files(config)
        self._loaded: dict[str, Params] = {}

    @in_32_bits
    def __getitem__(self, stem: str) -> Params:
        if stem not in self._loaded:
            if stem not in self:
                raise KeyError(stem)
            shapes = self._files[stem]()
            shardings = None
            if self._mesh is not None and self._component.axes is not None and stem == MODEL_FILE:
                shardings = shardings_for(self._component.axes(self._config), shapes, self._mesh)
            self._loaded[stem] = load_tree(self._source(stem), shapes, shardings, self._component.dtype)
        return self._loaded[stem]

    def __contains__(self, stem: object) -> bool:
        return stem in self._files and (stem == MODEL_FILE or is_file(self._source(str(stem))))

    def __iter__(self) -> Iterator[str]:
        return (stem for stem in self._files if stem in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _source(self, stem: str) -> Path:
        # load_tree looks into a folder for model.safetensors, its shards, or a single file with another name.
        return self._folder if stem == MODEL_FILE else self._folder / f"{stem}.safetensors"
