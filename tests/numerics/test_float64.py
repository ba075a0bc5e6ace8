"""Float64 sums in programs without float64: one context, which changes nothing outside of it."""

import concurrent.futures
import contextlib
import pathlib
import threading

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip._numerics import array_norms
from tests.support.forms import assert_right


def grads(zeros=0):
    """Their squares are 0 and inf in float32. Zeros at the end count for nothing."""
    end = [0.0] * zeros
    return {
        "a": np.float32([3e-30, 4e-30, *end]),
        "b": np.float32([[3e30], [4e30]]),
        "c": np.asarray(1e30).astype(jnp.bfloat16),
    }


RIGHT = np.sqrt(25e60 + np.float64(jnp.bfloat16(1e30)) ** 2)


def is_x64():
    """As the config has it, and as arrays are made."""
    return jax.config.jax_enable_x64, jnp.asarray(1.5).dtype == jnp.float64


def test_it_stands_in_one_place():
    sources = pathlib.Path(oc.__file__).parent.rglob("*.py")
    found = {path.name: path.read_text().count("enable_x64(") for path in sources}
    assert {name: count for name, count in found.items() if count} == {"array_norms.py": 1}


CONTEXTS = {
    "disable_jit": jax.disable_jit,
    "checking_leaks": jax.checking_leaks,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "no x64": lambda: jax.enable_x64(False),
    "debug_nans": lambda: jax.debug_nans(True),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_under_contexts_of_jax(name):
    zeros = 11 + list(CONTEXTS).index(name)  # of a size that is nowhere else, so that it is traced here
    updates, column = grads(zeros), np.float32([[3e30], [4e30], *[[0.0]] * zeros])
    clip, before = oc.clip_by_global_norm(1.0), is_x64()

    @jax.jit
    def program(updates, column):
        return oc.global_norm(updates), clip.update(updates, clip.init(updates))[0], jax.grad(oc.global_norm)(column)

    with CONTEXTS[name]():
        inside = is_x64()
        norm, clipped, slope = program(updates, column)
        assert is_x64() == inside
    assert is_x64() == before
    assert [x.dtype for x in (norm, clipped["a"], clipped["c"], slope)] == ["float32", "float32", "bfloat16", "float32"]
    np.testing.assert_allclose(norm, RIGHT, rtol=2**-23)
    np.testing.assert_allclose(clipped["b"], np.float64(updates["b"]) / RIGHT, rtol=1e-6)
    np.testing.assert_allclose(slope, [[0.6], [0.8], *[[0.0]] * zeros], rtol=1e-6)


def test_eight_threads_at_once():
    """Each traces programs of its own shapes while the others do."""
    together = threading.Barrier(8)

    def norms_of(thread):
        seen = []
        for i in range(4):
            x = np.float32([3e-30] * (thread + 1) + [1e30] * i)
            together.wait(timeout=60)
            norm = jax.jit(oc.global_norm)(x)
            seen.append((norm, x, jnp.asarray(1.5).dtype, jax.config.jax_enable_x64))
        return seen

    before = is_x64()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for norm, x, dtype, flag in (each for seen in pool.map(norms_of, range(8)) for each in seen):
            assert norm.dtype == dtype == jnp.float32
            assert not flag
            assert_right(norm, x, 1)
    assert is_x64() == before


def test_a_thread_with_float64_beside_one_without():
    """The context is of a thread, and so is what it changes."""
    together = threading.Barrier(2)

    def norm_of(x64):
        with jax.enable_x64(True) if x64 else contextlib.nullcontext():
            for size in range(1, 5):
                x = np.full(size, 1e30)
                together.wait(timeout=60)
                norm = oc.global_norm(jnp.asarray(x))
                assert norm.dtype == (jnp.float64 if x64 else jnp.float32)
                assert_right(norm, x if x64 else x.astype(np.float32), 8 if x64 else 2)
        return True

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(pool.map(norm_of, (True, False)))


def test_one_program_for_all_platforms_runs_where_it_was_not_traced():
    tx = oc.clip_by_global_norm(1.0, record=2)
    updates = grads()
    state = tx.init(updates)
    exported = jax.export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "tpu"])(updates, state)
    assert not [x for x in exported.out_avals if x.dtype == jnp.float64]
    ours, ours_state = exported.call(updates, state)
    expected, expected_state = jax.jit(tx.update)(updates, state)
    for one, other in zip(
        jax.tree.leaves((ours, ours_state)), jax.tree.leaves((expected, expected_state)), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert not any(is_x64())


def test_an_error_while_tracing_leaves_the_config_as_it_was(monkeypatch):
    def broken(*_args, **_kwargs):
        assert jax.config.jax_enable_x64
        raise ZeroDivisionError

    before = is_x64()
    with monkeypatch.context() as patched:
        patched.setattr(array_norms, "_powers", broken)
        for norm in (oc.global_norm, jax.jit(oc.global_norm), jax.vmap(oc.global_norm), jax.grad(oc.global_norm)):
            with pytest.raises(ZeroDivisionError):
                norm(jnp.ones((1, 77)) if norm is not jax.vmap else jnp.ones((2, 77)))
            assert is_x64() == before
    assert float(oc.global_norm(jnp.ones((1, 77)))) == np.float32(77**0.5)


@pytest.mark.parametrize("ord", [1, 2, 3])
def test_a_tpu_is_given_none(ord):
    """There float64 is a pair of float32, and reaches no further."""
    trees = ({"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)}, jnp.ones((40, 1000)), jnp.ones(3, jnp.complex64))
    for updates in trees:
        traced = jax.jit(lambda updates: oc.global_norm(updates, ord=ord)).trace(updates)
        has = {name: "f64" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cuda", "cpu")}
        assert has == {"tpu": False, "cuda": True, "cpu": True}
