"""Over which mesh axes a leaf is split.

Under `jit` with shardings a sum over an array is global already, and nothing here does anything. Inside `shard_map` and
`pmap` each device sees its own piece of a split leaf, and a norm must be summed over the axes that the leaf is split
over: all of them, and no other (a replicated leaf must be counted once).

`splits_of` decides that for every leaf, once, from `axes`:

- `"auto"`: the axes that the leaf varies over, which `shard_map` tracks in the types when `check_vma=True` (its
  default). Nothing is known in `pmap` and with `check_vma=False`: there is a warning, and the axes must be named.
- a name or a tuple of names: the same axes for every leaf. Where the types know nothing, there is a warning if a leaf
  could be whole: it would be counted once per device.
- a PartitionSpec or a prefix pytree of them: per leaf, and by dimension, which norms of single units need. A None among
  them is `P()`, a leaf that is whole.
- `None`: nothing is split; each device stands for itself.

Names that are not bound where we run (outside `shard_map`) are dropped, as are names over which a leaf is known not to
vary. A gradient that is a sum not yet taken is refused: its norm on each device would be that of a summand.

No type tells a piece of one model from a model of its own (seeds, populations): `"auto"` takes what varies for a piece,
and one norm then couples all devices. A model per device needs `None`.

Axes along which devices hold different examples, each with a gradient of its own, split no leaf: see `apart`.
"""

import contextlib
import contextvars
import math
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optaxclip._arrays import callers, dtypes, layouts, trees
from optaxclip._arrays.trees import Tree

Axes: TypeAlias = Any  # "auto" | None | str | tuple[str, ...] | prefix pytree of PartitionSpec


def whole_size(lengths: Iterable[int], axes: Iterable[str]) -> int:
    """How many entries there are in a block of these lengths on every device along these axes, taken together."""
    return math.prod(lengths) * math.prod(jax.lax.axis_size(name) for name in axes)


_APART: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("apart", default=frozenset())


@contextlib.contextmanager
def apart(names: Iterable[str]) -> Generator[None, None, None]:
    """While this is entered, devices along mesh axes `names` have trees of their own: no leaf is split over them."""
    token = _APART.set(_APART.get() | frozenset(names))
    try:
        yield
    finally:
        _APART.reset(token)


class Split(NamedTuple):
    """How one array is split.

    Attributes:
      axes: the mesh axes it is split over, in order.
      by_dim: the same axes, dimension by dimension; None where that is not known.
    """

    axes: tuple[str, ...] = ()
    by_dim: tuple[tuple[str, ...], ...] | None = None


_WHOLE = Split()


def splits_of(arrays: Sequence[Any], tree: Tree, places: Sequence[int], beside: Any, axes: Axes) -> list[Split]:
    """Says over which mesh axes each of some arrays is split.

    Args:
      arrays: leaves of `tree`.
      tree: gradients, updates or parameters.
      places: which of the leaves of `tree` the arrays are.
      beside: what tells how a reduced gradient would vary, the parameters say: a pytree like `tree`, or None.
      axes: see the module's docstring.
    """
    is_auto = isinstance(axes, str) and axes == "auto"
    is_chosen = axes is None or (not is_auto and _is_names(axes))
    over = require_reduced(tree, None if is_chosen else beside, meant=_WHAT_CAN_BE_MEANT)
    if axes is None or not arrays:
        return [_WHOLE] * len(arrays)
    if is_auto:
        if jax.sharding.get_abstract_mesh().manual_axes:
            _warn_of_the_unseen()
        if not any(over):
            return [_WHOLE] * len(arrays)
        return [Split(tuple(sorted(over[i] - _APART.get()))) for i in places]
    tracked = _Tracked()
    if is_chosen:
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        _warn_of_whole_leaves(axes, names, arrays, tracked)
        return [Split(tracked.keep(names, array)) for array in arrays]
    specs, paths = trees.values("axes", axes, tree), trees.paths(tree)
    return [_split_by_spec(specs[i], array, paths[i], tracked) for i, array in zip(places, arrays, strict=True)]


_WHAT_CAN_BE_MEANT = (
    ", or say what is meant: axes=None clips on each device alone, axes=<names> takes the norm over those axes"
)


def require_reduced(
    grads: Tree, beside: Any = None, *, called: str = "parameter", meant: str = ""
) -> list[frozenset[str]]:
    """Raises where a gradient is a sum that has not been taken yet: the piece on each device is one summand of it.

    Args:
      grads: a pytree.
      beside: of its structure, what tells how a reduced gradient would vary, the parameters say; None if nothing does.
        A gradient that varies over an axis that the array beside it does not vary over, at the same shape, is refused.
      called: what the message calls an array of `beside`.
      meant: how the message goes on where the caller has a way to say that this is meant.

    Returns:
      The mesh axes over which each leaf is known to vary.
    """
    flat, treedef = jax.tree.flatten(grads)
    dtypes.require_usable(grads, flat)  # here since every update comes through here
    on_mesh = layouts.on_mesh(flat)
    for i in on_mesh:
        if names := layouts.unreduced(flat[i]):  # jax itself says so, in the type
            raise ValueError(
                f"{_the_gradient(grads, i)} is unreduced over mesh axes {names}: each device has one summand of it. "
                "Reduce it first: under jit with jax.sharding.reshard to a PartitionSpec without `unreduced`, in "
                "shard_map with jax.lax.psum"
            )
    over = [frozenset()] * len(flat)
    for i in on_mesh:
        over[i] = layouts.varying(flat[i])
    if beside is None or not any(over):
        return over
    for i, (leaf, other) in enumerate(zip(flat, treedef.flatten_up_to(beside), strict=True)):
        extra = over[i] - layouts.varying(other)
        if extra and jax.numpy.shape(leaf) == jax.numpy.shape(other):
            raise ValueError(
                f"{_the_gradient(grads, i)} varies over mesh axes {tuple(sorted(extra))} and its {called} does not: it "
                f"has not been reduced yet. Reduce it first (jax.lax.psum or pmean){meant}"
            )
    return over


