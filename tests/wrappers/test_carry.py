"""with_carry: what a clipper takes away is given back, and no bound is broken on the way."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import thresholds
from tests.reference.trees import assert_same_bits, normal, stack
from tests.support.marks import slow_but

SHAPES = {"w": (3, 2), "b": (3,), "s": ()}
INNERS = {
    "clip": lambda: oc.clip(0.5),
    "clip_by_value": lambda: oc.clip_by_value(-0.25, 0.5),
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(1.0),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm(0.5),
    "zclip": lambda: oc.zclip(warmup_steps=3, max_norm=1.0),
    "chain": lambda: optax.chain(oc.clip_by_leaf_norm(0.7), oc.clip_by_global_norm(1.0)),
}


def tree(rng, dtype="float32", scale=1.0):
    return {name: normal(rng, shape, jnp.dtype(dtype), scale) for name, shape in SHAPES.items()}


def wide(leaf):
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if leaf.dtype.kind == "c" else np.float64)


def drive(tx, given):
    """Updates and states of all steps, stacked, and the last state; in one scan."""

    def step(state, grads):
        out, state = tx.update(grads, state)
        return state, (out, state)

    state, (outs, states) = jax.jit(lambda stacked: jax.lax.scan(step, tx.init(given[0]), stacked))(stack(given))
    return outs, states, state


@pytest.mark.parametrize("name", slow_but(INNERS, "clip", "chain"))
def test_updates_and_carry_sum_to_the_gradients(rng, name):
    scales = rng.lognormal(0.0, 1.5, 200)
    given = [tree(rng, scale=scale) for scale in scales]
    outs, _, state = drive(oc.with_carry(INNERS[name]()), given)
    for key in SHAPES:
        rows = np.stack([wide(grads[key]) for grads in given])
        size = np.abs(rows).sum(0)  # rounding is relative to what was carried at its largest
        total = wide(outs[key]).sum(0) + wide(state.carry[key])
        assert np.all(np.abs(total - rows.sum(0)) <= 200 * 1.2e-7 * size)
    assert any(np.any(np.abs(wide(leaf)) > 0.5) for leaf in jax.tree.leaves(state.carry))


def test_every_step_as_transcribed(rng):
    """u = clip(g + c), c <- g + c - u, in float64."""
    given = np.float32(rng.standard_normal((300, 4)) * rng.lognormal(0.0, 1.0, (300, 1)))
    outs, states, _ = drive(oc.with_carry(oc.clip_by_global_norm(1.0)), list(given))
    carry = np.zeros(4)
    for number, grads in enumerate(given.astype(np.float64)):
        total = grads + carry
        expected = total / max(1.0, np.linalg.norm(total))
        carry = total - expected
        np.testing.assert_allclose(outs[number], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(states.carry[number], carry, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16", "float16", "complex64"], "bfloat16"))
@pytest.mark.parametrize("name", slow_but(["clip", "clip_by_global_norm", "clip_by_leaf_norm"], "clip_by_global_norm"))
def test_the_bound_of_inner_is_kept(rng, name, dtype):
    given = [tree(rng, dtype, scale) for scale in (0.1, 30.0, 0.1, 0.1, 3.0, 0.1)]
    outs, states, _ = drive(oc.with_carry(INNERS[name]()), given)
    within = 1 + (1e-6 if dtype in {"float32", "complex64"} else 4 * float(jnp.finfo(dtype).eps))
    for i in range(len(given)):
        leaves = [wide(outs[key][i]).ravel() for key in SHAPES]
        bound, sizes = {
            "clip": (0.5, np.abs(np.concatenate(leaves))),
            "clip_by_global_norm": (1.0, np.linalg.norm(np.concatenate(leaves))),
            "clip_by_leaf_norm": (0.5, [np.linalg.norm(leaf) for leaf in leaves]),
        }[name]
        assert np.max(sizes) <= bound * within
        # While there is much to be given back the bound is reached.
        assert i == 0 or np.max(sizes) >= bound * (2 - within) * 0.99
    assert {leaf.dtype for leaf in jax.tree.leaves((outs, states.carry))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("gradient", slow_but(["bfloat16", "float16", "float32"], "bfloat16"))
def test_a_wide_carry_keeps_what_16_bits_lose(rng, gradient):
    given = [tree(rng, gradient, 3.0 if i % 10 == 0 else 0.01) for i in range(200)]
    tx = oc.with_carry(oc.clip_by_global_norm(0.5), state_dtype=jnp.float32)
    outs, _, state = drive(tx, given)
    assert {leaf.dtype for leaf in jax.tree.leaves(outs)} == {jnp.dtype(gradient)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.carry)} == {jnp.dtype("float32")}
    for key in SHAPES:
        total = wide(outs[key]).sum(0) + wide(state.carry[key])
        expected = np.stack([wide(grads[key]) for grads in given]).sum(0)
        np.testing.assert_allclose(total, expected, atol=200 * 1.2e-7 * 30)


@pytest.mark.parametrize("state_dtype", [None, jnp.float32])
def test_the_carry_of_complex_parameters_is_complex(rng, state_dtype):
    given = [tree(rng, "complex64", scale) for scale in (5.0, 0.1, 0.1)]
    outs, _, state = drive(oc.with_carry(oc.clip(0.5), state_dtype=state_dtype), given)
    for key in SHAPES:
        total = wide(outs[key]).sum(0) + wide(state.carry[key])
        np.testing.assert_allclose(total, np.stack([wide(grads[key]) for grads in given]).sum(0), rtol=1e-5)
    assert any(np.any(wide(leaf).imag != 0) for leaf in jax.tree.leaves(state.carry))


# What is not finite, and what is nearly so.


@pytest.mark.parametrize("name", slow_but(["clip", "clip_by_leaf_norm", "zclip"], "clip_by_leaf_norm"))
def test_a_gradient_that_is_not_finite_never_enters_the_carry(rng, name):
    inner, tx = INNERS[name](), oc.with_carry(INNERS[name]())
    step, step_alone = jax.jit(tx.update), jax.jit(inner.update)
    _, state = step(tree(rng, scale=10.0), tx.init(tree(rng)))
    for value in (np.nan, np.inf, -np.inf):
        grads = tree(rng, scale=0.1)
        grads["w"][1, 0] = value
        out, after = step(grads, state)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after.carry))
        assert float(after.carry["w"][1, 0]) == float(state.carry["w"][1, 0]) != 0
        total = jax.tree.map(lambda g, c: g + np.asarray(c), grads, state.carry)
        alone, _ = step_alone(total, state.inner_state)
        np.testing.assert_array_equal(out["w"][1, 0], alone["w"][1, 0])
        # All the others balance.
        for key in SHAPES:
            given, carried = wide(out[key]) + wide(after.carry[key]), wide(total[key])
            here = np.isfinite(carried)
            np.testing.assert_allclose(given[here], carried[here], atol=1e-5)


def test_inside_skip_nonfinite_the_whole_carry_stays(rng):
    tx = oc.skip_nonfinite(optax.chain(oc.with_carry(oc.clip_by_global_norm(1.0)), optax.sgd(0.1)))
    state, update = tx.init(tree(rng)), jax.jit(tx.update)
    _, state = update(tree(rng, scale=10.0), state)
    bad = tree(rng) | {"s": np.float32(np.nan)}
    out, after = update(bad, state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(out))
    assert_same_bits(after.inner_state, state.inner_state)


@pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16", "float16", "complex64"], "float32"))
@pytest.mark.parametrize("name", slow_but(INNERS, "clip_by_global_norm"))
def test_finite_gradients_at_the_end_of_the_range_stay_finite(name, dtype):
    if dtype == "complex64" and name == "clip_by_value":
        pytest.skip("a modulus has no negative lower end")
    largest = float(jnp.finfo(dtype).max)
    tx = oc.with_carry(INNERS[name](), state_dtype=None)
    signs = [1, 1, 1, -1, -1, -1, -1, 1, 0, 0]
    one = largest * (1 + 1j) if dtype == "complex64" else largest
    given = [{key: np.full(shape, sign * one, jnp.dtype(dtype)) for key, shape in SHAPES.items()} for sign in signs]
    outs, states, _ = drive(tx, given)
    for leaf in jax.tree.leaves((outs, states)):
        assert np.all(np.isfinite(wide(leaf)))


# Gradients and leaves of every kind.


def floats(*values):
    return np.array(values, np.float32)


def test_a_missing_gradient_keeps_its_carry_and_counts_for_nothing():
    tx = oc.with_carry(oc.clip_by_global_norm(1.0))
    weights = {"a": floats(1), "b": {"c": floats(1), "d": floats(1, 1)}}
    state, step = tx.init(weights), jax.jit(tx.update)
    _, state = step({"a": floats(0), "b": {"c": floats(60), "d": floats(80, 0)}}, state, weights)
    for missing in ({"a": floats(0.5), "b": None}, {"a": floats(0.5), "b": {"c": None, "d": None}}):
        for given in (weights, None):
            out, after = step(missing, state, given)
            assert jax.tree.structure(out) == jax.tree.structure(missing)
            # As if its gradient, and what it has to give back, were 0.
            np.testing.assert_allclose(out["a"], [0.5], rtol=1e-6)
            assert_same_bits(after.carry["b"], state.carry["b"])
    out, _ = step({"a": floats(0), "b": {"c": floats(0), "d": floats(0, 0)}}, after, weights)
    np.testing.assert_allclose(out["b"]["c"], [0.6], rtol=1e-5)


def test_what_a_clip_makes_of_a_missing_gradient_is_not_taken_from_its_carry():
    tx = oc.with_carry(oc.clip_by_value(0.5, 1.0))  # 0 becomes 0.5
    step = jax.jit(tx.update)
    _, state = step([floats(3)], tx.init([floats(1)]))
    out, state = step([None], state)
    assert out == [None]
    np.testing.assert_array_equal(state.carry[0], [2.0])


def test_leaves_of_other_kinds_pass():
    given = {
        "w": floats(3), "steps": np.arange(3, dtype=np.int32), "flag": jnp.asarray(True), "masked": optax.MaskedNode(),
        "no_gradient": np.zeros(2, jax.dtypes.float0), "key": jax.random.key(0), "empty": np.zeros((0, 2), np.float32),
    }  # fmt: skip
    tx = oc.with_carry(oc.clip(1.0))
    state = tx.init(given)
    for _ in range(2):
        out, after = tx.update(given, state, given)
        chex.assert_trees_all_equal_structs(after, state)
        assert (out["key"], out["masked"]) == (given["key"], optax.MaskedNode())
        np.testing.assert_array_equal(out["steps"], given["steps"])
        assert out["no_gradient"].dtype == jax.dtypes.float0
        state = after
    np.testing.assert_array_equal(state.carry["w"], [4.0])


# In company.


def test_a_chain_in_a_donated_scan_equals_a_loop(rng):
    tx = optax.chain(oc.with_carry(oc.clip_by_global_norm(1.0)), optax.sgd(0.1, momentum=0.9))
    given = [tree(rng, scale=scale) for scale in (0.1, 9.0, 0.1, 0.1)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(state, stacked):
        return jax.lax.scan(lambda state, grads: tx.update(grads, state)[::-1], state, stacked)

    state, outs = run(jax.jit(tx.init)(given[0]), stack(given))
    step, expected_state, expected = jax.jit(tx.update), tx.init(given[0]), []
    for grads in given:
        out, expected_state = step(grads, expected_state)
        expected.append(out)
    chex.assert_trees_all_close(outs, stack(expected), rtol=1e-6)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6)


def test_around_what_clips_nothing_nothing_is_carried(rng):
    given = [tree(rng) for _ in range(3)]
    outs, states, _ = drive(oc.with_carry(oc.clip(1e6)), given)
    for key in SHAPES:
        np.testing.assert_array_equal(outs[key], np.stack([grads[key] for grads in given]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(states.carry))


def test_around_a_clipper_with_state_and_extra_arguments(rng):
    seen = []

    def update(updates, state, params=None, *, factor):
        del params
        seen.append(factor)
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    tx = oc.with_carry(optax.GradientTransformationExtraArgs(lambda _: (), update))
    grads = tree(rng)
    out, state = jax.jit(functools.partial(tx.update, factor=0.25))(grads, tx.init(grads))
    assert seen == [0.25]
    chex.assert_trees_all_close(state.carry, jax.tree.map(lambda leaf: 0.75 * leaf, grads), rtol=1e-6)
    scheduled = oc.with_carry(oc.clip_by(oc.norms.leaf_norm(), thresholds.constant(lambda step: 1.0 / (1.0 + step))))
    state, step = scheduled.init({"w": floats(0)}), jax.jit(scheduled.update)
    for expected in (1.0, 0.5, 1 / 3):
        out, state = step({"w": floats(9)}, state)
        np.testing.assert_allclose(out["w"], [expected], rtol=1e-6)


# What it is for.


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.5, 2.0, 5.0])
def test_clipped_gradient_descent_is_biased_and_with_carry_it_is_not(bound):
    """f = x^2 / 2, noise of 9 with probability 0.1 and -1 otherwise, learning rate 1e-3.

    Without a carry x settles where 0.1 c = 0.9 (1 - x): at 1 - c / 9.
    """
    steps, runs = 40_000, 64

    def settled(tx):
        tx = optax.chain(tx, optax.sgd(1e-3))

        def step(carry, key):
            x, state, total = carry
            noise = jnp.where(jax.random.bernoulli(key[1], 0.1, (runs,)), 9.0, -1.0)
            out, state = tx.update(x + noise, state)
            x = x + out
            return (x, state, total + jnp.where(key[0] >= steps // 2, x, 0.0)), None

        first = (jnp.zeros(runs), tx.init(jnp.zeros(runs)), jnp.zeros(runs))
        keys = (jnp.arange(steps), jax.random.split(jax.random.key(0), steps))
        (_, _, total), _ = jax.lax.scan(step, first, keys)
        return total / (steps - steps // 2)

    plain = np.asarray(jax.jit(lambda: settled(oc.clip(bound)))())
    carried = np.asarray(jax.jit(lambda: settled(oc.with_carry(oc.clip(bound))))())
    # Of 64 runs: the mean, and how far it is off.
    for found, expected in ((plain, 1 - bound / 9), (carried, 0.0)):
        assert np.mean(found) == pytest.approx(expected, abs=max(0.02, 4 * np.std(found) / np.sqrt(runs)))
    assert np.mean(plain) > 10 * abs(np.mean(carried))
