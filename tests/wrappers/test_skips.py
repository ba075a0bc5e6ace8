"""skip_nonfinite and skip_spikes: what a step that is left out leaves behind, which steps those are, and the counts."""

import functools
import re
import time

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import clip_stats, norms, thresholds
from tests.reference.trees import assert_same_bits, stack
from tests.support.driving import together
from tests.support.marks import slow_but

PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), "b": np.ones(3, np.float32), "s": np.float32(2.0)}


ONES = jnp.asarray(np.ones(2, np.float32))


def params(dtype="float32"):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(jnp.dtype(dtype))), PARAMS)


def grads(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape).astype(jnp.dtype(dtype))), PARAMS)


def with_one(tree, value):
    """One entry of a matrix has this value."""
    w = np.array(tree["w"])
    w[1, 0] = value
    return tree | {"w": jnp.asarray(w)}


def bad(seed, value, dtype="float32"):
    return with_one(grads(seed, dtype), value)


def zeros(tree):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


# A step that is left out, and one that is not.


def loss(weights):
    return sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(weights))


CAPTURED = np.float32([8.0, 9.0])


def every_kind_of_entry():
    """Its update returns a value twice, an input unchanged, two that change places, constants, counts, keys, a flag, an
    empty array, what other entries are calculated from, and what the updates are not calculated from.
    """

    def init(weights):
        del weights
        return {
            "once": jnp.zeros(3),
            "twice": jnp.ones(3),
            "unchanged": jnp.full(2, 7.0),
            "left": jnp.full(2, 1.0),
            "right": jnp.full(2, 2.0),
            "constant": jnp.full(2, 3.0),
            "captured": jnp.zeros(2),
            "literal": jnp.zeros((), jnp.int32),
            "number": jnp.zeros((), jnp.int32),
            "after_number": jnp.zeros((), jnp.float32),
            "small": jnp.zeros((), jnp.uint8),
            "key": jax.random.key(0),
            "raw_key": jax.random.PRNGKey(1),
            "flag": jnp.asarray(False),
            "empty": jnp.zeros((0, 2)),
            "given": jnp.zeros(3),
            "nothing": None,
        }

    def update(updates, state, weights=None, **extra_args):
        del extra_args
        number = state["number"] + 1
        size = 0.5 * state["once"] + updates["b"]
        key, using = jax.random.split(state["key"])
        new = {
            "once": size,
            "twice": size,
            "unchanged": state["unchanged"],
            "left": state["right"],
            "right": state["left"],
            "constant": jnp.full(2, 4.0),
            "captured": CAPTURED,
            "literal": 5,
            "number": number,
            "after_number": state["after_number"] + 1.0 / number,
            "small": state["small"] - jnp.uint8(1),
            "key": key,
            "raw_key": jax.random.split(state["raw_key"])[1],
            "flag": ~state["flag"],
            "empty": state["empty"] * 2,
            "given": updates["b"],
            "nothing": None,
        }
        noise = jax.random.normal(using, (3, 2))
        return {"w": updates["w"] + noise, "b": size / number, "s": weights["s"] * new["after_number"]}, new

    return optax.GradientTransformationExtraArgs(init, update)


def rate(count):
    return 0.1 / (1 + jnp.asarray(count, jnp.float32))


INNERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw, nesterov": lambda: optax.adamw(rate, nesterov=True),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "clip, adam": lambda: optax.chain(oc.clip_by_global_norm(1.0, record=2), optax.adam(1e-2)),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "ema": lambda: optax.ema(0.9),
    "rmsprop": lambda: optax.rmsprop(1e-2, centered=True),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "lbfgs": lambda: optax.lbfgs(memory_size=2, linesearch=optax.scale_by_backtracking_linesearch(4)),
    "noise": lambda: optax.add_noise(0.1, 0.55, 0),
    "partition": lambda: optax.partition({"a": optax.adam(1e-2), "b": optax.sgd(0.1)}, {"w": "a", "b": "b", "s": "a"}),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False, "s": True}),
    "no state": lambda: optax.scale(-0.1),
    "every kind of entry": every_kind_of_entry,
}


# XLA may round a multiplication and an addition only once if they are in one loop, and a choice moves the borders of
# its loops. Without optimization it rounds as the program is written.
AS_WRITTEN = {"xla_backend_optimization_level": 0}


def stepper(tx):
    """The jitted update, with all that an inner transformation may ask for."""
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, compiler_options=AS_WRITTEN)
    def step(updates, state, weights):
        extras = {"value": loss(weights), "grad": jax.grad(loss)(weights), "value_fn": loss}
        return tx.update(updates, state, weights, **extras)

    return step


