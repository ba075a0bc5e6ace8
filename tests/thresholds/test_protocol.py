"""A Norm and a Threshold written outside of the library, with public names alone."""

import gc
import weakref
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import Norm, Threshold, clip_by, norms, thresholds
from tests.support.driving import together

# The largest modulus of each leaf, on all devices; a NaN in it is told by an infinite norm.


def largest(leaf):
    modulus = jnp.abs(jnp.asarray(leaf.value)).astype(jnp.float32)
    return leaf.max(jnp.max(jnp.where(jnp.isnan(modulus), jnp.inf, modulus), initial=0))


LEAF_MAX = Norm(
    lambda leaves: leaves.to_tree([largest(leaf) for leaf in leaves]),
    lambda leaves, factors: leaves.from_tree(factors),
    "leaf_max()",
)


# One group for the leaves that a function chooses, by the mean of their moduli, and finite whatever these hold.


def mean_of(choose):
    def chosen(leaves):
        return leaves.lookup("choose", choose)

    def measure(leaves):
        picked = [leaf.value for leaf, is_in in zip(leaves, chosen(leaves), strict=True) if is_in]
        total = sum(jnp.sum(jnp.abs(jnp.nan_to_num(x, posinf=0, neginf=0))) for x in picked)
        return jnp.asarray(total / sum(x.size for x in picked), jnp.float32)

    return Norm(measure, lambda leaves, factors: [factors if is_in else None for is_in in chosen(leaves)])


# At most so much more than one so far, in all groups together.


def record_high(ratio):
    def limit(norms, highest, param_norms, **extra_args):
        del param_norms, extra_args
        worst = jnp.stack([jnp.max(norm) for norm in jax.tree.leaves(norms)]).max()
        bound = jnp.where(highest > 0, ratio * highest, jnp.inf)
        return (0.0, bound), jnp.where(jnp.isfinite(worst), jnp.maximum(highest, jnp.minimum(worst, bound)), highest)

    return Threshold(lambda norms: jnp.zeros(()), limit)


GRADS = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[0.5, 0.25]]), "n": jnp.arange(3)}


def run(tx, *steps, params=None):
    state, update = tx.init(steps[0]), jax.jit(tx.update)
    for grads in steps:
        updates, state = update(grads, state, params)
    return updates, state


def test_a_norm_of_each_leaf():
    updates, _ = run(clip_by(LEAF_MAX, thresholds.constant({"a": 2.0, "b": 1.0, "n": None})), GRADS)
    np.testing.assert_array_equal(updates["a"], [1.5, -2.0])
    np.testing.assert_array_equal(updates["b"], GRADS["b"])
    np.testing.assert_array_equal(updates["n"], GRADS["n"])


def test_it_is_named_in_messages_and_signatures():
    assert repr(LEAF_MAX) == "leaf_max()"
    assert repr(norms.global_norm()) == "norms.global_norm()"


@jax.jit
def clipped_by_both(grads, bound):
    """By a Norm that is infinite for a leaf with a NaN, and by one that is finite for every leaf."""
    clips = [clip_by(norm, thresholds.constant(bound)) for norm in (LEAF_MAX, mean_of(lambda path: True))]
    return [tx.update(grads, tx.init(grads))[0] for tx in clips]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_what_is_zero_or_not_finite_never_becomes_nan(dtype):
    """A Norm that is finite for every leaf, so that all of them are scaled."""
    entries = [[0.0, 0.0], [np.inf, 2.0], [-np.inf, 0.0], [1.0, 3.0], [float(jnp.finfo(dtype).max), 1.0]]
    grads = {str(i): np.asarray(pair).astype(jnp.dtype(dtype)) for i, pair in enumerate(entries)}
    for bound in (0.0, 1e-3, 2.0, np.inf):
        for updates in clipped_by_both(grads, bound):
            for path, given in grads.items():
                found, finite = np.asarray(updates[path]), np.isfinite(given)
                assert not np.isnan(found).any(), bound
                assert np.isfinite(found)[finite].all(), bound
                np.testing.assert_array_equal(found[~finite], given[~finite], err_msg=str(bound))


