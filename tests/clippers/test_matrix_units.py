"""Singular values by iterations, on matrix units that round what they multiply: emulated on a CPU.

By default a TPU multiplies float32 matrices in one pass of bfloat16 (8 bits), and in six with Precision.HIGHEST; a GPU
in TF32 (11 bits), and in float32 with HIGHEST. Sums are in float32 on both.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip._numerics.matrices import capping, iterations
from tests.clippers.test_spectral import CONDITIONS, allowed, by, spectra, tall
from tests.reference import spectral

HIGHEST, HIGH, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT
matmul = jnp.matmul


def parts(x, number, bits):
    """A matrix as a sum of matrices with so many bits."""
    found = []
    for _ in range(number):
        # Not by a cast and back, which XLA may leave out.
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits - 1))
        x = x - found[-1]
    return found


def in_passes(number, bits):
    """A product of the parts of its factors, but for the products that rounding hides."""

    def product(x, y):
        xs, ys = parts(x, number, bits), parts(y, number, bits)
        pairs = [(i, j) for i in range(number) for j in range(number - i)]
        return sum(matmul(xs[i], ys[j], precision=HIGHEST) for i, j in reversed(pairs))

    return product


def in_float32(x, y):
    return matmul(x, y, precision=HIGHEST)


# What a product is at a precision. HIGHEST on a TPU is six passes, of three parts; HIGH is three, of two.
UNITS = {
    "TPU": {HIGHEST: in_passes(3, 8), HIGH: in_passes(2, 8), DEFAULT: in_passes(1, 8)},
    "GPU": {HIGHEST: in_float32, HIGH: in_passes(1, 11), DEFAULT: in_passes(1, 11)},
}
each_unit = pytest.mark.parametrize("unit", UNITS)


@contextlib.contextmanager
def on(unit, precision=None):
    """While this is entered, what is traced takes the iterations and their products as a unit would.

    Args:
      unit: the name of the unit.
      precision: a precision for all products, instead of the one that they state.
    """

    def emulated(x, y, *, precision=DEFAULT, instead=precision):
        return UNITS[unit][instead or precision](x, y)

    with by("iterations"), mock.patch.object(jnp, "matmul", emulated):
        yield


@functools.cache
def measured(unit, precision):
    """Both caps of a stack, and its largest singular values, compiled as a unit would calculate them."""

    def run(stack, caps):
        with on(unit, precision):
            both = [capping._capped(tall(stack), caps, soft).matrices for soft in (False, True)]
            return *both, capping._largest_singular_values(tall(stack))

    return jax.jit(run)


def worst_errors(rng, unit, precision, shape=(64, 33), conditions=CONDITIONS):
    """The largest errors, as a part of what is promised: of the hard cap, of the soft one, and of the norm."""
    worst = np.zeros(3)
    for values in spectra(min(shape), conditions):
        matrix = np.float32(spectral.with_singular_values(rng, shape, values))
        triple = spectral.svd(matrix)
        top = triple[1][0]
        for part in (0.3, 0.03, 0.001):
            c = np.float32(part * top)
            *both, norm = jax.device_get(measured(unit, precision)(matrix[None], c[None]))
            errors = [
                spectral.norm(ours[0] - spectral.capped(triple, c, soft=soft)) / allowed(part * top, top)
                for soft, ours in zip((False, True), both, strict=True)
            ]
            worst = np.maximum(worst, [*errors, abs(norm[0] / top - 1) / 1e-5])  # keeps NaN
    return worst


@each_unit
def test_caps_and_norm_keep_their_promise_at_the_stated_precision_only(rng, unit):
    hard, soft, norm = worst_errors(rng, unit, None)
    assert hard <= 1
    assert soft <= 1
    assert norm <= 1.1
    hard, soft, norm = worst_errors(rng, unit, DEFAULT, conditions=(1e6,))
    assert min(hard, soft) > 10
    assert norm > 3


@pytest.mark.slow
def test_larger_matrices_at_the_stated_precision(rng):
    """On a TPU. A GPU's products are float32's, with which test_spectral compares larger matrices."""
    hard, soft, norm = worst_errors(rng, "TPU", None, (256, 128), conditions=(1e6,))
    assert hard <= 1
    assert soft <= 1
    assert norm <= 1.1


def test_every_product_of_the_iterations_states_its_precision():
    stack, one = np.ones((1, 6, 4), np.float32), np.ones(1, np.float32)
    for soft in (False, True):
        traced = jax.make_jaxpr(lambda x, c, soft=soft: iterations.capped(x, c, c, soft))(stack, one)
        found = list(precisions(traced.jaxpr))
        assert found
        assert set(found) == {(HIGHEST, HIGHEST)}


def precisions(jaxpr):
    """Those of all products of a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in jax.tree.leaves(list(eqn.params.values())):
            body = getattr(inner, "jaxpr", inner)
            if hasattr(body, "eqns"):
                yield from precisions(body)
