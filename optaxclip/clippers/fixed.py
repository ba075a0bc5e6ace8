"""Clippers with a fixed bound on a norm: each is one line over `clip_by`."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def clip_by_global_norm(
    max_norm: Bound, *, ord: float | None = None, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates together so that their global norm is at most `max_norm`.

    .. math:: u \leftarrow u \cdot \min(1, c / n), \qquad n = \|u\|_p

    Args:
      max_norm: the bound c on the norm, at least 0, in the units of the gradient: a number, an array, or an optax
        schedule.
      ord: p of the p-norm, at least 1, or inf. None is 2, as in `numpy.linalg.norm`.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record.

    Raises:
      ValueError: if `max_norm` is negative or NaN, or `ord` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0)
      >>> updates, _ = tx.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, tx.init(None))
      >>> print(updates["a"], updates["b"])
      [0.6] [0.8]

      Clipped gradient descent of Zhang et al., whose step is :math:`\min(\eta, \gamma \eta / n) g`:

      >>> import optax
      >>> eta, gamma = 0.1, 5.0
      >>> optimizer = optax.chain(optaxclip.clip_by_global_norm(gamma), optax.sgd(eta))

    Notes:
      - Guarantees: as for `clip_by`. The direction of the whole gradient is kept.
      - Differs from optax: `optax.clip_by_global_norm` overflows at norms past 2e19 and returns zeros or NaN. This
        function returns the clipped update.
      - Differs from PyTorch: PyTorch divides by `n + 1e-6`, so its result is just below the bound.
      - Placement: before the optimizer. For one bound on the whole gradient, clip outside `optax.partition`. Two clips
        inside it bound two separate norms. The norm of all leaves can then reach the root of the sum of the squares of
        these bounds. For a bound per group, use `clip_by` with `norms.group_norm`.

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, ICML 2013, arXiv:1211.5063.
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, ICLR 2020, arXiv:1905.11881.

    See also:
      `smooth_clip_by_global_norm`, `clip_by_norm_range`, `clip_by_leaf_norm`; `global_norm` to log the norm.

      Notebooks: `notebooks/quickstart.ipynb`, a clipped and recorded run in twenty lines;
        `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish; `notebooks/acceleration.ipynb`, why
        clipping accelerates; `notebooks/stability.ipynb`, over which range of step sizes clipped methods converge.
    """
    checks.static_together(ord=ord, record=record)
    checks.bound("max_norm", max_norm, single=True)
    return clip_by(
        norms.global_norm(2 if ord is None else ord), thresholds.constant(max_norm), axes=axes, record=record
    )


