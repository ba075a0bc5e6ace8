"""The oracles of the adaptive methods, held to traces by hand, to the packages themselves and to the guard's rule."""

import numpy as np
import pytest

from tests.reference import adaptive, packages, sequences

inf = np.inf


def close(ours, trace):
    """To the six digits that the traces give."""
    np.testing.assert_allclose(ours, trace, rtol=1e-6, atol=5e-7)


ZCLIP = [1, 1.2, 0.8, 1, 3, 1, 10, 0.1]


@pytest.mark.parametrize(
    ("clip_to", "after"),
    [
        ("reciprocal", [1, 1.2, 0.8, 1, 1.0625, 1, 1.01496, 0.1]),
        ("mean", [1, 1.2, 0.8, 1, 1, 1, 1, 0.1]),
        ("edge", [1, 1.2, 0.8, 1, 1.353553, 1, 1.383146, 0.1]),
    ],
)
def test_zclip(clip_to, after):
    run = adaptive.zclip(ZCLIP, warmup_steps=4, max_norm=None, clip_to=clip_to)
    # Half a unit of the last digit: 1.01496 has one less than the others.
    assert np.all(np.abs(run.after - after) <= [5e-7] * 6 + [5e-6, 5e-7])
    np.testing.assert_array_equal(np.isfinite(run.bound), [0, 0, 0, 0, 1, 0, 1, 0])


def test_zclip_statistics():
    stats = adaptive.zclip(ZCLIP, warmup_steps=4, max_norm=None).stats
    assert np.all(np.isnan(stats["mu"][:3]))
    close(stats["mu"][3:], [1, 1.001875, 1.001819, 1.002213, 0.975147])
    close(stats["var"][3:], [0.02, 0.019510, 0.018925, 0.018362, 0.040788])
    np.testing.assert_array_equal(stats["spikes"], [0, 0, 0, 0, 1, 0, 1, 0])


def test_zclip_with_a_cap():
    """The cap bounds the result and stays out of the statistics."""
    run = adaptive.zclip([2, 2.4, 1.6, 2, 3, 0.5, 10, 2], warmup_steps=4, max_norm=1.0)
    close(run.after, [1, 1, 1, 1, 1, 0.5, 1, 1])
    close(run.stats["mu"][-1], 1.973791)
    close(run.stats["var"][-1], 0.138601)


def test_autoclip():
    norms = [1, 2, 0.5, 4, 1, 8, 0.25, 1]
    close(adaptive.autoclip(norms, 10).bound, [1, 1.1, 0.6, 0.65, 0.7, 0.75, 0.4, 0.425])
    close(adaptive.autoclip(norms, 50, window=3).bound, [1, 1.5, 1, 2, 1, 4, 1, 1])
    close(adaptive.autoclip([1, 100], 10).bound, [1, 10.9])


def test_percentile_clip():
    norms = [2, 1, 4, 1, 1, 1, 1, 1, 3, 0.5]
    run = adaptive.percentile_clip(norms)
    close(run.bound, [2] * 7 + [1] * 3)
    close(run.after, [2, 1, 2, 1, 1, 1, 1, 1, 1, 0.5])
    close(adaptive.percentile_clip(norms, 25, window=4).bound, [2] * 3 + [1] * 7)
    close(adaptive.percentile_clip(norms, 100).after, norms)


def test_adagc():
    run = adaptive.adagc(np.array([[2, 0.5, 3, 1, 2, 0.4, 10, 1]]).T, warmup_steps=4)
    close(run.after[:, 0], [1, 0.5, 1, 0.525, 0.525525, 0.4, 0.523930, 0.524453])
    close(run.stats["gamma"][:, 0], [1, 0.5, 0.5, 0.5005, 0.501001, 0.498980, 0.499479, 0.499979])


