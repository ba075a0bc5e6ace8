"""Arithmetic that stays within the float range. So do its derivatives."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes


def root(x: jax.Array) -> jax.Array:
    """Returns the square root. Its derivative at 0 is 0."""
    return jnp.where(x == 0, jnp.zeros_like(x), jnp.sqrt(jnp.where(x == 0, jnp.ones_like(x), x)))


@jax.custom_jvp
def quotient(x: jax.Array, whole: jax.Array) -> jax.Array:
    """Returns x / whole for positive `whole`. Both it and its derivative are right over the whole float range.

    XLA (jax 0.10 and 0.12) turns a division by a broadcast number into a multiplication by the reciprocal. From 8e37 on
    the reciprocal is subnormal, so 0. And the derivative of a plain division squares the denominator, which underflows
    below 1e-19.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(quotient(jnp.real(x), whole), quotient(jnp.imag(x), whole))
    shift = jnp.where(whole > 2.0**100, jnp.full_like(whole, 2.0**-4), jnp.ones_like(whole))
    if x.shape == whole.shape:  # nothing is broadcast, except perhaps under vmap
        return (x * shift.astype(x.dtype)) / (whole * shift)
    return x * (1 / (whole * shift)).astype(x.dtype) * shift.astype(x.dtype)


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, whole), (dx, d_whole) = primals, tangents
    share = quotient(x, whole)
    return share, quotient(dx, whole) - share * quotient(d_whole, whole).astype(share.dtype)


def or_one(x: jax.Array) -> jax.Array:
    """Returns x if it can be a divisor (positive and finite), else 1."""
    return jnp.where((x > 0) & jnp.isfinite(x), x, jnp.ones_like(x))


def largest(x: jax.Array, dims: tuple[int, ...] | None = None) -> jax.Array:
    """Returns the largest modulus; inf if an entry is NaN, see `has_nonfinite`."""
    return jnp.where(has_nonfinite(x, dims), jnp.inf, jnp.max(modulus(x), axis=dims, initial=0))


def has_nonfinite(x: jax.Array, dims: tuple[int, ...] | None = None) -> jax.Array:
    """Whether an entry is infinite or NaN. It uses that x - x is 0 or NaN.

    XLA fuses this sum into one pass (except in jax 0.8); for `isfinite` it would write an array of flags to memory (jax
    0.8 to 0.12). A sum over devices keeps NaN. A maximum need not: XLA for CPUs (jax 0.10 and 0.12) loses NaN even on
    one device.
    """
    return jnp.isnan(jnp.sum(x - x, axis=dims))


def modulus(x: Any) -> jax.Array:
    """Returns the absolute value, in the `dtypes.accumulator` of the dtype. Finite complex numbers saturate."""
    x = jnp.asarray(x)
    size = jnp.abs(x.astype(dtypes.wide(x.dtype)))
    return at_most_largest(size, jnp.isfinite(x)) if jnp.iscomplexobj(x) else size


def at_most_largest(x: jax.Array, is_finite: jax.Array) -> jax.Array:
    """Returns x, which is positive; where `is_finite`, at most the largest float."""
    return jnp.where(is_finite, jnp.minimum(x, float(jnp.finfo(x.dtype).max)), x)


def saturated(x: jax.Array, largest: float) -> jax.Array:
    """Clips every real and imaginary part of x to `largest` in size."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(saturated(jnp.real(x), largest), saturated(jnp.imag(x), largest))
    return jnp.clip(x, -largest, largest)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """Converts x to `dtype`. Finite numbers stay finite: they saturate at the largest float of `dtype`."""
    largest = float(jnp.finfo(dtype).max)
    if largest < float(jnp.finfo(x.dtype).max):
        x = jnp.where(jnp.isfinite(x), saturated(x, largest), x)
    return x.astype(dtype)
