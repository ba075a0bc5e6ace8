"""clip_tree and norms.known: a clip without an optimizer, and one by a norm that is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import clip_by, clip_tree, norms, thresholds
from tests.reference.trees import assert_same_bits
from tests.support.imports import imported

TREE = {
    "w": np.linspace(-3, 4, 12).reshape(3, 4),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "s": np.float32(0.3),
    "n": np.arange(3),
    "none": None,
    "empty": np.zeros((0, 2)),
}
TREE = {name: None if leaf is None else jnp.asarray(leaf) for name, leaf in TREE.items()}
FLOATS = {name: TREE[name] for name in ("w", "half", "s")}
KNOWN = clip_by(norms.known("grad_norm"), thresholds.constant(1.0))


def length(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, float))) for leaf in jax.tree.leaves(tree)))


@jax.jit
def both(max_norm):
    """Ours, and optax's."""
    return clip_tree(FLOATS, max_norm), optax.clip_by_global_norm(max_norm).update(FLOATS, optax.EmptyState())


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 100.0, np.inf])
def test_it_is_the_clip_of_optax_and_the_norm(max_norm):
    (clipped, norm), (expected, _) = both(max_norm)
    for ours, theirs in zip(jax.tree.leaves(clipped), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3 if ours.dtype == jnp.float16 else 1e-6)
        assert ours.dtype == theirs.dtype
    assert float(norm) == pytest.approx(length(FLOATS), rel=1e-6)


def test_what_is_no_float_passes():
    clipped, _ = clip_tree(TREE, 1.0)
    assert jax.tree.structure(clipped) == jax.tree.structure(TREE)
    assert_same_bits(clipped["n"], TREE["n"])
    assert length(clipped) - length({"n": TREE["n"]}) != 0
    assert clip_tree({}, 1.0) == ({}, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tree_that_is_not_finite_comes_back_with_its_norm(value):
    bad = FLOATS | {"s": jnp.float32(value)}
    clipped, norm = clip_tree(bad, 1.0)
    assert_same_bits(clipped, bad)
    assert not np.isfinite(norm)


@pytest.mark.parametrize(
    ("clip", "arguments"),
    [
        (oc.clip_by_global_norm(0.5), {}),
        (oc.clip_by_leaf_norm({"w": 1.0, "half": 0.1, "s": None}), {}),
        (oc.adaptive_grad_clip(0.05), {"params": FLOATS}),
        (oc.clip_by_norm_range(20.0, 30.0), {}),
        (clip_by(norms.group_norm({"w": "a", "half": "b", "s": "a"}), thresholds.smooth({"a": 1.0, "b": 0.1})), {}),
    ],
    ids=["global", "leaf", "relative", "range", "group"],
)
def test_any_clip_without_a_state(clip, arguments):
    @jax.jit
    def all_of(tree):
        clipped, norm = clip_tree(tree, clip, **arguments)
        expected, _ = clip.update(tree, clip.init(tree), FLOATS)
        measured = clip.made_of.norm.measure(oc.core.Leaves(tree, tree))
        pairs = [(clipped, expected), (norm, measured)]
        if all(np.ndim(each) == 0 for each in jax.tree.leaves(norm)):
            pairs.append((clip_tree(tree, clip, known_norm=norm, **arguments)[0], expected))
        return pairs

    for ours, right in all_of(FLOATS):
        assert_same_bits(ours, right)


def test_norms_of_several_groups_are_plain_numbers():
    clipped, norm = clip_tree(FLOATS, {"w": 1.0, "half": 2.0, "s": 0.1}, norm=norms.leaf_norm())
    assert {name: float(each) for name, each in norm.items()} == pytest.approx(
        {name: length(leaf) for name, leaf in FLOATS.items()}
    )
    assert {name: float(length(leaf)) for name, leaf in clipped.items()} == pytest.approx(
        {"w": 1.0, "half": length(FLOATS["half"]), "s": 0.1}, rel=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_norm": -1.0}, "max_norm must be"),
        ({"max_norm": oc.zclip()}, "without state, and this one keeps"),
        ({"max_norm": lambda step: 1.0}, r"got a schedule: pass schedule\(step\)"),
        ({"max_norm": oc.clip_by_leaf_norm(1.0, record=10)}, "without state, and this one keeps"),
        ({"max_norm": oc.thresholds.constant(1.0)}, r"got a Threshold: pass clip_by\(norm, threshold\)"),
        ({"max_norm": optax.clip_by_global_norm(1.0)}, "not built on clip_by: pass a clip"),
        ({"max_norm": oc.clip_by_global_norm(1.0), "norm": norms.leaf_norm()}, r"leave out norm= and axes="),
        ({"max_norm": 1.0, "norm": 2}, "norm must be"),
        ({"max_norm": 1.0, "known_norm": {"w": 1.0}}, "known_norm must be a scalar for each group"),
        ({"max_norm": 1.0, "known_norm": jnp.ones(2)}, "known_norm must be one norm, a real scalar"),
        ({"max_norm": 1.0, "known_norm": "5"}, "known_norm must be one norm, a real scalar, got '5'"),
        ({"max_norm": 1.0, "known_norm": 1j}, "known_norm must be one norm, a real scalar"),
        ({"max_norm": 0.1, "norm": norms.unit_norm(), "known_norm": 1.0}, "known_norm takes one number per group"),
        ({"max_norm": oc.adaptive_grad_clip(0.1)}, "params"),
    ],
)
def test_what_it_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        clip_tree(FLOATS, **arguments)


