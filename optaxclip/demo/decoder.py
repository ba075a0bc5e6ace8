"""A small decoder-only transformer: pre-norm, causal attention, rotary positions.

It is the architecture that language models are made of, at a size that trains on two CPU cores. Weights are plain
matrices and layers are stacked along the first axis, so that one `lax.scan` runs all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

LAYERS = 2
WIDTH = 128
HEADS = 4
_INITIAL_SCALE = 0.02  # GPT-2's standard deviation


class Layers(NamedTuple):
    """Parameters of every layer, stacked along the first axis.

    Attributes:
      attention_norm: scale of the RMS norm before the attention.
      query_key_value: from the residual stream to queries, keys and values.
      attention_out: from the heads to the residual stream.
      mlp_norm: scale of the RMS norm before the perceptron.
      mlp_in: from the residual stream to the hidden units.
      mlp_out: from the hidden units to the residual stream.
    """

    attention_norm: jax.Array
    query_key_value: jax.Array
    attention_out: jax.Array
    mlp_norm: jax.Array
    mlp_in: jax.Array
    mlp_out: jax.Array


class Params(NamedTuple):
    """All parameters.

    Attributes:
      embedding: one row per character.
      layers: those of the layers.
      final_norm: scale of the RMS norm before the logits.
      head: from the residual stream to the logits.
    """

    embedding: jax.Array
    layers: Layers
    final_norm: jax.Array
    head: jax.Array


def init(key: jax.Array, num_characters: int, width: int = WIDTH) -> Params:
    """Gaussian weights as in GPT-2, an embedding of unit variance, and norms that scale by 1.

    A small embedding in front of an RMS norm would have large gradients: the norm divides by its size.

    Args:
      key: a PRNG key.
      num_characters: the size of the alphabet.
      width: the size of the residual stream, a multiple of twice the number of heads.
    """
    keys = iter(jax.random.split(key, 6))

    def matrix(rows: int, columns: int, scale: float = _INITIAL_SCALE, stack: tuple[int, ...] = (LAYERS,)) -> jax.Array:
        return scale * jax.random.normal(next(keys), (*stack, rows, columns))

    residual = _INITIAL_SCALE / (2 * LAYERS) ** 0.5
    return Params(
        embedding=matrix(num_characters, width, 1.0, stack=()),
        layers=Layers(
            attention_norm=jnp.ones((LAYERS, width)),
            query_key_value=matrix(width, 3 * width),
            attention_out=matrix(width, width, residual),
            mlp_norm=jnp.ones((LAYERS, width)),
            mlp_in=matrix(width, 4 * width),
            mlp_out=matrix(4 * width, width, residual),
        ),
        final_norm=jnp.ones(width),
        head=matrix(width, num_characters, stack=()),
    )


def batch_loss(params: Params, batch: jax.Array) -> jax.Array:
    """The mean cross-entropy, in nats, of each character but the first, given those before it."""
    inputs, targets = batch[:, :-1], batch[:, 1:]

    def apply(stream: jax.Array, layer: Layers) -> tuple[jax.Array, None]:
        stream += _attention(_normalized(stream, layer.attention_norm), layer)
        hidden = jax.nn.gelu(_normalized(stream, layer.mlp_norm) @ layer.mlp_in)
        return stream + hidden @ layer.mlp_out, None

    stream, _ = jax.lax.scan(apply, params.embedding[inputs], params.layers)
    logits = _normalized(stream, params.final_norm) @ params.head
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _normalized(stream: jax.Array, scale: jax.Array) -> jax.Array:
    return scale[None, None] * stream * jax.lax.rsqrt(jnp.mean(stream**2, axis=-1, keepdims=True) + 1e-6)


def _attention(stream: jax.Array, layer: Layers) -> jax.Array:
    heads = (stream @ layer.query_key_value).reshape(*stream.shape[:-1], 3, HEADS, stream.shape[-1] // HEADS)
    query, key, value = jnp.moveaxis(heads, -3, 0)
    mixed = jax.nn.dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True)
    return mixed.reshape(stream.shape) @ layer.attention_out


def _rotated(heads: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of an array of (batch, position, head, coordinate)."""
    half = heads.shape[-1] // 2
    positions, frequencies = jnp.arange(heads.shape[1]), 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.outer(positions, frequencies)[None, :, None]
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
