"""How far the coordinates of a leaf are beyond their limits, in one pass over updates and limits."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import mesh, sums


@jax.jit  # traced once for all leaves of a kind
def worst_ratio(update: jax.Array, param: jax.Array, relative: Any, absolute: Any) -> jax.Array:
    """The largest `|u| / (relative |w| + absolute)` of a leaf: the largest float where no float is enough.

    It is inf where an update, a parameter or one of the two numbers is not finite.
    """
    param = mesh.like(jnp.asarray(param), update)  # which may be whole, on an Explicit mesh, where the update is split
    dtype = sums.accumulator(update.dtype)
    highest = float(jnp.finfo(dtype).max)
    # Behind a barrier, since XLA shares a constant with all that has an equal one (Adam has 0.1), and writes it out.
    relative, absolute = jax.lax.optimization_barrier((jnp.asarray(relative, dtype), jnp.asarray(absolute, dtype)))
    limit = relative * sums.modulus(param).astype(dtype) + absolute
    worst = jnp.max(_ratio(sums.modulus(update), limit), initial=0)
    # From the arrays as they came: what two reductions share XLA writes to memory.
    is_bad = [sums.has_nonfinite(each) for each in (update, param, relative, absolute)]
    worst = jnp.where(worst >= _nearly(_nearly(highest)), jnp.full_like(worst, highest), worst)
    return jnp.where(jnp.stack(is_bad).any(), jnp.full_like(worst, jnp.inf), worst)


def _ratio(size: jax.Array, limit: jax.Array) -> jax.Array:
    """`size / limit`; 0 where the size is, else nearly the largest float where the quotient is beyond it.

    Products and extrema only: a comparison is what XLA on CPUs doesn't fuse into the maximum that comes next, and it
    writes the array of ratios to memory instead.
    """
    info = jnp.finfo(size.dtype)
    most, tiny = _nearly(float(info.max)), float(info.tiny)
    ratio = sums.quotient(jnp.minimum(size, limit * most), jnp.maximum(limit, tiny))
    is_some, is_none = jnp.minimum(size / tiny, 1), 1 - jnp.minimum(limit / tiny, 1)  # 1 or 0
    return jnp.maximum(ratio, jax.lax.stop_gradient(most * is_some * is_none))


def _nearly(highest: float) -> float:
    """Below the largest float by more than rounding."""
    return highest * (1 - 2.0**-20)
