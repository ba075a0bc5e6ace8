"""Converts leaves to stacks of matrices, and back.

Matrices with more columns than rows are transposed, which keeps the singular values. Then W and W^T, as in the two MLP
kernels of a transformer, have the same shape and go into one stack.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, groups, layouts
from optaxclip._arrays.leaves import Leaf, Leaves
from optaxclip._numerics import tree_norms
from optaxclip._numerics.matrices.products import turned

UNITS = ("io", "oi")


def is_axis_count(value: Any) -> bool:
    """Whether a value of `stacked` is allowed for a leaf."""
    return checks.is_whole(value) and value >= 0


def layers(stacked: Any, leaves: Leaves) -> list[int]:
    """Returns how many axes of each leaf index layers, from a function or a prefix pytree. None is 0.

    Raises:
      ValueError: if an entry is no whole number of at least 0, or larger than the rank of its leaf.
    """
    if stacked is None:
        return [0] * len(leaves)
    found = [0 if axes is None else axes for axes in leaves.lookup("stacked", stacked)]
    for leaf, axes in zip(leaves, found, strict=True):
        if not is_axis_count(axes):
            raise ValueError(f"stacked must be a whole number of at least 0, got {axes!r} for {leaf.path!r}")
        if axes > jnp.ndim(leaf.value):
            raise ValueError(
                f"stacked must be at most the number of axes of the leaf, got {axes} for {leaf.path!r} of shape "
                f"{jnp.shape(leaf.value)}"
            )
    return found


def of_leaves(leaves: Leaves, layers: Sequence[int], units: str) -> dict[int, jax.Array]:
    """Returns the leaves that are matrices, by index: those with at least two dimensions after the `layers`.

    Returns:
      For each a stack of shape [number of layers, rows, columns], with at least as many rows as columns, in float32 or
      wider, whole on every device.

    Raises:
      ValueError: if a matrix is split over the devices of a `shard_map`.
    """
    return {
        i: _as_stack(leaf, stacked, units)
        for i, (leaf, stacked) in enumerate(zip(leaves, layers, strict=True))
        if jnp.ndim(leaf.value) - stacked >= 2
    }


def with_vectors(leaves: Leaves, layers: Sequence[int], matrices: dict[int, jax.Array]) -> list[jax.Array]:
    """Returns `matrices` for the leaves that are in it, and the norms of all other leaves."""
    others = [i for i in range(len(leaves)) if i not in matrices]
    dims = [tuple(range(layers[i], jnp.ndim(leaves[i].value))) for i in others]
    norms = dict(zip(others, tree_norms.of_each([leaves[i] for i in others], 2, dims), strict=True))
    return [matrices[i] if i in matrices else norms[i] for i in range(len(leaves))]


def _as_stack(leaf: Leaf, layers: int, units: str) -> jax.Array:
    value = jnp.asarray(leaf.value)
    if axes := leaf.axes_over(tuple(range(layers, value.ndim))):
        raise ValueError(
            f"the matrix {leaf.path!r} is split over mesh axes {axes}, but its singular values need all of it: clip "
            "outside shard_map, under jit, where jax gathers it; or gather it before the clip and take this device's "
            "piece afterwards"
        )
    number, rows, columns = _sizes(value.shape, layers, units)
    stack = layouts.whole(value).astype(dtypes.wide(value.dtype)).reshape(number, rows, columns)
    return turned(stack) if rows < columns else stack


def as_leaf(stack: jax.Array, shape: tuple[int, ...], layers: int, units: str) -> jax.Array:
    """Converts a stack that `of_leaves` made of a leaf back to the shape of the leaf."""
    _, rows, columns = _sizes(shape, layers, units)
    return (turned(stack) if rows < columns else stack).reshape(shape)


def _sizes(shape: tuple[int, ...], layers: int, units: str) -> tuple[int, int, int]:
    """Returns the number of matrices in a leaf, and their numbers of rows and columns."""
    last = len(shape) - 1 if units == "io" else layers + 1  # where the columns begin
    return math.prod(shape[:layers]), math.prod(shape[layers:last]), math.prod(shape[last:])


def together(fn: Callable[..., Any], *columns: dict[int, jax.Array]) -> dict[int, Any]:
    """Returns `fn(*arrays)` for every index, with one call for all stacks of the same shape and dtype.

    Args:
      fn: takes arrays with a leading axis of matrices, the first a stack; returns a pytree of arrays with such an axis.
      *columns: the arguments by index.
    """

    def kind(i: int) -> Any:
        stack = columns[0][i]
        # On an Auto mesh XLA decides the layout, and would give arrays that are put together the same one.
        return stack.shape[1:], stack.dtype, layouts.varying(stack), None if layouts.is_known(stack) else i

    keys = list(columns[0])
    results: dict[int, Any] = {}
    for at in groups.alike(map(kind, keys)).values():
        places = [keys[k] for k in at]
        out = fn(*(jnp.concatenate([column[i] for i in places]) for column in columns))
        ends = [0]
        for i in places:
            ends.append(ends[-1] + columns[0][i].shape[0])
        for i, start, end in zip(places, ends[:-1], ends[1:], strict=True):
            results[i] = jax.tree.map(lambda x, start=start, end=end: x[start:end], out)
    return results
