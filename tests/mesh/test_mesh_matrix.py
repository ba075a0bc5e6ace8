"""Every row of the table, laid out in the usual ways, in everything jax has for many devices, against one device.

A few steps run in one scan: a quiet one, a louder one, a spike, one with a NaN on one device, and one after it. So
states count, every device must have taken the same decisions, and a state that should be replicated must stay so.
"""

import functools
import inspect
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import optaxclip as oc
from optaxclip import contrib
from tests.reference.trees import stack
from tests.support.collectives import collectives, collectives_under_branches
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, EXPLICIT, P, is_spec, over_steps, pieces, put, with_specs
from tests.support.public import NAMES, public
from tests.table import ROWS, numbers, spectral

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

# One of each kind of norm and each class of state, with its kind of threshold.
OF_EACH_KIND = {
    *("clip", "clip_by_global_norm", "clip_by_global_norm-p1", "clip_by-inf_norm-exactly", "clip_by_block_rms"),
    *("adaptive_grad_clip", "clip_by-unit_norm-relative_to_params", "clip_by_leaf_norm-stacked", "clippy"),
    *("clip_by-group_norm-bound_per_group", "clip_by-leaf_norm-mixed_bounds", "zclip-scheduled-recorded", "adagc"),
    *("adaptive_grad_clip-scheduled-recorded", "autoclip-window", "mixed_clip", "scale_by_stable_adam"),
    *("skip_spikes", "with_carry"),
    # These are refused, before anything is compiled.
    *("clip_by_spectral_norm", "clip_by-unit_norm-zscore-ema_ratio", "clip_by-leaf_rms-mean_std-quantile"),
}
a_row_of_each_kind = pytest.mark.parametrize(
    "row", slow_but(ROWS, *(row for row in ROWS if row.name in OF_EACH_KIND)), ids=lambda row: row.name
)


# The tree: the paths of the table, every leaf of which can be split over eight devices.


def tree(seed):
    return {
        "dense": {"kernel": numbers(seed, (8, 8), "float32"), "bias": numbers(seed + 1, (8,), "float32")},
        "scale": numbers(seed + 2, (16,), "float32"),
    }


PARAMS = jax.tree.map(np.asarray, tree(100))
STEPS = 5
# Of every step, as in a training: what a method makes of constant ones could be moved out of the loop.
WEIGHTS = jax.tree.map(lambda leaf: np.stack([leaf * np.float32(1 + i / 8) for i in range(STEPS)]), PARAMS)


def gradients():
    """Of every step. Signs stay, so that averages do not cancel and errors are relative."""
    sizes = np.float32([1.0, 1.5, 7.0, 1.2, 0.9])
    signs = jax.tree.map(np.sign, tree(0))
    grads = [jax.tree.map(lambda leaf, sign, size=size: np.abs(leaf) * sign * size, tree(10 * i), signs)
             for i, size in enumerate(sizes)]  # fmt: skip
    stacked = stack(grads)
    stacked["dense"]["kernel"][3, 5, 6] = np.nan
    return stacked


GRADS = gradients()


def spread():
    """Steps in which the devices are 60 orders of magnitude apart; what is large is only in the first rows."""
    grads = jax.tree.map(lambda leaf: leaf * np.float32(1e-30), GRADS)
    grads["dense"]["kernel"] = np.nan_to_num(grads["dense"]["kernel"], nan=1e-30)
    grads["dense"]["kernel"][:, 0] *= np.float32(1e30)
    grads["dense"]["kernel"][:, 0] *= np.float32(1e30)
    return grads


SPREAD = spread()


# How they can be laid out.


class Layout(NamedTuple):
    """Of updates, and of what optimizers keep beside them; parameters are laid out alike but in ZeRO-1.

    Attributes:
      specs: over which axes each leaf is split.
      manual: the axis of a partly manual `shard_map`.
      params: the specs of the parameters, where they differ.
    """

    specs: Any
    manual: str = "data"
    params: Any = None

    @property
    def param_specs(self):
        return self.specs if self.params is None else self.params


def specs(kernel, bias, scale):
    return {"dense": {"kernel": kernel, "bias": bias}, "scale": scale}


