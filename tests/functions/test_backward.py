"""clip_cotangents: identity on the way there, a transformation on the way back, against float64 NumPy."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import optaxclip as oc
from tests.reference import fixed
from tests.reference.trees import TINY, assert_close, assert_same_bits, wide_leaves
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, EXPLICIT, P

RTOL = 1e-5
ONE = oc.clip_by_global_norm(1.0)
NO_TAP = np.zeros(2, np.float32)
ONES = np.ones(2, np.float32)
SHAPES = {"kernel": (3, 2), "bias": (2,), "scale": ()}


def tree(rng, dtypes=("float32",) * 3, scale=1.0):
    def numbers(shape, dtype):
        x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0)
        return np.asarray(x * scale).astype(jnp.dtype(dtype))

    return {name: numbers(shape, dtype) for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=True)}


def pulled_back(tx, x, cotangent, way=lambda f: f, tap=None):
    """What becomes of a cotangent on its way through, in a program that is transformed one `way` or another."""
    if tap is None:
        return jax.vjp(way(lambda x: oc.clip_cotangents(x, tx)), x)[1](cotangent)[0]
    return jax.vjp(way(lambda x, tap: oc.clip_cotangents(x, tx, tap=tap)), x, tap)[1](cotangent)


def pulled_back_at_once(tx, x, cotangent, tap=None):
    """The same in one compiled program."""
    return jax.jit(lambda *args: pulled_back(tx, *args[:2], tap=args[2]))(x, cotangent, tap)


def wide(tree):
    return dict(zip(sorted(tree), wide_leaves(tree), strict=True))


# Identity forward.


def test_the_forward_pass_is_the_identity(rng):
    key = jax.random.key(0)
    x = tree(rng, ("float32", "bfloat16", "complex64")) | {
        "none": None,
        "odd": jnp.array([-0.0, 1e-45, jnp.nan, jnp.inf]),
        "count": jnp.arange(3),
        "flag": jnp.array(True),
        "empty": jnp.zeros((0, 2)),
    }
    for call in (oc.clip_cotangents, jax.jit(oc.clip_cotangents, static_argnums=1)):
        assert_same_bits(call(x | {"deep": [(x["odd"],), {}]}, ONE), x | {"deep": [(x["odd"],), {}]})
        assert call({"key": key}, ONE)["key"] == key
    floats = {name: x[name] for name in ("kernel", "odd", "empty")}
    assert_same_bits(jax.vjp(lambda x: oc.clip_cotangents(x, ONE), floats)[0], floats)
    taps = jax.jit(lambda x, tap: oc.clip_cotangents(x, ONE, tap=tap))
    assert_same_bits(taps(x, jnp.full(2, jnp.nan)), x)


# Backward, what the transformation says.

TRANSFORMATIONS = {
    "global norm": (ONE, lambda g: fixed.clip_by_global_norm(g, 1.0)),
    "leaf norm": (oc.clip_by_leaf_norm(0.5), lambda g: fixed.clip_by_leaf_norm(g, 0.5)),
    "smooth": (oc.smooth_clip_by_global_norm(1.0), lambda g: fixed.smooth_clip_by_global_norm(g, 1.0)),
    "range": (oc.clip_by_norm_range(50.0, 60.0), lambda g: fixed.clip_by_norm_range(g, 50.0, 60.0)),
    "values": (oc.clip(0.5), lambda g: fixed.clip(g, 0.5)),
    "interval": (oc.clip_by_value(-0.5, 0.25), lambda g: fixed.clip_by_value(g, -0.5, 0.25)),
    "bound per leaf": (
        oc.clip_by_leaf_norm({"bias": 0.1, "kernel": 0.2, "scale": np.inf}),
        lambda g: {
            name: fixed.bring(x, fixed.vector_norm(x), 0, {"bias": 0.1, "kernel": 0.2, "scale": np.inf}[name])
            for name, x in g.items()
        },
    ),
    "chain": (
        optax.chain(oc.zero_nonfinite(), ONE, optax.scale(2.0)),
        lambda g: {name: 2 * x for name, x in fixed.clip_by_global_norm(g, 1.0).items()},
    ),
    "optax": (optax.clip(0.5), lambda g: fixed.clip(g, 0.5)),
    "inside": (oc.clip_by_global_norm(1e6), lambda g: g),
}


@pytest.mark.parametrize(
    "name", slow_but(TRANSFORMATIONS, "global norm", "interval", "bound per leaf", "chain", "optax", "inside")
)
def test_the_cotangent_goes_through_the_transformation(rng, name):
    tx, reference = TRANSFORMATIONS[name]
    x, cotangent = tree(rng), tree(rng)
    clipped = pulled_back_at_once(tx, x, cotangent)
    assert_close(clipped, reference(wide(cotangent)), RTOL)
    if name == "inside":
        assert_same_bits(clipped, cotangent)


def under_cond(f):
    return lambda *args: jax.lax.cond(
        args[0]["scale"] > -1e9, f, lambda x, *_: jax.tree.map(lambda leaf: -leaf, x), *args
    )


WAYS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat of jit": lambda f: jax.checkpoint(jax.jit(f)),
    "cond": under_cond,
    "jit of cond": lambda f: jax.jit(under_cond(f)),
    "twice jitted": lambda f: jax.jit(jax.jit(f)),
}


@pytest.mark.parametrize("way", slow_but(WAYS, "eager", "jit", "remat", "cond"))
def test_in_every_kind_of_program(rng, way):
    x, cotangent = tree(rng), tree(rng)
    clipped, norms = pulled_back(ONE, x, cotangent, WAYS[way], tap=NO_TAP)
    assert_close(clipped, fixed.clip_by_global_norm(wide(cotangent), 1.0), RTOL)
    np.testing.assert_allclose(norms, [fixed.global_norm(wide(cotangent)), 1.0], rtol=RTOL)


@pytest.mark.parametrize("way", slow_but(WAYS, "eager", "jit", "remat", "cond"))
def test_a_traced_bound_in_every_kind_of_program(rng, way):
    """Also a whole number, which has no derivative that would make jax keep track of it."""
    x, cotangent = tree(rng), tree(rng)

    def outside(bound):
        return pulled_back(oc.clip(bound), x, cotangent, WAYS[way])

    def inside(bound):
        def clipped(x, bound):
            return pulled_back(oc.clip(bound), x, cotangent)

        return WAYS[way](clipped)(x, bound)

    both = jax.jit(lambda bound: (outside(bound), inside(bound)))
    for bound in (np.float32(0.5), np.int32(1)):
        for clipped in both(bound):
            assert_close(clipped, fixed.clip(wide(cotangent), float(bound)), RTOL)


# What a cotangent may hold.


MIXED = [("float32", "bfloat16", "float16"), ("float16", "complex64", "bfloat16")]
DTYPES = [*MIXED, ("bfloat16",) * 3, ("float16",) * 3, ("complex64",) * 3]


@pytest.mark.parametrize("dtypes", slow_but(DTYPES, *MIXED), ids="-".join)
def test_dtypes_are_kept(rng, dtypes, strict_promotion):
    x, cotangent = tree(rng, dtypes), tree(rng, dtypes)
    cases = [TRANSFORMATIONS["global norm"], TRANSFORMATIONS["values"]]
    both = jax.jit(lambda *args: [pulled_back(tx, *args) for tx, _ in cases])(x, cotangent)
    for clipped, (_, reference) in zip(both, cases, strict=True):
        assert [leaf.dtype for leaf in jax.tree.leaves(clipped)] == [leaf.dtype for leaf in jax.tree.leaves(x)]
        assert_close(clipped, reference(wide(cotangent)), RTOL)


def test_a_transformation_that_widens_is_cast_back():
    x = jnp.ones(2, jnp.bfloat16)
    tx = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u.astype(jnp.float32) / 2, updates))
    assert_same_bits(pulled_back(tx, x, x), x / 2)


@jax.jit
def clipped_to_one(cotangent):
    return pulled_back(ONE, jnp.ones_like(cotangent), cotangent, tap=NO_TAP)


@pytest.mark.parametrize(
    ("cotangent", "expected", "norms"),
    [
        ([0.0, -0.0], None, [0, 0]),
        ([3e-30, 4e-30], None, [5e-30, 5e-30]),
        ([TINY / 4, 0.0], None, [0, 0]),
        ([np.inf, 1.0], None, [np.inf, np.inf]),
        ([np.nan, 1e38], None, [np.nan, np.nan]),
        ([6e37, -8e37], [0.6, -0.8], [1e38, 1]),
        ([2e38, 2e38], [0.5**0.5, 0.5**0.5], [8**0.5 * 1e38, 1]),
    ],
    ids=str,
)
def test_extremes(cotangent, expected, norms):
    """What is inside the bound, or has no finite norm, comes back bit for bit."""
    cotangent = np.float32(cotangent)
    clipped, tapped = clipped_to_one(cotangent)
    if expected is None:
        assert_same_bits(clipped, cotangent)
    else:
        np.testing.assert_allclose(clipped, expected, rtol=RTOL)
    np.testing.assert_allclose(tapped, norms, rtol=RTOL)


def test_a_norm_past_the_largest_number():
    clipped, tapped = clipped_to_one(np.full(2, 3e38, np.float32))
    assert np.all(np.isfinite(tapped))
    assert clipped[0] == clipped[1] > 0


def test_holes_and_values_alone():
    holes, ones = np.float32([np.nan, -np.inf, 3.0, 4.0]), np.ones(4, np.float32)
    cleaned = optax.chain(oc.zero_nonfinite(), ONE)
    clipped, norms = pulled_back_at_once(cleaned, ones, holes, NO_TAP)
    np.testing.assert_allclose(clipped, [0, 0, 0.6, 0.8], rtol=RTOL)
    np.testing.assert_allclose(norms, [np.nan, 1.0], rtol=RTOL)
    np.testing.assert_array_equal(pulled_back_at_once(oc.clip(1.0), ones, holes), [np.nan, -1, 1, 1])


def test_leaves_without_a_cotangent(rng):
    """They stay, get float0, and count for nothing; the transformation, ours or optax's, sees None."""
    floats = tree(rng)
    x = floats | {"count": np.arange(3), "flag": jnp.array(True), "key": jax.random.key(0), "none": None, "static": 3}
    seen = []
    spy = optax.stateless(lambda updates, params: seen.append((updates, params)) or updates)
    txs = (ONE, optax.clip_by_global_norm(1.0), optax.chain(spy, ONE))

    def loss(x, tx):
        return 10 * jnp.sum(oc.clip_cotangents(x, tx)["kernel"])

    @jax.jit
    def all_of(floats):
        return [jax.grad(loss, allow_int=True)(x | floats, tx) for tx in txs]

    without_jit = jax.grad(loss, allow_int=True)(x, ONE)
    for cotangent in (without_jit, *all_of(floats)):
        assert cotangent["count"].dtype == cotangent["flag"].dtype == jax.dtypes.float0
        np.testing.assert_allclose(cotangent["kernel"], np.full((3, 2), 1 / np.sqrt(6)), rtol=RTOL)
        np.testing.assert_array_equal(cotangent["bias"], [0, 0])
        assert cotangent["none"] is None
    for each in seen[0]:
        assert all(each[name] is None for name in ("count", "flag", "key", "none", "static"))
        assert each["kernel"].shape == (3, 2)


