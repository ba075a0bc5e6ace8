"""`tanh_clip` and `arcsinh_clip`: against NumPy's functions in long doubles, over the whole float range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip import contrib

L = np.longdouble
TINY, MAX = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
CLIPS = {"tanh": (contrib.tanh_clip, np.tanh), "arcsinh": (contrib.arcsinh_clip, np.arcsinh)}
both = pytest.mark.parametrize("name", CLIPS)
SCALES = [TINY, 1e-37, 1e-30, 1e-10, 0.3, 1.0, 1e10, 1e36, 1e38, MAX]


def apply(name, updates, scale):
    tx = CLIPS[name][0](scale)
    return tx.update(updates, tx.init(updates))[0]


compiled = jax.jit(apply, static_argnums=0)
SIZES = np.random.default_rng(0).choice([-1.0, 1.0], 3000)
SIZES = np.concatenate([np.geomspace(TINY, MAX * (1 - 1e-6), 1500), np.geomspace(1e-4, 100, 1500)]) * SIZES


def points(scale, dtype):
    """Numbers of the whole range, and numbers about the scale, of which half is bent."""
    with np.errstate(over="ignore"):
        sizes = np.concatenate([SIZES[:1500], SIZES[1500:] * scale]).astype(np.float32)
        x = np.asarray(jnp.asarray(sizes).astype(dtype))
    return jnp.asarray(np.where(np.isfinite(x.astype(np.float32)), x, np.ones_like(x)))


def wide(x):
    return np.asarray(x).astype(np.float64).astype(L)


def right(name, x, scale):
    scale = L(np.float32(scale))
    return scale * CLIPS[name][1](wide(x) / scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@both
def test_the_curve_over_the_whole_range(name, dtype):
    info = jnp.finfo(dtype)
    for scale in SCALES:
        x = points(scale, dtype)
        out, expected = wide(compiled(name, x, jnp.float32(scale))), right(name, x, scale)
        tiny = max(float(info.tiny), TINY)
        room = (0.5 if info.eps > 1e-6 else 4) * float(info.eps) * np.abs(expected) + tiny  # of subnormals any share
        assert np.all(np.abs(out - expected) <= room), scale
        assert np.all(np.abs(out) <= np.abs(wide(x)))
        assert np.all(out * wide(x) >= 0)
        order = np.argsort(wide(x))
        assert np.all(np.diff(out[order]) >= -room[order][1:])
        if name == "tanh":
            assert np.max(np.abs(out)) <= float(jnp.asarray(scale, jnp.float32).astype(dtype)) or scale > info.max


@pytest.mark.parametrize("scale", [TINY, 1e38])
@both
def test_a_scale_that_is_a_constant_is_no_other(name, scale):
    """XLA multiplies by the reciprocal of a constant, which is subnormal here."""
    x = points(scale, "float32")
    ours = jax.jit(lambda x: apply(name, x, scale))(x)
    np.testing.assert_allclose(ours, compiled(name, x, jnp.float32(scale)), rtol=1e-6)


@both
def test_small_coordinates_keep_every_bit(name):
    subnormal = float(jnp.finfo("float32").smallest_subnormal)
    x = jnp.asarray([subnormal, -3 * subnormal, 0.0, -0.0, 1.5 * TINY, -1e-30, 1.6e-4, -1.6e-4], jnp.float32)
    for scale in (1.0, 1e10, MAX):
        out = compiled(name, x, jnp.float32(scale))
        np.testing.assert_array_equal(np.asarray(out).view(np.int32), np.asarray(x).view(np.int32))


@both
def test_what_is_not_finite(name):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 2.0])
    out = np.asarray(compiled(name, x, jnp.float32(0.5)))
    most = 0.5 if name == "tanh" else 0.5 * np.arcsinh(L(MAX) / 0.5)
    np.testing.assert_allclose(out, [most, -most, np.nan, right(name, 2.0, 0.5)], rtol=1e-6)


@both
def test_scales_at_the_ends(name):
    x = jnp.array([jnp.inf, -3e38, 1e-3, -0.0, jnp.nan])
    for nothing in (jnp.inf, jnp.nan):  # an array of NaN bounds nothing
        np.testing.assert_array_equal(compiled(name, x, jnp.float32(nothing)), x)
    for zero in (0.0, -1.0, 1e-40):
        out = np.asarray(compiled(name, x, jnp.float32(zero)))
        np.testing.assert_array_equal(out, [0, 0, 0, 0, np.nan])


@both
def test_complex_coordinates_keep_their_direction(name):
    x = jnp.array([3 + 4j, 3e30 - 4e30j, 1e-4j, complex(0, 0), complex(np.inf, 0)], jnp.complex64)
    out = np.asarray(compiled(name, x, jnp.float32(2.0)))
    size = right(name, [5, 5e30, 1e-4, 0, np.inf if name == "tanh" else MAX], 2.0)
    turned = np.array([0.6 + 0.8j, 0.6 - 0.8j, 1j, 0, 1])
    np.testing.assert_allclose(out, (size * turned).astype(np.complex128), rtol=2e-6)


@both
def test_the_slopes_over_the_whole_range(name):
    """By the gradient and by the scale, which may be learnt."""

    def one(x, scale):
        return apply(name, x[None], scale)[0]

    slopes = jax.jit(jax.vmap(jax.grad(one, argnums=(0, 1)), (0, None)))
    forward = jax.jit(jax.vmap(jax.jacfwd(one, argnums=(0, 1)), (0, None)))
    for scale in SCALES:
        x = points(scale, "float32")[::7]
        x = x[jnp.abs(x) >= TINY]  # the slope of a subnormal one, which is returned, is 1
        by_x, by_scale = slopes(x, jnp.float32(scale))
        ratio = wide(x) / L(np.float32(scale))
        with np.errstate(over="ignore"):
            slope = 1 / np.cosh(ratio) ** 2 if name == "tanh" else 1 / np.sqrt(1 + ratio**2)
        np.testing.assert_allclose(by_x, slope.astype(np.float64), rtol=2e-5, atol=1e-7)
        # What is left of two equal numbers near 0 is their rounding.
        rest = CLIPS[name][1](ratio) - ratio * slope
        np.testing.assert_allclose(by_scale, rest.astype(np.float64), rtol=1e-5, atol=1e-6)
        for one_way, other in zip(forward(x, jnp.float32(scale)), (by_x, by_scale), strict=True):
            np.testing.assert_allclose(one_way, other, rtol=1e-6, atol=1e-7)
    assert [float(slopes(jnp.zeros(1), jnp.float32(c))[0][0]) for c in (1.0, TINY, MAX)] == [1, 1, 1]


@both
def test_a_scale_per_leaf_and_per_column(name):
    updates = {"a": jnp.array([1.0, -2.0]), "b": jnp.full((2, 3), 2.0), "c": jnp.full(2, 5.0), "steps": jnp.arange(2)}
    columns = np.array([0.5, 1.0, 4.0], np.float32)
    out = apply(name, updates, {"a": 1.0, "b": columns, "c": None, "steps": None})
    np.testing.assert_allclose(out["a"], right(name, [1, -2], 1.0).astype(float), rtol=1e-6)
    np.testing.assert_allclose(out["b"], [[right(name, 2.0, c) for c in columns]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(out["c"], updates["c"])
    np.testing.assert_array_equal(out["steps"], updates["steps"])
