"""The leaves of a tree of updates, as a Norm sees them. The tree is flattened once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes, mesh, trees
from optaxclip._arrays.parameters import require_params
from optaxclip._arrays.trees import Tree


class Leaf:
    """One array of floats in a tree, or this device's piece of it.

    Attributes:
      value: the array.
      axes: the mesh axes that the leaf is split over, a tuple; () outside `shard_map` and `pmap`.
      by_dim: the same axes for each dimension; None if that is unknown.
    """

    __slots__ = ("_at", "_paths", "axes", "by_dim", "value")

    def __init__(self, value: jax.Array, split: mesh.Split, paths: "_Paths", at: int) -> None:
        self.value, self.axes, self.by_dim = value, split.axes, split.by_dim
        self._paths, self._at = paths, at

    @property
    def path(self) -> str:
        """Returns the path of the leaf in its tree, as in "decoder/kernel"."""
        return self._paths()[self._at]

    def sum(self, part: jax.Array) -> jax.Array:
        """Sums `part` over the devices that hold a piece of this leaf. Returns `part` if the leaf is whole."""
        return jax.lax.psum(part, self.axes) if self.axes else part

    def max(self, part: jax.Array) -> jax.Array:
        """Takes the maximum of `part` over the devices that hold a piece of this leaf. NaN becomes inf."""
        if not self.axes:
            return part
        # Without this, XLA's maximum over CPU devices (jax 0.8 to 0.12) may lose a NaN.
        return jax.lax.pmax(jnp.where(jnp.isnan(part), jnp.full_like(part, jnp.inf), part), self.axes)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Returns the shape of the whole leaf. If that is unknown, no dimension has length 1."""
        shape = jnp.shape(self.value)
        if not self.axes:
            return shape
        if self.by_dim is None:
            return tuple(max(length, 2) for length in shape)
        return tuple(mesh.whole_size((length,), names) for length, names in zip(shape, self.by_dim, strict=True))

    def axes_over(self, dims: tuple[int, ...]) -> tuple[str, ...]:
        """Returns the mesh axes to sum over in a reduction over the dimensions `dims`."""
        if not self.axes or len(dims) == jnp.ndim(self.value):
            return self.axes
        if self.by_dim is None:
            raise ValueError(
                f"leaf {self.path!r} is split over mesh axes {self.axes}, but not known along which dimensions: for a "
                f"norm over dimensions {dims}, pass axes= as a PartitionSpec or a pytree of PartitionSpecs"
            )
        return tuple(sorted(name for dim in dims for name in self.by_dim[dim]))

    def size_over(self, dims: tuple[int, ...]) -> int:
        """Returns the number of entries of the whole leaf along these dimensions, at least 1 so that it can divide."""
        return max(mesh.whole_size((jnp.shape(self.value)[dim] for dim in dims), self.axes_over(dims)), 1)


class _Paths:
    """The paths of leaves, calculated when they are first needed.

    A leaf refers to this instead of `Leaves`. A leaf that refers to `Leaves` would be a cycle, which keeps gradients
    alive.
    """

    def __init__(self, keys: Sequence[Any], treedef: Any, places: list[int]) -> None:
        self._keys, self._treedef, self._places = keys, treedef, places
        self._known: list[str] | None = None

    def __call__(self) -> list[str]:
        if self._known is None:
            paths = trees.paths_of(self._keys, self._treedef)
            self._known = [paths[i] for i in self._places]
        return self._known


