"""Windows of another length: the newest norms, in a ring that goes on as one that always had that length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import contrib

# Two groups: the second has norms that do not enter the history, so that the rings are filled differently.
NORMS = np.array([[3, 1], [1, 0], [4, 2], [1.5, np.nan], [5, 1e-42], [9, 1e38], [2, 3], [6, 5], [5.5, 2], [3.5, 8]])
ZERO = np.zeros(1, np.float32)
TWO = {"a": ZERO, "b": ZERO}
WINDOWED = {
    "mean_std": lambda window: oc.clip_by_history(1.0, window=window, warmup_steps=1, take_in="raw", norm=LEAVES),
    "quantile": lambda window: oc.autoclip(60.0, window=window, norm=LEAVES),
    "order_statistic": lambda window: contrib.percentile_clip(60.0, window=window),
}
LEAVES = oc.norms.leaf_norm()


@functools.cache
def compiled(name, window):
    """What comes out, and the state, of the steps from one number to another. All others come out as 0."""
    tx = WINDOWED[name](window)

    def run(state, start, stop):
        def step(i, carry):
            after, state = carry
            updates, state = tx.update({"a": norms[i, :1], "b": norms[i, 1:]}, state)
            return after.at[i].set(jnp.concatenate([updates["a"], updates["b"]])), state

        norms = jnp.asarray(np.float32(NORMS))
        return jax.lax.fori_loop(start, stop, step, (jnp.zeros(NORMS.shape), state))

    return jax.jit(run), jax.jit(tx.init)(TWO)


# To one and to the same length of one kind: all of them go through the same lines.
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [(name, *lengths) for name in WINDOWED for lengths in [(5, 3), (3, 5)]] + [("mean_std", 3, 3), ("mean_std", 5, 1)],
)
def test_a_window_goes_on_as_one_that_was_always_so_long(name, before, after):
    """As long as the old one has all that such a one would have."""
    (run_old, old), (run_new, new) = compiled(name, before), compiled(name, after)
    for at in range(len(NORMS)):
        if after > before and at >= before:
            break  # it may have forgotten some, and one filled by its first norm does not show by which
        state, _ = oc.migrate(WINDOWED[name](after), TWO, run_old(old, 0, at)[1])
        always = run_new(new, 0, at)[1]
        ours, theirs = (np.asarray(run_new(start, at, len(NORMS))[0]) for start in (state, always))
        assert np.any(ours[at:])
        np.testing.assert_array_equal(ours, theirs)
    assert at >= min(before, 3)


def test_a_window_that_grows_counts_only_what_it_has():
    old, new = (oc.clip_by_history(2.0, window=window, warmup_steps=1, take_in="raw") for window in (2, 4))
    update, state = jax.jit(old.update), old.init(ZERO)
    for norm in np.float32([9, 7, 1, 3]):
        _, state = update(norm[None], state)
    state, report = oc.migrate(new, ZERO, state)
    np.testing.assert_array_equal(state.window_norms, [[1.0, 3.0, 0.0, 0.0]])
    assert int(state.window_seen[0]) == 2
    assert report.kept["window_norms"] == "2 norms, now 4"
    updates, state = jax.jit(new.update)(np.float32([100]), state)
    assert float(updates[0]) == 4.0  # the mean of 1 and 3, and twice their deviation
    np.testing.assert_array_equal(state.window_norms, [[1.0, 3.0, 100.0, 0.0]])


@pytest.mark.parametrize("window", [2, 4])
def test_a_window_of_other_groups_is_new(window):
    old, new = (
        oc.clip_by_history(window=4, warmup_steps=1, norm=LEAVES),
        oc.clip_by_history(window=window, warmup_steps=1),
    )
    _, state = jax.jit(lambda: old.update({"a": ZERO + 1, "b": ZERO + 1}, old.init(TWO)))()
    state, report = oc.migrate(new, TWO, state)
    assert not np.any(state.window_norms)
    assert report.kept == {}
    assert "of shape" in next(iter(report.dropped.values()))
