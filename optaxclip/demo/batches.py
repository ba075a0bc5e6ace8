"""How a text is cut up: random sequences to train on, and all of it to measure on."""

from typing import Any

import jax
import jax.numpy as jnp

SEQUENCE = 64  # characters that are predicted, each from those before it; a sequence is one longer


def random_batch(key: jax.Array, text: jax.Array, size: int) -> jax.Array:
    """`size` sequences from anywhere in the text, each with one character before those to predict."""
    starts = jax.random.randint(key, (size,), 0, len(text) - SEQUENCE)
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(text, start, SEQUENCE + 1))(starts)


def sequences(text: Any) -> jax.Array:
    """The whole text, cut into sequences like those of `random_batch`; a rest is dropped."""
    number = (len(text) - 1) // SEQUENCE
    starts = SEQUENCE * jnp.arange(number)[:, None]
    return jnp.asarray(text)[starts + jnp.arange(SEQUENCE + 1)[None]]
