"""What is measured: the Norms that `clip_by` takes.

========================  =====================================  =====================================
norm                      one group is                           norms are
========================  =====================================  =====================================
`global_norm`             all leaves together                    a scalar
`global_rms`              all leaves together                    a scalar
`group_norm`              the leaves with one label              a dict from label to scalar
`leaf_norm`, `leaf_rms`   a leaf, or a layer of a stacked one    a scalar per leaf
`leaf_peaks`              a leaf; only its peaks are scaled      a scalar per leaf
`spectral_norm`           a matrix: its largest singular value   a scalar per leaf
`unit_norm`               a unit (an output neuron, a filter)    an array per leaf, reduced axes kept as 1
`relative_change`         a leaf                                 a scalar per leaf
`known`                   all leaves; their norm is told         a scalar
========================  =====================================  =====================================

Leaves that hold no floats are in no group: they have None among the norms, and pass untouched.
"""

import functools
import keyword
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import groups, told, trees
from optaxclip._arrays.leaves import Leaf, Leaves
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, ratios, tree_norms
from optaxclip._numerics.matrices import capping, stacks
from optaxclip._numerics.scaling import Factor
from optaxclip.core import Norm, Norms

Axis: TypeAlias = int | tuple[int, ...] | None
DimsOf: TypeAlias = Callable[[tuple[int, ...], Leaf], tuple[int, ...]]  # (shape behind `stacked`, leaf) -> dimensions


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
    def measure(leaves: Leaves) -> Norms:
        return tree_norms.of_all(leaves, p)

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors] * len(leaves)

    return Norm(measure, assign, "norms.global_norm()" if p == 2 else f"norms.global_norm({p:g})")


def _norm_of_some(p: float, include: Any) -> Norm:
    def chosen(leaves: Leaves) -> list[bool]:
        wanted = leaves.lookup("include", include)
        leaves.require_any(wanted, include, "include chooses no leaf of")
        return wanted

    def measure(leaves: Leaves) -> Norms:
        return tree_norms.of_all([leaf for leaf, is_in in zip(leaves, chosen(leaves), strict=True) if is_in], p)

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors if is_in else None for is_in in chosen(leaves)]

    return Norm(measure, assign, "norms.global_norm(include=...)")


def known(name: str) -> Norm:
    """The norm of all leaves that `update` is told, so that nothing is measured.

    For a norm that is there already: in a pipeline that sums those of its stages, or a log that wants it before the
    clip. The argument's name is chosen here, so that two clips in a chain can't take one number for both.

    Args:
      name: of the keyword argument of `update` that has the norm: a real scalar, the same on all devices.

    Returns:
      A Norm; its norm is a scalar, float32 or float64.

    Raises:
      ValueError: if `name` can't be that of a further argument; at update, if the argument is missing, no real scalar,
        or differs between the devices of a `shard_map`; if parameters are to be measured.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.known("grad_norm"), thresholds.constant(1.0))
      >>> grads = jnp.array([3.0, 4.0])  # a half of all gradients; the other one is elsewhere
      >>> updates, _ = tx.update(grads, tx.init(grads), grad_norm=10.0)
      >>> print(updates)
      [0.3 0.4]

    Notes:
      - Guarantees: nothing checks that the number is the norm. One that is 0, negative or not finite clips nothing.
        With `record=`, the norms of the leaves are measured, to name the first that is not finite.
      - Devices: with `check_vma=False` nothing can tell whether all devices pass the same number.

    See also:
      `clip_tree` with `known_norm=`, the same without an optimizer; `global_norm`, which measures.
    """
    checks.text("name", name)
    if not name.isidentifier() or keyword.iskeyword(name) or name in {"updates", "state", "params"}:
        raise ValueError(f"name must be that of a keyword argument, such as 'grad_norm', got {name!r}")

    def measure(leaves: Leaves) -> Norms:
        if leaves.told is None:  # in init
            return jnp.zeros((), jnp.float32)
        if leaves.told.get(name) is None:
            raise ValueError(
                f"norms.known({name!r}) measures nothing and must be told: call "
                f"tx.update(updates, state, params, {name}=norm), or clip_tree(..., known_norm=norm) without norm=. It "
                "does not measure parameters either: a threshold relative to these needs another Norm"
            )
        return told.scalar(name, leaves.told[name], "norm")

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors] * len(leaves)

    return Norm(measure, assign, f"norms.known({name!r})")


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
      `contrib.aggc`; `leaf_norm`, where each leaf is a group.
    """
    checks.static_together(labels=labels, ord=ord)
    p = checks.order("ord", ord)
    none = "labels no leaf, so nothing would be clipped: give at least one leaf a string"
    checks.per_leaf("labels", labels, lambda value: isinstance(value, str), "strings or None", none)

    def label_of(leaves: Leaves) -> list[Any]:
        found = leaves.lookup("labels", labels)
        for leaf, label in zip(leaves, found, strict=True):
            if not (label is None or isinstance(label, str)):
                raise ValueError(f"labels must be strings or None, got {label!r} for {leaf.path!r}")
        leaves.require_any([label is not None for label in found], labels, "labels gives no label to any of")
        return found

    def measure(leaves: Leaves) -> Norms:
        # Labels that are known beforehand have a norm of 0 where a mask leaves no leaf, so that bounds and states fit.
        known = [] if trees.is_function(labels) else jax.tree.leaves(labels)
        members = groups.alike(label_of(leaves))
        present = [label for label in dict.fromkeys([*members, *known]) if label is not None]
        return {label: tree_norms.of_all([leaves[i] for i in members.get(label, [])], p) for label in present}

    def assign(leaves: Leaves, factors: Tree) -> list[Factor | None]:
        return [None if label is None else factors[label] for label in label_of(leaves)]

    return Norm(measure, assign, "norms.group_norm(...)")


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
    return _by_leaf("leaf_norm", _whole, checks.order("ord", ord), stacked)


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
      `contrib.adaptive_spike_clip`; `leaf_norm` with `ord=inf`, for a scale of the whole leaf.
    """
    whole = leaf_norm(math.inf)

    def assign(leaves: Leaves, factors: Tree) -> list[Factor | None]:
        return [_of_peaks(leaf.value, factor) for leaf, factor in zip(leaves, leaves.from_tree(factors), strict=True)]

    return Norm(whole.measure, assign, "norms.leaf_peaks()")