def test_empty_scalar_and_python_leaves():
    for nothing in ({}, None, [], {"count": np.arange(2)}):
        assert_same_bits(oc.clip_cotangents(nothing, ONE, tap=NO_TAP), nothing)
    empty = np.zeros((0, 3), np.float32)
    x = {"empty": empty, "scalar": np.float32(1.0), "numpy": np.ones(1, np.float32)}
    cotangent = {"empty": empty, "scalar": np.float32(-3.0), "numpy": np.float32([4.0])}
    clipped, norms = pulled_back_at_once(ONE, x, cotangent, NO_TAP)
    assert clipped["empty"].shape == (0, 3)
    np.testing.assert_allclose([clipped["scalar"], clipped["numpy"][0], *norms], [-0.6, 0.8, 5, 1], rtol=RTOL)
    assert jax.grad(lambda x: 5.0 * oc.clip_cotangents(x, ONE))(2.0) == 1.0


# Where parameters are needed, they are what the cotangent belongs to.


def test_relative_to_the_array_itself(rng):
    x, cotangent = tree(rng), tree(rng, scale=10.0)
    x_with_more, more = x | {"count": np.arange(3)}, {"count": np.zeros(3, jax.dtypes.float0)}
    expected = fixed.adaptive_grad_clip(wide(cotangent), wide(x), 0.1)
    tx = oc.adaptive_grad_clip(0.1)
    assert_close(pulled_back_at_once(tx, x, cotangent), expected, RTOL)
    clipped = pulled_back(optax.chain(oc.zero_nonfinite(), tx), x_with_more, cotangent | more, jax.jit)
    assert_close({name: clipped[name] for name in x}, expected, RTOL)
    decayed = pulled_back_at_once(optax.add_decayed_weights(0.5), x, cotangent)
    assert_close(decayed, {name: leaf + 0.5 * wide(x)[name] for name, leaf in wide(cotangent).items()}, RTOL)


