"""Steps that are left out on meshes of eight devices: one decision, taken by all of them."""

import functools
import warnings

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import optaxclip as oc
from optaxclip import clip_stats, norms, thresholds
from tests.support.collectives import collectives, collectives_under_branches
from tests.support.meshes import AUTO, EXPLICIT, P, put

SPECS = {"both": P("data", "model"), "rows": P("data"), "whole": P()}
SHAPES = {"both": (8, 4), "rows": (8,), "whole": (3,)}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def with_one(seed, name, index, value):
    """Gradients with one value changed, which one of eight devices has, or two, or all."""
    grads = tree(seed)
    grads[name][index] = value
    return grads


PARAMS = tree(100)
GIVEN = [
    tree(0),
    tree(1),
    with_one(2, "both", (0, 0), np.nan),  # on the first device
    with_one(3, "both", (5, 3), np.inf),  # on one in the middle
    with_one(4, "rows", 7, -np.inf),  # on the last two
    tree(5),
    with_one(6, "both", (5, 3), 1e6),
    with_one(7, "whole", 0, np.nan),  # on all
    tree(8),
]
TAKEN = [True, True, False, False, False, True, False, False, True]


def inner(axes):
    return optax.chain(oc.clip_by_global_norm(1.0, axes=axes), optax.sgd(0.1, momentum=0.9))


def spikes(norm, **options):
    threshold = thresholds.mean_std(9.0, window=8, warmup_steps=2)
    return lambda axes: oc.skip_spikes(inner(axes), threshold, norm=norm, axes=axes, **options)


SKIPS = {
    "global": spikes(norms.global_norm()),
    "largest": spikes(norms.global_norm(np.inf)),
    "leaf": spikes(norms.leaf_norm()),
    "some": spikes(norms.global_norm(include=lambda path: path != "whole")),
    "loss": spikes(norms.global_norm(), loss_threshold=thresholds.mean_std(9.0, window=8, warmup_steps=2)),
    # Groups that lie on different devices: no history, but a constant.
    "unit": lambda axes: oc.skip_spikes(inner(axes), thresholds.constant(100.0), norm=norms.unit_norm("io"), axes=axes),
    "nonfinite": lambda axes: oc.skip_nonfinite(inner(axes), axes=axes),
}
# The first takes the spike, the second the NaN in a leaf that it leaves out.
ALSO_TAKEN = {"nonfinite": 6, "some": 7}
LOSS = np.float32(1.0)


@functools.cache
def on_one_device(name):
    tx = SKIPS[name](None)
    return run(jax.jit(lambda *args: tx.update(*args, value=LOSS)), tx.init(PARAMS))


def run(step, state):
    outs = []
    for grads in GIVEN:
        out, state = step(grads, state, PARAMS)
        outs.append(out)
    return outs, state


def state_specs(tx):
    """What has the shape of a parameter is split as that is; all else is the same everywhere."""

    def whole(entries):
        return jax.tree.map(lambda _: P(), entries)

    return optax.tree.map_params(tx, lambda _, spec: spec, tx.init(PARAMS), SPECS, transform_non_params=whole)


def mapped(tx, *, mesh=AUTO, check_vma=True):
    specs = state_specs(tx)
    return jax.jit(
        jax.shard_map(
            lambda *args: tx.update(*args, value=LOSS),
            mesh=mesh,
            in_specs=(SPECS, specs, SPECS),
            out_specs=(SPECS, specs),
            check_vma=check_vma,
        )
    )


def assert_all_devices_agree(outs, state, name):
    expected, expected_state = on_one_device(name)
    for number, (out, want) in enumerate(zip(outs, expected, strict=True)):
        for key in SPECS:
            # A spike of 1e6 may be taken, and clipped.
            np.testing.assert_allclose(out[key], want[key], rtol=1e-5, atol=1e-9, err_msg=f"step {number}, {key}")
        is_taken = TAKEN[number] or number == ALSO_TAKEN.get(name)
        assert all(np.any(leaf != 0) == is_taken for leaf in jax.tree.leaves(out)), f"step {number}"
    assert clip_stats(state) == clip_stats(expected_state)
    wanted = jax.tree.leaves(expected_state)
    for leaf, want in zip(jax.tree.leaves(state), wanted, strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-5, atol=1e-9)
        if leaf.sharding.is_fully_replicated:
            pieces = [np.asarray(piece.data) for piece in leaf.addressable_shards]
            assert len(pieces) in {1, 8}
            assert all(np.array_equal(piece, pieces[0], equal_nan=True) for piece in pieces)