def data(tree):
    """The bits of keys in place of keys."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


WRAPPERS = {
    "nonfinite": oc.skip_nonfinite,
    "spikes": lambda inner: oc.skip_spikes(inner, thresholds.constant(100.0), norm=norms.leaf_norm()),
}


@pytest.mark.xla
@pytest.mark.parametrize("name", slow_but(INNERS, "clip, adam", "MultiSteps", "every kind of entry"))
def test_steps_left_out_leave_no_trace_and_the_others_are_those_of_inner(name):
    inner = INNERS[name]()
    tx, weights = oc.skip_spikes(inner, thresholds.constant(100.0)), params()
    plain, ours = stepper(inner), stepper(tx)
    expected_state, state = inner.init(weights), tx.init(weights)
    assert_same_bits(data(state.inner_state), data(expected_state))
    # The first is left out: later a value that is in the state twice is the same at both places.
    given = [bad(0, np.inf), grads(1), bad(2, np.nan), grads(3), bad(4, -np.inf), bad(5, 1e30), grads(6)]
    for number, updates in enumerate(given):
        before = jax.tree.map(np.asarray, data(state))
        out, state = ours(updates, state, weights)
        if number in {1, 3, 6}:
            expected, expected_state = plain(updates, expected_state, weights)
            assert_same_bits(out, expected)
            assert_same_bits(data(state.inner_state), data(expected_state))
        else:
            like = jax.eval_shape(plain, updates, expected_state, weights)[0]
            assert_same_bits(out, zeros(like))
            assert_same_bits(data(state.inner_state), before.inner_state)
    assert clip_stats(state.skip_stats)["skipped_steps"] == 4
    assert ours._cache_size() <= plain._cache_size()


def test_a_step_that_is_taken_is_that_of_inner_to_the_last_place_whatever_xla_makes_of_it():
    inner, weights = optax.adam(1e-2), params()
    tx = oc.skip_nonfinite(inner)
    plain, ours, state, expected_state = (
        jax.jit(inner.update),
        jax.jit(tx.update),
        jax.jit(tx.init)(weights),
        jax.jit(inner.init)(weights),
    )
    for seed in range(10):
        out, state = ours(grads(seed), state, weights)
        expected, expected_state = plain(grads(seed), expected_state, weights)
        chex.assert_trees_all_close((out, state.inner_state), (expected, expected_state), rtol=1e-6)


@pytest.mark.parametrize("wrapper", slow_but(WRAPPERS, "nonfinite"))
def test_zeros_come_in_the_dtypes_that_inner_returns(wrapper):
    inners = (optax.adam(1e-2), optax.sgd(0.1, momentum=0.9, accumulator_dtype="float32"), optax.scale(0.5))
    dtypes = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")]  # of gradients and parameters
    cases = [(WRAPPERS[wrapper](inner), inner, *pair) for inner in inners for pair in dtypes]

    def step(updates, states):
        return [
            tx.update(updates[dtype], state, params(of_params))
            for (tx, _, dtype, of_params), state in zip(cases, states, strict=True)
        ]

    # An update of 16-bit gradients may give the state another dtype once; that is inner's own.
    good = {dtype: grads(0, dtype) for dtype, _ in dtypes}
    poor = {dtype: bad(1, np.nan, dtype) for dtype, _ in dtypes}
    first = jax.jit(lambda updates: step(updates, [tx.init(params(of_params)) for tx, *_, of_params in cases]))(good)
    second = jax.jit(step)(poor, [state for _, state in first])
    for (_, inner, dtype, of_params), (_, state), (out, after) in zip(cases, first, second, strict=True):
        weights = params(of_params)
        expected = jax.eval_shape(inner.update, good[dtype], jax.eval_shape(inner.init, weights), weights)[0]
        chex.assert_trees_all_equal_shapes_and_dtypes(out, expected)
        assert_same_bits(out, zeros(out))
        assert_same_bits(after.inner_state, state.inner_state)


def odd_leaves(value):
    return {
        "float": jnp.asarray(np.float32([1.0, value])),
        "missing": None,
        "masked": optax.MaskedNode(),
        "steps": jnp.asarray(np.arange(3, dtype=np.int32)),
        "flag": jnp.asarray(True),
        "no_gradient": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
        "empty": jnp.asarray(np.zeros((0, 2), np.float32)),
        "complex": jnp.asarray(np.complex64([1.0 + 1.0j])),
    }


@pytest.mark.parametrize("wrapper", slow_but(WRAPPERS, "spikes"))
def test_leaves_of_every_kind(wrapper):
    tx = WRAPPERS[wrapper](optax.identity())
    given = odd_leaves(2.0)
    weights = given | {"missing": ONES}
    state, step = tx.init(weights), jax.jit(tx.update)
    out, state = step(given, state, weights)
    assert jax.tree.structure(out) == jax.tree.structure(given)
    assert_same_bits(data(out | {"no_gradient": None}), data(given | {"no_gradient": None}))
    out, state = step(odd_leaves(np.nan), state, weights)
    assert_same_bits(out["float"], np.zeros(2, np.float32))
    assert_same_bits(out["steps"], np.zeros(3, np.int32))  # whatever is added to the parameters
    assert_same_bits(out["complex"], np.zeros(1, np.complex64))
    assert (out["missing"], out["masked"]) == (None, optax.MaskedNode())
    assert out["no_gradient"].dtype == jax.dtypes.float0
    assert bool(out["flag"])
    assert out["key"] == given["key"]
    bad_complex = odd_leaves(1.0) | {"complex": jnp.asarray(np.complex64([complex(1.0, np.inf)]))}
    _, state = step(bad_complex, state, weights)
    assert clip_stats(state)["skipped_nonfinite"] == 2


def test_a_gradient_that_is_missing_reaches_inner_as_none():
    tx = oc.skip_nonfinite(optax.sgd(0.1))
    weights = {"a": ONES, "b": ONES}
    out, _ = jax.jit(lambda updates: tx.update(updates, tx.init(weights), weights))({"a": ONES, "b": None})
    assert out["b"] is None


# Where the step runs.


@functools.cache  # one object, so that it is compiled once
def adam_that_skips():
    return oc.skip_spikes(
        optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-2)), thresholds.mean_std(6.0, window=8, warmup_steps=4)
    )


@functools.cache
def first_and_step():
    """Its state, to begin with, and its jitted update."""
    tx = adam_that_skips()
    return jax.jit(tx.init)(params()), jax.jit(tx.update)


def sequence():
    """Ten gradients; the fourth, the sixth and the seventh are to be left out."""
    return [bad(i, {3: np.nan, 5: 1e20, 6: np.inf}[i]) if i in {3, 5, 6} else grads(i) for i in range(10)]


@functools.cache
def expected_run():
    """What comes out, step by step, and the last state."""
    (state, step), outs = first_and_step(), []
    for each in sequence():
        out, state = step(each, state, params())
        outs.append(out)
    assert clip_stats(state)["skipped_steps"] == 3
    return outs, state


def test_a_donated_scan_equals_a_loop():
    tx = adam_that_skips()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(state, weights, given):
        state, outs = jax.lax.scan(lambda state, each: tx.update(each, state, weights)[::-1], state, given)
        return state, weights, outs

    outs, state = expected_run()
    # Everything is donated: no two entries of the state, and none of the parameters, may share a buffer.
    first, weights, outs_one = run(jax.jit(tx.init)(params()), params(), stack(sequence()[:5]))
    last, _, outs_two = run(first, weights, stack(sequence()[5:]))
    chex.assert_trees_all_close(outs_one, stack(outs[:5]), rtol=1e-6)
    chex.assert_trees_all_close(outs_two, stack(outs[5:]), rtol=1e-6)
    chex.assert_trees_all_close(last, state, rtol=1e-6)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="the XLA of jax 0.8 fuses less: here, too, it writes to memory"
)
def test_a_donated_state_is_written_in_place():
    """Where `optax.apply_if_finite`, by its cond, writes all updates to memory."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((256, 256), leaf.dtype), PARAMS)
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))

    def temporary(tx):
        def step(weights, state, updates):
            updates, state = tx.update(updates, state, weights)
            return optax.apply_updates(weights, updates), state

        program = jax.jit(step, donate_argnums=(0, 1)).lower(shapes, jax.eval_shape(tx.init, shapes), shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    adam = optax.adam(1e-2)
    clip = oc.clip_by_global_norm(1.0)
    assert temporary(oc.skip_nonfinite(adam)) < 0.05 * gradients
    assert temporary(oc.skip_spikes(optax.chain(clip, adam), thresholds.mean_std(6.0))) < 0.05 * gradients
    assert temporary(optax.apply_if_finite(adam, 5)) > 0.5 * gradients


def test_no_barrier_keeps_a_clip_inside_from_sharing_the_norm():
    """On a GPU or a TPU it would read the gradients twice. XLA for CPUs shares the norm all the same."""
    shapes = {"w": jax.ShapeDtypeStruct((7, 11), jnp.float32)}
    tx = oc.skip_nonfinite(optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-2)))
    text = jax.jit(tx.update).lower(shapes, jax.eval_shape(tx.init, shapes)).as_text()
    assert "tensor<7x11xf32>" in text
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert [line for line in barriers if "7x11" in line] == []


