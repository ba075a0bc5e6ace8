"""What the numbers promise: right norms, bounds that hold, and nothing lost, over each dtype's whole range."""

import functools
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


@jax.jit
def norms_of(cases):
    """The norm of each tree in a dict, of an order and what else is in its key, in one program."""
    return {key: oc.global_norm(tree, ord=key[0]) for key, tree in cases.items()}


def assert_norms(cases):
    """As those in float64 of the numbers that the dtype holds."""
    for key, ours in norms_of(cases).items():
        assert ours.dtype == jnp.float32
        assert ours.shape == ()
        right = fixed.global_norm(trees.wide_leaves(cases[key]), key[0])
        np.testing.assert_allclose(float(ours), right, rtol=LAST_PLACE, err_msg=str(key))


def by_name(makes):
    """A jitted `(bound, updates, params) -> updates` of a dict of transformations: all of them in one program."""
    return jax.jit(
        lambda bound, updates, params=None: {
            name: trees.update(make(bound), updates, params) for name, make in makes.items()
        }
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_global_norm_over_the_range(rng, dtype):
    # The narrow dtypes are widened before anything is summed: how the sums go is the same for all.
    shapes = [(), (1,), (13,), (40, 25), (100_000,)] if dtype == jnp.float32 else [(), (13,), (100_000,)]
    cases = [*itertools.product(ORDS, shapes)]
    numbers = {shape: signed(rng, shape, dtype) for _, shape in cases}
    rows = [scales(dtype, int(np.prod(shape)), ord) for ord, shape in cases]
    for step, at_scale in enumerate(itertools.zip_longest(*rows, fillvalue=1.0)):  # some rows have fewer scales
        # The first scale is the smallest normal number; twice that, all are normal. Subnormal ones would count as zero.
        factor = 2 if step == 0 else 1
        given = {
            (ord, shape): np.asarray(numbers[shape] * scale * factor).astype(dtype)
            for (ord, shape), scale in zip(cases, at_scale, strict=True)
        }
        assert_norms(given)


def test_global_norm_of_ten_million():
    """In float32's range of squares and on both sides of it."""
    numbers = np.random.default_rng(0).standard_normal(10_000_000, np.float32)
    for dtype in FLOATS:
        rounded = numbers.astype(dtype)
        right = np.sqrt(sum(np.sum(np.square(part, dtype=np.float64)) for part in np.array_split(rounded, 20)))
        for scale in (1.0, 2.0**-90, 2.0**90) if dtype == jnp.float32 else (1.0,):  # by which nothing is rounded
            ours = oc.global_norm(jnp.asarray(rounded * np.asarray(scale, dtype)))
            np.testing.assert_allclose(float(ours), right * scale, rtol=LAST_PLACE, err_msg=f"{dtype}, {scale}")


@pytest.mark.parametrize("powers", [(-37, 37), (-37, -20), (19, 37), (-22, -18), (17, 20)], ids=str)
def test_global_norm_of_numbers_of_every_size(rng, powers):
    """Log-uniform magnitudes, also where the squares of some entries vanish and those of others do not."""
    for _ in range(5):
        assert_norms(
            {
                (ord, shape): (10 ** rng.uniform(*powers, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
                for ord, shape in itertools.product(ORDS, ((3,), (50,), (20, 20)))
            }
        )


def test_global_norm_of_leaves_of_every_size_and_dtype(rng):
    """15 leaves, scalars and zeros among them, each dtype at a scale of its own range."""
    shapes = [(), (1,), (5,), (3, 4)]
    ranges = {jnp.float32: (-37, 36), jnp.bfloat16: (-36, 36), jnp.float16: (-3, 3)}
    for reach in (1.0, 0.5, 0.1):
        updates = []
        for i in range(15):
            dtype = FLOATS[i % 3]
            scale = 10 ** (reach * rng.uniform(*ranges[dtype])) if i % 7 else 0
            updates.append(np.asarray(signed(rng, shapes[i % 4], dtype) * scale).astype(dtype))
        assert_norms({(ord,): updates for ord in ORDS})


def test_the_ends_of_the_range():
    info = np.finfo(np.float32)
    for value in (info.tiny, 2 * info.tiny, info.max, info.max / 2):
        shapes = itertools.product(ORDS, ((), (1,), (1, 1)))
        assert_norms({(ord, shape): np.full(shape, value, np.float32) for ord, shape in shapes})
    assert_norms({(2, "four"): np.full((2, 2), info.max / 2, np.float32)})  # whose norm is the largest number


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e38])
def test_scalar_leaves(scale, compiled):
    """A constant scale would be folded to `x * x * inf` on one-element leaves: NaN."""
    numbers = {"a": np.float32(scale), "b": np.float32([-scale / 8]), "c": np.float32(0), "d": np.float32(1e-30)}
    updates = jax.tree.map(jnp.asarray, numbers)
    norm = jax.jit(oc.global_norm) if compiled else oc.global_norm
    np.testing.assert_allclose(float(norm(updates)), fixed.global_norm(trees.wide_leaves(numbers)), rtol=LAST_PLACE)
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


NORMS_IN_FLOAT32 = ("clip", "global", "rms", "range", "smooth")  # of the 16-bit dtypes, whatever the order


@functools.cache
def bounding(names):
    """All of these in one program; one more for each further shape and dtype."""
    return by_name({name: BOUNDED[name][0] for name in names})


def bounding_all(dtype):
    """Those that need no parameters."""
    return bounding(tuple(name for name in BOUNDED if name != "agc") if dtype == jnp.float32 else NORMS_IN_FLOAT32)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_the_bound_holds(rng, dtype):
    """To 1 + 1e-6 in float32, to 1 + 4 eps plus half a subnormal an element in the 16-bit dtypes."""
    info = jnp.finfo(dtype)
    most = 1 + (RTOL if dtype == jnp.float32 else 4 * float(info.eps))
    half_subnormal = float(info.smallest_subnormal) / 2 if dtype == jnp.float16 else 0.0
    shapes = [(), (6, 4), (400,)]
    params = [trees.normal(rng, shape, dtype) for shape in shapes]
    step = bounding(tuple(BOUNDED) if dtype == jnp.float32 else ("agc", *NORMS_IN_FLOAT32))
    for scale in scales(dtype, 425, 1)[1::2]:
        updates = [np.asarray(signed(rng, shape, dtype) * scale).astype(dtype) for shape in shapes]
        for bound in (1e-30, 1e-6, 0.1, 1.0, 1e3, 1e30):
            for name, leaves in step(bound, updates, params).items():
                ours, (_, measure) = trees.wide_leaves(leaves), BOUNDED[name]
                # A norm of rounding errors of half a subnormal each, in the widest measure here, the sum of 425
                # absolutes.
                room = half_subnormal * sum(x.size for x in ours) * (1e3 if name == "agc" else 1)
                assert np.max(measure(ours, trees.wide_leaves(params))) <= bound * most + room, (name, scale, bound)


@pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
def test_what_is_clipped_lands_on_the_bound(rng, dtype):
    """Not somewhere below it: nothing is lost to a factor that leaves the range."""
    info = jnp.finfo(dtype)
    least = 1 - (RTOL if dtype == jnp.float32 else 4 * float(info.eps))
    step = bounding_all(dtype)
    for shape in ((), (5, 8)):
        numbers = signed(rng, shape, dtype)
        top = scales(dtype, max(1, int(np.prod(shape))), 1)
        for scale in top[2::2]:
            updates = [np.asarray(numbers * scale).astype(dtype)]
            for bound in (b for b in top[1:] if b < 0.4 * scale and b / 80 > float(info.tiny)):
                for name, leaves in step(bound, updates).items():
                    if name == "smooth":
                        continue  # which comes near its bound only
                    ours = BOUNDED[name][1](trees.wide_leaves(leaves), None)
                    assert np.min(ours) >= bound * least, (name, scale, bound, shape)


@pytest.mark.parametrize(
    ("value", "bound"),
    [(3e38, 1.0), (1e38, 1.0), (1e36, 1e-3), (3e38, 1e-37), (1e-30, 1e-37), (1.0, 2e-38), (3e38, 1e38)],
)
def test_one_number_far_outside(value, bound):
    """A single float32 factor would be 0 or subnormal here."""
    step = bounding_all(jnp.float32)
    for shape, sign in itertools.product(((), (1,), (1, 1)), (1, -1)):
        for name, (ours,) in step(bound, [np.full(shape, sign * value, np.float32)]).items():
            if name == "smooth":
                continue  # see below
            right = np.full(shape, sign * bound)
            np.testing.assert_allclose(np.asarray(ours, np.float64), right, rtol=RTOL, err_msg=name)


def test_one_number_far_below():
    step = by_name(
        {
            "range": lambda c: oc.clip_by_norm_range(c, np.inf),
            "exactly": lambda c: oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.exactly(c)),
        }
    )
    cases = [(2e-38, 10.0), (2e-38, 1e38), (1e-37, 3e38), (1e-20, 1e20), (2e-38, 3e-38), (1e38, 3e38)]
    for (value, bound), shape in itertools.product(cases, ((), (1,))):
        for name, ours in step(bound, np.full(shape, -value, np.float32)).items():
            right = np.full(shape, -bound)
            np.testing.assert_allclose(np.asarray(ours, np.float64), right, rtol=RTOL, err_msg=name)


