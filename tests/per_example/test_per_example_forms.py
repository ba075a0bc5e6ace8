"""Where a weighted loss would not do: functions whose gradients can't be weighted, and weights too far apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from tests.reference.examples import one_by_one

W = np.ones((8, 8), np.float32)


def summed(fun, tx, *batch, w=W):
    step = oc.per_example.clipped_value_and_grad(
        fun, tx, batch_argnums=tuple(range(1, 1 + len(batch))), reduce="sum", return_norms=True
    )
    _, grads, norms = jax.jit(step)(w, *batch)
    return np.asarray(grads, np.float64), np.asarray(norms, np.float64)


def by_hand(fun, bound, *batch, w=W):
    """The sum of the clipped gradients, and the norms."""
    _, clipped, norms = one_by_one(lambda w, rows: fun(w, *rows), w, batch, bound)
    return clipped, norms


@jax.custom_vjp
def signed(x):
    return x


signed.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.sign(cotangent),))

BACKWARD = {
    "a clip": lambda h: oc.clip_cotangents(h, oc.clip_by_global_norm(1.0)),
    "a clip in a jit": jax.jit(lambda h: oc.clip_cotangents(h, oc.clip_by_global_norm(1.0))),
    "a clip in a scan": lambda h: jax.lax.scan(
        lambda h, _: (oc.clip_cotangents(h, oc.clip_by_global_norm(1.0)), None), h, None, length=2
    )[0],
    "signs": signed,
}


@pytest.mark.parametrize("name", BACKWARD)
def test_a_backward_pass_that_is_not_linear(name):
    def loss(w, x):
        return 50 * jnp.sum(BACKWARD[name](w @ x))

    x = np.float32([[0.01] * 8, [10.0] * 8])
    expected, right = by_hand(loss, 1.0, x)
    found, norms = summed(loss, oc.clip_by_global_norm(1.0), x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(norms, right, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")  # jax 0.8
def test_real_weights_of_complex_activations(rng):
    def loss(w, x):
        return jnp.sum(jnp.abs(w @ x) ** 2)

    x = rng.normal(size=(3, 8, 2)).astype(np.float32)
    x = x[..., 0] + 1j * x[..., 1]
    expected, right = by_hand(loss, 1.0, x)
    found, norms = summed(loss, oc.clip_by_global_norm(1.0), x)
    np.testing.assert_allclose(norms, right, rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_float16_weights_of_a_float32_value(rng):
    def loss(w, x, s):
        return s * jnp.sum(jnp.sin((w @ x.astype(w.dtype)).astype(jnp.float32) * 1e-3))

    w = np.float16(rng.normal(size=(64, 64)))
    x = np.float32(rng.normal(size=(2, 64)) * [[1], [300]])
    scales = np.float32([1e-2, 30.0])
    expected, _ = by_hand(loss, 1e-4, x, scales, w=w)
    found, _ = summed(loss, oc.clip_by_global_norm(1e-4), x, scales, w=w)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)  # the result is float16, and subnormal


def test_a_norm_past_the_range_of_float16_is_infinite():
    def loss(w, x, s):
        return s * jnp.sum(w.astype(jnp.float32) @ x)

    batch = np.ones((2, 8), np.float32), np.float32([1.0, 1e6])
    _, norms = summed(loss, oc.clip_by_global_norm(1.0), *batch, w=np.float16(W))
    np.testing.assert_array_equal(norms, [8.0, np.inf])


def summed_scales(w, x, s):
    return s * jnp.sum(w @ x)


@functools.cache
def scaled():
    """One program for all scales."""
    tx = oc.clip_by_norm_range(1.0, 1.0)
    return jax.jit(oc.per_example.clipped_value_and_grad(summed_scales, tx, batch_argnums=(1, 2), reduce="sum"))


@pytest.mark.parametrize("scales", [(1e-20, 1e19), (1e-12, 1e27), (1e-20, 1e15), (1.0, 1.0)], ids=str)
def test_weights_too_far_apart_for_one_sum(scales):
    _, found = scaled()(W, np.ones((2, 8), np.float32), np.float32(scales))
    np.testing.assert_allclose(found, np.full((8, 8), 2 / 8), rtol=1e-6)  # two examples of the same direction