@pytest.mark.slow
def test_vmap_decides_for_each():
    tx = oc.skip_nonfinite(optax.adam(1e-2))
    given = [grads(0), bad(1, np.nan), grads(2)]
    first, step = jax.jit(tx.init)(params()), jax.jit(tx.update)
    outs, states = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)))(stack(given), stack([first] * 3), params())
    for i, each in enumerate(given):
        out, state = step(each, first, params())
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], (outs, states)), (out, state), rtol=1e-6)
    np.testing.assert_array_equal(states.skip_stats.skipped_nonfinite, [0, 1, 0])


@pytest.mark.parametrize("wrapper", slow_but(WRAPPERS, "spikes"))
def test_the_derivative_of_a_step_that_is_taken_is_that_of_inner(wrapper):
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-2, eps=1e-3))
    tx, weights = WRAPPERS[wrapper](inner), params()

    def after_two(tx):
        def objective(first, scale):
            state = tx.init(weights)
            one, state = tx.update(first, state, weights)
            moved = optax.apply_updates(weights, one)
            two, _ = tx.update(jax.tree.map(lambda x: scale * x, grads(1)), state, moved)
            return loss(optax.apply_updates(moved, two))

        return jax.grad(objective, argnums=(0, 1))(grads(0), jnp.float32(2.0))

    ours, expected = jax.jit(lambda: (after_two(tx), after_two(inner)))()
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-8)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(expected[0]))


