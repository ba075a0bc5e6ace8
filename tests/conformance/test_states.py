"""States that come from elsewhere: from another transformation, a checkpoint, a pickle, a ring of another length."""

import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optaxclip as oc
from optaxclip import contrib
from tests.reference.trees import assert_same_bits
from tests.table import ROWS, halving, params, tree

PARAMS, GRADS = params("float32"), tree(0, "float32")
STATEFUL = [pytest.param(row, id=row.name) for row in ROWS if not row.stateless]


# Of another transformation, or of other arguments.

WHAT_TO_DO = re.escape("optaxclip.migrate(tx, params, old_state)")
FOREIGN = {
    "None": None,
    "EmptyState": optax.EmptyState(),
    "ScaleByAdamState": optax.adam(1e-3).init(PARAMS)[0],
    # A chain of two names the first of them that does not fit.
    "((a tuple of 2: )?ScaleByAdamState|EmptyState)": optax.adam(1e-3).init(PARAMS),
}


@pytest.mark.parametrize("came", FOREIGN)
@pytest.mark.parametrize("row", STATEFUL)
def test_the_state_of_another_transformation_is_named_and_so_is_what_to_do(row, came):
    with pytest.raises(ValueError, match=rf"the state of .+ must be .+, got {came}.*{WHAT_TO_DO}"):
        jax.eval_shape(row.make().update, GRADS, FOREIGN[came], PARAMS)


def updates():
    return {"a": jnp.ones(2), "b": jnp.ones(3)}


STRAY = {
    "a schedule after a constant": (
        oc.clip_by_global_norm(lambda count: 1.0),
        optax.EmptyState,
        "a bound that follows a schedule must be ScheduleState, got EmptyState",
    ),
    "one of a chain": (
        oc.zclip(max_norm=1.0),
        lambda: oc.zclip(max_norm=None).init(updates()),
        "thresholds.chain must be a tuple of 2 states, got ZScoreState",
    ),
    "of another tree": (
        contrib.percentile_clip(),
        lambda: contrib.percentile_clip().init({"a": jnp.ones(2)}),
        r"\(2, 100\).*\(1, 100\).*parameter tree",
    ),
    "of another window": (
        oc.clip_by_history(window=128),
        lambda: oc.clip_by_history(window=64).init(updates()),
        r"\(1, 128\).*\(1, 64\).*change of arguments",
    ),
    "without the record": (
        oc.clip_by_global_norm(1.0, record=3),
        optax.EmptyState,
        "built with record=3 must be the threshold's state with a record of 3 steps, got EmptyState",
    ),
    "with a record": (
        oc.clip_by_global_norm(1.0),
        lambda: oc.clip_by_global_norm(1.0, record=2).init(updates()),
        "built with record=0 must be the threshold's state without a record, got one with a record of 2 steps",
    ),
    "with a record of another tree": (
        oc.clip_by_leaf_norm(1.0, record=2),
        lambda: oc.clip_by_leaf_norm(1.0, record=2).init({"a": jnp.ones(2)}),
        "the record has 1 groups, but the updates have 2",
    ),
}


@pytest.mark.parametrize("case", STRAY)
def test_a_state_of_other_arguments_is_refused(case):
    tx, state, message = STRAY[case]
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.update)(updates(), state())


# NumPy's arrays and Python's numbers.


def as_python_numbers(state):
    return jax.tree.map(lambda leaf: leaf.item() if leaf.ndim == 0 else leaf, jax.device_get(state))


BRINGS = {"jax": lambda state: state, "numpy": jax.device_get, "python": as_python_numbers}


