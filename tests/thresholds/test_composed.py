"""Thresholds made of others permit what NumPy says of each inside: a multiple, a floor, a cap, both of two."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import Threshold, clip_by, clip_stats, core, norms, thresholds
from optaxclip._numerics import scaling
from tests.reference import adaptive, sequences, trees
from tests.support.driving import drive

INF = np.inf
LARGEST = float(np.finfo(np.float32).max)
PARAM_NORMS = {"0": jnp.float32(6.0)}
BAD = [0.0, np.nan, INF]
STEPS = 40


def given(rng):
    """Norms about 1 with two spikes, one of them near the end of the range, and three norms that are none."""
    numbers = sequences.lognormal(rng, STEPS, scale=1.0, drift=1.5)
    numbers[[20, 30]] = np.float32([40.0, 1e38])
    numbers[[3, 12, 25]] = BAD
    return numbers


# Each threshold beside its band in float64: norms -> (lower ends, upper ends), from the oracles of the methods.


def fixed(low, high):
    return lambda n: (np.full(n.shape, low), np.full(n.shape, high))


def upper(run):
    return lambda n: (np.zeros(n.shape), run(n).bound)


def of_zscore(n, **options):
    """The bound of a spike. For other norms it is the level that a spike must pass, from the statistics before."""
    run = adaptive.zclip(n, 2.0, 0.9, 6, None, patience=3, **options)
    mean, var = (np.concatenate([[np.nan], run.stats[name][:-1]]) for name in ("mu", "var"))
    level = mean + 2 * (np.sqrt(var) + (0 if options.get("clip_to") == "edge" else 1e-6))
    is_ordinary = positive_and_finite(n) & (run.bound == INF) & ~np.isnan(mean)
    return np.zeros(n.shape), np.where(is_ordinary, level, run.bound)


def positive_and_finite(n):
    return (n > 0) & (n < INF)


def of_band(n):
    run = adaptive.aggc(n, 1.5, 0.8, 0.9)
    # Of the average before; the first norm is its own.
    ema = np.concatenate([[n[0]], run.stats["ema"][:-1]])
    high, low = 1.5 * ema, 0.8 * ema
    counts = positive_and_finite(n)
    return np.where(counts & (n <= high), low, 0), np.where(counts, high, INF)


def of_average(n):
    average, weight = 0.0, 0.0

    def step(x):
        nonlocal average, weight
        average, weight = 0.9 * average + 0.1 * x, 0.9 * weight + 0.1
        return 0, average / weight, {}

    return np.zeros(n.shape), adaptive.follow(step, n).bound


def of_normalised(n):
    m = v = count = 0.0
    goals = []
    for x in n:
        if np.isfinite(x):
            m, v, count = 0.7 * m + 0.3 * x, 0.9 * v + 0.1 * x * x, count + 1
        goals.append(m / (1 - 0.7**count) / (np.sqrt(v / (1 - 0.9**count)) + 1e-8) if np.isfinite(x) else INF)
    goals = np.array(goals)
    return np.where(goals < INF, goals, 0), goals


def of_ratio(n):
    run = adaptive.adagc(n[:, None], 1.2, 0.9, 6, INF)
    return np.zeros(n.shape), run.bound[:, 0]


class Inner(NamedTuple):
    make: Callable[[], Threshold]
    band: Callable[[np.ndarray], Any]


def history(**options):
    return thresholds.mean_std(2.0, window=8, warmup_steps=4, **options)


of_history = upper(lambda n: adaptive.clip_by_history(n, 2.0, 8, 4))
of_median = upper(lambda n: adaptive.autoclip(n, 50, 5))
of_growth = upper(lambda n: adaptive.clip_norm_growth(n, 1.1))


def zscore(clip_to):
    return Inner(
        lambda: thresholds.zscore(2.0, decay=0.9, warmup_steps=6, patience=3, clip_to=clip_to),
        lambda n: of_zscore(n, clip_to=clip_to),
    )


INNER = {
    "constant": Inner(lambda: thresholds.constant(1.2), fixed(0, 1.2)),
    "constant, none": Inner(lambda: thresholds.constant(INF), fixed(0, INF)),
    "between": Inner(lambda: thresholds.between(0.9, 1.2), fixed(0.9, 1.2)),
    "exactly": Inner(lambda: thresholds.exactly(1.1), fixed(1.1, 1.1)),
    "smooth": Inner(lambda: thresholds.smooth(2.0), lambda n: (np.zeros(n.shape), 2 / (1 + 2 / np.fmax(n, 1e-300)))),
    "relative_to_params": Inner(lambda: thresholds.relative_to_params(0.2), fixed(0, 1.2)),
    "quantile": Inner(lambda: thresholds.quantile(0.3), upper(lambda n: adaptive.autoclip(n, 30))),
    "quantile, window": Inner(lambda: thresholds.quantile(0.5, window=5), of_median),
    "order_statistic": Inner(
        lambda: thresholds.order_statistic(25.0, window=8), upper(lambda n: adaptive.percentile_clip(n, 25, 8))
    ),
    "tracked_quantile": Inner(thresholds.tracked_quantile, upper(adaptive.tracked_quantile)),
    "zscore": zscore("reciprocal"),
    "zscore, mean": zscore("mean"),
    "zscore, edge": zscore("edge"),
    "mean_std": Inner(history, of_history),
    "ema_ratio": Inner(lambda: thresholds.ema_ratio(1.2, decay=0.9, warmup_steps=6), of_ratio),
    "ema_band": Inner(lambda: thresholds.ema_band(1.5, min_ratio=0.8, decay=0.9), of_band),
    "growth": Inner(lambda: thresholds.growth(1.1), of_growth),
    "average": Inner(lambda: thresholds.average(0.9), of_average),
    "normalised": Inner(thresholds.normalised, of_normalised),
    "chain": Inner(
        lambda: thresholds.chain(history(), thresholds.between(0.8, 1.5)),
        lambda n: (np.full(n.shape, 0.8), np.minimum(of_history(n)[1], 1.5)),
    ),
    "times": Inner(
        lambda: thresholds.times(lambda step: 1 + step % 2, history()),
        lambda n: (np.zeros(n.shape), (1 + np.arange(len(n)) % 2) * of_history(n)[1]),
    ),
    "at_least": Inner(
        lambda: thresholds.at_least(1.0, thresholds.growth(1.1)),
        lambda n: (np.zeros(n.shape), np.maximum(of_growth(n)[1], 1.0)),
    ),
}

# What is put around each, and what that makes of its band.
OUTER = {
    "half": (lambda t: thresholds.times(0.5, t), lambda low, high: (low / 2, high / 2)),
    "floor": (lambda t: thresholds.at_least(1.0, t), lambda low, high: (low, np.maximum(high, 1.0))),
    "floor and cap": (
        lambda t: thresholds.chain(thresholds.at_least(0.9, t), thresholds.constant(1.0)),
        lambda low, high: (low, np.clip(high, 0.9, 1.0)),
    ),
}


def test_every_threshold_is_among_these():
    assert {name.partition(",")[0] for name in INNER} == {*thresholds.__all__}


def as_state(outer, state):
    """The state of what is around a threshold of this state: that itself, or in a chain with a constant a tuple."""
    is_chain = "cap" in outer and jax.tree.leaves(state)
    return (state, optax.EmptyState()) if is_chain else state


@pytest.mark.parametrize("name", INNER)
def test_around_every_threshold(rng, name):
    inner, numbers = INNER[name], given(rng)
    made = {outer: build(inner.make()) for outer, (build, _) in OUTER.items()}

    @jax.jit
    def run(numbers):
        def step(state, n):
            after, limits, states = {}, {}, {}
            for outer, threshold in made.items():
                judged = core.permit(threshold, {"0": n}, as_state(outer, state), lambda: PARAM_NORMS)
                after[outer], limits[outer] = scaling.rescale(n, judged.factors["0"]), judged.limits["0"]
                states[outer] = judged.state
            return states["half"], (after, limits, states)

        return jax.lax.scan(step, made["half"].init(PARAM_NORMS), numbers)

    _, (after, limits, states) = jax.device_get(run(np.float32(numbers)))
    low, high = inner.band(numbers)
    counts = positive_and_finite(numbers)
    for outer, (_, band) in OUTER.items():
        lower, upper = band(low, high)
        permitted = np.where(counts, np.minimum(np.maximum(numbers, lower), upper), numbers)
        np.testing.assert_allclose(after[outer], permitted, rtol=3e-5, err_msg=outer)
        np.testing.assert_allclose(limits[outer][counts], np.minimum(upper, LARGEST)[counts], rtol=3e-5, err_msg=outer)
        # What is inside goes its own way, whatever is around it.
        trees.assert_same_bits(states[outer], as_state(outer, states["half"]))


def test_a_chain_of_every_two(rng):
    """Far into a history: both hold, the smallest upper end before the largest lower end."""
    numbers, made, states, bands = given(rng)[:20], {}, {}, {}
    for name, inner in INNER.items():
        made[name] = threshold = inner.make()
        states[name] = threshold.init(jax.ShapeDtypeStruct((), jnp.float32))
        bands[name] = [end[-1] for end in inner.band(numbers)]

    @jax.jit
    def step(n, states):
        return {name: threshold.limit(n, states[name], lambda: PARAM_NORMS["0"]) for name, threshold in made.items()}

    for n in numbers:
        before, answers = states, step(np.float32(n), states)
        states = {name: state for name, (_, state) in answers.items()}
    alone = {name: Answered(band, before[name], state) for name, (band, state) in answers.items()}
    n = jnp.float32(numbers[-1])
    for pair in itertools.combinations_with_replacement(INNER, 2):
        both = thresholds.chain(*(alone[name].again() for name in pair))
        before, after = (tuple(getattr(alone[name], when) for name in pair) for when in ("before", "after"))
        (low, high), state = both.limit(n, before if jax.tree.leaves(before) else optax.EmptyState(), None)
        trees.assert_same_bits(state, after if jax.tree.leaves(after) else optax.EmptyState())
        lows, highs = zip(*(bands[name] for name in pair), strict=True)
        np.testing.assert_allclose(low, max(lows), rtol=1e-5, err_msg=pair)
        np.testing.assert_allclose(LARGEST if high is None else high, min(*highs, LARGEST), rtol=1e-5, err_msg=pair)


class Answered(NamedTuple):
    """What a threshold answered in a step, between two states."""

    band: Any
    before: Any
    after: Any

    def again(self):
        """A threshold that answers this again, to this state alone."""

        def limit(norms, state, param_norms, **extra_args):
            trees.assert_same_bits(state, self.before)
            return self.band, self.after

        return Threshold(lambda norms: self.before, limit)


# The ends.


def test_a_multiple_of_no_bound_is_none():
    nothings = [thresholds.constant(nothing) for nothing in (INF, 3.5e38, {"a": None, "b": 1.0}, jnp.float32(jnp.nan))]
    inside = [*nothings, thresholds.chain(), thresholds.growth()]  # the last has none for first norms
    updates = {"a": np.float32([3.4e38]), "b": np.zeros(1, np.float32)}

    @jax.jit
    def clipped(updates):
        multiples = itertools.product((0.5, 2.0, 1e30), inside)
        return [trees.update(clip_by(norms.leaf_norm(), thresholds.times(*each)), updates) for each in multiples]

    for found in clipped(updates):
        trees.assert_same_bits(found, updates)


ENDS = [
    (lambda: thresholds.times(1e30, thresholds.constant(1e30)), 3e38, 3e38),  # the product overflows
    (lambda: thresholds.times(1e-30, thresholds.constant(1e30)), 3e38, 1.0),
    (lambda: thresholds.times(1e30, thresholds.between(1e30, INF)), 1.0, LARGEST),
    (lambda: thresholds.times(3.0, thresholds.exactly(2.0)), 1e-30, 6.0),
    (lambda: thresholds.times(jnp.float32(jnp.nan), thresholds.exactly(2.0)), 1e-30, 1e-30),  # neither end
    (lambda: thresholds.times(2.0, thresholds.between(jnp.float32(jnp.nan), 3.0)), 1e-30, 1e-30),
    (lambda: thresholds.times(2.0, thresholds.constant(0.0)), 5.0, 0.0),
    (lambda: thresholds.at_least(0.0, thresholds.constant(0.0)), 5.0, 0.0),
    (lambda: thresholds.at_least(2.0, thresholds.constant(0.0)), 5.0, 2.0),
    (lambda: thresholds.at_least(INF, thresholds.constant(1.0)), 3e38, 3e38),
    (lambda: thresholds.at_least(2.0, thresholds.constant(jnp.float32(jnp.nan))), 3e38, 3e38),
    (lambda: thresholds.at_least(2.0, thresholds.exactly(1.0)), 5.0, 2.0),
    (lambda: thresholds.at_least(2.0, thresholds.exactly(1.0)), 0.5, 1.0),
]


@pytest.mark.parametrize(("threshold", "norm", "permitted"), ENDS, ids=[str(number) for number in range(len(ENDS))])
def test_at_the_ends_of_the_range(threshold, norm, permitted):
    updates, tx = np.float32([norm]), clip_by(norms.leaf_norm(), threshold())
    with jax.debug_infs(True):
        clipped, _ = tx.update(updates, tx.init(updates))
    np.testing.assert_allclose(clipped, [permitted], rtol=1e-5)


def test_the_numbers_may_be_those_of_every_bound(rng):
    """A pytree per leaf, None in one, and a schedule, beside whose count the state of the other stays as it is."""
    each = {"a": 2.0, "b": None, "c": jnp.float32(0.5)}
    cases = (
        (thresholds.times(each, thresholds.constant(1.0)), (2.0, 8.0, 0.5)),
        (thresholds.at_least(each, thresholds.constant(1.0)), (2.0, 1.0, 1.0)),
        (thresholds.times({"a": lambda step: 1.0 + step, "b": 1.0, "c": 1.0}, thresholds.constant(1.0)), (2.0, 1, 1)),
        (thresholds.at_least(lambda step: 2.0 + step, thresholds.constant(1.0)), (3.0, 3.0, 3.0)),
    )

    @jax.jit
    def second_steps(updates):
        txs = [clip_by(norms.leaf_norm(), threshold) for threshold, _ in cases]
        return [tx.update(updates, tx.update(updates, tx.init(updates))[1])[0] for tx in txs]

    eight = np.full(1, 8, np.float32)
    found = second_steps({"a": eight, "b": eight, "c": eight.astype(jnp.bfloat16)})
    for number, (clipped, (_, permitted)) in enumerate(zip(found, cases, strict=True)):
        ours = [float(leaf[0]) for leaf in jax.device_get(clipped).values()]
        np.testing.assert_allclose(ours, permitted, rtol=1e-5, err_msg=str(number))


def test_no_leaves_are_no_groups():
    for threshold in (thresholds.times(2.0, history()), thresholds.at_least(lambda step: 1.0, history())):
        tx = clip_by(norms.leaf_norm(), threshold)
        assert tx.update({}, tx.init({}))[0] == {}


def test_a_state_of_another_threshold_is_refused():
    scheduled = clip_by(norms.global_norm(), thresholds.times(lambda step: 1.0, history()))
    plain = clip_by(norms.global_norm(), thresholds.times(1.0, history()))
    with pytest.raises(ValueError, match=r"thresholds.times.*a tuple of 2 states"):
        scheduled.update(jnp.ones(1), plain.init(jnp.ones(1)))


# What reads states.


@pytest.mark.parametrize("outer", ["half", "floor"])
def test_records_and_migrations_find_the_state_inside(rng, outer):
    one = np.ones(1, np.float32)
    plain, composed = (clip_by(norms.global_norm(), made, record=2) for made in (history(), OUTER[outer][0](history())))

    @jax.jit
    def run(numbers):
        return jax.lax.scan(lambda state, n: (plain.update(n[None], state)[1], None), plain.init(one), numbers)[0]

    state = run(np.float32(sequences.lognormal(rng, 12)))
    migrated = oc.migrate(composed, one, state).state
    trees.assert_same_bits(migrated.threshold_state, state.threshold_state)
    mean = float(np.mean(state.threshold_state.window_norms))
    assert clip_stats(migrated)["threshold_mean"] == pytest.approx(mean, rel=1e-6)


def test_losses():
    """A floor holds for losses of any sign, a multiple is for positive ones."""
    assert thresholds.times(2.0, history()).signed is None
    assert thresholds.at_least(1.0, thresholds.growth()).signed is None
    tx = oc.skip_spikes(optax.identity(), thresholds.constant(INF), loss_threshold=thresholds.at_least(5.0, history()))
    one = np.ones(1, np.float32)
    state, step, skipped = tx.init(one), jax.jit(tx.update), []
    for loss in (*[-3.0, -3.5] * 4, 4.9, 5.1, -3.0):
        updates, state = step(one, state, value=loss)
        skipped.append(float(updates[0]) == 0)
    np.testing.assert_array_equal(np.flatnonzero(skipped), [9])


# The published clip that is one of these.


def test_the_clip_of_icefall(rng):
    """It sets its threshold once per period; ours, at every step, is the same in these steps."""
    period = 100
    numbers = sequences.training(rng, 5 * period)
    recent = thresholds.order_statistic(100 * (2 * (period // 4)) / period, window=period)
    tx = clip_by(norms.global_norm(), thresholds.times(2.0, recent), record=True)
    after, limits = drive(tx, numbers, lambda state: state.clip_stats.clip_limit[0])
    theirs = adaptive.scaled_adam(numbers, 2.0, period)
    at = np.arange(period, 5 * period + 1, period) - 1
    np.testing.assert_allclose(limits.ravel()[at], theirs.bound[at], rtol=1e-6)
    np.testing.assert_allclose(after[at], theirs.after[at], rtol=1e-6)
