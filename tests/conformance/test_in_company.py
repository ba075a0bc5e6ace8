"""Every row among the transformations of optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from tests.conformance.rows import (
    compiled,
    first_step,
    first_updates,
    is_of_its_own,
    rows,
    rows_and_dtypes,
    transformation,
)
from tests.conformance.ways import compositions, outcomes
from tests.reference.trees import stack
from tests.table import params, tree


@pytest.mark.slow  # what each way does is tested below in float32
@pytest.mark.parametrize("way", ["chain", "masked", "partition", "MultiSteps", "inject_hyperparams"])
@rows_and_dtypes(where=is_of_its_own)
def test_dtypes_survive_composition(row, dtype, way):
    tx, updates, weights = compositions(row, dtype)[way], tree(0, dtype), params(dtype)
    state = tx.init(weights)
    new_updates, new_state = jax.eval_shape(tx.update, updates, state, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@rows(where=is_of_its_own)
def test_chain_applies_one_after_the_other(row):
    clipped, _ = first_step(row, tree(0, "float32"), params("float32"))
    expected = jax.tree.map(lambda x: -0.5 * x, clipped)
    chex.assert_trees_all_close(outcomes(row)["chain"].updates, expected, rtol=1e-6)


@pytest.mark.parametrize("way", ["masked", "partition"])
@rows(where=lambda row: is_of_its_own(row) and not row.counts_entries)
def test_masked_leaves_count_for_nothing(row, way):
    masked, alone = outcomes(row)[way].updates, outcomes(row)["no scale"].updates
    chex.assert_trees_all_close(masked["dense"], alone["dense"], rtol=1e-6)
    assert masked["scale"] == {"masked": tree(0, "float32")["scale"], "partition": 0.0}[way]


@pytest.mark.slow
@rows(where=is_of_its_own)
def test_multi_steps_transforms_the_mean(row):
    @jax.jit
    def program(one, two, weights):
        tx = optax.MultiSteps(transformation(row), every_k_schedule=2)
        step = jax.jit(tx.update)
        first, state = step(one, tx.init(weights), weights)
        second, _ = step(two, state, weights)
        return first, second, first_updates(row, jax.tree.map(lambda a, b: (a + b) / 2, one, two), weights)

    one = tree(0, "float32")
    first, second, expected = program(one, tree(10, "float32"), params("float32"))
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, one))
    chex.assert_trees_all_close(second, expected, rtol=1e-5)


@rows(where=is_of_its_own)
def test_injected_hyperparameters_act_like_plain_ones(row):
    updates, weights = tree(0, "float32"), params("float32")
    state = transformation(row).init(weights)
    for way in ("inject_hyperparams", "inject_hyperparams twice"):
        plain, state = compiled(row)(updates, state, weights)
        chex.assert_trees_all_close(outcomes(row)[way].updates, plain, rtol=1e-6)


def raised(state, fields):
    """The state with 1 added to what some of its fields hold."""

    def one(path, leaf):
        return leaf + 1 if any(getattr(key, "name", None) in fields for key in path) else leaf

    return jax.tree_util.tree_map_with_path(one, state)


@rows()
def test_map_params_finds_the_way_through_the_state(row):
    tx = optax.chain(transformation(row), optax.trace(0.9))
    state = tx.init(params("float32"))
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[0], raised(state[0], row.param_state))
    chex.assert_trees_all_equal(mapped[1].trace, jax.tree.map(lambda x: x + 1, state[1].trace))


@rows(where=is_of_its_own)
def test_unknown_extra_arguments_are_ignored(row):
    plain, _ = first_step(row, tree(0, "float32"), params("float32"))
    chex.assert_trees_all_close(outcomes(row)["unknown arguments"].updates, plain, rtol=1e-6)


@rows(where=lambda row: is_of_its_own(row) and not row.needs_params)
def test_parameters_are_optional_where_they_are_not_needed(row):
    plain, _ = first_step(row, tree(0, "float32"), params("float32"))
    chex.assert_trees_all_close(outcomes(row)["no parameters"].updates, plain, rtol=1e-6)


@pytest.mark.slow
@rows(where=is_of_its_own)
def test_vmap_equals_a_loop(row):
    weights = params("float32")
    # One of the three far outside the band, one at zero: under vmap a cond runs both branches.
    examples = [tree(0, "float32"), tree(10, "float32", 1e25), jax.tree.map(jnp.zeros_like, weights)]

    @jax.jit
    def program(examples):
        one = functools.partial(first_updates, row, weights=weights)
        return jax.vmap(one)(examples), jax.lax.map(one, examples)

    batched, expected = program(stack(examples))
    chex.assert_trees_all_close(batched, expected, rtol=1e-6, atol=1e-6 if row.sums else 0)
