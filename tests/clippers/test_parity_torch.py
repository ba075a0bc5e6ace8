"""torch's two clips, and timm's AGC.

torch multiplies by `min(1, c / (n + 1e-6))` and we by `min(1, c / n)`: its result is ours times `n / (n + 1e-6)` where
both clip, so it lands below the bound by a share of `1e-6 / n`, and just inside the bound it shrinks by less than that.
On top comes what two float32 sums and two products round: ROUNDING.
"""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import optaxclip as oc
from tests.reference import fixed, trees

torch = pytest.importorskip("torch", reason="torch is the oracle here: pip install 'optaxclip[parity]'")

pytestmark = pytest.mark.parity

ROUNDING = 1e-6
ORDS = [1.0, 2.0, 3.0, float("inf")]


def as_parameters(updates, params=None):
    """torch parameters whose gradients are the leaves of `updates`."""
    values = trees.numpy_leaves(updates if params is None else params)
    parameters = [torch.nn.Parameter(torch.tensor(x)) for x in values]
    for parameter, gradient in zip(parameters, trees.numpy_leaves(updates), strict=True):
        parameter.grad = torch.tensor(gradient)
    return parameters


def gradients(parameters):
    return [parameter.grad.numpy() for parameter in parameters]


def random_trees(rng, structures, numbers, scales):
    """Trees of a few structures, so that each is compiled once, with numbers of many scales."""
    for _ in range(structures):
        structure = trees.random_tree(rng, np.float32)
        for _ in range(numbers):
            scale = 10 ** rng.uniform(*scales)
            yield jax.tree.map(lambda x, scale=scale: x * np.float32(scale * 10 ** rng.uniform(-1, 1)), structure)


@pytest.mark.parametrize("ord", ORDS)
def test_clip_grad_norm(rng, ord):
    @jax.jit
    def run(bound, updates):
        return trees.update(oc.clip_by_global_norm(bound, ord=ord), updates), oc.global_norm(updates, ord=ord)

    rounding = 2 * ROUNDING if ord == 3 else ROUNDING  # torch takes the third root of float32 cubes
    for updates in random_trees(rng, 3, 4, (-3, 6)):
        parameters = as_parameters(updates)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters], ord))
        bound = norm * 10 ** rng.uniform(-3, 0.5)
        theirs_norm = torch.nn.utils.clip_grad_norm_(parameters, bound, norm_type=ord)
        clipped, ours_norm = run(bound, updates)
        np.testing.assert_allclose(float(ours_norm), float(theirs_norm), rtol=rounding)
        for mine, theirs in zip(trees.numpy_leaves(clipped), gradients(parameters), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6 / norm + rounding)
            if bound < norm * (1 - rounding):
                np.testing.assert_allclose(mine * (norm / (norm + 1e-6)), theirs, rtol=rounding)


@pytest.mark.parametrize("ord", ORDS)
def test_small_norms_are_exact_here_and_not_there(ord):
    """At n = 1e-6 torch's clip lands at half the bound; ours on it."""
    updates = np.array([0.0, 1e-6, 0.0], np.float32)
    parameters = as_parameters(updates)
    torch.nn.utils.clip_grad_norm_(parameters, 1e-7, norm_type=ord)
    np.testing.assert_allclose(gradients(parameters)[0][1], 0.5e-7, rtol=ROUNDING)
    ours = trees.update(oc.clip_by_global_norm(1e-7, ord=ord), updates)
    np.testing.assert_allclose(ours[1], 1e-7, rtol=ROUNDING)


def test_clip_grad_value(rng):
    """Exactly the same float32 numbers, infinities clipped and NaN passed."""
    run = jax.jit(lambda bound, updates: trees.update(oc.clip(bound), updates))
    for updates in random_trees(rng, 3, 4, (-6, 6)):
        bound = float(np.abs(trees.numpy_leaves(updates)[0]).max()) * rng.uniform(0.05, 1.5)
        parameters = as_parameters(updates)
        torch.nn.utils.clip_grad_value_(parameters, bound)
        for mine, theirs in zip(trees.numpy_leaves(run(bound, updates)), gradients(parameters), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    strange = np.array([np.inf, -np.inf, np.nan, -0.0, 2.0], np.float32)
    parameters = as_parameters(strange)
    torch.nn.utils.clip_grad_value_(parameters, 0.5)
    np.testing.assert_array_equal(np.asarray(trees.update(oc.clip(0.5), strange)), gradients(parameters)[0])


@pytest.fixture(scope="module")
def timm_agc():
    """timm/utils/agc.py, loaded by its path: importing the package wants torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is the oracle here: pip install --no-deps timm")
    path = pathlib.Path(found.origin).parent / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("timm_agc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agc(rng, timm_agc):
    """`units="oi"`, on leaves of scale 0.1 and up: timm's bounds come out too small under 1e-6."""

    @jax.jit
    def run(clipping, eps, updates, params):
        return trees.update(oc.adaptive_grad_clip(clipping, eps, units="oi"), updates, params)

    for updates in random_trees(rng, 6, 4, (0, 4)):
        params = jax.tree.map(np.asarray, trees.like(rng, updates, scale=10 ** rng.uniform(-4, 2)))
        clipping, eps = 10 ** rng.uniform(-4, 0.5), 10 ** rng.uniform(-5, -1)
        parameters = as_parameters(updates, params)
        timm_agc.adaptive_clip_grad(parameters, clipping, eps)
        ours = trees.numpy_leaves(run(clipping, eps, updates, params))
        for mine, theirs in zip(ours, gradients(parameters), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2 * ROUNDING)


@pytest.mark.parametrize("ord", ORDS)
def test_the_transcription_is_torchs(rng, ord):
    """In float64 both are right to the last digits, but for torch's 1e-6."""
    for _ in range(12):
        updates = [trees.normal(rng, shape, np.float64) for shape in trees.SHAPES]
        parameters = as_parameters(updates)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.5, norm_type=ord))
        np.testing.assert_allclose(fixed.global_norm(updates, ord), norm, rtol=1e-13)
        for right, theirs in zip(fixed.clip_by_global_norm(updates, 0.5, ord), gradients(parameters), strict=True):
            np.testing.assert_allclose(right * (norm / (norm + 1e-6)), theirs, rtol=1e-13)


def test_the_transcription_is_timms(rng, timm_agc):
    for _ in range(12):
        updates, params = ([trees.normal(rng, shape, np.float64) for shape in trees.SHAPES] for _ in range(2))
        parameters = as_parameters(updates, params)
        timm_agc.adaptive_clip_grad(parameters, 0.3, 1e-2)
        expected = fixed.adaptive_grad_clip(updates, params, 0.3, 1e-2, units="oi")
        for right, theirs in zip(expected, gradients(parameters), strict=True):
            np.testing.assert_allclose(right, theirs, rtol=1e-13)