def test_adagc_of_two_tensors():
    run = adaptive.adagc([(3, 4), (0.3, 0.4), (1, 0.2), (0.5, 0.1), (9, 0.1), (0.3, 3)], warmup_steps=3)
    after = [(0.6, 0.8), (0.3, 0.4), (0.315, 0.2), (0.315315, 0.1), (0.315630, 0.1), (0.3, 0.403492)]
    close(run.after, after)
    close(run.stats["gamma"][-1], [0.300883, 0.384663])


def test_adagc_without_a_warmup():
    """The first step clips the global norm all the same, and starts gamma."""
    for steps in (0, 1):
        run = adaptive.adagc([(3, 4), (3, 4)], warmup_steps=steps)
        close(run.after, [(0.6, 0.8), (0.63, 0.84)])


AGGC = [1, 1, 1, 4, 0.1]


@pytest.mark.parametrize(
    ("scales", "after", "ema"),
    [
        ({}, [1, 0.75, 0.9375, 1.171875, 0.78125], [0.5, 0.625, 0.78125, 0.976562, 0.878906]),
        ({"max_down": 0.9, "max_up": 1.1}, [1, 0.9, 1, 3.6, 0.11], [0.5, 0.7, 0.85, 2.225, 1.1675]),
    ],
)
def test_aggc(scales, after, ema):
    run = adaptive.aggc(AGGC, 1.5, 0.8, 0.5, 0.01, initial=0.0, **scales)
    close(run.after, after)
    close(run.stats["ema"], ema)


def test_aggc_starts_at_the_first_norm():
    run = adaptive.aggc([4, 4, 40, 0.04], 1.5, 0.5, 0.5)
    close(run.after, [4, 4, 6, 2.5])
    close(run.stats["ema"], [4, 4, 5, 3.75])


def test_aggc_raises_past_an_upper_end_that_is_lower():
    close(adaptive.aggc([1, 1, 3], 1.5, None, 0.5, 2.0).after, [2, 2, 2.625])


HISTORY = [1, 1.2, 0.8, 1, 3, 10, 1, 1, 10]


def test_clip_by_history():
    raw = adaptive.clip_by_history(HISTORY, 3.0, 8, 4, take_in="raw")
    close(raw.after, [1, 1.2, 0.8, 1, 1.424264, 3.829815, 1, 1, 10])
    clipped = adaptive.clip_by_history(HISTORY, 3.0, 8, 4)
    close(clipped.after[[4, 5, 8]], [1.424264, 1.719833, 1.974491])
    assert np.all(clipped.bound[:4] == inf)


def test_skip_step():
    norms = [1, 1.2, 0.8, 1, 5, 5, 1, 1]
    keep = [1, 1, 1, 1, 0, 1, 1, 1]
    run = adaptive.skip_step(norms, 3.0, 8)
    close(run.after, np.multiply(keep, norms))
    np.testing.assert_array_equal(np.isfinite(run.bound), [0, 0, 0, 1, 1, 1, 1, 1])
    keep[5] = 0
    close(adaptive.skip_step(norms, 3.0, 8, take_in="kept").after, np.multiply(keep, norms))


def test_skip_step_after_constants():
    """Where all were the same any increase is too much, without a floor under the deviation."""
    norms = np.array([1.0] * 9 + [1 + 1e-9])
    assert adaptive.skip_step(norms, window=8).after[-1] == 0
    assert adaptive.skip_step(norms, window=8, floor=1e-6).after[-1] == norms[-1]


def test_tracked_quantile():
    run = adaptive.tracked_quantile([2, 2, 1, 0.5, 1, 3, 1.1])
    close(run.bound, [1, 1.105171, 1.221403, 1.105171, 1, 0.904837, 1])
    close(run.stats["c"][-1], 1.105171)


def test_clip_norm_growth():
    after = [1, 1.005, 1.01505001, 1.02520052, 0.5, 0.50500001]
    np.testing.assert_allclose(adaptive.clip_norm_growth([1, 1.005, 2, 2, 0.5, 0.6]).after, after, rtol=1e-8)


# What a method does with a bad norm at any phase: the run is the run without it.

