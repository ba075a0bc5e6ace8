"""What the numbers promise: right norms, bounds that hold, and nothing lost, over each dtype's whole range."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import contrib
from tests.reference import fixed, trees

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
ORDS = [1, 2, 3, np.inf]
LAST_PLACE = 2.0**-23  # of float32: norms are rounded twice, once of each leaf and once of all of them
RTOL = 1e-6  # of what is multiplied by a quotient of norms


def id_of(value):
    return getattr(value, "__name__", str(value))


def scales(dtype, size, ord=2):
    """From the smallest normal number up to where a norm of `size` numbers is the largest, by a few powers of ten."""
    info = jnp.finfo(dtype)
    low, high = float(info.tiny), float(info.max) / (1 if ord == np.inf else size ** (1 / ord))
    return [low, *(10.0**k for k in range(-36, 39, 3) if low < 10.0**k < high), high]


def signed(rng, size, dtype):
    """Numbers in +-[0.5, 1], so that at the largest scale they are in range, and at 2 * tiny normal."""
    return rng.choice([-1, 1], size) * rng.uniform(0.5, 1, size)


def measured(updates, ord=2):
    """(ours, float64's); the numbers behind the second are those that the dtype holds."""
    norm = oc.global_norm(updates, ord=ord)
    assert norm.dtype == jnp.float32
    assert norm.shape == ()
    return float(norm), fixed.global_norm(trees.wide_leaves(updates), ord)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (13,), (40, 25), (100_000,)], ids=str)
def test_global_norm_over_the_range(rng, dtype, ord, shape):
    size = int(np.prod(shape))
    numbers = signed(rng, shape, dtype)
    for scale in scales(dtype, size, ord):
        # At the lower end every number is normal: a subnormal one would count as zero.
        low_end = scale < 2 * float(jnp.finfo(dtype).tiny)
        ours, right = measured(jnp.asarray(np.asarray(numbers * scale * (2 if low_end else 1)).astype(dtype)), ord)
        np.testing.assert_allclose(ours, right, rtol=LAST_PLACE, err_msg=f"at scale {scale}")


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_global_norm_of_ten_million(dtype):
    """In float32's range of squares and on both sides of it."""
    numbers = np.random.default_rng(0).standard_normal(10_000_000, np.float32)
    for scale in (1.0,) if dtype == jnp.float16 else (1.0, 2.0**-90, 2.0**90):
        updates = (numbers * np.float32(scale)).astype(dtype)
        right = np.sqrt(sum(np.sum(np.square(part, dtype=np.float64)) for part in np.array_split(updates, 20)))
        np.testing.assert_allclose(float(oc.global_norm(jnp.asarray(updates))), right, rtol=LAST_PLACE)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("powers", [(-37, 37), (-37, -20), (19, 37), (-22, -18), (17, 20)], ids=str)
def test_global_norm_of_numbers_of_every_size(rng, ord, powers):
    """Log-uniform magnitudes, also where the squares of some entries vanish and those of others do not."""
    for shape in ((3,), (50,), (20, 20)):
        for _ in range(5):
            numbers = 10 ** rng.uniform(*powers, shape)
            ours, right = measured(jnp.asarray((numbers * rng.choice([-1, 1], shape)).astype(np.float32)), ord)
            np.testing.assert_allclose(ours, right, rtol=LAST_PLACE)


@pytest.mark.parametrize("ord", ORDS)
def test_global_norm_of_leaves_of_every_size_and_dtype(rng, ord):
    """40 leaves, scalars and zeros among them, each dtype at a scale of its own range."""
    shapes = [(), (1,), (5,), (3, 4)]
    ranges = {jnp.float32: (-37, 36), jnp.bfloat16: (-36, 36), jnp.float16: (-3, 3)}
    for reach in (1.0, 0.5, 0.1):
        updates = []
        for i in range(40):
            dtype = FLOATS[i % 3]
            scale = 10 ** (reach * rng.uniform(*ranges[dtype])) if i % 7 else 0
            updates.append(jnp.asarray(np.asarray(signed(rng, shapes[i % 4], dtype) * scale).astype(dtype)))
        ours, right = measured(updates, ord)
        np.testing.assert_allclose(ours, right, rtol=LAST_PLACE)