def test_the_derivative_of_a_step_that_is_left_out_is_zero():
    tx = oc.skip_spikes(optax.sgd(0.1), thresholds.constant(1.0))
    slope = jax.jit(jax.grad(lambda scale: tx.update(jnp.full(3, scale), tx.init(np.ones(3, np.float32)))[0].sum()))
    assert float(slope(0.1)) == pytest.approx(-0.3)
    assert float(slope(9.0)) == 0.0


@pytest.mark.slow
def test_an_exported_step_runs_as_the_step_itself():
    state, step = first_and_step()
    like = jax.eval_shape(lambda: (grads(0), state, params()))
    exported = jax.export.export(step, platforms=["cpu", "cuda", "tpu"])(*like)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for each, expected in zip(sequence()[:4], expected_run()[0], strict=False):
        out, state = exported.call(each, state, params())
        assert_same_bits(out, expected)


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    state, step = first_and_step()
    for each in sequence()[:7]:
        _, state = step(each, state, params())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert clip_stats(restored) == clip_stats(state)
    for each, expected in zip(sequence()[7:], expected_run()[0][7:], strict=True):
        out, restored = step(each, restored, params())
        assert_same_bits(out, expected)
    assert_same_bits(restored, expected_run()[1])


def test_an_eager_step_takes_milliseconds():
    twenty = {str(i): jnp.asarray(np.ones((3, 2), np.float32)) for i in range(20)}
    inner = optax.adam(1e-2)

    def processor_seconds(tx):
        state, times = tx.init(twenty), []
        for _ in range(4):
            start = time.process_time()
            _, state = jax.block_until_ready(tx.update(twenty, state, twenty))
            times.append(time.process_time() - start)
        return np.median(times[1:])

    # Traced anew at each call, but not compiled: optax.apply_if_finite, which is, takes ten times as long.
    assert processor_seconds(oc.skip_nonfinite(inner)) < 0.15


def test_around_multi_steps_every_micro_batch_is_judged():
    weights = params()
    given = [grads(0), bad(1, np.nan), grads(2), grads(3), bad(4, np.nan), grads(5)]
    outside = oc.skip_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    inside = optax.MultiSteps(oc.skip_nonfinite(optax.sgd(1.0)), 2).gradient_transformation()
    found = {}
    for name, tx in {"outside": outside, "inside": inside}.items():
        step, state = jax.jit(tx.update), tx.init(weights)
        found[name] = []
        for each in given:
            out, state = step(each, state, weights)
            found[name].append(np.asarray(out["b"]))
    means = [-np.mean([np.asarray(given[i]["b"]) for i in pair], axis=0) for pair in [(0, 2), (3, 5)]]
    nothing = np.zeros(3)
    np.testing.assert_allclose(found["outside"], [nothing, nothing, means[0], nothing, nothing, means[1]], rtol=1e-6)
    # optax empties its sum by multiplying with 0: one NaN stays there, and no step is taken again, as documented.
    np.testing.assert_array_equal(found["inside"], np.zeros((6, 3)))
    assert np.isnan(state.acc_grads["w"][1, 0])


def test_an_inner_state_of_another_shape_after_the_update_is_an_error():
    grows = optax.GradientTransformation(
        lambda _: (), lambda updates, state, _=None: (updates, (*state, jnp.zeros(())))
    )
    with pytest.raises(ValueError, match="had 0 arrays before the update and 1 after it"):
        oc.skip_nonfinite(grows).update(jnp.ones(2), oc.skip_nonfinite(grows).init(jnp.ones(2)))


# Which steps are left out.


@functools.cache  # one program for all sequences of a length
def deciding(tx):
    @jax.jit
    def run(given, losses):
        def step(state, row):
            out, state = tx.update({"w": row[0][None]}, state, {"w": jnp.ones(1)}, value=row[1])
            return state, (out["w"][0], state)

        return jax.lax.scan(step, tx.init({"w": jnp.ones(1)}), (given, losses))

    return run


def decisions(tx, given, losses=None):
    """Of norms in one scan: which steps were taken, the states after each, and the last state."""
    given = np.asarray(given, np.float32)
    losses = np.zeros_like(given) if losses is None else np.asarray(losses, np.float32)
    state, (outs, states) = deciding(tx)(given, losses)
    outs = np.asarray(outs)
    taken = outs != 0
    np.testing.assert_array_equal(outs[taken], given[taken])
    return taken, states, state


