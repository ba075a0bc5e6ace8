"""A skip around a clip that measures the same norm reads the gradients as often as the clip alone."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip as oc
from optaxclip import norms, thresholds

# Two kernels that are reduced in one stack, and one that is reduced alone.
SHAPES = {
    "a": jax.ShapeDtypeStruct((64, 128), jnp.float32),
    "b": jax.ShapeDtypeStruct((64, 128), jnp.float32),
    "c": jax.ShapeDtypeStruct((9000,), jnp.float32),
}
LARGE = 8000


def reductions(tx):
    """How many reductions over large arrays the compiled step has: `reduce-window` in the XLA of jax 0.8."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=jnp.sum(params["c"][:2]))
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, SHAPES)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(SHAPES, state, SHAPES).compile().as_text()
    shapes = re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text)
    sizes = {name: math.prod(int(n) for n in dims.split(",") if n) for name, dims in shapes}
    reduced = re.findall(r" reduce(?:-window)?\((?:\w+\[\S+ )?(%[\w.-]+)", text)
    assert reduced
    return sum(sizes[name] > LARGE for name in reduced)


def adam(clip):
    return optax.chain(clip, optax.adam(1e-3))


GLOBAL, LEAF = oc.clip_by_global_norm(1.0), oc.clip_by_leaf_norm(1.0)
SIX = thresholds.mean_std(6.0)
SKIPS = {
    "spikes": (lambda: oc.skip_spikes(adam(GLOBAL), SIX), GLOBAL),
    "nonfinite": (lambda: oc.skip_nonfinite(adam(GLOBAL)), GLOBAL),
    "loss, log": (
        lambda: oc.skip_spikes(adam(GLOBAL), thresholds.zscore(6.0, scale="log"), loss_threshold=SIX),
        GLOBAL,
    ),
    "leaf": (lambda: oc.skip_spikes(adam(LEAF), SIX, norm=norms.leaf_norm()), LEAF),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_skip_reads_the_gradients_no_more_than_the_clip_inside(name):
    skip, clip = SKIPS[name]
    assert 0 < reductions(skip()) == reductions(adam(clip))


def test_another_norm_is_another_reading():
    largest = oc.skip_spikes(adam(GLOBAL), SIX, norm=norms.global_norm(jnp.inf))
    assert reductions(largest) > reductions(adam(GLOBAL))