def test_the_ends_of_the_range():
    info = np.finfo(np.float32)
    for value in (info.tiny, 2 * info.tiny, info.max, info.max / 2):
        for shape in ((), (1,), (1, 1)):
            updates = jnp.full(shape, value, jnp.float32)
            for ord in ORDS:
                ours, right = measured(updates, ord)
                np.testing.assert_allclose(ours, right, rtol=LAST_PLACE)
    ours, right = measured([jnp.full((2, 2), info.max / 2, jnp.float32)])
    assert np.isfinite(ours)
    np.testing.assert_allclose(ours, right, rtol=LAST_PLACE)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e38])
def test_scalar_leaves(scale, compiled):
    """A constant scale would be folded to `x * x * inf` on one-element leaves: NaN."""
    updates = {"a": jnp.float32(scale), "b": jnp.full((1,), -scale / 8), "c": jnp.zeros(()), "d": jnp.float32(1e-30)}
    norm = jax.jit(oc.global_norm) if compiled else oc.global_norm
    np.testing.assert_allclose(float(norm(updates)), fixed.global_norm(trees.wide_leaves(updates)), rtol=LAST_PLACE)
    np.testing.assert_allclose(float(norm(updates["a"])), scale, rtol=LAST_PLACE)


# (transformation for a bound c, norm of each group in float64): what bounds a norm by c.
def per_leaf(measure):
    return lambda leaves, params: np.array([measure(x) for x in leaves])


def rms(x):
    return fixed.vector_norm(x) / np.sqrt(x.size)


def unit_ratio(leaves, params):
    """||g|| / max(||w||, eps) for every unit: AGC bounds it."""
    pairs = [(fixed.unit_norms(g, "io"), fixed.unit_norms(w, "io")) for g, w in zip(leaves, params, strict=True)]
    return np.concatenate([(g / np.maximum(w, 1e-3)).ravel() for g, w in pairs])


