"""A record in one of another length: each step at its place, what led to the first fault, and the names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import clip_stats
from tests.support.imports import imported

PARAMS = {"a": jnp.ones(1), "b": jnp.ones(1)}


def clip(length):
    return oc.clip_by_leaf_norm(20.0, record=length)


@functools.cache
def compiled(length):
    """The first state, and a step for each number of a range, which are their norms."""
    tx = clip(length)

    def run(state, start, stop, bad):
        def step(number, state):
            size = jnp.where(number == bad, jnp.nan, number.astype(jnp.float32))
            return tx.update({"a": size[None], "b": 2 * size[None]}, state)[1]

        return jax.lax.fori_loop(start, stop, step, state)

    return jax.jit(tx.init)(PARAMS), jax.jit(run)


def run(length, state, steps, bad):
    first, run_ = compiled(length)
    return run_(first if state is None else state, steps.start, steps.stop, bad)


def as_it_comes(state, how):
    if how == "live":
        return state
    serialization = imported("flax.serialization")
    return serialization.msgpack_restore(serialization.to_bytes(state))


@pytest.mark.parametrize(("bad", "how"), [(0, "live"), (3, "msgpack"), (27, "live"), (27, "msgpack")])
@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 40), (40, 10), (10, 40), (10, 10)])
def test_every_step_that_is_there_goes_into_a_ring_of_another_length(before, after, bad, how):
    done = 29
    old = run(before, None, range(1, done + 1), bad)
    state, report = oc.migrate(clip(after), PARAMS, as_it_comes(old, how))
    assert not report.dropped
    assert not report.new
    found, kept = (clip_stats(state, history=which, per_group=True) for which in (True, "first_nonfinite"))
    np.testing.assert_array_equal(found["clip_steps"], np.arange(done - min(before, after, done) + 1, done + 1))
    last = min(done, bad + before // 10, bad + after // 10) if bad else done
    # A shorter ring has no place for what came after the fault, a longer one has it as far as it was kept.
    there = np.arange(max(1, (min(done, bad + before // 10) if bad else done) - before + 1), last + 1)
    limit = (min(done, bad + after // 10) if bad else done) - after
    np.testing.assert_array_equal(kept["clip_steps"], there[there > limit])
    for seen in (found, kept):
        norms = np.where(seen["clip_steps"] == bad, np.nan, seen["clip_steps"])
        np.testing.assert_array_equal(seen["clip_norm/a"], norms)
        np.testing.assert_array_equal(seen["clip_norm/b"], 2 * norms)
        np.testing.assert_array_equal(seen["clip_limit/b"], np.full(len(norms), 20.0))
    now, was = clip_stats(state), clip_stats(old)
    for name in ("clip_steps", "clip_norm", "clipped_share", *(name for name in was if "nonfinite" in name)):
        assert now[name] == was[name], name
    if after <= before and not bad:
        go_on = run(after, state, range(done + 1, done + 6), bad)
        always = run(after, None, range(1, done + 6), bad)
        jax.tree.map(np.testing.assert_array_equal, go_on, always)


def test_a_record_of_another_model_is_no_record_of_this_one():
    old = run(4, None, range(1, 6), 0)
    other = {"a": jnp.ones(1), "c": jnp.ones(1)}
    state, report = oc.migrate(clip(4), other, old)
    assert set(report.kept) == set()
    assert report.dropped["clip_stats"] == "ClipStats"
    assert clip_stats(state)["clip_steps"] == 0


def test_the_names_are_those_of_the_new_state():
    tx = optax.chain(clip(4), optax.sgd(0.1))
    state, _ = oc.migrate(tx, PARAMS, as_it_comes((run(4, None, range(1, 6), 2),), "msgpack"))
    assert clip_stats(state)["first_nonfinite_report"] == "2 of 2 leaves: look in the forward pass"
    assert clip_stats(state, per_group=True)["clip_norm/b"] == 10.0
