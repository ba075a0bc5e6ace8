"""How many steps were left out, and why; and what `clip_stats` says of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.records import reader, recorder, restored


class SkipStats(NamedTuple):
    """Which steps a wrapper left out. All are int32 scalars.

    Attributes:
      skip_steps: the number of steps so far.
      skipped_in_row: the number of steps left out in a row up to now.
      skipped_nonfinite: the number left out because a gradient or the loss was infinite or NaN.
      skipped_norm: the number left out because a norm was above its threshold.
      skipped_loss: the number left out because the loss was, and no norm.
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
    """The counters one step on: whether it was left out, and the reasons that were there."""
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
