"""Models of Equinox and Flax as parameters, labels and bounds, without a line for them in the library."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib, norms, thresholds
from tests.support.imports import imported
from tests.table import ROWS

eqx, nn, nnx = imported("equinox"), imported("flax.linen"), imported("flax.nnx")


# Equinox: the model is its own parameters.


class Model(eqx.Module):
    dense: dict
    scale: jax.Array
    drop: eqx.nn.Dropout
    activation: object
    table: jax.Array
    name: str
    nothing: None

    def __call__(self, x):
        return self.activation(x @ self.dense["kernel"] + self.dense["bias"]) * self.scale


@functools.cache
def model():
    dense = {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.ones(3)}
    return Model(dense, jnp.asarray(2.0), eqx.nn.Dropout(0.5), jax.nn.relu, jnp.arange(3), "a name", None)


@functools.cache
def gradient():
    return eqx.filter_jit(eqx.filter_grad(lambda model: jnp.sum(model(jnp.full(4, 3.0)))))(model())


def wrapped(inner):
    """What else a model passes through on its way to a clipper."""
    return {
        "recorded": oc.clip_by(norms.leaf_norm(), thresholds.zscore(warmup_steps=1), record=2),
        "skip_spikes": oc.skip_spikes(oc.clip_by_leaf_norm(1.0), thresholds.mean_std(6.0), norm=norms.leaf_norm()),
        "skip of AGC": oc.skip_nonfinite(oc.adaptive_grad_clip(0.1)),
        "chain with Adam": optax.chain(oc.zclip(record=True), optax.scale_by_adam(), oc.clip_by_block_rms(1.0)),
    }[inner]


# The first row of each method, and those where a norm or a threshold looks at parameters, units or paths.
THAT_LOOK = {
    "clip_by_leaf_norm-stacked",
    "clip_by-group_norm-constant",
    "clip_by-unit_norm-relative_to_params",
    "clip_by-leaf_norm-relative_to_params-constant",
    "clip_by-relative_change-between",
    "clip_by-spectral_norm-zscore",
    "clip_by-included-smooth",
}
FIRST = {row.public: row.name for row in reversed(ROWS) if row.any_tree and row.public != "clip_by"}
ALL = {row.name: row.make for row in ROWS if row.name in THAT_LOOK.union(FIRST.values())} | {
    name: lambda name=name: wrapped(name) for name in ("recorded", "skip_spikes", "skip of AGC", "chain with Adam")
}


@pytest.mark.parametrize("name", ALL)
def test_a_whole_equinox_model_is_its_parameters(name):
    tx, grads = ALL[name](), gradient()
    arrays = eqx.filter(model(), eqx.is_inexact_array)

    def program(params):
        return jax.make_jaxpr(lambda grads, state: tx.update(grads, state, params, value=1.0), return_shape=True)(
            grads, jax.eval_shape(tx.init, arrays)
        )

    (filtered, out), (whole, same) = program(arrays), program(model())
    assert str(whole) == str(filtered)
    chex.assert_trees_all_equal_structs(out, same)
    chex.assert_trees_all_equal_structs(out[0], grads)


def test_what_is_frozen_in_an_equinox_model_counts_as_zero_and_stays_none():
    grads = eqx.tree_at(lambda tree: tree.dense["bias"], gradient(), None)
    for params in (model(), eqx.filter(model(), eqx.is_array)):
        tx = oc.clip_by(norms.leaf_norm(), thresholds.zscore(warmup_steps=1), record=2)
        state = jax.jit(tx.init)(eqx.filter(model(), eqx.is_array))
        updates, state = jax.jit(lambda *args, tx=tx, params=params: tx.update(*args, params))(grads, state)
        assert updates.dense["bias"] is None
        assert oc.clip_stats(state, per_group=True)["clip_norm/dense/bias"] == 0.0


def test_a_parameter_that_is_none_is_missed_by_its_name():
    params = {"a": jnp.ones(2), "b": None}
    with pytest.raises(ValueError, match="update 'b' has no parameter beside it; params has arrays at 'a'"):
        oc.adaptive_grad_clip(0.1).update({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.EmptyState(), params)
    updates, _ = oc.clip_by_global_norm(1.0).update({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.EmptyState(), params)
    np.testing.assert_allclose(updates["b"], 0.5, rtol=1e-6)


# Pytrees whose own type is callable are pytrees.


def test_a_callable_model_of_values_is_a_pytree():
    def values(kernel, bias, scale):
        tree = jax.tree.map(lambda _: None, model())
        where = lambda tree: (tree.dense["kernel"], tree.dense["bias"], tree.scale)  # noqa: E731
        return eqx.tree_at(where, tree, (kernel, bias, scale), is_leaf=lambda x: x is None)

    assert callable(values(1, 1, 1))
    grads = gradient()
    size = {name: np.linalg.norm(leaf) for name, leaf in (*grads.dense.items(), ("scale", grads.scale))}

    def clipped(tx):
        state = tx.init(eqx.filter(model(), eqx.is_array))
        updates, _ = jax.jit(lambda grads, state: tx.update(grads, state, model()))(grads, state)
        return [np.linalg.norm(leaf) for leaf in (*updates.dense.values(), updates.scale)]

    bounds = clipped(oc.clip_by_leaf_norm(values(1.0, 0.5, None)))
    np.testing.assert_allclose(bounds, [0.5, 1.0, size["scale"]], rtol=1e-6)
    included = clipped(oc.clip_by(norms.global_norm(include=values(False, True, None)), thresholds.constant(0.5)))
    np.testing.assert_allclose(included, [0.5, size["kernel"], size["scale"]], rtol=1e-6)
    labelled = clipped(oc.clip_by(norms.group_norm(values(None, "a", "b")), thresholds.constant({"a": 0.5, "b": 1.0})))
    np.testing.assert_allclose(labelled, [0.5, size["kernel"], 1.0], rtol=1e-6)
    stacked = clipped(oc.clip_by_leaf_norm(1.0, stacked=values(1, None, None)))
    np.testing.assert_allclose(stacked, [1.0, 2.0, 1.0], rtol=1e-6)  # four rows of the kernel, each a group


NONE_IN_BOUNDS = {
    "clip": (oc.clip({"a": 1.0, "b": None}), [1.0, 1.0], [3.0, 4.0]),
    "clip_by_value": (oc.clip_by_value({"a": None, "b": 3.5}, {"a": 1.0, "b": None}), [1.0, 1.0], [3.5, 4.0]),
    "constant": (oc.clip_by_leaf_norm({"a": 1.0, "b": None}), [0.6, 0.8], [3.0, 4.0]),
    "scheduled": (oc.clip_by_leaf_norm({"a": lambda count: 1.0, "b": None}), [0.6, 0.8], [3.0, 4.0]),
    "between": (
        oc.clip_by_norm_range({"a": None, "b": 10.0}, {"a": 1.0, "b": None}, norm=norms.leaf_norm()),
        [0.6, 0.8],
        [6.0, 8.0],
    ),
    "exactly": (oc.clip_by(norms.leaf_norm(), thresholds.exactly({"a": 1.0, "b": None})), [0.6, 0.8], [3.0, 4.0]),
    "smooth": (oc.clip_by(norms.leaf_norm(), thresholds.smooth({"a": 5.0, "b": None})), [1.5, 2.0], [3.0, 4.0]),
    "relative": (oc.adaptive_grad_clip({"a": 0.1, "b": None}, units="leaf"), [0.3, 0.4], [3.0, 4.0]),
    "floor": (
        oc.clip_by(norms.leaf_norm(), thresholds.relative_to_params(0.1, floor={"a": 100.0, "b": None})),
        [3.0, 4.0],
        [0.3, 0.4],
    ),
    "chain": (
        oc.clip_by(
            norms.leaf_norm(),
            thresholds.chain(thresholds.constant({"a": 1.0, "b": None}), thresholds.constant({"a": None, "b": 10.0})),
        ),
        [0.6, 0.8],
        [3.0, 4.0],
    ),
    "singular values": (oc.clip_singular_values({"a": 1.0, "b": None}), [0.6, 0.8], [3.0, 4.0]),
}


@functools.cache
def bounded():
    """What comes out of each of them, in one program."""

    @jax.jit
    def all_of(grads):
        return {case: tx.update(grads, tx.init(grads), grads)[0] for case, (tx, *_) in NONE_IN_BOUNDS.items()}

    return all_of({name: np.float32([3, 4]) for name in "ab"})


@pytest.mark.parametrize("case", NONE_IN_BOUNDS)
def test_none_in_a_pytree_of_bounds_is_no_bound_for_that_leaf(case):
    _, a, b = NONE_IN_BOUNDS[case]
    updates = bounded()[case]
    np.testing.assert_allclose([updates["a"], updates["b"]], [a, b], rtol=1e-6)


# Flax.


def test_clip_stats_reads_what_nnx_boxes_inside_and_outside_of_its_jit():
    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(oc.clip_by_leaf_norm(0.5, record=2), oc.skip_nonfinite(optax.sgd(0.1)))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x):
        optimizer.update(net, nnx.grad(lambda net: jnp.sum(net(x) ** 2))(net))
        return oc.clip_stats(optimizer.opt_state)

    inside = step(net, optimizer, jnp.ones((4, 2)))
    outside = oc.clip_stats(optimizer.opt_state, per_group=True)
    assert (inside["clip_steps"], inside["skip_steps"]) == (outside["clip_steps"], outside["skip_steps"]) == (1, 1)
    assert float(inside["clip_norm"]) == outside["clip_norm"]
    assert {"clip_norm/bias", "clip_norm/kernel"} <= set(outside)


def nnx_state():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(jnp.ones_like, state)


def boxed():
    leaf = jnp.ones((2, 3))
    return {"kernel": nn.Partitioned(leaf, (None, "model")), "bias": nn.LogicallyPartitioned(leaf[0], ("x",))}


def unboxed():
    return {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


TREES = list(itertools.product([nnx_state, boxed, unboxed], [boxed, unboxed]))


def clips_of(seen_by_init):
    """By a function of the path, a dict, and a tree in boxes."""
    chosen = {
        "a function": norms.global_norm(include=lambda path: path.endswith("kernel")),
        "a dict": norms.global_norm(include={"kernel": True, "bias": False}),
        "boxed values": norms.global_norm(include=jax.tree.map(lambda x: x.ndim == 2, seen_by_init())),
    }
    clips = {name: oc.clip_by(norm, thresholds.constant(1.0), record=1) for name, norm in chosen.items()}
    clips["bounds"] = oc.clip_by_leaf_norm({"kernel": 1.0, "bias": 0.5}, record=1)
    clips["labels"] = contrib.aggc({"kernel": "a", "bias": "b"}, 2.0)
    return clips


@functools.cache
def clipped():
    """What each clip makes of each two trees; XLA sees the same arrays in all of them."""

    def update(tx, grads, seen, leaves):
        return tx.update(jax.tree.unflatten(jax.tree.structure(grads), leaves), tx.init(seen))

    @jax.jit
    def all_of(leaves):
        return [
            {
                name: update(tx, grads(), grads() if grads is nnx_state else seen_by_init(), leaves)
                for name, tx in clips_of(seen_by_init).items()
            }
            for grads, seen_by_init in TREES
        ]

    return all_of([jnp.ones(3), jnp.ones((2, 3))])


@pytest.mark.parametrize(("grads", "seen_by_init"), TREES)
def test_flax_boxes_are_on_no_path_and_plain_dicts_fit_them(grads, seen_by_init):
    done = clipped()[TREES.index((grads, seen_by_init))]
    length = {name: [np.linalg.norm(leaf) for leaf in jax.tree.leaves(each)] for name, (each, _) in done.items()}
    for name in ("a function", "a dict", "boxed values"):
        np.testing.assert_allclose(length[name], [3**0.5, 1.0], rtol=1e-6)
        assert oc.clip_stats(done[name][1])["clip_norm"] == pytest.approx(6**0.5)
    np.testing.assert_allclose(length["bounds"], [0.5, 1.0], rtol=1e-6)
    assert oc.clip_stats(done["bounds"][1], per_group=True)["clip_limit/kernel"] == 1.0


def test_a_dict_that_does_not_fit_an_nnx_state_is_named():
    problem = "include does not fit the updates: "
    cases = {
        "'bias' is in updates but not in include, which has 'kernel'": {"kernel": True},
        "'gain' is in include but not in updates, which has 'bias', 'kernel'": dict.fromkeys(
            ("kernel", "bias", "gain"), True
        ),
    }
    for parting, labels in cases.items():
        tx = oc.clip_by(norms.global_norm(include=labels), thresholds.constant(1.0))
        with pytest.raises(ValueError, match=problem + parting):
            tx.init(nnx_state())


# Keys of any characters.


KEYS = ["\0", "a\0b", "", "/", "ключ", "\ud800"]


@functools.cache
def recorded():
    """The state after a step with each of them."""
    tx = oc.clip_by_leaf_norm(1.0, record=1)

    @jax.jit
    def all_of(bad, other):
        trees = {key: {key: bad, "other": other} for key in KEYS}
        return [tx.update(tree, tx.init(tree))[1] for tree in trees.values()]

    return all_of(np.float32([3, np.nan]), np.ones(1, np.float32))


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_any_characters_are_paths(key):
    found = oc.clip_stats(recorded()[KEYS.index(key)], per_group=True)
    assert found["first_nonfinite_leaf"] == key
    assert {f"clip_norm/{key}", "clip_norm/other"} <= set(found)


def test_keys_with_a_slash_do_not_hide_other_leaves():
    tree = {"a/b": np.float32([9]), "a": {"b": np.float32([1])}}
    tx = oc.clip_by_leaf_norm(1.0, record=1)
    found = oc.clip_stats(jax.jit(lambda tree: tx.update(tree, tx.init(tree))[1])(tree), per_group=True)
    assert (found["clip_norm/['a/b']"], found["clip_norm/['a']['b']"]) == (9.0, 1.0)
    chain = optax.named_chain(("x/0", oc.clip_by_leaf_norm(1.0, record=1)), ("x", optax.chain(tx)))
    assert len([name for name in oc.clip_stats(chain.init(tree)) if name.endswith("clip_limit")]) == 2


def test_parameters_in_other_containers_than_the_gradients_fit_by_their_keys():
    update = jax.jit(oc.adaptive_grad_clip(0.1, units="leaf").update)
    for grads, params in ((unboxed(), boxed()), (nnx_state(), unboxed()), (unboxed(), nnx_state())):
        updates, _ = update(grads, optax.EmptyState(), params)
        lengths = sorted(np.linalg.norm(leaf) for leaf in jax.tree.leaves(updates))
        np.testing.assert_allclose(lengths, [0.1 * 3**0.5, 0.1 * 6**0.5], rtol=1e-6)


def test_none_among_partition_specs_is_a_leaf_that_is_whole():
    axes = {"w": jax.sharding.PartitionSpec(), "ids": None}
    grads, params = {"w": jnp.ones(4), "ids": None}, {"w": jnp.ones(4), "ids": jnp.arange(3)}
    updates, _ = oc.clip_by_leaf_norm(1.0, axes=axes).update(grads, optax.EmptyState(), params)
    np.testing.assert_allclose(updates["w"], 0.5)