def _of_peaks(leaf: jax.Array, factor: Factor) -> Factor:
    """The factor of a leaf at the coordinates beyond what its norm is to become, 1 at the others."""
    is_scaled = factor.second != 1
    beyond = is_scaled & _is_beyond(jnp.asarray(leaf), factor.goal)
    return factor._replace(second=jnp.where(beyond, factor.second, jnp.ones_like(factor.second)))


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
    return _by_leaf("leaf_rms", _whole, 2, stacked, mean=True)


def global_rms() -> Norm:
    """The root mean square of all leaves together: their norm over the square root of the number of entries.

    A bound on it is right for models of every size.

    Returns:
      A Norm; its norms are one scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_rms(), thresholds.constant(1.0))
      >>> updates, _ = tx.update({"a": jnp.array([4.0, -4.0]), "b": jnp.zeros(6)}, tx.init(None))  # (32 / 8) ** 0.5
      >>> print(updates["a"])
      [ 2. -2.]

    Notes:
      - Entries that are 0 count, and so do those of a leaf whose gradient is None. What holds no floats does not.
      - Inside `shard_map` it counts the entries on all devices that have a piece of a leaf.

    See also:
      `global_norm`; `leaf_rms`, for each leaf alone.
    """

    def measure(leaves: Leaves) -> Norms:
        sizes = [leaf.size_over(tuple(range(jnp.ndim(leaf.value)))) for leaf in leaves if jnp.size(leaf.value)]
        return tree_norms.of_all(leaves, 2) / math.sqrt(max(sum(sizes), 1))

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors] * len(leaves)

    return Norm(measure, assign, "norms.global_rms()")


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

    def measure(leaves: Leaves) -> Norms:
        layers = stacks.layers(stacked, leaves)
        matrices = stacks.of_leaves(leaves, layers, units)
        norms: dict[int, jax.Array] = dict(stacks.together(capping.largest_singular_values, matrices))
        shaped = {i: norm.reshape(jnp.shape(leaves[i].value)[: layers[i]]) for i, norm in norms.items()}
        return leaves.to_tree(stacks.with_vectors(leaves, layers, shaped))

    return Norm(measure, by_leaf.assign, "norms.spectral_norm()")


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
    return _by_leaf("unit_norm", dims_of, 2, stacked, keepdims=True)