# A norm that is known.


@pytest.mark.parametrize("norm", [4.2426406e38, 10**39, np.float64(1e300)])
def test_a_known_norm_past_the_largest_float_clips_as_a_measured_one(norm):
    grads = jnp.array([3e38, 3e38])
    measured, largest = clip_tree(grads, 1.0)
    clipped, known = clip_tree(grads, 1.0, known_norm=norm)
    assert_same_bits((clipped, known), (measured, largest))
    assert not np.isfinite(clip_tree(grads, 1.0, known_norm=float("inf"))[1])


def reductions(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile().as_text()
    return sum(" reduce(" in line or " reduce-window(" in line or " dot(" in line for line in compiled.splitlines())


def test_a_known_norm_is_not_measured():
    tree = {"a": jnp.ones((64, 64)), "b": jnp.ones(256)}
    ours = functools.partial(clip_tree, max_norm=1.0)
    assert reductions(ours, tree) > 0
    assert reductions(lambda tree, norm: ours(tree, known_norm=norm), tree, 3.0) == 0
    assert reductions(lambda tree, norm: KNOWN.update(tree, KNOWN.init(tree), grad_norm=norm), tree, 3.0) == 0


@pytest.mark.parametrize("norm", [10.0, 10, np.float64(10), jnp.bfloat16(10), np.int32(10)], ids=repr)
def test_the_norm_that_update_is_told(norm):
    clipped, _ = KNOWN.update(FLOATS, KNOWN.init(FLOATS), grad_norm=norm)
    expected, known = clip_tree(FLOATS, 1.0, known_norm=norm)
    assert_same_bits(clipped, expected)
    assert (float(known), known.dtype) == (10.0, jnp.float32)
    np.testing.assert_allclose(clipped["w"], FLOATS["w"] / 10, rtol=1e-6)


@pytest.mark.parametrize("norm", [0.0, -3.0, np.nan, np.inf, 0.5])
def test_a_norm_that_says_nothing_clips_nothing(norm):
    assert_same_bits(clip_tree(FLOATS, 1.0, known_norm=norm)[0], FLOATS)


def test_two_norms_have_two_names():
    first, second = (clip_by(norms.known(name), thresholds.constant(1.0), record=True) for name in ("one", "other"))
    tx = optax.chain(first, second, optax.scale(-1.0))
    clipped, state = jax.jit(lambda **told: tx.update(FLOATS, tx.init(FLOATS), **told))(one=10.0, other=2.0)
    np.testing.assert_allclose(clipped["w"], -FLOATS["w"] / 20, rtol=1e-6)
    found = oc.clip_stats(state)
    assert (found["0/clip_norm"], found["1/clip_norm"]) == (10.0, 2.0)


def test_thresholds_follow_a_known_norm_and_skips_judge_it():
    tx = oc.skip_spikes(
        clip_by(norms.known("n"), thresholds.growth(2.0)), thresholds.constant(50.0), norm=norms.known("n")
    )
    update, state, seen = jax.jit(tx.update), tx.init(FLOATS), []
    for norm in (1.0, 8.0, 99.0, np.nan, 3.0):
        clipped, state = update(FLOATS, state, FLOATS, n=norm)
        seen.append(np.asarray(clipped["w"])[0, 0] / FLOATS["w"][0, 0])
    assert seen == pytest.approx([1.0, 0.25, 0.0, 0.0, 1.0])


def test_what_a_known_norm_needs():
    with pytest.raises(ValueError, match=r"needs the norm: call tx.update\(updates, state, params, grad_norm=norm\)"):
        KNOWN.update(FLOATS, KNOWN.init(FLOATS))
    with pytest.raises(ValueError, match="grad_norm must be one norm, a real scalar"):
        KNOWN.update(FLOATS, KNOWN.init(FLOATS), grad_norm=jnp.ones(3))
    with pytest.raises(ValueError, match="name must be"):
        norms.known("grad norm")
    relative = clip_by(norms.known("n"), thresholds.relative_to_params(0.1))
    with pytest.raises(ValueError, match="use another Norm"):
        relative.update(FLOATS, relative.init(FLOATS), FLOATS, n=1.0)


def test_all_devices_must_know_the_same():
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(AxisType.Auto,))

    def step(piece, total):
        norm = oc.global_norm(piece, axes=None)
        square = norm**2
        return clip_tree(piece, 1.0, known_norm=jnp.sqrt(jax.lax.psum(square, "stage")) if total else norm)[0]

    whole = jnp.arange(8.0)
    on_mesh = jax.shard_map(functools.partial(step, total=True), mesh=mesh, in_specs=P("stage"), out_specs=P("stage"))
    np.testing.assert_allclose(jax.jit(on_mesh)(whole), clip_tree(whole, 1.0)[0], rtol=1e-6)
    alone = jax.shard_map(functools.partial(step, total=False), mesh=mesh, in_specs=P("stage"), out_specs=P("stage"))
    with pytest.raises(ValueError, match="differs between the devices along mesh axes"):
        jax.jit(alone)(whole)


