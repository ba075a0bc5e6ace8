"""Paths of leaves, prefix pytrees, and the first difference between two pytrees."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

Tree: TypeAlias = Any  # a pytree, of arrays unless said otherwise


def paths(tree: Tree) -> list[str]:
    """Returns the path of every leaf, as in "decoder/kernel" or "layers/0/bias".

    Flax puts arrays into boxes (`nnx.Param`, `nn.Partitioned`), and jax gives the key of the box, "value", as the last
    one. It is left out, so that a leaf has the same path with and without box. If keys that contain "/" would give two
    leaves the same path, these leaves have jax's notation: "['a/b']".
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return paths_of([key for key, _ in flat], treedef)


def paths_of(keys: Sequence[Any], treedef: Any) -> list[str]:
    """Returns the same as `paths`, from the keys that jax gives for each leaf."""
    joined = ["/".join(path) for path in _without_boxes(keys, treedef)]
    if len(set(joined)) == len(joined):
        return joined
    twice = {path for path in joined if joined.count(path) > 1}
    exact = map(jax.tree_util.keystr, keys)
    return [full if path in twice else path for path, full in zip(joined, exact, strict=True)]


def _keys(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, ...]]:
    """Returns the keys of every leaf, without those of boxes."""
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
    """Returns for each leaf whether it is the only content of a Flax box."""
    data = treedef.node_data()
    if data is None:
        return [False] * treedef.num_leaves
    if treedef.num_leaves == 1 and is_box(data[0]):
        return [True]
    return [flag for child in treedef.children() for flag in _in_boxes(child)]


def is_box(kind: type) -> bool:
    # By name, because Flax may not be installed: nnx.Variable, its state in Flax before 0.12, and linen's metadata.
    names = ("Variable", "VariableState", "AxisMetadata")
    return any(base.__module__.startswith("flax.") and base.__name__ in names for base in kind.__mro__)


def values(name: str, value: Any, tree: Tree) -> list[Any]:
    """Returns the entry of a prefix pytree argument for each leaf of `tree`. None is an entry.

    Raises:
      ValueError: if the structures differ, with the name of the argument and the path.
    """
    return spread(f"{name} does not fit the updates", value, tree, (name, "updates"))


def spread(problem: str, value: Any, tree: Tree, names: tuple[str, str]) -> list[Any]:
    """Returns the entry of a prefix pytree for every leaf of `tree`. None is an entry.

    Args:
      problem: the start of the message.
      value: a prefix pytree. If its containers differ from those of `tree`, the keys are matched: a plain dict fits an
        `nnx.State` or a `FrozenDict` with the same keys.
      tree: a pytree.
      names: what the message calls the two pytrees.

    Raises:
      ValueError: if the structures differ, with the path.
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
    """Returns the shortest prefix of a path that has an entry; None if there is none."""
    starts = (path[:length] for length in range(len(path) + 1))
    return next((start for start in starts if start in entries), None)


def _at_empty(tree: Tree, entries: Any) -> set[Any]:
    """Returns the entries for nodes of `tree` without leaves: None, or what a mask hides."""
    return {_first_start(path, entries) for path, _ in _empty_nodes(tree)} - {None}


def empty_nodes(tree: Tree) -> list[tuple[str, Any]]:
    """Returns the nodes without leaves, with their paths: None, or what a mask hides."""
    return [("/".join(path), node) for path, node in _empty_nodes(tree)]


def _empty_nodes(tree: Tree) -> list[tuple[tuple[str, ...], Any]]:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    return [(_simple(path), node) for path, node in flat if not jax.tree.leaves(node)]


def aligned(tree: Tree, other: Any) -> Any:
    """Returns the leaves of `tree` in the containers of `other`, matched by keys. None if the keys differ.

    None counts as a leaf in both.
    """
    by_keys = dict(zip(_keys(tree, is_none), jax.tree.leaves(tree, is_leaf=is_none), strict=True))
    needed = _keys(other, is_none)
    if set(needed) != set(by_keys) or len(needed) != len(by_keys):
        return None
    return jax.tree.unflatten(jax.tree.structure(other, is_leaf=is_none), [by_keys[path] for path in needed])


def broadcast(problem: str, prefix: Tree, tree: Tree, names: tuple[str, str]) -> Any:
    """Broadcasts a prefix pytree to the structure of `tree`.

    Args:
      problem: the start of the message.
      prefix: a prefix pytree of `tree`.
      tree: a pytree.
      names: what the message calls the two pytrees.

    Raises:
      ValueError: if the structures differ, with the path.
    """
    try:
        return jax.tree.broadcast(prefix, tree)
    except ValueError as error:
        raise ValueError(f"{problem}: {difference(prefix, tree, names) or error}") from None


def difference(prefix: Tree, tree: Tree, names: tuple[str, str]) -> str:
    """Describes the first path that only one of two pytrees has. Empty if there is none.

    Args:
      prefix: a prefix pytree of `tree`, or meant to be one.
      tree: a pytree.
      names: what the message calls the two pytrees; both singular.
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
    """Lists the first paths of a tree, for messages."""
    if not names:
        return "no leaf"
    if names == [""]:
        return "a single leaf"
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@dataclasses.dataclass(frozen=True)
class _Box:
    """Holds one value, which may be None. To jax it is a leaf."""

    value: Any


def is_none(value: Any) -> bool:
    """The `is_leaf` for trees in which None is a leaf."""
    return value is None


def is_function(value: Any) -> bool:
    """Whether a value is to be called, such as a schedule or a function of a path.

    A callable pytree, such as an Equinox module, is not: its leaves are the values. `jax.tree_util.Partial` is,
    although it is a pytree. A class, such as `jnp.float32`, is not.
    """
    if not callable(value) or isinstance(value, type):
        return False
    return isinstance(value, jax.tree_util.Partial) or jax.tree_util.all_leaves([value])
