"""States that come from files: as NumPy arrays, from pickles, and without their types from orbax and msgpack."""

import pickle
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import optaxclip as oc
from tests.support.migrating import numbered

# Names that are also fields of states, to be taken for none.
PARAMS = {"trace": jnp.ones(2), "layer": {"count": jnp.ones(3), "mu": jnp.ones((2, 2)), "nu": jnp.ones(())}}
ADAM = optax.adam(1e-3)


def labels(path_or_tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: "x" if "trace" in str(path) else "y", path_or_tree)


BEFORE = {
    "chain": optax.chain(oc.zclip(), ADAM),
    "record": optax.chain(oc.zclip(record=3), optax.masked(ADAM, {"trace": True, "layer": False})),
    "skip": oc.skip_spikes(
        optax.chain(oc.clip_by_history(window=4, warmup_steps=2), ADAM),
        oc.thresholds.zscore(),
        loss_threshold=oc.thresholds.zscore(),
    ),
    "partition": optax.partition(
        {"x": optax.sgd(0.1, momentum=0.9), "y": optax.chain(oc.autoclip(window=3), ADAM)}, labels
    ),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1.0, 0.0, 10)),
    "accumulation": optax.MultiSteps(optax.chain(oc.clip_by_global_norm(optax.linear_schedule(1.0, 0.0, 9)), ADAM), 2),
    "many": optax.chain(*(oc.contrib.clip_norm_growth() for _ in range(11)), ADAM),
    "nothing": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
}


def by_orbax(state, folder):
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")  # orbax says that it does not know the shardings
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state")


FORMS = {
    "NumPy": lambda state, _: jax.device_get(state),
    "Python numbers": lambda state, _: jax.tree.map(lambda leaf: leaf.item() if leaf.ndim == 0 else leaf, state),
    "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
    "msgpack": lambda state, _: serialization.msgpack_restore(serialization.to_bytes(state)),
    "orbax": by_orbax,
}


@pytest.fixture(scope="module")
def states():
    return {name: numbered(tx.init(PARAMS)) for name, tx in BEFORE.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_state_from_a_file_is_worth_as_much_as_a_live_one(states, form, tmp_path):
    """All of them in one file."""
    restored = FORMS[form](states, tmp_path)
    for name, old in BEFORE.items():
        for tx in (old, oc.skip_nonfinite(old)):
            live, from_file = (oc.migrate(tx, PARAMS, both[name]) for both in (states, restored))
            assert from_file.report == live.report, name
            chex.assert_trees_all_equal(from_file.state, live.state, custom_message=name)
            chex.assert_trees_all_equal_dtypes(from_file.state, live.state, custom_message=name)
            assert not any(leaf.weak_type for leaf in jax.tree.leaves(from_file.state)), name
        chex.assert_trees_all_equal(oc.migrate(old, PARAMS, restored[name]).state, states[name], custom_message=name)


def test_a_window_in_a_checkpoint_changes_its_length(tmp_path):
    old, new = (oc.clip_by_history(window=window, warmup_steps=1, take_in="raw") for window in (4, 2))
    update, state = jax.jit(old.update), old.init(jnp.zeros(1))
    for norm in np.float32([1, 2, 3]):
        _, state = update(norm[None], state)
    state, report = oc.migrate(new, jnp.zeros(1), by_orbax(state, tmp_path))
    np.testing.assert_array_equal(state.window_norms, [[3.0, 2.0]])  # the third norm is in the first place
    assert report.kept["window_norms"] == "4 norms, now 2"


def test_what_is_dropped_from_a_checkpoint_has_no_type_and_is_said_all_the_same():
    restored = FORMS["msgpack"](BEFORE["chain"].init(PARAMS), None)
    with pytest.warns(UserWarning, match="per parameter"):
        _, report = oc.migrate(optax.sgd(0.1), PARAMS, restored)
    assert report.dropped == {"0": "", "1": ""}


def test_boxes_that_a_checkpoint_made_dicts_of():
    tx = optax.chain(oc.zclip(), ADAM)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = numbered(tx.init(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    boxed = jax.tree.map(lambda leaf: {"value": leaf}, serialization.to_state_dict(state))
    after, report = oc.migrate(tx, nnx.state(model, nnx.Param), boxed)
    assert (report.new, report.dropped) == ({}, {})
    chex.assert_trees_all_equal(jax.tree.leaves(after), jax.tree.leaves(state))
