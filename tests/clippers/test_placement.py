"""Where a clip stands decides what it bounds."""

import jax
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib, norms, thresholds
from tests.reference import fixed

LABELS = {"body": "a", "head": "b"}


def gradients():
    return {"body": np.float32([30.0, 40.0]), "head": np.float32([5.0, 12.0])}


def ones():
    return jax.tree.map(np.ones_like, gradients())


def once(tx, updates, params=None):
    def step(updates, params):
        return tx.update(updates, tx.init(params), params)[0]

    return jax.jit(step)(updates, updates if params is None else params)


def size(tree):
    return fixed.global_norm(jax.tree.leaves(tree))


# Peer defect 24: clips inside optax.partition each see their own part, and their bounds add up.


def test_24_two_clips_inside_partition_bound_each_part():
    inner = {"a": oc.clip_by_global_norm(1.0), "b": oc.clip_by_global_norm(1.0)}
    clipped = once(optax.partition(inner, LABELS), gradients())
    assert size(clipped) == pytest.approx(2**0.5, rel=1e-6)
    assert [size(clipped[name]) for name in LABELS] == pytest.approx([1.0, 1.0], rel=1e-6)


def test_24_a_clip_outside_partition_bounds_the_whole():
    inner = {"a": optax.identity(), "b": optax.identity()}
    clipped = once(optax.chain(oc.clip_by_global_norm(1.0), optax.partition(inner, LABELS)), gradients())
    assert size(clipped) == pytest.approx(1.0, rel=1e-6)


def test_24_group_norm_bounds_each_part_without_partition():
    tx = oc.clip_by(norms.group_norm(LABELS), thresholds.constant({"a": 0.6, "b": 0.8}))
    clipped = once(tx, gradients())
    assert [size(clipped[name]) for name in LABELS] == pytest.approx([0.6, 0.8], rel=1e-6)
    assert size(clipped) == pytest.approx(1.0, rel=1e-6)


def test_a_label_whose_leaves_are_all_masked_keeps_its_bound():
    tx = oc.clip_by(norms.group_norm(LABELS), thresholds.constant({"a": 0.6, "b": 0.8}))
    clipped = once(optax.masked(tx, {"body": True, "head": False}), gradients())
    assert size(clipped["body"]) == pytest.approx(0.6, rel=1e-6)
    np.testing.assert_array_equal(clipped["head"], gradients()["head"])


def test_24_the_trap_is_documented_with_both_ways_out():
    text = " ".join(oc.clip_by_global_norm.__doc__.split())
    for word in ("optax.partition", "outside", "group_norm"):
        assert word in text


# Muon beside AdamW: Muon takes no notice of the scale of a gradient, and Adam's eps does.


def test_a_group_norm_keeps_a_huge_matrix_of_muon_from_starving_adamw():
    labels = {"hidden": "muon", "head": "adamw"}
    weights = {"hidden": np.eye(3, dtype=np.float32), "head": np.ones(2, np.float32)}
    grads = {"hidden": np.float32([[3e8, 6e8, 0], [0, 3e8, 0], [3e8, 0, 3e8]]), "head": np.float32([0.01, -0.01])}
    behind = optax.partition({"muon": optax.contrib.muon(0.1), "adamw": optax.adamw(0.1, weight_decay=0.0)}, labels)
    clips = {
        "none": optax.identity(),
        "optax": optax.clip_by_global_norm(1.0),
        "global": oc.clip_by_global_norm(1.0),
        "group": oc.clip_by(norms.group_norm(labels), thresholds.constant(1.0)),
        "include": oc.clip_by(norms.global_norm(include={"hidden": False, "head": True}), thresholds.constant(1.0)),
    }

    @jax.jit
    def steps(grads):
        return {name: once(optax.chain(clip, behind), grads, weights) for name, clip in clips.items()}

    moved = steps(grads)
    for step in moved.values():  # 1 / 3e8 takes nothing from Muon
        np.testing.assert_allclose(step["hidden"], moved["none"]["hidden"], rtol=1e-3, atol=1e-5)
    eps, expected = 1e-8, -0.1 * np.sign(grads["head"])
    for name in ("optax", "global"):
        left = 0.01 / size(grads)  # 9e-12, far below Adam's eps
        np.testing.assert_allclose(moved[name]["head"], expected * left / (left + eps), rtol=1e-4)
    for name in ("none", "group", "include"):
        np.testing.assert_allclose(moved[name]["head"], expected, rtol=1e-4)


# The other places.


def test_adaptive_grad_clip_leaves_the_final_layer_out_when_masked():
    weights = ones()
    clipped = once(optax.masked(oc.adaptive_grad_clip(0.01), {"body": True, "head": False}), gradients(), weights)
    np.testing.assert_array_equal(clipped["head"], gradients()["head"])
    assert size(clipped["body"]) == pytest.approx(0.01 * 2**0.5, rel=1e-6)


def test_clippy_after_the_learning_rate_bounds_the_step_itself():
    weights = ones()
    tx = optax.chain(optax.adam(10.0), contrib.clippy(0.1, 1e-7))
    for leaf in jax.tree.leaves(once(tx, gradients(), weights)):
        np.testing.assert_allclose(1 + np.asarray(leaf), 0.9, rtol=1e-6)


def test_a_clip_inside_multi_steps_bounds_the_mean_and_outside_each_gradient():
    one, other = gradients(), jax.tree.map(lambda x: -x / 2, gradients())
    inside = optax.MultiSteps(oc.clip_by_global_norm(1.0), every_k_schedule=2)
    outside = optax.chain(oc.clip_by_global_norm(1.0), optax.MultiSteps(optax.identity(), 2).gradient_transformation())
    sizes = []
    for tx in (inside, outside):
        step = jax.jit(tx.update)
        _, state = step(one, jax.jit(tx.init)(one), one)
        sizes.append(size(step(other, state, one)[0]))
    assert sizes == pytest.approx([1.0, 0.0], abs=1e-5)


def test_normalised_descent_is_a_smooth_clip_before_sgd():
    # eta g / (n + beta) of Zhang et al. (2020): chain(smooth_clip_by_global_norm(beta), sgd(eta / beta)).
    tx = optax.chain(oc.smooth_clip_by_global_norm(0.5), optax.sgd(0.1 / 0.5))
    norm = size(gradients())
    for name, step in once(tx, gradients()).items():
        np.testing.assert_allclose(step, -0.1 * np.asarray(gradients()[name]) / (norm + 0.5), rtol=1e-6)
