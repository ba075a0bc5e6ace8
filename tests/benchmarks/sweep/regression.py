"""Task `regression`: least squares under noise whose variance is infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.benchmarks.sweep.tasks import Measured, Task

FEATURES = 32
TRAIN = 1024
HELD_OUT = 4096
FREEDOM = 1.5  # of Student's t: at 2 or less the variance is infinite, at 1 or less there is no mean


def _data(rng: np.random.Generator, loaded: Any) -> Any:
    """Another problem with each seed."""
    del loaded
    total = TRAIN + HELD_OUT
    x = rng.normal(size=(total, FEATURES))
    y = x @ rng.normal(size=FEATURES) + rng.standard_t(FREEDOM, size=total)
    return {"train": (x[:TRAIN], y[:TRAIN]), "held_out": (x[TRAIN:], y[TRAIN:])}


def _error(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return x @ params["kernel"] + params["bias"] - y


def _absolute_error(params: Any, batch: Any) -> jax.Array:
    return jnp.abs(_error(params, batch)).mean()  # that of the squares does not exist


REGRESSION = Task(
    name="regression",
    about=f"least squares, {FEATURES} features, noise of Student's t with {FREEDOM:g} degrees of freedom",
    loss="mean absolute error",
    steps=1000,
    optimizer="SGD with momentum 0.9",
    scaling=lambda: optax.trace(0.9),
    load=lambda: None,
    data=_data,
    init=lambda _, __: {"kernel": np.zeros(FEATURES), "bias": np.zeros(())},
    examples=lambda data: len(data["train"][0]),
    batch_size=8,
    batch=lambda places, data: jax.tree.map(lambda column: column[places], data["train"]),
    objective=lambda params, batch: 0.5 * jnp.mean(_error(params, batch) ** 2),
    measure=lambda params, data: Measured(
        _absolute_error(params, data["train"]), _absolute_error(params, data["held_out"])
    ),
)
