"""Nonsense for every parameter of every public function: a ValueError that names the parameter, or accepted on purpose.

Each value is written as the expression that makes it, so that a failure can be pasted into a REPL.
"""

import decimal  # the expressions below use these
import fractions
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import norms, per_example, thresholds

JUNK = """
None; True; False; np.bool_(True); "junk"; b"x"; "auto"; "mean"; "float32"; "floaty"; "int32"; int; bool; complex
-1; -1.5; 0; 0.0; 0.5; 1; 1.0; 1.5; 2; 101; 2**70; math.nan; math.inf; -math.inf; 1j
np.float64("nan"); np.int64(-1); np.int64(2); np.float32(0.5); np.complex64(1); np.datetime64("2020")
np.array("x"); np.array(0.5); np.array(-1.0); np.array(math.nan); np.array([1.0, 2.0]); np.array([-1.0]); np.array([])
np.array([1, "x"], object); np.array(True); np.array(1j); np.array(None)
jnp.array(0.5); jnp.array(2); jnp.array(1j); jnp.array([1.0, 2.0]); jax.random.key(0)
[]; {}; (); set(); {1.0}; [1.0, 2.0]; [0]; (0, 1); ["a"]; {"a": -1.0}; {"a": "x"}; {"a": None}; {"a": []}; {"a": 1j}
object(); object; Exception; lambda: 1; lambda step: 1.0; slice(1); ...; range(3)
fractions.Fraction(1, 2); decimal.Decimal(1)
optax.sgd; optax.sgd(0.1); norms.leaf_norm; norms.leaf_norm(); thresholds.constant(1.0); jax.sharding.PartitionSpec()
"""
EXPRESSIONS = [each.strip() for line in JUNK.strip().splitlines() for each in line.split(";")]


@functools.cache
def value_of(expression: str) -> Any:
    return eval(expression)  # one of ours


# What is accepted. Each kind says of a value: True if it must be accepted, False if refused, None if either will do.

Kind = Callable[[Any], bool | None]


def is_bool(v: Any) -> bool:
    return isinstance(v, bool | np.bool_)


def is_number(v: Any) -> bool:
    return isinstance(v, int | float | np.integer | np.floating) and not is_bool(v)


def is_real_array(v: Any) -> bool:
    is_array = isinstance(v, np.ndarray | jax.Array)
    return is_array and not jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) and v.dtype.kind in "iuf"


def is_either(v: Any) -> bool:
    """Numbers of other libraries and boolean arrays: refused or taken."""
    is_flags = isinstance(v, np.ndarray) and v.dtype == bool
    return is_flags or isinstance(v, fractions.Fraction | decimal.Decimal)


def is_huge(v: Any) -> bool:
    """A whole number that no float holds, or no int32: refused or taken, as long as it works."""
    return isinstance(v, int) and not is_bool(v) and abs(v) > 2**31


