"""Thresholds from moving averages: a few numbers of state per group."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Number
from optaxclip._numerics import arithmetic, averages, tree_norms
from optaxclip.core import Threshold
from optaxclip.thresholds.rules import Rule, no_steps, per_group


class AverageState(NamedTuple):
    """State of `ema_ratio` and `ema_band`, per group.

    Attributes:
      norm_average: moving average of the clipped norms.
      norms_seen: int32, the number of norms in the average.
    """

    norm_average: jax.Array
    norms_seen: jax.Array


def ema_ratio(
    ratio: Number = 1.05,
    *,
    decay: Number = 0.98,
    warmup_steps: int = 100,
    warmup_max_norm: Number | None = None,
    warmup_take_in: str = "raw",
) -> Threshold:
    r"""Bounds a norm by `ratio` times the moving average of the clipped norms, as AdaGC does.

    .. math:: bound = ratio \cdot \gamma, \qquad \gamma \leftarrow decay \cdot \gamma + (1 - decay) \min(n, bound)

    By default, norms are not bounded in the warm-up. If your run can explode at once, pass `warmup_max_norm=`.

    Args:
      ratio: the permitted multiple of the average, at least 0.
      decay: decay of the average, in [0, 1).
      warmup_steps: before this step the average is the smallest norm so far. The first step always belongs to the
        warm-up.
      warmup_max_norm: in the warm-up, all groups are scaled together so that the norm of their norms is at most this;
        positive. None is no bound.
      warmup_take_in: which norms enter the average in the warm-up. `"raw"`: as measured. `"clipped"`: after clipping,
        as published; a spike of one group then shrinks the averages of all.

    Returns:
      A Threshold. Its state is 8 bytes per group.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.ema_ratio(1.5, warmup_steps=2))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 8.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [1.5]

    Notes:
      - Level shifts: the average grows by at most `(ratio - 1) * (1 - decay)` per step, so at the defaults it takes
        2,300 steps to follow a tenfold rise. If levels shift, raise `ratio` or lower `decay`.
      - Edge cases: a norm of 0 does not enter its average. If the norm of any group is non-finite, no group is clipped
        and no average changes.

    See also:
      `adagc`; `ema_band`, with a lower end; `average`.
    """
    checks.static_together(warmup_steps=warmup_steps)
    ratio = checks.number("ratio", ratio)
    decay = checks.number("decay", decay, below=1.0)
    warmup_steps = checks.whole("warmup_steps", warmup_steps, at_least=0)
    if warmup_max_norm is not None:
        warmup_max_norm = checks.number("warmup_max_norm", warmup_max_norm, positive=True)
    checks.one_of("warmup_take_in", warmup_take_in, ("clipped", "raw"))
    least = 1e-8  # the floor of average and norm in the published code

    def limit(norm: jax.Array, state: AverageState, total: jax.Array) -> tuple[Any, AverageState]:
        average, seen = state
        first = seen == 0
        warm = first | (seen + 1 < warmup_steps)
        together = jnp.full_like(norm, bounds.highest(norm.dtype))
        if warmup_max_norm is not None:
            most = jnp.asarray(warmup_max_norm, norm.dtype)
            # XLA (jax 0.10 and 0.12) multiplies by the reciprocal of a divisor that all groups share. The reciprocal of
            # the largest floats is subnormal, which counts as 0.
            down = jnp.where(total > 2.0**100, 2.0**-8 * jnp.ones_like(total), jnp.ones_like(total))
            share = arithmetic.quotient(norm * down, (total + least) * down)
            together = jnp.where(most < total + least, most * share, together)
        upper = jnp.where(warm, together, jnp.asarray(ratio, norm.dtype) * jnp.maximum(average, least))
        after = jnp.minimum(norm, upper)
        early = after if warmup_take_in == "clipped" else norm
        smallest = jnp.where(first, early, jnp.minimum(average, early))
        new = AverageState(
            jnp.where(warm, smallest, averages.moved(average, after, averages.shares(decay, norm.dtype))),
            jnp.asarray(optax.safe_increment(seen)),
        )
        usable = jnp.isfinite(total)
        kept = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, state)
        return (0.0, jnp.where(usable, upper, bounds.highest(norm.dtype))), kept

    return per_group(Rule(_no_average, limit, lambda norms: (tree_norms.norm_of_norms(norms, (), 2),)))


def ema_band(
    ratio: Number,
    *,
    min_ratio: Number | None = None,
    decay: Number = 0.98,
    min_norm: Number = 0.0,
    max_down: Number | None = None,
    max_up: Number | None = None,
    initial: Number | None = None,
) -> Threshold:
    r"""Keeps a norm between `min_ratio` and `ratio` times the moving average of the clipped norms, as AGGC does.

    .. math:: lower = \max(min\_ratio \cdot e,\ min\_norm), \quad upper = ratio \cdot e, \qquad
        e \leftarrow decay \cdot e + (1 - decay) n_{clipped}

    By default, the first norm is its own average, so a `ratio` of at least 1 does not bound it. If your run can explode
    at once, `chain` this with a `constant`.

    Args:
      ratio: the upper end as a multiple of the average, at least 0. Required: the published default works only together
        with `max_down`.
      min_ratio: the lower end as a multiple of the average, from 0 to 1 and at most `ratio`. None is 0.
      decay: decay of the average, in [0, 1).
      min_norm: a norm below this is raised to it, whatever the average is; at least 0 and finite.
      max_down: the smallest factor by which a norm is scaled, in [0, 1]. Norms can then exceed the bound. None allows
        any factor.
      max_up: the largest factor by which a norm is scaled, at least 1. None allows any factor.
      initial: the average before the first norm, at least 0 and finite. None takes the first norm. 0 is the published
        start.

    Returns:
      A Threshold. Its state is 8 bytes per group.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.ema_band(2.0, min_ratio=0.5))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 8.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    Notes:
      - Start at 0: an average of 0 is no bound, so the first norm is not clipped. With `initial=0` and `ratio=1` the
        average then never rises above `1 - decay` times the first norm, unless you pass `max_down`.
      - Edge cases: zero and non-finite norms do not enter the history.

    See also:
      `contrib.aggc`; `ema_ratio`, with a warm-up.
    """
    ratio = checks.number("ratio", ratio)
    decay = checks.number("decay", decay, below=1.0)
    min_norm = checks.number("min_norm", min_norm, below=np.inf)
    if min_ratio is not None:
        min_ratio = checks.number("min_ratio", min_ratio, at_most=1.0)
        checks.ordered("min_ratio", min_ratio, "ratio", ratio)
    if max_down is not None:
        max_down = checks.number("max_down", max_down, at_most=1.0)
    if max_up is not None:
        max_up = checks.number("max_up", max_up, at_least=1.0)
    if initial is not None:
        initial = checks.number("initial", initial, below=np.inf)

    def limit(norm: jax.Array, state: AverageState) -> tuple[Any, AverageState]:
        average, seen = state
        average = jnp.where((seen == 0) & (initial is None), norm, average)
        least, down, up = (
            None if value is None else jnp.asarray(value, norm.dtype) for value in (min_ratio, max_down, max_up)
        )
        # An average of 0 means no average yet.
        upper = jnp.where(average > 0, jnp.asarray(ratio, norm.dtype) * average, bounds.highest(norm.dtype))
        lower = jnp.maximum(0 if least is None else least * average, jnp.asarray(min_norm, norm.dtype))
        is_large = norm > upper
        upper = upper if down is None else jnp.maximum(upper, down * norm)
        lower = lower if up is None else jnp.minimum(lower, up * norm)
        # Only one end applies: if the ends cross, the lower one may lie above the upper one.
        lower, upper = jnp.where(is_large, 0, lower), jnp.where(is_large | (lower <= upper), upper, lower)
        after = jnp.minimum(jnp.maximum(norm, lower), upper)
        new = averages.moved(average, after, averages.shares(decay, norm.dtype))
        return (lower, upper), AverageState(new, jnp.asarray(optax.safe_increment(seen)))

    def init(dtype: Any) -> AverageState:
        start = jnp.zeros((), dtype) if initial is None else jnp.asarray(initial, dtype)
        return AverageState(start, no_steps())

    return per_group(Rule(init, limit))


class DebiasedState(NamedTuple):
    """State of `average`, per group.

    Attributes:
      moving_norm: debiased moving average of the norms.
      norms_seen: int32, the number of norms in the average.
    """

    moving_norm: jax.Array
    norms_seen: jax.Array


def average(decay: Number = 0.999) -> Threshold:
    r"""Bounds a norm by the debiased moving average of the norms, the current one included.

    .. math:: M \leftarrow \beta M + (1 - \beta) n, \qquad bound = M / (1 - \beta^t)

    The first norm is its own average, so it is not bounded. If your run can explode at once, `chain` this with a
    `constant`.

    Args:
      decay: :math:`\beta`, in [0, 1).

    Returns:
      A Threshold. Its state is 8 bytes per group.

    Raises:
      ValueError: if `decay` is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.average(0.5))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (4.0, 16.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)  # a third of 4 and two thirds of 16
      [12.]

    Notes:
      - Edge cases: zero and non-finite norms do not enter the history.

    See also:
      `contrib.adaptive_spike_clip`; `ema_ratio`, an average of clipped norms.
    """
    decay = checks.number("decay", decay, below=1.0)

    def limit(norm: jax.Array, state: DebiasedState) -> tuple[Any, DebiasedState]:
        seen = jnp.asarray(optax.safe_increment(state.norms_seen))
        bound = averages.moved(state.moving_norm, norm, averages.debiased(decay, seen, norm.dtype))
        return (0.0, bound), DebiasedState(bound, seen)

    return per_group(Rule(lambda dtype: DebiasedState(jnp.zeros((), dtype), no_steps()), limit))


class GrowthState(NamedTuple):
    """State of `growth`, per group.

    Attributes:
      last_norm: the last clipped norm; 0 before the first.
    """

    last_norm: jax.Array


def growth(ratio: Number = 1.01) -> Threshold:
    r"""Bounds a norm by `ratio` times the last clipped norm.

    .. math:: bound = ratio \cdot (n_{prev} + 10^{-8})

    The first norm is not bounded. If your run can explode at once, `chain` this with a `constant`.

    Args:
      ratio: the permitted growth per step, positive.

    Returns:
      A Threshold. Its state is 4 bytes per group.

    Raises:
      ValueError: if `ratio` is not positive.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.growth(1.5))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 8.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [1.5]

    Notes:
      - Edge cases: zero and non-finite norms do not enter the history.

    See also:
      `contrib.clip_norm_growth`; `ema_ratio`, for a multiple of an average.
    """
    ratio = checks.number("ratio", ratio, positive=True)

    def limit(norm: jax.Array, state: GrowthState) -> tuple[Any, GrowthState]:
        bound = jnp.asarray(ratio, norm.dtype) * (state.last_norm + 1e-8)
        # 0 means no norm yet, so a bound must not be 0.
        bound = jnp.where(
            state.last_norm > 0, jnp.maximum(bound, jnp.finfo(norm.dtype).tiny), bounds.highest(norm.dtype)
        )
        return (0.0, bound), GrowthState(jnp.minimum(norm, bound))

    return per_group(Rule(lambda dtype: GrowthState(jnp.zeros((), dtype)), limit))


def _no_average(dtype: Any) -> AverageState:
    return AverageState(jnp.zeros((), dtype), no_steps())
