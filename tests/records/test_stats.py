"""The flight recorder: what a clipper did and what blew up first, from the state alone."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import ClipStats, Norm, clip_by, clip_stats, contrib, norms, thresholds
from tests.support.driving import together
from tests.table import halving

PARAMS = {"a": np.ones((2, 3), np.float32), "b": {"c": np.ones(3, np.float32), "d": np.float32(1)}}
RECORDED = optaxclip.clip_by_global_norm(1.0, record=True)  # one object, so that it is compiled once
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def grads(rng, scale):
    """Gradients of PARAMS of global norm `scale`."""
    flat, treedef = jax.tree.flatten(PARAMS)
    drawn = [rng.normal(size=leaf.shape) for leaf in flat]
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in drawn))
    return treedef.unflatten([np.asarray(leaf * scale / norm, np.float32) for leaf in drawn])


def run(tx, sequence, params=PARAMS):
    """The state after an update with each of the gradients."""
    update, state = jax.jit(tx.update), tx.init(params)
    sizes = []  # those that other tests with this transformation compiled count, too
    for each in sequence:
        _, state = update(each, state, params)
        sizes.append(update._cache_size())
    assert sizes[0] == sizes[-1]
    return state


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, float) for path, leaf in leaves}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, nan_ok=True)), name


# What is recorded.


def test_the_rings_hold_the_last_steps(rng):
    """Shorter than the run, dividing it or not, and longer."""
    scales, lengths = rng.lognormal(size=12), (1, 3, 7, 20)
    txs = together({length: optaxclip.clip_by_global_norm(halving, record=length) for length in lengths})
    states = run(txs, [grads(rng, scale) for scale in scales])
    limits = 1 / (1 + np.arange(12))
    for length in lengths:
        last = min(length, 12)
        seen = clip_stats(states[length], history=True)
        np.testing.assert_array_equal(seen["clip_steps"], np.arange(12 - last, 12) + 1)
        np.testing.assert_allclose(seen["clip_norm"], scales[-last:], rtol=1e-6)
        np.testing.assert_allclose(seen["clip_limit"], limits[-last:], rtol=1e-6)
        np.testing.assert_allclose(seen["clip_scale"], np.minimum(1, limits / scales)[-last:], rtol=1e-6)
        assert seen["clipped_share"] == pytest.approx(np.mean(scales > limits))
        now = clip_stats(states[length])
        assert now["clip_steps"] == 12
        assert {name: now[name] for name in ("clip_norm", "clip_limit", "clip_scale")} == {
            name: seen[name][-1] for name in ("clip_norm", "clip_limit", "clip_scale")
        }
        assert (now["nonfinite_steps"], now["first_nonfinite_step"], now["first_nonfinite_leaf"]) == (0, 0, "")


def test_true_is_a_record_of_one_step_and_false_is_none(rng):
    assert run(RECORDED, [grads(rng, 2.0)]).clip_stats.clip_norm.shape == (1, 1)
    assert optaxclip.clip_by_global_norm(1.0, record=False).init(PARAMS) == optax.EmptyState()


def test_what_is_recorded_is_ready_to_log(rng):
    found = clip_stats(run(optaxclip.clip_by_leaf_norm(1.0, record=2), [grads(rng, 9.0)] * 3), per_group=True)
    assert json.loads(json.dumps(found)) == found


def test_before_the_first_step_nothing_has_happened():
    found = clip_stats(optaxclip.clip_by_global_norm(1.0, record=4).init(PARAMS))
    assert (found["clip_steps"], found["clipped_share"], found["clip_norm"]) == (0, 0.0, 0.0)
    assert clip_stats(optaxclip.clip_by_global_norm(1.0, record=4).init(PARAMS), history=True)["clip_norm"].shape == (
        0,
    )


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (optax.adam(1e-3).init(PARAMS), "a tuple of 2: ScaleByAdamState, EmptyState"),
        (optaxclip.clip_by_global_norm(1.0).init(PARAMS), "EmptyState"),
        ((), "a tuple of 0"),
        (None, "None"),
        ([{"count": np.zeros(())}, None], "a list of 2: dict, None"),
    ],
    ids=["adam", "no record", "empty", "none", "restored"],
)
def test_a_state_without_a_record_says_why_there_is_nothing_to_say(state, named):
    with pytest.raises(ValueError, match=rf"no record in this state, {named}.*: build the clipper with record=True"):
        clip_stats(state)


def test_a_lower_end_is_a_scale_above_one(rng):
    found = clip_stats(run(optaxclip.clip_by_norm_range(1.0, 4.0, record=True), [grads(rng, 0.25)]))
    assert found["clip_scale"] == pytest.approx(4.0, rel=1e-6)
    assert (found["clip_limit"], found["clipped_share"]) == (4.0, 1.0)


def test_a_bound_that_bounds_nothing_is_recorded_as_inf(rng):
    tx = optax.inject_hyperparams(optaxclip.clip_by_global_norm, static_args=("record",))(max_norm=1.0, record=True)
    state = tx.init(PARAMS)
    state.hyperparams["max_norm"] = np.float32(np.nan)
    found = clip_stats(jax.jit(tx.update)(grads(rng, 9.0), state, PARAMS)[1])
    assert (found["clip_limit"], found["clip_scale"], found["clipped_share"]) == (np.inf, 1.0, 0.0)


# Several groups.


def test_groups_expand_by_path_and_aggregate_to_the_one_furthest_beyond_its_limit(rng):
    sequence = [grads(rng, scale) for scale in (0.5, 30.0, 3.0)]
    bounds = {"a": 4.0, "b": {"c": 0.25, "d": 2.0}}
    found = clip_stats(run(optaxclip.clip_by_leaf_norm(bounds, record=3), sequence), per_group=True, history=True)
    limits = by_path(bounds)
    for path in limits:
        expected = np.array([np.linalg.norm(by_path(each)[path]) for each in sequence])
        np.testing.assert_allclose(found[f"clip_norm/{path}"], expected, rtol=1e-6)
        np.testing.assert_allclose(found[f"clip_limit/{path}"], np.full(3, limits[path]))
        np.testing.assert_allclose(found[f"clip_scale/{path}"], np.minimum(1, limits[path] / expected), rtol=1e-6)
    ratios = {path: found[f"clip_norm/{path}"] / found[f"clip_limit/{path}"] for path in limits}
    for step in range(3):
        furthest = max(ratios, key=lambda path: ratios[path][step])
        assert found["clip_norm"][step] == found[f"clip_norm/{furthest}"][step]
        assert found["clip_limit"][step] == found[f"clip_limit/{furthest}"][step]


def test_labels_are_the_names_of_their_groups(rng):
    tx = clip_by(norms.group_norm({"a": "body", "b": "head"}), thresholds.constant(1.0), record=True)
    found = clip_stats(run(tx, [grads(rng, 3.0)]), per_group=True)
    assert {name for name in found if "/" in name} == {
        f"clip_{what}/{label}" for what in ("norm", "limit", "scale", "norm_after") for label in ("body", "head")
    }


def test_of_the_units_of_a_leaf_the_worst_stands_for_it():
    tx = clip_by(norms.unit_norm("io"), thresholds.constant(1.0), record=True)
    params = {"w": np.ones((2, 3), np.float32)}
    state = run(tx, [{"w": np.float32([[0.3, 3.0, 6.0], [0.4, 4.0, 8.0]])}], params)
    assert clip_stats(state, per_group=True)["clip_norm/w"] == 10.0
    assert clip_stats(state)["clip_scale"] == pytest.approx(0.1)
    assert state.clip_stats.clip_norm.shape == (1, 1)


def test_a_tree_without_leaves_is_recorded_and_saved(tmp_path):
    tx = optaxclip.clip_by_leaf_norm(1.0, record=2)
    state = run(tx, [{}], {})
    assert clip_stats(restored(state, tmp_path))["clip_norm"] == 0.0


# What blew up first.


def planted(tree, path, value):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [np.array(leaf) for _, leaf in flat]
    for (key, _), leaf in zip(flat, leaves, strict=True):
        if jax.tree_util.keystr(key, simple=True, separator="/") == path:
            leaf[(0,) * leaf.ndim] = value
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def test_the_first_leaf_that_was_not_finite_is_named(rng):
    clippers = {
        "global": optaxclip.clip_by_global_norm(1.0, record=True),
        "leaf": optaxclip.clip_by_leaf_norm(1.0, record=2),
        "units": optaxclip.adaptive_grad_clip(0.1, record=True),
        "relative": contrib.clippy(record=True),
    }
    txs = together(clippers)
    for value in (np.nan, np.inf, -np.inf):
        sequence = [grads(rng, 1.0) for _ in range(5)]
        sequence[2] = planted(sequence[2], "b/c", value)
        sequence[3] = planted(sequence[3], "a", value)
        states = run(txs, sequence)
        for kind in clippers:
            found = clip_stats(states[kind])
            first = (found["first_nonfinite_step"], found["first_nonfinite_leaf"])
            assert (found["nonfinite_steps"], *first) == (2, 3, "b/c"), (kind, value)
            assert found["clip_steps"] == 5


def test_of_two_leaves_that_blow_up_at_once_the_first_is_named(rng):
    bad = planted(planted(grads(rng, 1.0), "b/d", np.nan), "b/c", np.inf)
    found = clip_stats(run(RECORDED, [bad]))
    assert found["first_nonfinite_leaf"] == "b/c"


def test_leaves_of_other_kinds_keep_their_places_in_the_count():
    ones = np.ones(2, np.float32)
    params = {"a": np.arange(3), "b": jax.random.key(0), "c": None, "d": ones, "e": ones}
    bad = params | {"e": np.float32([1.0, np.nan])}
    found = clip_stats(run(RECORDED, [params, bad], params))
    assert (found["first_nonfinite_step"], found["first_nonfinite_leaf"]) == (2, "e")


def test_a_nan_in_one_of_68_leaves_is_found_in_a_long_scan():
    params = {f"layer_{i:03d}": np.ones(2, np.float32) for i in range(68)}
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=4), optax.sgd(0.1))
    planted_at, leaf = 1234, "layer_056"  # the 57th

    def step(state, number):
        bad = jnp.where(number == planted_at, jnp.nan, 1.0)
        _, state = tx.update(params | {leaf: params[leaf] * bad}, state, params)
        return state, None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(1, 2001)))(tx.init(params))
    found = clip_stats(state)
    assert (found["first_nonfinite_step"], found["first_nonfinite_leaf"]) == (planted_at, leaf)
    assert (found["nonfinite_steps"], found["clip_steps"]) == (1, 2000)
    assert found["clipped_share"] == 1999 / 2000
    assert clip_stats(state, history=True)["clip_steps"].tolist() == [1997, 1998, 1999, 2000]


# What led to it is kept.


def fault_run(length, *, steps, first, later=()):
    """A record of a run whose norm is its step, but for one step that is not finite, and later ones."""
    numbers = np.arange(1, steps + 1)
    given = np.where(np.isin(numbers, [first, *later]), np.nan, numbers).astype(np.float32)
    return recorded_run(given[:, None], length)


@functools.partial(jax.jit, static_argnums=1)
def recorded_run(given, length):
    tx = optaxclip.clip_by_global_norm(2.5, record=length)
    return jax.lax.scan(lambda state, each: (tx.update(each, state)[1], None), tx.init(given[0]), given)[0]


@pytest.mark.parametrize(("length", "after"), [(100, 10), (10, 1), (9, 0), (1, 0)])
def test_what_led_to_the_first_step_that_was_not_finite_is_there_3000_steps_later(length, after):
    for later in ((), (301, 302, 400)):
        state = fault_run(length, steps=3300, first=300, later=later)
        kept = clip_stats(state, history="first_nonfinite")
        expected = np.arange(300 + after - length + 1, 300 + after + 1)
        np.testing.assert_array_equal(kept["clip_steps"], expected)
        np.testing.assert_array_equal(kept["clip_norm"], np.where(np.isin(expected, [300, *later]), np.nan, expected))
        np.testing.assert_array_equal(clip_stats(state, history=True)["clip_steps"], np.arange(3301 - length, 3301))
        assert clip_stats(state)["clip_norm"] == 3300.0


def test_without_such_a_step_the_last_ones_are_kept():
    state = fault_run(7, steps=30, first=0)
    kept, last = (clip_stats(state, history=which) for which in ("first_nonfinite", True))
    np.testing.assert_array_equal(kept["clip_steps"], np.arange(24, 31))
    jax.tree.map(np.testing.assert_array_equal, kept, last)


def test_a_first_step_that_is_not_finite_is_kept_alone():
    assert clip_stats(fault_run(5, steps=40, first=1), history="first_nonfinite")["clip_steps"].tolist() == [1]


@pytest.mark.parametrize(
    ("leaves", "report"),
    [
        (["a", "b/c", "b/d"], "3 of 3 leaves: look in the forward pass"),
        (["b/c", "b/d"], "2 of 3 leaves, first in tree order b/c"),
        (["b/d"], "1 of 3 leaves: b/d"),
    ],
)
def test_it_says_how_many_leaves_were_not_finite_in_the_first_such_step(rng, leaves, report):
    bad = grads(rng, 1.0)
    for leaf in leaves:
        bad = planted(bad, leaf, np.nan)
    every = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), PARAMS)
    found = clip_stats(run(RECORDED, [grads(rng, 1.0), bad, every]))
    assert (found["first_nonfinite_leaves"], found["first_nonfinite_report"]) == (len(leaves), report)
    assert found["first_nonfinite_leaf"] == leaves[0]


def test_a_norm_that_is_not_finite_where_all_leaves_are_is_no_leaf():
    plain = Norm(
        lambda leaves: jnp.sqrt(sum(jnp.sum(leaf.value**2) for leaf in leaves)),
        lambda leaves, factors: [factors] * len(leaves),
    )
    tx = clip_by(plain, thresholds.constant(1.0), record=True)
    found = clip_stats(run(tx, [{"w": np.full(2, 1e30, np.float32)}], {"w": np.ones(2, np.float32)}))
    assert (found["first_nonfinite_leaf"], found["first_nonfinite_leaves"]) == ("", 0)
    assert found["first_nonfinite_report"] == "0 of 1 leaves: the norm alone is not finite"


# What is logged.


def test_the_norm_after_the_clip(rng):
    cases = [
        (optaxclip.clip_by_global_norm(1.0, record=True), 1.0),
        (optaxclip.clip_by_global_norm(9.0, record=True), 5.0),
        (optaxclip.clip_by_norm_range(7.0, 9.0, record=True), 7.0),
        (optaxclip.smooth_clip_by_global_norm(5.0, record=True), 2.5),
        (optaxclip.clip_by_global_norm(0.0, record=True), 0.0),
    ]
    all_of_them = jax.jit(lambda given: [tx.update(given, tx.init(PARAMS), PARAMS) for tx, _ in cases])
    for (clipped, state), (_, after) in zip(all_of_them(grads(rng, 5.0)), cases, strict=True):
        assert clip_stats(state)["clip_norm_after"] == pytest.approx(after, rel=1e-6)
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(clipped)])
        assert np.linalg.norm(flat) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize(("since", "steps", "clipped"), [(0, 6, 4), (14, 6, 4), (16, 4, 3), (20, 0, 0), (99, 0, 0)])
def test_the_share_clipped_in_the_record_and_since_a_step(since, steps, clipped):
    is_clipped = [*[True] * 14, False, True, False, True, True, True]
    state = recorded_run(np.float32([[3.0 if each else 2.5] for each in is_clipped]), 6)
    found = clip_stats(state, since=since)
    assert found["recent_steps"] == steps
    assert found["recent_clipped_share"] == pytest.approx(clipped / max(steps, 1))
    assert found["clipped_share"] == pytest.approx(18 / 20)


def test_only_numbers_are_there_if_only_these_are_asked_for(rng):
    tx = optaxclip.skip_nonfinite(optaxclip.clip_by_leaf_norm(1.0, record=2))
    found = clip_stats(run(tx, [grads(rng, 3.0)]), numeric=True, per_group=True)
    assert {type(value) for value in found.values()} == {int, float}
    assert {"skip_steps", "clip_norm/a"} <= set(found)


@pytest.mark.parametrize(
    "arguments",
    [{"history": "last"}, {"history": None}, {"since": -1}, {"since": 1.5}, {"since": True}, {"numeric": 1}],
    ids=str,
)
def test_what_it_can_not_be_asked_for(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        clip_stats(RECORDED.init(PARAMS), **arguments)


# Where it is found.

MASK = {"a": True, "b": False}
NESTINGS = {
    "alone": RECORDED,
    "chain": optax.chain(optax.identity(), RECORDED, optax.adam(1e-3)),
    "named_chain": optax.named_chain(("clip", RECORDED), ("sgd", optax.sgd(0.1))),
    "partition": optax.partition({True: optax.chain(RECORDED, optax.sgd(0.1)), False: optax.set_to_zero()}, MASK),
    "masked": optax.masked(RECORDED, MASK),
    "inject_hyperparams": optax.inject_hyperparams(optaxclip.clip_by_global_norm, "record")(1.0, record=True),
    "MultiSteps": optax.MultiSteps(optax.chain(RECORDED, optax.sgd(0.1)), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.chain(RECORDED, optax.sgd(0.1)), 3),
    "conditionally_transform": optax.conditionally_transform(RECORDED, lambda step: step % 2 == 1),
    "deep": optax.chain(
        optax.partition({"x": optax.named_chain(("c", RECORDED)), "y": RECORDED}, {"a": "x", "b": "x"}),
    ),
}


def test_a_record_is_found_in_any_nesting(rng):
    sequence = [grads(rng, 5.0)] * 4
    states = run(together(NESTINGS), sequence)
    for nesting, state in states.items():
        found = clip_stats(state)
        if nesting == "deep":  # one of the two labels has no leaf
            assert {name.split("/")[0] for name in found} == {"x", "y"}
            assert (found["y/clip_norm"], found["y/clip_scale"]) == (0.0, 1.0)
            found = {name.removeprefix("x/c/"): value for name, value in found.items()}
        whole = nesting not in {"partition", "masked"}
        size = 5.0 if whole else np.linalg.norm(sequence[0]["a"])
        assert found["clip_norm"] == pytest.approx(size, rel=1e-6), nesting
        assert found["clipped_share"] == 1.0, nesting
        assert found["clip_steps"] == (2 if nesting in {"MultiSteps", "conditionally_transform"} else 4), nesting


def test_several_records_are_told_apart_by_their_places():
    def keys(tx):
        found = clip_stats(tx.init(PARAMS))
        return [name.removesuffix("clip_norm") for name in found if name.endswith("clip_norm")]

    assert keys(optax.chain(RECORDED, optax.identity(), RECORDED)) == ["0/", "2/"]
    assert keys(optax.named_chain(("outer", RECORDED), ("sgd", optax.sgd(0.1)), ("inner", RECORDED))) == [
        "outer/",
        "inner/",
    ]
    parts = {"x": optax.chain(RECORDED, optax.adam(1e-3)), "y": optax.chain(RECORDED, optax.sgd(0.1))}
    assert keys(optax.partition(parts, {"a": "x", "b": "y"})) == ["x/", "y/"]
    deep = optax.chain(RECORDED, optax.chain(optax.identity(), RECORDED), optax.partition(parts, {"a": "x", "b": "y"}))
    assert len(set(keys(deep))) == 4


def test_in_a_jitted_function_it_gives_traced_scalars(rng):
    tx = optaxclip.clip_by_leaf_norm(0.5, record=3)

    @jax.jit
    def step(updates, state):
        _, state = tx.update(updates, state)
        return state, [clip_stats(state, per_group=per_group, since=1) for per_group in (False, True)]

    state = tx.init(PARAMS)
    for scale in (2.0, 0.1, 7.0):
        state, both = step(grads(rng, scale), state)
    for per_group, traced in zip((False, True), both, strict=True):
        concrete = clip_stats(state, per_group=per_group, since=1)
        assert set(concrete) - set(traced) == {"first_nonfinite_leaf", "first_nonfinite_report"}
        assert ("clip_norm/b/c" in traced) == per_group
        for name, value in traced.items():
            assert float(value) == pytest.approx(concrete[name], rel=1e-6)
    with pytest.raises(ValueError, match=r"call clip_stats outside"):
        jax.jit(lambda state: clip_stats(state, history=True))(state)


def test_replicas_in_one_state_are_refused():
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), RECORDED.init(PARAMS))
    with pytest.raises(ValueError, match="leading axes"):
        clip_stats(stacked)
    assert clip_stats(jax.tree.map(lambda leaf: leaf[1], stacked))["clip_steps"] == 0


# The state.


def restored(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        return checkpointer.restore(folder / "state", like)


def test_a_checkpoint_keeps_the_record_with_its_names(rng, tmp_path):
    tx = optax.chain(optaxclip.clip_by_leaf_norm(1.0, record=3), optax.adam(1e-3))
    state = run(tx, [grads(rng, 5.0), planted(grads(rng, 1.0), "b/c", np.nan)])
    again = restored(state, tmp_path)
    assert_same(clip_stats(again, per_group=True), clip_stats(state, per_group=True))
    assert clip_stats(again)["first_nonfinite_leaf"] == "b/c"


def test_the_state_has_one_shape_and_holds_nothing_of_the_size_of_the_parameters():
    params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}
    for tx in (optaxclip.clip_by_leaf_norm(1.0, record=8), optaxclip.adaptive_grad_clip(0.1, record=8)):
        before = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, before, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
        assert all(leaf.size < 60 for leaf in jax.tree.leaves(before))


def test_the_updates_are_those_without_a_record(rng):
    factories = (optaxclip.clip_by_leaf_norm, optaxclip.adaptive_grad_clip, contrib.clippy)

    def updates(given, **record):
        txs = [factory(0.3, **record) for factory in factories]
        return [tx.update(given, tx.init(PARAMS), PARAMS)[0] for tx in txs]

    given = grads(rng, 5.0)
    with_record, without = jax.jit(functools.partial(updates, record=2)), jax.jit(updates)
    jax.tree.map(np.testing.assert_array_equal, with_record(given), without(given))


# On meshes.

SPECS = {"both": P("data", "model"), "rows": P("data"), "whole": P()}
SHARDED = {"both": (8, 4), "rows": (8,), "whole": (3,)}
CLIPPERS = {
    "global": lambda axes: optaxclip.clip_by_global_norm(1.0, record=3, axes=axes),
    "leaf": lambda axes: optaxclip.clip_by_leaf_norm(0.5, record=3, axes=axes),
    "units": lambda axes: clip_by(norms.unit_norm("io"), thresholds.constant(0.5), record=3, axes=axes),
}


def on_mesh(tx, sequence, *, check_vma):
    def step(updates, state):
        return tx.update(updates, state)[1]

    state = tx.init(sequence[0])
    whole = jax.tree.map(lambda _: P(), state)
    sharded = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=(SPECS, whole), out_specs=whole, check_vma=check_vma))
    for updates in sequence:
        state = sharded(updates, state)
    return state


@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    "kind", ["units", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("global", "leaf"))]
)
def test_every_device_records_the_same(rng, kind, check_vma):
    sequence = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in SHARDED.items()} for _ in range(4)]
    sequence[1] = planted(sequence[1], "rows", np.inf)  # on two of the eight devices
    sequence[1] = planted(sequence[1], "whole", np.nan)
    state = on_mesh(CLIPPERS[kind](SPECS), sequence, check_vma=check_vma)
    for leaf in jax.tree.leaves(state):
        pieces = [np.asarray(piece.data) for piece in leaf.addressable_shards]
        assert all(np.array_equal(piece, pieces[0], equal_nan=piece.dtype.kind == "f") for piece in pieces)
    one_device = run(CLIPPERS[kind](None), sequence, sequence[0])
    found = clip_stats(state, per_group=True)
    assert found.pop("norm_axes") == "data,model"
    assert_same(found, clip_stats(one_device, per_group=True))
    assert (found["first_nonfinite_step"], found["first_nonfinite_leaf"]) == (2, "rows")


def test_a_record_of_each_device_alone(rng):
    tx = optaxclip.clip_by_global_norm(1.0, record=True, axes=None)
    updates = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHARDED.items()}
    updates = planted(updates, "both", np.nan)  # on the first device alone

    def step(updates, state):
        _, state = tx.update(updates, state)
        return state.clip_stats.first_nonfinite_step[None], state.clip_stats.first_nonfinite_leaf[None]

    state = tx.init(updates)
    steps, found = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=(SPECS, P()), out_specs=P(("data", "model"))))(
        updates, state
    )
    assert steps.tolist() == [1] + [0] * 7
    assert found.tolist() == [0] + [-1] * 7


def test_a_record_under_jit_on_an_explicit_mesh(rng):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    updates = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHARDED.items()}
    bad = planted(updates, "rows", np.nan)
    tx = together({kind: CLIPPERS[kind]("auto") for kind in CLIPPERS})
    with jax.set_mesh(mesh):
        placed = [
            {name: jax.device_put(leaf, jax.NamedSharding(mesh, SPECS[name])) for name, leaf in each.items()}
            for each in (updates, bad)
        ]
        state = tx.init(placed[0])
        for each in placed:
            _, state = jax.jit(tx.update)(each, state)
        found = clip_stats(state, per_group=True)
    assert_same(found, clip_stats(run(tx, [updates, bad], updates), per_group=True))
    assert found["global/first_nonfinite_leaf"] == found["units/first_nonfinite_leaf"] == "rows"


def test_the_type_is_public():
    assert isinstance(RECORDED.init(PARAMS).clip_stats, ClipStats)


def test_no_leaf_is_named_where_init_saw_other_leaves():
    tx = optaxclip.clip_by_global_norm(1.0, record=1)
    state = tx.init({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})
    _, state = jax.jit(tx.update)({"a": None, "b": np.float32([np.nan, 1.0])}, state)  # without params
    found = clip_stats(state)
    assert (found["first_nonfinite_step"], found["first_nonfinite_leaf"]) == (1, "")


# What a threshold that follows the history compares with.


def test_the_level_that_would_clip_with_mean_and_deviation(rng):
    norms_seen = rng.lognormal(0.0, 0.1, size=8)
    given = [{"a": np.float32([norm]), "b": np.float32([2 * norm])} for norm in norms_seen]
    made = {}
    for scale in ("linear", "log"):
        zscore = thresholds.zscore(3.0, warmup_steps=8, scale=scale)
        made["mean_std", scale] = thresholds.mean_std(3.0, window=8, warmup_steps=8, scale=scale)
        made["zscore", scale] = thresholds.chain(thresholds.constant(1e6), zscore)
    txs = together({case: clip_by(norms.leaf_norm(), threshold, record=3) for case, threshold in made.items()})
    states = run(txs, given, given[0])
    read = functools.partial(clip_stats, per_group=True)
    in_jit = jax.jit(lambda states: {case: read(state) for case, state in states.items()})(states)
    one_more = run(txs, [*given, given[0]], given[0])
    for case, state in states.items():
        is_log = "log" in case
        for found in (in_jit[case], read(state)):
            for group, times in [("a", 1), ("b", 2)]:
                values = np.log(times * norms_seen) if is_log else times * norms_seen
                mean, std = float(found[f"threshold_mean/{group}"]), float(found[f"threshold_std/{group}"])
                assert mean == pytest.approx(values.mean(), rel=1e-5, abs=1e-6), case
                assert std == pytest.approx(values.std(), rel=1e-4), case
        now = read(one_more[case])
        for group in ("a", "b"):
            level = found[f"threshold_mean/{group}"] + 3 * found[f"threshold_std/{group}"]
            level = np.exp(level) if is_log else level
            # And no inf between spikes.
            assert now[f"clip_limit/{group}"] == pytest.approx(float(level), rel=1e-4), case
            assert now[f"clip_scale/{group}"] == 1.0, case
        assert now["threshold_mean"] in {now["threshold_mean/a"], now["threshold_mean/b"]}, case


def test_a_leaf_that_the_norm_leaves_out_is_not_blamed():
    params = {"a_frozen": np.ones(1, np.float32), "w": np.ones(2, np.float32), "x": np.ones(2, np.float32)}
    frozen = params | {"a_frozen": np.float32([np.nan])}
    some = norms.global_norm(include=lambda path: path != "a_frozen")
    labelled = norms.group_norm({"a_frozen": None, "w": "w", "x": "x"})
    for norm in (some, labelled):
        tx = clip_by(norm, thresholds.constant(1.0), record=True)
        found = clip_stats(run(tx, [frozen, frozen, frozen | {"w": np.float32([1.0, np.inf])}], params))
        assert (found["first_nonfinite_step"], found["first_nonfinite_report"]) == (3, "1 of 3 leaves: w")


def test_the_steps_of_a_jitted_function_are_a_place_to_count_from(rng):
    state = run(optaxclip.clip_by_global_norm(1.0, record=4), [grads(rng, 2.0)] * 3)
    since = jax.jit(lambda state: clip_stats(state)["clip_steps"])(state)
    assert clip_stats(state, since=since)["recent_steps"] == 0
    with pytest.raises(ValueError, match="since must be"):
        clip_stats(state, since=jnp.ones(2, jnp.int32))
