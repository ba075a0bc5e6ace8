"""The methods with state per coordinate or a clip inside momentum, on the traces of the published codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib

PAIRS = [(3, 4), (3, -4), (30, 40), (0, 0.5)]
SPIKY = [(3, 4), (3, 4), (30, 4), (30, 20), (3, -4)]
ADAM = [(1, -1), (1, 1), (10, 0.1), (1, 0), (0, 0), (-1, 0.001)]
ACCLIP = [(1, -1), (1, 1), (-1, 0.1), (10, -0.1), (1, 0)]


@functools.cache
def jitted(tx):
    return jax.jit(functools.partial(tx.update))


def run(tx, sequence):
    """What comes out for each gradient, and the states."""
    sequence = [np.atleast_1d(np.asarray(each, np.float32)) for each in sequence]
    params = np.zeros_like(sequence[0])
    update, state = jitted(tx), tx.init(params)
    programs = update._cache_size()
    outs, states = [], []
    for each in sequence:
        out, state = update(each, state, params)
        outs.append(np.asarray(out))
        states.append(state)
    assert update._cache_size() <= programs + 1
    return np.array(outs), states


# name -> (transformation, gradients, what comes out), to the digits that the traces have
TRACES = {
    "spam_clip": (
        contrib.spam_clip(4.0, decay=0.9, warmup_steps=2),
        [1, 1, 3, 1, 10, 0.5, 1],
        [[1], [1], [0.871780], [0.993982], [1.133314], [0.5], [1]],
    ),
    "adaptive_spike_clip": (
        contrib.adaptive_spike_clip(),
        SPIKY,
        [(3, 4), (3, 4), (12.675339, 4), (17.013006, 11.342004), (3, -4)],
    ),
    "scale_by_adaptive_norm": (
        contrib.scale_by_adaptive_norm(),
        [*SPIKY, (0, 0), (3, 4)],
        [
            (0.6, 0.8),
            (0.6, 0.8),
            (0.871477, 0.116197),
            (0.804319, 0.536212),
            (0.473163, -0.630884),
            (0, 0),
            (0.317190, 0.422920),
        ],
    ),
    "both of Stable-SPAM": (
        optax.chain(contrib.adaptive_spike_clip(), contrib.scale_by_adaptive_norm()),
        [(3, 4), (3, 4), (30, 4), (3, -4)],
        [(0.6, 0.8), (0.6, 0.8), (0.931178, 0.293855), (0.543924, -0.725232)],
    ),
    "scale_by_acclip": (
        contrib.scale_by_acclip(),
        ACCLIP,
        [(0.009999, -0.009999), (0.019899, 0.01), (0.029697, 0.019), (0.129403, 0.0071), (0.138109, 0.00639)],
    ),
    "scale_by_acclip, alpha 2": (
        contrib.scale_by_acclip(alpha=2.0),
        ACCLIP,
        [(0.09999, -0.09999), (0.14106, 0.01), (0.071, 0.019), (1.014586, 0.0071), (1.014441, 0.00639)],
    ),
    "scale_by_stable_adam": (
        contrib.scale_by_stable_adam(),
        ADAM,
        [
            (0.999999, -0.999999),
            (0.999999, 0.052632),
            (0.609519, 0.070970),
            (0.659647, 0.070497),
            (0.558825, 0.059722),
            (0.428948, 0.051963),
        ],
    ),
    "mixed_clip": (
        contrib.mixed_clip(1.0, decay=0.9),
        PAIRS,
        [(0.39, 0.52), (0.579, -0.268), (0.644275, 0.763879), (0.460648, 0.677071)],
    ),
    "mixed_clip, smooth": (
        contrib.mixed_clip(1.0, decay=0.9, smooth=True),
        PAIRS,
        [(0.29, 0.386667), (0.403913, -0.217818), (0.567012, 0.675973), (0.381288, 0.536267)],
    ),
    "clipped_momentum": (
        oc.clipped_momentum(1.0),
        PAIRS,
        [(0.3, 0.4), (0.57, -0.04), (0.66325, 0.748398), (0.596925, 0.723558)],
    ),
    "centered_clip": (
        contrib.centered_clip(5.0),  # 5, 8, 49 and 6 away from the last update
        PAIRS,
        [(3, 4), (3, -1), (5.749953, 3.175854), (1.216787, 1.066256)],
    ),
    "reset_state_every": (
        contrib.reset_state_every(optax.ema(0.9, debias=False), 4, warmup_steps=2),
        [1] * 9,
        [[0.1], [0.19], [0.271], [0.001], [0.048925], [0.271], [0.3439], [0.001], [0.048925]],
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_the_published_trace(name):
    tx, gradients, expected = TRACES[name]
    np.testing.assert_allclose(run(tx, gradients)[0], expected, rtol=2e-5, atol=1e-6)


def test_the_averages_behind_the_traces():
    _, states = run(TRACES["spam_clip"][0], TRACES["spam_clip"][1])
    v = [0.1, 0.19, 0.247, 0.3211, 0.41743, 0.400687, 0.460618]
    np.testing.assert_allclose([float(state.spam_rms[0]) ** 2 for state in states], v, rtol=1e-5)
    _, states = run(TRACES["adaptive_spike_clip"][0], SPIKY)
    hat = [float(state.moving_norm[0]) for state in states]
    np.testing.assert_allclose(hat, [4, 4, 12.675339, 17.013006, 14.405195], rtol=1e-4)


def test_clipping_what_comes_out_and_keeping_the_average_is_another_method():
    other = optax.chain(optax.ema(0.9, debias=False), oc.clip_by_global_norm(1.0))
    np.testing.assert_allclose(run(other, PAIRS)[0][-1], (0.658068, 0.752958), rtol=1e-5)


# What the published codes get wrong, and numbers at the ends of the range.


def test_a_coordinate_that_was_silent_is_not_clipped():
    """Peer defect 29."""
    sequence = [(1.0, 0.0)] * 25 + [(1.0, 1.0)] * 3
    outs, _ = run(contrib.spam_clip(), sequence)
    np.testing.assert_array_equal(outs[-3:], [(1.0, 1.0)] * 3)


def test_the_warmup_comes_again_with_every_period():
    tx = contrib.spam_clip(4.0, decay=0.9, warmup_steps=2, period=6)
    spikes = [1e3 if step % 3 == 2 else 1.0 for step in range(1, 15)]  # 2, 5, 8, 11, 14
    outs, states = run(tx, spikes)
    clipped = [step for step, (out, spike) in enumerate(zip(outs[:, 0], spikes, strict=True), 1) if out < spike]
    assert 2 not in clipped
    assert 5 in clipped
    assert 8 not in clipped  # 6, 7 and 8 are idle
    assert 11 in clipped
    assert int(states[-1].spam_step) == 14


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(
    "name", ["spam_clip", "adaptive_spike_clip", "scale_by_adaptive_norm", "clipped_momentum", "centered_clip"]
)
def test_squares_outside_the_float_range(name, scale):
    tx, gradients, expected = TRACES[name]
    if name == "clipped_momentum":
        tx, factor = oc.clipped_momentum(scale), scale
    elif name == "centered_clip":
        tx, factor = contrib.centered_clip(5 * scale), scale
    else:
        factor = 1.0 if name == "scale_by_adaptive_norm" else scale
    outs, _ = run(tx, np.asarray(gradients) * scale)
    if name == "scale_by_adaptive_norm" and scale < 1:  # eps is not small there
        tx = contrib.scale_by_adaptive_norm(eps=0.0)
        outs, _ = run(tx, np.asarray(gradients) * scale)
    np.testing.assert_allclose(outs / factor, expected, rtol=3e-5, atol=1e-6)


def test_the_second_moment_of_stable_adam_does_not_overflow():
    outs, _ = run(TRACES["scale_by_stable_adam"][0], np.asarray(ADAM) * 1e30)
    np.testing.assert_allclose(outs, TRACES["scale_by_stable_adam"][2], rtol=3e-5, atol=3e-6)


ALL = {name: TRACES[name][0] for name in TRACES if name != "reset_state_every"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ALL)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(name, bad):
    good = np.asarray(TRACES[name][1], np.float32).reshape(len(TRACES[name][1]), -1)
    outs, states = run(ALL[name], good)
    with_bad, after = run(ALL[name], np.insert(good, 3, bad, axis=0))
    is_per_step = {"spam_clip", "scale_by_stable_adam"}  # these count steps, whatever they were
    if name not in is_per_step:
        np.testing.assert_array_equal(np.delete(with_bad, 3, axis=0), outs)
        jax.tree.map(np.testing.assert_array_equal, after[-1], states[-1])
    assert np.all(np.isfinite(np.delete(with_bad, 3, axis=0)))
    if name == "spam_clip" and not np.isnan(bad):
        assert np.all(np.isfinite(with_bad[3]))  # clipped, as by a bound on values
    else:
        assert not np.any(np.isfinite(with_bad[3]))


@pytest.mark.parametrize("name", ["scale_by_acclip", "spam_clip"])
def test_one_bad_coordinate_does_not_stop_the_others(name):
    tx = ALL[name]
    good = np.ones((6, 2), np.float32)
    bad = good.copy()
    bad[3, 0] = np.nan
    np.testing.assert_array_equal(run(tx, bad)[0][:, 1], run(tx, good)[0][:, 1])


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def test_the_state_has_the_dtype_that_is_asked_for():
    params = {"a": np.ones(3, jnp.bfloat16), "b": np.ones(3, np.float32)}
    factories = [
        contrib.spam_clip,
        contrib.scale_by_acclip,
        contrib.scale_by_stable_adam,
        functools.partial(oc.clipped_momentum, 1.0),
        functools.partial(contrib.centered_clip, 1.0),
    ]
    for factory in factories:
        shaped = [leaf for leaf in jax.tree.leaves(jax.eval_shape(factory().init, params)) if leaf.shape == (3,)]
        narrow = set() if factory is factories[-1] else {jnp.dtype("bfloat16")}  # see the test below
        assert {leaf.dtype for leaf in shaped} == narrow | {jnp.dtype("float32")}
        tx = factory(state_dtype=jnp.float32)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (3,)} == {jnp.dtype("float32")}
        assert dtypes(updates) == dtypes(params)
        assert dtypes(after) == dtypes(state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_center_of_narrow_parameters_does_not_stall(dtype):
    """Steps of 0.01 are below half the distance to the next number from 4 (bfloat16), or from 32 on (float16)."""
    goal = np.full(1, 64.0, jnp.dtype(dtype))
    tx = contrib.centered_clip(0.01)
    state = tx.init(goal)
    assert state.clip_center.dtype == jnp.float32
    state = state._replace(clip_center=np.full(1, np.float32(48)))
    step = jax.jit(lambda state: tx.update(goal, state, goal))
    for _ in range(100):
        update, state = step(state)
    assert update.dtype == goal.dtype
    np.testing.assert_allclose(np.float64(update), 49.0, rtol=float(jnp.finfo(dtype).eps) / 2 + 1e-5)
    np.testing.assert_allclose(state.clip_center, 49.0, rtol=1e-5)


def test_a_center_is_as_wide_as_its_parameter():
    params = {str(dtype): np.zeros(2, dtype) for dtype in (np.float32, np.complex64)}
    assert dtypes(jax.eval_shape(contrib.centered_clip(1.0).init, params)) == dtypes(params)


# Around an optimizer.


def test_a_reset_puts_back_moments_and_not_counts():
    params = {"a": np.ones(2, np.float32)}
    tx = contrib.reset_state_every(optax.adam(optax.linear_schedule(1.0, 0.0, 100)), 4, warmup_steps=1)
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = step({"a": np.full(2, np.float32(2))}, state, params)
    adam = state.inner_state[0]
    np.testing.assert_allclose(adam.mu["a"], 0.1 * 2.0, rtol=1e-6)  # of the fourth gradient alone
    np.testing.assert_allclose(adam.nu["a"], 0.001 * 4.0, rtol=1e-5)
    assert int(adam.count) == 4
    assert int(state.inner_state[1].count) == 4
    assert np.abs(updates["a"]).max() < 0.01


def test_a_reset_needs_parameters_and_says_so():
    tx = contrib.reset_state_every(optax.adam(0.1), 4)
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        jax.eval_shape(lambda x: tx.update(x, tx.init(x)), np.ones(2, np.float32))


def test_spam_is_a_composition():
    params = {"w": np.float32([1.0, -2.0])}
    tx = optax.chain(contrib.spam_clip(period=50), contrib.reset_state_every(optax.adam(0.05), 50, warmup_steps=15))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda w: 2 * w, params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(200):
        params, state = step(params, state)
    assert np.abs(params["w"]).max() < 0.1