@pytest.mark.xla
@pytest.mark.parametrize(
    ("name", "axes", "check_vma"),
    [("leaf", "auto", True), pytest.param("nonfinite", SPECS, False, marks=pytest.mark.slow)],
    ids=["auto", "specs, unchecked"],
)
def test_shard_map(name, axes, check_vma):
    tx = SKIPS[name](axes)
    assert_all_devices_agree(*run(mapped(tx, check_vma=check_vma), tx.init(PARAMS)), name)


@pytest.mark.xla
@pytest.mark.slow
@pytest.mark.parametrize(("axes", "check_vma"), [("auto", True), (SPECS, True), (SPECS, False)])
@pytest.mark.parametrize("name", SKIPS)
def test_shard_map_with_other_norms(name, axes, check_vma):
    axes = SPECS if name == "unit" else axes  # which dimensions of a unit are split must be known
    tx = SKIPS[name](axes)
    assert_all_devices_agree(*run(mapped(tx, check_vma=check_vma), tx.init(PARAMS)), name)


@pytest.mark.xla
@pytest.mark.slow
def test_shard_map_on_an_explicit_mesh():
    tx = SKIPS["global"]("auto")
    step, weights = mapped(tx, mesh=EXPLICIT), put(PARAMS, SPECS, EXPLICIT)
    with jax.set_mesh(EXPLICIT):
        outs, state = run(lambda grads, state, _: step(put(grads, SPECS, EXPLICIT), state, weights), tx.init(weights))
    assert_all_devices_agree(outs, state, "global")


@pytest.mark.parametrize("mesh", [pytest.param(AUTO, marks=pytest.mark.slow), EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["leaf", pytest.param("nonfinite", marks=pytest.mark.slow)])
def test_jit_with_sharded_arrays(name, mesh):
    tx = SKIPS[name]("auto")
    step, weights = jax.jit(lambda *args: tx.update(*args, value=LOSS)), put(PARAMS, SPECS, mesh)
    # Outside of jit each array of a state is a program. The types of an Explicit mesh say under jit how they are split.
    init = jax.jit(tx.init) if mesh is EXPLICIT else tx.init
    with jax.set_mesh(mesh):
        outs, state = run(lambda grads, state, _: step(put(grads, SPECS, mesh), state, weights), init(weights))
    assert_all_devices_agree(outs, state, name)
    for out in outs:
        for key, leaf in out.items():
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[key]), leaf.ndim), key
    for key, leaf in optax.tree.get(state, "trace").items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[key]), leaf.ndim), key


@pytest.mark.parametrize(
    "axes", ["device", pytest.param({"both": P("device"), "rows": P()}, marks=pytest.mark.slow)], ids=["name", "specs"]
)
def test_pmap(axes):
    """The first axis of "both" lies on eight devices; so does that of "rows", or every device has all of it."""
    in_axes = {"both": 0, "rows": 0 if axes == "device" else None}
    rng = np.random.default_rng(0)
    given = [{key: np.float32(rng.normal(size=(8, 2))) for key in in_axes} for _ in range(6)]
    given[2]["both"][6, 1] = np.nan
    given[4]["rows"][0] = 1e6
    threshold = thresholds.mean_std(9.0, window=8, warmup_steps=2)
    tx, alone = (oc.skip_spikes(optax.sgd(1.0), threshold, axes=each) for each in (axes, None))
    step, expected_step = jax.pmap(tx.update, axis_name="device", in_axes=(in_axes, 0)), jax.jit(alone.update)
    expected_state = alone.init(given[0])
    state = jax.tree.map(lambda leaf: np.stack([leaf] * 8), expected_state)
    for number, grads in enumerate(given):
        with warnings.catch_warnings():
            if axes == "device":  # both leaves are split, which nothing in `pmap` could tell
                warnings.filterwarnings("ignore", "axes='device' assumes that every leaf is split")
            out, state = step(grads, state)
        expected, expected_state = expected_step(grads, expected_state)
        for key, want in expected.items():
            ours = out[key] if in_axes[key] == 0 else out[key][0]
            np.testing.assert_allclose(ours, want, rtol=1e-5, err_msg=f"step {number}, {key}")
        assert np.any(out["both"]) == (number not in {2, 4})
    for device in range(8):
        assert clip_stats(jax.tree.map(lambda leaf, i=device: np.asarray(leaf)[i], state)) == clip_stats(expected_state)
    for entry in jax.tree.leaves(state.norm_threshold_state):
        np.testing.assert_array_equal(entry, np.broadcast_to(entry[:1], entry.shape))


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_22_optax_lets_each_device_decide_for_itself(mapping):
    grads = np.float32(1 + np.arange(16)).reshape(8, 2)
    grads[3, 1] = np.nan

    def taken(tx, axes):
        def update(grads):
            return tx.update(grads, tx.init(grads))[0]

        if mapping == "pmap":
            return np.any(jax.pmap(update, axis_name="data")(grads) != 0, axis=1)
        over = jax.shard_map(update, mesh=AUTO, in_specs=P(axes), out_specs=P(axes), check_vma=mapping == "shard_map")
        return np.any(np.asarray(jax.jit(over)(grads)) != 0, axis=1)

    axes = ("data", "model")
    ours = oc.skip_nonfinite(optax.scale(-1.0), axes="data" if mapping == "pmap" else "auto")
    np.testing.assert_array_equal(taken(ours, axes), np.zeros(8, bool))
    if mapping == "pmap":  # under shard_map's types its cond is an error
        np.testing.assert_array_equal(taken(optax.apply_if_finite(optax.scale(-1.0), 5), axes), np.arange(8) != 3)


