"""Every row on leaves and trees of every kind."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance.rows import (
    assert_finite,
    first_step,
    rows,
    transformation,
)
from tests.table import by_path, params, tree


@pytest.mark.parametrize("missing", ["dense/bias", "dense", "scale"])
@rows()
def test_a_missing_gradient_stays_missing_and_counts_for_nothing(row, missing):
    updates, weights = tree(0, "float32"), params("float32")
    zeroed = jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if keystr(path).startswith(missing) else x, updates
    )
    some = {"dense": dict(updates["dense"]), "scale": updates["scale"]}
    *above, last = missing.split("/")
    functools.reduce(operator.getitem, above, some)[last] = None
    state = transformation(row).init(weights)
    new_updates, new_state = transformation(row).update(some, state, weights)
    chex.assert_trees_all_equal_structs(new_updates, some)
    chex.assert_trees_all_equal_structs(new_state, state)
    # A zero counts for nothing either.
    expected = by_path(first_step(row, zeroed, weights)[0])
    for path, leaf in by_path(new_updates).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6)


def keystr(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def odd_leaves():
    """What else is found in a tree of gradients; none of it can be clipped."""
    return {
        "steps": jnp.arange(3),
        "flag": jnp.asarray(True),
        "no_gradient": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
    }


def assert_same_leaves(ours, given):
    for name, leaf in given.items():
        assert ours[name].dtype == leaf.dtype, name
        assert ours[name].shape == leaf.shape, name
    np.testing.assert_array_equal(ours["steps"], given["steps"])
    np.testing.assert_array_equal(ours["flag"], given["flag"])
    np.testing.assert_array_equal(jax.random.key_data(ours["key"]), jax.random.key_data(given["key"]))


@rows()
def test_leaves_that_are_not_numbers_pass_untouched_and_uncounted(row):
    updates, weights, odd = tree(0, "float32"), params("float32"), odd_leaves()
    tx = transformation(row)
    expected, _ = first_step(row, updates, weights)
    updates["dense"] |= odd
    weights["dense"] |= odd
    state = tx.init(weights)
    new_updates, new_state = tx.update(updates, state, weights)
    traced_updates, traced_state = jax.eval_shape(tx.update, updates, state, weights)
    chex.assert_trees_all_equal_structs(new_state, traced_state, state)
    chex.assert_trees_all_equal_structs(new_updates, traced_updates, updates)
    assert_same_leaves({name: new_updates["dense"].pop(name) for name in odd}, odd)
    chex.assert_trees_all_close(new_updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "updates",
    [{}, (), {"a": None}, np.float32(2.0), np.ones((0, 2), np.float32), {"a": np.arange(3)}],
    ids=["dict", "tuple", "none", "scalar", "empty", "integers"],
)
@rows(where=lambda row: row.any_tree)
def test_trees_with_little_in_them(row, updates):
    updates = jax.tree.map(jnp.asarray, updates)
    tx = transformation(row)
    state = tx.init(updates)
    new_updates, new_state = tx.update(updates, state, updates)
    chex.assert_trees_all_equal_structs((new_updates, new_state), (updates, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    if jax.tree.leaves(updates):
        assert_finite(new_updates)