BOUNDED = {
    "clip": (oc.clip, per_leaf(lambda x: fixed.vector_norm(x, np.inf))),
    "global": (oc.clip_by_global_norm, lambda leaves, _: np.array([fixed.global_norm(leaves)])),
    "global1": (lambda c: oc.clip_by_global_norm(c, ord=1), lambda leaves, _: np.array([fixed.global_norm(leaves, 1)])),
    "leaf": (oc.clip_by_leaf_norm, per_leaf(fixed.vector_norm)),
    "leaf3": (lambda c: oc.clip_by_leaf_norm(c, ord=3), per_leaf(lambda x: fixed.vector_norm(x, 3))),
    "rms": (oc.clip_by_block_rms, per_leaf(rms)),
    "range": (lambda c: oc.clip_by_norm_range(c / 8, c), lambda leaves, _: np.array([fixed.global_norm(leaves)])),
    "smooth": (oc.smooth_clip_by_global_norm, lambda leaves, _: np.array([fixed.global_norm(leaves)])),
    "agc": (oc.adaptive_grad_clip, unit_ratio),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("name", BOUNDED)
def test_the_bound_holds(rng, dtype, name):
    """To 1 + 1e-6 in float32, to 1 + 4 eps plus half a subnormal an element in the 16-bit dtypes."""
    make, measure = BOUNDED[name]
    info = jnp.finfo(dtype)
    most = 1 + (RTOL if dtype == jnp.float32 else 4 * float(info.eps))
    half_subnormal = float(info.smallest_subnormal) / 2 if dtype == jnp.float16 else 0.0
    shapes = [(), (6, 4), (400,)]
    params = [jnp.asarray(trees.normal(rng, shape, dtype)) for shape in shapes]
    step = trees.compiled(make)
    for scale in scales(dtype, 425, 1)[1::2]:
        numbers = [signed(rng, shape, dtype) * scale for shape in shapes]
        updates = [jnp.asarray(np.asarray(x).astype(dtype)) for x in numbers]
        for bound in (1e-30, 1e-6, 0.1, 1.0, 1e3, 1e30):
            ours = trees.wide_leaves(step(bound, updates, params))
            # A norm of rounding errors of half a subnormal each, in the widest measure here, the sum of 425 absolutes.
            room = half_subnormal * sum(x.size for x in ours) * (1e3 if name == "agc" else 1)
            assert np.max(measure(ours, trees.wide_leaves(params))) <= bound * most + room, (scale, bound)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
@pytest.mark.parametrize("name", ["global", "global1", "leaf", "leaf3", "rms", "range"])
def test_what_is_clipped_lands_on_the_bound(rng, dtype, name):
    """Not somewhere below it: nothing is lost to a factor that leaves the range."""
    make, measure = BOUNDED[name]
    info = jnp.finfo(dtype)
    least = 1 - (RTOL if dtype == jnp.float32 else 4 * float(info.eps))
    step = trees.compiled(make)
    for shape in ((), (5, 8)):
        numbers = signed(rng, shape, dtype)
        top = scales(dtype, max(1, int(np.prod(shape))), 1)
        for scale in top[2::2]:
            updates = [jnp.asarray(np.asarray(numbers * scale).astype(dtype))]
            for bound in (b for b in top[1:] if b < 0.4 * scale and b / 80 > float(info.tiny)):
                ours = measure(trees.wide_leaves(step(bound, updates)), None)
                assert np.min(ours) >= bound * least, (scale, bound, shape)


@pytest.mark.parametrize(
    ("value", "bound"),
    [(3e38, 1.0), (1e38, 1.0), (1e36, 1e-3), (3e38, 1e-37), (1e-30, 1e-37), (1.0, 2e-38), (3e38, 1e38)],
)
@pytest.mark.parametrize("name", ["global", "global1", "leaf", "leaf3", "rms", "range", "clip"])
def test_one_number_far_outside(value, bound, name):
    """A single float32 factor would be 0 or subnormal here."""
    for shape in ((), (1,), (1, 1)):
        for sign in (1, -1):
            ours = trees.update(BOUNDED[name][0](bound), jnp.full(shape, sign * value, jnp.float32))
            np.testing.assert_allclose(np.asarray(ours, np.float64), np.full(shape, sign * bound), rtol=RTOL)


@pytest.mark.parametrize(
    ("value", "bound"), [(2e-38, 10.0), (2e-38, 1e38), (1e-37, 3e38), (1e-20, 1e20), (2e-38, 3e-38), (1e38, 3e38)]
)
def test_one_number_far_below(value, bound):
    for tx in (oc.clip_by_norm_range(bound, np.inf), oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.exactly(bound))):
        for shape in ((), (1,)):
            ours = trees.update(tx, jnp.full(shape, -value, jnp.float32))
            np.testing.assert_allclose(np.asarray(ours, np.float64), np.full(shape, -bound), rtol=RTOL)


@pytest.mark.parametrize(
    ("value", "bound"), [(3e38, 3e38), (1e38, 3e38), (3e38, 1e30), (1e-38, 1e-38), (1e30, 1e-30), (2e-38, 1e38)]
)
def test_smooth_over_the_range(value, bound):
    """c/(c + n) where c + n, c n or c/n leave the range."""
    value = max(value, 2 * trees.TINY)
    right = value / (1 + value / bound)
    for shape in ((), (1,)):
        ours = trees.update(oc.smooth_clip_by_global_norm(bound), jnp.full(shape, value, jnp.float32))
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.full(shape, right), rtol=RTOL, atol=trees.TINY)


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_norms_beyond_the_largest_number_saturate(shape):
    """Finite, and the direction kept; the bound is not promised."""
    updates = jnp.array([3e38, -3e38, 3e38, 1.5e38], jnp.float32).reshape(shape)
    assert np.isfinite(float(oc.global_norm(updates)))
    assert float(oc.global_norm(updates)) > 3e38
    for ord in (1, 2, 3):
        assert np.isfinite(float(oc.global_norm([updates, updates], ord=ord)))
    for name in ("global", "global1", "leaf", "leaf3", "rms", "smooth", "range"):
        for bound in (1e-3, 1.0, 1e30):
            ours = np.asarray(trees.update(BOUNDED[name][0](bound), updates), np.float64).ravel()
            assert np.all(np.isfinite(ours))
            assert ours[0] > 0
            assert ours[0] < 3 * bound  # clipped all the same: the norm is at most 7 times the one measured
            np.testing.assert_allclose(ours / ours[0], [1, -1, 1, 0.5], rtol=1e-6)