def test_a_pipeline_whose_stages_add_their_norms_up_trains_as_one_program():
    rng = np.random.default_rng(0)
    x, y, *stages = (np.float32(rng.normal(size=shape)) for shape in [(16, 4), 16, (4, 8), (8, 8), 8])

    def forward(stage, weights, x):
        return x @ weights if stage == 2 else jnp.tanh(x @ weights)

    def pipelined(params, states):
        """Each stage has its own optimizer, and sees of the others one number."""
        tx = optax.chain(clip_by(norms.known("total"), thresholds.constant(0.1)), optax.adam(0.1))
        pulls, hidden = [], x
        for stage, weights in enumerate(params):
            hidden, pull = jax.vjp(functools.partial(forward, stage), weights, hidden)
            pulls.append(pull)
        cotangent, grads = 2 * (hidden - y) / len(y), []
        for pull in reversed(pulls):
            grad, cotangent = pull(cotangent)
            grads.insert(0, grad)
        total = jnp.sqrt(sum(oc.global_norm(grad) ** 2 for grad in grads))
        states = [tx.init(weights) for weights in params] if states is None else states
        updates, states = zip(*(tx.update(g, s, total=total) for g, s in zip(grads, states, strict=True)), strict=True)
        return [optax.apply_updates(*each) for each in zip(params, updates, strict=True)], states

    def loss(params):
        return jnp.mean((functools.reduce(lambda x, each: forward(*each, x), enumerate(params), x) - y) ** 2)

    tx = optax.chain(oc.clip_by_global_norm(0.1), optax.adam(0.1))

    def as_one(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    by_stage, together = jax.jit(pipelined), jax.jit(as_one)
    ours, states, whole, state, losses = stages, None, stages, tx.init(stages), []
    for _ in range(6):
        ours, states = by_stage(ours, states)
        whole, state, value = together(whole, state)
        losses.append(float(value))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, whole)
    assert losses[5] < 0.8 * losses[0]


@pytest.mark.parity
@pytest.mark.parametrize("order", [1.0, 2.0, np.inf])
def test_torch_clips_with_a_norm_in_hand_likewise(order):
    torch = imported("torch")
    leaves = [np.asarray(leaf, np.float32) for leaf in (FLOATS["w"], FLOATS["half"], FLOATS["s"])]
    theirs = [torch.nn.Parameter(torch.zeros(leaf.shape)) for leaf in leaves]
    for parameter, leaf in zip(theirs, leaves, strict=True):
        parameter.grad = torch.tensor(leaf)
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in theirs], norm_type=order)
    torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, total)
    ours = [jnp.asarray(leaf) for leaf in leaves]
    assert float(oc.global_norm(ours, ord=order)) == pytest.approx(float(total), rel=1e-6)
    clipped, norm = clip_tree(ours, 0.5, known_norm=float(total))
    assert float(norm) == pytest.approx(float(total))
    for one, other in zip(clipped, theirs, strict=True):  # torch divides by the norm + 1e-6
        np.testing.assert_allclose(one, other.grad.numpy(), rtol=1e-5)


def test_a_norm_of_some_leaves():
    assert float(oc.global_norm(FLOATS, include=lambda path: path != "w")) == pytest.approx(
        length({"half": FLOATS["half"], "s": FLOATS["s"]}), rel=1e-6
    )
    with pytest.raises(ValueError, match="chooses no leaf"):
        oc.global_norm(FLOATS, include=lambda path: False)
