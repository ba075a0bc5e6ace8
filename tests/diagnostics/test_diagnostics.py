"""What recorded norms look like: summaries of histories with known answers, and records in states."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import diagnostics
from tests.support.histories import lognormal, recorded, with_spikes

ROOT = Path(__file__).parents[2]


def pareto(rng, index, steps=1000):
    """Norms of which a share x**-index exceeds x."""
    return (1 - rng.random(steps)) ** (-1 / index)


# The summary.


def test_counts_and_percentiles():
    norms = np.concatenate([np.arange(1.0, 102.0), [0.0, 0.0, np.nan, np.inf, -np.nan]])
    found = diagnostics.summary(list(norms))
    assert (found.steps, found.nonfinite, found.zeros) == (106, 3, 2)
    assert dict(found.percentiles) == {1: 2.0, 10: 11.0, 50: 51.0, 90: 91.0, 99: 100.0, 100: 101.0}


@pytest.mark.parametrize("index", [1.1, 1.5, 3.0])
def test_the_interval_has_the_tail_index_of_a_pareto_law(rng, index):
    found = [diagnostics.summary(pareto(rng, index, 500)) for _ in range(60)]
    assert {each.tail_count for each in found} == {44}  # 2 sqrt(500)
    covered = np.mean([low < index < high for low, high in (each.tail_interval for each in found)])
    assert covered >= 0.85  # 95 % are meant; 9 or more misses of 60 have a chance of 0.2 %
    assert np.median([each.tail_index for each in found]) == pytest.approx(index, rel=0.1)
    for each in found:
        low, high = each.tail_interval
        assert (high - low) / 2 == pytest.approx(1.96 * each.tail_index / math.sqrt(44))


def test_the_tail_index_by_hand():
    # The largest 10 of 25 are e, the 11th is 1: the mean of their logarithms is 1.
    found = diagnostics.summary([1.0] * 15 + [math.e] * 10)
    assert (found.tail_count, found.tail_index) == (10, pytest.approx(1.0))
    assert math.isinf(diagnostics.summary([2.0] * 25).tail_index)
    assert math.isnan(diagnostics.summary([2.0] * 24).tail_index)


def test_spikes_are_found_and_nothing_else(rng):
    norms, at = with_spikes(rng, 4000)
    assert set(diagnostics.summary(norms).spikes) >= set(at)
    false = np.mean([len(diagnostics.summary(lognormal(rng)).spikes) for _ in range(20)])
    assert false < 2  # of 1,000 steps


def test_a_spike_among_the_first_steps_is_found(rng):
    norms = lognormal(rng, 100, spread=0.1)
    norms[1] = 1e25
    assert diagnostics.summary(norms).spikes == (2,)
    assert diagnostics.summary(norms[:16]).spikes == (2,)
    assert diagnostics.summary(norms[:15]).spikes == ()  # too few to compare with


def test_constant_norms_have_spikes_from_twice_their_value_on():
    norms = np.ones(200)
    norms[[120, 150]] = 1.99, 2.01
    assert diagnostics.summary(norms).spikes == (151,)


def test_spikes_count_all_steps(rng):
    norms = np.concatenate([[np.nan, 0.0], lognormal(rng, 100, spread=0.1), [50.0]])
    assert diagnostics.summary(norms).spikes == (103,)


def test_steady_growth_is_no_spike():
    assert diagnostics.summary(1.1 ** np.arange(1000)).spikes == ()


def test_spikes_stand_out_from_the_64_norms_before_them(rng):
    norms = np.exp(np.clip(rng.standard_t(1.5, 3000), -50, 50))
    logs, expected = np.log(norms), []
    for i, log in enumerate(logs):
        window = logs[max(i - 64, 0) : max(i, 64)]
        deviation = np.median(np.abs(window - np.median(window)))
        if log > np.median(window) + max(6 * deviation, math.log(2)):
            expected.append(i + 1)
    assert diagnostics.summary(norms).spikes == tuple(expected)
    assert len(expected) > 30


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_drift(rng, factor):
    norms = lognormal(rng, 400) * np.repeat([1.0, factor], 200)
    assert diagnostics.summary(norms).drift == pytest.approx(factor, rel=0.2)


def test_clipped_share_counts_finite_norms_above_the_bound():
    found = diagnostics.summary([0.0, 1.0, 2.0, 4.0, np.inf])
    assert found.clipped_share(1.0) == 2 / 5  # a norm at the bound is not clipped, nor is one that is infinite
    np.testing.assert_array_equal(found.clipped_share(np.array([[0.5, 3.0]])), [[3 / 5, 1 / 5]])
    assert isinstance(found.clipped_share(1), float)
    assert math.isnan(diagnostics.summary([]).clipped_share(1.0))


def test_clipped_share_is_what_a_clipper_does(rng):
    state = recorded(lognormal(rng, 50), optaxclip.clip_by_global_norm(1.5, record=50))
    found = diagnostics.summary(diagnostics.from_state(state))
    assert found.clipped_share(1.5) == pytest.approx(optaxclip.clip_stats(state)["clipped_share"])


def test_long_histories_are_judged_in_parts(rng, monkeypatch):
    norms, _ = with_spikes(rng, 500)
    whole = diagnostics.summary(norms).spikes
    monkeypatch.setattr("optaxclip.diagnostics.summaries._AT_ONCE", 100)
    assert diagnostics.summary(norms).spikes == whole


def test_a_summary_is_frozen():
    found = diagnostics.summary([1.0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.steps = 2
    with pytest.raises(TypeError):
        found.percentiles[50] = 2.0


@pytest.mark.parametrize("norms", [np.arange(3, dtype=ml_dtypes.bfloat16), jnp.arange(3), range(3), (0.0, 1.0, 2.0)])
def test_every_kind_of_vector_is_a_history(norms):
    np.testing.assert_array_equal(diagnostics.summary(norms).norms, [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("norms", "complaint"),
    [
        (1.0, r"shape \(\)"),
        ([[1.0]], r"shape \(1, 1\)"),
        (["a"], "of <U1"),
        ([1j], "of complex128"),
        ([True], "of bool"),
        ([1.0, -2.0], "at least 0, got -2 in step 2"),
    ],
)
def test_what_is_no_history_is_refused(norms, complaint):
    with pytest.raises(ValueError, match=complaint):
        diagnostics.summary(norms)


# Where histories come from.


def test_from_state_has_the_last_steps_before_the_clip():
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=3), optax.adam(1e-3))
    np.testing.assert_array_equal(diagnostics.from_state(recorded([1, 2, np.inf, 4], tx)), [2, np.inf, 4])
    np.testing.assert_array_equal(diagnostics.from_state(recorded([5], tx)), [5])


def test_from_state_has_what_led_to_the_first_step_that_was_not_finite():
    state = recorded([1, 2, np.nan, *range(4, 100)], optaxclip.clip_by_global_norm(1.0, record=10))
    np.testing.assert_array_equal(diagnostics.from_state(state), range(90, 100))
    np.testing.assert_array_equal(diagnostics.from_state(state, history="first_nonfinite"), [1, 2, np.nan, 4])
    with pytest.raises(ValueError, match="history must be one of 'last', 'first_nonfinite', got 'all'"):
        diagnostics.from_state(state, history="all")


def test_from_state_wants_to_know_which_of_several_records():
    each = optaxclip.clip_by_global_norm(1.0, record=3)
    state = recorded([2, 3], optax.chain(each, optaxclip.clip_by_leaf_norm(0.5, record=3)))
    np.testing.assert_allclose(diagnostics.from_state(state, place="1"), [1, 1])
    for place in ("", "2"):
        with pytest.raises(ValueError, match="place must be one of '0', '1'"):
            diagnostics.from_state(state, place=place)


def test_from_state_wants_to_know_which_of_several_groups():
    tx = optaxclip.clip_by_leaf_norm(1.0, record=3)
    state = tx.init({"a": np.zeros(2), "b": np.zeros(1)})
    _, state = jax.jit(tx.update)({"a": np.float32([3, 4]), "b": np.float32([2])}, state)
    np.testing.assert_allclose(diagnostics.from_state(state, group="b"), [2])
    for group in ("", "c"):
        with pytest.raises(ValueError, match=r"group must be one of 'a', 'b', or record the global norm"):
            diagnostics.from_state(state, group=group)


@pytest.mark.parametrize("norms", [{"clip_norm": 1.0}, [np.ones(2), np.ones(3)], optaxclip.clip_by_global_norm])
def test_what_is_no_vector_is_told_where_to_go(norms):
    with pytest.raises(ValueError, match=r"vector of real numbers.*from_state\(opt_state\)"):
        diagnostics.summary(norms)


def test_from_state_without_a_record():
    with pytest.raises(ValueError, match=r"no record .*record=100"):
        diagnostics.from_state(recorded([1], optaxclip.clip_by_global_norm(1.0)))


def test_summary_starts_no_jax_backend_and_needs_no_matplotlib():
    program = (
        "import sys; from optaxclip import diagnostics; from jax._src import xla_bridge\n"
        "print(diagnostics.summary([1.0, 2.0, 9.0]).steps)\n"
        "assert not xla_bridge.backends_are_initialized(); assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "3\n")
