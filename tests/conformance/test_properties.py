"""What every fixed clipper has in common, for any numbers that hypothesis finds.

One fixed set of shapes and a traced bound: every method is compiled once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

import optaxclip as oc
from optaxclip import contrib
from tests.reference import fixed, trees

SHAPES = [(3,), (2, 2), (), (3,)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
TINY, LARGEST = trees.TINY, float(np.finfo(np.float32).max)


def split(numbers):
    """A flat list of numbers as leaves of SHAPES."""
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
    parts = np.split(np.asarray(numbers, np.float32), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def whole(leaves):
    return [np.concatenate([x.ravel() for x in leaves])]


def one_each(leaves):
    return [x.ravel() for x in leaves]


def columns(leaves):
    """The units of "io": whole tensors below rank 2, columns of the matrix."""
    return [unit for x in leaves for unit in (x.T if x.ndim == 2 else [x.ravel()])]


def norms(leaves, _):
    return [fixed.vector_norm(x) for x in leaves]


class Method:
    """A clipper of one bound c: its groups, and the measure of each that c bounds."""

    def __init__(self, make, groups, measure, *, hard=True):
        self.make, self.groups, self.measure, self.hard = make, groups, measure, hard
        self.step = trees.compiled(make)

    def __call__(self, bound, updates, params):
        return [np.asarray(x) for x in self.step(np.float32(bound), updates, params)]

    def measured(self, updates, params):
        wide = (self.groups([np.asarray(x, np.float64) for x in tree]) for tree in (updates, params))
        return np.array(self.measure(*wide))


def agc_measure(groups, params):
    return [fixed.vector_norm(g) / max(fixed.vector_norm(w), 1e-3) for g, w in zip(groups, params, strict=True)]


def clippy_measure(groups, params):
    return [fixed.relative_change(u, w, 1.0, 0.25) for u, w in zip(groups, params, strict=True)]


def rms_measure(groups, _):
    return [fixed.vector_norm(x) / np.sqrt(x.size) for x in groups]


METHODS = {
    "clip_by_global_norm": Method(oc.clip_by_global_norm, whole, norms),
    "clip_by_global_norm, ord 1": Method(
        lambda c: oc.clip_by_global_norm(c, ord=1), whole, lambda groups, _: [fixed.vector_norm(groups[0], 1)]
    ),
    "clip_by_leaf_norm": Method(oc.clip_by_leaf_norm, one_each, norms),
    "clip_by_block_rms": Method(oc.clip_by_block_rms, one_each, rms_measure),
    "smooth_clip_by_global_norm": Method(oc.smooth_clip_by_global_norm, whole, norms, hard=False),
    "adaptive_grad_clip": Method(oc.adaptive_grad_clip, columns, agc_measure),
    "clippy": Method(lambda c: contrib.clippy(c, 0.25 * c), one_each, clippy_measure),
}

# Any finite float32, zeros and subnormals among them, mixed with numbers near the ends of the range.
anything = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-40, TINY, 1e-30, 1e-20, 1.0, -1e19, 1e30, -1e38, 3e38, LARGEST]
)
# Numbers whose products with powers of two, bounds and one another stay normal.
ordinary = st.just(0.0) | st.floats(2.0**-20, 2.0**20, width=32) | st.floats(-(2.0**20), -(2.0**-20), width=32)


def tree_of(numbers):
    return st.lists(numbers, min_size=SIZE, max_size=SIZE).map(split)


params_of = tree_of(st.just(0.0) | st.floats(-100, 100, width=32, allow_subnormal=False))
bounds = st.floats(-20, 20).map(lambda power: 10.0**power)


def in_range(updates):
    """Norms up to the largest float32 are promised; beyond it they saturate."""
    return fixed.global_norm(updates, 1) < LARGEST


def swapped(leaves):
    """The first and the last leaf, which have one shape, in each other's place."""
    return [leaves[3], *leaves[1:3], leaves[0]]


def every_method():
    """Drawing an example takes longer than clipping it, so each is for all methods. The last that is noted failed."""
    for name, method in METHODS.items():
        note(name)
        yield method


@settings(max_examples=150)
@given(updates=tree_of(anything), params=params_of, bound=bounds, room=st.floats(1.000002, 2))
def test_bound_identity_idempotence_direction_and_order_of_leaves(updates, params, bound, room):
    for method in every_method():
        ours = method(bound, updates, params)
        assert_direction(method, updates, ours)
        assert_close("order of leaves", method(bound, swapped(updates), swapped(params)), swapped(ours))
        if in_range(updates):
            # What is subnormal counts as zero; here it is far below every bound.
            assert np.max(method.measured(ours, params)) <= np.float32(bound) * (1 + 1e-6), "bound"
            if method.hard:
                assert_close("idempotence", method(bound, ours, params), ours)
                assert_identity_below_the_bound(method, updates, params, room)


