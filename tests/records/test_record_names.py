"""The names in a record: static, through everything that a state goes through, and learnt again where they are lost."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optaxclip
from optaxclip import clip_by, clip_stats, norms, thresholds
from optaxclip.records.names import Names
from tests.support.imports import imported

serialization, nnx = imported("flax.serialization"), imported("flax.nnx")

PARAMS = {"body": {"w": np.ones((2, 2), np.float32), "n": np.arange(3, dtype=np.int32)}, "head": np.ones(3, np.float32)}
BAD = PARAMS | {"head": np.float32([1.0, np.nan, 1.0])}
LEAVES = ("body/w", "head")
TX = optax.chain(optaxclip.clip_by_leaf_norm(1.0, record=4), optax.scale(-1.0))


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda bad: TX.update(bad, TX.init(PARAMS), PARAMS)[1])(BAD)


def names_in(state):
    return state[0].clip_stats.names


def on_the_host(state):
    return jax.tree.map(np.asarray, state)


def with_orbax(state, folder, *template):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", *template)


def test_they_are_no_arrays(state):
    assert names_in(state).leaves == LEAVES
    assert not jax.tree.leaves(names_in(state))
    shapes = [jax.eval_shape(TX.init, jax.tree.map(lambda x, n=n: np.ones((n, *x.shape)), PARAMS)) for n in (1, 2)]
    assert [x.shape for x in jax.tree.leaves(shapes[0])] == [x.shape for x in jax.tree.leaves(shapes[1])]
    assert repr(names_in(state)) == f"Names(groups={LEAVES}, leaves={LEAVES})"


@pytest.mark.parametrize(
    "trip",
    [
        on_the_host,
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),
        jax.jit(lambda state: state),
        lambda state: jax.lax.scan(lambda carry, _: (TX.update(PARAMS, carry)[1], None), state, None, length=2)[0],
        lambda state: jax.tree.map(lambda x: np.asarray(x)[1], jax.vmap(lambda _: state)(np.arange(2))),
    ],
    ids=["host", "deepcopy", "pickle", "jit", "scan", "vmap"],
)
def test_they_stay(state, trip):
    after = trip(state)
    assert (names_in(after).groups, names_in(after).leaves) == (names_in(state).groups, LEAVES)
    assert clip_stats(after)["first_nonfinite_leaf"] == "head"


@pytest.mark.parametrize(
    "template", [lambda state: state, lambda _: jax.eval_shape(TX.init, PARAMS)], ids=["of arrays", "of shapes"]
)
def test_a_checkpoint_with_a_template_has_them(state, tmp_path, template):
    after = with_orbax(state, tmp_path, template(state))
    assert clip_stats(after, per_group=True) == pytest.approx(clip_stats(state, per_group=True), nan_ok=True)


@pytest.mark.parametrize("how", ["orbax", "msgpack", "msgpack with a template", "nnx"])
def test_without_a_template_numbers_stand_for_them(state, tmp_path, how):
    if how == "orbax":
        after = with_orbax(state, tmp_path)
    elif how == "msgpack":
        after = serialization.msgpack_restore(serialization.to_bytes(state))
    elif how == "nnx":
        after = jax.tree.map(lambda leaf: {"value": leaf}, with_orbax(state, tmp_path))
    else:
        after = serialization.from_bytes(state, serialization.to_bytes(state))
    found, expected = clip_stats(after, per_group=True), clip_stats(state, per_group=True)
    assert (found.pop("first_nonfinite_leaf"), expected.pop("first_nonfinite_leaf")) == ("#1", "head")
    reports = found.pop("first_nonfinite_report"), expected.pop("first_nonfinite_report")
    assert reports == ("1 of the leaves: #1", "1 of 2 leaves: head")
    numbered = {name.replace("body/w", "#0").replace("head", "#1"): value for name, value in expected.items()}
    assert found == pytest.approx(numbered, nan_ok=True)


def test_the_next_step_learns_them_again_without_another_trace(state):
    lost = serialization.from_bytes(state, serialization.to_bytes(state))
    assert names_in(lost).groups is None

    @jax.jit
    def steps(state):
        return jax.lax.scan(lambda carry, _: (TX.update(PARAMS, carry)[1], None), state, None, length=2)[0]

    after = steps(jax.tree.map(jnp.asarray, lost))
    assert names_in(after).leaves == LEAVES
    assert clip_stats(steps(after))["first_nonfinite_leaf"] == "head"
    assert steps._cache_size() == 1


def test_names_that_are_known_are_told_apart():
    one, other, unknown = Names(("",), ("a",)), Names(("",), ("b",)), Names()
    assert (one != other, one == unknown, unknown == other, one == ()) == (True, True, True, False)
    traced = []
    identity = jax.jit(lambda tree: traced.append(1) or jax.tree.map(lambda x: x, tree))
    assert [identity((names, 1.0))[0].leaves for names in (one, other, one)] == [("a",), ("b",), ("a",)]
    assert len(traced) == 2


def test_partition_specs_of_a_recorded_state():
    specs = jax.tree.map(lambda leaf: f"spec of {leaf.shape}", PARAMS)
    by_label = clip_by(norms.group_norm({"body": "x", "head": "y"}), thresholds.constant(1.0), record=3)
    for tx in (TX, optax.chain(by_label, optax.adam(1e-3))):
        state = tx.init(PARAMS)
        found = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None)
        assert names_in(found).leaves in (LEAVES, ())
    assert found[1][0].mu["head"] == "spec of (3,)"


def test_flax_nnx_has_them_inside_its_jit():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(optaxclip.clip_by_leaf_norm(1.0, record=True), optax.adam(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2))(model)
        optimizer.update(model, grads)
        return clip_stats(optimizer.opt_state, per_group=True)

    traced = step(model, optimizer)
    assert {"clip_norm/kernel", "clip_norm/bias"} <= set(traced)
    for view in (optimizer.opt_state, nnx.state(optimizer), nnx.to_pure_dict(nnx.state(optimizer))):
        found = clip_stats(view)
        assert found["clip_norm"] == pytest.approx(float(traced["clip_norm"]))
