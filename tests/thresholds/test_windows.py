"""Windows of norms that orbax restored into another length with `strict=False`: cut off, or with zeros added."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from optaxclip import clip_by, norms, thresholds

OLD = np.random.default_rng(0).lognormal(size=(14, 2)).astype(np.float32)
NEW = np.random.default_rng(1).lognormal(size=(9, 2)).astype(np.float32)
LENGTHS = [(5, 8), (8, 5), (20, 8), (8, 20)]  # the window before and after; 14 norms do not fill 20

THRESHOLDS = {
    "quantile": lambda window: thresholds.quantile(0.3, window=window),
    "order_statistic": lambda window: thresholds.order_statistic(30.0, window=window),
    "mean_std": lambda window: thresholds.mean_std(0.5, window=window, warmup_steps=3, take_in="raw"),
    "mean_std, with this norm": lambda window: thresholds.mean_std(
        0.5, window=window, warmup_steps=3, take_in="raw", include_current=True
    ),
}


@functools.cache
def clip(name, window):
    """One, and so one program, for all tests."""
    return clip_by(norms.leaf_norm(), THRESHOLDS[name](window))


def followed(tx, sizes, state=None):
    """What comes out of two leaves of these norms, and the state."""
    update = jax.jit(tx.update)
    state = tx.init([jnp.zeros(1)] * 2) if state is None else state
    outs = []
    for row in sizes:
        out, state = update([jnp.asarray(size)[None] for size in row], state)
        outs.append([float(each[0]) for each in out])
    return np.array(outs), state


def bound(name, ring, norm, place, window):
    """From the norms that there are, in NumPy: what `norm` may be, and the ring with it."""
    after = ring.copy()
    after[place] = norm
    if name == "order_statistic":
        after[after == 0] = norm
        return np.sort(after)[min(int(30.0 * window / 100), window - 1)], after
    if name == "quantile":
        return np.quantile(after[after > 0], 0.3), after
    there = after if name.endswith("norm") else ring
    there = there[there > 0]
    return (there.mean() + 0.5 * there.std() if there.size >= 3 else np.inf), after


def restored(state, target, folder):
    """What orbax makes of a state where arrays have other shapes and it is told not to mind."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", target=target, strict=False)


@pytest.mark.parametrize(("before", "after"), LENGTHS)
@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_window_of_another_length(name, before, after, tmp_path):
    old, new = (clip(name, window) for window in (before, after))
    _, state = followed(old, OLD)
    state = restored(state, new.init([jnp.zeros(1)] * 2), tmp_path)
    rings = np.array(jax.tree.leaves(state)[0], np.float64)
    assert rings.shape == (2, after)
    seen, right = len(OLD), []
    for i, row in enumerate(NEW.astype(np.float64)):
        limits, rows = zip(
            *(bound(name, ring, norm, (seen + i) % after, after) for ring, norm in zip(rings, row, strict=True)),
            strict=True,
        )
        rings = np.array(rows)
        right.append(np.minimum(row, limits))
    outs, _ = followed(new, NEW, state)
    np.testing.assert_allclose(outs, right, rtol=1e-5)
    assert np.any(outs < NEW)


def test_nothing_is_bounded_before_there_are_enough_norms_whatever_the_count_says():
    tx = clip_by(norms.leaf_norm(), thresholds.mean_std(0.0, window=4, warmup_steps=3))
    _, state = followed(tx, OLD)
    emptied = state._replace(window_norms=state.window_norms.at[:, 1:].set(0))
    outs, _ = followed(tx, np.float32([[1e3, 1e3]]), emptied)
    np.testing.assert_array_equal(outs, 1e3)


def test_a_value_of_zero_is_no_empty_place():
    """The logarithm of a norm of 1, and a loss of 0."""
    threshold = thresholds.mean_std(3.0, window=4, warmup_steps=3, scale="log")
    outs, _ = followed(clip_by(norms.leaf_norm(), threshold), np.float32([[1.0, 2.0]] * 3 + [[5.0, 5.0]]))
    np.testing.assert_allclose(outs[-1], [1.0, 2.0], rtol=1e-5)
    threshold = thresholds.mean_std(3.0, window=4, warmup_steps=3).signed
    state = threshold.init(jnp.float32(0))
    for loss in (0.0, -0.0, 1e-40, 0.0):
        (_, limit), state = threshold.limit(jnp.float32(loss), state, None)
    np.testing.assert_allclose(limit, 3e-6, rtol=1e-5)


def test_the_largest_norms_are_norms_like_others():
    """The places that are empty sort as the largest float does."""
    largest = np.finfo(np.float32).max
    tx = clip_by(norms.leaf_norm(), thresholds.quantile(0.5, window=5))
    outs, state = followed(tx, np.float32([[largest, 1.0]] * 3))
    np.testing.assert_array_equal(outs, np.float32([[largest, 1.0]] * 3))
    outs, _ = followed(tx, np.float32([[1.0, largest]]), state)
    np.testing.assert_allclose(outs, np.float32([[1.0, 1.0]]), rtol=1e-6)
