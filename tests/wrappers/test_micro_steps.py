"""skip_micro_steps: which micro-batches `optax.MultiSteps` leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import norms
from tests.reference.trees import assert_same_bits
from tests.support.meshes import AUTO, P

SHAPES = {"w": (3, 2), "b": (3,), "s": ()}
GLOBAL = norms.global_norm()


def grads(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(scale * rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def with_one(seed, value):
    tree = grads(seed)
    tree["b"][1] = value
    return tree


PARAMS = grads(100)


def accumulate(multi, given):
    """The parameters after these micro-batches, and the last state."""

    @jax.jit
    def step(params, state, each):
        updates, state = multi.update(each, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, jax.jit(multi.init)(PARAMS)
    for each in given:
        params, state = step(params, state, each)
    return params, state


@pytest.mark.xla
@pytest.mark.parametrize("use_grad_mean", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_one_bad_micro_batch_costs_one_micro_batch(value, use_grad_mean):
    def multi(rule):
        return optax.MultiSteps(optax.adam(1e-2), 3, use_grad_mean=use_grad_mean, should_skip_update_fn=rule)

    given = [grads(0), with_one(1, value), *map(grads, range(2, 7)), with_one(7, value), grads(8)]
    good = [each for i, each in enumerate(given) if i not in (1, 7)]
    params, state = accumulate(multi(oc.skip_micro_steps(100.0)), given)
    expected, expected_state = accumulate(multi(oc.skip_micro_steps(100.0)), good)
    assert_same_bits((params, state), (expected, expected_state))
    # And those of optax without any rule.
    alone, alone_state = accumulate(multi(None), good)
    assert_same_bits((params, state._replace(skip_state=())), (alone, alone_state))
    assert (int(state.gradient_step), int(state.mini_step)) == (2, 1)


@functools.cache  # numbers and trees alike share a program
def judging(norm, schedule=None):
    def run(given, bound, step, params):
        if schedule is not None:
            bound = schedule
        rule = oc.skip_micro_steps(norm=norm) if bound is None else oc.skip_micro_steps(bound, norm=norm)
        return rule(given, step, params)

    return jax.jit(run)


def verdict(given, bound=None, *, step=0, params=None, norm=GLOBAL):
    """What the rule says: "" for a good micro-batch, else "norm" or "nonfinite"."""
    run, bound = (judging(norm, bound), None) if callable(bound) else (judging(norm), bound)
    skipped, state = run(given, bound, step, params)
    assert (skipped.dtype, skipped.shape) == (jnp.bool_, ())
    assert bool(state.micro_skipped) == bool(skipped)
    return {(False, False): "", (True, False): "norm", (True, True): "nonfinite"}[
        bool(skipped), bool(state.micro_nonfinite)
    ]


def full(*values, dtype="float32"):
    return [np.full(2, value, jnp.dtype(dtype)) for value in values]


def test_over_the_whole_range():
    assert verdict(full(3e38, -3e38)) == ""
    assert verdict(full(1e25), 2e25) == ""
    assert verdict(full(1e25), 1e25) == "norm"
    assert verdict(full(1e-30), 1e-30) == "norm"
    assert verdict(full(1e-40, 0.0), 0.0) == ""
    assert verdict(full(300.0, dtype="float16"), 500.0) == ""
    assert verdict(full(np.nan, dtype="bfloat16")) == "nonfinite"
    assert verdict(full(complex(1, np.inf), dtype="complex64")) == "nonfinite"
    assert verdict([np.float32(2.0)], 1.0) == "norm"
    for empty in ({}, [], [np.zeros((0, 2), np.float32)]):
        assert verdict(empty, 0.0) == ""
    # What those of optax make of the first.
    assert bool(jax.jit(lambda given: optax.skip_large_updates(given, 0, None, 1e30)[0])(full(1e25)))


def ones(number, dtype="float32"):
    return np.ones(number, dtype)


def test_bounds_of_every_kind():
    # Not traced: a number of Python, of NumPy and of jax.
    for number in (1.0, np.float32(1.0), jnp.float32(1.0)):
        assert bool(oc.skip_micro_steps(number)(full(1.0), 0, None)[0])
        assert not bool(oc.skip_micro_steps(2 * number)(full(1.0), 0, None)[0])
    assert verdict(full(1.0), jnp.float32(2.0)) == ""
    assert verdict(full(1.0), jnp.float32(1.0)) == "norm"
    schedule = lambda step: jnp.where(step < 5, 1.0, 2.0)  # noqa: E731 -- as users write it
    assert verdict(full(1.0), schedule, step=4) == "norm"
    assert verdict(full(1.0), schedule, step=np.int32(5)) == ""
    each = {"norm": norms.leaf_norm()}
    assert verdict({"a": ones(4), "b": ones(9)}, {"a": 2.0, "b": None}, **each) == ""
    assert verdict({"a": ones(4), "b": ones(9)}, {"a": None, "b": 2.0}, **each) == "norm"


def test_only_what_the_norm_measures():
    some = norms.global_norm(include=lambda path: path == "w")
    assert verdict(with_one(0, np.nan), norm=some) == ""
    assert verdict(with_one(0, np.nan) | {"w": np.full((3, 2), np.float32(np.inf))}, norm=some) == "nonfinite"
    mixed = {"float": ones(1), "steps": ones(3, "int32"), "key": jax.random.key(0), "masked": optax.MaskedNode()}
    assert verdict(mixed, 1.0) == ""
    missing = {"w": None, "b": ones(3), "s": np.float32(1.0)}
    assert verdict(missing, 2.0, params=PARAMS) == ""
    assert verdict(missing, 2.0, params=PARAMS, norm=norms.leaf_norm()) == ""
    relative = norms.relative_change(0.5, 0.0)
    assert verdict(ones(2), 1.0, params=np.full(2, np.float32(3)), norm=relative) == ""
    with pytest.raises(ValueError, match="params"):
        verdict(ones(2), 1.0, norm=relative)


def test_a_schedule_counts_gradient_steps():
    rule = oc.skip_micro_steps(lambda step: jnp.where(step < 1, 1e3, 1.0))
    multi = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=rule)
    _, state = accumulate(multi, [grads(i, 10.0) for i in range(5)])
    assert (int(state.gradient_step), int(state.mini_step)) == (1, 0)
    assert bool(state.skip_state.micro_skipped)


def test_all_devices_leave_out_the_same_micro_batches():
    specs = {"rows": P("data", "model"), "whole": P()}
    params = {"rows": np.ones((8, 4), np.float32), "whole": np.ones(2, np.float32)}
    rules = [
        oc.skip_micro_steps(100.0, norm=norm, axes=specs) for norm in (GLOBAL, norms.leaf_norm(), norms.unit_norm("io"))
    ]
    multis = [optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=rule) for rule in rules]
    states = jax.jit(lambda params: [multi.init(params) for multi in multis])(params)
    state_specs = [jax.tree.map(lambda _: P(), state)._replace(acc_grads=specs) for state in states]
    out_specs = [(specs, each) for each in state_specs]

    @jax.jit
    @functools.partial(jax.shard_map, mesh=AUTO, in_specs=(specs, state_specs, specs), out_specs=out_specs)
    def step(grads, states, params):
        return [multi.update(grads, state, params) for multi, state in zip(multis, states, strict=True)]

    def with_one(value):
        rows = params["rows"].copy()
        rows[7, 3] = value  # on the last device
        return params | {"rows": rows}

    for each in (params, with_one(np.nan), with_one(1e6), with_one(np.inf), with_one(3.0)):
        found = step(each, states, params)
        states = [state for _, state in found]
        for state in states:
            assert len({int(piece.data) for piece in state.mini_step.addressable_shards}) == 1
    for updates, state in found:
        assert int(state.gradient_step) == 1
        np.testing.assert_array_equal(updates["rows"][7], [-1, -1, -1, -2])


def test_around_or_inside():
    """`skip_nonfinite` around gives the same, and counts."""
    given = [grads(0), with_one(1, np.nan), *map(grads, range(2, 6))]
    inside = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=oc.skip_micro_steps())
    outside = oc.skip_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    found, _ = accumulate(inside, given)
    expected, state = accumulate(outside, given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    assert oc.clip_stats(state)["skipped_nonfinite"] == 1


@pytest.mark.parametrize("given", [{"max_norm": -1.0}, {"max_norm": np.nan}, {"norm": 2}, {"axes": 3}], ids=str)
def test_an_argument_that_is_something_else_is_named(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"^{name} "):
        oc.skip_micro_steps(**given)
