"""Losses of any sign, as those of policy gradients, ELBOs and flows are: which thresholds judge them, and how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import clip_by, clip_stats, norms, thresholds
from tests.reference.trees import assert_same_bits

NAN, INF = np.nan, np.inf


ONE = np.ones(1, np.float32)


@functools.cache  # one program for all sequences of a length
def judging(loss_threshold, max_consecutive):
    tx = oc.skip_spikes(
        optax.identity(), thresholds.constant(10.0), loss_threshold=loss_threshold, max_consecutive=max_consecutive
    )

    @jax.jit
    def scan(losses):
        def step(state, loss):
            out, state = tx.update(ONE, state, value=loss)
            return state, (out[0] == 0, state.loss_threshold_state)

        return jax.lax.scan(step, tx.init(ONE), losses)[1]

    return scan


def run(loss_threshold, losses, max_consecutive=20):
    """Which steps are skipped for their loss, and the states of the loss threshold after each step."""
    return judging(loss_threshold, max_consecutive)(np.asarray(losses, np.float32))


@functools.cache
def mean_std(**options):
    return thresholds.mean_std(6.0, **({"window": 16, "warmup_steps": 8} | options))


@functools.cache
def zscore(**options):
    return thresholds.zscore(6.0, **({"decay": 0.9, "warmup_steps": 8} | options))


DEVIATIONS = {"mean_std": mean_std, "zscore": zscore}


def with_spikes(rng, steps=120):
    """Losses about 0 with spikes up, and dips down that are none."""
    losses = rng.uniform(-1.5, 1.5, steps)
    losses[[40, 41, 90]] += 30.0
    losses[[60, 100]] -= 30.0
    return losses


@pytest.mark.parametrize("name", DEVIATIONS)
def test_what_stands_out_is_the_deviation_from_the_mean_wherever_that_is(rng, name):
    for level in (0.0, 5.0, -5.0, -1000.0):
        skipped, _ = run(DEVIATIONS[name](), with_spikes(rng) + level)
        np.testing.assert_array_equal(np.flatnonzero(skipped), [40, 41, 90], err_msg=str(level))


def moments(losses, decay=0.9, warmup=8):
    """Mean and standard deviation as `zscore` has them, in float64: plain ones of the warm-up, then moving ones."""
    losses, mean, var, rows = np.float64(losses), 0.0, 0.0, []
    for seen, loss in enumerate(losses, 1):
        if seen <= warmup:
            mean, var = np.mean(losses[:seen]), np.var(losses[:seen])
        else:
            mean = decay * mean + (1 - decay) * loss
            var = decay * var + (1 - decay) * (loss - mean) ** 2
        rows.append((mean, np.sqrt(var)))
    return np.transpose(rows)


def test_the_statistics_are_those_of_numpy(rng):
    for scale in (1.0, 1e-30, 1e30):
        losses = np.float32(rng.normal(size=50) * scale)
        _, states = run(zscore(), losses)
        mean, std = moments(losses)
        np.testing.assert_allclose(states.zscore_mean[:, 0], mean, rtol=1e-4, atol=1e-6 * scale)
        np.testing.assert_allclose(states.zscore_std[:, 0], std, rtol=1e-4)
        _, states = run(mean_std(), losses)
        np.testing.assert_array_equal(states.window_norms[-1, 0], np.roll(losses[-16:], 50 % 16))


def test_the_bound_is_that_of_numpy(rng):
    made = {
        (ddof, current): mean_std(ddof=ddof, include_current=current, take_in="raw").signed
        for ddof in (0, 1)
        for current in (False, True)
    }

    @jax.jit
    def step(loss, states):
        return {case: threshold.limit(loss, states[case], None) for case, threshold in made.items()}

    losses = np.float32(rng.normal(size=30))
    states = {case: threshold.init(jax.ShapeDtypeStruct((), jnp.float32)) for case, threshold in made.items()}
    for i, loss in enumerate(losses):
        for (ddof, current), ((_, bound), state) in step(loss, states).items():
            states[ddof, current] = state
            last = losses[: i + current][-16:].astype(np.float64)
            expected = np.mean(last) + 6 * np.std(last, ddof=ddof) if len(last) >= 8 else np.finfo(np.float32).max
            np.testing.assert_allclose(bound, expected, rtol=1e-5, err_msg=f"{ddof}, {current}")


@pytest.mark.parametrize("name", DEVIATIONS)
def test_ugly_losses(name):
    ordinary = [*[0.5, -0.5] * 1200, 50.0, 0.5]
    ugly = [0.0, 1e-40, -1e-40, 1e38, -1e38, 3.4e38, -3.4e38, 3.4e38, NAN, INF, -INF, 0.0, -0.0] * 3
    skipped, states = run(DEVIATIONS[name](warmup_steps=16), [*ugly, *ordinary], max_consecutive=None)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states))
    assert np.all(np.asarray(skipped)[: len(ugly)][~np.isfinite(ugly)])
    # And then it follows ordinary losses again.
    np.testing.assert_array_equal(skipped[-4:], [False, False, True, False])


@pytest.mark.parametrize("name", DEVIATIONS)
def test_equal_losses_and_losses_of_zero_are_a_history(name):
    for losses in ([0.0] * 10 + [1.0, 0.0, -1.0], [-3.0] * 10 + [-2.9, -3.1, -3.0]):
        skipped, _ = run(DEVIATIONS[name](), losses)
        np.testing.assert_array_equal(np.flatnonzero(skipped), [10])


def test_equal_losses_have_a_deviation_of_a_millionth_of_their_size():
    skipped, _ = run(mean_std(), [-5000.0] * 10 + [-4999.98, -4999.9])
    np.testing.assert_array_equal(np.flatnonzero(skipped), [11])


def test_a_constant_is_compared_with_the_number_itself():
    skipped, _ = run(thresholds.constant(1.0), [-5.0, 0.0, 1.0, 1.5, -1e38])
    np.testing.assert_array_equal(skipped, [False, False, False, True, False])
    # What is traced may be negative, and is not taken for 0.
    skipped, states = run(thresholds.constant(lambda step: -2.0 - step), [-5.0, -2.5, -4.0, NAN, -7.0])
    np.testing.assert_array_equal(skipped, [False, True, False, True, False])
    np.testing.assert_array_equal(states.schedule_step, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("bound", [INF, NAN])
def test_a_bound_that_bounds_nothing(bound):
    skipped, _ = run(thresholds.constant(lambda step: jnp.asarray(bound)), [3.4e38, -3.4e38, 0.0])
    assert not np.any(skipped)


RATIOS = {
    "growth": lambda: thresholds.growth(1.5),
    "ema_ratio": lambda: thresholds.ema_ratio(1.5, warmup_steps=2),
    "quantile": lambda: thresholds.quantile(0.5, window=4),
    "mean_std, log": lambda: mean_std(scale="log"),
    "zscore, log": lambda: zscore(scale="log"),
}


@pytest.mark.parametrize("name", RATIOS)
def test_ratios_judge_positive_losses_only(name):
    positive = [1.0, 1.01, 0.99, 1.0, 1.02] * 2
    skipped, states = run(RATIOS[name](), [*positive, -5.0, 0.0, -1e30, 1e3], max_consecutive=None)
    np.testing.assert_array_equal(skipped[-4:], [False, False, False, True])
    states = jax.tree.map(np.asarray, states)
    after = jax.tree.map(lambda leaf: leaf[-4:], states)
    assert_same_bits(after, jax.tree.map(lambda leaf: np.stack([leaf[-5]] * 4), states))


def test_a_chain_judges_by_what_each_of_it_judges(rng):
    chain = thresholds.chain(mean_std(), thresholds.constant(100.0), thresholds.growth(1e6))
    skipped, _ = run(chain, with_spikes(rng) - 50.0)
    np.testing.assert_array_equal(np.flatnonzero(skipped), [40, 41, 90])
    skipped, _ = run(chain, [-3.0, 125.0] + [3.0] * 118)
    np.testing.assert_array_equal(np.flatnonzero(skipped), [1])
    assert thresholds.chain(thresholds.constant(1.0), thresholds.growth()).signed is None


def test_an_argument_of_the_same_name_is_for_others():
    tx = clip_by(norms.global_norm(), mean_std())
    state = tx.init(ONE)
    assert_same_bits(jax.jit(lambda: tx.update(0 * ONE, state, signed=True)[1])(), state)


def test_negative_losses_are_counted_as_others_are():
    tx = oc.skip_spikes(optax.identity(), thresholds.constant(10.0), loss_threshold=mean_std())
    state, step = tx.init(ONE), jax.jit(tx.update)
    for loss in (*[-3.0, -3.5] * 6, -1.0, -3.2):
        _, state = step(ONE, state, value=loss)
    found = clip_stats(state)
    assert (found["skipped_steps"], found["skipped_loss"], found["skipped_in_row"]) == (1, 1, 0)
