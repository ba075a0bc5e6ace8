"""What holds of every clipper that follows a history of norms: nothing poisons it, and nothing locks it."""

import functools

import jax
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import clip_by, contrib, norms, thresholds
from tests.reference import adaptive, sequences, trees
from tests.support import published
from tests.support.driving import METHODS, drive, driver, share_left, steps_to_follow

pytestmark = pytest.mark.slow

BAD = [np.nan, np.inf, 0.0]

# With short windows and warm-ups of eight steps, so that sixty steps see every phase.
SHORT = {
    "autoclip": lambda: oc.autoclip(50),
    "autoclip, window": lambda: oc.autoclip(50, window=8),
    "percentile_clip": lambda: contrib.percentile_clip(25, window=8),
    "zclip": lambda: oc.zclip(warmup_steps=8, patience=3),
    "zclip, edge": lambda: oc.zclip(warmup_steps=8, max_norm=None, patience=None, clip_to="edge"),
    "adagc": lambda: oc.adagc(warmup_steps=8),
    "aggc": lambda: contrib.aggc("all", 1.5, min_ratio=0.8),
    "aggc, published": lambda: contrib.aggc("all", 1.5, min_ratio=0.8, initial=0.0, max_down=0.9, max_up=1.1),
    "clip_by_history": lambda: oc.clip_by_history(window=16, warmup_steps=8, patience=3),
    "clip_by_history, raw": lambda: oc.clip_by_history(window=16, warmup_steps=8, take_in="raw"),
    "clip_by_tracked_quantile": contrib.clip_by_tracked_quantile,
    "clip_norm_growth": contrib.clip_norm_growth,
}
# Step 1, warm-up, the last of eight, the first after them, steady.
PHASES = [0, 3, 7, 8, 30]


def whole(state):
    return state


def assert_same_history(seen, clean, kept):
    """The states after the steps `kept` are those of the run without the others, bit for bit."""
    trees.assert_same_bits(
        jax.tree.map(lambda leaf: leaf[kept], seen), jax.tree.map(lambda leaf: leaf[: len(kept)], clean)
    )


# No poisoning.


@pytest.mark.parametrize("name", SHORT)
def test_bad_norms_leave_no_trace(rng, name):
    run = driver(SHORT[name](), whole)
    given = sequences.lognormal(rng, 60, drift=1.0)
    given[[12, 20, 40, 50]] *= 30
    clean_after, clean = run(given)
    assert np.any(clean_after < given)
    for at in PHASES:
        for times in (1, 10):
            for bad in BAD:
                after, seen = run(np.insert(given, at, [bad] * times)[:60])
                kept = np.delete(np.arange(60), slice(at, at + times))
                assert_same_history(seen, clean, kept)
                np.testing.assert_array_equal(after[kept], clean_after[: len(kept)])
                np.testing.assert_array_equal(after[at : at + times], bad)


@pytest.mark.parametrize("name", SHORT)
def test_bad_norms_change_no_state_from_init_on(name):
    tx = SHORT[name]()
    first = state = tx.init({"0": np.zeros(1, np.float32)})
    step = jax.jit(tx.update)
    for bad in BAD:
        updates, state = step({"0": np.float32([bad])}, state)
        np.testing.assert_array_equal(updates["0"], [bad])
    trees.assert_same_bits(state, first)


PER_LEAF = {
    "autoclip": lambda: oc.autoclip(50, norm=norms.leaf_norm()),
    "autoclip, window": lambda: oc.autoclip(50, window=8, norm=norms.leaf_norm()),
    "percentile_clip": lambda: contrib.percentile_clip(25, window=8),
    "zclip": lambda: oc.zclip(warmup_steps=8, patience=3, norm=norms.leaf_norm()),
    "aggc": lambda: contrib.aggc(lambda path: path, 1.5, min_ratio=0.8),
    "clip_by_history": lambda: oc.clip_by_history(window=16, warmup_steps=8, norm=norms.leaf_norm()),
    "clip_by_tracked_quantile": lambda: contrib.clip_by_tracked_quantile(norm=norms.leaf_norm()),
    "clip_norm_growth": contrib.clip_norm_growth,
}


