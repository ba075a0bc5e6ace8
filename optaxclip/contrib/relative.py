"""A clipper that bounds the change of each coordinate relative to its parameter."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments.bounds import Number
from optaxclip._arrays.mesh import Axes
from optaxclip.core import clip_by


def clippy(
    relative: Number = 0.1, absolute: Number = 1e-7, *, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that no parameter changes by more than a share of its own modulus.

    .. math:: u_l \leftarrow u_l \cdot \min\Bigl(1, \min_i \frac{relative \cdot |w_i| + absolute}{|u_i|}\Bigr)

    Args:
      relative: the permitted share of the parameter's modulus, at least 0: a number or a scalar array. 0.1 in
        TensorFlow Recommenders.
      absolute: added to the limit, at least 0, in the units of the parameters: a number or a scalar array. 1e-7 in
        TensorFlow Recommenders. With `absolute=0`, a parameter can't leave 0.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). `record=` adds a record. Its `update` needs `params`.

    Raises:
      ValueError: if `relative` or `absolute` is negative or NaN; at update, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.clippy()
      >>> params = jnp.array([1.0, -2.0, 0.0])
      >>> updates, _ = tx.update(jnp.array([0.02, -0.4, 0.0]), tx.init(params), params)
      >>> print(updates.round(4))  # -0.4 is twice what -2 permits, so all are halved
      [ 0.01 -0.2   0.  ]
      >>> updates, _ = tx.update(jnp.array([0.02, -0.4, 0.01]), tx.init(params), params)
      >>> print(updates)  # w = 0 permits 1e-7, not 0.01, so all shrink by 1e-5
      [ 2.e-07 -4.e-06  1.e-07]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each leaf is kept.
      - Parameters at 0: one coordinate with w = 0 caps its whole leaf, as the second example shows. If parameters start
        at 0, raise `absolute`.
      - Edge cases: coordinates with u = 0 do not count. A non-zero update with a limit of 0 (`absolute=0`, w = 0), or a
        ratio beyond the largest float, scales the leaf to 0. A leaf with a non-finite update or parameter is returned
        unchanged.
      - Placement: after the learning rate, at the end of the chain. It bounds the change of the parameters, not the
        gradient.
      - Differs from the paper: the defaults are those of `ClippyAdagrad` in TensorFlow Recommenders; public ports of
        the paper use 0.5 and 0.01. That class includes Adagrad, and its limit has a third term, relative to Adagrad's
        accumulator and 0 by default. Here any optimizer may come before.

    References:
      Tang et al., Improving training stability for multitask ranking models in recommender systems, KDD 2023,
      arXiv:2302.09178.

    See also:
      `adaptive_grad_clip`; `norms.relative_change` with another threshold.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    return clip_by(norms.relative_change(relative, absolute), thresholds.constant(1.0), axes=axes, record=record)
