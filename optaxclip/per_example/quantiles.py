"""A bound on per-example gradients that follows a quantile of their norms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import dtypes, layouts, mesh
from optaxclip._numerics import tracking
from optaxclip.per_example import weights as of_weights


def track_quantile(
    bound: Number,
    norms: jax.Array,
    *,
    quantile: Number = 0.5,
    learning_rate: Number = 0.2,
    weights: jax.Array | None = None,
    axes: mesh.Axes = "auto",
) -> jax.Array:
    r"""Moves a bound towards a quantile of the per-example norms of a batch: adaptive clipping.

    .. math:: c \leftarrow c \cdot \exp(-\eta (b - q)), \qquad b = \frac{1}{B} \sum_{i=1}^{B} 1[n_i \le c]

    Clip a batch by the bound, then call this with the norms of the batch. It returns the bound for the next batch.

    Args:
      bound: the bound c for the norms of this batch, positive and finite: a number or a scalar array.
      norms: the norms of the gradients of the examples before the clip: the vector that `clipped_value_and_grad`
        returns with `return_norms=True`.
      quantile: q in [0, 1], the share of examples that should not be clipped; 0.5 by default, as in the paper.
      learning_rate: :math:`\eta`, at least 0 and finite; 0.2 by default, as in the paper. With the defaults the bound
        moves by at most 10 % per batch, so a tenfold change takes 24 batches.
      weights: the `weights=` of the call, one per example. Examples of weight 0 do not count, all others count once.
      axes: the mesh axes that the examples are split over, inside `shard_map` and `pmap`; see `clip_by`.

    Returns:
      The bound for the next batch, a scalar in the dtype of `bound`, but at least float32. It is the whole state: keep
      it next to the optimizer's state.

    Raises:
      ValueError: if an argument is out of range, `norms` is not a vector of floats, or `weights` has another length.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> from optaxclip import per_example
      >>> def loss(w, x):
      ...     return jnp.vdot(w, x)  # so that the gradient is x
      >>> @jax.jit
      ... def gradients(w, bound, batch):
      ...     clip = optaxclip.clip_by_global_norm(bound)
      ...     step = per_example.clipped_value_and_grad(loss, clip, return_norms=True)
      ...     _, grads, norms = step(w, batch)
      ...     return grads, per_example.track_quantile(bound, norms)
      >>> examples = jnp.array([[3.0, 4.0], [0.6, 0.8], [6.0, 8.0], [jnp.nan, 0.0]])
      >>> grads, bound = gradients(jnp.ones(2), 1.0, examples)
      >>> print(f"{bound:.4f}")  # one of three is not clipped: exp(0.2 * (1/2 - 1/3))
      1.0339

      As in the paper, with Gaussian noise (here of standard deviation 2) on the number of examples that are not
      clipped:

      >>> noise = 2.0 * jax.random.normal(jax.random.key(0))
      >>> noisy = bound * jnp.exp(-0.2 * noise / len(examples))  # 0.2 is the learning rate

    Notes:
      - Privacy: without noise this is not private, because the bound reveals the share of examples that were not
        clipped. For differential privacy add noise to that share, as in the second example. Every example of the batch
        must then count, and the accountant must include this noise; see the paper.
      - Edge cases: an example whose norm is 0, infinite or NaN does not count, neither as clipped nor as not clipped.
        If no example counts, the bound is returned unchanged. The bound stays in the normal float range.
      - Several devices: inside `shard_map` the share is that of the examples on all devices, and the bound is the same
        on each. Along a mesh axis that `bound` itself varies over, each device has its own bound. With
        `check_vma=False`, and in `pmap`, pass `axes=`. Under `jit` nothing is needed.
      - Microbatches: call this once per step, with the norms of all examples of the step.
      - Differs from the paper: there is no noise. In the paper, gradients of 0 count as not clipped. If more than a
        share q of the examples have a gradient of 0, the bound of the paper goes to 0, and learning stops.
      - Differs from opacus: its optimizer for this method adds 1e-6 to the norms and keeps the bound between two
        limits. For such limits, use `jnp.clip` on the result.

    References:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping, NeurIPS 2021,
      arXiv:1905.03871.

    See also:
      `per_example.clipped_value_and_grad`, which clips; `contrib.clip_by_tracked_quantile`, for the norm of the
      gradient of a whole batch.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, a bound that follows the examples.
    """
    quantile = checks.number("quantile", quantile, at_most=1.0)
    learning_rate = checks.number("learning_rate", learning_rate, below=np.inf)
    bound = checks.number("bound", bound, positive=True, below=np.inf)
    checks.axes(axes)
    sizes = _vector(norms)
    bound = bound if isinstance(bound, jax.Array) else jnp.asarray(bound, sizes.dtype)
    within, seen = _numbers(bound, sizes, weights, axes)
    share = jnp.where(seen > 0, within / jnp.maximum(seen, 1), jnp.asarray(quantile, bound.dtype))
    log_bound = jnp.log(bound)
    moved_on = tracking.moved(log_bound, share, quantile, learning_rate)
    # The exponential of the logarithm is not always the same number.
    return jnp.where(moved_on == log_bound, bound, tracking.estimate(moved_on))


def _vector(norms: Any) -> jax.Array:
    """Checks the norms, and returns them in float32 or wider."""
    dtype = getattr(norms, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.ndim(norms) != 1:
        got = repr(norms) if dtype is None else f"{dtype} of shape {jnp.shape(norms)}"
        raise ValueError(f"norms must be a vector of floats, one per example, got {got}")
    norms = jnp.asarray(norms)
    return norms.astype(dtypes.accumulator(norms.dtype))


def _numbers(bound: jax.Array, norms: jax.Array, weights: Any, axes: mesh.Axes) -> jax.Array:
    """Counts the examples with a norm of at most `bound`, and all examples, on all devices."""
    seen = jnp.isfinite(norms) & (norms >= jnp.finfo(norms.dtype).tiny)  # subnormals are 0 on some devices
    if weights is not None:
        of_weights.require_vector(norms.size, weights)
        given = jnp.asarray(weights)
        seen &= of_weights.counts(given.astype(dtypes.accumulator(given.dtype)))
    widest = jnp.promote_types(norms.dtype, bound.dtype)
    within = seen & (norms.astype(widest) <= bound.astype(widest))
    numbers = jnp.stack([jnp.sum(flags, dtype=jnp.int32) for flags in (within, seen)])
    (split,) = mesh.splits_of([norms], norms, [0], None, axes)
    names = tuple(name for name in split.axes if name not in layouts.varying(bound))
    return (jax.lax.psum(numbers, names) if names else numbers).astype(bound.dtype)