@pytest.mark.parametrize(
    ("value", "bound"), [(3e38, 3e38), (1e38, 3e38), (3e38, 1e30), (1e-38, 1e-38), (1e30, 1e-30), (2e-38, 1e38)]
)
def test_smooth_over_the_range(value, bound):
    """c/(c + n) where c + n, c n or c/n leave the range."""
    value = max(value, 2 * trees.TINY)
    right = value / (1 + value / bound)
    for shape in ((), (1,)):
        (ours,) = bounding_all(jnp.float32)(bound, [np.full(shape, value, np.float32)])["smooth"]
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.full(shape, right), rtol=RTOL, atol=trees.TINY)


def test_norms_beyond_the_largest_number_saturate():
    """Finite, and the direction kept; the bound is not promised."""
    updates = np.float32([[3e38, -3e38], [3e38, 1.5e38]])
    found = norms_of({(2, "one"): updates} | {(ord, "two"): [updates, updates] for ord in (1, 2, 3)})
    assert np.all(np.isfinite([*found.values()]))
    assert float(found[2, "one"]) > 3e38
    for bound in (1e-3, 1.0, 1e30):
        for name, (clipped,) in bounding_all(jnp.float32)(bound, [updates]).items():
            if name == "clip":
                continue  # which changes the direction
            ours = np.asarray(clipped, np.float64).ravel()
            assert np.all(np.isfinite(ours)), name
            assert ours[0] > 0, name
            # Clipped all the same: the norm is at most 7 times the one measured.
            assert ours[0] < 3 * bound, name
            np.testing.assert_allclose(ours / ours[0], [1, -1, 1, 0.5], rtol=1e-6, err_msg=name)


