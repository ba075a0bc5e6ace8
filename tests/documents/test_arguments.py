"""Arguments: every parameter of every public function refuses what it can't mean, by name, where it is given.

What bad numbers do to each method is in `test_errors`.
"""

import ast
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib, diagnostics, norms, per_example, thresholds
from optaxclip._arrays import trees
from tests.support.public import NAMES, public
from tests.table import ROWS, tree


def updates():
    return {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 3))}}


def shapes_of_two_steps(tx):
    given = tree(0, "float32")
    state = jax.eval_shape(tx.init, given)
    for _ in range(2):
        new_updates, state = jax.eval_shape(tx.update, given, state, given)
    return new_updates


# Every parameter of every public function.

IDENTITY = optax.identity()
STEPS = np.linspace(1.0, 2.0, 100)

PROJECTIONS = contrib.Projection("query")
# What each needs to be called.
PUBLIC = {
    "adagc": (oc.adagc, {}),
    "adaptive_grad_clip": (oc.adaptive_grad_clip, {"clipping": 0.1}),
    "adaptive_spike_clip": (contrib.adaptive_spike_clip, {}),
    "aggc": (contrib.aggc, {"labels": "all", "ratio": 2.0}),
    "as_function": (oc.as_function, {"tx": IDENTITY}),
    "autoclip": (oc.autoclip, {}),
    "arcsinh_clip": (contrib.arcsinh_clip, {"scale": 1.0}),
    "centered_clip": (contrib.centered_clip, {"max_norm": 1.0}),
    "tanh_clip": (contrib.tanh_clip, {"max_delta": 1.0}),
    "clip": (oc.clip, {"max_delta": 1.0}),
    "clip_by": (oc.clip_by, {"norm": norms.leaf_norm(), "threshold": thresholds.constant(1.0)}),
    "clip_by_block_rms": (oc.clip_by_block_rms, {"threshold": 1.0}),
    "clip_by_global_norm": (oc.clip_by_global_norm, {"max_norm": 1.0}),
    "clip_by_history": (oc.clip_by_history, {}),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, {"max_norm": 1.0}),
    "clip_by_norm_range": (oc.clip_by_norm_range, {"min_norm": 0.1, "max_norm": 1.0}),
    "clip_by_spectral_norm": (oc.clip_by_spectral_norm, {"max_norm": 1.0}),
    "clip_by_tracked_quantile": (contrib.clip_by_tracked_quantile, {}),
    "clip_by_value": (oc.clip_by_value, {"max_value": 1.0}),
    "clip_cotangents": (oc.clip_cotangents, {"x": jnp.ones(2), "tx": IDENTITY}),
    "clip_norm_growth": (contrib.clip_norm_growth, {}),
    "clip_singular_values": (oc.clip_singular_values, {"max_value": 1.0}),
    "clip_tree": (oc.clip_tree, {"tree": {}, "max_norm": 1.0}),
    "clipped_momentum": (oc.clipped_momentum, {"max_norm": 1.0}),
    "clippy": (contrib.clippy, {}),
    "global_norm": (oc.global_norm, {"tree": {}}),
    "migrate": (oc.migrate, {"tx": IDENTITY, "params": {}, "old_state": optax.EmptyState()}),
    "mixed_clip": (contrib.mixed_clip, {"max_norm": 1.0}),
    "per_example_global_norm_clip": (oc.per_example_global_norm_clip, {"grads": {}, "l2_norm_clip": 1.0}),
    "per_example_layer_norm_clip": (oc.per_example_layer_norm_clip, {"grads": {}, "global_l2_norm_clip": 1.0}),
    "percentile_clip": (contrib.percentile_clip, {}),
    "qk_clip": (contrib.qk_clip, {"projections": PROJECTIONS}),
    "reset_state_every": (contrib.reset_state_every, {"inner": IDENTITY}),
    "scale_by_acclip": (contrib.scale_by_acclip, {}),
    "scale_by_adaptive_norm": (contrib.scale_by_adaptive_norm, {}),
    "scale_by_stable_adam": (contrib.scale_by_stable_adam, {}),
    "skip_micro_steps": (oc.skip_micro_steps, {}),
    "skip_nonfinite": (oc.skip_nonfinite, {"inner": IDENTITY}),
    "skip_spikes": (oc.skip_spikes, {"inner": IDENTITY, "threshold": thresholds.constant(1.0)}),
    "smooth_clip_by_global_norm": (oc.smooth_clip_by_global_norm, {"max_norm": 1.0}),
    "spam_clip": (contrib.spam_clip, {}),
    "with_carry": (oc.with_carry, {"inner": IDENTITY}),
    "zclip": (oc.zclip, {}),
    "norms.global_norm": (norms.global_norm, {}),
    "norms.group_norm": (norms.group_norm, {"labels": "all"}),
    "norms.known": (norms.known, {"name": "grad_norm"}),
    "norms.leaf_norm": (norms.leaf_norm, {}),
    "norms.leaf_rms": (norms.leaf_rms, {}),
    "norms.relative_change": (norms.relative_change, {"relative": 0.1, "absolute": 0.1}),
    "norms.spectral_norm": (norms.spectral_norm, {}),
    "norms.unit_norm": (norms.unit_norm, {}),
    "thresholds.at_least": (thresholds.at_least, {"min_limit": 0.1, "threshold": thresholds.growth()}),
    "thresholds.average": (thresholds.average, {}),
    "thresholds.between": (thresholds.between, {"min_norm": 0.1, "max_norm": 1.0}),
    "thresholds.constant": (thresholds.constant, {"max_norm": 1.0}),
    "thresholds.ema_band": (thresholds.ema_band, {"ratio": 2.0}),
    "thresholds.ema_ratio": (thresholds.ema_ratio, {}),
    "thresholds.exactly": (thresholds.exactly, {"target_norm": 1.0}),
    "thresholds.growth": (thresholds.growth, {}),
    "thresholds.mean_std": (thresholds.mean_std, {}),
    "thresholds.normalised": (thresholds.normalised, {}),
    "thresholds.order_statistic": (thresholds.order_statistic, {}),
    "thresholds.quantile": (thresholds.quantile, {"quantile": 0.5}),
    "thresholds.relative_to_params": (thresholds.relative_to_params, {"ratio": 0.1}),
    "thresholds.smooth": (thresholds.smooth, {"max_norm": 1.0}),
    "thresholds.times": (thresholds.times, {"k": 2.0, "threshold": thresholds.growth()}),
    "thresholds.tracked_quantile": (thresholds.tracked_quantile, {}),
    "thresholds.zscore": (thresholds.zscore, {}),
    "per_example.clipped_value_and_grad": (per_example.clipped_value_and_grad, {"fun": jnp.dot, "tx": IDENTITY}),
    "per_example.track_quantile": (per_example.track_quantile, {"bound": 1.0, "norms": jnp.ones(2)}),
    "diagnostics.from_state": (diagnostics.from_state, {"opt_state": optax.EmptyState()}),
    "diagnostics.plot": (diagnostics.plot, {"norms": STEPS}),
    "diagnostics.replay": (diagnostics.replay, {"norms": STEPS, "fixed": oc.clip_by_global_norm(1.0)}),
    "diagnostics.summary": (diagnostics.summary, {"norms": STEPS}),
}
WITHOUT_ARGUMENTS = {"zero_nonfinite", "norms.global_rms", "norms.leaf_peaks"}
CHECKED_ELSEWHERE = {"clip_stats", "per_example.form_of", "thresholds.chain"}
# No transformations, nor parts of one: optax.inject_hyperparams has nothing to do with them.
CALLED_ONCE = {
    "clip_cotangents", "global_norm", "migrate", "per_example_global_norm_clip", "per_example_layer_norm_clip",
    "clip_tree", "skip_micro_steps",
    "per_example.clipped_value_and_grad", "per_example.track_quantile",
    *(name for name in PUBLIC if name.startswith("diagnostics")),
}  # fmt: skip
DATA = {"grads", "old_state", "opt_state", "params", "tree", "x"}
PARAMETERS = [
    (name, parameter)
    for name, (function, _) in PUBLIC.items()
    for parameter in inspect.signature(function).parameters
    if parameter not in DATA
]


