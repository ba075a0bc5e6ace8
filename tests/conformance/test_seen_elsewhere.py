"""What goes wrong elsewhere and must not here; a comment says what and where ("optax" is optax 0.2.8).

Norms are compared with float64 ones.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import contrib, norms, thresholds
from tests.reference import fixed, spectral
from tests.reference.trees import assert_same_bits
from tests.support import published
from tests.support.driving import together
from tests.table import ROWS, halving

EPS16 = float(jnp.finfo(jnp.float16).eps)
BEPS = float(jnp.finfo(jnp.bfloat16).eps)


def once(tx, updates, params=None):
    return tx.update(updates, tx.init(updates if params is None else params), params)[0]


def clip(max_norm, updates):
    return once(oc.clip_by_global_norm(max_norm), updates)


def size(tree):
    """The global norm in float64."""
    return fixed.global_norm(jax.tree.leaves(tree))


@jax.jit
def norm_and_clipped(max_norm, updates):
    return oc.global_norm(updates), clip(max_norm, updates)


def test_a_norm_whose_square_overflows():
    # optax: the norm is inf and the updates are 0, silently.
    norm, clipped = norm_and_clipped(1.0, np.full(4, 1e20, np.float32))
    assert float(norm) == pytest.approx(2e20, rel=2**-23)
    np.testing.assert_allclose(clipped, 0.5, rtol=1e-6)
    norm, clipped = norm_and_clipped(1.0, np.full(10, 300.0, np.float16))
    assert float(norm) == pytest.approx(300 * 10**0.5, rel=2**-23)
    np.testing.assert_allclose(np.asarray(clipped, np.float64), 10**-0.5, rtol=EPS16)


def test_a_norm_whose_square_underflows():
    # optax and jax_privacy: the norm is 0 and a norm of .0316 is not clipped to .01.
    small = np.full(100_000, 1e-4, np.float16)
    norm, clipped = norm_and_clipped(0.01, small)
    assert float(norm) == pytest.approx(size(small), rel=2**-23)
    rounding_to_subnormals = 2**-25 * 100_000**0.5
    assert size(clipped) == pytest.approx(0.01, rel=4 * EPS16, abs=rounding_to_subnormals)


def test_a_sum_over_leaves_in_bfloat16():
    # optax: norm 5.66 instead of 6.48, and 1.15 after clipping to 1.
    tree = [np.ones(32, jnp.bfloat16)] + [np.full(10, 0.1, jnp.bfloat16)] * 100
    norm, clipped = norm_and_clipped(1.0, tree)
    assert size(tree) == pytest.approx(6.48, abs=5e-3)
    assert float(norm) == pytest.approx(size(tree), rel=2**-23)
    assert size(clipped) == pytest.approx(1.0, rel=4 * BEPS)


def test_float16_leaves_beside_float32_ones():
    # optax: 0 and nan.
    _, clipped = norm_and_clipped(9e4, {"a": np.array([1e5], np.float32), "b": np.array([1000.0], np.float16)})
    assert {name: leaf.dtype for name, leaf in clipped.items()} == {"a": jnp.float32, "b": jnp.float16}
    assert size(clipped) == pytest.approx(9e4, rel=1e-6)
    assert float(clipped["b"][0]) == pytest.approx(900, rel=2 * EPS16)


def test_adaptive_grad_clip_on_an_explicit_mesh():
    # optax: ShardingTypeError.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    given = [np.float32(np.random.default_rng(i).normal(size=(16, 8))) for i in range(2)]

    @jax.jit
    def clipped(given):
        """By units, and by layouts."""
        return {
            units: {spec: once(oc.adaptive_grad_clip(0.01, units=units), *pair) for spec, pair in given.items()}
            for units in ("io", "leaf")
        }

    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, spec) for spec in (P("x", None), P(None, "x"))]
        on_the_mesh = clipped({str(one.spec): jax.device_put(given, one) for one in shardings})
    for units, expected in clipped({"": given}).items():
        for one in shardings:
            ours = on_the_mesh[units][str(one.spec)]
            assert ours.sharding.is_equivalent_to(one, 2), (units, one)
            np.testing.assert_allclose(ours, expected[""], rtol=1e-6, err_msg=f"{units}, {one}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_leaf_that_is_not_finite(value):
    # optax: every leaf is NaN, or the others are 0, silently.
    tree = {"bad": jnp.array([value, 1.0]), "good": jnp.array([3.0, 4.0])}
    assert_same_bits(clip(1.0, tree), tree)
    per_leaf = once(oc.clip_by_leaf_norm(1.0), tree)
    assert_same_bits(per_leaf["bad"], tree["bad"])
    np.testing.assert_allclose(per_leaf["good"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    "factory",
    [oc.clip_by_global_norm, oc.clip_by_leaf_norm, oc.clip_by_block_rms, oc.smooth_clip_by_global_norm, oc.clip],
)
def test_bounds_that_are_0_negative_or_nan(factory):
    # optax: NaN at zero gradients, ascent, NaN.
    for updates in (jnp.zeros(3), jnp.ones(3)):
        np.testing.assert_array_equal(once(factory(0.0), updates), np.zeros(3))
        np.testing.assert_array_equal(once(factory(jnp.float32(0.0)), updates), np.zeros(3))
    with pytest.raises(ValueError, match="-1"):
        factory(-1.0)
    with pytest.raises(ValueError, match="nan"):
        factory(np.nan)


BOUNDED = {
    "clip": oc.clip,
    "value": lambda c: oc.clip_by_value(None, c),
    "global": oc.clip_by_global_norm,
    "leaf": oc.clip_by_leaf_norm,
    "rms": oc.clip_by_block_rms,
    "range": lambda c: oc.clip_by_norm_range(0.0, c),
    "smooth": oc.smooth_clip_by_global_norm,
    "adaptive": oc.adaptive_grad_clip,
    "exactly": lambda c: oc.clip_by(norms.leaf_norm(), thresholds.exactly(c)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_gradients_with_a_float32_bound(dtype):
    # optax: TypeError, or a silent promotion to float32.
    updates, weights = np.full(4, 8.0, jnp.dtype(dtype)), np.full(4, 0.5, jnp.dtype(dtype))
    bounds = {"array": jnp.asarray(np.float32(1.0)), "schedule": halving}

    @jax.jit
    def clipped(updates, weights):
        return {
            f"{name} by {kind}": once(factory(bound), updates, weights)
            for name, factory in BOUNDED.items()
            for kind, bound in bounds.items()
        }

    for case, ours in clipped(updates, weights).items():
        assert ours.dtype == dtype, case
        assert size(ours) < size(updates), case


def test_leaves_that_are_not_numbers():
    # optax: TypeError, NotImplementedError, a structure error.
    key, no_gradient = jax.random.key(0), np.zeros(3, jax.dtypes.float0)
    tree = {
        "w": jnp.array([3.0, 4.0]),
        "i": jnp.arange(3),
        "b": jnp.array([True]),
        "0": no_gradient,
        "k": key,
        "n": None,
    }
    weights = tree | {"n": jnp.ones(2)}
    for tx in (oc.clip_by_global_norm(1.0), oc.clip_by_block_rms(1 / 2**0.5), oc.clip_by_leaf_norm(1.0)):
        clipped = once(tx, tree, weights)
        np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
        assert clipped["n"] is None
        assert clipped["0"].dtype == jax.dtypes.float0
        assert clipped["k"] == key
        for name in ("i", "b"):
            assert_same_bits(clipped[name], tree[name])


def test_the_derivative_at_zero_gradients():
    # optax: NaN for four transformations. Every other row is in test_under_jax.py.
    names = ("clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip", "clip_by_leaf_norm")
    weights = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)

    @jax.jit
    def slopes(updates):
        txs = {name: getattr(oc, name)(0.1) for name in names}
        return {
            name: jax.grad(lambda updates, tx=tx: jnp.sum(once(tx, updates, weights)))(updates)
            for name, tx in txs.items()
        }

    for name, slope in slopes(np.zeros((2, 2), np.float32)).items():
        # Near zero nothing is clipped: each coordinate passes, with slope 1.
        np.testing.assert_allclose(slope, np.ones((2, 2)), rtol=1e-6, err_msg=name)


def test_one_of_several_stacked_layers_explodes():
    # optax: the healthy layer is scaled from 1e-4 to 1.4e-7.
    weights = np.ones((2, 4, 3), np.float32)
    updates = weights * np.array([1e-4, 1e3], np.float32)[:, None, None]
    txs = {
        "adaptive": oc.adaptive_grad_clip(0.01, stacked=1),
        "leaf": oc.clip_by_leaf_norm(0.02, stacked=1),
        "rms": oc.clip_by_block_rms(0.02, stacked=1),
    }
    clip_all = jax.jit(lambda updates, weights: {name: once(tx, updates, weights) for name, tx in txs.items()})
    for name, clipped in jax.device_get(clip_all(updates, weights)).items():
        assert_same_bits(clipped[0], updates[0])
        assert 0 < np.max(clipped[1]) < 0.05, name


def runner(txs):
    """A scan over norms, each of a tensor of one number, for all transformations of a dict at once."""
    tx = together(txs)

    def step(states, norm):
        outs, states = tx.update({"w": norm[None]}, states)
        return states, {name: out["w"][0] for name, out in outs.items()}

    return jax.jit(lambda sequence: jax.lax.scan(step, tx.init({"w": jnp.ones(1)}), sequence))


def after_each(run, sequence):
    """The norms that come out of each transformation of a `runner`, for the norms that go in."""
    return {name: np.asarray(out, np.float64) for name, out in run(np.float32(sequence))[1].items()}


def test_recording_a_norm_in_a_scan():
    # optax's snapshot: its state starts in the dtype of the parameters and is no carry.
    updates, weights = {"w": jnp.ones((4, 3), jnp.bfloat16)}, {"w": jnp.ones((4, 3))}
    tx = oc.clip_by_global_norm(0.5, record=4)

    def step(state, _):
        return tx.update(updates, state)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=6))(tx.init(weights))
    assert oc.clip_stats(state)["clip_norm"] == pytest.approx(12**0.5)


ADAPTIVE = {
    "autoclip": lambda: oc.autoclip(50.0),
    "autoclip, window": lambda: oc.autoclip(50.0, window=8),
    "percentile_clip": lambda: contrib.percentile_clip(50.0, window=8),
    "zclip": lambda: oc.zclip(warmup_steps=5, max_norm=None),
    "adagc": lambda: oc.adagc(warmup_steps=5),
    "aggc": lambda: contrib.aggc("all", 2.0),
    "clip_by_history": lambda: oc.clip_by_history(window=8, warmup_steps=4),
    "clip_by_tracked_quantile": contrib.clip_by_tracked_quantile,
    "clip_norm_growth": contrib.clip_norm_growth,
    "adaptive_spike_clip": lambda: contrib.adaptive_spike_clip(0.9),
}


@functools.cache
def adaptive():
    return runner({method: make() for method, make in ADAPTIVE.items()})


def after_each_adaptive(method, sequence):
    """All sequences have one length, with ones at the end: one program."""
    padded = np.pad(sequence, (0, 40 - len(sequence)), constant_values=1.0)
    return after_each(adaptive(), padded)[method][: len(sequence)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_one_norm_that_is_not_finite(method, bad):
    good = np.random.default_rng(0).lognormal(0.0, 0.3, 30)
    with_bad = after_each_adaptive(method, np.insert(good, 12, bad))
    assert not np.isfinite(with_bad[12])
    np.testing.assert_array_equal(np.delete(with_bad, 12), after_each_adaptive(method, good))


@pytest.mark.parametrize("at", [0, 3, 12], ids=["first", "warm-up", "later"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_of_zero(method, at):
    good = np.random.default_rng(1).lognormal(0.0, 0.3, 30)
    with_zeros = after_each_adaptive(method, np.insert(good, at, np.zeros(10)))
    np.testing.assert_array_equal(with_zeros[at : at + 10], np.zeros(10))
    np.testing.assert_array_equal(np.delete(with_zeros, np.arange(at, at + 10)), after_each_adaptive(method, good))


@pytest.mark.parametrize("wrap", [oc.skip_nonfinite, lambda inner: oc.skip_spikes(inner, thresholds.mean_std(6.0))])
def test_a_skip_with_bfloat16_gradients_and_float32_parameters(wrap):
    # optax's apply_if_finite: "true_fun and false_fun output must have identical types".
    weights = {"w": np.ones(3, np.float32)}
    tx = wrap(optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-2)))
    good, bad = ({"w": np.full(3, value, jnp.bfloat16)} for value in (1.0, np.nan))
    step, state = jax.jit(tx.update), tx.init(weights)
    taken, state = step(good, state, weights)
    for _ in range(40):
        out, state = step(bad, state, weights)
        assert_same_bits(out, jax.tree.map(np.zeros_like, taken))
    out, state = step(good, state, weights)
    out = np.asarray(out["w"])
    assert np.all(np.isfinite(out))
    assert np.all(out != 0)


def test_no_number_of_bad_steps_applies_nan():
    # optax's apply_if_finite lets NaN through after so many in a row.
    bad, weights = jnp.array([np.nan]), jnp.ones(1)
    tx = oc.skip_nonfinite(optax.sgd(1.0))
    step, state = jax.jit(tx.update), tx.init(weights)
    for _ in range(30):
        out, state = step(bad, state, weights)
        assert out[0] == 0


def test_infinity_before_a_clip():
    # optax's zero_nans lets inf through, which its clip makes NaN.
    given = jnp.array([np.inf, 3.0, np.nan, 4.0])
    ours = once(optax.chain(oc.zero_nonfinite(), oc.clip_by_global_norm(1.0)), given)
    np.testing.assert_allclose(ours, [0, 0.6, 0, 0.8], rtol=1e-6)


def test_a_step_that_is_skipped_is_zero_and_leaves_the_window_clean():
    # levanter multiplies by 0, and 0 * NaN is NaN; its window then holds the NaN for 128 steps.
    run = runner({"skip": oc.skip_spikes(optax.identity(), thresholds.mean_std(6.0, window=16, warmup_steps=8))})
    good = np.random.default_rng(4).lognormal(0.0, 0.1, 30)
    for bad in (np.nan, np.inf, 1e30):
        with_bad = after_each(run, np.insert(good, [12, 20], [bad, bad]))["skip"]
        np.testing.assert_array_equal(with_bad[[12, 21]], [0.0, 0.0])
        np.testing.assert_array_equal(np.delete(with_bad, [12, 21]), np.float32(good))


def test_norms_that_jump_for_good_open_the_gate():
    # A skip by a moving average of what was taken: it rejects all of the 1,900 steps that follow.
    given = np.where(np.arange(2000) < 100, 1.0, 25.0) * np.random.default_rng(5).lognormal(0.0, 0.05, 2000)
    rules = {"band": thresholds.ema_band(2.0), "std": thresholds.mean_std(6.0), "growth": thresholds.growth(2.0)}
    gates = {name: oc.skip_spikes(optax.identity(), rule) for name, rule in rules.items()}
    for name, rule in rules.items():
        gates[f"{name}, locked"] = oc.skip_spikes(optax.identity(), rule, max_consecutive=10**6)
    taken = {name: out != 0 for name, out in after_each(runner(gates), given).items()}
    for name in rules:
        assert np.all(taken[name][:100]), name
        np.testing.assert_array_equal(np.flatnonzero(~taken[name]), np.arange(100, 120), err_msg=name)
        assert not np.any(taken[f"{name}, locked"][100:]), name


def test_the_states_of_the_wrappers_are_donated():
    weights = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    skipping = oc.skip_spikes(
        optax.chain(oc.with_carry(oc.clip_by_global_norm(1.0)), optax.adam(1e-3)),
        thresholds.mean_std(6.0),
        loss_threshold=thresholds.mean_std(6.0),
    )
    tx = oc.skip_nonfinite(skipping)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(updates, state, weights):
        new_updates, state = tx.update(updates, state, weights, value=1.0)
        return state, optax.apply_updates(weights, new_updates)

    state = tx.init(weights)
    for _ in range(3):
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, weights))]
        assert len(set(buffers)) == len(buffers)
        state, weights = step({"a": jnp.ones(3), "b": jnp.ones((2, 2))}, state, weights)
    assert int(optax.tree.get(state, "count")) == 3


def test_sixty_norms_all_the_same():
    run = runner({"zclip": published.zclip(max_norm=None)})
    for norm in (1.0, 0.1, 1e30):
        states, out = run(np.full(60, norm, np.float32))
        np.testing.assert_array_equal(out["zclip"], np.full(60, norm, np.float32))
        np.testing.assert_allclose(states["zclip"].zscore_mean, [norm], rtol=1e-6)
        assert 0 <= float(states["zclip"].zscore_std[0]) <= 1e-5 * norm


def test_a_window_under_jit():
    given = np.random.default_rng(2).lognormal(0.0, 1.0, 40)
    bounds = [np.percentile(given[max(0, t - 9) : t + 1], 30.0) for t in range(40)]
    ours = after_each(runner({"autoclip": published.autoclip(30.0, window=10)}), given)["autoclip"]
    np.testing.assert_allclose(ours, np.minimum(given, bounds), rtol=1e-5)


def test_norms_that_rise_and_stay():
    zclip = functools.partial(published.zclip, max_norm=None)
    run = runner({"patient": zclip(), "without patience": zclip(patience=None)})
    noise = np.random.default_rng(3).lognormal(0.0, 0.1, 300)
    for before in (noise, np.ones(300)):
        given = before * np.where(np.arange(300) < 100, 1, 10)
        ours = after_each(run, given)
        followed = np.flatnonzero((ours["patient"] == np.float32(given)) & (np.arange(300) >= 100))[0]
        assert followed - 100 <= 45
        assert np.all(ours["without patience"][100:] < given[100:])  # every one of them clipped, and for ever


def test_a_state_that_is_donated():
    # A state whose init returned one array twice: "Attempt to donate the same buffer twice".
    weights = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    per_leaf = thresholds.constant({"a": halving, "b": halving})
    tx = optax.chain(
        oc.clip_by_global_norm(halving),
        oc.clip_by(norms.leaf_norm(), thresholds.chain(per_leaf, thresholds.between(halving, halving))),
        optax.adam(1e-3),
    )

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(updates, state, weights):
        new_updates, state = tx.update(updates, state, weights)
        return state, optax.apply_updates(weights, new_updates)

    state = tx.init(weights)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, weights))]
    assert len(set(buffers)) == len(buffers)
    for _ in range(3):
        state, weights = step({"a": jnp.ones(3), "b": jnp.ones((2, 2))}, state, weights)
    assert int(optax.tree.get(state, "count")) == 3


def gpt2_like(layers, width):
    """Shapes and dtypes of a small transformer."""
    layer = [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width, width)]
    return {
        f"{i}/{j}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(layers) for j, shape in enumerate(layer)
    }


def temporary_bytes(clip, tree):
    tx = optax.chain(clip, optax.adam(1e-3))
    state = jax.eval_shape(tx.init, tree)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return step.lower(tree, state, tree).compile().memory_analysis().temp_size_in_bytes


def normalise(updates, params):
    """The least that any clip by norm does: one multiplication by a number that depends on all gradients."""
    del params
    factor = 1 / optax.tree.norm(updates)
    return jax.tree.map(lambda update: update * factor, updates)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="its XLA fuses not even a multiplication into Adam")
def test_a_clip_before_adam_allocates_no_second_gradient():
    # optax: its division per element keeps XLA from fusing the clip into Adam, so all gradients are written anew.
    tree = gpt2_like(layers=2, width=512)
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(tree))
    assert temporary_bytes(oc.clip_by_global_norm(1.0), tree) < (
        temporary_bytes(optax.stateless(normalise), tree) + 0.1 * gradients
    )


def test_many_small_leaves_share_their_reductions():
    # optax: a reduction per leaf; with 1000 leaves the clip doubles the time it takes to compile a step.
    leaves = 200
    tree = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * leaves
    tx = oc.clip_by_global_norm(1.0)
    program = jax.jit(lambda updates: tx.update(updates, optax.EmptyState())[0]).lower(tree).as_text()
    # 20 is far below one per leaf and leaves room for a second try at other scales.
    assert len(re.findall(r"stablehlo\.reduce\b", program)) < 20
    assert len(re.findall(r"stablehlo\.(?:case|if)\b", program)) < 5


@jax.jit
def capped(matrix):
    """With singular values of at most 1, by whether the cap is soft."""
    return {soft: once(oc.clip_singular_values(1.0, smooth=soft), matrix) for soft in (True, False)}


@pytest.mark.parametrize("times", [10.0, 30.0, 60.0, 1000.0])
def test_a_singular_value_far_above_a_soft_cap(times):
    # Ten coupled Newton-Schulz steps: off by 28 % at 60 times the cap, by 95 % at 1000.
    matrix = np.float32(spectral.with_singular_values(np.random.default_rng(0), (8, 6), [times, 2, 1, 1, 0.5, 0.1]))
    for soft, ours in capped(matrix).items():
        error = np.float64(ours) - spectral.capped(spectral.svd(matrix), 1.0, soft=soft)
        assert np.linalg.norm(error, 2) <= 1e-3 + 20 * np.finfo(np.float32).eps * times


@pytest.mark.parametrize("times", [1e4, 1e8, 1e30])
def test_a_singular_value_beyond_what_float32_resolves(times):
    # Thirty steps: NaN at 1e4.
    matrix = np.float32(times * spectral.with_singular_values(np.random.default_rng(1), (8, 6), np.ones(6)))
    for ours in capped(matrix).values():
        np.testing.assert_allclose(np.linalg.svd(np.float64(ours), compute_uv=False), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([3e38], 0.0, 1.0),
        ([1e38], 0.0, 1.0),
        ([1e36], 0.0, 1e-3),
        ([6e35, -8e35], 0.0, 1e-3),
        ([2e-38], 10.0, np.inf),
        ([2e-38, 0.0, -2e-38], 1e30, np.inf),
    ],
    ids=["3e38", "1e38", "1e36", "two", "tiny", "tiny_to_huge"],
)
def test_a_factor_that_float32_cannot_hold(values, low, high):
    # One float32 factor c/n is 0 or inf here: zeros or NaN, silently.
    updates = jnp.asarray(values, jnp.float32)
    expected = np.asarray(updates, np.float64)
    expected *= (high if low == 0 else low) / fixed.vector_norm(updates)
    for compiled in (False, True):
        tx = oc.clip_by_norm_range(low, high)
        step = jax.jit(functools.partial(once, tx)) if compiled else functools.partial(once, tx)
        np.testing.assert_allclose(step(updates), expected, rtol=1e-6)
        if low == 0:
            np.testing.assert_allclose(clip(high, updates), expected, rtol=1e-6)


def twenty_leaves():
    return {str(i): jnp.ones((3, 1 + i % 4)) for i in range(20)}


@pytest.fixture
def compilations():
    """How long each compilation took, in a list that grows."""
    events = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events  # jax 0.8 cannot take one listener away again; this one is never read after the test


def test_a_transformation_built_anew_compiles_nothing(compilations):
    # A guarded norm that makes new closures: 2.7 s for each eager call. inject_hyperparams builds a transformation
    # at every step.
    updates = twenty_leaves()
    clip(0.5, updates)
    jax.jit(lambda x: x + 1)(1.0)
    assert compilations  # so they are noticed
    compilations.clear()
    for i in range(3):
        clip(1.0 + i, updates)
    assert not compilations


def test_a_stacked_axis_that_is_split():
    # Elsewhere: one norm of 28.57 for eight layers with norms 2 to 16, silently.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sizes = jnp.arange(2.0, 17.0, 2.0)[:, None]
    layers = sizes * jnp.full((8, 4), 0.5)

    def sharded(tx):
        update = functools.partial(once, tx)
        return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(layers)

    with pytest.raises(ValueError, match="PartitionSpec"):
        sharded(oc.clip_by_leaf_norm(3.0, stacked=1))
    clipped = sharded(oc.clip_by_leaf_norm(3.0, stacked=1, axes=P("x")))
    np.testing.assert_allclose(jnp.linalg.norm(clipped, axis=1), [2, 3, 3, 3, 3, 3, 3, 3], rtol=1e-5)


def test_unit_norms_of_a_split_kernel():
    # The same trap: which dimension is split decides whether a unit is whole. With one row on each device a kernel even
    # looks like a vector.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    given = {rows: [np.float32(np.random.default_rng(seed).normal(size=(rows, 8))) for seed in range(2)]
             for rows in (8, 16)}  # fmt: skip

    def sharded(tx, spec):
        return jax.shard_map(functools.partial(once, tx), mesh=mesh, in_specs=(spec, spec), out_specs=spec)

    for pair in given.values():
        with pytest.raises(ValueError, match="PartitionSpec"):
            jax.eval_shape(sharded(oc.adaptive_grad_clip(0.1), P("x")), *pair)

    @jax.jit
    def whole_and_split(updates, kernel):
        split = {spec: sharded(oc.adaptive_grad_clip(0.1, axes=spec), spec) for spec in (P("x", None), P(None, "x"))}
        whole = once(oc.adaptive_grad_clip(0.1), updates, kernel)
        return whole, {str(spec): clip(updates, kernel) for spec, clip in split.items()}

    for rows, pair in given.items():
        whole, split = whole_and_split(*pair)
        for spec, clipped in split.items():
            np.testing.assert_allclose(clipped, whole, rtol=1e-6, err_msg=f"{rows}, {spec}")


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if not row.stateless and row.any_tree])
def test_the_count_of_the_optimizer_is_found(row):
    # A clip whose state has a `count` too: optax.tree.get raises, for two were found.
    tx = optax.chain(row.make(), optax.adam(1e-3))
    state = jax.eval_shape(tx.init, {"w": np.ones(3, np.float32)})
    assert optax.tree.get(state, "count") is optax.tree.get(state[1], "count")
