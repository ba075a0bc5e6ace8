"""`migrate` between every pair of methods, records and wrappings: what has a place is kept, nothing else differs."""

import contextlib
import inspect
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests.support.driving import together
from tests.support.migrating import assert_reported, numbered
from tests.table import ROWS

ONES = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}
PARAMS = jax.tree.map(jnp.asarray, {"dense": ONES, "scale": np.float32(1)})
WRAPPINGS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.adam(1e-3)),
    "skip": lambda tx: oc.skip_nonfinite(optax.chain(tx, optax.adam(1e-3))),
}
BY_NAME = [pytest.param(row, id=row.name) for row in ROWS]


def records_of(row):
    """The lengths of records that a row is built with; its own arguments where it takes no record."""
    takes = row.public == "clip_by" or "record" in inspect.signature(row.factory).parameters
    return (0, 10, 100) if takes and row.factory.__name__ != "<lambda>" else (None,)


def make(row, record, wrapping="bare"):
    return WRAPPINGS[wrapping](row.factory(*row.args, **row.kwargs | ({} if record is None else {"record": record})))


@contextlib.contextmanager
def optimizers_may_be_dropped():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the new transformation has no place")
        yield


# What a wrapping adds, by the type or field in the report.
ADDED = {
    "bare": set(),
    "chain": {"ScaleByAdamState"},
    "skip": {"ScaleByAdamState", "SkipState", "SkipStats", "spikes_in_row"},
}


def words_of(entries):
    """The type of each part in a list of the report, or its last key."""
    return {note.split(",")[0] if note else path.rsplit("/", 1)[-1] for path, note in entries.items()}


# Of all pairs of a row three, of its neighbour others: what goes wrong with a pair goes wrong with many rows.
@pytest.mark.parametrize("row", BY_NAME)
def test_a_method_keeps_its_state_under_every_record_and_wrapping(row):
    pairs = list(itertools.product(itertools.product(records_of(row), WRAPPINGS), repeat=2))
    stride = len(pairs) // 3
    pairs = pairs[ROWS.index(row) % stride :: stride]
    assert any(old != new for old, new in pairs)
    variants = {variant for pair in pairs for variant in pair}
    built = {variant: make(row, *variant) for variant in variants}
    initial = {variant: tx.init(PARAMS) for variant, tx in built.items()}
    states = {variant: numbered(state) for variant, state in initial.items()}
    for old, new in pairs:
        with optimizers_may_be_dropped():
            state, report = oc.migrate(built[new], PARAMS, states[old])
        assert_reported(initial[new], states[old], state, report)
        added = ADDED[new[1]] - ADDED[old[1]]
        added |= {"ClipStats"} if new[0] and not old[0] else set()
        assert words_of(report.new) <= added, report
        if old == new:
            chex.assert_trees_all_equal(state, states[old])


def test_every_method_goes_into_every_other():
    built = {row.name: make(row, None, "chain") for row in ROWS}
    initial = {name: tx.init(PARAMS) for name, tx in built.items()}
    of_its_kind = {str(jax.tree.structure(state)): name for name, state in initial.items()}  # one each
    initial = {name: initial[name] for name in of_its_kind.values()}
    states = {name: numbered(state) for name, state in initial.items()}
    for i, pair in enumerate(itertools.combinations(initial, 2)):
        old, new = pair[:: 1 if i % 2 else -1]  # each two in one direction
        with optimizers_may_be_dropped():
            state, report = oc.migrate(built[new], PARAMS, states[old])
        assert_reported(initial[new], states[old], state, report)
        assert report.kept["1/0"] == "ScaleByAdamState", (old, new)


GRADS = [{"dense": {name: x * ones for name, ones in ONES.items()}, "scale": 2 * x} for x in (0.5, 0.3, 4.0)]


# Of each kind of statistics one; more would take minutes to compile.
GOING_ON = {"zclip", "autoclip-window", "clip_by_history", "spam_clip", "with_carry"}


def test_the_next_update_is_that_of_a_run_that_was_always_so():
    rows = [row for row in ROWS if row.name in GOING_ON]
    new = {row.name: make(row, records_of(row)[-1], "skip") for row in rows}
    old_ones, new_ones = together({row.name: make(row, None, "chain") for row in rows}), together(new)
    step_of_old, step = jax.jit(old_ones.update), jax.jit(new_ones.update)
    old_states, always = old_ones.init(PARAMS), new_ones.init(PARAMS)
    for grads in GRADS[:-1]:
        _, old_states = step_of_old(grads, old_states, PARAMS)
        _, always = step(grads, always, PARAMS)
    states = {name: oc.migrate(tx, PARAMS, old_states[name]).state for name, tx in new.items()}
    (found, after), (expected, _) = step(GRADS[-1], states, PARAMS), step(GRADS[-1], always, PARAMS)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert len(after) == len(GOING_ON)
    for name, state in after.items():
        assert oc.clip_stats(state)["skip_steps"] == 1, name
