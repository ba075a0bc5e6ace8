"""Derivatives through the updates, as meta-learning takes them: finite at zero, and right at every scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import contrib
from tests.reference import fixed, trees

pytestmark = pytest.mark.slow
SHAPES = [(3,), (2, 2), ()]
SIZE = 8
# float32 Jacobians of a few products and one norm, against float64 differences with a step of 1e-6 of the norm.
RTOL = 2e-5


def split(flat, module):
    return [module.reshape(flat[:3], (3,)), module.reshape(flat[3:7], (2, 2)), module.reshape(flat[7:], ())]


def flatten(leaves, module):
    return module.concatenate([module.ravel(x) for x in leaves])


def ours(make):
    """flat updates, flat params, bound -> flat updates."""

    def run(flat, params, bound):
        return flatten(trees.update(make(bound), split(flat, jnp), split(params, jnp)), jnp)

    return run


def theirs(reference):
    def run(flat, params, bound):
        return flatten(reference(split(flat, np), split(params, np), bound), np)

    return run


def differences(fun, x):
    """The Jacobian of `fun` at `x` by central differences in float64."""
    x = np.asarray(x, np.float64)
    step = 1e-6 * max(np.linalg.norm(x), 1e-300)
    return np.stack([(fun(x + step * e) - fun(x - step * e)) / (2 * step) for e in np.eye(x.size)], axis=-1)


# name -> (transformation of a bound, its transcription on updates, parameters and that bound)
METHODS = {
    "clip": (oc.clip, lambda g, w, c: fixed.clip(g, c)),
    "clip_by_value": (lambda c: oc.clip_by_value(-c / 2, c), lambda g, w, c: fixed.clip_by_value(g, -c / 2, c)),
    "clip_by_global_norm": (
        oc.clip_by_global_norm,
        lambda g, w, c: fixed.clip_by_global_norm(g, c),
    ),
    "clip_by_global_norm, ord 1": (
        lambda c: oc.clip_by_global_norm(c, ord=1),
        lambda g, w, c: fixed.clip_by_global_norm(g, c, 1),
    ),
    "clip_by_global_norm, ord 3": (
        lambda c: oc.clip_by_global_norm(c, ord=3),
        lambda g, w, c: fixed.clip_by_global_norm(g, c, 3),
    ),
    "clip_by_global_norm, ord inf": (
        lambda c: oc.clip_by_global_norm(c, ord=np.inf),
        lambda g, w, c: fixed.clip_by_global_norm(g, c, np.inf),
    ),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, lambda g, w, c: fixed.clip_by_leaf_norm(g, c)),
    "clip_by_block_rms": (oc.clip_by_block_rms, lambda g, w, c: fixed.clip_by_block_rms(g, c)),
    "clip_by_norm_range, up": (
        lambda c: oc.clip_by_norm_range(16 * c, 32 * c),
        lambda g, w, c: fixed.clip_by_norm_range(g, 16 * c, 32 * c),
    ),
    "smooth_clip_by_global_norm": (
        oc.smooth_clip_by_global_norm,
        lambda g, w, c: fixed.smooth_clip_by_global_norm(g, c),
    ),
    "adaptive_grad_clip, io": (
        oc.adaptive_grad_clip,
        fixed.adaptive_grad_clip,
    ),
    "clippy": (lambda c: contrib.clippy(c, c / 8), lambda g, w, c: fixed.clippy(g, w, c, c / 8)),
}


@functools.cache
def jacobians(name, mode):
    """(by the updates, by the parameters, by the bound) at (flat updates, flat params, bound)."""
    derivative = jax.jacrev if mode == "reverse" else jax.jacfwd
    return jax.jit(derivative(ours(METHODS[name][0]), argnums=(0, 1, 2)))


def points(rng):
    """Updates of norm about 1.5 and parameters of norm about 3, away from kinks: no two entries alike, none near 0."""
    updates = rng.choice([-1, 1], SIZE) * np.linspace(0.2, 0.9, SIZE)[rng.permutation(SIZE)]
    params = rng.choice([-1, 1], SIZE) * np.linspace(0.8, 1.3, SIZE)[rng.permutation(SIZE)]
    return np.float32(updates), np.float32(params)


def transcribed_jacobians(name, updates, params, bound):
    """The same three from the transcription, at the float32 numbers that the library gets."""
    at = [np.asarray(x, np.float64) for x in (updates, params, [bound])]

    def by(argument):
        def run(x):
            values = [*at[:argument], x, *at[argument + 1 :]]
            return theirs(METHODS[name][1])(values[0], values[1], values[2][0])

        return differences(run, at[argument])

    return by(0), by(1), by(2)[..., 0]


# A bound of 0.31 times the updates' scale clips `points`, each but the smallest units; 100 clips nothing.
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", METHODS)
def test_first_derivatives(rng, name, mode, scale):
    """By the updates, the parameters, and the bound: `max_norm` may be learnt, or injected and differentiated."""
    updates, params = points(rng)
    for bound in (0.31, 0.01 if name.endswith("up") else 100.0):
        at = np.float32(updates * scale), params, np.float32(bound * scale)
        pairs = zip(jacobians(name, mode)(*at), transcribed_jacobians(name, *at), strict=True)
        for argument, (got, right) in zip(("updates", "params", "bound"), pairs, strict=True):
            assert np.all(np.isfinite(got)), (argument, bound, got)
            room = RTOL * np.abs(right).max()
            np.testing.assert_allclose(np.asarray(got, np.float64), right, rtol=0, atol=room, err_msg=argument)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", METHODS)
def test_finite_at_zero(name, mode):
    """Zero updates, zero parameters, bound 0: every derivative is finite; by the updates it is the identity's."""
    zeros = np.zeros(SIZE, np.float32)
    for params in (zeros, zeros + 1):
        for bound in (0.0, 0.31):
            for got in jacobians(name, mode)(zeros, params, np.float32(bound)):
                assert np.all(np.isfinite(got)), (params, bound, got)
    if not name.startswith("clip_by_norm_range"):  # which has no derivative there: the norm jumps from 0
        at_zero = jacobians(name, mode)(zeros, zeros + 1, np.float32(0.31))[0]
        np.testing.assert_allclose(at_zero, np.eye(SIZE), rtol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", METHODS)
def test_finite_where_one_leaf_is_zero(rng, name, mode):
    """An unused layer among others, where each leaf has a norm of its own; with a bound of 0 too."""
    updates, params = points(rng)
    updates[3:7] = 0
    for bound in (0.31, 100.0, 0.0):
        for got in jacobians(name, mode)(updates, params, np.float32(bound)):
            assert np.all(np.isfinite(got)), (bound, got)


# global_norm itself


def gradient_of_norm(x, ord):
    norm = fixed.vector_norm(x, ord)
    if ord == np.inf:
        return np.sign(x) * (np.abs(x) == norm)
    return np.sign(x) * (np.abs(x) / norm) ** (ord - 1)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("ord", [1, 2, 3, np.inf])
def test_gradient_of_the_norm(rng, ord, mode):
    mode = jax.jacrev if mode == "reverse" else jax.jacfwd
    derivative = jax.jit(mode(lambda x: oc.global_norm(split(x, jnp), ord=ord)))
    for scale in (1e-36, 1e-30, 1e-19, 1.0, 1e19, 1e30, 1e37):
        x = np.float32(points(rng)[0] * scale)
        got = np.asarray(derivative(x), np.float64)
        np.testing.assert_allclose(got, gradient_of_norm(x.astype(np.float64), ord), rtol=RTOL)
    np.testing.assert_array_equal(derivative(np.zeros(SIZE, np.float32)), np.zeros(SIZE))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradient_of_the_norm_keeps_a_narrow_dtype(rng, dtype):
    x = jnp.asarray(points(rng)[0], dtype)
    gradient = jax.grad(lambda x: oc.global_norm(split(x, jnp)))(x)
    wide = np.asarray(x, np.float64)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), wide / fixed.vector_norm(wide), rtol=trees.slack(dtype, 1e-6)[0]
    )


