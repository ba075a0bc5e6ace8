"""Clips by the norm of each column, of arrays of many columns, on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optaxclip as oc
from tests.support.meshes import AUTO, EXPLICIT

MANY = 20_000


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()], ids=str)
def test_on_a_mesh(rng, mesh, spec):
    x = jnp.asarray(rng.normal(size=(8, MANY)), jnp.float32)
    tx = oc.adaptive_grad_clip(0.01, units="io")
    expected, _ = tx.update(x, tx.init(x), x + 1)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        found, _ = jax.jit(tx.update)(split, tx.init(split), split + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.sharding.is_equivalent_to(split.sharding, 2)


def test_in_shard_map(rng):
    x = jnp.asarray(rng.normal(size=(8, 2 * MANY)), jnp.float32)
    spec = PartitionSpec("data", "model")
    tx = oc.adaptive_grad_clip(0.01, axes=spec)
    found = jax.jit(
        jax.shard_map(lambda x: tx.update(x, tx.init(x), x + 1)[0], mesh=AUTO, in_specs=spec, out_specs=spec)
    )(x)
    whole = oc.adaptive_grad_clip(0.01)
    np.testing.assert_allclose(found, whole.update(x, whole.init(x), x + 1)[0], rtol=1e-6)
