"""The largest singular value and the cap, over the whole float range, with derivatives, on every platform."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes
from optaxclip._numerics import arithmetic
from optaxclip._numerics.matrices import decompositions, iterations
from optaxclip._numerics.matrices.products import product, times_columns, turned


class Capped(NamedTuple):
    """Matrices with capped singular values.

    Attributes:
      matrices: the stack; zeros for the matrices that are kept.
      kept: for each matrix, whether the cap leaves it unchanged.
    """

    matrices: jax.Array
    kept: jax.Array


# The largest singular value.


@jax.custom_jvp
def _largest_singular_values(stack: jax.Array) -> jax.Array:
    size, x = _unit(stack)
    share = jax.lax.platform_dependent(
        x, cpu=decompositions.largest_singular_values, default=iterations.largest_singular_values
    )
    return jnp.where(jnp.isfinite(size), jnp.minimum(share * size, jnp.finfo(size.dtype).max), size)


@_largest_singular_values.defjvp
def _largest_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (stack,), (change,) = primals, tangents
    norm = largest_singular_values(stack)
    u, _, vh = jnp.linalg.svd(_unit(stack)[1], full_matrices=False)
    along = product(product(turned(u[:, :, :1]), change), turned(vh[:, :1, :]))
    slope = jnp.real(along)[:, 0, 0]
    return norm, jnp.where(norm > 0, slope, jnp.zeros_like(slope))


# At module level and jitted, so that eager calls do not compile again. So is `capped`.
@jax.jit
def largest_singular_values(stack: jax.Array) -> jax.Array:
    """Returns the largest singular value of each matrix of a stack, [number, rows, columns] with rows >= columns.

    It is inf if an entry is not finite, and otherwise at most the largest float. Its derivative is u v^T, and 0 for a
    matrix of zeros. If several singular values are the largest, it is the derivative of one of them.
    """
    if stack.size == 0:
        return jnp.zeros(stack.shape[0], dtypes.accumulator(stack.dtype))
    return _largest_singular_values(stack)


# The cap.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _capped(stack: jax.Array, cap: jax.Array, soft: bool) -> Capped:
    size, x = _unit(stack)
    relative = _relative(cap, size)
    # If all singular values are this far below the cap, the soft cap changes nothing visible.
    reach = relative * (float(jnp.finfo(cap.dtype).eps) ** 0.5 / 4 if soft else 1)
    shares, largest = jax.lax.platform_dependent(
        x,
        relative,
        reach,
        cpu=functools.partial(decompositions.capped, soft=soft),
        default=functools.partial(iterations.capped, soft=soft),
    )
    kept = largest <= reach
    # The caller has the leaf and keeps it. To return it from here would copy each transposed leaf.
    factor = jnp.where(kept, jnp.zeros_like(cap), cap)[:, None, None]
    return Capped(shares * factor.astype(x.dtype), kept)


@_capped.defjvp
def _capped_jvp(soft: bool, primals: Any, tangents: Any) -> tuple[Capped, Capped]:
    r"""The derivative of U g(S) V^T, by the quotients of differences of g.

    The symmetric part of U^T dA V is multiplied by (g(s) - g(t)) / (s - t), the antisymmetric part by (g(s) + g(t)) /
    (s + t). All quotients are written out, so that they are finite if singular values are equal or 0.
    """
    (stack, cap), (change, cap_change) = primals, tangents
    out = capped(stack, cap, soft)
    size, x = _unit(stack)
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    ratio = s / _relative(cap, size)[:, None]
    share, by_cap, differences, means = _slopes(ratio, soft)
    inner = product(product(turned(u), change), turned(vh))
    twice = differences.astype(u.dtype) * (inner + turned(inner)) + means.astype(u.dtype) * (inner - turned(inner))
    total = product(product(u, twice / 2), vh) + product(times_columns(u, by_cap * cap_change[:, None]), vh)
    if stack.shape[-2] > stack.shape[-1]:
        outside = product(change, turned(vh)) - product(u, inner)
        total += product(times_columns(outside, share), vh)
    no_change: Any = np.zeros(out.kept.shape, jax.dtypes.float0)  # `kept` is boolean
    return out, Capped(jnp.where(out.kept[:, None, None], jnp.zeros_like(total), total), no_change)


@functools.partial(jax.jit, static_argnums=2)
def capped(stack: jax.Array, cap: jax.Array, soft: bool) -> Capped:
    """Caps the singular values of matrices, U g(S) V^T: hard min(s, c), soft s / sqrt(1 + (s/c)^2).

    A matrix inside its cap, or with an entry that is not finite, is kept. First derivatives are finite everywhere.
    Second derivatives are finite if the singular values differ from one another and from 0.

    Args:
      stack: matrices, [number, rows, columns], with at least as many rows as columns, in float32 or wider.
      cap: for each matrix, at least 0, in the accumulator's dtype. inf caps nothing.
      soft: whether to use the soft cap.
    """
    if stack.size == 0:
        return Capped(jnp.zeros_like(stack), jnp.ones(stack.shape[0], jnp.bool_))
    return _capped(stack, cap, soft)


def _slopes(ratio: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns derivatives of g in units of the cap, at the singular values `ratio` times the cap.

    Returns:
      g(s) / s; the derivative by the cap; for all pairs (g(s) - g(t)) / (s - t), and (g(s) + g(t)) / (s + t).
    """
    share = decompositions.share(ratio, soft)
    value = share * ratio
    one, other = ratio[:, :, None], ratio[:, None, :]
    total = one + other
    mean = jnp.where(total > 0, (value[:, :, None] + value[:, None, :]) / jnp.where(total > 0, total, 1), 1)
    if soft:
        return share, value**3, jnp.square(share)[:, :, None] * jnp.square(share)[:, None, :] / mean, mean
    low, high = jnp.minimum(one, other), jnp.maximum(one, other)
    across = (low < 1) & (high > 1)
    slope = jnp.where(across, (1 - low) / jnp.where(across, high - low, 1), (high <= 1).astype(low.dtype))
    return share, (ratio > 1).astype(ratio.dtype), slope, mean


def _unit(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest modulus of each matrix, and the matrix divided by it; zeros if an entry is not finite."""
    size = jax.lax.stop_gradient(arithmetic.largest(stack, (1, 2)))
    usable = (size > 0) & jnp.isfinite(size)
    whole = jnp.where(usable, size, jnp.ones_like(size))[:, None, None]
    return size, jnp.where(usable[:, None, None], arithmetic.quotient(stack, whole), jnp.zeros_like(stack))


def _relative(cap: jax.Array, size: jax.Array) -> jax.Array:
    """Returns the caps as shares of `size`, clipped from below to a number far under the rounding error."""
    info = jnp.finfo(cap.dtype)
    usable = (size > 0) & jnp.isfinite(size)
    share = arithmetic.quotient(cap, jnp.where(usable, size, jnp.ones_like(size)))
    return jnp.clip(share, float(info.tiny) ** (1 / 3), float(info.max))
