"""Singular values by matrix products alone.

The norm: the trace of a power of the Gram matrix is at least that power of the largest eigenvalue. The higher the
power, the smaller the gap.

The cap: it is built from polar factors. The polar factor of a matrix has the same singular vectors, and all singular
values 1. Let c be the cap and s a singular value of A. The polar factor of A on top of c I has

    m = s / sqrt(s^2 + c^2)  on top,    k = c / sqrt(s^2 + c^2)  below.

The soft cap is c m. The hard cap is c m / max(m, k). As m^2 + k^2 = 1,

    max(m, k)^2 = (1 + |t|) / 2,    t = m^2 - k^2 = 1 - 2 k^2.

|t| is t times its sign, and the sign is again a polar factor. The inverse root is a polynomial. Everything after the
first polar factor is in units of the cap, so the result exceeds the cap by rounding only.

Compile time: a TPU's compiler (libtpu of jax 0.10.2) takes 1 to 8 s for each new product in full precision, but
compiles equal products once. So each iteration is a loop, and all products have one of three forms: X^T X and X P of
the tall matrix, and P Q of square matrices. Barriers keep XLA from fusing anything with them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._numerics.matrices.products import gram, length, product, turned

# In the first steps to a polar factor, singular values below this share of the largest may shrink as well. A smaller
# share takes fewer steps, but increases the rounding error by as much as they shrink.
_CUSHION = 0.2


def largest_singular_values(x: jax.Array) -> jax.Array:
    """Returns the largest singular value of tall matrices with moduli of at most 1.

    The error is 1e-5 in float32 and 1e-12 in float64, plus rounding.
    """
    squares = gram(x)
    n, info = squares.shape[-1], jnp.finfo(squares.dtype)
    tolerance = 1e-5 if info.bits <= 32 else 1e-12
    # The trace of the 2^k-th power of the Gram matrix is too large by a factor of at most n.
    squarings = max(math.ceil(math.log2(max(math.log(n), tolerance) / tolerance)) - 1, 0)
    first = _or_one(_trace(squares))

    def square(i: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        power, log = at
        power = _product(power, power)
        trace = _or_one(_trace(power))
        return power / trace[:, None, None].astype(power.dtype), log + jnp.ldexp(jnp.log(trace), -(i + 1))

    start = (squares / first[:, None, None].astype(squares.dtype), jnp.log(first))
    _, log = jax.lax.fori_loop(0, squarings, square, start)
    return jnp.where(_trace(squares) > 0, jnp.exp(log / 2), jnp.zeros_like(log))


def capped(x: jax.Array, cap: jax.Array, reach: jax.Array, soft: bool) -> tuple[jax.Array, jax.Array]:
    """Does the same as `decompositions.capped`, with the same arguments."""
    # All matrices together, which is faster on accelerators: if one matrix exceeds its cap, all are calculated. Both
    # conditions pay: the first saves about 20 products of square matrices, the second all others.
    largest = jax.lax.cond(jnp.all(length(x) <= reach), length, _largest_of_padded, x)

    def cap_all(x: jax.Array) -> jax.Array:
        whole = _or_one(largest * (1 + 1e-5))
        both = _angles(x / whole[:, None, None].astype(x.dtype), cap / whole)
        return (both if soft else _hard(both))[:, : x.shape[-2]]

    return jax.lax.cond(jnp.all(largest <= reach), lambda x: x, cap_all, x), largest


def _largest_of_padded(x: jax.Array) -> jax.Array:
    """Returns the largest singular values, from padded matrices.

    They have the shape of those in `_angles`, so that there is one product less to compile.
    """
    return largest_singular_values(jnp.concatenate([x, jnp.zeros_like(x[:, : x.shape[-1]])], axis=-2))


def _angles(x: jax.Array, cap: jax.Array) -> jax.Array:
    """Returns U m V^T on top of V k V^T, for tall matrices with singular values up to 1."""
    eps = float(jnp.finfo(x.dtype).eps)
    cap = cap.astype(x.dtype)[:, None, None]
    norm = jnp.sqrt(1 + jnp.square(cap))
    both = jnp.concatenate([x / norm, cap / norm * _identity(x)], axis=-2)
    # Caps down to 1e-5 of the largest singular value (1e-11 in float64) differ from 0. Below that, rounding is larger.
    return _polar(both, eps**-0.7, gram)


def _hard(both: jax.Array) -> jax.Array:
    """Returns U m / max(m, k) V^T on top, given the result of `_angles`."""
    bottom = both[:, -both.shape[-1] :]
    identity, eps = _identity(bottom), float(jnp.finfo(bottom.dtype).eps)
    bottom = (bottom + turned(bottom)) / 2
    t = identity - 2 * _product(bottom, bottom)
    # If |t| is below the root of eps, its sign is not resolved, at the cost of that root at most. t is symmetric, so
    # its square is its Gram matrix.
    size = _product(t, _polar(t, eps**-0.5, lambda t: _product(t, t)))
    return _product(both, _inverse_root(2 * size - identity))


def _polar(x: jax.Array, condition: float, square: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the polar factor of matrices with singular values up to 1.

    Singular values below `1 / condition` end up between 0 and 1.
    """

    def step(x: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, None]:
        a, b = coefficients
        return _product(x, a * _identity(x) - b * square(x)), None

    steps = _cubics(1 / condition, float(jnp.finfo(x.dtype).eps))
    return jax.lax.scan(step, x, jnp.asarray(steps, x.dtype))[0]