def skip(threshold, **options):
    return oc.skip_spikes(optax.identity(), threshold, **options)


NAN, INF = np.nan, np.inf


# For each limit of spikes in a row: norms, and which steps are taken.
GATES = {
    # It opens after `most` finite steps in a row, and stays open until a step is inside.
    3: [([2, 2, 2, 2, 2, 9, 0.5, 2, 2, 2, 2], "---++++---+")],
    1: [([2, 2, 2, 0.5, 2, 2], "-+++-+")],
    0: [
        ([2, 9, 0.5, 2], "++++"),
        ([NAN, 2, -INF, 2], "-+-+"),
    ],
    2: [
        # What is not finite is never taken, and counts neither way.
        ([2, NAN, 2, INF, 2, NAN, 2, 0.5, NAN, 2, NAN, NAN, NAN, 2, 2], "----+-++------+"),
        # A step inside starts the count anew.
        ([2, 0.5, 2, 0.5, 2, 2, 2], "-+-+--+"),
        # A norm at the threshold does not stand out, and neither does one of 0.
        ([1, 2, 0, 2, 2, 2], "+-0--+"),
    ],
    # It never opens.
    None: [([2] * 30 + [0.5, NAN, 2], "-" * 30 + "+--")],
}


@pytest.mark.parametrize("most", GATES)
def test_when_the_gate_opens_and_closes(most):
    tx = skip(thresholds.constant(1.0), max_consecutive=most)
    longest = max(len(given) for given, _ in GATES[most])
    for given, expected in GATES[most]:
        taken, _, _ = decisions(tx, given + [NAN] * (longest - len(given)))
        assert "".join("+" if each else "-" for each in taken[: len(given)]) == expected.replace("0", "-"), given


def gate(norms, losses, norm_rule, loss_rule, most):
    """METHODS, "skip_spikes", in plain Python and float64: per step why it was left out, or "", and the steps in a row.

    A rule has `bound()`, in force for the next value, and `take(value)`.
    """
    reasons, in_row = [], 0
    rows = []
    for norm, value in zip(norms, losses, strict=True):
        if not (np.isfinite(norm) and (loss_rule is None or np.isfinite(value))):
            reasons.append("nonfinite")
            rows.append(in_row)
            continue
        high = norm > norm_rule.bound()
        high_loss = loss_rule is not None and value > loss_rule.bound()
        is_open = in_row >= most
        in_row = in_row + 1 if high or high_loss else 0
        rows.append(in_row)
        if (high or high_loss) and not is_open:
            reasons.append("norm" if high else "loss")
            continue
        reasons.append("")
        norm_rule.take(norm)
        if loss_rule is not None:
            loss_rule.take(value)
    return reasons, rows


class MeanStd:
    """The bound is mean + k max(std, 1e-6 max(|mean|, 1)) of the last values; what is above is taken in as the bound.

    A loss may have any sign, a norm of 0 is none.
    """

    def __init__(self, k, window, least, signed):
        self.k, self.window, self.least, self.signed, self.values = k, window, least, signed, []

    def bound(self):
        if len(self.values) < self.least:
            return np.inf
        mean, std = np.mean(self.values), np.std(self.values)
        return mean + self.k * max(std, 1e-6 * max(abs(mean), 1))

    def take(self, value):
        if value > 0 or self.signed:
            self.values = [*self.values, min(value, self.bound())][-self.window :]


class Growth:
    """At most `most` times the last value, if that was positive."""

    def __init__(self, most, signed):
        del signed
        self.most, self.last = most, None

    def bound(self):
        return np.inf if self.last is None else self.most * self.last

    def take(self, value):
        if value > 0:
            self.last = min(value, self.bound())


RULES = {
    "mean_std": (
        lambda: thresholds.mean_std(4.0, window=32, warmup_steps=8),
        lambda signed: MeanStd(4.0, 32, 8, signed),
    ),
    "growth": (lambda: thresholds.growth(3.0), lambda signed: Growth(3.0, signed)),
}


def events(rng, steps):
    """Values about a level that shifts now and then, with spikes alone and in bursts, zeros, NaN and inf."""
    level = 10.0 ** np.cumsum(np.where(rng.random(steps) < 0.004, rng.uniform(-1.5, 1.5, steps), 0.0))
    values = level * rng.lognormal(0.0, 0.2, steps)
    values[rng.random(steps) < 0.02] *= 1e3
    for start in rng.integers(0, steps, 12):
        values[start : start + rng.integers(2, 60)] *= 30
    for value in (np.nan, np.inf, 0.0):
        values[rng.random(steps) < 0.02] = value
    return np.float32(values).astype(np.float64)


def of_any_sign(rng, losses):
    """About 0: each third of the losses is turned around."""
    return np.where(rng.random(len(losses)) < 1 / 3, -losses, losses)


@functools.cache  # one object for losses of both kinds, so that it is compiled once
def skip_by_rule(rule, most, with_loss):
    ours, _ = RULES[rule]
    return skip(ours(), loss_threshold=ours() if with_loss else None, max_consecutive=most)


