"""The bound that follows a quantile of the norms of examples: against the published formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import per_example
from tests.reference.examples import norm_of
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, EXPLICIT, P, put

TINY, MAX = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
track = jax.jit(per_example.track_quantile)
LENGTH = 6


def padded(norms):
    """Norms, and NaN up to one length, so that one program is compiled for all."""
    return np.float32(np.append(norms, [np.nan] * (LENGTH - len(norms))))


def track_padded(bound, norms, **options):
    return track(np.float32(bound), padded(norms), **options)


def published(bound, norms, q=0.5, rate=0.2):
    """Andrew et al. 2021 (arXiv 1905.03871), algorithm 1, without noise."""
    share = np.mean(np.asarray(norms, np.float64) <= bound)
    return bound * np.exp(-rate * (share - q))


def opacus(bound, norms, q=0.5, rate=0.2):
    """As `clip_and_accumulate` and `scale_grad` of opacus' AdaClipDPOptimizer count: by clip factors below 1."""
    factors = np.minimum(bound / (np.asarray(norms, np.float64) + 1e-6), 1.0)
    unclipped = len(factors) - np.sum(factors < 1)
    return bound * np.exp(-rate * (unclipped / len(factors) - q))


@pytest.mark.parametrize("reference", [published, opacus])
def test_the_published_bound_over_many_batches(rng, reference):
    batches = np.float32(rng.lognormal(2.0, 1.0, (300, 16)))

    def step(bound, norms):
        return per_example.track_quantile(bound, norms, quantile=0.75), bound

    _, bounds = jax.jit(lambda b: jax.lax.scan(step, jnp.float32(0.1), b))(batches)
    expected = [0.1]
    for norms in batches[:-1]:
        expected.append(reference(expected[-1], norms, q=0.75))
    np.testing.assert_allclose(bounds, expected, rtol=5e-5)
    # It arrives where three quarters of the norms lie below.
    assert np.mean(batches <= np.mean(bounds[150:])) == pytest.approx(0.75, abs=0.05)


UGLY = {
    "not finite": ([0.5, np.nan, 3.0, np.inf, -np.inf, 4.0], [0.5, 3.0, 4.0]),
    "zero and subnormal": ([0.0, 0.5, 1e-42, 3.0, 4.0], [0.5, 3.0, 4.0]),
    "at the bound": ([1.0, 1.0, 2.0], [1.0, 1.0, 2.0]),
    "large": ([1e38, 3e38, 0.5], [1e38, 3e38, 0.5]),
    "one": ([2.0], [2.0]),
}


@pytest.mark.parametrize("case", UGLY)
def test_only_norms_that_are_numbers_are_counted(case):
    norms, counted = UGLY[case]
    assert float(track_padded(1.0, norms)) == pytest.approx(published(1.0, counted))


@pytest.mark.parametrize("bound", [TINY, 0.3, 1.0, 7.7, 1e38])
@pytest.mark.parametrize(
    "norms", [np.zeros(0, np.float32), padded([0, 0, 0]), padded([]), padded([0, np.inf])], ids=str
)
def test_without_an_example_the_bound_keeps_every_bit(bound, norms):
    bound = np.float32(bound)
    assert track(bound, norms) == bound


def test_at_the_quantile_the_bound_keeps_every_bit(rng):
    for bound in np.float32(rng.lognormal(0, 20, 50)):
        assert track(bound, padded([0.5 * bound, 2 * bound])) == bound


def test_the_bound_stays_a_normal_float():
    below, above = [1e-37] * 3, [3e38] * 3
    low, high = (track_padded(1.0, norms, learning_rate=1e4) for norms in (below, above))
    np.testing.assert_allclose([low, high], [TINY, MAX], rtol=1e-5)
    assert np.isfinite(high)
    assert float(low) >= TINY
    assert float(track_padded(low, [1e-38])) >= TINY  # not subnormal, so not 0
    np.testing.assert_allclose(track_padded(high, below), MAX * np.exp(-0.1), rtol=1e-4)


