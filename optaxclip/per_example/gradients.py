"""The gradient of a batch, with each example's gradient transformed by itself."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

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
    reduce: str = "mean",
    return_norms: bool = False,
    form: str = "auto",
) -> Callable[..., Any]:
    r"""Transforms the gradient of each example by itself, so that no single example can move the sum by much.

    .. math:: \frac{1}{B} \sum_{i=1}^{B} T(\nabla_w f(w, x_i))

    With :math:`T` a clip of the norm to c, an example adds at most c to the sum, and so at most c / B to the mean. With
    weights :math:`a_i` of the examples, the mean is :math:`\sum_i a_i T(\nabla_w f(w, x_i)) / \sum_i a_i`.

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
      reduce: "mean" or "sum". The mean divides by the number of all examples, also of those that do not count; with
        weights by the sum of the weights, so that padding of weight 0 changes nothing.
      return_norms: whether to return the norms of the gradients of the examples as well.
      form: "auto" (the default), "one_pass" or "two_pass"; see below. `form_of` tells which one "auto" takes.

    Returns:
      A function that is called as `fun` is, with batches, and returns what `jax.value_and_grad(fun)` does, `(value,
      gradients)`, or with `has_aux` `((value, aux), gradients)`. The value is the mean or the sum of those of the
      examples; `aux` has a batch axis, with what `fun` returned for each example. With `return_norms` a third result
      follows, the 2-norm of each example's gradient before `tx`, in an array of the length of the batch: right over
      the whole float range, and not finite where the gradient is not. (Norms are not a part of `aux`, so that the first
      two results do not depend on whether anyone wants them.)

      Weights: the function takes one more keyword argument, weights=, an array of one real number or boolean per
      example: 0 for padding, or how much the example is worth. `aux` and norms are not weighted.

    Raises:
      ValueError: if an argument is none of the above, or `argnums` and `batch_argnums` overlap; when called, if `tx`
        has a state, if the numbers of examples differ, if weights are no such array or `fun` has an argument of that
        name, or with the reason if "two_pass" is not possible.

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

      The last two examples are padding, and the first one is worth three of the second:

      >>> value, grads, _ = step(jnp.ones(2), examples, weights=jnp.array([3.0, 1.0, 0.0, 0.0]))
      >>> print(value, [round(float(each), 3) for each in grads])  # the gradient: (3 * [0.6, 0.8] + [0.3, 0.4]) / 4
      5.425 [0.525, 0.7]

    Notes:
      **Guarantees.** Gradients are added up in float32 or wider, and have the dtype of the parameters. An example
      whose gradient is not finite after `tx` counts nothing, in the gradient and in the value: all other examples
      count as without it. A finite gradient is clipped however large it is; its bound holds up to norms of the
      largest float. Microbatches give the same result as none, up to rounding.

      **Weights.** A gradient is clipped first and weighted afterwards: an example adds at most its weight times the
      bound. Bound the weights as well, where you must know by how much one example can move the sum. An example of
      weight 0 may hold anything, NaN too. A weight that is NaN, infinite or subnormal is 0. An example that is not
      finite counts nothing, and its weight counts in the mean. Negative weights are allowed; use "sum" for weights of
      both signs. If the weights add up to 0, so do value and gradients of "mean".

      There are two forms, and their results agree up to rounding. "one_pass" calculates every gradient, and works for
      every `tx`. "two_pass" calculates the norms, then the gradient of the sum of the losses, each times its factor.
      Where the weights are matrices that an example meets once, that takes 1.4 to 1.8 times the ordinary gradient
      (perceptrons on a CPU, jax 0.10 and 0.12) and little memory. Elsewhere (convolutions, sequences, scanned layers,
      `jax.checkpoint`) it is slower than one pass. "auto" takes the faster form that is right.

      Two passes are right for a clip by the global 2-norm that `clip_by` makes from `norms.global_norm()` and any
      threshold without state: `clip_by_global_norm`, `smooth_clip_by_global_norm`, `clip_by_norm_range`; neither in a
      chain nor wrapped. They are not right, and "two_pass" is refused, where

      - the value has fewer than 32 bits, or anything is of a dtype with less range than float32 (float16, float8);
      - the function has a `jax.custom_vjp` in it, as `clip_cotangents` is one, or a `jax.experimental.io_callback`;
      - the function exchanges data over mesh axes, or parameters are split over them.

      Under `jax.vmap`, over several models say, two passes are slow: use `jax.lax.map`, or `form="one_pass"`.

      The Python code of `fun` runs once for each call, and twice in `shard_map`. In two passes a `jax.debug.callback`
      in it is called twice for each example. It sees parameters and examples as
      tracers, as under `jax.jit`.

      **Edge cases.** A value that is not finite does not count in the value; its gradient may be finite and
      count. If no example counts, value and gradients are 0. Gradients of float16 parameters that add up to more
      than the largest number are that number.

      The function can be jitted, vmapped, scanned and differentiated. Its derivatives are those of the sum above with
      :math:`T` as it is; where an example does not count they may be NaN.

      **Placement.** In the place of `jax.value_and_grad` of the mean loss. The optimizer follows as usual.

      Inside `shard_map`, with the batch and its weights split over a mesh axis, the result is that of the whole batch,
      the same on every device: gradients and value are reduced over the axes along which devices have different
      examples (those that the value of `fun` varies over), and must not be reduced again; `aux` and norms stay with
      their examples.
      Written by hand this goes wrong: `jax.vmap(jax.grad(fun), (None, 0))(w, rows)` of a replicated `w` does not give
      gradients of single examples there. jax adds up what all devices find for a replicated argument, so row i is the
      sum over the i-th examples of all devices, and a clip bounds groups of examples instead of examples. Here the
      parameters are made each device's own first (`jax.lax.pcast(w, axes, to="varying")`, before jax 0.8.2
      `jax.lax.pvary`), and `tx` takes no norm over these axes. Parameters that vary over such an axis already stay
      as they are, and so do their gradients, which are not reduced over it. `fun` must not exchange anything between
      examples, so it must not gather split parameters along the axis: gather them before.

      Under `jit` the batch may be spread over an Auto or an Explicit mesh, and the parameters over an Auto one. With
      parameters spread over an Explicit mesh jax refuses the branches of a clip under vmap, with a ShardingTypeError;
      so it does with microbatches of a batch that is spread over one, and jax 0.8 with such a batch in one pass.

      With `check_vma=False`, and in `pmap`, jax does not tell which axes these are. Nothing is reduced, and the user
      must: `jax.lax.psum`, or `pmean` for equal shares. With weights, add up the sums and the weights, and divide. Pass
      a clip `axes=None` there.

      **Differs from jax-privacy.** `jax_privacy.clipped_grad` replaces each NaN or infinity in a gradient by 0
      and keeps the rest; here all of that example is left out. Its norms overflow in float32 (past 2e19) and in
      16 bits. This function makes no claim of privacy.

      Differential privacy needs noise, an accountant and care, none of which is here. Use jax-privacy, which takes
      any clip of this library for what comes before its own:

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
      `form_of`; `per_example_global_norm_clip` for gradients that are there already; `as_function`.

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
    # Without what else a function may have, so that nothing of it takes the place of a field.
    return functools.update_wrapper(step, fun, updated=())


