"""Products of stacked matrices, in full precision.

By default a TPU multiplies float32 in bfloat16, and a GPU in TF32. With either, capped singular values are off by 50 to
300 times what is promised. With HIGHEST, six passes of bfloat16 or float32 proper, they are off by a twentieth of it at
most. HIGH is not enough: on a TPU, three passes, it uses 0.8 of the promise, and on a GPU it is TF32. This is by
calculation, with the units emulated (tests/clippers/test_matrix_units.py), not measured on a device.
"""

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
