"""Singular values by LAPACK's decompositions.

The eigenvalues of the Gram matrix cost half as much as singular values. They are the squares of the singular values, to
eps of the largest square. That is accurate enough for the largest singular value, and for a cap that is not far below
it.
"""

import functools

import jax
import jax.numpy as jnp

from optaxclip._numerics.matrices.products import gram, length, product, times_columns, turned

# For caps down to this many times below the largest singular value, the Gram matrix is used. At 1024 x 1024 the worst
# error seen in float32 is then a fifth of this sum: 1e-3 of the cap plus 20 eps of the largest. At 100 it is twice the
# sum.
_REACH = 30.0
# If the cap is at most this many eps of the largest singular value, every matrix within the cap is within 20 eps of the
# exact one.
_LOST = 10.0


def largest_singular_values(x: jax.Array) -> jax.Array:
    """Returns the largest singular value of each tall matrix, up to rounding. Moduli are at most 1."""
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram(x))[:, -1], 0))


def capped(x: jax.Array, cap: jax.Array, reach: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array]:
    """Caps the singular values of matrices.

    Args:
      x: a stack of matrices, with no more columns than rows and moduli of at most 1.
      cap: for each matrix, more than 0.
      reach: for each matrix, a number. It is changed only if its largest singular value exceeds this.
      soft: whether to use the soft cap.

    Returns:
      The matrices in units of their caps, and their largest singular values or upper bounds of them.
    """
    # One matrix after the other, as LAPACK does it anyway, so that each gets the decomposition that it needs.
    if len(x) == 1:  # a loop would copy it in and out
        matrix, largest = _screened(x[0], cap[0], reach[0], soft)
        return matrix[None], largest[None]
    return jax.lax.map(lambda one: _screened(one[0], one[1], one[2], soft), (x, cap, reach))


def _screened(x: jax.Array, cap: jax.Array, reach: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array]:
    by_vectors = functools.partial(_by_vectors, soft=soft)
    return jax.lax.cond(length(x) <= reach, lambda x, _: (x, length(x)), by_vectors, x, cap)


def _by_vectors(x: jax.Array, cap: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array]:
    by_svd = functools.partial(_by_svd, soft=soft)
    return jax.lax.cond(_estimate(x) <= _REACH * cap, functools.partial(_by_gram, soft=soft), by_svd, x, cap)


def _by_gram(x: jax.Array, cap: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array]:
    eigenvalues, v = jnp.linalg.eigh(gram(x))
    values = jnp.sqrt(jnp.maximum(eigenvalues, 0))
    # The estimate may have been far too low.
    return jax.lax.cond(
        values[-1] <= 2 * _REACH * cap,
        lambda x, cap: (_by_right_vectors(x, values, v, cap, soft), values[-1]),
        functools.partial(_by_svd, soft=soft),
        x,
        cap,
    )


def _by_svd(x: jax.Array, cap: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array]:
    u, values, vh = jnp.linalg.svd(x, full_matrices=False)
    # If the cap is lost in the rounding of the largest singular value, x v may be lost, too, for the v of a smaller
    # one. Then use the vectors of both sides, so that nothing exceeds the cap.
    is_lost = cap <= _LOST * float(jnp.finfo(cap.dtype).eps) * values[0]
    matrix = jax.lax.cond(
        is_lost,
        lambda: product(times_columns(u, values / cap * share(values / cap, soft)), vh),
        lambda: _by_right_vectors(x, values, turned(vh), cap, soft),
    )
    return matrix, values[0]


def _by_right_vectors(x: jax.Array, values: jax.Array, v: jax.Array, cap: jax.Array, soft: bool) -> jax.Array:
    """Applies the cap without the left vectors, which may fit the right vectors less well than these fit x.

    For a matrix of 1024 x 1024 with singular values down to 1e-6 of the largest, LAPACK's own U S V^T is off by 130 eps
    of the largest.
    """
    return product(times_columns(product(x, v), share(values / cap, soft) / cap), turned(v))


def share(ratio: jax.Array, soft: bool) -> jax.Array:
    """Returns the share of a singular value that the cap leaves, for a value of `ratio` times the cap."""
    return jax.lax.rsqrt(1 + jnp.square(ratio)) if soft else 1 / jnp.maximum(ratio, 1)


def _estimate(x: jax.Array) -> jax.Array:
    """Returns a lower bound of the largest singular value, rarely far below it: one step of power iteration."""
    longest = jnp.argmax(jnp.sum(jnp.square(jnp.abs(x)), axis=1))
    v = jnp.conj(x[longest])[:, None]
    u = product(x, v / length(v).astype(v.dtype))
    return length(product(turned(x), u / length(u).astype(u.dtype)))
