"""Tasks `digits` and `spikes`: a convolutional network reads scikit-learn's digits, without and with bad batches."""

import math
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.benchmarks.sweep.tasks import Measured, Spikes, Task, TaskError

TRAIN = 1000  # of the 1797 images, others with each seed; the rest is held out
CHANNELS = 8
CLASSES = 10
WRONG = 0.1  # of the labels, held-out ones too: without them 5 % of the best loss is far less than what a seed changes


def _load() -> dict[str, np.ndarray]:
    try:
        # In the extra `notebooks`; the other tasks do without it.
        datasets: Any = import_module("sklearn.datasets")
    except ImportError as error:
        raise TaskError("the digits need scikit-learn: pip install -e '.[notebooks]'") from error
    digits = datasets.load_digits()
    return {"images": digits.images[..., None] / 16.0, "labels": digits.target}


def _data(rng: np.random.Generator, loaded: Any) -> Any:
    order = rng.permutation(len(loaded["labels"]))
    wrong = rng.random(len(order)) < WRONG
    labels = np.where(wrong, loaded["labels"] + rng.integers(1, CLASSES, len(order)), loaded["labels"]) % CLASSES
    parts = {"train": order[:TRAIN], "held_out": order[TRAIN:]}
    return {part: (loaded["images"][chosen], labels[chosen]) for part, chosen in parts.items()}


def _init(rng: np.random.Generator, data: Any) -> Any:
    del data
    shapes = {"first": (3, 3, 1, CHANNELS), "second": (3, 3, CHANNELS, 2 * CHANNELS), "last": (8 * CHANNELS, CLASSES)}
    return {
        name: {
            "kernel": math.sqrt(2 / math.prod(shape[:-1])) * rng.normal(size=shape),
            "bias": np.zeros(shape[-1]),
        }
        for name, shape in shapes.items()
    }


def _convolved(images: jax.Array, layer: Any) -> jax.Array:
    """A convolution of 3 x 3 with stride 2, and ReLU.

    As a product of matrices: with another kernel for each learning rate and seed, XLA's own takes several times longer.
    """
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]
    kernel = layer["kernel"]
    flat = jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    return jax.nn.relu(flat + layer["bias"][None, None, None])


def _objective(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    hidden = _convolved(_convolved(images, params["first"]), params["second"])
    logits = hidden.reshape(len(images), -1) @ params["last"]["kernel"] + params["last"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _spoil(batch: Any) -> Any:
    images, labels = batch
    return images, (labels + 1) % CLASSES


DIGITS = Task(
    name="digits",
    about=f"convolutional network on scikit-learn's digits, of whose labels {WRONG:.0%} are wrong",
    loss="cross-entropy (nats)",
    steps=400,
    optimizer="Adam",
    scaling=optax.scale_by_adam,
    load=_load,
    data=_data,
    init=_init,
    examples=lambda data: len(data["train"][0]),
    batch_size=32,
    batch=lambda places, data: jax.tree.map(lambda column: column[places], data["train"]),
    objective=_objective,
    measure=lambda params, data: Measured(_objective(params, data["train"]), _objective(params, data["held_out"])),
)
SPIKES = DIGITS._replace(
    name="spikes",
    about="digits; in 1 % of the steps all labels are wrong and the gradient is 1,000 times too large",
    spikes=Spikes(every=100, factor=1000.0, spoil=_spoil, guess=math.log(CLASSES)),
)
