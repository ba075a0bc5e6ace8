"""Bad arguments raise where they are given, and the message says which argument, which value, which leaf."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax._src.base import NO_PARAMS_MSG

import optaxclip as oc
from optaxclip import contrib, norms, thresholds
from tests.support.public import public
from tests.table import ROWS, kernels, params, tree

NAN = math.nan


def updates():
    return {"a": np.ones(2, np.float32), "b": {"c": np.ones((2, 3), np.float32)}}


# Static arguments. Each case: the call, what is called, its bad argument, and that argument's value.

BAD = [
    (oc.clip, {"max_delta": -1.5}, "max_delta"),
    (oc.clip, {"max_delta": NAN}, "max_delta"),
    (oc.clip_by_value, {"min_value": NAN}, "min_value"),
    (oc.clip_by_value, {"min_value": -1.0, "max_value": NAN}, "max_value"),
    (oc.clip_by_global_norm, {"max_norm": -1.5}, "max_norm"),
    (oc.clip_by_global_norm, {"max_norm": -1}, "max_norm"),
    (oc.clip_by_global_norm, {"max_norm": np.float64(-1.5)}, "max_norm"),
    (oc.clip_by_global_norm, {"max_norm": NAN}, "max_norm"),
    (oc.clip_by_global_norm, {"max_norm": 1.0, "ord": 0}, "ord"),
    (oc.clip_by_global_norm, {"max_norm": 1.0, "ord": -2}, "ord"),
    (oc.clip_by_global_norm, {"max_norm": 1.0, "ord": NAN}, "ord"),
    (oc.clip_by_leaf_norm, {"max_norm": -1.5}, "max_norm"),
    (oc.clip_by_leaf_norm, {"max_norm": NAN}, "max_norm"),
    (oc.clip_by_leaf_norm, {"max_norm": 1.0, "ord": -2}, "ord"),
    (oc.clip_by_leaf_norm, {"max_norm": 1.0, "stacked": -1}, "stacked"),
    (oc.clip_by_block_rms, {"threshold": -1.5}, "threshold"),
    (oc.clip_by_block_rms, {"threshold": NAN}, "threshold"),
    (oc.clip_by_block_rms, {"threshold": 1.0, "stacked": -1}, "stacked"),
    (oc.clip_by_norm_range, {"min_norm": -1.5, "max_norm": 1.0}, "min_norm"),
    (oc.clip_by_norm_range, {"min_norm": 0.5, "max_norm": NAN}, "max_norm"),
    (oc.smooth_clip_by_global_norm, {"max_norm": -1.5}, "max_norm"),
    (oc.smooth_clip_by_global_norm, {"max_norm": NAN}, "max_norm"),
    (oc.adaptive_grad_clip, {"clipping": -0.5}, "clipping"),
    (oc.adaptive_grad_clip, {"clipping": NAN}, "clipping"),
    (oc.adaptive_grad_clip, {"clipping": 0.1, "eps": -1e-3}, "eps"),
    (oc.adaptive_grad_clip, {"clipping": 0.1, "units": "hwio"}, "units"),
    (oc.adaptive_grad_clip, {"clipping": 0.1, "stacked": -1}, "stacked"),
    (oc.clip_by_global_norm, {"max_norm": 1.0, "record": -1}, "record"),
    (oc.adaptive_grad_clip, {"clipping": 0.1, "record": 2.5}, "record"),
    (contrib.clippy, {"relative": -0.5}, "relative"),
    (contrib.clippy, {"relative": NAN}, "relative"),
    (contrib.clippy, {"absolute": -1e-7}, "absolute"),
    (oc.global_norm, {"tree": {}, "ord": -2}, "ord"),
    (norms.global_norm, {"ord": -2}, "ord"),
    (norms.group_norm, {"labels": "all", "ord": NAN}, "ord"),
    (norms.leaf_norm, {"ord": 0}, "ord"),
    (norms.leaf_norm, {"stacked": -1}, "stacked"),
    (norms.leaf_norm, {"stacked": {"a": 0, "b": -1}}, "stacked"),
    (norms.leaf_rms, {"stacked": -1}, "stacked"),
    (norms.unit_norm, {"units": "hwio"}, "units"),
    (norms.unit_norm, {"stacked": -1}, "stacked"),
    (norms.relative_change, {"relative": -0.5, "absolute": 0.0}, "relative"),
    (norms.relative_change, {"relative": 0.5, "absolute": NAN}, "absolute"),
    (oc.autoclip, {"percentile": 100.5}, "percentile"),
    (oc.autoclip, {"percentile": -1.0}, "percentile"),
    (oc.autoclip, {"window": 0}, "window"),
    (oc.autoclip, {"window": 2.5}, "window"),
    (contrib.percentile_clip, {"percentile": NAN}, "percentile"),
    (contrib.percentile_clip, {"window": 0}, "window"),
    (contrib.percentile_clip, {"window": None}, "window"),
    (contrib.clip_by_tracked_quantile, {"quantile": 1.5}, "quantile"),
    (contrib.clip_by_tracked_quantile, {"learning_rate": -0.5}, "learning_rate"),
    (contrib.clip_by_tracked_quantile, {"initial": -1.0}, "initial"),
    (oc.zclip, {"num_std": -2.5}, "num_std"),
    (oc.zclip, {"decay": 1.0}, "decay"),
    (oc.zclip, {"decay": -0.5}, "decay"),
    (oc.zclip, {"warmup_steps": 0}, "warmup_steps"),
    (oc.zclip, {"max_norm": -1.0}, "max_norm"),
    (oc.zclip, {"patience": 0}, "patience"),
    (oc.zclip, {"patience": 2.5}, "patience"),
    (oc.zclip, {"clip_to": "median"}, "clip_to"),
    (oc.adagc, {"ratio": NAN}, "ratio"),
    (oc.adagc, {"decay": 1.0}, "decay"),
    (oc.adagc, {"warmup_steps": -1}, "warmup_steps"),
    (oc.adagc, {"warmup_max_norm": -1.0}, "warmup_max_norm"),
    (contrib.aggc, {"labels": "a", "ratio": -1.0}, "ratio"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "min_ratio": -1.0}, "min_ratio"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "max_down": 1.5}, "max_down"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "max_up": -1.0}, "max_up"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "min_norm": -1.0}, "min_norm"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "initial": -1.0}, "initial"),
    (oc.clip_by_history, {"num_std": -3.0}, "num_std"),
    (oc.clip_by_history, {"window": 0}, "window"),
    (oc.clip_by_history, {"warmup_steps": 0}, "warmup_steps"),
    (oc.clip_by_history, {"window": 5, "warmup_steps": 6}, "warmup_steps"),
    (oc.clip_by_history, {"take_in": "all"}, "take_in"),
    (oc.clip_by_history, {"patience": 0}, "patience"),
    (contrib.clip_norm_growth, {"ratio": -1.5}, "ratio"),
    (oc.zclip, {"num_std": 0.0}, "num_std"),
    (oc.zclip, {"decay": "slow"}, "decay"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "min_ratio": 3.0}, "min_ratio"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "max_up": 0.5}, "max_up"),
    (contrib.aggc, {"labels": "a", "ratio": 2.0, "initial": math.inf}, "initial"),
    (contrib.clip_by_tracked_quantile, {"initial": 0.0}, "initial"),
    (contrib.clip_norm_growth, {"ratio": 0.0}, "ratio"),
    (oc.clip_by_global_norm, {"max_norm": 1.0, "record": [2]}, "record"),
    (contrib.spam_clip, {"ratio": -1.0}, "ratio"),
    (contrib.spam_clip, {"decay": 1.0}, "decay"),
    (contrib.spam_clip, {"warmup_steps": -1}, "warmup_steps"),
    (contrib.spam_clip, {"period": 0}, "period"),
    (contrib.adaptive_spike_clip, {"decay": 1.5}, "decay"),
    (contrib.scale_by_adaptive_norm, {"b1": 1.0}, "b1"),
    (contrib.scale_by_adaptive_norm, {"eps": -1.0}, "eps"),
    (contrib.scale_by_acclip, {"b2": 1.0}, "b2"),
    (contrib.scale_by_acclip, {"alpha": 0.5}, "alpha"),
    (contrib.scale_by_stable_adam, {"eps": -1.0}, "eps"),
    (oc.clipped_momentum, {"max_norm": -1.0}, "max_norm"),
    (oc.clipped_momentum, {"max_norm": 1.0, "decay": 1.0}, "decay"),
    (contrib.mixed_clip, {"max_norm": NAN}, "max_norm"),
    (contrib.mixed_clip, {"max_norm": 1.0, "mix": 1.5}, "mix"),
    (contrib.mixed_clip, {"max_norm": 1.0, "smooth": 2}, "smooth"),
    (contrib.centered_clip, {"max_norm": -1.0}, "max_norm"),
    (contrib.centered_clip, {"max_norm": 1.0, "state_dtype": "int32"}, "state_dtype"),
    (contrib.tanh_clip, {"max_delta": -1.0}, "max_delta"),
    (contrib.arcsinh_clip, {"scale": NAN}, "scale"),
    (contrib.reset_state_every, {"inner": optax.identity(), "period": 0}, "period"),
    (contrib.reset_state_every, {"inner": optax.identity(), "warmup_steps": -1}, "warmup_steps"),
    (thresholds.quantile, {"quantile": 1.5}, "quantile"),
    (thresholds.quantile, {"quantile": 0.5, "warmup_max_norm": 0.0}, "warmup_max_norm"),
    (thresholds.zscore, {"warmup_max_norm": NAN}, "warmup_max_norm"),
    (thresholds.times, {"k": 0.0, "threshold": thresholds.growth()}, "k"),
    (thresholds.times, {"k": -1.0, "threshold": thresholds.growth()}, "k"),
    (thresholds.times, {"k": math.inf, "threshold": thresholds.growth()}, "k"),
    (thresholds.at_least, {"min_limit": -0.1, "threshold": thresholds.growth()}, "min_limit"),
    (thresholds.mean_std, {"ddof": 2}, "ddof"),
    (thresholds.constant, {"max_norm": -1.5}, "max_norm"),
    (thresholds.constant, {"max_norm": NAN}, "max_norm"),
    (thresholds.between, {"min_norm": -1.5, "max_norm": 1.0}, "min_norm"),
    (thresholds.between, {"min_norm": 0.5, "max_norm": NAN}, "max_norm"),
    (thresholds.exactly, {"target_norm": -1.5}, "target_norm"),
    (thresholds.smooth, {"max_norm": NAN}, "max_norm"),
    (thresholds.relative_to_params, {"ratio": -0.5}, "ratio"),
    (thresholds.relative_to_params, {"ratio": NAN}, "ratio"),
    (thresholds.relative_to_params, {"ratio": 0.5, "floor": -1e-3}, "floor"),
    (thresholds.relative_to_params, {"ratio": 0.5, "offset": NAN}, "offset"),
]


@pytest.mark.parametrize(
    ("factory", "arguments", "bad"),
    [
        pytest.param(*case, id=f"{case[0].__module__}.{case[0].__name__}-{case[2]}-{number}")
        for number, case in enumerate(BAD)
    ],
)
def test_a_bad_argument_is_named_with_its_value(factory, arguments, bad):
    value = arguments[bad]
    shown = value if not isinstance(value, dict) else min(value.values())
    with pytest.raises(ValueError, match=rf"\b{bad}\b") as error:
        factory(**arguments)
    assert str(shown) in str(error.value)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (oc.clip_by_value, ("min_value", "max_value")),
        (lambda: oc.clip_by_value(2.0, 1.5), ("min_value", "2.0", "max_value", "1.5")),
        (lambda: oc.clip_by_norm_range(2.0, 1.5), ("min_norm", "2.0", "max_norm", "1.5")),
        (lambda: thresholds.between(2.0, 1.5), ("min_norm", "2.0", "max_norm", "1.5")),
        (lambda: thresholds.constant({"a": 1.0, "b": -1.5}), ("max_norm", "-1.5")),
        (lambda: oc.clip_by_leaf_norm({"a": 1.0, "b": {"c": NAN}}), ("max_norm", "nan")),
    ],
    ids=["no_bound", "crossed_values", "crossed_norms", "crossed_band", "bound_in_a_tree", "nan_in_a_tree"],
)
def test_bounds_that_do_not_go_together_are_named(build, names):
    with pytest.raises(ValueError, match=names[0]) as error:
        build()
    for name in names:
        assert name in str(error.value)


WRONG = {
    "a tree for the one norm": (lambda: oc.clip_by_global_norm({"a": 1.0}), "max_norm must be one number.*'a': 1.0"),
    "gradients, as in torch": (lambda: oc.clip_by_global_norm(updates()), "max_norm must be one number"),
    "an array for the one norm": (lambda: oc.clip_by_global_norm(jnp.ones(3)), "max_norm must be one number"),
    "a tree for the smooth clip": (lambda: oc.smooth_clip_by_global_norm([1.0]), "max_norm must be one number"),
    "a schedule in a norm": (lambda: contrib.clippy(lambda count: 0.1), "relative.*inject_hyperparams"),
    "a tree in a norm": (lambda: contrib.clippy(0.1, {"a": 1.0}), "absolute must be one number"),
    "an array in a norm": (lambda: norms.relative_change(jnp.ones(2), 0.1), "relative must be one number"),
    "a label that is no string": (
        lambda: norms.group_norm({"a": 1, "b": "x"}),
        "labels must be strings or None, got 1",
    ),
    "an uncalled norm": (
        lambda: oc.clip_by(norms.global_norm, thresholds.constant(1.0)),
        r"norm must be a Norm, such as norms.global_norm\(\), got <function",
    ),
    "the function that measures": (lambda: oc.clip_by(oc.global_norm, thresholds.constant(1.0)), "norm must be a Norm"),
    "a number": (lambda: oc.clip_by(norms.leaf_norm(), 1.0), r"threshold.*such as thresholds.constant\(1.0\), got 1.0"),
    "a number in a chain": (
        lambda: thresholds.chain(thresholds.zscore(), 1.0),
        "threshold 1 of the chain must be a Thr",
    ),
    "a clipper in a chain": (lambda: thresholds.chain(oc.zclip()), "threshold 0 of the chain must be a Threshold"),
    "a clipper for a threshold": (lambda: thresholds.times(2.0, oc.zclip()), "threshold must be a Threshold, such as"),
    "a threshold for a factor": (lambda: thresholds.times(thresholds.growth(), 2.0), "k must be a number"),
    "a schedule for a decay": (lambda: oc.zclip(decay=lambda count: 0.9), "decay must be a number.*inject_hyperparams"),
    "swapped": (lambda: oc.clip_by(thresholds.constant(1.0), norms.leaf_norm()), "norm must be a Norm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_of_the_wrong_kind_is_refused_when_it_is_given(case):
    build, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_0_and_inf_are_bounds_like_any_other():
    @jax.jit
    def clipped(given):
        return [oc.clip_by_global_norm(bound).update(given, optax.EmptyState())[0] for bound in (0, math.inf)]

    nothing, everything = clipped(updates())
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(nothing))
    jax.tree.map(np.testing.assert_array_equal, everything, updates())


# Bounds that arrive as arrays are not checked: they act in a way that can do no harm.

TRACED = [
    pytest.param(oc.clip, id="clip"),
    pytest.param(oc.clip_by_global_norm, id="clip_by_global_norm"),
    pytest.param(oc.clip_by_leaf_norm, id="clip_by_leaf_norm"),
    pytest.param(oc.clip_by_block_rms, id="clip_by_block_rms"),
    pytest.param(oc.smooth_clip_by_global_norm, id="smooth_clip_by_global_norm"),
    pytest.param(oc.adaptive_grad_clip, id="adaptive_grad_clip"),
    pytest.param(lambda c: oc.clip_by(norms.leaf_norm(), thresholds.exactly(c)), id="exactly"),
    pytest.param(lambda c: oc.clip_by(norms.leaf_norm(), thresholds.between(0.0, c)), id="between"),
]


@functools.cache
def stepped(build):
    """The first updates as a function of the bound."""
    weights = params("float32")

    def step(bound):
        tx = build(bound)
        return tx.update(tree(0, "float32"), tx.init(weights), weights)[0]

    return jax.jit(step)


@pytest.mark.parametrize("build", TRACED)
def test_a_traced_negative_bound_acts_as_0(build):
    for leaf in jax.tree.leaves(stepped(build)(-1.0)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("build", TRACED)
def test_a_traced_nan_bounds_nothing(build):
    jax.tree.map(np.testing.assert_array_equal, stepped(build)(NAN), tree(0, "float32"))


# Parameters.


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.needs_params])
def test_missing_parameters_raise_what_optax_says(row):
    tx = row.make()
    state = jax.eval_shape(tx.init, params("float32"))
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared below
        jax.eval_shape(tx.update, tree(0, "float32"), state)
    assert NO_PARAMS_MSG in str(error.value)


# Trees that do not fit each other.

WITHOUT_C = {"a": 1.0, "b": {}}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: oc.clip_by_leaf_norm(WITHOUT_C), id="bound"),
        pytest.param(lambda: oc.clip_by_leaf_norm({"a": 1.0}), id="bound_without_a_branch"),
        pytest.param(lambda: oc.clip_by_leaf_norm(1.0, stacked={"a": 0, "b": {}}), id="stacked"),
        pytest.param(lambda: oc.clip_by(norms.group_norm({"a": "x", "b": {}}), thresholds.constant(1.0)), id="labels"),
        pytest.param(
            lambda: oc.clip_by(norms.global_norm(include={"a": True, "b": {}}), thresholds.constant(1.0)), id="include"
        ),
    ],
)
def test_a_prefix_that_does_not_fit_names_the_path(build):
    with pytest.raises(ValueError, match=r"\bb\b"):
        step(build())


def step(tx):
    return tx.update(updates(), tx.init(updates()), updates())


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.needs_params])
def test_parameters_that_do_not_fit_the_updates_name_the_path(row):
    tx = row.make()
    given, weights = tree(0, "float32"), params("float32")
    state = jax.eval_shape(tx.init, weights)
    del weights["dense"]["bias"]
    # `reset_state_every` leaves it to jax, which says "dense" since 0.9.
    words = "bias" if row.name == "reset_state_every" and jax.__version_info__ < (0, 9) else r"(?s)dense.*bias"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(tx.update, given, state, weights)


def test_a_group_without_a_bound_is_named():
    tx = oc.clip_by(norms.group_norm({"a": "body", "b": "head"}), thresholds.constant({"body": 1.0}))
    with pytest.raises(ValueError, match="head"):
        step(tx)


def test_units_of_a_rank_without_a_convention_ask_for_axis():
    kernel = {"k": np.ones((1, 2, 1, 2, 1, 2), np.float32)}
    tx = oc.adaptive_grad_clip(0.1)
    with pytest.raises(ValueError, match="axis"):
        tx.update(kernel, tx.init(kernel), kernel)


# optax.inject_hyperparams.


def test_a_schedule_can_be_injected_and_a_number_changed_by_hand():
    given = {"a": np.full(4, 10, np.float32)}

    def norm_after(state):
        new_updates, state = update(given, state, given)
        return np.linalg.norm(new_updates["a"]), state

    scheduled = optax.inject_hyperparams(oc.clip_by_global_norm)(optax.linear_schedule(4.0, 2.0, 2))
    update, state = jax.jit(scheduled.update), jax.jit(scheduled.init)(given)
    for expected in (4.0, 3.0, 2.0, 2.0):
        size, state = norm_after(state)
        assert size == pytest.approx(expected, rel=1e-6)

    by_hand = optax.inject_hyperparams(oc.clip_by_global_norm)(max_norm=4)
    update, state = jax.jit(by_hand.update), jax.jit(by_hand.init)(given)
    state.hyperparams["max_norm"] = jnp.asarray(3)
    size, _ = norm_after(state)
    assert size == pytest.approx(3.0, rel=1e-6)


def test_a_schedule_needs_no_injection():
    given = {"a": np.full(4, 10, np.float32)}
    tx = oc.clip_by_global_norm(optax.linear_schedule(4.0, 2.0, 2))
    update, state = jax.jit(tx.update), tx.init(given)
    for expected in (4.0, 3.0, 2.0, 2.0):
        new_updates, state = update(given, state)
        assert np.linalg.norm(new_updates["a"]) == pytest.approx(expected, rel=1e-6)


def test_norms_and_thresholds_are_not_callable():
    # inject_hyperparams would take them for schedules.
    assert not callable(norms.leaf_norm())
    assert not callable(thresholds.constant(1.0))
    tx = optax.inject_hyperparams(oc.clip_by)(norms.leaf_norm(stacked=kernels), thresholds.constant(1.0))
    new_updates, _ = jax.jit(lambda given: tx.update(given, tx.init(given), given))(updates())
    assert np.linalg.norm(new_updates["a"]) == pytest.approx(1.0, rel=1e-6)


# Signatures.

SIGNATURES = {
    "clip_by": "(norm, threshold, *, axes='auto', record=False)",
    "global_norm": "(tree, *, ord=2, include=None, axes='auto')",
    "clip": "(max_delta)",
    "clip_by_value": "(min_value=None, max_value=None)",
    "clip_by_global_norm": "(max_norm, *, ord=None, axes='auto', record=False)",
    "clip_by_leaf_norm": "(max_norm, *, ord=None, stacked=None, axes='auto', record=False)",
    "clip_by_block_rms": "(threshold, *, stacked=None, axes='auto', record=False)",
    "clip_by_spectral_norm": "(max_norm, *, units='io', stacked=None, axes='auto', record=False)",
    "clip_singular_values": "(max_value, *, smooth=False, units='io', stacked=None, axes='auto')",
    "smooth_clip_by_global_norm": "(max_norm, *, axes='auto', record=False)",
    "adaptive_grad_clip": "(clipping, eps=0.001, axis=None, *, units='io', stacked=None, axes='auto', record=False)",
    "clippy": "(relative=0.1, absolute=1e-07, *, axes='auto', record=False)",
    "adagc": (
        "(ratio=1.05, *, decay=0.98, warmup_steps=100, warmup_max_norm=1.0, warmup_take_in='raw', axes='auto', "
        "record=False)"
    ),
    "aggc": (
        "(labels, ratio, *, min_ratio=None, decay=0.98, min_norm=0.0, max_down=None, max_up=None, initial=None, "
        "axes='auto', record=False)"
    ),
    "spam_clip": "(ratio=5000.0, *, decay=0.999, warmup_steps=19, period=None, state_dtype=None)",
    "adaptive_spike_clip": "(decay=0.999, *, axes='auto', record=False)",
    "scale_by_adaptive_norm": "(b1=0.7, b2=0.9, *, eps=1e-08, axes='auto', record=False)",
    "scale_by_acclip": "(b1=0.9, b2=0.99, *, alpha=1.0, eps=1e-05, state_dtype=None)",
    "scale_by_stable_adam": "(b1=0.9, b2=0.99, *, eps=1e-06, state_dtype=None, axes='auto')",
    "clipped_momentum": "(max_norm, decay=0.9, *, state_dtype=None, axes='auto')",
    "tanh_clip": "(max_delta)",
    "arcsinh_clip": "(scale)",
    "centered_clip": "(max_norm, *, state_dtype=None, axes='auto')",
    "qk_clip": "(max_logit=100.0, *, projections, alpha=0.5, queries_per_key=1)",
    "mixed_clip": "(max_norm, *, decay=0.999, mix=0.7, smooth=False, state_dtype=None, axes='auto')",
    "reset_state_every": "(inner, period=500, *, warmup_steps=150)",
    "norms.global_norm": "(ord=2, *, include=None)",
    "norms.group_norm": "(labels, ord=2)",
    "norms.leaf_norm": "(ord=2, *, stacked=None)",
    "norms.global_rms": "()",
    "norms.leaf_rms": "(*, stacked=None)",
    "norms.spectral_norm": "(*, units='io', stacked=None)",
    "norms.unit_norm": "(units='io', *, axis=None, stacked=None)",
    "norms.relative_change": "(relative, absolute)",
    "norms.known": "(name)",
    "thresholds.constant": "(max_norm)",
    "thresholds.between": "(min_norm, max_norm)",
    "thresholds.exactly": "(target_norm)",
    "thresholds.smooth": "(max_norm)",
    "thresholds.relative_to_params": "(ratio, *, floor=0.0, offset=0.0)",
    "thresholds.chain": "(*thresholds)",
    "thresholds.times": "(k, threshold)",
    "thresholds.at_least": "(min_limit, threshold)",
    "clip_stats": "(opt_state, *, per_group=False, history=False, since=0, numeric=False)",
}


def without_annotations(function):
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_published_ones(name):
    *module, function = name.split(".")
    found = getattr({"norms": norms, "thresholds": thresholds}[module[0]], function) if module else public(name)
    assert without_annotations(found) == SIGNATURES[name]


# Those with a norm among their arguments, which has no literal: their names, with the defaults of the numbers.
WITH_A_NORM = {
    "clip_by_norm_range": "min_norm max_norm * norm",
    "autoclip": "percentile=10.0 * window=None warmup_steps=25 warmup_max_norm=1.0 norm",
    "percentile_clip": "percentile=5.0 * window=100 norm",
    "zclip": "num_std=2.5 * decay=0.97 warmup_steps=25 warmup_max_norm=1.0 max_norm=None patience=33 "
    "clip_to='reciprocal' scale='linear' norm",
    "clip_by_history": "num_std=3.0 * window=128 warmup_steps=64 warmup_max_norm=1.0 take_in='clipped' patience=None "
    "scale='linear' norm",
    "clip_by_tracked_quantile": "quantile=0.5 * learning_rate=0.2 initial=1.0 norm",
    "clip_norm_growth": "ratio=1.01 * norm",
}


@pytest.mark.parametrize("name", WITH_A_NORM)
def test_the_norm_is_a_keyword(name):
    shown = []
    for parameter in inspect.signature(public(name)).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        has_literal = parameter.name != "norm" and parameter.default is not inspect.Parameter.empty
        shown.append(f"{parameter.name}={parameter.default!r}" if has_literal else parameter.name)
    assert " ".join(shown) == WITH_A_NORM[name] + " axes='auto' record=False"


@pytest.mark.parametrize("name", ["clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"])
def test_optax_names_take_optax_positional_arguments(name):
    ours = list(inspect.signature(public(name)).parameters.values())
    theirs = list(inspect.signature(getattr(optax, name)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


# What only shows when the updates are there.

MISFITS = {
    "an entry too many": (
        oc.clip_by_leaf_norm({"a": 1.0, "x": 2.0}),
        "'x' is in the bound but not in what it bounds, which has 'a', 'b/c'",
    ),
    "an entry too few": (
        oc.clip_by_leaf_norm({"b": 1.0}),
        "'a' is in what it bounds but not in the bound, which has 'b'",
    ),
    "an entry too deep": (
        oc.clip_by_leaf_norm({"a": 1.0, "b": {"c": {"d": 1.0}}}),
        "'b/c/d' is in the bound but not in what it bounds, which has 'a', 'b/c'",
    ),
    "another container": (oc.clip([1.0, 2.0]), "'0' is in the bound but not in"),
    "too long for its norm": (
        oc.clip_by_leaf_norm(jnp.ones(3)),
        r"shape \(3,\) does not fit 'a'.*broadcast to shape \(\)",
    ),
    "one axis too many": (oc.clip_by_leaf_norm({"a": jnp.ones(1), "b": 1.0}), r"shape \(1,\) does not fit 'a'"),
    "too long for its leaf": (oc.clip({"a": jnp.ones(3), "b": 1.0}), r"shape \(3,\) does not fit 'a'.*\(2,\)"),
    "a bound for a scalar": (
        oc.clip_by(norms.global_norm(), thresholds.constant({"a": 1.0})),
        "'a' is in the bound but not in what it bounds, which has a single leaf",
    ),
    "a label unknown": (
        oc.clip_by(norms.group_norm(lambda path: path[0]), thresholds.constant({"a": 1.0, "b": 1.0, "x": 1.0})),
        "'x' is in the bound but not in what it bounds, which has 'a', 'b'",
    ),
    "a floor": (oc.adaptive_grad_clip(0.1, {"x": 0.1}), "'x' is in the bound but not in"),
    "stacked": (
        oc.clip_by_leaf_norm(1.0, stacked={"a": 0}),
        "stacked does not fit the updates: 'b/c' is in updates but not in stacked, which has 'a'",
    ),
    "labels": (
        oc.clip_by(norms.group_norm({"a": "all", "x": "all"}), thresholds.constant(1.0)),
        "labels does not fit the updates: 'x' is in labels but not in updates, which has 'a', 'b/c'",
    ),
    "no leaf included": (
        oc.clip_by(norms.global_norm(include=lambda path: path == "A"), thresholds.constant(1.0)),
        "include chooses no leaf of 'a', 'b/c'",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_the_updates_is_named_by_its_path(case):
    tx, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda u: tx.update(u, tx.init(u), u))(updates())


def test_an_array_bound_may_have_the_shape_of_what_it_bounds():
    given = {"a": np.float32([4, 4]), "b": np.float32([[3, 4], [6, 8]])}
    by_coordinate = oc.clip({"a": np.float32([1, 2]), "b": np.float32([[1], [7]])})
    clipped, _ = jax.jit(by_coordinate.update)(given, by_coordinate.init(given))
    np.testing.assert_array_equal(clipped["a"], [1.0, 2.0])
    np.testing.assert_array_equal(clipped["b"], [[1.0, 1.0], [6.0, 7.0]])
    by_layer = oc.clip_by_leaf_norm({"a": 10.0, "b": np.float32([1, 5])}, stacked={"a": 0, "b": 1})
    clipped, _ = jax.jit(by_layer.update)(given, by_layer.init(given))
    np.testing.assert_allclose(clipped["b"], [[0.6, 0.8], [3.0, 4.0]], rtol=1e-6)


def test_floors_and_offsets_are_bounds_like_any_other():
    weights = {"a": np.zeros(2, np.float32), "b": np.float32([3, 4])}
    given = {"a": np.float32([30, 40]), "b": np.float32([30, 40])}
    tx = oc.clip_by(
        norms.leaf_norm(),
        thresholds.relative_to_params(0.1, floor={"a": 1.0, "b": 0.0}, offset=lambda count: 0.5 * count),
    )
    update, state = jax.jit(tx.update), tx.init(weights)
    for expected in ({"a": 0.1, "b": 0.5}, {"a": 0.6, "b": 1.0}):
        clipped, state = update(given, state, weights)
        for name, size in expected.items():
            assert np.linalg.norm(clipped[name]) == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize(
    "wrapper",
    [
        oc.skip_nonfinite,
        lambda inner: oc.skip_spikes(inner, oc.thresholds.constant(1.0)),
        oc.with_carry,
        contrib.reset_state_every,
        oc.as_function,
    ],
    ids=["skip_nonfinite", "skip_spikes", "with_carry", "reset_state_every", "as_function"],
)
def test_what_is_wrapped_must_be_a_transformation(wrapper):
    with pytest.raises(ValueError, match=r"must be an optax transformation, got 1\.0$"):
        wrapper(1.0)
    with pytest.raises(ValueError, match=r"must be an optax transformation, got <function clip.*; call it first"):
        wrapper(oc.clip)
