"""Arithmetic over the whole float range, also where something is broadcast under vmap alone."""

import jax
import numpy as np
import pytest

from optaxclip._numerics import arithmetic

SIZES = np.float32([2e-37, 1e-20, 1.0, 1e20, 1e37, 9e37, 3.4e38])


@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
def test_quotients_by_one_number_for_a_batch(shape):
    """XLA multiplies by the reciprocal of what is broadcast, which may be subnormal."""
    eager = jax.vmap(arithmetic.quotient, (0, None))
    jitted = jax.jit(eager)
    for whole in SIZES:
        wholes = np.full(shape, whole)
        shares = np.float64([0.25, 0.9, 1.0])
        batch = np.float32(shares * np.float64(whole))
        given = np.broadcast_to(batch.reshape(3, *[1] * len(shape)), (3, *shape))
        right = (np.float64(batch) / np.float64(whole)).reshape(3, *[1] * len(shape)) + np.zeros((3, *shape))
        for quotients in (eager, jitted):
            np.testing.assert_allclose(quotients(given, wholes), right, rtol=3e-7, err_msg=str(whole))
