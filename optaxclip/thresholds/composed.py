"""Thresholds made of others: several at once, a multiple of one, one with a floor.

The inner thresholds see the measured norms. If an inner threshold takes clipped norms into its statistics, these norms
are clipped by its own limit.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import groups, states
from optaxclip.core import Norms, State, Threshold
from optaxclip.thresholds.fixed import Band, ParamNorms


def chain(*thresholds: Threshold) -> Threshold:
    """Bounds each norm by several thresholds at once: the largest lower end and the smallest upper end.

    Args:
      *thresholds: any number of Thresholds.

    Returns:
      A Threshold. Its state is a tuple of their states, or `optax.EmptyState` if none has state.

    Raises:
      ValueError: if an argument is not a Threshold.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> both = thresholds.chain(thresholds.relative_to_params(0.1), thresholds.constant(1.0))
      >>> tx = clip_by(norms.leaf_norm(), both)
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([30.0, 40.0])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["a"], updates["b"])  # bounds of 0.5 and 1
      [0.3 0.4] [0.6 0.8]

    Notes:
      - Statistics: each threshold sees the measured norms. If clipped norms enter its statistics, they are clipped by
        its own limit, not by that of the chain.
      - Edge cases: if the ends cross, the upper end wins. An empty chain has no bound.

    See also:
      `zclip`, a chain of `zscore` and `constant`.
    """
    for number, threshold in enumerate(thresholds):
        checks.instance(f"threshold {number} of the chain", threshold, Threshold, "thresholds.constant(1.0)")
    return _all_of(thresholds)


def _all_of(thresholds: tuple[Threshold, ...]) -> Threshold:
    def init(norms: Norms) -> State:
        each = tuple(threshold.init(norms) for threshold in thresholds)
        return each if jax.tree.leaves(each) else optax.EmptyState()

    def limit(norms: Norms, state: State, param_norms: ParamNorms, **extra_args: Any) -> tuple[Band, State]:
        stateless = not jax.tree.leaves(state)
        if not stateless and not (type(state) is tuple and len(state) == len(thresholds)):
            expected = f"a tuple of {len(thresholds)} states"
            raise ValueError(states.wrong("thresholds.chain", expected, states.described(state)))
        lower, upper = 0.0, None
        after_each: list[State] = []
        for threshold, before in zip(thresholds, [state] * len(thresholds) if stateless else state, strict=True):
            (low, high), after = threshold.limit(norms, before, param_norms, **extra_args)
            lower = _tighter(_larger, norms, lower, low, 0.0)
            upper = _tighter(_smaller, norms, upper, high, None)
            after_each.append(after)
        return (lower, upper), state if stateless else tuple(after_each)

    if all(threshold.signed is None for threshold in thresholds):
        return Threshold(init, limit)
    signed = tuple(threshold if threshold.signed is None else threshold.signed for threshold in thresholds)
    return Threshold(init, limit, _all_of(signed))


def times(k: bounds.Bound, threshold: Threshold) -> Threshold:
    r"""Multiplies both ends of the band of another threshold by k.

    .. math:: lower = k \cdot lower_{inner}, \qquad upper = k \cdot upper_{inner}

    Args:
      k: the factor, positive and finite: a number, an array, an optax schedule, or a prefix pytree of these if the norm
        has several groups.
      threshold: the other threshold. Where it has no bound, the result has none.

    Returns:
      A Threshold. Its state is that of `threshold`. With a schedule, it is a tuple of a step count and that state.

    Raises:
      ValueError: if `k` is 0, negative, infinite or NaN, or `threshold` is not a Threshold.

    Example:
      Twice the median of the last three norms:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_norm(), thresholds.times(2.0, thresholds.quantile(0.5, window=3)))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 9.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [4.]

    Notes:
      - Statistics: `threshold` sees the measured norms. The clipped norms that enter the statistics of `ema_ratio`,
        `ema_band`, `growth`, `mean_std` and `zscore` are clipped by their own limit, whatever k is. A norm between that
        limit and k times that limit is not clipped. It enters the statistics as the limit, and `patience` counts it as
        a spike.
      - Spikes: with `zscore`, k multiplies the limit of a spike. For other norms, k multiplies the level above which a
        norm is a spike. With k below 1, norms that are not spikes are clipped too.
      - Limits on the factor: `max_down` and `max_up` of `ema_band` apply before k.
      - Edge cases: None in a pytree and NaN in an array mean no bound.
      - Losses: as `loss_threshold` of `skip_spikes` it judges positive losses only.

    See also:
      `at_least`; `chain`, for a cap.
    """
    checks.bound("k", k, finite=True, positive=True)
    checks.instance("threshold", threshold, Threshold, "thresholds.quantile(0.5)")

    def scaled(norms: Norms, band: Band, factor: Any) -> Band:
        lower, upper = band
        if not (isinstance(lower, float) and lower == 0.0):
            lower = groups.over_groups(functools.partial(_multiple, is_upper=False), norms, lower, factor)
        return lower, groups.over_groups(functools.partial(_multiple, is_upper=True), norms, upper, factor)

    return _altered("thresholds.times", k, threshold, scaled)


def at_least(min_limit: bounds.Bound, threshold: Threshold) -> Threshold:
    """Keeps the limit of another threshold at or above `min_limit`: smaller norms are never clipped.

    Args:
      min_limit: the floor of the limit, at least 0, in the units of the norm: a number, an array, an optax schedule, or
        a prefix pytree of these if the norm has several groups.
      threshold: the other threshold.

    Returns:
      A Threshold. Its state is that of `threshold`. With a schedule, it is a tuple of a step count and that state.

    Raises:
      ValueError: if `min_limit` is negative or NaN, or `threshold` is not a Threshold.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.at_least(0.5, thresholds.growth(2.0)))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1e-6, 1.0):  # growth alone permits 2e-6
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [0.5]

    Notes:
      - Lower end: the lower end of `threshold` does not change. A norm below it is still raised to it.
      - Statistics: `threshold` sees the measured norms. The clipped norms that enter the statistics of `ema_ratio`,
        `ema_band`, `growth`, `mean_std` and `zscore` are clipped by their own limit. So the floor does not lift a limit
        that is stuck below it.
      - Edge cases: 0, None in a pytree and NaN in an array mean no floor. With inf there is no bound.

    See also:
      `chain` with a `constant`, for a cap; `times`; `between`, which raises small norms.
    """
    checks.bound("min_limit", min_limit)
    checks.instance("threshold", threshold, Threshold, "thresholds.quantile(0.5)")

    def floored(norms: Norms, band: Band, floor: Any) -> Band:
        lower, upper = band
        return lower, groups.over_groups(_not_below, norms, upper, floor)

    made = _altered("thresholds.at_least", min_limit, threshold, floored)
    if threshold.signed is None:
        return made
    return made._replace(signed=_altered("thresholds.at_least", min_limit, threshold.signed, floored))


def _altered(
    name: str, given: bounds.Bound, threshold: Threshold, alter: Callable[[Norms, Band, Any], Band]
) -> Threshold:
    """A threshold with the band `alter(norms, band, bound)`. A schedule puts its state in front."""
    scheduled = bounds.is_scheduled(given)

    def init(norms: Norms) -> State:
        inner = threshold.init(norms)
        return (bounds.init(given), inner) if scheduled else inner

    def limit(norms: Norms, state: State, param_norms: ParamNorms, **extra_args: Any) -> tuple[Band, State]:
        if scheduled and not (type(state) is tuple and len(state) == 2):
            raise ValueError(states.wrong(name, "a tuple of 2 states", states.described(state)))
        own, inner = state if scheduled else (optax.EmptyState(), state)
        (bound,), own = bounds.resolve([given], own, norms)
        band, inner = threshold.limit(norms, inner, param_norms, **extra_args)
        return alter(norms, band, bound), (own, inner) if scheduled else inner

    return Threshold(init, limit)


def _multiple(norm: jax.Array, end: Any, factor: Any, *, is_upper: bool) -> jax.Array:
    """An end of a band times a factor. No bound stays no bound: half of the largest float would be a bound."""
    highest = bounds.highest(norm.dtype)
    end, factor = (bounds.as_array(value, norm.dtype, none=np.nan) for value in (end, factor))
    # Not for an end that is no bound, nor for NaN, nor if the product overflows.
    fits = end < (1 - 2.0**-20) * highest / jnp.maximum(factor, 1)
    product = jnp.where(fits, end, jnp.ones_like(norm)) * jnp.where(fits, factor, jnp.ones_like(norm))
    beyond = highest if is_upper else jnp.where(jnp.isnan(end) | jnp.isnan(factor), 0, highest)
    return jnp.where(fits, product, beyond)


def _not_below(norm: jax.Array, upper: Any, floor: Any) -> jax.Array:
    highest = bounds.highest(norm.dtype)
    upper = bounds.as_array(upper, norm.dtype)
    limit = jnp.where(upper < highest, upper, jnp.full_like(norm, highest))  # NaN means no bound
    return jnp.fmax(limit, jnp.minimum(bounds.as_array(floor, norm.dtype, none=0), highest))


def _tighter(fn: Callable[..., jax.Array], norms: Norms, one: Any, other: Any, nothing: float | None) -> Any:
    """The tighter of two ends. Either may be `nothing`, the value that means no bound."""
    for end, rest in ((one, other), (other, one)):
        if end is nothing or (isinstance(end, float) and end == nothing):
            return rest
    return groups.over_groups(fn, norms, one, other)


# In both, None and NaN mean no bound, so the other end applies.
def _larger(norm: jax.Array, one: Any, other: Any) -> jax.Array:
    return jnp.fmax(*(bounds.as_array(end, norm.dtype, none=0) for end in (one, other)))


def _smaller(norm: jax.Array, one: Any, other: Any) -> jax.Array:
    highest = bounds.highest(norm.dtype)
    return jnp.fmin(*(jnp.minimum(bounds.as_array(end, norm.dtype), highest) for end in (one, other)))
