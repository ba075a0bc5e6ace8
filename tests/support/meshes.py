"""Meshes of eight devices, and trees laid out over them."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AUTO = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))


def is_spec(node):
    return isinstance(node, P)


def with_specs(fn, specs, *trees):
    """`fn(spec, leaf, ...)` of every leaf."""
    return jax.tree.map(fn, specs, *trees, is_leaf=is_spec)


def put(tree, specs, mesh):
    """A tree laid out over a mesh."""
    return with_specs(lambda spec, leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), specs, tree)


def over_steps(specs):
    """The specs of arrays that have the steps as another first axis."""
    return with_specs(lambda spec: P(None, *spec), specs)


def pieces(leaf, spec, number=8):
    """What each of `number` devices along one axis holds of an array, stacked."""
    leaf = np.asarray(leaf)
    dims = [dim for dim, name in enumerate(spec) if name is not None]
    return np.stack(np.split(leaf, number, axis=dims[0]) if dims else [leaf] * number)
