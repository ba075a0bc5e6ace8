"""Every row under what jax does with programs: derivatives, exports, transfers, meshes."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conformance.rows import (
    assert_finite,
    compiled,
    first_updates,
    is_of_its_own,
    rows,
    transformation,
)
from tests.table import by_path, params, tree


def two_leaves(tree):
    """A matrix and a number: what is traced or compiled for every leaf costs less than with three."""
    return {"dense": {"kernel": tree["dense"]["kernel"]}, "scale": tree["scale"]}


WEIGHTS, UPDATES, FIRST, SECOND = (
    two_leaves(one) for one in (params("float32"), *(tree(seed, "float32") for seed in (0, 20, 30)))
)
ZEROS = jax.tree.map(np.zeros_like, WEIGHTS)


def number(row):
    """A number made from the new updates, as a function of the updates and the parameters."""

    def fun(updates, weights):
        out = first_updates(row, updates, weights)
        return sum(jnp.vdot(jnp.cos(jnp.arange(x.size)), x) for x in jax.tree.leaves(out))

    return fun


@rows(where=lambda row: row.needs_params)
def test_derivatives_at_zero_parameters_are_finite(row):
    gradient = jax.jit(jax.grad(number(row), argnums=(0, 1)))
    assert_finite(gradient(ZEROS, ZEROS))
    assert_finite(gradient(UPDATES, ZEROS))


@rows(where=is_of_its_own)
def test_a_step_has_second_derivatives(row):
    """Forward over reverse, as `jax.hessian` does; `jax.grad` linearizes."""

    def curvature(updates, weights, direction):
        return jax.jvp(lambda updates: jax.grad(number(row))(updates, weights), (updates,), (direction,))[1]

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(curvature, UPDATES, WEIGHTS, FIRST), UPDATES)


@functools.cache
def derivatives(row):
    """One program: the gradient, the change along a direction, and how the gradient changes along it."""

    def along(updates, weights, direction):
        def value_and_slopes(updates):
            return jax.value_and_grad(number(row), argnums=(0, 1))(updates, weights)

        (_, gradient), (change, (curvature, _)) = jax.jvp(value_and_slopes, (updates,), (direction,))
        return gradient, change, curvature

    return jax.jit(along)


@pytest.mark.slow
@rows()
def test_derivatives_at_zero_gradients_are_finite(row):
    assert_finite(derivatives(row)(ZEROS, WEIGHTS, FIRST)[0])
    assert_finite(derivatives(row)(UPDATES | {"dense": ZEROS["dense"]}, WEIGHTS, FIRST)[0])


@pytest.mark.slow
@rows()
def test_forward_equals_reverse_and_second_derivatives_are_symmetric(row):
    gradient, change, curvature = derivatives(row)(UPDATES, WEIGHTS, FIRST)
    assert float(change) == pytest.approx(vdot(gradient[0], FIRST), rel=1e-5, abs=1e-5)
    assert_finite(curvature)
    other_curvature = derivatives(row)(UPDATES, WEIGHTS, SECOND)[2]
    assert vdot(curvature, SECOND) == pytest.approx(vdot(other_curvature, FIRST), rel=1e-3, abs=1e-4)


def vdot(tree, other):
    return sum(np.vdot(x, y) for x, y in zip(by_path(tree).values(), by_path(other).values(), strict=True))


# Where the step runs.


@pytest.mark.slow
@rows(where=is_of_its_own)
def test_what_is_exported_and_read_again_equals_what_runs_without_jit(row):
    """For every platform, and as flat arrays: jax.export writes no containers that it was not told of."""
    flat, treedef = jax.tree.flatten((UPDATES, transformation(row).init(WEIGHTS), WEIGHTS))

    def update(flat):
        return jax.tree.leaves(transformation(row).update(*jax.tree.unflatten(treedef, flat)))

    written = jax.export.export(jax.jit(update), platforms=["cpu", "cuda", "tpu"])(flat).serialize()
    read = jax.export.deserialize(written)
    assert read.platforms == ("cpu", "cuda", "tpu")
    with jax.disable_jit():
        eager = update(flat)
    chex.assert_trees_all_close(read.call(flat), eager, rtol=1e-6, atol=1e-7)


@rows()
def test_a_step_transfers_nothing(row):
    updates, weights = tree(0, "float32"), params("float32")
    state = transformation(row).init(weights)
    # The first call compiles.
    compiled(row)(updates, state, weights)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(row)(updates, state, weights))
    assert "callback" not in str(jax.make_jaxpr(transformation(row).update)(updates, state, weights))


@rows()
def test_shardings_survive_an_explicit_mesh(row):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    specs = {"dense": {"kernel": P("x", None)}, "scale": P()}
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), WEIGHTS, specs
        )
        new_updates = jax.eval_shape(functools.partial(first_updates, row), placed, placed)
    assert jax.tree.map(lambda x: x.sharding.spec, new_updates) == specs