@pytest.mark.parametrize(
    ("bound", "norms"),
    [
        (1.0, np.ones(2, jnp.bfloat16)),
        (1.0, np.ones(2, jnp.float8_e4m3fn)),
        (jnp.bfloat16(1.0), np.ones(2, np.float32)),
        (np.float64(1.0), np.ones(2, np.float32)),
        (1, np.ones(2, np.float32)),
    ],
)
def test_the_bound_is_float32_at_least(bound, norms):
    found = jax.jit(lambda norms: per_example.track_quantile(bound, norms))(norms)
    assert (found.dtype, found.shape) == ("float32", ())
    np.testing.assert_allclose(found, np.exp(-0.1), rtol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [
        np.array([1.0, 0.0, 3.0, 0.0, -2.0, 1.0], np.float32),
        np.array([True, False, True, False, True, True]),
        np.array([1.0, np.nan, 2.0, 1e-42, 0.5, 1.0], np.float32),
    ],
)
def test_an_example_of_weight_0_is_no_example(weights):
    found = track_padded(1.0, [0.5, 0.1, 3.0, 0.2, 4.0], weights=weights)
    assert float(found) == pytest.approx(published(1.0, [0.5, 3.0, 4.0]))


# With the clip.


def loss(params, example):
    return jnp.sum(jnp.tanh(params["w"] @ example["x"]) * example["y"])


def trees(rng, number=16):
    sizes = np.logspace(-1, 1, number)[:, None]
    batch = {"x": rng.normal(size=(number, 5)), "y": rng.normal(size=(number, 4)) * sizes}
    return jax.tree.map(np.float32, ({"w": rng.normal(size=(4, 5))}, batch))


WEIGHTS = np.ones(16, np.float32)
WEIGHTS[5:8] = 0


def step_of(tx_of, **options):
    def step(params, bound, batch, weights):
        grad = per_example.clipped_value_and_grad(loss, tx_of(bound), return_norms=True, **options)
        _, grads, norms = grad(params, batch, weights=weights)
        return grads, per_example.track_quantile(bound, norms, weights=weights), norms

    return step


FORMS = {
    "two passes": step_of(oc.clip_by_global_norm, form="two_pass"),
    "one pass": step_of(oc.clip_by_global_norm, form="one_pass"),
    "microbatches": step_of(lambda c: optax.chain(oc.clip_by_global_norm(c)), microbatch_size=3),
}


@pytest.mark.parametrize("form", slow_but(FORMS, "two passes"))
def test_a_bound_that_is_traced_clips_and_follows(rng, form):
    params, batch = trees(rng)
    batch["x"][3] = np.nan
    step, bound = jax.jit(FORMS[form]), jnp.float32(0.5)
    for _ in range(3):
        before = bound
        grads, bound, norms = step(params, bound, batch, WEIGHTS)
        there = np.delete(norms, [3, 5, 6, 7])
        assert np.all(np.isfinite(there))
        assert float(bound) == pytest.approx(published(float(before), there))
        assert norm_of(grads) <= float(before) * (1 + 1e-5)
    assert step._cache_size() == 1


def test_examples_on_several_devices_are_one_batch(rng):
    params, batch = trees(rng)
    step, bound = FORMS["two passes"], np.float32(0.5)
    whole = jax.jit(step)(params, bound, batch, WEIGHTS)
    mapped = jax.shard_map(
        step,
        mesh=AUTO,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=(P(), P(), P("data")),  # which `check_vma` proves: it is the same on all devices
    )
    ours = jax.jit(mapped)(params, bound, batch, WEIGHTS)
    assert ours[1] == whole[1] != bound
    assert published(0.5, np.delete(whole[2], [5, 6, 7])) == pytest.approx(float(whole[1]))
    alone = published(0.5, np.asarray(whole[2])[:2])
    assert alone != pytest.approx(float(whole[1]))  # a device's own examples would give another


