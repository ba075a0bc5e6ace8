"""What the type of an array says about where it is, and arrays brought to where others are.

Inside `shard_map` the type says over which mesh axes an array varies; on an Explicit mesh under `jit`, how it is laid
out. On an Auto mesh XLA decides the layout later, and the type says only that.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_mesh(flat: Sequence[Any]) -> list[int]:
    """Which of these leaves have a type with a mesh in it. Of the others nothing is known, and nothing to be said."""
    return [
        i
        for i, leaf in enumerate(flat)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        or (hasattr(leaf, "aval") and not jax.typeof(leaf).sharding.mesh.empty)
    ]


def varying(leaf: Any) -> frozenset[str]:
    """The mesh axes that a leaf is known to vary over (none outside `shard_map`)."""
    if not hasattr(leaf, "aval") and not isinstance(leaf, jax.ShapeDtypeStruct):
        return frozenset()  # a NumPy array or a Python number is the same everywhere
    kind: Any = jax.typeof(leaf)
    manual = getattr(kind, "manual_axis_type", None)  # None before jax 0.10
    return frozenset(kind.vma if manual is None else manual.varying)


def varying_over(value: jax.Array, names: Iterable[str]) -> jax.Array:
    """`value`, typed as varying over mesh axes `names`, as both branches of a cond must be if one is."""
    missing = tuple(sorted(set(names) - varying(value)))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # pyright: ignore[reportAttributeAccessIssue]  # before jax 0.8.2


def unreduced(leaf: Any) -> tuple[str, ...]:
    """The mesh axes over which jax knows an array to be a sum not yet taken."""
    if not hasattr(leaf, "aval"):
        return ()
    kind: Any = jax.typeof(leaf)
    under_jit = getattr(kind.sharding.spec, "unreduced", frozenset())
    in_shard_map = getattr(getattr(kind, "manual_axis_type", None), "unreduced", frozenset())
    return tuple(sorted(under_jit | in_shard_map))


def is_known(leaf: Any) -> bool:
    """Whether a leaf is laid out as its type says: on an Auto mesh XLA decides that after us."""
    mesh = jax.typeof(leaf).sharding.mesh
    return not any(
        kind == AxisType.Auto and mesh.shape[name] > 1
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


def is_whole(leaf: Any) -> bool:
    """Whether every device where we run is known to have all of a leaf."""
    return is_known(leaf) and not any(dims_of(spec_of(leaf)))


def whole(array: jax.Array) -> jax.Array:
    """An array with all of it on every device, outside of `shard_map`."""
    if jax.typeof(array).sharding.mesh.empty:
        return array
    if not is_known(array):
        sharding = NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(array, sharding)
    dims = dims_of(spec_of(array))
    return _resharded(array, PartitionSpec(*(None for _ in dims)), array) if any(dims) else array


def like(array: jax.Array, other: jax.Array) -> jax.Array:
    """`array`, sharded as `other` is where the sharding is in the type."""
    if jax.typeof(other).sharding.mesh.empty:
        return array
    dims = dims_of(spec_of(other))
    return _resharded(array, PartitionSpec(*dims), other) if any(dims) else array


def _resharded(array: jax.Array, spec: PartitionSpec, other: jax.Array) -> jax.Array:
    """`array` on the mesh of `other`, which need not be that of the context."""
    kind: Any = jax.typeof(other)
    return jax.sharding.reshard(array, NamedSharding(kind.sharding.mesh, spec))


def spec_of(array: jax.Array) -> PartitionSpec:
    """How an array is laid out, as far as its type says."""
    kind: Any = jax.typeof(array)
    return kind.sharding.spec


def dims_of(spec: PartitionSpec) -> tuple[Any, ...]:
    """What a spec says of each dimension. With `reduced` axes in it, newer jax refuses to iterate over it."""
    # There are no `partitions` before jax 0.10.2.
    return spec.partitions if hasattr(spec, "partitions") else tuple(spec)