LOSSES = {
    "norm": None,
    "norm and loss": lambda rng: events(rng, 2000),
    "norm and loss of any sign": lambda rng: of_any_sign(rng, events(rng, 2000)),
}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("most", slow_but([0, 3, 20], 3))
@pytest.mark.parametrize("rule", slow_but(RULES, "mean_std"))
def test_two_thousand_random_steps_as_transcribed(rng, rule, most, losses):
    _, theirs = RULES[rule]
    given, with_loss = events(rng, 2000), losses is not None
    losses = losses(rng) if with_loss else np.zeros(2000)
    reasons, in_row = gate(given, losses, theirs(False), theirs(True) if with_loss else None, most)
    taken, states, last = decisions(skip_by_rule(rule, most, with_loss), given, losses)
    np.testing.assert_array_equal(
        taken, [not reason and norm != 0 for reason, norm in zip(reasons, given, strict=True)]
    )
    np.testing.assert_array_equal(states.spikes_in_row, in_row)
    total = np.zeros(2000)
    for reason in ("nonfinite", "norm", "loss"):
        count = np.cumsum([each == reason for each in reasons])
        total += count
        np.testing.assert_array_equal(getattr(states.skip_stats, f"skipped_{reason}"), count)
    np.testing.assert_array_equal(states.skip_stats.skip_steps, np.arange(1, 2001))
    found = clip_stats(last)
    assert (
        found["skipped_steps"]
        == total[-1]
        == found["skipped_nonfinite"] + found["skipped_norm"] + found["skipped_loss"]
    )
    rejected = np.array([bool(reason) for reason in reasons])
    run = [0]
    for each in rejected:
        run.append(run[-1] + 1 if each else 0)
    np.testing.assert_array_equal(states.skip_stats.skipped_in_row, run[1:])
    # The numbers are such that everything happens.
    kinds = {"", "nonfinite"} | ({"norm"} if most else set()) | ({"loss"} if most and with_loss else set())
    assert set(reasons) == kinds
    assert most != 3 or max(in_row) > 3


ADAPTIVE = {
    "scheduled": lambda: thresholds.constant(lambda step: 1e3 / (1.0 + step)),
    "quantile": lambda: thresholds.quantile(0.9),
    "quantile, window": lambda: thresholds.quantile(0.9, window=8),
    "order_statistic": lambda: thresholds.order_statistic(90.0, window=8),
    "tracked_quantile": lambda: thresholds.tracked_quantile(0.5),
    "zscore": lambda: thresholds.zscore(warmup_steps=4),
    "mean_std": lambda: thresholds.mean_std(3.0, window=8, warmup_steps=4),
    "mean_std, raw": lambda: thresholds.mean_std(3.0, window=8, warmup_steps=4, take_in="raw", include_current=True),
    "ema_ratio": lambda: thresholds.ema_ratio(1.5, warmup_steps=4, warmup_max_norm=10.0),
    "ema_band": lambda: thresholds.ema_band(2.0),
    "growth": lambda: thresholds.growth(1.5),
    "normalised": thresholds.normalised,
}


@pytest.mark.parametrize("name", slow_but(ADAPTIVE, "mean_std, raw", "scheduled"))
def test_what_is_left_out_enters_no_statistics(rng, name):
    # The constant leaves out what would do the most harm, whatever the adaptive one says.
    tx = skip(thresholds.chain(ADAPTIVE[name](), thresholds.constant(50.0)), max_consecutive=10_000)
    given = rng.lognormal(0.0, 0.3, 120)
    given[rng.random(120) < 0.2] *= 1e3
    given[rng.random(120) < 0.1] = np.nan
    taken, _, state = decisions(tx, given)
    assert 5 < np.sum(taken) < 110
    # Padded to one length, so that one program does for both.
    again, _, without = decisions(tx, np.concatenate([given[taken], np.full(np.sum(~taken), np.nan)]))
    assert np.all(again[: np.sum(taken)])
    assert_same_bits(without.norm_threshold_state, state.norm_threshold_state)


NORMS = {
    "global, infinity": norms.global_norm(np.inf),
    "leaf": norms.leaf_norm(),
    "rms": norms.leaf_rms(),
    "unit": norms.unit_norm("io"),
    "group": norms.group_norm(lambda path: "first" if path == "w" else "second"),
    "included": norms.global_norm(include=lambda path: path != "b"),
    "relative": norms.relative_change(1.0, 1.0),
    "peaks": norms.leaf_peaks(),
    "spectral": norms.spectral_norm(),
}


