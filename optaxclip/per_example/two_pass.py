"""Sums clipped per-example gradients in two passes: first their norms, then one gradient.

The second pass takes the gradient of the loss with each example multiplied by its factor. The sum is the same if the
clip multiplies a gradient by one number that depends only on its norm (`reasons` lists the exceptions). If the
parameters are matrices, and each example is multiplied with each matrix once, two passes take at most twice as long as
the ordinary gradient (see `outer`). They always take less memory than one pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import core
from optaxclip._arrays import dtypes, layouts, mesh
from optaxclip._arrays.trees import Tree
from optaxclip._jaxprs import outer
from optaxclip._numerics import scaling, tree_norms
from optaxclip.per_example import batches, one_pass
from optaxclip.per_example.problems import Batch, Grads, Problem, Seen, Weights


def summed(problem: Problem, batch: Batch, weights: Weights) -> tuple[Grads, Seen]:
    """Takes the norms, then one gradient of the weighted loss. For problems without a reason against two passes."""
    value, aux, norm = jax.vmap(functools.partial(_norm_of_one, problem))(batch)
    finite = jnp.isfinite(norm)
    factor = jax.vmap(functools.partial(_factor_of, problem))(norm)
    one = jnp.ones_like(norm)
    given = one if weights is None else one * weights.astype(norm.dtype)
    weight = jnp.where(finite, scaling.rescale(given, factor), jnp.zeros_like(norm))
    counted = finite & (given != 0)
    # One gradient is not enough if a factor outside the normal range must be applied in two steps, or if weights are
    # too far apart for one sum. The weighted gradient stays outside the branch, because XLA for CPUs (jax 0.8 to 0.12)
    # runs convolutions in a branch many times slower. It can move in when they run at full speed there.
    size, moves = jnp.abs(weight), counted & (factor.second != 0)  # if such a weight is 0, it underflowed
    together = jnp.min(jnp.where(moves, size, jnp.inf)) > jnp.max(size) * 2.0**-100
    in_one_step = jnp.all((factor.first == one) | ~counted) & (together | ~jnp.any(moves))
    total = jax.lax.cond(
        in_one_step,
        lambda total, rows: total,
        lambda _, rows: _one_by_one(problem, *jax.tree.map(layouts.whole, rows)),
        _weighted(problem, batch, weight, finite),
        (batch, weights),
    )
    return total, Seen(value, aux, norm, counted)


def _one_by_one(problem: Problem, batch: Batch, weights: Weights) -> Grads:
    return batches.in_microbatches(one_pass.summed, problem, batch, weights, 1)[0]


def _factor_of(problem: Problem, norm: jax.Array) -> scaling.Factor:
    """Returns the factor for a gradient of this norm."""
    made_of: Any = problem.made_of()  # never None: without a clip there is a reason against two passes

    def param_norms() -> jax.Array:
        with mesh.apart(problem.apart):
            return made_of.norm.measure(core.Leaves(problem.params, problem.params, made_of.axes))

    return core.permit(made_of.threshold, norm, problem.no_state(), param_norms).factors


def _norm_of_one(problem: Problem, example: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Returns value, auxiliary output, and the norm of the gradient."""
    (value, aux), grads = outer.evaluate(problem.grad, example)
    products = [leaf for leaf in jax.tree.leaves(grads) if isinstance(leaf, outer.Outer)]
    rest = [leaf for leaf in jax.tree.leaves(grads) if not isinstance(leaf, outer.Outer)]
    parts = [*(product.norm() for product in products), tree_norms.total_norm(rest, [()] * len(rest), 2)]
    return outer.as_array(value), jax.tree.map(outer.as_array, aux), tree_norms.norm_of_parts(parts, 2)


def _weighted(problem: Problem, batch: Batch, weight: jax.Array, finite: jax.Array) -> Grads:
    """Returns the gradient of the sum of the values, each times its weight."""
    # In a branch, because it gathers a batch that is spread over devices.
    rows = jax.lax.cond(jnp.all(finite), lambda rows: rows, functools.partial(_replace, finite), batch)

    def values(params: Tree) -> jax.Array:
        return jax.vmap(problem.loss, (None, 0))(params, rows)[0]

    value, pull = jax.vjp(values, problem.params)
    # Scaled so that the largest weight is near 1. Then gradients fit the float range if they do in one pass.
    scale = _power_of_two_near(jnp.max(jnp.abs(weight)))
    (grads,) = pull((weight / scale).astype(value.dtype))

    def finish(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(dtypes.wide(leaf.dtype))
        return jnp.where(jnp.any(finite), wide * scale.astype(wide.dtype), jnp.zeros_like(wide))

    return jax.tree.map(finish, grads)


def _replace(finite: jax.Array, batch: Batch) -> Batch:
    """Returns the batch, with the first example whose gradient is finite in place of all whose gradient is not.

    A weight of 0 does not leave an example out, because 0 times NaN is NaN. Zeros as inputs do not either: the function
    may have no derivative there.
    """
    first = jnp.argmax(layouts.whole(finite))

    def replace(leaf: jax.Array) -> jax.Array:
        good = jax.lax.dynamic_index_in_dim(layouts.whole(leaf), first)
        return jnp.where(jnp.expand_dims(finite, range(1, leaf.ndim)), leaf, good)

    return jax.tree.map(replace, batch)


def _power_of_two_near(x: jax.Array) -> jax.Array:
    """Returns the smallest power of two above x, as a constant; 1 for 0."""
    _, exponent = jnp.frexp(jax.lax.stop_gradient(x))
    return jnp.ldexp(jnp.ones_like(x), jnp.where(x > 0, exponent, jnp.zeros_like(exponent)))
