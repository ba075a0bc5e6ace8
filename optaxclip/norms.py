"""What is measured: the Norms that `clip_by` takes.

========================  =====================================  =====================================
norm                      one group is                           norms are
========================  =====================================  =====================================
`global_norm`             all leaves together                    a scalar
`group_norm`              the leaves with one label              a dict from label to scalar
`leaf_norm`, `leaf_rms`   a leaf, or a layer of a stacked one    a scalar per leaf
`leaf_peaks`              a leaf; only its peaks are scaled      a scalar per leaf
`spectral_norm`           a matrix: its largest singular value   a scalar per leaf
`unit_norm`               a unit (an output neuron, a filter)    an array per leaf, reduced axes kept as 1
`relative_change`         a leaf                                 a scalar per leaf
========================  =====================================  =====================================

Leaves that hold no floats are in no group: they have None among the norms, and pass untouched.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, groups, mesh, trees
from optaxclip._arrays.parameters import require_params
from optaxclip._numerics import arithmetic, ratios, scaling, tree_norms
from optaxclip._numerics.matrices import capping, stacks
from optaxclip.core import Norm, Norms, Updates

Axis: TypeAlias = int | tuple[int, ...] | None
DimsOf: TypeAlias = Callable[[tuple[int, ...], str], tuple[int, ...]]  # (shape, path) -> dimensions


def global_norm(ord: float = 2, *, include: Any = None) -> Norm:
    """One norm of all leaves together.

    Args:
      ord: p of the p-norm, at least 1, or inf.
      include: a prefix pytree of booleans, or a callable from a leaf's path ("decoder/kernel") to one. Leaves not
        included are neither counted nor scaled (a frozen leaf must not shrink the trained ones). None includes all. A
        choice of no leaf is an error.

    Returns:
      A Norm; its norms are one scalar.

    Raises:
      ValueError: if `ord` is below 1 or NaN, or `include` none of these, or no leaf is chosen; for a callable, at
        init and update.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_norm(include={"a": True, "frozen": False}), thresholds.constant(1.0))
      >>> grads = {"a": jnp.array([3.0, 4.0]), "frozen": jnp.array([100.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["a"], updates["frozen"])
      [0.6 0.8] [100.]

    See also:
      `clip_by_global_norm`; `optaxclip.global_norm`, the number itself; `group_norm`, `leaf_norm`.
    """
    checks.static_together(ord=ord, include=include)
    p = checks.order("ord", ord)
    if include is not None:
        none = "chooses no leaf, so nothing would be clipped: pass True for at least one leaf"
        checks.per_leaf("include", include, lambda value: isinstance(value, bool | np.bool_), "True or False", none)
        if not (trees.is_function(include) or any(jax.tree.leaves(include))):
            raise ValueError(f"include={include!r} {none}")
    return _norm_of_all(p) if include is None else _norm_of_some(p, include)


@functools.cache  # so that norms of everything are equal where their orders are
def _norm_of_all(p: float) -> Norm:
    return _norm_of_some(p, None)


def _norm_of_some(p: float, include: Any) -> Norm:
    def chosen(tree: Updates) -> list[bool]:
        flat = jax.tree.leaves(tree)
        wanted = [True] * len(flat) if include is None else trees.values("include", include, tree)
        counted = [dtypes.is_inexact(leaf) and bool(want) for leaf, want in zip(flat, wanted, strict=True)]
        # A misspelt path would turn clipping off, unnoticed.
        if trees.is_function(include) and flat and not any(wanted):
            raise ValueError(f"include chooses no leaf of {trees.listed(trees.paths(tree))}")
        return counted

    def measure(updates: Updates, params: Any, split: list[mesh.Split]) -> Norms:
        del params
        counted = [each for each, is_in in zip(_with_split(updates, split), chosen(updates), strict=True) if is_in]
        return tree_norms.total_norm([leaf for leaf, _ in counted], [at.axes for _, at in counted], p)

    def scale(updates: Updates, norms: Norms, permitted: Norms) -> Updates:
        factor = scaling.factors(norms, permitted)
        return _rescale_each(updates, [factor if is_in else None for is_in in chosen(updates)])

    return Norm(measure, scale)


def group_norm(labels: Any, ord: float = 2) -> Norm:
    """One norm per label, of all leaves with that label.

    Args:
      labels: a prefix pytree of strings, or a callable from a leaf's path ("decoder/kernel") to one. A leaf labelled
        None is in no group: neither counted nor scaled.
      ord: p of the p-norm, at least 1, or inf.

    Returns:
      A Norm; its norms are a dict from label to scalar. A prefix pytree of bounds is a dict of that kind. A label that
      no leaf has, under `optax.masked` say, has a norm of 0 if `labels` is a pytree, and none if it is a callable.

    Raises:
      ValueError: if `labels` or `ord` is neither of these, or no leaf has a label; for a callable, at init and update.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> groups = norms.group_norm(lambda path: path.split("/")[0])
      >>> tx = clip_by(groups, thresholds.constant({"body": 1.0, "head": 5.0}))
      >>> grads = {"body": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([6.0, 8.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["body"]["w"], updates["body"]["b"], updates["head"])
      [0.6] [0.8] [3. 4.]

    See also:
      `aggc`; `leaf_norm`, where each leaf is a group.
    """
    checks.static_together(labels=labels, ord=ord)
    p = checks.order("ord", ord)
    none = "labels no leaf, so nothing would be clipped: give at least one leaf a string"
    checks.per_leaf("labels", labels, lambda value: isinstance(value, str), "strings or None", none)

    def label_of(tree: Updates) -> list[Any]:
        found = trees.values("labels", labels, tree)
        for path, label in zip(trees.paths(tree), found, strict=bool(found)):
            if not (label is None or isinstance(label, str)):
                raise ValueError(f"labels must be strings or None, got {label!r} for {path!r}")
        # Where no leaf has a label nothing is clipped, unnoticed.
        if trees.is_function(labels) and found and all(label is None for label in found):
            raise ValueError(f"labels gives no label to any of {trees.listed(trees.paths(tree))}")
        return [
            label if dtypes.is_inexact(leaf) else None for leaf, label in zip(jax.tree.leaves(tree), found, strict=True)
        ]

    def measure(updates: Updates, params: Any, split: list[mesh.Split]) -> Norms:
        del params
        members: dict[Any, list[tuple[Any, mesh.Split]]] = {}
        for each, label in zip(_with_split(updates, split), label_of(updates), strict=True):
            if label is not None:
                members.setdefault(label, []).append(each)
        # Labels that are known beforehand have a norm of 0 where a mask leaves no leaf, so that bounds and states fit.
        known = [] if trees.is_function(labels) else jax.tree.leaves(labels)
        members.update({label: [] for label in known if label not in members})
        return {
            label: tree_norms.total_norm([leaf for leaf, _ in group], [at.axes for _, at in group], p)
            for label, group in members.items()
        }

    def scale(updates: Updates, norms: Norms, permitted: Norms) -> Updates:
        factor = scaling.factors(norms, permitted)
        return _rescale_each(updates, [None if label is None else factor[label] for label in label_of(updates)])

    return Norm(measure, scale)


def leaf_norm(ord: float = 2, *, stacked: Any = None) -> Norm:
    """One norm per leaf.

    Args:
      ord: p of the p-norm, at least 1, or inf.
      stacked: how many leading axes of a leaf index independent layers (from `nn.scan` or `vmap`), each a group of its
        own: a number, a prefix pytree of numbers, or a callable from a leaf's path to one. None is 0.

    Returns:
      A Norm; its norms are a scalar per leaf, or an array of shape `leaf.shape[:stacked]`.

    Raises:
      ValueError: if `ord` is below 1 or NaN, or `stacked` negative; at init and update, if it exceeds a leaf's rank.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(stacked=1), thresholds.constant(1.0))  # two layers
      >>> updates, _ = tx.update(jnp.array([[3.0, 4.0], [0.3, 0.4]]), tx.init(None))
      >>> print(updates)
      [[0.6 0.8]
       [0.3 0.4]]

    See also:
      `clip_by_leaf_norm`; `leaf_rms`, which does not grow with the leaf; `unit_norm`, of parts of a leaf.
    """
    checks.static_together(ord=ord, stacked=stacked)
    return _by_leaf(_whole, checks.order("ord", ord), stacked)


def leaf_peaks() -> Norm:
    """The largest modulus of each leaf. Only the coordinates beyond what is permitted are scaled, and all alike.

    Returns:
      A Norm; its norms are a scalar per leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_peaks(), thresholds.constant(5.0))
      >>> updates, _ = tx.update(jnp.array([10.0, -8.0, 3.0]), tx.init(None))
      >>> print(updates)
      [ 5. -4.  3.]

    See also:
      `adaptive_spike_clip`; `leaf_norm` with `ord=inf`, for a scale of the whole leaf.
    """
    whole = leaf_norm(math.inf)

    def scale(updates: Updates, norms: Norms, permitted: Norms) -> Updates:
        flat, treedef = jax.tree.flatten(updates)
        columns = (treedef.flatten_up_to(tree) for tree in (whole.scale(updates, norms, permitted), permitted))
        return treedef.unflatten(
            [
                leaf if high is None else jnp.where(_is_beyond(jnp.asarray(leaf), high), scaled, leaf)
                for leaf, scaled, high in zip(flat, *columns, strict=True)
            ]
        )

    return Norm(whole.measure, scale)


def leaf_rms(*, stacked: Any = None) -> Norm:
    """The root mean square of each leaf: its norm over the square root of its size.

    Args:
      stacked: see `leaf_norm`.

    Returns:
      A Norm; its norms are a scalar per leaf, or an array of shape `leaf.shape[:stacked]`.

    Raises:
      ValueError: as `leaf_norm`, for `stacked`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_rms(), thresholds.constant(1.0))
      >>> updates, _ = tx.update(jnp.array([2.0, -2.0, 2.0, 2.0]), tx.init(None))
      >>> print(updates)
      [ 1. -1.  1.  1.]

    See also:
      `clip_by_block_rms`; `leaf_norm`.
    """
    checks.static_together(stacked=stacked)
    return _by_leaf(_whole, 2, stacked, mean=True)


def spectral_norm(*, units: str = "io", stacked: Any = None) -> Norm:
    """The largest singular value of each leaf, its 2-norm where the leaf is a vector or a number.

    On CPUs it comes from eigenvalues of the Gram matrix of the smaller side and is right to rounding; elsewhere from
    powers of that matrix, which are products alone, and may be 1e-5 too large. In `shard_map` a matrix must be whole on
    every device; under `jit` jax gathers it.

    Args:
      units: which matrix a leaf of rank over 2 is. `"io"`: its last axis against all others (kernels [in, out] or
        HWIO, as in Flax); `"oi"`: its first axis against all others (kernels [out, in, ...], as in PyTorch and
        Equinox).
      stacked: how many leading axes of a leaf index independent matrices; see `leaf_norm`.

    Returns:
      A Norm; its norms are a scalar per leaf, or an array of shape `leaf.shape[:stacked]`.

    Raises:
      ValueError: if `units` is unknown, or `stacked` negative; at init and update, if it exceeds a leaf's rank, or in
        `shard_map` for a matrix that is split over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.spectral_norm(), thresholds.constant(1.0))
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), tx.init(None))
      >>> print(updates)
      [[0.75 0.  ]
       [0.   1.  ]]

    See also:
      `clip_by_spectral_norm`; `clip_singular_values`, for all of them.
    """
    checks.static_together(stacked=stacked)
    checks.one_of("units", units, stacks.UNITS)
    by_leaf = leaf_norm(stacked=stacked)

    def measure(updates: Updates, params: Any, split: list[mesh.Split]) -> Norms:
        flat, treedef = jax.tree.flatten(updates)
        layers = stacks.layers(stacked, updates)
        norms = stacks.together(capping.largest_singular_values, stacks.of_leaves(flat, layers, split, units))
        measured = treedef.flatten_up_to(by_leaf.measure(treedef.unflatten(stacks.others(flat, norms)), params, split))
        for i, norm in norms.items():
            measured[i] = norm.reshape(jnp.shape(flat[i])[: layers[i]])
        return treedef.unflatten(measured)

    return Norm(measure, by_leaf.scale)


def unit_norm(units: str = "io", *, axis: Axis = None, stacked: Any = None) -> Norm:
    """One norm per unit of each leaf. What a unit is depends on the layout of the kernels.

    Args:
      units: `"io"` for kernels of shape [in, out] or HWIO (Flax, Haiku; optax and DeepMind's nfnets): leaves of
        squeezed rank 0 or 1 are one unit; rank 2 and 3 reduce axis 0, rank 4 axes 0 to 2, rank 5 axes 0 to 3. `"oi"`
        for [out, in, ...] (PyTorch, Equinox; timm): leaves of rank 0 or 1 are one unit, others reduce all axes but 0.
        `"leaf"`: each leaf is one unit.
      axis: the axis or axes to reduce in every leaf, instead of `units`; not counting `stacked` axes from the front.
      stacked: how many leading axes of a leaf index independent layers, never reduced over; see `leaf_norm`.

    Returns:
      A Norm; its norms are an array per leaf, of the leaf's rank, with the reduced axes of length 1.

    Raises:
      ValueError: if `units` is unknown, `axis` no axis or `stacked` negative; at init and update, if a leaf has too low
        a rank for them, or too high a one for `"io"`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.unit_norm("io"), thresholds.constant(1.0))  # each column of a kernel [in, out]
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.3], [4.0, 0.4]]), tx.init(None))
      >>> print(updates)
      [[0.6 0.3]
       [0.8 0.4]]

    See also:
      `adaptive_grad_clip`; `leaf_norm`, for leaves as a whole.
    """
    checks.static_together(axis=axis, stacked=stacked)
    checks.one_of("units", units, tuple(_UNITS))
    if axis is not None:
        checks.axis("axis", axis)
    dims_of = _UNITS[units] if axis is None else functools.partial(_given, axis=axis)
    return _by_leaf(dims_of, 2, stacked, keepdims=True)


def relative_change(relative: Any, absolute: Any) -> Norm:
    r"""How large the update of each leaf is beside its parameters, by its worst coordinate.

    .. math:: n = \max_i \frac{|u_i|}{relative \cdot |w_i| + absolute}

    Coordinates with u = 0 do not count. Where the limit of a non-zero update is 0, or the ratio passes the largest
    float, the norm is the largest float, and the leaf can only be scaled to 0. Needs parameters.

    Args:
      relative: share of the parameter's modulus that an update may have, at least 0: a number or a scalar array.
      absolute: added to it, in units of the parameters, likewise.

    Returns:
      A Norm; its norms are a scalar per leaf, 1 where the worst coordinate is at its limit.

    Raises:
      ValueError: if an argument is negative or NaN; at update, without `params`, or if they differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.relative_change(0.5, 0.0), thresholds.constant(1.0))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(jnp.array([0.25, -2.0]), tx.init(params), params)
      >>> print(updates)  # -2 is twice the half of 2: both are halved
      [ 0.125 -1.   ]

    See also:
      `clippy`; `thresholds.relative_to_params`, for the norm of an update beside that of its parameters.
    """
    relative = checks.number("relative", relative)
    absolute = checks.number("absolute", absolute)

    def measure(updates: Updates, params: Any, split: list[mesh.Split]) -> Norms:
        require_params(updates, params)
        flat, treedef = jax.tree.flatten(updates)
        weights = treedef.flatten_up_to(params)
        counted = [i for i, update in enumerate(flat) if dtypes.is_inexact(update)]
        worst = [ratios.worst_ratio(flat[i], weights[i], relative, absolute) for i in counted]
        across = tree_norms.across(worst, [split[i].axes for i in counted], math.inf)
        norms = dict(zip(counted, across, strict=True))
        return treedef.unflatten([norms.get(i) for i in range(len(flat))])

    def scale(updates: Updates, norms: Norms, permitted: Norms) -> Updates:
        # A saturated norm says only that no factor is small enough.
        reachable = groups.over_groups(
            lambda norm, goal: jnp.where(
                (norm >= jnp.finfo(norm.dtype).max) & (goal < norm), jnp.zeros_like(goal), goal
            ),
            norms,
            permitted,
        )
        # What is far below its limit may be scaled up beyond the largest float where parameters are large.
        factors = jax.tree.structure(updates).flatten_up_to(scaling.factors(norms, reachable))
        return _rescale_each(updates, factors, saturate=True)

    return Norm(measure, scale)


def _is_beyond(leaf: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(leaf):
        return arithmetic.modulus(leaf) > high
    # Not by the moduli, which XLA for CPUs (jax 0.10) would calculate once for here and for the maximum, and write to
    # memory between.
    wide = leaf.astype(high.dtype)
    return (wide > high) | (wide < -high)


def _by_leaf(dims_of: DimsOf, ord: float, stacked: Any, *, keepdims: bool = False, mean: bool = False) -> Norm:
    """A Norm with groups of their own in each leaf, extending over the dimensions `dims_of(shape, path)`."""
    if stacked is not None:
        none = "stacks no leaf: give at least one leaf a number of axes, or pass None"
        checks.per_leaf("stacked", stacked, stacks.is_axis_count, "a number of axes, at least 0", none)

    def dims_in(tree: Updates, shape_of: Callable[[Any, int], tuple[int, ...]]) -> list[tuple[int, ...] | None]:
        flat = zip(jax.tree.leaves(tree), trees.paths(tree), stacks.layers(stacked, tree), strict=True)
        return [
            _behind_stacked(dims_of, shape_of(leaf, i), path, layers) if dtypes.is_inexact(leaf) else None
            for i, (leaf, path, layers) in enumerate(flat)
        ]

    def measure(updates: Updates, params: Any, split: list[mesh.Split]) -> Norms:
        del params
        flat, treedef = jax.tree.flatten(updates)
        dims_of_leaf = dims_in(updates, lambda leaf, i: split[i].whole_shape(jnp.shape(leaf)))
        counted = [
            (i, dims, split[i].over(dims, jnp.ndim(flat[i]))) for i, dims in enumerate(dims_of_leaf) if dims is not None
        ]
        measured = tree_norms.separate_norms(
            [flat[i] for i, _, _ in counted], [dims for _, dims, _ in counted], [axes for _, _, axes in counted], ord
        )
        norms: list[Any] = [None] * len(flat)
        for norm, (i, dims, axes) in zip(measured, counted, strict=True):
            norms[i] = norm / math.sqrt(_size(flat[i], dims, axes)) if mean else norm
            norms[i] = jnp.expand_dims(norms[i], dims) if keepdims else norms[i]
        return treedef.unflatten(norms)

    def scale(updates: Updates, norms: Norms, permitted: Norms) -> Updates:
        factors = jax.tree.structure(updates).flatten_up_to(scaling.factors(norms, permitted))
        if not keepdims:  # stacked layers: back to the rank of the leaf
            factors = [
                None if dims is None else jax.tree.map(lambda each, dims=dims: jnp.expand_dims(each, dims), factor)
                for factor, dims in zip(factors, dims_in(updates, lambda leaf, _: jnp.shape(leaf)), strict=True)
            ]
        return _rescale_each(updates, factors, saturate=mean)

    return Norm(measure, scale)


def _behind_stacked(dims_of: DimsOf, shape: tuple[int, ...], path: str, layers: int) -> tuple[int, ...]:
    return tuple(dim + layers for dim in dims_of(shape[layers:], path))


def _whole(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    del path
    return tuple(range(len(shape)))


def _in_out(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    rank = len(shape)
    if sum(length != 1 for length in shape) <= 1:
        return tuple(range(rank))
    if rank > 5:
        raise ValueError(f'units="io" does not say what a unit of leaf {path!r} of shape {shape} is; pass axis=')
    return (0,) if rank <= 3 else tuple(range(rank - 1))


def _out_in(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    del path
    return tuple(range(len(shape)))[0 if len(shape) <= 1 else 1 :]


def _given(shape: tuple[int, ...], path: str, *, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    rank = len(shape)
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if any(not -rank <= each < rank for each in axes):
        raise ValueError(f"axis={axis!r} is out of range for leaf {path!r} of shape {shape}")
    return tuple(sorted({each % rank for each in axes}))


_UNITS: dict[str, DimsOf] = {"io": _in_out, "oi": _out_in, "leaf": _whole}


def _size(leaf: Any, dims: tuple[int, ...], axes: tuple[str, ...]) -> int:
    """How many coordinates a group has on all devices; 1 for none, so that one can divide by it."""
    return max(mesh.whole_size((jnp.shape(leaf)[dim] for dim in dims), axes), 1)


def _with_split(updates: Updates, split: list[mesh.Split]) -> list[tuple[Any, mesh.Split]]:
    return list(zip(jax.tree.leaves(updates), split, strict=True))


def _rescale_each(updates: Updates, factors: Sequence[scaling.Factor | None], *, saturate: bool = False) -> Updates:
    """Each leaf by its factor; as it is where that is None."""
    flat, treedef = jax.tree.flatten(updates)
    return treedef.unflatten(
        [
            leaf if factor is None else scaling.rescale(leaf, factor, saturate=saturate)
            for leaf, factor in zip(flat, factors, strict=True)
        ]
    )
