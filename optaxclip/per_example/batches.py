"""Processes a batch in microbatches, one after the other."""

from typing import TypeAlias

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes, layouts
from optaxclip.per_example.problems import Batch, Form, Grads, Problem, Seen, Weights, size

Rows: TypeAlias = tuple[Batch, Weights]  # examples, each with its weight


def in_microbatches(
    form: Form, problem: Problem, batch: Batch, weights: Weights, microbatch_size: int | None
) -> tuple[Grads, Seen]:
    """Applies `form` to `microbatch_size` examples at a time. An incomplete microbatch comes last."""
    number = size(batch)
    if microbatch_size is None or microbatch_size >= number:
        return form(problem, batch, weights)
    left_over = number % microbatch_size
    last = number - left_over
    rows = batch, weights
    total, seen = _scan(form, problem, jax.tree.map(lambda leaf: _split(leaf[:last], microbatch_size), rows))
    seen = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(last, *leaf.shape[2:]), seen)
    if not left_over:
        return total, seen
    more, seen_last = form(problem, *jax.tree.map(lambda leaf: leaf[last:], rows))
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), seen, seen_last)
    return jax.tree.map(jnp.add, total, more), both


def _split(leaf: jax.Array, microbatch_size: int) -> jax.Array:
    """Splits the first axis into microbatches.

    Each microbatch takes examples from all over the batch, and so from all devices that hold a part of it.
    """
    rows = leaf.reshape(microbatch_size, leaf.shape[0] // microbatch_size, *leaf.shape[1:])
    return jnp.swapaxes(rows, 0, 1)


def _scan(form: Form, problem: Problem, microbatches: Rows) -> tuple[Grads, Seen]:
    def step(total: Grads, rows: Rows) -> tuple[Grads, Seen]:
        part, seen = form(problem, *rows)
        return jax.tree.map(jnp.add, total, part), seen

    def zeros(param: jax.Array) -> jax.Array:
        return layouts.varying_over(jnp.zeros_like(param, dtypes.wide(param.dtype)), layouts.varying(param))

    return jax.lax.scan(step, jax.tree.map(zeros, problem.params), microbatches)
