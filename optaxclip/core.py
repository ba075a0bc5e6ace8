"""The one mechanism: how large is each group of coordinates, and how large may it be?

Nearly every gradient clipper answers these two questions. Clippers differ in one of the answers:

- A **Norm** measures the updates: one number per group of coordinates (all of them, a leaf, a unit). It also says which
  group each leaf belongs to.
- A **Threshold** says in which band each of these numbers may lie. It uses constants, the parameters, or earlier norms.

`clip_by` combines one of each into an optax transformation::

    clip_by_global_norm(c)      clip_by(norms.global_norm(), thresholds.constant(c))
    clip_by_leaf_norm(c)        clip_by(norms.leaf_norm(), thresholds.constant(c))
    clip_by_spectral_norm(c)    clip_by(norms.spectral_norm(), thresholds.constant(c))
    clip_by_norm_range(lo, hi)  clip_by(norms.global_norm(), thresholds.between(lo, hi))
    adaptive_grad_clip(r, eps)  clip_by(norms.unit_norm(), thresholds.relative_to_params(r, floor=eps))
    autoclip(10)                clip_by(norms.global_norm(), thresholds.quantile(0.10, warmup_max_norm=1.0))
    zclip(2.5)                  clip_by(norms.global_norm(), thresholds.zscore(2.5, warmup_max_norm=1.0))
    contrib.clippy(rel, abs)    clip_by(norms.relative_change(rel, abs), thresholds.constant(1.0))
    contrib.aggc(labels, 2)     clip_by(norms.group_norm(labels), thresholds.ema_band(2))

`clip_by` does the rest: it flattens the updates, asks the norm and the threshold, computes one factor per group, and
multiplies.

Any norm works with any threshold. A method that needs more than these two hooks (values, state per coordinate,
momentum) is a plain transformation in another module.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays import groups, states
from optaxclip._arrays.leaves import Leaf, Leaves
from optaxclip._arrays.mesh import Axes
from optaxclip._arrays.parameters import beside, drop_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import scaling
from optaxclip._numerics.scaling import Factor
from optaxclip.records import recorder
from optaxclip.records.recorder import RecordedState

__all__ = ["Axes", "Bound", "Factor", "Leaf", "Leaves", "Norm", "Norms", "RecordedState", "Threshold", "clip_by"]

Updates: TypeAlias = Any  # a pytree of arrays
Norms: TypeAlias = Any  # a pytree with one real array, float32 or wider, per group
State: TypeAlias = Any  # a pytree of arrays


class Norm(NamedTuple):
    """How large each group of coordinates is, and which group each leaf belongs to.

    `clip_by` flattens the updates once into `leaves`, the list of all leaves that hold floats. `measure` and `assign`
    both get this list:

    - `leaf.value` is an array; inside `shard_map`, this device's piece of it. `leaf.path` is its path
      ("decoder/kernel").
    - `leaf.sum(x)` and `leaf.max(x)` combine a number `x` over all devices that hold a piece of the leaf.
    - `leaves.to_tree(values)` puts one value per leaf into the structure of the updates. `leaves.from_tree(tree)` turns
      it back into a list.
    - `leaves.lookup(name, argument)` turns an argument, a prefix pytree or a function `path -> value`, into a list with
      one value per leaf.
    - `leaves.told` holds the keyword arguments of `update`. It is None in `init`, which only needs shapes.
    - `leaves.params()` is the list of the parameters of these leaves. Without parameters it raises optax's error.

    Attributes:
      measure: `leaves -> norms`, a pytree with one non-negative number per group, or an array of them, in float32 or
        float64. Infinite or NaN gradients must give non-finite norms. If `leaves.to_tree` made the pytree, bounds may
        be prefix pytrees, as in `{"body": 1.0, "head": None}`.
      assign: `(leaves, factors) -> list`, with one factor per leaf, or None to leave the leaf unchanged. `factors` has
        the structure of the norms, with a `Factor` in place of each norm. Return these factors unchanged. If a norm is
        an array, the numbers in its factor are arrays too, and they must broadcast to the leaf.
      name: the text that `repr` returns and that signatures show.

    `clip_by` multiplies by the factor in float32 or wider. It returns a group unchanged if its norm is inside the band,
    0, or non-finite.

    Example:
      The mean modulus of each leaf:

      >>> import jax.numpy as jnp
      >>> from optaxclip import Norm, clip_by, thresholds
      >>> def measure(leaves):
      ...     def mean(leaf):
      ...         moduli = jnp.abs(leaf.value).astype(jnp.float32)
      ...         return leaf.sum(jnp.sum(moduli)) / leaf.sum(jnp.float32(moduli.size))
      ...     return leaves.to_tree([mean(leaf) for leaf in leaves])
      >>> def assign(leaves, factors):
      ...     return leaves.from_tree(factors)
      >>> tx = clip_by(Norm(measure, assign, "mean_modulus()"), thresholds.constant(1.0))
      >>> updates, _ = tx.update(jnp.array([6.0, -2.0]), tx.init(None))
      >>> print(updates)
      [ 1.5 -0.5]

    See also:
      `norms`, for the Norms of this library; `clip_by`, which takes one.
    """

    measure: Callable[[Leaves], Norms]
    assign: Callable[[Leaves, Any], list[Factor | None]]
    name: str = "a Norm"

    def __repr__(self) -> str:
        return self.name


class Threshold(NamedTuple):
    """How large the norm of each group may be.

    Attributes:
      init: `norms -> state`, a pytree of arrays; `optax.EmptyState()` if it needs none. Each entry of `norms` is a
        `jax.ShapeDtypeStruct`: the values are not known yet.
      limit: `(norms, state, param_norms, **extra_args) -> ((lower, upper), state)`. Each end of the band has the
        structure of `norms`, or is one number for all groups. None and NaN mean no bound. `param_norms()` measures the
        parameters with the same Norm; without `params` it raises optax's error. `extra_args` are the keyword arguments
        of `update`; every Threshold must accept them. If the Threshold counts steps, the count is part of its state.
      signed: the same Threshold for numbers of any sign, such as a loss, with the same states. None if the Threshold is
        right for positive numbers only. `skip_spikes` uses it for the loss.

    A NaN or infinite norm is not an observation. `limit` must then leave its statistics unchanged, but still count the
    step if it counts steps. `skip_spikes` relies on that: after a skipped step, the next state is the one that `limit`
    returns when all norms are NaN.

    Example:
      A bound that halves every hundred steps:

      >>> import jax.numpy as jnp
      >>> from optaxclip import Threshold, clip_by, norms
      >>> def limit(norms, step, param_norms, **extra_args):
      ...     return (0.0, 4.0 * 0.5 ** (step // 100)), step + 1
      >>> halving = Threshold(lambda norms: jnp.zeros((), jnp.int32), limit)
      >>> tx = clip_by(norms.global_norm(), halving)
      >>> updates, step = tx.update(jnp.array([3.0, 4.0]), jnp.int32(250))
      >>> print(updates, step)
      [0.6 0.8] 251

    See also:
      `thresholds`, for the Thresholds of this library; `clip_by`, which takes one.
    """

    init: Callable[[Norms], State]
    limit: Callable[..., tuple[tuple[Norms, Norms], State]]
    signed: "Threshold | None" = None


class MadeOf(NamedTuple):
    """What a transformation was built from: the arguments of `clip_by`."""

    norm: Norm
    threshold: Threshold
    axes: Axes


class Clip(optax.GradientTransformationExtraArgs):
    """A transformation that remembers what it was built from. A wrapper around it does not."""

    made_of: MadeOf | None = None


def clip_by(
    norm: Norm, threshold: Threshold, *, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every group of coordinates whose norm is outside its band to the nearest edge of the band.

    .. math:: u_G \leftarrow u_G \cdot \frac{\min(\max(n_G, lower_G), upper_G)}{n_G}

    Args:
      norm: what to measure, from `optaxclip.norms`.
      threshold: how large the norms may be, from `optaxclip.thresholds`.
      axes: which mesh axes split the leaves, inside `shard_map` and `pmap`. `"auto"`, the default, reads them from the
        types; it needs `check_vma=True`. Or pass a PartitionSpec, or a prefix pytree of them. If all leaves are split
        over the same axes, a name or a tuple of names is enough. None measures each device alone. Pass None if each
        device has its own model (seeds, populations). The types do not distinguish such a model from a piece of one, so
        `"auto"` would measure one norm over all devices, without a warning. `clip_stats` shows the axes of a recorded
        norm.
      record: how many of the last steps to record (norms and limits), for `clip_stats`; True is 1. A record of any
        length also counts clipped and non-finite steps, and names the first non-finite leaf.

    Returns:
      An optax transformation. Its state is that of the threshold (`optax.EmptyState` if it has none). With `record=` it
      is a `RecordedState`, which holds that state and a `ClipStats`.

    Raises:
      ValueError: if an argument is of the wrong kind. At update: if parameters are needed and missing; if they are
        needed and differ from the updates in structure; if a gradient inside `shard_map` has not been reduced yet; if
        the dtype of a leaf can't be clipped (float8_e8m0fnu, which has neither 0 nor a sign, and float6).

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.between(1.0, 5.0))
      >>> grads = {"large": jnp.array([6.0, 8.0]), "small": jnp.array([0.3, 0.4])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["large"], updates["small"])
      [3. 4.] [0.6 0.8]

    Notes:
      - Guarantees: structure, shapes and dtypes are kept. An update inside the band is returned unchanged, bit for bit.
        Finite updates stay finite. After clipping, the norm is at the edge of the band up to rounding: a factor of
        `1 + 1e-5` in float32, `1 + 4 eps` in 16 bits.
      - Edge cases: a group with norm 0 stays 0. A group with an infinite or NaN norm is returned unchanged. An upper
        end of 0 gives zeros; inf changes nothing. Integer, boolean, float0 and key leaves are returned unchanged and do
        not count. A gradient of None counts as zero if the parameters have a leaf there, and stays None.
      - Placement: before the optimizer, to bound the gradient. After the optimizer, before or after the learning rate,
        to bound the update. Each named method says where it belongs.

    See also:
      `norms` and `thresholds`, for the arguments; `Norm` and `Threshold`, to write your own; `clip_stats`, to read the
      record.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(record=record)
    checks.instance("norm", norm, Norm, "norms.global_norm()")
    checks.instance("threshold", threshold, Threshold, "thresholds.constant(1.0)")
    length = checks.record(record)
    checks.axes(axes)

    def init(params: Tree) -> State:
        params = parameters(params)
        norms = shapes_of(norm, params, axes)
        state = threshold.init(norms)
        return RecordedState(state, recorder.init(norms, params, length)) if length else state

    def update(updates: Updates, state: State, params: Tree = None, **extra_args: Any) -> tuple[Updates, State]:
        filled, params = beside(updates, params)
        leaves = Leaves(filled, params, axes, told=extra_args)
        recorder.require_state(state, length)
        state = states.as_arrays(state)
        judged = judge(norm, threshold, leaves, state.threshold_state if length else state, extra_args)
        assigned, after = assigned_to(norm, leaves, judged.factors), judged.state
        clipped = rescaled(leaves, assigned)
        if length:
            is_measured = [factor is not None for factor in assigned]
            after = RecordedState(after, recorder.advance(state.clip_stats, judged, leaves, is_measured))
        return clipped if filled is updates else drop_missing(updates, clipped), after

    tx = Clip(init, update)
    tx.made_of = MadeOf(norm, threshold, axes)
    return tx


def shapes_of(norm: Norm, params: Tree, axes: Axes) -> Norms:
    """The shapes and dtypes of what a norm measures for updates like `params`."""
    return jax.eval_shape(lambda tree: _measured(norm, Leaves(tree, tree, axes)), params)


class Judged(NamedTuple):
    """What was measured and what is permitted. All fields except the state have the structure of the norms.

    Attributes:
      norms: what was measured.
      limits: the upper end of the band.
      factors: the Factor of each group.
      state: the next state of the threshold.
    """

    norms: Norms
    limits: Norms
    factors: Tree
    state: State


def judge(
    norm: Norm, threshold: Threshold, leaves: Leaves, state: State, extra_args: Mapping[str, Any] = MappingProxyType({})
) -> Judged:
    """Measures the updates, and asks the threshold for their band."""
    measured = _measured(norm, leaves)
    return permit(threshold, measured, state, lambda: norm.measure(leaves.params()), extra_args)


def _measured(norm: Norm, leaves: Leaves) -> Norms:
    norms = norm.measure(leaves)
    flat = jax.tree.leaves(norms)
    if others := [each for each in flat if getattr(each, "dtype", None) not in (jnp.float32, jnp.float64)]:
        came = getattr(others[0], "dtype", type(others[0]).__name__)
        raise ValueError(f"measure of {norm} must return arrays of float32 or float64, got {came}")
    return norms


def permit(
    threshold: Threshold,
    norms: Norms,
    state: State,
    param_norms: Callable[[], Norms],
    extra_args: Mapping[str, Any] = MappingProxyType({}),
) -> Judged:
    """Asks the threshold for the band of these norms."""
    (lower, upper), state = threshold.limit(norms, state, param_norms, **extra_args)
    flat, treedef = jax.tree.flatten(norms)
    edges = groups.vectorized(_edge, flat, groups.entries(lower, treedef), groups.entries(upper, treedef))
    limits, factors = zip(*edges, strict=True) if edges else ((), ())
    return Judged(norms, treedef.unflatten(limits), treedef.unflatten(factors), state)


def apply(norm: Norm, leaves: Leaves, factors: Tree) -> Updates:
    """The updates, with each leaf scaled by the factor that the norm assigns to it."""
    return rescaled(leaves, assigned_to(norm, leaves, factors))


def assigned_to(norm: Norm, leaves: Leaves, factors: Tree) -> list[Factor | None]:
    """The factor of each leaf; None for a leaf that the norm leaves out."""
    assigned: Any = norm.assign(leaves, factors)
    if problem := _what_is_wrong(assigned, leaves):
        raise ValueError(
            f"assign of {norm} must return a list with one of the factors, or None, for each of the {len(leaves)} "
            f"leaves, got {problem}"
        )
    return assigned


def rescaled(leaves: Leaves, assigned: list[Factor | None]) -> Updates:
    """The updates, with each leaf scaled by its factor."""
    by_leaf = zip(leaves, assigned, strict=True)
    return leaves.updated(
        [leaf.value if factor is None else scaling.rescale(leaf.value, factor) for leaf, factor in by_leaf]
    )


def _what_is_wrong(assigned: Any, leaves: Leaves) -> str:
    """Why `assigned` is not a list of factors for these leaves; an empty string if it is."""
    if not isinstance(assigned, list | tuple) or isinstance(assigned, Factor):
        return f"a {type(assigned).__name__}"
    others = [type(factor).__name__ for factor in assigned if not (factor is None or isinstance(factor, Factor))]
    if len(assigned) != len(leaves) or others:
        return f"{len(assigned)} entries" + (f", among them a {others[0]}" if others else "")
    for leaf, factor in zip(leaves, assigned, strict=True):
        shape = () if factor is None else factor.second.shape
        if shape and jnp.broadcast_shapes(shape, leaf.value.shape) != leaf.value.shape:
            return f"a factor of shape {shape} for the leaf {leaf.path!r} of shape {leaf.value.shape}"
    return ""


def _edge(norm: jax.Array, lower: Any, upper: Any) -> tuple[jax.Array, Factor]:
    """The upper end of the band of each norm, and the factor that brings the norm into its band."""
    high = upper_end(norm, upper)
    low = bounds.as_array(lower, norm.dtype, none=0)
    low = jnp.where(jnp.isnan(low), jnp.zeros_like(low), low)
    return high, scaling.factor(norm, jnp.minimum(jnp.maximum(norm, low), high))


def upper_end(norm: jax.Array, upper: Any) -> jax.Array:
    """The upper end of the band of each norm, as a finite number to compare the norm with."""
    highest = bounds.highest(norm.dtype)
    upper = bounds.as_array(upper, norm.dtype, none=highest)
    # A traced negative bound can't be refused. It acts as 0, so that no gradient changes its sign.
    upper = jnp.where(jnp.isnan(upper), jnp.full_like(upper, highest), jnp.clip(upper, 0, highest))
    return upper + jnp.zeros_like(norm)  # with the shape and sharding of the norms
