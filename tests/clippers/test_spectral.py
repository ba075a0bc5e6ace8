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
def capped(way):
    """Both caps of a stack, the hard one and the soft one, in one compiled program."""

    def run(stack, caps):
        return {soft: one(stack, caps, soft) for soft in (False, True)}

    def one(stack, caps, soft):
        with by(way):
            out, kept = capping._capped(tall(stack), caps, soft)
        out = out if out.shape == stack.shape else turned(out)
        return capping.Capped(jnp.where(kept[:, None, None], stack, out), kept)

    return jax.jit(run)


def tall(stack):
    return turned(stack) if stack.shape[-2] < stack.shape[-1] else stack


def caps_of(way, matrix, c):
    """For hard and for soft: the matrix with its cap."""
    dtype = np.finfo(matrix.dtype).dtype
    found = jax.device_get(capped(way)(matrix[None], np.asarray([c], dtype)))
    return {soft: matrices[0] for soft, (matrices, _) in found.items()}


@functools.cache
def largest(way):
    def run(stack):
        with by(way):
            return capping._largest_singular_values(tall(stack))

    return jax.jit(run)


def is_within(error, most):
    """Whether the spectral norm is; the Frobenius norm, which is never smaller, is found much faster."""
    return np.linalg.norm(error) <= most or spectral.norm(error) <= most


def allowed(c, top, relative=1e-3):
    """How far, in the spectral norm, the result may be from that of float64."""
    return relative * c + 20 * EPS * top


# Accuracy.

WIDE = (33, 64)
SHAPES = [(7, 1), WIDE, (1, 1), (5, 3), (256, 100), (512, 512)]
CAPS = (1.0, 0.3, 0.1, 0.04, 0.03, 0.01, 0.003, 0.001)
CAPS_OF_LARGE = (0.04, 0.001)  # from 100 rows or columns on


BIG = 256  # from which on float64 takes seconds: the hardest spectra alone
CONDITIONS = (1.0, 10.0, 1e3, 1e6)


