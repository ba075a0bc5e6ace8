"""Products of stacked matrices, in full precision: on accelerators float32 may otherwise mean three digits."""

import jax
import jax.numpy as jnp


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrix product."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def turned(x: jax.Array) -> jax.Array:
    """The conjugate transpose."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def gram(x: jax.Array) -> jax.Array:
    """The products of the columns: its eigenvalues are the squares of the singular values."""
    return product(turned(x), x)


def times_columns(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Each column times a real number of its own."""
    return x * jnp.expand_dims(numbers, -2).astype(x.dtype)


def length(x: jax.Array) -> jax.Array:
    """The root of the sum of all squares of each matrix, not below its largest singular value."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), axis=(-2, -1)))
