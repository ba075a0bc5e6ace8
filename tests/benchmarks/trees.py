"""Trees of shapes to measure on.

`gpt2` is GPT-2 small: 148 leaves, 124,439,808 values, 498 MB in float32. Embeddings, twelve blocks of two layer norms,
attention and MLP, and a last layer norm; the output layer is the token embedding again. Most of the bytes are in 50
kernels, most of the leaves are vectors. `stacked` is the same with the blocks as one, with a leading axis for the
layers as `nn.scan` has it: 16 leaves. `small` is a thousand leaves of 32x32.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Tree = Any  # a pytree of `jax.ShapeDtypeStruct`


def gpt2(dtype: Any = np.float32, *, layers: int = 12, width: int = 768, vocabulary: int = 50257) -> Tree:
    """GPT-2; the defaults are its small one."""
    block = _block(width)
    return _typed({**_outside(width, vocabulary), "blocks": [block] * layers}, dtype)


def stacked(dtype: Any = np.float32, *, layers: int = 12, width: int = 768, vocabulary: int = 50257) -> Tree:
    """GPT-2 with a leading axis for the layers."""
    blocks = jax.tree.map(lambda shape: (layers, *shape), _block(width), is_leaf=_is_shape)
    return _typed({**_outside(width, vocabulary), "blocks": blocks}, dtype)


LAYER_AXES = {"wte": 0, "wpe": 0, "ln_f": 0, "blocks": 1}  # the `stacked=` of clippers for that tree


def small(dtype: Any = np.float32, *, leaves: int = 1000) -> Tree:
    """Many small leaves."""
    return _typed([(32, 32)] * leaves, dtype)


TREES: dict[str, Callable[..., Tree]] = {"gpt2": gpt2, "stacked": stacked, "small": small}


def nbytes(tree: Tree) -> int:
    """The bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def random_like(shapes: Tree, *, scale: float, seed: int) -> Any:
    """Normal values of this scale."""
    rng, scale = np.random.default_rng(seed), np.float32(scale)

    def draw(leaf: Any) -> jax.Array:
        return jax.numpy.asarray(rng.standard_normal(leaf.shape, np.float32) * scale, leaf.dtype)

    return jax.tree.map(draw, shapes)


def with_zeros(tree: Any) -> Any:
    """The same tree with every tenth leaf zero; the other leaves are shared, not copied."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([jax.numpy.zeros_like(leaf) if i % 10 == 5 else leaf for i, leaf in enumerate(leaves)])


def _outside(width: int, vocabulary: int) -> Tree:
    """All but the blocks."""
    return {"wte": (vocabulary, width), "wpe": (1024, width), "ln_f": _layer_norm(width)}


def _block(width: int) -> Tree:
    return {
        "ln_1": _layer_norm(width),
        "attn": {"qkv": _dense(width, 3 * width), "out": _dense(width, width)},
        "ln_2": _layer_norm(width),
        "mlp": {"in": _dense(width, 4 * width), "out": _dense(4 * width, width)},
    }


def _layer_norm(width: int) -> Tree:
    return {"scale": (width,), "bias": (width,)}


def _dense(fan_in: int, fan_out: int) -> Tree:
    return {"kernel": (fan_in, fan_out), "bias": (fan_out,)}


def _typed(tree: Any, dtype: Any) -> Tree:
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=_is_shape)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple)
