"""Norms of arrays in both forms, over the whole float range, under jax's transformations and on meshes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip._numerics import array_norms, tree_norms
from tests.support.forms import TINY, assert_right, form_of, norms, places, right_norm, signed, without_subnormal
from tests.support.meshes import AUTO, EXPLICIT
from tests.table import NARROW

ORDS = (1, 1.5, 2, 3, 7, 8, 40, math.inf)
MOST = np.finfo(np.float32).max


@pytest.fixture(scope="module", params=["default", "tpu"], autouse=True)
def form(request):
    """Float64 sums, which CPUs and GPUs take, and three scales. For a CPU's own see test_norms_of_columns.py."""
    with form_of(request.param):
        yield request.param


# Over the whole range.


@pytest.mark.parametrize("ord", ORDS)
def test_two_numbers_of_any_two_sizes(rng, form, ord):
    """From 2^-126 to 2^127, with thresholds, overflows and underflows anywhere between them."""
    powers = np.array([*itertools.product(range(-126, 128, 3), range(-126, 128, 2))])
    pairs = signed(rng, powers.shape) * 2.0**powers
    turned = pairs * np.exp(2j * np.pi * rng.uniform(size=pairs.shape))
    given = [
        without_subnormal(x) for x in (pairs.astype(np.float32), pairs.astype(jnp.bfloat16), turned.astype("complex64"))
    ]
    for found, x in zip(norms(given, ord, (1,)), given, strict=True):
        assert found.dtype == jnp.float32
        assert_right(found, x, places(form, ord), ord, (1,))


@pytest.mark.parametrize("ord", [1, 2, 8, math.inf])
def test_arrays_of_every_dtype(rng, form, ord):
    """Arrays of one kind are reduced in a stack, whatever the others hold."""
    kinds = [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, *NARROW]
    for spread in (0.0, 0.5, 1.0):
        given = []
        for kind in kinds:
            info = jnp.finfo(kind)
            ends = np.log2([float(info.tiny), float(info.max) / 2])
            x = signed(rng, 12) * 2.0 ** (rng.uniform(*ends) * (1 - spread) + spread * rng.uniform(*ends, 12))
            given.append(without_subnormal((x * (1 - 1j) if kind == jnp.complex64 else x).astype(kind)))
        for found, x in zip(norms(given, ord), given, strict=True):
            assert found.dtype == jnp.float32
            assert_right(found, x, places(form, ord), ord)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_thousand_numbers(rng, form, scale):
    """Float64 sums do not round more for it. Float32 ones do: here one by one, on a TPU in a thousand lanes."""
    given = [(scale * rng.normal(size=1000)).astype(kind) for kind in (jnp.float32, jnp.bfloat16)]
    for found, x in zip(norms(given), given, strict=True):
        assert_right(found, x, {"default": 1, "tpu": 16}[form])


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_double_precision(rng, form, ord):
    powers = np.array([*itertools.product(range(-1022, 1024, 31), range(-1022, 1024, 33))])
    pairs = without_subnormal(signed(rng, powers.shape) * 2.0**powers)
    with jax.enable_x64(True):
        given = [pairs, pairs + 1j * pairs[::-1], np.full((2, 2), 1.5e308), pairs[:3].astype(np.float32) * 0 + 3]
        double, complex_, most, single = norms(given, ord, (1,))
        assert [x.dtype for x in (double, complex_, most, single)] == [*[np.dtype("float64")] * 3, np.dtype("float32")]
        assert_right(double, given[0], 8, ord, (1,))
        assert_right(complex_, given[1], 8, ord, (1,))
        assert_right(single, given[3], places(form, ord), ord, (1,))
        assert np.all(np.isfinite(most))
        assert np.all(most == (1.5e308 if ord == math.inf else np.finfo(np.float64).max))


@pytest.mark.parametrize("ord", [1, 2, 3, 7, 8, 40, math.inf])
def test_the_ends_of_the_range(form, ord):
    kinds = [jnp.float32, jnp.bfloat16, jnp.complex64]

    def of_four(value):
        given = [np.full((2, 2), value).astype(kind) for kind in kinds if np.isreal(value) or kind == jnp.complex64]
        return zip(norms(given, ord), given, strict=True)

    for found, x in of_four(0):
        assert found == 0, x.dtype
    for found, x in of_four(1e-39):  # subnormal: at p = 1 a sum of such numbers is as well
        assert found == 0, x.dtype
    for found, x in of_four(3e38):
        assert np.isfinite(found)
        assert_right(found, x, places(form, ord), ord)
    for found, x in of_four(3e38 * (1 + 1j)):
        assert found == MOST, x.dtype