def test_complex_numbers_count_by_modulus_over_the_range():
    """Up to parts of 3e38, whose modulus is no float32: it saturates, and is clipped like any other."""
    clip = by_name({ord: lambda c, ord=ord: oc.clip_by_global_norm(c, ord=ord) for ord in ORDS})
    for scale, shape in itertools.product((2e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e38, 3e38), ((), (3,))):
        updates = np.full(shape, np.float32(scale) * (1 - 1j), np.complex64)
        for (ord,), norm in norms_of({(ord,): updates for ord in ORDS}).items():
            right = min(fixed.global_norm(trees.wide_leaves(updates), ord), float(np.finfo(np.float32).max))
            np.testing.assert_allclose(float(norm), right, rtol=LAST_PLACE, err_msg=f"{ord}, {scale}")
        for ord, clipped in clip(1e-20, updates).items():
            ours = np.asarray(clipped).ravel()
            assert np.all(np.abs(ours) < 1e-19), (ord, scale)
            np.testing.assert_allclose(ours.imag, -ours.real, rtol=1e-6)
            assert np.all(ours.real > 0), (ord, scale)


def test_a_saturated_norm_is_not_an_infinite_one():
    """Finite numbers are clipped, however large; an infinite one passes as it came."""
    clip = by_name({ord: lambda c, ord=ord: oc.clip_by_global_norm(c, ord=ord) for ord in (1, 2, 3)})
    huge = np.full(100, 3e38, np.float32)
    assert np.all(np.array([*clip(1.0, huge).values()]) < 1e38)
    huge[3] = np.inf
    for ours in clip(1.0, huge).values():
        trees.assert_same_bits(ours, huge)


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
@pytest.mark.parametrize("dtype", [*FLOATS, jnp.complex64], ids=id_of)
def test_inside_the_band_nothing_changes(dtype):
    """Under jit, all in one program; two of them eagerly too, for complex numbers."""
    numbers = odd_numbers(dtype)
    groups = [numbers.reshape(5, 2), numbers[1:2]]
    updates = [jnp.asarray(x) for x in groups]
    trees.assert_same_bits(updates, groups)  # subnormals arrive
    params = [np.ones_like(x) for x in groups]

    def step_of(names):
        return by_name({name: lambda _, make=INSIDE[name]: make(dtype) for name in names})

    found = [step_of(INSIDE)]
    if dtype == jnp.complex64:
        found.append(step_of(["clip_by_value", "clip_by_global_norm"]).__wrapped__)
    for step in found:
        for name, ours in step(None, updates, params).items():
            assert [np.asarray(x).tobytes() for x in ours] == [x.tobytes() for x in groups], name


