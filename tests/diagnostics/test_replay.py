"""What other clippers would have done: as the transformations themselves, driven with gradients of these norms."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import contrib, diagnostics, norms, thresholds
from optaxclip._arrays import trees
from tests.support.histories import lognormal, recorded, with_spikes

CLIPPERS = {
    "fixed": lambda **record: optaxclip.clip_by_global_norm(1.5, **record),
    "range": lambda **record: optaxclip.clip_by_norm_range(0.5, 1.5, **record),
    "schedule": lambda **record: optaxclip.clip_by_global_norm(optax.linear_schedule(9.0, 1.0, 40), **record),
    "autoclip": lambda **record: optaxclip.autoclip(90.0, **record),
    "window": lambda **record: optaxclip.autoclip(90.0, window=20, **record),
    "zclip": lambda **record: optaxclip.zclip(max_norm=None, warmup_steps=5, patience=2, **record),
    "history": lambda **record: optaxclip.clip_by_history(1.0, warmup_steps=8, scale="log", **record),
    "tracked": contrib.clip_by_tracked_quantile,
}


def ugly(rng):
    """Norms with spikes, zeros, subnormal, largest and non-finite ones, and runs of these."""
    found, _ = with_spikes(rng, 120, share=0.1)
    found[[0, 7, 30, 31]] = 0
    found[[11, 40, 41]] = np.nan, np.inf, np.nan
    found[[55, 56, 57]] = 1e-40, 1e38, 3e38
    return np.float32(found)


def assert_same(replayed, state):
    """Asserts that limits, norms and clipped steps are those that a transformation recorded."""
    found = optaxclip.clip_stats(state, history=True, per_group=True)
    groups = [key.removeprefix("clip_norm") for key in found if key.startswith("clip_norm/")] or [""]
    limit, after, scale = (
        np.stack([found[name + group] for group in groups], axis=1)
        for name in ("clip_limit", "clip_norm_after", "clip_scale")
    )
    assert replayed.limit.dtype == limit.dtype
    np.testing.assert_array_equal(replayed.limit.reshape(limit.shape), limit)  # bit for bit
    np.testing.assert_array_equal(replayed.clipped.reshape(scale.shape), scale != 1)
    # Where it is raised, the record multiplies by a scale that is rounded.
    np.testing.assert_allclose(replayed.norm_after.reshape(after.shape), after, rtol=1e-6)


@pytest.mark.xla
@pytest.mark.parametrize("name", CLIPPERS)
def test_a_replay_is_what_the_transformation_does(rng, name):
    state = recorded(given := ugly(rng), CLIPPERS[name](record=len(given)))
    (replayed,) = diagnostics.replay(given, CLIPPERS[name]()).clippers.values()
    assert_same(replayed, state)
    assert replayed.clipped_share == pytest.approx(optaxclip.clip_stats(state)["clipped_share"])
    assert 0 < replayed.clipped_share < 1


def test_a_state_and_a_list_are_replayed_as_their_norms(rng):
    state = recorded(given := ugly(rng), optaxclip.clip_by_global_norm(math.inf, record=len(given)))
    fixed = optaxclip.clip_by_global_norm(1.5)
    expected = diagnostics.replay(given, fixed).clippers["clipper 1"]
    for source in (state, list(map(float, given))):
        found = diagnostics.replay(source, fixed).clippers["clipper 1"]
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert found.limit.dtype == np.float32


LEAF_CLIPPERS = {
    "adagc": lambda **record: optaxclip.adagc(warmup_steps=10, **record),
    "percentile": lambda **record: contrib.percentile_clip(90.0, window=20, **record),
    "bounds": lambda **record: optaxclip.clip_by_leaf_norm({"a": 1.0, "b": None, "c": 0.2}, **record),
    "labels": lambda **record: optaxclip.clip_by(
        norms.group_norm(lambda path: path), thresholds.zscore(warmup_steps=5), **record
    ),
}


@pytest.mark.xla
@pytest.mark.parametrize("name", LEAF_CLIPPERS)
def test_several_groups_are_replayed_together(rng, name):
    given = np.stack([ugly(rng), np.roll(ugly(rng), 3), ugly(rng)[::-1]], axis=1)
    source = recorded(given, optaxclip.clip_by_leaf_norm(1.0, record=len(given)))
    found = diagnostics.replay(source, LEAF_CLIPPERS[name]())
    assert (found.groups, found.norms.shape) == (("a", "b", "c"), given.shape)
    assert_same(found.clippers["clipper 1"], recorded(given, LEAF_CLIPPERS[name](record=len(given))))
    assert "Steps 1 to 120, 3 groups; " in str(found)


def test_groups_may_be_in_another_order():
    """A record keeps the order of the tree that it saw, and nested dicts that of their keys."""
    grads = [{"w": jnp.array([5.0])} for _ in range(11)]  # layers 0 to 10: as words, 10 comes before 2
    tx = optaxclip.clip_by_leaf_norm([{"w": float(bound)} for bound in range(11)], record=1)
    _, state = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
    by_path = optaxclip.clip_by_leaf_norm({str(bound): {"w": float(bound)} for bound in range(11)})
    found = diagnostics.replay(state, by_path)
    assert found.groups == tuple(trees.paths(grads))
    np.testing.assert_array_equal(found.clippers["clipper 1"].limit, [range(11)])


def test_one_norm_of_many_leaves_fits_every_clipper_of_one_norm():
    source = recorded([[3.0, 4.0], [6.0, 8.0]], optaxclip.clip_by_global_norm(1.0, record=2))
    only = optaxclip.clip_by(norms.global_norm(include={"a": True, "b": False}), thresholds.constant(7.0))
    told = optaxclip.clip_by(norms.known("grad_norm"), thresholds.constant(2.0))
    found = diagnostics.replay(source, only, told=told)
    assert [done.norm_after.tolist() for done in found.clippers.values()] == [[5.0, 7.0], [2.0, 2.0]]


def test_the_ring_that_led_to_the_first_nonfinite_step_can_be_replayed():
    state = recorded([1, 2, np.nan, *range(4, 100)], optaxclip.clip_by_global_norm(1.0, record=10))
    fixed = optaxclip.clip_by_global_norm(1.5)
    found = diagnostics.replay(state, fixed, history="first_nonfinite")
    assert found.steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(found.clippers["clipper 1"].norm_after, [1, 1.5, np.nan, 1.5])
    assert diagnostics.replay(state, fixed).steps.tolist() == list(range(90, 100))


def test_the_record_is_chosen_by_its_place():
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=3), optaxclip.clip_by_leaf_norm(0.5, record=3))
    state = recorded([2, 3], tx)
    found = diagnostics.replay(state, optaxclip.clip_by_global_norm(0.25), place="1")
    np.testing.assert_allclose(found.norms, [1, 1])
    with pytest.raises(ValueError, match="place must be one of '0', '1'"):
        diagnostics.replay(state, optaxclip.zclip())


def test_norms_of_every_dtype_are_measured_as_they_would_be():
    fixed = optaxclip.clip_by_global_norm(1.0)
    for given in (np.float16([2]), np.array([2], ml_dtypes.bfloat16), [2], jnp.arange(2, 3)):
        assert diagnostics.replay(given, fixed).norms.dtype == np.float32
    assert diagnostics.replay([1e300, 1e-300], fixed).norms.tolist() == [float(np.finfo(np.float32).max), 0]
    with jax.enable_x64(True):
        found = diagnostics.replay(np.array([1e300, 1e-300]), fixed)
        assert found.norms.tolist() == [1e300, 1e-300]
        assert found.clippers["clipper 1"].norm_after.tolist() == [1.0, 1e-300]
        assert diagnostics.replay(np.float32([2]), fixed).norms.dtype == np.float32


def test_without_steps_there_is_nothing_to_share():
    for source in ([], optaxclip.clip_by_global_norm(1.0, record=3).init({"w": jnp.zeros(2)})):
        found = diagnostics.replay(source, optaxclip.zclip())
        assert math.isnan(found.clippers["clipper 1"].clipped_share)
        assert "No steps." in str(found)


# As text.


def test_the_table_by_hand():
    given = [1.0] * 40 + [8.0, math.inf, 4.0, math.nan]
    found = diagnostics.replay(given, all=optaxclip.clip_by_global_norm(math.inf), two=optaxclip.clip_by_global_norm(2))
    assert np.flatnonzero(found.spikes).tolist() == [40, 42]
    first, second, third = str(found).split("\n\n")
    assert first.splitlines()[0] == "Steps 1 to 44; 2 of them not finite."
    assert "Open loop" in first
    assert second == "\n".join(
        [
            "clipper  clipped  median limit  largest before  largest after",
            "-------  -------  ------------  --------------  -------------",
            "all         0.0%           inf               8              8",
            "two         4.5%             2               8              2",
        ]
    )
    assert [line.split() for line in third.splitlines()[1:]] == [
        ["step", "norm", "all", "two"],
        ["----", "----", "---", "---"],
        ["41", "8", "8", "2"],
        ["43", "4", "4", "2"],
    ]


def test_of_many_spikes_the_largest_are_listed(rng):
    given = lognormal(rng, 200, spread=0.1)
    at = np.arange(99, 199, 10)
    given[at] = np.geomspace(1000, 10, len(at))
    lines = str(diagnostics.replay(given, optaxclip.zclip())).splitlines()
    assert [line.split()[0] for line in lines[-9:-1]] == [str(step + 1) for step in at[:8]]
    assert lines[-1] == "and 2 smaller ones"


# What can't be replayed.

GLOBAL = optaxclip.clip_by_global_norm(1.0)


@pytest.mark.parametrize(
    ("clipper", "complaint"),
    [
        (optaxclip.clip_by_leaf_norm(1.0), "it measures several per step, but there is one"),
        (optaxclip.adaptive_grad_clip(0.1), "measures parts of leaves"),
        (optaxclip.clip_by(norms.global_norm(), thresholds.relative_to_params(0.1)), "asks for the parameters"),
        (optaxclip.clip_by(norms.global_norm(include={"w": True}), thresholds.constant(1.0)), "include does not fit"),
        (optaxclip.clip(1.0), "must be a clipper that clip_by makes"),
        (optax.clip_by_global_norm(1.0), "must be a clipper that clip_by makes"),
        (optax.chain(GLOBAL, optax.adam(0.1)), "neither wrapped nor chained"),
        (optaxclip.zclip, "must be a clipper .*got a function"),
    ],
)
def test_what_can_not_be_replayed_is_named(clipper, complaint):
    with pytest.raises(ValueError, match=rf"^mine .*{complaint}"):
        diagnostics.replay([1.0, 2.0], mine=clipper)


def test_other_groups_are_refused():
    state = recorded([[1.0, 2.0]], optaxclip.clip_by_leaf_norm(1.0, record=1))
    with pytest.raises(ValueError, match=r"it measures one per step, but there is one for each of 'a', 'b'"):
        diagnostics.replay(state, optaxclip.zclip())
    with pytest.raises(ValueError, match=r"it measures one per step, but there is one for each of 'a', 'b'"):
        diagnostics.replay(state, optaxclip.clip_by(norms.group_norm("both"), thresholds.constant(1.0)))


def test_a_record_without_names_of_its_groups_says_so():
    tx = optaxclip.clip_by_leaf_norm(1.0, record=1)
    state = recorded([[1.0, 2.0]], tx)
    nameless = state._replace(clip_stats=state.clip_stats._replace(names=type(state.clip_stats.names)()))
    with pytest.raises(ValueError, match="does not know the names of its groups: restore them with"):
        diagnostics.replay(nameless, tx)


def test_a_replay_needs_clippers_and_norms():
    with pytest.raises(ValueError, match="clippers must be at least one"):
        diagnostics.replay([1.0])
    for tx in (GLOBAL, optax.chain(GLOBAL, optax.adam(0.1))):
        with pytest.raises(ValueError, match=r"norms must be a vector of real numbers.*record="):
            diagnostics.replay(tx.init(jnp.ones(2)), GLOBAL)
    for choice in ({"place": "0"}, {"history": "first_nonfinite"}):
        with pytest.raises(ValueError, match="choose from a state, but norms is a vector"):
            diagnostics.replay([1.0], GLOBAL, **choice)
