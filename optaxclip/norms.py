"""What to measure: the Norms that `clip_by` takes.

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
`known`                   all leaves; you pass their norm        a scalar
========================  =====================================  =====================================

Leaves without floats belong to no group. Their norm is None, and they are returned unchanged.
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
# One value per leaf: a prefix pytree, or a function of a leaf's path.
Included: TypeAlias = Tree | Callable[[str], bool] | None
Labels: TypeAlias = Tree | Callable[[str], str | None]
Stacked: TypeAlias = Tree | Callable[[str], int] | None
DimsOf: TypeAlias = Callable[[tuple[int, ...], Leaf], tuple[int, ...]]  # (shape without `stacked`, leaf) -> dimensions


def global_norm(ord: float = 2, *, include: Included = None) -> Norm:
    """One norm of all leaves together.

    Args:
      ord: p of the p-norm, at least 1, or inf.
      include: a prefix pytree of booleans, or a function from a leaf's path ("decoder/kernel") to a boolean. Other
        leaves are neither counted nor scaled, so a frozen leaf does not shrink the trained ones. None includes all
        leaves. Including no leaf is an error.

    Returns:
      A Norm: one scalar.

    Raises:
      ValueError: if `ord` is below 1 or NaN, `include` is of the wrong kind, or it includes no leaf. If `include` is a
        function, the error comes at init and update.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_norm(include={"a": True, "frozen": False}), thresholds.constant(1.0))
      >>> grads = {"a": jnp.array([3.0, 4.0]), "frozen": jnp.array([100.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["a"], updates["frozen"])
      [0.6 0.8] [100.]

    See also:
      `clip_by_global_norm`; `optaxclip.global_norm`, which returns the number; `group_norm`, `leaf_norm`.
    """
    checks.static_together(ord=ord, include=include)
    p = checks.order("ord", ord)
    if include is not None:
        none = "chooses no leaf, so nothing would be clipped: pass True for at least one leaf"
        checks.per_leaf("include", include, lambda value: isinstance(value, bool | np.bool_), "True or False", none)
        if not (trees.is_function(include) or any(jax.tree.leaves(include))):
            raise ValueError(f"include={include!r} {none}")
    return _norm_of_all(p) if include is None else _norm_of_some(p, include)


@functools.cache  # so that norms of all leaves compare equal if their orders do
def _norm_of_all(p: float) -> Norm:
    def measure(leaves: Leaves) -> Norms:
        return tree_norms.of_all(leaves, p)

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors] * len(leaves)

    return Norm(measure, assign, "norms.global_norm()" if p == 2 else f"norms.global_norm({p:g})")


def _norm_of_some(p: float, include: Included) -> Norm:
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
    """Takes the norm of all leaves from an argument of `update`, and measures nothing.

    Use it if you already have the norm: in a pipeline that sums the norms of its stages, or if the log needs the norm
    before the clip. You choose the name of the argument, so two clips in a chain can't take the same number by mistake.

    Args:
      name: the keyword argument of `update` that holds the norm: a real scalar, the same on all devices.

    Returns:
      A Norm: one scalar, float32 or float64.

    Raises:
      ValueError: if `update` can't take a further argument of this name. At update: if the argument is missing, is not
        a real scalar, or differs between the devices of a `shard_map`; if the threshold needs the norm of the
        parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.known("grad_norm"), thresholds.constant(1.0))
      >>> grads = jnp.array([3.0, 4.0])  # half of all gradients; another stage has the rest
      >>> updates, _ = tx.update(grads, tx.init(grads), grad_norm=10.0)
      >>> print(updates)
      [0.3 0.4]

    Notes:
      - Guarantees: nothing checks that the number is the norm. A number that is 0, negative or non-finite clips
        nothing. `record=` still measures the norms of the leaves, to name the first non-finite one.
      - Devices: with `check_vma=False`, nothing checks that all devices pass the same number.

    See also:
      `clip_tree` with `known_norm=`, the same without an optimizer; `global_norm`, which measures the norm.
    """
    checks.text("name", name)
    if not name.isidentifier() or keyword.iskeyword(name) or name in {"updates", "state", "params"}:
        raise ValueError(f"name must be usable as a keyword argument of update, such as 'grad_norm', got {name!r}")

    def measure(leaves: Leaves) -> Norms:
        if leaves.told is None:  # in init, which only needs the shape
            return jnp.zeros((), jnp.float32)
        if leaves.told.get(name) is None:
            raise ValueError(
                f"norms.known({name!r}) needs the norm: call tx.update(updates, state, params, {name}=norm), or "
                "clip_tree(..., known_norm=norm) without norm=. It can't measure parameters: use another Norm with a "
                "threshold relative to them"
            )
        return told.scalar(name, leaves.told[name], "norm")

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors] * len(leaves)

    return Norm(measure, assign, f"norms.known({name!r})")


def group_norm(labels: Labels, ord: float = 2) -> Norm:
    """One norm per label, over all leaves with that label.

    Args:
      labels: a prefix pytree of strings, or a function from a leaf's path ("decoder/kernel") to a string. A leaf with
        the label None is neither counted nor scaled.
      ord: p of the p-norm, at least 1, or inf.

    Returns:
      A Norm: a dict from label to scalar. A prefix pytree of bounds is then a dict from label to bound. If `labels` is
      a pytree, a label without a leaf (for example under `optax.masked`) has a norm of 0. If it is a function, such a
      label has no norm.

    Raises:
      ValueError: if `labels` is of the wrong kind, `ord` is below 1 or NaN, or no leaf has a label. If `labels` is a
        function, the error comes at init and update.

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
        # The labels of a pytree are known. If a mask hides all leaves of one, it has a norm of 0, so that bounds and
        # states keep their structure.
        known = [] if trees.is_function(labels) else jax.tree.leaves(labels)
        members = groups.alike(label_of(leaves))
        present = [label for label in dict.fromkeys([*members, *known]) if label is not None]
        return {label: tree_norms.of_all([leaves[i] for i in members.get(label, [])], p) for label in present}

    def assign(leaves: Leaves, factors: Tree) -> list[Factor | None]:
        return [None if label is None else factors[label] for label in label_of(leaves)]

    return Norm(measure, assign, "norms.group_norm(...)")


def leaf_norm(ord: float = 2, *, stacked: Stacked = None) -> Norm:
    """One norm per leaf.

    Args:
      ord: p of the p-norm, at least 1, or inf.
      stacked: how many of a leaf's leading axes run over independent layers (from `nn.scan` or `vmap`). Each layer is
        its own group. A number, a prefix pytree of numbers, or a function from a leaf's path to a number. None is 0.

    Returns:
      A Norm: a scalar per leaf, or an array of shape `leaf.shape[:stacked]`.

    Raises:
      ValueError: if `ord` is below 1 or NaN, or `stacked` is negative; at init and update, if `stacked` exceeds a
        leaf's rank.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(stacked=1), thresholds.constant(1.0))  # two layers
      >>> updates, _ = tx.update(jnp.array([[3.0, 4.0], [0.3, 0.4]]), tx.init(None))
      >>> print(updates)
      [[0.6 0.8]
       [0.3 0.4]]

    See also:
      `clip_by_leaf_norm`; `leaf_rms`, which does not grow with the size of the leaf; `unit_norm`, for parts of a leaf.
    """
    checks.static_together(ord=ord, stacked=stacked)
    return _by_leaf("leaf_norm", _whole, checks.order("ord", ord), stacked)


def leaf_peaks() -> Norm:
    """The largest modulus of each leaf; a clip scales only the coordinates beyond the bound, all by one factor.

    Returns:
      A Norm: a scalar per leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_peaks(), thresholds.constant(5.0))
      >>> updates, _ = tx.update(jnp.array([10.0, -8.0, 3.0]), tx.init(None))
      >>> print(updates)
      [ 5. -4.  3.]

    See also:
      `contrib.adaptive_spike_clip`; `leaf_norm` with `ord=inf`, which scales the whole leaf.
    """
    whole = leaf_norm(math.inf)

    def assign(leaves: Leaves, factors: Tree) -> list[Factor | None]:
        return [_of_peaks(leaf.value, factor) for leaf, factor in zip(leaves, leaves.from_tree(factors), strict=True)]

    return Norm(whole.measure, assign, "norms.leaf_peaks()")


def _of_peaks(leaf: jax.Array, factor: Factor) -> Factor:
    """The factor of a leaf for its coordinates beyond the new norm, and 1 for all others."""
    is_scaled = factor.second != 1
    beyond = is_scaled & _is_beyond(jnp.asarray(leaf), factor.goal)
    return factor._replace(second=jnp.where(beyond, factor.second, jnp.ones_like(factor.second)))


def leaf_rms(*, stacked: Stacked = None) -> Norm:
    """The root mean square of each leaf: its norm divided by the square root of its size.

    Args:
      stacked: see `leaf_norm`.

    Returns:
      A Norm: a scalar per leaf, or an array of shape `leaf.shape[:stacked]`.

    Raises:
      ValueError: if `stacked` is negative; at init and update, if `stacked` exceeds a leaf's rank.

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
    """The root mean square of all leaves together: their norm divided by the root of the number of entries.

    It does not grow with the model, so the same bound fits models of every size.

    Returns:
      A Norm: one scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_rms(), thresholds.constant(1.0))
      >>> updates, _ = tx.update({"a": jnp.array([4.0, -4.0]), "b": jnp.zeros(6)}, tx.init(None))  # (32 / 8) ** 0.5
      >>> print(updates["a"])
      [ 2. -2.]

    Notes:
      - Zero entries count, including those of a leaf whose gradient is None. Leaves without floats do not count.
      - Inside `shard_map`, it counts the entries on all devices that hold a piece of a leaf.

    See also:
      `global_norm`; `leaf_rms`, for each leaf alone.
    """

    def measure(leaves: Leaves) -> Norms:
        sizes = [leaf.size_over(tuple(range(jnp.ndim(leaf.value)))) for leaf in leaves if jnp.size(leaf.value)]
        return tree_norms.of_all(leaves, 2) / math.sqrt(max(sum(sizes), 1))

    def assign(leaves: Leaves, factors: Factor) -> list[Factor | None]:
        return [factors] * len(leaves)

    return Norm(measure, assign, "norms.global_rms()")


def spectral_norm(*, units: str = "io", stacked: Stacked = None) -> Norm:
    """The largest singular value of each matrix; for vectors and scalars, the 2-norm.

    On CPUs it is computed from the eigenvalues of the smaller Gram matrix, and is exact up to rounding. On accelerators
    it is computed from powers of that matrix, because these need only matrix products. There, it may be 1e-5 too large.
    Inside `shard_map`, every device must hold whole matrices. Under `jit`, jax gathers a matrix that is split.

    Args:
      units: how a leaf of rank over 2 becomes a matrix. `"io"`: the last axis against all others (kernels [in, out] or
        HWIO, as in Flax). `"oi"`: the first axis against all others (kernels [out, in, ...], as in PyTorch and
        Equinox).
      stacked: how many of a leaf's leading axes run over independent matrices; see `leaf_norm`.

    Returns:
      A Norm: a scalar per leaf, or an array of shape `leaf.shape[:stacked]`.

    Raises:
      ValueError: if `units` is unknown, or `stacked` is negative; at init and update, if `stacked` exceeds a leaf's
        rank, or if `shard_map` splits a matrix over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.spectral_norm(), thresholds.constant(1.0))
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), tx.init(None))
      >>> print(updates)
      [[0.75 0.  ]
       [0.   1.  ]]

    See also:
      `clip_by_spectral_norm`; `clip_singular_values`, which caps each singular value.
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


