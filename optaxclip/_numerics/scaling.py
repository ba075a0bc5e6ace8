"""Bringing a group of coordinates from one norm to another, over the whole float range.

The factor is a number per group, so that per coordinate there are only multiplications, which XLA fuses into whatever
reads the result. A factor outside the normal range of floats (3e38 clipped to 1, or 1e36 to 1e-3) would flush to 0 or
inf: it is applied as its square root, twice. Which of the two it is, is again a number per group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes
from optaxclip._numerics import arithmetic


class Factor(NamedTuple):
    """By what a group is multiplied: by `first`, then by `second`. Where `second` is 1 it is left, bit for bit.

    Derivatives go through `norm` and `goal` only. The derivative of the factor itself may overflow.

    Attributes:
      first: 1, or the root of the factor.
      second: the factor, or its root.
      norm: the norm of the group; 1 where it is left.
      goal: what that is to become.
    """

    first: jax.Array
    second: jax.Array
    norm: jax.Array
    goal: jax.Array


def is_kept(norm: jax.Array, permitted: jax.Array) -> jax.Array:
    """Where norm and goal are one number, the norm is 0 or not finite, or the goal is not."""
    return (permitted == norm) | ~(norm > 0) | ~jnp.isfinite(norm) | ~jnp.isfinite(permitted)


@jax.jit  # traced once for all leaves of a kind
def factor(norm: jax.Array, permitted: jax.Array) -> Factor:
    """The Factor of one group, or of each group in an array."""
    keep = is_kept(norm, permitted)
    # Where a group is kept the factor is not used, but its derivative is multiplied by 0 and must be finite.
    one = jnp.ones_like(norm)
    norm, permitted = jnp.where(keep, one, norm), jnp.where(keep, one, permitted)
    # Rounded, a coordinate that is nearly the whole norm could exceed the largest float.
    highest = jnp.maximum(norm, (1 - 2.0**-17) * jnp.finfo(norm.dtype).max)
    given = jax.lax.stop_gradient((norm, jnp.minimum(permitted, highest)))
    roots = tuple(map(jnp.sqrt, given))
    ratio = roots[1] / roots[0]
    # Of what is no quotient of floats there is the quotient of roots, which is one.
    extreme = ((ratio < 2.0**-50) & (permitted > 0)) | (ratio > 2.0**50)
    # They end in a division: XLA for CPUs (jax 0.8 to 0.12) would repeat anything cheaper for every coordinate.
    first = jnp.where(extreme, roots[1], one) / jnp.where(extreme, roots[0], one)
    second = jnp.where(extreme, roots[1], given[1]) / jnp.where(extreme, roots[0], given[0])
    return Factor(first, second, norm, permitted)


# At module level and jitted, so that eager calls do not compile anew.
@jax.jit
def rescale(leaf: jax.Array, factor: Factor) -> jax.Array:
    """A leaf times its factor, calculated in float32 or wider, of the leaf's own dtype and finite where the leaf is.

    Args:
      leaf: floats of any shape.
      factor: scalars, or arrays that broadcast to the leaf's shape.
    """
    leaf = jnp.asarray(leaf)
    # Beside a float64 leaf a factor may be no float32.
    dtype = np.promote_types(dtypes.wide(leaf.dtype), factor.norm.dtype)
    if leaf.dtype != dtype:
        # Otherwise XLA for CPUs (jax 0.8 to 0.12) converts it once for the norm and for here, and writes the wide array
        # to memory. For jax 0.8 it does so all the same.
        leaf = jax.lax.platform_dependent(leaf, cpu=jax.lax.optimization_barrier, default=lambda leaf: leaf)
    wide = leaf.astype(dtype)
    scaled = _scaled(wide, factor.first, factor.second, factor.norm, factor.goal)
    # A coordinate may pass the largest float where it is larger than the norm, or rounded to a narrower dtype.
    scaled = arithmetic.saturated(scaled, float(jnp.finfo(leaf.dtype).max))
    # Of an infinite entry in a group whose norm is finite all the same, a factor of 0 would make NaN.
    scaled = jnp.where(jnp.isfinite(wide), scaled, wide)
    return jnp.where(factor.second == 1, leaf, scaled.astype(leaf.dtype))


@jax.custom_jvp
def _scaled(x: jax.Array, first: jax.Array, second: jax.Array, norm: jax.Array, goal: jax.Array) -> jax.Array:
    """x times goal / norm, which is `first * second`."""
    del norm, goal
    return x * first.astype(x.dtype) * second.astype(x.dtype)


@_scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, first, second, norm, goal), (dx, _, _, d_norm, d_goal) = primals, tangents
    scaled = _scaled(x, first, second, norm, goal)
    # A slope beyond the range of floats, as where 1e-38 is brought to 1e3, saturates: 0 times it must be 0.
    exponent = int(jnp.finfo(norm.dtype).maxexp) - 2
    root, least = 2.0 ** (exponent // 2), goal * 2.0**-exponent
    second = jnp.where(first == 1, second, jnp.minimum(second, root))
    per_norm = arithmetic.quotient(scaled, jnp.maximum(norm, least))
    # Of the factor, too, only this function knows the derivative, and not where it is called with a tangent.
    factor = _scaled(jnp.ones_like(norm), jnp.minimum(first, root), second, norm, goal)
    return scaled, (
        dx * factor.astype(x.dtype)
        + arithmetic.quotient(x, norm) * d_goal.astype(x.dtype)
        - per_norm * d_norm.astype(x.dtype)
    )
