"""Clips inside the backward pass: bounds the gradient that flows back through an array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts
from optaxclip._arrays.trees import Tree
from optaxclip._jaxprs.hoisting import hoist
from optaxclip.functions import global_norm, stateless

_NO_STATE = (
    "which a backward pass can't keep: for a scheduled bound, build tx with the bound of this step, as in "
    "clip_by_global_norm(schedule(step)); to record norms, pass tap="
)


def clip_cotangents(x: Tree, tx: optax.GradientTransformation, *, tap: jax.Array | None = None) -> Tree:
    r"""Returns `x` unchanged; in the backward pass, sends the cotangent of `x` through `tx`.

    .. math:: y = x, \qquad \bar{x} = \mathrm{tx}(\bar{y})

    The cotangent of an array is the derivative of the loss with respect to it. In a recurrent network, every step
    multiplies it by a matrix on the way back, so it can grow exponentially. A clip at every step prevents that.

    Args:
      x: a pytree of arrays: activations, the carry of a scan, parameters.
      tx: any transformation without state, or a chain of these. Its updates are the cotangents of `x`. If it needs
        parameters, it gets `x`: `adaptive_grad_clip(0.1)` bounds the cotangent of each unit by a tenth of the unit's
        norm.
      tap: a float array of shape (2,); its values do not matter. Its gradient is the global norm of the cotangent
        before and after `tx`. In a scan, pass an array of shape (steps, 2) as `xs`, to get one row per step.

    Returns:
      `x`.

    Raises:
      ValueError: if `tx` is not a transformation or has state, or if `tap` is not a float array of shape (2,).

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

      A recurrence that doubles the gradient at each of 200 steps. Without the clip it would be 1.6e60, infinite in
      float32:

      >>> def final(h, taps):
      ...     def step(h, tap):
      ...         return 2.0 * optaxclip.clip_cotangents(h, optaxclip.clip(1.0), tap=tap), None
      ...     return jax.lax.scan(step, h, taps)[0]
      >>> cotangent, norms = jax.grad(final, argnums=(0, 1))(0.0, jnp.zeros((200, 2)))
      >>> print(cotangent, norms[0], norms[-1])
      1.0 [2. 1.] [2. 1.]

    Notes:
      - Guarantees: the forward pass does not change. Without `tap`, only `tx` is added to the backward pass. Structure,
        shapes and dtypes of the cotangents are kept, and the guarantees of `tx` hold for them.
      - Memory: only a traced bound is stored for the backward pass, and `x` if `tx` uses it.
      - Derivatives: higher derivatives are those of the clipped gradient, also with respect to a bound. Forward mode
        (`jax.jvp`, `jax.jacfwd`) raises an error, as for every `jax.custom_vjp`. Forward over reverse, as in
        `jax.hessian`, works.
      - Bounds: a bound may be traced, differentiated and mapped by `vmap`. A *scheduled* bound needs a step count,
        which is state. Build `tx` where the step is known instead: `clip_by_global_norm(schedule(step))`.
      - Batches: one norm covers all of `x`, batch axes included. To clip each example alone, call it under `vmap`. If
        `vmap` does not map `x`, the clip sees the sum of the cotangents over the examples. If `vmap` maps a bound but
        not `x`, the result is undefined.
      - Means: a mean over examples divides the cotangent of each example, and so its norm, by the number of examples.
      - Taps: if several calls or examples share a tap, their norms add up. Give each its own row. If the loss does not
        depend on `x`, there is no backward pass, and the tap gets 0.
      - Meshes: inside `shard_map`, the norm covers the `axes=` of `tx`; `"auto"` means all axes that split `x`. The
        norms of a tap always use `"auto"`. In `pmap` and with `check_vma=False`, the norms of a tap cover this device's
        piece only, with a warning.
      - Edge cases: None stays None. Integer, boolean and key leaves have no cotangent: they are returned unchanged, and
        `tx` sees None in their place, also in its parameters. `tx` decides what happens to a non-finite cotangent: a
        clip by norm returns it unchanged, and the tap shows its norm.
      - Placement: in the model, where you want to bound the gradient: on the carry at the top of a scan's body, or on
        the output of a block. It changes the direction of the gradient of the parameters; a clip by global norm in the
        optimizer does not.
      - Differs from the paper: Graves clips by coordinate, for handwriting prediction. The derivatives with respect to
        the inputs of an LSTM layer, before its nonlinearities, are clipped to [-10, 10]: `clip(10.0)`. Those with
        respect to its outputs are clipped to [-100, 100]: `clip(100.0)`. Pascanu et al. clip the gradient of the
        parameters, as a clip in the optimizer does.

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
        """The tree with `floats` as its float leaves, and `others` as the rest."""
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
    raise ValueError(f"tap must be a float array of shape (2,), got {got}; in a scan, it must be one row of the xs")


def _with_backward(
    backward: Callable[[list[Any]], tuple[list[jax.Array], jax.Array | None]], xs: list[Any], tap: jax.Array | None
) -> list[Any]:
    """`xs`, with `backward` as the function from their cotangents to new ones and to that of the tap."""
    hoisted, closed_over = hoist(backward, xs)

    # jax may trace the forward pass and the backward pass in different places, as under scan. A value traced in
    # between, such as a bound, only reaches the backward pass as an argument and a residual.
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
