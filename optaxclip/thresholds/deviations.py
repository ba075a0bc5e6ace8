"""Thresholds from the mean and the standard deviation of norms: of the last norms, or as moving averages."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Number
from optaxclip._numerics import arithmetic, averages
from optaxclip.core import Threshold
from optaxclip.records import moments
from optaxclip.thresholds.rules import (
    Rule,
    RuleState,
    bounded_at_first,
    exponential,
    no_steps,
    of_logarithms,
    per_group,
    taken_in,
)

_CLIP_TO = ("reciprocal", "mean", "edge")


class _Scale(NamedTuple):
    """The scale of the statistics of a rule: how to apply the rule to norms, and the norm that a mean stands for."""

    applied: Callable[[Rule], Rule]
    as_norm: Callable[[jax.Array], jax.Array]


_SCALES = {
    "linear": _Scale(lambda rule: rule, lambda mean: mean),
    "log": _Scale(of_logarithms, exponential),
}


class ZScoreState(NamedTuple):
    """State of `zscore`, per group.

    Attributes:
      zscore_mean: moving average of the norms, with spikes clipped.
      zscore_std: their standard deviation, the root of a moving average of squares. The squares themselves could
        overflow.
      zscore_seen: int32, the number of norms that entered the statistics.
      zscore_spikes: int32, spikes in a row.
    """

    zscore_mean: jax.Array
    zscore_std: jax.Array
    zscore_seen: jax.Array
    zscore_spikes: jax.Array


class LogZScoreState(NamedTuple):
    """State of `zscore` with `scale="log"`: as `ZScoreState`, of the logarithms of the norms.

    It is a separate type, so that statistics of one scale are never used for the other.
    """

    zscore_log_mean: jax.Array
    zscore_log_std: jax.Array
    zscore_seen: jax.Array
    zscore_spikes: jax.Array


def zscore(
    num_std: Number = 2.5,
    *,
    decay: Number = 0.97,
    warmup_steps: int = 25,
    warmup_max_norm: Number | None = None,
    patience: int | None = 33,
    clip_to: str = "reciprocal",
    scale: str = "linear",
) -> Threshold:
    r"""Brings spikes (norms many standard deviations above a moving average) close to that average, as ZClip does.

    With mean :math:`\mu`, standard deviation :math:`\sigma` and :math:`z = (n - \mu) / (\sigma + 10^{-6})`, a norm with
    :math:`z > k` may be at most :math:`\mu + k^2 \sigma / z`. Other norms are not clipped: their limit is the level
    above which a norm is a spike, :math:`\mu + k (\sigma + 10^{-6})`.

    By default, the first `warmup_steps` norms are not bounded. If your run can explode at once, pass
    `warmup_max_norm=`.

    Args:
      num_std: k, the number of standard deviations that makes a norm a spike, positive.
      decay: decay of mean and variance, in [0, 1). A spike enters them as its bound, other norms as measured.
      warmup_steps: how many norms are averaged before the first can be a spike; at least 1.
      warmup_max_norm: bound on the norm in the warm-up, positive. Set it to about the size of your norms. In the
        statistics, a warm-up norm counts as at most the larger of this bound and ten times the mean so far. So one huge
        norm does not spoil the statistics, unless the bound is far above your norms: for example a bound of 1 for norms
        of 0.01. None is no bound, and raw norms enter the statistics.
      patience: after this many spikes in a row, raw norms enter the statistics, so that these follow a lasting rise.
        With None they never do, as in the published method.
      clip_to: what a spike is clipped to. `"reciprocal"` is the formula above: the larger the spike, the lower its
        bound. `"mean"` is :math:`\mu`. `"edge"` is :math:`\mu + k \sigma`, which is also where spikes then begin.
      scale: `"linear"`, or `"log"` for mean, deviation and bound of the logarithm of the norm. Norms of minibatches
        scatter by factors, so fewer ordinary steps stand out on a log scale. In the statistics, no logarithm counts as
        further below the mean than the bound is above it. So a batch of padding does not widen the band.

    Returns:
      A Threshold. Its state is 16 bytes per group.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_norm(), thresholds.zscore(warmup_steps=4))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 1.2, 0.8, 1.0, 3.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.4f}")
      1.0625

    Notes:
      - Constant norms: after a warm-up of equal norms, every larger norm is a spike until `patience` runs out.
      - Small norms: the 1e-6 is absolute, so with `scale="linear"` norms far below it are never spikes.
      - Edge cases: zero and non-finite norms do not enter the history.
      - Losses: as `loss_threshold` of `skip_spikes` it judges losses of any sign. With `scale="log"` or
        `warmup_max_norm` it judges positive ones only.

    See also:
      `zclip`; `mean_std`, whose window forgets.
    """
    checks.static_together(warmup_steps=warmup_steps, patience=patience)
    num_std = checks.number("num_std", num_std, positive=True)
    decay = checks.number("decay", decay, below=1.0)
    warmup_steps = checks.whole("warmup_steps", warmup_steps)
    patience = checks.whole_or_none("patience", patience)
    if warmup_max_norm is not None:
        warmup_max_norm = checks.number("warmup_max_norm", warmup_max_norm, positive=True)
    checks.one_of("clip_to", clip_to, _CLIP_TO)
    checks.one_of("scale", scale, tuple(_SCALES))

    kind = LogZScoreState if scale == "log" else ZScoreState

    def init(dtype: Any) -> RuleState:
        return kind(jnp.zeros((), dtype), jnp.zeros((), dtype), no_steps(), no_steps())

    def limit(norm: jax.Array, state: RuleState) -> tuple[Any, RuleState]:
        mean, std, seen, spikes = state
        most = jnp.asarray(num_std, norm.dtype)
        warm = seen < warmup_steps
        # Whether z, the number of deviations, is above num_std: without the division, which may overflow.
        away = norm - mean
        is_far = away > most * (std + 1e-6)
        one, other = jnp.where(is_far, std + 1e-6, jnp.zeros_like(std)), jnp.where(is_far, away, jnp.ones_like(away))
        share = arithmetic.quotient(one, other)  # 1 / z; 0 where it is not used, for a finite derivative
        above = {"reciprocal": most * (std * (most * share)), "mean": jnp.zeros_like(std), "edge": most * std}
        bound = mean + above[clip_to]
        is_spike = ~warm & (norm > bound if clip_to == "edge" else is_far)
        value, spikes = taken_in(patience, spikes, is_spike, norm, bound)
        if scale == "log":  # a norm is never far below the mean, but its logarithm may be
            value = jnp.where(warm, value, jnp.maximum(value, mean - most * (std + 1e-6)))
        seen = jnp.asarray(optax.safe_increment(seen))
        # In the warm-up, the plain mean and population variance of all norms so far, by Welford's method; then the
        # moving averages. Welford multiplies the distances of the value from the old and the new mean. The moving
        # variance takes the square of the distance from the new mean.
        plain, moving = _shares_of_all(seen, norm.dtype), averages.shares(decay, norm.dtype)
        by = averages.Shares(*(jnp.where(warm, one, other) for one, other in zip(plain, moving, strict=True)))
        distance = jnp.minimum(jnp.abs(value - mean), bounds.highest(norm.dtype))  # inf would stay in the average
        left = jnp.where(warm, arithmetic.root(by.old), by.old) * distance
        new = kind(averages.moved(mean, value, by), averages.power_mean(std, left, by, 2), seen, spikes)
        level = bound if clip_to == "edge" else mean + most * (std + 1e-6)
        upper = jnp.where(is_spike, bound, jnp.maximum(level, norm))  # by rounding, the level may be below the norm
        return (0.0, jnp.where(warm, bounds.highest(norm.dtype), upper)), new

    def so_far(state: RuleState) -> tuple[jax.Array, jax.Array]:
        mean, _, seen, _ = state
        return seen < warmup_steps, jnp.where(seen > 0, as_norm(mean), jnp.zeros_like(mean))

    applied, as_norm = _SCALES[scale]
    return per_group(bounded_at_first(applied(Rule(init, limit, signed=True)), warmup_max_norm, so_far))


@moments.of_kind.register
def _of_zscore(state: ZScoreState) -> tuple[jax.Array, jax.Array]:
    return state.zscore_mean, state.zscore_std


@moments.of_kind.register
def _of_log_zscore(state: LogZScoreState) -> tuple[jax.Array, jax.Array]:
    return state.zscore_log_mean, state.zscore_log_std


class MomentsState(NamedTuple):
    """State of `normalised`, per group.

    Attributes:
      norm_mean: debiased moving average of the norms.
      norm_rms: root of the debiased moving average of their squares.
      norms_seen: int32, the number of norms in the averages.
    """

    norm_mean: jax.Array
    norm_rms: jax.Array
    norms_seen: jax.Array


def normalised(b1: Number = 0.7, b2: Number = 0.9, *, eps: Number = 1e-8) -> Threshold:
    r"""Brings every norm except 0 to :math:`\hat m / (\sqrt{\hat v} + \epsilon)`: near 1, and less if norms vary.

    .. math:: m \leftarrow b_1 m + (1 - b_1) n, \qquad v \leftarrow b_2 v + (1 - b_2) n^2

    Args:
      b1: decay of the average of norms, in [0, 1).
      b2: decay of the average of their squares, in [0, 1).
      eps: added to the root, at least 0.

    Returns:
      A Threshold. Its state is 12 bytes per group.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.normalised())
      >>> updates, _ = tx.update(jnp.array([30.0, 40.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [0.6 0.8]

    Notes:
      - Edge cases: the first norm becomes 1, up to `eps`. A norm of 0 stays 0, and enters the averages. A non-finite
        norm does not enter them.

    See also:
      `contrib.scale_by_adaptive_norm`; `exactly`, for a norm that is always the same.
    """
    b1 = checks.number("b1", b1, below=1.0)
    b2 = checks.number("b2", b2, below=1.0)
    eps = checks.number("eps", eps)

    def limit(norm: jax.Array, state: MomentsState) -> tuple[Any, MomentsState]:
        seen = jnp.asarray(optax.safe_increment(state.norms_seen))
        mean = averages.moved(state.norm_mean, norm, averages.debiased(b1, seen, norm.dtype))
        rms = averages.power_mean(state.norm_rms, norm, averages.debiased(b2, seen, norm.dtype), 2)
        root = rms + eps
        goal = arithmetic.quotient(mean, jnp.where(root > 0, root, jnp.ones_like(root)))
        return (goal, goal), MomentsState(mean, rms, seen)

    def init(dtype: Any) -> MomentsState:
        return MomentsState(jnp.zeros((), dtype), jnp.zeros((), dtype), no_steps())

    return per_group(Rule(init, limit, takes_zero=True))


def _shares_of_all(seen: jax.Array, dtype: Any) -> averages.Shares:
    """The shares of old and new that give all values so far the same weight."""
    whole = seen.astype(dtype)
    return averages.Shares((whole - 1) / whole, 1 / whole)


class WindowState(NamedTuple):
    """State of `mean_std`, per group.

    Attributes:
      window_norms: ring of the last norms. 0 is an empty place; a value of 0 is stored as twice the smallest normal
        float.
      window_seen: int32, the number of norms that entered the window.
      window_spikes: int32, spikes in a row.
    """

    window_norms: jax.Array
    window_seen: jax.Array
    window_spikes: jax.Array


class LogWindowState(NamedTuple):
    """State of `mean_std` with `scale="log"`: as `WindowState`, of the logarithms of the norms.

    It is a separate type, so that statistics of one scale are never used for the other.
    """

    window_logs: jax.Array
    window_seen: jax.Array
    window_spikes: jax.Array


def mean_std(
    num_std: Number = 3.0,
    *,
    window: int = 128,
    warmup_steps: int = 64,
    warmup_max_norm: Number | None = None,
    ddof: int = 0,
    include_current: bool = False,
    take_in: str = "clipped",
    patience: int | None = None,
    scale: str = "linear",
) -> Threshold:
    r"""Bounds a norm by `num_std` standard deviations above the mean of the last norms.

    .. math:: bound = \mu + k \cdot \max(\sigma, 10^{-6} \max(|\mu|, 1))

    By default, the first `warmup_steps` norms are not bounded. If your run can explode at once, pass
    `warmup_max_norm=`.

    Args:
      num_std: k, the number of standard deviations, at least 0.
      window: how many norms are kept, at least 1.
      warmup_steps: how many norms the window needs before it bounds the next, from 1 to `window`. With
        `include_current`, the current norm counts too.
      warmup_max_norm: bound on the norm in the warm-up, positive. Set it to about the size of your norms. In the
        statistics, a warm-up norm counts as at most the larger of this bound and ten times the mean so far. So one huge
        norm does not spoil the statistics, unless the bound is far above your norms: for example a bound of 1 for norms
        of 0.01. None is no bound, and raw norms enter the statistics.
      ddof: the variance divides by the number of norms minus this; 0 or 1.
      include_current: whether mean and deviation include the current norm.
      take_in: which norms enter the window. `"clipped"`: after clipping, so one spike does not make room for the next.
        `"raw"`: as measured, which follows a rise sooner.
      patience: after this many spikes in a row, raw norms enter the window, so that the bound follows a lasting rise.
        With None they never do.
      scale: `"linear"`, or `"log"` for mean, deviation and bound of the logarithm of the norm. Norms of minibatches
        scatter by factors, so fewer ordinary steps stand out on a log scale. In the statistics, no logarithm counts as
        further below the mean than the bound is above it. So a batch of padding does not widen the band.

    Returns:
      A Threshold. Per group, its state is 4 bytes per norm of the window, and 8 more.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.mean_std(2.0, window=4, warmup_steps=2))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 9.0):  # mean 2, deviation 1
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [4.]

    Notes:
      - Constant norms: if all norms in the window are equal, the deviation is a millionth of their mean, or 1e-6 if the
        mean is below 1.
      - Edge cases: zero and non-finite norms do not enter the history.
      - Losses: as `loss_threshold` of `skip_spikes` it judges losses of any sign. With `scale="log"` or
        `warmup_max_norm` it judges positive ones only.

    See also:
      `clip_by_history`; `skip_spikes`, which can use it; `zscore`, without a window.
    """
    checks.static_together(
        window=window, warmup_steps=warmup_steps, ddof=ddof, include_current=include_current, patience=patience
    )
    num_std = checks.number("num_std", num_std)
    window = checks.whole("window", window)
    warmup_steps = checks.whole("warmup_steps", warmup_steps)
    if warmup_steps > window:
        raise ValueError(f"warmup_steps must be at most window, got warmup_steps={warmup_steps} and window={window}")
    if not (checks.is_whole(ddof) and ddof in (0, 1)):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if warmup_max_norm is not None:
        warmup_max_norm = checks.number("warmup_max_norm", warmup_max_norm, positive=True)
    checks.flag("include_current", include_current)
    checks.one_of("take_in", take_in, ("clipped", "raw"))
    patience = checks.whole_or_none("patience", patience)
    checks.one_of("scale", scale, tuple(_SCALES))

    kind = LogWindowState if scale == "log" else WindowState

    def limit(norm: jax.Array, state: RuleState) -> tuple[Any, RuleState]:
        ring, seen, spikes = state
        place = seen % window
        values = ring.at[place].set(_not_zero(norm)) if include_current else ring
        number = jnp.sum(values != 0)
        mean, std = _mean_and_std(values, ddof)
        bound = mean + jnp.asarray(num_std, norm.dtype) * jnp.maximum(std, 1e-6 * jnp.maximum(jnp.abs(mean), 1))
        is_spike = (number >= warmup_steps) & (norm > bound)
        value, spikes = taken_in(patience, spikes, is_spike, norm, bound)
        if scale == "log":  # a norm is never far below the mean, but its logarithm may be
            value = jnp.where(number >= warmup_steps, jnp.maximum(value, 2 * mean - bound), value)
        value = norm if take_in == "raw" else value
        upper = jnp.where(number >= warmup_steps, bound, bounds.highest(norm.dtype))
        ring = ring.at[place].set(_not_zero(value))
        return (0.0, upper), kind(ring, jnp.asarray(optax.safe_increment(seen)), spikes)

    def init(dtype: Any) -> RuleState:
        return kind(jnp.zeros(window, dtype), no_steps(), no_steps())

    def so_far(state: RuleState) -> tuple[jax.Array, jax.Array]:
        ring, seen, _ = state
        values = ring.at[seen % window].set(1) if include_current else ring
        mean = as_norm(_mean_and_std(ring, 0)[0])
        return jnp.sum(values != 0) < warmup_steps, jnp.where(jnp.any(ring != 0), mean, jnp.zeros_like(mean))

    applied, as_norm = _SCALES[scale]
    return per_group(bounded_at_first(applied(Rule(init, limit, signed=True)), warmup_max_norm, so_far))


def _not_zero(value: jax.Array) -> jax.Array:
    """A value as the ring stores it: 0 is an empty place, so a value of 0 is stored as a tiny one.

    A count can't replace this: orbax may restore a ring into a longer one, whose further zeros are not values.
    """
    tiny = float(jnp.finfo(value.dtype).tiny)
    return value + jnp.where(jnp.abs(value) < tiny, 2 * tiny, 0).astype(value.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _mean_and_std_of(ring: jax.Array, ddof: int) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the non-zero values, whose squares may leave the float range."""
    largest = jnp.max(jnp.abs(ring))
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    shares = arithmetic.quotient(ring, largest)
    mean = jnp.sum(shares) / _number(ring, 0)
    away = jnp.where(ring != 0, shares - mean, jnp.zeros_like(shares))
    variance = jnp.sum(jnp.square(away)) / _number(ring, ddof)
    return mean * largest, jnp.sqrt(variance) * largest


@_mean_and_std_of.defjvp
def _mean_and_std_jvp(ddof: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # The derivative of the code above would go through the reciprocals of the smallest norms, and add up many of them.
    (ring,), (change,) = primals, tangents
    mean, std = _mean_and_std(ring, ddof)
    there = ring != 0
    away = arithmetic.quotient(ring - mean, jnp.where(std > 0, std, jnp.ones_like(std)))
    weights = jnp.where(there & (std > 0), away, jnp.zeros_like(ring)) / _number(ring, ddof)
    d_mean = jnp.sum(jnp.where(there, change, jnp.zeros_like(change)) / _number(ring, 0))
    return (mean, std), (d_mean, jnp.sum(weights * change))


# Jitted, so that eager calls do not compile operation by operation.
_mean_and_std = jax.jit(_mean_and_std_of, static_argnums=1)


def _number(ring: jax.Array, less: int) -> jax.Array:
    """The number of non-zero values minus `less`; at least 1."""
    return jnp.maximum(jnp.sum(ring != 0) - less, 1).astype(ring.dtype)


@moments.of_kind.register
def _of_window(state: WindowState) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(functools.partial(_mean_and_std, ddof=0))(state.window_norms)


@moments.of_kind.register
def _of_log_window(state: LogWindowState) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(functools.partial(_mean_and_std, ddof=0))(state.window_logs)
