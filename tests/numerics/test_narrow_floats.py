"""8-bit and 4-bit floats: every number that they have, and what acts on values, on examples or on a state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib
from tests.reference.trees import assert_same_bits, update
from tests.support.driving import together
from tests.support.public import public
from tests.table import NARROW, REFUSED

BOUNDS = [0.0, 2.0**-6, 0.3, 1.0, 1.7, 6.0, 100.0, 1e6, np.inf]


def every_number(dtype):
    """All that a dtype holds, from its bits."""
    return np.arange(2 ** jnp.finfo(dtype).bits, dtype=np.uint8).view(dtype)


def wide(x):
    return np.asarray(x).astype(np.float64)


def rounded(bound, dtype):
    """The bound as a number of `dtype`: at most its largest, unless it is infinite."""
    most = float(jnp.finfo(dtype).max)
    return bound if np.isinf(bound) else float(np.asarray(np.clip(bound, -most, most)).astype(dtype))


TREE = jax.device_put({str(dtype): every_number(dtype) for dtype in NARROW})


@jax.jit
def clipped_values(bound):
    state = oc.clip(1.0).init(None)
    clips = {
        "both": oc.clip(bound),
        "above": oc.clip_by_value(max_value=bound),
        "below": oc.clip_by_value(min_value=bound),
        "around": oc.clip_by_value(-bound, bound),
    }
    return {name: tx.update(TREE, state)[0] for name, tx in clips.items()}


@pytest.mark.xla
@pytest.mark.parametrize("bound", BOUNDS)
def test_value_clips_of_every_number(bound):
    found = clipped_values(bound)
    for dtype in NARROW:
        numbers, high = wide(every_number(dtype)), rounded(bound, dtype)
        right = {
            "both": np.clip(numbers, -high, high),
            "above": np.minimum(numbers, high),
            "below": np.maximum(numbers, min(high, float(jnp.finfo(dtype).max))),
            "around": np.clip(numbers, -high, high),
        }
        for name, expected in right.items():
            np.testing.assert_array_equal(wide(found[name][str(dtype)]), expected, err_msg=f"{name}, {dtype}")


@pytest.mark.xla
def test_value_clips_are_the_same_outside_jit():
    for name, expected in clipped_values(1.7).items():
        tx = {"below": oc.clip_by_value(1.7), "above": oc.clip_by_value(max_value=1.7)}.get(name, oc.clip(1.7))
        assert_same_bits(update(tx, TREE), expected)


@pytest.mark.xla
def test_a_bound_that_is_no_number_bounds_nothing():
    found = clipped_values(np.nan)["both"]
    for dtype in NARROW:
        np.testing.assert_array_equal(wide(found[str(dtype)]), wide(every_number(dtype)))


def test_finite_numbers_stay_finite_under_ends_past_the_largest_of_a_16_bit_dtype():
    for dtype in (jnp.float16, jnp.bfloat16):
        updates = jnp.asarray(np.array([1.0, -2.0, 65504.0]).astype(dtype))
        most = float(jnp.finfo(dtype).max)
        for end in (1e6, 3.4e38):
            bounded = float(np.float32(min(end, most)).astype(dtype))
            np.testing.assert_array_equal(
                wide(update(oc.clip_by_value(end), updates)), np.maximum(wide(updates), bounded)
            )


@pytest.mark.xla
@pytest.mark.parametrize("tx", [oc.clip_by_global_norm(np.inf), oc.zero_nonfinite()], ids=["norm", "zero_nonfinite"])
def test_numbers_that_are_not_touched_keep_every_bit(tx):
    finite = {name: x[np.isfinite(wide(x))] for name, x in TREE.items()}
    assert_same_bits(jax.jit(lambda tree: update(tx, tree))(finite), finite)


@pytest.mark.xla
def test_zero_nonfinite_leaves_the_finite_numbers():
    for name, x in update(oc.zero_nonfinite(), TREE).items():
        np.testing.assert_array_equal(wide(x), np.where(np.isfinite(wide(TREE[name])), wide(TREE[name]), 0))


# What has a state per coordinate.

WITH_STATE = {
    "scale_by_stable_adam": lambda dtype: contrib.scale_by_stable_adam(0.9, 0.999, state_dtype=dtype),
    "scale_by_acclip": lambda dtype: contrib.scale_by_acclip(state_dtype=dtype),
    "clipped_momentum": lambda dtype: oc.clipped_momentum(1e3, state_dtype=dtype),
    "mixed_clip": lambda dtype: contrib.mixed_clip(1e3, state_dtype=dtype),
    "centered_clip": lambda dtype: contrib.centered_clip(1e3, state_dtype=dtype),
    "spam_clip": lambda dtype: contrib.spam_clip(4.0, decay=0.5, warmup_steps=1, state_dtype=dtype),
    "with_carry": lambda dtype: oc.with_carry(oc.clip(1.0), state_dtype=dtype),
}


@pytest.mark.parametrize("name", WITH_STATE)
def test_an_average_of_narrow_floats_is_float32_unless_said_otherwise(name):
    params = {str(dtype): jax.ShapeDtypeStruct((2,), dtype) for dtype in NARROW}
    state = jax.eval_shape(WITH_STATE[name](None).init, params)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_a_state_of_16_bits_stays_finite():
    """Gradients past its range, and so small that one of two averages rounds to 0 and not the other."""
    tx = together({name: make(jnp.float16) for name, make in WITH_STATE.items()})
    params = {"wide": np.ones(3, np.float32), "narrow": np.ones(3).astype(jnp.float8_e4m3fn)}
    step, state = jax.jit(tx.update), tx.init(params)
    for size in (0.0195, 0.0, 1e8, 0.0, 1e-3):
        g = {
            "wide": np.full(3, size, np.float32),
            "narrow": np.full(3, min(size, 448.0), np.float32).astype(jnp.float8_e4m3fn),
        }
        out, state = step(g, state, params)
        for name in WITH_STATE:
            assert all(np.all(np.isfinite(wide(x))) for x in jax.tree.leaves((out[name], state[name]))), (name, size)


@pytest.mark.parametrize("dtype", [*NARROW, *REFUSED], ids=str)
@pytest.mark.parametrize("name", WITH_STATE)
def test_a_state_of_fewer_than_16_bits_is_refused(name, dtype):
    with pytest.raises(ValueError, match=r"state_dtype must be .*16 bits"):
        WITH_STATE[name](dtype)


def test_a_state_beside_complex_parameters_is_complex_whatever_its_dtype():
    state = oc.clipped_momentum(1.0, state_dtype=jnp.float16).init(jnp.ones(2, jnp.complex64))
    assert state.clipped_average.dtype == jnp.complex64


# Examples and cotangents.


def test_sums_of_examples():
    @jax.jit
    def sums(examples, bound):
        return {name: oc.per_example_global_norm_clip(grads, bound) for name, grads in examples.items()}

    numbers = np.array([[3.0, 4.0], [0.5, -1.0], [6.0, 0.0]])
    ordinary = {str(dtype): numbers.astype(dtype) for dtype in NARROW}
    most = {str(dtype): np.full((3, 2), float(jnp.finfo(dtype).max)).astype(dtype) for dtype in NARROW}
    for name, (total, clipped) in sums(ordinary, 2.0).items():
        grads = ordinary[name]
        shares = wide(grads) * np.minimum(1, 2 / np.linalg.norm(wide(grads), axis=1, keepdims=True))
        assert total.dtype == grads.dtype
        np.testing.assert_array_equal(wide(total), wide(shares.sum(axis=0).astype(grads.dtype)), err_msg=name)
        assert int(clipped) == 2, name
    for name, (total, _) in sums(most, np.inf).items():
        np.testing.assert_array_equal(wide(total), wide(most[name][0]), err_msg=name)


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
def test_examples_and_trees_that_hold_no_gradient_are_refused(dtype):
    grads = {"a": jax.ShapeDtypeStruct((2, 3), dtype)}
    for fun in (
        lambda g: oc.per_example_global_norm_clip(g, 1.0),
        lambda g: oc.per_example_layer_norm_clip(g, 1.0),
        oc.global_norm,
    ):
        with pytest.raises(ValueError, match=f"'a' is {dtype}, .*cast the gradients"):
            jax.eval_shape(fun, grads)


@pytest.mark.parametrize("tx", [oc.clip(1.0), oc.clip_by_global_norm(1.0)], ids=["clip", "norm"])
def test_cotangents(tx):
    @jax.jit
    @jax.grad
    def cotangents(xs, weights):
        return sum(jnp.sum(oc.clip_cotangents(x, tx).astype(jnp.float32) * weights) for x in xs)

    weights = np.full(2, 3, np.float32)
    given = [np.ones(2).astype(dtype) for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)]
    right = np.asarray(jax.jit(oc.as_function(tx))(weights))
    for found, x in zip(cotangents(given, weights), given, strict=True):
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(wide(found), wide(right.astype(x.dtype)))


# Hyperparameters: `optax.inject_hyperparams` casts what it injects to the dtype of the parameters.

FACTORIES = {
    "scale_by_adaptive_norm": ("record",),
    "scale_by_acclip": ("alpha",),
    "scale_by_stable_adam": (),
    "spam_clip": ("warmup_steps",),
    "adaptive_spike_clip": ("record",),
    "autoclip": ("warmup_steps", "record"),
    "percentile_clip": ("window", "record"),
    "clip_by_tracked_quantile": ("record",),
    "zclip": ("warmup_steps", "patience", "record"),
    "adagc": ("warmup_steps", "record"),
    "clip_by_history": ("window", "warmup_steps", "record"),
    "clip_norm_growth": ("record",),
    "clippy": ("record",),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_hyperparameters_of_narrow_models_are_widened(name):
    tx = optax.inject_hyperparams(public(name), static_args=FACTORIES[name])()
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
        params = {"a": jnp.ones((2, 3), dtype)}
        updates, _ = jax.eval_shape(lambda g, tx=tx: tx.update(g, tx.init(g), g), params)
        assert updates["a"].dtype == dtype


def test_a_percentile_of_a_narrow_dtype_is_that_percentile():
    """In float16 95 * 1000 is inf, and in int8 it wraps around."""
    norms = np.float32([*np.arange(1.0, 1000.0), 1e4])

    def last(percentile):
        tx = contrib.percentile_clip(percentile, window=1000)
        step = lambda state, norm: tx.update(norm[None], state)[::-1]  # noqa: E731
        return jax.lax.scan(step, tx.init(norms[:1]), norms)[1][-1, 0]

    percentiles = [np.asarray(95).astype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.int8, jnp.float32)]
    found = jax.jit(lambda percentiles: list(map(last, percentiles)))(percentiles)
    assert list(map(float, found)) == [951.0] * 4


def test_a_decay_that_rounds_to_1_still_lets_the_average_move():
    """0.999 is 1 in bfloat16."""
    tx = contrib.adaptive_spike_clip(jnp.asarray(np.asarray(0.999).astype(jnp.bfloat16)))
    state, step = tx.init(np.zeros(1, np.float32)), jax.jit(tx.update)
    for grad in np.float32([1.0, 2.0, 3.0, 100.0]):
        updates, state = step(grad[None], state)
    assert float(updates[0]) == pytest.approx(26.5, rel=0.02)