def test_gradient_of_the_norm_of_complex_leaves(rng):
    """d||x|| along v is Re <x, v> / ||x||; jax's gradient of a real function is the conjugate, conj(x) / ||x||."""
    x, v = (jnp.asarray(trees.normal(rng, (5,), np.complex64)) for _ in range(2))
    wide, along = (np.asarray(y, np.complex128) for y in (x, v))
    norm = np.linalg.norm(wide)
    tangent = jax.jvp(oc.global_norm, (x,), (v,))[1]
    np.testing.assert_allclose(float(tangent), np.real(np.vdot(wide, along)) / norm, rtol=RTOL)
    np.testing.assert_allclose(jax.grad(oc.global_norm)(x), np.conj(wide) / norm, rtol=RTOL)
    np.testing.assert_array_equal(jax.grad(oc.global_norm)(jnp.zeros_like(x)), np.zeros(5))


HESSIANS = {
    "forward over reverse": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
}


@pytest.mark.parametrize("order", HESSIANS)
def test_hessian_of_the_norm(rng, order):
    second = jax.jit(HESSIANS[order](lambda x: oc.global_norm(split(x, jnp))))
    for scale in (1e-30, 1e-19, 1.0, 1e19, 1e30):
        x = np.float32(points(rng)[0] * scale)
        wide = x.astype(np.float64)
        norm = np.linalg.norm(wide)
        right = (np.eye(SIZE) - np.outer(wide, wide) / norm**2) / norm
        np.testing.assert_allclose(np.asarray(second(x), np.float64), right, rtol=0, atol=RTOL / norm)
    assert np.all(np.isfinite(second(np.zeros(SIZE, np.float32))))


SECOND = [
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_block_rms",
    "clip_by_norm_range, up",
    "smooth_clip_by_global_norm",
    "adaptive_grad_clip, io",
    "clippy",
]


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(rng, name):
    """The Hessian of <updates out, params>, against differences of the transcription's Jacobian."""
    updates, params = points(rng)
    bound = np.float32(0.31)
    run = ours(METHODS[name][0])
    second = jax.jit(jax.hessian(lambda x: jnp.vdot(run(x, params, bound), params)))
    weights, x = params.astype(np.float64), updates.astype(np.float64)

    def gradient(x):
        return weights @ transcribed_jacobians(name, x, params, bound)[0]

    right = np.stack([(gradient(x + 1e-4 * e) - gradient(x - 1e-4 * e)) / 2e-4 for e in np.eye(SIZE)], axis=-1)
    # Differences of differences are good to about 1e-5 here.
    room = 1e-4 * max(np.abs(right).max(), 1.0)
    np.testing.assert_allclose(np.asarray(second(updates), np.float64), right, rtol=0, atol=room)
    assert np.all(np.isfinite(second(np.zeros(SIZE, np.float32))))
