"""What the skips rely on: norms of gradients that are not finite are not finite, and the others are."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip import core, norms, thresholds
from optaxclip._arrays.leaves import Leaves
from optaxclip.wrappers import verdicts
from tests.support.meshes import AUTO, P

NORMS = {
    "global": norms.global_norm(),
    "global, 1": norms.global_norm(1),
    "global, inf": norms.global_norm(math.inf),
    "group, inf": norms.group_norm({"w": "w", "b": "other", "s": "other"}, math.inf),
    "leaf": norms.leaf_norm(),
    "leaf, 3": norms.leaf_norm(3),
    "leaf, inf": norms.leaf_norm(math.inf),
    "stacked": norms.leaf_norm(stacked={"w": 1, "b": 0, "s": 0}),
    "peaks": norms.leaf_peaks(),
    "rms": norms.leaf_rms(),
    "global rms": norms.global_rms(),
    "spectral": norms.spectral_norm(),
    "spectral, oi, stacked": norms.spectral_norm(units="oi", stacked={"w": 1, "b": 0, "s": 0}),
    "units": norms.unit_norm("io"),
    "relative": norms.relative_change(0.5, 0.1),
}
BAD = [np.nan, np.inf, -np.inf]
PLACES = [("w", (1, 3, 2)), ("b", (4,)), ("s", ())]


def tree(dtype):
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 4, 3), "b": (5,), "s": ()}
    return {name: np.asarray(rng.normal(size=shape)).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def is_finite(norm, axes=None):
    """A function from gradients and parameters to the verdict on all groups."""
    threshold = thresholds.constant(math.inf)

    def finite(grads, params):
        leaves = Leaves(grads, params, axes)
        return verdicts.of_norms(core.judge(norm, threshold, leaves, None), leaves).finite

    return finite


@jax.jit
def judged(grads, params):
    """By every norm, in one program."""
    return {name: is_finite(norm)(grads, params) for name, norm in NORMS.items()}


def verdicts_on_bad_and_good(dtype):
    """Of every norm: (what was not finite, whether that was judged finite), and the same of numbers that were."""
    params = tree("float32") if dtype == "bfloat16" else tree(dtype)
    bad, good = {}, {}
    for leaf, place in PLACES:
        for value in [*BAD, complex(1, np.inf), complex(np.nan, 1)] if dtype == "complex64" else BAD:
            given = tree(dtype)
            given[leaf][place] = value
            bad[leaf, value] = jax.device_get(judged(given, params))
    largest = float(jnp.finfo(dtype).max)
    for value in (0.0, 1e-40, 1e30, largest, -largest):
        given = jax.tree.map(lambda x, value=value: np.full_like(x, value), tree(dtype))
        good[value] = jax.device_get(judged(given, params))
    return bad, good


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_one_entry_that_is_not_finite(dtype):
    bad, good = verdicts_on_bad_and_good(dtype)
    for name in NORMS:
        assert [case for case, found in bad.items() if found[name]] == [], name
        assert [case for case, found in good.items() if not found[name]] == [], name


def test_on_all_devices_alike():
    specs = {"w": P("data", "model"), "b": P()}
    by_name = {name: norm for name, norm in NORMS.items() if "spectral" not in name and "stacked" not in name}
    by_name["group, inf"] = norms.group_norm({"w": "w", "b": None}, math.inf)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=AUTO, in_specs=(specs, specs), out_specs=P(("data", "model")))
    def judge(grads, params):
        return {name: is_finite(norm, specs)(grads, params)[None] for name, norm in by_name.items()}

    params = {"w": np.ones((8, 4), np.float32), "b": np.ones(3, np.float32)}
    for name, found in judge(params, params).items():
        assert np.all(np.asarray(found)), name
    for value in BAD:
        for place in ((0, 0), (7, 3)):
            rows = params["w"].copy()
            rows[place] = value
            for name, found in judge(params | {"w": rows}, params).items():
                assert not np.any(np.asarray(found)), (name, place, value)
