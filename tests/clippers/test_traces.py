"""Numbers that can be checked by hand: AGC by its three kinds of unit, clippy, and capped singular values."""

import jax
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import contrib
from tests.reference import fixed, spectral, trees

WEIGHTS = [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
GRADIENTS = [[0.3, 0.4], [3e-4, 4e-4], [0.0, 0.01]]

# ratio 0.05, eps 1e-3; "io" from optax as run, "oi" from timm as run, "leaf" by hand. Beside each trace half a unit of
# the last digit that it gives: in its large entries, and in its second row.
AGC = {
    "io": ([[0.158114, 0.223537], [1.581e-4, 2.235e-4], [0, 0.005588]], 5e-7, 5e-8),
    "oi": ([[0.15, 0.2], [3e-5, 4e-5], [0, 0.01]], 5e-7, 5e-10),
    "leaf": ([[0.164284, 0.219045], [1.64284e-4, 2.19045e-4], [0, 0.005476]], 5e-7, 5e-10),
}

# (updates, parameters, relative, absolute) -> the factor. The last two are tensorflow/recommenders' own tests.
CLIPPY = [
    ([0.02, -0.4, 0.0], [1.0, -2.0, 0.0], 0.1, 1e-7, 0.5),
    ([0.02, -0.4, 0.01], [1.0, -2.0, 0.0], 0.1, 1e-7, 1e-5),
    ([0.02, -0.4, 0.01], [1.0, -2.0, 0.0], 0.5, 1e-2, 1.0),
    ([1.0, 1.0], [1.0, 0.1], 0.1, 0.01, 0.02),
    (2.0, 4.0, 0.1, 0.02, 0.21),
]


def test_agc():
    given = np.float32(GRADIENTS), np.float32(WEIGHTS)
    clips = {units: oc.adaptive_grad_clip(0.05, 1e-3, units=units) for units in AGC}
    run = jax.jit(lambda *given: {units: trees.update(tx, *given) for units, tx in clips.items()})
    for units, ours in run(*given).items():
        trace, half_unit, small_half_unit = AGC[units]
        room = np.array([[half_unit] * 2, [small_half_unit] * 2, [half_unit] * 2])
        reference = fixed.adaptive_grad_clip([np.array(GRADIENTS)], [np.array(WEIGHTS)], 0.05, 1e-3, units=units)[0]
        assert np.all(np.abs(reference - trace) <= room), units
        assert np.all(np.abs(np.asarray(ours, np.float64) - trace) <= room), units


@jax.jit
def clippy(updates, params, relative, absolute):
    return trees.update(contrib.clippy(relative, absolute), updates, params)


@pytest.mark.parametrize(("updates", "params", "relative", "absolute", "factor"), CLIPPY)
def test_clippy(updates, params, relative, absolute, factor):
    expected = np.array(updates) * factor
    reference = fixed.clippy([np.array(updates)], [np.array(params)], relative, absolute)[0]
    ours = clippy(*map(np.float32, (updates, params, relative, absolute)))
    # The traces give six digits: the first factor is (0.1 * 2 + 1e-7) / 0.4 = 0.50000025.
    np.testing.assert_allclose(reference, expected, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=1e-6)


def test_clippy_defaults_are_those_of_tensorflow_recommenders():
    updates, params = np.float32([0.02, -0.4, 0.0]), np.float32([1.0, -2.0, 0.0])
    ours = jax.jit(lambda *given: trees.update(contrib.clippy(), *given))(updates, params)
    trees.assert_same_bits(ours, clippy(updates, params, np.float32(0.1), np.float32(1e-7)))
    np.testing.assert_allclose(ours, [0.01, -0.2, 0.0], rtol=1e-6)


SINGULAR_VALUES = {
    "soft": [[-0.066629, 0.625780], [0.542284, 0.880475], [1.151196, 1.135170]],
    "hard": [[-0.071787, 0.642350], [0.553098, 0.900470], [1.177983, 1.158590]],
}


def test_singular_values():
    matrix = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    transformations = {form: oc.clip_singular_values(2.0, smooth=form == "soft") for form in SINGULAR_VALUES}
    given = {"matrix": np.float32(matrix), "transpose": np.float32(matrix.T)}
    run = jax.jit(lambda given: {form: trees.update(tx, given) for form, tx in transformations.items()})
    for form, ours in run(given).items():
        reference = spectral.capped(spectral.svd(matrix), 2.0, soft=form == "soft")
        np.testing.assert_allclose(reference, SINGULAR_VALUES[form], rtol=0, atol=5e-7)
        np.testing.assert_allclose(ours["matrix"], reference, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours["transpose"], reference.T, rtol=0, atol=1e-6)
