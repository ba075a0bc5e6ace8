"""Products of stacked matrices in full precision.

The default precision for float32 is bfloat16 on a TPU and TF32 on a GPU. With either, the error of capped singular
values is 50 to 300 times the promised one. HIGHEST (six passes of bfloat16, or true float32) keeps it below a twentieth
of the promise. HIGH is not enough: its three passes use 0.8 of the promise on a TPU, and on a GPU it is TF32.

These figures are from emulated units (tests/clippers/test_matrix_units.py), not measured on a device.
"""

import jax
import jax.numpy as jnp


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the matrix product."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def turned(x: jax.Array) -> jax.Array:
    """Returns the conjugate transpose."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def gram(x: jax.Array) -> jax.Array:
    """Returns the Gram matrix of the columns. Its eigenvalues are the squares of the singular values."""
    return product(turned(x), x)


def times_columns(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Multiplies each column by its own real number."""
    return x * jnp.expand_dims(numbers, -2).astype(x.dtype)


def length(x: jax.Array) -> jax.Array:
    """Returns the Frobenius norm of each matrix, which is at least its largest singular value."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), axis=(-2, -1)))
