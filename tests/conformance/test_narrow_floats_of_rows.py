"""Every row on every float dtype of jax that is narrower than 16 bits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance.rows import (
    abstract,
    assert_finite,
    rows,
    transformation,
)
from tests.reference import fixed
from tests.table import NARROW, REFUSED, TWO, by_path, numbers, params, tree


def mixed(seed, fill=None):
    """One tree with a matrix of every float dtype of jax that is narrower than 16 bits."""
    if fill is None:
        matrices = {dtype: np.asarray(numbers(seed + i, (2, 3), "float32")) for i, dtype in enumerate(NARROW)}
    else:
        matrices = {dtype: np.resize(fill(jnp.finfo(dtype)), (2, 3)) for dtype in NARROW}
    dense = {str(dtype): x.astype(dtype) for dtype, x in matrices.items()}
    return {"dense": dense, "scale": np.asarray(numbers(seed, (), "float32"))}


def extremes(info):
    return np.array([float(x) for x in (info.max, info.min, info.smallest_subnormal, info.tiny, 0, 1)])


# Numbers from both ends of each range, in turn with zeros.
FILLS = (extremes, lambda info: float(info.max), lambda info: 0.0, lambda info: float(info.smallest_subnormal))

# Their thresholds alone set these rows apart from others, and a threshold sees float32 norms, whatever the leaves are.
THRESHOLDS_ALONE = {
    "clip_by_global_norm-scheduled",
    "clip_by_leaf_norm-bound_per_leaf",
    "clip_by_norm_range",
    "clip_by_norm_range-leaf_norm",
    "zclip",
    "clip_by-group_norm-bound_per_group",
    "clip_by-leaf_norm-mixed_bounds",
}


def treats_leaves_in_its_own_way(row):
    """Rows of two dtypes do so only if they keep something for every parameter."""
    return row.name not in THRESHOLDS_ALONE and (row.dtypes != TWO or row.param_state)


def compiled_mixed(row):
    """The jitted update, which makes a fresh state where there is none.

    XLA's older emitters make NaN of a float8_e4m3b11fnuz that is -0 (tests.support.compiling). Newer ones do not.
    """
    tx = transformation(row)

    def step(updates, state, weights, fresh):
        state = jax.tree.map(functools.partial(jax.lax.select, fresh), tx.init(weights), state)
        return tx.update(updates, state, weights)

    quick = jax.jit(step)
    with_newer_emitters = jax.jit(step, compiler_options={"xla_cpu_use_fusion_emitters": True})

    def update(updates, state, weights):
        given = updates, nothing(row, weights) if state is None else state, weights, np.bool_(state is None)
        new_updates, new_state = quick(*given)
        if np.any(np.isnan(fixed.wide(new_updates["dense"]["float8_e4m3b11fnuz"]))):
            return with_newer_emitters(*given)
        return new_updates, new_state

    return update


def nothing(row, weights):
    """Zeros in the place of a state."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(transformation(row).init, weights))


@pytest.mark.usefixtures("strict_promotion")
@rows(where=treats_leaves_in_its_own_way)
def test_every_narrow_float_of_jax(row):
    updates, weights, update = mixed(0), mixed(100), compiled_mixed(row)
    new_updates, new_state = update(updates, None, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, nothing(row, weights))
    assert_as_in_float64(row, updates, new_updates, weights)
    for fill in FILLS:  # nothing leaves its range, in the state either
        new_updates, new_state = update(mixed(0, fill), new_state, mixed(100, fill))
        assert_finite(new_updates)
        assert not any(np.any(np.isnan(leaf)) for leaf in by_path(new_state).values())


def assert_as_in_float64(row, before, after, weights):
    """Every group lies in its band, up to the rounding of its leaves; where it is only scaled, by the right factor."""
    assert_finite(after)

    def of_dtype(number):
        return row.split(jax.tree.map(lambda x: np.full(x.shape, float(number(jnp.finfo(x.dtype)))), before))

    eps, least = of_dtype(lambda info: info.eps), of_dtype(lambda info: info.smallest_subnormal)
    groups, parameters = row.split(before), row.split(weights)
    for name, (size, low, high) in row.measured(after, weights).items():
        first = row.measure(groups[name], parameters[name])
        if (row.direction_preserving or row.elementwise) and row.inside is not None:
            right = groups[name] * (np.clip(first, low, high) / first)
            off = np.abs(row.split(after)[name] - right)
            assert np.all(off <= (eps[name] / 2 + 1e-5) * np.abs(right) + least[name] / 2), (name, off, right)
        else:
            slack, rest = 4 * np.max(eps[name]), fixed.vector_norm(least[name])
            assert low - slack * abs(low) - rest <= size <= high * (1 + slack) + rest, (name, size, low, high)


@rows()
def test_narrow_floats_that_hold_no_gradient_are_refused(row):
    updates, weights = abstract(tree(0, "float32")), abstract(params("float32"))
    state = jax.eval_shape(transformation(row).init, weights)
    for dtype in REFUSED:
        updates["dense"]["bias"] = jax.ShapeDtypeStruct((3,), dtype)
        with pytest.raises(ValueError, match=rf"'dense/bias' is {dtype}, .*cast the gradients"):
            jax.eval_shape(transformation(row).update, updates, state, weights)