@pytest.mark.parametrize("ord", ORDS)
def test_complex_numbers_count_by_modulus_over_the_range(ord):
    """Up to parts of 3e38, whose modulus is no float32: it saturates, and is clipped like any other."""
    for scale in (2e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e38, 3e38):
        for shape in ((), (3,)):
            updates = jnp.full(shape, np.float32(scale) * (1 - 1j), jnp.complex64)
            right = fixed.global_norm(trees.wide_leaves(updates), ord)
            right = min(right, float(np.finfo(np.float32).max))
            np.testing.assert_allclose(float(oc.global_norm(updates, ord=ord)), right, rtol=LAST_PLACE)
            ours = np.asarray(trees.update(oc.clip_by_global_norm(1e-20, ord=ord), updates)).ravel()
            assert np.all(np.abs(ours) < 1e-19)
            np.testing.assert_allclose(ours.imag, -ours.real, rtol=1e-6)
            assert np.all(ours.real > 0)


@pytest.mark.parametrize("ord", [1, 2, 3])
def test_a_saturated_norm_is_not_an_infinite_one(ord):
    """Finite numbers are clipped, however large; an infinite one passes as it came."""
    huge = jnp.full((100,), 3e38, jnp.float32)
    assert np.all(np.asarray(trees.update(oc.clip_by_global_norm(1.0, ord=ord), huge)) < 1e38)
    trees.assert_same_bits(
        trees.update(oc.clip_by_global_norm(1.0, ord=ord), huge.at[3].set(np.inf)), huge.at[3].set(np.inf)
    )


# Inside the band an update is returned bit for bit.

INSIDE = {
    "clip": lambda _: oc.clip(1e4),
    "clip_by_value": lambda dtype: oc.clip_by_value(0.0 if dtype == jnp.complex64 else -1e4, 1e4),
    "clip_by_value, one end": lambda dtype: oc.clip_by_value(None, 1e4),
    "clip_by_global_norm": lambda _: oc.clip_by_global_norm(1e5),
    "clip_by_global_norm, inf": lambda _: oc.clip_by_global_norm(np.inf),
    "clip_by_global_norm, ord 3": lambda _: oc.clip_by_global_norm(1e5, ord=3),
    "clip_by_leaf_norm": lambda _: oc.clip_by_leaf_norm(1e5),
    "clip_by_leaf_norm, stacked": lambda _: oc.clip_by_leaf_norm(1e5, stacked=1),
    "clip_by_block_rms": lambda _: oc.clip_by_block_rms(1e5),
    "clip_by_norm_range": lambda _: oc.clip_by_norm_range(0.0, 1e5),
    "clip_by_norm_range, inf": lambda _: oc.clip_by_norm_range(0.0, np.inf),
    "smooth_clip_by_global_norm, inf": lambda _: oc.smooth_clip_by_global_norm(np.inf),
    "adaptive_grad_clip": lambda _: oc.adaptive_grad_clip(1e9),
    "adaptive_grad_clip, inf": lambda _: oc.adaptive_grad_clip(np.inf, units="oi"),
    "clip_by_spectral_norm": lambda _: oc.clip_by_spectral_norm(1e5),
    "clip_singular_values": lambda _: oc.clip_singular_values(1e5),
    "clip_singular_values, soft, inf": lambda _: oc.clip_singular_values(np.inf, smooth=True),
    "clippy": lambda _: contrib.clippy(1e9, 1e9),
}