def _the_gradient(grads: Tree, i: int) -> str:
    path = trees.paths(grads)[i]
    return f"the gradient of {path!r}" if path else "the gradient"


def may_vary_over(value: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of some mesh axes over which a value may differ between devices."""
    return _Tracked().keep(tuple(sorted(names)), value)


def _warn_of_the_unseen() -> None:
    """One warning where `"auto"` finds nothing because this `shard_map` (or `pmap`, which is one) tracks nothing."""
    if names := _untracked():
        warnings.warn(
            f"axes='auto' sees nothing along mesh axes {names}: in pmap, and in shard_map with check_vma=False, jax "
            "does not track over which axes an array is split, so every device takes the norm of its own share alone. "
            "Where arrays are split pass axes=, a PartitionSpec for all leaves or a pytree of them (P() for a leaf "
            "that is whole on every device); where all are whole, or each device has a model of its own, "
            "pass axes=None",
            stacklevel=callers.steps_up(),
        )


def _warn_of_whole_leaves(axes: Axes, names: tuple[str, ...], arrays: Sequence[Any], tracked: "_Tracked") -> None:
    """One warning where names stand for all leaves and nothing tells which of them are whole on every device."""
    may_be_whole = len(arrays) > 1 or any(jnp.ndim(array) == 0 for array in arrays)
    if may_be_whole and set(names).intersection(_untracked(tracked)):
        warnings.warn(
            f"axes={axes!r} takes every leaf to be split over these mesh axes, and in pmap, and in shard_map with "
            "check_vma=False, jax does not track whether it is: a leaf that is whole on every device is counted once "
            "per device. Pass PartitionSpecs instead, P() for such a leaf: axes={'kernel': P('data'), 'bias': P()}",
            stacklevel=callers.steps_up(),
        )


def _untracked(tracked: "_Tracked | None" = None) -> tuple[str, ...]:
    """The axes of the mesh along which types say nothing.

    A named axis of `vmap` is none of them, and one norm for each of its entries is what people want of it.
    """
    names = jax.sharding.get_abstract_mesh().manual_axes
    tracked = tracked or _Tracked()
    return tuple(name for name in names if tracked(name) is False) if names else ()


def _refuse_unknown(name: str) -> None:
    """Raises for a name that no axis of the mesh has where one is bound: each device would be left to itself."""
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes and name not in here.axis_names:
        raise ValueError(f"axes={name!r} is no axis of the mesh, which has {here.axis_names}")


class _Tracked:
    """Which axis names are bound here, and whether the types track them; asked once per name."""

    def __init__(self) -> None:
        self.known: dict[str, bool | None] = {}

    def __call__(self, name: str) -> bool | None:
        if name not in self.known:
            try:
                # Where variation is tracked, a device's own index varies over its axis.
                self.known[name] = name in layouts.varying(jax.lax.axis_index(name))
            except NameError:
                _refuse_unknown(name)
                self.known[name] = None
        return self.known[name]

    def keep(self, names: tuple[str, ...], leaf: Any) -> tuple[str, ...]:
        """Those of `names` that are bound and that `leaf` may be split over."""
        over = layouts.varying(leaf)
        names = tuple(name for name in names if name not in _APART.get())
        return tuple(name for name in names if (self(name) is False) or (self(name) and name in over))


def _is_names(axes: Any) -> bool:
    if isinstance(axes, str):
        return True
    several = isinstance(axes, tuple | list) and not _is_spec(axes)
    return several and bool(axes) and all(isinstance(name, str) for name in axes)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def _split_by_spec(spec: Any, leaf: Any, path: str, tracked: _Tracked) -> Split:
    spec = PartitionSpec() if spec is None else spec  # no entry, as where a parameter has no gradient
    if not _is_spec(spec):
        raise ValueError(
            "axes must be 'auto', None, a name, a tuple of names, or a prefix pytree of PartitionSpec; "
            f"got {spec!r} for leaf {path!r}"
        )
    ndim = len(jax.numpy.shape(leaf))
    dims = layouts.dims_of(spec)
    if len(dims) > ndim:
        raise ValueError(f"axes={spec} has {len(dims)} dimensions, but leaf {path!r} has {ndim}")
    entries = [*dims, *([None] * (ndim - len(dims)))]
    named = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    by_dim = tuple(tracked.keep(tuple(n for n in names if isinstance(n, str)), leaf) for names in named)
    # In one order for all leaves: a set of axes in two orders would be two collectives.
    return Split(tuple(sorted(name for names in by_dim for name in names)), by_dim)
