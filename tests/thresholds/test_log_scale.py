"""Statistics of the logarithms of norms: `scale="log"` of `mean_std` and `zscore`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import clip_by, norms, thresholds
from tests.support import published

MOST = np.finfo(np.float32).max


@functools.partial(jax.jit, static_argnums=0)
def scan(threshold, given):
    def step(state, norm):
        (_, upper), state = threshold.limit(norm, state, None)
        return state, upper

    return jax.lax.scan(step, threshold.init(jax.ShapeDtypeStruct(given.shape[1:], given.dtype)), given)


def follow(threshold, given):
    """The upper end of the band at each norm, and the last state. A row of `given` is a step, a column a group."""
    state, uppers = scan(threshold, np.float32(given))
    return np.asarray(uppers), state


def mean_std_of_logs(given, num_std, window, warmup):
    """mean + k max(std, 1e-6 max(|mean|, 1)) of the last logarithms, in float64, and exp of it."""
    logs, bounds = [], []
    for norm in np.float64(np.float32(given)):
        last = logs[-window:]
        if len(last) < warmup:
            bounds.append(np.inf)
        else:
            mean, std = np.mean(last), np.std(last)
            bounds.append(np.exp(mean + num_std * max(std, 1e-6 * max(abs(mean), 1))))
        low = 0 if len(last) < warmup else mean - num_std * max(std, 1e-6 * max(abs(mean), 1))
        logs.append(np.log(min(norm, bounds[-1])) if len(last) < warmup else max(np.log(min(norm, bounds[-1])), low))
    return np.array(bounds)


def zscore_of_logs(given, num_std, decay, warmup):
    """ZClip's bound of the logarithm, in float64, and exp of it; for no spike the level that one must pass."""
    mean, var, logs, bounds = 0.0, 0.0, [], []
    for norm in np.float64(np.float32(given)):
        log, bound = np.log(norm), np.inf
        if len(logs) >= warmup:
            std = np.sqrt(var)
            z = (log - mean) / (std + 1e-6)
            bound = mean + (num_std**2 * std / z if z > num_std else num_std * (std + 1e-6))
            log = max(min(log, bound), mean - num_std * (std + 1e-6))
        logs.append(log)
        bounds.append(np.exp(bound))
        if len(logs) <= warmup:
            mean, var = np.mean(logs), np.var(logs)
        else:
            mean = decay * mean + (1 - decay) * log
            var = decay * var + (1 - decay) * (log - mean) ** 2
    return np.array(bounds)


KINDS = {
    "mean_std": (
        thresholds.mean_std(2.5, window=16, warmup_steps=8, scale="log"),
        lambda given: mean_std_of_logs(given, 2.5, 16, 8),
    ),
    "zscore": (
        thresholds.zscore(2.5, decay=0.9, warmup_steps=8, patience=None, scale="log"),
        lambda given: zscore_of_logs(given, 2.5, 0.9, 8),
    ),
}


