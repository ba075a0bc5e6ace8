"""Thresholds from quantiles of the norms: of the last norms, of all norms so far, or estimated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Number
from optaxclip._numerics import tracking
from optaxclip.core import Threshold
from optaxclip.thresholds.histogram import MAX_GROUPS, rule_of_all
from optaxclip.thresholds.ordering import in_order, interpolated
from optaxclip.thresholds.rules import Rule, bounded_at_first, no_steps, per_group


class RecentNormsState(NamedTuple):
    """State of `quantile` with a window and of `order_statistic`, per group.

    Attributes:
      recent_norms: ring of the last norms; 0 is an empty place.
      norms_seen: int32, the number of norms that entered the ring.
    """

    recent_norms: jax.Array
    norms_seen: jax.Array


def quantile(
    quantile: Number, *, window: int | None = None, warmup_steps: int = 25, warmup_max_norm: Number | None = None
) -> Threshold:
    r"""Bounds a norm by a quantile of all norms so far, the current one included.

    .. math:: bound_t = \mathrm{quantile}(\{n_1, \dots, n_t\}, q)

    By default, the first norm is its own quantile, so it is not bounded. If your run can explode at once, pass
    `warmup_max_norm=`.

    Args:
      quantile: q in [0, 1], interpolated linearly as in `numpy.quantile`.
      window: how many of the last norms count, at least 1; the quantile is then exact. None keeps the whole history:
        exact for the first 64 norms, then as a histogram, for at most 1,024 groups.
      warmup_steps: how many norms `warmup_max_norm` also bounds; at least 0.
      warmup_max_norm: bound on the norm in the warm-up, positive. Raw norms enter the history, so a quantile near 1
        needs a longer warm-up. None bounds by the quantile alone.

    Returns:
      A Threshold. Its state per group is 4 bytes per norm of the window and 4 more, or 40 KiB without a window.

    Raises:
      ValueError: if an argument is out of range; at init, without a window and with more than 1,024 groups.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.quantile(0.5, window=3))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 4.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    Notes:
      - Histogram: its 10,160 bins are spread evenly over the logarithms of all normal float32 numbers, so the quantile
        is accurate to 0.9 %.
      - Edge cases: zero and non-finite norms do not enter the history.

    See also:
      `autoclip`; `order_statistic`, without interpolation; `tracked_quantile`, with one number of state.
    """
    checks.static_together(window=window, warmup_steps=warmup_steps)
    quantile = checks.number("quantile", quantile, at_most=1.0)
    warmup_steps = checks.whole("warmup_steps", warmup_steps, at_least=0)
    if warmup_max_norm is not None:
        warmup_max_norm = checks.number("warmup_max_norm", warmup_max_norm, positive=True)
    of_history = rule_of_all(quantile) if window is None else _of_window(quantile, window)

    def so_far(state: Any) -> tuple[jax.Array, Any]:
        # Outliers do not spoil a quantile, so raw norms enter its history.
        return state.norms_seen < warmup_steps, np.inf

    rule = bounded_at_first(of_history, warmup_max_norm, so_far)
    return per_group(rule, max_groups=MAX_GROUPS if window is None else None)


def _of_window(quantile: Number, window: int) -> Rule:
    """The quantile of the last norms, the current one included."""

    def bound_of(ring: jax.Array) -> jax.Array:
        there = jnp.where(ring > 0, ring, jnp.full_like(ring, bounds.highest(ring.dtype)))
        return interpolated(quantile, jnp.sum(ring > 0, dtype=jnp.int32), in_order(there), ring.dtype)

    return _of_recent(window, bound_of, prefilled=False)


def order_statistic(percentile: Number = 5.0, *, window: int = 100) -> Threshold:
    r"""Bounds a norm by one of the last `window` norms, chosen so that `percentile` percent of them are smaller.

    .. math:: bound = s_k, \qquad k = \min(\lfloor p w / 100 \rfloor, w - 1), \qquad s_0 \le \dots \le s_{w-1}

    The window includes the current norm. The first norm fills the whole window, so it is not bounded. If your run can
    explode at once, `chain` this with a `constant`.

    Args:
      percentile: p in [0, 100]; 100 means no bound. There is no interpolation. A number between 0 and 1 raises a
        warning, because it may be meant as a fraction.
      window: w, the number of norms, at least 1.

    Returns:
      A Threshold. Per group, its state is 4 bytes per norm of the window, and 4 more.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.order_statistic(25.0, window=4))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 1.0, 4.0):  # 1, 2, 2, 4
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    Notes:
      - Edge cases: zero and non-finite norms do not enter the history.

    See also:
      `contrib.percentile_clip`; `quantile`, which interpolates.
    """
    checks.static_together(window=window)
    percentile = checks.percentile("percentile", percentile)

    def entry(ring: jax.Array) -> jax.Array:
        place = jnp.floor(jnp.asarray(percentile * window / 100, ring.dtype)).astype(jnp.int32)
        return in_order(ring)(jnp.clip(place, 0, window - 1))

    return per_group(_of_recent(window, entry, prefilled=True))


def _of_recent(window: int, bound_of: Callable[[jax.Array], jax.Array], *, prefilled: bool) -> Rule:
    """A bound computed from the ring of the last norms. If `prefilled`, a norm fills all empty places."""
    window = checks.whole("window", window)

    def init(dtype: Any) -> RecentNormsState:
        return RecentNormsState(jnp.zeros(window, dtype), no_steps())

    def limit(norm: jax.Array, state: RecentNormsState) -> tuple[Any, RecentNormsState]:
        ring, seen = state
        ring = jnp.where((ring > 0) | (not prefilled), ring, norm).at[seen % window].set(norm)
        return (0.0, bound_of(ring)), RecentNormsState(ring, jnp.asarray(optax.safe_increment(seen)))

    return Rule(init, limit)


class TrackedQuantileState(NamedTuple):
    """State of `tracked_quantile`, per group.

    Attributes:
      tracked_log_norm: logarithm of the estimate. The estimate itself would accumulate a rounding error at every step.
    """

    tracked_log_norm: jax.Array


def tracked_quantile(quantile: Number = 0.5, *, learning_rate: Number = 0.2, initial: Number = 1.0) -> Threshold:
    r"""Bounds a norm by an estimate of a quantile of the norms, which changes by a factor at each step.

    .. math:: c \leftarrow c \cdot \exp(-learning\_rate \cdot (1[n \le c] - q))

    Args:
      quantile: q in [0, 1].
      learning_rate: learning rate of the logarithm, at least 0. `optax.inject_hyperparams` lets it decay.
      initial: the first bound, positive and finite.

    Returns:
      A Threshold. Its state is 4 bytes per group.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.tracked_quantile(0.5))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 2.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates.round(3))  # the exponential of 0.1
      [1.105]

    Notes:
      - Precision: the logarithm of c moves in fixed steps, so it never settles. At the default rate it wanders around
        the quantile with a standard deviation of 0.12 to 0.25.
      - Edge cases: the first bound is `initial`, whatever the norms are. The estimate stays in the normal float range.
        Zero and non-finite norms do not enter the history.

    See also:
      `contrib.clip_by_tracked_quantile`; `quantile`, which keeps the norms and needs more state.
    """
    quantile = checks.number("quantile", quantile, at_most=1.0)
    learning_rate = checks.number("learning_rate", learning_rate, below=np.inf)
    initial = checks.number("initial", initial, positive=True, below=np.inf)

    def limit(norm: jax.Array, state: TrackedQuantileState) -> tuple[Any, TrackedQuantileState]:
        bound = tracking.estimate(state.tracked_log_norm)
        share = (norm <= bound).astype(bound.dtype)  # the share of one norm: 0 or 1
        moved_on = tracking.moved(state.tracked_log_norm, share, quantile, learning_rate)
        return (0.0, bound), TrackedQuantileState(moved_on)

    return per_group(Rule(lambda dtype: TrackedQuantileState(jnp.log(jnp.asarray(initial, dtype))), limit))
