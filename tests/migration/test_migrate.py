"""`migrate`: what a user changes in a run, and what becomes of its state."""

import contextlib
import warnings
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import optaxclip as oc
from tests.support.migrating import assert_reported, by_path, numbered

PARAMS = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
ADAM = optax.adam(1e-3)
NOT_OURS = "nothing of the old state fits the new transformation"
ZCLIP = oc.zclip(warmup_steps=2, max_norm=1.0)
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def two_labels(labels):
    return optax.partition({"x": ADAM, "y": MOMENTUM, "z": optax.adam(1.0)}, labels)


def spikes(**thresholds):
    return oc.skip_spikes(ADAM, **thresholds)


class Count(NamedTuple):
    """The state of a transformation of a user's own."""

    own_count: jax.Array


def counting():
    """A transformation that is written by a user."""
    return optax.GradientTransformation(
        lambda params: Count(jnp.zeros((), jnp.int32)), lambda updates, state, params=None: (updates, state)
    )


# A threshold of a user's own, whose state is a bare array.
HALVING = oc.clip_by(
    oc.norms.global_norm(),
    oc.Threshold(lambda norms: jnp.zeros((), jnp.int32), lambda norms, step, *_, **__: ((0.0, 0.5**step), step + 1)),
)
WINDOW, ZSCORE = oc.thresholds.mean_std(window=4, warmup_steps=2), oc.thresholds.zscore()
# (the old transformation, the new one, what the report says): the three lists.
CHANGES = {
    "a record": (
        optax.chain(ZCLIP, ADAM),
        optax.chain(oc.zclip(max_norm=1.0, record=5), ADAM),
        {"0/threshold_state/0": "ZScoreState, from 0/0", "1/0": "ScaleByAdamState"},
        {"0/clip_stats": "ClipStats"},
        {},
    ),
    "no record any more": (
        optax.chain(oc.zclip(max_norm=1.0, record=5), ADAM),
        optax.chain(ZCLIP, ADAM),
        {"0/0": "ZScoreState, from 0/threshold_state/0", "1/0": "ScaleByAdamState"},
        {},
        {"0/clip_stats": "ClipStats"},
    ),
    "another clip": (
        optax.chain(optax.clip_by_global_norm(1.0), ADAM),
        optax.chain(ZCLIP, ADAM),
        {"1/0": "ScaleByAdamState"},
        {"0/0": "ZScoreState"},
        {},
    ),
    "a cap on a clip": (oc.zclip(max_norm=None), ZCLIP, {"0": "ZScoreState, from the state"}, {}, {}),
    "a skip around": (
        optax.chain(ZCLIP, ADAM),
        oc.skip_nonfinite(optax.chain(ZCLIP, ADAM)),
        {"inner_state/0/0": "ZScoreState, from 0/0", "inner_state/1/0": "ScaleByAdamState, from 1/0"},
        {"skip_stats": "SkipStats", "spikes_in_row": ""},
        {},
    ),
    "a skip taken away": (
        oc.skip_nonfinite(optax.chain(ZCLIP, ADAM)),
        optax.chain(ZCLIP, ADAM),
        {"0/0": "ZScoreState, from inner_state/0/0", "1/0": "ScaleByAdamState, from inner_state/1/0"},
        {},
        {"skip_stats": "SkipStats", "spikes_in_row": ""},
    ),
    "another skip": (
        optax.apply_if_finite(ADAM, 5),
        oc.skip_nonfinite(ADAM),
        {"inner_state/0": "ScaleByAdamState"},
        {"skip_stats": "SkipStats", "spikes_in_row": ""},
        {"notfinite_count": "", "last_finite": "", "total_notfinite": ""},
    ),
    "a clip of the updates, in front of which one comes": (
        optax.chain(ADAM, ZCLIP),
        optax.chain(ZCLIP, ADAM, ZCLIP),
        {"1/0": "ScaleByAdamState, from 0/0", "2/0": "ZScoreState, from 1/0"},
        {"0/0": "ZScoreState"},
        {},
    ),
    "a clip to the other side of the optimizer": (
        optax.chain(ADAM, ZCLIP),
        optax.chain(ZCLIP, ADAM),
        {"1/0": "ScaleByAdamState, from 0/0"},
        {"0/0": "ZScoreState"},
        {"1/0": "ZScoreState"},
    ),
    "a clip from one side to the other": (
        optax.chain(ZCLIP, ADAM),
        optax.chain(ADAM, ZCLIP),
        {"0/0": "ScaleByAdamState, from 1/0"},
        {"1/0": "ZScoreState"},
        {"0/0": "ZScoreState"},
    ),
    "a label in front of another": (
        optax.partition({"b": ZCLIP}, "b"),
        optax.partition({"a": ZCLIP, "b": ZCLIP}, {"a": "a", "b": "b"}),
        {"inner_states/b/inner_state/0": "ZScoreState"},
        {"inner_states/a/inner_state/0": "ZScoreState"},
        {},
    ),
    "a shorter window beside one that stays": (
        oc.autoclip(window=4),
        optax.named_chain(("short", oc.autoclip(window=2)), ("same", oc.autoclip(window=4))),
        {"same": "RecentNormsState, from the state"},
        {"short": "RecentNormsState"},
        {},
    ),
    "an array that is a whole state": (
        optax.chain(HALVING, ADAM),
        oc.skip_nonfinite(optax.chain(HALVING, ADAM)),
        {"inner_state/0": "from 0", "inner_state/1/0": "ScaleByAdamState, from 1/0"},
        {"skip_stats": "SkipStats", "spikes_in_row": ""},
        {},
    ),
    "an array that is a whole state, at another place": (
        optax.chain(HALVING, ADAM),
        optax.chain(ZCLIP, HALVING, ADAM),
        {"2/0": "ScaleByAdamState, from 1/0"},
        {"0/0": "ZScoreState", "1": ""},
        {"0": ""},
    ),
    "names for a chain": (
        optax.chain(ZCLIP, ADAM),
        optax.named_chain(("optimizer", ADAM), ("clip", oc.clip(1.0))),
        {"optimizer/0": "ScaleByAdamState, from 1/0"},
        {},
        {"0/0": "ZScoreState"},
    ),
    "statistics of the loss, which are none of norms": (
        spikes(threshold=ZSCORE, loss_threshold=WINDOW),
        spikes(threshold=WINDOW),
        {"skip_stats": "SkipStats", "spikes_in_row": "", "inner_state/0": "ScaleByAdamState"},
        {"norm_threshold_state": "WindowState"},
        {"norm_threshold_state": "ZScoreState", "loss_threshold_state": "WindowState"},
    ),
    "other groups": (
        oc.zclip(max_norm=1.0, norm=oc.norms.leaf_norm()),
        ZCLIP,
        {},
        {"0": "ZScoreState"},
        {"0": "ZScoreState, of shape (2,), now (1,)"},
    ),
    "a label more": (
        optax.partition({"x": ADAM, "y": MOMENTUM}, {"a": "x", "b": "y"}),
        optax.partition({"w": ADAM, "x": ADAM, "y": MOMENTUM}, {"a": "x", "b": "y"}),
        {
            "inner_states/x/inner_state/0": "ScaleByAdamState",
            "inner_states/y/inner_state/0": "TraceState",
        },
        {"inner_states/w/inner_state/0": "ScaleByAdamState"},
        {},
    ),
    "another label for a parameter": (
        two_labels("x"),
        two_labels({"a": "x", "b": "z"}),
        {
            "inner_states/x/inner_state/0": "ScaleByAdamState",
            "inner_states/z/inner_state/0": "ScaleByAdamState, from inner_states/x/inner_state/0",
        },
        {},
        {"inner_states/z/inner_state/0": "ScaleByAdamState"},
    ),
    "no labels any more": (
        optax.partition({"x": ADAM, "y": optax.adam(1.0)}, {"a": "x", "b": "y"}),
        ADAM,
        {f"0/{path}": f"from inner_states/{label}/inner_state/0"
         for path, label in {"count": "x", "mu/a": "x", "mu/b": "y", "nu/a": "x", "nu/b": "y"}.items()},
        {},
        {"inner_states/y/inner_state/0/count": ""},
    ),
    "a mask": (
        ADAM,
        optax.masked(ADAM, {"a": True, "b": True}),
        {"inner_state/0": "ScaleByAdamState, from 0"},
        {},
        {},
    ),
    "accumulation": (
        ADAM,
        optax.MultiSteps(ADAM, 2),
        {"inner_opt_state/0": "ScaleByAdamState, from 0"},
        {"mini_step": "", "gradient_step": "", "acc_grads": ""},
        {},
    ),
    "a carry around a clip": (
        optax.chain(ZCLIP, MOMENTUM),
        optax.chain(oc.with_carry(ZCLIP), MOMENTUM),
        {"0/inner_state/0": "ZScoreState, from 0/0", "1/0": "TraceState"},
        {"0/carry": ""},
        {},
    ),
    "a transformation of a user's own": (
        optax.chain(counting(), ADAM),
        optax.chain(ZCLIP, ADAM, counting()),
        {"1/0": "ScaleByAdamState", "2": "Count, from 0"},
        {"0/0": "ZScoreState"},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_keeps_what_has_a_place(change):
    old, new, *lists = CHANGES[change]
    initial, old_state = new.init(PARAMS), numbered(old.init(PARAMS))
    state, report = oc.migrate(new, PARAMS, old_state)
    assert list(report) == lists
    assert_reported(initial, old_state, state, report)


def test_names_of_parameters_with_what_changed_in_them():
    old_params = {"head": jnp.ones((4, 2)), "gone": jnp.ones(3), "body": jnp.ones(5)}
    params = {"head": jnp.ones((4, 7)), "added": jnp.ones(3), "body": jnp.ones(5)}
    old_state = numbered(ADAM.init(old_params))
    state, report = oc.migrate(ADAM, params, old_state)  # no warning: what was dropped is needed no more
    assert_reported(ADAM.init(params), old_state, state, report)
    assert list(report.kept) == ["0/count", "0/mu/body", "0/nu/body"]
    assert report.dropped["0/mu/head"] == "of shape (4, 2), now (4, 7)"
    assert report.dropped["0/mu/gone"] == ""


def test_a_new_parameter_starts_with_large_updates_as_the_docstring_says():
    """Adam corrects moments by its count, and these are younger."""
    old_state = optax.tree.set(ADAM.init({"a": jnp.ones(1)}), count=jnp.int32(100_000))
    state, _ = oc.migrate(ADAM, {"a": jnp.ones(1), "new": jnp.ones(1)}, old_state)
    sizes, grads = [], {"a": jnp.ones(1), "new": jnp.ones(1)}
    update = jax.jit(ADAM.update)
    for _ in range(20):
        updates, state = update(grads, state)
        sizes.append(-float(updates["new"][0]) / 1e-3)
    assert 6.5 < max(sizes) <= 6.6


def test_moments_of_which_none_fits_keep_no_count_either():
    """Adam's count says how many gradients are in the moments."""
    with pytest.warns(UserWarning, match=NOT_OURS):
        state, report = oc.migrate(ADAM, jnp.ones(3), numbered(ADAM.init(jnp.ones(2))))
    chex.assert_trees_all_equal(state, ADAM.init(jnp.ones(3)))
    assert list(report.new) == ["0"]


@pytest.mark.parametrize("params", [PARAMS, jnp.ones(3)], ids=["a tree", "an array"])
def test_an_optimizer_is_not_dropped_without_a_word(params):
    with pytest.warns(UserWarning, match="no place for what the old state keeps per parameter.*0/mu") as caught:
        oc.migrate(optax.sgd(0.1), params, ADAM.init(params))
    assert caught[0].filename == __file__


def test_a_statistic_is_nothing_per_parameter():
    """It may be dropped without a word, even where it has the shape of the only parameter."""
    _, report = oc.migrate(optax.clip(1.0), jnp.ones(1), ZCLIP.init(jnp.ones(1)))
    assert report.dropped == {"0": "ZScoreState"}


def test_the_report_is_a_text_of_three_lists():
    old, new = oc.clip_by_history(window=4, warmup_steps=2), oc.clip_by_history(window=2, warmup_steps=2, record=3)
    _, report = oc.migrate(new, PARAMS, old.init(PARAMS))
    assert str(report).splitlines() == [
        "kept:",
        "  threshold_state/window_norms: from the state, 4 norms, now 2",
        "  threshold_state/window_seen: from the state",
        "  threshold_state/window_spikes: from the state",
        "new:",
        "  clip_stats: ClipStats",
        "dropped: nothing",
    ]


# Injected hyperparameters.


def injected(**settings):
    return optax.inject_hyperparams(optax.adam)(**settings)


def test_an_injected_value_stays_what_it_was_and_the_report_shows_the_other():
    old_state = injected(learning_rate=0.25).init(PARAMS)
    old_state.hyperparams["learning_rate"] = jnp.float32(0.125)
    state, report = oc.migrate(oc.skip_nonfinite(injected(learning_rate=0.5)), PARAMS, old_state)
    assert float(state.inner_state.hyperparams["learning_rate"]) == 0.125
    assert report.kept["inner_state/hyperparams/learning_rate"] == "from the state, 0.125; tx has 0.5"
    assert report.kept["inner_state/hyperparams/b1"] == "from the state"


@pytest.mark.parametrize("to_schedule", [True, False])
def test_what_a_schedule_made_of_a_value_is_no_setting(to_schedule):
    constant, scheduled = injected(learning_rate=0.5), injected(learning_rate=optax.linear_schedule(4.0, 0.0, 10))
    old, new = (constant, scheduled) if to_schedule else (scheduled, constant)
    state, report = oc.migrate(new, PARAMS, old.init(PARAMS))
    assert float(state.hyperparams["learning_rate"]) == (4.0 if to_schedule else 0.5)
    assert "hyperparams/learning_rate" in report.new
    assert "hyperparams/b1" in report.kept


# What the arrays are like.


def test_numbers_survive_that_are_no_ordinary_ones():
    ugly = np.array([0.0, -0.0, 1e-42, 1e38, np.nan, np.inf, -np.inf, 1.0], np.float32)
    old_state = optax.tree.set(ADAM.init(jnp.zeros(8)), mu=jnp.asarray(ugly))
    state, _ = oc.migrate(oc.skip_nonfinite(ADAM), jnp.zeros(8), old_state)
    assert np.asarray(state.inner_state[0].mu).tobytes() == ugly.tobytes()


def test_another_dtype_is_reported_and_what_is_finite_stays_so():
    old_state = optax.tree.set(ADAM.init(jnp.ones(3)), mu=jnp.array([1e38, 1.0, jnp.inf]))
    state, report = oc.migrate(ADAM, jnp.ones(3, jnp.float16), old_state)
    np.testing.assert_array_equal(state[0].mu, np.array([65504, 1, np.inf], np.float16))
    assert report.kept["0/mu"] == "float32, now float16"
    assert report.kept["0/count"] == ""
    state, report = oc.migrate(ADAM, jnp.ones(3, jnp.bfloat16), old_state)
    assert state[0].mu.dtype == jnp.bfloat16


def test_whole_numbers_make_no_floats():
    _, report = oc.migrate(ADAM, PARAMS, optax.tree.set(ADAM.init(PARAMS), count=jnp.float32(3)))
    assert list(report.new) == ["0/count"]


@pytest.mark.parametrize(
    "params", [{}, jnp.zeros(()), {"a": jnp.zeros(0)}, {"a": None}, {"a": jnp.zeros(1, jnp.bfloat16)}]
)
def test_trees_of_hardly_anything(params):
    old, new = optax.chain(ZCLIP, ADAM), oc.skip_nonfinite(optax.chain(oc.zclip(max_norm=1.0, record=2), ADAM))
    state, report = oc.migrate(new, params, numbered(old.init(params)))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new.init(params))
    assert int(state.inner_state[1][0].count) >= 1000
    assert "inner_state/0/clip_stats" in report.new


@pytest.mark.parametrize(
    ("old_state", "is_missed"),
    [
        (None, False),
        ((), False),
        (optax.EmptyState(), False),
        (ZCLIP.init(PARAMS), False),
        (jnp.zeros(3), True),
        ({"step": 3, "name": "run"}, True),
        (jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), ADAM.init(PARAMS)), True),
        (ADAM.init({"other": jnp.ones(5)}), True),
    ],
    ids=["none", "tuple", "empty", "clip", "array", "train state", "replicas", "other model"],
)
def test_a_state_with_nothing_to_keep_makes_a_new_one_and_says_so(old_state, is_missed):
    with pytest.warns(UserWarning, match=NOT_OURS) if is_missed else contextlib.nullcontext():
        state, report = oc.migrate(ADAM, PARAMS, old_state)
    chex.assert_trees_all_equal(state, ADAM.init(PARAMS))
    assert report.kept == {}
    assert bool(report.dropped) == bool(jax.tree.leaves(old_state))