def clip_by_leaf_norm(
    max_norm: Bound,
    *,
    ord: float | None = None,
    stacked: norms.Stacked = None,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that its norm is at most `max_norm`.

    .. math:: u_l \leftarrow u_l \cdot \min(1, c / n_l), \qquad n_l = \|u_l\|_p

    Args:
      max_norm: the bound c on each norm, at least 0, in the units of the gradient: a number, an array, an optax
        schedule, or a prefix pytree of these for different bounds on different leaves.
      ord: p of the p-norm, at least 1, or inf. None is 2, as in `numpy.linalg.norm`.
      stacked: how many of a leaf's leading axes run over independent layers. Each layer is its own group. A number, a
        prefix pytree of numbers, or a function from the leaf's path to a number.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record.

    Raises:
      ValueError: if `max_norm` is negative or NaN, `ord` is below 1, or `stacked` exceeds a leaf's rank.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm(1.0)
      >>> updates, _ = tx.update({"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}, tx.init(None))
      >>> print(updates["a"], updates["b"])
      [0.6 0.8] [0.5]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each leaf is kept; the direction of the whole gradient is not.
      - Differs from Keras and TensorFlow: their norm overflows or underflows if a square leaves the float range.
        Otherwise the results agree.
      - Placement: before the optimizer. The norm of L leaves together can reach `max_norm` times the square root of L.

    References:
      `clipnorm` of the Keras optimizers; `tf.clip_by_norm`.

    See also:
      `clip_by_global_norm`, `clip_by_block_rms`; `norms.group_norm` for groups of several leaves.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(ord=ord, stacked=stacked, record=record)
    checks.bound("max_norm", max_norm)
    norm = norms.leaf_norm(2 if ord is None else ord, stacked=stacked)
    return clip_by(norm, thresholds.constant(max_norm), axes=axes, record=record)


def clip_by_block_rms(
    threshold: Bound, *, stacked: norms.Stacked = None, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that its root mean square is at most `threshold`.

    .. math:: u_l \leftarrow u_l / \max(1, r_l / d), \qquad r_l = \|u_l\|_2 / \sqrt{N_l}

    Args:
      threshold: the bound d, at least 0, in the units of one coordinate: a number, an array, an optax schedule, or a
        prefix pytree of these. Adafactor uses 1.
      stacked: how many of a leaf's leading axes run over independent layers. Each layer is its own block; see
        `clip_by_leaf_norm`.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record.

    Raises:
      ValueError: if `threshold` is negative or NaN, or `stacked` exceeds a leaf's rank.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_block_rms(1.0)
      >>> updates, _ = tx.update(jnp.array([2.0, -2.0, 2.0, 2.0]), tx.init(None))
      >>> print(updates)
      [ 1. -1.  1.  1.]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each leaf is kept.
      - Placement: after the preconditioning and before the learning rate, as in Adafactor. There, a healthy update has
        a root mean square near 1. It also works before the optimizer.
      - Differs from the paper: in the paper the clip is part of the optimizer, and u is the gradient divided by the
        root of its second moment.

    References:
      Shazeer, Stern, Adafactor, ICML 2018, arXiv:1804.04235, section 6.

    See also:
      `clip_by_leaf_norm`.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(stacked=stacked, record=record)
    checks.bound("threshold", threshold)
    return clip_by(norms.leaf_rms(stacked=stacked), thresholds.constant(threshold), axes=axes, record=record)


def clip_by_norm_range(
    min_norm: Bound, max_norm: Bound, *, norm: Norm = norms.global_norm(), axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates so that their norm lies between `min_norm` and `max_norm`; small gradients are scaled up.

    .. math:: u \leftarrow u \cdot \frac{\min(\max(n, lo), hi)}{n} \quad (n > 0)

    Args:
      min_norm: the lower end, at least 0 and finite, in the units of the norm: a number, an array, an optax schedule,
        or a prefix pytree of these if the norm has several groups.
      max_norm: the upper end, of the same kinds; it may be inf.
      norm: what to measure, from `optaxclip.norms`; by default all leaves together.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record.

    Raises:
      ValueError: if an end is negative or NaN, `min_norm` is infinite, or `min_norm` is larger than `max_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_norm_range(1.0, 10.0)
      >>> updates, _ = tx.update(jnp.array([0.03, 0.04]), tx.init(None))
      >>> print(updates)
      [0.6 0.8]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept. A norm of 0 has no direction, so it stays 0.
      - Placement: before an optimizer that does not normalise (SGD, momentum). Adam undoes the scaling of small
        gradients. Near a minimum, the lower end keeps steps from shrinking: lower it with a schedule, or lower the
        learning rate.
      - Differs from the paper: the paper scales down large gradients, and handles vanishing ones with a term in the
        loss. The lower end is this library's own.

    References:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, ICML 2013, arXiv:1211.5063, for
      both sides of the problem.

    See also:
      `clip_by_global_norm`; `thresholds.exactly` for a norm that is always the same.

      Notebook: `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish.
    """
    checks.bound("min_norm", min_norm, finite=True)
    checks.bound("max_norm", max_norm)
    checks.ordered("min_norm", min_norm, "max_norm", max_norm)
    return clip_by(norm, thresholds.between(min_norm, max_norm), axes=axes, record=record)


def smooth_clip_by_global_norm(
    max_norm: Bound, *, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates together, smoothly, so that their global norm stays below `max_norm`.

    .. math:: u \leftarrow u \cdot \frac{c}{c + n}, \qquad n = \|u\|_2

    Args:
      max_norm: the bound c, at least 0, in the units of the gradient: a number, an array, or an optax schedule. A
        gradient of this norm is halved.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record.

    Raises:
      ValueError: if `max_norm` is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.smooth_clip_by_global_norm(5.0)
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(None))
      >>> print(updates)
      [1.5 2. ]

      Normalised gradient descent of Zhang et al., whose step is :math:`\eta_n g / (n + \beta)`:

      >>> import optax
      >>> eta_n, beta = 0.1, 5.0
      >>> optimizer = optax.chain(optaxclip.smooth_clip_by_global_norm(beta), optax.sgd(eta_n / beta))

    Notes:
      - Guarantees: as for `clip_by`. The direction is kept, and larger norms stay larger. The norm after the clip is
        `n * c / (n + c)`. In floating point it reaches c if n is far larger.
      - Placement: before the optimizer. Every gradient shrinks, not only large ones: with SGD, raise the learning rate.
      - Differs from the paper: Bu et al. use :math:`R / (n + \gamma)` for the gradient of each example; here R and
        gamma are both c. The step of Zhang et al. is the same.

    References:
      Bu, Wang, Zha, Karypis, Automatic clipping, NeurIPS 2023, arXiv:2206.07136.
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, ICLR 2020, arXiv:1905.11881.

    See also:
      `clip_by_global_norm`; `thresholds.smooth` for the same with any other norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.bound("max_norm", max_norm, single=True)
    return clip_by(norms.global_norm(), thresholds.smooth(max_norm), axes=axes, record=record)
