"""What users are told on a mesh: that "auto" sees nothing where it does, and which gradient is not reduced yet."""

import re
import warnings

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import optaxclip as oc
from tests.support.meshes import AUTO, EXPLICIT, P
from tests.table import ROWS, params, tree

GRADS = {"kernel": np.ones((8, 3), np.float32)}
BOTH = P(("data", "model"))


def update_of(tx):
    return lambda grads: tx.update(grads, tx.init(grads), grads)[0]


def unchecked(tx):
    return jax.shard_map(update_of(tx), mesh=AUTO, in_specs=BOTH, out_specs=BOTH, check_vma=False)


BLIND = {
    "shard_map": unchecked,
    "jitted": lambda tx: jax.jit(unchecked(tx)),
    "pmap": lambda tx: jax.pmap(update_of(tx), axis_name="devices"),
}


def shown(call):
    """The warnings that users see of a call, with Python's own settings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        call()
    return seen


# Where "auto" is blind.


@pytest.mark.parametrize("way", BLIND)
def test_one_warning_where_auto_sees_nothing(way):
    # Measured at init and at update, by two clippers, in two traces; and called from one line of ours.
    tx = optax.chain(oc.clip_by_global_norm(1.0), oc.adagc(), optax.sgd(0.1))

    def call():
        jax.eval_shape(BLIND[way](tx), GRADS)
        jax.eval_shape(BLIND[way](tx), {"other": GRADS["kernel"]})

    (warning,) = shown(call)
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert warning.lineno == update_of.__code__.co_firstlineno + 1
    for word in ("devices" if way == "pmap" else "('data', 'model')", "axes=None", "PartitionSpec", "check_vma=False"):
        assert word in str(warning.message)


def test_another_line_that_calls_is_warned_too():
    tx = oc.clip_by_global_norm(1.0)

    def update(grads):
        one = tx.update(grads, tx.init(grads))[0]
        return tx.update(one, tx.init(grads))[0]

    seen = shown(lambda: jax.eval_shape(jax.pmap(update), GRADS["kernel"]))
    assert [warning.lineno - update.__code__.co_firstlineno for warning in seen] == [1, 2]


@pytest.mark.parametrize(
    "wrap",
    [
        oc.skip_nonfinite,
        oc.with_carry,
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, {"kernel": True}),
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(scale=1.0),
    ],
    ids=["skip_nonfinite", "with_carry", "MultiSteps", "masked", "inject_hyperparams"],
)
def test_the_line_is_that_of_the_user_whatever_is_between(wrap):
    (warning,) = shown(lambda: jax.eval_shape(unchecked(wrap(oc.clip_by_global_norm(1.0))), GRADS))
    assert warning.filename == __file__


def of_each_row(look, found):
    """A function of gradients and parameters: what `look` finds of each row's update, by name. To trace all at once."""

    def traced(grads, weights):
        for row in ROWS:
            tx = row.make()
            try:
                found[row.name] = look(lambda tx=tx: tx.update(grads, tx.init(weights), weights))
            except Exception as error:
                error.add_note(row.name)
                raise

    return traced


def test_every_row_that_looks_for_axes_warns():
    found = {}
    looks = of_each_row(lambda update: len(shown(update)), found)
    blind = jax.shard_map(looks, mesh=AUTO, in_specs=P(), out_specs=P(), check_vma=False)
    jax.eval_shape(blind, tree(0, "float32"), params("float32"))
    assert found == {row.name: int(row.public not in NO_AXES) for row in ROWS}


# What looks at each coordinate by itself, or leaves the norms to what it is wrapped around.
NO_AXES = {
    *("arcsinh_clip", "clip", "clip_by_value", "qk_clip", "scale_by_acclip", "spam_clip", "tanh_clip"),
    "zero_nonfinite",
}


@pytest.mark.parametrize("axes", [None, ("data", "model"), BOTH, {"kernel": P("data")}], ids=repr)
def test_to_say_what_is_split_is_to_silence_it(axes):
    assert shown(lambda: jax.eval_shape(unchecked(oc.clip_by_global_norm(1.0, axes=axes)), GRADS)) == []


