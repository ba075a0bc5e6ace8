"""`warmup_max_norm`: what it lets through, what statistics take in, and that a run survives an early explosion."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import clip_by, norms, thresholds
from tests.reference import adaptive, sequences
from tests.support.commands import DEMO
from tests.support.driving import drive, drive_all, driver, driver_of_all, fields

INF = np.inf
DEFAULTS = {"autoclip": oc.autoclip, "zclip": oc.zclip, "clip_by_history": oc.clip_by_history, "adagc": oc.adagc}
WARMUP_STEPS = {"autoclip": 25, "zclip": 25, "clip_by_history": 64, "adagc": 99}


# Step by step against the oracles, with explosions in the warm-up, at its end, and after it.


def exploding(rng, steps, at, *, level=5.0, size=1e25):
    numbers = sequences.lognormal(rng, steps, scale=level, drift=1.0)
    numbers[list(at)] = size
    return sequences.as_float32(numbers)


ORACLES = {
    "autoclip": (
        lambda w: oc.autoclip(50, window=20, warmup_steps=8, warmup_max_norm=w),
        lambda n, w: adaptive.autoclip(n, 50, 20, warmup_steps=8, warmup_max_norm=w),
    ),
    "zclip": (
        lambda w: oc.zclip(warmup_steps=8, warmup_max_norm=w, patience=3),
        lambda n, w: adaptive.zclip(n, 2.5, 0.97, 8, None, patience=3, warmup_max_norm=w),
    ),
    "zclip, capped": (
        lambda w: oc.zclip(warmup_steps=8, warmup_max_norm=w, max_norm=4.0, patience=None),
        lambda n, w: adaptive.zclip(n, 2.5, 0.97, 8, 4.0, warmup_max_norm=w),
    ),
    "clip_by_history": (
        lambda w: oc.clip_by_history(window=16, warmup_steps=8, warmup_max_norm=w),
        lambda n, w: adaptive.clip_by_history(n, 3.0, 16, 8, warmup_max_norm=w),
    ),
    "clip_by_history, raw": (
        lambda w: oc.clip_by_history(window=16, warmup_steps=8, warmup_max_norm=w, take_in="raw"),
        lambda n, w: adaptive.clip_by_history(n, 3.0, 16, 8, warmup_max_norm=w, take_in="raw"),
    ),
}


# One program for all sequences of a length.
to_two = driver_of_all({name: make(2.0) for name, (make, _) in ORACLES.items()})


@pytest.mark.parametrize("at", [(), (0,), (0, 1), (1, 2), (7,), (8,), (3, 20)], ids=str)
def test_step_by_step(rng, at):
    given = exploding(rng, 40, at)
    for name, (after, _) in to_two(given).items():
        np.testing.assert_allclose(after, ORACLES[name][1](given, 2.0).after, rtol=3e-5, err_msg=name)


def test_zeros_and_norms_that_are_not_finite_belong_to_no_warm_up(rng):
    given = np.insert(exploding(rng, 36, (2,)), [0, 3, 3, 6], [0.0, np.nan, INF, 0.0])
    found = to_two(given)
    for name in ("autoclip", "zclip", "clip_by_history"):
        np.testing.assert_allclose(found[name][0], ORACLES[name][1](given, 2.0).after, rtol=3e-5, err_msg=name)


def test_adagc_takes_in_norms_as_measured(rng):
    given = sequences.tensors(rng, 60)
    given[[0, 4], 1] = 1e25
    cases = [{}, {"warmup_max_norm": 0.1, "ratio": 1.5}, {"warmup_take_in": "clipped"}]
    txs = {i: oc.adagc(warmup_steps=10, **options) for i, options in enumerate(cases)}
    for i, (after, seen) in drive_all(txs, given, fields("norm_average")).items():
        run = adaptive.adagc(given, warmup_steps=10, **{"warmup_take_in": "raw"} | cases[i])
        np.testing.assert_allclose(after, run.after, rtol=3e-5, err_msg=str(cases[i]))
        np.testing.assert_allclose(seen["norm_average"], run.stats["gamma"], rtol=3e-5, err_msg=str(cases[i]))


def test_each_group_has_a_warm_up_of_its_own():
    """Leaf 1 has its first norm in step 31, when the warm-up of leaf 0 is over."""
    given = np.ones((40, 2)) * 5
    given[:30, 1] = 0
    makes = {"zclip": oc.zclip, "autoclip": functools.partial(oc.autoclip, window=8), "history": oc.clip_by_history}
    txs = {name: make(warmup_steps=4, norm=norms.leaf_norm()) for name, make in makes.items()}
    for name, (after, _) in drive_all(txs, given).items():
        np.testing.assert_array_equal(after[:4, 0], 1, err_msg=name)
        np.testing.assert_array_equal(after[30:34, 1], 1, err_msg=name)
        np.testing.assert_allclose(after[8:, 0], 5, err_msg=name)


def test_on_a_scale_of_logarithms_the_bound_is_the_same(rng):
    given = exploding(rng, 40, (0, 3))
    options = {"warmup_steps": 8, "warmup_max_norm": 2.0, "scale": "log"}
    both = {"zscore": thresholds.zscore(**options), "mean_std": thresholds.mean_std(window=16, **options)}
    txs = {name: clip_by(norms.global_norm(), threshold) for name, threshold in both.items()}
    for name, (after, _) in drive_all(txs, given).items():
        np.testing.assert_allclose(after[:8], np.minimum(given[:8], 2), rtol=1e-6, err_msg=name)
        assert np.median(after[10:] / given[10:]) > 0.9, name
        assert after.max() < 100, name


def test_with_the_current_norm_the_warm_up_is_a_step_shorter():
    given = np.float32([5, 5, 5, 1e20, 5])
    threshold = thresholds.mean_std(3.0, window=4, warmup_steps=3, warmup_max_norm=1.0, include_current=True)
    after, _ = drive(clip_by(norms.global_norm(), threshold), given)
    np.testing.assert_array_equal(after[:2], 1)
    assert after[2] > 1


def test_a_norm_near_the_end_of_the_range_spoils_nothing():
    given = np.float32([3.4e38, 3.4e38, *[1.0] * 60])
    txs = {
        f"{make.__name__}, {scale}": clip_by(
            norms.global_norm(), make(warmup_steps=16, warmup_max_norm=1.0, scale=scale)
        )
        for make in (thresholds.zscore, thresholds.mean_std)
        for scale in ("linear", "log")
    }
    for name, (after, seen) in drive_all(txs, given, lambda state: state).items():
        np.testing.assert_allclose(after, 1, rtol=1e-6, err_msg=name)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(seen)), name


def test_a_loss_of_any_sign_has_no_such_bound():
    for make in (thresholds.zscore, thresholds.mean_std):
        assert make().signed is not None
        assert make(warmup_max_norm=1.0).signed is None


# The defaults.


STEPS = 300


@functools.cache
def default(name):
    """What drives it: compiled once for a number of steps."""
    return driver(DEFAULTS[name]())


@pytest.mark.parametrize("level", [0.25, 5.0, 1e3])
@pytest.mark.parametrize("name", DEFAULTS)
def test_an_explosion_in_the_warm_up_is_cut_and_forgotten(rng, name, level):
    run, steps = default(name), WARMUP_STEPS[name]
    for at in ((0,), (1, 2), (steps // 2,), (steps - 1,)):
        given = exploding(rng, STEPS, at, level=level)
        after, _ = run(given)
        assert np.all(after[: steps - 1] <= 1 + 1e-5)
        # Then what is let through is of the size of the norms: a tenth of them for autoclip, for adagc the least.
        left = after[steps + 80 :]
        assert 0.3 * level < np.median(left) < 3 * level, at
        assert left.max() < 10 * level, at
        # And the next explosion is cut to that size.
        given[-1] = 1e25
        assert run(given)[0][-1] < 10 * level, at


@pytest.mark.parametrize("level", [1e-3, 1e-6])
@pytest.mark.parametrize("name", DEFAULTS)
def test_small_norms_pass_after_an_explosion(rng, name, level):
    given = exploding(rng, STEPS, (0,), level=level)
    after, _ = default(name)(given)
    assert after.max() <= 1 + 1e-5
    assert np.median(after[200:]) > 0.3 * level


def test_zclip_adapts_to_norms_above_1(rng):
    """At a level of 5 the published cap makes it a fixed clip."""
    given = sequences.lognormal(rng, STEPS, scale=5.0, drift=1.0)
    after, _ = default("zclip")(given)
    assert np.mean(after[25:] < 0.999 * given[25:]) < 0.05
    fixed, _ = drive(oc.zclip(max_norm=1.0), given)
    np.testing.assert_allclose(fixed, 1, rtol=1e-6)


def test_a_spike_of_one_leaf_pins_no_other_of_adagc():
    ours, published = default("adagc"), driver(oc.adagc(warmup_take_in="clipped"))
    for at in (0, 1, 50):
        given = np.ones((140, 3)) * [0.5, 0.05, 5.0]
        given[at, 0] = 1e8
        np.testing.assert_allclose(ours(given)[0][100:], given[100:], rtol=1e-5, err_msg=at)
        assert np.all(published(given)[0][100:, 1:] < 1e-6), at


def test_a_bound_in_an_array_is_that_bound():
    bounds = {"number": 2.0, "array": jnp.bfloat16(2.0), "infinite": INF, "none": None}
    found = drive_all({name: oc.zclip(warmup_max_norm=bound) for name, bound in bounds.items()}, np.full(40, 5.0))
    np.testing.assert_array_equal(found["number"][0], found["array"][0])
    np.testing.assert_array_equal(found["infinite"][0], found["none"][0])
    assert np.any(found["number"][0] != found["none"][0])


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_defaults_survive_the_recurrent_network_of_the_main_job(monkeypatch, tmp_path):
    """It explodes in its second step, by a factor of 1e25."""
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        DEMO.main("--model", "rnn", "--steps", 60, "--clippers", ",".join(DEFAULTS))
    lines = {line.partition("(")[0]: line.split() for line in out.getvalue().splitlines()}
    bits = {name: float(lines[name][1]) for name in DEFAULTS}
    assert all(each < 5 for each in bits.values()), bits