@pytest.mark.parametrize(
    "name", ["global", *(pytest.param(n, marks=pytest.mark.slow) for n in ("largest", "leaf", "some"))]
)
def test_one_collective_per_set_of_axes_and_none_under_a_branch(name):
    # Of the wrapper alone, around what sends nothing.
    norm = {
        "global": norms.global_norm(),
        "largest": norms.global_norm(np.inf),
        "leaf": norms.leaf_norm(),
        "some": norms.global_norm(include=lambda path: path != "whole"),
    }[name]
    tx = oc.skip_spikes(optax.sgd(0.1, momentum=0.9), thresholds.constant(100.0), norm=norm)
    text = mapped(tx).lower(GIVEN[0], tx.init(PARAMS), PARAMS).compile().as_text()
    assert collectives_under_branches(text) == []
    # There are two sets: {data} and {data, model}. Whether all is finite is read from the same norms.
    assert collectives(text) == ["all-reduce"] * 2


@pytest.mark.slow
def test_one_collective_per_set_of_axes_with_a_clipper_and_adam_inside():
    tx = oc.skip_spikes(optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-3)), thresholds.mean_std(6.0))
    text = mapped(tx).lower(GIVEN[0], tx.init(PARAMS), PARAMS).compile().as_text()
    assert collectives_under_branches(text) == []
    # The clipper's norm is that of the wrapper: two sets of axes, {data} and {data, model}.
    assert collectives(text) == ["all-reduce"] * 2


@pytest.mark.parametrize("large", [50.0, np.nan])
def test_a_unit_that_one_device_has_is_one_decision_of_all(large):
    tx = oc.skip_spikes(optax.identity(), thresholds.constant(9.0), norm=norms.unit_norm("oi"), axes=P("data"))
    grads = np.ones((8, 4), np.float32)
    grads[2, 1] = large
    step = jax.shard_map(tx.update, mesh=AUTO, in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=False)
    updates, state = jax.jit(step)(grads, tx.init(grads))
    np.testing.assert_array_equal(updates, np.zeros((8, 4)))
    skipped = clip_stats(state)
    assert (skipped["skipped_norm"], skipped["skipped_nonfinite"]) == ((1, 0) if np.isfinite(large) else (0, 1))


@pytest.mark.parametrize("losses", [(0.5, 5.0), (0.5, np.nan), (np.inf, 0.5)], ids=str)
def test_devices_with_losses_of_their_own_decide_alike(losses):
    tx = oc.skip_spikes(
        optax.sgd(0.1), thresholds.constant(9.0), loss_threshold=thresholds.constant(1.0), axes="device"
    )
    state = tx.init({"w": np.zeros(1, np.float32)})

    def step(grad, loss):
        return tx.update({"w": grad}, state, value=loss)

    updates, states = jax.pmap(step, axis_name="device", devices=jax.devices()[:2])(
        np.ones((2, 1), np.float32), np.float32(losses)
    )
    np.testing.assert_array_equal(updates["w"], [[0], [0]])
    reason = "skipped_loss" if np.isfinite(losses).all() else "skipped_nonfinite"
    np.testing.assert_array_equal(getattr(states.skip_stats, reason), [1, 1])
