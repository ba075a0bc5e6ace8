"""By what groups are multiplied to come from one norm to another, between any two numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip._numerics import scaling
from tests.support.forms import TINY, signed

MOST, EPS = float(np.finfo(np.float32).max), float(np.finfo(np.float32).eps)
SIZES = [
    TINY,
    2 * TINY,
    1e-37,
    1e-30,
    1e-20,
    3e-8,
    0.7,
    1.0,
    1 + EPS,
    1.3,
    5e6,
    1e15,
    1e20,
    1e30,
    3e38,
    0.999999 * MOST,
]
LEAST = np.longdouble(TINY) ** 2  # a factor of two normal numbers
ODD = [0.0, 1e-45, 1e-39, MOST, np.inf, np.nan]


def pairs(numbers):
    norm, permitted = np.float32([*itertools.product(numbers, repeat=2)]).T
    return norm, permitted


def reached(norm, found):
    """What becomes of the norm, rounded as it is to be stored."""
    first, second = (np.asarray(x, np.longdouble) for x in (found.first, found.second))
    return norm.astype(np.longdouble) * first * second


def test_between_any_two_sizes():
    norm, permitted = pairs(SIZES)
    found = scaling.factor(norm, permitted)
    # What is nearly the largest number is left, or brought to a number from which rounding does not lead beyond it.
    right = np.minimum(permitted, np.maximum(norm, (1 - 2.0**-17) * MOST))
    right = np.where(permitted < norm * LEAST, 0, right)
    np.testing.assert_allclose(reached(norm, found), right, rtol=8 * EPS)
    kept = np.asarray(scaling.is_kept(norm, permitted))
    np.testing.assert_array_equal(kept, norm == permitted)
    np.testing.assert_array_equal(np.asarray(found.second) == 1, right == norm)


def test_the_two_factors_are_numbers_and_normal():
    """Norms are never subnormal; what is permitted may be."""
    norm, permitted = np.float32([*itertools.product([*SIZES, 0.0, MOST, np.inf, np.nan], SIZES + ODD)]).T
    found = scaling.factor(norm, permitted)
    for each in found:
        assert np.all(np.isfinite(each))
    for each in (found.first, found.second):
        sizes = np.asarray(each)[np.asarray(each) > 0]
        assert np.all((sizes >= TINY) & (sizes <= MOST))
    is_zero = reached(np.ones_like(norm), found) == 0
    assert not np.any(is_zero & (permitted >= np.maximum(TINY, norm * LEAST)))


def test_what_is_kept():
    norm, permitted = pairs(SIZES + ODD)
    kept = np.asarray(scaling.is_kept(norm, permitted))
    found = scaling.factor(norm, permitted)
    no_number = ~np.isfinite(norm) | ~np.isfinite(permitted)
    assert np.all(kept[no_number | (norm == 0) | (norm == permitted)])
    for each in found:
        np.testing.assert_array_equal(np.asarray(each)[kept], 1)


def bits(x):
    return np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kept_groups_keep_every_bit(dtype):
    info = jnp.finfo(dtype)
    leaf = np.array([0.0, -0.0, info.smallest_subnormal, -info.tiny / 2, info.tiny, 1.5, info.max, np.inf, np.nan])
    leaf = leaf.astype(dtype)
    for norm, permitted in [
        (2.0, 2.0),
        (0.0, 1.0),
        (np.inf, 1.0),
        (np.nan, 1.0),
        (1e-40, 1.0),
        (3.0, np.nan),
        (3.0, np.inf),
    ]:
        for shape in ((), (9,)):
            factor = scaling.factor(*(np.full(shape, x, np.float32) for x in (norm, permitted)))
            if norm == 1e-40 and np.asarray(factor.second).flat[0] != 1:
                continue  # a machine on which subnormal numbers count
            np.testing.assert_array_equal(bits(scaling.rescale(leaf, factor)), bits(leaf))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_from_one_end_of_the_range_to_the_other_and_back(rng, dtype):
    shares = signed(rng, 16) / 4
    step = jax.jit(lambda leaf, norm, goal: scaling.rescale(leaf, scaling.factor(norm, goal)))
    for size, goal in itertools.permutations([4e-37, 1e-30, 1e-3, 1.0, 1e19, 1e30, 3e38], 2):
        leaf = (shares * size * (1j if dtype == "complex64" else 1)).astype(dtype)
        found = np.asarray(step(leaf, np.float32(size), np.float32(goal)))
        assert found.dtype == leaf.dtype
        wide = np.complex128 if dtype == "complex64" else np.float64
        right = leaf.astype(wide) / np.float32(size) * float(np.float32(goal))
        within = 8 * EPS + (float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else 0)
        np.testing.assert_allclose(found.astype(wide), right, rtol=within)


def test_a_permitted_norm_of_zero():
    leaf = np.float32([3e38, -1e-30, 0.0, -2.0])
    for norm in (3e38, 1.0, 1e-30):
        found = scaling.rescale(leaf, scaling.factor(np.float32(norm), np.float32(0)))
        np.testing.assert_array_equal(found, np.zeros(4))


def test_coordinates_beyond_their_norm_saturate():
    factor = scaling.factor(np.float32(1.0), np.float32(1e38))
    np.testing.assert_array_equal(scaling.rescale(np.float32([8, -8, 1]), factor), np.float32([MOST, -MOST, 1e38]))


@pytest.mark.parametrize("goal", [0.0, 1e-3, 10.0])
def test_entries_that_are_not_finite_stay_where_their_norm_is_finite_all_the_same(goal):
    leaf = np.float32([np.inf, -np.inf, np.nan, 2.0])
    found = scaling.rescale(leaf, scaling.factor(np.float32(2.0), np.float32(goal)))
    np.testing.assert_array_equal(found, np.float32([np.inf, -np.inf, np.nan, goal]))
