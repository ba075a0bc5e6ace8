"""The cases that levanter and OLMo-core test their skips with, and more of the kind, as one table.

A row has the norms and the losses of a run, and which steps each takes: `+`, or `-` for a step that is skipped. Their
column is checked by their rule, written out in NumPy. Where ours differs the row says why.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import thresholds

NAN = np.nan


class Rule(NamedTuple):
    """levanter: `SkipStepConfig`, `tests/test_skip_step.py`. OLMo-core: `SkipStepOptimizer`, its test of that name."""

    num_std: float
    window: int
    least: int  # how many steps must have been seen before one is skipped
    ddof: int
    floor: float


def levanter(window, num_std=6.0):
    return Rule(num_std, window, max(2, window // 2), ddof=0, floor=1e-6)


def olmo(window, num_std=6.0):
    return Rule(num_std, window, max(2, window // 2) - 1, ddof=1, floor=0.0)


class Case(NamedTuple):
    rule: Rule
    norms: list[float]
    losses: list[float]
    theirs: str
    ours: str
    why: str = ""


# levanter fills its window with losses of 5 + sin(i / 10) and norms of 0.18 (1 + cos(i / 10) / 10).
LOSSES = [5 + np.sin(0.1 * i) for i in range(5)]
NORMS = [0.18 * (1 + 0.1 * np.cos(0.1 * i)) for i in range(5)]
RISING = [float(i) for i in range(15)]

CASES = {
    "levanter: the first steps are taken": Case(
        levanter(10), [0.38] * 4, [10.0, 11.0, 12.0, 13.0], "++++", "++++",
    ),
    "levanter: an ordinary step": Case(levanter(10), [*NORMS, 0.18], [*LOSSES, 5.0], "+" * 6, "+" * 6),
    "levanter: a high loss": Case(levanter(10), [*NORMS, 0.18], [*LOSSES, 7.1], "+++++-", "+++++-"),
    "levanter: a high norm": Case(levanter(10), [*NORMS, 1.2], [*LOSSES, 5.0], "+++++-", "+++++-"),
    "levanter: once around the window": Case(
        levanter(10), [0.4 + 0.01 * i for i in range(15)], RISING, "+" * 15, "+" * 15
    ),
    "levanter: a short window, one deviation": Case(levanter(5, 1.0), [0.017] * 3, [1.0, 1.1, 101.0], "++-", "++-"),
    "OLMo-core: an outlier at the second step": Case(olmo(2, 1.0), [0.0] * 3, [-3.2, 1e9, -3.5], "+-+", "+-+"),
    "OLMo-core: a higher loss after it": Case(
        olmo(2, 1.0), [0.0] * 3, [-3.2, 1e9, -3.1], "+-+", "+--", "an outlier widens no band: one loss is no spread yet"
    ),
    "a loss far below": Case(levanter(10), [1.0] * 8, [*LOSSES, -100.0, 5.0, 5.0], "+" * 8, "+" * 8),
    "negative losses": Case(
        levanter(10), [1.0] * 8, [-loss for loss in LOSSES] + [-4.5, -5.2, -9.0], "+" * 8, "+" * 8
    ),
    "negative losses, a high one": Case(
        levanter(10), [1.0] * 7, [-loss for loss in LOSSES] + [0.0, -5.2], "+++++-+", "+++++-+"
    ),
    "two high ones in a row": Case(
        levanter(10), [1.0] * 8, [*LOSSES, 50.0, 50.0, 5.0], "+++++-++", "+++++--+",
        "what is skipped does not enter the window",
    ),
    "a loss that is NaN": Case(
        levanter(10), [1.0] * 8, [*LOSSES, NAN, 5.0, 5.0], "+++++---", "+++++-++",
        "a NaN in the window skips every step until it is out",
    ),
    "a loss that is NaN, at first": Case(
        levanter(10), [1.0] * 4, [5.0, NAN, 5.1, 5.0], "++++", "+-++", "what is not finite is never taken"
    ),
    "all equal, and one a little larger": Case(
        levanter(10), [1.0] * 7, [5000.0] * 6 + [5000.02], "+" * 6 + "-", "+" * 7,
        "the floor of the deviation is relative: 1e-6 of a mean of 5,000 is less than float32 has",
    ),
}  # fmt: skip


def taken_by(rule, norms, losses):
    """What they do: both numbers enter the window at each step, and both must be at most mean + k std before it."""
    window, taken = [], ""
    for row in zip(norms, losses, strict=True):
        is_high = False
        if len(window) >= rule.least:
            last = np.array(window[-rule.window :])
            mean = last.mean(axis=0)
            std = last.std(axis=0, ddof=rule.ddof) if len(last) > rule.ddof else np.array([0.0, NAN])
            # Of one number torch's std is NaN. Without a norm, as in the test of OLMo-core, only the loss is judged.
            is_high = not np.all(np.array(row) - mean <= rule.num_std * np.maximum(std, rule.floor))
        taken += "-" if is_high else "+"
        window.append(row)
    return taken


ONE = np.ones(1, np.float32)


@functools.cache  # one program for all cases of a rule
def ours(rule):
    both = thresholds.mean_std(rule.num_std, window=rule.window, warmup_steps=rule.least, ddof=rule.ddof)
    # Zeros would be steps that are taken and do nothing.
    inner = optax.chain(optax.scale(0.0), optax.add_decayed_weights(1.0), optax.ema(0.9))
    tx = oc.skip_spikes(inner, both, loss_threshold=both)

    @jax.jit
    def step(norm, loss, state):
        updates, state = tx.update(norm[None], state, ONE, value=loss)
        return updates[0] != 0, optax.tree.get(state, "count"), state

    return jax.jit(tx.init)(ONE), step


def taken_by_ours(rule, norms, losses):
    (state, step), taken, before = ours(rule), "", 0
    for norm, loss in zip(norms, losses, strict=True):
        is_taken, count, state = step(np.float32(norm), loss, state)
        taken += "+" if is_taken else "-"
        assert is_taken == (count > before)
        before = count
    return taken


@pytest.mark.parametrize("name", CASES)
def test_as_they_do_or_for_a_reason(name):
    case = CASES[name]
    assert taken_by(case.rule, case.norms, case.losses) == case.theirs
    assert taken_by_ours(case.rule, case.norms, case.losses) == case.ours
    assert (case.ours == case.theirs) == (not case.why)


def test_a_loss_must_be_passed():
    """levanter's `loss=` is our `value=`, which optax's own transformations take."""
    tx = oc.skip_spikes(optax.sgd(0.1), thresholds.mean_std(), loss_threshold=thresholds.mean_std())
    with pytest.raises(ValueError, match="needs the loss"):
        jax.eval_shape(lambda: tx.update(ONE, tx.init(ONE)))


def test_the_window_holds_what_was_taken_in_order():
    """levanter's holds all, in a ring whose oldest entry comes next; so does ours."""
    tx = oc.skip_spikes(
        optax.identity(), thresholds.constant(1e3), loss_threshold=thresholds.mean_std(6.0, window=10, warmup_steps=5)
    )
    state, step = jax.jit(tx.init)(ONE), jax.jit(tx.update)
    for loss in RISING:
        _, state = step(ONE, state, value=loss)
    np.testing.assert_array_equal(np.roll(state.loss_threshold_state.window_norms[0], -15 % 10), RISING[-10:])
