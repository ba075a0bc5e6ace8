"""One run: the model, an optimizer, and one jitted step whose state is donated."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip.demo.batches import random_batch, sequences
from optaxclip.demo.corpus import Corpus
from optaxclip.demo.models import Model
from optaxclip.demo.watching import last_step_skipped, last_update_clipped

REPORT_EVERY = 20  # steps; a report waits for the device, a step does not


class Log(NamedTuple):
    """What is kept of each step: numbers of one step, or columns of all of them.

    Attributes:
      loss: in nats per character.
      norm: global norm of the gradient; None where the clipper's own record has one.
      finite: whether loss and gradient were finite.
      clipped: whether the clip changed anything; None without a clip.
      skipped: whether the step was skipped; None if none can be.
    """

    loss: jax.Array
    norm: jax.Array | None
    finite: jax.Array
    clipped: jax.Array | None
    skipped: jax.Array | None


class TrainState(NamedTuple):
    """All that a step changes. It stays on the device, and each step overwrites the last one's.

    Attributes:
      params: the model.
      opt_state: the optimizer's state.
      step: steps done.
      log: what they were like.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    log: Log


class Program(NamedTuple):
    """One way to train, ready to go.

    Attributes:
      start: makes a run before its first step, of fresh arrays, since a step takes them away.
      step: one step of it, and its loss; compiled when it is first called.
      held_out_loss: the loss of parameters on the held-out text, in nats per character.
    """

    start: Callable[[], TrainState]
    step: Callable[[TrainState], tuple[TrainState, jax.Array]]
    held_out_loss: Callable[[Any], jax.Array]


class History(NamedTuple):
    """A run step by step, as columns.

    Attributes:
      loss: in bits per character.
      norm: what the clipper measured; for one that keeps no record, the gradient's global norm.
      limit: what it permitted; None if it keeps no record.
      scale: what it multiplied by; None if it keeps no record.
      clipped: whether loss and gradient were finite and the clip changed anything; None without a clip.
      skipped: whether the step was skipped; None if none can be.
    """

    loss: np.ndarray
    norm: np.ndarray
    limit: np.ndarray | None
    scale: np.ndarray | None
    clipped: np.ndarray | None
    skipped: np.ndarray | None


class Result(NamedTuple):
    """What came of a run.

    Attributes:
      bits: per character of the held-out text, after the last step. Not finite if the model was lost.
      nonfinite_steps: steps whose loss or gradient was not finite.
      clipped_share: the share of the other steps that was clipped or skipped; None if there is no clip or no such step.
      history: the run step by step.
    """

    bits: float
    nonfinite_steps: int
    clipped_share: float | None
    history: History


def prepare(model: Model, optimizer: optax.GradientTransformation, corpus: Corpus, *, steps: int, seed: int) -> Program:
    """A program that trains a model on a text.

    Args:
      model: the model.
      optimizer: the optimizer, clipping included.
      corpus: the text.
      steps: how many steps are logged; at least 1.
      seed: for the initial parameters and the batches: equal seeds see the same of both, whatever the optimizer.
    """
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    text = jnp.asarray(corpus.train)
    step = _make_step(model, optimizer)
    return Program(
        start=lambda: _start(optimizer, model.init(init_key, len(corpus.alphabet)), steps),
        step=lambda run: step(run, text, batch_key),
        held_out_loss=lambda params: _loss_in_pieces(model.batch_loss, params, sequences(corpus.held_out)),
    )


def train(program: Program, *, steps: int, report: Callable[[int, float], None]) -> Result:
    """Runs a program and measures the model on the held-out text.

    Args:
      program: what `prepare` made for this text and number of steps.
      steps: how many steps.
      report: called now and then with the number of steps done and the last loss, in bits per character.
    """
    run = program.start()
    for done in range(1, steps + 1):
        run, loss = program.step(run)
        if done % REPORT_EVERY == 0 or done in {1, steps}:
            report(done, float(loss) / math.log(2))
    bits = float(program.held_out_loss(run.params)) / math.log(2)
    record = optaxclip.clip_stats(run.opt_state, history=True) if _is_recorded(run.opt_state) else {}
    return _result(bits, jax.device_get(run.log), record)


def _result(bits: float, log: Any, record: dict[str, Any]) -> Result:
    finite = log.finite
    clipped = None if log.clipped is None else log.clipped & finite
    if log.skipped is not None:
        clipped &= ~log.skipped  # of a step that was skipped, the clip inside saw nothing
    changed = clipped if log.skipped is None else clipped | (log.skipped & finite)
    return Result(
        bits=bits,
        nonfinite_steps=int((~finite).sum()),
        clipped_share=None if changed is None or not finite.any() else float(changed.sum() / finite.sum()),
        history=History(
            loss=log.loss.astype(np.float64) / math.log(2),
            norm=record.get("clip_norm", log.norm),
            limit=record.get("clip_limit"),
            scale=record.get("clip_scale"),
            clipped=clipped,
            skipped=log.skipped,
        ),
    )


def _start(optimizer: optax.GradientTransformation, params: Any, steps: int) -> TrainState:
    opt_state = optimizer.init(params)
    log = Log(
        loss=jnp.zeros(steps),
        norm=None if _is_recorded(opt_state) else jnp.zeros(steps),
        finite=jnp.zeros(steps, jnp.bool_),
        clipped=None if last_update_clipped(opt_state) is None else jnp.zeros(steps, jnp.bool_),
        skipped=None if last_step_skipped(opt_state) is None else jnp.zeros(steps, jnp.bool_),
    )
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), log)


def _make_step(
    model: Model, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    def step(run: TrainState, text: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
        batch = random_batch(jax.random.fold_in(key, run.step), text, model.batch)
        loss, grads = jax.value_and_grad(model.batch_loss)(run.params, batch)
        updates, opt_state = optimizer.update(grads, run.opt_state, run.params)
        params: Any = optax.apply_updates(run.params, updates)
        seen = Log(
            loss=loss,
            norm=None if _is_recorded(opt_state) else optaxclip.global_norm(grads),
            finite=jnp.stack([jnp.isfinite(x).all() for x in (loss, *jax.tree.leaves(grads))]).all(),
            clipped=last_update_clipped(opt_state),
            skipped=last_step_skipped(opt_state),
        )
        log = jax.tree.map(lambda column, now: column.at[run.step].set(now), run.log, seen)
        return TrainState(params, opt_state, run.step + 1, log), loss

    return jax.jit(step, donate_argnums=0)


def _is_recorded(opt_state: Any) -> bool:
    return bool(optax.tree.get_all_with_path(opt_state, "clip_stats"))


@partial(jax.jit, static_argnums=0)
def _loss_in_pieces(batch_loss: Callable[[Any, jax.Array], jax.Array], params: Any, text: jax.Array) -> jax.Array:
    """In pieces, so that a long text needs no more memory than a short one."""
    losses = jax.lax.map(lambda sequence: batch_loss(params, sequence[None]), text, batch_size=128)
    return losses.mean()
