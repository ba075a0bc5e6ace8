"""No transformation writes the gradients anew: what the compiled, donated step allocates besides."""

import jax
import jax.numpy as jnp
import pytest

from tests.benchmarks import overhead, trees
from tests.support.marks import slow_but
from tests.table import ROWS, spectral

# The XLA of jax before 0.10 fuses not even a multiplication into Adam.
FUSES = jax.__version_info__ >= (0, 10)
TREE = {
    "dense": {
        "kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
        "bias": jax.ShapeDtypeStruct((512,), jnp.float32),
    },
    "scale": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
}


# Singular values need room for the matrix and its vectors, several times over.
LEAN = [row for row in ROWS if not row.param_state and row.measure is not spectral]
# Other thresholds and bounds: to the gradients these do what another row does.
SAME_FACTORS = {
    "clip_by_global_norm-scheduled",
    "clip_by_norm_range",
    "autoclip-window",
    "clip_by_tracked_quantile",
    "zclip-scheduled-recorded",
    "clip_by_history",
    "clip_by-global_norm-ema_band-growth",
    "clip_by_leaf_norm-bound_per_leaf",
    "clip_by_norm_range-leaf_norm",
    "percentile_clip",
    "clip_norm_growth",
    "clip_by-leaf_norm-times-at_least",
    "clip_by-leaf_norm-between",
    "clip_by-leaf_norm-relative_to_params-constant",
    "clip_by-group_norm-bound_per_group",
    "clip_by-unit_norm-zscore-ema_ratio",
    "clip_by-leaf_rms-mean_std-quantile",
    "adaptive_grad_clip-scheduled-recorded",
}
# XLA for CPUs (jax 0.10 and 0.12) does not fuse what a curve makes of each coordinate with what takes it.
CURVES = {"tanh_clip": 1.1, "arcsinh_clip-scheduled": 3.1}


@pytest.mark.skipif(not FUSES, reason="jax 0.8 writes the gradients anew for any multiplication")
@pytest.mark.parametrize(
    "row", slow_but(LEAN, *(row for row in LEAN if row.name not in SAME_FACTORS)), ids=lambda row: row.name
)
def test_temporary_memory_is_under_a_tenth_of_the_gradients(row):
    tx = row.make()
    program = overhead.compile_step(tx, TREE)
    state = trees.nbytes(jax.eval_shape(tx.init, TREE))  # a history for each of 512 stacked layers is large
    room = CURVES.get(row.name, 0.1)
    assert program.temporary_bytes < room * trees.nbytes(TREE) + 3 * state


@pytest.mark.skipif(not FUSES, reason="as above")
@pytest.mark.parametrize("name", ["clippy", "adaptive_spike_clip"])
def test_leaves_of_one_shape_share_no_array(name):
    # XLA would broadcast constants that several leaves share into memory. `clippy` takes large leaves in blocks.
    tree = [block["mlp"] for block in trees.gpt2(layers=2, width=512)["blocks"]]
    (row,) = [row for row in ROWS if row.name == name]
    assert overhead.compile_step(row.make(), tree).temporary_bytes < 0.1 * trees.nbytes(tree)


@pytest.mark.skipif(not FUSES, reason="as above")
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm"])
def test_sixteen_bits_are_not_converted_once_for_norm_and_scale(name):
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), TREE)
    (row,) = [row for row in ROWS if row.name == name]
    # What XLA converts once it writes to memory in float32, and twice the size; that is what optax's clip takes.
    assert overhead.compile_step(row.make(), tree).temporary_bytes < 1.1 * trees.nbytes(tree)
