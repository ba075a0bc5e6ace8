"""Sums over examples, which CPUs take row by row where rows are large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip._numerics import rows
from tests.support.meshes import AUTO, EXPLICIT

MANY = 20_000  # entries of a row, beyond the number from which on rows are taken one by one
SHAPES = [(2, MANY), (16, MANY), (17, MANY), (37, 1, MANY), (40, 2, 8200), (1, MANY), (16, 30)]


def weighted(x, weights):
    """Rows times their weights."""
    return x.astype(jnp.float32) * jnp.expand_dims(weights["of"], range(1, x.ndim))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_added_up(rng, dtype):
    xs = [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in SHAPES]
    weights = [{"of": rng.normal(size=len(x)).astype(np.float32)} for x in xs]
    sums = jax.jit(lambda *args: [rows.sum_of(weighted, *each) for each in zip(*args, strict=True)])(xs, weights)
    for found, x, each in zip(sums, xs, weights, strict=True):
        assert found.dtype == jnp.float32
        expected = np.tensordot(each["of"].astype(np.float64), x.astype(np.float64), 1)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(x.shape))


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA for CPUs writes the terms of jax 0.8 either way")
def test_nothing_of_the_size_of_the_gradients_is_written():
    x = jax.ShapeDtypeStruct((64, MANY), jnp.float32)
    program = jax.jit(lambda x: oc.per_example_global_norm_clip(x, 1.0)).lower(x).compile()
    assert program.memory_analysis().temp_size_in_bytes < x.size * x.dtype.itemsize / 20


def test_under_vmap_and_in_a_derivative(rng):
    x, weights = rng.normal(size=(3, 4, MANY)).astype(np.float32), np.arange(4, dtype=np.float32)

    def total(x):
        return rows.sum_of(weighted, x, {"of": weights})

    sums, slope = jax.jit(lambda x: (jax.vmap(total)(x), jax.grad(lambda x: total(x)[7])(x[0])))(x)
    np.testing.assert_allclose(sums, np.tensordot(x, weights, ([1], [0])), atol=1e-5)
    np.testing.assert_array_equal(slope, np.outer(weights, np.arange(MANY) == 7))


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()], ids=str)
def test_on_a_mesh(rng, mesh, spec):
    x, weights = rng.normal(size=(8, MANY)).astype(np.float32), np.arange(8, dtype=np.float32)
    expected = np.tensordot(weights, x.astype(np.float64), 1)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        by_row = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(*spec[:1])))
        program = jax.jit(lambda x, weights: rows.sum_of(weighted, x, {"of": weights})).lower(split, by_row).compile()
    np.testing.assert_allclose(program(split, by_row), expected, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in program.as_text()
