"""Plain clips on adversarial trees, against factors in longdouble.

Each method is compiled once per tree; the values and the bounds are traced.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib, norms, thresholds
from tests import table
from tests.fuzz import inputs, plain
from tests.fuzz.plain import Expected, L

ORDERS = [1, 1.5, 2, 3, math.inf]


class Method(NamedTuple):
    """A clip of two bounds, of which it may ignore the second.

    Attributes:
      make: (c, d) -> transformation.
      expect: (floats, their parameters, c, d) -> what each must be.
      norm: floats -> a number about which bounds are interesting.
    """

    make: Callable[[Any, Any], Any]
    expect: Callable[[list[Any], list[Any], Any, Any], list[Expected]]
    norm: Callable[[list[Any]], Any]
    narrow: bool = True


def values(flat, low, high):
    """By coordinate; the modulus, where they are complex."""
    return [_values(x, low, high) for x in flat]


def _values(leaf, low, high):
    x, dtype = plain.wide(leaf), np.asarray(leaf).dtype
    is_complex = dtype.kind == "c"
    with np.errstate(all="ignore"):
        # Ends are rounded to the dtype, those beyond its largest number to that.
        most = np.longdouble(float(jnp.finfo(dtype).max))
        low, high = (end if np.isinf(end) else np.clip(end, -most, most) for end in (low, high))
        low, high = (plain.wide(np.asarray(end).astype(np.real(np.asarray(leaf)).dtype)) for end in (low, high))
        size = np.abs(x) if is_complex else x
        goal = np.fmin(np.fmax(size, low), high)
        base = direction(x) * goal if is_complex else goal
        kept = (goal == size) | np.isnan(x)
    # Beside an end that is subnormal, or 0 with one of two signs, only the value of what is subnormal counts.
    is_exact = min(abs(low), abs(high)) >= plain.info(dtype).tiny
    kept &= is_exact | (np.abs(x) >= plain.info(dtype).tiny) | np.isnan(x)
    # A modulus past the largest float counts as that.
    most = np.maximum(np.abs(x) / L(plain.info(dtype).max), 1) if is_complex else L(1)
    return Expected(L(1), np.where(np.isfinite(most), most, 1), kept, base)


def direction(x):
    """Of complex numbers, infinite ones too, as numbers of modulus 1; 0 for 0."""
    infinite = np.isinf(x.real) | np.isinf(x.imag)
    parts = [np.where(infinite, np.where(np.isinf(part), np.sign(part), 0), part) for part in (x.real, x.imag)]
    size = np.hypot(*parts)
    return (parts[0] + 1j * parts[1]) / np.where(size > 0, size, 1)


def global_norm(ord):
    def expect(flat, params, c, d):
        n = plain.together(flat, ord)
        return [plain.expected(n, [0], plain.bounds_of(c, "float32")) for _ in flat]

    return Method(lambda c, d: oc.clip_by_global_norm(c, ord=ord), expect, lambda flat: plain.together(flat, ord)[0])


def of_leaf(leaf, ord=2, dims=None):
    return plain.norms_of(leaf, ord, dims)


def rms(leaf):
    return plain.norms_of(leaf, divisor=np.sqrt(L(max(np.size(leaf), 1))))


def first(flat, norm=of_leaf):
    return float(np.max([np.max(norm(x)[0], initial=0) for x in flat], initial=0))


def leaf_by_leaf(make, norms_of_leaf, factor=plain.into_band):
    def expect(flat, params, c, d):
        return [plain.expected(norms_of_leaf(x), [0], plain.bounds_of(c, np.asarray(x).dtype), factor) for x in flat]

    return Method(make, expect, lambda flat: first(flat, norms_of_leaf))


def norm_range_expect(flat, params, c, d):
    n = plain.together(flat)
    low, high = min(c, d, np.float32(inputs.LARGEST)), max(c, d)
    return [plain.expected(n, plain.bounds_of(low, "float32"), plain.bounds_of(high, "float32")) for _ in flat]


def smooth_expect(flat, params, c, d):
    n = plain.together(flat)
    return [plain.expected(n, [0], plain.bounds_of(c, "float32"), plain.smooth) for _ in flat]


def io_dims(shape):
    rank = len(shape)
    if sum(length != 1 for length in shape) <= 1:
        return tuple(range(rank))
    return (0,) if rank <= 3 else tuple(range(rank - 1))


def oi_dims(shape):
    return tuple(range(len(shape)))[0 if len(shape) <= 1 else 1 :]


def agc(units, dims_of):
    def one(x, w, ratio, eps):
        dims, dtype = dims_of(np.shape(x)), np.asarray(x).dtype
        ratios, floors, sizes = plain.bounds_of(ratio, dtype), plain.bounds_of(eps, dtype), of_leaf(w, 2, dims)
        with np.errstate(all="ignore"):
            limits = [share * np.maximum(n, least) for share in ratios for least in floors for n in sizes]
        # 0 times inf, and parameters that are not finite, bound nothing.
        limits = [np.where(np.isfinite(sizes[0]) & ~np.isnan(limit), limit, L(np.inf)) for limit in limits]
        limits += [plain.flushed(limit, dtype) for limit in limits]
        limits += [np.where(limit > L(plain.info(dtype).max), L(np.inf), limit) for limit in limits]
        return plain.expected(of_leaf(x, 2, dims), [0], plain.ends(limits))

    def expect(flat, params, c, d):
        return [one(x, w, c, d) for x, w in zip(flat, params, strict=True)]

    return Method(lambda c, d: oc.adaptive_grad_clip(c, d, units=units), expect, lambda flat: 1.0)


def clippy_expect(flat, params, c, d):
    return [_clippy(x, w, c, d) for x, w in zip(flat, params, strict=True)]


def _clippy(leaf, weight, relative, absolute):
    u, w, dtype = plain.wide(leaf), plain.wide(weight), np.asarray(leaf).dtype
    if not (np.all(np.isfinite(u)) and np.all(np.isfinite(w)) and np.isfinite(relative) and np.isfinite(absolute)):
        return Expected(L(1), L(1), np.array(True))
    top = L(plain.info(dtype).max)
    ratios = []
    with np.errstate(all="ignore"):
        for flush in (lambda x: x, lambda x: plain.flushed(x, dtype)):
            rel, more = flush(L(relative)), flush(L(absolute))
            # A modulus past the largest float counts as that.
            for most in (top, L(np.inf)):
                size, weights = (np.minimum(np.abs(flush(x)), most) for x in (u, w))
                for last in (lambda x: x, flush):
                    limit = last(flush(rel * weights) + more)
                    ratios.append(np.max(np.where(size == 0, L(0), size / limit), initial=0))
    factors = [L(1) if r <= 1 else 1 / r for r in ratios] + [L(0) for r in ratios if r > top * L(1 - 1e-4)]
    kept = all(r * L(1 + plain.ROUNDING) <= 1 for r in ratios)
    return Expected(min(factors), max(factors), np.array(kept))


def spectral(leaf):
    """The largest singular value, of what "io" makes of a leaf; from float64, of a matrix near 1."""
    x, dtype = plain.wide(leaf), np.asarray(leaf).dtype
    if x.ndim < 2 or 0 in x.shape or not np.all(np.isfinite(x)):
        return of_leaf(leaf)
    found = []
    for each in (x, plain.flushed(x, dtype)):
        matrix = each.reshape(-1, x.shape[-1])
        top = np.max(np.abs(matrix))
        near = (matrix / (top if top > 0 else 1)).astype(np.complex128 if x.dtype.kind == "c" else np.float64)
        value = top * L(np.linalg.svd(near, compute_uv=False)[0])
        found.append(np.full((1,) * x.ndim, value))
    most = L(plain.info(dtype).max)
    found += [np.where(n > most * L(1 - plain.ROUNDING), most, n) for n in found]
    return plain.ends(found + [plain.flushed(n, dtype) for n in found])


METHODS = {
    "clip": Method(lambda c, d: oc.clip(c), lambda flat, params, c, d: values(flat, -c, c), first),
    "clip_by_value": Method(
        lambda c, d: oc.clip_by_value(-c, d),
        lambda flat, params, c, d: values(flat, -c, d),
        first,
    ),
    **{f"clip_by_global_norm, ord {ord}": global_norm(ord) for ord in ORDERS},
    **{
        f"clip_by_leaf_norm, ord {ord}": leaf_by_leaf(
            lambda c, d, ord=ord: oc.clip_by_leaf_norm(c, ord=ord), lambda leaf, ord=ord: of_leaf(leaf, ord)
        )
        for ord in ORDERS
    },
    "clip_by_block_rms": leaf_by_leaf(lambda c, d: oc.clip_by_block_rms(c), rms),
    "clip_by_norm_range": Method(
        lambda c, d: oc.clip_by_norm_range(jnp.minimum(jnp.minimum(c, d), inputs.LARGEST), jnp.maximum(c, d)),
        norm_range_expect,
        lambda flat: plain.together(flat)[0],
    ),
    "smooth_clip_by_global_norm": Method(
        lambda c, d: oc.smooth_clip_by_global_norm(c), smooth_expect, lambda flat: plain.together(flat)[0]
    ),
    "smooth, leaf by leaf": leaf_by_leaf(
        lambda c, d: oc.clip_by(norms.leaf_norm(), thresholds.smooth(c)), of_leaf, plain.smooth
    ),
    "adaptive_grad_clip, io": agc("io", io_dims),
    "adaptive_grad_clip, oi": agc("oi", oi_dims),
    "adaptive_grad_clip, leaf": agc("leaf", lambda shape: tuple(range(len(shape)))),
    "clippy": Method(contrib.clippy, clippy_expect, lambda flat: 1.0),
    "clip_by_spectral_norm": leaf_by_leaf(lambda c, d: oc.clip_by_spectral_norm(c), spectral),
    "zero_nonfinite": Method(
        lambda c, d: oc.zero_nonfinite(),
        lambda flat, params, c, d: [zeroed(x) for x in flat],
        lambda flat: 1.0,
    ),
}


def zeroed(leaf):
    x = plain.wide(leaf)
    return Expected(L(1), L(1), np.isfinite(x), np.where(np.isfinite(x), x, 0))


class Step:
    """A method compiled for a tree."""

    def __init__(self, method):
        def step(c, d, updates, params):
            tx = method.make(c, d)
            return tx.update(updates, tx.init(params), params)[0]

        self.method, self.step = method, jax.jit(step)

    def problem(self, tree, seed):
        """What is wrong with an example, in words and as code; "" if nothing is."""
        updates, params, rng = inputs.example(tree, seed)
        flat, weights = floats(updates), floats(params)
        with np.errstate(all="ignore"):
            norm = self.method.norm(flat)
            c, d = (inputs.bound(rng, norm) for _ in range(2))
        if tree == "double":  # in float32 a bound may be subnormal, and then it is none in float64
            c, d = np.float64(c), np.float64(d)
        try:
            after = self.step(c, d, *as_arrays(updates, params))
        except ValueError as error:  # what a dtype can't do is refused
            return "" if tree in inputs.NARROW and tree in str(error) else f"{error}"
        wrong = structure(updates, after) or first_wrong(flat, weights, after, self.method.expect(flat, weights, c, d))
        return wrong and (f"{wrong}\n    c, d = {c!r}, {d!r}; updates, params, _ = inputs.example({tree!r}, {seed})")


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if plain.is_float(leaf)]


def as_arrays(*trees):
    return jax.tree.map(lambda x: jax.device_put(x) if plain.is_float(x) else x, trees)


def first_wrong(flat, weights, after, wanted):
    for x, w, y, want in zip(flat, weights, floats(after), wanted, strict=True):
        if wrong := plain.problem(x, y, want):
            return f"{wrong}\n    leaf {inputs.pasteable(x)}\n    parameter {inputs.pasteable(w)}"
    return ""


def structure(before, after):
    if jax.tree.structure(before) != jax.tree.structure(after):
        return f"{jax.tree.structure(before)} became {jax.tree.structure(after)}"
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not plain.is_float(x) and not np.array_equal(np.asarray(x), np.asarray(y)):
            return f"{x!r}, which holds no floats, became {y!r}"
    return ""


def precision(tree):
    return jax.enable_x64(True) if tree == "double" else contextlib.nullcontext()


def check(name, tree, seeds):
    wrong = {}
    with precision(tree):
        step = Step(METHODS[name])
        for seed in seeds:
            if found := step.problem(tree, seed):
                wrong[seed] = found
    shown = "\n".join(list(wrong.values())[:3])
    assert not wrong, f"{name} on {tree!r}: {len(wrong)} of {len(seeds)} examples\n{shown}"


LARGE = {"wide", "large"}  # one example holds as many numbers as thousands of the other trees
WIDE = [name for name in inputs.TREES if name not in inputs.NARROW]
FOR_NARROW = ["clip", "clip_by_global_norm, ord 2", "clip_by_norm_range", "clip_by_block_rms", "zero_nonfinite"]


def pairs(trees_of, methods=tuple(METHODS)):
    """Methods and trees, as parameters."""
    return [pytest.param(name, tree, id=f"{name}-{tree}") for i, name in enumerate(methods) for tree in trees_of(i)]


# In the quick part every method meets one tree, and every tree some method.
@pytest.mark.parametrize(("name", "tree"), pairs(lambda i: [WIDE[(2 + i) % len(WIDE)]]))
def test_some(name, tree):
    check(name, tree, range(6 if tree in LARGE else 15))


@pytest.mark.xla
@pytest.mark.parametrize(("name", "tree"), pairs(lambda i: inputs.NARROW, ["clip"]))
def test_narrow_floats(name, tree):
    check(name, tree, range(30))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tree"), pairs(lambda i: WIDE[i % 2 :: 2]))
def test_many(name, tree):
    check(name, tree, range(100, 120 if tree in LARGE else 150))


@pytest.mark.slow
@pytest.mark.xla
@pytest.mark.parametrize(("name", "tree"), pairs(lambda i: inputs.NARROW, FOR_NARROW))
def test_many_narrow_floats(name, tree):
    check(name, tree, range(100, 130))


def check_norm(tree, ord, seeds):
    with precision(tree):
        measure = jax.jit(lambda updates: oc.global_norm(updates, ord=ord))
        for seed in seeds:
            (updates,) = as_arrays(inputs.example(tree, seed).updates)
            if tree in map(str, table.REFUSED):
                with pytest.raises(ValueError, match=tree):
                    measure(updates)
                continue
            norm, right = plain.L(measure(updates)), plain.together(floats(updates), ord)
            with np.errstate(invalid="ignore"):
                is_right = min(right) * L(1 - 1e-5) <= norm <= max(right) * L(1 + 1e-5)
            # Not finite where an entry is not, be it inf or NaN.
            assert is_right if np.isfinite(right[0]) else not np.isfinite(norm), (
                f"global_norm is {float(norm)!r}, not {float(min(right))!r} to {float(max(right))!r}: "
                f"ord={ord}; updates = inputs.example({tree!r}, {seed}).updates"
            )


@pytest.mark.parametrize(("ord", "tree"), [(2, "nested"), (1, "sixteen"), (3, "complex"), (math.inf, "no floats")])
def test_global_norm(ord, tree):
    check_norm(tree, ord, range(30))


@pytest.mark.slow
@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("tree", inputs.TREES)
def test_many_global_norms(ord, tree):
    check_norm(tree, ord, range(100, 120))


@pytest.mark.parametrize("ends", [thresholds.exactly, lambda c: thresholds.between(c, jnp.inf)], ids=["=", ">="])
def test_norms_are_raised_to_near_the_largest_float(ends):
    rng = np.random.default_rng(0)

    @jax.jit
    def step(c, x):
        return oc.clip_by(norms.leaf_norm(), ends(c)).update(x, optax.EmptyState())[0]

    for _ in range(100):
        x = (rng.uniform(0.1, 1, 1) * 10.0 ** rng.uniform(-30, 38)).astype(np.float32)
        c = np.float32(inputs.LARGEST * rng.choice([0.9999, 1 - 2.0**-24, 1.0]))
        after = step(c, x)
        wrong = plain.problem(x, after, plain.expected(of_leaf(x), [L(c)], [L(c)]))
        assert not wrong, f"c = {c!r}, x = {inputs.pasteable(x)}: {wrong}"


def capped(x, c, soft):
    """U min(S, c) V^T, or the soft form, and the largest singular value; from float64, of a matrix near 1."""
    top = float(np.max(np.abs(x)))
    u, s, v = np.linalg.svd(x.astype(np.float64) / (top or 1), full_matrices=False)
    s, c = s.astype(L) * L(top), L(c)
    with np.errstate(all="ignore"):
        mapped = s / np.sqrt(1 + (s / c) ** 2) if soft else np.minimum(s, c)
    return (u * np.where(s > 0, mapped, 0)) @ v.astype(L), s[0]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (3, 6)])
def test_singular_values(shape, soft):
    rng = np.random.default_rng(0)
    step = jax.jit(lambda c, x: oc.clip_singular_values(c, smooth=soft).update(x, optax.EmptyState())[0])
    for _ in range(50):
        x = inputs.numbers(rng, shape, "float32", str(rng.choice(["one scale", "all scales", "special"])))
        top = capped(x, np.inf, False)[1]
        with np.errstate(over="ignore"):
            c = np.float32(float(top) * rng.choice([0.001, 0.1, 0.5, 0.999, 2.0])) if top < 1e38 else np.float32(1e38)
        want, _ = capped(x, c, soft)
        after = np.asarray(step(c, x)).astype(L)
        room = L(1e-3) * L(c) + 20 * L(np.finfo(np.float32).eps) * top + 8 * L(inputs.TINY)
        off = np.linalg.norm(after - want)
        assert off <= room, f"c = {c!r}, x = {inputs.pasteable(x)}: off by {off}, and not by {room}\n{after}\n{want}"


# Bounds as they may be given, in eager calls: a function of the number and of the step.

ONE = {
    "float": float,
    "NumPy's": np.float32,
    "NumPy array": lambda c: np.array(c, np.float32),
    "array": jnp.float32,
    "schedule": lambda c: lambda step: jnp.float32(c) + 0 * step,
}
# By leaf, with the numbers meant.
BY_LEAF = {
    "dict": lambda c: ({"a": float(c), "b": jnp.float32(1.0)}, [c, 1.0]),
    "some": lambda c: ({"a": None, "b": float(c)}, [np.inf, c]),
    "schedules": lambda c: ({"a": lambda step: jnp.float32(c) + 0 * step, "b": 1.0}, [c, 1.0]),
}
SINGLE = {
    "clip_by_global_norm": (oc.clip_by_global_norm, METHODS["clip_by_global_norm, ord 2"]),
    "smooth_clip_by_global_norm": (oc.smooth_clip_by_global_norm, METHODS["smooth_clip_by_global_norm"]),
}
SEVERAL = {
    "clip": (oc.clip, METHODS["clip"]),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, METHODS["clip_by_leaf_norm, ord 2"]),
    "clip_by_block_rms": (oc.clip_by_block_rms, METHODS["clip_by_block_rms"]),
    "adaptive_grad_clip": (oc.adaptive_grad_clip, METHODS["adaptive_grad_clip, io"]),
}


@pytest.mark.parametrize("name", SINGLE | SEVERAL)
def test_forms_of_bounds(name):
    for form in ONE if name in SINGLE else ONE | BY_LEAF:
        check_form(name, form)


def check_form(name, form):
    build, method = (SINGLE | SEVERAL)[name]
    rng = np.random.default_rng(0)
    for c in map(np.float32, [0.0, 1e-40, 1e-38, 1e-3, 1e38, np.inf]):
        kind = str(rng.choice(["one scale", "special", "largest"]))
        tree = {name: inputs.numbers(rng, (2, 3), "float32", kind) for name in "ab"}
        bound, meant = BY_LEAF[form](c) if form in BY_LEAF else (ONE[form](c), [c, c])
        tx = build(bound)
        updates = jax.device_put(tree)
        after, _ = tx.update(updates, tx.init(updates), updates)
        each = list(tree.values())
        wanted = [method.expect(each, each, number, np.float32(1e-3))[i] for i, number in enumerate(meant)]
        wrong = first_wrong(each, each, after, wanted)
        assert not wrong, f"{name}({bound!r}), {form}: {wrong}\n    tree = {jax.tree.map(inputs.pasteable, tree)}"
