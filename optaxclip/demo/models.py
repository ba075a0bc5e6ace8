"""What can be trained: two models, each with its optimizers and the clippers that are compared by default."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optaxclip.demo import decoder, recurrent
from optaxclip.demo.rows import ROWS


class Optimizer(NamedTuple):
    """An optimizer and its learning rate.

    Attributes:
      name: what `--optimizer` calls it.
      shown: what the table calls it.
      make: from the learning rate and the number of steps to the optimizer.
      learning_rate: the default.
    """

    name: str
    shown: str
    make: Callable[[float, int], optax.GradientTransformation]
    learning_rate: float


class Model(NamedTuple):
    """A model and how it is trained.

    Attributes:
      name: what `--model` calls it.
      shown: a description for the line above the table.
      init: from a key and the number of characters in the alphabet to the parameters.
      batch_loss: from the parameters and a batch of shape (sequences, characters) to the mean loss in nats.
      batch: sequences in a batch.
      steps: the default number of steps.
      optimizers: the optimizers, by name; the first is the one that a clip helps most.
      rows: the clippers that are compared by default, by name.
    """

    name: str
    shown: str
    init: Callable[[jax.Array, int], Any]
    batch_loss: Callable[[Any, jax.Array], jax.Array]
    batch: int
    steps: int
    optimizers: dict[str, Optimizer]
    rows: tuple[str, ...]


def _warmed_up(peak: float, steps: int) -> optax.Schedule:
    """A fifth of the steps up to the peak, and a cosine down to a tenth of it."""
    return optax.schedules.warmup_cosine_decay_schedule(0.0, peak, steps // 5, max(steps, 2), 0.1 * peak)


def _by_name(*optimizers: Optimizer) -> dict[str, Optimizer]:
    return {each.name: each for each in optimizers}


DECODER = Model(
    name="decoder",
    shown=f"decoder-only transformer, {decoder.LAYERS} layers, width {decoder.WIDTH}",
    init=decoder.init,
    batch_loss=decoder.batch_loss,
    batch=8,
    steps=150,
    optimizers=_by_name(
        Optimizer("sgd", "SGD", lambda rate, steps: optax.sgd(_warmed_up(rate, steps), momentum=0.9), 1.0),
        Optimizer("adamw", "AdamW", lambda rate, steps: optax.adamw(_warmed_up(rate, steps)), 3e-3),
    ),
    rows=("none", "optax.clip_by_global_norm", "clip_by_global_norm", "autoclip", "zclip", "skip_spikes"),
)

RECURRENT = Model(
    name="rnn",
    shown=f"ReLU recurrent network, {recurrent.UNITS} units",
    init=recurrent.init,
    batch_loss=recurrent.batch_loss,
    batch=32,
    steps=400,
    optimizers=_by_name(Optimizer("adam", "Adam", lambda rate, _: optax.adam(rate), 0.03)),
    rows=tuple(ROWS),
)

MODELS = {model.name: model for model in (DECODER, RECURRENT)}
