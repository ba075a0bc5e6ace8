"""Reads from the type of an array where it is, and moves arrays to where others are.

Inside `shard_map` the type says over which mesh axes an array varies. On an Explicit mesh under `jit` it says how the
array is laid out. On an Auto mesh it says nothing, because XLA decides the layout later.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_mesh(flat: Sequence[Any]) -> list[int]:
    """Returns the indices of the leaves whose type has a mesh. The types of the others say nothing."""
    return [
        i
        for i, leaf in enumerate(flat)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        or (hasattr(leaf, "aval") and not jax.typeof(leaf).sharding.mesh.empty)
    ]


def varying(leaf: Any) -> frozenset[str]:
    """Returns the mesh axes over which a leaf is known to vary; none outside `shard_map`."""
    if not hasattr(leaf, "aval") and not isinstance(leaf, jax.ShapeDtypeStruct):
        return frozenset()  # a NumPy array or a Python number is the same everywhere
    kind: Any = jax.typeof(leaf)
    manual = getattr(kind, "manual_axis_type", None)  # None before jax 0.10
    return frozenset(kind.vma if manual is None else manual.varying)


def varying_over(value: jax.Array, names: Iterable[str]) -> jax.Array:
    """Returns `value` typed as varying over `names`. The branches of a cond must vary over the same axes."""
    missing = tuple(sorted(set(names) - varying(value)))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # pyright: ignore[reportAttributeAccessIssue]  # before jax 0.8.2


def unreduced(leaf: Any) -> tuple[str, ...]:
    """Returns the mesh axes over which jax knows an array to be an unreduced sum."""
    if not hasattr(leaf, "aval"):
        return ()
    kind: Any = jax.typeof(leaf)
    under_jit = getattr(kind.sharding.spec, "unreduced", frozenset())
    in_shard_map = getattr(getattr(kind, "manual_axis_type", None), "unreduced", frozenset())
    return tuple(sorted(under_jit | in_shard_map))


def is_known(leaf: Any) -> bool:
    """Whether a leaf is laid out as its type says. On an Auto mesh XLA decides the layout later."""
    mesh = jax.typeof(leaf).sharding.mesh
    return not any(
        kind == AxisType.Auto and mesh.shape[name] > 1
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


def is_whole(leaf: Any) -> bool:
    """Whether every device is known to hold all of a leaf."""
    return is_known(leaf) and not any(dims_of(spec_of(leaf)))


def whole(array: jax.Array) -> jax.Array:
    """Returns an array that is whole on every device. For use outside `shard_map`."""
    if jax.typeof(array).sharding.mesh.empty:
        return array
    if not is_known(array):
        sharding = NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(array, sharding)
    dims = dims_of(spec_of(array))
    return _resharded(array, PartitionSpec(*(None for _ in dims)), array) if any(dims) else array


def like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Returns `array` with the sharding of `other`, if the type of `other` has one."""
    if jax.typeof(other).sharding.mesh.empty:
        return array
    dims = dims_of(spec_of(other))
    return _resharded(array, PartitionSpec(*dims), other) if any(dims) else array


def _resharded(array: jax.Array, spec: PartitionSpec, other: jax.Array) -> jax.Array:
    """Reshards `array` on the mesh of `other`, which may differ from the mesh of the context."""
    kind: Any = jax.typeof(other)
    return jax.sharding.reshard(array, NamedSharding(kind.sharding.mesh, spec))


def spec_of(array: jax.Array) -> PartitionSpec:
    """Returns the layout in the type of an array."""
    kind: Any = jax.typeof(array)
    return kind.sharding.spec


def dims_of(spec: PartitionSpec) -> tuple[Any, ...]:
    """Returns the entry of a spec for each dimension. Newer jax refuses to iterate over a spec with `reduced` axes."""
    # PartitionSpec has no `partitions` before jax 0.10.2.
    return spec.partitions if hasattr(spec, "partitions") else tuple(spec)