def _inverse_root(y: jax.Array) -> jax.Array:
    """Returns the inverse root of (3 + y) / 4, for symmetric matrices with eigenvalues from -1 to 1."""
    identity = _identity(y)

    def step(total: jax.Array, coefficient: jax.Array) -> tuple[jax.Array, None]:
        return _product(total, y) + coefficient * identity, None

    first, second, *others = _inverse_root_coefficients(float(jnp.finfo(y.dtype).eps))
    return jax.lax.scan(step, first * y + second * identity, jnp.asarray(others, y.dtype))[0]


@functools.cache
def _inverse_root_coefficients(eps: float) -> list[float]:
    """Returns the coefficients of a polynomial that is 2 / sqrt(3 + y) on [-1, 1] to eps, highest power first."""
    # With each degree the interpolation error shrinks by 3 + sqrt(8), because the singularity is at -3.
    degree = math.ceil(-math.log(eps) / math.log(3 + math.sqrt(8)))
    fit = np.polynomial.Chebyshev.interpolate(lambda y: 2 * (3 + y) ** -0.5, degree)
    return fit.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()


@functools.cache
def _cubics(lowest: float, eps: float) -> list[tuple[float, float]]:
    """Returns the coefficients of steps `a x - b x^3` that together bring all of [lowest, 1] to 1.

    Each step is the best cubic on the interval that the previous one left, [lowest, highest]. Its error is the same at
    both ends and, above 1, in between.
    """
    steps: list[tuple[float, float]] = []
    highest = 1.0
    while highest - lowest > eps:
        part = max(lowest / highest, _CUSHION)
        turn = math.sqrt((1 + part + part**2) / 3)  # where x (3 turn^2 - x^2) is largest; it has one value at both ends
        low, high = part * (1 + part), 2 * turn**3
        scale = 2 / (low + high)
        steps.append((scale * 3 * turn**2 / highest, scale / highest**3))
        a, b = steps[-1]
        lowest, highest = min(a * lowest - b * lowest**3, scale * low), scale * high
    return steps


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # Barriers on both sides keep XLA from fusing anything with the product, so that it is the same program everywhere.
    # At 3072 x 768 the cap compiles for a TPU in 29 s with both barriers, and in 76 or 86 s with one of them (jax
    # 0.10.2). They can go when such products compile in less than a second.
    return jax.lax.optimization_barrier(product(*jax.lax.optimization_barrier((x, y))))


def _identity(x: jax.Array) -> jax.Array:
    """Returns a stack with one identity matrix, of the size of the columns."""
    return jnp.eye(x.shape[-1], dtype=x.dtype)[None]


def _trace(x: jax.Array) -> jax.Array:
    return jnp.real(jnp.trace(x, axis1=-2, axis2=-1))


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.ones_like(x))
