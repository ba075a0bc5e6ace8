"""The main job's transformer, against the same written in NumPy."""

import jax
import numpy as np
from scipy.special import log_softmax

from optaxclip.demo import decoder

CHARACTERS = 11
init = jax.jit(decoder.init, static_argnums=1)
batch_loss = jax.jit(decoder.batch_loss)


def params():
    """Every leaf random, so that none is left out unseen."""
    leaves, structure = jax.tree.flatten(init(jax.random.key(0), CHARACTERS))
    rng = np.random.default_rng(0)
    return structure.unflatten([np.asarray(leaf) + np.float32(0.1) * rng.normal(size=leaf.shape) for leaf in leaves])


def normalized(stream, scale):
    return scale * stream / np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-6)


def rotated(head):
    """Each pair of coordinates is a complex number, turned by its position times its frequency."""
    half = head.shape[-1] // 2
    turns = np.exp(1j * np.arange(len(head))[:, None] * 10_000.0 ** (-np.arange(half) / half))
    turned = (head[:, :half] + 1j * head[:, half:]) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attended(stream, query_key_value):
    size = decoder.WIDTH // decoder.HEADS
    query, key, value = np.split(stream @ query_key_value, 3, axis=-1)
    heads = []
    for first in range(0, decoder.WIDTH, size):
        q, k, v = (each[:, first : first + size] for each in (rotated_heads(query), rotated_heads(key), value))
        scores = q @ k.T / np.sqrt(size)
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        heads.append(np.exp(log_softmax(scores, axis=-1)) @ v)
    return np.concatenate(heads, axis=-1)


def rotated_heads(stream):
    return np.concatenate([rotated(head) for head in np.split(stream, decoder.HEADS, axis=-1)], axis=-1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def losses(params, characters):
    """The loss of each character of a sequence but the first."""
    stream = params.embedding[characters[:-1]]
    for number in range(decoder.LAYERS):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], params.layers)
        stream = (
            stream + attended(normalized(stream, layer.attention_norm), layer.query_key_value) @ layer.attention_out
        )
        stream = stream + gelu(normalized(stream, layer.mlp_norm) @ layer.mlp_in) @ layer.mlp_out
    logits = log_softmax(normalized(stream, params.final_norm) @ params.head, axis=-1)
    return -logits[np.arange(len(logits)), characters[1:]]


def test_the_loss_is_that_of_numpy():
    batch = np.random.default_rng(1).integers(0, CHARACTERS, (3, 9), np.int32)
    given = params()
    expected = np.mean([losses(jax.tree.map(np.float64, given), sequence) for sequence in batch])
    np.testing.assert_allclose(batch_loss(given, batch), expected, rtol=1e-5)


def test_a_new_model_guesses():
    batch = np.arange(27, dtype=np.int32).reshape(3, 9) % CHARACTERS
    loss = batch_loss(init(jax.random.key(1), CHARACTERS), batch)
    np.testing.assert_allclose(loss, np.log(CHARACTERS), rtol=0.1)
