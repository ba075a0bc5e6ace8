"""Per-example clipping on eight devices: in `shard_map`, and under `jit` with a batch that is spread over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import per_example
from optaxclip._arrays import layouts
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, EXPLICIT, P, put

B, BOUND = 16, 1.0
FORMS = {"one pass": optax.chain(oc.clip_by_global_norm(BOUND)), "two passes": oc.clip_by_global_norm(BOUND)}
two_passes = pytest.mark.parametrize("form", slow_but(FORMS, "two passes"))
OPTIONS = {"has_aux": True, "return_norms": True}


def loss(params, example):
    hidden = jnp.tanh(params["w"] @ example["x"] + params["b"])
    return 1.0 + jnp.sum(hidden * example["y"]) ** 2, hidden


def trees(rng):
    params = {"w": rng.normal(size=(4, 6)) / 4, "b": rng.normal(size=4)}
    batch = {"x": rng.normal(size=(B, 6)) + 1.0, "y": rng.normal(size=(B, 4)) * np.logspace(-2, 2, B)[:, None]}
    return jax.tree.map(np.float32, (params, batch))


@functools.cache
def step_of(form, **options):
    """The jitted step with all that it returns: one for all tests that ask for the same."""
    return jax.jit(per_example.clipped_value_and_grad(loss, FORMS[form], **OPTIONS, **options))


def averaged(form, params, batch):
    """Value and gradients on one device."""
    (value, _), grads, _ = jax.device_get(step_of(form)(params, batch))
    return value, grads


def assert_same(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=2e-6 * np.nanmax(np.abs(other)))


RESULT = ((P(), P("data")), P(), P("data"))  # value and aux, gradients, norms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("microbatch_size", slow_but([None, 3], 3))
def test_shard_map_gives_what_one_device_does(rng, form, microbatch_size):
    options = {"reduce": "sum"} if microbatch_size is None else {}
    params, batch = trees(rng)
    batch["x"][5] = np.nan
    step = per_example.clipped_value_and_grad(loss, FORMS[form], microbatch_size=microbatch_size, **OPTIONS, **options)
    sharded = jax.shard_map(step, mesh=AUTO, in_specs=(P(), P("data")), out_specs=RESULT)
    assert_same(jax.jit(sharded)(params, batch), step_of(form, **options)(params, batch))


@pytest.mark.parametrize("name", ["two passes", "leaves"])  # the latter take one pass
def test_one_example_removed_changes_the_sum_by_at_most_the_bound(rng, name):
    params, batch = trees(rng)
    tx, bound = (FORMS | {"leaves": oc.clip_by_leaf_norm(BOUND)})[name], BOUND * (2**0.5 if name == "leaves" else 1)
    step = per_example.clipped_value_and_grad(lambda *args: loss(*args)[0], tx, reduce="sum")
    step = jax.jit(jax.shard_map(step, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P()))
    _, whole = step(params, batch)
    moved = []
    for i in range(B):
        counted = (np.arange(B) != i)[:, None]
        _, rest = step(params, batch | {"x": np.where(counted, batch["x"], np.float32(np.nan))})
        difference = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), whole, rest)
        moved.append(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(difference))))
    assert max(moved) <= bound * (1 + 1e-5)
    assert sum(each > 0.99 * BOUND for each in moved) > 4


@pytest.mark.xla
def test_the_trap(rng):
    """What a user would write clips sums over the devices: one example can move far more than its bound."""
    params, batch = trees(rng)
    clip = oc.as_function(oc.clip_by_global_norm(BOUND, axes=None))
    grad = jax.grad(lambda *args: loss(*args)[0])

    def by_hand(cast, params, batch):
        params = jax.tree.map(lambda leaf: layouts.varying_over(leaf, ("data",) if cast else ()), params)
        clipped = jax.vmap(lambda example: clip(grad(params, example)))(batch)
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), clipped)
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, "data"), total) if cast else total

    def run(cast):
        wrong = functools.partial(by_hand, cast)
        return jax.jit(jax.shard_map(wrong, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P()))(params, batch)

    right = jax.tree.map(lambda leaf: leaf * B, averaged("two passes", params, batch)[1])
    assert_same(run(cast=True), right)
    with pytest.raises(AssertionError):
        assert_same(run(cast=False), right)


def test_examples_that_are_spread_over_devices_themselves(rng):
    """Each example is split over `model`, and the function adds up the shares: gradients are whole, not shares."""
    params, batch = trees(rng)

    def shared(params, example):
        hidden = jax.lax.psum(params["w"] @ example["x"], "model")
        return 1.0 + jnp.sum(jnp.tanh(hidden + params["b"]) * example["y"]) ** 2

    specs = {"w": P(None, "model"), "b": P()}
    rows = {"x": P("data", "model"), "y": P("data")}
    expected = averaged("one pass", params, batch)
    for tx in FORMS.values():
        step = per_example.clipped_value_and_grad(shared, tx)
        sharded = jax.shard_map(step, mesh=AUTO, in_specs=(specs, rows), out_specs=(P(), specs))
        assert_same(jax.jit(sharded)(params, batch), expected)


def test_a_bad_share_leaves_the_example_out_on_every_device(rng):
    """A clip by leaf norms leaves the other shares of a gradient finite."""

    def own(params, example):
        return jax.lax.psum(jnp.vdot(params, example), "model")

    rows = np.float32(rng.normal(size=(8, 4)))
    rows[3, 3] = np.nan
    step = per_example.clipped_value_and_grad(own, oc.clip(10.0), reduce="sum")
    sharded = jax.shard_map(step, mesh=AUTO, in_specs=(P("model"), P("data", "model")), out_specs=(P(), P("model")))
    _, grads = jax.jit(sharded)(np.ones(4, np.float32), rows)
    np.testing.assert_allclose(grads, np.delete(rows, 3, axis=0).sum(0), rtol=1e-5)


def test_parameters_of_each_device_have_gradients_of_each_device(rng):
    params, batch = trees(rng)
    several = jax.tree.map(lambda leaf: np.stack([leaf * (1 + i) for i in range(4)]), params)

    def local(params, batch):
        own = jax.tree.map(lambda leaf: leaf[0], params)
        _, grads = per_example.clipped_value_and_grad(loss, FORMS["two passes"], has_aux=True, reduce="sum")(own, batch)
        return jax.tree.map(lambda leaf: leaf[None], grads)

    grads = jax.jit(jax.shard_map(local, mesh=AUTO, in_specs=P("data"), out_specs=P("data")))(several, batch)
    for i in range(4):
        own = np.arange(B) // 4 == i  # what is not finite counts nothing, so that one program does for all devices
        rows = batch | {"x": np.where(own[:, None], batch["x"], np.float32(np.nan))}
        _, expected = averaged("two passes", jax.tree.map(lambda leaf, i=i: leaf[i], several), rows)
        assert_same(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i] / B, grads), expected)


def test_without_tracking_each_device_is_left_to_itself(rng):
    params, batch = trees(rng)
    tx = oc.clip_by_global_norm(BOUND, axes=None)

    def step(params, batch):
        _, grads = per_example.clipped_value_and_grad(loss, tx, has_aux=True)(params, batch)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), grads)

    sharded = jax.shard_map(step, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    assert_same(jax.jit(sharded)(params, batch), averaged("two passes", params, batch)[1])


@two_passes
@pytest.mark.parametrize("bad", slow_but([False, True], True), ids=["ordinary", "bad"])
def test_under_jit_with_a_batch_spread_over_an_explicit_mesh(rng, form, bad):
    if form == "one pass" and jax.__version_info__ < (0, 9):
        pytest.skip("jax 0.8 has no rule for a branch under vmap on an Explicit mesh")
    params, batch = trees(rng)
    if bad:
        batch["x"][3] = np.nan
    step = step_of(form)
    expected = step(params, batch)
    laid_out = put((params, batch), ({name: P() for name in params}, {"x": P("data"), "y": P("data")}), EXPLICIT)
    with jax.set_mesh(EXPLICIT):
        found = step(*laid_out)
    assert_same(found, expected)


def test_under_jit_with_parameters_and_a_batch_spread_over_an_auto_mesh(rng):
    params, batch = trees(rng)
    batch["x"][3] = np.nan
    specs = {"w": P("model", None), "b": P("model")}
    laid_out = put((params, batch), (specs, {"x": P("data"), "y": P("data")}), AUTO)
    for form in FORMS:
        step = step_of(form)
        assert_same(step(*laid_out), step(params, batch))


@two_passes
def test_microbatches_of_a_batch_spread_over_an_auto_mesh(rng, form):
    params, batch = trees(rng)
    laid_out = put((params, batch), ({name: P() for name in params}, {"x": P("data"), "y": P("data")}), AUTO)
    assert_same(step_of(form, microbatch_size=8)(*laid_out), step_of(form)(params, batch))
