"""The gradient of a batch, with each example's gradient transformed by itself."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts
from optaxclip._numerics import arithmetic
from optaxclip.per_example import batches, forms, problems
from optaxclip.per_example.problems import Grads, Problem, Seen


def clipped_value_and_grad(
    fun: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    reduce: str = "mean",
    return_norms: bool = False,
) -> Callable[..., Any]:
    r"""Transforms the gradient of each example by itself, so that no single example can move the sum by much.

    .. math:: \frac{1}{B} \sum_{i=1}^{B} T(\nabla_w f(w, x_i))

    With :math:`T` a clip of the norm to c, an example adds at most c to the sum, and so at most c / B to the mean.

    Args:
      fun: the loss of one example, without a batch axis, as for `jax.vmap`: a scalar, or with `has_aux` a pair of a
        scalar and anything.
      tx: a transformation without state, or a chain of these. It is given the parameters, for those that need them.
      argnums: which positional arguments of `fun` to differentiate by: a number, or several for a tuple of gradients.
      batch_argnums: which positional arguments have the examples, along the first axis of every array in them: `(1, 2)`
        for a loss of parameters, inputs and labels. PRNG keys and integers may be among these. All other arguments, and
        keyword arguments, are the same for all examples.
      has_aux: whether `fun` returns a pair.
      microbatch_size: how many examples to take at a time, to save memory; None for all. The last microbatch may be
        smaller. On several devices each must have its share of a microbatch to be busy.
      reduce: "mean" or "sum". The mean divides by the number of all examples, also of those that do not count.
      return_norms: whether to return the norms of the gradients of the examples as well.

    Returns:
      A function that is called as `fun` is, with batches, and returns what `jax.value_and_grad(fun)` does, `(value,
      gradients)`, or with `has_aux` `((value, aux), gradients)`. The value is the mean or the sum of those of the
      examples; `aux` has a batch axis, with what `fun` returned for each example. With `return_norms` a third result
      follows, the 2-norm of each example's gradient before `tx`, in an array of the length of the batch: right over
      the whole float range, and not finite where the gradient is not. (Norms are not a part of `aux`, so that the first
      two results do not depend on whether anyone wants them.)

    Guarantees:
      Gradients are added up in float32 or wider, and have the dtype of the parameters. An example whose gradient is not
      finite after `tx` counts nothing, in the gradient and in the value: all other examples count as without it. A
      finite gradient is clipped however large it is; its bound holds up to norms of the largest float. Microbatches
      give the same result as none, up to rounding.

      For a clip by the global 2-norm, which `clip_by` makes from `norms.global_norm()` and any threshold without state
      (`clip_by_global_norm`, `smooth_clip_by_global_norm`, `clip_by_norm_range`), not in a chain and not wrapped, the
      result is calculated in two passes: the norms, then the gradient of the sum of the losses, each times its factor.
      The results agree up to rounding, and where the weights are matrices that an example meets once, it takes 1.4 to
      1.8 times the ordinary gradient (perceptrons on a CPU, jax 0.10 and 0.12) and little memory. This form is not
      chosen where the value has fewer than 32 bits, as its factors would, where anything is float16, where the function
      has a `jax.custom_vjp` in it (as `clip_cotangents` is one), nor where parameters or examples are spread over
      devices in `shard_map`. Under `jax.vmap`, over several models say, it is slow: use `jax.lax.map`.

    Edge cases:
      A value that is not finite does not count in the value; its gradient may be finite and count. If no example
      counts, value and gradients are 0. Gradients of float16 parameters that add up to more than the largest number
      are that number.

      The function can be jitted, vmapped, scanned and differentiated. Its derivatives are those of the sum above with
      :math:`T` as it is; where an example does not count they may be NaN.

    Placement:
      In the place of `jax.value_and_grad` of the mean loss. The optimizer follows as usual.

      Inside `shard_map`, with the batch split over a mesh axis, the result is that of the whole batch, the same on
      every device: gradients and value are reduced over the axes along which devices have different examples (those
      that the value of `fun` varies over), and must not be reduced again; `aux` and norms stay with their examples.
      Written by hand this goes wrong: `jax.vmap(jax.grad(fun), (None, 0))(w, rows)` of a replicated `w` does not give
      gradients of single examples there. jax adds up what all devices find for a replicated argument, so row i is the
      sum over the i-th examples of all devices, and a clip bounds groups of examples instead of examples. Here the
      parameters are made each device's own first (`jax.lax.pcast(w, axes, to="varying")`, before jax 0.9
      `jax.lax.pvary`), and `tx` takes no norm over these axes. Parameters that vary over such an axis already stay
      as they are, and so do their gradients, which are not reduced over it. `fun` must not exchange anything between
      examples, so it must not gather split parameters along the axis: gather them before.

      Under `jit` the batch may be spread over an Auto or an Explicit mesh, and the parameters over an Auto one. With
      parameters spread over an Explicit mesh jax refuses the branches of a clip under vmap, with a ShardingTypeError;
      so it does with microbatches of a batch that is spread over one, and jax 0.8 with such a batch in one pass.

      With `check_vma=False`, and in `pmap`, jax does not tell which axes these are. Nothing is reduced, and the user
      must: `jax.lax.psum`, or `pmean` for equal shares. Pass a clip `axes=None` there.

    Raises:
      ValueError: if an argument is none of the above, or `argnums` and `batch_argnums` overlap; when called, if `tx`
        has a state, or the numbers of examples differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> from optaxclip import per_example
      >>> def loss(w, x):
      ...     return jnp.vdot(w, x)  # so that the gradient is x
      >>> step = per_example.clipped_value_and_grad(loss, optaxclip.clip_by_global_norm(1.0), return_norms=True)
      >>> examples = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 0.0], [0.0, 0.0]])
      >>> value, grads, norms = step(jnp.ones(2), examples)
      >>> print(value, grads, norms)  # (7 + 0.7) / 4, ([0.6, 0.8] + [0.3, 0.4]) / 4
      1.925 [0.225 0.3  ] [5.  0.5 nan 0. ]

      Differential privacy needs noise, an accountant and care, none of which is here. Use jax-privacy, which takes
      any clip of this library for what comes before its own:

      .. code-block:: python

          clip = optaxclip.as_function(optaxclip.clip_by_leaf_norm(1.0))
          private = jax_privacy.clipped_grad(
              loss, l2_clip_norm=1.0, batch_argnums=1, keep_batch_dim=False, pre_clipping_transform=clip
          )
          summed = private(w, examples)  # add noise by private.sensitivity()

    Differs from jax-privacy:
      `jax_privacy.clipped_grad` replaces each NaN or infinity in a gradient by 0 and keeps the rest; here all of that
      example is left out. Its norms overflow in float32 (past 2e19) and in 16 bits. This function makes no claim of
      privacy.

    References:
      Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133 (the clip of each example).
      Goodfellow, Efficient per-example gradient computations, arXiv:1510.01799 (norms without the gradients).
      Lee, Kifer, Scaling up differentially private deep learning with fast per-example gradient clipping, PETS 2021,
      arXiv:2009.03106 (the weighted loss).

    See also:
      `per_example_global_norm_clip` for gradients that are there already; `as_function`.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, clipping each example.
    """
    if not callable(fun):
        raise ValueError(f"fun must be a function, got {fun!r}")
    checks.transformation("tx", tx)
    where = problems.places(argnums, batch_argnums)
    checks.flag("has_aux", has_aux)
    checks.flag("return_norms", return_norms)
    checks.one_of("reduce", reduce, ("mean", "sum"))
    microbatch_size = checks.whole_or_none("microbatch_size", microbatch_size)

    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        problem, params, batch = problems.of_call(fun, tx, where, has_aux, return_norms, args, kwargs)
        number = problems.size(where, batch)
        form = forms.choose(problem, batch)
        total, seen = batches.in_microbatches(form, problem, batch, microbatch_size)
        whole = number * math.prod(jax.lax.axis_size(name) for name in problem.apart)
        count = whole if reduce == "mean" else 1
        grads = _reduced(problem, total, params, count)
        value = _value(problem, seen, count)
        found = ((value, seen.aux) if has_aux else value, grads)
        return (*found, seen.norm) if return_norms else found

    return functools.wraps(fun)(value_and_grad) if hasattr(fun, "__name__") else value_and_grad


def _reduced(problem: Problem, total: Grads, params: Any, count: int) -> Grads:
    """The gradients of all examples, on all devices that have some, divided by `count`."""

    def finish(leaf: jax.Array, own: jax.Array, given: Any) -> jax.Array:
        axes = tuple(sorted(set(problem.apart) - layouts.varying(given)))
        reduced = (jax.lax.psum(leaf, axes) if axes else leaf) / count
        return arithmetic.saturated(reduced, float(jnp.finfo(own.dtype).max)).astype(own.dtype)

    return jax.tree.map(finish, total, problem.params, params)


def _value(problem: Problem, seen: Seen, count: int) -> jax.Array:
    wide = seen.value.astype(dtypes.accumulator(seen.value.dtype))
    value = jnp.sum(jnp.where(seen.counted & jnp.isfinite(wide), wide, jnp.zeros_like(wide)))
    value = jax.lax.psum(value, problem.apart) if problem.apart else value
    return arithmetic.narrowed(value / count, seen.value.dtype)