def assert_identity_below_the_bound(method, updates, params, room):
    above = max(float(np.max(method.measured(updates, params))) * room, 1e-30)
    if above < LARGEST:
        for same, given_ in zip(method(above, updates, params), updates, strict=True):
            assert same.tobytes() == given_.tobytes(), "identity below the bound"


def assert_close(name, ours, expected):
    for first, second in zip(ours, expected, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=TINY, err_msg=name)


def assert_direction(method, updates, ours):
    """Each group comes back as itself times one number in [0, 1], also where its norm saturates."""
    after, before = (method.groups([x.astype(np.float64) for x in tree]) for tree in (ours, updates))
    for mine, group in zip(after, before, strict=True):
        top = np.argmax(np.abs(group))
        factor = mine[top] / group[top] if group[top] else 1.0
        assert 0 <= factor <= 1 + 1e-6, "direction"
        # Two roundings an entry and two in the factor; what is subnormal may be flushed.
        np.testing.assert_allclose(mine, factor * group, rtol=4e-7, atol=TINY, err_msg="direction")


@settings(max_examples=100)
@given(updates=tree_of(ordinary), params=params_of, power=st.integers(-60, 60), bound=st.floats(1e-6, 1e6))
def test_scale_equivariance(updates, params, power, bound):
    """Units are ours to choose: 2^k times the updates and the bound give 2^k times the result."""
    scale = np.float32(2.0**power)
    for method in every_method():
        plain = method(bound, updates, params)
        scaled = method(np.float32(bound) * scale, [x * scale for x in updates], params)
        assert_close("scale equivariance", scaled, [x * scale for x in plain])


any_bound = st.sampled_from([0.0, 1e-45, TINY, 1.0, LARGEST, np.inf]) | st.floats(0, LARGEST, width=32)


@settings(max_examples=150)
@given(updates=tree_of(anything), params=tree_of(anything), bound=any_bound)
def test_finite_in_finite_out(updates, params, bound):
    for method in every_method():
        assert all(np.all(np.isfinite(ours)) for ours in method(bound, updates, params))


# clip, clip_by_value and clip_by_norm_range have other properties.

value_clip = jax.jit(lambda low, high, updates: trees.update(oc.clip_by_value(low, high), updates))
clip = trees.compiled(oc.clip)
norm_range = jax.jit(lambda low, high, updates: trees.update(oc.clip_by_norm_range(low, high), updates))
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def same_numbers(ours, expected):
    """Equal, subnormals counted as zero."""
    for x, y in zip(map(np.asarray, ours), expected, strict=True):
        np.testing.assert_array_equal(np.where(np.abs(x) < TINY, 0, x), np.where(np.abs(y) < TINY, 0, y))


@settings(max_examples=150)
@given(updates=tree_of(anything), ends=st.tuples(float32s, float32s))
def test_clip_by_value_is_numpys_clip(updates, ends):
    low, high = sorted(np.float32(ends))
    assume(all(x == 0 or abs(x) >= TINY for x in (low, high)))
    ours = value_clip(low, high, updates)
    same_numbers(ours, [np.clip(x, low, high) for x in updates])
    same_numbers(value_clip(low, high, ours), [np.asarray(x) for x in ours])


@settings(max_examples=150)
@given(updates=tree_of(anything), bound=st.floats(TINY, LARGEST, width=32))
def test_clip_never_exceeds_its_bound(updates, bound):
    ours = clip(np.float32(bound), updates)
    assert max(float(np.max(np.abs(x))) for x in ours) <= bound
    inside = all(np.all(np.abs(x) <= bound) for x in updates)
    if inside:
        trees.assert_same_bits(ours, [jnp.asarray(x) for x in updates])


@settings(max_examples=150)
@given(updates=tree_of(anything), low=bounds, factor=st.floats(1, 1e6))
def test_a_norm_comes_into_its_range(updates, low, factor):
    norm = fixed.global_norm(updates)
    assume(in_range(updates))
    assume(norm == 0 or norm > 4 * TINY)
    high = np.float32(low * factor)
    ours = [np.asarray(x, np.float64) for x in norm_range(np.float32(low), high, updates)]
    if fixed.global_norm([np.where(np.abs(x) < TINY, 0, x) for x in updates]) == 0:
        same_numbers(ours, updates)
    else:
        assert low * (1 - 1e-6) <= fixed.global_norm(ours) <= high * (1 + 1e-6)