def odd_numbers(dtype):
    """Both zeros, subnormals down to the smallest, and ordinary numbers."""
    if dtype == jnp.complex64:
        parts = odd_numbers(jnp.float32)
        return (parts + 1j * parts[::-1]).astype(np.complex64)
    info = jnp.finfo(dtype)
    tiny, least = np.asarray(info.tiny), np.asarray(info.smallest_subnormal)
    return np.array([0.0, -0.0, least, -least, tiny / 2, -3 * least, tiny, 1.0, -2.5, 1000.0]).astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float16, True), (jnp.complex64, False)],
    ids=["float32-jit", "bfloat16-jit", "float16-jit", "complex64-eager"],
)
@pytest.mark.parametrize("name", INSIDE)
def test_inside_the_band_nothing_changes(dtype, compiled, name):
    numbers = odd_numbers(dtype)
    groups = [numbers.reshape(5, 2), numbers[1:2]]
    updates = [jnp.asarray(x) for x in groups]
    trees.assert_same_bits(updates, groups)  # subnormals arrive
    params = [jnp.ones_like(x) for x in updates]
    tx = INSIDE[name](dtype)
    update = jax.jit(tx.update) if compiled else tx.update
    trees.assert_same_bits(update(updates, tx.init(params), params)[0], updates)


# Bound 0, bound inf, and norms that are not finite.

ZERO = {
    "clip": oc.clip,
    "clip_by_value": lambda c: oc.clip_by_value(c, c),
    "clip_by_global_norm": oc.clip_by_global_norm,
    "clip_by_leaf_norm": oc.clip_by_leaf_norm,
    "clip_by_block_rms": oc.clip_by_block_rms,
    "clip_by_norm_range": lambda c: oc.clip_by_norm_range(0.0, c),
    "smooth_clip_by_global_norm": oc.smooth_clip_by_global_norm,
    "adaptive_grad_clip": oc.adaptive_grad_clip,
    "clip_by_spectral_norm": oc.clip_by_spectral_norm,
    "clip_singular_values": oc.clip_singular_values,
    "clip_singular_values, soft": lambda c: oc.clip_singular_values(c, smooth=True),
    "clippy": lambda c: contrib.clippy(c, c),
    "exactly": lambda c: oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.exactly(c)),
}


