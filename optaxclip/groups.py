"""One function on every group at once.

Norms are a pytree with one entry per group: a scalar per leaf, say. What is done to them is done entry by entry: XLA
compiles the same small operation on a thousand scalars once, where taking the n-th number out of a vector is another
operation for every n.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import layouts


def over_groups(fn: Callable[..., Any], norms: Any, *others: Any) -> Any:
    """Applies an elementwise function to each group's entries.

    Args:
      fn: takes an entry of `norms` and one of each of `others`, returns a pytree of arrays of the entry's shape.
      norms: a pytree with one array per group.
      *others: each a pytree of the structure of `norms`, or one number or scalar array for all groups.

    Returns:
      A pytree of the structure of `norms` with what `fn` returned at its leaves.
    """
    flat, treedef = jax.tree.flatten(norms)
    columns = [entries(other, treedef) for other in others]
    return treedef.unflatten([fn(*row) for row in zip(flat, *columns, strict=True)])


def number(norms: Any) -> int:
    """How many groups there are."""
    return sum(math.prod(entry.shape) for entry in jax.tree.leaves(norms))


def dtype(norms: Any) -> Any:
    """The widest dtype of the groups' norms; float32 if there are none."""
    return jnp.result_type(jnp.float32, *(entry.dtype for entry in jax.tree.leaves(norms)))


def as_vector(norms: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """All groups, at least one, as a vector that is whole on every device; and the way back for such a vector.

    Raises:
      ValueError: if groups lie on different devices of a `shard_map`.
    """
    flat, treedef = jax.tree.flatten(norms)
    widest = dtype(norms)
    for entry in flat:
        if entry.ndim and layouts.varying(entry):
            raise ValueError(
                f"the groups lie on different devices along mesh axes {tuple(sorted(layouts.varying(entry)))}, and a "
                "threshold that follows the history of norms needs all of them on each: measure whole leaves, or clip "
                "outside of shard_map"
            )
    vector = jnp.concatenate([layouts.whole(entry).reshape(-1).astype(widest) for entry in flat])
    ends = list(itertools.accumulate(entry.size for entry in flat))

    def back(values: jax.Array) -> Any:
        pieces = jnp.split(layouts.whole(values), ends[:-1])  # or XLA may lay out what is kept of them as a leaf
        return treedef.unflatten(
            [
                layouts.like(piece.reshape(entry.shape).astype(entry.dtype), entry)
                for piece, entry in zip(pieces, flat, strict=True)
            ]
        )

    return vector, back


def entries(value: Any, treedef: Any) -> list[Any]:
    """The entries of a pytree of the structure `treedef`, or one number, or None, as often as that has leaves."""
    is_one = value is None or jnp.isscalar(value)
    return [value] * treedef.num_leaves if is_one else treedef.flatten_up_to(value)
