"""Norms of arrays in both forms, over the whole float range, under jax's transformations and on meshes."""

import functools
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


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def norms_by_ord(arrays, form, ords, dims=None):
    """The norms of every order, in one program for each form."""
    return {ord: norms(arrays, ord, dims) for ord in ords}


# Over the whole range.


def test_two_numbers_of_any_two_sizes(rng, form):
    """From 2^-126 to 2^127, with thresholds, overflows and underflows anywhere between them."""
    powers = np.array([*itertools.product(range(-126, 128, 3), range(-126, 128, 2))])
    pairs = signed(rng, powers.shape) * 2.0**powers
    turned = pairs * np.exp(2j * np.pi * rng.uniform(size=pairs.shape))
    given = [
        without_subnormal(x) for x in (pairs.astype(np.float32), pairs.astype(jnp.bfloat16), turned.astype("complex64"))
    ]
    for ord, by_array in norms_by_ord(given, form, ORDS, (1,)).items():
        for found, x in zip(by_array, given, strict=True):
            assert found.dtype == jnp.float32
            assert_right(found, x, places(form, ord), ord, (1,))


def test_arrays_of_every_dtype(rng, form):
    """Arrays of one kind are reduced in a stack, whatever the others hold."""
    kinds = [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, *NARROW]
    for spread in (0.0, 0.5, 1.0):
        given = []
        for kind in kinds:
            info = jnp.finfo(kind)
            ends = np.log2([float(info.tiny), float(info.max) / 2])
            x = signed(rng, 12) * 2.0 ** (rng.uniform(*ends) * (1 - spread) + spread * rng.uniform(*ends, 12))
            given.append(without_subnormal((x * (1 - 1j) if kind == jnp.complex64 else x).astype(kind)))
        for ord, by_array in norms_by_ord(given, form, (1, 2, 8, math.inf)).items():
            for found, x in zip(by_array, given, strict=True):
                assert found.dtype == jnp.float32
                assert_right(found, x, places(form, ord), ord)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_thousand_numbers(rng, form, scale):
    """Float64 sums do not round more for it. Float32 ones do: here one by one, on a TPU in a thousand lanes."""
    given = [(scale * rng.normal(size=1000)).astype(kind) for kind in (jnp.float32, jnp.bfloat16)]
    for found, x in zip(norms(given), given, strict=True):
        assert_right(found, x, {"default": 1, "tpu": 16}[form])


def test_double_precision(rng, form):
    powers = np.array([*itertools.product(range(-1022, 1024, 31), range(-1022, 1024, 33))])
    pairs = without_subnormal(signed(rng, powers.shape) * 2.0**powers)
    with jax.enable_x64(True):
        given = [pairs, pairs + 1j * pairs[::-1], np.full((2, 2), 1.5e308), pairs[:3].astype(np.float32) * 0 + 3]
        for ord, (double, complex_, most, single) in norms_by_ord(given, form, (1, 2, 3, math.inf), (1,)).items():
            assert [x.dtype for x in (double, complex_, most, single)] == [*["float64"] * 3, "float32"]
            assert_right(double, given[0], 8, ord, (1,))
            assert_right(complex_, given[1], 8, ord, (1,))
            assert_right(single, given[3], places(form, ord), ord, (1,))
            assert np.all(np.isfinite(most)), ord
            assert np.all(most == (1.5e308 if ord == math.inf else np.finfo(np.float64).max)), ord


def test_the_ends_of_the_range(form):
    def of_four(value):
        """(order, norm, numbers) of each order and kind, all of one program."""
        given = [np.full((2, 2), value).astype(kind) for kind in (jnp.float32, jnp.bfloat16)]
        given.append(np.full((2, 2), value * (1 if value < 3e38 else 1 + 1j), np.complex64))
        for ord, by_array in norms_by_ord(given, form, (1, 2, 3, 7, 8, 40, math.inf)).items():
            yield from ((ord, found, x) for found, x in zip(by_array, given, strict=True))

    for ord, found, x in of_four(0):
        assert found == 0, (ord, x.dtype)
    for ord, found, x in of_four(1e-39):  # subnormal: at p = 1 a sum of such numbers is as well
        assert found == 0, (ord, x.dtype)
    for ord, found, x in of_four(2.9e38):
        assert np.isfinite(found), (ord, x.dtype)
        assert_right(found, x, places(form, ord), ord)
    for ord, found, x in of_four(3e38):
        assert np.isfinite(found), (ord, x.dtype)
        assert_right(found, x, places(form, ord), ord)
        assert found == MOST or x.dtype != "complex64", ord


