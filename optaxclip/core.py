"""The one mechanism: how big is each group of coordinates, and how big may it be?

Nearly every gradient clipper answers these two questions, and differs from the others in one of the answers:

- a **Norm** measures the updates, one number per group of coordinates (all of them, a leaf, a unit), and says which
  group each leaf belongs to;
- a **Threshold** says in which band each of those numbers may lie, from constants, from the parameters, or from what it
  has seen.

`clip_by` puts one of each together into an optax transformation::

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

Any norm goes with any threshold. What needs more than these two hooks (values, state per coordinate, momentum) is a
plain transformation elsewhere.
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
    """How big each group of coordinates is, and which group each leaf is in.

    `clip_by` flattens the updates once, into `leaves`: a list of those that hold floats, without integers, keys and
    None. Both hooks get it:

    - `leaf.value` is an array, in `shard_map` this device's piece of one; `leaf.path` is its path ("decoder/kernel").
    - `leaf.sum(x)` and `leaf.max(x)` take a number of this device's piece over all devices that hold a piece.
    - `leaves.to_tree(values)` puts one value per leaf into the structure of the updates, and `leaves.from_tree(tree)`
      makes it a list again.
    - `leaves.lookup(name, argument)` is a list of what an argument says of each leaf: a prefix pytree, or a function
      `path -> value`.
    - `leaves.told` are the keyword arguments of `update`; None in `init`, where only shapes are asked for.
    - `leaves.params()` is the list of the parameters of these leaves. It raises optax's error where there are none.

    Attributes:
      measure: `leaves -> norms`, a pytree with one non-negative number, or array of them, per group, in float32 or
        float64. Norms of infinite or NaN gradients must not be finite. If `leaves.to_tree` made the pytree, bounds may
        be prefix pytrees, as in `{"body": 1.0, "head": None}`.
      assign: `(leaves, factors) -> list`: for each leaf one of the factors, or None to leave the leaf as it is.
        `factors` has the structure of the norms, with one `Factor` in the place of each; hand them on as they are.
        Where a norm is an array, so are the numbers in its factor, and they must broadcast to the leaf.
      name: how it is called in a signature.

    `clip_by` multiplies by the factor in float32 or wider. A group inside its band, of norm 0, or of a norm that is not
    finite is returned bit for bit.

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
      `norms`, for those that are there; `clip_by`, which takes one.
    """

    measure: Callable[[Leaves], Norms]
    assign: Callable[[Leaves, Any], list[Factor | None]]
    name: str = "a Norm"

    def __repr__(self) -> str:
        return self.name


class Threshold(NamedTuple):
    """How big each group may be.

    Attributes:
      init: `norms -> state`, a pytree of arrays; `optax.EmptyState()` if there is none. Each of `norms` is a
        `jax.ShapeDtypeStruct`: the values are not known yet.
      limit: `(norms, state, param_norms, **extra_args) -> ((lower, upper), state)`. Each end of the band has the
        structure of `norms`, or is one number for all groups; None and NaN bound nothing. `param_norms()` measures the
        parameters with the same Norm, and raises optax's error if there are none. `extra_args` are the keyword
        arguments of `update`, which every Threshold must accept. A count of steps is a part of the state.
      signed: the same for numbers of any sign, such as a loss, with the same states; None for a Threshold that judges
        positive numbers only. `skip_spikes` takes it for the loss.

    A norm that is NaN or infinite is no observation: `limit` must leave statistics as they are, and count the step
    where it counts steps. `skip_spikes` relies on that. In a step that it skips, the next state is the one that `limit`
    returns for NaN in the place of all norms.

    Example:
      A bound that is halved every hundred steps:

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
      `thresholds`, for those that are there; `clip_by`, which takes one.
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
    """A transformation that knows what it was built from. One that is wrapped no longer does."""

    made_of: MadeOf | None = None


