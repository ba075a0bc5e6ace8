"""Finds out over which mesh axes each leaf is split.

Under `jit` with shardings a sum over an array is already global, and this module does nothing. Inside `shard_map` and
`pmap` each device sees only its piece of a split leaf. A norm must then be summed over exactly the axes that split the
leaf: with one axis more, a replicated leaf would be counted several times.

`splits_of` decides this once for every leaf, from `axes`:

- `"auto"`: the axes that the leaf varies over, which `shard_map` tracks in the types with `check_vma=True` (its
  default). With `check_vma=False`, and in `pmap`, nothing is tracked: there is a warning, and the user must name the
  axes.
- a name or a tuple of names: the same axes for every leaf. If the types track nothing and a leaf may be whole, there is
  a warning, because a whole leaf would be counted once per device.
- a PartitionSpec or a prefix pytree of them: axes per leaf and dimension, which norms of single units need. None among
  them means `P()`, a whole leaf.
- `None`: nothing is split, and each device clips alone.

Names that are not bound (outside `shard_map`) are dropped, and so are names over which a leaf is known not to vary. A
gradient that is an unreduced sum is refused: each device would measure one summand.

The types can't tell a piece of one model from a model of its own (seeds, populations). `"auto"` takes everything that
varies for a piece, so one norm then couples all devices. For one model per device pass `None`.

No leaf is split over axes along which devices hold different examples, each with its own gradient: see `apart`.
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
    """Returns the number of entries in a block with these lengths, counted on all devices along these axes."""
    return math.prod(lengths) * math.prod(jax.lax.axis_size(name) for name in axes)


_APART: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("apart", default=frozenset())


@contextlib.contextmanager
def apart(names: Iterable[str]) -> Generator[None, None, None]:
    """Within this context, devices along mesh axes `names` have separate trees: no leaf is split over these axes."""
    token = _APART.set(_APART.get() | frozenset(names))
    try:
        yield
    finally:
        _APART.reset(token)


class Split(NamedTuple):
    """How one array is split.

    Attributes:
      axes: the mesh axes that split it, in order.
      by_dim: the same axes for each dimension; None if that is unknown.
    """

    axes: tuple[str, ...] = ()
    by_dim: tuple[tuple[str, ...], ...] | None = None


_WHOLE = Split()


def splits_of(arrays: Sequence[Any], tree: Tree, places: Sequence[int], beside: Any, axes: Axes) -> list[Split]:
    """Returns the mesh axes over which each array is split.

    Args:
      arrays: leaves of `tree`.
      tree: gradients, updates or parameters.
      places: the indices of the arrays among the leaves of `tree`.
      beside: a pytree like `tree` that varies as reduced gradients would, for example the parameters; or None.
      axes: see the docstring of this module.
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
    ". To clip it as it is, pass axes=None (each device alone) or axes=<names> (one norm over those axes)"
)


def require_reduced(
    grads: Tree, beside: Any = None, *, called: str = "parameter", meant: str = ""
) -> list[frozenset[str]]:
    """Raises ValueError if a gradient is an unreduced sum, of which each device holds one summand.

    Args:
      grads: a pytree.
      beside: a pytree of the same structure that varies as reduced gradients would, for example the parameters; None if
        there is none. A gradient is refused if it has the same shape as the array beside it, but varies over more axes.
      called: what the message calls an array of `beside`.
      meant: the end of the message, for callers that can clip such a gradient on request.

    Returns:
      The mesh axes over which each leaf is known to vary.
    """
    flat, treedef = jax.tree.flatten(grads)
    dtypes.require_usable(grads, flat)  # checked here because every update passes here
    on_mesh = layouts.on_mesh(flat)
    for i in on_mesh:
        if names := layouts.unreduced(flat[i]):  # jax itself says so, in the type
            raise ValueError(
                f"{_the_gradient(grads, i)} is unreduced over mesh axes {names}: each device has one summand of it. "
                "Reduce it first: in shard_map with jax.lax.psum, under jit with jax.sharding.reshard to a "
                "PartitionSpec without `unreduced`"
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
                f"{_the_gradient(grads, i)} varies over mesh axes {tuple(sorted(extra))} but its {called} does not: it "
                f"has not been reduced yet. Reduce it first, with jax.lax.psum or pmean{meant}"
            )
    return over