@pytest.mark.parametrize("name", slow_but(NORMS, "unit", "leaf"))
def test_a_spike_in_one_group_rejects_the_whole_step(name):
    tx = oc.skip_spikes(optax.identity(), thresholds.mean_std(6.0, window=8, warmup_steps=3), norm=NORMS[name])
    step, state = jax.jit(tx.update), tx.init(params())

    def good(scale):
        return jax.tree.map(lambda leaf: jnp.asarray(np.full_like(leaf, scale)), PARAMS)

    for scale in (1.0, -1.2, 0.8, 1.1, -0.9):
        out, state = step(good(scale), state, params())
        assert_same_bits(out, good(scale))
    before = state.norm_threshold_state
    for value in (1e4, np.nan, -np.inf):
        out, state = step(with_one(good(1.0), value), state, params())
        assert_same_bits(out, zeros(out))
        assert_same_bits(state.norm_threshold_state, before)
    out, state = step(good(1.2), state, params())
    assert_same_bits(out, good(1.2))
    assert clip_stats(state) == {
        "skip_steps": 9, "skipped_steps": 3, "skipped_in_row": 0, "skipped_nonfinite": 2, "skipped_norm": 1,
        "skipped_loss": 0,
    }  # fmt: skip


SOME = {
    "include": norms.global_norm(include=lambda path: path == "w"),
    "labels": norms.group_norm({"w": "w", "b": None, "s": "s"}),
}


def test_a_leaf_that_the_norm_leaves_out_may_hold_anything():
    tx = together(
        {name: oc.skip_spikes(optax.identity(), thresholds.constant(10.0), norm=norm) for name, norm in SOME.items()}
    )
    first, step = tx.init(params()), jax.jit(tx.update)
    for value in (1e6, np.nan, np.inf, -np.inf):
        frozen, spike = grads(1) | {"b": np.float32([1.0, value, 1.0])}, bad(2, value)
        taken, states = step(frozen, first, params())
        left_out, states = step(spike, states, params())
        for name in SOME:
            assert_same_bits(taken[name], frozen)
            assert_same_bits(left_out[name], zeros(spike))
            found = clip_stats(states[name])
            assert (found["skipped_steps"], found["skipped_norm"]) == (1, int(np.isfinite(value))), (name, value)


def test_finite_numbers_at_the_end_of_the_range_are_no_reason_to_skip():
    tx = oc.skip_nonfinite(optax.identity())
    sizes = {"a": (4, "float32", 3e38), "b": (3, "bfloat16", -3.3e38), "c": (3, "float16", 65504.0)}
    huge = {name: np.full(number, size, jnp.dtype(dtype)) for name, (number, dtype, size) in sizes.items()}
    step = jax.jit(tx.update)
    for given in (huge, zeros(huge), {}):
        out, state = step(given, tx.init(given), given)
        assert_same_bits(out, given)
        assert clip_stats(state)["skipped_steps"] == 0


def test_a_threshold_that_follows_the_parameters():
    tx = oc.skip_spikes(optax.identity(), thresholds.relative_to_params(0.1), norm=norms.leaf_norm())
    weights = {"a": np.full(4, 10.0, np.float32), "b": np.full(4, 1.0, np.float32)}
    state, step = tx.init(weights), jax.jit(tx.update)
    small = {"a": np.full(4, 0.5, np.float32), "b": np.full(4, 0.05, np.float32)}
    assert_same_bits(step(small, state, weights)[0], small)
    assert_same_bits(step(small | {"b": np.full(4, 0.2, np.float32)}, state, weights)[0], zeros(small))
    with pytest.raises(ValueError, match="params"):
        tx.update(small, state)


# The loss.


def by_loss(**options):
    return skip(thresholds.constant(1e3), loss_threshold=thresholds.constant(1.0), **options)


@pytest.mark.parametrize("value", [2.0, np.float32(2.0), 3, jnp.bfloat16(2.0), jnp.asarray(np.float16(2.0))])
def test_a_high_loss_of_any_type_rejects_the_step(value):
    tx = by_loss()
    out, state = tx.update(ONES, tx.init(ONES), value=value)
    assert_same_bits(out, zeros(ONES))
    found = clip_stats(state)
    assert (found["skipped_loss"], found["skipped_norm"], found["skipped_steps"]) == (1, 0, 1)


