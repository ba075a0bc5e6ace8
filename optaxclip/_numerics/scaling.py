"""Scales a group of coordinates from one norm to another, over the whole float range.

There is one factor per group, so each coordinate is only multiplied, and XLA fuses that into whatever reads the result.
A factor outside the normal range of floats (3e38 clipped to 1, or 1e36 to 1e-3) would flush to 0 or inf, so its square
root is applied twice. That choice, too, is made once per group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes
from optaxclip._numerics import arithmetic


class Factor(NamedTuple):
    """The factor of a group: multiply by `first`, then by `second`.

    If `second` is 1 the group stays unchanged, bit for bit. Derivatives go through `norm` and `goal` only. The
    derivative of the factor itself may overflow.

    Attributes:
      first: 1, or the root of the factor.
      second: the factor, or its root.
      norm: the norm of the group; 1 if the group stays unchanged.
      goal: the norm after scaling.
    """

    first: jax.Array
    second: jax.Array
    norm: jax.Array
    goal: jax.Array


def is_kept(norm: jax.Array, permitted: jax.Array) -> jax.Array:
    """Whether a group stays unchanged: norm and goal are equal, the norm is 0, or one of them is not finite."""
    return (permitted == norm) | ~(norm > 0) | ~jnp.isfinite(norm) | ~jnp.isfinite(permitted)


@jax.jit  # traced once for all leaves of one shape and dtype
def factor(norm: jax.Array, permitted: jax.Array) -> Factor:
    """Returns the Factor of one group, or of each group in an array."""
    keep = is_kept(norm, permitted)
    # For a kept group the factor is not used, but its derivative is multiplied by 0, so it must be finite.
    one = jnp.ones_like(norm)
    norm, permitted = jnp.where(keep, one, norm), jnp.where(keep, one, permitted)
    # Slightly below the largest float: a coordinate that is nearly the whole norm could round past it.
    highest = jnp.maximum(norm, (1 - 2.0**-17) * jnp.finfo(norm.dtype).max)
    given = jax.lax.stop_gradient((norm, jnp.minimum(permitted, highest)))
    roots = tuple(map(jnp.sqrt, given))
    ratio = roots[1] / roots[0]
    # If the quotient leaves the float range, the quotient of the roots does not.
    extreme = ((ratio < 2.0**-50) & (permitted > 0)) | (ratio > 2.0**50)
    # Both end in a division: XLA for CPUs (jax 0.8 to 0.12) would repeat anything cheaper for every coordinate.
    first = jnp.where(extreme, roots[1], one) / jnp.where(extreme, roots[0], one)
    second = jnp.where(extreme, roots[1], given[1]) / jnp.where(extreme, roots[0], given[0])
    return Factor(first, second, norm, permitted)


# At module level and jitted, so that eager calls do not compile again.
@jax.jit
def rescale(leaf: jax.Array, factor: Factor) -> jax.Array:
    """Returns a leaf times its factor, in the leaf's dtype. Finite entries stay finite.

    It is calculated in float32 or wider.

    Args:
      leaf: floats of any shape.
      factor: scalars, or arrays that broadcast to the leaf's shape.
    """
    leaf = jnp.asarray(leaf)
    # The factor is float64 if another leaf of the group is.
    dtype = np.promote_types(dtypes.wide(leaf.dtype), factor.norm.dtype)
    if leaf.dtype != dtype:
        # Without a barrier, XLA for CPUs (jax 0.8 to 0.12) converts the leaf once for both the norm and this product,
        # and writes the wide array to memory. With jax 0.8 it does so in any case.
        leaf = jax.lax.platform_dependent(leaf, cpu=jax.lax.optimization_barrier, default=lambda leaf: leaf)
    wide = leaf.astype(dtype)
    scaled = _scaled(wide, factor.first, factor.second, factor.norm, factor.goal)
    # A coordinate may exceed the largest float if it is larger than the norm, or rounded to a narrower dtype.
    scaled = arithmetic.saturated(scaled, float(jnp.finfo(leaf.dtype).max))
    # An infinite entry in a group whose norm is finite would become NaN with a factor of 0.
    scaled = jnp.where(jnp.isfinite(wide), scaled, wide)
    return jnp.where(factor.second == 1, leaf, scaled.astype(leaf.dtype))


@jax.custom_jvp
def _scaled(x: jax.Array, first: jax.Array, second: jax.Array, norm: jax.Array, goal: jax.Array) -> jax.Array:
    """Returns x times goal / norm, which is `first * second`."""
    del norm, goal
    return x * first.astype(x.dtype) * second.astype(x.dtype)


@_scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, first, second, norm, goal), (dx, _, _, d_norm, d_goal) = primals, tangents
    scaled = _scaled(x, first, second, norm, goal)
    # A slope beyond the float range (1e-38 brought to 1e3) saturates, so that 0 times it is 0.
    exponent = int(jnp.finfo(norm.dtype).maxexp) - 2
    root, least = 2.0 ** (exponent // 2), goal * 2.0**-exponent
    second = jnp.where(first == 1, second, jnp.minimum(second, root))
    per_norm = arithmetic.quotient(scaled, jnp.maximum(norm, least))
    # The factor comes from `_scaled`, so that its own derivative is right. It is called with ones, because it must not
    # be called with a tangent.
    factor = _scaled(jnp.ones_like(norm), jnp.minimum(first, root), second, norm, goal)
    return scaled, (
        dx * factor.astype(x.dtype)
        + arithmetic.quotient(x, norm) * d_goal.astype(x.dtype)
        - per_norm * d_norm.astype(x.dtype)
    )
