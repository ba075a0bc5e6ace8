"""Arithmetic over the whole float range, also where something is broadcast under vmap alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip._numerics import arithmetic

SIZES = np.float32([2e-37, 1e-20, 1.0, 1e20, 1e37, 9e37, 3.4e38])


@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
@pytest.mark.parametrize("whole", SIZES)
def test_quotients_by_one_number_for_a_batch(whole, shape):
    """XLA multiplies by the reciprocal of what is broadcast, which may be subnormal."""
    wholes = jnp.full(shape, whole)
    shares = np.float64([0.25, 0.9, 1.0])
    batch = np.float32(shares * np.float64(whole))
    given = jnp.asarray(np.broadcast_to(batch.reshape(3, *[1] * len(shape)), (3, *shape)))
    right = (np.float64(batch) / np.float64(whole)).reshape(3, *[1] * len(shape)) + np.zeros((3, *shape))
    for wrap in (lambda fun: fun, jax.jit):
        found = wrap(jax.vmap(arithmetic.quotient, (0, None)))(given, wholes)
        np.testing.assert_allclose(found, right, rtol=3e-7)