def test_the_second_derivative_has_that_by_the_array(rng):
    """Clipped to a tenth of ||x||, the gradient a of <a, x> is 0.1 ||x|| a / ||a||, and its derivative a product."""
    x, a = np.array([3.0, 4.0]), np.array([12.0, 5.0])
    tx = oc.clip_by(oc.norms.global_norm(), oc.thresholds.relative_to_params(0.1))
    hessian = jax.jit(jax.hessian(lambda x: jnp.vdot(jnp.float32(a), oc.clip_cotangents(x, tx))))
    np.testing.assert_allclose(hessian(jnp.float32(x)), 0.1 * np.outer(a / 13, x / 5), rtol=RTOL)


def stored(tx, x):
    """What is kept for the backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: oc.clip_cotangents(x, tx), x)[1], x))


def test_nothing_is_stored_that_is_not_needed(rng):
    x = tree(rng)
    assert [leaf.shape for leaf in stored(ONE, x) if leaf.size > 1] == []
    assert {leaf.shape for leaf in stored(oc.adaptive_grad_clip(0.1), x) if leaf.size > 1} == {(3, 2), (2,)}


# vmap.


def test_under_vmap_each_example_is_clipped_by_itself(rng):
    rows = np.float32(rng.normal(size=(5, 3)) * np.logspace(-2, 3, 5)[:, None])
    bounds = np.float32([0.01, 0.1, 1.0, 2.0, 0.0])
    expected = [fixed.clip_by_global_norm([row], bound)[0] for row, bound in zip(rows, bounds, strict=True)]
    norms = [[np.linalg.norm(row), np.linalg.norm(e)] for row, e in zip(rows, expected, strict=True)]

    def loss(x, row, bound, tap):
        return jnp.vdot(oc.clip_cotangents(x, oc.clip_by_global_norm(bound), tap=tap), row)

    def total(*args):
        return jnp.sum(jax.vmap(loss)(*args))

    @jax.jit
    def all_of(*args):
        each, together = jax.vmap(jax.grad(loss, (0, 3)))(*args), jax.grad(total, (0, 3))(*args)
        # One tap for all examples gets the sum; whole bounds are mapped as well.
        summed = jax.grad(lambda tap: total(*args[:3], jnp.broadcast_to(tap, (5, 2))))(NO_TAP)
        return each, together, summed, jax.grad(total)(*args[:2], jnp.arange(5), args[3])

    *pairs, summed, whole = all_of(np.ones((5, 3), np.float32), rows, bounds, np.zeros((5, 2), np.float32))
    for clipped, tapped in pairs:
        np.testing.assert_allclose(clipped, expected, rtol=RTOL, atol=1e-30)
        np.testing.assert_allclose(tapped, norms, rtol=RTOL, atol=1e-30)
    np.testing.assert_allclose(summed, np.sum(norms, axis=0), rtol=RTOL)
    right = [fixed.clip_by_global_norm([row], bound)[0] for bound, row in enumerate(rows)]
    np.testing.assert_allclose(whole, right, rtol=RTOL)


def test_what_vmap_does_not_map_has_one_cotangent():
    rows = jnp.array([[3.0, 0.0], [0.0, 4.0]])

    def loss(x, row):
        return jnp.vdot(oc.clip_cotangents(x, ONE), row)

    at_once = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(loss, (None, 0))(x, rows))))(ONES)
    np.testing.assert_allclose(at_once, [0.6, 0.8], rtol=RTOL)  # the sum, clipped
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(ONES, rows)
    np.testing.assert_allclose(each, [[1, 0], [0, 1]], rtol=RTOL)


# Recurrences.


class Recurrence:
    """h <- A sin(h), with a loss <v_t, h_t> after every step: bounded, and its gradient explodes."""

    def __init__(self, rng, steps, growth=3.0, size=4):
        orthogonal, _ = np.linalg.qr(rng.normal(size=(size, size)))
        self.matrix = np.float32(growth * orthogonal)
        self.weights = np.float32(rng.normal(size=(steps, size)) * 0.1)
        self.start = np.float32(rng.normal(size=size))
        self.taps = np.zeros((steps, 2), np.float32)

    def loss(self, h, taps, clip, body=lambda f: f):
        """The loss, and the state before each step. `clip` is applied to that, with the row of the taps."""

        def step(h, along):
            weights, tap = along
            after = self.matrix @ jnp.sin(clip(h, tap))
            return after, (jnp.vdot(weights, after), h)

        _, (losses, states) = jax.lax.scan(body(step), h, (self.weights, taps))
        return jnp.sum(losses), states

    def backward(self, states, *clips):
        """The gradient in float64, each step's cotangent through its clip, and the norms before and after."""
        matrix = self.matrix.astype(np.float64)
        cotangent, norms = np.zeros(len(matrix)), []
        clips = clips * len(states) if len(clips) == 1 else clips
        for state, weights, clip in zip(states[::-1], self.weights[::-1], clips[::-1], strict=True):
            before = np.cos(np.float64(state)) * (matrix.T @ (cotangent + weights))
            cotangent = clip(before)
            norms.append([np.linalg.norm(before), np.linalg.norm(cotangent)])
        return cotangent, np.array(norms[::-1])

    def gradient(self, start, clip):
        """The same from the start on, all of it in float64."""
        states = [np.float64(start)]
        for _ in self.weights[1:]:
            states.append(self.matrix.astype(np.float64) @ np.sin(states[-1]))
        return self.backward(states, clip)[0]


