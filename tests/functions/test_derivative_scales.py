"""Derivatives of every transformation, through three steps and their state, for gradients of every scale.

What leaves the range of floats (the slope of what brings 1e-38 to 1e3) is finite all the same: it saturates, or is 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optaxclip as oc
from tests import table
from tests.support import published

STEPS, SIZE = 3, 4
# These gave NaN; one of a threshold, one of a clip by coordinate, and one of an optimizer are quick.
GAVE_NAN = {"zclip", "spam_clip", "scale_by_adaptive_norm", "scale_by_acclip", "scale_by_stable_adam"}
QUICK = {"zclip", "spam_clip", "scale_by_stable_adam"}
# With another row of the same norm and threshold: a number in place of another, of one per leaf or of a schedule, or a
# record, which updates do not depend on. No slope goes through these.
AS_ANOTHER = {
    "clip_by_global_norm-scheduled",
    "clip_by_global_norm-recorded",
    "clip_by_leaf_norm-bound_per_leaf",
    "clip_by-leaf_norm-between",
    "clip_by-leaf_norm-mixed_bounds",
    "clip_by-group_norm-bound_per_group",
    "adaptive_grad_clip-scheduled-recorded",
    "zclip-scheduled-recorded",
}
ROWS = [
    pytest.param(row, id=row.name, marks=() if row.name in QUICK else pytest.mark.slow)
    for row in table.ROWS
    if "float32" in row.dtypes and not row.bounds_weights and row.name not in AS_ANOTHER
]


def tree(flat):
    return {"dense": {"kernel": flat[:3]}, "scale": flat[3]}


def through_steps(row, dtype):
    """Gradients of all steps -> what comes out at each."""
    tx = row.make()
    params = tree(jnp.asarray([1.5, -0.6, 0.9, 1.2], dtype))

    def run(gradients):
        def step(state, each):
            updates, state = tx.update(tree(each), state, params)
            return state, ravel_pytree(updates)[0]

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    return run


def points():
    """name -> the gradients of all steps."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 2.0, (STEPS, SIZE)) * rng.choice([-1.0, 1.0], (STEPS, SIZE))
    scales = (2.5e-38, 1e-36, 1e-30, 1e-22, 1e-18, 1e-10, 1.0, 1e10, 1e18, 1e22, 1e30, 1e37)
    silent = base.copy()
    silent[1] = 0
    return {f"{scale:g}": base * scale for scale in scales} | {
        "a tiny one": base * [1e-22, 1, -2, 1],
        "far apart": base * [1e30, 1e-30, 0, 1],
        "all small": base * [4e-38, 1e-19, 1e-3, 0],
        "a fall": base * [[1e30], [1e-8], [1e-36]],
        "a rise": base * [[1e-36], [1e-2], [1e36]],
        "a step of zeros": silent,
        "zeros": base * 0,
        "the same": base[[0, 0, 0]],
        "the same, small": base[[0, 0, 0]] * 1e-20,
    }


POINTS = {name: np.float32(point) for name, point in points().items()}


def jacobians(row, dtype=jnp.float32):
    """At every point, outputs and both Jacobians. A loop over the points is a smaller program than a batch of them."""

    def at(gradients):
        # What jvp does with a tangent, and its transpose, as in vjp, around one and the same forward pass: two of them
        # may round differently, and so lie on different sides of a kink.
        out, push_forward = jax.linearize(through_steps(row, dtype), gradients)
        pull_back = jax.linear_transpose(push_forward, gradients)
        basis = np.eye(STEPS * SIZE, dtype=dtype).reshape(-1, STEPS, SIZE)
        forward, (reverse,) = jax.vmap(push_forward)(basis), jax.vmap(pull_back)(basis)
        return out, *(each.reshape(len(basis), -1) for each in (jnp.moveaxis(forward, 0, -1), reverse))

    all_of = jax.jit(functools.partial(jax.lax.map, at))
    return [np.asarray(x, np.float64) for x in all_of(np.stack(list(POINTS.values())).astype(dtype))]


float32_jacobians = functools.cache(jacobians)


@pytest.mark.parametrize("row", ROWS)
def test_both_modes_are_finite_and_agree(row):
    results = float32_jacobians(row)
    for name, out, forward, reverse in zip(POINTS, *results, strict=True):
        assert np.all(np.isfinite(out)), name
        assert np.all(np.isfinite(forward)), name
        assert np.all(np.isfinite(reverse)), name
        # Below 1e-35 slopes and what they are made of are flushed to 0. A slope is the factor of a coordinate less a
        # part of it, and where these cancel their rounding is left.
        given = np.abs(POINTS[name])
        factor = np.max(np.abs(out) / np.where(given > 0, given, np.inf))
        room = 1e-4 * np.abs(forward).max() + 1e-6 * factor + 1e-35
        np.testing.assert_allclose(forward, reverse, rtol=0, atol=room, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in table.ROWS if row.name in GAVE_NAN], ids=lambda row: row.name)
def test_they_are_those_of_float64(row):
    with jax.enable_x64(True):
        right = jacobians(row, jnp.float64)[1]
    for name, ours, theirs in zip(POINTS, float32_jacobians(row)[1], right, strict=True):
        sizes = np.abs(POINTS[name])
        if np.abs(theirs).max() > 1e38 or np.any((sizes > 0) & (sizes < 1e-37)):
            continue  # no float32, or a state that is none
        if name.startswith("the same"):
            continue  # the kink of `max(1, excess)`
        room = 1e-3 * np.abs(theirs).max() + 1e-35
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=room, err_msg=name)


@jax.jit
@jax.grad
def slope_of_the_soft_cap(gradient, cap):
    return oc.clip_singular_values(cap, smooth=True).update(gradient, optax.EmptyState())[0][0]


@pytest.mark.parametrize("scale", np.float32([1e-30, 1e-20, 1.0, 1e20, 1e30]), ids=str)
def test_the_soft_cap_of_a_vector_has_the_slope_of_its_scale(scale):
    np.testing.assert_allclose(slope_of_the_soft_cap(1.5 * scale[None], scale), [(1 + 1.5**2) ** -1.5], rtol=1e-5)
    np.testing.assert_allclose(slope_of_the_soft_cap(0 * scale[None], scale), [1.0])


@jax.jit
@jax.grad
def slope_of_the_last_step(z, scale):
    tx = published.zclip(z, warmup_steps=2, max_norm=None)
    state = tx.init(jnp.zeros(1))
    for norm in (1.0, 3.0, 2.0):
        updates, state = tx.update(jnp.array([norm * scale]), state)
    return updates[0]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20, 1e37])
def test_a_step_that_is_no_spike_has_no_slope_by_the_threshold_of_zclip(scale):
    assert slope_of_the_last_step(2.5, scale) == 0