LAYOUTS = {
    "tensor parallel": Layout(specs(P(None, "model"), P("model"), P()), "model"),
    "FSDP": Layout(specs(P("data"), P("data"), P("data"))),
    "ZeRO-1": Layout(specs(P("data"), P("data"), P("data")), params=specs(P(), P(), P())),
    "data parallel": Layout(specs(P(), P(), P())),
    "mixed": Layout(specs(P("data", "model"), P("data"), P())),
}
MIXED = LAYOUTS["mixed"]


def renamed(specs, names):
    """The specs with axes called as `names` says, and without those that it has not."""
    return with_specs(lambda spec: P(*(names.get(name) for name in spec)), specs)


# What can't work, and why.


# Norms of parts of a leaf: the types say over which axes a leaf is split, and not which of its dimensions. Which
# dimensions of the kernel stay, that is: have a norm for each of their entries.
PARTS = {
    "adaptive_grad_clip": (1,),
    "adaptive_grad_clip-oi": (0,),
    "adaptive_grad_clip-scheduled-recorded": (1,),
    "clip_by_leaf_norm-stacked": (0,),
    "clip_by-unit_norm-zscore-ema_ratio": (1,),
    "clip_by-leaf_rms-mean_std-quantile": (0,),
    "clip_by-unit_norm-relative_to_params": (0, 1),
    "clip_by-leaf_norm-mixed_bounds": (0,),
}
NEED_SPECS = r"dense/kernel.*axes= as a PartitionSpec"
# Those of them whose threshold has a state for each part: every device would have that of its own parts alone.
HISTORY_OF_PARTS = {"clip_by-unit_norm-zscore-ema_ratio", "clip_by-leaf_rms-mean_std-quantile"}
# Which compare an update with its parameter: of a parameter that is whole, shard_map has not the piece beside it.
BESIDE_PARAMS = {row.name for row in ROWS if row.needs_params}


def refused(row, layout, bound):
    """The message where something can't work; `bound` are the axes that are bound."""
    if layout.params is not None and row.name in BESIDE_PARAMS:
        return r"differ in shape"
    kernel = layout.specs["dense"]["kernel"]
    if row.measure is spectral and any(name in bound for name in kernel):
        return r"matrix 'dense/kernel' is split over mesh axes"
    kept = [kernel[dim] for dim in PARTS.get(row.name, ()) if dim < len(kernel)]
    if row.name in HISTORY_OF_PARTS and any(name in bound for name in kept):
        return r"groups lie on different devices|in shard_map, init and update must see the same pieces"
    return None


# Rows with axes.


def with_axes(row, axes):
    """The row's transformation with `axes` wherever something takes them."""

    def given(name):
        function = public(name)
        takes = inspect.isfunction(function) and "axes" in inspect.signature(function).parameters
        return functools.partial(function, axes=axes) if takes else function

    replaced = {name: given(name) for name in NAMES}
    factory = next((replaced[name] for name in NAMES if public(name) is row.factory), row.factory)
    in_contrib = {name: replaced.pop(name) for name in oc.contrib.__all__}
    with mock.patch.multiple(oc, **replaced), mock.patch.multiple(oc.contrib, **in_contrib):
        return factory(*row.args, **row.kwargs)


def axes_of(row, specs):
    """What a row needs in `shard_map` where the types know the rest."""
    return specs if row.name in PARTS else "auto"


def steps(tx, state, params, grads):
    """The updates of all steps, and the state after them."""

    def step(state, now):
        grads, params = now
        updates, state = tx.update(grads, state, params)
        return state, updates

    return jax.lax.scan(step, state, (grads, params))[::-1]


def first_state(tx):
    """Made outside of all meshes, from whole parameters."""
    return jax.tree.map(np.asarray, tx.init(PARAMS))


def state_specs(tx, specs):
    """As the updates, where the state has an entry per parameter; the same on all devices elsewhere."""
    state = jax.eval_shape(tx.init, PARAMS)
    return optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())


@functools.cache
def one_device(row):
    """The compiled steps, which every test of this row is held against."""
    tx = row.make()
    return jax.jit(functools.partial(steps, tx))


