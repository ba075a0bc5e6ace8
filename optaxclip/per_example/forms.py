"""The two forms of a sum of per-example gradients that have gone through a transformation.

`one_pass` calculates every gradient, transforms it, and adds up what is finite: it works for every transformation, and
takes the memory of as many gradients as there are examples.

`two_pass` calculates their norms first, and then one gradient, that of the loss with each example weighted by its
factor. It is valid where the transformation multiplies a gradient by one number that depends on its norm, and gives
the same sum. Where weights are matrices that an example meets once it takes at most twice as long as the ordinary
gradient (see `outer`), and nowhere as much memory as one pass.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from optaxclip import core, norms
from optaxclip._arrays import dtypes, layouts, mesh
from optaxclip._numerics import arithmetic, rows, scaling, tree_norms
from optaxclip.functions import empty_state, global_norm
from optaxclip.per_example import batches, outer
from optaxclip.per_example.problems import Batch, Form, Grads, Problem, Seen


def choose(problem: Problem, batch: Batch) -> Form:
    """The faster of the forms that are valid."""
    factor_of = _factor_of_norm(problem)
    if factor_of is None or not _is_better_weighted(problem, batch):
        return one_pass
    return functools.partial(two_pass, factor_of)


def _no_state(problem: Problem) -> Any:
    advice = (
        "which one example can't hand on to the next: for a bound that follows a schedule build it with the number of "
        "this step, as in clip_by_global_norm(schedule(step)); for a record of the norms pass return_norms=True; chain "
        "what keeps a state behind it, as an optimizer does"
    )
    return empty_state("clipped_value_and_grad", problem.tx, problem.params, advice)


# One pass.


def one_pass(problem: Problem, batch: Batch) -> tuple[Grads, Seen]:
    """Every gradient by itself."""
    (value, aux), grads = jax.vmap(problem.grad)(batch)
    with mesh.apart(problem.apart):
        state = _no_state(problem)
        updates = jax.vmap(lambda grad: problem.tx.update(grad, state, problem.params)[0])(grads)
        norm = jax.vmap(global_norm)(grads) if problem.want_norms else None
        counted = _everywhere(problem, jax.vmap(_is_finite)(updates))
    return jax.tree.map(functools.partial(_sum, counted), updates), Seen(value, aux, norm, counted)


def _is_finite(tree: Any) -> jax.Array:
    flags = [~arithmetic.has_nonfinite(leaf) for leaf in jax.tree.leaves(tree) if dtypes.is_inexact(leaf)]
    return functools.reduce(jnp.logical_and, flags, jnp.asarray(True))


def _everywhere(problem: Problem, counted: jax.Array) -> jax.Array:
    """Whether an example counts, the same on all devices that have a share of its gradient."""
    names = tuple(sorted(layouts.varying(counted) - set(problem.apart)))
    return jax.lax.pmin(counted.astype(jnp.int32), names) > 0 if names else counted


def _sum(counted: jax.Array, updates: jax.Array) -> jax.Array:
    """The sum of the updates that are counted, in float32 or wider."""

    def terms(updates: jax.Array, counted: jax.Array) -> jax.Array:
        wide = updates.astype(dtypes.wide(updates.dtype))
        return jnp.where(jnp.expand_dims(counted, range(1, updates.ndim)), wide, jnp.zeros_like(wide))

    return rows.sum_of(terms, updates, counted)


# Two passes.

FactorOf: TypeAlias = Callable[[jax.Array], scaling.Factor]


def _factor_of_norm(problem: Problem) -> FactorOf | None:
    """What the norm of a gradient is to become; None if its scaling does not depend on its global 2-norm alone."""
    made_of = problem.tx.made_of if isinstance(problem.tx, core.Clip) else None
    if made_of is None or made_of.norm != norms.global_norm():
        return None
    state = _no_state(problem)
    with mesh.apart(problem.apart):
        leaves = core.Leaves(problem.params, problem.params, made_of.axes)
    if leaves.axes:  # a part of the norm lies on another device
        return None

    def factor_of(norm: jax.Array) -> scaling.Factor:
        return core.permit(made_of.threshold, norm, state, lambda: made_of.norm.measure(leaves)).factors

    return factor_of


def _is_better_weighted(problem: Problem, batch: Batch) -> bool:
    """Whether a weighted loss is right, and its second pass worth its time.

    Its gradient starts from the weights in the dtype of the value, where a narrow one would round them, and a weight
    must go through the backward pass as a factor. A function that adds up over the mesh would do so under a branch. And
    the time is that of gradients that must be calculated for their norms: it is well spent where most entries need not
    be.
    """
    arrays = jax.tree.leaves((problem.params, batch))
    if any(layouts.varying(array) - set(problem.apart) for array in arrays) or not _keeps_weights(problem, batch):
        return False
    undone = 0

    def look(example: Any) -> jax.Array:
        nonlocal undone
        (value, _), grads = outer.evaluate(problem.grad, example)
        kinds = zip(jax.tree.leaves(grads), jax.tree.leaves(problem.params), strict=True)
        undone = sum(param.size for leaf, param in kinds if isinstance(leaf, outer.Outer))
        return outer.as_array(value)

    value = jax.eval_shape(jax.vmap(look), batch)
    entries = sum(param.size for param in jax.tree.leaves(problem.params))
    return value.dtype == dtypes.accumulator(value.dtype) and 2 * undone >= entries


def _keeps_weights(problem: Problem, batch: Batch) -> bool:
    """Whether a weight times the loss is that weight times its gradient.

    A `jax.custom_vjp` need not be linear (`clip_cotangents` is not), and in float16 what has a small weight is 0.
    """
    equations = list(outer.equations(jax.make_jaxpr(jax.vmap(problem.loss, (None, 0)))(problem.params, batch).jaxpr))
    names = {equation.primitive.name for equation in equations}
    dtypes = {getattr(out.aval, "dtype", None) for equation in equations for out in equation.outvars}
    given = {leaf.dtype for leaf in jax.tree.leaves((problem.params, batch))}
    return not any(name.startswith("custom_vjp") for name in names) and jnp.dtype(jnp.float16) not in dtypes | given


def two_pass(factor_of: FactorOf, problem: Problem, batch: Batch) -> tuple[Grads, Seen]:
    """Norms first, then one gradient of the weighted loss."""
    value, aux, norm = jax.vmap(functools.partial(_norm_of_one, problem))(batch)
    counted = jnp.isfinite(norm)
    factor = jax.vmap(factor_of)(norm)
    one = jnp.ones_like(norm)
    weight = jnp.where(counted, scaling.rescale(one, factor), jnp.zeros_like(norm))
    # A factor outside the normal range is applied in two steps, which a weight can't be, and weights that lie too far
    # apart do not fit into one sum. The weighted gradient stays outside the branch: XLA for CPUs (jax 0.10) runs
    # convolutions in a branch many times slower.
    together = jnp.min(jnp.where(weight > 0, weight, jnp.inf)) > jnp.max(weight) * 2.0**-100
    in_one_step = jnp.all((factor.first == one) | ~counted) & (together | ~jnp.any(weight > 0))
    total = jax.lax.cond(
        in_one_step,
        lambda total, rows: total,
        lambda _, rows: batches.in_microbatches(one_pass, problem, jax.tree.map(layouts.whole, rows), 1)[0],
        _weighted(problem, batch, weight, counted),
        batch,
    )
    return total, Seen(value, aux, norm, counted)


def _norm_of_one(problem: Problem, example: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Value, auxiliary output, and the norm of the gradient."""
    (value, aux), grads = outer.evaluate(problem.grad, example)
    products = [leaf for leaf in jax.tree.leaves(grads) if isinstance(leaf, outer.Outer)]
    rest = [leaf for leaf in jax.tree.leaves(grads) if not isinstance(leaf, outer.Outer)]
    parts = [*(product.norm() for product in products), tree_norms.total_norm(rest, [()] * len(rest), 2)]
    return outer.as_array(value), jax.tree.map(outer.as_array, aux), tree_norms.norm_of_parts(parts, 2)