def test_a_norm_that_is_subnormal_is_zero():
    """Asked of the function itself: where this machine calculates it flushes them anyway."""
    numbers = np.float32([1e-45, 1e-39, TINY, 1])
    np.testing.assert_array_equal(array_norms._normal(numbers), np.float32([0, 0, TINY, 1]))


def test_numbers_that_are_subnormal_in_a_narrow_dtype_count(form):
    kinds = [jnp.float16, *(kind for kind in NARROW if jnp.finfo(kind).smallest_subnormal < 1)]
    given = [np.full(4, float(jnp.finfo(kind).smallest_subnormal)).astype(kind) for kind in kinds]
    for found, x in zip(norms(given), given, strict=True):
        assert_right(found, x, places(form))
        assert found > 0


@pytest.mark.parametrize("ord", [1, 2, 3, 40, math.inf])
def test_an_entry_that_is_not_finite(ord):
    """Its own array has a norm that is not finite, and no other, of the same kind or not."""
    fine = [np.ones(3, np.float32), np.ones(3, np.float32), np.ones(3, "complex64"), np.ones(3, jnp.bfloat16)]
    for at, bad in itertools.product(range(4), (np.inf, -np.inf, np.nan, complex(1, np.inf), complex(np.nan, 1))):
        given = [x.copy() for x in fine]
        if np.iscomplexobj(bad) and not np.iscomplexobj(given[at]):
            continue
        given[at][1] = bad
        found = np.asarray(norms(given, ord))
        np.testing.assert_array_equal(np.isfinite(found), np.arange(4) != at)
        if np.isinf(bad):
            assert found[at] == np.inf
    both = np.array([np.inf, np.nan, 1], np.float32)
    assert not np.isfinite(norms([both, *fine[1:]], ord)[0])


@pytest.mark.parametrize("ord", [1, 2, 40, math.inf])
def test_scalars_and_empty_arrays(ord):
    given = [np.float32(-3), np.zeros((0,), np.float32), np.zeros((2, 0, 3), jnp.bfloat16), np.float32(-4e-30)]
    np.testing.assert_array_equal(norms(given, ord), np.float32([3, 0, 0, 4e-30]))
    (rows,) = norms([np.zeros((3, 0), np.float32)], ord, (1,))
    np.testing.assert_array_equal(rows, np.zeros(3))
    (columns,) = norms([np.zeros((3, 0), np.float32)], ord, (0,))
    assert columns.shape == (0,)
    assert norms([], ord) == []


# Some dimensions.


@pytest.mark.parametrize("dims", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_norms_over_some_dimensions(rng, form, dims):
    given = [signed(rng, (4, 3, 5)).astype(kind) for kind in (jnp.float32, jnp.float32, jnp.bfloat16, jnp.complex64)]
    given[1] *= np.float32(10) ** rng.integers(-36, 36, given[1].shape)
    for found, x in zip(norms(given, 2, dims), given, strict=True):
        assert_right(found, x, places(form), 2, dims)


# Transformations of jax.


def one_norm(ord):
    return lambda x: array_norms.norms([x], [(0,)], ord)[0]


def right_slope(x, ord):
    norm = right_norm(x, ord)
    if ord == math.inf:
        at = np.abs(x) == norm
        return np.sign(x) * at / at.sum()
    return np.sign(x) * (np.abs(x) / norm) ** (ord - 1)


SCALES = np.float32([1e-37, 1e-30, 1e-20, 1, 1e10, 1e25, 3e37])


@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, 40, math.inf])
def test_the_gradient_over_the_range(ord):
    x = np.float32([0.5, -1.5, 2, -2])
    slope = jax.jit(jax.grad(one_norm(ord)))
    for scale in SCALES:
        np.testing.assert_allclose(slope(x * scale), right_slope(x * scale, ord), rtol=1e-5)
    np.testing.assert_array_equal(slope(np.zeros(4, np.float32)), np.zeros(4))


