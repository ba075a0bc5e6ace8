"""Differentiates a batch, and transforms the gradient of each example by itself."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic
from optaxclip.per_example import batches, forms, problems, weights
from optaxclip.per_example.problems import Grads, Problem, Seen
from optaxclip.per_example.weights import Shares


def clipped_value_and_grad(
    fun: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    return_norms: bool = False,
    form: Literal["auto", "one_pass", "two_pass"] = "auto",
) -> Callable[..., Any]:
    r"""Differentiates a batch, and clips the gradient of each example by itself.

    .. math:: \frac{1}{B} \sum_{i=1}^{B} T(\nabla_w f(w, x_i))

    If :math:`T` clips the norm to c, one example adds at most c to the sum, and so at most c / B to the mean. With
    weights :math:`a_i`, the mean is :math:`\sum_i a_i T(\nabla_w f(w, x_i)) / \sum_i a_i`.

    Args:
      fun: the loss of one example, without a batch axis, as for `jax.vmap`. It returns a scalar, or with `has_aux` a
        pair of a scalar and anything.
      tx: a transformation without state, or a chain of these. It receives the parameters.
      argnums: the positional arguments of `fun` to differentiate with respect to: a number (0 by default), or several
        numbers, which give a tuple of gradients.
      batch_argnums: the positional arguments that hold examples, along the first axis of every array; 1 by default.
        Pass `(1, 2)` for a loss of parameters, inputs and labels. PRNG keys and integers are allowed. All other
        arguments, and keyword arguments, are the same for all examples.
      has_aux: whether `fun` returns a pair.
      microbatch_size: how many examples to process at a time, at least 1, to save memory; None (the default) for all.
        The last microbatch may be smaller. On several devices, a microbatch needs examples for each device; otherwise
        some devices are idle.
      reduce: "mean" (the default) or "sum". The mean divides by the number of examples, including those that do not
        count. With weights it divides by the sum of the weights, so padding of weight 0 changes nothing.
      return_norms: whether to return the norm of each example's gradient as well.
      form: "auto" (the default), "one_pass" or "two_pass"; see the Notes. `form_of` tells which form "auto" takes.

    Returns:
      A function with the arguments of `fun`, that takes batches for `batch_argnums`. It returns `(value, gradients)`,
      as `jax.value_and_grad(fun)` does, or with `has_aux` `((value, aux), gradients)`. The value is the mean or the sum
      over the examples. `aux` has a batch axis, with what `fun` returned for each example.

      With `return_norms` a third result follows: the 2-norm of each example's gradient before `tx`, in a vector of the
      length of the batch. Norms are correct over the whole float range. They are not finite if the gradient is not.
      They are not part of `aux`, so `return_norms` does not change the first two results.

      The function takes one more keyword argument, ``weights=``: an array with one real number or boolean per example.
      The weight is 0 for padding, or says how much the example is worth. `aux` and norms are not weighted.

    Raises:
      ValueError: if an argument is out of range, or `argnums` and `batch_argnums` overlap. When called: if `tx` has a
        state, if the numbers of examples differ, if weights are not such an array, if `fun` has an argument of that
        name, or if "two_pass" is not possible (the message says why).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> from optaxclip import per_example
      >>> def loss(w, x):
      ...     return jnp.vdot(w, x)  # so that the gradient is x
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> step = jax.jit(per_example.clipped_value_and_grad(loss, clip, return_norms=True))
      >>> examples = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 0.0], [0.0, 0.0]])
      >>> value, grads, norms = step(jnp.ones(2), examples)
      >>> print(value, grads, norms)  # (7 + 0.7) / 4, ([0.6, 0.8] + [0.3, 0.4]) / 4
      1.925 [0.225 0.3  ] [5.  0.5 nan 0. ]

      The last two examples are padding, and the first one is worth three of the second:

      >>> value, grads, _ = step(jnp.ones(2), examples, weights=jnp.array([3.0, 1.0, 0.0, 0.0]))
      >>> print(value, [round(float(each), 3) for each in grads])  # the gradient: (3 * [0.6, 0.8] + [0.3, 0.4]) / 4
      5.425 [0.525, 0.7]

    Notes:
      **Guarantees.** Gradients are summed in float32 or wider, and have the dtype of the parameters. An example whose
      gradient is not finite after `tx` does not count, neither in the gradient nor in the value. The other examples are
      not affected. A finite gradient is clipped however large it is. The bound holds for norms up to the largest float.
      Microbatches change the result by rounding only.

      **Weights.** A gradient is clipped first and weighted afterwards, so an example adds at most its weight times the
      bound. To limit how much one example can move the sum, bound the weights, too. An example of weight 0 may hold
      anything, even NaN. A weight that is NaN, infinite or subnormal is taken as 0. An example that is not finite does
      not count, but its weight counts in the mean. Negative weights are allowed; for weights of both signs use "sum".
      If the weights add up to 0, value and gradients of "mean" are 0.

      **One pass or two.** The two forms give the same result up to rounding. "one_pass" calculates the gradient of
      every example, and works for every `tx`. "two_pass" calculates the norms, and then the gradient of the sum of the
      losses, each multiplied by the factor of its example. If the parameters are matrices, and each example is
      multiplied with each matrix once, two passes take 1.4 to 1.8 times as long as the ordinary gradient (perceptrons
      on a CPU, jax 0.10 and 0.12), and little memory. Otherwise (convolutions, sequences, scanned layers,
      `jax.checkpoint`) they are slower than one pass. "auto" takes the faster of the forms that are correct.

      Two passes are correct for a clip by the global 2-norm that `clip_by` makes from `norms.global_norm()` and a
      threshold without state: `clip_by_global_norm`, `smooth_clip_by_global_norm` and `clip_by_norm_range`. It must be
      neither in a chain nor wrapped. "two_pass" is not possible if

      - the value has fewer than 32 bits, or any dtype in the function has less range than float32 (float16, float8);
      - the function has a `jax.custom_vjp` in it, as `clip_cotangents` does, or a `jax.experimental.io_callback`;
      - the function exchanges data over mesh axes, or parameters are split over them.

      Under `jax.vmap`, for example over several models, two passes are slow: use `jax.lax.map`, or `form="one_pass"`.

      **Python code.** The Python code of `fun` runs once per call, and twice in `shard_map`. It sees parameters and
      examples as tracers, as under `jax.jit`. In two passes a `jax.debug.callback` in it is called twice per example.

      **Edge cases.** A value that is not finite is left out of the value. Its gradient may still be finite and count.
      If no example counts, value and gradients are 0. Sums of float16 gradients saturate at the largest float16.

      **Derivatives.** The function can be jitted, vmapped, scanned and differentiated. Its derivatives are those of the
      formula above, with the derivatives of :math:`T`. They may be NaN if an example does not count.

      **Placement.** In place of `jax.value_and_grad` of the mean loss. The optimizer follows as usual.

      **In shard_map.** If the batch and its weights are split over a mesh axis, the result is that of the whole batch,
      the same on every device. Gradients and value are already reduced over the axes along which devices have different
      examples (those that the value of `fun` varies over). Do not reduce them again. `aux` and norms stay with their
      examples.

      `jax.vmap(jax.grad(fun), (None, 0))(w, rows)` does not do that. jax adds up the gradients of all devices for a
      replicated `w`, so row i is the sum over the i-th examples of all devices. A clip then bounds groups of examples.
      This function first gives each device its own copy of the parameters (`jax.lax.pcast(w, axes, to="varying")`,
      before jax 0.8.2 `jax.lax.pvary`). Then `tx` takes no norm over these axes. Parameters that already vary over such
      an axis stay as they are, and their gradients are not reduced over it. `fun` must not exchange anything between
      examples. If parameters are split along the axis, gather them before the call.

      **Under jit.** The batch may be sharded over an Auto or an Explicit mesh, the parameters over an Auto mesh only.
      jax raises a ShardingTypeError in two cases: for the branches of a clip under vmap, if parameters are sharded over
      an Explicit mesh; and for microbatches, if the batch is sharded over one. jax 0.8 also refuses such a batch in one
      pass.

      **With check_vma=False, and in pmap.** jax does not tell which axes have different examples, so nothing is
      reduced. Reduce the result yourself: `jax.lax.psum`, or `jax.lax.pmean` if all devices have equally many examples.
      With weights, add up the sums and the weights, then divide. Build the clip with `axes=None`.

      **Differs from jax-privacy.** `jax_privacy.clipped_grad` replaces each NaN or infinity in a gradient by 0 and
      keeps the rest. This function leaves out the whole example. The norms of jax-privacy overflow in float32 (above
      2e19) and in 16 bits.

      **Privacy.** This function makes no claim of privacy. Differential privacy needs noise, an accountant and care,
      and this library has none of these. Use jax-privacy. It takes any clip of this library, to apply before its own:

      .. code-block:: python

          clip = optaxclip.as_function(optaxclip.clip_by_leaf_norm(1.0))
          private = jax_privacy.clipped_grad(
              loss, l2_clip_norm=1.0, batch_argnums=1, keep_batch_dim=False, pre_clipping_transform=clip
          )
          summed = private(w, examples)  # add noise by private.sensitivity()

    References:
      Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133 (the clip of each example).
      Goodfellow, Efficient per-example gradient computations, arXiv:1510.01799 (norms without the gradients).
      Lee, Kifer, Scaling up differentially private deep learning with fast per-example gradient clipping, PETS 2021,
      arXiv:2009.03106 (the weighted loss).

    See also:
      `form_of`; `per_example_global_norm_clip` for gradients that you already have; `as_function`.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, clipping each example.
    """
    if not callable(fun):
        raise ValueError(f"fun must be a function, got {fun!r}")
    checks.transformation("tx", tx)
    where = problems.places(argnums, batch_argnums)
    checks.flag("has_aux", has_aux)
    checks.flag("return_norms", return_norms)
    checks.one_of("reduce", reduce, ("mean", "sum"))
    checks.one_of("form", form, forms.NAMES)
    microbatch_size = checks.whole_or_none("microbatch_size", microbatch_size)
    step = Step(fun, tx, where, has_aux, microbatch_size, reduce, return_norms, form)
    # `updated=()`: attributes of `fun` must not replace the fields of `step`.
    return functools.update_wrapper(step, fun, updated=())


@dataclasses.dataclass(eq=False)  # compared by identity, as functions are
class Step:
    """What `clipped_value_and_grad` returns: its arguments, callable like `fun`."""

    fun: Callable[..., Any]
    tx: optax.GradientTransformation
    where: problems.Places
    has_aux: bool
    microbatch_size: int | None
    reduce: str
    return_norms: bool
    form: str

    def __call__(self, *args: Any, weights: Any = None, **kwargs: Any) -> Any:
        """Returns the value and the gradients."""
        problem, params, batch, shares = self._problem(args, weights, kwargs)
        form = forms.SUMMED[forms.choose(self.form, problem, batch)]
        total, seen = batches.in_microbatches(form, problem, batch, shares.relative, self.microbatch_size)
        finish = shares.mean if self.reduce == "mean" else shares.sum
        grads = _reduced(problem, total, params, finish)
        value = _value(problem, seen, shares.relative, finish)
        found = ((value, seen.aux) if self.has_aux else value, grads)
        return (*found, seen.norm) if self.return_norms else found

    def form_of(self, *args: Any, weights: Any = None, **kwargs: Any) -> str:
        """Returns the form that a call with these arguments takes."""
        problem, _, batch, _ = self._problem(args, weights, kwargs)
        return forms.choose(self.form, problem, batch)

    def _problem(
        self, args: Sequence[Any], given: Any, kwargs: dict[str, Any]
    ) -> tuple[Problem, Any, problems.Batch, Shares]:
        if given is not None:
            weights.require_free(self.fun, args)
        called = problems.of_call(self.fun, self.tx, self.where, self.has_aux, self.return_norms, args, kwargs)
        problem, params, batch = called
        return problem, params, batch, weights.of_call(problem, problems.size(batch), given)


def form_of(step: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Tells which form a call of `step` with these arguments takes, without running it.

    Args:
      step: what `clipped_value_and_grad` returned, also inside `jax.jit`.
      *args: the arguments of the call. Arrays may be `jax.ShapeDtypeStruct`, as for `jax.eval_shape`.
      **kwargs: the keyword arguments of the call.

    Returns:
      "one_pass" or "two_pass". The form depends on shapes and dtypes and, inside `shard_map`, on mesh axes, so call
      `form_of` in the place where `step` is called. To learn why "auto" takes one pass, build the step with
      `form="two_pass"`. If two passes are not possible, the error says why. Without an error, one pass is faster.

    Raises:
      ValueError: if `step` is not from `clipped_value_and_grad`, or if the call would raise a ValueError.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> from optaxclip import per_example
      >>> def loss(w, x):
      ...     return jnp.sum(jnp.tanh(w @ x))
      >>> step = jax.jit(per_example.clipped_value_and_grad(loss, optaxclip.clip_by_global_norm(1.0)))
      >>> weights = jax.ShapeDtypeStruct((8, 8), jnp.float32)
      >>> per_example.form_of(step, weights, jnp.ones((32, 8)))  # a batch of 32 vectors
      'two_pass'
      >>> per_example.form_of(step, weights, jnp.ones((32, 8, 5)))  # each weight meets 5 vectors per example
      'one_pass'

    See also:
      `clipped_value_and_grad`, which says when two passes are taken.
    """
    inner = inspect.unwrap(step, stop=lambda function: isinstance(function, Step)) if callable(step) else step
    if not isinstance(inner, Step):
        raise ValueError(f"step must be what per_example.clipped_value_and_grad returned, got {step!r}")
    leaves, structure = jax.tree.flatten((args, kwargs))
    shapes = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)}
    found = ""

    def look(arrays: dict[int, jax.Array]) -> tuple[()]:
        nonlocal found
        args, kwargs = structure.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        found = inner.form_of(*args, **kwargs)
        return ()

    jax.eval_shape(look, shapes)
    return found


def _reduced(problem: Problem, total: Grads, params: Tree, finish: Callable[[jax.Array], jax.Array]) -> Grads:
    """Returns the gradients of all examples, on all devices that have some. `finish` turns a sum into a sum or mean."""

    def reduced(leaf: jax.Array, own: jax.Array, given: Any) -> jax.Array:
        axes = tuple(sorted(set(problem.apart) - layouts.varying(given)))
        whole = finish(jax.lax.psum(leaf, axes) if axes else leaf)
        return arithmetic.saturated(whole, float(jnp.finfo(own.dtype).max)).astype(own.dtype)

    return jax.tree.map(reduced, total, problem.params, params)


def _value(
    problem: Problem, seen: Seen, relative: problems.Weights, finish: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    wide = seen.value.astype(dtypes.accumulator(seen.value.dtype))
    weighted = wide if relative is None else wide * relative.astype(wide.dtype)
    value = jnp.sum(jnp.where(seen.counted & jnp.isfinite(wide), weighted, jnp.zeros_like(wide)))
    value = jax.lax.psum(value, problem.apart) if problem.apart else value
    return arithmetic.narrowed(finish(value), seen.value.dtype)
