"""What holds for each leaf: from one value, a prefix pytree of values, or a function of the leaf's path."""

import dataclasses
from typing import Any

import jax


def paths(tree: Any) -> list[str]:
    """The path of every leaf, as in "decoder/kernel" or "layers/0/bias"."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def values(name: str, value: Any, tree: Any) -> list[Any]:
    """One value per leaf of `tree`.

    Args:
      name: the argument's name, for the message.
      value: a callable `path -> value`, or a prefix pytree of values (a single value, say).
      tree: the pytree whose leaves are asked about.

    Raises:
      ValueError: naming the argument and the path where the structures part.
    """
    if not jax.tree.leaves(tree):  # as when `optax.tree.map_params` looks for the parameters in a state
        return []
    if callable(value):
        return [value(path) for path in paths(tree)]
    boxes = jax.tree.map(_Box, value, is_leaf=_is_none)
    try:
        return [box.value for box in jax.tree.leaves(jax.tree.broadcast(boxes, tree))]
    except ValueError as error:
        raise ValueError(f"{name} is not a prefix of the tree of updates: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Box:
    """A leaf to jax, also where the value is None."""

    value: Any


def _is_none(value: Any) -> bool:
    return value is None
