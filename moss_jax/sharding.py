"""The device mesh, and the one table that maps logical axes to mesh axes.

    mesh = make_mesh(fsdp=4, tensor=2)
    shardings = shardings_for(param_axes(model, ...), param_shapes(model, ...), mesh)
    with jax.set_mesh(mesh):
        ...  # jitted functions constrain their activations and caches to the same table

Models name logical axes only. Mesh axes: "data" replicates parameters and shards the batch; "fsdp" shards both;
"tensor" shards heads, the feed-forward and the vocabulary; "sequence" shards the rows of a sequence between attentions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.errors import MossError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

RULES: dict[str, tuple[str, ...]] = {  # logical axis -> mesh axes
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "conv_in": (),
    "conv_out": (),
    # activations and caches
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
}

Axes = Sequence[str | None]
Rules = Mapping[str, tuple[str, ...]]
GATHERED = "all "  # prefix of an axis name, for `per_device`


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with all four axes over `devices` (default: all); the product of the sizes must be their number.

    Over several TPU slices, which are connected by a slow network only, "data" is the axis across slices.

    Raises:
        MossError: the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data, fsdp, tensor, sequence)
    product = data * fsdp * tensor * sequence
    if min(sizes) < 1 or product != len(devices):
        named = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise MossError(f"mesh {named} needs {product} devices, there are {len(devices)}")
    # Auto: flax's logical constraints fail under the Explicit axes that jax.make_mesh makes by default.
    axis_types = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return jax.make_mesh(sizes, MESH_AXES, axis_types, devices=devices)
    if data % slices:
        raise MossError(f"mesh: data is {data}, expected a multiple of the number of TPU slices, {slices}")
    within_slice = (data // slices, *sizes[1:])
    across_slices = (slices, 1, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within_slice, across_slices, devices), MESH_AXES, axis_types)


def shardings_for(
    axes: Mapping[str, Axes], shapes: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES
) -> dict[str, NamedSharding]:
    """Flat {path: NamedSharding} of parameters.

    Args:
        axes: flat {path: logical axis names, one per dimension}, see `moss_jax.nn.tree.param_axes`.
        shapes: flat {path: anything with .shape}.

    Raises:
        MossError: lists every parameter with an unknown axis name, two axes on the same mesh axis, or a dimension that
            is not divisible.
    """
    shardings = {}
    problems = []
    for path, names in axes.items():
        try:
            spec = _spec(names, rules)
            _check_divides(names, spec, shapes[path].shape, mesh)
            shardings[path] = NamedSharding(mesh, spec)
        except MossError as error:
            problems.append(f"{path} {list(shapes[path].shape)}: {error}")
    if problems:
        sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        raise MossError("\n  ".join([f"{len(problems)} parameters cannot be sharded on the mesh {sizes}", *problems]))
    return shardings


def fitting(axes: Axes, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an activation or a cache by the table; a dimension that is not divisible is replicated."""
    return NamedSharding(mesh, _fitting_spec(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards an activation or a cache by the table on the mesh of `jax.set_mesh`; without a mesh x itself.

    A dimension that is not divisible (a batch of one, a single decoded row) is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, _fitting_spec(axes, x.shape, mesh))
    return constrained


def num_shards(name: str, size: int) -> int:
    """Number of shards of a logical axis of `size` on the mesh of `jax.set_mesh`; 1 without a mesh, or if not even."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else _mesh_size(RULES[name], mesh)
    return shards if size % shards == 0 else 1


def per_device(
    function: Callable[..., jax.Array], axes: Sequence[Axes], out_axes: Axes, rules: Rules = RULES
) -> Callable[..., jax.Array]:
    """`function` run by every device on its own part of the arrays.

    For what the compiler cannot partition by itself (a hand-written kernel), or partitions badly.

    Args:
        axes: the logical axes of each argument; an argument may be None. "all length" instead of "length" is a sharded
            axis that is whole in the function: it is gathered on the way in, its gradient is summed and scattered on
            the way out. A mesh axis is not used where one of the dimensions on it is not divisible. An argument with
            `manual_sharding_spec` (a splash kernel) has a sharding of its own.
        out_axes: logical axes of the one result.
        rules: instead of the table, for a function that partitions its work differently.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    sharded_axes = [tuple(name and name.removeprefix(GATHERED) for name in names) for names in axes]

    def run(*args: Any) -> jax.Array:
        present = [i for i, x in enumerate(args) if x is not None]
        arrays = [i for i in present if not hasattr(args[i], "manual_sharding_spec")]
        # Mesh axes with a dimension that is not divisible are not used at all: query heads must not be sharded where
        # the key/value heads that they read are replicated.
        unused: set[str] = set()
        for i in arrays:
            for name, size in zip(sharded_axes[i], args[i].shape, strict=True):
                if name is not None and size % _mesh_size(rules[name], mesh):
                    unused.update(rules[name])
        used_rules = {name: () if unused & set(mesh_axes) else mesh_axes for name, mesh_axes in rules.items()}

        def spec(i: int) -> Any:
            own = _spec(sharded_axes[i], used_rules)
            return own if i in arrays else args[i].manual_sharding_spec(NamedSharding(mesh, own))

        def local(*parts: Any) -> jax.Array:
            arguments = [None] * len(args)
            for i, part in zip(present, parts, strict=True):
                for dim, name in enumerate(axes[i]):
                    if name is not None and name.startswith(GATHERED):
                        mesh_axes = used_rules[name.removeprefix(GATHERED)]
                        if _mesh_size(mesh_axes, mesh) > 1:
                            part = jax.lax.all_gather(part, mesh_axes, axis=dim, tiled=True)
                arguments[i] = part
            return function(*arguments)

        in_specs = tuple(spec(i) for i in present)
        # The check of replicated results does not know hand-written kernels.
        sharded = jax.shard_map(local, in_specs=in_specs, out_specs=_spec(out_axes, used_rules), check_vma=False)
        result: jax.Array = sharded(*(args[i] for i in present))
        return result

    return run


def _spec(names: Axes, rules: Rules = RULES) -> P:
    used: dict[str, str] = {}  # mesh axis -> the logical axis on it
    entries: list[str | tuple[str, ...] | None] = []
    for name in names:
        if name is None:
            entries.append(None)
            continue
        if name not in rules:
            raise MossError(f"logical axis {name!r} has no rule, expected one of {', '.join(rules)}")
        mesh_axes = rules[name]
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise MossError(
                    f"logical axes {used[mesh_axis]!r} and {name!r} map to the same mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = name
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return P(*entries)


def _mesh_size(mesh_axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """Number of devices along an entry of a PartitionSpec."""
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    return math.prod(mesh.shape[name] for name in names)


def _check_divides(names: Axes, spec: P, shape: Sequence[int], mesh: Mesh) -> None:
    for name, entry, size in zip(names, spec, shape, strict=True):
        devices = _mesh_size(entry, mesh)
        if size % devices:
            raise MossError(f"axis {name!r} of size {size} is not divisible by the {devices} of {entry!r}")


def _fitting_spec(names: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    entries = zip(_spec(names), shape, strict=True)
    return P(*(None if size % _mesh_size(entry, mesh) else entry for entry, size in entries))
