"""Moving averages at both ends of `[0, 1)` and over the float range, against NumPy's longdouble."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import contrib
from optaxclip._numerics import averages
from tests.reference import trees
from tests.support.driving import together

LONG = np.longdouble
# From 0 to the last float64 below 1. 1e-9 is no float32 apart from 0 when it is taken from 1.
DECAYS = (0.0, 1e-9, 0.3, 0.5, 0.9, 0.999, 1 - 1e-7, 1 - 2.0**-53)
SIZES = np.float32([1.2e-38, 1e-37, 1e-30, 1e-8, 1.0, 3.0, 1e8, 1e19, 1e30, 3.4028235e38])
ONE, OTHER = (grid.ravel() for grid in np.meshgrid(SIZES, SIZES))
EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)


@jax.jit
def means(decay, one, other):
    by = averages.shares(decay, jnp.float32)
    orders = {p: averages.power_mean(one, other, by, p) for p in (1, 1.5, 2, 3)}
    signed = averages.moved(one, -other, by)
    whole = averages.moved(jax.lax.complex(one, other), jax.lax.complex(-other, one), by)
    return orders, signed, whole


def of_powers(one, other, decay, p):
    one, other, decay = LONG(one), LONG(other), LONG(decay)
    return (decay * one**p + (1 - decay) * other**p) ** (1 / LONG(p))


def close(ours, right, rtol=4 * EPS):
    """What is below the smallest normal number may be 0."""
    np.testing.assert_allclose(np.asarray(ours, LONG), right, rtol=rtol, atol=2 * TINY)


@jax.jit
def means_of_every_decay(one, other):
    """With decays that are not traced: a float32 is not close enough to the last two."""
    return {decay: means.__wrapped__(decay, one, other) for decay in DECAYS}


@pytest.mark.parametrize("decay", DECAYS)
def test_every_mean_of_every_two_sizes(decay):
    orders, signed, whole = jax.device_get(means_of_every_decay(ONE, OTHER)[decay])
    for p, mean in orders.items():
        close(mean, of_powers(ONE, OTHER, decay, p), rtol=8 * p * EPS)
        assert np.all(mean <= np.maximum(ONE, OTHER))
    terms = LONG(decay) * LONG(ONE), (1 - LONG(decay)) * LONG(OTHER)
    assert np.all(np.abs(LONG(signed) - (terms[0] - terms[1])) <= 4 * EPS * np.maximum(*terms) + 2 * TINY)
    np.testing.assert_array_equal(whole.real, signed)
    assert np.all(np.isfinite(whole.imag))
    if decay == 0:
        np.testing.assert_array_equal(orders[1], OTHER)
        np.testing.assert_array_equal(orders[2], OTHER)
        np.testing.assert_array_equal(signed, -OTHER)
        np.testing.assert_array_equal(whole, -OTHER + 1j * ONE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_traced_decay_is_widened_before_it_is_taken_from_one(decay, dtype):
    decay = jnp.asarray(decay, dtype)
    close(means(decay, ONE, OTHER)[0][1], of_powers(ONE, OTHER, float(decay), 1))


def test_the_debiased_shares_are_a_moving_average_divided_by_its_bias():
    values = np.random.default_rng(0).lognormal(size=60)
    for decay in (0.0, 1e-9, 0.7, 0.999, 1 - 1e-9):

        def step(average, at, decay=decay):
            seen, value = at
            new = averages.moved(average, value, averages.debiased(decay, seen, jnp.float32))
            return new, new

        steps = jnp.arange(1, 61, dtype=jnp.int32)
        for scale in (1e-37, 1.0, 1e37):
            sizes = np.float32(values * scale)
            ours = jax.lax.scan(step, jnp.float32(0), (steps, sizes))[1]
            moving, right = LONG(0), []
            for t, value in enumerate(LONG(sizes), 1):
                moving = LONG(decay) * moving + (1 - LONG(decay)) * value
                right.append(moving / (1 - LONG(decay) ** t))
            close(ours, np.array(right), rtol=3e-6)


# decay 0: nothing is remembered, so that every step is as the first.
FORGETFUL = {
    "adaptive_spike_clip": contrib.adaptive_spike_clip(0.0),
    "scale_by_adaptive_norm": contrib.scale_by_adaptive_norm(0.0, 0.0, eps=0.0),
    "scale_by_acclip": contrib.scale_by_acclip(0.0, 0.0, eps=0.0),
    "scale_by_acclip, alpha 2": contrib.scale_by_acclip(0.0, 0.0, alpha=2.0, eps=0.0),
    "scale_by_acclip, alpha 3": contrib.scale_by_acclip(0.0, 0.0, alpha=3.0, eps=0.0),
    "scale_by_stable_adam": contrib.scale_by_stable_adam(0.0, 0.0, eps=0.0),
    "clipped_momentum": oc.clipped_momentum(1.0, 0.0),
    "mixed_clip": contrib.mixed_clip(1.0, decay=0.0),
    "thresholds.average": oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.average(0.0)),
}
# The same, where what counts is the gradient before: name -> (transformation, gradients of two steps -> the bound).
RELATIVE = {
    "aggc": (contrib.aggc("all", 2.0, decay=0.0), lambda before: 2 * before),
    "adagc": (oc.adagc(1.5, decay=0.0, warmup_steps=0, warmup_max_norm=None), lambda before: 1.5 * max(before, 1e-8)),
    "zclip": (oc.zclip(2.0, decay=0.0, warmup_steps=1, max_norm=None, clip_to="mean"), lambda before: before),
    "spam_clip": (contrib.spam_clip(4.0, decay=0.0, warmup_steps=1), lambda before: 2 * before),
}
# Falls and rises by 1e8 to 1e38, and back.
SEQUENCE = (1.0, 1e-8, 1.0, 1e8, 1e-30, 1e8, 1e-37, 1.0, 1e37, 1e-1, 1e-30)


def driven(tx, gradients):
    """The updates of each step."""

    @jax.jit
    def run(gradients):
        def step(state, each):
            updates, state = tx.update(each, state)
            return state, updates

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]

    return np.asarray(run(jnp.asarray(gradients)), np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_without_memory_every_step_is_as_the_first(dtype):
    direction = trees.normal(np.random.default_rng(1), (3,), np.complex64)
    direction = (direction if dtype == np.complex64 else direction.real).astype(dtype)
    gradients = np.stack([direction * dtype(size) for size in SEQUENCE])
    tx = together(FORGETFUL)
    start, step = jax.jit(tx.init), jax.jit(tx.update)
    states = start(gradients[0])
    for each in gradients:
        firsts, _ = step(each, start(each))
        outs, states = step(each, states)
        for name, first in firsts.items():
            np.testing.assert_allclose(outs[name], first, rtol=4 * EPS, err_msg=name)
            assert np.all(np.asarray(first) != 0), name


@pytest.mark.parametrize("name", RELATIVE)
def test_without_memory_the_bound_is_that_of_the_last_step(name):
    tx, bound_of = RELATIVE[name]
    outs = driven(tx, np.float32(SEQUENCE)[:, None])[:, 0]
    kept, right = float(np.float32(SEQUENCE[0])), []
    for size in np.float64(np.float32(SEQUENCE)):
        # z counts in deviations of at least 1e-6: what is less than 2 of them above is no spike.
        is_high = size > bound_of(kept) and (name != "zclip" or size > kept + 2e-6)
        right.append(bound_of(kept) if right and is_high else size)
        kept = right[-1]
    np.testing.assert_allclose(outs, right, rtol=4 * EPS)


def test_a_silent_start_does_not_hide_small_norms():
    """An average from 0 of norms of 1e-36 is below all floats for its first steps, and let nothing through."""
    outs = driven(contrib.adaptive_spike_clip(), np.full((5, 2), 1e-36, np.float32))
    np.testing.assert_allclose(outs, 1e-36, rtol=1e-5)


def test_zclip_follows_norms_near_the_largest_float():
    sizes = np.float32([1e38, 1.1e38, 0.9e38, 1e38, 3.3e38, 1e38])
    outs = driven(oc.zclip(warmup_steps=4, warmup_max_norm=None), sizes[:, None])[:, 0]
    unit = driven(oc.zclip(warmup_steps=4, warmup_max_norm=None), sizes[:, None] / np.float32(1e30))[:, 0]
    np.testing.assert_allclose(outs, unit * 1e30, rtol=1e-5)
    assert outs[4] < 1.2e38
