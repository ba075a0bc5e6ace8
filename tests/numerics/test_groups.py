"""One function on the numbers of many groups: what it is called with, and what comes back of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from optaxclip._arrays import groups, layouts
from optaxclip._numerics import array_norms
from tests.support.meshes import AUTO


def combined(norm, other, flag):
    """A pytree with a number in it that depends on none of the arguments."""
    bound = norm * 0 + 9 if other is None else jnp.asarray(other).astype(norm.dtype)
    return {"less": jnp.minimum(norm, bound), "constant": (jnp.float32(7), norm > bound), "given": norm * flag}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(x, y)


def test_it_is_the_function_of_every_row():
    """Of float32 and float64, numbers and arrays, with numbers, arrays and None beside them, in any order."""
    with jax.enable_x64(True):
        entries = [np.float32(3), np.float64(4), np.arange(3, dtype=np.float32), np.asarray(5).astype(jnp.bfloat16)]
        others = [None, 2, 4.5, jnp.float32(3.5), jnp.float64(1), np.float32(8)]
        rows = [
            (jnp.asarray(entry), other, np.bool_(i % 3))
            for i, (other, entry) in enumerate([*itertools.product(others, entries)] * 2)
        ]
        first, others, flags = zip(*rows, strict=True)

        @jax.jit
        def both(first, flags):
            one_by_one = [combined(*row) for row in zip(first, others, flags, strict=True)]
            return one_by_one, groups.vectorized(combined, first, others, flags)

        expected, found = both(first, flags)
        for one, other in zip(expected, found, strict=True):
            same(one, other)
        # Without jit, where each operation on each dtype is a program, of the first dtype.
        eagerly = groups.vectorized(combined, first[::4], others[::4], list(map(jnp.asarray, flags[::4])))
        for one, other in zip(expected[::4], eagerly, strict=True):
            same(one, other)


def test_numbers_of_a_kind_are_taken_in_one_vector():
    seen = []

    def fn(norm, bound):
        seen.append((np.shape(norm), norm.dtype, np.shape(bound)))
        return norm * bound

    entries = [jnp.float32(1), jnp.ones(4), jnp.float32(2), jnp.bfloat16(3), jnp.float32(4), jnp.ones(4)]
    found = groups.vectorized(fn, entries, [0.5, 0.5, 2, 0.5, 1.5, 0.5])
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(x) for x in found]), [0.5, *[0.5] * 4, 4, 1.5, 6, *[0.5] * 4]
    )
    kinds = [((3,), "float32", (3,)), ((4,), "float32", ()), ((), "bfloat16", ()), ((4,), "float32", ())]
    assert sorted(map(str, seen)) == sorted(str((shape, np.dtype(dtype), other)) for shape, dtype, other in kinds)


def test_one_number_for_all_stays_one():
    def fn(norm, bound):
        assert bound is one
        return norm * bound

    for one in (0.5, jnp.float32(0.5)):
        found = groups.over_groups(fn, {"a": jnp.float32(1), "b": [jnp.float32(2), jnp.float32(4)]}, one)
        assert found == {"a": 0.5, "b": [1, 2]}
    assert (
        groups.over_groups(lambda norm, bound: norm if bound is None else bound, (jnp.float32(1),) * 3, None)
        == (1,) * 3
    )
    assert groups.over_groups(fn, {}, 0.5) == {}


def test_what_varies_over_a_mesh_axis_makes_nothing_else_vary():
    """Norms of sharded leaves beside those of replicated ones, whose results must stay replicated."""
    over = {"a": "data", "b": "model", "c": (), "d": "data", "e": ("data", "model"), "f": (), "g": "model"}
    specs = {name: P(axes if isinstance(axes, str) else axes or None) for name, axes in over.items()}

    def step(tree):
        sums = {name: jnp.sum(x) for name, x in tree.items()}
        doubled = groups.over_groups(lambda x, y: (x + y, x > 3), sums, sums)
        for name, (double, large) in doubled.items():
            expected = {over[name]} if isinstance(over[name], str) else set(over[name])
            assert layouts.varying(double) == layouts.varying(large) == expected, name
        return {name: double[None] for name, (double, _) in doubled.items()}

    tree = {name: jnp.arange(8.0) for name in over}
    found = jax.jit(jax.shard_map(step, mesh=AUTO, in_specs=(specs,), out_specs=specs))(tree)
    for name, axes in over.items():
        devices = {"data": 4, "model": 2, (): 1, ("data", "model"): 8}[axes]
        np.testing.assert_array_equal(found[name], 2 * np.arange(8.0).reshape(devices, -1).sum(axis=1))


def test_norms_of_leaves_that_lie_on_different_devices_keep_their_types():
    """The same through the norm, whose arrays of one kind are stacked."""

    def step(a, b, c):
        found = array_norms.norms([a, b, c, c], [(0,)] * 4, 2)
        assert [layouts.varying(x) for x in found] == [{"data"}, {"model"}, set(), set()]
        return tuple(x[None] for x in found[:3])

    x = np.float32([3, 4] * 4)
    specs = (P("data"), P("model"), P())
    # Of one shape on every device.
    found = jax.jit(jax.shard_map(step, mesh=AUTO, in_specs=specs, out_specs=specs))(x, x[:4], x[:2])
    for norms in found:
        np.testing.assert_array_equal(norms, np.full(norms.shape, 5))