@pytest.mark.parametrize("name", PER_LEAF)
def test_a_bad_leaf_stops_no_other(rng, name):
    """Leaf 1 is bad at ten steps: the others have the history that they have anyway, and it has that of the rest."""
    run = driver(PER_LEAF[name](), whole)
    given = sequences.tensors(rng, 60)
    clean_after, clean = run(given)
    short_after, short = run(np.concatenate([np.delete(given, slice(20, 30), axis=0), given[:10]]))
    for bad in BAD:
        spoiled = given.copy()
        spoiled[20:30, 1] = bad
        after, seen = run(spoiled)
        np.testing.assert_array_equal(after[:, [0, 2]], clean_after[:, [0, 2]])
        for leaf, right in zip(jax.tree.leaves(seen), jax.tree.leaves(clean), strict=True):
            np.testing.assert_array_equal(leaf[:, [0, 2]], right[:, [0, 2]])
        kept = np.delete(np.arange(60), slice(20, 30))
        np.testing.assert_array_equal(after[kept, 1], short_after[:50, 1])
        for leaf, right in zip(jax.tree.leaves(seen), jax.tree.leaves(short), strict=True):
            np.testing.assert_array_equal(leaf[kept, 1], right[:50, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("warmup_max_norm", [1.0, None])
def test_a_leaf_that_is_not_finite_stops_adagc_for_all(rng, warmup_max_norm, bad):
    """The global norm is not finite then: a step for none, as in the published code."""
    threshold = thresholds.ema_ratio(warmup_steps=8, warmup_max_norm=warmup_max_norm)
    run = driver(clip_by(norms.leaf_norm(), threshold), whole)
    given = sequences.tensors(rng, 60)
    clean_after, clean = run(given)
    for at in PHASES:
        row = np.array([1.0, bad, 2.0])
        after, seen = run(np.insert(given, at, row, axis=0)[:60])
        kept = np.delete(np.arange(60), at)
        assert_same_history(seen, clean, kept)
        np.testing.assert_array_equal(after[kept], clean_after[:59])
        np.testing.assert_array_equal(after[at], row)


def test_a_zero_leaf_stops_no_other_of_adagc(rng):
    given = sequences.tensors(rng, 60)
    given[5:12, 1] = 0
    after, _ = drive(published.adagc(warmup_steps=8), given)
    np.testing.assert_allclose(after, adaptive.adagc(given, warmup_steps=8).after, rtol=2e-5)


# No lock.

# Steps until a tenfold rise that stays is followed: the most that was measured, and a quarter more. The whole history
# of autoclip(10) has to be nine parts new.
MOST = {
    "autoclip": 6000,
    "autoclip, window 100": 120,
    "percentile_clip": 120,
    "zclip": 48,
    "adagc": 2800,
    "aggc": 230,
    "clip_by_history": 620,
    "clip_by_tracked_quantile": 40,
    "clip_norm_growth": 290,
}


@functools.cache
def default(name):
    """What drives it: compiled once for a number of steps."""
    return driver(METHODS[name].make())


@pytest.mark.parametrize("name", MOST)
def test_a_rise_that_stays_is_followed(rng, name):
    """After 500 steps of noise, and after 500 that were all the same."""
    for spread, level in ((0.1, 1.0), (0.0, 1.0), (0.0, 1e-3), (0.0, 1e4)):
        calm = sequences.lognormal(rng, 500 + MOST[name] + 50, scale=level, spread=spread, drift=1.0)
        given = sequences.with_shift(calm)
        after, _ = default(name)(given)
        steps = steps_to_follow(given, after, 500)
        assert steps is not None, (spread, level)
        assert steps <= MOST[name], (spread, level)


@pytest.mark.parametrize("name", MOST)
def test_one_large_norm_is_no_new_level(name):
    """After a spike of a thousand times, which is cut, norms are let through as before."""
    given = np.ones(500 + MOST[name] + 50)
    given[200] = 1000.0
    after, _ = default(name)(given)
    assert after[200] <= 1.6
    left = share_left(given, after)
    assert np.all(left[230:-10] >= 0.9 * left[150])


# The whole range.

RANGE = {
    "autoclip, window": (
        lambda: published.autoclip(50, window=8),
        lambda given: adaptive.autoclip(given, 50, window=8),
    ),
    "percentile_clip": (
        lambda: contrib.percentile_clip(25, window=8),
        lambda given: adaptive.percentile_clip(given, 25, window=8),
    ),
    "zclip": (lambda: published.zclip(max_norm=None), lambda given: adaptive.zclip(given, max_norm=None, patience=33)),
    "adagc": (published.adagc, METHODS["adagc"].published),
    "aggc": (lambda: contrib.aggc("all", 1.5, min_ratio=0.8), lambda given: adaptive.aggc(given, 1.5, 0.8)),
    "clip_by_history": (published.clip_by_history, adaptive.clip_by_history),
    "clip_by_tracked_quantile": (
        lambda: contrib.clip_by_tracked_quantile(learning_rate=2.0),
        lambda given: adaptive.tracked_quantile(given, learning_rate=2.0),
    ),
    "clip_norm_growth": (contrib.clip_norm_growth, adaptive.clip_norm_growth),
}


@pytest.mark.parametrize("name", RANGE)
def test_at_both_ends_of_the_range(rng, name):
    """The published numbers there too: those with an absolute eps clip nothing at the lower end, or all."""
    make, right = RANGE[name]
    run = driver(make(), whole)
    for end in ("smallest 1e-37", "largest 1e37"):
        given = sequences.training(rng, 300, drift=1.0)
        given = sequences.as_float32(given * (1e-37 / given.min() if "smallest" in end else 1e37 / given.max()))
        after, seen = run(given)
        np.testing.assert_allclose(after, right(given).after, rtol=2e-5, err_msg=end)
        for leaf in jax.tree.leaves(seen):
            assert not np.any(np.isnan(leaf)), end
