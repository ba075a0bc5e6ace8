"""Which dtypes come out: of weakly typed leaves and of leaves of several dtypes, and where float64 is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.table import ROWS, tree

SHAPES = {"a": (2, 3), "b": (3,), "c": (2,), "d": (2, 3)}
DTYPES = {"a": jnp.bfloat16, "b": jnp.float32, "c": jnp.float16, "d": jnp.complex64}
MIXED = {name: jax.ShapeDtypeStruct(SHAPES[name], DTYPES[name]) for name in SHAPES}
WEAK = {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.float32, weak_type=True) for name in "ab"}
PLAIN = {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.float32) for name in "ab"}
CASES = {
    "mixed": (lambda: jax.numpy_dtype_promotion("strict"), MIXED),
    "weak": (lambda: jax.numpy_dtype_promotion("strict"), WEAK),
    "x64": (lambda: jax.enable_x64(True), PLAIN),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_dtypes_are_kept_and_none_is_float64(row):
    """Sums take float64 in any case: it stays inside."""
    tx = row.make()

    def first_step(grads):
        state = tx.init(grads)
        return state, *tx.update(grads, state, grads)

    for case, (context, grads) in CASES.items():
        given = grads if row.any_tree else tree(0, "float32")
        with context():
            state, updates, after = jax.eval_shape(first_step, given)
        assert dtypes(updates) == dtypes(given), case
        assert not {*dtypes(state), *dtypes(after)} & WIDE, case


WIDE = {np.dtype(kind) for kind in ("float64", "complex128", "int64")}


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]
