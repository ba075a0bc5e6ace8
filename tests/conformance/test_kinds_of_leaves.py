"""Every row on leaves and trees of every kind."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance.rows import assert_finite, first_step, is_of_its_own, is_run_eagerly, rows
from tests.conformance.ways import LITTLE, MISSING, Outcome, odd_leaves, outcomes, ways
from tests.table import by_path, params, tree


def eagerly(row, name):
    """What `outcomes` finds in this way, without jit."""
    way = ways(row, tree(0, "float32"), params("float32"))[name]
    given = jax.tree.map(jnp.asarray, way.updates)
    state = way.tx.init(way.weights)
    return Outcome(given, state, *way.tx.update(given, state, way.weights))


def assert_missing(row, missing, found):
    """What is missing stays missing and counts for nothing, as a zero does."""
    chex.assert_trees_all_equal_structs(found.updates, found.given)
    chex.assert_trees_all_equal_structs(found.state, found.first_state)
    zeroed = jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if keystr(path).startswith(missing) else x, tree(0, "float32")
    )
    expected = by_path(first_step(row, zeroed, params("float32"))[0])
    for path, leaf in by_path(found.updates).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6)


def keystr(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize("missing", MISSING)
@rows(where=is_of_its_own)
def test_a_missing_gradient_stays_missing_and_counts_for_nothing(row, missing):
    assert_missing(row, missing, outcomes(row)[f"no {missing}"])


@rows(where=is_run_eagerly)
def test_a_missing_gradient_without_jit(row):
    assert_missing(row, "dense/bias", eagerly(row, "no dense/bias"))


def assert_untouched(row, found):
    """Leaves that are not numbers pass as they are, and the others as without them."""
    chex.assert_trees_all_equal_structs(found.updates, found.given)
    chex.assert_trees_all_equal_structs(found.state, found.first_state)
    dense, given = dict(found.updates["dense"]), odd_leaves()
    for name, leaf in given.items():
        ours = dense.pop(name)
        assert ours.dtype == leaf.dtype, name
        assert ours.shape == leaf.shape, name
        bits = jax.random.key_data if name == "key" else np.asarray
        np.testing.assert_array_equal(bits(ours), bits(leaf), err_msg=name)
    expected, _ = first_step(row, tree(0, "float32"), params("float32"))
    chex.assert_trees_all_close(found.updates | {"dense": dense}, expected, rtol=1e-6)


@rows(where=is_of_its_own)
def test_leaves_that_are_not_numbers_pass_untouched_and_uncounted(row):
    assert_untouched(row, outcomes(row)["odd leaves"])


@rows(where=is_run_eagerly)
def test_leaves_that_are_not_numbers_without_jit(row):
    assert_untouched(row, eagerly(row, "odd leaves"))


def assert_little(found):
    """The step keeps a tree with few numbers or none in it, and the state."""
    chex.assert_trees_all_equal_structs((found.updates, found.state), (found.given, found.first_state))
    chex.assert_trees_all_equal_shapes_and_dtypes(found.updates, found.given)
    if jax.tree.leaves(found.updates):
        assert_finite(found.updates)


@pytest.mark.parametrize("few", LITTLE)
@rows(where=lambda row: is_of_its_own(row) and row.any_tree)
def test_trees_with_little_in_them(row, few):
    assert_little(outcomes(row)[few])


@pytest.mark.parametrize("few", LITTLE)
@rows(where=is_run_eagerly)
def test_trees_with_little_in_them_without_jit(row, few):
    assert_little(eagerly(row, few))