@pytest.mark.parametrize("axes", ["data", P("data")], ids=str)
def test_without_types_the_axes_are_named(axes):
    norms, bound = np.logspace(-1, 1, 16, dtype=np.float32), np.float32(1.5)
    mapped = jax.shard_map(
        lambda bound, norms: per_example.track_quantile(bound, norms, axes=axes),
        mesh=AUTO,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    assert jax.jit(mapped)(bound, norms) == track(bound, norms)
    outside = jax.jit(functools.partial(per_example.track_quantile, axes=axes))
    assert outside(bound, norms) == track(bound, norms)


def test_without_types_and_axes_there_is_a_warning():
    mapped = jax.shard_map(
        per_example.track_quantile, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    with pytest.warns(UserWarning, match="axes='auto' finds no split arrays"):
        jax.eval_shape(mapped, np.float32(1.0), np.ones(16, np.float32))


def test_a_bound_of_each_device_stays_its_own():
    bounds, norms = np.float32([1, 2, 4, 8, 1, 2, 4, 8]), np.tile(np.float32([0.5, 3.0]), 8)
    (size,) = [length for name, length in AUTO.shape.items() if name == "data"]
    mapped = jax.shard_map(
        lambda bound, norms: per_example.track_quantile(bound[0], norms)[None],
        mesh=AUTO,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    by_device = norms.reshape(size, -1)
    expected = [published(float(b), n) for b, n in zip(bounds[:size], by_device, strict=True)]
    np.testing.assert_allclose(jax.jit(mapped)(bounds[:size], norms), expected, rtol=1e-6)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_norms_spread_over_a_mesh_under_jit(mesh):
    norms, bound = np.logspace(-1, 1, 16, dtype=np.float32), np.float32(1.5)
    spread = put({"n": norms}, {"n": P("data")}, mesh)["n"]
    with jax.set_mesh(mesh):
        assert track(bound, spread, weights=spread) == track(bound, norms)


def test_under_vmap_and_in_a_derivative():
    bounds, norms = np.float32([1.0, 2.0]), np.float32([[0.5, 3.0, 4.0], [0.5, 0.1, 7.0]])
    ours = jax.jit(jax.vmap(per_example.track_quantile))(bounds, norms)
    np.testing.assert_allclose(ours, [published(1.0, norms[0]), published(2.0, norms[1])], rtol=1e-6)
    slope = jax.jit(jax.grad(per_example.track_quantile))(bounds[0], norms[0])
    np.testing.assert_allclose(slope, published(1.0, norms[0]), rtol=1e-6)


def test_noise_on_the_number_of_examples_is_a_factor(rng):
    """As the docstring says it is added."""
    norms, noise = rng.lognormal(size=16), 1.7
    share = (np.sum(norms <= 1.0) + noise) / 16
    ours = float(track(np.float32(1.0), np.float32(norms))) * np.exp(-0.2 * noise / 16)
    assert ours == pytest.approx(np.exp(-0.2 * (share - 0.5)))


WRONG = [
    ({"bound": 0.0}, "bound must be more than 0 and below inf, got 0.0"),
    ({"bound": np.inf}, "bound must be"),
    ({"bound": np.ones(2, np.float32)}, "bound must be one number"),
    ({"quantile": 1.5}, "quantile must be at least 0 and at most 1, got 1.5"),
    ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
    (
        {"norms": np.ones((2, 2), np.float32)},
        r"norms must be a vector of floats, one per example, got float32 of shape \(2, 2\)",
    ),
    ({"norms": np.arange(3, dtype=np.int32)}, "norms must be a vector of floats, one per example, got int32"),
    ({"norms": [1.0, 2.0]}, r"norms must be a vector of floats, one per example, got \[1.0, 2.0\]"),
    (
        {"weights": np.ones(2, np.float32)},
        r"weights must be an array of 3 real numbers, one per example, got float32 of shape",
    ),
    ({"axes": 3}, "axes must be"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        per_example.track_quantile(**({"bound": 1.0, "norms": np.ones(3, np.float32)} | given))
