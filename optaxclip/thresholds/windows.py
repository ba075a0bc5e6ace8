"""Thresholds from a window: the last norms of each group, in a ring.

The ring holds 0 where there is no norm yet, and how many norms it holds is counted there. So a ring that was restored
into one of another length, cut off or filled up with zeros, is a ring with other norms in it, and nothing disagrees.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import arithmetic, bounds, checks
from optaxclip.core import Threshold
from optaxclip.thresholds.histogram import quantile_of_all
from optaxclip.thresholds.ordering import in_order, interpolated
from optaxclip.thresholds.rules import Rule, no_steps, per_group, taken_in


class WindowState(NamedTuple):
    """State of `mean_std`, per group.

    Attributes:
      window_norms: ring of the last norms taken in; 0 where there is none yet.
      window_seen: int32, norms taken in.
      window_spikes: int32, spikes in a row.
    """

    window_norms: jax.Array
    window_seen: jax.Array
    window_spikes: jax.Array


def mean_std(
    num_std: Any = 3.0,
    *,
    window: int = 128,
    min_count: int = 64,
    ddof: int = 0,
    include_current: bool = False,
    take_in: str = "clipped",
    patience: int | None = None,
) -> Threshold:
    r"""A norm may be at most `num_std` standard deviations above the mean of the last ones.

    .. math:: bound = \mu + k \cdot \max(\sigma, 10^{-6} \max(\mu, 1))

    Args:
      num_std: the number k of standard deviations, at least 0.
      window: how many norms are kept.
      min_count: nothing is bounded before so many norms are there, the current one included if `include_current`.
      ddof: the variance divides by the number of norms less this; 0 or 1.
      include_current: whether the norm that is to be bounded counts in mean and deviation.
      take_in: `"clipped"` takes in a norm as it is after clipping, so that one spike does not make room for the next;
        `"raw"` as it was, which follows a rise sooner.
      patience: after so many spikes in a row norms are taken in as they were, so that a lasting rise is followed. None
        never does.

    Returns:
      A Threshold. Its state is 4 bytes per norm of the window, and 8 more, per group.

    Edge cases:
      The first `min_count` norms pass. Where all norms in the window are the same, the deviation is a millionth of
      their mean, or 1e-6 if that is below 1. A norm of 0, an infinite or a NaN norm is not taken in.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.mean_std(2.0, window=4, min_count=2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 9.0):  # 2, and twice 1
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [4.]

    See also:
      `clip_by_history`; `skip_spikes`, for which it is made; `zscore`, without a window.
    """
    checks.static_together(
        window=window, min_count=min_count, ddof=ddof, include_current=include_current, patience=patience
    )
    num_std = checks.number("num_std", num_std)
    window = checks.whole("window", window)
    min_count = checks.whole("min_count", min_count)
    if min_count > window:
        raise ValueError(f"min_count must be at most window, got min_count={min_count} and window={window}")
    if not (checks.is_whole(ddof) and ddof in (0, 1)):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    checks.flag("include_current", include_current)
    checks.one_of("take_in", take_in, ("clipped", "raw"))
    patience = checks.whole_or_none("patience", patience)

    def limit(norm: jax.Array, state: WindowState) -> tuple[Any, WindowState]:
        ring, seen, spikes = state
        place = seen % window
        values = ring.at[place].set(norm) if include_current else ring
        number = jnp.sum(values > 0)
        mean, std = _mean_and_std(values, ddof)
        bound = mean + jnp.asarray(num_std, norm.dtype) * jnp.maximum(std, 1e-6 * jnp.maximum(mean, 1))
        is_spike = (number >= min_count) & (norm > bound)
        value, spikes = taken_in(patience, spikes, is_spike, norm, bound)
        value = norm if take_in == "raw" else value
        upper = jnp.where(number >= min_count, bound, bounds.highest(norm.dtype))
        return (0.0, upper), WindowState(ring.at[place].set(value), jnp.asarray(optax.safe_increment(seen)), spikes)

    def init(dtype: Any) -> WindowState:
        return WindowState(jnp.zeros(window, dtype), no_steps(), no_steps())

    return per_group(Rule(init, limit))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _mean_and_std_of(ring: jax.Array, ddof: int) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the positive values, whose squares may lie outside the float range."""
    there = ring > 0
    largest = jnp.max(ring)
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    shares = arithmetic.quotient(ring, largest)
    mean = jnp.sum(shares) / _number(ring, 0)
    away = jnp.where(there, shares - mean, jnp.zeros_like(shares))
    variance = jnp.sum(jnp.square(away)) / _number(ring, ddof)
    return mean * largest, jnp.sqrt(variance) * largest


