"""One run: the model, an optimizer, and one jitted step whose state is donated."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.demo import model
from optaxclip.demo.corpus import Corpus
from optaxclip.demo.watching import last_update_clipped

SEQUENCE = 64  # characters that are predicted
BATCH = 32
REPORT_EVERY = 20  # steps; a report waits for the device, a step does not


class Run(NamedTuple):
    """All that a step changes. It stays on the device, and each step overwrites the last one's.

    Attributes:
      params: the model.
      opt_state: the optimizer's state.
      step: steps done.
      nonfinite_steps: steps whose loss or gradient was not finite.
      clipped_steps: other steps that were clipped.
    """

    params: model.Params
    opt_state: Any
    step: jax.Array
    nonfinite_steps: jax.Array
    clipped_steps: jax.Array


class Result(NamedTuple):
    """What came of a run.

    Attributes:
      bits: per character of the held-out text, after the last step. Not finite if the model was lost.
      nonfinite_steps: steps whose loss or gradient was not finite.
      clipped_share: which share of the other steps was clipped; None if there was no clip, or no such step.
    """

    bits: float
    nonfinite_steps: int
    clipped_share: float | None


def train(
    optimizer: optax.GradientTransformation,
    corpus: Corpus,
    *,
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
) -> Result:
    """Trains a model and measures it on the held-out text.

    Args:
      optimizer: the optimizer, clipping included.
      corpus: the text.
      steps: how many steps; at least 1.
      seed: for the initial parameters and the batches: equal seeds see the same of both, whatever the optimizer.
      report: called now and then with the number of steps done and the last loss.
    """
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    run = _start(optimizer, model.init(init_key, len(corpus.alphabet)))
    step = _make_step(optimizer)
    text = jnp.asarray(corpus.train)
    for done in range(1, steps + 1):
        run, loss = step(run, text, batch_key)
        if done % REPORT_EVERY == 0 or done in {1, steps}:
            report(done, float(loss))
    nonfinite_steps = int(run.nonfinite_steps)
    finite_steps = steps - nonfinite_steps
    watched = last_update_clipped(run.opt_state) is not None
    return Result(
        bits=float(_held_out_loss(run.params, _sequences(corpus.held_out))) / math.log(2),
        nonfinite_steps=nonfinite_steps,
        clipped_share=int(run.clipped_steps) / finite_steps if watched and finite_steps else None,
    )


def _start(optimizer: optax.GradientTransformation, params: model.Params) -> Run:
    # Three zeros, not one three times: a buffer can be donated only once.
    step, nonfinite_steps, clipped_steps = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Run(params, optimizer.init(params), step, nonfinite_steps, clipped_steps)


def _make_step(
    optimizer: optax.GradientTransformation,
) -> Callable[[Run, jax.Array, jax.Array], tuple[Run, jax.Array]]:
    def step(run: Run, text: jax.Array, key: jax.Array) -> tuple[Run, jax.Array]:
        batch = _random_batch(jax.random.fold_in(key, run.step), text)
        loss, grads = jax.value_and_grad(model.batch_loss)(run.params, batch)
        updates, opt_state = optimizer.update(grads, run.opt_state, run.params)
        finite = jnp.stack([jnp.isfinite(x).all() for x in (loss, *jax.tree.leaves(grads))]).all()
        clipped = last_update_clipped(opt_state)
        params: Any = optax.apply_updates(run.params, updates)
        after = Run(
            params=params,
            opt_state=opt_state,
            step=run.step + 1,
            nonfinite_steps=run.nonfinite_steps + ~finite,
            clipped_steps=run.clipped_steps if clipped is None else run.clipped_steps + (finite & clipped),
        )
        return after, loss

    return jax.jit(step, donate_argnums=0)


def _random_batch(key: jax.Array, text: jax.Array) -> jax.Array:
    """Sequences from anywhere in the text, each with one character before those to predict."""
    starts = jax.random.randint(key, (BATCH,), 0, len(text) - SEQUENCE)
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(text, start, SEQUENCE + 1))(starts)


def _sequences(text: Any) -> jax.Array:
    """The whole text, cut into sequences like those of `_random_batch`; a rest is dropped."""
    number = (len(text) - 1) // SEQUENCE
    starts = SEQUENCE * jnp.arange(number)[:, None]
    return jnp.asarray(text)[starts + jnp.arange(SEQUENCE + 1)[None]]


@jax.jit
def _held_out_loss(params: model.Params, sequences: jax.Array) -> jax.Array:
    # In pieces, so that a long text needs no more memory than a short one.
    losses = jax.lax.map(lambda sequence: model.sequence_loss(params, sequence), sequences, batch_size=256)
    return losses.mean()
