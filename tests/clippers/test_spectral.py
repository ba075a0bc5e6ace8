"""Singular values against those of float64, by both ways of finding them, whichever this machine would take."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import optaxclip as oc
from optaxclip._numerics.matrices import capping
from optaxclip._numerics.matrices.products import turned
from tests.reference import spectral
from tests.reference.trees import assert_same_bits, update
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, EXPLICIT, P, put

EPS = float(np.finfo(np.float32).eps)
WAYS = ("decompositions", "iterations")
each_way = pytest.mark.parametrize("way", WAYS)


@contextlib.contextmanager
def by(way):
    """While this is entered, what is traced takes one of the ways."""

    def chosen(*arguments, cpu, default):
        return (cpu if way == "decompositions" else default)(*arguments)

    with mock.patch.object(jax.lax, "platform_dependent", chosen), contextlib.ExitStack() as stack:
        for name in ("capped", "largest_singular_values"):  # what was traced before would be taken again
            stack.enter_context(mock.patch.object(capping, name, getattr(capping, name).__wrapped__))
        yield


@functools.cache
def capped(way, soft):
    """The cap of a stack, compiled."""

    def run(stack, caps):
        with by(way):
            out, kept = capping._capped(tall(stack), caps, soft)
        out = out if out.shape == stack.shape else turned(out)
        return capping.Capped(jnp.where(kept[:, None, None], stack, out), kept)

    return jax.jit(run)


def tall(stack):
    return turned(stack) if stack.shape[-2] < stack.shape[-1] else stack


def cap(way, matrix, c, *, soft):
    dtype = np.finfo(matrix.dtype).dtype
    return np.asarray(capped(way, soft)(jnp.asarray(matrix)[None], jnp.asarray([c], dtype)).matrices)[0]


@functools.cache
def largest(way):
    def run(stack):
        with by(way):
            return capping._largest_singular_values(tall(stack))

    return jax.jit(run)


def allowed(c, top, relative=1e-3):
    """How far, in the spectral norm, the result may be from that of float64."""
    return relative * c + 20 * EPS * top


# Accuracy.

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (33, 64), (256, 100), (512, 512), (1024, 1024), (2048, 512)]
CAPS = (1.0, 0.3, 0.1, 0.04, 0.03, 0.01, 0.003, 0.001)


BIG = 500  # from which on float64 takes seconds: the hardest spectra and caps alone


def spectra(number):
    """From 1 down to a condition: evenly by ratio, evenly by difference, and one that stands out."""
    for condition in (1.0, 10.0, 1e3, 1e6) if number < BIG else (1e6,):
        yield np.geomspace(1, 1 / condition, number)
        yield np.linspace(1, 1 / condition, number)
        yield np.r_[1.0, np.full(number - 1, 1 / condition)]
    yield np.r_[np.ones(number - number // 2), np.zeros(number // 2)]  # half of the rank


@each_way
@pytest.mark.parametrize("shape", slow_but(SHAPES, *SHAPES[:5]), ids=str)
def test_the_cap_is_that_of_float64(rng, shape, way):
    for values in spectra(min(shape)):
        size = 10.0 ** rng.uniform(-3, 3)
        matrix = np.float32(size * spectral.with_singular_values(rng, shape, values))
        triple = spectral.svd(matrix)
        top = triple[1][0]
        for part in CAPS if max(shape) < BIG else (0.04, 0.001):
            for soft in (False, True):
                right = spectral.capped(triple, part * top, soft=soft)
                error = np.linalg.norm(cap(way, matrix, part * top, soft=soft) - right, 2)
                assert error <= allowed(part * top, top), (part, soft, values[:3], error / top)


@each_way
@pytest.mark.parametrize("shape", slow_but(SHAPES, *SHAPES[:5]), ids=str)
def test_the_largest_singular_value_is_that_of_float64(rng, shape, way):
    for values in spectra(min(shape)):
        matrix = np.float32(spectral.with_singular_values(rng, shape, values))
        right = spectral.svd(matrix)[1][0]
        ratio = float(largest(way)(jnp.asarray(matrix)[None])[0]) / right
        assert 1 - 3e-6 <= ratio <= 1 + (1e-5 if way == "iterations" else 3e-6), values[:3]


@each_way
@pytest.mark.parametrize("soft", [False, True])
def test_complex_and_float64(rng, soft, way):
    with jax.enable_x64(True):
        for shape, dtype, within in (
            ((6, 4), np.complex64, 1e-5),
            ((6, 4), np.float64, 1e-12),
            ((6, 4), np.complex128, 1e-12),
            ((4, 6), np.complex64, 1e-5),
            ((5, 5), np.float64, 1e-12),
        ):
            matrix = rng.normal(size=shape).astype(dtype)
            matrix = matrix + 1j * matrix[::-1] if np.iscomplexobj(matrix) else matrix
            triple = spectral.svd(matrix)
            for part in (0.5, 0.01):
                ours = cap(way, matrix, part * triple[1][0], soft=soft)
                assert ours.dtype == matrix.dtype
                right = spectral.capped(triple, part * triple[1][0], soft=soft)
                # Of the hard cap by iterations, next to its kink, half of the digits are right.
                room = max(within, 1e-8) if way == "iterations" and not soft else within
                assert np.linalg.norm(ours - right, 2) <= room * triple[1][0]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(rng, dtype, soft):
    for shape in ((40, 24), (24, 40)):
        for values in spectra(24):
            matrix = jnp.asarray(spectral.with_singular_values(rng, shape, values).astype(dtype))
            triple = spectral.svd(np.asarray(matrix, np.float64))
            top = triple[1][0]
            for part in (1.0, 0.1, 0.01, 0.001):
                ours = update(oc.clip_singular_values(float(part * top), smooth=soft), matrix)
                assert ours.dtype == dtype
                error = np.linalg.norm(np.asarray(ours, np.float64) - spectral.capped(triple, part * top, soft=soft), 2)
                assert error <= allowed(part * top, top, 2e-2), (part, values[:3])


# Over the range.


FAR = {
    "full rank": lambda rng: spectral.with_singular_values(rng, (20, 12), np.geomspace(1, 1e-6, 12)),
    "rank 1": lambda rng: np.outer(rng.normal(size=64), rng.normal(size=32)),
    "ones": lambda rng: np.ones((5, 3)),
    "rank 4": lambda rng: rng.normal(size=(40, 4)) @ rng.normal(size=(4, 64)),
}


@each_way
@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("soft", [False, True])
def test_singular_values_far_above_the_cap(rng, soft, kind, way):
    """The cap is far below the rounding of the largest singular value: nothing is right but the norm."""
    matrix = FAR[kind](rng)
    matrix = np.float32(matrix / np.linalg.norm(matrix, 2))
    for size in (1e-30, 1.0, 1e30):
        for part in (1e-4, 1e-5, 1e-6, 1e-10, 1e-25, 1e-37):
            c = np.float32(size * part)
            if c < 1e-37:
                continue
            ours = np.float64(cap(way, matrix * np.float32(size), c, soft=soft))
            assert np.all(np.isfinite(ours))
            assert np.linalg.norm(ours, 2) == pytest.approx(float(c), rel=0.05)


@each_way
@pytest.mark.parametrize("soft", [False, True])
def test_the_ends_of_the_range(way, soft):
    high, low = np.float32(3e38), np.float32(1.5e-38)
    for size in (high, low, 1.0):
        diagonal = np.diag([size, size / 2, size / 4]).astype(np.float32)
        c = np.float32(size * 0.3)
        right = spectral.capped(spectral.svd(diagonal), float(c), soft=soft)
        if size != low:  # a quarter of it is subnormal, and may count as 0
            np.testing.assert_allclose(cap(way, diagonal, c, soft=soft), right, rtol=1e-5, atol=1e-5 * size)
        np.testing.assert_allclose(largest(way)(diagonal[None]), size, rtol=1.1e-5)
    for matrix in (np.full((2, 2), high), np.array([[high, 1], [low, -1]]), np.full((3, 2), low)):
        for c in (0.0, 1e-45, 1e-30, 1.0, 3.4e38, np.inf):
            assert np.all(np.isfinite(cap(way, np.float32(matrix), np.float32(c), soft=soft)))
    assert float(largest(way)(jnp.full((1, 2, 2), high))[0]) == np.finfo(np.float32).max


@pytest.mark.parametrize("soft", [False, True])
def test_zeros_infinities_and_nan(soft):
    bad = jnp.array([[1.0, jnp.nan], [0.0, 5.0]])
    tree = {
        "zero": jnp.zeros((3, 2)),
        "nan": bad,
        "inf": jnp.where(jnp.isnan(bad), jnp.inf, bad),
        "none": jnp.ones((0, 3)),
    }
    tx = oc.clip_singular_values(0.5, smooth=soft)
    assert_same_bits(update(tx, tree), tree)
    assert_same_bits(update(oc.clip_by_spectral_norm(0.5), tree), tree)
    ones = jnp.ones((3, 2))
    assert not np.any(update(oc.clip_singular_values(0.0, smooth=soft), ones))
    assert_same_bits(update(oc.clip_singular_values(np.inf, smooth=soft), ones), ones)


def test_a_matrix_within_its_cap_keeps_every_bit_beside_one_that_is_not(rng):
    inside, outside = rng.normal(size=(2, 6, 4)).astype(np.float32)
    inside[0, 0] = 1e-45
    tree = {"inside": jnp.asarray(inside / 100), "outside": jnp.asarray(outside)}
    for tx in (oc.clip_singular_values(0.9), oc.clip_by_spectral_norm(0.9)):
        ours = update(tx, tree)
        assert_same_bits(ours["inside"], tree["inside"])
        assert np.linalg.norm(np.float64(ours["outside"]), 2) == pytest.approx(0.9, rel=1e-5)


# Vectors, kernels, stacks.


def test_vectors_take_the_norm_form_of_the_same_map():
    vector = jnp.array([3.0, 4.0])
    for c, soft, factor in ((2.0, False, 0.4), (5.0, False, 1.0), (5.0, True, 0.5**0.5), (2.0, True, 1 / 7.25**0.5)):
        tx = oc.clip_singular_values(c, smooth=soft)
        for leaf in (vector, vector[:, None], vector[None, :]):
            np.testing.assert_allclose(update(tx, leaf), factor * np.asarray(leaf), rtol=1e-6)
        np.testing.assert_allclose(update(tx, jnp.float32(-5.0)), -5 * factor, rtol=1e-6)
    huge = jnp.array([3e38, 0.0])
    np.testing.assert_allclose(update(oc.clip_singular_values(1.0, smooth=True), huge), [1.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(("units", "matrix"), [("io", (18, 5)), ("oi", (3, 30))])
def test_a_kernel_of_higher_rank_is_a_matrix(rng, units, matrix):
    kernel = np.float32(rng.normal(size=(3, 3, 2, 5)))
    flat = kernel.reshape(matrix)
    right = spectral.capped(spectral.svd(flat), 1.5, soft=False).reshape(kernel.shape)
    np.testing.assert_allclose(update(oc.clip_singular_values(1.5, units=units), jnp.asarray(kernel)), right, atol=1e-5)
    scaled = update(oc.clip_by_spectral_norm(1.5, units=units), jnp.asarray(kernel))
    np.testing.assert_allclose(scaled, 1.5 * kernel / np.linalg.norm(np.float64(flat), 2), rtol=1e-5)


def test_layers_and_leaves_of_one_shape_do_not_mix(rng):
    sizes = np.array([[0.1, 1.0, 10.0]])
    stack = np.float32(sizes.T[..., None] * rng.normal(size=(3, 6, 4)))
    single = np.float32(4 * rng.normal(size=(6, 4)))
    tree = {"kernel": jnp.asarray(stack), "other": jnp.asarray(single), "turned": jnp.asarray(single.T)}
    stacked = {"kernel": 1, "other": 0, "turned": 0}
    for each in ([0.5, 2.0, 3.0], 2.0):
        bound = {"kernel": np.float32(each), "other": 1.0, "turned": 1.0}
        caps = np.broadcast_to(np.float32(each), (3,))
        ours = update(oc.clip_singular_values(bound, stacked=stacked), tree)
        for i, c in enumerate(caps):
            right = spectral.capped(spectral.svd(stack[i]), c, soft=False)
            np.testing.assert_allclose(ours["kernel"][i], right, atol=3e-6)
        right = spectral.capped(spectral.svd(single), 1.0, soft=False)
        np.testing.assert_allclose(ours["other"], right, atol=3e-6)
        np.testing.assert_allclose(ours["turned"], right.T, atol=3e-6)
        scaled = update(oc.clip_by_spectral_norm(bound, stacked=stacked), tree)
        norms = [np.linalg.norm(np.float64(layer), 2) for layer in scaled["kernel"]]
        np.testing.assert_allclose(norms, np.minimum([np.linalg.norm(layer, 2) for layer in stack], caps), rtol=1e-5)


@each_way
def test_what_is_alike_is_one_call(rng, way):
    stack = np.float32(rng.normal(size=(4, 6, 3)) * np.array([0.01, 1, 30, 1e20])[:, None, None])
    caps = np.float32([1.0, 0.5, 1.0, 1e3])
    ours = capped(way, False)(stack, caps)
    np.testing.assert_array_equal(ours.kept, [True, False, False, False])
    for one, c, matrix in zip(ours.matrices, caps, stack, strict=True):
        top = np.linalg.norm(np.float64(matrix), 2)
        right = spectral.capped(spectral.svd(matrix), c, soft=False)
        assert np.linalg.norm(one - right, 2) <= allowed(c, top)


@each_way
@pytest.mark.parametrize("soft", [False, True])
def test_under_vmap(rng, soft, way):
    stack = np.float32(rng.normal(size=(4, 1, 6, 3)) * np.array([0.01, 1, 30, 300])[:, None, None, None])
    caps = np.full((4, 1), 0.5, np.float32)
    together = jax.vmap(capped(way, soft))(stack, caps).matrices
    for one, matrix, c in zip(together, stack, caps, strict=True):
        np.testing.assert_allclose(one, capped(way, soft)(matrix, c).matrices, atol=1e-5)


# Any threshold.


def test_thresholds_follow_the_spectral_norm():
    tx = oc.clip_by(oc.norms.spectral_norm(), oc.thresholds.growth(1.5))
    state, step = tx.init(jnp.zeros((2, 2))), jax.jit(tx.update)
    for size, right in ((1.0, 1.0), (4.0, 1.5), (4.0, 2.25)):
        updates, state = step(np.float32(size * np.diag([1.0, 0.5])), state)
        assert float(np.linalg.norm(updates, 2)) == pytest.approx(right, rel=1e-5)


def test_a_record_holds_spectral_norms():
    tx = oc.clip_by_spectral_norm(1.0, record=2)
    _, state = jax.jit(tx.update)({"w": np.diag(np.float32([3, 4]))}, tx.init({"w": jnp.zeros((2, 2))}))
    assert float(state.clip_stats.clip_norm[0, 0]) == pytest.approx(4.0, rel=1e-5)


def test_schedules_are_counted():
    tx = oc.clip_singular_values(lambda count: 1.0 / (1.0 + count))
    state = tx.init(None)
    for right in (1.0, 0.5):
        updates, state = tx.update(jnp.diag(jnp.array([3.0, 4.0])), state)
        np.testing.assert_allclose(jnp.diag(updates), right, rtol=1e-6)


# Derivatives.

# A matrix in general, two with singular values that are the same, one of lower rank, and zeros.
POINTS = {
    "general": [2.0, 1.3, 0.7],
    "the same": [2.0, 2.0, 0.5],
    "all the same": [1.7, 1.7, 1.7],
    "lower rank": [2.0, 0.6, 0.0],
    "zero twice": [2.0, 0.0, 0.0],
    "zeros": [0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", POINTS)
def test_the_derivative_of_the_cap(rng, name, soft, complex_):
    """The hard cap has none where a singular value is the cap; here none is."""

    def one(matrix, caps):
        return capped("decompositions", soft)(matrix[None], caps).matrices[0]

    for shape in ((5, 3), (3, 5), (3, 3)):
        matrix = spectral.with_singular_values(rng, shape, POINTS[name], complex_=complex_)
        change = rng.normal(size=shape) + (1j * rng.normal(size=shape) if complex_ else 0)
        caps, more, step = np.array([1.1]), np.array([0.3]), 1e-5

        def right(t, matrix=matrix, change=change, caps=caps, more=more):
            return spectral.capped(spectral.svd(matrix + t * change), (caps + t * more)[0], soft=soft)

        expected = (right(step) - right(-step)) / (2 * step)
        with jax.enable_x64(True):
            _, ours = jax.jvp(one, (matrix, caps), (change, more))
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("name", POINTS)
def test_the_derivative_of_the_norm(rng, name):
    matrix = spectral.with_singular_values(rng, (4, 3), POINTS[name])
    with jax.enable_x64(True):
        slope = np.asarray(jax.jit(jax.grad(lambda m: capping.largest_singular_values(m[None])[0]))(matrix))
    assert np.all(np.isfinite(slope))
    u, s, vh = spectral.svd(matrix)
    if s[0] > s[1] + 1e-9:
        np.testing.assert_allclose(slope, np.outer(u[:, 0], vh[0]), atol=1e-9)
    elif s[0] == 0:
        np.testing.assert_array_equal(slope, 0)
    else:  # any of the convex hull
        assert np.sum(slope * matrix) == pytest.approx(s[0])


def test_derivatives_through_the_transformations_are_finite():
    for tx in (oc.clip_by_spectral_norm(0.5), oc.clip_singular_values(0.5), oc.clip_singular_values(0.5, smooth=True)):
        slope = jax.jit(jax.grad(lambda x, tx=tx: jnp.sum(jnp.sin(tx.update(x, tx.init(x))[0]))))
        for matrix in (np.zeros((3, 3)), np.ones((3, 3)), np.eye(3), np.full((3, 3), 1e-30), np.full((3, 3), 1e30)):
            assert np.all(np.isfinite(slope(np.float32(matrix))))


def test_second_derivatives_where_singular_values_differ(rng):
    with jax.enable_x64(True):
        matrix = spectral.with_singular_values(rng, (3, 2), [2.0, 0.7])
        functions = [lambda m: capping.largest_singular_values(m[None])[0]]
        functions += [
            lambda m, soft=soft: jnp.sum(jnp.sin(capping.capped(m[None], jnp.array([1.1]), soft).matrices))
            for soft in (False, True)
        ]
        for fun in functions:
            hessian, step, change = np.asarray(jax.jit(jax.hessian(fun))(matrix)), 1e-5, rng.normal(size=(3, 2))
            slope = jax.jit(jax.grad(fun))
            slopes = [np.asarray(slope(matrix + t * change)) for t in (step, -step)]
            expected = (slopes[0] - slopes[1]) / (2 * step)
            np.testing.assert_allclose(np.einsum("abcd,cd->ab", hessian, change), expected, atol=1e-6)


# Meshes.


def make(name, **kwargs):
    return {
        "norm": functools.partial(oc.clip_by_spectral_norm, 1.0),
        "cap": functools.partial(oc.clip_singular_values, 1.0),
        "smooth cap": functools.partial(oc.clip_singular_values, 1.0, smooth=True),
    }[name](**kwargs)


each_clip = pytest.mark.parametrize("name", ["norm", "cap", "smooth cap"])


def layers(rng):
    return np.float32(np.linspace(0.1, 4, 8)[:, None, None] * rng.normal(size=(8, 4, 2)))


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@each_clip
def test_matrices_split_over_devices_under_jit(rng, name, mesh):
    tree = {
        "stack": layers(rng),
        "kernel": np.float32(rng.normal(size=(8, 4))),
        "whole": np.float32(rng.normal(size=(8, 4))),
    }
    tx = make(name, stacked={"stack": 1, "kernel": 0, "whole": 0})
    right = update(tx, jax.tree.map(jnp.asarray, tree))
    # The two caps differ in what is done to the singular values alone.
    for stack in (P("data"), P(None, "data", "model"), P("data", None, "model"))[: 1 if name == "smooth cap" else 3]:
        specs = {"stack": stack, "kernel": P("data", "model"), "whole": P()}
        ours = jax.jit(lambda x: tx.update(x, tx.init(x))[0])(put(tree, specs, mesh))
        for key, leaf in ours.items():
            np.testing.assert_allclose(leaf, right[key], atol=1e-5)
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[key]), leaf.ndim), key


def in_shard_map(tx, spec, **options):
    run = jax.shard_map(lambda x: tx.update(x, tx.init(x))[0], mesh=AUTO, in_specs=spec, out_specs=spec, **options)
    return jax.jit(run)


@each_way
@each_clip
def test_layers_split_over_devices_in_shard_map(rng, name, way):
    stack = layers(rng)
    right = update(make(name, stacked=1), jnp.asarray(stack))
    with by(way):
        for options in ({}, {"check_vma": False}):
            ours = in_shard_map(make(name, stacked=1, axes=P("data")), P("data"), **options)(stack)
            np.testing.assert_allclose(ours, right, atol=1e-5)


@each_clip
def test_a_matrix_split_over_devices_in_shard_map_is_an_error(rng, name):
    stack = layers(rng)
    with pytest.raises(ValueError, match="PartitionSpec"):  # it may be the layers that are split
        in_shard_map(make(name, stacked=1), P("data"))(stack)
    for axes in ("auto", "data", P("data")):
        with pytest.raises(ValueError, match=r"matrix '' is split over mesh axes \('data',\).*under jit"):
            in_shard_map(make(name, axes=axes), P("data"))(stack[0].repeat(2, axis=0))
    with pytest.raises(ValueError, match=r"split over mesh axes \('model',\)"):
        in_shard_map(make(name, stacked=1, axes=P(None, None, "model")), P(None, None, "model"))(stack)


# Arguments.


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (oc.clip_by_spectral_norm, {"max_norm": -1.0}, "max_norm must be at least 0, got -1.0"),
        (oc.clip_singular_values, {"max_value": np.nan}, "max_value must be at least 0, got nan"),
        (oc.clip_singular_values, {"max_value": 1.0, "smooth": 0.5}, "smooth must be True or False, got 0.5"),
        (oc.clip_singular_values, {"max_value": 1.0, "units": "leaf"}, "units must be one of 'io', 'oi', got 'leaf'"),
        (oc.clip_by_spectral_norm, {"max_norm": 1.0, "units": "hwio"}, "units must be one of"),
        (oc.clip_singular_values, {"max_value": 1.0, "stacked": -1}, "stacked"),
    ],
)
def test_bad_arguments_are_refused(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


def test_more_stacked_axes_than_a_leaf_has():
    for tx in (oc.clip_by_spectral_norm(1.0, stacked=3), oc.clip_singular_values(1.0, stacked=3)):
        with pytest.raises(ValueError, match=r"stacked must be at most the number of axes of the leaf, got 3"):
            update(tx, jnp.ones((2, 2)))