def relative_change(relative: Number, absolute: Number) -> Norm:
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
      `contrib.clippy`; `thresholds.relative_to_params`, for the norm of an update beside that of its parameters.
    """
    relative = checks.number("relative", relative)
    absolute = checks.number("absolute", absolute)

    def measure(leaves: Leaves) -> Norms:
        pairs = zip(leaves, leaves.params(), strict=True)
        worst = [ratios.worst_ratio(leaf.value, param.value, relative, absolute) for leaf, param in pairs]
        return leaves.to_tree(tree_norms.across(worst, [leaf.axes for leaf in leaves], math.inf))

    def assign(leaves: Leaves, factors: Tree) -> list[Factor | None]:
        return [_or_nothing(factor) for factor in leaves.from_tree(factors)]

    return Norm(measure, assign, "norms.relative_change(...)")


def _or_nothing(factor: Factor) -> Factor:
    """A factor, which is 0 where the norm is saturated and to be reduced: that says only that none is small enough."""
    is_lost = (factor.norm >= jnp.finfo(factor.norm.dtype).max) & (factor.goal < factor.norm)
    second, goal = (jnp.where(is_lost, jnp.zeros_like(x), x) for x in (factor.second, factor.goal))
    return factor._replace(second=second, goal=goal)


def _is_beyond(leaf: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(leaf):
        return arithmetic.modulus(leaf) > high
    # Not by the moduli, which XLA for CPUs (jax 0.10 and 0.12) would calculate once for here and for the maximum, and
    # write to memory between.
    wide = leaf.astype(high.dtype)
    return (wide > high) | (wide < -high)


def _by_leaf(
    name: str, dims_of: DimsOf, ord: float, stacked: Any, *, keepdims: bool = False, mean: bool = False
) -> Norm:
    """A Norm with groups of their own in each leaf, extending over the dimensions `dims_of(shape, leaf)`."""
    if stacked is not None:
        none = "stacks no leaf: give at least one leaf a number of axes, or pass None"
        checks.per_leaf("stacked", stacked, stacks.is_axis_count, "a number of axes, at least 0", none)

    def dims_in(leaves: Leaves) -> list[tuple[int, ...]]:
        def look() -> list[tuple[int, ...]]:
            layers = stacks.layers(stacked, leaves)
            return [_behind_stacked(dims_of, leaf, number) for leaf, number in zip(leaves, layers, strict=True)]

        return leaves.once(dims_in, look)

    def measure(leaves: Leaves) -> Norms:
        dims = dims_in(leaves)
        norms = tree_norms.of_each(leaves, ord, dims)
        if mean:
            norms = [x / math.sqrt(leaf.size_over(d)) for x, leaf, d in zip(norms, leaves, dims, strict=True)]
        return leaves.to_tree(list(map(jnp.expand_dims, norms, dims)) if keepdims else norms)

    def assign(leaves: Leaves, factors: Tree) -> list[Factor | None]:
        found = leaves.from_tree(factors)
        if keepdims or stacked is None:
            return found
        return [  # back to the rank of the leaf
            jax.tree.map(lambda each, dims=dims: jnp.expand_dims(each, dims), factor)
            for factor, dims in zip(found, dims_in(leaves), strict=True)
        ]

    return Norm(measure, assign, f"norms.{name}({'' if ord == 2 else f'{ord:g}'})")


def _behind_stacked(dims_of: DimsOf, leaf: Leaf, layers: int) -> tuple[int, ...]:
    dims = dims_of(leaf.whole_shape[layers:], leaf)
    return tuple(dim + layers for dim in dims) if layers else dims


def _whole(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    del leaf
    return tuple(range(len(shape)))


def _in_out(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    rank = len(shape)
    if sum(length != 1 for length in shape) <= 1:
        return tuple(range(rank))
    if rank > 5:
        raise ValueError(f'units="io" does not say what a unit of leaf {leaf.path!r} of shape {shape} is; pass axis=')
    return (0,) if rank <= 3 else tuple(range(rank - 1))


def _out_in(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    del leaf
    return tuple(range(len(shape)))[0 if len(shape) <= 1 else 1 :]


def _given(shape: tuple[int, ...], leaf: Leaf, *, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    rank = len(shape)
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if any(not -rank <= each < rank for each in axes):
        raise ValueError(f"axis={axis!r} is out of range for leaf {leaf.path!r} of shape {shape}")
    return tuple(sorted({each % rank for each in axes}))


_UNITS: dict[str, DimsOf] = {"io": _in_out, "oi": _out_in, "leaf": _whole}