def test_the_first_reason_that_holds_is_counted():
    _, states, _ = decisions(by_loss(max_consecutive=99), [1, 2e3, 2e3, NAN, 1, 2e3], [0.5, 0.5, 5, 5, NAN, NAN])
    counts = {name: np.asarray(getattr(states.skip_stats, f"skipped_{name}")) for name in ("norm", "nonfinite", "loss")}
    np.testing.assert_array_equal(counts["norm"], [0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(counts["nonfinite"], [0, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(counts["loss"], np.zeros(6))


def test_a_loss_that_is_not_finite_is_never_taken_and_opens_nothing():
    tx = by_loss(max_consecutive=2)
    for value in (np.nan, np.inf, -np.inf):
        taken, states, _ = decisions(tx, np.ones(9), [value] * 6 + [5, 5, 5])
        np.testing.assert_array_equal(taken, [False] * 8 + [True], err_msg=str(value))
        np.testing.assert_array_equal(states.spikes_in_row, [0] * 6 + [1, 2, 3], err_msg=str(value))


def test_without_a_loss_threshold_the_loss_plays_no_role():
    taken, _, _ = decisions(skip(thresholds.constant(10.0)), np.ones(3), [NAN, INF, 1e30])
    assert np.all(taken)
    tx = skip(thresholds.constant(10.0))
    assert_same_bits(tx.update(ONES, tx.init(ONES))[0], ONES)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, ["needs the loss", "value=loss"]),
        ({"value": None}, ["needs the loss", "value=loss"]),
        ({"value": jnp.ones(3)}, ["value must be one loss, a real scalar", "(3,)"]),
        ({"value": 1j}, ["value must be one loss, a real scalar", "complex"]),
        ({"value": True}, ["value must be one loss, a real scalar", "bool"]),
        ({"value": "low"}, ["value must be one loss, a real scalar", "'low'"]),
        ({"value": 10**400}, ["value must be one loss, a real scalar"]),
        ({"value": jnp.ones((1,))}, ["value must be one loss, a real scalar", "(1,)"]),
    ],
)
def test_a_loss_that_is_none_says_so(extra, words):
    tx = by_loss()
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        tx.update(ONES, tx.init(ONES), None, **extra)


def test_a_loss_threshold_has_no_parameters_to_follow():
    tx = skip(thresholds.constant(1.0), loss_threshold=thresholds.relative_to_params(0.1))
    with pytest.raises(ValueError, match="must not depend on the parameters"):
        tx.update(ONES, tx.init(ONES), ONES, value=1.0)


def test_a_loss_of_each_device_raises():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = by_loss()

    def update(given, losses, reduce):
        value = losses[0]
        value = jax.lax.pmean(value, "x") if reduce else value
        return tx.update(given, tx.init(given), value=value)[0]

    def run(reduce):
        specs = {"in_specs": (P("x"), P("x")), "out_specs": P("x")}
        return jax.jit(jax.shard_map(functools.partial(update, reduce=reduce), mesh=mesh, **specs))(
            np.ones(8, np.float32), np.arange(8, dtype=np.float32)
        )

    with pytest.raises(ValueError, match=re.escape("('x',)") + ".*" + "jax.lax.pmean"):
        run(reduce=False)
    assert_same_bits(np.asarray(run(reduce=True)), np.zeros(8, np.float32))  # the mean, 3.5, is too high


# Arguments, and what is there to log.


@pytest.mark.parametrize(
    "given",
    [
        {"norm": 2},
        {"loss_threshold": 2.0},
        {"max_consecutive": "no"},
        {"max_consecutive": -1},
        {"max_consecutive": 1.5},
        {"threshold": 6.0},
    ],
    ids=str,
)
def test_an_argument_that_is_something_else_is_named(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"^{name} "):
        skip(**({"threshold": thresholds.constant(1.0)} | given))


def test_the_counts_are_found_in_any_nesting_and_told_apart():
    inner = oc.skip_nonfinite(optax.sgd(0.1))
    tx = optax.named_chain(("first", inner), ("clip", oc.clip_by_global_norm(1.0, record=True)), ("last", inner))
    state = tx.init(params())
    step = jax.jit(tx.update)
    for each in (grads(0), bad(1, np.nan)):
        _, state = step(each, state, params())
    found = clip_stats(state)
    # The first returns zeros, so that the last one takes a step.
    assert {name: found[name] for name in found if "skipped_non" in name} == {
        "first/skipped_nonfinite": 1, "last/skipped_nonfinite": 0,
    }  # fmt: skip
    assert found["clip_steps"] == 2
    assert isinstance(found["first/skip_steps"], int)
    assert clip_stats(optax.chain(inner, optax.identity()).init(params()))["skip_steps"] == 0


def test_in_a_jitted_function_the_counts_are_traced():
    tx = oc.skip_nonfinite(optax.sgd(0.1))

    @jax.jit
    def step(updates, state):
        _, state = tx.update(updates, state)
        return state, clip_stats(state)

    state, traced = step(bad(0, np.nan), tx.init(params()))
    assert {name: int(value) for name, value in traced.items()} == clip_stats(state)
    with pytest.raises(ValueError, match="leading axes"):
        clip_stats(jax.vmap(lambda _: tx.init(params()))(jnp.arange(2)))


def test_the_optimizers_entries_are_found_through_the_wrapper():
    tx = oc.skip_nonfinite(optax.adam(1e-3))
    step = jax.jit(tx.update)
    _, state = step(grads(0), tx.init(params()), params())
    _, state = step(bad(1, np.nan), state, params())
    assert int(optax.tree.get(state, "count")) == 1
    mapped = optax.tree.map_params(tx, lambda leaf: np.asarray(leaf) + 1, state)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, optax.tree.get(state, "mu"))
    chex.assert_trees_all_close(optax.tree.get(mapped, "mu"), expected, rtol=1e-6)
    assert_same_bits(mapped.skip_stats, state.skip_stats)