def test_a_function_of_the_path_is_asked_once_for_each_leaf():
    asked = []

    def choose(path):
        asked.append(path)
        return path != "b"

    tx = clip_by(mean_of(choose), thresholds.relative_to_params(0.5))
    state = tx.init(GRADS)
    asked.clear()
    updates, _ = tx.update(GRADS, state, GRADS)
    assert sorted(asked) == ["a", "b"]
    np.testing.assert_array_equal(updates["a"], [1.5, -2.0])
    np.testing.assert_array_equal(updates["b"], GRADS["b"])


@pytest.mark.parametrize(
    "make",
    [lambda f: norms.global_norm(include=f), lambda f: norms.group_norm(lambda path: str(f(path)))],
    ids=["include", "labels"],
)
def test_so_are_those_of_the_library(make):
    asked = []
    tx = clip_by(make(lambda path: asked.append(path) is None), thresholds.relative_to_params(0.5))
    state = tx.init(GRADS)
    asked.clear()
    tx.update(GRADS, state, GRADS)
    assert sorted(asked) == ["a", "b"]


def test_it_goes_with_every_threshold_and_in_every_place():
    made = {"zscore": thresholds.zscore(), "quantile": thresholds.quantile(0.5, window=4), "mine": record_high(1.5)}
    clips = together({name: clip_by(LEAF_MAX, threshold, record=2) for name, threshold in made.items()})
    updates, states = run(clips, *[GRADS] * 3)
    for name in made:
        assert oc.clip_stats(states[name])["clip_norm"] == 4.0, name
        np.testing.assert_array_equal(updates[name]["a"], GRADS["a"], err_msg=name)
    tx = oc.skip_spikes(optax.sgd(1.0), record_high(1.5), norm=LEAF_MAX)
    spike = jax.tree.map(lambda leaf: 100 * np.asarray(leaf), GRADS)
    _, state = run(tx, GRADS, spike, GRADS)
    assert oc.clip_stats(state)["skipped_norm"] == 1


def test_a_threshold_with_a_state_of_its_own():
    tx = clip_by(norms.global_norm(), record_high(2.0))
    steps = [{"a": jnp.array([3.0, 4.0]) * scale} for scale in (1.0, 10.0, 10.0)]
    updates, state = run(tx, *steps)
    np.testing.assert_allclose(np.linalg.norm(updates["a"]), 20.0, rtol=1e-6)
    assert float(state) == 20.0


def test_a_group_that_is_not_finite_is_let_alone_in_its_state_too():
    updates, state = run(clip_by(LEAF_MAX, record_high(2.0)), {"a": jnp.array([1.0, jnp.nan])}, {"a": jnp.ones(2)})
    assert float(state) == 1.0
    np.testing.assert_array_equal(updates["a"], [1.0, 1.0])