@functools.cache
def expected(row):
    return jax.tree.map(np.asarray, one_device(row)(first_state(row.make()), WEIGHTS, GRADS))


# Comparing.


UPDATES, STATES = 1e-6, 1e-5


def near_zero(row):
    """What coordinates that are sums of others can differ by: those others' rounding, which are of order 10."""
    return 10 * UPDATES if row.sums else 0.0


def assert_close(path, actual, want, rtol, atol=0.0):
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(actual, want, err_msg=path)
        return
    np.testing.assert_allclose(actual, want, rtol=rtol, atol=atol, err_msg=path)


# It names the mesh's axes, which one device has not: tests/mesh/test_mesh_messages.py looks at it.
AXES_OF_A_RECORD = jax.tree_util.GetAttrKey("norm_axes")


def assert_same(actual, want, atol=0.0):
    """Updates and state, on every device that has a copy or a piece of them."""
    for part, rtol, theirs, ours in zip(("updates", "state"), (UPDATES, STATES), actual, want, strict=True):
        assert jax.tree.structure(theirs) == jax.tree.structure(ours)
        flat = jax.tree_util.tree_leaves_with_path(theirs)
        for (path, leaf), whole in zip(flat, jax.tree.leaves(ours), strict=True):
            if path and path[-1] == AXES_OF_A_RECORD:
                continue
            assert leaf.shape == whole.shape, path
            assert leaf.dtype == whole.dtype, path
            assert len(leaf.addressable_shards) == 8
            for shard in leaf.addressable_shards:
                name = f"{part} {jax.tree_util.keystr(path)}, {shard.device}"
                assert_close(name, np.asarray(shard.data), whole[shard.index], rtol, atol)


def assert_laid_out(outputs, specs, mesh):
    """Each array split as its spec says, and every other one whole on all devices."""

    def check(spec, leaf):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (spec, leaf.sharding)

    with_specs(check, specs, outputs)


def assert_clips(row):
    """A row that never did anything would pass."""
    updates, _ = expected(row)
    flat = zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True)
    assert any(not np.array_equal(after, before, equal_nan=True) for after, before in flat)


# The ways to run steps.


def under_jit(row, layout, mesh):
    """The updates of all steps and the state after them, from one step that is jitted."""
    tx = row.make()
    out_specs = (layout.specs, state_specs(tx, layout.specs))
    updates, state, traced = [], put(first_state(tx), out_specs[1], mesh), []

    @jax.jit
    def update(*arguments):
        traced.append(arguments)
        return tx.update(*arguments)

    for i in range(STEPS):
        grads, params = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (GRADS, WEIGHTS))
        update_now, state = update(put(grads, layout.specs, mesh), state, put(params, layout.param_specs, mesh))
        assert_laid_out((update_now, state), out_specs, mesh)
        updates.append(update_now)
    assert len(traced) == 1  # a state that comes back as another type would be another trace
    return updates, state


def mapped(row, layout, axes, **options):
    """The compiled `shard_map`, as a function of whole gradients."""
    tx = with_axes(row, axes)
    names = options.get("axis_names", set(AUTO.axis_names))
    manual = functools.partial(renamed, names={name: name for name in names})
    whole = (over_steps(layout.specs), state_specs(tx, layout.specs))
    bound = (over_steps(manual(layout.specs)), manual(whole[1]))
    program = jax.jit(
        jax.shard_map(
            functools.partial(steps, tx),
            mesh=AUTO,
            in_specs=(bound[1], over_steps(manual(layout.param_specs)), bound[0]),
            out_specs=bound,
            **options,
        )
    )
    fixed = put(first_state(tx), whole[1], AUTO), put(WEIGHTS, over_steps(layout.param_specs), AUTO)

    def arguments(grads):
        return *fixed, put(grads, whole[0], AUTO)

    return program, arguments, whole


def in_shard_map(row, layout, axes, **options):
    program, arguments, whole = mapped(row, layout, axes, **options)
    outputs = program(*arguments(GRADS))
    assert_laid_out(outputs, whole, AUTO)
    return outputs