def clip_by(
    norm: Norm, threshold: Threshold, *, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Brings every group of coordinates whose norm lies outside its band to the edge of the band.

    .. math:: u_G \leftarrow u_G \cdot \frac{\min(\max(n_G, lower_G), upper_G)}{n_G}

    Args:
      norm: what is measured, from `optaxclip.norms`.
      threshold: how much is permitted, from `optaxclip.thresholds`.
      axes: over which mesh axes the leaves are split, inside `shard_map` and `pmap`: `"auto"` (the default, from the
        types, with `check_vma=True`), a PartitionSpec or a prefix pytree of them, a name or a tuple of names (every
        leaf is then split over all of them), or None for each device alone. One model per device (seeds, populations)
        needs None: no type tells such a model from a piece of one, so `"auto"` takes one norm of all devices, without a
        warning. `clip_stats` says which axes a recorded norm went over.
      record: of how many of the last steps the state keeps norms and limits, for `clip_stats`; True is 1. Whatever it
        is, the record counts clipped and non-finite steps, and names the leaf that was the first not to be finite.

    Returns:
      An optax transformation. Its state is the threshold's (`optax.EmptyState` for a threshold without one), or with
      `record` a `RecordedState` of that and a `ClipStats`.

    Raises:
      ValueError: if `norm`, `threshold` or `record` is something else; at update, if parameters are needed and missing,
        if the structures of updates and parameters differ where both are needed, if a gradient inside `shard_map`
        has not been reduced yet, or if a leaf is of a dtype that can't be clipped (float8_e8m0fnu, which has neither 0
        nor a sign, and float6).

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.between(1.0, 5.0))
      >>> grads = {"large": jnp.array([6.0, 8.0]), "small": jnp.array([0.3, 0.4])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["large"], updates["small"])
      [3. 4.] [0.6 0.8]

    Notes:
      - Guarantees: structure, shapes and dtypes are kept. Inside the band an update is returned bit for bit. Finite
        updates stay finite. Afterwards the norm is at the edge of the band up to rounding: `1 + 1e-5` in float32,
        `1 + 4 eps` in 16 bits.
      - Edge cases: a group with norm 0 stays 0. A group with an infinite or NaN norm is returned unchanged. An upper
        end of 0 gives zeros, and inf changes nothing. Integer, boolean, float0 and key leaves pass untouched and
        uncounted. A None where the parameters have a leaf counts as a zero gradient, and stays None.
      - Placement: before the optimizer for a bound on the gradient. For a bound on the update, after the optimizer,
        before or after the learning rate. The named methods say where they belong.

    See also:
      `norms` and `thresholds`, which it takes; `Norm` and `Threshold`, to write another; `clip_stats` for the record.

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
    """What a norm measures of updates like `params`, in shapes and dtypes alone."""
    return jax.eval_shape(lambda tree: _measured(norm, Leaves(tree, tree, axes)), params)


class Judged(NamedTuple):
    """What was measured, and what of it is permitted. All but the state have the structure of the norms.

    Attributes:
      norms: what was measured.
      limits: the upper end of the band.
      factors: the Factor of each group.
      state: the threshold's.
    """

    norms: Norms
    limits: Norms
    factors: Tree
    state: State


def judge(
    norm: Norm, threshold: Threshold, leaves: Leaves, state: State, extra_args: Mapping[str, Any] = MappingProxyType({})
) -> Judged:
    """Measures, and asks the threshold."""
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
    """Asks the threshold what of these norms is permitted."""
    (lower, upper), state = threshold.limit(norms, state, param_norms, **extra_args)
    flat, treedef = jax.tree.flatten(norms)
    edges = groups.vectorized(_edge, flat, groups.entries(lower, treedef), groups.entries(upper, treedef))
    limits, factors = zip(*edges, strict=True) if edges else ((), ())
    return Judged(norms, treedef.unflatten(limits), treedef.unflatten(factors), state)


def apply(norm: Norm, leaves: Leaves, factors: Tree) -> Updates:
    """The updates, each leaf by the factor that the norm gives it."""
    return rescaled(leaves, assigned_to(norm, leaves, factors))


def assigned_to(norm: Norm, leaves: Leaves, factors: Tree) -> list[Factor | None]:
    """The factor of each leaf; None for those that the norm leaves out."""
    assigned: Any = norm.assign(leaves, factors)
    if problem := _what_is_wrong(assigned, leaves):
        raise ValueError(
            f"assign of {norm} must return a list with one of the factors, or None, for each of the {len(leaves)} "
            f"leaves, got {problem}"
        )
    return assigned


def rescaled(leaves: Leaves, assigned: list[Factor | None]) -> Updates:
    """The updates, each leaf by its factor."""
    by_leaf = zip(leaves, assigned, strict=True)
    return leaves.updated(
        [leaf.value if factor is None else scaling.rescale(leaf.value, factor) for leaf, factor in by_leaf]
    )


def _what_is_wrong(assigned: Any, leaves: Leaves) -> str:
    """Why this is no list of factors for these leaves; nothing if it is."""
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
    """The upper end of the band of some norms, and the factor that takes each into its band."""
    high = upper_end(norm, upper)
    low = bounds.as_array(lower, norm.dtype, none=0)
    low = jnp.where(jnp.isnan(low), jnp.zeros_like(low), low)
    return high, scaling.factor(norm, jnp.minimum(jnp.maximum(norm, low), high))


def upper_end(norm: jax.Array, upper: Any) -> jax.Array:
    """The upper end of the band of some norms, as finite numbers that norms can be compared with."""
    highest = bounds.highest(norm.dtype)
    upper = bounds.as_array(upper, norm.dtype, none=highest)
    # A traced bound can't be refused when it is negative. As 0 it at least turns no gradient around.
    upper = jnp.where(jnp.isnan(upper), jnp.full_like(upper, highest), jnp.clip(upper, 0, highest))
    return upper + jnp.zeros_like(norm)  # of the shape and sharding of the norms
