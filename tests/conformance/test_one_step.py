"""One step of every row: what is kept, what is bounded, what is not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip.core import RecordedState
from optaxclip.wrappers.skips import SkipState
from tests.conformance.rows import (
    abstract,
    assert_finite,
    assert_inside,
    compiled,
    first_step,
    first_updates,
    is_of_its_own,
    is_run_eagerly,
    of_several_dtypes,
    parameters_dtype,
    poisoned,
    rounding,
    rows,
    rows_and_dtypes,
    transformation,
)
from tests.reference.trees import assert_same_bits
from tests.table import by_path, params, tree


@rows_and_dtypes()
def test_structure_shapes_and_dtypes_are_kept(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    state = transformation(row).init(weights)
    new_updates, new_state = first_step(row, updates, weights)
    chex.assert_trees_all_equal_structs(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_structs(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert_finite(new_updates)


@pytest.mark.usefixtures("strict_promotion")
@rows_and_dtypes()
def test_the_parameters_dtype_does_not_decide_the_updates_and_nothing_is_promoted(row, dtype):
    updates, weights = abstract(tree(0, dtype)), abstract(params(parameters_dtype(row, dtype)))
    new_updates = jax.eval_shape(functools.partial(first_updates, row), updates, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)


@rows()
def test_leaves_of_different_dtypes_keep_theirs(row):
    updates, weights = of_several_dtypes(), params("float32")
    new_updates, _ = first_step(row, updates, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    assert_inside(row, new_updates, weights, rounding("bfloat16"))


@rows()
def test_float64_is_kept(row):
    with jax.enable_x64(True):
        weights = abstract(jax.tree.map(lambda x: np.asarray(x, np.float64), params("float32")))
        state = jax.eval_shape(transformation(row).init, weights)
        new_updates, new_state = jax.eval_shape(transformation(row).update, weights, state, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@rows(where=is_of_its_own)
def test_eager_equals_jit(row):
    tx = transformation(row)
    for dtype in row.dtypes if is_run_eagerly(row) else row.dtypes[:1]:
        updates, weights = tree(0, dtype), params(dtype)
        eager = tx.update(updates, tx.init(weights), weights)
        # The two may differ in the last place: XLA fuses a multiply and an add.
        last_place = 2 * float(jnp.finfo(dtype).eps)
        jitted = first_step(row, updates, weights)
        chex.assert_trees_all_close(eager, jitted, rtol=last_place, atol=0, custom_message=dtype)


@rows_and_dtypes()
def test_the_bound_holds(row, dtype):
    weights = params(dtype)
    for scale in (1e-3, 1.0, 1e3):
        updates = tree(0, dtype, scale)
        new_updates, _ = first_step(row, updates, weights)
        assert_inside(row, new_updates, weights, rounding(dtype))
        before, after = by_path(updates), by_path(new_updates)
        for path in row.untouched:
            np.testing.assert_array_equal(after[path], before[path], err_msg=f"at scale {scale}")


@rows(where=lambda row: not (row.first_passes or row.bounds_weights))
def test_the_bound_of_the_table_is_one_that_can_fail(row):
    weights = params("float32")
    with pytest.raises(AssertionError, match="is not within"):
        assert_inside(row, tree(0, "float32", 1e3), weights, rounding("float32"))


@rows_and_dtypes(where=lambda row: row.direction_preserving)
def test_direction_is_kept(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    after = row.split(first_step(row, updates, weights)[0])
    for name, before in row.split(updates).items():
        factors = np.ravel(after[name] / before)
        assert np.all(np.real(factors) > 0), name
        np.testing.assert_allclose(factors, factors[0], rtol=2 * rounding(dtype))


@rows_and_dtypes(where=lambda row: row.inside is not None)
def test_inside_the_band_every_bit_is_kept(row, dtype):
    updates = tree(0, dtype, row.inside)
    # A subnormal number shows a multiplication by 1, which would flush it.
    bias = updates["dense"]["bias"]
    subnormal = jnp.asarray(np.asarray(float(jnp.finfo(dtype).smallest_subnormal) * 3).astype(bias.dtype))
    updates["dense"]["bias"] = jnp.stack([subnormal, -jnp.zeros_like(subnormal), bias[2]])
    new_updates, _ = first_step(row, updates, params(dtype))
    assert_same_bits(new_updates, updates)


@rows(where=lambda row: row.idempotent)
def test_a_second_application_changes_nothing_more(row):
    weights = params("float32")
    once, state = first_step(row, tree(0, "float32", 10.0), weights)
    twice, _ = compiled(row)(once, state, weights)
    chex.assert_trees_all_close(twice, once, rtol=1e-5)


@rows_and_dtypes(where=lambda row: not row.bounds_weights)
def test_zero_gradients_stay_zero(row, dtype):
    zeros = jax.tree.map(jnp.zeros_like, tree(0, dtype))
    new_updates, _ = first_step(row, zeros, params(dtype))
    chex.assert_trees_all_equal(new_updates, zeros)


@rows()
def test_zero_gradients_and_parameters_stay_zero(row):
    zeros = jax.tree.map(jnp.zeros_like, tree(0, "float32"))
    new_updates, _ = first_step(row, zeros, zeros)
    chex.assert_trees_all_equal(new_updates, zeros)


@rows_and_dtypes(where=lambda row: not (row.elementwise or row.zeroes))
def test_a_group_that_is_not_finite_passes_and_stops_no_other(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    clean = row.split(first_step(row, updates, weights)[0])
    for value in (np.nan, np.inf, -np.inf):
        bad = poisoned(updates, value)
        before, after = row.split(bad), row.split(first_step(row, bad, weights)[0])
        sick = {name for name, group in before.items() if not np.all(np.isfinite(group))}
        assert sick
        for name, group in after.items():
            what = f"{name} with {value}"
            if name in sick:
                np.testing.assert_array_equal(group, before[name], err_msg=what)
            else:
                np.testing.assert_allclose(group, clean[name], rtol=2 * float(jnp.finfo(dtype).eps), err_msg=what)


@rows_and_dtypes(where=lambda row: row.elementwise and not row.zeroes)
def test_where_values_are_clipped_nan_passes_and_inf_does_not(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    clean = by_path(first_step(row, updates, weights)[0])["dense/kernel"]
    for value, passes in ((np.nan, True), (np.inf, False), (-np.inf, False)):
        after = first_step(row, poisoned(updates, value), weights)[0]
        kernel = by_path(after)["dense/kernel"]
        np.testing.assert_array_equal(np.delete(kernel, 0), np.delete(clean, 0))
        assert np.isnan(kernel[0, 0]) == passes
        if not passes:
            assert_inside(row, after, weights, rounding(dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@rows_and_dtypes(where=lambda row: row.zeroes)
def test_what_is_not_finite_comes_out_as_zero(row, dtype, value):
    updates, weights = tree(0, dtype), params(dtype)
    after, _ = first_step(row, poisoned(updates, value), weights)
    expected = {"step": jax.tree.map(jnp.zeros_like, updates), "coordinate": poisoned(updates, 0.0)}[row.zeroes]
    assert_same_bits(after, expected)


def without_record(state):
    """The state but for the record and the counters, which are there to show such steps."""
    if isinstance(state, SkipState):
        return state._replace(skip_stats=None)
    return state.threshold_state if isinstance(state, RecordedState) else state


@pytest.mark.parametrize("value", [np.nan, np.inf])
@rows(where=lambda row: not row.takes_zero)
def test_a_step_that_is_not_finite_leaves_the_state_of_a_zero_step(row, value):
    updates, weights = tree(0, "float32"), params("float32")
    _, after_bad = first_step(row, jax.tree.map(lambda leaf: jnp.full_like(leaf, value), updates), weights)
    _, after_zero = first_step(row, jax.tree.map(jnp.zeros_like, updates), weights)
    chex.assert_trees_all_equal(without_record(after_bad), without_record(after_zero))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@rows(where=lambda row: row.takes_zero)
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(row, value):
    weights = params("float32")
    _, after_bad = first_step(row, jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree(0, "float32")), weights)
    chex.assert_trees_all_equal(without_record(after_bad), without_record(transformation(row).init(weights)))