def types(tree):
    """The structure, and of each leaf all that a trace sees of it."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


@pytest.mark.parametrize("row", STATEFUL)
def test_states_of_plain_numbers_make_the_same_types(row):
    tx = row.make()
    state = tx.init(PARAMS)

    def after(state):
        """A constant to the trace, as it is outside of jit."""
        return types(jax.eval_shape(lambda grads: tx.update(grads, state, PARAMS), GRADS))

    wanted = after(state)
    assert after(BRINGS["numpy"](state)) == wanted
    assert after(BRINGS["python"](state)) == wanted
    assert types(pickle.loads(pickle.dumps(state))) == types(state)


@pytest.mark.parametrize(
    "tx",
    [
        oc.zclip(warmup_steps=1, record=2),
        oc.skip_spikes(oc.clip_by_leaf_norm(0.5, record=2), oc.thresholds.mean_std(6.0)),
        contrib.reset_state_every(oc.clip_by_global_norm(0.5, record=2), 2, warmup_steps=0),
    ],
    ids=["zclip", "skip_spikes", "reset_state_every"],
)
def test_states_of_plain_numbers_go_on_as_jax_arrays_do(tx):
    """As constants to the program, which the library sees as they are; as it does outside of jit."""
    grads = {"w": np.array([3.0, 4.0], np.float32)}
    states = dict.fromkeys(BRINGS, tx.init(grads))
    for _ in range(2):
        given = {kind: bring(states[kind]) for kind, bring in BRINGS.items()}
        after = jax.jit(lambda given=given: {kind: tx.update(grads, state, grads) for kind, state in given.items()})()
        states = {kind: state for kind, (_, state) in after.items()}
        for kind in BRINGS:
            chex.assert_trees_all_close(after[kind], after["jax"], rtol=1e-6)
            chex.assert_trees_all_equal_dtypes(after[kind], after["jax"])
    for bring in BRINGS.values():
        assert oc.clip_stats(bring(states["jax"])) == oc.clip_stats(states["jax"])


def test_a_count_of_python_goes_on_as_one_of_jax_does_eagerly():
    tx = oc.clip_by_global_norm(halving)
    grads = {"w": np.array([3.0, 4.0], np.float32)}
    ours = plain = tx.init(grads)
    for _ in range(2):
        (one, ours), (other, plain) = tx.update(grads, ours), tx.update(grads, as_python_numbers(plain))
        assert_same_bits((other, plain), (one, ours))


def test_counts_of_python_have_32_bits_where_there_are_64():
    tx = oc.skip_nonfinite(optax.identity())
    with jax.enable_x64(True):
        grads = {"w": np.ones(2, np.float32)}
        state = tx.init(grads)
        plain = as_python_numbers(state)  # a constant to the trace, as it is outside of jit
        after = jax.eval_shape(lambda grads: tx.update(grads, plain, grads)[1], grads)
    chex.assert_trees_all_equal_dtypes(after, state)


# A ring that was restored into one of another length.


def restored(template, saved, folder):
    """A checkpoint in arrays of other lengths: orbax cuts and pads with zeros where it is not strict."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, saved)
        return checkpointer.restore(
            folder,
            item=template,
            restore_args=jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(
                    sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
                ),
                template,
            ),
        )


@functools.cache
def recorder(length):
    """A clip with a ring of that length, and its step as a function of its state and a norm."""
    tx = oc.clip_by_global_norm(1e6, record=length)
    return tx, jax.jit(lambda state, norm: tx.update(norm[None], state)[1])


@pytest.mark.parametrize(("before", "after"), [(40, 10), (10, 40), (40, 7)])
def test_a_ring_of_another_length_keeps_the_numbers_of_its_steps(before, after, tmp_path):
    def run(length, state, steps):
        for step in steps:
            state = recorder(length)[1](state, np.float32(step))
        return state

    start = {length: recorder(length)[0].init(np.zeros(1, np.float32)) for length in (before, after)}
    saved = run(before, start[before], range(1, 54))
    state = restored(start[after], saved, tmp_path / "state")

    def assert_true(state, now):
        found = oc.clip_stats(state, history=True)
        np.testing.assert_array_equal(found["clip_steps"], found["clip_norm"])  # the norm of step n was n
        assert oc.clip_stats(state)["clip_steps"] == now
        assert set(found["clip_steps"]) <= set(range(now - after + 1, now + 1))
        return found["clip_steps"].tolist()

    assert_true(state, 53)
    state = run(after, state, range(54, 57))
    assert assert_true(state, 56)[-3:] == [54, 55, 56]
    assert oc.clip_stats(state)["clip_norm"] == 56.0
    state = run(after, state, range(57, 57 + after))
    assert assert_true(state, 56 + after) == list(range(57, 57 + after))


PER_PARAMETER = {
    "clipped_momentum": oc.clipped_momentum(1.0),
    "mixed_clip": contrib.mixed_clip(1.0),
    "centered_clip": contrib.centered_clip(1.0),
    "spam_clip": contrib.spam_clip(),
    "scale_by_acclip": contrib.scale_by_acclip(),
    "scale_by_stable_adam": contrib.scale_by_stable_adam(),
    "with_carry": oc.with_carry(oc.clip(1.0)),
}
OTHER_TREES = {
    "of a shape that broadcasts": (
        {"a": jnp.ones((2, 1)), "b": jnp.ones(3)},
        r"of shape \(2,\) at 'a', got shape \(2, 1\)",
    ),
    "of another shape": ({"a": jnp.ones(4), "b": jnp.ones(3)}, r"of shape \(2,\) at 'a', got shape \(4,\)"),
    "of fewer leaves": ({"a": jnp.ones(2)}, "with arrays at 'a', 'b', got 'a'"),
}


@pytest.mark.parametrize("case", OTHER_TREES)
@pytest.mark.parametrize("name", PER_PARAMETER)
def test_a_state_per_parameter_of_another_tree_is_refused(name, case):
    """One that broadcasts would make updates of another shape."""
    other, message = OTHER_TREES[case]
    tx = PER_PARAMETER[name]
    with pytest.raises(
        ValueError,
        match=rf"keeps an array per parameter must be .*{message}.*{WHAT_TO_DO}",
    ):
        tx.update(updates(), tx.init(other))
