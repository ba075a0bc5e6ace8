"""Scaling up to the largest float: finite gradients give finite updates, for every norm, bound and dtype."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import clip_by, norms, thresholds

MOST = float(np.finfo(np.float32).max)
NORMS = {
    "global": norms.global_norm(),
    "global, ord 1": norms.global_norm(ord=1),
    "global, ord inf": norms.global_norm(ord=np.inf),
    "leaf": norms.leaf_norm(),
    "rms": norms.leaf_rms(),
    "unit": norms.unit_norm(),
    "spectral": norms.spectral_norm(),
    "peaks": norms.leaf_peaks(),
    "relative": norms.relative_change(0.1, 1e-3),
}
GOALS = (1.0, 1e30, MOST / 2, MOST * (1 - 2.0**-18), float(np.nextafter(np.float32(MOST), 0)), MOST)


def sizes(dtype):
    """Over the range of a dtype, with mantissas that round either way."""
    info = ml_dtypes.finfo(dtype)
    exponents = np.linspace(np.log2(float(info.smallest_normal)), np.log2(float(info.max)), 40)
    mantissas = np.random.default_rng(0).uniform(0.25, 1, (40, 5))
    return np.float32(2.0 ** exponents[:, None] * mantissas).astype(dtype)


@functools.cache
def brought_to_goals(dtype):
    """By every norm, in one program for each dtype."""
    given = sizes("float32" if dtype == "complex64" else dtype)
    given = given * np.complex64(0.6 - 0.8j) if dtype == "complex64" else given

    @jax.jit
    @jax.vmap
    def brought(row, goal):
        tree = {"one": row[:1], "several": row[1:].reshape(2, 2)}
        weights = jax.tree.map(lambda x: jnp.full_like(x, 1e4), tree)
        clips = {name: clip_by(norm, thresholds.exactly(goal)) for name, norm in NORMS.items()}
        return {name: tx.update(tree, tx.init(tree), weights)[0] for name, tx in clips.items()}

    rows, goals = (np.repeat(given, len(GOALS), axis=0), np.tile(np.float32(GOALS), len(given)))
    return brought(rows, goals)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("name", NORMS)
def test_finite_in_finite_out(name, dtype):
    for leaf in jax.tree.leaves(brought_to_goals(dtype)[name]):
        assert leaf.dtype == dtype
        assert np.all(np.isfinite(np.asarray(leaf, np.complex64)))


def test_the_numbers_that_failed():
    for tx in (oc.clip_by_norm_range(MOST, np.inf), clip_by(norms.global_norm(), thresholds.exactly(MOST))):
        for size in (1.94783068, *np.random.default_rng(0).uniform(1, 2, 50)):
            out, _ = jax.jit(tx.update)(np.float32([size]), tx.init(None))
            np.testing.assert_allclose(out, MOST, rtol=1e-5)  # 2^-17 below it, where rounding does not lead beyond
            assert np.all(np.isfinite(out))


def test_a_float32_leaf_beside_a_float64_one():
    """One norm for both is a float64, and so is what it is brought to."""
    with jax.enable_x64(True):
        tree = {"a": np.float32([1e-30, 3e38]), "b": np.float64([1.0])}

        @jax.jit
        def brought(tree, goal):
            tx = clip_by(norms.global_norm(), thresholds.exactly(goal))
            return tx.update(tree, tx.init(tree))[0]

        for goal in (1e300, 1e60, 1.0, 1e-300):
            out = brought(tree, goal)
            assert out["a"].dtype == jnp.float32
            right = np.clip(np.float64(tree["a"]) * (goal / np.float64(np.float32(3e38))), -MOST, MOST)
            np.testing.assert_allclose(out["a"], right, rtol=1e-6, atol=1e-37)
            np.testing.assert_allclose(out["b"], goal / 3e38, rtol=1e-6)
