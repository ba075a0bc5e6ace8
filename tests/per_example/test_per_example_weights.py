"""Weights of examples: against one example after the other in float64, and padded batches against unpadded ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import per_example
from optaxclip.per_example import two_pass
from tests.reference.examples import f64, norm_of, row, value_and_grad
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, EXPLICIT, P, put

B, BOUND = 7, 3.0
FORMS = {"one pass": optax.chain(oc.clip_by_global_norm(BOUND)), "two passes": oc.clip_by_global_norm(BOUND)}
both_forms = pytest.mark.parametrize("form", FORMS)
two_passes = pytest.mark.parametrize("form", slow_but(FORMS, "two passes"))


def loss(params, example):
    return 3.0 + jnp.sum(jnp.sin(params["w"] @ example["x"] + params["b"]))


def with_aux(params, example):
    return loss(params, example), example["x"]


def trees(rng, number=B):
    params = {"w": rng.normal(size=(4, 6)), "b": rng.normal(size=4)}
    batch = {"x": rng.normal(size=(number, 6)) * np.logspace(-1, 1, number)[:, None]}
    return jax.tree.map(np.float32, (params, batch))


def weighted(fun, params, batch, weights, reduce="mean"):
    """Value, gradients and norms, one example after the other; examples of weight 0 are not looked at."""
    used = [i for i, weight in enumerate(weights) if weight]
    found = {i: value_and_grad(fun)(params, row(batch, i)) for i in used}
    sizes = {i: norm_of(grads) for i, (_, grads) in found.items()}
    shares = {i: float(weights[i]) / (float(np.sum(f64(weights))) if reduce == "mean" else 1.0) for i in used}
    clipped = [
        jax.tree.map(lambda leaf, i=i: leaf * shares[i] * min(1.0, BOUND / sizes[i]), f64(found[i][1])) for i in used
    ]
    value = sum(shares[i] * float(found[i][0]) for i in used)
    return value, jax.tree.map(lambda *leaves: sum(leaves), *clipped), sizes


TINY = float(np.finfo(np.float32).tiny)


def assert_close(ours, expected, rtol=5e-6):
    """Within `rtol` of the largest entry of each array. Subnormals may be 0."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(f64(ours)), jax.tree.leaves(f64(expected)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=rtol * np.max(np.abs(other), initial=0) + TINY)


@functools.cache
def step_of(tx, fun=loss, **options):
    """The jitted step: one for all tests that ask for the same."""
    return jax.jit(per_example.clipped_value_and_grad(fun, tx, return_norms=True, **options))


def in_microbatches(tx):
    """The sum, by a step of another kind, for all tests of it."""
    return step_of(tx, with_aux, reduce="sum", has_aux=True, microbatch_size=3)


def one_by_one_fails(monkeypatch):
    """The slow way, for weights too far apart, must not be needed. `step_of` must not have the step yet."""
    monkeypatch.setattr(
        two_pass, "_one_by_one", lambda problem, *_: jax.tree.map(lambda w: w * jnp.nan, problem.params)
    )


# Against one example after the other.

WEIGHTS = {
    "padding": np.array([1, 1, 0, 1, 1, 1, 0], np.float32),
    "mask": np.array([1, 1, 0, 1, 1, 1, 0], bool),
    "whole numbers": np.array([3, 1, 0, 2, 5, 1, 1], np.int32),
    "importance": np.array([0.3, 2.0, 1e-3, 0.0, 7.0, 1.5, 0.9], np.float32),
    "both signs": np.array([0.5, -1.0, 2.0, 0.0, -0.25, 1.0, 1.0], np.float32),
    "bfloat16": np.array([0.5, 1, 2, 0, 0.25, 1, 1]).astype(jnp.bfloat16),
    "small": np.array([1, 2, 0, 3, 1, 1, 1], np.float32) * np.float32(1e-37),
    "large": np.array([1, 2, 0, 3, 1, 1, 1], np.float32) * np.float32(1e38),
}


@both_forms
@pytest.mark.parametrize("name", slow_but(WEIGHTS, "padding", "importance", "both signs", "small", "large"))
def test_the_mean_divides_by_the_sum_of_the_weights(rng, form, name, monkeypatch):
    one_by_one_fails(monkeypatch)
    params, batch = trees(rng)
    value, grads, sizes = step_of(FORMS[form])(params, batch, weights=WEIGHTS[name])
    expected_value, expected, by_size = weighted(loss, params, batch, WEIGHTS[name])
    assert min(by_size.values()) < BOUND < max(by_size.values())
    np.testing.assert_allclose(value, expected_value, rtol=5e-6)
    assert_close(grads, expected)
    for i, size in by_size.items():
        np.testing.assert_allclose(sizes[i], size, rtol=5e-6)


