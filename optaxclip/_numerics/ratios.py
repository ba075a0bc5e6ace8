"""Measures how far coordinates exceed their limits, in one pass over updates and parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes, layouts
from optaxclip._numerics import arithmetic

_BLOCK = 1 << 15  # entries; no size from 2^14 to 2^17 is faster


@jax.jit  # traced once for all leaves of one shape and dtype
def worst_ratio(update: jax.Array, param: jax.Array, relative: Any, absolute: Any) -> jax.Array:
    """Returns the largest `|u| / (relative |w| + absolute)` of a leaf. It saturates at the largest float.

    It is inf if an update, a parameter or one of the two numbers is not finite.
    """
    param = layouts.like(jnp.asarray(param), update)  # on an Explicit mesh it may be whole and the update split
    dtype = dtypes.accumulator(update.dtype)
    relative, absolute = jnp.asarray(relative, dtype), jnp.asarray(absolute, dtype)
    # Blocks of an array that is split over devices would have to be gathered. Blocks of 16-bit floats gain nothing: XLA
    # for CPUs (jax 0.8 and 0.10) converts the whole array before the loop. That condition can go with jax 0.10.
    has_blocks = update.size > _BLOCK and update.dtype == param.dtype and layouts.is_whole(update)
    on_cpu = _by_blocks if has_blocks and dtypes.wide(update.dtype) == update.dtype else _at_once
    worst = jax.lax.platform_dependent(update, param, relative, absolute, cpu=on_cpu, default=_at_once)
    highest = jnp.finfo(dtype).max
    is_past = jnp.isfinite(worst) & (worst >= highest * (1 - 2.0**-18))
    worst = jnp.where(is_past, jnp.full_like(worst, highest), worst)
    return jnp.where(jnp.isfinite(relative) & jnp.isfinite(absolute), worst, jnp.full_like(worst, jnp.inf))


def _at_once(update: jax.Array, param: jax.Array, relative: jax.Array, absolute: jax.Array) -> jax.Array:
    return jnp.max(_ratios(update, param, relative, absolute), initial=0)


def _by_blocks(update: jax.Array, param: jax.Array, relative: jax.Array, absolute: jax.Array) -> jax.Array:
    """Works in blocks that fit into the cache, because XLA for CPUs (jax 0.8 to 0.12) writes the ratios to memory.

    Without blocks `clippy` takes 2 to 3 times as long, and temporary memory of the size of the gradients.
    """

    def block(i: jax.Array | int) -> jax.Array:
        def part(x: jax.Array) -> jax.Array:
            # The last block overlaps with the one before.
            return jax.lax.dynamic_slice(x.reshape(-1), (i * _BLOCK,), (_BLOCK,))

        return _at_once(part(update), part(param), relative, absolute)

    blocks = -(-update.size // _BLOCK)
    return jax.lax.fori_loop(1, blocks, lambda i, worst: jnp.maximum(worst, block(i)), block(0))


def _ratios(update: jax.Array, param: jax.Array, relative: jax.Array, absolute: jax.Array) -> jax.Array:
    """Returns the ratio of every coordinate: 0 where u is 0, and just below the largest float if it would overflow."""
    info = jnp.finfo(relative.dtype)
    most = float(info.max) * (1 - 2.0**-20)  # further below the largest float than a quotient rounds
    size, weight = arithmetic.modulus(update), arithmetic.modulus(param).astype(relative.dtype)
    limit = relative * weight + absolute
    attained = jnp.minimum(size, jax.lax.stop_gradient(limit * most))
    ratio = arithmetic.quotient(attained, jnp.maximum(limit, float(info.tiny)))
    is_forbidden = (limit < float(info.tiny)) & (size >= float(info.tiny))
    ratio = jnp.where(is_forbidden, jnp.full_like(ratio, most), ratio)
    return jnp.where(jnp.isfinite(size) & jnp.isfinite(weight), ratio, jnp.full_like(ratio, jnp.inf))
