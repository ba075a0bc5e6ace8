"""Every fixed clipper against its float64 transcription, over random trees and every dtype."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import contrib
from tests.reference import fixed, trees

# Norms are right to a last place of float32, and a factor is made of two and rounded a few times more. What a dtype
# rounds comes on top, in trees.assert_close.
pytestmark = pytest.mark.slow
RTOL = 1e-6
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.float64, jnp.complex128]
# Where an argument takes many values: one dtype of each kind, so that the kernels to compile stay few.
TWO_DTYPES = [jnp.float32, jnp.bfloat16]
WIDE = [jnp.float64, jnp.complex128]
SHAPES = [(), (7,), (2, 3, 4)]
UNIT_SHAPES = [(7,), (4, 1), (3, 5), (1, 1, 5), (2, 3, 4), (2, 2, 3, 4), (2, 1, 2, 3, 2)]
# How many axes index layers -> leaves; where that is all of a leaf's axes, a layer is one number.
STACKED_SHAPES = {None: SHAPES, 1: [(7,), (2, 3, 4)], 2: [(3, 5), (2, 3, 4)]}
ORDS = [1, 2, 3, np.inf]
# Bounds as shares of the measured norm: nearly nothing is left, half, just inside, far inside.
SHARES = [1e-3, 0.5, 1.01, 100.0]


def some_trees(rng, dtype, shapes=SHAPES, count=3):
    """Of one structure, so that one program does for all."""
    structure = trees.shuffled_tree(rng, dtype, shapes)

    def fill(leaf, scale):
        return trees.normal(rng, leaf.shape, leaf.dtype, scale * 10 ** rng.uniform(-1, 1))

    for scale in np.geomspace(1e-2, 1e2, count):
        yield jax.tree.map(functools.partial(fill, scale=scale), structure)


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.__name__)
def dtype(request):
    with jax.enable_x64(True) if request.param in WIDE else contextlib.nullcontext():
        yield request.param


two_dtypes = pytest.mark.parametrize("dtype", TWO_DTYPES, ids=lambda dtype: dtype.__name__, indirect=True)


@functools.cache
def compiled(make):
    return jax.jit(lambda bounds, updates, params: trees.update(make(*bounds), updates, params))


def check(make, bounds, expected, updates, params=None):
    """`make` makes the transformation of its bounds. The same function has one program for all of them."""
    ours = compiled(make)(bounds, updates, params)
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(updates)]
    assert jax.tree.structure(ours) == jax.tree.structure(updates)
    trees.assert_close(ours, expected, RTOL)


def test_clip(rng, dtype):
    for updates in some_trees(rng, dtype):
        for bound in (0.0, 1e-3, 0.3, 10.0, np.inf):
            check(oc.clip, (bound,), fixed.clip(trees.wide_leaves(updates), bound), updates)


@pytest.mark.parametrize(("clip", "curve"), [(contrib.tanh_clip, np.tanh), (contrib.arcsinh_clip, np.arcsinh)])
def test_value_clips_without_a_kink(rng, dtype, clip, curve):
    for updates in some_trees(rng, dtype):
        for scale in (1e-3, 0.3, 10.0):
            check(clip, (scale,), fixed.squashed(trees.wide_leaves(updates), scale, curve), updates)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 2.0), (None, 0.25), (0.25, None), (-3.0, -1.0), (0.5, 0.5)])
def test_clip_by_value(rng, dtype, low, high):
    if jnp.issubdtype(dtype, jnp.complexfloating) and high is not None and high < 0:
        pytest.skip("a modulus has no negative upper end")
    for updates in some_trees(rng, dtype):
        check(oc.clip_by_value, (low, high), fixed.clip_by_value(trees.wide_leaves(updates), low, high), updates)


@pytest.mark.parametrize("ord", ORDS)
def test_clip_by_global_norm_and_the_norm(rng, dtype, ord):
    @jax.jit
    def run(bound, updates):
        return trees.update(oc.clip_by_global_norm(bound, ord=ord), updates), oc.global_norm(updates, ord=ord)

    for updates in some_trees(rng, dtype):
        wide = trees.wide_leaves(updates)
        right = fixed.global_norm(wide, ord)
        for share in SHARES:
            ours, norm = run(share * right, updates)
            assert jax.tree.structure(ours) == jax.tree.structure(updates)
            trees.assert_close(ours, fixed.clip_by_global_norm(wide, share * right, ord), RTOL)
            assert norm.dtype == (jnp.float64 if dtype in WIDE else jnp.float32)
            np.testing.assert_allclose(float(norm), right, rtol=RTOL)
        assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(updates)]


@two_dtypes
@pytest.mark.parametrize("ord", ORDS)
def test_clip_by_leaf_norm(rng, dtype, ord):
    make = functools.partial(oc.clip_by_leaf_norm, ord=ord)
    for updates in some_trees(rng, dtype):
        wide = trees.wide_leaves(updates)
        for share in SHARES:
            bound = share * fixed.vector_norm(wide[0], ord)
            check(make, (bound,), fixed.clip_by_leaf_norm(wide, bound, ord), updates)


@two_dtypes
@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("ord", [2, np.inf])
def test_clip_by_leaf_norm_stacked(rng, dtype, ord, stacked):
    make = functools.partial(oc.clip_by_leaf_norm, ord=ord, stacked=stacked)
    for updates in some_trees(rng, dtype, STACKED_SHAPES[stacked]):
        wide = trees.wide_leaves(updates)
        bound = 0.7 * fixed.vector_norm(wide[0].reshape(-1)[:3], ord)
        expected = fixed.clip_by_leaf_norm(wide, bound, ord, stacked)
        check(make, (bound,), expected, updates)


@two_dtypes
@pytest.mark.parametrize("stacked", [1, 2])
def test_clip_by_block_rms_stacked(rng, dtype, stacked):
    check_block_rms(rng, dtype, stacked)


def test_clip_by_block_rms(rng, dtype):
    check_block_rms(rng, dtype, None)


def check_block_rms(rng, dtype, stacked):
    make = functools.partial(oc.clip_by_block_rms, stacked=stacked)
    for updates in some_trees(rng, dtype, STACKED_SHAPES[stacked]):
        wide = trees.wide_leaves(updates)
        for bound in (1e-3, 1.0, 50.0):
            expected = fixed.clip_by_block_rms(wide, bound, stacked)
            check(make, (bound,), expected, updates)


@two_dtypes
def test_stacked_as_a_callable_of_the_path(rng, dtype):
    """A stacked leaf beside plain ones: only "blocks/..." has layers."""
    kernel = trees.normal(rng, (3, 4, 2), np.float64) * [[[1e-2]], [[1]], [[9]]]
    updates = {"blocks": {"kernel": kernel.astype(jnp.dtype(dtype))}, "head": trees.normal(rng, (4, 2), dtype)}
    kernel, head = trees.wide_leaves(updates)
    expected = [*fixed.clip_by_leaf_norm([kernel], 1.0, stacked=1), *fixed.clip_by_leaf_norm([head], 1.0)]
    for stacked in (lambda path: 1 if path.startswith("blocks/") else 0, {"blocks": 1, "head": 0}):
        check(functools.partial(oc.clip_by_leaf_norm, stacked=stacked), (1.0,), expected, updates)


def test_clip_by_norm_range(rng, dtype):
    for updates in some_trees(rng, dtype):
        wide = trees.wide_leaves(updates)
        norm = fixed.global_norm(wide)
        for low, high in ((0.0, 0.5), (0.5, 0.9), (1.5, 3.0), (0.2, 5.0), (2.0, 2.0)):
            expected = fixed.clip_by_norm_range(wide, low * norm, high * norm)
            check(oc.clip_by_norm_range, (low * norm, high * norm), expected, updates)


def test_clip_by_norm_range_of_each_leaf(rng, dtype):
    make = functools.partial(oc.clip_by_norm_range, norm=oc.norms.leaf_norm())
    for updates in some_trees(rng, dtype):
        wide = trees.wide_leaves(updates)
        expected = [fixed.clip_by_norm_range([x], 0.5, 2.0)[0] for x in wide]
        check(make, (0.5, 2.0), expected, updates)


def test_smooth_clip_by_global_norm(rng, dtype):
    for updates in some_trees(rng, dtype):
        for bound in (0.0, 1e-3, 1.0, 1e3, np.inf):
            expected = fixed.smooth_clip_by_global_norm(trees.wide_leaves(updates), bound)
            check(oc.smooth_clip_by_global_norm, (bound,), expected, updates)


def check_agc(make, updates, params, *numbers):
    arguments = make.keywords if isinstance(make, functools.partial) else {}
    expected = fixed.adaptive_grad_clip(trees.wide_leaves(updates), trees.wide_leaves(params), *numbers, **arguments)
    check(make, numbers, expected, updates, params)


def test_adaptive_grad_clip(rng, dtype):
    for updates in some_trees(rng, dtype):
        params = trees.like(rng, updates)
        for clipping, eps in ((0.01, 1e-3), (0.3, 1e-3), (0.5, 2.0), (1e3, 1e-3), (0.0, 1e-3), (np.inf, 1e-3)):
            check_agc(oc.adaptive_grad_clip, updates, params, clipping, eps)
        # The floor eps lets a freshly zeroed layer move.
        check_agc(oc.adaptive_grad_clip, updates, jax.tree.map(np.zeros_like, updates), 0.5, 1e-2)


@two_dtypes
@pytest.mark.parametrize("units", ["io", "oi", "leaf"])
def test_adaptive_grad_clip_units(rng, dtype, units):
    make = functools.partial(oc.adaptive_grad_clip, units=units)
    for updates in some_trees(rng, dtype, UNIT_SHAPES):
        check_agc(make, updates, trees.like(rng, updates), 0.3, 1e-3)


@two_dtypes
@pytest.mark.parametrize("units", ["io", "oi", "leaf"])
@pytest.mark.parametrize("stacked", [1, 2])
def test_adaptive_grad_clip_units_of_layers(rng, dtype, units, stacked):
    make = functools.partial(oc.adaptive_grad_clip, units=units, stacked=stacked)
    for updates in some_trees(rng, dtype, STACKED_SHAPES[stacked]):
        check_agc(make, updates, trees.like(rng, updates), 0.3, 1e-3)


@two_dtypes
@pytest.mark.parametrize("axis", [-1, (0, 2)])
def test_adaptive_grad_clip_axis(rng, dtype, axis):
    make = functools.partial(oc.adaptive_grad_clip, axis=axis)
    for updates in some_trees(rng, dtype, [(2, 3, 4), (2, 2, 3, 4)]):
        check_agc(make, updates, trees.like(rng, updates), 0.1, 1e-3)


def test_clippy(rng, dtype):
    for updates in some_trees(rng, dtype):
        params = trees.like(rng, updates)
        wide = trees.wide_leaves(updates), trees.wide_leaves(params)
        for relative, absolute in ((0.1, 1e-7), (0.5, 1e-2), (0.0, 0.1), (0.1, 0.0), (100.0, 100.0)):
            check(contrib.clippy, (relative, absolute), fixed.clippy(*wide, relative, absolute), updates, params)


def test_mixed_dtypes_share_one_global_norm(rng):
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
    for bound in (1e-2, 1.0, 100.0):
        updates = [trees.normal(rng, (7,), dtype) for dtype in dtypes]
        wide = trees.wide_leaves(updates)
        check(oc.clip_by_global_norm, (bound,), fixed.clip_by_global_norm(wide, bound), updates)
        check(oc.smooth_clip_by_global_norm, (bound,), fixed.smooth_clip_by_global_norm(wide, bound), updates)


def test_a_tree_without_numbers():
    for updates in ({}, [], {"a": None}, {"a": jnp.zeros((0, 3)), "b": jnp.zeros((0,))}):
        assert float(oc.global_norm(updates)) == 0
        for tx in (oc.clip(1.0), oc.clip_by_global_norm(1.0), oc.clip_by_leaf_norm(1.0), oc.clip_by_block_rms(1.0)):
            trees.assert_same_bits(trees.update(tx, updates), updates)


# Any norm goes with any threshold: pairs that have no name, each in the words of the references.


def leafwise(measure, lower, upper):
    def apply(updates):
        return [fixed.bring(x, measure(x), lower(measure(x)), upper(measure(x))) for x in updates]

    return apply


def rms(x):
    return fixed.vector_norm(x) / np.sqrt(x.size)


PAIRS = {
    "leaf_norm, smooth": (
        lambda: oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.smooth(2.0)),
        leafwise(fixed.vector_norm, lambda n: 0, lambda n: 2 * n / (2 + n)),
    ),
    "leaf_norm, between": (
        lambda: oc.clip_by(oc.norms.leaf_norm(3), oc.thresholds.between(0.5, 1.5)),
        leafwise(lambda x: fixed.vector_norm(x, 3), lambda n: 0.5, lambda n: 1.5),
    ),
    "leaf_rms, exactly": (
        lambda: oc.clip_by(oc.norms.leaf_rms(), oc.thresholds.exactly(0.75)),
        leafwise(rms, lambda n: 0.75, lambda n: 0.75),
    ),
    "leaf_rms, chain": (
        lambda: oc.clip_by(
            oc.norms.leaf_rms(), oc.thresholds.chain(oc.thresholds.smooth(4.0), oc.thresholds.constant(1.5))
        ),
        leafwise(rms, lambda n: 0, lambda n: min(4 * n / (4 + n), 1.5)),
    ),
    "global_norm, exactly": (
        lambda: oc.clip_by(oc.norms.global_norm(1), oc.thresholds.exactly(3.0)),
        lambda updates: [fixed.bring(x, fixed.global_norm(updates, 1), 3.0, 3.0) for x in updates],
    ),
}


@two_dtypes
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_without_a_name(rng, dtype, name):
    make, reference = PAIRS[name]
    for updates in some_trees(rng, dtype):
        check(make, (), reference(trees.wide_leaves(updates)), updates)


@two_dtypes
def test_relative_to_params_offset(rng, dtype):
    """ratio * max(||w||, floor) + offset, per leaf."""

    def make(ratio, floor, offset):
        threshold = oc.thresholds.relative_to_params(ratio, floor=floor, offset=offset)
        return oc.clip_by(oc.norms.leaf_norm(), threshold)

    for updates in some_trees(rng, dtype):
        params = trees.like(rng, updates)
        expected = [
            fixed.bring(g, fixed.vector_norm(g), 0, 0.1 * max(fixed.vector_norm(w), 0.5) + 0.05)
            for g, w in zip(trees.wide_leaves(updates), trees.wide_leaves(params), strict=True)
        ]
        check(make, (0.1, 0.5, 0.05), expected, updates, params)


@two_dtypes
@pytest.mark.parametrize("ord", ORDS)
def test_group_norm(rng, dtype, ord):
    """Two labelled groups, one bound each."""
    shapes = {"a": {"b": (7,), "w": (2, 3, 4)}, "c": ()}
    updates = jax.tree.map(
        lambda shape: trees.normal(rng, shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    b, w, c = trees.wide_leaves(updates)
    expected = [*fixed.clip_by_global_norm([b, w], 1.0, ord), *fixed.clip_by_global_norm([c], 2.0, ord)]
    for labels in ({"a": "first", "c": "second"}, lambda path: "first" if path.startswith("a/") else "second"):
        norm = oc.norms.group_norm(labels, ord)

        def make(first, second, norm=norm):
            return oc.clip_by(norm, oc.thresholds.constant({"first": first, "second": second}))

        check(make, (1.0, 2.0), expected, updates)


@two_dtypes
def test_include(rng, dtype):
    """A frozen leaf is neither counted nor touched."""
    updates = {"train": trees.normal(rng, (2, 3, 4), dtype), "frozen": trees.normal(rng, (7,), dtype, 10.0)}
    expected = {"train": fixed.clip_by_global_norm(trees.wide_leaves([updates["train"]]), 1.0)[0]}
    for include in ({"train": True, "frozen": False}, lambda path: path == "train"):
        norm = oc.norms.global_norm(include=include)
        tx = oc.clip_by(norm, oc.thresholds.constant(1.0))
        ours = jax.jit(lambda updates, tx=tx: trees.update(tx, updates))(updates)
        trees.assert_same_bits(ours["frozen"], updates["frozen"])
        trees.assert_close(ours["train"], expected["train"], RTOL)