@_mean_and_std_of.defjvp
def _mean_and_std_jvp(ddof: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # That of the above would go through the reciprocals of the smallest norms, and add up many of them.
    (ring,), (change,) = primals, tangents
    mean, std = _mean_and_std(ring, ddof)
    away = arithmetic.quotient(ring - mean, jnp.where(std > 0, std, jnp.ones_like(std)))
    weights = jnp.where((ring > 0) & (std > 0), away, jnp.zeros_like(ring)) / _number(ring, ddof)
    d_mean = jnp.sum(jnp.where(ring > 0, change, jnp.zeros_like(change)) / _number(ring, 0))
    return (mean, std), (d_mean, jnp.sum(weights * change))


# Jitted, so that eager calls do not compile operation by operation.
_mean_and_std = jax.jit(_mean_and_std_of, static_argnums=1)


def _number(ring: jax.Array, less: int) -> jax.Array:
    """How many values are positive, less a number; at least 1."""
    return jnp.maximum(jnp.sum(ring > 0) - less, 1).astype(ring.dtype)


class RecentNormsState(NamedTuple):
    """State of `quantile` with a window and of `order_statistic`, per group.

    Attributes:
      recent_norms: ring of the last norms; 0 where there is none yet.
      norms_seen: int32, norms taken in.
    """

    recent_norms: jax.Array
    norms_seen: jax.Array


def quantile(q: Any, *, window: int | None = None) -> Threshold:
    """A norm may be at most a quantile of all norms so far, itself among them, interpolated as in `numpy.quantile`.

    Args:
      q: which quantile, in [0, 1].
      window: of how many of the last norms, exactly. None is the whole history: exactly for the first 64 norms, then
        in a histogram whose 10,160 bins are spread evenly over the logarithms of all normal float32, so that the
        quantile is right to 0.9 %. For at most 1,024 groups.

    Returns:
      A Threshold. Its state is per group: 40 KiB without a window, 4 bytes per norm of it and 4 more with one.

    Edge cases:
      The first norm is its own quantile, and passes. A norm of 0, an infinite or a NaN norm is not taken in.

    Raises:
      ValueError: if `q` or `window` is out of range; at init, without a window and with more than 1,024 groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.quantile(0.5, window=3))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 4.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    See also:
      `autoclip`; `order_statistic`, without interpolation; `tracked_quantile`, with hardly any state.
    """
    checks.static_together(window=window)
    q = checks.number("q", q, at_most=1.0)
    if window is None:
        return quantile_of_all(q)

    def bound_of(ring: jax.Array) -> jax.Array:
        there = jnp.where(ring > 0, ring, jnp.full_like(ring, bounds.highest(ring.dtype)))
        return interpolated(q, jnp.sum(ring > 0, dtype=jnp.int32), in_order(there), ring.dtype)

    return _of_recent(window, bound_of, prefilled=False)


def order_statistic(percentile: Any = 5.0, *, window: int = 100) -> Threshold:
    """A norm may be at most one of the last `window` norms, itself among them: the one that many percent from below.

    The first norm fills the whole window. There is no interpolation: of the window in ascending order, the entry
    `floor(percentile * window / 100)` is taken, or the last.

    Args:
      percentile: in [0, 100]; 100 bounds nothing. A number between 0 and 1 warns: it may be meant as a fraction.
      window: how many norms.

    Returns:
      A Threshold. Its state is 4 bytes per norm of the window, and 4 more, per group.

    Edge cases:
      The first norm fills the whole window, and passes. A norm of 0, an infinite or a NaN norm is not taken in.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.order_statistic(25.0, window=4))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 1.0, 4.0):  # 1, 2, 2, 4
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    See also:
      `percentile_clip`; `quantile`, which interpolates.
    """
    checks.static_together(window=window)
    percentile = checks.percentile("percentile", percentile)

    def entry(ring: jax.Array) -> jax.Array:
        place = jnp.floor(jnp.asarray(percentile * window / 100, ring.dtype)).astype(jnp.int32)
        return in_order(ring)(jnp.clip(place, 0, window - 1))

    return _of_recent(window, entry, prefilled=True)


def _of_recent(window: int, bound_of: Callable[[jax.Array], jax.Array], *, prefilled: bool) -> Threshold:
    """A bound calculated from the ring of the last norms; `prefilled`, a norm takes every place that has none yet."""
    window = checks.whole("window", window)

    def init(dtype: Any) -> RecentNormsState:
        return RecentNormsState(jnp.zeros(window, dtype), no_steps())

    def limit(norm: jax.Array, state: RecentNormsState) -> tuple[Any, RecentNormsState]:
        ring, seen = state
        ring = jnp.where((ring > 0) | (not prefilled), ring, norm).at[seen % window].set(norm)
        return (0.0, bound_of(ring)), RecentNormsState(ring, jnp.asarray(optax.safe_increment(seen)))

    return per_group(Rule(init, limit))
