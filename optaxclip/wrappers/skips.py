"""Skips steps: those with non-finite gradients, and spikes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import core, norms, thresholds
from optaxclip._arguments import bounds, checks
from optaxclip._arrays import groups, mesh, states, told
from optaxclip._arrays.parameters import beside, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._jaxprs.holding import update_or_hold
from optaxclip.core import Norm, Norms, State, Threshold, Updates
from optaxclip.wrappers import skip_counts, verdicts
from optaxclip.wrappers.skip_counts import SkipStats


class SkipState(NamedTuple):
    """State of `skip_nonfinite` and `skip_spikes`.

    Attributes:
      skip_stats: how many steps were skipped, and why.
      spikes_in_row: int32 scalar, the number of spikes in a row, skipped or not. Non-finite steps do not count.
      norm_threshold_state: the state of the threshold on the norms.
      loss_threshold_state: the state of the threshold on the loss; `optax.EmptyState()` without such a threshold.
      inner_state: the state of the wrapped transformation.
    """

    skip_stats: SkipStats
    spikes_in_row: jax.Array
    norm_threshold_state: State
    loss_threshold_state: State
    inner_state: Tree


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axes: mesh.Axes = "auto"
) -> optax.GradientTransformationExtraArgs:
    r"""Skips every step in which a gradient is infinite or NaN.

    .. math:: (u, s) \leftarrow (0, s) \text{ if some } g_i \text{ is not finite, else } \mathrm{inner}(g, s)

    Args:
      inner: the optimizer, or any transformation.
      axes: which mesh axes split the leaves; see `clip_by`. All devices make the same decision.

    Returns:
      An optax transformation. Its state is a `SkipState`: the inner state and a few counters.

    Raises:
      ValueError: if `inner` is not a transformation, or `axes` is of the wrong kind.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.skip_nonfinite(optax.sgd(0.1))
      >>> params = jnp.ones(2)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grads in ([1.0, 2.0], [jnp.nan, 2.0], [3.0, 4.0]):
      ...     updates, state = update(jnp.array(grads), state, params)
      ...     print(updates, end=" ")
      [-0.1 -0.2] [0. 0.] [-0.3 -0.4]
      >>> print(optaxclip.clip_stats(state)["skipped_nonfinite"])
      1

    Notes:
      - Guarantees: a skipped step returns zeros in the dtypes that `inner` returns, and leaves the inner state
        unchanged, bit for bit. Any other step is that of `inner`, up to rounding if the compiler fuses a multiplication
        with an addition. A non-finite step is never taken, however many there are in a row.
      - Edge cases: gradients of 1e30 are finite: clip them inside, or use `skip_spikes`. Leaves without floats are not
        checked. In a skipped step, integer updates are zeros too.
      - Some leaves: `skip_spikes(inner, thresholds.constant(jnp.inf), norm=norms.global_norm(include=...))` checks only
        the included leaves.
      - Placement: around everything: `skip_nonfinite(chain(clip_by_global_norm(1.0), adam(1e-3)))`. Around
        `optax.MultiSteps` it checks every micro-batch. Do not put it inside: optax resets its sum of gradients by
        multiplying with 0, so a NaN stays in the sum, and every later step is skipped.
      - Records: a clipper inside with `record=` sees only the steps that are taken. To record all steps, put a clipper
        without a bound in front: `chain(clip_by_leaf_norm(jnp.inf, record=100), skip_nonfinite(adam(1e-3)))`.
      - Differs from optax: `optax.apply_if_finite` applies the NaN after `max_consecutive_errors`. Inside `shard_map`,
        it lets each device decide alone.

    References:
      `optax.apply_if_finite`.

    See also:
      `skip_spikes`; `skip_micro_steps`, inside `optax.MultiSteps`; `zero_nonfinite`, which keeps the finite
      coordinates.

      Notebook: `notebooks/recipes.ipynb`, logs, loops, other libraries, checkpoints.
    """
    # No finite norm is above infinity.
    return skip_spikes(inner, thresholds.constant(float("inf")), axes=axes)


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Threshold,
    *,
    norm: Norm = norms.global_norm(),
    loss_threshold: Threshold | None = None,
    max_consecutive: int | None = 20,
    axes: mesh.Axes = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Skips every step whose norm or loss is above its bound or non-finite.

    .. math:: (u, s) \leftarrow (0, s) \text{ if } n_G > upper_G \text{ for some group, or the loss is above its own},
        \text{ else } \mathrm{inner}(g, s)

    After 20 spikes in a row, the next spike is taken, as the start of a new level. With `max_consecutive=None`, every
    spike is skipped. During the warm-up of a threshold, every finite step is taken, however large its norm. So put a
    clip inside: `skip_spikes(chain(clip_by_global_norm(1.0), adam(1e-3)), thresholds.mean_std(6.0))`.

    Args:
      inner: the optimizer, or any transformation.
      threshold: from `optaxclip.thresholds`. A step is a spike if a norm is above the upper end of its band; the lower
        end is ignored. Use `thresholds.mean_std` or `thresholds.zscore` with many deviations, or `thresholds.constant`.
      norm: what to measure, from `optaxclip.norms`. Leaves that it excludes, for example by `include=`, may be NaN.
      loss_threshold: a threshold for the loss. Pass the loss as `tx.update(grads, state, params, value=loss)`, the same
        on all devices. `thresholds.mean_std`, `thresholds.zscore` and `thresholds.constant` judge losses of any sign.
        Pass a negative bound to `thresholds.constant` as an array: ``thresholds.constant(jnp.array(-5.0))``. All other
        thresholds, and `scale="log"`, judge positive losses only: they ignore a loss of 0 or less.
      max_consecutive: after this many spikes in a row, spikes are taken and enter the statistics, until a step is not a
        spike. At least 0; 20 is long for a spike and short for a new level. With None, no spike is ever taken.
      axes: which mesh axes split the leaves; see `clip_by`. All devices make the same decision.

    Returns:
      An optax transformation. Its state is a `SkipState`: the inner state, the states of the thresholds, and a few
      counters.

    Raises:
      ValueError: if an argument is of the wrong kind; at update, with `loss_threshold`, if `value` is missing, is not a
        scalar, or differs between the devices of a `shard_map`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> from optaxclip import thresholds
      >>> tx = optaxclip.skip_spikes(optax.sgd(0.1), thresholds.growth(2.0), max_consecutive=2)
      >>> params = jnp.zeros(1)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for norm in (1.0, 1.5, 50.0, 2.0, 50.0, 50.0, 50.0, 60.0):  # a spike, then a new level
      ...     updates, state = update(jnp.array([norm]), state, params)
      ...     print(updates[0].round(2), end=" ")
      -0.1 -0.15 0.0 -0.2 0.0 0.0 -5.0 -6.0

    Notes:
      - Guarantees: as for `skip_nonfinite`. A skipped step does not enter the statistics of the thresholds, and does
        not advance the schedules of `inner`.
      - Schedules: a schedule inside a threshold counts every step, skipped or not. To skip steps 10 to 12, pass
        ``thresholds.constant(lambda step: jnp.where((step >= 10) & (step <= 12), 0.0, jnp.inf))`` and
        `max_consecutive=None`.
      - Unsuitable thresholds: a quantile of the norms, or a small multiple of them, skips more and more ordinary steps,
        because only the steps *taken* enter the statistics. `thresholds.smooth` skips all steps.
      - Edge cases: a step with a non-finite gradient, or a non-finite loss if there is a `loss_threshold`, is never
        taken. It does not change the count for `max_consecutive`. `clip_stats` counts a step under the first reason
        that applies: non-finite, norm, loss.
      - Placement: around everything. To record all steps, put a recording clipper in front; see `skip_nonfinite`.
      - Differs from OLMo-core: in OLMo-core, skipped steps enter the window, so one spike widens the band for 128
        steps. OLMo-core multiplies skipped updates by 0, so a NaN stays NaN. It has no `max_consecutive`.

    References:
      Walsh et al., 2 OLMo 2 Furious, COLM 2025, arXiv:2501.00656. It is SkipStepOptimizer in OLMo-core, and
      `skip_spikes(inner, thresholds.mean_std(6.0), loss_threshold=thresholds.mean_std(6.0))` here.

    See also:
      `skip_nonfinite`; `clip_by_history` and `zclip`, which shrink such steps instead.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(max_consecutive=max_consecutive)
    checks.transformation("inner", inner)
    checks.instance("threshold", threshold, Threshold, "thresholds.mean_std(6.0)")
    checks.instance("norm", norm, Norm, "norms.global_norm()")
    if loss_threshold is not None:
        checks.instance("loss_threshold", loss_threshold, Threshold, "thresholds.mean_std(6.0)")
    if max_consecutive is not None:
        max_consecutive = checks.whole("max_consecutive", max_consecutive, at_least=0, also=", or None")
    checks.axes(axes)
    return _skipping(
        optax.with_extra_args_support(inner), _Gate(threshold, norm, loss_threshold, max_consecutive, axes)
    )


class _Gate(NamedTuple):
    """The arguments of `skip_spikes` that decide whether a step is taken."""

    threshold: Threshold
    norm: Norm
    loss_threshold: Threshold | None
    max_consecutive: int | None
    axes: mesh.Axes


def _skipping(inner: optax.GradientTransformationExtraArgs, gate: _Gate) -> optax.GradientTransformationExtraArgs:
    def init(params: Tree) -> SkipState:
        measured = core.shapes_of(gate.norm, parameters(params), gate.axes)
        no_loss = optax.EmptyState() if gate.loss_threshold is None else gate.loss_threshold.init(_LOSS)
        return SkipState(
            skip_stats=skip_counts.none_yet(),
            spikes_in_row=jnp.zeros((), jnp.int32),
            norm_threshold_state=gate.threshold.init(measured),
            loss_threshold_state=no_loss,
            inner_state=inner.init(params),
        )

    def update(updates: Updates, state: Tree, params: Tree = None, **extra_args: Any) -> tuple[Updates, SkipState]:
        state = states.of_kind(SkipState, state, "skip_nonfinite or skip_spikes")
        seen = _look(gate, updates, state, params, extra_args)
        is_open = False if gate.max_consecutive is None else state.spikes_in_row >= gate.max_consecutive
        rejected = ~seen.finite | (seen.stands_out & jnp.logical_not(is_open))
        new_updates, inner_state = update_or_hold(
            lambda updates, inner_state: inner.update(updates, inner_state, params, **extra_args),
            rejected,
            updates,
            state.inner_state,
        )
        after = _outer_state(state, seen, rejected)
        return jax.tree.map(lambda leaf: _zero_if(rejected, leaf), new_updates), after._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _States(NamedTuple):
    """The states of the two thresholds."""

    of_norm: Any
    of_loss: Any


class _Seen(NamedTuple):
    """What is known of a step, and the next states of the thresholds if it is taken and if it is skipped."""

    finite: jax.Array
    high_norm: jax.Array
    high_loss: jax.Array
    taken: _States
    skipped: _States

    @property
    def stands_out(self) -> jax.Array:
        return self.finite & (self.high_norm | self.high_loss)


def _look(gate: _Gate, updates: Updates, state: SkipState, params: Tree, extra_args: Mapping[str, Any]) -> _Seen:
    filled, known = beside(updates, params)
    leaves = core.Leaves(filled, known, gate.axes, told=extra_args)
    before = _States(state.norm_threshold_state, state.loss_threshold_state)
    judged = core.judge(gate.norm, gate.threshold, leaves, before.of_norm, extra_args)
    verdict = verdicts.of_norms(judged, leaves)
    without = _without(
        gate.threshold, judged.norms, before.of_norm, lambda: gate.norm.measure(leaves.params()), extra_args
    )
    seen = _Seen(
        finite=verdict.finite,
        high_norm=verdict.high,
        high_loss=jnp.zeros_like(verdict.high),
        taken=before._replace(of_norm=judged.state),
        skipped=before._replace(of_norm=without),
    )
    if gate.loss_threshold is None:
        return seen
    loss, threshold = _loss(extra_args, leaves.axes), gate.loss_threshold
    threshold = threshold if threshold.signed is None else threshold.signed
    (_, upper), after = threshold.limit(loss, before.of_loss, _no_param_norms, **extra_args)
    return seen._replace(
        finite=verdict.finite & jnp.isfinite(loss),
        high_loss=groups.over_groups(_is_above, loss, upper),
        taken=seen.taken._replace(of_loss=after),
        skipped=seen.skipped._replace(of_loss=_without(threshold, loss, before.of_loss, _no_param_norms, extra_args)),
    )


def _without(
    threshold: Threshold,
    norms: Norms,
    state: Any,
    param_norms: Callable[[], Norms],
    extra_args: Mapping[str, Any],
) -> Any:
    """The state of a threshold after a skipped step: NaN counts as a step, but not as an observation."""
    if not jax.tree.leaves(state):
        return state
    # These NaN are intended, so jax_debug_nans must not raise for them.
    with jax.debug_nans(False), jax.debug_infs(False):
        nothing = jax.tree.map(lambda norm: jnp.full_like(norm, jnp.nan), norms)
        _, after = threshold.limit(nothing, state, param_norms, **extra_args)
    return after


def _outer_state(state: SkipState, seen: _Seen, rejected: jax.Array) -> SkipState:
    """The state after this step, except the inner state."""
    after = jax.tree.map(lambda skipped, taken: jnp.where(rejected, skipped, taken), seen.skipped, seen.taken)
    in_row = jnp.where(seen.stands_out, jnp.asarray(optax.safe_increment(state.spikes_in_row)), 0)
    return state._replace(
        skip_stats=skip_counts.one_more(state.skip_stats, rejected, ~seen.finite, seen.high_norm),
        spikes_in_row=jnp.where(seen.finite, in_row, state.spikes_in_row),
        norm_threshold_state=after.of_norm,
        loss_threshold_state=after.of_loss,
    )


_LOSS = jax.ShapeDtypeStruct((), jnp.float32)


def _loss(extra_args: Mapping[str, Any], names: frozenset[str]) -> jax.Array:
    if extra_args.get("value") is None:
        raise ValueError("loss_threshold needs the loss: call tx.update(updates, state, params, value=loss)")
    loss = told.scalar("value", extra_args["value"], "loss").astype(jnp.float32)
    # If the types do not say that all devices have the same loss, they take the largest, so that all decide alike. pmax
    # may lose a NaN, so NaN becomes inf first.
    axes = mesh.may_vary_over(loss, names)
    return jax.lax.pmax(jnp.where(jnp.isnan(loss), jnp.inf, loss), axes) if axes else loss


def _no_param_norms() -> Any:
    raise ValueError("loss_threshold must not depend on the parameters: pass a threshold that needs no params")


def _is_above(loss: jax.Array, upper: Any) -> jax.Array:
    """Whether a loss is above its bound. Unlike the bound of a norm, it may be negative."""
    return jnp.isfinite(loss) & (loss > bounds.as_array(upper, loss.dtype))


def _zero_if(flag: jax.Array, leaf: Any) -> Any:
    """Zeros if the flag is set, also for NaN; leaves without numbers stay unchanged."""
    dtype = getattr(leaf, "dtype", None)
    is_number = dtype is None or (jnp.issubdtype(dtype, jnp.number) and dtype != jax.dtypes.float0)
    return jnp.where(flag, jnp.zeros_like(leaf), leaf) if is_number else leaf
