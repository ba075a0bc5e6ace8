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
    dtypes_apart,
    first_step,
    rows,
    takes_record,
    transformation,
)
from tests.reference.trees import assert_same_bits, stack
from tests.table import ROWS, params, tree


@rows()
def test_one_trace_serves_calls_in_a_row_a_scan_and_a_branch_of_cond(row):
    """Not run, since tracing is what counts: it is traced once more if dtypes or weak types have changed."""

    def steps(step, go, updates, weights):
        state = transformation(row).init(weights)
        for _ in range(3):
            updates, state = step(updates, state, weights)
        carry, _ = jax.lax.scan(lambda carry, _: (step(*carry, weights), None), (updates, state), length=3)
        return jax.lax.cond(go, lambda: step(*carry, weights), lambda: carry)

    for dtype in dtypes_apart(row):
        chex.clear_trace_counter()
        step = jax.jit(chex.assert_max_traces(transformation(row).update, n=1))
        jax.eval_shape(functools.partial(steps, step), True, tree(0, dtype), params(dtype))


@functools.cache
def one_of_each_state():
    """A row for each class of state, alone or inside another: what a scan carries and what is donated."""
    chosen, known = [], set()
    for row in ROWS:
        classes = set(classes_in(jax.eval_shape(transformation(row).init, params("float32"))))
        if classes - known:
            chosen.append(row)
            known |= classes
    return chosen


def classes_in(state):
    """The classes of all named tuples in a state."""
    if isinstance(state, tuple):
        yield type(state)
        for part in state:
            yield from classes_in(part)


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

    def program(state):
        def step(updates, weights):
            new_updates, new_state = tx.update(updates, state, weights)
            assert new_state is None or new_state == optax.EmptyState()
            return new_updates

        return str(jax.make_jaxpr(step)(updates, weights))

    assert program(None) == program(optax.EmptyState())


@rows()
def test_a_checkpoint_continues_bit_for_bit(row):
    tx, weights = transformation(row), params("float32")
    _, state = first_step(row, tree(0, "float32"), weights)
    structure = jax.tree.structure(jax.eval_shape(tx.init, weights))
    saved = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved])
    later = tree(10, "float32")
    assert_same_bits(compiled(row)(later, restored, weights), compiled(row)(later, state, weights))
