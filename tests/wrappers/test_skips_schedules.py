"""The clock of a threshold inside a skip: it counts every step, while statistics and the inner optimizer hold still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import Threshold, clip_stats, norms, thresholds
from tests.reference.trees import assert_same_bits

# The recipe in the docstring of `skip_spikes`.
STEPS_10_TO_12 = thresholds.constant(lambda step: jnp.where((step >= 10) & (step <= 12), 0.0, jnp.inf))


def run(tx, given, params=None):
    """Which of these gradients of one number are taken, and the last state."""

    @jax.jit
    def scan(given):
        def step(state, grad):
            out, state = tx.update(grad[None], state, params, value=grad)
            return state, out[0] != 0

        return jax.lax.scan(step, tx.init(jnp.ones(1)), given)

    state, taken = scan(jnp.asarray(given, jnp.float32))
    return np.asarray(taken), state


def test_skip_steps_10_to_12():
    tx = oc.skip_spikes(optax.sgd(lambda step: 1.0 + step), STEPS_10_TO_12, max_consecutive=None)
    taken, state = run(tx, np.ones(20))
    np.testing.assert_array_equal(np.flatnonzero(~taken), [10, 11, 12])
    assert int(optax.tree.get(state, "count")) == 17
    assert clip_stats(state)["skipped_norm"] == 3


def test_a_step_that_is_skipped_for_another_reason_counts_too():
    given = np.ones(20)
    given[[3, 11]] = np.nan, np.inf
    by_loss = oc.skip_spikes(
        optax.identity(), thresholds.constant(5.0), loss_threshold=STEPS_10_TO_12, max_consecutive=None
    )
    given[4] = 9.0
    taken, state = run(by_loss, given)
    np.testing.assert_array_equal(np.flatnonzero(~taken), [3, 4, 10, 11, 12])
    assert clip_stats(state)["skipped_nonfinite"] == 2
    assert clip_stats(state)["skipped_loss"] == 2


def test_the_statistics_beside_a_schedule_hold_still():
    given = np.where(np.arange(30) % 5 == 4, 1e3, 1.0)
    threshold = thresholds.chain(thresholds.mean_std(6.0, window=8, warmup_steps=3), STEPS_10_TO_12)
    taken, state = run(oc.skip_spikes(optax.identity(), threshold, max_consecutive=None), given)
    np.testing.assert_array_equal(taken, (given == 1) & ~np.isin(np.arange(30), [10, 11, 12]))
    window, scheduled = state.norm_threshold_state
    assert int(scheduled.schedule_step) == 30
    assert int(window.window_seen[0]) == np.sum(taken)
    np.testing.assert_array_equal(window.window_norms, np.ones((1, 8)))


def counting():
    """A threshold as a user writes one: it counts steps, and follows the largest norm that is finite."""

    def limit(norms, state, param_norms, **extra_args):
        step, largest = state
        seen = jnp.where(jnp.isfinite(norms), jnp.maximum(largest, norms), largest)
        return (0.0, jnp.where(step < 4, jnp.inf, 2 * largest)), (step + 1, seen)

    return Threshold(lambda norms: (jnp.zeros((), jnp.int32), jnp.zeros(())), limit)


def test_a_threshold_of_a_user_counts_on():
    given = [1.0, 2.0, np.nan, 1.0, 9.0, 3.0, np.inf, 9.0, 1.0]
    taken, state = run(oc.skip_spikes(optax.identity(), counting(), max_consecutive=None), given)
    np.testing.assert_array_equal(taken, [True, True, False, True, False, True, False, False, True])
    assert_same_bits(state.norm_threshold_state, (jnp.int32(9), jnp.float32(3.0)))


def test_a_schedule_relative_to_the_parameters():
    threshold = thresholds.relative_to_params(lambda step: jnp.where(step == 2, 0.1, 1.0))
    params = jnp.full(1, 10.0)
    tx = oc.skip_spikes(optax.identity(), threshold, norm=norms.leaf_norm(), max_consecutive=None)
    taken, state = run(tx, [5.0, 50.0, 5.0, 5.0, np.nan], params)
    np.testing.assert_array_equal(taken, [True, False, False, True, False])
    assert int(state.norm_threshold_state.schedule_step) == 5


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_nobody_looks_for_nan_where_a_threshold_is_asked_with_it(flag):
    """jax itself finds it only in some programs, those that it has not run before."""
    asked = []

    def limit(norms, step, param_norms, **extra_args):
        asked.append((bool(jnp.isnan(norms)), getattr(jax.config, flag)))
        return (0.0, 1.0), step + 1

    tx = oc.skip_spikes(optax.identity(), Threshold(lambda norms: jnp.zeros((), jnp.int32), limit))
    state = tx.init(jnp.ones(2))
    jax.config.update(flag, True)
    try:
        _, state = tx.update(jnp.ones(2), state)
        assert getattr(jax.config, flag)
    finally:
        jax.config.update(flag, False)
    assert asked == [(False, True), (True, False)]
    assert int(state.norm_threshold_state) == 1