@pytest.mark.parametrize("old_state", ["ckpt/100", jax.eval_shape(ADAM.init, PARAMS)], ids=["path", "shapes"])
def test_what_has_no_arrays_is_no_state(old_state):
    with pytest.raises(ValueError, match="old_state must be a state with arrays in it, got one of"):
        oc.migrate(ADAM, PARAMS, old_state)


@pytest.mark.parametrize("build", [oc.thresholds.mean_std, oc.thresholds.zscore])
@pytest.mark.parametrize("is_restored", [False, True])
def test_statistics_of_another_scale_start_anew(build, is_restored):
    linear, log = (oc.skip_spikes(ADAM, build(4.0, scale=scale)) for scale in ("linear", "log"))
    for old, new in ((linear, log), (log, linear)):
        old_state = numbered(old.init(PARAMS))
        if is_restored:
            old_state = serialization.msgpack_restore(serialization.to_bytes(old_state))
        state, report = oc.migrate(new, PARAMS, old_state)
        assert "norm_threshold_state" in report.new
        chex.assert_trees_all_equal(state.norm_threshold_state, new.init(PARAMS).norm_threshold_state)


def test_keys_of_random_numbers_are_kept():
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(3))
    _, old_state = jax.jit(noise.update)(PARAMS, noise.init(PARAMS))
    state, report = oc.migrate(optax.chain(noise, ADAM), PARAMS, old_state)
    chex.assert_trees_all_equal(jax.random.key_data(state[0].rng_key), jax.random.key_data(old_state.rng_key))
    assert report.kept == {"0": "AddNoiseState, from the state"}