def test_in_shard_map_a_leaf_says_over_which_axes_it_is_split():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = clip_by(LEAF_MAX, thresholds.constant(1.0))
    step = jax.shard_map(
        lambda grads: tx.update(grads, tx.init(grads))[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    numbers = np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(jax.jit(step)(numbers), numbers / 7, rtol=1e-6)
    numbers[2] = np.nan
    np.testing.assert_array_equal(jax.jit(step)(numbers), numbers)


def test_a_sum_over_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = Norm(
        lambda leaves: leaves.to_tree(
            [leaf.sum(jnp.sum(jnp.abs(leaf.value))) / leaf.sum(jnp.float32(leaf.value.size)) for leaf in leaves]
        ),
        lambda leaves, factors: leaves.from_tree(factors),
    )
    tx = clip_by(mean, thresholds.constant(1.0))
    step = jax.shard_map(
        lambda grads: tx.update(grads, tx.init(grads))[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_allclose(jax.jit(step)(jnp.arange(8.0)), np.arange(8.0) / 3.5, rtol=1e-6)


def test_what_a_norm_must_not_return():
    one_each = LEAF_MAX.assign

    def wide(factor):
        return jax.tree.map(lambda x: jnp.full((2, 2), x), factor)

    for measure, came in ((lambda leaves: jnp.bfloat16(1), "bfloat16"), (lambda leaves: 1.0, "float")):
        tx = clip_by(Norm(measure, lambda leaves, factors: [factors] * len(leaves)), thresholds.constant(1.0))
        with pytest.raises(ValueError, match=f"measure of a Norm must return arrays of float32 or float64, got {came}"):
            tx.update(GRADS, optax.EmptyState())
        with pytest.raises(ValueError, match="measure of a Norm must return"):
            clip_by(tx.made_of.norm, thresholds.zscore()).init(GRADS)
    for assign, came in (
        (lambda leaves, factors: one_each(leaves, factors)[:1], "1 entries"),
        (lambda leaves, factors: [1.0, None], "2 entries, among them a float"),
        (lambda leaves, factors: None, "a NoneType"),
        (lambda leaves, factors: factors, "a dict"),
        (
            lambda leaves, factors: [wide(factors["a"]), None],
            r"a factor of shape \(2, 2\) for the leaf 'a' of shape \(2,\)",
        ),
    ):
        tx = clip_by(Norm(LEAF_MAX.measure, assign, "mine()"), thresholds.constant(1.0))
        with pytest.raises(ValueError, match=rf"assign of mine\(\) must .* for each of the 2 leaves, got {came}"):
            tx.update(GRADS, tx.init(GRADS))


def test_the_derivative_at_zero_is_finite():
    tx = clip_by(LEAF_MAX, thresholds.constant(1.0))

    def total(grads):
        return jnp.sum(tx.update(grads, tx.init(grads))[0])

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(np.zeros(3, np.float32)), np.ones(3))


@pytest.mark.parametrize("norm", [norms.global_norm(), norms.unit_norm(), norms.global_norm(include=lambda path: True)])
def test_no_cycle_keeps_gradients_alive(norm):
    tx = clip_by(norm, thresholds.relative_to_params(1.0))
    grads = {"a": jnp.ones((2, 3))}
    state = tx.init(grads)
    tx.update(grads, state, grads)  # what is traced and cached is
    grads = {"a": jnp.full((2, 3), 5.0)}
    alive = weakref.ref(grads["a"])
    gc.disable()
    try:
        tx.update(grads, state, grads)
        del grads
        assert alive() is None
    finally:
        gc.enable()


def test_a_lookup_is_of_its_own_function_even_if_that_is_gone():
    seen = []

    def measure(leaves):
        for number in range(4):
            seen.append(leaves.lookup("weight", lambda path, number=number: number)[0])
            gc.collect()
        return jnp.float32(1)

    tx = clip_by(Norm(measure, lambda leaves, factors: [None] * len(leaves)), thresholds.constant(1.0))
    tx.update(GRADS, optax.EmptyState())
    assert seen == [0, 1, 2, 3]


def test_a_leaf_knows_its_path_when_leaves_are_gone():
    kept = []

    def measure(leaves):
        kept.extend([*leaves, *leaves.params()])
        return jnp.float32(1)

    tx = clip_by(Norm(measure, lambda leaves, factors: [None] * len(leaves)), thresholds.constant(1.0))
    tx.update(GRADS, optax.EmptyState(), GRADS)
    gc.collect()
    assert [leaf.path for leaf in kept] == ["a", "b", "a", "b"]


def test_a_python_number_is_an_array_to_a_norm():
    tx = clip_by(LEAF_MAX, thresholds.constant(1.0))
    updates, _ = tx.update({"a": 3.0}, optax.EmptyState())
    assert float(updates["a"]) == 1.0


def test_parameters_in_other_containers_fit_where_a_gradient_is_missing():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}
    tx = clip_by(norms.leaf_norm(), thresholds.relative_to_params(0.1))
    for grads in (OrderedDict(b=None, a=params["a"]), OrderedDict(b=params["b"], a=params["a"])):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert list(updates) == ["b", "a"]
        np.testing.assert_allclose(updates["a"], [0.3, 0.4], rtol=1e-6)
        assert (updates["b"] is None) == (grads["b"] is None)