def test_the_norm_itself_warns_too():
    norm = jax.shard_map(oc.global_norm, mesh=AUTO, in_specs=BOTH, out_specs=P(), check_vma=False)
    (warning,) = shown(lambda: jax.eval_shape(norm, GRADS))
    assert "axes=" in str(warning.message)


def test_there_is_no_warning_where_the_types_know():
    update = update_of(oc.clip_by_global_norm(1.0))
    specs = {"mesh": AUTO, "in_specs": BOTH, "out_specs": BOTH}
    some = {"mesh": AUTO, "in_specs": P("data"), "out_specs": P("data"), "axis_names": {"data"}}
    for mapped in (update, jax.shard_map(update, **specs), jax.jit(jax.shard_map(update, **some))):
        assert shown(lambda mapped=mapped: jax.eval_shape(mapped, GRADS)) == []
    assert shown(lambda: update(GRADS)) == []


def test_there_is_no_warning_for_a_named_axis_of_vmap():
    """One norm per example is what people want there; and it is no axis of a mesh."""
    update = jax.vmap(update_of(oc.clip_by_global_norm(1.0)), axis_name="examples")
    assert shown(lambda: jax.eval_shape(update, GRADS)) == []


def test_a_partly_manual_shard_map_names_what_is_manual():
    tx = oc.clip_by_global_norm(1.0)
    mapped = jax.shard_map(
        update_of(tx), mesh=AUTO, in_specs=P("model"), out_specs=P("model"), axis_names={"model"}, check_vma=False
    )
    (warning,) = shown(lambda: jax.eval_shape(jax.jit(mapped), {"kernel": np.ones((4, 3), np.float32)}))
    assert "('model',)" in str(warning.message)
    assert "data" not in str(warning.message)


def test_nothing_to_measure_is_nothing_to_warn_of():
    assert shown(lambda: jax.jit(unchecked(oc.clip_by_global_norm(1.0)))({})) == []


# Gradients that are not reduced yet.


# Each coordinate by itself, and no state beside it: whatever a device holds can be clipped.
NOTHING_BESIDE = {"arcsinh_clip", "clip", "clip_by_value", "tanh_clip", "zero_nonfinite"}


def refusal(update):
    """What it says, if it is refused; else None."""
    try:
        update()
    except ValueError as error:
        return str(error)
    return None


def assert_says(message, pattern, nothing_of, row):
    assert message, row.name
    assert re.search(pattern, message), (row.name, message)
    for word in nothing_of:
        assert word not in message, (row.name, message)


def test_a_gradient_that_varies_where_its_parameter_does_not():
    grads, found = tree(0, "float32"), {}
    grads["dense"]["kernel"] = np.tile(grads["dense"]["kernel"], (4, 1))  # on each device as large as the parameter
    specs = {"dense": {"kernel": P("data"), "bias": P()}, "scale": P()}
    mapped = jax.shard_map(of_each_row(refusal, found), mesh=AUTO, in_specs=(specs, P()), out_specs=P())
    jax.eval_shape(mapped, grads, params("float32"))
    for row in ROWS:
        if row.public in NOTHING_BESIDE:
            assert found[row.name] is None, row.name
        else:
            pattern = r"dense/kernel'.*\('data',\).*has not been reduced yet"
            assert_says(found[row.name], pattern, ("bias", "model"), row)


def unreduced(mesh, leaf):
    sharding = NamedSharding(mesh, P(*(None for _ in leaf.shape), unreduced={"data"}))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def test_a_gradient_that_an_explicit_mesh_knows_to_be_unreduced():
    grads, found = tree(0, "float32"), {}
    grads["dense"]["kernel"] = unreduced(EXPLICIT, grads["dense"]["kernel"])
    jax.eval_shape(of_each_row(refusal, found), grads, params("float32"))
    for row in ROWS:
        assert_says(found[row.name], r"dense/kernel'.*unreduced.*\('data',\).*Reduce it first", ("bias",), row)


# Names that are no axis.