def number(low: float = 0, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Kind:
    """One number in an interval, or a scalar array, whose value is not looked at."""

    def fits(v: Any) -> bool | None:
        if isinstance(v, jax.Array):
            return is_real_array(v) and v.ndim == 0
        if not (is_number(v) or (is_real_array(v) and v.ndim == 0)):
            return None if is_either(v) and np.ndim(v) == 0 else False
        inside = low <= v <= high and not (open_low and v == low) and not (open_high and v == high)
        return None if is_huge(v) and inside else bool(inside)

    return fits


def bound(*, signed: bool = False, positive: bool = False, finite: bool = False, single: bool = False) -> Kind:
    """A number, an array, a schedule or a pytree of these; whether the latter fit shows beside the updates."""

    def leaf_fits(v: Any) -> bool | None:
        if v is None or callable(v):  # classes, too: what they return shows at update
            return None
        if isinstance(v, jax.Array):
            return is_real_array(v)
        if not (is_number(v) or is_real_array(v)):
            return None if is_either(v) else False
        if is_huge(v):
            return None if signed or v > 0 else False
        v = np.asarray(v)
        if positive and np.any(v == 0):
            return False
        return bool(not np.any(np.isnan(v)) and (signed or np.all(v >= 0)) and not (finite and np.any(np.isinf(v))))

    def fits(v: Any) -> bool | None:
        leaves = jax.tree.leaves(v, is_leaf=lambda leaf: leaf is None)
        is_one = len(leaves) == 1 and leaves[0] is v
        if v is None or not leaves or (single and not (is_one and np.ndim(v) == 0)):
            return False
        if is_one and np.ndim(v) == 0:
            return leaf_fits(v)
        return False if False in map(leaf_fits, leaves) else None

    return fits


def whole(least: int, *, none: bool = False) -> Kind:
    def fits(v: Any) -> bool | None:
        if v is None:
            return none
        good = isinstance(v, int | np.integer) and not is_bool(v) and v >= least
        return None if good and is_huge(v) else good

    return fits


def or_none(kind: Kind) -> Kind:
    return lambda v: True if v is None else kind(v)


def one_of(*words: str) -> Kind:
    return lambda v: isinstance(v, str) and v in words


def flag(v: Any) -> bool | None:
    return None if isinstance(v, np.bool_) else isinstance(v, bool)


def order(v: Any) -> bool | None:
    if isinstance(v, np.ndarray) and v.ndim == 0 and (is_real_array(v) or is_either(v)):
        return None if v >= 1 else False
    if not is_number(v):
        return None if v is None or is_either(v) else False
    return None if is_huge(v) and v > 0 else bool(v >= 1)


def record(v: Any) -> bool | None:
    if isinstance(v, np.bool_):
        return None
    good = isinstance(v, int | np.integer) and (is_bool(v) or v >= 0)
    return None if good and is_huge(v) else good


def tree_of(kind: Kind, *, none: bool) -> Kind:
    """A function of a path, or a prefix pytree whose leaves are of a kind, or None."""

    def fits(v: Any) -> bool | None:
        if v is None:
            return none
        if callable(v):
            return None
        leaves = jax.tree.leaves(v)
        if not leaves:
            return None if isinstance(v, list | tuple | dict) else False
        found = [kind(leaf) for leaf in leaves]
        return False if False in found else None

    return fits


def axis(v: Any) -> bool | None:
    if v is None:
        return True
    each = v if isinstance(v, tuple | list) else [v]
    good = bool(each) and all(isinstance(i, int | np.integer) and not is_bool(i) for i in each)
    return None if good or (isinstance(v, tuple | list) and not v) else False


def axes(v: Any) -> bool | None:
    spec = jax.sharding.PartitionSpec
    names = isinstance(v, tuple | list) and v and all(isinstance(name, str) for name in v)
    if v is None or isinstance(v, str | spec):
        return True
    # What is in a dict or list must be PartitionSpecs; without leaves there is nothing to fit.
    leaves = jax.tree.leaves(v, is_leaf=lambda each: isinstance(each, spec))
    return True if names else None if not leaves else all(isinstance(each, spec) for each in leaves)


def floats(v: Any) -> bool | None:
    if v is None:
        return True
    return (isinstance(v, str) and v == "float32") or (None if v is float else False)


def transformation(v: Any) -> bool | None:
    return isinstance(v, optax.GradientTransformation) or None if hasattr(v, "update") else False


def is_a(kind: type) -> Kind:
    return lambda v: isinstance(v, kind)


def function(v: Any) -> bool | None:
    return None if callable(v) else False


def argnums(v: Any) -> bool | None:
    each = v if isinstance(v, tuple | list | range) else [v]
    return None if all(isinstance(i, int | np.integer) and not is_bool(i) for i in each) else False


def tap(v: Any) -> bool | None:
    if isinstance(v, np.ndarray):  # of float64, which jax may have to cut
        return None if v.shape == (2,) and v.dtype.kind == "f" else False
    return True if v is None else is_real_array(v) and v.shape == (2,) and v.dtype.kind == "f"


def norm_in_hand(v: Any) -> bool | None:
    """A real scalar, whose value is not looked at."""
    is_one = is_number(v) or (is_real_array(v) and v.ndim == 0)
    return v is None or (None if is_huge(v) else is_one)


def percentile(v: Any) -> bool | None:
    """In [0, 100]; one below 1 may be taken for a mistake."""
    fits = number(high=100)(v)
    return None if fits and not isinstance(v, jax.Array) and 0 < v < 1 else fits


DECAY, SHARE, POSITIVE = number(high=1, open_high=True), number(high=1), number(open_low=True)
FINITE = number(open_high=True)
BOUND, SINGLE = bound(), bound(single=True)
KINDS: dict[str, Kind] = {
    "absolute": number(),
    "alpha": order,
    "argnums": argnums,
    "axes": axes,
    "axis": axis,
    "bound": number(open_low=True, open_high=True),
    "b1": DECAY,
    "b2": DECAY,
    "batch_argnums": argnums,
    "clip_to": one_of("reciprocal", "mean", "edge"),
    "clipping": BOUND,
    "ddof": lambda v: None if np.ndim(v) == 0 and is_number(v) and v in {0, 1} else False,
    "decay": DECAY,
    "eps": number(),
    "floor": BOUND,
    "fun": function,
    "global_l2_norm_clip": number(),
    "has_aux": flag,
    "history": flag,
    "include": tree_of(flag, none=True),
    "include_current": flag,
    "initial": or_none(FINITE),
    "inner": transformation,
    "known_norm": norm_in_hand,
    "l2_norm_clip": number(),
    "k": bound(finite=True, positive=True),
    "labels": tree_of(is_a(str), none=False),
    "learning_rate": FINITE,
    "loss_threshold": or_none(is_a(oc.Threshold)),
    "max_consecutive": lambda v: None if v is None else whole(0)(v),
    "max_delta": BOUND,
    "max_down": or_none(SHARE),
    "max_logit": POSITIVE,
    "max_norm": BOUND,
    "max_up": or_none(number(1)),
    "max_value": bound(signed=True),
    "microbatch_size": whole(1, none=True),
    "min_limit": BOUND,
    "min_norm": FINITE,
    "min_ratio": or_none(SHARE),
    "min_value": or_none(bound(signed=True)),
    "mix": SHARE,
    "name": lambda v: isinstance(v, str) and v.isidentifier(),
    "norm": is_a(oc.Norm),
    "norms": lambda v: None if is_real_array(v) and v.ndim == 1 and v.dtype.kind not in "iu" else False,
    "num_std": number(),
    "numeric": flag,
    "offset": BOUND,
    "ord": order,
    "patience": whole(1, none=True),
    "per_group": flag,
    "percentile": percentile,
    "period": whole(1, none=True),
    "projections": tree_of(is_a(oc.contrib.Projection), none=False),
    "quantile": SHARE,
    "queries_per_key": lambda v: whole(1)(v) and (True if v == 1 else None),  # it must divide the heads
    "ratio": number(),
    "record": record,
    "reduce": one_of("mean", "sum"),
    "form": one_of("auto", "one_pass", "two_pass"),
    "relative": number(),
    "return_norms": flag,
    "scale": one_of("linear", "log"),
    "since": lambda v: None if isinstance(v, jax.Array) and is_real_array(v) else whole(0)(v),
    "smooth": flag,
    "stacked": tree_of(lambda v: None if v is False else whole(0)(v), none=True),
    "state_dtype": floats,
    "take_in": one_of("clipped", "raw"),
    "target_norm": bound(finite=True),
    "tap": tap,
    "threshold": is_a(oc.Threshold),
    "thresholds": is_a(oc.Threshold),
    "tx": transformation,
    "uniform": flag,
    "units": one_of("io", "oi", "leaf"),
    "warmup_max_norm": or_none(POSITIVE),
    "warmup_steps": whole(0),
    "warmup_take_in": one_of("clipped", "raw"),
    "weights": lambda v: v is None or (None if getattr(v, "shape", ()) == (2,) else False),
    "window": whole(1),
}
# Where a parameter of that name is of another kind.
SPECIAL: dict[str, Kind] = {
    "clip_by_block_rms.threshold": BOUND,
    "clip_by_global_norm.max_norm": SINGLE,
    "smooth_clip_by_global_norm.max_norm": SINGLE,
    "clipped_momentum.max_norm": SINGLE,
    "contrib.arcsinh_clip.scale": BOUND,
    "contrib.centered_clip.max_norm": SINGLE,
    "contrib.mixed_clip.max_norm": SINGLE,
    "zclip.max_norm": or_none(BOUND),
    "clip_by_norm_range.min_norm": bound(finite=True),
    "clip_by_value.max_value": or_none(bound(signed=True)),
    "clip_singular_values.max_value": BOUND,
    "adaptive_grad_clip.eps": BOUND,
    "zclip.num_std": POSITIVE,
    "thresholds.zscore.num_std": POSITIVE,
    "contrib.clip_norm_growth.ratio": POSITIVE,
    "thresholds.growth.ratio": POSITIVE,
    "thresholds.relative_to_params.ratio": BOUND,
    "thresholds.between.min_norm": bound(finite=True),
    "contrib.clip_by_tracked_quantile.initial": number(open_low=True, open_high=True),
    "thresholds.tracked_quantile.initial": number(open_low=True, open_high=True),
    "clip_by_history.warmup_steps": whole(1),
    "zclip.warmup_steps": whole(1),
    "thresholds.mean_std.warmup_steps": whole(1),
    "thresholds.zscore.warmup_steps": whole(1),
    "autoclip.window": whole(1, none=True),
    "thresholds.quantile.window": whole(1, none=True),
    "contrib.qk_clip.alpha": SHARE,
    "contrib.reset_state_every.period": whole(1),
    "clip_by_spectral_norm.units": one_of("io", "oi"),
    "clip_singular_values.units": one_of("io", "oi"),
    "norms.spectral_norm.units": one_of("io", "oi"),
}
# Required arguments, and partners for which every value of the other argument is in order.
GIVEN: dict[str, dict[str, Any]] = {
    "": {
        "max_delta": 1.0, "max_norm": 1.0, "max_value": 1.0, "clipping": 0.1, "min_norm": 0.0, "labels": "a",
        "projections": {"a": oc.contrib.Projection("query", 0), "b": oc.contrib.Projection("key", 0, tail=1)},
        "inner": optax.identity(), "tx": oc.clip(1.0), "target_norm": 1.0, "quantile": 0.5, "ratio": 1.0,
        "norm": norms.leaf_norm(), "relative": 0.1, "k": 2.0, "min_limit": 0.1, "absolute": 0.1, "l2_norm_clip": 1.0,
        "global_l2_norm_clip": 1.0, "grads": jnp.ones((2, 3)), "fun": jnp.vdot, "x": jnp.ones(2), "tree": jnp.ones(2),
        "params": {}, "old_state": (), "name": "grad_norm",
        "opt_state": oc.clip_by_global_norm(1.0, record=True).init(jnp.ones(2)), "threshold": thresholds.constant(1.0),
    },
    "clip_by_block_rms": {"threshold": 1.0},
    "clip_by_value": {"min_value": -math.inf, "max_value": math.inf},
    "clip_by_norm_range": {"max_norm": math.inf},
    "thresholds.between": {"max_norm": math.inf},
    "contrib.aggc.min_ratio": {"ratio": math.inf},
    "thresholds.ema_band.min_ratio": {"ratio": math.inf},
    "clip_by_history.warmup_steps": {"window": 200},
    "clip_by_history.window": {"warmup_steps": 1},
    "thresholds.mean_std.warmup_steps": {"window": 200},
    "thresholds.mean_std.window": {"warmup_steps": 1},
    "contrib.arcsinh_clip": {"scale": 1.0},
    "contrib.qk_clip.projections": {"alpha": 1.0},
    "per_example.track_quantile": {"bound": 1.0, "norms": jnp.ones(2)},
    "per_example.clipped_value_and_grad.argnums": {"batch_argnums": 7},
    "per_example.clipped_value_and_grad.batch_argnums": {"argnums": 7},
}  # fmt: skip
# What a value is may show only beside the updates.
LATE = {"axes", "axis", "include", "labels", "projections", "stacked"}
# What their callers hand to `update`.
TOLD = {
    "skip_spikes": {"value": 1.0},
    "contrib.qk_clip": {"max_logits": jnp.ones(1)},
    "norms.known": dict.fromkeys(("junk", "auto", "mean", "float32", "floaty", "int32", "grad_norm"), 1.0),
}


class Case(NamedTuple):
    name: str
    function: Callable[..., Any]
    parameter: str


@functools.cache
def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def functions() -> dict[str, Callable[..., Any]]:
    modules = {"": (oc, oc.__all__), "thresholds.": (thresholds, thresholds.__all__)}
    modules["contrib."] = (oc.contrib, oc.contrib.__all__)
    modules["norms."] = (norms, [n for n, f in vars(norms).items() if inspect.isfunction(f) and n[0] != "_"])
    modules["per_example."] = (per_example, ["clipped_value_and_grad", "track_quantile"])
    return {
        prefix + name: getattr(module, name)
        for prefix, (module, names) in modules.items()
        for name in names
        if inspect.isfunction(getattr(module, name))
        and getattr(module, name).__module__.startswith("optaxclip")
        and (prefix != "norms." or getattr(module, name).__module__ == norms.__name__)
    }


# Pytrees of anything: what is no array fails as in jax.
DATA = {"grads", "old_state", "opt_state", "params", "tree", "x"}
CASES = [
    Case(name, f, parameter)
    for name, f in functions().items()
    for parameter in parameters_of(f)
    if parameter not in DATA
]


def kind_of(case: Case) -> Kind:
    return SPECIAL.get(f"{case.name}.{case.parameter}") or KINDS[case.parameter]


def call(case: Case, value: Any) -> Any:
    """The function with a value for the parameter, and what it needs besides."""
    parameters = parameters_of(case.function)
    given = GIVEN[""] | GIVEN.get(case.name, {}) | GIVEN.get(f"{case.name}.{case.parameter}", {})
    positional = [n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL]
    special = GIVEN.get(case.name, {}).keys() | GIVEN.get(f"{case.name}.{case.parameter}", {}).keys()
    arguments = {n: given[n] for n, p in parameters.items() if n in given and (p.default is p.empty or n in special)}
    arguments = {n: v for n, v in arguments.items() if n not in positional}
    if case.parameter in positional:
        return case.function(value, **arguments)
    return case.function(**arguments | {case.parameter: value})


UPDATES = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}


