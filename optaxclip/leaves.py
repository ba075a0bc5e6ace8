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
    boxes = jax.tree.map(_Box, value, is_leaf=is_none)
    return [box.value for box in jax.tree.leaves(broadcast(f"{name} does not fit the updates", boxes, tree))]


def broadcast(problem: str, prefix: Any, tree: Any) -> Any:
    """A prefix pytree brought to the structure of `tree`.

    Args:
      problem: what it means if that is impossible, for the message.
      prefix: a pytree that ends where `tree` does, or before.
      tree: a pytree.

    Raises:
      ValueError: with the problem and the path where the structures part.
    """
    try:
        return jax.tree.broadcast(prefix, tree)
    except ValueError as error:
        raise ValueError(f"{problem}: {_difference(prefix, tree) or error}") from None


def _difference(prefix: Any, tree: Any) -> str:
    """The first path at which a prefix pytree has something and `tree` has not, or the other way round."""
    have, need = paths(prefix), paths(tree)
    for path in have:
        if not any(_starts_with(other, path) for other in need):
            return f"it has an entry at {path!r}, where there is nothing; there are {listed(need)}"
    for path in need:
        if not any(_starts_with(path, other) for other in have):
            return f"it has no entry for {path!r}; it has {listed(have)}"
    return ""


def _starts_with(path: str, start: str) -> bool:
    return start in ("", path) or path.startswith(start + "/")


def listed(names: list[str]) -> str:
    """Some of the paths of a tree, for messages."""
    if names == [""]:
        return "only one, of no path"
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@dataclasses.dataclass(frozen=True)
class _Box:
    """A leaf to jax, also where the value is None."""

    value: Any


def is_none(value: Any) -> bool:
    """What `is_leaf` says where a None is a leaf."""
    return value is None
