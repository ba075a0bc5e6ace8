"""State beside sharded parameters: under jit it is sharded as they are, in `shard_map` each device has its piece.

Updates are held to those of one device over a few steps, one of them a spike. A leaf is split over both axes of the
mesh, one over one of them, one over none: what a method needs of a whole leaf, or of all, it must get from all devices.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip import contrib

pytestmark = pytest.mark.slow

P = PartitionSpec
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
SPECS = {"both": P("data", "model"), "rows": P("data"), "whole": P()}
SHAPES = {"both": (8, 4), "rows": (8,), "whole": (5,)}
STEPS = 6

METHODS = {
    "spam_clip": contrib.spam_clip(4.0, decay=0.9, warmup_steps=2, period=5),
    "adaptive_spike_clip": contrib.adaptive_spike_clip(0.9),
    "scale_by_adaptive_norm": contrib.scale_by_adaptive_norm(),
    "scale_by_acclip": contrib.scale_by_acclip(),
    "scale_by_stable_adam": contrib.scale_by_stable_adam(),
    "clipped_momentum": oc.clipped_momentum(1.0),
    "mixed_clip": contrib.mixed_clip(1.0, decay=0.9),
    "centered_clip": contrib.centered_clip(3.0),
    "SPAM": optax.chain(contrib.spam_clip(4.0, warmup_steps=2), contrib.reset_state_every(optax.scale_by_adam(), 3)),
}


def gradients():
    """Of every step, with a spike in one corner of the mesh alone."""
    rng = np.random.default_rng(0)
    grads = {name: np.float32(rng.standard_normal((STEPS, *shape))) for name, shape in SHAPES.items()}
    grads["both"][3, 6:, 2:] *= 30
    return grads


def params():
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def steps(tx, state, weights, grads):
    """The updates of all steps, and the state after them."""

    def step(state, grads):
        updates, state = tx.update(grads, state, weights)
        return state, updates

    return jax.lax.scan(step, state, grads)[::-1]


@functools.cache
def on_one_device(name):
    tx = METHODS[name]
    return jax.jit(functools.partial(steps, tx))(tx.init(params()), params(), gradients())


def over_steps(specs):
    return {name: P(None, *spec) for name, spec in specs.items()}


def put(tree, specs):
    return {name: jax.device_put(leaf, NamedSharding(MESH, specs[name])) for name, leaf in tree.items()}


def state_specs(tx):
    """As the parameters, where the state is; the same on all devices elsewhere."""
    state = jax.eval_shape(tx.init, params())
    return optax.tree.map_params(tx, lambda _, spec: spec, state, SPECS, transform_non_params=lambda _: P())


def assert_same(name, updates, state):
    expected_updates, expected_state = on_one_device(name)
    # A few roundings of a sum over a leaf, in numbers of order 1 and, where there was the spike, 100.
    for ours, expected in zip(
        jax.tree.leaves((updates, state)), jax.tree.leaves((expected_updates, expected_state)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_under_jit_the_state_is_sharded_like_the_parameters(name):
    tx = METHODS[name]
    weights = put(params(), SPECS)
    first = tx.init(weights)
    updates, state = jax.jit(functools.partial(steps, tx))(first, weights, put(gradients(), over_steps(SPECS)))
    assert_same(name, updates, state)
    has_params = False
    for states in (first, state):
        for leaf, spec in zip(jax.tree.leaves(states), spec_leaves(tx), strict=True):
            if spec != P():
                has_params = True
                assert leaf.sharding.is_equivalent_to(NamedSharding(MESH, spec), leaf.ndim)
    assert has_params == (name not in {"adaptive_spike_clip", "scale_by_adaptive_norm"})
    for leaf, spec in zip(jax.tree.leaves(updates), jax.tree.leaves(over_steps(SPECS)), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(MESH, spec), leaf.ndim)


def spec_leaves(tx):
    return jax.tree.leaves(state_specs(tx), is_leaf=lambda node: isinstance(node, P))


@pytest.mark.parametrize("name", METHODS)
def test_in_shard_map(name):
    """`check_vma` is on: jax itself checks that what is said to be the same on all devices is."""
    tx, specs = METHODS[name], state_specs(METHODS[name])
    mapped = jax.shard_map(
        functools.partial(steps, tx),
        mesh=MESH,
        in_specs=(specs, SPECS, over_steps(SPECS)),
        out_specs=(over_steps(SPECS), specs),
    )
    assert_same(name, *jax.jit(mapped)(tx.init(params()), params(), gradients()))


@pytest.mark.parametrize(
    "name",
    [
        "adaptive_spike_clip",
        "scale_by_adaptive_norm",
        "scale_by_stable_adam",
        "clipped_momentum",
        "mixed_clip",
        "centered_clip",
    ],
)
def test_a_bad_value_on_one_device_is_one_decision_on_all(name):
    tx, specs = METHODS[name], state_specs(METHODS[name])
    grads = {key: leaf[0] for key, leaf in gradients().items()}
    grads["both"][5, 3] = np.nan
    mapped = jax.shard_map(tx.update, mesh=MESH, in_specs=(SPECS, specs, SPECS), out_specs=(SPECS, specs))
    ours = jax.jit(mapped)(grads, tx.init(params()), params())
    expected = jax.jit(tx.update)(grads, tx.init(params()), params())
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=3e-6, atol=1e-6)
