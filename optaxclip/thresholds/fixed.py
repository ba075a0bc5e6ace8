"""Thresholds from constants and schedules.

A threshold with a scheduled bound counts its steps in a `bounds.ScheduleState`. The other thresholds of this module
have `optax.EmptyState`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import groups
from optaxclip._numerics import arithmetic
from optaxclip.core import Norms, State, Threshold

Band: TypeAlias = tuple[Any, Any]  # the lower and the upper end
ParamNorms: TypeAlias = Callable[[], Norms]


def constant(max_norm: bounds.Bound) -> Threshold:
    """Bounds every norm by `max_norm`.

    Args:
      max_norm: the bound, at least 0, in the units of the norm: a number, an array, an optax schedule, or a prefix
        pytree of these if the norm has several groups.

    Returns:
      A Threshold without state. A schedule adds a step count.

    Raises:
      ValueError: if `max_norm` is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.constant({"a": 1.0, "b": 5.0}))
      >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["a"], updates["b"])
      [0.6 0.8] [3. 4.]

    Notes:
      - Edge cases: 0 gives zeros; inf means no bound. In an array, NaN means no bound, and a negative number counts as
        0.

    See also:
      `clip_by_global_norm`, `clip_by_leaf_norm`, `clip_by_block_rms`; `smooth`.
    """
    checks.bound("max_norm", max_norm)
    return from_bounds(lambda norms, param_norms, high: (0.0, high), max_norm)


def between(min_norm: bounds.Bound, max_norm: bounds.Bound) -> Threshold:
    """Keeps every norm except 0 between `min_norm` and `max_norm`; small norms are scaled up.

    Args:
      min_norm: the lower end, at least 0 and finite, in the units of the norm: the kinds that `constant` takes.
      max_norm: the upper end, of the same kinds. It may be inf. If the two cross, the upper end wins.

    Returns:
      A Threshold without state. A schedule adds a step count.

    Raises:
      ValueError: if an end is negative or NaN, `min_norm` is infinite, or `min_norm` is larger than `max_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.between(1.0, 5.0))
      >>> grads = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([0.3, 0.4])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["a"], updates["b"])
      [3. 4.] [0.6 0.8]

    Notes:
      - Edge cases: a norm of 0 stays 0. Ends in arrays may cross or be NaN; NaN means no bound.

    See also:
      `clip_by_norm_range`; `exactly`, for equal ends.
    """
    checks.bound("min_norm", min_norm, finite=True)
    checks.bound("max_norm", max_norm)
    checks.ordered("min_norm", min_norm, "max_norm", max_norm)
    return from_bounds(lambda norms, param_norms, low, high: (low, high), min_norm, max_norm)


def exactly(target_norm: bounds.Bound) -> Threshold:
    """Brings every norm except 0 to `target_norm`: normalised descent.

    Args:
      target_norm: the norm, at least 0 and finite: the kinds that `constant` takes.

    Returns:
      A Threshold without state. A schedule adds a step count.

    Raises:
      ValueError: if `target_norm` is negative, infinite or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.global_norm(), thresholds.exactly(1.0))
      >>> updates, _ = tx.update(jnp.array([0.3, 0.4]), tx.init(None))
      >>> print(updates)
      [0.6 0.8]

    Notes:
      - Edge cases: a norm of 0 has no direction and stays 0. A group with a non-finite norm is returned unchanged. Even
        the smallest norms are scaled up, so steps do not shrink near a minimum.

    See also:
      `normalised`, whose target depends on how much norms vary; `smooth`.
    """
    checks.bound("target_norm", target_norm, finite=True)
    return from_bounds(lambda norms, param_norms, goal: (goal, goal), target_norm)


def smooth(max_norm: bounds.Bound) -> Threshold:
    """Brings a norm n to :math:`n c / (n + c)`, smoothly and always below the bound c.

    Args:
      max_norm: the bound c, at least 0, in the units of the norm: the kinds that `constant` takes. A norm of c is
        halved.

    Returns:
      A Threshold without state. A schedule adds a step count.

    Raises:
      ValueError: if `max_norm` is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.smooth(5.0))
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(None))
      >>> print(updates)
      [1.5 2. ]

    Notes:
      - Edge cases: 0 gives zeros; inf changes nothing. In floating point the norm reaches c if n is far larger.

    See also:
      `smooth_clip_by_global_norm`; `constant`.
    """
    checks.bound("max_norm", max_norm)
    return from_bounds(lambda norms, param_norms, high: (0.0, groups.over_groups(_harmonic, norms, high)), max_norm)


def from_bounds(band: Callable[..., Band], *given: bounds.Bound) -> Threshold:
    """A threshold whose band is `band(norms, param_norms, *bounds)`."""

    def init(norms: Norms) -> State:
        del norms
        return bounds.init(*given)

    def limit(norms: Norms, state: State, param_norms: ParamNorms, **extra_args: Any) -> tuple[Band, State]:
        del extra_args
        resolved, state = bounds.resolve(given, state, norms)
        return band(norms, param_norms, *resolved), state

    return Threshold(init, limit)


def _harmonic(norm: jax.Array, high: Any) -> jax.Array:
    """n c / (n + c), without a product or a sum that could overflow."""
    if high is None:
        return jnp.full_like(norm, bounds.highest(norm.dtype))
    bound = bounds.as_array(high, norm.dtype)
    high = jnp.maximum(jnp.minimum(bound, bounds.highest(norm.dtype)), jnp.zeros_like(norm))
    small, large = jnp.minimum(norm, high), jnp.maximum(norm, high)
    halved = small / (1 + arithmetic.quotient(small, jnp.where(large > 0, large, jnp.ones_like(large))))
    return jnp.where(bound == jnp.inf, norm, halved)
