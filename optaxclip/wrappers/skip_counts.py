"""Counters of skipped steps and their reasons, and what `clip_stats` reports of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.records import reader, recorder, restored


class SkipStats(NamedTuple):
    """Counters of the skipped steps. All are int32 scalars.

    Attributes:
      skip_steps: the number of steps so far.
      skipped_in_row: the number of steps skipped in a row, up to the last step.
      skipped_nonfinite: the number of steps skipped because a gradient or the loss was infinite or NaN.
      skipped_norm: the number of steps skipped because a norm was above its bound.
      skipped_loss: the number of steps skipped because only the loss was above its bound.
    """

    skip_steps: jax.Array
    skipped_in_row: jax.Array
    skipped_nonfinite: jax.Array
    skipped_norm: jax.Array
    skipped_loss: jax.Array


def none_yet() -> SkipStats:
    """The counters before the first step."""
    return SkipStats(*(jnp.zeros((), jnp.int32) for _ in SkipStats._fields))


def one_more(stats: SkipStats, skipped: jax.Array, nonfinite: jax.Array, high_norm: jax.Array) -> SkipStats:
    """The counters after one more step: whether it was skipped, and the reasons."""
    in_row = jnp.asarray(optax.safe_increment(stats.skipped_in_row))
    return SkipStats(
        skip_steps=jnp.asarray(optax.safe_increment(stats.skip_steps)),
        skipped_in_row=jnp.where(skipped, in_row, jnp.zeros_like(in_row)),
        skipped_nonfinite=recorder.counted(stats.skipped_nonfinite, skipped & nonfinite),
        skipped_norm=recorder.counted(stats.skipped_norm, skipped & ~nonfinite & high_norm),
        skipped_loss=recorder.counted(stats.skipped_loss, skipped & ~nonfinite & ~high_norm),
    )


@reader.summary.register
def _summary(stats: SkipStats, wanted: reader.Wanted) -> dict[str, Any]:
    del wanted
    stats = restored.unboxed(stats)
    reader.require_one(stats.skip_steps, 0)
    counts = stats._asdict()
    steps = counts.pop("skip_steps")
    total = stats.skipped_nonfinite + stats.skipped_norm + stats.skipped_loss
    found = {"skip_steps": steps, "skipped_steps": total, **counts}
    return found if reader.is_traced(stats) else {name: int(value) for name, value in found.items()}