def along_one_axis(row, layout, transform):
    """In `pmap` or `vmap`; and what is expected of each of the eight."""
    names = dict.fromkeys(AUTO.axis_names, "device")
    specs, param_specs = renamed(layout.specs, names), renamed(layout.param_specs, names)
    if not any(jax.tree.leaves(specs, is_leaf=is_spec)):
        axes = None
    else:
        by_name = all(jax.tree.leaves(specs, is_leaf=is_spec)) and row.name not in PARTS
        axes = "device" if by_name else specs
    tx = with_axes(row, axes)
    states = state_specs(tx, specs)
    arguments = [
        with_specs(lambda spec, leaf: pieces(leaf, spec), *each)
        for each in ((states, first_state(tx)), (over_steps(param_specs), WEIGHTS), (over_steps(specs), GRADS))
    ]
    outputs = jax.jit(transform(functools.partial(steps, tx), axis_name="device"))(*arguments)
    return outputs, with_specs(lambda spec, leaf: pieces(leaf, spec), (over_steps(specs), states), expected(row))


def assert_same_pieces(actual, want, atol=0.0):
    for part, rtol, theirs, ours in zip(("updates", "state"), (UPDATES, STATES), actual, want, strict=True):
        flat = jax.tree_util.tree_leaves_with_path(theirs)
        for (path, leaf), whole in zip(flat, jax.tree.leaves(ours), strict=True):
            if path and path[-1] == AXES_OF_A_RECORD:
                continue
            assert_close(f"{part} {jax.tree_util.keystr(path)}", np.asarray(leaf), whole, rtol, atol)


def assert_first_inside(row, updates):
    """The first step, measured in float64, where the first step is clipped at all."""
    first = jax.tree.map(lambda leaf: leaf[0], updates)
    for name, (norm, low, high) in row.measured(first, PARAMS).items():
        assert low - 1e-6 * abs(low) <= norm <= high + 1e-6 * abs(high), (name, norm, low, high)


# One mixed sharding.


@functools.cache
def mixed(row):
    """The compiled program in which a leaf is split over both axes, one over one, one over none."""
    program, arguments, _ = mapped(row, MIXED, axes_of(row, MIXED.specs))
    return program.lower(*arguments(GRADS)).compile(), arguments


# A leaf is split over {data, model} and one over {data}: two sets of axes, so two collectives, and besides:
MORE_COLLECTIVES = {
    "clip_by_global_norm-recorded": 1,  # which leaf is the first that is not finite
    "zclip-scheduled-recorded": 1,
    "adaptive_grad_clip-scheduled-recorded": 3,  # and which unit stands for a leaf whose units lie on several devices
    "skip_nonfinite": 2,  # what is wrapped measures again: zeros, if the step is left out
    "skip_spikes": 2,
}


@a_row_of_each_kind
def test_a_mixed_sharding(row):
    if message := refused(row, MIXED, AUTO.axis_names):
        with pytest.raises(ValueError, match=message):
            mixed(row)
        return
    program, arguments = mixed(row)
    assert_same(program(*arguments(GRADS)), expected(row))
    assert_clips(row)
    text = program.as_text()
    assert len(collectives(text)) <= (0 if row.elementwise else 2 + MORE_COLLECTIVES.get(row.name, 0))
    assert collectives_under_branches(text) == []
    far_apart = jax.tree.map(np.asarray, one_device(row)(first_state(row.make()), WEIGHTS, SPREAD))
    # What would be subnormal may be 0.
    assert_same(program(*arguments(SPREAD)), far_apart, atol=1.2e-38)
    assert_first_inside(row, far_apart[0])


# All of it.


# What can run a layout: those are the columns of the matrix, and the layouts that each of them can have.
UNMIXED = [layout for layout in LAYOUTS.values() if layout is not MIXED]
COLUMNS = {
    "jit, auto": list(LAYOUTS.values()),
    "jit, explicit": list(LAYOUTS.values()),
    "checked": UNMIXED,  # the test above has the mixed one
    "unchecked": list(LAYOUTS.values()),
    "partly manual": list(LAYOUTS.values()),
    "pmap": UNMIXED,  # the mixed one needs two axes
    "vmap": UNMIXED,
}