@dataclasses.dataclass(eq=False)  # one is the same as another only if it is that one, as with functions
class Step:
    """What `clipped_value_and_grad` returns: its arguments, to be called like `fun`."""

    fun: Callable[..., Any]
    tx: optax.GradientTransformation
    where: problems.Places
    has_aux: bool
    microbatch_size: int | None
    reduce: str
    return_norms: bool
    form: str

    def __call__(self, *args: Any, weights: Any = None, **kwargs: Any) -> Any:
        """The value and the gradients."""
        problem, params, batch, shares = self._problem(args, weights, kwargs)
        form = forms.SUMMED[forms.choose(self.form, problem, batch)]
        total, seen = batches.in_microbatches(form, problem, batch, shares.relative, self.microbatch_size)
        finish = shares.mean if self.reduce == "mean" else shares.sum
        grads = _reduced(problem, total, params, finish)
        value = _value(problem, seen, shares.relative, finish)
        found = ((value, seen.aux) if self.has_aux else value, grads)
        return (*found, seen.norm) if self.return_norms else found

    def form_of(self, *args: Any, weights: Any = None, **kwargs: Any) -> str:
        """The form that a call with these arguments takes."""
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
    """The form that a call of `step` with these arguments takes, "one_pass" or "two_pass", without calculating it.

    Args:
      step: what `clipped_value_and_grad` returned, or that in `jax.jit`.
      *args: the arguments of the call. Arrays may be `jax.ShapeDtypeStruct`, as for `jax.eval_shape`.
      **kwargs: the keyword arguments of the call.

    Returns:
      "one_pass" or "two_pass". It depends on shapes, dtypes and, inside `shard_map`, mesh axes: ask where `step` is
      called. To learn why "auto" takes one pass, build the step with `form="two_pass"`: if two passes are not possible
      the error says why; if they are, "auto" takes one pass because that is faster.

    Raises:
      ValueError: if `step` is something else, and where the call would.

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
      >>> per_example.form_of(step, weights, jnp.ones((32, 8, 5)))  # each weight meets 5 vectors of an example
      'one_pass'

    See also:
      `clipped_value_and_grad`, which says when which form is taken.
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
    """The gradients of all examples, on all devices that have some; `finish` makes a sum or a mean of it."""

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
