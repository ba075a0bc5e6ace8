"""optax 0.2.8 and ours give the same float32 numbers wherever optax is right, on 200 random trees of 20 structures.

optax is right where no square leaves the normal range (so scales stay within 1e-15 to 1e15), where the norm is not 0,
and, for AGC, where a unit's norm is above its 1e-6.
"""

import functools

import jax
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests.reference import fixed, trees

BLOCKS = 4
STRUCTURES, NUMBERS = 5, 10  # of each block
RTOL = 1e-6


def assert_same(mine, other):
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    for a, b in zip(trees.numpy_leaves(mine), trees.numpy_leaves(other), strict=True):
        assert a.dtype == b.dtype == np.float32
        # Results below the normal range are flushed by both, not always alike.
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=trees.TINY)


def random_bound(rng, norm):
    """Around the norm, on both sides, over four powers of ten."""
    return float(norm * 10 ** rng.uniform(-3, 1))


def filled(rng, like, scale, spread):
    """Gaussian numbers; a leaf's scale is `scale` times a power of 10 within +-`spread`."""
    return jax.tree.map(lambda x: trees.normal(rng, x.shape, x.dtype, scale * 10 ** rng.uniform(-spread, spread)), like)


@jax.jit
def clipped_by_both(updates, value, norm, rms):
    return [
        {
            "clip": trees.update(module.clip(value), updates),
            "global norm": trees.update(module.clip_by_global_norm(norm), updates),
            "block rms": trees.update(module.clip_by_block_rms(rms), updates),
        }
        for module in (oc, optax)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_two_hundred_random_trees(rng, block):
    del block  # the rng differs by it
    for _ in range(STRUCTURES):
        structure = trees.random_tree(rng, np.float32)
        for _ in range(NUMBERS):
            updates = filled(rng, structure, 10 ** rng.uniform(-12, 12), rng.uniform(0, 3))
            leaves = [leaf.astype(np.float64) for leaf in jax.tree.leaves(updates)]
            measured = np.abs(leaves[0]).max(), fixed.global_norm(leaves), np.sqrt(np.mean(leaves[0] ** 2))
            assert_same(*clipped_by_both(updates, *(random_bound(rng, norm) for norm in measured)))


@jax.jit
def agc_by_both(updates, params, clipping, eps):
    return [trees.update(module.adaptive_grad_clip(clipping, eps), updates, params) for module in (oc, optax)]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_two_hundred_random_trees_agc(rng, block):
    del block
    for _ in range(STRUCTURES):
        structure = trees.random_tree(rng, np.float32)
        for _ in range(NUMBERS):
            # Leaves of scale 1e-2 and up: a Gaussian unit's norm is above optax's 1e-6, also where it is one number.
            updates = filled(rng, structure, 10 ** rng.uniform(0, 6), rng.uniform(0, 2))
            params = filled(rng, structure, 10 ** rng.uniform(-4, 2), 0)
            assert_same(*agc_by_both(updates, params, 10 ** rng.uniform(-4, 1), 10 ** rng.uniform(-5, -1)))


@functools.cache
def agc(axis=None, clipping=0.01):
    """Both, compiled."""
    pair = [module.adaptive_grad_clip(clipping, axis=axis) for module in (oc, optax)]
    return jax.jit(lambda updates, params: [trees.update(tx, updates, params) for tx in pair])


def test_agc_of_every_rank(rng):
    shapes = [(3,), (3, 4), (2, 3, 4), (2, 2, 3, 4)]
    updates = trees.shuffled_tree(rng, np.float32, shapes)
    params = trees.like(rng, updates, scale=7e-4)  # units on both sides of the floor, 1e-3
    assert_same(*agc(clipping=0.1)(updates, params))


@pytest.mark.parametrize("axis", [-1, (0, 1)])
def test_agc_axis(rng, axis):
    given = trees.shuffled_tree(rng, np.float32, [(3, 5), (2, 3, 4)])
    for scale in (1e-2, 1.0, 1e3):
        updates, params = (trees.like(rng, given, scale=size) for size in (scale, 1.0))
        assert_same(*agc(axis)(updates, params))


def test_agc_wants_an_axis_above_rank_five(rng):
    updates = trees.random_tree(rng, np.float32, shapes=[(2, 1, 2, 1, 2, 2)])
    for tx in (oc.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)):
        with pytest.raises(ValueError, match="axis"):
            trees.update(tx, updates, updates)
    assert_same(*agc((0, 1, 2))(updates, updates))


def test_agc_wants_params_in_optax_words(rng):
    updates = trees.random_tree(rng, np.float32)
    messages = []
    for tx in (oc.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)):
        with pytest.raises(ValueError, match="params") as error:
            tx.update(updates, tx.init(updates), None)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_the_transcriptions_are_optaxs(rng):
    """In float64 both are right to the last digits."""
    with jax.enable_x64(True):
        shapes = [(), (3, 5), (2, 2, 3, 4)]
        updates, params = ([trees.normal(rng, shape, np.float64) for shape in shapes] for _ in range(2))

        @jax.jit
        def run(bound):
            clips = (
                optax.clip(bound),
                optax.clip_by_global_norm(bound),
                optax.clip_by_block_rms(bound),
                optax.adaptive_grad_clip(bound, 1e-2),
            )
            return [trees.update(tx, updates, params) for tx in clips]

        for bound in (0.3, 1.0, 1e3):
            references = (
                fixed.clip(updates, bound),
                fixed.clip_by_global_norm(updates, bound),
                fixed.clip_by_block_rms(updates, bound),
                fixed.adaptive_grad_clip(updates, params, bound, 1e-2),
            )
            for theirs, expected in zip(run(bound), references, strict=True):
                for a, b in zip(theirs, expected, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-13)