def unit_norm(units: str = "io", *, axis: Axis = None, stacked: Stacked = None) -> Norm:
    """One norm per unit (an output neuron, a filter) of each leaf.

    Args:
      units: `"io"` for kernels of shape [in, out] or HWIO (Flax, Haiku; optax and DeepMind's nfnets): a leaf of
        squeezed rank 0 or 1 is one unit; for rank 2 and 3, axis 0 is reduced; for rank 4, axes 0 to 2; for rank 5, axes
        0 to 3. `"oi"` for [out, in, ...] (PyTorch, Equinox; timm): a leaf of rank 0 or 1 is one unit; for other ranks,
        all axes except axis 0 are reduced. `"leaf"`: each leaf is one unit.
      axis: the axis or axes to reduce in every leaf, instead of `units`. Axis 0 is the first after the `stacked` axes.
      stacked: how many of a leaf's leading axes run over independent layers. They are never reduced; see `leaf_norm`.

    Returns:
      A Norm: an array per leaf, with the rank of the leaf. The reduced axes have length 1.

    Raises:
      ValueError: if `units` is unknown, `axis` is not an axis, or `stacked` is negative; at init and update, if the
        rank of a leaf is too low for these, or above 5 with `"io"`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.unit_norm("io"), thresholds.constant(1.0))  # each column of a kernel [in, out]
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.3], [4.0, 0.4]]), tx.init(None))
      >>> print(updates)
      [[0.6 0.3]
       [0.8 0.4]]

    See also:
      `adaptive_grad_clip`; `leaf_norm`, for whole leaves.
    """
    checks.static_together(axis=axis, stacked=stacked)
    checks.one_of("units", units, tuple(_UNITS))
    if axis is not None:
        checks.axis("axis", axis)
    dims_of = _UNITS[units] if axis is None else functools.partial(_given, axis=axis)
    return _by_leaf("unit_norm", dims_of, 2, stacked, keepdims=True)


