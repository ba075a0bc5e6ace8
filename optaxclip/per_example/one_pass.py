"""Calculates and transforms every per-example gradient, and adds up those that are finite.

This works for every transformation. It takes the memory of one gradient per example.
"""

import functools

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes, layouts, mesh
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, rows
from optaxclip.functions import global_norm
from optaxclip.per_example.problems import Batch, Grads, Problem, Seen, Weights


def summed(problem: Problem, batch: Batch, weights: Weights) -> tuple[Grads, Seen]:
    """Transforms every gradient by itself, and sums them up."""
    (value, aux), grads = jax.vmap(problem.grad)(batch)
    with mesh.apart(problem.apart):
        state = problem.no_state()
        updates = jax.vmap(lambda grad: problem.tx.update(grad, state, problem.params)[0])(grads)
        norm = jax.vmap(global_norm)(grads) if problem.want_norms else None
        counted = _everywhere(problem, jax.vmap(_is_finite)(updates))
    counted = counted if weights is None else counted & (weights != 0)
    return jax.tree.map(functools.partial(_sum, counted, weights), updates), Seen(value, aux, norm, counted)


def _is_finite(tree: Tree) -> jax.Array:
    flags = [~arithmetic.has_nonfinite(leaf) for leaf in jax.tree.leaves(tree) if dtypes.is_inexact(leaf)]
    return functools.reduce(jnp.logical_and, flags, jnp.asarray(True))


def _everywhere(problem: Problem, counted: jax.Array) -> jax.Array:
    """Whether an example counts on all devices that hold a piece of its gradient."""
    names = tuple(sorted(layouts.varying(counted) - set(problem.apart)))
    return jax.lax.pmin(counted.astype(jnp.int32), names) > 0 if names else counted


def _sum(counted: jax.Array, weights: Weights, updates: jax.Array) -> jax.Array:
    """Sums the updates that count, each times its weight, in float32 or wider."""

    def terms(updates: jax.Array, counted: jax.Array, weights: Weights) -> jax.Array:
        wide = updates.astype(dtypes.wide(updates.dtype))
        counted, weights = jax.tree.map(lambda x: jnp.expand_dims(x, range(1, updates.ndim)), (counted, weights))
        weighted = wide if weights is None else wide * weights.astype(dtypes.accumulator(wide.dtype))
        return jnp.where(counted, weighted, jnp.zeros_like(wide))

    return rows.sum_of(terms, updates, counted, weights)
