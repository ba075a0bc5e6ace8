"""Clippers whose bound is relative to the parameters."""

from typing import Any

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays.mesh import Axes
from optaxclip.core import clip_by


def adaptive_grad_clip(
    clipping: Bound,
    eps: Bound = 1e-3,
    axis: norms.Axis = None,
    *,
    units: str = "io",
    stacked: Any = None,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AGC: scales each unit so that its norm is at most `clipping` times the norm of its parameters.

    .. math:: u_k \leftarrow u_k \cdot \min(1, m_k / \|u_k\|), \qquad m_k = clipping \cdot \max(\|w_k\|, eps)

    Args:
      clipping: the permitted ratio of the norms, at least 0: a number, an array, an optax schedule, or a prefix pytree
        of these. The paper has 0.01 for batches of 4096, and larger ones for smaller batches.
      eps: parameters of a smaller norm count as this large, so that zero-initialised units can move; 1e-3 in the paper.
      axis: the axis or axes to reduce in every leaf, instead of what `units` says. Leaves that do not have it: leave
        them out with `optax.masked`.
      units: what a unit is. `"io"`: kernels are [in, out] or HWIO (Flax, Haiku, and optax's own AGC); `"oi"`: kernels
        are [out, in, ...] (Equinox, PyTorch, and timm's AGC); `"leaf"`: each leaf is one unit. See `norms.unit_norm`.
      stacked: how many leading axes of a leaf index independent layers, never reduced over; see `clip_by_leaf_norm`.
      axes: over which mesh axes the leaves are split; inside `shard_map` a PartitionSpec or a pytree of them, since
        units are single dimensions. See `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record. Its `update` needs `params`.

    Guarantees:
      The direction of each unit is kept. Each norm afterwards is at most `m_k (1 + 1e-5)` in float32. A unit below its
      bound is returned bit for bit.

    Edge cases:
      A unit of norm 0 stays 0. A unit with an infinite or NaN norm is returned as it came, the others of its leaf are
      clipped. Leaves of squeezed rank 0 or 1 (biases, gains) are one unit.

    Placement:
      Before the optimizer. The paper leaves the final linear layer unclipped: mask it, as below.

    Raises:
      ValueError: if `clipping` or `eps` is negative or NaN, `units` unknown, `axis` out of range; at update, without
        `params`, or with a leaf of rank over 5 and neither `axis` nor another `units`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> params = {"hidden": jnp.array([[3.0], [4.0]]), "final": jnp.array([1.0])}
      >>> grads = {"hidden": jnp.array([[30.0], [40.0]]), "final": jnp.array([9.0])}
      >>> agc = optaxclip.adaptive_grad_clip(0.1)  # parameters of norm 5, so at most 0.5
      >>> tx = optax.masked(agc, {"hidden": True, "final": False})
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["hidden"].ravel(), updates["final"])
      [0.3 0.4] [9.]

    Differs from the paper:
      optax and timm divide by `max(norm, 1e-6)`, so that bounds under 1e-6 come out too small. Here they are exact.

    References:
      Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, ICML 2021,
      arXiv:2102.06171.

    See also:
      `clippy` for a bound on every coordinate; `thresholds.relative_to_params` with any other norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(axis=axis, stacked=stacked, record=record)
    checks.bound("clipping", clipping)
    checks.bound("eps", eps)
    norm = norms.unit_norm(units, axis=axis, stacked=stacked)
    return clip_by(norm, thresholds.relative_to_params(clipping, floor=eps), axes=axes, record=record)