def test_a_norm_that_is_subnormal_is_zero():
    """Asked of the function itself: where this machine calculates it flushes them anyway."""
    numbers = np.float32([1e-45, 1e-39, TINY, 1])
    np.testing.assert_array_equal(array_norms._normal(numbers), np.float32([0, 0, TINY, 1]))


def test_numbers_that_are_subnormal_in_a_narrow_dtype_count(form):
    kinds = [jnp.float16, *(kind for kind in NARROW if jnp.finfo(kind).smallest_subnormal < 1)]
    given = [np.full(4, float(jnp.finfo(kind).smallest_subnormal)).astype(kind) for kind in kinds]
    for found, x in zip(norms(given), given, strict=True):
        assert_right(found, x, places(form))
        assert float(found) > 0


def test_an_entry_that_is_not_finite(form):
    """Its own array has a norm that is not finite, and no other, of the same kind or not."""
    ords = (1, 2, 3, 40, math.inf)
    fine = [np.ones(3, np.float32), np.ones(3, np.float32), np.ones(3, "complex64"), np.ones(3, jnp.bfloat16)]
    for at, bad in itertools.product(range(4), (np.inf, -np.inf, np.nan, complex(1, np.inf), complex(np.nan, 1))):
        given = [x.copy() for x in fine]
        if np.iscomplexobj(bad) and not np.iscomplexobj(given[at]):
            continue
        given[at][1] = bad
        for ord, found in norms_by_ord(given, form, ords).items():
            np.testing.assert_array_equal(np.isfinite(found), np.arange(4) != at, err_msg=f"{ord}, {bad}")
            if np.isinf(bad):
                assert found[at] == np.inf, ord
    both = np.array([np.inf, np.nan, 1], np.float32)
    for ord, (found, *_) in norms_by_ord([both, *fine[1:]], form, ords).items():
        assert not np.isfinite(found), ord


def test_scalars_and_empty_arrays(form):
    given = [np.float32(-3), np.zeros((0,), np.float32), np.zeros((2, 0, 3), jnp.bfloat16), np.float32(-4e-30)]
    ords, empty = (1, 2, 40, math.inf), [np.zeros((3, 0), np.float32)]
    for ord, found in norms_by_ord(given, form, ords).items():
        np.testing.assert_array_equal(found, np.float32([3, 0, 0, 4e-30]), err_msg=str(ord))
    for ord, (rows,) in norms_by_ord(empty, form, ords, (1,)).items():
        np.testing.assert_array_equal(rows, np.zeros(3), err_msg=str(ord))
    for ord, (columns,) in norms_by_ord(empty, form, ords, (0,)).items():
        assert columns.shape == (0,), ord
        assert norms([], ord) == []


# Some dimensions.


def test_norms_over_some_dimensions(rng, form):
    over = [(), (0,), (1,), (0, 2), (1, 2)]
    given = [signed(rng, (4, 3, 5)).astype(kind) for kind in (jnp.float32, jnp.float32, jnp.bfloat16, jnp.complex64)]
    given[1] *= np.float32(10) ** rng.integers(-36, 36, given[1].shape)
    by_dims = jax.jit(lambda arrays: [norms(arrays, 2, dims) for dims in over])(given)
    for dims, by_array in zip(over, by_dims, strict=True):
        for found, x in zip(by_array, given, strict=True):
            assert_right(found, x, places(form), 2, dims)


# Transformations of jax.


def one_norm(ord):
    return lambda x: array_norms.norms([x], [(0,)], ord)[0]


def by_each(transformed, ords):
    """A jitted function to a dict: what the transformation of each order's norm gives."""
    return jax.jit(lambda *args: {ord: transformed(one_norm(ord))(*args) for ord in ords})


def right_slope(x, ord):
    norm = right_norm(x, ord)
    if ord == math.inf:
        at = np.abs(x) == norm
        return np.sign(x) * at / at.sum()
    return np.sign(x) * (np.abs(x) / norm) ** (ord - 1)


SCALES = np.float32([1e-37, 1e-30, 1e-20, 1, 1e10, 1e25, 3e37])