def test_every_public_function_is_there():
    top = {name for name in NAMES if inspect.isfunction(public(name))}
    below = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (norms, thresholds, per_example, diagnostics)
        for name, found in inspect.getmembers(module, inspect.isfunction)
        if found.__module__.startswith(module.__name__) and not name.startswith("_")
    }
    assert {*PUBLIC, *WITHOUT_ARGUMENTS, *CHECKED_ELSEWHERE} == top | below


def refuses(name, parameter, value):
    """Whether the function raises an error that names the argument; any other error is no answer."""
    function, arguments = PUBLIC[name]
    try:
        function(**{**arguments, parameter: value})
    except ValueError as error:
        assert parameter in str(error), (name, error)  # noqa: PT017  # most values are to be refused, and some are not
        return True
    except Exception as error:
        error.add_note(f"{name}({parameter}={value!r})")
        raise
    return False


HUGE = 10**400

# What is fine for no parameter at all.
JUNK = [
    1j, np.complex64(1), jnp.array(1j), np.array(1j), jnp.array(True), np.array(True), jax.random.key(0),
    np.array("x"), np.datetime64(0, "s"), b"x", object(), {1, 2}, math, HUGE, math.nan, complex,
    {"a": 1j}, {"a": object()}, {}, (jnp.array(1j), 1.0),
]  # fmt: skip
# The ranks of the leaves are known later, and a norm may be NaN.
FINE = {"axis": [HUGE], "fun": [complex], "known_norm": [math.nan], "stacked": [HUGE]}