def _weighted(problem: Problem, batch: Batch, weight: jax.Array, counted: jax.Array) -> Grads:
    """The gradient of the sum of the values, each times its weight."""
    # In a branch, since it gathers a batch that is spread over devices.
    rows = jax.lax.cond(jnp.all(counted), lambda rows: rows, functools.partial(_replace, counted), batch)

    def values(params: Any) -> jax.Array:
        return jax.vmap(problem.loss, (None, 0))(params, rows)[0]

    value, pull = jax.vjp(values, problem.params)
    # The largest weight is near 1, so that gradients that fit the range in one pass do so here.
    scale = _power_of_two_near(jnp.max(weight))
    (grads,) = pull((weight / scale).astype(value.dtype))

    def finish(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(dtypes.wide(leaf.dtype))
        return jnp.where(jnp.any(counted), wide * scale.astype(wide.dtype), jnp.zeros_like(wide))

    return jax.tree.map(finish, grads)


def _replace(counted: jax.Array, batch: Batch) -> Batch:
    """The batch, with a copy of the first example that counts in the place of each that does not.

    A weight of 0 is not enough to leave an example out: 0 times NaN is NaN. Neither are zeros for its inputs, where a
    function need not have a derivative.
    """
    first = jnp.argmax(layouts.whole(counted))

    def replace(leaf: jax.Array) -> jax.Array:
        good = jax.lax.dynamic_index_in_dim(layouts.whole(leaf), first)
        return jnp.where(jnp.expand_dims(counted, range(1, leaf.ndim)), leaf, good)

    return jax.tree.map(replace, batch)


def _power_of_two_near(x: jax.Array) -> jax.Array:
    """The smallest power of two that is larger than x, as a constant; 1 for 0."""
    _, exponent = jnp.frexp(jax.lax.stop_gradient(x))
    return jnp.ldexp(jnp.ones_like(x), jnp.where(x > 0, exponent, jnp.zeros_like(exponent)))
