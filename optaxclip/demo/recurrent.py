"""The model: a recurrent network of ReLU units whose recurrent matrix starts as the identity.

Le, Jaitly and Hinton (2015), "A simple way to initialize recurrent networks of rectified linear units",
arXiv:1504.00941. Nothing bounds its state: with an eigenvalue of the recurrent matrix a little above 1, state and
gradient grow with every character. The gradient's square leaves float32 long before the gradient does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

UNITS = 128
INITIAL_SCALE = 1e-3  # the paper's standard deviation for all that is neither identity nor zero


class Params(NamedTuple):
    """The parameters.

    Attributes:
      read: one row per character, added to the state when it is read.
      recur: from one state to the next.
      recur_bias: added to each state.
      write: from a state to the logits of the next character.
      write_bias: added to the logits.
    """

    read: jax.Array
    recur: jax.Array
    recur_bias: jax.Array
    write: jax.Array
    write_bias: jax.Array


def init(key: jax.Array, num_characters: int) -> Params:
    """Identity, zero biases, and small Gaussian numbers for the rest."""
    read_key, write_key = jax.random.split(key)
    return Params(
        read=INITIAL_SCALE * jax.random.normal(read_key, (num_characters, UNITS)),
        recur=jnp.eye(UNITS),
        recur_bias=jnp.zeros(UNITS),
        write=INITIAL_SCALE * jax.random.normal(write_key, (UNITS, num_characters)),
        write_bias=jnp.zeros(num_characters),
    )


def sequence_loss(params: Params, characters: jax.Array) -> jax.Array:
    """The mean cross-entropy, in nats, of each character but the first, given those before it."""

    def read_one(state: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jax.nn.relu(read + state @ params.recur + params.recur_bias)
        return state, state

    _, states = jax.lax.scan(read_one, jnp.zeros(UNITS), params.read[characters[:-1]])
    logits = jax.vmap(lambda state: state @ params.write + params.write_bias)(states)
    return optax.softmax_cross_entropy_with_integer_labels(logits, characters[1:]).mean()


def batch_loss(params: Params, batch: jax.Array) -> jax.Array:
    """The mean of `sequence_loss` over a batch."""
    return jax.vmap(sequence_loss, in_axes=(None, 0))(params, batch).mean()