@pytest.mark.parametrize("axes", ["dat", ("data", "dat"), P("dat"), ["dat"]], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_misspelt_axis_raises_where_there_are_others(axes, check_vma):
    tx = oc.clip_by_global_norm(1.0, axes=axes)
    mapped = jax.shard_map(update_of(tx), mesh=AUTO, in_specs=BOTH, out_specs=BOTH, check_vma=check_vma)
    with pytest.raises(ValueError, match=r"axes='dat' is no axis of the mesh, which has \('data', 'model'\)"):
        jax.eval_shape(mapped, GRADS)


def test_a_list_of_names_is_as_good_as_a_tuple():
    def norms(grads):
        return [oc.global_norm(grads, axes=axes) for axes in (["data", "model"], ("data", "model"))]

    of_list, of_tuple = jax.jit(jax.shard_map(norms, mesh=AUTO, in_specs=BOTH, out_specs=P()))(GRADS)
    assert of_list == of_tuple


# Where names take every leaf to be split.


TWO = {"split": np.ones((8, 3), np.float32), "whole": np.ones(3, np.float32)}
OF_TWO = {"split": BOTH, "whole": P()}


def unchecked_pair(tx, grads=TWO, specs=OF_TWO):
    mapped = jax.shard_map(update_of(tx), mesh=AUTO, in_specs=(specs,), out_specs=specs, check_vma=False)
    return lambda: jax.eval_shape(mapped, grads)


@pytest.mark.parametrize("axes", ["data", ("data", "model")])
def test_names_beside_a_leaf_that_may_be_whole_are_warned_of(axes):
    (warning,) = shown(unchecked_pair(oc.clip_by_global_norm(1.0, axes=axes)))
    for word in (f"axes={axes!r}", "whole on every device", "once per device", "PartitionSpecs"):
        assert word in str(warning.message)
    assert warning.filename == __file__


def test_a_scalar_cannot_be_split_whatever_is_named():
    scalar = {"scale": np.float32(1.0)}
    call = unchecked_pair(oc.clip_by_global_norm(1.0, axes="data"), scalar, {"scale": P()})
    assert "whole on every device" in str(shown(call)[0].message)


def test_what_the_warnings_recommend_silences_them_and_is_right():
    tx = oc.clip_by_global_norm(1.0, axes=OF_TWO, record=1)

    def update(grads):
        updates, state = tx.update(grads, tx.init(grads))
        return updates, optax.tree.get(state, "clip_norm")[0, 0]

    mapped = jax.shard_map(update, mesh=AUTO, in_specs=(OF_TWO,), out_specs=(OF_TWO, P()), check_vma=False)
    norms = []
    assert shown(lambda: norms.append(jax.jit(mapped)(TWO)[1])) == []
    np.testing.assert_allclose(norms[0], np.sqrt(8 * 3 + 3), rtol=1e-6)


def test_names_are_silent_where_the_types_know_and_outside_of_any_mesh():
    tx = oc.clip_by_global_norm(1.0, axes=("data", "model"))
    tracked = jax.shard_map(update_of(tx), mesh=AUTO, in_specs=(OF_TWO,), out_specs=OF_TWO)
    for mapped in (tracked, update_of(tx)):
        assert shown(lambda mapped=mapped: jax.eval_shape(mapped, TWO)) == []


# One model per device.


@pytest.mark.parametrize(("axes", "alone"), [("auto", False), (None, True)], ids=repr)
def test_a_record_says_over_which_axes_its_norm_went(axes, alone):
    """Four seeds on the devices of an axis: "auto" makes one norm of them, without a word; None clips each alone."""
    tx = oc.clip_by_global_norm(1.0, axes=axes, record=1)
    grads = np.float32([[0.5], [5.0], [0.1], [500.0], [1.0], [0.2], [0.3], [0.4]])

    def update(grads):
        updates, state = tx.update(grads, tx.init(grads))
        return updates, jax.tree.map(lambda leaf: leaf[None], state)

    mapped = jax.shard_map(update, mesh=AUTO, in_specs=BOTH, out_specs=(BOTH, BOTH), check_vma=True)
    results = []
    assert shown(lambda: results.append(jax.jit(mapped)(grads))) == []
    ((updates, state),) = results
    found = oc.clip_stats(jax.tree.map(lambda leaf: np.asarray(leaf)[0], state))
    expected = np.minimum(1, grads) if alone else grads / np.linalg.norm(grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert found.get("norm_axes") == (None if alone else "data,model")
