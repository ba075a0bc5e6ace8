"""Windows of norms that orbax restored into another length with `strict=False`: cut off, or with zeros added."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from optaxclip import clip_by, norms, thresholds
from tests.support.driving import together

OLD = np.random.default_rng(0).lognormal(size=(14, 2)).astype(np.float32)
NEW = np.random.default_rng(1).lognormal(size=(9, 2)).astype(np.float32)
# The window before and after, and how many norms there were: a ring that is full, and ones with places left before and
# after the cut.
LENGTHS = [(5, 8, 14), (8, 5, 14), (8, 5, 3), (5, 8, 3)]

THRESHOLDS = {
    "quantile": lambda window: thresholds.quantile(0.3, window=window),
    "order_statistic": lambda window: thresholds.order_statistic(30.0, window=window),
    "mean_std": lambda window: thresholds.mean_std(0.5, window=window, warmup_steps=3, take_in="raw"),
    "mean_std, with this norm": lambda window: thresholds.mean_std(
        0.5, window=window, warmup_steps=3, take_in="raw", include_current=True
    ),
}


ZEROS = [np.zeros(1, np.float32)] * 2


@functools.cache
def clips(window):
    """A clip by each, in one program for all tests."""
    return together({name: clip_by(norms.leaf_norm(), make(window)) for name, make in THRESHOLDS.items()})


def followed(tx, sizes, state=None):
    """What comes out of two leaves of these norms, an array of steps by leaves for each clip, and the state."""
    update = jax.jit(tx.update)
    state = tx.init(ZEROS) if state is None else state
    outs = []
    for row in sizes:
        out, state = update([size[None] for size in row], state)
        outs.append(jax.tree.map(np.concatenate, out, is_leaf=lambda node: isinstance(node, list)))
    return jax.tree.map(lambda *steps: np.stack(steps), *outs), state


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


@pytest.mark.parametrize(("before", "after", "steps"), LENGTHS)
def test_a_window_of_another_length(before, after, steps, tmp_path):
    old, new = clips(before), clips(after)
    _, states = followed(old, OLD[:steps])
    states = restored(states, new.init(ZEROS), tmp_path)
    outs, _ = followed(new, NEW, states)
    for name, state in states.items():
        rings = np.array(jax.tree.leaves(state)[0], np.float64)
        assert rings.shape == (2, after)
        seen, right = steps, []
        for i, row in enumerate(NEW.astype(np.float64)):
            limits, rows = zip(
                *(bound(name, ring, norm, (seen + i) % after, after) for ring, norm in zip(rings, row, strict=True)),
                strict=True,
            )
            rings = np.array(rows)
            right.append(np.minimum(row, limits))
        np.testing.assert_allclose(outs[name], right, rtol=1e-5, err_msg=name)
        assert np.any(outs[name] < NEW), name


def test_nothing_is_bounded_before_there_are_enough_norms_whatever_the_count_says():
    tx = clip_by(norms.leaf_norm(), thresholds.mean_std(0.0, window=4, warmup_steps=3))
    _, state = followed(tx, OLD)
    emptied = state._replace(window_norms=state.window_norms * np.eye(4, dtype=np.float32)[:1])
    outs, _ = followed(tx, np.float32([[1e3, 1e3]]), emptied)
    np.testing.assert_array_equal(outs, 1e3)


def test_a_value_of_zero_is_no_empty_place():
    """The logarithm of a norm of 1, and a loss of 0."""
    threshold = thresholds.mean_std(3.0, window=4, warmup_steps=3, scale="log")
    outs, _ = followed(clip_by(norms.leaf_norm(), threshold), np.float32([[1.0, 2.0]] * 3 + [[5.0, 5.0]]))
    np.testing.assert_allclose(outs[-1], [1.0, 2.0], rtol=1e-5)
    threshold = thresholds.mean_std(3.0, window=4, warmup_steps=3).signed
    state, step = threshold.init(jnp.float32(0)), jax.jit(lambda loss, state: threshold.limit(loss, state, None))
    for loss in np.float32([0.0, -0.0, 1e-40, 0.0]):
        (_, limit), state = step(loss, state)
    np.testing.assert_allclose(limit, 3e-6, rtol=1e-5)


def test_the_largest_norms_are_norms_like_others():
    """The places that are empty sort as the largest float does."""
    largest = np.finfo(np.float32).max
    tx = clip_by(norms.leaf_norm(), thresholds.quantile(0.5, window=5))
    outs, state = followed(tx, np.float32([[largest, 1.0]] * 3))
    np.testing.assert_array_equal(outs, np.float32([[largest, 1.0]] * 3))
    outs, _ = followed(tx, np.float32([[1.0, largest]]), state)
    np.testing.assert_allclose(outs, np.float32([[1.0, 1.0]]), rtol=1e-6)