@both_forms
# The sum of the large ones is past the largest float.
@pytest.mark.parametrize("name", slow_but([name for name in WEIGHTS if name != "large"], "both signs", "small"))
def test_the_sum_and_microbatches(rng, form, name):
    params, batch = trees(rng)
    (value, aux), grads, _ = in_microbatches(FORMS[form])(params, batch, weights=WEIGHTS[name])
    expected_value, expected, _ = weighted(loss, params, batch, WEIGHTS[name], "sum")
    np.testing.assert_allclose(value, expected_value, rtol=5e-6)
    assert_close(grads, expected)
    np.testing.assert_array_equal(aux, batch["x"])


@both_forms
def test_weights_of_one_change_nothing(rng, form):
    params, batch = trees(rng)
    step = step_of(FORMS[form])
    value, grads, _ = step(params, batch, weights=np.ones(B, np.float32))
    expected_value, expected, _ = step(params, batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-7)
    assert_close(grads, expected, 1e-7)


# Padding.

PADDING = {"zeros": 0.0, "ordinary": 1.0, "nan": np.nan, "inf": np.inf, "large": 3e38, "subnormal": 1e-40}


@both_forms
@pytest.mark.parametrize("name", slow_but(PADDING, "ordinary", "nan", "large"))
def test_a_padded_batch_gives_what_the_unpadded_one_does(rng, form, name):
    params, batch = trees(rng)
    padded = {"x": np.concatenate([batch["x"], np.full((2, 6), PADDING[name], np.float32)])}
    step = step_of(FORMS[form])
    value, grads, _ = step(params, padded, weights=np.arange(B + 2) < B)
    expected_value, expected, _ = step(params, batch)
    np.testing.assert_allclose(value, expected_value, rtol=5e-6)
    assert_close(grads, expected)


def test_padding_in_front_and_a_bad_example_among_the_others(rng):
    """The first example of the batch may stand in for none."""
    params, batch = trees(rng)
    bad = {"x": batch["x"].copy()}
    bad["x"][0], bad["x"][3] = np.nan, np.inf
    weights = np.array([0, 1, 1, 2, 1, 1, 1], np.float32)
    for tx in FORMS.values():
        value, grads, _ = step_of(tx)(params, bad, weights=weights)
        without = np.array([0, 1, 1, 0, 1, 1, 1], np.float32)
        expected_value, expected, _ = weighted(loss, params, batch, without, "sum")
        np.testing.assert_allclose(value, expected_value / 7, rtol=5e-6)  # the weight of a bad example is counted
        assert_close(grads, jax.tree.map(lambda leaf: leaf / 7, expected))


@both_forms
@pytest.mark.parametrize("weight", slow_but([np.nan, np.inf, 1e-40], np.nan))
def test_a_weight_that_is_not_finite_or_subnormal_is_one_of_zero(rng, form, weight):
    params, batch = trees(rng)
    weights = np.ones(B, np.float32)
    weights[2] = weight
    step = step_of(FORMS[form])
    assert_close(step(params, batch, weights=weights), step(params, batch, weights=np.float32(np.arange(B) != 2)), 1e-7)


@both_forms
@pytest.mark.parametrize("weights", [np.zeros(B), np.full(B, np.nan), np.array([1.0, -1, 0, 0, 0, 0, 0])], ids=str)
def test_weights_that_add_up_to_zero_give_no_nan(rng, form, weights):
    params, batch = trees(rng)
    for step in (step_of(FORMS[form]), in_microbatches(FORMS[form])):  # the mean, and the sum
        value, grads, _ = jax.device_get(step(params, batch, weights=weights.astype(np.float32)))
        found = value[0] if isinstance(value, tuple) else value, grads
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
        if not np.any(weights > 0):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))


# Far apart.


def linear(w, x):
    return jnp.vdot(w, x)


@pytest.mark.parametrize("spread", [1e-20, 1e-36])
def test_weights_too_far_apart_for_one_sum(spread):
    """The example with the large weight has no gradient in the second entry, which is of the other alone."""

    rows, weights = np.float32([[3.0, 0.0], [0.0, 4e20]]), np.array([1.0, spread], np.float32)
    for tx in FORMS.values():
        step = step_of(tx, linear, reduce="sum", batch_argnums=1)
        _, grads, _ = step(np.ones(2, np.float32), rows, weights=weights)
        np.testing.assert_allclose(grads, [BOUND, BOUND * spread], rtol=1e-5)


# Under the transformations of jax.


@two_passes
def test_derivatives_by_the_weights(rng, form):
    params, batch = trees(rng)
    step = per_example.clipped_value_and_grad(loss, FORMS[form])

    def after(weights, step):
        value, grads = step(params, batch, weights=weights)
        return value + jnp.sum(grads["w"]) + jnp.sum(grads["b"] ** 2)

    def plain(params, batch, weights):
        value, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2, axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(grads)))
        shares = weights * jnp.minimum(1, BOUND / norm) / jnp.sum(weights)
        return jnp.vdot(weights, value) / jnp.sum(weights), jax.tree.map(
            lambda leaf: jnp.tensordot(shares, leaf, 1), grads
        )

    weights = WEIGHTS["importance"]
    derivatives = jax.jit(lambda weights: [jax.grad(after)(weights, each) for each in (step, plain)])
    ours, expected = jax.device_get(derivatives(weights))
    used = weights != 0  # where the weight is 0 the example is not looked at
    np.testing.assert_allclose(ours[used], expected[used], rtol=1e-4, atol=1e-6)


