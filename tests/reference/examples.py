"""Per-example clips of the global norm, one example after the other, in float64."""

import functools

import jax
import numpy as np


def row(batch, i):
    return jax.tree.map(lambda leaf: leaf[i], batch)


def f64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def norm_of(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(f64(tree))))


@functools.cache
def value_and_grad(fun):
    """Compiled once for all tests of a function."""
    return jax.jit(jax.value_and_grad(fun))


def one_by_one(fun, params, batch, bound):
    """Sums of the values and of the clipped gradients, and the norms, one example after the other."""
    found = [value_and_grad(fun)(params, row(batch, i)) for i in range(jax.tree.leaves(batch)[0].shape[0])]
    sizes = [norm_of(each) for _, each in found]
    clipped = [
        jax.tree.map(lambda leaf, size=size: leaf * min(1.0, bound / max(size, 1e-300)), f64(each))
        for (_, each), size in zip(found, sizes, strict=True)
    ]
    return sum(float(value) for value, _ in found), jax.tree.map(lambda *leaves: sum(leaves), *clipped), sizes
