"""Arithmetic that stays within the float range, as do its derivatives."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes


def root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 at 0."""
    return jnp.where(x == 0, jnp.zeros_like(x), jnp.sqrt(jnp.where(x == 0, jnp.ones_like(x), x)))


@jax.custom_jvp
def quotient(x: jax.Array, whole: jax.Array) -> jax.Array:
    """x / whole for positive wholes, over the whole range, and so its derivative.

    XLA (jax 0.10 and 0.12) turns a division by a broadcast number into a multiplication by its reciprocal, and that is
    subnormal, so 0, from 8e37 on. And the derivative of a plain division squares the denominator, which underflows
    below 1e-19.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(quotient(jnp.real(x), whole), quotient(jnp.imag(x), whole))
    shift = jnp.where(whole > 2.0**100, jnp.full_like(whole, 2.0**-4), jnp.ones_like(whole))
    if x.shape == whole.shape:  # nothing is broadcast, but perhaps under vmap
        return (x * shift.astype(x.dtype)) / (whole * shift)
    return x * (1 / (whole * shift)).astype(x.dtype) * shift.astype(x.dtype)


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, whole), (dx, d_whole) = primals, tangents
    share = quotient(x, whole)
    return share, quotient(dx, whole) - share * quotient(d_whole, whole).astype(share.dtype)


def or_one(x: jax.Array) -> jax.Array:
    """x where one can divide by it, else 1."""
    return jnp.where((x > 0) & jnp.isfinite(x), x, jnp.ones_like(x))


def largest(x: jax.Array, dims: tuple[int, ...] | None = None) -> jax.Array:
    """The largest modulus. It is inf where an entry is NaN; see `has_nonfinite`."""
    return jnp.where(has_nonfinite(x, dims), jnp.inf, jnp.max(modulus(x), axis=dims, initial=0))


def has_nonfinite(x: jax.Array, dims: tuple[int, ...] | None = None) -> jax.Array:
    """Whether an entry is infinite or NaN: x - x is 0 unless it is NaN.

    XLA fuses this sum into one pass (not that of jax 0.8), where it would write a mask of flags to memory (jax 0.8 to
    0.12). A sum over devices keeps NaN; a maximum over them need not, and XLA's for CPUs (jax 0.10 and 0.12) loses it
    on one device as well.
    """
    return jnp.isnan(jnp.sum(x - x, axis=dims))


def modulus(x: Any) -> jax.Array:
    """The absolute value, in `dtypes.accumulator` of the dtype; that of finite complex numbers saturates."""
    x = jnp.asarray(x)
    size = jnp.abs(x.astype(dtypes.wide(x.dtype)))
    return at_most_largest(size, jnp.isfinite(x)) if jnp.iscomplexobj(x) else size


def at_most_largest(x: jax.Array, is_finite: jax.Array) -> jax.Array:
    """x, which is positive; where it should be finite, at most the largest number."""
    return jnp.where(is_finite, jnp.minimum(x, float(jnp.finfo(x.dtype).max)), x)


def saturated(x: jax.Array, largest: float) -> jax.Array:
    """x with every real and imaginary part brought to at most `largest` in size."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(saturated(jnp.real(x), largest), saturated(jnp.imag(x), largest))
    return jnp.clip(x, -largest, largest)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """x in another dtype, where what is finite stays finite: beyond the largest number of `dtype` it is that number."""
    largest = float(jnp.finfo(dtype).max)
    if largest < float(jnp.finfo(x.dtype).max):
        x = jnp.where(jnp.isfinite(x), saturated(x, largest), x)
    return x.astype(dtype)
