"""Clips inside the backward pass: the gradient that flows back through an array, where it flows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts
from optaxclip._jaxprs.hoisting import hoist
from optaxclip.functions import global_norm, stateless

_NO_STATE = (
    "which a backward pass can't hand on to the next: for a bound that follows a schedule build it with the number of "
    "this step, as in clip_by_global_norm(schedule(step)); for a record of the norms pass tap="
)


def clip_cotangents(x: Any, tx: optax.GradientTransformation, *, tap: jax.Array | None = None) -> Any:
    r"""Returns `x` unchanged, and in the backward pass sends the cotangent of `x` through `tx`.

    .. math:: y = x, \qquad \bar{x} = \mathrm{tx}(\bar{y})

    The cotangent of an array is the derivative of the loss with respect to it. In a recurrent network one matrix per
    step multiplies it on its way back, so it grows like a power. A clip at every step stops that.

    Args:
      x: a pytree of arrays: activations, the carry of a scan, parameters.
      tx: any transformation without state, or a chain of these. Its updates are the cotangents of `x`. Where it needs
        parameters, they are `x`: `adaptive_grad_clip(0.1)` bounds the cotangent of each unit by a tenth of the unit's
        norm.
      tap: a float array of shape (2,), of any values. Its gradient is the global norm of the cotangent before and after
        `tx`. In a scan, pass one of shape (steps, 2) as `xs` for a row per step.

    Returns:
      `x`.

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

    Notes:
      - Guarantees: the forward pass does not change, and without `tap` the backward pass has only `tx` in it.
        Structure, shapes and dtypes of the cotangents are kept, and the guarantees of `tx` hold for them.
      - Memory: the backward pass stores only a traced bound, and `x` where `tx` calculates with it.
      - Derivatives: higher ones are those of the clipped gradient, also with respect to a bound. Forward mode
        (`jax.jvp`, `jax.jacfwd`) raises, as for every `jax.custom_vjp`. Forward over reverse, as in `jax.hessian`,
        works.
      - Bounds: a bound may be traced, differentiated and mapped by `vmap`. A *scheduled* bound has a step count for its
        state, so build `tx` where the step is known: `clip_by_global_norm(schedule(step))`.
      - Batches: one norm covers all that `x` holds, batch axes included. For each example alone, call it under `vmap`.
        If `vmap` does not map `x`, the clip sees the sum of its cotangents over the examples. With a mapped bound and
        an unmapped `x` the result is undefined.
      - Means: in a mean over examples, the cotangent of each example, and so its norm, is divided by their number.
      - Taps: if one tap serves several calls or examples, their norms add up. Give each a row of its own. If the loss
        does not depend on `x` there is no backward pass, and the tap gets 0.
      - Meshes: in `shard_map` the norm goes over the `axes=` of `tx`; `"auto"` means all axes that split `x`. The norms
        of a tap are always `"auto"`. In `pmap` and with `check_vma=False` they are those of the device's share, with a
        warning.
      - Edge cases: None stays. Integer, boolean and key leaves have no cotangent: they are returned unchanged, and `tx`
        sees None for them, also in its parameters. A cotangent that is not finite is what `tx` makes of it: a clip by
        norm lets it pass, and the tap shows its norm.
      - Placement: in the model, where you want to bound the gradient: the carry at the top of a scan's body, the output
        of a block. It changes the direction of the gradient of the parameters; a clip by global norm in the optimizer
        does not.
      - Differs from the paper: Graves clips by coordinate, in handwriting prediction. The derivatives with respect to
        an LSTM layer's inputs, before its nonlinearities, go to [-10, 10], and those of the outputs to [-100, 100]:
        `clip(10.0)` and `clip(100.0)`. Pascanu et al. clip the gradient of the parameters, as a clip in the optimizer
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
    hoisted, closed_over = hoist(backward, xs)

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