def use(case: Case, made: Any) -> None:
    """Traces a step of what was made."""
    if isinstance(made, oc.Norm):
        made = oc.clip_by(made, thresholds.constant(1.0))
    if isinstance(made, oc.Threshold):
        made = oc.clip_by(norms.leaf_norm(), made)
    if isinstance(made, optax.GradientTransformation):

        def step(updates: Any) -> Any:
            extra = TOLD.get(case.name, {})
            return optax.with_extra_args_support(made).update(updates, made.init(updates), updates, **extra)

        jax.eval_shape(step, UPDATES)


def outcome(case: Case, value: Any, is_used: bool) -> str:
    """One of FINE, or what went wrong."""
    stage = "refused"
    try:
        made = call(case, value)
        stage = "refused late"
        if is_used:
            use(case, made)
    except UserWarning as warning:  # as of a dtype that jax cuts
        is_meant = re.search("truncated to dtype|percentile goes from", str(warning))
        return "accepted" if is_meant else f"UserWarning: {warning}"
    except ValueError as error:
        named = re.search(rf"\b({case.parameter}|bound)\b", str(error))
        # Of what is refused beside the updates, a message about these is as good.
        is_fine = named or (stage == "refused late" and case.parameter in LATE)
        return stage if is_fine else f"ValueError, {stage}, does not name it: {error}"
    except Exception as error:  # noqa: BLE001  # which is the finding
        return f"{type(error).__name__}{', late' if stage != 'refused' else ''}: {str(error)[:200]}"
    return "accepted"


