"""What `zscore` permits between spikes: the level that a spike must pass, which a record then shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip import clip_by, clip_stats, norms, thresholds
from tests.reference.trees import assert_same_bits
from tests.support import published

SPIKES = [40, 41, 90]


@functools.cache
def scanned(steps, warmup_steps, clip_to):
    """One program for all norms of a number of steps."""
    threshold = thresholds.zscore(3.0, warmup_steps=warmup_steps, clip_to=clip_to)
    tx = clip_by(norms.global_norm(), threshold, record=steps)

    @jax.jit
    def scan(given):
        def step(state, norm):
            updates, after = tx.update(norm[None], state)
            return after, (updates[0], state.threshold_state)

        return jax.lax.scan(step, tx.init(jnp.ones(1)), given)

    return scan


def follow(given, *, warmup_steps=10, clip_to="reciprocal"):
    """Each norm's limit in the record, what comes out, and mean and deviation before it."""
    state, (after, states) = scanned(len(given), warmup_steps, clip_to)(jnp.asarray(given))
    limits = clip_stats(state, history=True)["clip_limit"]
    return limits, np.asarray(after), np.float64(states.zscore_mean[:, 0]), np.float64(states.zscore_std[:, 0])


def with_spikes(rng, level=1.0):
    given = rng.lognormal(0.0, 0.2, 120)
    given[SPIKES] *= 20
    return np.float32(np.minimum(level * given, np.finfo(np.float32).max))


@pytest.mark.parametrize("clip_to", ["reciprocal", "mean", "edge"])
def test_it_is_the_level_that_a_spike_must_pass(rng, clip_to):
    given = with_spikes(rng)
    limits, after, mean, std = follow(given, clip_to=clip_to)
    assert np.all(limits[:10] == np.inf)
    level = mean + 3 * (std if clip_to == "edge" else std + 1e-6)
    ordinary = np.delete(np.arange(10, 120), np.array(SPIKES) - 10)
    ordinary = ordinary[given[ordinary] <= level[ordinary]]
    assert len(ordinary) > 100
    np.testing.assert_allclose(limits[ordinary], level[ordinary], rtol=1e-5)
    assert_same_bits(after[ordinary], given[ordinary])
    assert np.all(limits[SPIKES] < given[SPIKES])
    np.testing.assert_allclose(after[SPIKES], limits[SPIKES], rtol=1e-5)


@pytest.mark.parametrize("level", [1e-37, 1e-12, 1e30, 1e37])
@pytest.mark.parametrize("clip_to", ["reciprocal", "edge"])
def test_a_norm_that_is_no_spike_is_returned_bit_for_bit(rng, clip_to, level):
    """Also where the level rounds below it: all norms are the same, or so large that the level overflows."""
    for given in (with_spikes(rng, level), np.full(40, level, np.float32)):
        limits, after, mean, std = follow(given, clip_to=clip_to)
        # With room for rounding: those that are not clearly spikes.
        kept = given <= (mean + 3 * std) * (1 - 1e-5)
        kept[:10] = True
        assert_same_bits(after[kept], given[kept])
        assert np.all(limits[kept] >= given[kept])


@pytest.mark.xla
@pytest.mark.parametrize("clip_to", ["reciprocal", "edge"])
def test_a_norm_within_an_ulp_of_the_level(rng, clip_to):
    """There the level may round below a norm that is no spike."""
    mean, std = (np.float32(10.0 ** rng.uniform(-2, 2, 100_000)) for _ in range(2))
    threshold = thresholds.zscore(3.0, clip_to=clip_to)
    level = mean + np.float32(3) * (std + np.float32(1e-6))
    for norm in (level, np.nextafter(level, np.float32(np.inf)), np.nextafter(level, np.float32(0))):
        state = threshold.init(jax.ShapeDtypeStruct(norm.shape, norm.dtype))
        state = state._replace(zscore_mean=mean, zscore_std=std, zscore_seen=jnp.full_like(state.zscore_seen, 100))
        (_, limit), state = jax.jit(lambda norm, state: threshold.limit(norm, state, None))(norm, state)
        assert np.all((limit >= norm) | (state.zscore_spikes > 0))


def test_equal_norms_are_at_their_limit():
    limits, after, _, _ = follow(np.full(12, 0.1, np.float32), warmup_steps=4)
    np.testing.assert_allclose(limits[4:], 0.1 + 3e-6, rtol=1e-6)
    assert_same_bits(after, np.full(12, 0.1, np.float32))


def test_the_cap_of_zclip_holds_beside_it():
    tx = published.zclip(3.0, warmup_steps=4, max_norm=1.0, record=True)
    state, update = tx.init(jnp.ones(1)), jax.jit(tx.update)
    for norm, limit in ((0.1, 1.0), (0.3, 1.0), (0.1, 1.0), (0.3, 1.0), (0.2, 0.5)):  # 0.2 and three times 0.1
        updates, state = update(jnp.array([norm]), state)
        assert clip_stats(state)["clip_limit"] == pytest.approx(limit, rel=1e-4)
        assert_same_bits(updates, jnp.array([norm]))
