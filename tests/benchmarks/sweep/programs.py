"""One program: all learning rates and seeds of one method in one task, compiled together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.diagnostics import summary
from tests.benchmarks.sweep.methods import Method
from tests.benchmarks.sweep.tasks import Measured, Task


class Outcome(NamedTuple):
    """What came of a program: a row per learning rate, a column per seed, and NaN where a loss is not finite.

    Attributes:
      train: loss after the last step, on what was trained on.
      held_out: loss after the last step, on what was not.
      initial: held-out loss before the first step; its rows are all the same.
      spikes: how many norms of the gradient, before the clip, `diagnostics.summary` calls spikes.
      unspiked: the same as `held_out`, of runs that differ only in that they have no bad batches; None where none have
        any.
    """

    train: np.ndarray
    held_out: np.ndarray
    initial: np.ndarray
    spikes: np.ndarray
    unspiked: np.ndarray | None


class Seen(NamedTuple):
    """What the seeds see, whatever the method and the learning rate. The first axis of every array is the seed.

    Attributes:
      data: what is trained and measured on.
      params: the parameters before the first step.
      places: for each step, where in the data the examples of its batch are.
      bad: for each step, whether its batch is bad, where a run has spikes.
    """

    data: Any
    params: Any
    places: jax.Array
    bad: jax.Array


class Prepared(NamedTuple):
    """A task, ready for all of its programs.

    Attributes:
      task: the task.
      seen: what its seeds see.
      measure: `task.measure` for all runs, compiled once.
      initial: the held-out loss of each seed before the first step.
    """

    task: Task
    seen: Seen
    measure: Callable[[Any, Any], Measured]
    initial: np.ndarray


def prepare(task: Task, *, seeds: int, steps: int) -> Prepared:
    """Makes all that does not depend on the method.

    Args:
      task: the task.
      seeds: how many seeds: 0, 1, ...
      steps: of each run.

    Raises:
      TaskError: if the data can't be had.
    """
    loaded = task.load()
    each_seed = [_seen(task, loaded, seed, steps) for seed in range(seeds)]
    seen: Seen = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each_seed)
    over_seeds = jax.vmap(task.measure)
    over_rates = jax.vmap(over_seeds, in_axes=(0, None))
    initial = _finite(jax.jit(over_seeds)(seen.params, seen.data).held_out)
    return Prepared(task, seen, jax.jit(jax.vmap(over_rates, in_axes=(0, None))), initial)


def train(prepared: Prepared, method: Method) -> Outcome:
    """Trains once per learning rate and seed, and measures what came of it.

    Args:
      prepared: the task.
      method: how it is clipped.
    """
    task = prepared.task
    run = _run(task, method)
    for place in (2, 1, 0):  # over seeds, rates, and with spikes and without
        run = _over(run, place, task.together and method.together)
    spiked = [False] if task.spikes is None else [True, False]
    params, norms = jax.jit(run)(jnp.asarray(spiked), jnp.asarray(task.rates, jnp.float32), prepared.seen)
    trained, held_out = map(_finite, prepared.measure(params, prepared.seen.data))
    return Outcome(
        train=trained[0],
        held_out=held_out[0],
        initial=np.broadcast_to(prepared.initial, held_out[0].shape),
        spikes=np.apply_along_axis(_count_spikes, -1, np.asarray(norms[0])),
        unspiked=held_out[1] if len(spiked) > 1 else None,
    )


def _count_spikes(norms: np.ndarray) -> float:
    return float(len(summary(norms).spikes))


def _over(run: Callable[..., Any], place: int, together: bool) -> Callable[..., Any]:
    """`run` for every entry of its argument in this place, with the others as they are."""
    if together:
        return jax.vmap(run, in_axes=tuple(0 if other == place else None for other in range(3)))
    return lambda *given: jax.lax.map(lambda one: run(*given[:place], one, *given[place + 1 :]), given[place])


def _finite(losses: jax.Array) -> np.ndarray:
    """As a file keeps them, so that it makes no difference whether they were read from one."""
    array = np.asarray(losses, np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _seen(task: Task, loaded: Any, seed: int, steps: int) -> Seen:
    rng = np.random.default_rng(seed)
    data = task.data(rng, loaded)
    params = task.init(rng, data)
    places = rng.integers(task.examples(data), size=(steps, task.batch_size))
    every = 1 if task.spikes is None else task.spikes.every
    blocks = -(-steps // every)
    bad = np.arange(every)[None] == rng.integers(every, size=(blocks, 1))
    narrow: Any = jax.tree.map(_narrow, (data, params, places, bad.ravel()[:steps]))
    return Seen(*narrow)


def _narrow(array: Any) -> np.ndarray:
    """As jax would have it: 32 bits."""
    return np.asarray(array, jax.dtypes.canonicalize_dtype(np.asarray(array).dtype))


def _run(task: Task, method: Method) -> Callable[[jax.Array, jax.Array, Seen], Any]:
    def run(spiked: jax.Array, rate: jax.Array, seen: Seen) -> Any:
        optimizer = method.optimizer(task.scaling(), rate)

        def step(carry: Any, now: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            params, state = carry
            places, bad = now
            grads = _gradient(task, params, task.batch(places, seen.data), spiked & bad)
            norm = optax.tree.norm(grads)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), norm

        start = (seen.params, optimizer.init(seen.params))
        (params, _), norms = jax.lax.scan(step, start, (seen.places, seen.bad))
        return params, norms

    return run


def _gradient(task: Task, params: Any, batch: Any, bad: jax.Array) -> Any:
    if task.spikes is None:
        return jax.grad(task.objective)(params, batch)
    spoilt = task.spikes.spoil(batch)
    batch = jax.tree.map(lambda here, there: jnp.where(bad, there, here), batch, spoilt)
    factor = jnp.where(bad, task.spikes.factor, 1.0)
    return jax.tree.map(lambda leaf: factor * leaf, jax.grad(task.objective)(params, batch))
