"""Under `jax_debug_infs` an infinity in any intermediate result is an error: there is none on ordinary gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def limits(makes, ones, transform=lambda step: step):
    """Norms of several sizes, one after another, for each of these thresholds; `ones` are norms of 1."""
    made = {name: make() for name, make in makes.items()}

    def step(norms, states):
        found = {name: threshold.limit(norms, states[name], lambda: norms) for name, threshold in made.items()}
        return {name: upper for name, ((_, upper), _) in found.items()}, {name: one for name, (_, one) in found.items()}

    step = transform(step)
    states = {name: threshold.init(ones) for name, threshold in made.items()}
    for size in np.float32([1.0, 2.0, 0.0, 3.0, 1e30, 1e-30]):
        norms = jax.tree.unflatten(jax.tree.structure(ones), [jnp.asarray(size), jnp.asarray(2 * size)][: len(ones)])
        uppers, states = step(norms, states)
        for name in made:
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((uppers[name], states[name]))), name


@pytest.mark.usefixtures("infinities_are_errors")
@pytest.mark.parametrize("name", THRESHOLDS)
def test_no_threshold_makes_one_eagerly(name):
    """Of one group: most operations are those of `test_no_transformation_makes_one_eagerly`, compiled once for both."""
    limits({name: THRESHOLDS[name]}, [jnp.float32(1)])


@pytest.mark.usefixtures("infinities_are_errors")
def test_no_threshold_makes_one_under_jit():
    limits(THRESHOLDS, [jnp.float32(1)] * 2, jax.jit)


# One of each kind: eagerly every operation is a program of its own, and is checked.
EAGERLY = (
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
BY_NAME = {row.name: row for row in ROWS}


def recorded(row):
    """The transformation of a row, with a record if it can have one."""
    return row.factory(*row.args, **{**row.kwargs, **({"record": 3} if takes_record(row) else {})})


WEIGHTS = params("float32")


def steps(update, state, scales):
    for seed, scale in enumerate(scales):
        updates, state = update(tree(seed, "float32", scale), state, WEIGHTS)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.usefixtures("infinities_are_errors")
@pytest.mark.parametrize("part", range(2))
def test_no_transformation_makes_one_under_jit(part):
    """Half of those with a record in one program: one for each row takes twice the time.

    The others are in `tests/conformance/test_several_steps.py`: of what is jitted jax checks the results alone.
    """
    # A record is given to all of them, so that the row which is another with a record is there already.
    rows = [row for row in ROWS if takes_record(row) and row.name != "clip_by_global_norm-recorded"]
    tx = together({row.name: recorded(row) for row in rows[part::2]})
    steps(jax.jit(tx.update), jax.jit(tx.init)(WEIGHTS), (1.0, 2.0, 0.0, 3.0, 1e-3))


@pytest.mark.usefixtures("infinities_are_errors")
@pytest.mark.parametrize("name", EAGERLY)
def test_no_transformation_makes_one_eagerly(name):
    tx = recorded(BY_NAME[name])
    steps(tx.update, tx.init(WEIGHTS), (1.0, 0.0))


@pytest.mark.usefixtures("infinities_are_errors")
def test_no_value_clip_makes_one_within_what_is_jitted():
    """Of what is jitted jax checks the results alone."""
    tx, grads = oc.clip(1.0), jnp.array([0.5, -3.0, 3.0])
    with jax.disable_jit():
        updates, _ = tx.update(grads, tx.init(None))
    assert updates.tolist() == [0.5, -1.0, 1.0]
    one_end, _ = oc.clip_by_value(max_value=1.0).update(grads, tx.init(None))
    assert one_end.tolist() == [0.5, -3.0, 1.0]