def by_norm(bound):
    return lambda x: fixed.clip_by_global_norm([x], bound)[0]


SCANS = {
    "scan": lambda f: f,
    "remat": jax.checkpoint,
    "saved dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False),
}


@pytest.mark.parametrize("way", SCANS)
def test_an_exploding_recurrence(rng, way):
    model = Recurrence(rng, steps=300)

    def run(h, taps, bound):
        def clip(h, tap):
            return oc.clip_cotangents(h, oc.clip_by_global_norm(bound), tap=tap)

        return model.loss(h, taps, clip, SCANS[way])

    gradient = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
    for bound in (np.float32(1.5), np.int32(2)):
        (clipped, norms), states = jax.device_get(gradient(model.start, model.taps, bound))
        expected, right = model.backward(states, by_norm(float(bound)))
        np.testing.assert_allclose(clipped, expected, rtol=1e-4)
        np.testing.assert_allclose(norms, right, rtol=1e-4)
        assert np.all(norms[:, 1] <= float(bound) * (1 + RTOL))
        assert np.sum(norms[:, 0] > float(bound)) > 100


def test_without_a_clip_it_explodes(rng):
    model = Recurrence(rng, steps=300)

    def run(h, taps):
        return model.loss(h, taps, lambda h, tap: oc.clip_cotangents(h, optax.identity(), tap=tap))

    (lost, norms), states = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(model.start, model.taps)
    assert not np.all(np.isfinite(lost))
    assert not np.all(np.isfinite(norms))
    # In float64 it is finite, and far outside the range of float32.
    assert 1e45 < np.linalg.norm(model.backward(states, lambda x: x)[0]) < np.inf


