"""Norms over the leading dimensions of arrays of many columns, in the form of every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip._numerics import array_norms
from tests.support.forms import assert_right, form_of, norms, places, signed, without_subnormal
from tests.support.meshes import AUTO, EXPLICIT


@pytest.fixture(scope="module", params=["default", "cpu", "tpu"], autouse=True)
def form(request):
    """Float64 sums, in two steps of 16 bits; float32 where that is enough; three scales."""
    with form_of(request.param):
        yield request.param


COLUMNS = [
    ((24, 1000), (0,), "float32"),
    ((24, 1000), (0,), "bfloat16"),  # taken in two steps on a GPU, of 8 blocks of rows
    ((25, 1000), (0,), "float16"),  # of one block
    ((2, 6, 1500), (0, 1), "bfloat16"),
    ((3, 4, 1500), (1,), "bfloat16"),
    ((3, 2**14 + 2), (0,), "float32"),
    ((4, 2**14 + 2), (0,), "bfloat16"),
    ((37, 1000), (0,), "complex64"),
]


def columns(rng, shape, dims, dtype):
    """Every column at its own scale, then all at one: arrays for one program after another."""
    numbers = signed(rng, shape) * (np.exp(2j * np.pi * rng.uniform(size=shape)) if dtype == "complex64" else 1)
    all_kept = [1 if i in dims else n for i, n in enumerate(shape)]
    powers = (-14, 15) if dtype == "float16" else (-37, 37)
    scales = [10.0 ** rng.uniform(*powers, all_kept), *([1.0] * 3 if dtype == "float16" else [1.0, 1e-30, 1e30])]
    for i, scale in enumerate(scales):
        x = numbers * scale
        if i == 0:  # one of zeros, or that underflows, takes the others with it into float64
            x[..., 3] = 0
        yield without_subnormal(np.clip(x, -6e4, 6e4).astype(dtype) if dtype == "float16" else x.astype(dtype))


def test_norms_of_columns(rng, form):
    norms_of_all = jax.jit(
        lambda arrays: [norms([x], 2, dims) for x, (_, dims, _) in zip(arrays, COLUMNS, strict=True)]
    )
    for given in zip(*(columns(rng, *case) for case in COLUMNS), strict=True):
        for (found,), x, (_, dims, _) in zip(norms_of_all(given), given, COLUMNS, strict=True):
            assert_right(found, x, places(form, columns=True), 2, dims)


def test_float32_sums_of_columns_are_left_where_they_underflow(rng, form):
    """From a norm of 1e-19 downwards squares are subnormal, first some and then all."""
    numbers = signed(rng, (64, 300))
    for power in np.arange(-25, -14, 0.25):
        x = (numbers * 10**power).astype(np.float32)
        x[1:32] *= np.float32(1e-3)
        assert_right(norms([x], 2, (0,))[0], x, places(form, columns=True), 2, (0,))


def test_columns_that_are_not_finite(rng):
    x = signed(rng, (19, 1000)).astype(np.float32)
    x[18, 4], x[0, 9], x[2, 11] = np.nan, -np.inf, 3e38
    for kind in (jnp.float32, jnp.bfloat16):
        found = np.asarray(norms([x.astype(kind)], 2, (0,))[0])
        np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(found)), [4, 9])
        assert found[9] == np.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_under_vmap_and_in_a_derivative(rng, form, dtype):
    x = signed(rng, (2, 20, 900)).astype(dtype)
    x[0, :, 5] *= np.asarray(1e-30, dtype)

    def norm(x):
        return array_norms.norms([x], [(0,)], 2)[0]

    def slope_of_one(x):
        return jax.grad(lambda x: norm(x)[5])(x)

    found, slope = map(np.array, jax.jit(lambda x: (jax.vmap(norm)(x), slope_of_one(x[0])))(x))
    assert_right(found, x, places(form, columns=True), 2, (1,))
    within = 1e-5 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(np.float32(slope[:, 5]), np.float64(x[0, :, 5]) / found[0, 5], rtol=within)
    slope[:, 5] = 0
    assert not np.any(slope)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_columns_on_a_mesh(rng, form, mesh):
    """In every layout, in one program."""
    numbers = signed(rng, (32, 600))
    with jax.set_mesh(mesh):
        laid_out = [
            jax.device_put(numbers.astype(dtype), NamedSharding(mesh, spec))
            for spec in (P("data"), P(None, "data"), P())
            for dtype in ("float32", "bfloat16")
        ]
        by_layout = jax.jit(lambda arrays: [norms([x], 2, (0,))[0] for x in arrays])(laid_out)
    for found, x in zip(by_layout, laid_out, strict=True):
        assert_right(found, x, places(form, columns=True), 2, (0,))