def test_the_gradient_over_the_range():
    x = np.float32([0.5, -1.5, 2, -2])
    slopes = by_each(jax.grad, (1, 1.5, 2, 3, 40, math.inf))
    for scale in SCALES:
        for ord, slope in slopes(x * scale).items():
            np.testing.assert_allclose(slope, right_slope(x * scale, ord), rtol=1e-5, err_msg=f"{ord}, {scale}")
    for ord, slope in slopes(np.zeros(4, np.float32)).items():
        np.testing.assert_array_equal(slope, np.zeros(4), err_msg=str(ord))


def test_the_hessian_over_the_range():
    x = np.float32([0.5, -1.5, 2])
    hessians = by_each(jax.hessian, (2, 3))
    for scale in SCALES:
        given = (x * scale).astype(np.float64)
        for ord, hessian in hessians(x * scale).items():
            norm, slope = float(right_norm(given, ord)), right_slope(given, ord)
            curved = np.diag((np.abs(given) / norm) ** (ord - 2)) - np.outer(slope, slope)
            right = (ord - 1) / norm * curved
            within = max(4 * TINY, 1e-6 * np.abs(right).max())
            np.testing.assert_allclose(hessian, right, rtol=1e-4, atol=within, err_msg=f"{ord}, {scale}")
    for ord, hessian in hessians(np.zeros(3, np.float32)).items():
        assert np.all(np.isfinite(hessian)), ord


def test_the_gradient_of_16_bit_and_complex_arrays():
    given = [np.float32([3, -4]).astype(kind) for kind in (jnp.bfloat16, jnp.complex64)]
    slopes = jax.jit(lambda given: [jax.grad(one_norm(2))(x) for x in given])(given)
    for slope, x in zip(slopes, given, strict=True):
        assert slope.dtype == x.dtype
        np.testing.assert_array_equal(slope, np.float32([0.6, -0.8]).astype(x.dtype))


def test_vmap_and_jit_give_the_same(rng, form):
    x, ords = (signed(rng, (3, 5)) * 10 ** rng.uniform(-30, 30, (3, 5))).astype(np.float32), (2, 3, math.inf)
    by_columns = by_each(functools.partial(jax.vmap, in_axes=1), ords)(x.T)
    slopes = by_each(lambda norm: jax.vmap(jax.grad(norm)), ords)(x)
    for ord in ords:
        by_rows = jax.vmap(one_norm(ord))(x)
        assert_right(by_rows, x, places(form, ord), ord, (1,))
        np.testing.assert_array_equal(by_columns[ord], by_rows)
        np.testing.assert_allclose(slopes[ord], [right_slope(row, ord) for row in x], rtol=1e-5, atol=1e-30)


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


def norms_of_tree(tree, axes, ords):
    """The global norms, and the norms of the leaves."""
    specs = [SPECS[name] for name in tree]
    flat, dims = list(tree.values()), [tuple(range(x.ndim)) for x in tree.values()]
    split = [tuple(name for name in spec if name) if axes else () for spec in specs]
    return {
        ord: (oc.global_norm(tree, ord=ord, axes=axes), jnp.stack(tree_norms.separate_norms(flat, dims, split, ord)))
        for ord in ords
    }


def assert_norms_of_tree(found, tree, places):
    for ord, (total, each) in found.items():
        for one, x in zip(each, tree.values(), strict=True):
            assert_right(one, x, places, ord)
        assert_right(total, np.concatenate([x.ravel() for x in tree.values()]), places, ord)


def test_in_shard_map(rng, form):
    """Without types of what varies, and in the form of a TPU, a sum of squares and one of other powers."""
    tree = leaves(rng)
    for check_vma, ords in {"default": [(True, ON_MESHES), (False, (2, 3))], "tpu": [(True, (2, 3))]}[form]:
        mapped = jax.shard_map(
            functools.partial(norms_of_tree, axes=SPECS, ords=ords),
            mesh=AUTO,
            in_specs=(SPECS,),
            out_specs=P(),
            check_vma=check_vma,
        )
        # Across devices squares are summed at three scales, in every form.
        assert_norms_of_tree(jax.jit(mapped)(tree), tree, 6)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_on_a_mesh(rng, form, mesh):
    tree, ords = leaves(rng), ON_MESHES if form == "default" else (2, 3)
    laid_out = {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}
    with jax.set_mesh(mesh):
        found = jax.jit(lambda tree: norms_of_tree(tree, None, ords))(laid_out)
    assert_norms_of_tree(found, tree, 2 * places(form))
