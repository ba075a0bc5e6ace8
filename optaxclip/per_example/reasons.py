"""Says why two passes are not possible, in one sentence per reason.

Two passes give the sum of the clipped gradients only for some clips, meshes and functions.
"""

from collections.abc import Iterator, Set
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import core, norms
from optaxclip._arrays import dtypes, layouts, mesh
from optaxclip._jaxprs import reading
from optaxclip.per_example.problems import Batch, Problem


def against_two_passes(problem: Problem, batch: Batch) -> str | None:
    """Returns the first reason against two passes; None if they give the same sum as one pass."""
    return next((reason for look in (_in_tx, _in_the_mesh, _in_the_function) for reason in look(problem, batch)), None)


def _in_tx(problem: Problem, _: Batch) -> Iterator[str]:
    """`tx` must only multiply each gradient by a factor, which may depend only on the norm of the gradient."""
    made_of = problem.made_of()
    if made_of is None:
        yield (
            "tx is a chain, wrapped, or not made by clip_by, so it may do more than multiply each gradient by a factor "
            "of its norm"
        )
    elif made_of.norm != norms.global_norm():
        yield "tx does not clip by the global 2-norm of all leaves, so one factor per example is not enough"


def _in_the_mesh(problem: Problem, batch: Batch) -> Iterator[str]:
    made_of: Any = problem.made_of()
    with mesh.apart(problem.apart):
        leaves = core.Leaves(problem.params, problem.params, made_of.axes)
    if axes := leaves.axes:
        yield f"parameters are split over mesh axes {_listed(axes)}, so each device has only a part of each norm"
    arrays = jax.tree.leaves((problem.params, batch))
    if axes := {name for array in arrays for name in layouts.varying(array)} - set(problem.apart):
        # A branch that exchanges data must be entered by all devices.
        yield f"the function sums over mesh axes {_listed(axes)}, which is not possible in a branch of the second pass"


def _in_the_function(problem: Problem, batch: Batch) -> Iterator[str]:
    """The gradient of a weight times the loss must be that weight times the gradient of the loss."""
    loss = jax.vmap(problem.loss, (None, 0))
    value, _ = jax.eval_shape(loss, problem.params, batch)
    if value.dtype != dtypes.accumulator(value.dtype):  # the backward pass starts from the weights in this dtype
        yield f"the value of the function is {value.dtype}, and the factors would be rounded to it"
    equations = reading.equations(loss, problem.params, batch)
    if equations is None:
        yield f"jax {jax.__version__} does not show which operations the function has"
        return
    if any(equation.primitive.name.startswith("custom_vjp") for equation in equations):
        yield "the function uses jax.custom_vjp, whose backward pass may not be linear in the weight of an example"
    if axes := {name for equation in equations for name in _exchanged_over(equation)}:
        yield f"the function exchanges data over mesh axes {_listed(axes)}, which is not possible in a branch"
    if any(equation.primitive.name == "io_callback" for equation in equations):
        yield "the function uses io_callback, whose side effect would happen in both passes"
    given = jax.tree.leaves((problem.params, batch))
    made = [out.aval for equation in equations for out in equation.outvars]
    if narrow := {array.dtype for array in [*given, *made] if _is_short_of_range(array)}:
        names = ", ".join(sorted(str(dtype) for dtype in narrow))
        yield f"the function calculates in {names}, in which the gradient of an example with a small factor vanishes"


def _exchanged_over(equation: Any) -> set[str]:
    """Returns the mesh axes along which an operation exchanges data between devices."""
    if equation.primitive.name in ("axis_index", "pcast", "pvary"):
        return set()
    named = [equation.params.get(key, ()) for key in ("axes", "axis_name")]
    names = {name for each in named for name in (each if isinstance(each, tuple) else (each,))}
    # Other axes belong to a `shard_map` inside the function, which under `jit` all devices enter.
    return names & set(jax.sharding.get_abstract_mesh().manual_axes)


def _is_short_of_range(array: Any) -> bool:
    """Whether an array holds floats with less range than float32."""
    dtype = getattr(array, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return is_float and jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp


def _listed(names: Set[str]) -> tuple[str, ...]:
    return tuple(sorted(names))
