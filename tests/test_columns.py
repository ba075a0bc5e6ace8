"""Arrays of many columns: reductions over their rows, and clips by the norm of a column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import columns
from tests.meshes import AUTO, EXPLICIT

MANY = 20_000  # columns, beyond the number from which on rows are added up


@pytest.mark.parametrize("dims", [(0,), (0, 1)])
def test_rows_are_added_up(rng, dims):
    x = jnp.asarray(rng.normal(size=(5, 6, MANY)), jnp.float32)
    program = jax.jit(lambda x: columns.sum_of(jnp.square, x, dims))
    rows = int(np.prod([x.shape[dim] for dim in dims]))
    # All that the rows are for: on this machine XLA's reduction is not asked.
    is_here = jax.default_backend() == "cpu"
    assert ("stablehlo.reduce(" in program.lower(x).as_text()) != is_here
    expected = np.square(np.asarray(x, np.float64)).reshape(rows, *x.shape[len(dims) :]).sum(axis=0)
    np.testing.assert_allclose(program(x), expected, rtol=2e-6)
    np.testing.assert_array_equal(columns.max_of(jnp.abs, x, dims), jnp.abs(x).max(axis=dims))


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P()], ids=str)
def test_units_of_many_columns_on_a_mesh(rng, mesh, spec):
    x = jnp.asarray(rng.normal(size=(8, MANY)), jnp.float32)
    tx = oc.adaptive_grad_clip(0.01, units="io")
    expected, _ = tx.update(x, tx.init(x), x + 1)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        found, _ = jax.jit(tx.update)(split, tx.init(split), split + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.sharding.is_equivalent_to(split.sharding, 2)


def test_units_of_many_columns_in_shard_map(rng):
    x = jnp.asarray(rng.normal(size=(8, 2 * MANY)), jnp.float32)
    spec = P("data", "model")
    tx = oc.adaptive_grad_clip(0.01, axes=spec)
    found = jax.jit(
        jax.shard_map(lambda x: tx.update(x, tx.init(x), x + 1)[0], mesh=AUTO, in_specs=spec, out_specs=spec)
    )(x)
    whole = oc.adaptive_grad_clip(0.01)
    np.testing.assert_allclose(found, whole.update(x, whole.init(x), x + 1)[0], rtol=1e-5)
