"""How often a compiled step reads the gradients to measure them, and how often it chooses what to do."""

import functools
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


def compiled(tx, tree=SHAPES):
    """The text of the compiled step."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=jnp.sum(params["c"][:2]))
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, tree)
    return jax.jit(step, donate_argnums=(0, 1)).lower(tree, state, tree).compile().as_text()


def reductions(text):
    """How many reductions over large arrays a program has: `reduce-window` in the XLA of jax 0.8."""
    shapes = re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text)
    sizes = {name: math.prod(int(n) for n in dims.split(",") if n) for name, dims in shapes}
    reduced = re.findall(r" reduce(?:-window)?\((?:\w+\[\S+ )?(%[\w.-]+)", text)
    assert reduced
    return sum(sizes[name] > LARGE for name in reduced)


def before_sgd(clip):
    return optax.chain(clip, optax.sgd(1e-3, momentum=0.9))


GLOBAL, LEAF = oc.clip_by_global_norm(1.0), oc.clip_by_leaf_norm(1.0)
SIX = thresholds.mean_std(6.0)
SKIPS = {
    "spikes": (lambda: oc.skip_spikes(before_sgd(GLOBAL), SIX), GLOBAL),
    "nonfinite": (lambda: oc.skip_nonfinite(before_sgd(GLOBAL)), GLOBAL),
    "loss, log": (
        lambda: oc.skip_spikes(before_sgd(GLOBAL), thresholds.zscore(6.0, scale="log"), loss_threshold=SIX),
        GLOBAL,
    ),
    "leaf": (lambda: oc.skip_spikes(before_sgd(LEAF), SIX, norm=norms.leaf_norm()), LEAF),
}


@functools.cache
def readings(clip):
    """Of the clip before an optimizer with a state."""
    return reductions(compiled(before_sgd(clip)))


@pytest.mark.parametrize("name", SKIPS)
def test_a_skip_reads_the_gradients_no_more_than_the_clip_inside(name):
    skip, clip = SKIPS[name]
    assert 0 < reductions(compiled(skip())) == readings(clip)


def test_another_norm_is_another_reading():
    largest = oc.skip_spikes(before_sgd(GLOBAL), SIX, norm=norms.global_norm(jnp.inf))
    assert reductions(compiled(largest)) > readings(GLOBAL)


# Each is large enough to be reduced alone: a matrix and a vector.
LEAVES = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("a", (128, 256)), ("c", (20_000,)))}


@pytest.mark.parametrize("clip", [GLOBAL, LEAF, oc.zclip()], ids=["global", "leaf", "zclip"])
def test_a_norm_reads_each_leaf_once(clip):
    text = compiled(clip, LEAVES)
    assert reductions(text) == len(LEAVES)
    assert " conditional(" not in text


def test_norms_of_columns_are_read_again_only_where_float32_is_too_narrow():
    # Of parameters and gradients, a vector once, a matrix in float32 and, in a branch, in float64.
    text = compiled(oc.adaptive_grad_clip(0.01), LEAVES)
    assert reductions(text) == 2 * (1 + 2)
    assert text.count(" conditional(") == 2