def test_an_exploding_recurrence_clipped_by_value(rng):
    model = Recurrence(rng, steps=300)
    gradient = jax.grad(
        lambda h: model.loss(h, model.taps, lambda h, _: oc.clip_cotangents(h, oc.clip(0.5))), has_aux=True
    )
    clipped, states = jax.jit(gradient)(model.start)
    expected, _ = model.backward(states, lambda x: np.clip(x, -0.5, 0.5))
    np.testing.assert_allclose(clipped, expected, rtol=1e-4)


def test_in_a_branch_of_a_scan(rng):
    """Every other step is clipped."""
    model = Recurrence(rng, steps=6)
    flags = jnp.arange(6) % 2

    def clip(h, flag):
        return jax.lax.cond(flag > 0, lambda h: oc.clip_cotangents(h, ONE), lambda h: h, h)

    gradient, states = jax.jit(jax.grad(lambda h: model.loss(h, flags, clip), has_aux=True))(model.start)
    expected, _ = model.backward(states, *[lambda x: x, by_norm(1.0)] * 3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_nothing_leaks(rng):
    model = Recurrence(rng, steps=3)

    @jax.jit
    def gradient(h, bound):
        return jax.grad(
            lambda h: model.loss(
                h, model.taps, lambda h, tap: oc.clip_cotangents(h, oc.clip_by_global_norm(bound), tap=tap)
            )[0]
        )(h)

    with jax.checking_leaks():
        gradient(model.start, jnp.asarray(1))


# Higher derivatives.


def cubic(x, weights, bound, tx=oc.clip_by_global_norm):
    """<a, y^3> / 3 of a clipped y, whose gradient is clip(a x^2)."""
    return jnp.vdot(weights, oc.clip_cotangents(x, tx(bound)) ** 3) / 3


def jacobian_of_clip(gradient, bound):
    """Of g -> min(1, c / ||g||) g, by hand: c / ||g|| (I - gg' / ||g||^2), by g; and g / ||g||, by c."""
    norm = np.linalg.norm(gradient)
    if norm <= bound:
        return np.eye(len(gradient)), np.zeros(len(gradient))
    along = gradient / norm
    return bound / norm * (np.eye(len(gradient)) - np.outer(along, along)), along


SECOND = {
    "hessian": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "jitted inside": lambda f: jax.jacrev(jax.jacrev(jax.jit(f))),
    "of remat": lambda f: jax.hessian(jax.checkpoint(f)),
}


def test_hessian():
    x, weights = np.array([0.5, -1.0, 2.0]), np.array([1.0, -0.5, 0.25])
    second = jax.jit(lambda *args: {name: way(cubic)(*args) for name, way in SECOND.items()})
    for bound in (0.5, 100.0):
        by_gradient, _ = jacobian_of_clip(weights * x**2, bound)
        for name, got in second(*map(np.float32, (x, weights, bound))).items():
            right = by_gradient @ np.diag(2 * weights * x)
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6, err_msg=name)


