"""Weighted averages of two numbers, right for all weights and over the whole float range. So are their derivatives.

Every moving average of this library is one of these, and takes its shares from here.

Each of the two usual forms fails somewhere, so each is used where the other fails:

- `average + (1 - decay) * (value - average)` becomes 0 if a value far below the average should replace it.
- `decay * average + (1 - decay) * value` drifts if `decay` is near 1: float32(0.999) is off by 3e-8, which is 3e-5 of 1
  - 0.999.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes
from optaxclip._numerics import arithmetic


class Shares(NamedTuple):
    """The weights of the average and of the value: two real numbers in [0, 1] with sum 1.

    Each is rounded once, from the exact decay. `1 - float32(0.999)` would be off by 1e-5.

    Attributes:
      old: the weight of the average.
      new: the weight of the value.
    """

    old: jax.Array
    new: jax.Array


def shares(decay: Any, dtype: Any) -> Shares:
    """Returns the shares of a moving average with this decay, a number or an array."""
    if not isinstance(decay, jax.Array):
        exact = np.float64(decay)
    else:
        exact = decay if decay.dtype == jnp.float64 else decay.astype(dtype)
    return Shares(jnp.asarray(exact, dtype), jnp.asarray(1 - exact, dtype))


def debiased(decay: Any, seen: jax.Array, dtype: Any) -> Shares:
    r"""Returns the shares of one step of a debiased average.

    They give what an average from 0 gives after division by `1 - decay^t`, without the division. The average from 0
    also starts far below the values, where small ones underflow to 0. This one does not.

    Args:
      decay: the decay of the average.
      seen: int32, the number of the step, from 1.
      dtype: the dtype of the shares.
    """
    return _debiased(shares(decay, dtype), seen)


# At module level and jitted, like the functions below, so that each is traced once for all leaves.
@jax.jit
def _debiased(each: Shares, seen: jax.Array) -> Shares:
    is_first = seen <= 1
    before = _gathered(each, jnp.where(is_first, jnp.ones_like(seen), seen - 1))
    whole = _gathered(each, jnp.maximum(seen, 1))
    old, new = each.old * (before / whole), jnp.minimum(each.new / whole, 1)
    return Shares(jnp.where(is_first, jnp.zeros_like(old), old), jnp.where(is_first, jnp.ones_like(new), new))


def _gathered(each: Shares, steps: jax.Array) -> jax.Array:
    """Returns `1 - decay^steps`."""
    tiny = jnp.finfo(each.old.dtype).tiny
    # For a decay near 1 the logarithm comes from 1 - decay. Both branches are finite, because both are differentiated.
    log = jnp.where(each.new > 0.5, jnp.log(jnp.maximum(each.old, tiny)), jnp.log1p(-jnp.minimum(each.new, 0.5)))
    return -jnp.expm1(steps.astype(each.old.dtype) * log)


def moved(average: jax.Array, value: jax.Array, by: Shares) -> jax.Array:
    """Returns `by.old * average + by.new * value`, real or complex.

    The result lies between the two, and is exactly one of them if its share is 1.
    """
    if jnp.iscomplexobj(average):
        return jax.lax.complex(
            moved(jnp.real(average), jnp.real(value), by), moved(jnp.imag(average), jnp.imag(value), by)
        )
    return _moved(average, value, by)


def moved_widened(average: jax.Array, value: Any, decay: Any) -> jax.Array:
    """Returns the average after one step, calculated in float32 or wider."""
    wide = np.promote_types(dtypes.wide(jnp.result_type(value)), dtypes.wide(average.dtype))
    return moved(average.astype(wide), jnp.asarray(value).astype(wide), shares(decay, dtypes.accumulator(wide)))


@jax.custom_jvp
def _moved_real(average: jax.Array, value: jax.Array, by: Shares) -> jax.Array:
    # Scaled up: a share of a number near the smallest float would be subnormal, and flushed to 0.
    is_small = jnp.maximum(jnp.abs(average), jnp.abs(value)) < 1
    one = jnp.ones_like(average)
    up, down = jnp.where(is_small, 2.0**64 * one, one), jnp.where(is_small, 2.0**-64 * one, one)
    return _mixed(average * up, value * up, by) * down


@_moved_real.defjvp
def _moved_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (average, value, by), (d_average, d_value, d_by) = primals, tangents
    # A tangent may be as large as the largest float, so it can't be scaled by 2^64.
    return _moved(average, value, by), _mixed(d_average, d_value, by) + d_by.old * average + d_by.new * value


_moved = jax.jit(_moved_real)


def _mixed(one: jax.Array, other: jax.Array, by: Shares) -> jax.Array:
    base, taken = _first(one, by), jnp.where(by.new <= 0.5, by.new, jnp.zeros_like(by.new))
    # Never `other - one`, which may overflow.
    return base + (by.new * other - taken * one)


def _first(one: jax.Array, by: Shares) -> jax.Array:
    return one * jnp.where(by.new <= 0.5, jnp.ones_like(by.old), by.old)


def power_mean(one: jax.Array, other: jax.Array, by: Shares, p: float) -> jax.Array:
    """Returns the root of `by.old one^p + by.new other^p` for sizes whose powers may leave the float range."""
    return moved(one, other, by) if p == 1 else _power_mean(one, other, by, p)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _power_mean_of(one: jax.Array, other: jax.Array, by: Shares, p: float) -> jax.Array:
    # Two forms, as in `_mixed`. For a large `new` share, scale by the roots first: with decay 0, an average far above
    # the value must leave nothing behind.
    few, nothing, unit = by.new <= 0.5, jnp.zeros_like(by.new), jnp.ones_like(by.new)
    roots = _roots(by, p)
    left, right = jnp.where(few, unit, roots.old) * one, jnp.where(few, unit, roots.new) * other
    largest = jnp.maximum(left, right)
    whole = arithmetic.or_one(largest)
    x, y = arithmetic.quotient(left, whole) ** p, arithmetic.quotient(right, whole) ** p
    total = x + (jnp.where(few, by.new, unit) * y - jnp.where(few, by.new, nothing) * x)
    mean = jnp.minimum(whole * (jnp.sqrt(total) if p == 2 else total ** (1 / p)), jnp.maximum(one, other))
    return jnp.where((largest > 0) & jnp.isfinite(largest), mean, largest)


@_power_mean_of.defjvp
def _power_mean_jvp(p: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (one, other, by), (d_one, d_other, d_by) = primals, tangents
    mean = _power_mean(one, other, by, p)
    roots, most = _roots(by, p), jnp.finfo(mean.dtype).max

    def slope(size: jax.Array, root: jax.Array) -> jax.Array:
        """The derivative by a size with share `root^p`: at most 1, and 0 if the mean is 0."""
        return root * _share(root * size, mean) ** (p - 1)

    def by_share(size: jax.Array) -> jax.Array:
        return jnp.minimum(size * (_share(size, mean) ** (p - 1) / p), most)

    return mean, (
        slope(one, roots.old) * d_one
        + slope(other, roots.new) * d_other
        + (by_share(one) * d_by.old + by_share(other) * d_by.new)
    )


_power_mean = jax.jit(_power_mean_of, static_argnums=3)


def _share(size: jax.Array, mean: jax.Array) -> jax.Array:
    share = arithmetic.quotient(size, arithmetic.or_one(mean))
    return jnp.where((mean > 0) & jnp.isfinite(mean) & jnp.isfinite(share), share, jnp.zeros_like(share))


def _roots(by: Shares, p: float) -> Shares:
    if p == 2:
        return Shares(arithmetic.root(by.old), arithmetic.root(by.new))
    return Shares(*(jnp.where(share > 0, arithmetic.or_one(share) ** (1 / p), jnp.zeros_like(share)) for share in by))
