"""Norms over the leading dimensions of arrays of many columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip import sums
from tests.meshes import AUTO, EXPLICIT

MANY = 20_000
SHAPES = [(2, MANY), (16, MANY), (17, MANY), (37, 1, MANY), (5, 7, 3000), (40, 2, 8200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_of_columns(rng, shape, scale, dtype):
    x = jnp.asarray(scale * rng.normal(size=shape), dtype).at[..., 3].set(0).at[0, ..., 5].set(1e38)
    expected = np.linalg.norm(np.asarray(x, np.float64).reshape(shape[0], -1), axis=0).reshape(shape[1:])
    found = jax.jit(lambda x: sums.separate_norms([x], [(0,)], [()], 2)[0])(x)
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def test_columns_that_are_not_finite(rng):
    x = jnp.asarray(rng.normal(size=(19, MANY)), jnp.float32).at[18, 4].set(jnp.nan).at[0, 9].set(-jnp.inf)
    (found,) = sums.separate_norms([x], [(0,)], [()], 2)
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(found)), [4, 9])


def test_under_vmap_and_in_a_derivative(rng):
    x = jnp.asarray(rng.normal(size=(3, 4, MANY)), jnp.float32)

    def norm(x):
        return sums.separate_norms([x], [(0,)], [()], 2)[0]

    np.testing.assert_allclose(jax.vmap(norm)(x), np.linalg.norm(np.asarray(x, np.float64), axis=1), rtol=2e-6)
    slope = jax.grad(lambda x: norm(x)[7])(x[0])
    np.testing.assert_allclose(slope[:, 7], x[0, :, 7] / np.linalg.norm(x[0, :, 7]), rtol=1e-5)
    assert not jnp.any(slope.at[:, 7].set(0))


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()], ids=str)
def test_on_a_mesh(rng, mesh, spec):
    x = jnp.asarray(rng.normal(size=(8, MANY)), jnp.float32)
    tx = oc.adaptive_grad_clip(0.01, units="io")
    expected, _ = tx.update(x, tx.init(x), x + 1)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        found, _ = jax.jit(tx.update)(split, tx.init(split), split + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.sharding.is_equivalent_to(split.sharding, 2)


def test_in_shard_map(rng):
    x = jnp.asarray(rng.normal(size=(8, 2 * MANY)), jnp.float32)
    spec = PartitionSpec("data", "model")
    tx = oc.adaptive_grad_clip(0.01, axes=spec)
    found = jax.jit(
        jax.shard_map(lambda x: tx.update(x, tx.init(x), x + 1)[0], mesh=AUTO, in_specs=spec, out_specs=spec)
    )(x)
    whole = oc.adaptive_grad_clip(0.01)
    np.testing.assert_allclose(found, whole.update(x, whole.init(x), x + 1)[0], rtol=1e-5)
