"""Several steps of every row: states are traced once, carried, donated and restored."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.conformance.rows import (
    assert_finite,
    compiled,
    first_step,
    rows,
    rows_and_dtypes,
    stack,
    takes_record,
    transformation,
)
from tests.reference.trees import assert_same_bits
from tests.table import ROWS, params, tree


@rows_and_dtypes()
def test_one_trace_over_three_calls(row, dtype):
    tx, weights = transformation(row), params(dtype)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    updates, state = tree(0, dtype), tx.init(weights)
    for _ in range(3):
        # Not run, since tracing is what counts: once more if dtypes or weak types had changed.
        updates, state = jax.eval_shape(step, updates, state, weights)


@rows_and_dtypes()
def test_the_state_can_be_carried_by_scan(row, dtype):
    tx, weights = transformation(row), params(dtype)

    def step(carry, _):
        updates, state = carry
        return tx.update(updates, state, weights), None

    carry = (tree(0, dtype), tx.init(weights))
    jax.eval_shape(lambda: jax.lax.scan(step, carry, length=3))


@rows_and_dtypes()
def test_a_step_can_be_a_branch_of_cond(row, dtype):
    tx, updates, weights = transformation(row), tree(0, dtype), params(dtype)
    state = tx.init(weights)
    jax.eval_shape(
        lambda go: jax.lax.cond(go, lambda: tx.update(updates, state, weights), lambda: (updates, state)), True
    )


@functools.cache
def one_of_each_state():
    """A row for each class of state: what a scan carries and what is donated."""
    classes = {}
    for row in ROWS:
        state = jax.eval_shape(transformation(row).init, params("float32"))
        classes.setdefault(jax.tree.structure(state), row)
    return classes.values()


@rows(where=lambda row: row in one_of_each_state())
def test_a_scan_with_everything_donated_twice_equals_a_loop(row):
    tx = transformation(row)
    batches = [[tree(seed, "float32"), tree(seed + 10, "float32")] for seed in (0, 50)]
    expected, loop_state = [], tx.init(params("float32"))
    for updates in (*batches[0], *batches[1]):
        out, loop_state = compiled(row)(updates, loop_state, params("float32"))
        expected.append(out)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def run(stacked, state, weights):
        def body(state, updates):
            return tx.update(updates, state, weights)[::-1]

        state, outs = jax.lax.scan(body, state, stacked)
        return outs, state, weights

    # The parameters are donated as well: no state may share a buffer with them.
    weights = params("float32")
    state = tx.init(weights)
    for i, batch in enumerate(batches):
        outs, state, weights = run(stack(batch), state, weights)
        # Gradients are of order 1, and a carry added to one may cancel most of it.
        chex.assert_trees_all_close(outs, stack(expected[2 * i : 2 * i + 2]), rtol=1e-6, atol=1e-7)
    # Norms are of order 1, and a standard deviation is a difference of them.
    chex.assert_trees_all_close(state, loop_state, rtol=1e-6, atol=1e-6)


@rows(where=lambda row: not takes_record(row))
def test_ordinary_gradients_leave_no_infinity_in_the_state(row):
    """Under `jax_debug_infs` one would be an error. Those that can have a record: numerics/test_debug_infs.py."""
    weights = params("float32")
    state = transformation(row).init(weights)
    for seed, scale in enumerate((1.0, 2.0, 0.0, 3.0, 1e-3)):
        updates, state = compiled(row)(tree(seed, "float32", scale), state, weights)
        assert_finite((updates, state))


@rows()
def test_a_state_is_strongly_typed_and_has_no_count(row):
    state = transformation(row).init(params("float32"))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    # optax.tree.get(state, "count") has to find the optimizer's.
    assert optax.tree.get(state, "count") is None


@rows(where=lambda row: row.stateless)
def test_a_stateless_transformation_takes_and_returns_any_state(row):
    tx, updates, weights = transformation(row), tree(0, "float32"), params("float32")
    assert tx.init(weights) == optax.EmptyState()
    expected, _ = first_step(row, updates, weights)
    new_updates, new_state = tx.update(updates, None, weights)
    assert new_state is None or new_state == optax.EmptyState()
    chex.assert_trees_all_close(new_updates, expected, rtol=1e-6)


@rows()
def test_a_checkpoint_continues_bit_for_bit(row):
    tx, weights = transformation(row), params("float32")
    _, state = first_step(row, tree(0, "float32"), weights)
    saved = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(tx.init(weights)), [jnp.asarray(leaf) for leaf in saved])
    later = tree(10, "float32")
    assert_same_bits(compiled(row)(later, restored, weights), compiled(row)(later, state, weights))
