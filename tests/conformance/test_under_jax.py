"""Every row under what jax does with programs: derivatives, exports, transfers, meshes."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conformance.rows import (
    assert_finite,
    compiled,
    parameters_dtype,
    rows,
    rows_and_dtypes,
    transformation,
)
from tests.table import params, tree


def number(row):
    """A number made from the new updates, as a function of the updates and the parameters."""
    tx = transformation(row)

    def fun(updates, weights):
        out, _ = tx.update(updates, tx.init(weights), weights)
        return sum(jnp.vdot(jnp.cos(jnp.arange(x.size)), x) for x in jax.tree.leaves(out))

    return fun


@functools.cache
def gradient(row):
    return jax.jit(jax.grad(number(row), argnums=(0, 1)))


@pytest.mark.slow
@rows()
def test_derivatives_at_zero_gradients_are_finite(row):
    weights = params("float32")
    zeros = jax.tree.map(jnp.zeros_like, weights)
    assert_finite(gradient(row)(zeros, weights))
    assert_finite(gradient(row)(tree(0, "float32") | {"dense": zeros["dense"]}, weights))


@rows(where=lambda row: row.needs_params)
def test_derivatives_at_zero_parameters_are_finite(row):
    zeros = jax.tree.map(jnp.zeros_like, params("float32"))
    assert_finite(gradient(row)(zeros, zeros))
    assert_finite(gradient(row)(tree(0, "float32"), zeros))


@rows()
def test_a_step_has_a_hessian_and_can_be_linearized(row):
    updates, weights = tree(0, "float32"), params("float32")
    hessian = jax.eval_shape(jax.hessian(number(row)), updates, weights)
    assert hessian["scale"]["dense"]["kernel"].shape == (4, 3)
    pushed = jax.eval_shape(lambda updates: jax.linearize(number(row), updates, weights)[1](updates, weights), updates)
    assert pushed.shape == ()


@pytest.mark.slow
@rows()
def test_linearizations_and_second_derivatives(row):
    updates, weights = tree(0, "float32"), params("float32")
    first, second = tree(20, "float32"), tree(30, "float32")

    @jax.jit
    def along(direction):
        def of_updates(updates):
            return number(row)(updates, weights)

        change = jax.jvp(of_updates, (updates,), (direction,))[1]
        curvature = jax.jvp(jax.grad(of_updates), (updates,), (direction,))[1]
        return jax.linearize(of_updates, updates)[1](direction), change, curvature

    pushed, change, curvature = along(first)
    assert float(pushed) == pytest.approx(float(change), rel=1e-5, abs=1e-5)
    assert_finite(curvature)
    one, other = optax.tree.vdot(curvature, second), optax.tree.vdot(along(second)[2], first)
    assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-4)


# Where the step runs.


@pytest.mark.slow
@rows()
def test_what_is_exported_for_every_platform_does_the_same_when_it_is_read_again(row):
    """As flat arrays: jax.export writes no containers that it was not told of."""
    weights = params("float32")
    arguments = tree(0, "float32"), transformation(row).init(weights), weights
    flat, treedef = jax.tree.flatten(arguments)

    def update(flat):
        return jax.tree.leaves(transformation(row).update(*jax.tree.unflatten(treedef, flat)))

    written = jax.export.export(jax.jit(update), platforms=["cpu", "cuda", "tpu"])(flat).serialize()
    read = jax.export.deserialize(written)
    assert read.platforms == ("cpu", "cuda", "tpu")
    chex.assert_trees_all_close(read.call(flat), jax.tree.leaves(compiled(row)(*arguments)), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@rows()
def test_without_jit(row):
    updates, weights = tree(0, "float32"), params("float32")
    state = transformation(row).init(weights)
    with jax.disable_jit():
        eager = transformation(row).update(updates, state, weights)
    chex.assert_trees_all_close(eager, compiled(row)(updates, state, weights), rtol=1e-6, atol=1e-7)


@rows()
def test_a_step_transfers_nothing(row):
    updates, weights = tree(0, "float32"), params("float32")
    state = transformation(row).init(weights)
    # The first call compiles.
    compiled(row)(updates, state, weights)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(row)(updates, state, weights))
    assert "callback" not in str(jax.make_jaxpr(transformation(row).update)(updates, state, weights))


@pytest.mark.usefixtures("strict_promotion")
@rows_and_dtypes()
def test_no_dtype_is_promoted_in_passing(row, dtype):
    updates, weights = tree(0, dtype), params(parameters_dtype(row, dtype))
    tx = row.make()
    new_updates, _ = jax.eval_shape(tx.update, updates, jax.eval_shape(tx.init, weights), weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)


@rows()
def test_shardings_survive_an_explicit_mesh(row):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    specs = {"dense": {"kernel": P("x", None), "bias": P(None)}, "scale": P()}
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            params("float32"),
            specs,
        )
        state = jax.eval_shape(transformation(row).init, placed)
        new_updates, _ = jax.eval_shape(transformation(row).update, placed, state, placed)
    assert jax.tree.map(lambda x: x.sharding.spec, new_updates) == specs