# Every transformation with a bound that is traced: compiled once for each dtype, for all tests below.

EVERY = {
    "clip": oc.clip,
    "clip_by_value": lambda c: oc.clip_by_value(c, c),
    "lower end": lambda c: oc.clip_by_value(-c, None),
    "global": oc.clip_by_global_norm,
    "global, ord 1": lambda c: oc.clip_by_global_norm(c, ord=1),
    "global, ord 3": lambda c: oc.clip_by_global_norm(c, ord=3),
    "global, ord inf": lambda c: oc.clip_by_global_norm(c, ord=np.inf),
    "leaf": oc.clip_by_leaf_norm,
    "rms": oc.clip_by_block_rms,
    "range from": lambda c: oc.clip_by_norm_range(c, np.inf),
    "range up to": lambda c: oc.clip_by_norm_range(0.0, c),
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


# In 16 bits the norms are measured in float32, whatever their order, and bfloat16 has float32's range. A complex number
# counts by its modulus. So these take one of each kind, and the plainest.
PLAIN = (
    "clip",
    "global",
    "rms",
    "range of leaves",
    "smooth",
    "exactly, rms",
    "agc",
    "singular values",
    "clippy, no floor",
)
NAMES = {
    jnp.float32: tuple(EVERY),
    jnp.float16: tuple(name for name in EVERY if "ord" not in name and name != "smooth, leaf"),
    jnp.bfloat16: PLAIN,
    jnp.complex64: (*PLAIN, "clip_by_value", "spectral norm", "singular values, soft"),
}
every_dtype = pytest.mark.parametrize("dtype", NAMES, ids=id_of)


@functools.cache
def steps_of(dtype):
    """A step of those that look at parameters, and one of those that do not."""
    with_params = [name for name in NAMES[dtype] if name.startswith(("agc", "clippy"))]
    others = [name for name in NAMES[dtype] if name not in with_params]
    return [by_name({name: EVERY[name] for name in names}) for names in (with_params, others)]


def all_of(dtype, bound, updates, params):
    """What each makes of the updates, by name."""
    of_params, others = steps_of(dtype)
    return jax.device_get(of_params(bound, updates, params) | others(bound, updates, updates))


# Bound 0, bound inf, and norms that are not finite.


@functools.cache
def step_with_number(bound):
    """The bound is a Python number, of which the library knows more; no norm can be brought to infinity."""
    names = ["clip", "clip_by_value", "global", "leaf", "rms", "range up to", "smooth", "agc", "clippy"]
    names += ["spectral norm", "singular values", "singular values, soft"]
    names += [] if bound == np.inf else ["exactly, rms"]
    return jax.jit(functools.partial(by_name({name: EVERY[name] for name in names}).__wrapped__, bound))


def leaves_of(dtype, vector, matrix, number):
    return [np.asarray(x).astype(dtype) for x in (vector, matrix, number)]


@every_dtype
def test_bound_zero_gives_zeros(dtype):
    most = float(jnp.finfo(dtype).max)
    updates = leaves_of(dtype, [0.0] * 6, [[most, most], [0.0, 1.0]], 5.0)
    params = [np.ones_like(x) for x in updates]
    found = {"traced": all_of(dtype, 0.0, updates, params)}
    if dtype == jnp.float32:
        found["number"] = step_with_number(0.0)(updates, params)
    for kind, by_clip in found.items():
        for name, ours in by_clip.items():
            if name not in ("lower end", "range from"):  # of which 0 is the lower end
                assert not any(map(np.any, trees.wide_leaves(ours))), (name, kind)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every_dtype
def test_a_group_that_is_not_finite_passes_as_it_came(dtype, value):
    updates = leaves_of(dtype, [1.0, value, -0.0, 1000.0, 2.0, 2.0], [[3.0, 4.0], [0.0, 1.0]], value)
    params = [np.ones_like(x) for x in updates]
    steps = [(bound, functools.partial(all_of, dtype, bound)) for bound in (0.0, 1e-3, np.inf)]
    if dtype == jnp.float32:
        steps += [(bound, step_with_number(bound)) for bound in (0.0, np.inf)]
    for bound, step in steps:
        for name, ours in step(updates, params).items():
            if name in ("clip", "clip_by_value", "lower end") or (name.startswith("exactly") and bound == np.inf):
                continue  # no norm can be brought to infinity
            vector, matrix, number = (
                np.asarray(x).tobytes() == y.tobytes() for x, y in zip(ours, updates, strict=True)
            )
            assert vector, (name, bound)
            assert number, (name, bound)
            if name in ("range from", "range up to", "smooth") or name.startswith("global"):
                assert matrix, (name, bound)
            elif bound < 1:
                small = np.abs(trees.wide_leaves(ours)[1]) < 0.1
                assert np.all(small), f"{name}, {bound}: one bad leaf must not stop the others"


def test_units_that_are_not_finite_pass_and_the_others_are_clipped():
    """Columns are the units of "io", rows those of "oi", layers those of `stacked`."""
    updates = np.array([[1.0, np.nan], [1.0, 1.0]], np.float32)
    clips = {
        "io": oc.adaptive_grad_clip,
        "oi": lambda c: oc.adaptive_grad_clip(c, units="oi"),
        "layers": lambda c: oc.clip_by_leaf_norm(c * 1e-3, stacked=1),
    }
    found = by_name(clips)(1.0, updates, np.zeros((2, 2), np.float32))
    np.testing.assert_allclose(found["io"], [[1e-3 / 2**0.5, np.nan], [1e-3 / 2**0.5, 1.0]], rtol=1e-6)
    for name in ("oi", "layers"):
        np.testing.assert_allclose(found[name], [[1.0, np.nan], [1e-3 / 2**0.5, 1e-3 / 2**0.5]], rtol=1e-6)


def test_parameters_that_are_not_finite_bound_nothing():
    step = by_name({"agc": oc.adaptive_grad_clip})
    for value in (np.nan, np.inf):
        agc = step(1.0, np.ones((2, 2), np.float32), np.float32([[value, 0.0], [0.0, 0.0]]))["agc"]
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
        yield [np.asarray(x * unit).astype(dtype) for x in leaves]


@every_dtype
def test_finite_in_finite_out(dtype):
    everything = [*hostile_leaves(dtype)]
    bounds = [0.0, 1e-45, 1e-30, 1.0, 1e6, 1e38, 3.4028234e38, np.inf]
    of_params, others = steps_of(dtype)
    calls = [(of_params, *given) for given in itertools.product(bounds, everything, everything)]
    calls += [(others, bound, updates, updates) for bound, updates in itertools.product(bounds, everything)]
    for step, bound, updates, params in calls:
        for name, ours in jax.device_get(step(bound, updates, params)).items():
            if bound == np.inf and name.startswith(("range", "exactly", "clip_by_value")) and name != "range up to":
                continue  # infinity is what is asked for there
            assert {x.dtype for x in ours} == {np.dtype(dtype)}, name
            for x in ours:
                assert np.all(np.isfinite(x)), (name, bound, x, updates, params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=id_of)
@pytest.mark.parametrize("traced", [False, True], ids=["number", "array"])
def test_a_bound_beyond_a_narrow_dtype(dtype, traced):
    """1e6 and 1e-6 are bounds for float16 leaves too, though float16 holds neither."""
    updates = np.array([3.0, 4.0]).astype(dtype)
    step = by_name(
        {
            "global": oc.clip_by_global_norm,
            "leaf": oc.clip_by_leaf_norm,
            "range": lambda c: oc.clip_by_norm_range(0.0, c),
            "clip": oc.clip,
            "clip_by_value": lambda c: oc.clip_by_value(-c, c),
            "one end": lambda c: oc.clip_by_value(max_value=c),
        }
    )
    relative, absolute = trees.slack(dtype, RTOL)
    for bound, by_norm in ((1e6, [3.0, 4.0]), (1e-6, [0.6e-6, 0.8e-6])):
        by_value = np.minimum([3.0, 4.0], bound)
        with_number = jax.jit(functools.partial(step.__wrapped__, bound))
        clipped = step(np.float32(bound), updates) if traced else with_number(updates)
        for name, ours in clipped.items():
            assert ours.dtype == dtype, name
            expected = by_norm if name in ("global", "leaf", "range") else by_value
            found = np.asarray(ours, np.float64)
            np.testing.assert_allclose(found, expected, rtol=relative, atol=absolute, err_msg=name)


def test_double_precision_has_the_same_promises():
    with jax.enable_x64(True):
        step = by_name({"global": oc.clip_by_global_norm, "leaf": oc.clip_by_leaf_norm})
        for value, bound in ((1e300, 1.0), (1e-300, 1e-305), (1e308, 1e-300), (1e200, 1e30)):
            updates = np.array([0.6 * value, -0.8 * value])
            norm = oc.global_norm(jnp.asarray(updates))
            assert norm.dtype == jnp.float64
            np.testing.assert_allclose(float(norm), value, rtol=1e-15)
            for name, ours in step(bound, updates).items():
                np.testing.assert_allclose(ours, [0.6 * bound, -0.8 * bound], rtol=1e-14, err_msg=name)
        tiny = np.array([1e-310, -0.0, 1.0])
        for ours in step(10.0, tiny).values():
            trees.assert_same_bits(ours, tiny)


def test_clippy_leaves_complex_numbers_that_are_not_finite():
    # The difference of a number from itself, by which that is told, may be NaN in either part.
    step, params = by_name({"clippy": lambda _: contrib.clippy()}), np.ones(3, np.complex64)
    for bad in (np.inf, np.nan, complex(1, np.inf), complex(np.nan, 1)):
        updates = np.array([1 + 2j, bad, 3j], np.complex64)
        np.testing.assert_array_equal(step(None, updates, params)["clippy"], updates)
