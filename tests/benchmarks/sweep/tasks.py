"""What a task is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optaxclip.demo.ending import InputError


class TaskError(InputError):
    """A task can't be run here; the message says why."""


class Measured(NamedTuple):
    """How good a model is, once it is trained.

    Attributes:
      train: its loss on what it was trained on.
      held_out: its loss on what it never saw.
    """

    train: jax.Array
    held_out: jax.Array


class Spikes(NamedTuple):
    """Bad batches, which are injected.

    Attributes:
      every: there is one in so many steps, at a place that the seed draws.
      factor: what its gradient is multiplied by.
      spoil: from a batch, what takes its place.
      guess: the loss of a model that has learnt nothing.
    """

    every: int
    factor: float
    spoil: Callable[[Any], Any]
    guess: float


def half_decades(first: int, last: int) -> tuple[float, ...]:
    """Learning rates from one power of ten to another, two per decade."""
    return tuple(10.0 ** (half / 2) for half in range(2 * first, 2 * last + 1))


class Task(NamedTuple):
    """One kind of training, the same for every method.

    Attributes:
      name: what `--tasks` calls it.
      about: what it is, in one line.
      loss: what is scored, with its unit.
      steps: how many steps a run takes, unless the command line says otherwise.
      optimizer: what it is called.
      scaling: makes the optimizer without its learning rate.
      load: reads the data that all seeds share; raises TaskError where that is not possible.
      data: from a seed's generator and what was loaded, what this seed trains and is measured on.
      init: from a seed's generator and its data, the parameters before the first step.
      examples: from a seed's data, how many places there are to take an example of a batch from.
      batch_size: how many examples a batch has.
      batch: from the places of its examples, and the data, a batch.
      objective: of the parameters on a batch: what is trained.
      measure: of the parameters on the data: what is scored.
      rates: the learning rates, ascending.
      spikes: the bad batches; None where there are none.
      together: whether the runs of a program take each step together. One after the other they are faster where a step
        is large enough to keep a core busy.
    """

    name: str
    about: str
    loss: str
    steps: int
    optimizer: str
    scaling: Callable[[], optax.GradientTransformation]
    load: Callable[[], Any]
    data: Callable[[np.random.Generator, Any], Any]
    init: Callable[[np.random.Generator, Any], Any]
    examples: Callable[[Any], int]
    batch_size: int
    batch: Callable[[jax.Array, Any], Any]
    objective: Callable[[Any, Any], jax.Array]
    measure: Callable[[Any, Any], Measured]
    rates: tuple[float, ...] = half_decades(-4, 0)
    spikes: Spikes | None = None
    together: bool = True
