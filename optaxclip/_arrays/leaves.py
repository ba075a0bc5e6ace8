"""The leaves of a tree of updates, found once: what a Norm sees of it."""

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
      axes: a tuple of the mesh axes that it is split over where we run; () outside of `shard_map` and `pmap`.
      by_dim: the same axes, dimension by dimension; None where that is not known.
    """

    __slots__ = ("_at", "_paths", "axes", "by_dim", "value")

    def __init__(self, value: jax.Array, split: mesh.Split, paths: "_Paths", at: int) -> None:
        self.value, self.axes, self.by_dim = value, split.axes, split.by_dim
        self._paths, self._at = paths, at

    @property
    def path(self) -> str:
        """Where the leaf is in its tree, as in "decoder/kernel"."""
        return self._paths()[self._at]

    def sum(self, part: jax.Array) -> jax.Array:
        """The sum of what each device has of this leaf; where the leaf is whole, `part` itself."""
        return jax.lax.psum(part, self.axes) if self.axes else part

    def max(self, part: jax.Array) -> jax.Array:
        """The largest of what each device has of this leaf, likewise; a NaN among them comes out as inf."""
        if not self.axes:
            return part
        # XLA's maximum over CPUs (jax 0.8 to 0.12) may lose a NaN.
        return jax.lax.pmax(jnp.where(jnp.isnan(part), jnp.full_like(part, jnp.inf), part), self.axes)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole leaf; where that is not known, no length is 1."""
        shape = jnp.shape(self.value)
        if not self.axes:
            return shape
        if self.by_dim is None:
            return tuple(max(length, 2) for length in shape)
        return tuple(mesh.whole_size((length,), names) for length, names in zip(shape, self.by_dim, strict=True))

    def axes_over(self, dims: tuple[int, ...]) -> tuple[str, ...]:
        """The mesh axes to sum over when the dimensions `dims` are reduced."""
        if not self.axes or len(dims) == jnp.ndim(self.value):
            return self.axes
        if self.by_dim is None:
            raise ValueError(
                f"leaf {self.path!r} is split over mesh axes {self.axes}, and it is not known which of its dimensions "
                f"are: a norm over its dimensions {dims} alone needs axes= to be a PartitionSpec or a pytree of them"
            )
        return tuple(sorted(name for dim in dims for name in self.by_dim[dim]))

    def size_over(self, dims: tuple[int, ...]) -> int:
        """How many entries the whole leaf has along these dimensions; 1 for none, so that one can divide by it."""
        return max(mesh.whole_size((jnp.shape(self.value)[dim] for dim in dims), self.axes_over(dims)), 1)


class _Paths:
    """The paths of leaves, once somebody asks for them.

    A leaf has this and not `Leaves`, which has the leaf: a cycle would keep gradients alive.
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

    Integers, booleans, keys and what else a tree may hold are not among them: no clip measures or changes these.

    Attributes:
      told: the keyword arguments of `update`; None in `init`, where only shapes are asked for.
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
          tree: gradients, updates or parameters, without None in the place of a leaf.
          params: the parameters in the containers of `tree`, or None.
          axes: over which mesh axes the leaves are split; see `mesh`.
          told: the keyword arguments of `update`; None where there is no update, as in `init`.
          like: leaves of a tree of this structure and these shapes; what was found of them holds here, too.

        Raises:
          ValueError: for a gradient that is not reduced yet, or of a dtype that can't be clipped.
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
        """The mesh axes that some leaf is split over."""
        return frozenset(name for leaf in self for name in leaf.axes)

    def to_tree(self, values: Sequence[Any]) -> Any:
        """One value per leaf in the structure of the tree, with None at what is no leaf here."""
        whole: list[Any] = [None] * len(self._flat)
        for i, value in zip(self._places, values, strict=True):
            whole[i] = value
        return self._treedef.unflatten(whole)

    def from_tree(self, tree: Tree) -> list[Any]:
        """What a pytree of the structure of this tree has for each leaf: what `to_tree` was given."""
        return self._counted(self._treedef.flatten_up_to(tree))

    def updated(self, values: Sequence[Any]) -> Any:
        """The tree with other values at its leaves, and all else as it was."""
        whole = list(self._flat)
        for i, value in zip(self._places, values, strict=True):
            whole[i] = value
        return self._treedef.unflatten(whole)

    def lookup(self, name: str, value: Any) -> list[Any]:
        """What an argument says of each leaf.

        Args:
          name: the argument's name, for messages.
          value: a prefix pytree of values, or a function `path -> value`, which is called once for each leaf.
        """

        def look() -> list[Any]:
            if trees.is_function(value):
                return [value(path) for path in self.paths]
            return self._counted(trees.values(name, value, self._tree)) if self else []

        return self.once(value, look, name)

    def require_any(self, chosen: Sequence[bool], value: Any, problem: str) -> None:
        """Refuses a function of a path that chooses no leaf: a misspelt path would turn clipping off, unnoticed.

        Args:
          chosen: what the argument says of each leaf. For a tree without leaves it says nothing.
          value: the argument: a function, or a prefix pytree, of which the structure is checked elsewhere.
          problem: the message, to which the paths are added.

        Raises:
          ValueError: with the paths that there are.
        """
        if trees.is_function(value) and chosen and not any(chosen):
            raise ValueError(f"{problem} {trees.listed(self.paths)}")

    def once(self, key: Any, look: Callable[[], list[Any]], name: str = "") -> list[Any]:
        """What `look` finds of these leaves and of their parameters alike; it is called once for each key."""
        place = (name, id(key))
        if place not in self._found:
            self._found[place] = key, look()  # with the key, so that no other object gets its id
        return self._found[place][1]

    def params(self) -> "Leaves":
        """The parameters of these leaves.

        Raises:
          ValueError: optax's message, where there are none; or where they are not of this structure and these shapes.
        """
        require_params(self._tree, self._params)
        return Leaves(self._params, self._params, self._axes, told={}, like=self)

    def _counted(self, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self._places]