def layout_of(row, column):
    """One layout; the next rows of the table have the others, and rows of one norm stand beside each other."""
    layouts = COLUMNS[column]
    return layouts[(ROWS.index(row) + list(COLUMNS).index(column)) % len(layouts)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@each_row
def test_jit(row, mesh):
    updates, state = under_jit(row, layout_of(row, "jit, auto" if mesh is AUTO else "jit, explicit"), mesh)
    wanted, wanted_state = expected(row)
    for i, now in enumerate(updates):
        assert_same((now, ()), (jax.tree.map(lambda leaf, i=i: leaf[i], wanted), ()), near_zero(row))
    assert_same(((), state), ((), wanted_state))


WAYS = {
    "checked": lambda row, layout: {"axes": axes_of(row, layout.specs)},
    "unchecked": lambda row, layout: {"axes": layout.specs, "check_vma": False},
    "partly manual": lambda row, layout: {"axes": axes_of(row, layout.specs), "axis_names": {layout.manual}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "way"),
    [
        pytest.param(row, way, id=f"{row.name}-{way}")
        for row in ROWS
        for way in WAYS
        # The other rows have been checked with the mixed layout.
        if way != "checked" or row.name in OF_EACH_KIND
    ],
)
def test_shard_map(row, way):
    layout = layout_of(row, way)
    options = WAYS[way](row, layout)
    if message := refused(row, layout, options.get("axis_names", AUTO.axis_names)):
        with pytest.raises(ValueError, match=message):
            in_shard_map(row, layout, **options)
    else:
        assert_same(in_shard_map(row, layout, **options), expected(row), near_zero(row))


@pytest.mark.filterwarnings("ignore:axes=.device. assumes that every leaf is split")  # in pmap every leaf is
@pytest.mark.slow
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap], ids=["pmap", "vmap"])
@each_row
def test_one_named_axis(row, transform):
    layout = layout_of(row, transform.__name__)
    if message := refused(row, layout, AUTO.axis_names):
        with pytest.raises(ValueError, match=message):
            along_one_axis(row, layout, transform)
    else:
        assert_same_pieces(*along_one_axis(row, layout, transform), near_zero(row))


# What the types know, and what is said.


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in PARTS], ids=lambda row: row.name)
def test_norms_of_parts_of_a_leaf_need_partition_specs(row):
    for layout, axes in (
        ("tensor parallel", "auto"),
        ("FSDP", "data"),
        ("mixed", "auto"),
        ("mixed", ("data", "model")),
    ):
        program, arguments, _ = mapped(row, LAYOUTS[layout], axes)
        with pytest.raises(ValueError, match=NEED_SPECS):
            program.trace(*arguments(GRADS))


# Nothing is measured, or only by what is wrapped.
NO_AXES = {
    *("clip", "clip_by_value", "qk_clip", "reset_state_every", "scale_by_acclip", "spam_clip", "with_carry"),
    *("arcsinh_clip", "tanh_clip", "zero_nonfinite"),
}


def test_whatever_measures_takes_axes():
    makers = {row.public: public(row.public) for row in ROWS}
    assert {name for name, make in makers.items() if "axes" not in inspect.signature(make).parameters} == NO_AXES


def carried_by_leaf(max_norm):
    return oc.with_carry(oc.clip_by_leaf_norm(max_norm))


@pytest.mark.parametrize(
    "make",
    [oc.clipped_momentum, contrib.mixed_clip, contrib.centered_clip, carried_by_leaf],
    ids=lambda make: make.__name__,
)
def test_a_whole_leaf_beside_a_split_one_of_its_shape_stays_whole(make):
    """On an Auto mesh, where it was calculated here: as what comes in is laid out is what the user said."""
    specs = {"split": P("model"), "whole": P()}
    grads = put({name: np.ones(8, np.float32) for name in specs}, specs, AUTO)
    tx = make(1.0)
    outputs = jax.jit(tx.update)(grads, tx.init(grads), grads)
    beside_params = [
        tree for tree in jax.tree.leaves(outputs, is_leaf=lambda node: isinstance(node, dict)) if isinstance(tree, dict)
    ]
    assert len(beside_params) >= 2
    for tree in beside_params:
        assert_laid_out(tree, specs, AUTO)
