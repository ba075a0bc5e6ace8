"""How far the coordinates of a leaf are beyond their limits, in one pass over updates and parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import arithmetic, dtypes, layouts


@jax.jit  # traced once for all leaves of a kind
def worst_ratio(update: jax.Array, param: jax.Array, relative: Any, absolute: Any) -> jax.Array:
    """The largest `|u| / (relative |w| + absolute)` of a leaf: the largest float where no float is enough.

    It is inf where an update, a parameter or one of the two numbers is not finite.
    """
    param = layouts.like(jnp.asarray(param), update)  # on an Explicit mesh it may be whole where the update is split
    dtype = dtypes.accumulator(update.dtype)
    relative, absolute = jnp.asarray(relative, dtype), jnp.asarray(absolute, dtype)
    # In one sum of both arrays, and from them as they came: what two reductions share XLA for CPUs (jax 0.10) writes to
    # memory.
    zeros = sum(_zeros(each, dtype) for each in jax.lax.optimization_barrier((update, param)))
    zero = jax.lax.stop_gradient(jnp.sum(zeros) + _zeros(relative, dtype) + _zeros(absolute, dtype))
    worst = jnp.max(_ratio(update, param, relative, absolute, zero), initial=0)
    highest = jnp.finfo(dtype).max
    worst = jnp.where(worst >= highest * (1 - 2.0**-18), jnp.full_like(worst, highest), worst)
    return jnp.where(jnp.isnan(zero), jnp.full_like(worst, jnp.inf), worst)


def _ratio(update: jax.Array, param: jax.Array, relative: Any, absolute: Any, zero: jax.Array) -> jax.Array:
    """The ratio of every coordinate; 0 where u is, else nearly the largest float where the quotient is beyond it.

    Written for XLA on CPUs (jax 0.10), so that it goes into the maximum that comes next and not into memory: by
    products and extrema only, without a comparison; and with constants to which this leaf's `zero` is added, since it
    would share those of all leaves, and of Adam.
    """
    info = jnp.finfo(zero.dtype)
    size, weight = arithmetic.modulus(update), arithmetic.modulus(param).astype(zero.dtype)
    limit = (zero + relative) * weight + (zero + absolute)
    most, tiny, one = zero + float(info.max) * (1 - 2.0**-20), zero + info.tiny, zero + 1  # a quotient rounds by less
    ratio = arithmetic.quotient(jnp.minimum(size, jax.lax.stop_gradient(limit * most)), jnp.maximum(limit, tiny))
    per_tiny = zero + 1 / float(info.tiny)
    is_some, is_none = jnp.minimum(size * per_tiny, one), one - jnp.minimum(limit * per_tiny, one)  # 1 or 0
    return jnp.maximum(ratio, jax.lax.stop_gradient(most * is_some * is_none))


def _zeros(x: jax.Array, dtype: Any) -> jax.Array:
    """NaN where an entry is not finite; see `arithmetic.has_nonfinite`."""
    zeros = x - x
    return (zeros.real + zeros.imag if jnp.iscomplexobj(zeros) else zeros).astype(dtype)