@pytest.mark.parametrize("level", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", KINDS)
def test_the_bound_is_that_of_numpy(rng, name, level):
    threshold, expected = KINDS[name]
    given = level * rng.lognormal(0.0, 0.6, 120)
    given[[30, 31, 80]] *= 1e4
    uppers, _ = follow(threshold, given)
    bounds = expected(given)
    warm = np.isinf(bounds)
    assert np.all(uppers[warm] == MOST)
    # A logarithm of 69 is off by 4e-6, and so is what it is the logarithm of.
    np.testing.assert_allclose(uppers[~warm], bounds[~warm], rtol=1e-4)
    assert np.all(uppers[[30, 31, 80]] < np.float32(given)[[30, 31, 80]])


@functools.cache
def built(name, num_std, scale):
    """One, and so one program, for all tests."""
    return getattr(thresholds, name)(num_std, scale=scale)


@pytest.mark.parametrize("sigma", [0.8, 1.0])
@pytest.mark.parametrize("name", ["mean_std", "zscore"])
def test_six_linear_deviations_clip_ordinary_steps_and_four_of_logarithms_the_spikes(name, sigma):
    """The norms of pytorch #12189, 469 minibatches, taken as lognormal, with two spikes; 100 such runs."""
    spikes = [200, 350]
    given = np.stack([np.random.default_rng(seed).lognormal(0.0, sigma, 469) for seed in range(100)], axis=1)
    given[spikes] = 1000.0

    def clipped(threshold):
        is_clipped = np.float32(given) > follow(threshold, given)[0]
        assert np.all(is_clipped[spikes])
        return np.delete(is_clipped, spikes, axis=0)[64:]  # of the ordinary steps after the warm-up

    # 0.3 to 0.9 %, more for zscore and for the larger sigma: 1 to 4 steps in every run.
    assert 0.003 < np.mean(clipped(built(name, 6.0, "linear"))) < 0.009
    # The spikes alone, in all runs by mean_std and in 97 by zscore: 4 deviations are passed once in 32,000.
    assert np.sum(np.any(clipped(built(name, 4.0, "log")), axis=0)) <= 3


@pytest.mark.parametrize("name", KINDS)
def test_a_norm_that_is_no_spike_is_returned_bit_for_bit(rng, name):
    """The exponential of the logarithm rounds below many norms: here, where all are the same, below the bound."""
    threshold, _ = KINDS[name]
    same = np.tile(np.float32(10 ** rng.uniform(-37, 38, 40)), (12, 1))
    uppers, _ = follow(threshold, same)
    assert np.all(uppers >= same)


@pytest.mark.parametrize("name", KINDS)
def test_ugly_norms(name):
    threshold, _ = KINDS[name]
    tiny = np.finfo(np.float32).tiny
    ends = [tiny, MOST, 1e38, 2 * tiny, 1e-37]
    given = [*ends * 3, 0.0, np.nan, np.inf, 1.0, MOST, tiny]
    uppers, state = follow(threshold, given)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert np.all(np.isfinite(uppers))
    assert np.all(uppers >= tiny)
    # What is 0 or not finite is no observation.
    again, without = follow(threshold, [each for each in given if each >= tiny and np.isfinite(each)])
    np.testing.assert_array_equal(jax.tree.leaves(without)[0], jax.tree.leaves(state)[0])
    np.testing.assert_array_equal(again[-1], uppers[-1])


@pytest.mark.parametrize("name", KINDS)
def test_the_derivative_is_finite(name):
    threshold, _ = KINDS[name]

    @jax.jit
    @jax.grad
    def slope(given):
        def step(state, norm):
            (_, upper), state = threshold.limit(norm, state, None)
            return state, jnp.minimum(norm, upper)

        return jnp.sum(jax.lax.scan(step, threshold.init(jax.ShapeDtypeStruct((), jnp.float32)), given)[1])

    for given in (np.ones(12), np.geomspace(1e-3, 1e3, 12), np.r_[np.ones(10), 1e5, 0.0], np.r_[np.nan, np.ones(11)]):
        found = slope(jnp.asarray(given, jnp.float32))
        assert np.all(np.isfinite(found)), given


CLIPPERS = {
    "zclip": lambda scale: published.zclip(2.5, warmup_steps=8, max_norm=None, scale=scale, record=1),
    "clip_by_history": lambda scale: published.clip_by_history(2.5, window=16, warmup_steps=8, scale=scale, record=1),
}
THEIRS = {
    "zclip": thresholds.zscore(2.5, warmup_steps=8, scale="log"),
    "clip_by_history": thresholds.mean_std(2.5, window=16, warmup_steps=8, scale="log"),
}


@pytest.mark.parametrize("name", CLIPPERS)
def test_clippers_hand_the_scale_on(name):
    """Theirs is the program of the threshold with this scale."""

    def program(tx):
        one = np.ones(1, np.float32)
        return str(jax.make_jaxpr(lambda updates: tx.update(updates, tx.init(updates)))(one))

    expected = clip_by(norms.global_norm(), THEIRS[name], record=1)
    assert program(CLIPPERS[name]("log")) == program(expected) != program(CLIPPERS[name]("linear"))


@pytest.mark.parametrize("build", [thresholds.zscore, thresholds.mean_std, oc.zclip, oc.clip_by_history])
def test_another_scale_is_refused(build):
    with pytest.raises(ValueError, match=r"^scale must be one of 'linear', 'log', got 'ln'"):
        build(scale="ln")


@pytest.mark.parametrize(
    "build",
    [
        lambda scale: thresholds.mean_std(3.0, window=64, warmup_steps=32, scale=scale),
        lambda scale: thresholds.zscore(3.0, scale=scale),
    ],
    ids=["mean_std", "zscore"],
)
def test_one_batch_of_padding_does_not_open_the_band(rng, build):
    given = rng.lognormal(0.0, 0.3, 200)
    given[120] = 1e-12
    seen = [follow(build(scale), given)[0] for scale in ("linear", "log")]
    assert np.max(seen[1][121:]) < 2 * np.max(seen[0][121:])
