"""Long trainings in which steps go wrong, as the benchmark `faults` runs them."""

import functools

import jax
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import clip_stats, thresholds
from tests.benchmarks import faults
from tests.reference.trees import assert_same_bits

pytestmark = pytest.mark.slow

STEPS = 10_000
# Without optimization XLA rounds as the program is written, in two programs alike.
AS_WRITTEN = {"xla_backend_optimization_level": 0}
NONFINITE = ("nan", "inf", "leaf", "coordinate")
REASONS = dict.fromkeys((*NONFINITE, "loss"), "skipped_nonfinite") | {
    "1e30": "skipped_norm",
    "high loss": "skipped_loss",
}


def skip_by_both(inner):
    """By norm and by loss, as OLMo does."""
    return oc.skip_spikes(inner, thresholds.mean_std(6.0), loss_threshold=thresholds.mean_std(6.0))


# Per wrapper the kinds of fault that it leaves out. What else happens is a step: zeros, and for skip_nonfinite 1e30.
WRAPPERS = {
    "nonfinite": (oc.skip_nonfinite, NONFINITE),
    "spikes": (lambda inner: oc.skip_spikes(inner, thresholds.mean_std(6.0)), (*NONFINITE, "1e30")),
    "norm and loss": (skip_by_both, (*NONFINITE, "1e30", "loss", "high loss")),
}


def expected_counts(code, kinds):
    left_out = [faults.KINDS[each] for each in code if faults.KINDS[each] in kinds]
    reasons = [REASONS[kind] for kind in left_out]
    names = ("skipped_nonfinite", "skipped_norm", "skipped_loss")
    return {"skip_steps": len(code), "skipped_steps": len(left_out)} | {name: reasons.count(name) for name in names}


def is_left_out(code, kinds):
    return np.isin(code, [faults.KINDS.index(kind) for kind in kinds])


def codes(fault, kinds=faults.IN_TABLE, seed=0):
    """The faults of the benchmark, and none in the last 1,000 steps: time to recover what can be recovered."""
    code = faults.codes(fault, STEPS, kinds, seed)
    code[-1000:] = 0
    return code


@functools.cache
def loss_without_faults():
    return float(faults.loss(faults.train(faults.clipped_adam(), np.zeros(STEPS, np.int32)).params))


@pytest.mark.parametrize(
    ("wrapper", "level", "fault"),
    [
        *((name, 0.0, fault) for name in WRAPPERS for fault in ("20 % of steps", faults.BURSTS)),
        ("norm and loss", -0.1, "20 % of steps"),
        ("norm and loss", -50.0, "20 % of steps"),
    ],
)
def test_the_run_is_that_of_the_good_steps_alone(wrapper, level, fault):
    """Also where the losses are about 0 in the end, or negative from the first."""
    wrap, kinds = WRAPPERS[wrapper]
    # A burst of finite spikes opens the gate: the test below.
    finite = ("1e30", "high loss")
    code = codes(fault, [kind for kind in faults.KINDS[1:] if fault != faults.BURSTS or kind not in finite])
    run = faults.train(wrap(faults.clipped_adam()), code, options=AS_WRITTEN, level=level)
    out = is_left_out(code, kinds)
    alone = faults.train(faults.clipped_adam(), code[~out], np.flatnonzero(~out), AS_WRITTEN)
    assert_same_bits(run.params, alone.params)
    assert_same_bits(run.state.inner_state, alone.state)
    np.testing.assert_array_equal(run.moved, ~out)
    found, expected = clip_stats(run.state), expected_counts(code, kinds)
    assert {name: found[name] for name in expected} == expected
    assert found["skipped_steps"] == sum(found[f"skipped_{reason}"] for reason in ("nonfinite", "norm", "loss"))
    assert 0.02 < np.mean(out) < 0.2
    assert faults.survives(run)
    assert float(faults.loss(run.params)) == pytest.approx(loss_without_faults(), rel=0.1)


@pytest.mark.parametrize("most", [0, 20])
def test_a_burst_of_finite_spikes_opens_the_gate_and_locks_nothing(most):
    code = codes(faults.BURSTS, ("1e30",))
    tx = oc.skip_spikes(faults.clipped_adam(), thresholds.mean_std(6.0), max_consecutive=most)
    run = faults.train(tx, code)
    assert faults.survives(run)
    # Of each burst so many are left out, and then it is the new level, until a good step comes.
    starts = np.flatnonzero((code > 0) & (np.roll(code, 1) == 0))
    within = np.arange(faults.BURST + 1)
    np.testing.assert_array_equal(run.moved[starts[0] + within], within >= most)
    assert np.all(run.moved[code == 0])
    assert np.sum(~run.moved) <= most * len(starts)
    assert float(faults.loss(run.params)) == pytest.approx(loss_without_faults(), rel=0.1)


def test_what_the_table_claims():
    rows = {fault: faults.measure(codes(fault)) for fault in ("no faults", "1 % of steps", faults.BURSTS)}
    adam, apply_if_finite, *ours = faults.OPTIMIZERS
    for fault, row in rows.items():
        for name in ours:
            assert row[name]["survives"]
            assert row[name]["loss"] == pytest.approx(loss_without_faults(), rel=0.1)
            assert row[name]["lost"] <= row[name]["faults"]
        assert row[adam]["survives"] == (fault == "no faults")
        # Six NaN in a row are applied; one 1e30 makes the second moment infinite, and no step moves anything again.
        lost = row[apply_if_finite]["lost"]
        assert lost == 0 if fault == "no faults" else lost > STEPS / 2


def test_a_spike_of_the_loss_is_left_out():
    code = faults.codes("5 % of steps", 2000, ("loss",))
    run = faults.train(skip_by_both(faults.clipped_adam()), code)
    np.testing.assert_array_equal(run.moved, code == 0)
    assert clip_stats(jax.device_get(run.state))["skipped_nonfinite"] == np.sum(code > 0)