def test_grad_of_grad_by_all_arguments():
    """Of <v, clip(a x^2)>, by x, a and the bound; the loss itself does not depend on the bound."""
    x, weights, v = np.array([0.5, -1.0, 2.0]), np.array([1.0, -0.5, 0.25]), np.array([1.0, 2.0, 3.0])

    @jax.jit
    def derivatives(*args):
        second = jax.grad(lambda *args: jnp.vdot(jnp.float32(v), jax.grad(cubic)(*args)), (0, 1, 2))(*args)
        return second, jax.grad(cubic, 2)(*args)

    for bound in (0.5, 100.0):
        second, by_bound_alone = derivatives(*map(np.float32, (x, weights, bound)))
        by_gradient, by_bound = jacobian_of_clip(weights * x**2, bound)
        expected = 2 * weights * x * (by_gradient.T @ v), x**2 * (by_gradient.T @ v), by_bound @ v
        for got, right in zip(second, expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
        assert by_bound_alone == 0


def test_hessian_by_value():
    """Of a clip by value it is the Hessian without the rows of the coordinates that are clipped."""
    x, weights = np.array([0.5, -1.0, 2.0]), np.array([1.0, -0.5, 0.25])
    second = jax.jit(jax.hessian(lambda x: cubic(x, jnp.float32(weights), 0.6, oc.clip)))(jnp.float32(x))
    np.testing.assert_allclose(second, np.diag([1.0, 1.0, 0.0]) @ np.diag(2 * weights * x), rtol=1e-6)


def test_second_derivative_through_a_recurrence(rng):
    """Against differences in float64, of a recurrence that is short enough not to be chaotic."""
    model = Recurrence(rng, steps=5)
    v = rng.normal(size=4)

    @jax.jit
    def second(h, bound):
        def directional(h, bound):
            def clip(h, tap):
                return oc.clip_cotangents(h, oc.clip_by_global_norm(bound), tap=tap)

            return jnp.vdot(jnp.float32(v), jax.grad(lambda h: model.loss(h, model.taps, clip, jax.checkpoint)[0])(h))

        return jax.grad(directional, (0, 1))(h, bound)

    def directional(h, bound):
        return v @ model.gradient(h, by_norm(bound))

    start, bound, step = model.start.astype(np.float64), 0.7, 1e-6
    by_start = [
        (directional(start + step * e, bound) - directional(start - step * e, bound)) / (2 * step) for e in np.eye(4)
    ]
    by_bound = (directional(start, bound + step) - directional(start, bound - step)) / (2 * step)
    got = second(model.start, jnp.float32(bound))
    np.testing.assert_allclose(got[0], by_start, rtol=1e-3, atol=1e-3 * np.abs(by_start).max())
    np.testing.assert_allclose(got[1], by_bound, rtol=1e-3)


def test_forward_mode_raises():
    forward = jax.jacfwd(lambda x: oc.clip_cotangents(x, ONE))
    for call in (jax.jit(forward), forward):
        with pytest.raises(TypeError, match="custom_vjp"):
            call(ONES)


# Schedules.


def test_the_bound_of_the_step_from_a_schedule():
    """A train loop whose bound falls from 4 to 1: each step's gradient is clipped by the bound of that step."""
    schedule = optax.linear_schedule(4.0, 1.0, 3)
    rows = jnp.full((5, 2), 10.0)

    def loss(w, row, step):
        return jnp.vdot(oc.clip_cotangents(w, oc.clip_by_global_norm(schedule(step))), row)

    def train(w, along):
        gradient = jax.grad(loss)(w, *along)
        return w - gradient, jnp.linalg.norm(gradient)

    _, norms = jax.jit(lambda: jax.lax.scan(train, jnp.zeros(2), (rows, jnp.arange(5))))()
    np.testing.assert_allclose(norms, [4, 3, 2, 1, 1], rtol=RTOL)


def test_a_bound_per_step_of_the_recurrence(rng):
    """And through time: the bound of each step is that of a schedule at its number."""
    model = Recurrence(rng, steps=6)
    schedule = optax.exponential_decay(2.0, 1, 0.5)

    def clip(h, step):
        return oc.clip_cotangents(h, oc.clip_by_global_norm(schedule(step)))

    gradient, states = jax.jit(jax.grad(lambda h: model.loss(h, jnp.arange(6), clip), has_aux=True))(model.start)
    expected, _ = model.backward(states, *map(by_norm, 2.0 * 0.5 ** np.arange(6)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (oc.clip_by_global_norm(lambda step: 1.0 / (1 + step)), r"keeps 1 arrays \(ScheduleState\).*schedule\(step\)"),
        (oc.clip(lambda step: 1.0 / (1 + step)), r"ScheduleState.*schedule\(step\)"),
        (oc.clip_by_global_norm(1.0, record=True), "RecordedState.*pass tap="),
        (oc.zclip(), "keeps 4 arrays"),
        (optax.chain(ONE, optax.adam(1e-3)), "keeps 3 arrays"),
    ],
    ids=["schedule", "schedule by value", "record", "zclip", "chain"],
)
def test_a_state_is_refused_when_called(tx, words):
    """In the forward pass, before anything is differentiated."""
    for call in (oc.clip_cotangents, jax.jit(oc.clip_cotangents, static_argnums=1)):
        with pytest.raises(ValueError, match=f"clip_cotangents needs a transformation without state.*{words}"):
            call(ONES, tx)


@pytest.mark.parametrize("tx", [None, 1.0, oc.clip, "a name"])
def test_what_is_no_transformation(tx):
    with pytest.raises(ValueError, match="tx must be an optax transformation"):
        oc.clip_cotangents(ONES, tx)


@pytest.mark.parametrize(
    "tap", [jnp.zeros(3), jnp.zeros((4, 2)), jnp.zeros(2, int), jnp.zeros(2, complex), 0.0, [0.0, 0.0]], ids=str
)
def test_what_is_no_tap(tap):
    with pytest.raises(ValueError, match=r"tap must be a float array of shape \(2,\)"):
        oc.clip_cotangents(ONES, ONE, tap=tap)


# The tap.


def test_the_tap_keeps_its_dtype(strict_promotion):
    x, cotangent = (np.array(values, jnp.bfloat16) for values in ([1, 1], [3, 4]))
    taps = [np.zeros(2, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
    all_of = jax.jit(lambda taps: [pulled_back(ONE, x, cotangent, tap=tap)[1] for tap in taps])
    for tap, norms in zip(taps, all_of(taps), strict=True):
        assert norms.dtype == tap.dtype
        np.testing.assert_allclose(np.float32(norms), [5, 1], rtol=1e-2)


def test_taps_of_several_places():
    """One each keeps them apart, one for both adds them up, and where nothing flows back there is nothing."""

    def loss(x, taps):
        first = oc.clip_cotangents(x, ONE, tap=taps["first"])
        second = oc.clip_cotangents(first * 2, oc.clip_by_global_norm(3.0), tap=taps["second"])
        oc.clip_cotangents(first, ONE, tap=taps["unused"])
        return jnp.vdot(second, jnp.array([3.0, 4.0]))

    zero = jnp.zeros(2)
    norms = jax.jit(jax.grad(loss, 1))(ONES, {"first": zero, "second": zero, "unused": zero})
    np.testing.assert_allclose([norms["second"], norms["first"], norms["unused"]], [[5, 3], [6, 1], [0, 0]], rtol=RTOL)
    shared = jax.jit(jax.grad(lambda tap: loss(ONES, {"first": tap, "second": tap, "unused": tap})))(zero)
    np.testing.assert_allclose(shared, [11, 4], rtol=RTOL)


# Meshes.


def on_mesh(mesh, tx, tap_spec, **options):
    """The gradient by x and tap of sum(x^2) / 2, of an x that is split over the rows."""

    def per_device(x, scale, tap):
        x = oc.clip_cotangents(x, tx, tap=tap.reshape(2))
        return jax.lax.psum(jnp.sum((x * scale) ** 2) / 2, ("data", "model"))

    rows = P(("data", "model"))
    loss = jax.shard_map(per_device, mesh=mesh, in_specs=(rows, P(), tap_spec), out_specs=P(), **options)
    return jax.jit(jax.grad(loss, (0, 2)))


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_in_shard_map_the_norm_is_global(rng, mesh):
    x = np.float32(rng.normal(size=(8, 3)))
    laid_out = jax.device_put(x, NamedSharding(mesh, P(("data", "model"))))
    tap_specs = (P(), P(("data", "model")))  # one for all devices, or one on each
    taps = [
        jax.device_put(np.zeros(n, np.float32), NamedSharding(mesh, spec))
        for n, spec in zip((2, 16), tap_specs, strict=True)
    ]

    @jax.jit
    def gradients(x, taps):
        two = np.float32(2.0)
        alone = on_mesh(mesh, oc.clip_by_global_norm(1.0, axes=None), P())(x, two, taps[0])
        return [on_mesh(mesh, ONE, spec)(x, two, tap) for spec, tap in zip(tap_specs, taps, strict=True)], alone

    with_taps, (alone, _) = gradients(laid_out, taps)
    for (clipped, norms), number in zip(with_taps, (1, 8), strict=True):
        norm = np.linalg.norm(4.0 * x.astype(np.float64))
        np.testing.assert_allclose(clipped, 4.0 * x / norm, rtol=RTOL)
        np.testing.assert_allclose(np.reshape(norms, (-1, 2)), [[norm, 1]] * number, rtol=RTOL)
        assert clipped.sharding.is_equivalent_to(laid_out.sharding, 2)
    np.testing.assert_allclose(alone, np.concatenate([by_norm(1.0)(4.0 * row[None]) for row in x]), rtol=RTOL)


def test_in_shard_map_without_types(rng):
    x = np.float32(rng.normal(size=(8, 3)))

    def per_device(x):
        x = oc.clip_cotangents(x, oc.clip_by_global_norm(1.0, axes=("data", "model")))
        return jax.lax.psum(jnp.sum(x**2) / 2, ("data", "model"))

    rows = P(("data", "model"))
    loss = jax.shard_map(per_device, mesh=AUTO, in_specs=rows, out_specs=P(), check_vma=False)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), by_norm(1.0)(x), rtol=RTOL)
    with pytest.warns(UserWarning, match="finds no split arrays"):
        on_mesh(AUTO, oc.clip(1.0), P(), check_vma=False)(x, jnp.float32(1.0), NO_TAP)


def test_a_scan_with_the_gradient_inside_shard_map(rng):
    """The carry is split over the rows, the parameter is not: its gradient is the same on every device."""
    rows, matrix = np.float32(rng.normal(size=(8, 2))), np.float32(rng.normal(size=(2, 2)) * 3)

    def loss(h, matrix, taps):
        def step(h, tap):
            return oc.clip_cotangents(h, ONE, tap=tap) @ matrix, None

        return jnp.sum(jax.lax.scan(step, h, taps)[0])

    split = P(("data", "model"))
    gradients = jax.shard_map(
        jax.grad(loss, (0, 1, 2)), mesh=AUTO, in_specs=(split, P(), P()), out_specs=(split, P(), P())
    )
    got = jax.jit(gradients)(rows, matrix, jnp.zeros((3, 2)))
    states = [rows.astype(np.float64)]
    for _ in range(2):
        states.append(states[-1] @ matrix)
    cotangent, by_matrix, norms = np.ones((8, 2)), np.zeros((2, 2)), []
    for state in reversed(states):
        by_matrix += state.T @ cotangent
        before = cotangent @ matrix.T.astype(np.float64)
        cotangent = by_norm(1.0)(before)
        norms.append([np.linalg.norm(before), np.linalg.norm(cotangent)])
    for mine, right in zip(got, (cotangent, by_matrix, norms[::-1]), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-4)


def test_under_jit_with_shardings(rng):
    x = np.float32(rng.normal(size=(8, 4)))
    for mesh in (AUTO, EXPLICIT):
        laid_out = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        clipped = jax.jit(jax.grad(lambda x: jnp.sum(oc.clip_cotangents(x, ONE) ** 2)))(laid_out)
        np.testing.assert_allclose(clipped, by_norm(1.0)(2 * x), rtol=RTOL)
        assert clipped.sharding.is_equivalent_to(laid_out.sharding, 2)


# What it costs.


def test_one_trace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(x, bound, tap):
        return jax.grad(
            lambda x, tap: jnp.sum(oc.clip_cotangents(x, oc.clip_by_global_norm(bound), tap=tap) ** 2), (0, 1)
        )(x, tap)

    for bound in (1.0, 2.0, 3.0):
        clipped, _ = gradient(jnp.full(4, bound), bound, NO_TAP)
        np.testing.assert_allclose(np.linalg.norm(clipped), bound, rtol=RTOL)
    chex.clear_trace_counter()


def operations(f, *args):
    """What a compiled program consists of."""
    hlo = jax.jit(f).lower(*args).compile().as_text()
    return collections.Counter(re.findall(r"^\s*(?:ROOT )?%?\S+ = .*? ([a-z\-]+)\(", hlo, flags=re.MULTILINE))


def model(params, rows, clip):
    hidden = clip(jnp.tanh(rows @ params["in"]))
    return jnp.sum((hidden @ params["out"]) ** 2)


def by_hand(tx):
    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, cotangent: (tx.update(cotangent, optax.EmptyState())[0],))
    return clip


def test_without_a_tap_there_is_nothing_but_the_transformation():
    params, rows = {"in": np.ones((3, 4), np.float32), "out": np.ones((4, 2), np.float32)}, np.ones((5, 3), np.float32)

    def ours(tx):
        return lambda x: oc.clip_cotangents(x, tx)

    def program(clip, way=jax.grad):
        return operations(lambda params, rows: way(lambda params: model(params, rows, clip))(params), params, rows)

    bare = program(lambda x: x)
    assert sum(bare.values()) > 5
    assert program(ours(optax.identity())) == bare
    assert program(ours(ONE)) == program(by_hand(ONE)) != bare
    assert program(ours(ONE), lambda f: f) == program(lambda x: x, lambda f: f)