METHODS = {
    "autoclip": adaptive.autoclip,
    "autoclip, window": lambda norms: adaptive.autoclip(norms, 50, window=8),
    "percentile_clip": lambda norms: adaptive.percentile_clip(norms, 25, window=8),
    "zclip": lambda norms: adaptive.zclip(norms, warmup_steps=8),
    "zclip, patient": lambda norms: adaptive.zclip(norms, warmup_steps=8, max_norm=None, patience=3),
    "aggc": lambda norms: adaptive.aggc(norms, 1.5, 0.5),
    "clip_by_history": lambda norms: adaptive.clip_by_history(norms, window=16, warmup_steps=8, patience=3),
    "tracked_quantile": adaptive.tracked_quantile,
    "clip_norm_growth": adaptive.clip_norm_growth,
    "skip_step": lambda norms: adaptive.skip_step(norms, window=16),
}
BAD = [0.0, np.nan, inf]


@pytest.mark.parametrize("name", METHODS)
def test_bad_norms_leave_no_trace(rng, name):
    norms = sequences.training(rng, 60)
    clean = METHODS[name](norms)
    for at in (0, 3, 8, 9, 30):
        run = METHODS[name](np.insert(norms, at, BAD))
        kept = np.delete(np.arange(63), slice(at, at + 3))
        np.testing.assert_array_equal(run.after[kept], clean.after)
        np.testing.assert_array_equal(run.bound[kept], clean.bound)
        for statistic, values in run.stats.items():
            np.testing.assert_array_equal(values[kept], clean.stats[statistic])
        if name != "skip_step":
            np.testing.assert_array_equal(run.after[at : at + 3], BAD)


def test_bad_norms_leave_no_trace_in_adagc(rng):
    norms = sequences.tensors(rng, 60)
    clean = adaptive.adagc(norms, warmup_steps=8)
    for at in (0, 3, 7, 8, 30):
        for bad in ([0, 0, 0], [inf, 1, 1], [1, np.nan, 1]):
            run = adaptive.adagc(np.insert(norms, at, bad, axis=0), warmup_steps=8)
            np.testing.assert_array_equal(np.delete(run.after, at, axis=0), clean.after)
            np.testing.assert_array_equal(run.after[at], bad)


def test_a_zero_tensor_of_adagc_stops_no_other():
    norms = np.full((20, 2), 0.5)
    norms[5:10, 0] = 0
    run = adaptive.adagc(norms, warmup_steps=8)
    alone = adaptive.adagc(np.delete(norms, slice(5, 10), axis=0), warmup_steps=8)
    np.testing.assert_array_equal(np.delete(run.after[:, 0], slice(5, 10)), alone.after[:, 0])
    np.testing.assert_array_equal(run.after[:, 1], 0.5)


# As published, for comparison: the locks that the guard and patience are there for.


def test_zeros_pin_the_methods_as_published():
    twenty_zeros = [0.0] * 20 + [1.0] * 200
    np.testing.assert_array_equal(adaptive.autoclip(twenty_zeros, guard=False).bound > 0, np.arange(1, 221) > 191)
    one_zero = [1.0, 0.0] + [1.0] * 20
    assert adaptive.clip_norm_growth(one_zero, guard=False).after[-1] < 1e-6
    assert adaptive.clip_norm_growth(one_zero).after[-1] == 1
    pinned = adaptive.adagc(np.array([one_zero]).T, warmup_steps=4, guard=False)
    assert pinned.after[-1, 0] < 1e-7


def steps_to_follow(run, norms, at):
    """Steps from the shift on until a norm passes unclipped."""
    return int(np.argmax(run.after[at - 1 :] == norms[at - 1 :])) if np.any(run.after[at:] == norms[at:]) else None


def test_patience_follows_a_lasting_shift(rng):
    norms = sequences.with_shift(sequences.lognormal(rng, 1500, spread=0.1, drift=1.0))
    assert steps_to_follow(adaptive.zclip(norms, max_norm=None), norms, 500) is None
    for patience, most in ((33, 45), (5, 20)):
        steps = steps_to_follow(adaptive.zclip(norms, max_norm=None, patience=patience), norms, 500)
        assert patience < steps <= most


