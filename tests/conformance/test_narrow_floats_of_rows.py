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
from tests.support import compiling
from tests.table import NARROW, REFUSED, by_path, numbers, params, tree


def mixed(seed, fill=None):
    """One tree with a matrix of every float dtype of jax that is narrower than 16 bits."""
    if fill is None:
        matrices = {dtype: np.asarray(numbers(seed + i, (2, 3), "float32")) for i, dtype in enumerate(NARROW)}
    else:
        matrices = {dtype: np.resize(fill(jnp.finfo(dtype)), (2, 3)) for dtype in NARROW}
    dense = {str(dtype): jnp.asarray(np.asarray(x).astype(dtype)) for dtype, x in matrices.items()}
    return {"dense": dense, "scale": numbers(seed, (), "float32")}


def extremes(info):
    return np.array([float(x) for x in (info.max, info.min, info.smallest_subnormal, info.tiny, 0, 1)])


@functools.cache
def compiled_mixed(row):
    """The jitted update; compiled as users do where XLA's older emitters make NaN of a -0 (tests.support.compiling)."""
    quick = jax.jit(transformation(row).update)
    as_users_do = jax.jit(transformation(row).update, compiler_options=compiling.AS_USERS_DO)

    def update(updates, state, weights):
        new_updates, new_state = quick(updates, state, weights)
        if np.any(np.isnan(fixed.wide(new_updates["dense"]["float8_e4m3b11fnuz"]))):
            return as_users_do(updates, state, weights)
        return new_updates, new_state

    return update


@pytest.mark.usefixtures("strict_promotion")
@rows()
def test_every_narrow_float_of_jax(row):
    updates, weights = mixed(0), mixed(100)
    state = transformation(row).init(weights)
    new_updates, new_state = compiled_mixed(row)(updates, state, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert_as_in_float64(row, updates, new_updates, weights)
    # Numbers from both ends of each range, in turn with zeros: nothing leaves it, in the state either.
    for fill in (extremes, lambda info: float(info.max), lambda info: 0.0, lambda info: float(info.smallest_subnormal)):
        new_updates, new_state = compiled_mixed(row)(mixed(0, fill), new_state, mixed(100, fill))
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


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@rows()
def test_narrow_floats_that_hold_no_gradient_are_refused(row, dtype):
    updates, weights = abstract(tree(0, "float32")), abstract(params("float32"))
    state = jax.eval_shape(transformation(row).init, weights)
    updates["dense"]["bias"] = jax.ShapeDtypeStruct((3,), dtype)
    with pytest.raises(ValueError, match=rf"'dense/bias' is {dtype}, .*cast the gradients"):
        jax.eval_shape(transformation(row).update, updates, state, weights)