def spectra(number, conditions=CONDITIONS):
    """From 1 down to a condition: evenly by ratio, evenly by difference, and one that stands out."""
    for condition in conditions if number < BIG else (1e6,):
        yield np.geomspace(1, 1 / condition, number)
        if number < BIG:
            yield np.linspace(1, 1 / condition, number)
        yield np.r_[1.0, np.full(number - 1, 1 / condition)]
    yield np.r_[np.ones(number - number // 2), np.zeros(number // 2)]  # half of the rank


@functools.cache
def decomposed(shape):
    """Matrices with these spectra and of any size, and their decompositions in float64: once for all tests."""
    rng = np.random.default_rng(shape)
    matrices = [
        np.float32(10.0 ** rng.uniform(-3, 3) * spectral.with_singular_values(rng, shape, values))
        for values in spectra(min(shape))
    ]
    return [(matrix, spectral.svd(matrix)) for matrix in matrices]


each_shape = pytest.mark.parametrize("shape", slow_but(SHAPES, *SHAPES[:2]), ids=str)


@each_way
@each_shape
def test_the_cap_is_that_of_float64(shape, way):
    for matrix, triple in decomposed(shape):
        top = triple[1][0]
        for part in CAPS if max(shape) < 100 else CAPS_OF_LARGE:
            for soft, ours in caps_of(way, matrix, part * top).items():
                error = ours - spectral.capped(triple, part * top, soft=soft)
                off = np.linalg.norm(error) / top
                assert is_within(error, allowed(part * top, top)), (part, soft, triple[1][:3], off)


@each_way
@each_shape
def test_the_largest_singular_value_is_that_of_float64(shape, way):
    for matrix, (_, values, _) in decomposed(shape):
        ratio = np.asarray(largest(way)(matrix[None]))[0] / values[0]
        assert 1 - 3e-6 <= ratio <= 1 + (1e-5 if way == "iterations" else 3e-6), values[:3]


@each_way
def test_complex_numbers_and_float64(rng, way):
    with jax.enable_x64(True):
        for shape, dtype, within in (
            ((4, 6), np.complex64, 1e-5),
            ((5, 5), np.complex128, 1e-12),
            ((5, 5), np.float64, 1e-12),
        ):
            matrix = rng.normal(size=shape).astype(dtype)
            matrix = matrix + 1j * matrix[::-1] if np.iscomplexobj(matrix) else matrix
            triple = spectral.svd(matrix)
            for part in (0.5, 0.01):
                for soft, ours in caps_of(way, matrix, part * triple[1][0]).items():
                    assert ours.dtype == matrix.dtype
                    right = spectral.capped(triple, part * triple[1][0], soft=soft)
                    # Of the hard cap by iterations, next to its kink, half of the digits are right.
                    room = max(within, 1e-8) if way == "iterations" and not soft else within
                    assert np.linalg.norm(ours - right, 2) <= room * triple[1][0]


@jax.jit
def both_clips(c, tree):
    """`clip_singular_values`, hard and soft."""
    return {soft: update(oc.clip_singular_values(c, smooth=soft), tree) for soft in (False, True)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(rng, dtype):
    for values in spectra(24):
        shapes = {"tall": (40, 24), "wide": (24, 40)}
        tree = {name: spectral.with_singular_values(rng, shape, values).astype(dtype) for name, shape in shapes.items()}
        triples = {name: spectral.svd(np.float64(matrix)) for name, matrix in tree.items()}
        top = max(s[0] for _, s, _ in triples.values())
        for part in (1.0, 0.1, 0.01, 0.001):
            c = np.float32(part * top)
            for soft, clipped in both_clips(c, tree).items():
                for name, ours in clipped.items():
                    assert ours.dtype == dtype
                    right = spectral.capped(triples[name], c, soft=soft)
                    error = np.linalg.norm(np.float64(ours) - right, 2)
                    assert error <= allowed(part * top, top, 2e-2), (name, soft, part, values[:3])


# Over the range.


FAR = {
    "full rank": lambda rng: spectral.with_singular_values(rng, WIDE, np.geomspace(1, 1e-6, min(WIDE))),
    "rank 1": lambda rng: np.outer(rng.normal(size=WIDE[0]), rng.normal(size=WIDE[1])),
    "ones": lambda rng: np.ones(WIDE),
    "rank 4": lambda rng: rng.normal(size=(WIDE[0], 4)) @ rng.normal(size=(4, WIDE[1])),
}


@each_way
@pytest.mark.parametrize("kind", FAR)
def test_singular_values_far_above_the_cap(rng, kind, way):
    """The cap is far below the rounding of the largest singular value: nothing is right but the norm."""
    matrix = FAR[kind](rng)
    matrix = np.float32(matrix / np.linalg.norm(matrix, 2))
    for size in (1e-30, 1.0, 1e30):
        for part in (1e-4, 1e-5, 1e-6, 1e-10, 1e-25, 1e-37):
            c = np.float32(size * part)
            if c < 1e-37:
                continue
            for soft, ours in caps_of(way, matrix * np.float32(size), c).items():
                assert np.all(np.isfinite(ours)), (soft, size, part)
                assert np.linalg.norm(np.float64(ours), 2) == pytest.approx(float(c), rel=0.05), (soft, size, part)


@each_way
def test_the_ends_of_the_range(way):
    high, low = np.float32(3e38), np.float32(1.5e-38)
    for size in (high, low, 1.0):
        diagonal = np.diag([size, size / 2, size / 4]).astype(np.float32)
        c = np.float32(size * 0.3)
        for soft, ours in caps_of(way, diagonal, c).items() if size != low else ():
            # Not the low one: a quarter of it is subnormal, and may count as 0.
            right = spectral.capped(spectral.svd(diagonal), float(c), soft=soft)
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5 * size)
        np.testing.assert_allclose(largest(way)(diagonal[None]), size, rtol=1.1e-5)
    corner = np.zeros((3, 3))
    corner[:2, :2] = [[high, 1], [low, -1]]
    for matrix in (np.full((3, 3), high), corner, np.full((3, 3), low)):
        for c in (0.0, 1e-45, 1e-30, 1.0, 3.4e38, np.inf):
            for ours in caps_of(way, np.float32(matrix), np.float32(c)).values():
                assert np.all(np.isfinite(ours))
    np.testing.assert_array_equal(largest(way)(np.full((1, 3, 3), high)), np.finfo(np.float32).max)


def test_zeros_infinities_and_nan():
    bad = np.float32([[1.0, np.nan], [0.0, 5.0], [2.0, 1.0]])
    left = {
        "zero": np.zeros((3, 2), np.float32),
        "nan": bad,
        "inf": np.where(np.isnan(bad), np.float32(np.inf), bad),
        "none": np.ones((0, 3), np.float32),
    }
    ones = np.ones((3, 2), np.float32)

    def run(c, tree):
        return [update(oc.clip_by_spectral_norm(c), tree), *both_clips(c, tree).values()]

    traced = jax.jit(run)
    steps = [(c, functools.partial(traced, np.float32(c))) for c in (0.5, 0.0, np.inf)]
    steps += [(c, jax.jit(functools.partial(run, c))) for c in (0.0, np.inf)]  # with a Python number
    for c, step in steps:
        for ours in jax.device_get(step(left | {"ones": ones})):
            clipped = ours.pop("ones")
            assert_same_bits(ours, left)
            assert c != 0.0 or not np.any(clipped)
            assert c != np.inf or np.array_equal(clipped, ones)


def test_a_matrix_within_its_cap_keeps_every_bit_beside_one_that_is_not(rng):
    inside, outside = np.float32(rng.normal(size=(2, 6, 4)) * [[[0.01]], [[1]]])
    inside[0, 0] = 1e-45
    tree = {"inside": inside, "outside": outside}
    transformations = (oc.clip_singular_values(0.9), oc.clip_by_spectral_norm(0.9))
    for ours in jax.jit(lambda tree: [update(tx, tree) for tx in transformations])(tree):
        assert_same_bits(ours["inside"], tree["inside"])
        assert np.linalg.norm(np.float64(ours["outside"]), 2) == pytest.approx(0.9, rel=1e-5)


# Vectors, kernels, stacks.


def test_vectors_take_the_norm_form_of_the_same_map():
    vector = np.float32([3.0, 4.0])
    tree = {"vector": vector, "column": vector[:, None], "row": vector[None, :], "scalar": np.float32(-5.0)}
    for c, soft, factor in ((2.0, False, 0.4), (5.0, False, 1.0), (5.0, True, 0.5**0.5), (2.0, True, 1 / 7.25**0.5)):
        for name, ours in both_clips(np.float32(c), tree)[soft].items():
            np.testing.assert_allclose(ours, factor * tree[name], rtol=1e-6, err_msg=name)
    huge = tree | {"vector": np.float32([3e38, 0.0])}
    np.testing.assert_allclose(both_clips(np.float32(1.0), huge)[True]["vector"], [1.0, 0.0], rtol=1e-6)


def test_a_kernel_of_higher_rank_is_a_matrix(rng):
    kernel = np.float32(rng.normal(size=(3, 3, 2, 5)))
    shapes = {"io": (18, 5), "oi": (3, 30)}
    clips = {(name, units): make(name, 1.5, units=units) for name in ("cap", "norm") for units in shapes}
    ours = jax.jit(lambda kernel: {key: update(tx, kernel) for key, tx in clips.items()})(kernel)
    for units, matrix in shapes.items():
        flat = kernel.reshape(matrix)
        right = spectral.capped(spectral.svd(flat), 1.5, soft=False).reshape(kernel.shape)
        np.testing.assert_allclose(ours["cap", units], right, atol=1e-5)
        np.testing.assert_allclose(ours["norm", units], 1.5 * kernel / np.linalg.norm(np.float64(flat), 2), rtol=1e-5)


def test_layers_and_leaves_of_one_shape_do_not_mix(rng):
    sizes = np.array([[0.1, 1.0, 10.0]])
    stack = np.float32(sizes.T[..., None] * rng.normal(size=(3, 6, 4)))
    single = np.float32(4 * rng.normal(size=(6, 4)))
    tree = {"kernel": stack, "other": single, "turned": single.T}
    stacked = {"kernel": 1, "other": 0, "turned": 0}

    @jax.jit
    def run(each, tree):
        bound = {"kernel": each, "other": 1.0, "turned": 1.0}
        return [update(make(name, bound, stacked=stacked), tree) for name in ("cap", "norm")]

    for each in ([0.5, 2.0, 3.0], 2.0):
        caps = np.broadcast_to(np.float32(each), (3,))
        ours, scaled = jax.device_get(run(np.float32(each), tree))
        for i, c in enumerate(caps):
            right = spectral.capped(spectral.svd(stack[i]), c, soft=False)
            np.testing.assert_allclose(ours["kernel"][i], right, atol=3e-6)
        right = spectral.capped(spectral.svd(single), 1.0, soft=False)
        np.testing.assert_allclose(ours["other"], right, atol=3e-6)
        np.testing.assert_allclose(ours["turned"], right.T, atol=3e-6)
        norms = [np.linalg.norm(np.float64(layer), 2) for layer in scaled["kernel"]]
        np.testing.assert_allclose(norms, np.minimum([np.linalg.norm(layer, 2) for layer in stack], caps), rtol=1e-5)


@each_way
def test_what_is_alike_is_one_call(rng, way):
    """And so is what vmap makes one call of."""
    stack = np.float32(rng.normal(size=(4, 6, 3)) * np.array([0.01, 1, 30, 1e20])[:, None, None])
    caps = np.float32([1.0, 0.5, 1.0, 1e3])
    found = jax.device_get(capped(way)(stack, caps))
    mapped = jax.device_get(jax.jit(jax.vmap(capped(way)))(stack[:, None], caps[:, None]))
    for soft, ours in found.items():
        np.testing.assert_array_equal(ours.kept, [not soft, False, False, False])
        for i, (c, matrix) in enumerate(zip(caps, stack, strict=True)):
            top = np.linalg.norm(np.float64(matrix), 2)
            right = spectral.capped(spectral.svd(matrix), c, soft=soft)
            for one in (ours.matrices[i], mapped[soft].matrices[i, 0]):
                assert np.linalg.norm(one - right, 2) <= allowed(c, top)
            np.testing.assert_allclose(mapped[soft].matrices[i, 0], ours.matrices[i], atol=1e-5 * max(c, top))


# Any threshold.


def test_thresholds_follow_the_spectral_norm():
    tx = oc.clip_by(oc.norms.spectral_norm(), oc.thresholds.growth(1.5))
    state, step = tx.init(np.zeros((2, 2), np.float32)), jax.jit(tx.update)
    for size, right in ((1.0, 1.0), (4.0, 1.5), (4.0, 2.25)):
        updates, state = step(np.float32(size * np.diag([1.0, 0.5])), state)
        assert float(np.linalg.norm(updates, 2)) == pytest.approx(right, rel=1e-5)


def test_a_record_holds_spectral_norms():
    tx = oc.clip_by_spectral_norm(1.0, record=2)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[1])
    recorded = np.asarray(step({"w": np.diag(np.float32([3, 4]))}).clip_stats.clip_norm)
    assert recorded[0, 0] == pytest.approx(4.0, rel=1e-5)


def test_schedules_are_counted():
    tx = oc.clip_singular_values(lambda count: 1.0 / (1.0 + count))
    state, step = tx.init(None), jax.jit(tx.update)
    for right in (1.0, 0.5):
        updates, state = step(np.diag(np.float32([3.0, 4.0])), state)
        np.testing.assert_allclose(np.diag(updates), right, rtol=1e-6)


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
def test_the_derivative_of_the_cap(rng, complex_):
    """The hard cap has none where a singular value is the cap; here none is."""

    @jax.jit
    def slopes(stacks, changes, caps, more):
        def one(x, caps, soft):
            out, kept = capping.capped(x, caps, soft)
            return jnp.where(kept[:, None, None], x, out)

        def run(stacks, caps):
            return [{soft: one(x, caps, soft) for soft in (False, True)} for x in stacks]

        return jax.jvp(run, (stacks, caps), (changes, more))[1]

    def right(t, soft, matrix, change, cap, more):
        return spectral.capped(spectral.svd(matrix + t * change), cap + t * more, soft=soft)

    shapes, step = ((5, 3), (3, 3)), 1e-5
    stacks = [
        np.stack([spectral.with_singular_values(rng, shape, values, complex_=complex_) for values in POINTS.values()])
        for shape in shapes
    ]
    changes = [rng.normal(size=x.shape) + (1j * rng.normal(size=x.shape) if complex_ else 0) for x in stacks]
    caps, more = np.full(len(POINTS), 1.1), np.full(len(POINTS), 0.3)
    with jax.enable_x64(True):
        found = jax.device_get(slopes(stacks, changes, caps, more))
    for shape, stack, change, ours in zip(shapes, stacks, changes, found, strict=True):
        for soft, each in ours.items():
            for name, one, *at in zip(POINTS, each, stack, change, caps, more, strict=True):
                expected = (right(step, soft, *at) - right(-step, soft, *at)) / (2 * step)
                np.testing.assert_allclose(one, expected, atol=1e-6, err_msg=f"{name}, {shape}, soft={soft}")


def test_the_derivative_of_the_norm(rng):
    slope_of = jax.jit(jax.grad(lambda m: capping.largest_singular_values(m[None])[0]))
    for name, values in POINTS.items():
        matrix = spectral.with_singular_values(rng, (4, 3), values)
        with jax.enable_x64(True):
            slope = np.asarray(slope_of(matrix))
        assert np.all(np.isfinite(slope)), name
        u, s, vh = spectral.svd(matrix)
        if s[0] > s[1] + 1e-9:
            np.testing.assert_allclose(slope, np.outer(u[:, 0], vh[0]), atol=1e-9, err_msg=name)
        elif s[0] == 0:
            np.testing.assert_array_equal(slope, 0, err_msg=name)
        else:  # any of the convex hull
            assert np.sum(slope * matrix) == pytest.approx(s[0]), name


def test_derivatives_through_the_transformations_are_finite():
    def loss(x, name):
        return jnp.sum(jnp.sin(update(make(name, 0.5), x)))

    slopes = jax.jit(lambda x: {name: jax.grad(loss)(x, name) for name in CLIPS})
    for matrix in (np.zeros((3, 3)), np.ones((3, 3)), np.eye(3), np.full((3, 3), 1e-30), np.full((3, 3), 1e30)):
        for name, slope in slopes(np.float32(matrix)).items():
            assert np.all(np.isfinite(slope)), name


def test_second_derivatives_where_singular_values_differ(rng):
    functions = {
        "norm": lambda m: capping.largest_singular_values(m[None])[0],
        "hard": lambda m: jnp.sum(jnp.sin(capping.capped(m[None], jnp.array([1.1]), False).matrices)),
        "soft": lambda m: jnp.sum(jnp.sin(capping.capped(m[None], jnp.array([1.1]), True).matrices)),
    }

    @jax.jit
    def slopes(matrix, change):
        """The gradient of each function, and its derivative along the change."""
        return {name: jax.jvp(jax.grad(fun), (matrix,), (change,)) for name, fun in functions.items()}

    matrix, change, step = spectral.with_singular_values(rng, (3, 2), [2.0, 0.7]), rng.normal(size=(3, 2)), 1e-5
    with jax.enable_x64(True):
        here, *beside = (slopes(matrix + t * change, change) for t in (0, step, -step))
    for name, (_, along) in here.items():
        expected = (np.asarray(beside[0][name][0]) - np.asarray(beside[1][name][0])) / (2 * step)
        np.testing.assert_allclose(along, expected, atol=1e-6, err_msg=name)


# Meshes.


CLIPS = ("norm", "cap", "smooth cap")


def make(name, bound=1.0, **kwargs):
    return {
        "norm": oc.clip_by_spectral_norm,
        "cap": oc.clip_singular_values,
        "smooth cap": functools.partial(oc.clip_singular_values, smooth=True),
    }[name](bound, **kwargs)


def layers(rng):
    return np.float32(np.linspace(0.1, 4, 8)[:, None, None] * rng.normal(size=(8, 4, 2)))


def clipped(tree, names=CLIPS, **kwargs):
    return {name: update(make(name, **kwargs), tree) for name in names}


def expected(name, stack):
    """In float64, for matrices with their bound of 1."""
    u, s, vh = spectral.svd(stack)
    if name == "norm":
        return stack / np.maximum(s[..., :1, None], 1)
    return (u * (s / np.sqrt(1 + s**2) if name == "smooth cap" else np.minimum(s, 1))[..., None, :]) @ vh


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_matrices_split_over_devices_under_jit(rng, mesh):
    tree = {
        "stack": layers(rng),
        "kernel": np.float32(rng.normal(size=(8, 4))),
        "whole": np.float32(rng.normal(size=(8, 4))),
    }
    # The two caps differ in what is done to the singular values alone. What a mesh of AUTO axes splits only XLA sees.
    layouts = [(P("data", None, "model"), ("norm", "cap"))]
    if mesh is EXPLICIT:
        layouts += [(P(None, "data", "model"), ("norm", "smooth cap"))]
    for stack, names in layouts:
        specs = {"stack": stack, "kernel": P("data", "model"), "whole": P()}
        run = jax.jit(functools.partial(clipped, names=names, stacked={"stack": 1, "kernel": 0, "whole": 0}))
        for name, ours in run(put(tree, specs, mesh)).items():
            for key, leaf in ours.items():
                np.testing.assert_allclose(leaf, expected(name, tree[key]), atol=1e-5, err_msg=f"{name}, {stack}")
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[key]), leaf.ndim), (name, stack, key)


