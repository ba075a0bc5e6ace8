"""Programs for accelerators have no conditional: a GPU would ask its host which branch to run, or run both."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip as oc
from tests import table

CLIPS = {
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(1.0),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm(1.0),
    "clip_by_leaf_norm, ord 3": lambda: oc.clip_by_leaf_norm(1.0, ord=3),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.01),
    "zclip": oc.zclip,
    "record=100": lambda: oc.clip_by_global_norm(1.0, record=100),
    "leaf norms, record=100": lambda: oc.clip_by_leaf_norm(1.0, record=100),
    "skip_nonfinite": lambda: oc.skip_nonfinite(optax.sgd(1.0, momentum=0.9)),
    "skip_spikes": lambda: oc.skip_spikes(optax.sgd(1.0, momentum=0.9), oc.thresholds.zscore()),
}
DEFINITION = re.compile(r'(%\w+)(?::\d+)? = "?stablehlo\.(\w+)"?(?:\((%\w+)\))?')


def conditionals(traced, platform):
    """How many choices a program for this platform leaves for when it runs.

    The choice of the platform, too, stands there as a `case`, of a constant that XLA folds.
    """
    count, constant = 0, set()
    for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines():
        if found := DEFINITION.search(line):
            name, operation, index = found.groups()
            chooses = operation in {"case", "if"}
            count += chooses and index not in constant
            is_constant = operation == "constant" or (chooses and index in constant)
            constant = constant | {name} if is_constant else constant - {name}
    return count


def test_conditionals_are_counted():
    def two(x):
        x = jax.lax.platform_dependent(
            x, cpu=lambda x: x, default=lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)
        )
        return jax.lax.switch(jnp.int32(x[1]), [jnp.sin, jnp.cos, jnp.tan], x)

    traced = jax.jit(two).trace(jax.ShapeDtypeStruct((2,), jnp.float32))
    assert (conditionals(traced, "cuda"), conditionals(traced, "cpu")) == (2, 1)


@pytest.mark.parametrize("name", CLIPS)
def test_no_conditional(name):
    columns = jax.ShapeDtypeStruct((20, 1000), jnp.float32)
    tree = {"wide": table.params("float32"), "narrow": table.params("bfloat16"), "columns": columns}
    tx = CLIPS[name]()
    traced = jax.jit(tx.update).trace(tree, jax.eval_shape(tx.init, tree), tree)
    assert {platform: conditionals(traced, platform) for platform in ("cuda", "tpu")} == {"cuda": 0, "tpu": 0}
