"""Under `jax_debug_infs` an infinity in any intermediate result is an error: there is none on ordinary gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

import optaxclip as oc
from optaxclip import thresholds
from tests.conformance.rows import takes_record
from tests.support.driving import together
from tests.table import ROWS, params, tree

THRESHOLDS = {
    "constant": lambda: thresholds.constant(1.0),
    "between": lambda: thresholds.between(0.1, 1.0),
    "exactly": lambda: thresholds.exactly(1.0),
    "smooth": lambda: thresholds.smooth(1.0),
    "smooth, without a bound": lambda: thresholds.smooth(np.inf),
    "relative_to_params": lambda: thresholds.relative_to_params(0.1, floor=1e-3),
    "chain": lambda: thresholds.chain(thresholds.zscore(warmup_steps=2), thresholds.constant(np.inf)),
    "quantile": lambda: thresholds.quantile(0.1),
    "quantile, 1": lambda: thresholds.quantile(1.0),
    "quantile of a window": lambda: thresholds.quantile(0.1, window=4),
    "order_statistic": lambda: thresholds.order_statistic(5, window=4),
    "tracked_quantile": lambda: thresholds.tracked_quantile(0.5),
    "zscore": lambda: thresholds.zscore(warmup_steps=2),
    "zscore, log": lambda: thresholds.zscore(warmup_steps=2, scale="log"),
    "mean_std": lambda: thresholds.mean_std(window=4, warmup_steps=2),
    "mean_std, log": lambda: thresholds.mean_std(window=4, warmup_steps=2, scale="log"),
    "ema_ratio": lambda: thresholds.ema_ratio(warmup_steps=2, warmup_max_norm=1.0),
    "ema_band": lambda: thresholds.ema_band(2.0, min_ratio=0.5),
    "ema_band from 0": lambda: thresholds.ema_band(2.0, initial=0.0, max_down=0.9),
    "average": lambda: thresholds.average(0.9),
    "average, decay 0": lambda: thresholds.average(0.0),
    "growth": thresholds.growth,
    "normalised": thresholds.normalised,
    "normalised, decay 0": lambda: thresholds.normalised(0.0, 0.0, eps=0.0),
}


@pytest.fixture
def infinities_are_errors():
    jax.config.update("jax_debug_infs", True)
    yield
    jax.config.update("jax_debug_infs", False)


def run_and_record(jaxpr, consts, given, seen):
    """What a jaxpr returns. What each of its operations gave joins `seen`."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        if eqn.primitive.name == "custom_jvp_call":
            results = run_and_record(eqn.params["call_jaxpr"].jaxpr, eqn.params["call_jaxpr"].consts, inputs, seen)
        else:
            results = eqn.primitive.bind(*inputs, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
            seen += results
        values.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def with_every_result(fun):
    """The function, which also returns what each operation gave: jax looks at these where nothing is jitted.

    As there, it is the results alone of what is jitted in the library. Jitted, all of this is one program; eagerly,
    each operation is one.
    """

    def run(*args):
        jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        seen = []
        returned = run_and_record(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(args), seen)
        return jax.tree.unflatten(jax.tree.structure(shapes), returned), seen

    return run


def all_finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def assert_no_infinity(seen, name):
    assert not any(np.any(np.isinf(x)) for x in seen if jnp.issubdtype(x.dtype, jnp.inexact)), name


def test_no_threshold_makes_one():
    """In no operation, on norms of several sizes in turn, of two groups."""
    made = {name: make() for name, make in THRESHOLDS.items()}

    def limit(name):
        def step(norms, state):
            (_, upper), state = made[name].limit(norms, state, lambda: norms)
            return upper, state

        return with_every_result(step)

    @jax.jit
    def step(norms, states):
        return {name: limit(name)(norms, states[name]) for name in made}

    states = {name: threshold.init([np.float32(1)] * 2) for name, threshold in made.items()}
    assert all_finite(states)
    for size in np.float32([1.0, 2.0, 0.0, 3.0, 1e30, 1e-30]):
        found = jax.device_get(step([size, 2 * size], states))
        for name, ((upper, states[name]), seen) in found.items():
            assert all_finite((upper, states[name])), name
            assert_no_infinity(seen, name)


# One of each kind.
IN_EVERY_OPERATION = (
    "clip_by_value",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "adaptive_grad_clip",
    "clip_by_spectral_norm",
    "zclip",
    "skip_nonfinite",
    "skip_spikes",
    "with_carry",
)
# Another norm, bound or window of a row that is there: of no other dtype, and in no other place of the record.
VARIANTS = {
    "clip_by_global_norm-p1",
    "clip_by_global_norm-scheduled",
    "adaptive_grad_clip-oi",
    "adaptive_grad_clip-leaf-scheduled",
    "adaptive_grad_clip-scheduled-recorded",
    "clip_by_leaf_norm-stacked",
    "zclip-scheduled-recorded",
    "clip_by_global_norm-recorded",  # all of them have a record here
}
BY_NAME = {row.name: row for row in ROWS}
WEIGHTS = params("float32")


def recorded(row):
    """The transformation of a row, with a record if it can have one."""
    return row.factory(*row.args, **{**row.kwargs, **({"record": 3} if takes_record(row) else {})})


@pytest.mark.usefixtures("infinities_are_errors")
@pytest.mark.parametrize("part", range(2))
def test_no_transformation_makes_one_under_jit(part):
    """Half of those with a record in one program: one for each row takes twice the time.

    The others are in `tests/conformance/test_several_steps.py`: of what is jitted jax checks the results alone.
    """
    rows = [row for row in ROWS if takes_record(row) and row.name not in VARIANTS]
    tx = together({row.name: recorded(row) for row in rows[part::2]})
    step, state = jax.jit(tx.update), jax.jit(tx.init)(WEIGHTS)
    for seed, scale in enumerate((1.0, 2.0, 0.0, 3.0, 1e-3)):
        updates, state = step(tree(seed, "float32", scale), state, WEIGHTS)
        assert all_finite((updates, state))


def test_no_transformation_makes_one_in_any_operation():
    made = {name: recorded(BY_NAME[name]) for name in IN_EVERY_OPERATION}
    steps = {name: with_every_result(tx.update) for name, tx in made.items()}

    @jax.jit
    def step(updates, states):
        return {name: steps[name](updates, states[name], WEIGHTS) for name in made}

    states = jax.jit(lambda: {name: tx.init(WEIGHTS) for name, tx in made.items()})()
    assert all_finite(states)
    for seed, scale in enumerate((1.0, 0.0)):
        found = jax.device_get(step(tree(seed, "float32", scale), states))
        for name, ((updates, states[name]), seen) in found.items():
            assert all_finite((updates, states[name])), name
            assert_no_infinity(seen, name)


@pytest.mark.usefixtures("infinities_are_errors")
def test_no_value_clip_makes_one_within_what_is_jitted():
    """Of what is jitted jax checks the results alone."""
    tx, grads = oc.clip(1.0), jnp.array([0.5, -3.0, 3.0])
    with jax.disable_jit():
        updates, _ = tx.update(grads, tx.init(None))
    assert updates.tolist() == [0.5, -1.0, 1.0]
    one_end, _ = oc.clip_by_value(max_value=1.0).update(grads, tx.init(None))
    assert one_end.tolist() == [0.5, -3.0, 1.0]
