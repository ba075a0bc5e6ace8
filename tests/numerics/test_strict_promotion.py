"""Under strict dtype promotion: weakly typed leaves, and leaves of several dtypes beside each other."""

import jax
import jax.numpy as jnp
import pytest

from tests.table import ROWS

pytestmark = pytest.mark.usefixtures("strict_promotion")

TREES = {
    "weak": {"a": jnp.full((2, 3), 2.0), "b": jnp.full(3, 0.5)},
    "mixed": {
        "a": jnp.ones((2, 3), jnp.bfloat16),
        "b": jnp.ones(3),
        "c": jnp.ones(2, jnp.float16),
        "d": jnp.ones((2, 3), jnp.complex64),
    },
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("row", [row for row in ROWS if row.any_tree], ids=lambda row: row.name)
def test_dtypes_are_kept(row, tree):
    grads, tx = TREES[tree], row.make()
    updates, _ = jax.eval_shape(lambda grads: tx.update(grads, tx.init(grads), grads), grads)
    assert {path: leaf.dtype for path, leaf in updates.items()} == {path: leaf.dtype for path, leaf in grads.items()}
