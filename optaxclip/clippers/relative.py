"""Clippers whose bound is relative to the parameters."""

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
    stacked: norms.Stacked = None,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AGC: scales each unit so that its norm is at most `clipping` times the norm of its parameters.

    .. math:: u_k \leftarrow u_k \cdot \min(1, m_k / \|u_k\|), \qquad m_k = clipping \cdot \max(\|w_k\|, eps)

    Args:
      clipping: the permitted ratio of the norms, at least 0: a number, an array, an optax schedule, or a prefix pytree
        of these. The paper uses 0.01 for batches of 4096, and more for smaller batches.
      eps: parameters with a smaller norm count as `eps`, so that zero-initialised units can move. At least 0, of the
        same kinds as `clipping`; 1e-3 in the paper.
      axis: the axis or axes to reduce in every leaf, instead of those of `units`. Exclude leaves without that axis with
        `optax.masked`.
      units: what a unit is. `"io"`: kernels are [in, out] or HWIO (Flax, Haiku, and optax's own AGC). `"oi"`: kernels
        are [out, in, ...] (Equinox, PyTorch, and timm's AGC). `"leaf"`: each leaf is one unit. See `norms.unit_norm`.
      stacked: how many of a leaf's leading axes run over independent layers. They are never reduced; see
        `clip_by_leaf_norm`.
      axes: which mesh axes split the leaves; see `clip_by`. Inside `shard_map`, pass a PartitionSpec or a pytree of
        them: `"auto"` does not know which dimension of a leaf is split.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record. Its
      `update` needs `params`.

    Raises:
      ValueError: if `clipping` or `eps` is negative or NaN, `units` is unknown, or `axis` is out of range; at update,
        without `params`, or for a leaf of rank over 5 with `units="io"` and no `axis`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> params = {"hidden": jnp.array([[3.0], [4.0]]), "final": jnp.array([1.0])}
      >>> grads = {"hidden": jnp.array([[30.0], [40.0]]), "final": jnp.array([9.0])}
      >>> agc = optaxclip.adaptive_grad_clip(0.1)  # parameters of norm 5: the bound is 0.5
      >>> tx = optax.masked(agc, {"hidden": True, "final": False})
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["hidden"].ravel(), updates["final"])
      [0.3 0.4] [9.]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each unit is kept. A non-finite unit does not affect the other
        units of its leaf.
      - Edge cases: a leaf whose squeezed rank is 0 or 1 (biases, gains) is one unit.
      - Placement: before the optimizer. The paper leaves the final linear layer unclipped: mask it, as in the example.
      - Differs from optax and timm: they divide by `max(norm, 1e-6)`, so their bounds under 1e-6 are too small. Here
        bounds are exact.

    References:
      Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, ICML 2021,
      arXiv:2102.06171.

    See also:
      `contrib.clippy` for a bound on every coordinate; `thresholds.relative_to_params` with any other norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(axis=axis, stacked=stacked, record=record)
    checks.bound("clipping", clipping)
    checks.bound("eps", eps)
    norm = norms.unit_norm(units, axis=axis, stacked=stacked)
    return clip_by(norm, thresholds.relative_to_params(clipping, floor=eps), axes=axes, record=record)