def in_shard_map(run, spec, **options):
    return jax.jit(jax.shard_map(run, mesh=AUTO, in_specs=spec, out_specs=spec, **options))


@each_way
def test_layers_split_over_devices_in_shard_map(rng, way):
    stack = layers(rng)
    ways = [(CLIPS, {})]
    if way == "decompositions":
        ways += [(("norm", "cap"), {"check_vma": False})]
    for names, options in ways:
        run = functools.partial(clipped, names=names, stacked=1, axes=P("data"))
        with by(way):
            for name, ours in in_shard_map(run, P("data"), **options)(stack).items():
                np.testing.assert_allclose(ours, expected(name, stack), atol=1e-5, err_msg=f"{name}, {options}")


@pytest.mark.parametrize("name", CLIPS)
def test_a_matrix_split_over_devices_in_shard_map_is_an_error(rng, name):
    def run(spec, **kwargs):
        return in_shard_map(functools.partial(update, make(name, **kwargs)), spec)

    stack = layers(rng)
    with pytest.raises(ValueError, match="PartitionSpec"):  # it may be the layers that are split
        run(P("data"), stacked=1)(stack)
    for axes in ("auto", "data", P("data")):
        with pytest.raises(ValueError, match=r"matrix '' is split over mesh axes \('data',\).*under jit"):
            run(P("data"), axes=axes)(stack[0].repeat(2, axis=0))
    with pytest.raises(ValueError, match=r"split over mesh axes \('model',\)"):
        run(P(None, None, "model"), stacked=1, axes=P(None, None, "model"))(stack)


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
            update(tx, np.ones((2, 2), np.float32))