# The packages themselves, over 2,000 steps, each with float64 and with float32 parameters.

TOLERANCE = {"float64": 1e-12, "float32": 2e-5}


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.mark.parity
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(
    ("clip_to", "theirs", "drift"),
    [
        ("reciprocal", {}, 0.1),
        ("reciprocal", {}, 10.0),
        ("edge", {"mode": "percentile"}, 0.1),
        ("edge", {"mode": "percentile"}, 10.0),
        ("mean", {"clip_option": "mean"}, 0.1),
    ],
)
def test_zclip_is_the_packages(rng, dtype, clip_to, theirs, drift, max_norm):
    norms = sequences.training(rng, drift=drift)
    after, stats = packages.zclip(norms, dtype=dtype, max_grad_norm=max_norm, **theirs)
    run = adaptive.zclip(norms, max_norm=max_norm, clip_to=clip_to)
    np.testing.assert_allclose(packages.without_eps(norms, after), run.after, rtol=TOLERANCE[dtype])
    for name in ("mu", "var"):
        np.testing.assert_allclose(stats[name], run.stats[name], rtol=TOLERANCE[dtype])
    assert 20 <= np.sum(run.stats["spikes"] > 0) < 500


@pytest.mark.parity
@pytest.mark.parametrize("foreach", [False, True])
def test_adagc_is_the_packages(rng, dtype, foreach):
    norms = sequences.tensors(rng)
    after, stats = packages.adagc(norms, dtype=dtype, foreach=foreach)
    run = adaptive.adagc(norms)
    # The package sums the global norm in float32 whatever the parameters are.
    tolerance = max(TOLERANCE[dtype], 1e-6)
    np.testing.assert_allclose(after, run.after, rtol=tolerance)
    np.testing.assert_allclose(stats["gamma"], run.stats["gamma"], rtol=tolerance)
    assert np.all(np.sum(run.bound < norms, axis=0) > 20)


@pytest.mark.parity
@pytest.mark.parametrize("window", [1000, 50])
def test_autoclip_of_the_package_leaves_the_current_norm_out(rng, dtype, window):
    """Its threshold is AutoClip's of one step before, at quantile 0.9 of the last 1,000."""
    norms = sequences.training(rng)
    after, _ = packages.autoclip(norms, dtype=dtype, quantile=0.9, history_length=window)
    before = np.concatenate([[inf], adaptive.autoclip(norms, 90, window=window).bound[:-1]])
    # It keeps its history in float32.
    np.testing.assert_allclose(packages.without_eps(norms, after), np.minimum(norms, before), rtol=1e-6)


# The sequences.


def test_sequences(rng):
    for norms in (sequences.training(rng), sequences.tensors(rng)):
        assert len(norms) == sequences.STEPS
        assert np.all(np.isfinite(norms) & (norms > 0))
        np.testing.assert_array_equal(norms, sequences.as_float32(norms))
    calm = sequences.lognormal(rng)
    ratio = sequences.with_spikes(rng, calm) / calm
    assert np.sum(ratio > 2) == 20
    close([ratio.min(), ratio.max()], [1, 1000])
    assert 40 <= np.sum(np.diff(sequences.with_constants(rng, calm)) == 0) <= 400
    np.testing.assert_array_equal(sequences.with_shift(calm)[:499], calm[:499])
    close(sequences.with_shift(calm)[499:] / calm[499:], 10)


@pytest.mark.parametrize("name", sequences.DISTRIBUTIONS)
def test_distributions(rng, name):
    norms = sequences.DISTRIBUTIONS[name](rng, 10_000)
    assert norms.shape == (10_000,)
    assert norms.min() >= np.float32(1e-37)
    assert norms.max() <= np.float32(1e38)
    np.testing.assert_array_equal(norms, sequences.as_float32(norms))
