"""Whether a clip or a skip changed anything, for any transformation: optax's clips don't say."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class WatchState(NamedTuple):
    """State of `watch`.

    Attributes:
      last_update_clipped: whether the last updates went in finite somewhere and came out different there.
      inner: the state of the clip.
    """

    last_update_clipped: jax.Array
    inner: Any


def watch(clip: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`clip`, and in its state whether it changed the last updates.

    It compares what goes in with what comes out, inside the step. That takes no traffic with the host, but one pass
    over the updates.
    """
    clip = optax.with_extra_args_support(clip)

    def init(params: Any) -> WatchState:
        return WatchState(jnp.zeros((), jnp.bool_), clip.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, WatchState]:
        clipped, inner = clip.update(updates, state.inner, params, **extra_args)
        changes = [
            jnp.any(jnp.isfinite(before) & (before != after))  # NaN differs from itself
            for before, after in zip(jax.tree.leaves(updates), jax.tree.leaves(clipped), strict=True)
        ]
        return clipped, WatchState(jnp.stack(changes).any(), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def last_update_clipped(opt_state: Any) -> jax.Array | None:
    """What the `watch` in an optimizer's state saw last; None if there is none in it."""
    return optax.tree.get(opt_state, "last_update_clipped")


def last_step_skipped(opt_state: Any) -> jax.Array | None:
    """Whether a skip in an optimizer's state rejected the last step; None if there is none in it."""
    skipped_in_row = optax.tree.get(opt_state, "skipped_in_row")
    return None if skipped_in_row is None else skipped_in_row > 0