@pytest.mark.parametrize("ord", [2, 3])
def test_the_hessian_over_the_range(ord):
    x = np.float32([0.5, -1.5, 2])
    hessian = jax.jit(jax.hessian(one_norm(ord)))
    for scale in SCALES:
        given = (x * scale).astype(np.float64)
        norm, slope = float(right_norm(given, ord)), right_slope(given, ord)
        curved = np.diag((np.abs(given) / norm) ** (ord - 2)) - np.outer(slope, slope)
        right = (ord - 1) / norm * curved
        np.testing.assert_allclose(hessian(x * scale), right, rtol=1e-4, atol=max(4 * TINY, 1e-6 * np.abs(right).max()))
    assert np.all(np.isfinite(hessian(np.zeros(3, np.float32))))


def test_the_gradient_of_16_bit_and_complex_arrays():
    for kind in (jnp.bfloat16, jnp.complex64):
        x = jnp.asarray(np.float32([3, -4]).astype(kind))
        slope = jax.grad(lambda x: array_norms.norms([x], [(0,)], 2)[0])(x)
        assert slope.dtype == kind
        np.testing.assert_array_equal(slope, jnp.asarray([0.6, -0.8]).astype(kind))


@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_vmap_and_jit_give_the_same(rng, form, ord):
    x = (signed(rng, (3, 5)) * 10 ** rng.uniform(-30, 30, (3, 5))).astype(np.float32)
    by_rows = jax.vmap(one_norm(ord))(x)
    assert_right(by_rows, x, places(form, ord), ord, (1,))
    np.testing.assert_array_equal(jax.jit(jax.vmap(one_norm(ord), in_axes=1))(x.T), by_rows)
    slopes = jax.jit(jax.vmap(jax.grad(one_norm(ord))))(x)
    np.testing.assert_allclose(slopes, [right_slope(row, ord) for row in x], rtol=1e-5, atol=1e-30)


# Meshes.


ON_MESHES = (2, 3, math.inf)
TREE = {"rows": ((8, 6), P("data")), "columns": ((3, 6), P(None, "model")), "both": ((4, 4), P(("data", "model")))}
SPECS = {name: P("data", "model") if name == "both" else spec for name, (_, spec) in TREE.items()} | {"whole": P()}


def leaves(rng):
    """Of very different sizes, so that squares of some have no float32."""
    sizes = {"rows": 1e-30, "columns": 1e30, "both": 1.0}
    tree = {name: (signed(rng, shape) * sizes[name]).astype(np.float32) for name, (shape, _) in TREE.items()}
    tree |= {"whole": np.float32([3e25, 4e25])}
    return {name: tree[name] for name in sorted(tree)}  # as jit orders them


def norms_of_tree(tree, axes):
    """The global norms, and the norms of the leaves."""
    specs = [SPECS[name] for name in tree]
    flat, dims = list(tree.values()), [tuple(range(x.ndim)) for x in tree.values()]
    split = [tuple(name for name in spec if name) if axes else () for spec in specs]
    return [
        (oc.global_norm(tree, ord=ord, axes=axes), jnp.stack(tree_norms.separate_norms(flat, dims, split, ord)))
        for ord in ON_MESHES
    ]


def assert_norms_of_tree(found, tree, places):
    for ord, (total, each) in zip(ON_MESHES, found, strict=True):
        for one, x in zip(each, tree.values(), strict=True):
            assert_right(one, x, places, ord)
        assert_right(total, np.concatenate([x.ravel() for x in tree.values()]), places, ord)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(rng, check_vma):
    tree = leaves(rng)
    mapped = jax.shard_map(
        lambda tree: norms_of_tree(tree, SPECS), mesh=AUTO, in_specs=(SPECS,), out_specs=P(), check_vma=check_vma
    )
    # Across devices squares are summed at three scales, in every form.
    assert_norms_of_tree(jax.jit(mapped)(tree), tree, 6)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_on_a_mesh(rng, form, mesh):
    tree = leaves(rng)
    laid_out = {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}
    with jax.set_mesh(mesh):
        found = jax.jit(lambda tree: norms_of_tree(tree, None))(laid_out)
    assert_norms_of_tree(found, tree, 2 * places(form))