def taken(values_for):
    """What each parameter takes of the values for it, where it takes any."""
    found = {each: [value for value in values_for(*each) if not refuses(*each, value)] for each in PARAMETERS}
    return {each: values for each, values in found.items() if values}


def test_junk_is_refused_by_name():
    assert taken(lambda *_: JUNK) == {each: FINE[each[1]] for each in PARAMETERS if each[1] in FINE}


FLAGS = {"has_aux", "include", "include_current", "record", "return_norms", "smooth", "uniform"}
NONE_IS_MEANT = {"axes", "patience", ("zclip", "max_norm"), "warmup_max_norm", "max_consecutive"}


def test_a_boolean_is_no_number():
    assert taken(lambda _, parameter: [] if parameter in FLAGS else [True]) == {}


def test_none_is_only_what_it_is_by_default():
    def none(name, parameter):
        default = inspect.signature(PUBLIC[name][0]).parameters[parameter].default
        return [] if default is None or {parameter, (name, parameter)} & NONE_IS_MEANT else [None]

    assert taken(none) == {}


BUILT = [norms.leaf_norm(), thresholds.constant(1.0), optax.sgd(0.1)]


def test_what_was_built_for_another_argument_is_refused():
    fits = {"norm": 0, "threshold": 1, "loss_threshold": 1, "inner": 2, "tx": 2}

    def others(name, parameter):
        own = None if (name, parameter) == ("clip_by_block_rms", "threshold") else parameter
        return [each for number, each in enumerate(BUILT) if number != fits.get(own)]

    assert taken(others) == {}


HAVE_STATE_DTYPE = [name for name, parameter in PARAMETERS if parameter == "state_dtype"]


@pytest.mark.parametrize("name", HAVE_STATE_DTYPE)
def test_a_state_has_a_real_float_dtype(name):
    function, arguments = PUBLIC[name]
    for dtype in (None, jnp.float32, np.float16, "bfloat16", np.dtype("float32")):
        function(**arguments, state_dtype=dtype)
    for dtype in (
        *(jnp.int32, int, bool, complex, "complex64", "floaty", "", [("a", "f4")], "2f4", jax.dtypes.float0, "O"),
        *(jnp.float8_e4m3fn, "float8_e5m2", jnp.float4_e2m1fn, np.float32(1), np.zeros(2), jnp.zeros(2), 32),
        *(jnp.float64, float, np.longdouble),  # wider than arrays are here
    ):
        assert refuses(name, "state_dtype", dtype), dtype