@two_passes
@pytest.mark.parametrize("microbatch_size", slow_but([None, 3], None))
def test_shard_map_gives_what_one_device_does(rng, form, microbatch_size):
    params, batch = trees(rng, 16)
    batch["x"][14] = np.nan
    weights = np.float32(rng.uniform(0, 1e3, size=16) * (np.arange(16) < 13))  # one device has padding
    step = per_example.clipped_value_and_grad(loss, FORMS[form], microbatch_size=microbatch_size)

    def call(params, batch, weights):
        return step(params, batch, weights=weights)

    specs = P(), P("data"), P("data")
    sharded = jax.shard_map(call, mesh=AUTO, in_specs=specs, out_specs=P())
    expected = step_of(FORMS[form])(params, batch, weights=weights)[:2]
    assert_close(jax.jit(sharded)(params, batch, weights), expected, 1e-5)


def test_weights_that_are_the_same_on_every_device(rng):
    params, batch = trees(rng, 16)
    step = per_example.clipped_value_and_grad(loss, FORMS["two passes"])
    weights = np.array([1, 0, 2, 0], np.float32)
    sharded = jax.shard_map(
        lambda params, batch: step(params, batch, weights=weights),
        mesh=AUTO,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    expected = step_of(FORMS["two passes"])(params, batch, weights=np.tile(weights, 4))[:2]
    assert_close(jax.jit(sharded)(params, batch), expected, 1e-5)


def test_weights_that_differ_where_examples_do_not_are_refused(rng):
    params, batch = trees(rng, 4)
    step = per_example.clipped_value_and_grad(loss, FORMS["two passes"])
    sharded = jax.shard_map(
        lambda params, batch, weights: step(params, batch, weights=weights),
        mesh=AUTO,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"weights differ between devices along mesh axes \('data',\)"):
        jax.eval_shape(sharded, params, batch, np.ones(16, np.float32))


@two_passes
@pytest.mark.parametrize(
    ("on", "spec"),
    [(AUTO, P("data")), (EXPLICIT, P("data")), (EXPLICIT, P())],
    ids=["auto", "explicit", "explicit, whole weights"],
)
def test_under_jit_with_a_batch_spread_over_the_mesh(rng, form, spec, on):
    if on is EXPLICIT and form == "one pass" and jax.__version_info__ < (0, 9):
        pytest.skip("jax 0.8 has no rule for a branch under vmap on an Explicit mesh")
    params, batch = trees(rng, 16)
    batch["x"][3] = np.nan
    weights = np.float32(np.arange(16) % 3)
    step = step_of(FORMS[form])
    expected = step(params, batch, weights=weights)[:2]
    laid_out = put((params, batch, weights), ({"w": P(), "b": P()}, {"x": P("data")}, spec), on)
    with jax.set_mesh(on):
        found = step(*laid_out[:2], weights=laid_out[2])[:2]
    assert_close(found, expected, 1e-5)


# Errors.


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(B + 1), r"array of 7 real numbers, one per example, got float64 of shape \(8,\)"),
        (np.ones((B, 1)), r"got float64 of shape \(7, 1\)"),
        (1.0, "got 1.0"),
        ([1.0] * B, r"got \[1.0"),
        (np.ones(B, complex), "got complex128"),
        (jax.random.split(jax.random.key(0), B), "got key"),
    ],
    ids=str,
)
def test_bad_weights(rng, weights, words):
    with pytest.raises(ValueError, match=words):
        per_example.clipped_value_and_grad(loss, FORMS["one pass"])(*trees(rng), weights=weights)


def test_a_function_with_weights_of_its_own(rng):
    params, batch = trees(rng)

    def own(params, example, *, weights=2.0):
        return weights * loss(params, example)

    def by_position(weights, example):
        return loss(weights, example)

    with pytest.raises(ValueError, match=r"the function has an argument of that name"):
        per_example.clipped_value_and_grad(own, FORMS["one pass"])(params, batch, weights=np.ones(B))
    step, same = (step_of(FORMS["one pass"], each) for each in (by_position, loss))
    weights = WEIGHTS["importance"]
    assert_close(step(params, batch, weights=weights), same(params, batch, weights=weights), 0)


def test_form_of_takes_weights(rng):
    params, batch = trees(rng)
    step = per_example.clipped_value_and_grad(loss, FORMS["two passes"])
    shape = jax.ShapeDtypeStruct((B,), jnp.float32)
    assert per_example.form_of(step, params, batch, weights=shape) == "two_pass"
    with pytest.raises(ValueError, match="weights must be"):
        per_example.form_of(step, params, batch, weights=jax.ShapeDtypeStruct((B, 1), jnp.float32))