@pytest.mark.parametrize("bring", [lambda state: state, jax.device_get], ids=["jax", "NumPy"])
def test_the_arrays_are_fresh(bring):
    tx = optax.chain(ZCLIP, ADAM)
    old_state = bring(numbered(tx.init(PARAMS)))
    copy = jax.tree.map(np.array, old_state)
    state, _ = oc.migrate(tx, PARAMS, old_state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that can't be donated would warn
        after = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal(old_state, copy)
    chex.assert_trees_all_equal(after, jax.tree.map(lambda leaf: leaf + 1, copy))


@pytest.mark.parametrize("bring", [lambda state: state, jax.device_get], ids=["jax", "NumPy"])
def test_shardings_stay(bring):
    """Those of the old arrays; NumPy's go where the new parameters are."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones(16), split)}
    old_state = ADAM.init(params)
    state, _ = oc.migrate(oc.skip_nonfinite(ADAM), params, bring(old_state))
    assert state.inner_state[0].mu["w"].sharding == split
    assert state.inner_state[0].count.committed == old_state[0].count.committed
    jax.jit(oc.skip_nonfinite(ADAM).update)(params, state, params)  # no array is alone on one device


def test_it_works_where_arrays_are_traced():
    tx = oc.skip_nonfinite(
        optax.chain(oc.clip_by_history(window=3, warmup_steps=1, record=2), injected(learning_rate=1.0))
    )
    old = optax.chain(oc.clip_by_history(window=2, warmup_steps=1, record=2), injected(learning_rate=2.0))
    traced = jax.eval_shape(lambda state: oc.migrate(tx, PARAMS, state).state, old.init(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(traced, tx.init(PARAMS))


# Models.


class Model(eqx.Module):
    weight: jax.Array
    act: object = eqx.field(static=True, default=None)


class OtherModel(eqx.Module):
    weight: jax.Array
    bias: jax.Array


def test_modules_are_parameters_and_no_states():
    """They are dataclasses, as some states are; the class may be another than it was."""
    old_state = numbered(ADAM.init(Model(jnp.ones(2))))
    state, report = oc.migrate(ADAM, OtherModel(jnp.ones(2), jnp.ones(1)), old_state)
    assert list(report.kept) == ["0/count", "0/mu/weight", "0/nu/weight"]
    np.testing.assert_array_equal(state[0].mu.weight, old_state[0].mu.weight)


def test_arrays_in_boxes():
    tx = optax.chain(ZCLIP, ADAM)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(lambda optimizer, model: optimizer.update(model, jax.tree.map(jnp.ones_like, params)))(optimizer, model)
    state, report = oc.migrate(oc.skip_nonfinite(tx), params, optimizer.opt_state)
    assert (report.new, report.dropped) == ({"skip_stats": "SkipStats", "spikes_in_row": ""}, {})
    before, after = jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(state.inner_state)
    chex.assert_trees_all_equal(before, after)
    assert any(path.endswith("value") for path in by_path(state))  # boxed as init boxes it


def test_a_record_of_other_leaves_is_new():
    tx = oc.clip_by_leaf_norm(1.0, record=2)
    old_params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    _, old_state = jax.jit(lambda: tx.update(old_params, tx.init(old_params)))()
    params = {"a": jnp.ones(1), "c": jnp.ones(1)}
    state, report = oc.migrate(tx, params, old_state)
    chex.assert_trees_all_equal(state, tx.init(params))
    assert list(report.new) == ["clip_stats"]


def test_what_is_no_transformation_is_refused():
    with pytest.raises(ValueError, match="tx must be an optax transformation"):
        oc.migrate(optax.adam, PARAMS, ADAM.init(PARAMS))
