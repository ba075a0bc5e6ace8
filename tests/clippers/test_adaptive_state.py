"""Where histories live: in scans and jitted steps, inside other transformations, in checkpoints, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import clip_by, contrib, norms, thresholds
from tests.reference import adaptive, sequences, trees
from tests.support import published
from tests.support.driving import together

pytestmark = pytest.mark.slow

SHAPES = {"both": (8, 4), "rows": (8,), "whole": (3,)}
SPECS = {"both": P("data", "model"), "rows": P("data"), "whole": P()}
LABELS = {"both": "kernel", "rows": "vector", "whole": "vector"}

METHODS = {
    "autoclip": lambda axes: oc.autoclip(50, axes=axes),
    "autoclip per leaf": lambda axes: oc.autoclip(50, window=5, norm=norms.leaf_norm(), axes=axes),
    "percentile_clip": lambda axes: contrib.percentile_clip(25, window=4, axes=axes),
    "zclip": lambda axes: oc.zclip(warmup_steps=3, max_norm=lambda step: 9.0 / (1 + step), axes=axes),
    "zclip per group": lambda axes: oc.zclip(warmup_steps=3, norm=norms.group_norm(LABELS), axes=axes),
    "adagc": lambda axes: oc.adagc(warmup_steps=3, axes=axes),
    "aggc": lambda axes: contrib.aggc(LABELS, 1.1, min_ratio=0.9, axes=axes),
    "clip_by_history": lambda axes: oc.clip_by_history(1.0, window=4, warmup_steps=2, axes=axes),
    "clip_by_tracked_quantile": lambda axes: contrib.clip_by_tracked_quantile(axes=axes),
    "clip_norm_growth": lambda axes: contrib.clip_norm_growth(axes=axes),
    "a record of units": lambda axes: clip_by(
        norms.unit_norm("io"), thresholds.growth(1.1), axes=None if axes is None else "auto", record=2
    ),
}


def gradients(rng, steps=8):
    """Steps of gradients of very different norms; leaf "rows" is not finite in the fourth, and "whole" is 0 in it."""
    sizes = rng.lognormal(size=steps)
    sequence = [
        {name: jnp.asarray(size * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        for size in sizes
    ]
    sequence[3] = {**sequence[3], "rows": sequence[3]["rows"].at[5].set(jnp.nan), "whole": jnp.zeros(3)}
    return sequence


def all_of(names, axes="auto"):
    """Several methods at once."""
    return together({name: METHODS[name](axes) for name in names})


ALL = all_of(METHODS)
UNRECORDED = [name for name in METHODS if name != "a record of units"]


@functools.cache
def jitted(tx):
    """The update, and a list that gets an entry for each trace."""
    traces = []

    @jax.jit
    def update(each, state):
        traces.append(each)
        return tx.update(each, state)

    return update, traces


def stepped(tx, sequence, state=None):
    """Updates and state after each gradient, from one jitted update, which is traced once."""
    update, traces = jitted(tx)
    state = tx.init(sequence[0]) if state is None else state
    updates = []
    for each in sequence:
        out, state = update(each, state)
        updates.append(out)
    assert len(traces) == 1
    return updates, state


def assert_close(ours, right, rtol=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(right)
    for mine, theirs in zip(trees.numpy_leaves(ours), trees.numpy_leaves(right), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=1e-7)


def test_every_method_is_at_work(rng):
    """What follows says nothing of a clip that never clips."""
    sequence = gradients(rng)
    updates, _ = stepped(ALL, sequence)
    for name in METHODS:
        changed = [
            not np.array_equal(out[name]["both"], each["both"]) for out, each in zip(updates, sequence, strict=True)
        ]
        assert sum(changed) >= 2, name


def test_the_state_keeps_structure_shapes_and_dtypes(rng):
    sequence = gradients(rng, 5)
    before = jax.eval_shape(ALL.init, sequence[0])
    _, after = jax.eval_shape(ALL.update, sequence[0], before)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_histories_are_in_float32_whatever_the_gradients_are(rng, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), gradients(rng, 5)[0])
    state = jax.eval_shape(all_of(UNRECORDED).init, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32), np.dtype(np.int32)}


def test_a_scan_is_the_steps_one_by_one(rng):
    sequence = gradients(rng)
    updates, state = stepped(ALL, sequence)
    stacked = trees.stack(sequence)

    def step(state, each):
        out, state = ALL.update(each, state)
        return state, out

    scanned, outs = jax.lax.scan(step, ALL.init(sequence[0]), stacked)
    assert_close(scanned, state)
    for i, each in enumerate(updates):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], outs), each)


# Inside and around MultiSteps.


def seen(state):
    """Norms taken in, by the histogram or the window."""
    return int(optax.tree.get(state, "norms_seen")[0])


def sgd_by(*parts):
    return optax.chain(*parts, optax.sgd(1.0))


@pytest.mark.parametrize("window", [None, 4])
def test_inside_multi_steps_a_real_step_is_a_step(rng, window):
    sequence = gradients(rng, 12)[4:]
    inner = oc.autoclip(50, window=window)
    tx = optax.MultiSteps(sgd_by(inner), every_k_schedule=4).gradient_transformation()
    updates, state = stepped(tx, sequence)
    assert seen(state) == 2
    means = [jax.tree.map(lambda *leaves: sum(leaves) / 4, *sequence[i : i + 4]) for i in (0, 4)]
    right, alone = stepped(inner, means)
    assert_close(optax.tree.get(state, "norms_seen"), alone.norms_seen)
    for i, each in ((3, right[0]), (7, right[1])):
        assert_close(updates[i], jax.tree.map(jnp.negative, each))


@pytest.mark.parametrize("window", [None, 4])
def test_outside_multi_steps_a_micro_step_is_a_step(rng, window):
    sequence = gradients(rng, 12)[4:]
    clip = oc.autoclip(50, window=window)
    tx = optax.chain(clip, optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4).gradient_transformation())
    updates, state = stepped(tx, sequence)
    assert seen(state) == 8
    clipped, _ = stepped(clip, sequence)
    for i in (3, 7):
        mean = jax.tree.map(lambda *leaves: -sum(leaves) / 4, *clipped[i - 3 : i + 1])
        assert_close(updates[i], mean)


# Checkpoints.


def test_a_checkpoint_goes_on_bit_for_bit(rng, tmp_path):
    sequence = gradients(rng, 10)
    _, state = stepped(ALL, sequence[:5])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        restored = checkpointer.restore(tmp_path / "state", like)
    trees.assert_same_bits(restored, state)
    trees.assert_same_bits(stepped(ALL, sequence[5:], restored), stepped(ALL, sequence[5:], state))
    # And as if it had never stopped.
    trees.assert_same_bits(stepped(ALL, sequence[5:], restored)[1], stepped(ALL, sequence)[1])


# Arguments that change while it runs.


def test_injected_arguments_change_from_step_to_step(rng):
    """The quantile as a schedule: the histogram is one for all quantiles."""
    given = sequences.lognormal(rng, 40, drift=1.0)
    tx = optax.inject_hyperparams(published.autoclip, static_args=("window", "warmup_steps"))(
        percentile=lambda step: 90.0 - 2 * step, window=9
    )
    updates, _ = stepped(tx, [{"x": jnp.asarray([n], jnp.float32)} for n in given])
    for t, out in enumerate(updates):
        bound = np.percentile(given[max(0, t - 8) : t + 1], 90.0 - 2 * t)
        np.testing.assert_allclose(out["x"], [min(given[t], bound)], rtol=2e-5)


def test_a_rate_that_decays_brings_a_tracked_quantile_to_rest(rng):
    given = sequences.lognormal(rng, 2000, drift=1.0)
    tx = optax.inject_hyperparams(contrib.clip_by_tracked_quantile)(
        quantile=0.8, learning_rate=lambda step: 0.2 / (1 + step / 50)
    )

    def step(state, norm):
        return tx.update({"x": norm[None]}, state)[1], None

    state, _ = jax.lax.scan(step, tx.init({"x": jnp.zeros(1)}), jnp.asarray(given, jnp.float32))
    np.testing.assert_allclose(np.exp(optax.tree.get(state, "tracked_log_norm")), [np.quantile(given, 0.8)], rtol=0.05)


def test_a_chain_of_histories_sees_what_was_measured(rng):
    """Not what the other permits: the band is the smallest of both, and each has the history it has alone."""
    given = sequences.training(rng, 200)
    both = thresholds.chain(thresholds.quantile(0.5, window=20), thresholds.growth(1.2))

    def step(state, norm):
        updates, state = clip_by(norms.global_norm(), both).update({"x": norm[None]}, state)
        return state, updates["x"][0]

    state = clip_by(norms.global_norm(), both).init({"x": jnp.zeros(1)})
    _, after = jax.lax.scan(step, state, jnp.asarray(given, jnp.float32))
    right = np.minimum(adaptive.autoclip(given, 50, window=20).after, adaptive.clip_norm_growth(given, 1.2).after)
    np.testing.assert_allclose(after, right, rtol=2e-5)


# Meshes.

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def assert_replicated(state):
    for leaf in jax.tree.leaves(state):
        pieces = [np.asarray(piece.data) for piece in leaf.addressable_shards]
        assert len(pieces) == 8
        assert all(piece.shape == leaf.shape and piece.tobytes() == pieces[0].tobytes() for piece in pieces)


FEW = ["autoclip", "zclip per group", "adagc", "clip_by_history"]


@pytest.mark.parametrize(("check_vma", "names"), [(True, UNRECORDED), (False, FEW)], ids=["vma", "specs"])
def test_in_shard_map_every_device_has_the_history_of_the_whole(rng, check_vma, names):
    sequence = gradients(rng)
    tx = all_of(names, "auto" if check_vma else SPECS)
    state = tx.init(sequence[0])
    whole = jax.tree.map(lambda _: P(), state)
    specs = dict.fromkeys(names, SPECS)
    sharded = jax.jit(
        jax.shard_map(tx.update, mesh=MESH, in_specs=(SPECS, whole), out_specs=(specs, whole), check_vma=check_vma)
    )
    right, right_state = stepped(ALL, sequence)
    for each, expected in zip(sequence, right, strict=True):
        updates, state = sharded(each, state)
        assert_close(updates, {name: expected[name] for name in names})
    assert_replicated(state)
    assert_close(state, {name: right_state[name] for name in names})


def test_under_jit_on_an_explicit_mesh(rng):
    sequence = gradients(rng)
    right, right_state = stepped(ALL, sequence)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    with jax.set_mesh(mesh):
        placed = [
            {name: jax.device_put(leaf, jax.NamedSharding(mesh, SPECS[name])) for name, leaf in each.items()}
            for each in sequence
        ]
        state = jax.jit(ALL.init)(placed[0])
        update = jax.jit(ALL.update)
        for each, expected in zip(placed, right, strict=True):
            updates, state = update(each, state)
            for name in METHODS:
                for leaf, given in each.items():
                    assert updates[name][leaf].sharding.is_equivalent_to(given.sharding, given.ndim)
            assert_close(updates, expected)
        assert_replicated(state)
    assert_close(state, right_state)


def test_units_that_lie_on_different_devices_are_refused(rng):
    """Each device has but a part of the groups, and a history has to be the same on all."""
    spec = {"w": P("data")}
    tx = clip_by(norms.unit_norm("oi"), thresholds.growth(), axes=spec)
    updates = {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)}
    state = tx.init(updates)
    step = jax.shard_map(
        lambda updates, state: tx.update(updates, state)[0], mesh=MESH, in_specs=(spec, P()), out_specs=spec
    )
    with pytest.raises(ValueError, match="lie on different devices"):
        jax.jit(step)(updates, state)


def test_another_tree_than_at_init_is_refused():
    tx = contrib.percentile_clip()
    state = tx.init({"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"\(2, 100\), .*, got one with .*\(1, 100\), .*parameter tree"):
        tx.update({"a": jnp.zeros(2), "b": jnp.zeros(2)}, state)
