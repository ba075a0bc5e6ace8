"""Clips by the norm of each column, of arrays of many columns, on meshes."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optaxclip as oc
from tests.support.meshes import AUTO, EXPLICIT

MANY = 20_000


def clipped(x, **options):
    """A gradient beside parameters that are larger by 1."""
    tx = oc.adaptive_grad_clip(0.01, **options)
    return tx.update(x, tx.init(x), x + 1)[0]


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_on_a_mesh(rng, mesh):
    x = rng.normal(size=(8, MANY)).astype(np.float32)
    specs = (PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec())
    clipped_columns = functools.partial(clipped, units="io")
    with jax.set_mesh(mesh):
        given = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
        found_of_each = jax.jit(lambda given: list(map(clipped_columns, given)))(given)
    expected = jax.jit(clipped_columns)(x)
    for found, split, spec in zip(found_of_each, given, specs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(spec))
        assert found.sharding.is_equivalent_to(split.sharding, 2)


def test_in_shard_map(rng):
    x = rng.normal(size=(8, 2 * MANY)).astype(np.float32)
    spec = PartitionSpec("data", "model")
    found = jax.jit(jax.shard_map(functools.partial(clipped, axes=spec), mesh=AUTO, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_allclose(found, jax.jit(clipped)(x), rtol=1e-6)
