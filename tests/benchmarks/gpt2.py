"""The tree of shapes of GPT-2 small: 148 leaves, 124,439,808 values, 498 MB in float32.

Embeddings, twelve blocks of two layer norms, attention and MLP, and a last layer norm; the output layer is the token
embedding again. Most of the bytes are in 50 kernels, most of the leaves are vectors.
"""

from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]


def shapes(*, layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024) -> Tree:
    """A pytree of `jax.ShapeDtypeStruct`; the defaults are GPT-2 small."""
    return {
        "wte": _float32(vocabulary, width),
        "wpe": _float32(positions, width),
        "blocks": [_block(width) for _ in range(layers)],
        "ln_f": _layer_norm(width),
    }


def _block(width: int) -> Tree:
    return {
        "ln_1": _layer_norm(width),
        "attn": {"qkv": _dense(width, 3 * width), "out": _dense(width, width)},
        "ln_2": _layer_norm(width),
        "mlp": {"in": _dense(width, 4 * width), "out": _dense(4 * width, width)},
    }


def _layer_norm(width: int) -> Tree:
    return {"scale": _float32(width), "bias": _float32(width)}


def _dense(fan_in: int, fan_out: int) -> Tree:
    return {"kernel": _float32(fan_in, fan_out), "bias": _float32(fan_out)}


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)
