"""Splits a state into parts: the states of single transformations, each with its own arrays."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from optaxclip._arrays import trees
from optaxclip._arrays.trees import Tree

Path: TypeAlias = tuple[str, ...]

# Fields in which a wrapper keeps the state of what it wraps. They do not distinguish parts.
_WRAPPED = {
    "inner_state",
    "inner_states",
    "inner_opt_state",
    "base_optimizer_state",
    "opt_state",
    "fast_state",
    "threshold_state",
}
# Fields with statistics of something else: of the loss, of the norms that a skip sees, of other parameters.
_APART = {"norm_threshold_state", "loss_threshold_state", "adv_state", "hyperparams_states"}


@dataclasses.dataclass(eq=False)
class Part:
    """The state of one transformation, without the states inside it; or one array that stands alone.

    Attributes:
      path: its path in the state.
      node: the NamedTuple or dataclass, or the dict that a checkpoint made of it; None for a single array.
      fields: the names of its fields.
      leaves: its own arrays, by their paths inside it.
    """

    path: Path
    node: Any
    fields: frozenset[str]
    leaves: dict[Path, Any] = dataclasses.field(default_factory=dict)

    @property
    def places(self) -> "list[Place]":
        """Returns its own arrays with their places."""
        return [Place(self, inside, leaf) for inside, leaf in self.leaves.items()]

    @property
    def is_typed(self) -> bool:
        """Whether the class is known."""
        return not isinstance(self.node, Mapping)

    @property
    def keys(self) -> Path:
        """Returns the path without the fields of wrappers."""
        return tuple(key for key in self.path if key not in _WRAPPED)

    @property
    def role(self) -> Path:
        """Returns what its statistics are of, if not of what passes through the chain."""
        return tuple(key for key in self.path if key in _APART)


class Place(NamedTuple):
    """A leaf of a state.

    Attributes:
      part: the part that it belongs to.
      inside: its path inside the part.
      leaf: the array.
    """

    part: Part
    inside: Path
    leaf: Any

    @property
    def path(self) -> Path:
        """Returns its path in the state."""
        return self.part.path + self.inside


class Parts:
    """The parts of a state, and its leaves in the order of jax.

    Args:
      state: the state.
      params: the parameters. Their containers are no parts.
      like: the parts of another state. If this state has no NamedTuples, dicts with the fields of one of those parts
        are parts. Where those parts have arrays, these have no parts inside.
    """

    def __init__(self, state: Tree, params: Tree, like: "Parts | None" = None) -> None:
        self.places: list[Place] = []
        self._found: list[Part] = []
        self._with_parts: dict[frozenset[str], set[str]] = {}  # by fields of a part: those with parts inside
        self._orders: dict[frozenset[str], Path] = {}  # by fields of a part: their order
        self._like = like
        self._containers = {type(node) for node in _nodes(params) if _has_fields(node)}
        self._as_dicts = like is not None and not any(map(_has_fields, _nodes(state)))
        # In a checkpoint, the box that Flax puts an array in is a dict.
        self._boxes = self._as_dicts and not any(path[-1:] == ("value",) for path in shapes(params))
        self._visit(state, (), None, ())

    @property
    def parts(self) -> list[Part]:
        """Returns the parts that have arrays of their own."""
        return [part for part in self._found if part.leaves]

    def _visit(self, node: Any, path: Path, owner: Part | None, inside: Path) -> None:
        if _is_leaf(node):
            part = self._added(Part(path, None, frozenset())) if owner is None else owner
            part.leaves[inside] = node
            self.places.append(Place(part, inside, node))
            return
        fields = self._fields_of(node, owner, inside)
        if fields is not None:
            if owner is not None:
                self._with_parts[owner.fields].add(inside[0])
            owner, inside = self._added(Part(path, node, fields)), ()
        if self._boxes and isinstance(node, Mapping) and list(node) == ["value"]:
            self._visit(node["value"], path, owner, inside)
            return
        for key, child in self._in_order(children(node), fields):
            if not inside and key in _WRAPPED:
                self._visit(child, (*path, key), None, ())
            else:
                below = () if owner is None else (*inside, key)
                self._visit(child, (*path, key), owner, below)

    def _added(self, part: Part) -> Part:
        self._found.append(part)
        self._with_parts.setdefault(part.fields, set())
        if part.node is not None and part.is_typed:
            self._orders[part.fields] = _field_names(part.node)
        return part

    def _in_order(self, below: list[tuple[str, Any]], fields: frozenset[str] | None) -> list[tuple[str, Any]]:
        """Restores the order of fields or tuple entries that a checkpoint turned into a dict."""
        if not self._as_dicts or self._like is None:
            return below
        if fields is not None:
            order = self._like._orders[fields]
            return sorted(below, key=lambda one: order.index(one[0]))
        return sorted(below, key=lambda one: int(one[0])) if all(key.isdecimal() for key, _ in below) else below

    def _fields_of(self, node: Any, owner: Part | None, inside: Path) -> frozenset[str] | None:
        """Returns the names of a part's fields; None if the node is no part."""
        known = self._like._with_parts if self._like else {}
        if owner is not None and owner.fields in known and inside[0] not in known[owner.fields]:
            return None  # a container of parameters, which the model may no longer have
        if self._as_dicts:
            fields = frozenset(map(str, node)) if isinstance(node, Mapping) else frozenset[str]()
            return fields if fields and fields in known else None
        if not _has_fields(node) or type(node) in self._containers:
            return None
        return frozenset(_field_names(node))


def children(node: Any) -> list[tuple[str, Any]]:
    """Returns the children of a node, by key. The box that Flax puts an array in is not a level."""
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)
    below = [(jax.tree_util.keystr(path, simple=True), child) for path, child in flat]
    return [(key, _unboxed(child)) for key, child in below]


def shapes(tree: Tree) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every array in a pytree, by path."""
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree, ()) if hasattr(leaf, "shape")}


def is_per_parameter(place: Place, params: Mapping[Path, tuple[int, ...]]) -> bool:
    """Whether a leaf has the path and shape of a parameter, as moments have.

    Args:
      place: the leaf.
      params: the shapes of the parameters.
    """
    ends = (place.path[start:] for start in range(1, len(place.path) + 1))
    # If the parameters are a single number, it has no path, and the same shape as any statistic.
    return any(params.get(end) == np.shape(place.leaf) and (end or np.size(place.leaf) > 1) for end in ends)


def _leaves(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if _is_leaf(node):
        yield path, node
        return
    for key, child in children(node):
        yield from _leaves(child, (*path, key))


def _nodes(node: Any) -> Iterator[Any]:
    """Yields every container in a pytree."""
    if _is_leaf(node):
        return
    yield node
    for _, child in children(node):
        yield from _nodes(child)


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _unboxed(node: Any) -> Any:
    return jax.tree.leaves(node)[0] if trees.is_box(type(node)) and jax.tree.structure(node).num_leaves == 1 else node


def _has_fields(node: Any) -> bool:
    """Whether this is a NamedTuple or dataclass that may be a state."""
    is_state = (hasattr(node, "_fields") and isinstance(node, tuple)) or dataclasses.is_dataclass(node)
    return is_state and not isinstance(node, type | optax.MaskedNode)


def _field_names(node: Any) -> tuple[str, ...]:
    names = getattr(node, "_fields", None)
    return tuple(field.name for field in dataclasses.fields(node)) if names is None else names
