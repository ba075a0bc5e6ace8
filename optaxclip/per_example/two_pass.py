"""The sum of clipped per-example gradients in two passes: their norms, then one gradient.

The second pass takes the gradient of the loss with each example weighted by its factor. It gives the same sum where a
clip multiplies a gradient by one number that depends on its norm (`reasons` has what stands against it). Where weights
are matrices that an example meets once it takes at most twice as long as the ordinary gradient (see `outer`), and
nowhere as much memory as one pass.
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
    """Norms first, then one gradient of the weighted loss; for what `reasons` has nothing against."""
    value, aux, norm = jax.vmap(functools.partial(_norm_of_one, problem))(batch)
    finite = jnp.isfinite(norm)
    factor = jax.vmap(functools.partial(_factor_of, problem))(norm)
    one = jnp.ones_like(norm)
    given = one if weights is None else one * weights.astype(norm.dtype)
    weight = jnp.where(finite, scaling.rescale(given, factor), jnp.zeros_like(norm))
    counted = finite & (given != 0)
    # A factor outside the normal range is applied in two steps, which a weight can't be, and weights that lie too far
    # apart do not fit into one sum. The weighted gradient stays outside the branch: XLA for CPUs (jax 0.8
    # to 0.12) runs convolutions in a branch many times slower.
    size, moves = jnp.abs(weight), counted & (factor.second != 0)  # where the weight is 0 all the same, it underflowed
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
    """By what a gradient of this norm is multiplied."""
    made_of: Any = problem.made_of()  # never None: what is no clip has a reason against two passes

    def param_norms() -> jax.Array:
        with mesh.apart(problem.apart):
            return made_of.norm.measure(core.Leaves(problem.params, problem.params, made_of.axes))

    return core.permit(made_of.threshold, norm, problem.no_state(), param_norms).factors


def _norm_of_one(problem: Problem, example: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Value, auxiliary output, and the norm of the gradient."""
    (value, aux), grads = outer.evaluate(problem.grad, example)
    products = [leaf for leaf in jax.tree.leaves(grads) if isinstance(leaf, outer.Outer)]
    rest = [leaf for leaf in jax.tree.leaves(grads) if not isinstance(leaf, outer.Outer)]
    parts = [*(product.norm() for product in products), tree_norms.total_norm(rest, [()] * len(rest), 2)]
    return outer.as_array(value), jax.tree.map(outer.as_array, aux), tree_norms.norm_of_parts(parts, 2)


def _weighted(problem: Problem, batch: Batch, weight: jax.Array, finite: jax.Array) -> Grads:
    """The gradient of the sum of the values, each times its weight."""
    # In a branch, since it gathers a batch that is spread over devices.
    rows = jax.lax.cond(jnp.all(finite), lambda rows: rows, functools.partial(_replace, finite), batch)

    def values(params: Tree) -> jax.Array:
        return jax.vmap(problem.loss, (None, 0))(params, rows)[0]

    value, pull = jax.vjp(values, problem.params)
    # The largest weight is near 1, so that gradients that fit the range in one pass do so here.
    scale = _power_of_two_near(jnp.max(jnp.abs(weight)))
    (grads,) = pull((weight / scale).astype(value.dtype))

    def finish(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(dtypes.wide(leaf.dtype))
        return jnp.where(jnp.any(finite), wide * scale.astype(wide.dtype), jnp.zeros_like(wide))

    return jax.tree.map(finish, grads)


def _replace(finite: jax.Array, batch: Batch) -> Batch:
    """The batch, with a copy of the first example whose gradient is finite in the place of each where it is not.

    A weight of 0 is not enough to leave an example out: 0 times NaN is NaN. Neither are zeros for its inputs, where a
    function need not have a derivative.
    """
    first = jnp.argmax(layouts.whole(finite))

    def replace(leaf: jax.Array) -> jax.Array:
        good = jax.lax.dynamic_index_in_dim(layouts.whole(leaf), first)
        return jnp.where(jnp.expand_dims(finite, range(1, leaf.ndim)), leaf, good)

    return jax.tree.map(replace, batch)


def _power_of_two_near(x: jax.Array) -> jax.Array:
    """The smallest power of two that is larger than x, as a constant; 1 for 0."""
    _, exponent = jnp.frexp(jax.lax.stop_gradient(x))
    return jnp.ldexp(jnp.ones_like(x), jnp.where(x > 0, exponent, jnp.zeros_like(exponent)))
