"""Applies one function to every group at once.

Norms are a pytree with one entry per group, for example one scalar per leaf. Scalars are stacked into one vector first,
because a GPU or TPU would start a program for every small operation on each of them.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import layouts
from optaxclip._arrays.trees import Tree


def over_groups(fn: Callable[..., Any], norms: Tree, *others: Any) -> Any:
    """Applies an elementwise function to the entries of each group.

    Args:
      fn: takes an entry of `norms` and one of each of `others`, or vectors of many entries. Returns a pytree of arrays
        with the entry's shape.
      norms: a pytree with one array per group.
      *others: each a pytree with the structure of `norms`, or one number or scalar array for all groups.

    Returns:
      A pytree with the structure of `norms`, and the results of `fn` at its leaves.
    """
    flat, treedef = jax.tree.flatten(norms)
    return treedef.unflatten(vectorized(fn, flat, *[entries(other, treedef) for other in others]))


def vectorized(fn: Callable[..., Any], first: Sequence[jax.Array], *others: Sequence[Any]) -> list[Any]:
    """Applies `fn` to every row of these columns. Scalars of one dtype are stacked into a vector, arrays are not.

    Args:
      fn: acts elementwise; returns a pytree of arrays.
      first: arrays.
      *others: arrays of the same shapes, or numbers, or None.

    Returns:
      A list with the result of each row.
    """
    rows = list(zip(first, *others, strict=True))
    if len(rows) == 1:
        return [fn(*rows[0])]
    results: dict[int, Any] = {}
    for at in alike(i if row[0].ndim else tuple(map(_kind, row)) for i, row in enumerate(rows)).values():
        if len(at) == 1:
            results[at[0]] = fn(*rows[at[0]])
            continue
        whole, treedef = jax.tree.flatten(fn(*map(_stacked, zip(*(rows[i] for i in at), strict=True))))
        pieces = zip(*(unstacked(value) if value.ndim else [value] * len(at) for value in whole), strict=True)
        results |= zip(at, map(treedef.unflatten, pieces), strict=True)
    return [results[i] for i in range(len(rows))]


def alike(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Returns the indices at which each key occurs."""
    places: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return places


def _kind(value: Any) -> Any:
    """Returns a key that is equal for scalars that may share a vector.

    Scalars that vary over mesh axes get their own vector, because they would make the others vary.
    """
    return jax.typeof(value) if isinstance(value, jax.Array) else value is None


def _stacked(column: tuple[Any, ...]) -> Any:
    if all(value is column[0] for value in column):
        return column[0]
    return jnp.stack(column) if isinstance(column[0], jax.Array) else np.stack(column)


def unstacked(array: jax.Array) -> list[jax.Array]:
    """Returns the entries along the first axis."""
    return [jax.lax.squeeze(piece, [0]) for piece in jax.lax.split(array, [1] * len(array))]


def number(norms: Tree) -> int:
    """Returns the number of groups."""
    return sum([entry.size for entry in jax.tree.leaves(norms)])


def dtype(norms: Tree) -> Any:
    """Returns the widest dtype of the norms; float32 if there are none."""
    return functools.reduce(np.promote_types, [entry.dtype for entry in jax.tree.leaves(norms)], np.dtype(np.float32))


def as_vector(norms: Tree) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Returns all groups (at least one) as a vector that is whole on every device, and a function that undoes this.

    Raises:
      ValueError: if the groups are split over the devices of a `shard_map`.
    """
    flat, treedef = jax.tree.flatten(norms)
    widest = dtype(norms)
    for entry in flat:
        if entry.ndim and layouts.varying(entry):
            raise ValueError(
                f"the groups lie on different devices along mesh axes {tuple(sorted(layouts.varying(entry)))}, but a "
                "threshold that follows the history of norms needs all groups on every device: measure whole leaves, "
                "or clip outside shard_map"
            )
    vector = jnp.concatenate([layouts.whole(entry).reshape(-1).astype(widest) for entry in flat])
    ends = list(itertools.accumulate(entry.size for entry in flat))

    def back(values: jax.Array) -> Any:
        pieces = jnp.split(layouts.whole(values), ends[:-1])  # else XLA may lay out the pieces like a leaf
        return treedef.unflatten(
            [
                layouts.like(piece.reshape(entry.shape).astype(entry.dtype), entry)
                for piece, entry in zip(pieces, flat, strict=True)
            ]
        )

    return vector, back


def entries(value: Any, treedef: Any) -> list[Any]:
    """Returns the entries of a pytree with structure `treedef`. One number or None is repeated for each leaf."""
    is_one = value is None or jnp.isscalar(value)
    return [value] * treedef.num_leaves if is_one else treedef.flatten_up_to(value)
