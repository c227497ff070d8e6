"""The mesh, and the one table that says on which mesh axis a logical axis lies.

    mesh = make_mesh(fsdp=4, tensor=2)
    shardings = shardings_for(param_axes(model, ...), param_shapes(model, ...), mesh)
    with jax.set_mesh(mesh):
        ...  # jitted functions constrain their activations and caches to the same table

Models name logical axes only. Mesh axes: "data" copies parameters and divides the batch; "fsdp" divides both; "tensor"
divides heads, the feed-forward and the vocabulary; "sequence" divides the rows of a sequence between attentions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_jax.errors import MossError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

RULES: dict[str, tuple[str, ...]] = {
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
GATHERED = "all "  # before the name of an axis, for `per_device`


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with all four axes over `devices` (default: all); the sizes must multiply to their number.

    Over several TPU slices, which only a slow network joins, "data" is what lies across them.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data, fsdp, tensor, sequence)
    product = data * fsdp * tensor * sequence
    if min(sizes) < 1 or product != len(devices):
        told = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise MossError(f"mesh {told} has {product} places, expected {len(devices)}, one for each device")
    kinds = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return jax.make_mesh(sizes, MESH_AXES, kinds, devices=devices)
    if data % slices:
        raise MossError(f"mesh: data is {data}, expected a multiple of {slices}: it alone lies across the TPU slices")
    inside = (data // slices, *sizes[1:])
    across = (slices, 1, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), MESH_AXES, kinds)


def shardings_for(
    axes: Mapping[str, Axes], shapes: Mapping[str, Any], mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES
) -> dict[str, NamedSharding]:
    """Flat {path: NamedSharding} of parameters.

    Args:
        axes: flat {path: logical axis names, one for each dimension}; `moss_jax.nn.tree.param_axes` gives them.
        shapes: flat {path: anything with .shape}.

    Raises:
        MossError: every parameter of which a name is unknown, two axes meet on one mesh axis, or a dimension does not
            divide; all of them at once.
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
        raise MossError("\n  ".join([f"{len(problems)} parameters cannot lie on the mesh {sizes}", *problems]))
    return shardings


def fitting(axes: Axes, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an activation or a cache: as the table says, but a dimension that does not divide stays whole."""
    return NamedSharding(mesh, _fitting(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation or a cache out by the table on the mesh of `jax.set_mesh`; without a mesh x itself.

    A dimension that does not divide (a batch of one, a single decoded row) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(axes, x.shape, mesh))


def num_shards(name: str, size: int) -> int:
    """In how many parts an axis of `size` lies on the mesh of `jax.set_mesh`; 1 without a mesh or if it is not even."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else _ways(_spec([name])[0], mesh)
    return parts if size % parts == 0 else 1


def per_device(
    function: Callable, axes: Sequence[Axes], out_axes: Axes, rules: Mapping[str, tuple[str, ...]] = RULES
) -> Callable:
    """`function` run by each device on its own part of the arrays.

    What the compiler cannot divide by itself (a hand-written kernel), or divides badly, is divided by this.

    Args:
        axes: the logical axes of each argument; an argument may be None. "all length" instead of "length" is an axis
            that lies divided but is whole in the function: it is gathered on the way in, its gradient is summed and
            divided on the way out. A mesh axis is left out where one of the dimensions on it does not divide. An
            argument with `manual_sharding_spec` (a splash kernel) says itself how it lies.
        out_axes: logical axes of the one result.
        rules: instead of the table, for a function that divides its work in another way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    lying = [[name and name.removeprefix(GATHERED) for name in names] for names in axes]

    def run(*args):
        given = [i for i, x in enumerate(args) if x is not None]
        arrays = [i for i in given if not hasattr(args[i], "manual_sharding_spec")]
        sizes = [(name, size) for i in arrays for name, size in zip(lying[i], args[i].shape, strict=True)]
        # Query heads must not be divided where the key/value heads that they read stay whole.
        whole = {name for name, size in sizes if size % _ways(_spec([name], rules)[0], mesh)}
        whole = {place for name in whole for place in rules.get(name, ())}
        fit = {name: () if whole & set(places) else places for name, places in rules.items()}

        def spec(i):
            laid = _spec(lying[i], fit)
            return laid if i in arrays else args[i].manual_sharding_spec(NamedSharding(mesh, laid))

        def local(*parts):
            arguments = [None] * len(args)
            for i, part in zip(given, parts, strict=True):
                for dim, name in enumerate(axes[i]):
                    if name and name.startswith(GATHERED) and _ways(_spec([lying[i][dim]], fit)[0], mesh) > 1:
                        part = jax.lax.all_gather(part, fit[lying[i][dim]], axis=dim, tiled=True)
                arguments[i] = part
            return function(*arguments)

        specs = tuple(map(spec, given))
        out = _spec(out_axes, fit)
        return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(*(args[i] for i in given))

    return run


def _spec(names: Axes, rules: Mapping[str, tuple[str, ...]] = RULES) -> P:
    taken: dict[str, str] = {}
    entries = []
    for name in names:
        if name is not None and name not in rules:
            raise MossError(f"logical axis {name!r} has no rule, expected one of {', '.join(rules)}")
        places = () if name is None else rules[name]
        for place in places:
            if place in taken:
                raise MossError(f"logical axes {taken[place]!r} and {name!r} meet on mesh axis {place!r}")
            taken[place] = name
        entries.append(places[0] if len(places) == 1 else places or None)
    return P(*entries)


def _ways(entry, mesh) -> int:
    product = 1
    for place in (entry,) if isinstance(entry, str) else entry or ():
        product *= mesh.shape[place]
    return product


def _check_divides(names: Axes, spec: P, shape: Sequence[int], mesh) -> None:
    for name, entry, size in zip(names, spec, shape, strict=True):
        if size % _ways(entry, mesh):
            raise MossError(f"axis {name!r} of {size} does not divide by the {_ways(entry, mesh)} of {entry!r}")


def _fitting(names: Axes, shape: Sequence[int], mesh) -> P:
    spec = _spec(names)
    return P(*(None if size % _ways(entry, mesh) else entry for entry, size in zip(spec, shape, strict=True)))