class Leaves(list[Leaf]):
    """The leaves of a tree of updates that hold floats, in order.

    Other leaves, such as integers, booleans and keys, are not in the list: no clip measures or changes them.

    Attributes:
      told: the keyword arguments of `update`; None in `init`, where only shapes are known.
    """

    def __init__(
        self,
        tree: Tree,
        params: Tree = None,
        axes: mesh.Axes = "auto",
        *,
        told: Mapping[str, Any] | None = None,
        like: "Leaves | None" = None,
    ) -> None:
        """Flattens a tree.

        Args:
          tree: gradients, updates or parameters. No leaf may be None.
          params: the parameters in the containers of `tree`, or None.
          axes: the mesh axes that split the leaves; see `mesh`.
          told: the keyword arguments of `update`; None outside an update, as in `init`.
          like: leaves of a tree with the same structure and shapes. What was looked up for them is used again.

        Raises:
          ValueError: if a gradient is not reduced yet, or has a dtype that can't be clipped.
        """
        self._tree, self._params, self._axes = tree, params, axes
        self.told = told
        flat, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        keys, self._flat = zip(*flat, strict=True) if flat else ((), ())
        self._found: dict[Any, tuple[Any, list[Any]]] = {} if like is None else like._found
        self._places = dtypes.places_of_floats(self._flat) if like is None else like._places
        self._paths = _Paths(keys, self._treedef, self._places) if like is None else like._paths
        arrays = [
            self._flat[i] if hasattr(self._flat[i], "shape") else jnp.asarray(self._flat[i]) for i in self._places
        ]
        splits = mesh.splits_of(arrays, tree, self._places, params, axes)
        each = enumerate(zip(arrays, splits, strict=True))
        super().__init__([Leaf(array, split, self._paths, at) for at, (array, split) in each])

    @property
    def paths(self) -> list[str]:
        """The path of each leaf, as in "decoder/kernel"."""
        return self._paths()

    @property
    def axes(self) -> frozenset[str]:
        """Returns all mesh axes that split some leaf."""
        return frozenset(name for leaf in self for name in leaf.axes)

    def to_tree(self, values: Sequence[Any]) -> Any:
        """Puts one value per leaf into the structure of the tree, with None for everything else."""
        whole: list[Any] = [None] * len(self._flat)
        for i, value in zip(self._places, values, strict=True):
            whole[i] = value
        return self._treedef.unflatten(whole)

    def from_tree(self, tree: Tree) -> list[Any]:
        """Returns the entries of `tree` for each leaf: the inverse of `to_tree`."""
        return self._counted(self._treedef.flatten_up_to(tree))

    def updated(self, values: Sequence[Any]) -> Any:
        """Returns the tree with other values for these leaves, and everything else unchanged."""
        whole = list(self._flat)
        for i, value in zip(self._places, values, strict=True):
            whole[i] = value
        return self._treedef.unflatten(whole)

    def lookup(self, name: str, value: Any) -> list[Any]:
        """Returns the value of an argument for each leaf.

        Args:
          name: the name of the argument, for messages.
          value: a prefix pytree of values, or a function `path -> value`, which is called once per leaf.
        """

        def look() -> list[Any]:
            if trees.is_function(value):
                return [value(path) for path in self.paths]
            return self._counted(trees.values(name, value, self._tree)) if self else []

        return self.once(value, look, name)

    def require_any(self, chosen: Sequence[bool], value: Any, problem: str) -> None:
        """Raises if a function of a path chooses no leaf: a misspelt path would silently turn clipping off.

        Args:
          chosen: whether each leaf is chosen. A tree without leaves passes.
          value: the argument: a function, or a prefix pytree, whose structure is checked elsewhere.
          problem: the message. The paths are added to it.

        Raises:
          ValueError: with the paths of the leaves.
        """
        if trees.is_function(value) and chosen and not any(chosen):
            raise ValueError(f"{problem} {trees.listed(self.paths)}")

    def once(self, key: Any, look: Callable[[], list[Any]], name: str = "") -> list[Any]:
        """Calls `look` once per key, and keeps the result for these leaves and their parameters."""
        place = (name, id(key))
        if place not in self._found:
            self._found[place] = key, look()  # keeps the key alive, so that its id is not reused
        return self._found[place][1]

    def params(self) -> "Leaves":
        """Returns the parameters of these leaves.

        Raises:
          ValueError: with optax's message if there are no parameters; if their structure or shapes differ.
        """
        require_params(self._tree, self._params)
        return Leaves(self._params, self._params, self._axes, told={}, like=self)

    def _counted(self, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self._places]