def _the_gradient(grads: Tree, i: int) -> str:
    path = trees.paths(grads)[i]
    return f"the gradient of {path!r}" if path else "the gradient"


def may_vary_over(value: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Returns those of some mesh axes over which a value may differ between devices."""
    return _Tracked().keep(tuple(sorted(names)), value)


def _warn_of_the_unseen() -> None:
    """Warns once if `"auto"` finds nothing because this `shard_map` (or `pmap`) tracks nothing."""
    if names := _untracked():
        warnings.warn(
            f"axes='auto' finds no split arrays along mesh axes {names}, because jax does not track them in pmap and "
            "in shard_map with check_vma=False: each device measures only its own piece. If arrays are split, pass "
            "axes=, a PartitionSpec for all leaves or a pytree of them (P() for a leaf that is whole on every device). "
            "If every leaf is whole, or each device has its own model, pass axes=None",
            stacklevel=callers.steps_up(),
        )


def _warn_of_whole_leaves(axes: Axes, names: tuple[str, ...], arrays: Sequence[Any], tracked: "_Tracked") -> None:
    """Warns once if axis names are given for all leaves, and some leaf may be whole on every device."""
    may_be_whole = len(arrays) > 1 or any(jnp.ndim(array) == 0 for array in arrays)
    if may_be_whole and set(names).intersection(_untracked(tracked)):
        warnings.warn(
            f"axes={axes!r} assumes that every leaf is split over these mesh axes. In pmap, and in shard_map with "
            "check_vma=False, jax does not track whether that is so: a leaf that is whole on every device is counted "
            "once per device. Pass PartitionSpecs, P() for such a leaf: axes={'kernel': P('data'), 'bias': P()}",
            stacklevel=callers.steps_up(),
        )


def _untracked(tracked: "_Tracked | None" = None) -> tuple[str, ...]:
    """Returns the mesh axes that the types do not track.

    A named axis of `vmap` is not among them: there, users want one norm per entry.
    """
    names = jax.sharding.get_abstract_mesh().manual_axes
    tracked = tracked or _Tracked()
    return tuple(name for name in names if tracked(name) is False) if names else ()


def _refuse_unknown(name: str) -> None:
    """Raises ValueError inside `shard_map` for a name that is no mesh axis: each device would clip alone."""
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes and name not in here.axis_names:
        raise ValueError(f"axes={name!r} is no axis of the mesh, which has {here.axis_names}")


class _Tracked:
    """Which axis names are bound here, and whether the types track them. Each name is looked up once."""

    def __init__(self) -> None:
        self.known: dict[str, bool | None] = {}

    def __call__(self, name: str) -> bool | None:
        if name not in self.known:
            try:
                # If variation is tracked, the index of a device varies over its axis.
                self.known[name] = name in layouts.varying(jax.lax.axis_index(name))
            except NameError:
                _refuse_unknown(name)
                self.known[name] = None
        return self.known[name]

    def keep(self, names: tuple[str, ...], leaf: Any) -> tuple[str, ...]:
        """Returns those of `names` that are bound and may split `leaf`."""
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
    spec = PartitionSpec() if spec is None else spec  # for example for a parameter without gradient
    if not _is_spec(spec):
        raise ValueError(
            "axes must be 'auto', None, a name, a tuple of names, or a prefix pytree of PartitionSpec, "
            f"got {spec!r} for leaf {path!r}"
        )
    ndim = len(jax.numpy.shape(leaf))
    dims = layouts.dims_of(spec)
    if len(dims) > ndim:
        raise ValueError(f"axes={spec} has {len(dims)} dimensions, but leaf {path!r} has {ndim}")
    entries = [*dims, *([None] * (ndim - len(dims)))]
    named = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    by_dim = tuple(tracked.keep(tuple(n for n in names if isinstance(n, str)), leaf) for names in named)
    # In the same order for all leaves: the same axes in two orders would take two collectives.
    return Split(tuple(sorted(name for names in by_dim for name in names)), by_dim)