def relative_change(relative: Number, absolute: Number) -> Norm:
    r"""The largest change of a coordinate in each leaf, relative to its parameter.

    .. math:: n = \max_i \frac{|u_i|}{relative \cdot |w_i| + absolute}

    Coordinates with u = 0 do not count. The norm is the largest float if the denominator of a non-zero update is 0, or
    if the ratio exceeds the largest float. A clip then scales the leaf to 0. Needs parameters.

    Args:
      relative: the permitted change as a share of the parameter's modulus, at least 0: a number or a scalar array.
      absolute: added to the permitted change, at least 0, in the units of the parameters: a number or a scalar array.

    Returns:
      A Norm: a scalar per leaf. It is 1 if the worst coordinate changes by exactly what is permitted.

    Raises:
      ValueError: if an argument is negative or NaN; at update, without `params`, or if they differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.relative_change(0.5, 0.0), thresholds.constant(1.0))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(jnp.array([0.25, -2.0]), tx.init(params), params)
      >>> print(updates)  # -2 is twice the permitted half of 2: both are halved
      [ 0.125 -1.   ]

    See also:
      `contrib.clippy`; `thresholds.relative_to_params`, which compares the norms of update and parameters.
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
    """A factor; 0 if the norm is saturated and must shrink, since no other factor is known to be small enough."""
    is_lost = (factor.norm >= jnp.finfo(factor.norm.dtype).max) & (factor.goal < factor.norm)
    second, goal = (jnp.where(is_lost, jnp.zeros_like(x), x) for x in (factor.second, factor.goal))
    return factor._replace(second=second, goal=goal)


def _is_beyond(leaf: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(leaf):
        return arithmetic.modulus(leaf) > high
    # Not through the moduli: XLA on CPUs (jax 0.10 and 0.12) would compute them once for this and for the maximum, and
    # write them to memory in between.
    wide = leaf.astype(high.dtype)
    return (wide > high) | (wide < -high)


def _by_leaf(
    name: str, dims_of: DimsOf, ord: float, stacked: Stacked, *, keepdims: bool = False, mean: bool = False
) -> Norm:
    """A Norm with its own groups in each leaf. A group covers the dimensions `dims_of(shape, leaf)`."""
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
        raise ValueError(f'units="io" covers ranks up to 5, got leaf {leaf.path!r} of shape {shape}: pass axis=')
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