def test_64_bits_of_state_need_them_enabled():
    with pytest.raises(ValueError, match=r"at most 32 bits.*got 'float64': set jax_enable_x64, or pass jnp.float32"):
        contrib.spam_clip(state_dtype="float64")
    with jax.enable_x64(True):
        state = contrib.spam_clip(state_dtype="float64").init({"a": jnp.ones(2, jnp.float32)})
        assert state.spam_rms["a"].dtype == jnp.float64
        with pytest.raises(ValueError, match="at most 64 bits"):
            contrib.spam_clip(state_dtype=np.longdouble)


@jax.tree_util.register_pytree_node_class
class Module:
    """A pytree whose own type is callable, as those of Equinox are."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        raise AssertionError("it was called")

    def tree_flatten(self):
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_function_is_what_is_callable_and_no_pytree():
    functions = (
        abs,
        jax.jit(abs),
        functools.partial(pow, 2),
        jax.tree_util.Partial(pow, 2),
        optax.constant_schedule(1),
    )
    assert all(map(trees.is_function, functions))
    assert not any(map(trees.is_function, (None, 1.0, "x", Module(1.0), Module(None), jnp.float32, norms.leaf_norm())))


def test_a_callable_pytree_is_checked_leaf_by_leaf():
    for fine in (Module(1.0), {"a": Module(None), "b": 1.0}, Module(optax.constant_schedule(1.0)), Module(np.ones(2))):
        oc.clip_by_leaf_norm(fine)
    for bad in (Module(-1.0), Module("x"), Module(None), Module(1j)):
        assert refuses("clip_by_leaf_norm", "max_norm", bad)
        assert refuses("clip_by_global_norm", "max_norm", bad)
        assert refuses("clippy", "relative", bad)
    norms.global_norm(include=Module(True))
    norms.group_norm(Module("a"))
    norms.leaf_norm(stacked=Module(1))
    assert refuses("norms.global_norm", "include", Module("a"))
    assert refuses("norms.group_norm", "labels", Module(1))
    assert refuses("norms.leaf_norm", "stacked", Module(True))


def test_none_in_a_pytree_of_bounds_bounds_nothing_and_alone_is_refused():
    for build in (oc.clip, oc.clip_by_leaf_norm, thresholds.constant, thresholds.exactly):
        build({"a": None, "b": 1.0})
    oc.clip_by_value({"a": None, "b": 1.0}, {"a": 2.0, "b": None})
    for nothing in (None, {"a": None}, {"a": None, "b": [None]}, [], {}):
        assert refuses("clip", "max_delta", nothing)
        assert refuses("thresholds.between", "max_norm", nothing)
    assert refuses("clip_by_value", "min_value", {"a": None})


@pytest.mark.parametrize(
    ("low", "high"), [({"a": 2.0, "b": 0.0}, 1.0), (2.0, {"a": 3.0, "b": 1.0}), ({"a": 2.0}, {"a": 1.0})]
)
def test_ends_that_cross_anywhere_are_refused(low, high):
    with pytest.raises(ValueError, match=r"min_norm must be at most max_norm, got min_norm=2.0 and max_norm=1.0"):
        thresholds.between(low, high)


@pytest.mark.parametrize("bound", [np.int8(1), np.float16(1), np.array([1, 2]), jnp.array([1, 2]), jnp.bfloat16(1)])
def test_numbers_of_every_real_dtype_are_bounds(bound):
    thresholds.constant({"a": bound})


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("include", value) for value in (False, (), {"a": None}, {"a": False, "b": None}, {"a": abs}, {"a": 1}, 1)]
    + [("labels", value) for value in (None, (), {"a": None}, {"a": abs}, {"a": True})]
    + [("stacked", value) for value in ((), {"a": None}, {"a": True}, {"a": 1.0}, {"a": abs}, np.array(1))]
    + [("axis", value) for value in (1.0, (0, True), (0, None), {"a": 0}, abs, "0")],
)
def test_what_says_nothing_of_leaves_is_refused(parameter, value):
    owner = {"include": "global_norm", "labels": "group_norm", "stacked": "leaf_norm", "axis": "unit_norm"}[parameter]
    assert refuses(f"norms.{owner}", parameter, value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: norms.group_norm(None), "labels=None labels no leaf.*: give at least one leaf a string"),
        (lambda: norms.group_norm({"a": None}), "labels={'a': None} labels no leaf"),
        (lambda: norms.global_norm(include=False), "include=False chooses no leaf.*: pass True for at least one leaf"),
        (lambda: norms.global_norm(include={"a": None}), "include={'a': None} chooses no leaf"),
        (lambda: norms.leaf_norm(stacked={"a": None}), "stacked={'a': None} stacks no leaf: .* or pass None"),
        (
            lambda: oc.clip_by_leaf_norm({"w": None}),
            "max_norm={'w': None} bounds no leaf: give at least one leaf a number",
        ),
        (lambda: oc.clip_by_leaf_norm(None), "max_norm must be a number, .*, got None"),
    ],
)
def test_what_would_concern_no_leaf_is_refused_in_words(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("factory", "arguments", "structural"),
    [
        (oc.clip_by_leaf_norm, {"max_norm": 1.0, "stacked": 1}, "stacked"),
        (oc.clip_by_leaf_norm, {"max_norm": 1.0, "ord": 1}, "ord"),
        (oc.clip_by_global_norm, {"max_norm": 1.0, "ord": 1}, "ord"),
        (oc.clip_by_block_rms, {"threshold": 1.0, "stacked": 1}, "stacked"),
        (oc.adaptive_grad_clip, {"clipping": 0.1, "axis": 1}, "axis"),
        (oc.adaptive_grad_clip, {"clipping": 0.1, "stacked": 1}, "stacked"),
    ],
)
def test_what_is_static_beside_injected_numbers_does_what_it_does_without(factory, arguments, structural):
    given = {"k": np.arange(1, 25, dtype=np.float32).reshape(2, 4, 3)}
    params = {"k": 1 / given["k"]}
    static = optax.inject_hyperparams(factory, static_args=(structural, "record"))(**arguments)
    plain = factory(**arguments)
    other = factory(**{name: value for name, value in arguments.items() if name != structural})

    @jax.jit
    def all_of(given, params):
        return [tx.update(given, tx.init(params), params)[0]["k"] for tx in (static, plain, other)]

    new_updates, expected, differs = all_of(given, params)
    np.testing.assert_allclose(new_updates, expected, rtol=1e-6)
    assert not np.allclose(differs, expected, rtol=1e-3)


@pytest.mark.parametrize("axes", [3, True, (), ["x", 1], {"a": "x"}, {"a": None}, jnp.float32])
def test_what_names_no_mesh_axes_is_refused(axes):
    assert all(refuses(name, "axes", axes) for name, parameter in PARAMETERS if parameter == "axes")


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (norms.leaf_norm(stacked=lambda path: path == "a"), "stacked must be a whole number.*got True for 'a'"),
        (norms.spectral_norm(stacked=lambda path: 1.5), "stacked must be a whole number.*got 1.5 for 'a'"),
        (norms.group_norm(len), "labels must be strings or None, got 1 for 'a'"),
        (norms.group_norm(lambda path: None), "labels gives no label to any of 'a', 'b/c'"),
    ],
)
def test_what_a_function_of_a_path_says_is_checked_where_it_is_called(norm, message):
    with pytest.raises(ValueError, match=message):
        oc.clip_by(norm, thresholds.constant(1.0)).init(updates())


def test_numbers_of_numpy_and_beyond_32_bits_do_what_plain_ones_do():
    period = contrib.reset_state_every(IDENTITY, np.int8(100), warmup_steps=np.int8(127))
    period.update(updates(), period.init(updates()), updates())
    for build in (
        contrib.clippy,
        contrib.scale_by_acclip,
        contrib.scale_by_stable_adam,
        contrib.scale_by_adaptive_norm,
    ):
        name = "absolute" if build is contrib.clippy else "eps"
        for number in (2**40, np.longdouble(2.0**40)):
            shapes_of_two_steps(build(**{name: number}))
    for refused in (2**31, 2**63):
        assert refuses("zclip", "patience", refused)
        assert refuses("clip_by_global_norm", "record", refused)


# A percentile that is meant as a fraction.

PERCENTILES = [oc.autoclip, contrib.percentile_clip, thresholds.order_statistic]


@pytest.mark.parametrize("build", PERCENTILES)
def test_a_percentile_below_1_warns_where_it_is_written(build):
    with pytest.warns(UserWarning, match=r"percentile=0.1 means 0.1 % of the norms.*pass percentile=10$") as caught:
        build(0.1)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("build", PERCENTILES)
def test_other_percentiles_do_not_warn(build):
    for percentile in (0, 0.0, 1, 1.0, 99.5, 100, jnp.asarray(0.1)):
        build(percentile)


def test_every_percentile_is_among_these():
    named = {PUBLIC[name][0] for name, parameter in PARAMETERS if "percentile" in parameter}
    assert named == set(PERCENTILES)


# Static arguments, under optax.inject_hyperparams.


def asked_for(error):
    """What a message asks to be passed as static_args."""
    return ast.literal_eval(str(error).partition("pass static_args=")[2] or "()")


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_one_error_names_all_arguments_that_must_be_static(row):
    given = inspect.signature(row.factory).bind(*row.args, **row.kwargs).arguments
    # A function of a path is called with a count before we see anything of it.
    needed = tuple(name for name in row.static_args if callable(given.get(name)))
    try:
        shapes_of_two_steps(optax.inject_hyperparams(row.factory, needed)(*row.args, **row.kwargs))
    except ValueError as error:
        needed = tuple(dict.fromkeys((*needed, *asked_for(error))))
    assert needed == row.static_args
    shapes_of_two_steps(optax.inject_hyperparams(row.factory, needed)(*row.args, **row.kwargs))


def test_the_error_ends_with_what_to_copy():
    with pytest.raises(ValueError, match=r"static_args=\('warmup_steps', 'patience', 'record'\)$") as error:
        optax.inject_hyperparams(oc.zclip)().init(updates())
    assert "warmup_steps=25, patience=33" in str(error.value)


def test_those_that_are_static_already_are_named_too():
    injected = optax.inject_hyperparams(oc.zclip, static_args=("warmup_steps",))(record=3)
    with pytest.raises(
        ValueError, match=r"came as arrays: patience=33, record=3;.*\('warmup_steps', 'patience', 'record'\)$"
    ):
        injected.init(updates())
    # To optax a dtype is callable, so a schedule.
    with pytest.raises(ValueError, match=r"static_args=\('warmup_steps', 'state_dtype'\)$"):
        optax.inject_hyperparams(contrib.spam_clip)(state_dtype=jnp.float32).init(updates())


# Beside those that are annotated as Python's numbers, which are static.
STRUCTURAL = {"axis", "include", "labels", "stacked", "state_dtype"}
NUMBERS = {int, float, bool, int | None, float | None}


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in CALLED_ONCE])
def test_every_static_argument_is_in_that_error(name):
    function, arguments = PUBLIC[name]
    parameters = inspect.signature(function).parameters.values()
    static = tuple(p.name for p in parameters if p.annotation in NUMBERS or p.name in STRUCTURAL)
    for each in static:
        with pytest.raises(ValueError, match=rf"must be static but came as arrays: {each}=1;") as error:
            function(**{**arguments, each: jnp.asarray(1)})
        assert each in asked_for(error.value)
    if static:
        with pytest.raises(ValueError, match="must be static") as error:
            function(**{**arguments, **dict.fromkeys(static, jnp.asarray(1))})
        assert asked_for(error.value) == static


def test_a_schedule_that_returns_no_real_number_is_named():
    tx = oc.clip_by_global_norm(lambda count: 1j)
    with pytest.raises(ValueError, match=r"the schedule of a bound must return real numbers, got 1j"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_booleans_of_numpy_are_flags():
    oc.clip_singular_values(1.0, smooth=np.True_)
    oc.clip_by(norms.global_norm(include={"a": np.True_}), thresholds.constant(1.0), record=np.True_)
