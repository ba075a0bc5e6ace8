"""The clips for stacked gradients of examples, against optax where it is right and NumPy's float64 where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests.reference.trees import assert_same_bits

B = 6
CLIPS = {
    "global": (oc.per_example_global_norm_clip, optax.per_example_global_norm_clip),
    "layers": (oc.per_example_layer_norm_clip, optax.per_example_layer_norm_clip),
    "layers by size": (
        lambda grads, bound: oc.per_example_layer_norm_clip(grads, bound, False),
        lambda grads, bound: optax.per_example_layer_norm_clip(grads, bound, False),
    ),
}
ONES = np.ones((2, 2), np.float32)


@jax.jit
def compared(grads, bound):
    """What ours and optax's say of the same gradients, the latter as float32, by name: one program for all bounds."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    return {name: (ours(grads, bound), theirs(wide, bound)) for name, (ours, theirs) in CLIPS.items()}


def stacked(rng, dtype="float32"):
    scale = np.logspace(-1, 1, B)
    shapes = {"w": (B, 4, 3), "b": (B, 3), "s": (B,)}
    return {
        name: (scale.reshape(-1, *[1] * (len(shape) - 1)) * rng.normal(size=shape)).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
    }


def assert_close(ours, expected, clip, rtol=2e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(expected), clip
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert leaf.shape == other.shape, clip
        mine, right = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(mine, right, rtol=rtol, atol=rtol * np.max(np.abs(right)), err_msg=clip)


@pytest.mark.parametrize("bound", [0.0, 0.7, 1.25, np.inf])
def test_as_optax(rng, bound):
    for name, (ours, theirs) in compared(stacked(rng), bound).items():
        assert_close(ours, theirs, name)


def test_integers_as_in_the_docstrings_of_optax():
    grads = [np.array([[0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]])]
    for bound in (0.0, 1.25, np.inf):
        for name, (ours, theirs) in compared(grads, bound).items():
            assert_close(ours, theirs, name)
            assert ours[0][0].dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_example_counts_nothing(rng, bad):
    grads = stacked(rng)
    zeroed = {key: np.where((np.arange(B) == 2).reshape(-1, *[1] * (x.ndim - 1)), 0, x) for key, x in grads.items()}
    without = compared(zeroed, 0.5)
    grads["b"][2, 1] = bad  # the other entries of the example stay as they are, and must not count either
    for name, (ours, theirs) in compared(grads, 0.5).items():
        assert_close(ours, without[name][1], name)
        assert np.any(np.isnan(theirs[0]["b"]))  # optax


@pytest.mark.parametrize("size", [1e20, 1e25, 3e38])
def test_a_large_example_is_clipped(size):
    rows = np.float32([[0.6, 0.8], [0.03, 0.04]]) * np.float32([[size], [1.0]])
    for name, ((total, clipped), theirs) in jax.device_get(compared(rows, 1.0)).items():
        np.testing.assert_allclose(total, [0.63, 0.84], rtol=1e-6, err_msg=name)
        assert clipped == 1, name
        if name == "global":
            assert theirs[0][0] < 0.1  # optax leaves it out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients(rng, dtype):
    for name, ((total, clipped), (expected, number)) in compared(stacked(rng, dtype), 0.7).items():
        assert_close(total, expected, name, float(jnp.finfo(dtype).eps))
        assert_close(clipped, number, name)
        assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype(dtype)}


def test_norms_of_narrow_gradients_are_measured_in_float32():
    rows = {"a": np.full((1, 100_000), 1e-4, np.float16)}  # of norm 0.0316
    total, clipped = jax.jit(oc.per_example_global_norm_clip)(rows, 0.01)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(total["a"], np.float64)), 0.01, rtol=2e-2)
    assert clipped == 1


def test_a_float16_sum_beyond_the_largest_number_is_that():
    total, _ = jax.jit(oc.per_example_global_norm_clip)(np.full((4, 2), 30000.0, np.float16), np.inf)
    np.testing.assert_array_equal(total, np.full(2, 65504.0))


def test_one_bad_layer_leaves_the_example_out_of_all():
    grads = {"a": np.ones((2, 3), np.float32), "b": np.float32([[np.nan, 1], [1, 1]])}
    total, clipped = jax.jit(oc.per_example_layer_norm_clip)(grads, 0.5)
    share = 0.5 / 2**0.5
    np.testing.assert_allclose(total["a"], np.full(3, share / 3**0.5), rtol=1e-6)
    np.testing.assert_allclose(total["b"], np.full(2, share / 2**0.5), rtol=1e-6)
    assert clipped == {"a": 1, "b": 1}


def test_empty():
    assert oc.per_example_global_norm_clip({}, 1.0) == ({}, 0)
    assert oc.per_example_layer_norm_clip({}, 1.0) == ({}, {})
    total, clipped = oc.per_example_global_norm_clip({"a": np.zeros((3, 0), np.float32)}, 1.0)
    assert total["a"].shape == (0,)
    assert clipped == 0


def test_eagerly_with_a_list(rng):
    grads = stacked(rng)
    for name, (expected, _) in compared(grads, 0.7).items():
        ours = CLIPS[name][0]([leaf for _, leaf in sorted(grads.items())], 0.7)
        assert_close(jax.tree.leaves(ours), jax.tree.leaves(expected), name)


def test_complex():
    rows = np.complex64([[3.0 + 4.0j, 0.0], [0.3, 0.4j]])
    total, clipped = jax.jit(oc.per_example_global_norm_clip)(rows, 1.0)
    np.testing.assert_allclose(total, [0.9 + 0.8j, 0.4j], rtol=1e-6)
    assert clipped == 1


def test_in_place_of_optax_with_positional_and_named_arguments(rng):
    grads = stacked(rng)
    assert_same_bits(
        oc.per_example_layer_norm_clip(grads=grads, global_l2_norm_clip=1.0, uniform=False),
        oc.per_example_layer_norm_clip(grads, 1.0, False),
    )
    assert_same_bits(
        oc.per_example_global_norm_clip(grads=grads, l2_norm_clip=1.0), oc.per_example_global_norm_clip(grads, 1.0)
    )


@pytest.mark.parametrize(
    ("grads", "bound", "words"),
    [
        (ONES, -1.0, "norm_clip must be at least 0, got -1.0"),
        (ONES, np.nan, "norm_clip must be at least 0, got nan"),
        (ONES, lambda step: 1.0, "norm_clip must be a number"),
        (
            {"a": ONES, "b": ONES[0, :1]},
            1.0,
            r"first axis.*'b' has the shape \(1,\), and .* 2 examples",
        ),
        ({"a": np.float32(1)}, 1.0, r"'a' has the shape \(\)"),
        ({"a": ONES, "k": np.ones(2, bool)}, 1.0, "must be numbers, got an array of bool"),
    ],
)
@pytest.mark.parametrize("clip", CLIPS)
def test_bad_arguments(clip, grads, bound, words):
    with pytest.raises(ValueError, match=words):
        CLIPS[clip][0](grads, bound)


def test_uniform_is_a_boolean():
    with pytest.raises(ValueError, match="uniform must be True or False, got 'yes'"):
        oc.per_example_layer_norm_clip(ONES, 1.0, "yes")
