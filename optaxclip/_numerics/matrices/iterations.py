"""Singular values by matrix products alone.

The norm: the trace of a power of the Gram matrix, which lies above the power of the largest eigenvalue, and by less the
higher the power.

The cap: all comes from polar factors, which have the singular vectors of a matrix and for singular values ones. With
c the cap and s a singular value of A, the polar factor of A on top of c I has on top

    m = s / sqrt(s^2 + c^2),    below    k = c / sqrt(s^2 + c^2).

c m is the soft cap. The hard one is c m / max(m, k). As m^2 + k^2 = 1,

    max(m, k)^2 = (1 + |t|) / 2,    t = m^2 - k^2 = 1 - 2 k^2,

where |t| is t times its sign, again a polar factor, and the inverse root is a polynomial. Everything after the first
polar factor is in units of the cap, so the result exceeds the cap by rounding at most.

Compile time: a TPU's compiler (libtpu of jax 0.10.2) takes 1 to 8 s for each product in full precision that it has not
met before. So each iteration is a loop, and all products have one of three forms: X^T X and X P of the tall matrix, and
P Q of square ones. Barriers keep XLA from fusing anything with them. Products that look the same are compiled once.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._numerics.matrices.products import gram, length, product, turned

# Below this part of the largest singular value, the first steps to a polar factor let others shrink as well. A smaller
# one takes fewer steps, and loses in rounding what it shrinks by.
_CUSHION = 0.2


def largest_singular_values(x: jax.Array) -> jax.Array:
    """Of tall matrices with moduli of at most 1 the largest singular value: to 1e-5, 1e-12 in float64, and rounding."""
    squares = gram(x)
    n, info = squares.shape[-1], jnp.finfo(squares.dtype)
    tolerance = 1e-5 if info.bits <= 32 else 1e-12
    # The trace of the 2^k-th power of the Gram matrix lies above by a factor of up to n.
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
    """What `decompositions.capped` does, with the same arguments."""
    # All together, as accelerators like it, so that one matrix outside takes the others along. Both conditions pay: the
    # first saves about 20 products of square matrices, the second all others.
    largest = jax.lax.cond(jnp.all(length(x) <= reach), length, _largest_of_padded, x)

    def cap_all(x: jax.Array) -> jax.Array:
        whole = _or_one(largest * (1 + 1e-5))
        both = _angles(x / whole[:, None, None].astype(x.dtype), cap / whole)
        return (both if soft else _hard(both))[:, : x.shape[-2]]

    return jax.lax.cond(jnp.all(largest <= reach), lambda x: x, cap_all, x), largest


def _largest_of_padded(x: jax.Array) -> jax.Array:
    """The largest singular values, from matrices of the shape that `_angles` makes: one product less to compile."""
    return largest_singular_values(jnp.concatenate([x, jnp.zeros_like(x[:, : x.shape[-1]])], axis=-2))


def _angles(x: jax.Array, cap: jax.Array) -> jax.Array:
    """U m V^T on top of V k V^T, of tall matrices with singular values up to 1."""
    eps = float(jnp.finfo(x.dtype).eps)
    cap = cap.astype(x.dtype)[:, None, None]
    norm = jnp.sqrt(1 + jnp.square(cap))
    both = jnp.concatenate([x / norm, cap / norm * _identity(x)], axis=-2)
    # A cap of 1e-5 of the largest singular value is told from 0, or of 1e-11 in float64. Rounding is larger below it.
    return _polar(both, eps**-0.7, gram)


def _hard(both: jax.Array) -> jax.Array:
    """U m / max(m, k) V^T on top, of what `_angles` returns."""
    bottom = both[:, -both.shape[-1] :]
    identity, eps = _identity(bottom), float(jnp.finfo(bottom.dtype).eps)
    bottom = (bottom + turned(bottom)) / 2
    t = identity - 2 * _product(bottom, bottom)
    # Where t is below the root of eps, its sign is not resolved: it costs that root at most. t is symmetric, so its
    # square is its Gram matrix.
    size = _product(t, _polar(t, eps**-0.5, lambda t: _product(t, t)))
    return _product(both, _inverse_root(2 * size - identity))


def _polar(x: jax.Array, condition: float, square: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The polar factor of matrices with singular values up to 1. Those below `1 / condition` end between 0 and 1."""

    def step(x: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, None]:
        a, b = coefficients
        return _product(x, a * _identity(x) - b * square(x)), None

    steps = _cubics(1 / condition, float(jnp.finfo(x.dtype).eps))
    return jax.lax.scan(step, x, jnp.asarray(steps, x.dtype))[0]


def _inverse_root(y: jax.Array) -> jax.Array:
    """The inverse root of (3 + y) / 4, of symmetric matrices with eigenvalues from -1 to 1."""
    identity = _identity(y)

    def step(total: jax.Array, coefficient: jax.Array) -> tuple[jax.Array, None]:
        return _product(total, y) + coefficient * identity, None

    first, second, *others = _inverse_root_coefficients(float(jnp.finfo(y.dtype).eps))
    return jax.lax.scan(step, first * y + second * identity, jnp.asarray(others, y.dtype))[0]


@functools.cache
def _inverse_root_coefficients(eps: float) -> list[float]:
    """Those of a polynomial that is 2 / sqrt(3 + y) on [-1, 1] to eps, the highest power first."""
    # Errors of interpolation shrink by 3 + sqrt(8) with each degree, as the function's singularity is at -3.
    degree = math.ceil(-math.log(eps) / math.log(3 + math.sqrt(8)))
    fit = np.polynomial.Chebyshev.interpolate(lambda y: 2 * (3 + y) ** -0.5, degree)
    return fit.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()


@functools.cache
def _cubics(lowest: float, eps: float) -> list[tuple[float, float]]:
    """The coefficients of steps `a x - b x^3` that bring all of [lowest, 1] to 1, one after the other.

    Each is the best of its kind on the interval that the last one left, [lowest, highest]: it has the same error at
    both ends and, above 1, in between.
    """
    steps: list[tuple[float, float]] = []
    highest = 1.0
    while highest - lowest > eps:
        part = max(lowest / highest, _CUSHION)
        turn = math.sqrt((1 + part + part**2) / 3)  # where x (3 turn^2 - x^2) is largest; it is the same at both ends
        low, high = part * (1 + part), 2 * turn**3
        scale = 2 / (low + high)
        steps.append((scale * 3 * turn**2 / highest, scale / highest**3))
        a, b = steps[-1]
        lowest, highest = min(a * lowest - b * lowest**3, scale * low), scale * high
    return steps


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # Barriers on both sides keep XLA from fusing anything with it: so it is the same program wherever it is used. At
    # 3072 x 768 the cap compiles for a TPU in 29 s with both, in 76 or 86 s with either (jax 0.10.2). They can go when
    # such products compile in less than a second.
    return jax.lax.optimization_barrier(product(*jax.lax.optimization_barrier((x, y))))


def _identity(x: jax.Array) -> jax.Array:
    """A stack of one, of the size of the columns."""
    return jnp.eye(x.shape[-1], dtype=x.dtype)[None]


def _trace(x: jax.Array) -> jax.Array:
    return jnp.real(jnp.trace(x, axis1=-2, axis2=-1))


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.ones_like(x))