FINE = {"accepted", "refused", "refused late"}


def problem(case: Case, expression: str, *, is_used: bool = True) -> str:
    """What is wrong with how a value is met; "" if nothing is."""
    value = value_of(expression)
    wanted, found = kind_of(case)(value), outcome(case, value, is_used)
    shown = f"{case.name}({case.parameter}={expression})"
    if found not in FINE:
        # A function of the user's, called as documented, may raise or return what it likes.
        is_users = wanted is None and callable(value)
        return "" if is_users else f"{shown}: {found}"
    if wanted is True and found != "accepted":
        return f"{shown}: {found}, and must be accepted"
    if wanted is False and found == "accepted" and (is_used or case.parameter not in LATE):
        return f"{shown}: accepted, and must be refused"
    if wanted is False and found == "refused late" and case.parameter not in LATE:
        return f"{shown}: refused only at init or update"
    return ""


def test_every_parameter_has_a_kind():
    missing = {case.parameter for case in CASES} - KINDS.keys()
    assert not missing
    assert len(CASES) > 150


def check(name: str, *, is_used: bool) -> None:
    cases = [case for case in CASES if case.name == name]
    with np.errstate(all="ignore"):
        found = [p for case in cases for each in EXPRESSIONS if (p := problem(case, each, is_used=is_used))]
    assert not found, f"{len(found)} values\n" + "\n".join(found[:20])


@pytest.mark.parametrize("name", functions())
def test_nonsense_is_refused(name):
    check(name, is_used=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", functions())
def test_what_is_not_refused_works(name):
    check(name, is_used=True)
