"""Clips inside the backward pass: the gradient that flows back through an array, where it flows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts
from optaxclip.functions import global_norm, stateless

_NO_STATE = (
    "which a backward pass can't hand on to the next: for a bound that follows a schedule build it with the number of "
    "this step, as in clip_by_global_norm(schedule(step)); for a record of the norms pass tap="
)


def clip_cotangents(x: Any, tx: optax.GradientTransformation, *, tap: jax.Array | None = None) -> Any:
    r"""Returns `x` as it is; on the way back the cotangent of `x` goes through `tx`, which bounds it there.

    .. math:: y = x, \qquad \bar{x} = \mathrm{tx}(\bar{y})

    The cotangent of an array is the derivative of the loss with respect to it. In a recurrent network it is multiplied
    by one matrix per step on its way back, and grows like a power: clipped at every step, it can't.

    Args:
      x: a pytree of arrays: activations, the carry of a scan, parameters.
      tx: any transformation without state, or a chain of these. Its updates are the cotangents of `x`, and where it
        needs parameters they are `x` itself: `adaptive_grad_clip(0.1)` bounds the cotangent of each unit by a tenth of
        the norm of the unit.
      tap: a float array of shape (2,), of any values. The gradient with respect to it is the global norm of the
        cotangent before `tx`, and that after it. In a scan, one of shape (steps, 2) goes along as `xs` and gets a row
        per step.

    Returns:
      `x`.

    Guarantees:
      The forward pass does not change, and without `tap` the backward pass has nothing but `tx` in it. Structure,
      shapes and dtypes of the cotangents are kept, and they have the guarantees of `tx`. Nothing is stored for the
      backward pass but the bound, if it is traced, and `x` where `tx` calculates with it. Higher derivatives are those
      of the clipped gradient, also with respect to a bound.

    Edge cases:
      None stays. Integer, boolean and key leaves have no cotangent: they are returned as they came, and are None to
      `tx`, also in its parameters. A cotangent that is infinite or NaN is what `tx` makes of it: a clip by norm lets it
      pass, so that it is seen, and the tap has its norm.

      A bound may be traced, differentiated and mapped by `vmap`. A *scheduled* bound has a count for its state: build
      `tx` where the step is known, as in `clip_by_global_norm(schedule(step))`.

      The norm is one over all that `x` holds, batch axes included; for each example by itself call it under `vmap`. An
      `x` that `vmap` does not map is one value: what is clipped is the sum of its cotangents over the examples. With a
      bound that is mapped and an `x` that is not the result is not defined.

      Where one tap serves several calls or examples, their norms are added: give each a row of its own. The cotangent
      of an example in a mean over many is that of its loss divided by their number, and so are its norms. An `x` that
      the loss does not depend on has no backward pass, and its tap gets 0.

      In `shard_map` the norm of a cotangent is taken over the `axes=` of `tx`; "auto" means all that `x` is split over.
      The norms of a tap are always "auto": in `pmap` and with `check_vma=False` there is a warning, and they are those
      of the device's share.

      Forward-mode derivatives (`jax.jvp`, `jax.jacfwd`) raise, as for every `jax.custom_vjp`. Forward over reverse, as
      in `jax.hessian`, works.

    Placement:
      In the model, around what the gradient is to be bounded at: the carry at the top of a scan's body, the output of a
      block. It changes the direction of the gradient of the parameters, which a clip in the optimizer does not.

    Raises:
      ValueError: if `tx` is no transformation or has a state, or `tap` is no float array of shape (2,).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> def loss(x, tap):
      ...     x = optaxclip.clip_cotangents(x, optaxclip.clip_by_global_norm(1.0), tap=tap)
      ...     return 3.0 * x[0] + 4.0 * x[1]
      >>> cotangent, norms = jax.grad(loss, argnums=(0, 1))(jnp.ones(2), jnp.zeros(2))
      >>> print(cotangent, norms)
      [0.6 0.8] [5. 1.]

      A recurrence that doubles the gradient at each of 200 steps, which is 1.6e60 and infinite in float32:

      >>> def final(h, taps):
      ...     def step(h, tap):
      ...         return 2.0 * optaxclip.clip_cotangents(h, optaxclip.clip(1.0), tap=tap), None
      ...     return jax.lax.scan(step, h, taps)[0]
      >>> cotangent, norms = jax.grad(final, argnums=(0, 1))(0.0, jnp.zeros((200, 2)))
      >>> print(cotangent, norms[0], norms[-1])
      1.0 [2. 1.] [2. 1.]

    Differs from the paper:
      Graves clips coordinate by coordinate: the derivatives with respect to what enters an LSTM layer, before its
      nonlinearities, to [-10, 10] in handwriting prediction, and those with respect to the outputs to [-100, 100]. That
      is `clip(10.0)` and `clip(100.0)`. Pascanu et al. clip the gradient of the parameters, as a clip in the optimizer
      does.

    References:
      Graves, Generating sequences with recurrent neural networks, 2013, arXiv:1308.0850, section 2.1.
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, ICML 2013, arXiv:1211.5063.

    See also:
      `as_function`, for a clip as a function of gradients; `clip_by_global_norm`, `clip`, `zero_nonfinite`.

      Notebook: `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish.
    """
    checks.transformation("tx", tx)
    _require_tap(tap)
    tap = None if tap is None else jnp.asarray(tap)
    flat, treedef = jax.tree.flatten(x)
    counted = [dtypes.is_inexact(leaf) for leaf in flat]

    def in_place(floats: list[Any], others: list[Any]) -> Any:
        """The tree with `floats` where it has floats, and `others` elsewhere."""
        each, rest = iter(floats), iter(others)
        return treedef.unflatten([next(each if is_float else rest) for is_float in counted])

    floats = [leaf for leaf, is_float in zip(flat, counted, strict=True) if is_float]
    others = [leaf for leaf, is_float in zip(flat, counted, strict=True) if not is_float]
    nothing = [None for _ in others]
    clip = stateless("clip_cotangents", tx, in_place(floats, nothing), _NO_STATE)

    def backward(cotangents: list[Any]) -> tuple[list[jax.Array], jax.Array | None]:
        given = in_place(cotangents, nothing)
        taken = jax.tree.leaves(clip(given))
        clipped = [new.astype(jnp.result_type(old)) for new, old in zip(taken, cotangents, strict=True)]
        if tap is None:
            return clipped, None
        norms = jnp.stack([global_norm(given), global_norm(clipped)]).astype(tap.dtype)
        return clipped, layouts.varying_over(norms, layouts.varying(tap))

    return in_place(_with_backward(backward, floats, tap), others)


def _require_tap(tap: Any) -> None:
    is_array = isinstance(tap, jax.Array | np.ndarray)
    if tap is None or (is_array and tap.shape == (2,) and jnp.issubdtype(tap.dtype, jnp.floating)):
        return
    got = f"{tap.dtype} of shape {tap.shape}" if is_array else repr(tap)
    raise ValueError(f"tap must be a float array of shape (2,), in a scan a row of what goes along as xs; got {got}")


def _with_backward(
    backward: Callable[[list[Any]], tuple[list[jax.Array], jax.Array | None]], xs: list[Any], tap: jax.Array | None
) -> list[Any]:
    """`xs`, with `backward` from their cotangents to these and to the tap's."""
    hoisted, closed_over = _hoist(backward, xs)

    # The forward pass of a derivative may be traced in a place and its backward pass in another, as under scan. What
    # was traced in between, as a bound, can only get there as an argument and a residual.
    @jax.custom_vjp
    def identity(xs: list[Any], tap: jax.Array | None, closed_over: list[Any]) -> list[Any]:
        del tap, closed_over
        return xs

    def forward(xs: list[Any], tap: jax.Array | None, closed_over: list[Any]) -> tuple[list[Any], list[Any]]:
        del tap
        return xs, closed_over

    def back(closed_over: list[Any], cotangents: list[Any]) -> tuple[list[jax.Array], jax.Array | None, None]:
        return *hoisted(closed_over, cotangents), None

    identity.defvjp(forward, back)
    return identity(xs, tap, closed_over)


def _hoist(fun: Callable[[list[Any]], Any], example: list[Any]) -> tuple[Callable[[list[Any], list[Any]], Any], Any]:
    """`fun` as a function of the arrays that it closes over and of its argument, and these arrays.

    `jax.closure_convert` leaves those in the closure that it takes to be without a derivative: integers, and under
    `vmap` what is mapped.
    """
    closed, out = jax.make_jaxpr(fun, return_shape=True)(example)

    def hoisted(closed_over: list[Any], argument: list[Any]) -> Any:
        run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, closed_over))
        return jax.tree.unflatten(jax.tree.structure(out), run(*argument))

    return hoisted, list(closed.consts)
