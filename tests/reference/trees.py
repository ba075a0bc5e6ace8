"""Random trees for the tests, and how far from a float64 result a leaf of each dtype may be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Ranks 0 to 5, with the shapes on which unit conventions differ. Few shapes, so that kernels are compiled once.
SHAPES = [(), (33,), (3, 5), (4, 1), (1, 6), (2, 3, 4), (2, 2, 3, 4), (2, 1, 2, 3, 2)]
TINY = float(np.finfo(np.float32).tiny)


class Pair(NamedTuple):
    left: object
    right: object


def nest(rng, parts):
    """The list `parts` as a random nesting of dicts, lists, tuples and named tuples, in the same leaf order."""
    if len(parts) == 1:
        return {"only": parts[0]} if rng.random() < 0.3 else parts[0]
    cut = int(rng.integers(1, len(parts)))
    left, right = nest(rng, parts[:cut]), nest(rng, parts[cut:])
    return [{"a": left, "b": right}, [left, right], (left, right), Pair(left, right)][int(rng.integers(4))]


def normal(rng, shape, dtype, scale=1.0):
    """Gaussian numbers times `scale`, as a NumPy array of `dtype`."""
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return np.asarray(x * scale).astype(dtype)


def stack(trees):
    """Trees of one structure as one of NumPy arrays, whose first axis counts them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def random_tree(rng, dtype, *, shapes=SHAPES, most=8, scale=1.0, spread=0.0):
    """1 to `most` leaves, a shape at most twice; a leaf's scale is `scale` times a power of 10 within +-`spread`."""
    twice = [*shapes, *shapes]
    picked = rng.permutation(len(twice))[: int(rng.integers(1, most + 1))]
    leaves = [normal(rng, twice[int(i)], dtype, scale * 10 ** rng.uniform(-spread, spread)) for i in picked]
    return jax.device_put(nest(rng, leaves))


def shuffled_tree(rng, dtype, shapes, *, scale=1.0, spread=0.0):
    """One leaf of each shape, in random order and nesting: trees of many structures that share compiled kernels."""
    leaves = [normal(rng, shape, dtype, scale * 10 ** rng.uniform(-spread, spread)) for shape in shapes]
    return jax.device_put(nest(rng, [leaves[int(i)] for i in rng.permutation(len(leaves))]))


def like(rng, tree, scale=1.0):
    """Gaussian numbers with the structure, shapes and dtypes of `tree`."""
    return jax.tree.map(lambda x: jnp.asarray(normal(rng, x.shape, x.dtype, scale)), tree)


def numpy_leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def wide_leaves(tree):
    """The leaves as float64 or complex128."""
    return [x.astype(np.complex128 if jnp.iscomplexobj(x) else np.float64) for x in numpy_leaves(tree)]


def update(tx, updates, params=None):
    """One step from a fresh state."""
    state = tx.init(updates if params is None else params)
    return tx.update(updates, state, params)[0]


def compiled(make):
    """A jitted `(bound, updates, params) -> updates` of `make(bound)`: many bounds and numbers, one compilation."""
    return jax.jit(lambda bound, updates, params=None: update(make(bound), updates, params))


def slack(dtype, rtol):
    """(relative, absolute) distance that `dtype` allows: `rtol` from the norm, half a last place, subnormals.

    float16 keeps its subnormals; XLA flushes those of every other dtype to zero.
    """
    info = jnp.finfo(dtype)
    tiny = float(info.smallest_subnormal) / 2 if dtype == jnp.float16 else TINY
    return rtol + float(info.eps) / 2, tiny


def assert_close(ours, expected, rtol):
    """Every leaf of `ours` within its dtype's slack of the float64 `expected`, coordinate by coordinate."""
    ours = jax.tree.leaves(ours)
    for mine, right in zip(ours, jax.tree.leaves(expected), strict=True):
        assert mine.shape == right.shape
        relative, absolute = slack(mine.dtype, rtol)
        off = np.abs(wide_leaves([mine])[0] - right)
        allowed = relative * np.abs(right) + absolute
        assert np.all(off <= allowed), f"{mine.dtype}{list(mine.shape)} off by {np.max(off / allowed):.3g} of the slack"


def assert_same_bits(ours, given):
    """Same structure, dtypes and bytes: -0.0, subnormals and NaN payloads included."""
    assert jax.tree.structure(ours) == jax.tree.structure(given)
    for mine, theirs in zip(numpy_leaves(ours), numpy_leaves(given), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert mine.tobytes() == theirs.tobytes(), f"{mine} is not {theirs}"
