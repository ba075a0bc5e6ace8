"""Norms on meshes of eight devices, in `shard_map`, `pmap`, `vmap` and `jit`, against the same arrays on one device."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optaxclip
from optaxclip import contrib, norms, thresholds
from tests.support.collectives import collectives, collectives_under_branches, written_collectives
from tests.support.meshes import AUTO, EXPLICIT, P, put

SPECS = {
    "both": P("data", "model"),
    "columns": P(None, "model"),
    "half": P("data"),
    "steps": P("data"),
    "whole": P(),
}
SHAPES = {"both": (8, 4), "columns": (3, 4), "half": (8,), "whole": (5,)}
# The other ways in which a leaf can be split over two axes; they hold no set of axes that SPECS has not.
MORE_SPECS = {"flipped": P("model", "data"), "long": P(("data", "model")), "rows": P("data"), "scalar": P()}
MORE_SHAPES = {"flipped": (2, 8), "long": (16,), "rows": (8, 3), "scalar": ()}


def random_tree(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


def mixed_tree(seed):
    tree = random_tree(seed, SHAPES)
    tree["both"][:2] = 0  # all that the first two devices have of it
    return tree | {"half": tree["half"].astype(jnp.bfloat16), "steps": np.arange(8, dtype=np.int32)}


GRADS, PARAMS = mixed_tree(0), mixed_tree(1)
MORE_GRADS, MORE_PARAMS = random_tree(2, MORE_SHAPES), random_tree(3, MORE_SHAPES)


def by_initial(path):
    return "first" if path < "h" else "second"


def clip_by(norm, threshold):
    return functools.partial(optaxclip.clip_by, norm, threshold)


CLIPPERS = {
    "value": functools.partial(optaxclip.clip_by_value, -0.5, 0.25),
    "global 1": functools.partial(optaxclip.clip_by_global_norm, 1.0, ord=1),
    "global 2": functools.partial(optaxclip.clip_by_global_norm, 1.0),
    "global 3": functools.partial(optaxclip.clip_by_global_norm, 1.0, ord=3),
    "global inf": functools.partial(optaxclip.clip_by_global_norm, 1.0, ord=np.inf),
    "global, some": clip_by(norms.global_norm(include=lambda path: path != "columns"), thresholds.constant(1.0)),
    "global, array bound": functools.partial(optaxclip.clip_by_global_norm, np.float32(1.0)),
    "leaf 1": functools.partial(optaxclip.clip_by_leaf_norm, 1.0, ord=1),
    "leaf 2": functools.partial(optaxclip.clip_by_leaf_norm, 1.0),
    "leaf 3": functools.partial(optaxclip.clip_by_leaf_norm, 1.0, ord=3),
    "leaf inf": functools.partial(optaxclip.clip_by_leaf_norm, 1.0, ord=np.inf),
    "group 1": clip_by(norms.group_norm(by_initial, 1), thresholds.constant(1.0)),
    "group 2": clip_by(norms.group_norm(by_initial), thresholds.constant(1.0)),
    "group 3": clip_by(norms.group_norm(by_initial, 3), thresholds.constant(1.0)),
    "group inf": clip_by(norms.group_norm(by_initial, np.inf), thresholds.constant(1.0)),
    "rms": functools.partial(optaxclip.clip_by_block_rms, 0.5),
    "relative change": functools.partial(contrib.clippy, 0.1, 1e-3),
    "whole leaves as units": functools.partial(optaxclip.adaptive_grad_clip, 0.1, units="leaf"),
    "relative to the parameters": clip_by(
        norms.global_norm(), thresholds.chain(thresholds.relative_to_params(0.1), thresholds.constant(5.0))
    ),
    "range": functools.partial(optaxclip.clip_by_norm_range, 20.0, 30.0),
    "smooth": functools.partial(optaxclip.smooth_clip_by_global_norm, 1.0),
}
NORM_CLIPPERS = tuple(sorted(set(CLIPPERS) - {"value"}))  # clip_by_value has no norm, so no axes
# Where a compilation each would take long: one of every kind.
SOME_CLIPPERS = ["global 2", "global inf", "leaf 2", "leaf 3", "group 1", "rms", "relative change"]

# Units are parts of a leaf: which of its dimensions are split must be known.
UNIT_SPECS = {
    "bias": P("model"),
    "column": P("data"),
    "conv": P(None, None, "data", "model"),
    "kernel": P("data", "model"),
    "thin": P("data"),
}
UNIT_SHAPES = {
    "bias": (4,),
    "column": (8, 1),
    "conv": (2, 1, 4, 4),
    "kernel": (8, 4),
    "thin": (4, 6),  # one row on each device: there it looks like a vector
}
STACKED_SPECS = {"bias": P("data", "model"), "kernel": P("data", None, "model"), "within": P(None, "model", "data")}
STACKED_SHAPES = {"bias": (4, 6), "kernel": (8, 3, 4), "within": (3, 2, 4)}
UNIT_CLIPPERS = {
    "io": (functools.partial(optaxclip.adaptive_grad_clip, 0.1), UNIT_SPECS, UNIT_SHAPES),
    "oi": (functools.partial(optaxclip.adaptive_grad_clip, 0.1, units="oi"), UNIT_SPECS, UNIT_SHAPES),
    "stacked io": (functools.partial(optaxclip.adaptive_grad_clip, 0.1, stacked=1), STACKED_SPECS, STACKED_SHAPES),
    "stacked norm": (functools.partial(optaxclip.clip_by_leaf_norm, 0.1, stacked=1), STACKED_SPECS, STACKED_SHAPES),
    "stacked rms": (functools.partial(optaxclip.clip_by_block_rms, 0.1, stacked=1), STACKED_SPECS, STACKED_SHAPES),
}


def on_one_device(clipper, grads, params):
    """The updates that everything here is held against."""
    return whole_update(clipper)(grads, params)


@functools.cache
def whole_update(clipper):
    return jax.jit(update_of(clipper()))


@functools.cache
def whole_updates(names):
    """The same of several clips, by name: one program for all of them."""
    return jax.jit(update_of(by_name(names)))


def by_name(names):
    return {name: CLIPPERS[name]() for name in names}


def for_each(fun, clips):
    """`fun` of a clip, or of each in a list or a dict."""
    return jax.tree.map(fun, clips, is_leaf=lambda x: isinstance(x, optax.GradientTransformation))


def update_of(clips):
    """What stateless clips make of gradients."""
    return lambda grads, params: for_each(lambda tx: tx.update(grads, tx.init(params), params)[0], clips)


def in_shard_map(clips, specs, *, mesh=AUTO, **options):
    """The same there; jax checks that what is not split comes out replicated."""
    out_specs = for_each(lambda _: specs, clips)
    return jax.jit(jax.shard_map(update_of(clips), mesh=mesh, in_specs=(specs, specs), out_specs=out_specs, **options))


@functools.cache
def updates_of(names, *, is_sharded):
    """Those of several clips, by name, with SPECS and by the types, or on one device: one program for all tests."""
    program = in_shard_map(by_name(names), SPECS) if is_sharded else whole_updates(names)
    return lambda grads: program(grads, PARAMS)


def assert_close(actual, expected, rtol=1e-6):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert actual[name].dtype == want.dtype, name
        # Two float32 factors that differ in their last bit can round to neighbours in bfloat16.
        within = 2.0**-7 if want.dtype == jnp.bfloat16 else rtol
        pair = (np.asarray(x, np.float64) for x in (actual[name], want))
        np.testing.assert_allclose(*pair, rtol=within, err_msg=name)


def assert_clipped(updates, grads):
    """The test would pass without clipping otherwise."""
    assert any(np.any(np.asarray(updates[name]) != np.asarray(grads[name])) for name in grads)


def assert_unchanged(updates, grads):
    for name, grad in grads.items():
        np.testing.assert_array_equal(np.asarray(updates[name]), np.asarray(grad), err_msg=name)


ORDERS = (1, 2, 3, np.inf)


def numpy_norm(tree, ord):
    floats = [np.asarray(leaf, np.float64).ravel() for leaf in tree.values() if leaf.dtype != np.int32]
    return np.linalg.norm(np.concatenate(floats), ord)


# shard_map: axes found in the types, named, or given as PartitionSpecs


@pytest.mark.slow
@pytest.mark.parametrize("name", NORM_CLIPPERS)
def test_shard_map_equals_one_device(name):
    updates, expected = (updates_of(tuple(CLIPPERS), is_sharded=each)(GRADS)[name] for each in (True, False))
    assert_close(updates, expected)
    assert_clipped(updates, GRADS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_CLIPPERS)
def test_unchecked_shard_map_with_partition_specs_equals_one_device(name):
    updates = in_shard_map(CLIPPERS[name](axes=SPECS), SPECS, check_vma=False)(GRADS, PARAMS)
    assert_close(updates, on_one_device(CLIPPERS[name], GRADS, PARAMS))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("data", "model"), SPECS], ids=["names", "specs"])
@pytest.mark.parametrize("name", SOME_CLIPPERS)
def test_explicit_axes_in_a_checked_shard_map(name, axes):
    """The same program; names are dropped for a leaf that does not vary over them: "whole" is counted once."""
    named, by_type = (in_shard_map(CLIPPERS[name](axes=each), SPECS).trace(GRADS, PARAMS) for each in (axes, "auto"))
    assert str(named.jaxpr) == str(by_type.jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "check_vma"), [("auto", True), (MORE_SPECS, True), (MORE_SPECS, False)], ids=["auto", "specs", "unchecked"]
)
@pytest.mark.parametrize("name", ["global 2", "leaf 3"])
def test_more_ways_to_split_a_leaf(name, axes, check_vma):
    updates = in_shard_map(CLIPPERS[name](axes=axes), MORE_SPECS, check_vma=check_vma)(MORE_GRADS, MORE_PARAMS)
    assert_close(updates, on_one_device(CLIPPERS[name], MORE_GRADS, MORE_PARAMS))


def test_values_are_clipped_on_their_own():
    expected = on_one_device(CLIPPERS["value"], GRADS, PARAMS)
    assert_unchanged(in_shard_map(CLIPPERS["value"](), SPECS)(GRADS, PARAMS), expected)


@pytest.mark.parametrize(
    ("axes", "check_vma", "orders"),
    [("auto", True, ORDERS), (SPECS, False, (2, 3, np.inf))],  # a sum, a gathering and a maximum
    ids=["auto", "specs, unchecked"],
)
def test_global_norm_is_numpys(axes, check_vma, orders):
    def norms_of(tree):
        return [optaxclip.global_norm(tree, ord=ord, axes=axes) for ord in orders]

    mapped = jax.jit(jax.shard_map(norms_of, mesh=AUTO, in_specs=(SPECS,), out_specs=P(), check_vma=check_vma))
    for ord, norm in zip(orders, mapped(GRADS), strict=True):
        np.testing.assert_allclose(norm, numpy_norm(GRADS, ord), rtol=4 * 2.0**-23, err_msg=str(ord))


def test_a_spec_is_a_prefix_and_counts_a_replicated_leaf_once():
    grads = {"split": GRADS["both"], "nested": {"split": GRADS["both"] + 1, "whole": GRADS["whole"]}}
    specs = {"split": P("data", "model"), "nested": {"split": P("data", "model"), "whole": P()}}
    expected = numpy_norm({"0": grads["split"], "1": grads["nested"]["split"], "2": grads["nested"]["whole"]}, 2)
    split_over_data = jax.tree.map(lambda spec: P(*spec[:1]), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))

    prefixes = P("data"), {"split": P("data"), "nested": P(("data",))}

    def norms_of(grads):
        return [optaxclip.global_norm(grads, axes=axes) for axes in prefixes]

    mapped = jax.shard_map(norms_of, mesh=AUTO, in_specs=(split_over_data,), out_specs=P())
    np.testing.assert_allclose(jax.jit(mapped)(grads), [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_name_sums_over_that_axis_alone(check_vma):
    grads = {"both": GRADS["both"]}
    tx = optaxclip.clip_by_global_norm(1.0, axes="data")
    updates = in_shard_map(tx, {"both": P("data", "model")}, check_vma=check_vma)(grads, grads)
    columns = [
        on_one_device(CLIPPERS["global 2"], {"both": part}, {"both": part})["both"]
        for part in np.split(grads["both"], 2, axis=1)
    ]
    np.testing.assert_allclose(updates["both"], np.concatenate(columns, axis=1), rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_axes_none_leaves_each_device_to_itself(check_vma):
    grads = {"rows": 10.0 ** np.arange(8, dtype=np.float32)[:, None] * np.float32([[3, 4, 0]]) / 1e3}
    update = in_shard_map(
        optaxclip.clip_by_global_norm(1.0, axes=None), {"rows": P(("data", "model"))}, check_vma=check_vma
    )
    compiled = update.lower(grads, grads).compile()
    expected = grads["rows"] * np.minimum(1, 1 / np.linalg.norm(grads["rows"], axis=1, keepdims=True))
    rows = put(grads, {"rows": P(("data", "model"))}, AUTO)
    np.testing.assert_allclose(compiled(rows, rows)["rows"], expected, rtol=1e-6)
    assert collectives(compiled.as_text()) == []


@pytest.mark.parametrize("name", ["global 2", "leaf inf", "whole leaves as units"])
def test_a_name_that_is_not_bound_means_a_whole_array(name):
    """It is the same program."""

    def program(axes):
        tx = CLIPPERS[name](axes=axes)
        return str(jax.make_jaxpr(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(GRADS, PARAMS))

    for axes in ("data", ("data", "model"), SPECS):
        assert program(axes) == program("auto")


def test_init_outside_shard_map_and_a_replicated_state():
    def clip(axes):
        return optaxclip.clip_by_global_norm(lambda count: 1.0 / (1 + count), axes=axes)

    clips = [clip("auto"), clip(("data", "model")), clip(SPECS)]

    def updates(grads, states, params):
        return [tx.update(grads, state, params) for tx, state in zip(clips, states, strict=True)]

    # jax refuses out_specs of P() for a state that is not the same on every device.
    specs = {"in_specs": (SPECS, P(), SPECS), "out_specs": [(SPECS, P())] * 3}
    update, expected_update = jax.jit(jax.shard_map(updates, mesh=AUTO, **specs)), jax.jit(clips[0].update)
    states, expected_state = [tx.init(PARAMS) for tx in clips], clips[0].init(PARAMS)
    for _ in range(2):
        ours = update(GRADS, states, PARAMS)
        states = [state for _, state in ours]
        expected, expected_state = expected_update(GRADS, expected_state, PARAMS)
        for updates_now, state in ours:
            assert_close(updates_now, expected)
            assert jax.tree.map(int, state) == jax.tree.map(int, expected_state)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", ("data", "model"), SPECS], ids=["auto", "names", "specs"])
@pytest.mark.parametrize("name", ["global 2", "relative change"])
def test_a_partly_manual_shard_map(name, axes):
    only_data = {key: P("data") if "data" in spec[:1] else P() for key, spec in SPECS.items()}
    kept = ["both", "columns", "whole"]
    grads, params, specs, over_data = ({key: tree[key] for key in kept} for tree in (GRADS, PARAMS, SPECS, only_data))
    axes = specs if isinstance(axes, dict) else axes
    update = in_shard_map(CLIPPERS[name](axes=axes), over_data, axis_names={"data"})
    updates = update(put(grads, specs, AUTO), put(params, specs, AUTO))
    assert_close(updates, on_one_device(CLIPPERS[name], grads, params))
    assert_clipped(updates, grads)


def test_shard_map_on_an_explicit_mesh():
    names = ("global 2", "leaf 3", "relative change")
    update = in_shard_map([CLIPPERS[name]() for name in names], SPECS, mesh=EXPLICIT)
    all_updates = update(put(GRADS, SPECS, EXPLICIT), put(PARAMS, SPECS, EXPLICIT))
    expected = updates_of(names, is_sharded=False)(GRADS)
    for name, updates in zip(names, all_updates, strict=True):
        assert_close(updates, expected[name])


def test_optax_clips_each_device_by_its_own_norm():
    """Peer defect 5: optax is silently wrong where ours is right."""
    grads = {"kernel": np.float32(1 + np.arange(24)).reshape(8, 3)}
    expected = grads["kernel"] * 3 / np.linalg.norm(grads["kernel"])

    def run(tx):
        def update(grads):
            return tx.update(grads, tx.init(grads))[0]

        specs = {"kernel": P(("data", "model"))}
        return jax.jit(jax.shard_map(update, mesh=AUTO, in_specs=(specs,), out_specs=specs))(grads)["kernel"]

    np.testing.assert_allclose(run(optaxclip.clip_by_global_norm(3.0)), expected, rtol=1e-6)
    theirs = np.asarray(run(optax.clip_by_global_norm(3.0)))
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 3, rtol=1e-6)  # on every device, so 8.5 in all
    assert np.max(np.abs(theirs - expected)) > 0.5


# Units and stacked layers: by PartitionSpec, or not at all


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", UNIT_CLIPPERS)
def test_units_with_partition_specs(name, check_vma):
    clipper, specs, shapes = UNIT_CLIPPERS[name]
    grads, params = random_tree(2, shapes), random_tree(3, shapes)
    updates = in_shard_map(clipper(axes=specs), specs, check_vma=check_vma)(grads, params)
    assert_close(updates, on_one_device(clipper, grads, params))
    assert_clipped(updates, grads)


@pytest.mark.parametrize(("axes", "check_vma"), [("auto", True), ("data", True), (("data", "model"), False)])
@pytest.mark.parametrize("name", UNIT_CLIPPERS)
def test_units_without_partition_specs_raise(name, axes, check_vma):
    clipper, specs, shapes = UNIT_CLIPPERS[name]
    split, shape = ({"dense": {"kernel": of["kernel"]}} for of in (specs, shapes))
    grads = {"dense": random_tree(2, shape["dense"])}
    with pytest.raises(ValueError, match=r"(?s)dense/kernel.*PartitionSpec"):
        in_shard_map(clipper(axes=axes), split, check_vma=check_vma)(grads, grads)


@pytest.mark.parametrize("name", ["io", "stacked norm"])
def test_units_of_replicated_leaves_need_no_specs(name):
    clipper, _, shapes = UNIT_CLIPPERS[name]
    shapes = {leaf: shapes[leaf] for leaf in ("bias", "kernel")}
    grads, params = random_tree(2, shapes), random_tree(3, shapes)
    clips = [clipper(axes=axes) for axes in ("auto", None)]
    for updates in in_shard_map(clips, dict.fromkeys(shapes, P()))(grads, params):
        assert_close(updates, on_one_device(clipper, grads, params))


@pytest.mark.parametrize("axes", ["auto", "data"])
def test_a_kernel_with_one_row_on_each_device_is_no_vector(axes):
    grads, spec = {"thin": np.ones((4, 6), np.float32)}, {"thin": P("data")}
    with pytest.raises(ValueError, match=r"(?s)thin.*PartitionSpec"):
        in_shard_map(optaxclip.adaptive_grad_clip(0.1, axes=axes), spec)(grads, grads)


def test_eight_layers_on_eight_devices():
    """Peer defect 34: a norm per layer, or an error; never one norm of all of them."""
    layers = {"kernel": np.float32(2 * np.arange(1, 9))[:, None] * np.full((8, 4), 0.5, np.float32)}  # norms 2 to 16
    spec = {"kernel": P(("data", "model"))}
    tx = functools.partial(optaxclip.clip_by_leaf_norm, 5.0, stacked=1)
    updates = in_shard_map(tx(axes=spec), spec)(layers, layers)
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"], axis=1), [2, 4, 5, 5, 5, 5, 5, 5], rtol=1e-6)
    with pytest.raises(ValueError, match="kernel"):
        in_shard_map(tx(), spec)(layers, layers)


# Gradients that are not reduced yet


@pytest.mark.parametrize("axes", ["auto", P()], ids=["auto", "the parameters' specs"])
def test_a_gradient_that_is_not_reduced_yet_raises(axes):
    grads = {"block": {"kernel": np.ones((8, 3), np.float32), "bias": np.ones(4, np.float32)}}
    params = {"block": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(4, np.float32)}}
    in_specs = ({"block": {"kernel": P("data"), "bias": P()}}, P())

    def run(clip):
        def update(grads, params):
            return clip.update(grads, clip.init(params), params)[0]

        return jax.eval_shape(jax.shard_map(update, mesh=AUTO, in_specs=in_specs, out_specs=P("data")), grads, params)

    for name in ("global 2", "leaf 2", "group inf", "relative change"):
        with pytest.raises(ValueError, match=r"(?s)block/kernel.*data") as error:
            run(CLIPPERS[name](axes=axes))
        assert "bias" not in str(error.value)
        assert "model" not in str(error.value)


def test_the_unreduced_axis_is_told_from_the_split_one():
    def update(grads, params):
        return optaxclip.clip_by_global_norm(1.0).update(grads, optax.EmptyState(), params)[0]

    both, data = P(("data", "model")), P("data")
    mapped = jax.shard_map(update, mesh=AUTO, in_specs=(both, data), out_specs=both)
    with pytest.raises(ValueError, match="model") as error:
        jax.eval_shape(mapped, {"kernel": np.ones((16, 3), np.float32)}, {"kernel": np.ones((8, 3), np.float32)})
    assert "kernel" in str(error.value)
    assert "data" not in str(error.value)


def test_a_scattered_gradient_of_a_whole_parameter_is_no_error():
    """ZeRO: each device has its part of the gradient, and all of the parameters."""
    grads, spec = {"kernel": MORE_GRADS["rows"]}, {"kernel": P("data")}
    tx = optaxclip.clip_by_global_norm(1.0)

    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    updates = jax.jit(jax.shard_map(update, mesh=AUTO, in_specs=(spec, P()), out_specs=spec))(grads, grads)
    assert_close(updates, on_one_device(CLIPPERS["global 2"], grads, grads))


# Auto and Explicit meshes, under jit


@functools.cache
def updates_under_jit(mesh):
    """Those of clips by name, on a mesh: one program, as a function of gradients."""
    clips = {name: clipper() for name, clipper in CLIPPERS.items()}
    params = put(PARAMS, SPECS, mesh)

    def update(grads, params):
        return {name: tx.update(grads, tx.init(params), params)[0] for name, tx in clips.items()}

    program = jax.jit(update)

    def run(grads):
        with jax.set_mesh(mesh):
            return program(put(grads, SPECS, mesh), params)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", CLIPPERS)
def test_jit_on_a_mesh(name, mesh):
    updates = updates_under_jit(mesh)(GRADS)[name]
    assert_close(updates, updates_of(tuple(CLIPPERS), is_sharded=False)(GRADS)[name])
    assert_clipped(updates, GRADS)
    assert_laid_out(updates, put(GRADS, SPECS, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", UNIT_CLIPPERS)
def test_units_under_jit_on_a_mesh(name, mesh):
    clipper, specs, shapes = UNIT_CLIPPERS[name]
    assert_same_under_jit(clipper, random_tree(2, shapes), random_tree(3, shapes), specs, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["global 2", "leaf 3"])
def test_more_ways_to_split_a_leaf_on_an_explicit_mesh(name):
    assert_same_under_jit(CLIPPERS[name], MORE_GRADS, MORE_PARAMS, MORE_SPECS, EXPLICIT)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["global 2", "global inf", "leaf inf", "group inf", "rms", "relative change"])
def test_a_bad_value_is_seen_in_a_sharded_array(name, mesh):
    """A maximum over a sharded array may lose a NaN."""
    grads = with_bad(np.nan)
    assert_unchanged({"both": updates_under_jit(mesh)(grads)[name]["both"]}, {"both": grads["both"]})


def assert_laid_out(updates, grads):
    for name, grad in grads.items():
        assert updates[name].sharding.is_equivalent_to(grad.sharding, grad.ndim), name


def assert_same_under_jit(clipper, grads, params, specs, mesh):
    tx, expected = clipper(), on_one_device(clipper, grads, params)
    grads, params = put(grads, specs, mesh), put(params, specs, mesh)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(updates, expected)
    assert_clipped(updates, grads)
    assert_laid_out(updates, grads)


def test_types_on_an_explicit_mesh_without_a_context():
    whole = {name: GRADS[name] for name in ("both", "whole")}  # outside of jit each operation on a leaf is a program
    grads = put(whole, {name: SPECS[name] for name in whole}, EXPLICIT)

    def update(grads):
        updates, _ = CLIPPERS["global 2"]().update(grads, optax.EmptyState())
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, grads)
        return updates

    expected = on_one_device(CLIPPERS["global 2"], whole, whole)
    assert_close(jax.jit(update)(grads), expected)
    assert_close(update(grads), expected)


def test_optax_adaptive_grad_clip_fails_on_an_explicit_mesh():
    """Peer defect 6; that ours works is tested with the other units."""
    kernel = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(EXPLICIT, P("data", "model")))
    tx = optax.adaptive_grad_clip(0.1)
    with pytest.raises(Exception, match=r"(?i)shard") as error:
        jax.jit(tx.update)(kernel, tx.init(kernel), kernel)
    assert type(error.value).__name__ == "ShardingTypeError"  # public nowhere in jax


# Numbers


def spread(magnitudes):
    """Two values of its own magnitude on each of eight devices."""
    return {"kernel": np.float32(np.float64(magnitudes)[:, None] * [[1.5, -2.0]])}


OVER_ALL = {"kernel": P(("data", "model"))}


@pytest.mark.slow
@pytest.mark.parametrize("ord", ORDERS)
def test_the_whole_range_on_one_mesh(ord):
    norm = functools.partial(optaxclip.global_norm, ord=ord)
    mapped = jax.jit(jax.shard_map(norm, mesh=AUTO, in_specs=(OVER_ALL,), out_specs=P()))
    one_large, one_small = np.full(8, 1e-30), np.full(8, 1e30)
    one_large[3], one_small[5] = 1e30, 1e-30
    cases = [one_large, one_small, np.zeros(8), np.eye(8)[2] * 1e-30, np.eye(8)[7] * 1e37, np.full(8, 1e37)]
    cases += [np.full(8, 10.0**k) for k in range(-37, 38, 2)]
    cases += [10.0 ** (k + np.arange(8) / 2) for k in range(-36, 33, 4)]
    for magnitudes in cases:
        tree = spread(magnitudes)
        np.testing.assert_allclose(mapped(tree), numpy_norm(tree, ord), rtol=4 * 2.0**-23, err_msg=str(magnitudes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["global 1", "global 2", "global 3", "global inf", "leaf 2", "group 2", "rms"])
def test_clipping_is_safe_where_devices_are_magnitudes_apart(name):
    update = in_shard_map(CLIPPERS[name](), OVER_ALL)
    for magnitudes in ([1e30] + [1e-30] * 7, [1e-30] * 7 + [1e37], [1e37] * 8, np.logspace(-30, 30, 8)):
        grads = spread(magnitudes)
        ord = float(name.split()[1]) if " " in name else 2
        bound = 1.0 if " " in name else 0.5 * np.sqrt(16)
        expected = np.float64(grads["kernel"]) * (bound / numpy_norm(grads, ord))
        updates = np.float64(update(grads, grads)["kernel"])
        # What would be subnormal may be 0.
        np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1.2e-38, err_msg=str(magnitudes))


def test_a_norm_past_the_largest_float_keeps_the_direction():
    grads = spread([1.6e38] * 8)
    updates = np.asarray(in_shard_map(CLIPPERS["global 2"](), OVER_ALL)(grads, grads)["kernel"], np.float64)
    assert np.all(np.isfinite(updates))
    assert np.all(updates != 0)
    np.testing.assert_allclose(updates / updates[0, 0], np.tile([[1, -4 / 3]], (8, 1)), rtol=1e-6)


# A value that is not finite leaves the first unclipped; of the second it leaves one leaf unclipped.
ONE_DECISION = ("global 2", "global 3", "global inf", "group 2", "relative to the parameters", "smooth")
OF_EACH_LEAF = ("leaf 2", "leaf 3", "leaf inf", "rms", "relative change", "whole leaves as units")


def with_bad(value, row=5, column=3):
    """On one device; this one is in the middle."""
    grads = GRADS | {"both": GRADS["both"].copy()}
    grads["both"][row, column] = value
    return grads


@pytest.mark.parametrize("name", ONE_DECISION)
def test_one_bad_value_on_one_device_is_one_decision_on_all(name):
    touched = [key for key in GRADS if name != "group 2" or by_initial(key) == by_initial("both")]
    others = [key for key in GRADS if key not in touched]
    for bad in (np.nan, np.inf, -np.inf):
        for row, column in ((0, 0), (5, 3)):  # on the first device, and on one in the middle
            grads = with_bad(bad, row, column)
            updates = updates_of(ONE_DECISION + OF_EACH_LEAF, is_sharded=True)(grads)[name]
            assert_unchanged({key: updates[key] for key in touched}, {key: grads[key] for key in touched})
            if others:
                expected = on_one_device(CLIPPERS[name], grads, PARAMS)
                assert_close({key: updates[key] for key in others}, {key: expected[key] for key in others})


@pytest.mark.parametrize("name", OF_EACH_LEAF)
def test_one_bad_leaf_does_not_stop_the_others(name):
    updates = updates_of(ONE_DECISION + OF_EACH_LEAF, is_sharded=True)
    good = updates(GRADS)[name]
    for bad in (np.nan, np.inf):
        grads = with_bad(bad)
        assert_unchanged(updates(grads)[name], good | {"both": grads["both"]})


def test_a_bad_unit_on_one_device_does_not_stop_the_others():
    clipper, specs, shapes = UNIT_CLIPPERS["io"]
    specs, shapes = ({leaf: each[leaf] for leaf in ("bias", "kernel")} for each in (specs, shapes))
    grads, params = random_tree(2, shapes), random_tree(3, shapes)
    update = in_shard_map(clipper(axes=specs), specs)
    good = update(grads, params)
    grads["kernel"][6, 1] = np.nan  # column 1 is one unit, split over four devices
    expected = {**good, "kernel": np.asarray(good["kernel"]).copy()}
    expected["kernel"][:, 1] = grads["kernel"][:, 1]
    assert_unchanged(update(grads, params), expected)


def test_the_derivative_of_the_norm_across_devices():
    norm = jax.shard_map(optaxclip.global_norm, mesh=AUTO, in_specs=(MORE_SPECS,), out_specs=P())
    derivative = jax.jit(jax.grad(norm))
    size = numpy_norm(MORE_GRADS, 2)
    expected = {key: np.float32(leaf / size) for key, leaf in MORE_GRADS.items()}
    assert_close(derivative(MORE_GRADS), expected, rtol=2e-6)
    zeros = jax.tree.map(np.zeros_like, MORE_GRADS)
    assert_unchanged(derivative(zeros), zeros)


# What is sent


def test_a_collective_under_a_branch_would_be_found():
    axes = ("data", "model")

    def branching(x):
        everywhere = jax.lax.psum(jnp.sum(x), axes)
        return jax.lax.cond(everywhere > 0, lambda: jax.lax.psum(2 * x, axes), lambda: jax.lax.pmax(x, axes))

    mapped = jax.shard_map(branching, mesh=AUTO, in_specs=(P(axes),), out_specs=P())
    traced = jax.jit(mapped).trace(np.ones(8, np.float32))
    assert len(written_collectives(traced.jaxpr.jaxpr)) == 3
    hlo = traced.lower().compile().as_text()
    assert collectives(hlo) == ["all-reduce"] * 3
    assert collectives_under_branches(hlo) == ["all-reduce"] * 2


@pytest.mark.parametrize("name", ["global 2", "global inf", "leaf 2", "leaf inf", "group 2", "rms", "relative change"])
def test_one_collective_per_set_of_axes(name):
    # There are three sets of axes: {data}, {model} and {data, model}, the last in two orders.
    kept = ("both", "columns", "half", "whole", "flipped")
    trees = SPECS | MORE_SPECS, GRADS | MORE_GRADS, PARAMS | MORE_PARAMS
    specs, grads, params = ({leaf: each[leaf] for leaf in kept} for each in trees)
    traced, named = (in_shard_map(CLIPPERS[name](axes=axes), specs).trace(grads, params) for axes in ("auto", specs))
    assert str(traced.jaxpr) == str(named.jaxpr)  # so it is enough to compile one of them
    hlo = traced.lower().compile().as_text()
    assert collectives(hlo) == ["all-reduce"] * 3
    assert collectives_under_branches(hlo) == []


@pytest.mark.parametrize("name", ["global 2", "leaf 2", "global inf"])
def test_one_collective_for_many_leaves(name):
    shapes = {f"{i}": (8, 1 + i % 3) for i in range(6)}
    grads, specs = random_tree(4, shapes), dict.fromkeys(shapes, P(("data", "model")))
    traced = in_shard_map(CLIPPERS[name](), specs).trace(grads, grads)
    assert len(written_collectives(traced.jaxpr.jaxpr)) == 1


def test_no_collective_for_replicated_leaves():
    clips = [CLIPPERS[name](axes=("data", "model")) for name in ("global 2", "leaf 2", "relative change")]
    hlo = in_shard_map(clips, dict.fromkeys(SPECS, P())).lower(GRADS, PARAMS).compile().as_text()
    assert collectives(hlo) == []


# pmap and vmap with a named axis


def jitted_vmap(fun, axis_name, in_axes=0):
    return jax.jit(jax.vmap(fun, axis_name=axis_name, in_axes=in_axes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "names"),
    [(jax.pmap, SOME_CLIPPERS), (jitted_vmap, ["global 2", "relative change"])],
    ids=["pmap", "vmap"],
)
def test_pmap_and_vmap_with_partition_specs(names, transform):
    split, whole = ["both", "half"], ["columns", "whole"]
    grads, params = ({key: tree[key] for key in split + whole} for tree in (GRADS, PARAMS))
    axes = {key: P("device") if key in split else P() for key in grads}

    def update(grads, params):
        # A leaf of (8, ...) arrives without its first axis; as (1, ...) it is a piece of the whole.
        grads, params = (tree | {key: tree[key][None] for key in split} for tree in (grads, params))
        clips = {name: CLIPPERS[name](axes=axes) for name in names}
        return {name: tx.update(grads, tx.init(params), params)[0] for name, tx in clips.items()}

    in_axes = {key: 0 if key in split else None for key in grads}
    found = jax.device_get(transform(update, axis_name="device", in_axes=(in_axes, in_axes))(grads, params))
    expected = jax.device_get(whole_updates(tuple(names))(grads, params))
    for name, updates in found.items():
        whole = expected[name]
        for device in range(8):
            pieces = {key: whole[key][device : device + 1] if key in split else whole[key] for key in grads}
            assert_close({key: updates[key][device] for key in grads}, pieces)


@pytest.mark.parametrize("transform", [jax.pmap, jitted_vmap], ids=["pmap", "vmap"])
def test_pmap_and_vmap_with_a_name(transform):
    grads = {"long": MORE_GRADS["long"].reshape(8, 2), "rows": MORE_GRADS["rows"]}
    axes = {"global 2": "device", "global inf": ("device",), "leaf 3": ("device",), "rms": "device"}

    def told():
        """Two leaves are split; in `pmap` nothing could tell if one of them were not."""
        return pytest.warns(UserWarning, match="once per device") if transform is jax.pmap else contextlib.nullcontext()

    def update(grads):
        updates = {}
        for name, axis in axes.items():
            tx = CLIPPERS[name](axes=axis)
            with told():
                updates[name] = tx.update(grads, tx.init(grads), grads)[0]
        return updates

    expected = whole_updates(tuple(axes))(grads, grads)
    for name, updates in transform(update, axis_name="device")(grads).items():
        assert_close(updates, expected[name])


def test_vmap_without_axes_is_one_norm_per_example():
    grads = {"rows": MORE_GRADS["rows"] * 10}
    tx = optaxclip.clip_by_global_norm(1.0)
    updates = jitted_vmap(lambda grads: tx.update(grads, tx.init(grads))[0], axis_name="device")(grads)
    expected = grads["rows"] / np.linalg.norm(grads["rows"], axis=1, keepdims=True)
    np.testing.assert_allclose(updates["rows"], expected, rtol=1e-6)


# A step


def test_a_train_step_in_shard_map_equals_one_device():
    """Rows of the kernel over `model`, the batch over `data`; jax sums the gradients of what is replicated."""
    tx = optax.chain(optaxclip.clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.9))
    rng = np.random.default_rng(5)
    params = {"kernel": np.float32(rng.normal(size=(6, 3))), "bias": np.zeros(3, np.float32)}
    x, y = np.float32(rng.normal(size=(8, 6))), np.float32(rng.normal(size=(8, 3)))

    def step(params, state, x, y, axes):
        def loss(params):
            out = x @ params["kernel"]
            out = jax.lax.psum(out, "model") if axes else out
            error = jnp.mean((out + params["bias"][None] - y) ** 2)
            return jax.lax.pmean(error, "data") if axes else error

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    specs = {"kernel": P("model"), "bias": P()}
    trace = optax.TraceState(specs)  # the momentum is split as the parameters are
    state_specs = (optax.EmptyState(), (trace, optax.EmptyState()))
    in_specs = (specs, state_specs, P("data", "model"), P("data"))
    sharded = jax.shard_map(
        functools.partial(step, axes=True), mesh=AUTO, in_specs=in_specs, out_specs=(specs, state_specs, P())
    )
    whole, sharded = jax.jit(functools.partial(step, axes=False)), jax.jit(sharded)
    one, many = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(4):
        *one, loss = whole(*one, x, y)
        *many, sharded_loss = sharded(*many, x, y)
        np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    # Parameters of order 1, one of them nearly cancelled: rounding is absolute.
    for name, param in one[0].items():
        np.testing.assert_allclose(many[0][name], param, atol=1e-6, err_msg=name)
