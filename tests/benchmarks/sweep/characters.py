"""Task `characters`: a recurrent network reads the Python language reference.

The network of `optaxclip.demo.recurrent`, smaller: its recurrent matrix starts as the identity, and nothing bounds its
state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.demo import corpus
from optaxclip.demo.corpus import CorpusError
from tests.benchmarks.sweep.tasks import Measured, Task, TaskError

UNITS = 32
SEQUENCE = 32
MEASURED = 256  # sequences of each part, evenly spread
INITIAL_SCALE = 1e-3


def _load() -> dict[str, np.ndarray]:
    try:
        text = corpus.language_reference()
    except CorpusError as error:
        raise TaskError(str(error)) from error
    return {"train": text.train, "held_out": text.held_out, "alphabet": np.arange(len(text.alphabet))}


def _init(rng: np.random.Generator, data: Any) -> Any:
    characters = len(data["alphabet"])
    return {
        "read": INITIAL_SCALE * rng.normal(size=(characters, UNITS)),
        "recur": {"kernel": np.eye(UNITS), "bias": np.zeros(UNITS)},
        "write": {"kernel": INITIAL_SCALE * rng.normal(size=(UNITS, characters)), "bias": np.zeros(characters)},
    }


def _sequences(starts: jax.Array, text: jax.Array) -> jax.Array:
    """Sequences from anywhere in the text, each with one character before those to predict."""
    return text[starts[:, None] + jnp.arange(SEQUENCE + 1)[None]]


def spread(text: jax.Array, count: int) -> jax.Array:
    """So many sequences, from the first to the last of the text."""
    return _sequences(jnp.linspace(0, len(text) - SEQUENCE - 1, count).astype(jnp.int32), text)


def _objective(params: Any, batch: jax.Array) -> jax.Array:
    """The mean cross-entropy of each character but the first, given those before it."""

    def step(state: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jax.nn.relu(read + state @ params["recur"]["kernel"] + params["recur"]["bias"][None])
        return state, state

    read = params["read"][batch[:, :-1].T]
    _, states = jax.lax.scan(step, jnp.zeros((len(batch), UNITS)), read)
    logits = states @ params["write"]["kernel"] + params["write"]["bias"][None, None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].T).mean()


def _measure(params: Any, data: Any) -> Measured:
    parts = (spread(data[part], MEASURED) for part in ("train", "held_out"))
    return Measured(*(_objective(params, part) for part in parts))


CHARACTERS = Task(
    name="characters",
    about=f"ReLU recurrent network with {UNITS} units on the Python language reference",
    loss="cross-entropy (nats)",
    steps=400,
    optimizer="Adam",
    scaling=optax.scale_by_adam,
    load=_load,
    data=lambda _, loaded: loaded,
    init=_init,
    examples=lambda data: len(data["train"]) - SEQUENCE,
    batch_size=8,
    batch=lambda starts, data: _sequences(starts, data["train"]),
    objective=_objective,
    measure=_measure,
)
