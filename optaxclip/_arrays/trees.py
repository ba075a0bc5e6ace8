"""What pytrees have where: the paths of leaves, prefix pytrees, and where two pytrees part."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

Tree: TypeAlias = Any  # a pytree: of arrays, where nothing else is said


def paths(tree: Tree) -> list[str]:
    """The path of every leaf, as in "decoder/kernel" or "layers/0/bias".

    Flax boxes its arrays (`nnx.Param`, `nn.Partitioned`), and jax gives the box's own "value" as the last key. That key
    is left out, so that a leaf has one path whether it is boxed or not. Where keys that contain a "/" would give two
    leaves one path, these have jax's notation: "['a/b']".
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return paths_of([key for key, _ in flat], treedef)


def paths_of(keys: Sequence[Any], treedef: Any) -> list[str]:
    """As `paths`, from what jax says are the keys of each leaf."""
    joined = ["/".join(path) for path in _without_boxes(keys, treedef)]
    if len(set(joined)) == len(joined):
        return joined
    twice = {path for path in joined if joined.count(path) > 1}
    exact = map(jax.tree_util.keystr, keys)
    return [full if path in twice else path for path, full in zip(joined, exact, strict=True)]


def _keys(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, ...]]:
    """The keys on the way to every leaf, except those of boxes."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return _without_boxes([key for key, _ in flat], treedef)


def _without_boxes(keys: Sequence[Any], treedef: Any) -> list[tuple[str, ...]]:
    simple = [_simple(path) for path in keys]
    if not any(path and path[-1] == jax.tree_util.GetAttrKey("value") for path in keys):
        return simple
    return [path[:-1] if is_boxed else path for path, is_boxed in zip(simple, _in_boxes(treedef), strict=True)]


def _simple(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _in_boxes(treedef: Any) -> list[bool]:
    """Which leaves of a tree are all that a box of Flax holds."""
    data = treedef.node_data()
    if data is None:
        return [False] * treedef.num_leaves
    if treedef.num_leaves == 1 and is_box(data[0]):
        return [True]
    return [flag for child in treedef.children() for flag in _in_boxes(child)]


def is_box(kind: type) -> bool:
    # By name, since Flax need not be installed: nnx.Variable, its state in Flax before 0.12, linen's metadata.
    names = ("Variable", "VariableState", "AxisMetadata")
    return any(base.__module__.startswith("flax.") and base.__name__ in names for base in kind.__mro__)


def values(name: str, value: Any, tree: Tree) -> list[Any]:
    """What an argument of this name, a prefix pytree, says of each leaf of `tree`. A None in it is a value.

    Raises:
      ValueError: naming the argument and the path where the structures part.
    """
    return spread(f"{name} does not fit the updates", value, tree, (name, "updates"))


def spread(problem: str, value: Any, tree: Tree, names: tuple[str, str]) -> list[Any]:
    """The entry of a prefix pytree for every leaf of `tree`. A None in it is an entry.

    Args:
      problem: the first half of the message where an entry is missing.
      value: a prefix pytree, by structure, or by keys where the containers differ: a plain dict fits an `nnx.State` or
        a `FrozenDict` with its keys.
      tree: a pytree.
      names: of the two pytrees, for the message.

    Raises:
      ValueError: with the problem and the path where the structures part.
    """
    boxes = jax.tree.map(_Box, value, is_leaf=is_none)
    return [box.value for box in _spread(problem, boxes, tree, names)]


def _spread(problem: str, prefix: Tree, tree: Tree, names: tuple[str, str]) -> list[Any]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(prefix, tree))
    except ValueError as error:
        entries = dict(zip(_keys(prefix), jax.tree.leaves(prefix), strict=True))
        places = [_first_start(path, entries) for path in _keys(tree)]
        if None in places or {*places, *_at_empty(tree, entries)} != set(entries):
            raise ValueError(f"{problem}: {difference(prefix, tree, names) or error}") from None
        return [entries[place] for place in places if place is not None]


def _first_start(path: tuple[str, ...], entries: Any) -> tuple[str, ...] | None:
    """The shortest beginning of a path that has an entry."""
    starts = (path[:length] for length in range(len(path) + 1))
    return next((start for start in starts if start in entries), None)


def _at_empty(tree: Tree, entries: Any) -> set[Any]:
    """The entries for what is there and holds no leaf: None, or what a mask hides."""
    return {_first_start(path, entries) for path, _ in _empty_nodes(tree)} - {None}


def empty_nodes(tree: Tree) -> list[tuple[str, Any]]:
    """What is there and holds no leaf, with its path: None, or what a mask hides."""
    return [("/".join(path), node) for path, node in _empty_nodes(tree)]


def _empty_nodes(tree: Tree) -> list[tuple[tuple[str, ...], Any]]:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    return [(_simple(path), node) for path, node in flat if not jax.tree.leaves(node)]


def aligned(tree: Tree, other: Any) -> Any:
    """The leaves of `tree` in the containers of `other`, by their keys; None unless both have the same keys.

    A None in one of the two is a leaf.
    """
    by_keys = dict(zip(_keys(tree, is_none), jax.tree.leaves(tree, is_leaf=is_none), strict=True))
    needed = _keys(other, is_none)
    if set(needed) != set(by_keys) or len(needed) != len(by_keys):
        return None
    return jax.tree.unflatten(jax.tree.structure(other, is_leaf=is_none), [by_keys[path] for path in needed])


def broadcast(problem: str, prefix: Tree, tree: Tree, names: tuple[str, str]) -> Any:
    """A prefix pytree brought to the structure of `tree`.

    Args:
      problem: the first half of the message where the two do not fit.
      prefix: a pytree that ends where `tree` does, or before.
      tree: a pytree.
      names: of the two pytrees, for the message.

    Raises:
      ValueError: with the problem and the path where the structures part.
    """
    try:
        return jax.tree.broadcast(prefix, tree)
    except ValueError as error:
        raise ValueError(f"{problem}: {difference(prefix, tree, names) or error}") from None


def difference(prefix: Tree, tree: Tree, names: tuple[str, str]) -> str:
    """The first path at which a prefix pytree has something and `tree` has not, or the other way round.

    Args:
      prefix: a pytree.
      tree: a pytree.
      names: of the two, for the message; both singular.
    """
    (one, other), have, need = names, paths(prefix), paths(tree)
    for path in have:
        if not any(_starts_with(longer, path) for longer in need):
            return f"{path!r} is in {one} but not in {other}, which has {listed(need)}"
    for path in need:
        if not any(_starts_with(path, start) for start in have):
            return f"{path!r} is in {other} but not in {one}, which has {listed(have)}"
    return ""


def _starts_with(path: str, start: str) -> bool:
    return start in ("", path) or path.startswith(start + "/")


def listed(names: list[str]) -> str:
    """Some of the paths of a tree, for messages."""
    if not names:
        return "no leaf"
    if names == [""]:
        return "a single leaf"
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@dataclasses.dataclass(frozen=True)
class _Box:
    """A leaf to jax, also where the value is None."""

    value: Any


def is_none(value: Any) -> bool:
    """What `is_leaf` says where a None is a leaf."""
    return value is None


def is_function(value: Any) -> bool:
    """Whether a value is to be called, as a schedule or a function of a path.

    A callable whose type is a pytree, as an Equinox module, is a pytree: its leaves are what is meant.
    `jax.tree_util.Partial` is a pytree in form alone. A class, as `jnp.float32`, makes values and says nothing of any.
    """
    if not callable(value) or isinstance(value, type):
        return False
    return isinstance(value, jax.tree_util.Partial) or jax.tree_util.all_leaves([value])