@pytest.mark.parametrize(
    ("dtype", "traced"),
    [(jnp.float32, False), (jnp.float32, True), (jnp.float16, True)],
    ids=["float32-number", "float32-traced", "float16-traced"],
)
@pytest.mark.parametrize("name", ZERO)
def test_bound_zero_gives_zeros(dtype, traced, name):
    groups = [np.zeros(3), np.array(5.0), np.full((2, 2), float(jnp.finfo(dtype).max))]
    updates = [jnp.asarray(x.astype(dtype)) for x in groups]
    params = [jnp.ones_like(x) for x in updates]
    ours = (
        trees.compiled(ZERO[name])(0.0, updates, params) if traced else trees.update(ZERO[name](0.0), updates, params)
    )
    for x in jax.tree.leaves(ours):
        assert not np.any(np.asarray(x, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bound", [0.0, 1e-3, np.inf])
@pytest.mark.parametrize("dtype", [*FLOATS, jnp.complex64], ids=id_of)
@pytest.mark.parametrize("name", [name for name in ZERO if name not in ("clip", "clip_by_value")])
def test_a_group_that_is_not_finite_passes_as_it_came(dtype, bound, value, name):
    if name == "exactly" and bound == np.inf:
        pytest.skip("no norm can be brought to infinity: a ValueError")
    bad = np.array([1.0, value, -0.0, 1000.0]).astype(dtype)
    good = np.array([[3.0], [4.0]]).astype(dtype)
    updates = {"bad": jnp.asarray(bad), "good": jnp.asarray(good), "number": jnp.asarray(np.array(value).astype(dtype))}
    params = jax.tree.map(jnp.ones_like, updates)
    ours = trees.update(ZERO[name](bound), updates, params)
    trees.assert_same_bits(ours["bad"], updates["bad"])
    trees.assert_same_bits(ours["number"], updates["number"])
    if name in ("clip_by_global_norm", "clip_by_norm_range", "smooth_clip_by_global_norm"):
        trees.assert_same_bits(ours["good"], updates["good"])
    elif bound < 1:
        assert np.all(np.abs(trees.wide_leaves(ours["good"])[0]) < 0.1), "one bad leaf must not stop the others"


def test_units_that_are_not_finite_pass_and_the_others_are_clipped():
    """Columns are the units of "io", rows those of "oi", layers those of `stacked`."""
    updates = np.array([[1.0, np.nan], [1.0, 1.0]], np.float32)
    params = jnp.zeros((2, 2))
    io = np.asarray(trees.update(oc.adaptive_grad_clip(1.0), jnp.asarray(updates), params))
    oi = np.asarray(trees.update(oc.adaptive_grad_clip(1.0, units="oi"), jnp.asarray(updates), params))
    layers = np.asarray(trees.update(oc.clip_by_leaf_norm(1e-3, stacked=1), jnp.asarray(updates)))
    np.testing.assert_allclose(io, [[1e-3 / 2**0.5, np.nan], [1e-3 / 2**0.5, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(oi, [[1.0, np.nan], [1e-3 / 2**0.5, 1e-3 / 2**0.5]], rtol=1e-6)
    np.testing.assert_allclose(layers, [[1.0, np.nan], [1e-3 / 2**0.5, 1e-3 / 2**0.5]], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_bound_nothing(value):
    updates = jnp.array([[1.0, 1.0], [1.0, 1.0]])
    params = jnp.array([[value, 0.0], [0.0, 0.0]])
    agc = np.asarray(trees.update(oc.adaptive_grad_clip(1.0), updates, params))
    np.testing.assert_allclose(agc, [[1.0, 1e-3 / 2**0.5], [1.0, 1e-3 / 2**0.5]], rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_a_value_clip_takes_infinity_and_passes_nan(dtype):
    updates = jnp.asarray(np.array([np.inf, -np.inf, np.nan, 2.0, -0.25]).astype(dtype))
    np.testing.assert_array_equal(
        np.asarray(trees.update(oc.clip(0.5), updates), np.float32),
        np.array([0.5, -0.5, np.nan, 0.5, -0.25], np.float32),
    )
    np.testing.assert_array_equal(
        np.asarray(trees.update(oc.clip_by_value(max_value=0.5), updates), np.float32),
        np.array([0.5, -np.inf, np.nan, 0.5, -0.25], np.float32),
    )


# Finite in, finite out: every transformation, every dtype, numbers from the ends of the range.

HOSTILE = {
    "clip": oc.clip,
    "clip_by_value": lambda c: oc.clip_by_value(-c, None),
    "global": oc.clip_by_global_norm,
    "global, ord 1": lambda c: oc.clip_by_global_norm(c, ord=1),
    "global, ord 3": lambda c: oc.clip_by_global_norm(c, ord=3),
    "global, ord inf": lambda c: oc.clip_by_global_norm(c, ord=np.inf),
    "leaf": oc.clip_by_leaf_norm,
    "rms": oc.clip_by_block_rms,
    "range": lambda c: oc.clip_by_norm_range(c, np.inf),
    "range of leaves": lambda c: oc.clip_by_norm_range(c, c, norm=oc.norms.leaf_norm()),
    "smooth": oc.smooth_clip_by_global_norm,
    "agc": oc.adaptive_grad_clip,
    "agc, oi": lambda c: oc.adaptive_grad_clip(c, eps=0.0, units="oi"),
    "spectral norm": oc.clip_by_spectral_norm,
    "singular values": oc.clip_singular_values,
    "singular values, soft": lambda c: oc.clip_singular_values(c, smooth=True),
    "clippy": lambda c: contrib.clippy(c, c),
    "clippy, no floor": lambda c: contrib.clippy(c, 0.0),
    "exactly, rms": lambda c: oc.clip_by(oc.norms.leaf_rms(), oc.thresholds.exactly(c)),
    "exactly, ord inf": lambda c: oc.clip_by(oc.norms.leaf_norm(np.inf), oc.thresholds.exactly(c)),
    "exactly, units": lambda c: oc.clip_by(oc.norms.unit_norm("oi"), oc.thresholds.exactly(c)),
    "smooth, leaf": lambda c: oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.smooth(c)),
}


def hostile_leaves(dtype):
    """A vector, a matrix and a scalar, filled in several ways from the ends of the range."""
    info = jnp.finfo(dtype)
    most, tiny, least = float(info.max), float(info.tiny), float(info.smallest_subnormal)
    mixed = np.array([most, -most, least, tiny, 0.0, -0.0])
    values = [
        (np.full(6, most), np.full((2, 2), most), most),
        (mixed, np.array([[1.0, most], [least, -1.0]]), tiny),
        (np.full(6, least), np.zeros((2, 2)), least),
        (np.full(6, tiny), np.full((2, 2), -tiny), 0.0),
        (mixed / 8, np.array([[tiny, -least], [-0.0, 0.0]]), most),
    ]
    unit = (1 + 1j) / 2 if dtype == jnp.complex64 else 1.0
    for leaves in values:
        yield [jnp.asarray(np.asarray(x * unit).astype(dtype)) for x in leaves]


# The other two dtypes differ from these in what they round, not in their range: the plainest of each kind will do.
PLAIN = ["clip", "global", "rms", "range of leaves", "smooth", "exactly, rms", "clippy, no floor"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(HOSTILE, [jnp.float32, jnp.float16]), *itertools.product(PLAIN, [jnp.bfloat16, jnp.complex64])],
    ids=id_of,
)
def test_finite_in_finite_out(name, dtype):
    step = trees.compiled(HOSTILE[name])
    everything = list(hostile_leaves(dtype))
    for bound in [0.0, 1e-45, 1e-30, 1.0, 1e6, 1e38, 3.4028234e38, np.inf]:
        if bound == np.inf and name.startswith(("range", "exactly")):
            continue  # infinity is what is asked for there
        for updates in everything:
            for params in everything if "agc" in name or "clippy" in name else everything[:1]:
                for x in step(bound, updates, params):
                    assert x.dtype == dtype
                    assert np.all(np.isfinite(trees.wide_leaves([x])[0])), (bound, x, updates, params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=id_of)
@pytest.mark.parametrize("traced", [False, True], ids=["number", "array"])
def test_a_bound_beyond_a_narrow_dtype(dtype, traced):
    """1e6 and 1e-6 are bounds for float16 leaves too, though float16 holds neither."""
    updates = jnp.asarray(np.array([3.0, 4.0]).astype(dtype))
    for bound, right in ((1e6, [3.0, 4.0]), (1e-6, [0.6e-6, 0.8e-6])):
        c = jnp.float32(bound) if traced else bound
        for tx in (oc.clip_by_global_norm(c), oc.clip_by_leaf_norm(c), oc.clip_by_norm_range(0.0, c)):
            ours = trees.update(tx, updates)
            assert ours.dtype == dtype
            relative, absolute = trees.slack(dtype, RTOL)
            np.testing.assert_allclose(np.asarray(ours, np.float64), right, rtol=relative, atol=absolute)
        for tx in (oc.clip(c), oc.clip_by_value(-c, c), oc.clip_by_value(max_value=c)):
            expected = np.minimum([3.0, 4.0], bound)
            ours = np.asarray(trees.update(tx, updates), np.float64)
            np.testing.assert_allclose(ours, expected, rtol=relative, atol=absolute)


def test_double_precision_has_the_same_promises():
    with jax.enable_x64(True):
        for value, bound in ((1e300, 1.0), (1e-300, 1e-305), (1e308, 1e-300), (1e200, 1e30)):
            updates = jnp.array([0.6 * value, -0.8 * value])
            assert updates.dtype == jnp.float64
            np.testing.assert_allclose(float(oc.global_norm(updates)), value, rtol=1e-15)
            for tx in (oc.clip_by_global_norm(bound), oc.clip_by_leaf_norm(bound)):
                ours = np.asarray(trees.update(tx, updates))
                np.testing.assert_allclose(ours, [0.6 * bound, -0.8 * bound], rtol=1e-14)
        tiny = jnp.array([1e-310, -0.0, 1.0])
        trees.assert_same_bits(trees.update(oc.clip_by_global_norm(10.0), tiny), tiny)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, complex(1, jnp.inf), complex(jnp.nan, 1)], ids=str)
def test_clippy_leaves_complex_numbers_that_are_not_finite(bad):
    # The difference of a number from itself, by which that is told, may be NaN in either part.
    updates = jnp.array([1 + 2j, bad, 3j], jnp.complex64)
    params = jnp.ones(3, jnp.complex64)
    tx = contrib.clippy()
    found, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(found, updates)
