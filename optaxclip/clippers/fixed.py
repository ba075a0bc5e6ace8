"""Clippers with a fixed bound on a norm: each is one line over `clip_by`."""

from typing import Any

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
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record.

    Guarantees:
      The direction is kept. The norm afterwards is at most `max_norm (1 + 1e-5)` in float32, over the whole float
      range: where `optax.clip_by_global_norm` overflows (a norm past 2e19) and gives zeros or NaN, this gives the
      clipped update. Below the bound updates are returned bit for bit.

    Edge cases:
      Norm 0: zeros, also at a bound of 0. A norm that is infinite or NaN: all updates are returned as they came, so
      that what follows can see it. Bound inf: no change.

    Placement:
      Before the optimizer. Two of these inside `optax.partition` bound two norms, and the norm of the whole by the root
      of the sum of squares of the bounds: clip outside the partition for one bound on everything, or use `clip_by` with
      `norms.group_norm` for a bound per group.

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

    Differs from the paper:
      Nothing: Pascanu et al. have this map, and Zhang et al. write it as a step. PyTorch divides by `n + 1e-6`, and so
      lands just below the bound.

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
    max_norm: Bound, *, ord: float | None = None, stacked: Any = None, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that its norm is at most `max_norm`.

    .. math:: u_l \leftarrow u_l \cdot \min(1, c / n_l), \qquad n_l = \|u_l\|_p

    Args:
      max_norm: the bound c on each norm, at least 0, in the units of the gradient: a number, an array, an optax
        schedule, or a prefix pytree of these for different bounds on different leaves.
      ord: p of the p-norm, at least 1, or inf. None is 2, as in `numpy.linalg.norm`.
      stacked: how many leading axes of a leaf index independent layers, each a group of its own: a number, a prefix
        pytree of numbers, or a callable from the leaf's path to one.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record.

    Guarantees:
      The direction of each leaf is kept, that of the whole gradient is not. Each norm afterwards is at most
      `max_norm (1 + 1e-5)` in float32. A leaf below the bound is returned bit for bit.

    Edge cases:
      A leaf of norm 0 stays 0. A leaf with an infinite or NaN norm is returned as it came; the others are clipped as
      usual. Bound 0 gives zeros, inf changes nothing.

    Placement:
      Before the optimizer. The norm of L leaves together can reach `max_norm` times the square root of L.

    Raises:
      ValueError: if `max_norm` is negative or NaN, `ord` is below 1, or `stacked` exceeds a leaf's rank.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm(1.0)
      >>> updates, _ = tx.update({"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}, tx.init(None))
      >>> print(updates["a"], updates["b"])
      [0.6 0.8] [0.5]

    Differs from the published code:
      Nothing while the squares of the entries stay in the float range; past it Keras and TensorFlow lose the norm.

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
    threshold: Bound, *, stacked: Any = None, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that its root mean square is at most `threshold`.

    .. math:: u_l \leftarrow u_l / \max(1, r_l / d), \qquad r_l = \|u_l\|_2 / \sqrt{N_l}

    Args:
      threshold: the bound d, at least 0, in the units of one coordinate: a number, an array, an optax schedule, or a
        prefix pytree of these. Adafactor has 1.
      stacked: how many leading axes of a leaf index independent layers, each a block of its own; see
        `clip_by_leaf_norm`.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record.

    Guarantees:
      The direction of each leaf is kept. Each root mean square afterwards is at most `threshold (1 + 1e-5)` in float32.
      A leaf below the bound is returned bit for bit.

    Edge cases:
      A leaf of zeros stays 0. A leaf with an infinite or NaN entry is returned as it came. Bound 0 gives zeros, inf
      changes nothing.

    Placement:
      After the preconditioning and before the learning rate, as Adafactor has it, where the update of a healthy step
      has a root mean square near 1; or before the optimizer.

    Raises:
      ValueError: if `threshold` is negative or NaN, or `stacked` exceeds a leaf's rank.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_block_rms(1.0)
      >>> updates, _ = tx.update(jnp.array([2.0, -2.0, 2.0, 2.0]), tx.init(None))
      >>> print(updates)
      [ 1. -1.  1.  1.]

    Differs from the paper:
      Nothing. There it is a part of the optimizer, and u the gradient divided by the root of its second moment.

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
    r"""Scales updates so that their norm is at least `min_norm` and at most `max_norm`: against vanishing, too.

    .. math:: u \leftarrow u \cdot \frac{\min(\max(n, lo), hi)}{n} \quad (n > 0)

    Args:
      min_norm: the lower end, at least 0 and finite, in the units of the norm: a number, an array, an optax schedule,
        or a prefix pytree of these where the norm has several groups.
      max_norm: the upper end, likewise; it may be inf.
      norm: what is measured, from `optaxclip.norms`; all leaves together by default.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record.

    Guarantees:
      The direction of each group is kept. The norm afterwards lies in the range up to rounding: `1 + 1e-5` in float32.
      Within the range updates are returned bit for bit.

    Edge cases:
      A norm of 0 has no direction and stays 0. A group with an infinite or NaN norm is returned as it came.

    Placement:
      Before an optimizer that does not normalise (SGD, momentum); Adam undoes the scaling of small gradients by itself.
      Near a minimum a lower end keeps the steps from shrinking: lower it with a schedule, or the learning rate.

    Raises:
      ValueError: if an end is negative or NaN, `min_norm` infinite, or `min_norm` larger than `max_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_norm_range(1.0, 10.0)
      >>> updates, _ = tx.update(jnp.array([0.03, 0.04]), tx.init(None))
      >>> print(updates)
      [0.6 0.8]

    Differs from the paper:
      The paper scales down what is too large, and meets what vanishes with a term in the loss. The lower end is this
      library's own.

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
    r"""Scales all updates together so that their global norm stays below `max_norm`, without a kink.

    .. math:: u \leftarrow u \cdot \frac{c}{c + n}, \qquad n = \|u\|_2

    Args:
      max_norm: the bound c, at least 0, in the units of the gradient: a number, an array, or an optax schedule. A
        gradient of this norm is halved.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record.

    Guarantees:
      The direction is kept; larger norms stay larger. The norm afterwards is `n c / (n + c)`, below c (in floats it
      reaches c where n is far larger), over the whole float range.

    Edge cases:
      Norm 0: zeros. A norm that is infinite or NaN: all updates are returned as they came. Bound 0 gives zeros, inf
      changes nothing.

    Placement:
      Before the optimizer. Every gradient is shortened, not only large ones: with SGD raise the learning rate
      accordingly.

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

    Differs from the paper:
      Bu et al. have :math:`R / (n + \gamma)` for the gradient of each example; this is their form with R = gamma = c.
      From the step of Zhang et al. nothing differs.

    References:
      Bu, Wang, Zha, Karypis, Automatic clipping, NeurIPS 2023, arXiv:2206.07136.
      Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training, ICLR 2020, arXiv:1905.11881.

    See also:
      `clip_by_global_norm`; `thresholds.smooth` for the same with any other norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.bound("max_norm", max_norm, single=True)
    return clip_by(norms.global_norm(), thresholds.smooth(max_norm), axes=axes, record=record)
