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


@jax.jit
def both_ways(updates, scale):
    return {name: apply(name, updates, scale) for name in CLIPS}


def compiled(name, updates, scale):
    """One program does for both."""
    return both_ways(updates, np.float32(scale))[name]


SIZES = np.random.default_rng(0).choice([-1.0, 1.0], 3000)
SIZES = np.concatenate([np.geomspace(TINY, MAX * (1 - 1e-6), 1500), np.geomspace(1e-4, 100, 1500)]) * SIZES


def points(scale, dtype):
    """Numbers of the whole range, and numbers about the scale, of which half is bent."""
    with np.errstate(over="ignore"):
        x = np.concatenate([SIZES[:1500], SIZES[1500:] * scale]).astype(np.float32).astype(jnp.dtype(dtype))
    return np.where(np.isfinite(x.astype(np.float32)), x, np.ones_like(x))


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
        out, expected = wide(compiled(name, x, scale)), right(name, x, scale)
        tiny = max(float(info.tiny), TINY)
        room = (0.5 if info.eps > 1e-6 else 4) * float(info.eps) * np.abs(expected) + tiny  # of subnormals any share
        assert np.all(np.abs(out - expected) <= room), scale
        assert np.all(np.abs(out) <= np.abs(wide(x)))
        assert np.all(out * wide(x) >= 0)
        order = np.argsort(wide(x))
        assert np.all(np.diff(out[order]) >= -room[order][1:])
        if name == "tanh":
            assert scale > float(info.max) or np.max(np.abs(out)) <= float(np.float32(scale).astype(jnp.dtype(dtype)))


def test_a_scale_that_is_a_constant_is_no_other():
    """XLA multiplies by the reciprocal of a constant, which is subnormal here."""
    given = {scale: points(scale, "float32") for scale in (TINY, 1e38)}
    run = jax.jit(lambda given: {scale: {name: apply(name, x, scale) for name in CLIPS} for scale, x in given.items()})
    for scale, ours in run(given).items():
        for name in CLIPS:
            np.testing.assert_allclose(ours[name], compiled(name, given[scale], scale), rtol=1e-6)


@both
def test_small_coordinates_keep_every_bit(name):
    subnormal = float(jnp.finfo("float32").smallest_subnormal)
    x = np.float32([subnormal, -3 * subnormal, 0.0, -0.0, 1.5 * TINY, -1e-30, 1.6e-4, -1.6e-4])
    for scale in (1.0, 1e10, MAX):
        out = compiled(name, x, scale)
        np.testing.assert_array_equal(np.asarray(out).view(np.int32), x.view(np.int32))


@both
def test_what_is_not_finite(name):
    x = np.float32([np.inf, -np.inf, np.nan, 2.0])
    out = np.asarray(compiled(name, x, 0.5))
    most = 0.5 if name == "tanh" else 0.5 * np.arcsinh(L(MAX) / 0.5)
    np.testing.assert_allclose(out, [most, -most, np.nan, right(name, 2.0, 0.5)], rtol=1e-6)


@both
def test_scales_at_the_ends(name):
    x = np.float32([np.inf, -3e38, 1e-3, -0.0, np.nan])
    for nothing in (np.inf, np.nan):  # an array of NaN bounds nothing
        np.testing.assert_array_equal(compiled(name, x, nothing), x)
    for zero in (0.0, -1.0, 1e-40):
        out = np.asarray(compiled(name, x, zero))
        np.testing.assert_array_equal(out, [0, 0, 0, 0, np.nan])


@both
def test_complex_coordinates_keep_their_direction(name):
    x = np.complex64([3 + 4j, 3e30 - 4e30j, 1e-4j, complex(0, 0), complex(np.inf, 0)])
    out = np.asarray(compiled(name, x, 2.0))
    size = right(name, [5, 5e30, 1e-4, 0, np.inf if name == "tanh" else MAX], 2.0)
    turned = np.array([0.6 + 0.8j, 0.6 - 0.8j, 1j, 0, 1])
    np.testing.assert_allclose(out, (size * turned).astype(np.complex128), rtol=2e-6)


@both
def test_the_slopes_over_the_whole_range(name):
    """By the gradient and by the scale, which may be learnt."""

    def one(x, scale):
        return apply(name, x[None], scale)[0]

    @jax.jit
    def slopes(x, scale):
        return [jax.vmap(way(one, argnums=(0, 1)), (0, None))(x, scale) for way in (jax.grad, jax.jacfwd)]

    for scale in SCALES:
        x = points(scale, "float32")[::7]
        x = np.where(np.abs(x) >= TINY, x, np.float32(1))  # the slope of a subnormal one, which is returned, is 1
        (by_x, by_scale), forward = slopes(x, np.float32(scale))
        ratio = wide(x) / L(np.float32(scale))
        with np.errstate(over="ignore"):
            slope = 1 / np.cosh(ratio) ** 2 if name == "tanh" else 1 / np.sqrt(1 + ratio**2)
        np.testing.assert_allclose(by_x, slope.astype(np.float64), rtol=2e-5, atol=1e-7)
        # What is left of two equal numbers near 0 is their rounding.
        rest = CLIPS[name][1](ratio) - ratio * slope
        np.testing.assert_allclose(by_scale, rest.astype(np.float64), rtol=1e-5, atol=1e-6)
        for one_way, other in zip(forward, (by_x, by_scale), strict=True):
            np.testing.assert_allclose(one_way, other, rtol=1e-6, atol=1e-7)
    assert [float(slopes(np.zeros_like(x), np.float32(c))[0][0][0]) for c in (1.0, TINY, MAX)] == [1, 1, 1]


@both
def test_a_scale_per_leaf_and_per_column(name):
    updates = {"a": np.float32([1, -2]), "b": np.full((2, 3), np.float32(2)), "c": np.full(2, np.float32(5))}
    updates["steps"] = np.arange(2, dtype=np.int32)
    columns = np.array([0.5, 1.0, 4.0], np.float32)
    scales = {"a": 1.0, "b": columns, "c": None, "steps": None}
    out = jax.jit(lambda updates: apply(name, updates, scales))(updates)
    np.testing.assert_allclose(out["a"], right(name, [1, -2], 1.0).astype(float), rtol=1e-6)
    np.testing.assert_allclose(out["b"], [[right(name, 2.0, c) for c in columns]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(out["c"], updates["c"])
    np.testing.assert_array_equal(out["steps"], updates["steps"])
