"""Optimizers with a clip inside, as `scale_by_` transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import dtypes, mesh, states
from optaxclip._arrays.beside import each_leaf, require_beside, sizes_like, zeros_like
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, averages, tree_norms
from optaxclip.core import Leaves, Updates


class AcclipState(NamedTuple):
    """State of `scale_by_acclip`.

    Attributes:
      acclip_momentum: like the parameters, the average of the gradients, not debiased.
      acclip_size: like the parameters, the power mean of order alpha of the moduli.
    """

    acclip_momentum: Updates
    acclip_size: Updates


def scale_by_acclip(
    b1: Number = 0.9,
    b2: Number = 0.99,
    *,
    alpha: float = 1.0,
    eps: Number = 1e-5,
    state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each coordinate of the momentum to the average size of its gradients.

    .. math:: u \leftarrow m \min\Bigl(1, \frac{\tau}{|m| + \epsilon}\Bigr), \qquad
        m \leftarrow b_1 m + (1 - b_1) g, \quad \tau^\alpha \leftarrow b_2 \tau^\alpha + (1 - b_2) |g|^\alpha

    Args:
      b1: decay of the momentum, in [0, 1); 0.9 in the paper.
      b2: decay of the sizes, in [0, 1); 0.99 in the paper.
      alpha: order of the average of sizes, at least 1; 1 in the paper, 2 in the public code.
      eps: added to the momentum's modulus, at least 0.
      state_dtype: dtype of both averages, a real float dtype of at least 16 bits. None: the parameter's dtype, or
        float32 if that has fewer than 16 bits.

    Returns:
      An optax transformation. Its state is two numbers per coordinate.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.scale_by_acclip()
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)
      >>> print(updates.round(3))
      [ 0.01 -0.01]

    Notes:
      - Guarantees: no coordinate of the update exceeds :math:`\tau`, the average size of its gradients.
      - Edge cases: nothing is debiased. At alpha 1, the update starts at a hundredth of the gradient and needs 100
        steps to reach 0.63 of it. A non-finite coordinate is returned unchanged and does not change its averages.
      - Placement: in place of `scale_by_adam`: `chain(contrib.scale_by_acclip(), scale_by_learning_rate(0.1))`.
      - Differs from the paper: the public code uses alpha 2, and by default also divides by the root of the second
        moment.

    References:
      Zhang J., Karimireddy, Veit, Kim, Reddi, Kumar, Sra, Why are adaptive methods good for attention models?, NeurIPS
      2020, arXiv:1912.03194.

    See also:
      `spam_clip`, which clips the gradient.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(alpha=alpha, state_dtype=state_dtype)
    b1 = checks.number("b1", b1, below=1.0)
    b2 = checks.number("b2", b2, below=1.0)
    order = checks.order("alpha", alpha)
    eps = checks.number("eps", eps)
    dtype = checks.state_dtype(state_dtype)

    def init(params: Tree) -> AcclipState:
        params = parameters(params)
        return AcclipState(zeros_like(params, dtype), sizes_like(params, dtype))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra: Any) -> tuple[Updates, AcclipState]:
        del params, extra
        state = states.of_kind(AcclipState, state, "scale_by_acclip")

        def one(leaf: Any, momentum: jax.Array, size: jax.Array) -> tuple[jax.Array, ...]:
            leaf = jnp.asarray(leaf)
            real = dtypes.accumulator(leaf.dtype)
            new = averages.moved_widened(momentum, leaf, b1)
            tau = averages.power_mean(size.astype(real), arithmetic.modulus(leaf), averages.shares(b2, real), order)
            is_good = jnp.isfinite(new) & jnp.isfinite(tau)
            length = jnp.maximum(arithmetic.modulus(new) + eps, jnp.finfo(real).tiny)
            kept = jnp.minimum(tau, length).astype(new.dtype)
            out = jnp.where(tau < length, arithmetic.quotient(new, length) * kept, new)
            return (
                jnp.where(is_good, arithmetic.narrowed(out, leaf.dtype), leaf),
                jnp.where(is_good, arithmetic.narrowed(new, momentum.dtype), momentum),
                jnp.where(is_good, arithmetic.narrowed(tau, size.dtype), size),
            )

        filled = fill_missing(updates, state.acclip_momentum)
        mesh.require_reduced(filled, state.acclip_momentum, called="average")
        out, *new = each_leaf(one, filled, state.acclip_momentum, state.acclip_size)
        return drop_missing(updates, out), AcclipState(*new)

    return optax.GradientTransformationExtraArgs(init, update)


class StableAdamState(NamedTuple):
    """State of `scale_by_stable_adam`.

    Attributes:
      adam_steps: int32 vector, the number of gradients in the averages of each leaf.
      adam_mean: like the parameters, the debiased average of the gradients.
      adam_rms: like the parameters, the root of the debiased average of their squares.
    """

    adam_steps: jax.Array
    adam_mean: Updates
    adam_rms: Updates


def scale_by_stable_adam(
    b1: Number = 0.9,
    b2: Number = 0.99,
    *,
    eps: Number = 1e-6,
    state_dtype: jax.typing.DTypeLike | None = None,
    axes: mesh.Axes = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides Adam's update of each leaf by the excess of its gradient over the second moment, as StableAdamW does.

    .. math:: u_l \leftarrow \frac{\hat m}{\sqrt{\hat v} + \epsilon} \Big/ \max(1, r_l), \qquad
        r_l = \sqrt{\operatorname{mean}_i \frac{g_i^2}{\max(\hat v_i, \epsilon^2)}}

    Args:
      b1: decay of the mean, in [0, 1); 0.9 in the paper.
      b2: decay of the squares, in [0, 1); 0.99 in the paper.
      eps: added to the root, at least 0; 1e-6 in the paper.
      state_dtype: dtype of both averages, a real float dtype of at least 16 bits. None: the parameter's dtype, or
        float32 if that has fewer than 16 bits.
      axes: which mesh axes split the leaves; see `clip_by`.

    Returns:
      An optax transformation. Its state is two numbers per coordinate, and a step count per leaf.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.scale_by_stable_adam()
      >>> params = jnp.zeros(2)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grads in ([1.0, -1.0], [1.0, 1.0], [10.0, 0.1]):
      ...     updates, state = update(jnp.array(grads), state, params)
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      0.6095 0.0710

    Notes:
      - Guarantees: a leaf whose gradient does not exceed the second moment (r at most 1) gets Adam's update. The state
        holds the root of the second moment, so it is accurate over the whole float range.
      - Edge cases: a leaf of zeros at the start stays 0. A leaf with a non-finite entry is returned unchanged and does
        not change its averages.
      - Placement: in place of `scale_by_adam`. StableAdamW is `chain(contrib.scale_by_stable_adam(),
        add_decayed_weights(0.01), scale_by_learning_rate(1e-3))`.
      - Differs from the paper: weight decay is a separate transformation here. The paper also divides the weight decay
        by r.

    References:
      Wortsman et al., Stable and low-precision training for large-scale vision-language models, NeurIPS 2023,
      arXiv:2304.13013.

    See also:
      `clip_by_block_rms`, which bounds the update itself.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(state_dtype=state_dtype)
    b1 = checks.number("b1", b1, below=1.0)
    b2 = checks.number("b2", b2, below=1.0)
    eps = checks.number("eps", eps)
    dtype = checks.state_dtype(state_dtype)
    checks.axes(axes)

    def init(params: Tree) -> StableAdamState:
        params = parameters(params)
        # Without leaves there is one placeholder: checkpoints refuse empty arrays.
        steps = jnp.zeros(max(len(jax.tree.leaves(params)), 1), jnp.int32)
        return StableAdamState(steps, zeros_like(params, dtype), sizes_like(params, dtype))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra: Any) -> tuple[Updates, StableAdamState]:
        del extra
        state = states.of_kind(StableAdamState, state, "scale_by_stable_adam")
        params = parameters(params, updates)
        filled = fill_missing(updates, state.adam_mean)
        require_beside(filled, state.adam_mean)
        flat, treedef = jax.tree.flatten(filled)
        leaves = Leaves(filled, params, axes)
        means, roots = (treedef.flatten_up_to(tree) for tree in (state.adam_mean, state.adam_rms))
        counted = [i for i, leaf in enumerate(flat) if dtypes.is_inexact(leaf)]
        now = jnp.asarray(optax.safe_increment(state.adam_steps))
        new = {i: _averages(jnp.asarray(flat[i]), means[i], roots[i], b1, b2, now[i]) for i in counted}
        excess = dict(zip(counted, _excess(leaves, list(new.values()), eps), strict=True))
        is_good = [jnp.isfinite(excess[i]) if i in excess else jnp.zeros((), jnp.bool_) for i in range(len(flat))]
        for i in counted:
            mean, root = new[i]
            out = arithmetic.quotient(arithmetic.quotient(mean, _or_tiny(root + eps)), jnp.maximum(excess[i], 1))
            out = arithmetic.saturated(out, bounds.highest(out.dtype))
            flat[i] = jnp.where(is_good[i], arithmetic.narrowed(out, jnp.result_type(flat[i])), flat[i])
            means[i] = jnp.where(is_good[i], arithmetic.narrowed(mean, means[i].dtype), means[i])
            roots[i] = jnp.where(is_good[i], arithmetic.narrowed(root, roots[i].dtype), roots[i])
        steps = jnp.where(jnp.stack(is_good), now, state.adam_steps) if flat else state.adam_steps
        after = StableAdamState(steps, treedef.unflatten(means), treedef.unflatten(roots))
        return drop_missing(updates, treedef.unflatten(flat)), after

    return optax.GradientTransformationExtraArgs(init, update)


def _averages(
    leaf: jax.Array, mean: jax.Array, root: jax.Array, b1: Number, b2: Number, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both moments after this step, the second as its root, in float32 or wider."""
    wide, real = dtypes.wide(leaf.dtype), dtypes.accumulator(leaf.dtype)
    return (
        averages.moved(mean.astype(wide), leaf.astype(wide), averages.debiased(b1, step, real)),
        averages.power_mean(root.astype(real), arithmetic.modulus(leaf), averages.debiased(b2, step, real), 2),
    )


def _excess(leaves: Leaves, moments: list[tuple[jax.Array, jax.Array]], eps: Number) -> list[jax.Array]:
    """The root mean square of each leaf's gradient over its second moment's root. No share exceeds 1 / (1 - b2)."""
    local = []
    for leaf, (_, root) in zip(leaves, moments, strict=True):
        unit = _or_tiny(jnp.maximum(root, jnp.asarray(eps, root.dtype)))
        share = arithmetic.quotient(arithmetic.modulus(leaf.value), unit)
        local.append(arithmetic.root(jnp.sum(jnp.square(share)) / leaf.size_over(tree_norms.all_dims(leaf.value))))
    return tree_norms.across(local, [leaf.axes for leaf in leaves], 2)


def _or_tiny(x: jax.Array) -> jax.Array:
    """x, or the smallest normal number if x is smaller."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
