"""Clippers of single coordinates that spike, compared with earlier values of the coordinate or its leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import mesh, states
from optaxclip._arrays.beside import each_leaf, sizes_like
from optaxclip._arrays.mesh import Axes
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, averages, scaling
from optaxclip.core import Updates, clip_by


class SpamState(NamedTuple):
    """State of `spam_clip`.

    Attributes:
      spam_step: int32 scalar, the number of updates.
      spam_rms: like the parameters, the root of the moving average of squares.
    """

    spam_step: jax.Array
    spam_rms: Updates


def spam_clip(
    ratio: Number = 5000.0,
    *,
    decay: Number = 0.999,
    warmup_steps: int = 19,
    period: int | None = None,
    state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each coordinate whose square is more than `ratio` times the moving average of its squares.

    .. math:: u \leftarrow \operatorname{sign}(u) \sqrt{\theta v} \text{ where } u^2 > \theta v > 0, \qquad
        v \leftarrow \beta v + (1 - \beta) u^2

    The first `warmup_steps` steps are not clipped. If your run can explode at once, put a fixed clip in front:
    `chain(clip_by_global_norm(10.0), contrib.spam_clip())`.

    Args:
      ratio: :math:`\theta`, the permitted multiple of the average of squares, at least 0; 5000 in the paper.
      decay: :math:`\beta`, decay of the average of the squares after clipping, in [0, 1); 0.999 in the paper.
      warmup_steps: how many steps at the start are not clipped while the average fills, at least 0. The paper clips
        from step 20 on.
      period: the number of steps from one restart of the average to the next. Each restart begins a new warm-up. 500 in
        the paper. None never restarts.
      state_dtype: dtype of the average, a real float dtype of at least 16 bits. None: the parameter's dtype, or float32
        if that has fewer than 16 bits. In 16 bits, an average with the default decay hardly moves.

    Returns:
      An optax transformation. Its state is one number per coordinate, and a step count.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.spam_clip(4.0, decay=0.9, warmup_steps=2)
      >>> params = jnp.zeros(1)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grad in (1.0, 1.0, 3.0):
      ...     updates, state = update(jnp.array([grad]), state, params)
      >>> print(updates)  # the root of 4 times 0.19
      [0.8718]

    Notes:
      - Guarantees: the sign of each coordinate is kept (the phase, if it is complex). Coordinates that do not spike are
        returned unchanged, except subnormals in bfloat16, which some versions of XLA flush. The state holds the root of
        the average, so it is accurate over the whole float range.
      - Edge cases: a coordinate that was always 0 is not clipped (v = 0, as in unused rows of an embedding). An
        infinite coordinate is clipped if there is an average; NaN stays NaN. Neither enters the average. Integer,
        boolean, float0 and key leaves are returned unchanged.
      - Placement: before the optimizer. SPAM is this and a reset of Adam's moments:
        `chain(contrib.spam_clip(period=500), contrib.reset_state_every(adam(1e-3), 500))`.
      - Differs from the paper: the published code clips to 0 where v = 0. A coordinate that was 0 throughout the
        warm-up then stays 0 until the next restart. In the paper, v is Adam's own second moment. Here it is a separate
        average, so that any optimizer can follow.

    References:
      Huang et al., SPAM: spike-aware Adam with momentum reset for stable LLM training, ICLR 2025, arXiv:2501.06842.

    See also:
      `adaptive_spike_clip`, of Stable-SPAM; `clip` for a fixed bound.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(warmup_steps=warmup_steps, period=period, state_dtype=state_dtype)
    ratio = checks.number("ratio", ratio)
    decay = checks.number("decay", decay, below=1.0)
    warmup_steps = checks.whole("warmup_steps", warmup_steps, at_least=0)
    period = checks.whole_or_none("period", period)
    dtype = checks.state_dtype(state_dtype)

    def init(params: Tree) -> SpamState:
        return SpamState(jnp.zeros((), jnp.int32), sizes_like(parameters(params), dtype))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra: Any) -> tuple[Updates, SpamState]:
        del params, extra
        state = states.of_kind(SpamState, state, "spam_clip")
        filled = fill_missing(updates, state.spam_rms)
        mesh.require_reduced(filled, state.spam_rms, called="average")
        step = jnp.asarray(optax.safe_increment(state.spam_step))
        phase = step if period is None else step % period
        restarts = (phase == 0) & (period is not None)
        is_warm = phase <= warmup_steps

        def one(leaf: Any, rms: jax.Array) -> tuple[jax.Array, jax.Array]:
            leaf = jnp.asarray(leaf)
            size = arithmetic.modulus(leaf)
            before = jnp.where(restarts, jnp.zeros_like(rms), rms).astype(size.dtype)
            bound = arithmetic.root(jnp.asarray(ratio, size.dtype)) * before
            spikes = (size > bound) & (before > 0) & ~is_warm
            kept = jnp.where(spikes, bound, size)
            after = averages.power_mean(before, kept, averages.shares(decay, size.dtype), 2)
            after = jnp.where(jnp.isfinite(size), after, before)
            return _with_modulus(leaf, bound, spikes), arithmetic.narrowed(after, rms.dtype)

        clipped, rms = each_leaf(one, filled, state.spam_rms)
        return drop_missing(updates, clipped), SpamState(step, rms)

    return optax.GradientTransformationExtraArgs(init, update)


def adaptive_spike_clip(
    decay: Number = 0.999, *, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales down the coordinates of each leaf that exceed the moving average of the leaf's largest modulus.

    .. math:: u_i \leftarrow u_i \hat M / \max_j |u_j| \text{ where } |u_i| > \hat M, \qquad
        M \leftarrow \beta M + (1 - \beta) \max_j |u_j|, \quad \hat M = M / (1 - \beta^t)

    The first step is not clipped. If your run can explode at once, put a fixed clip in front:
    `chain(clip_by_global_norm(10.0), contrib.adaptive_spike_clip())`.

    Args:
      decay: :math:`\beta`, in [0, 1); 0.999 in the paper.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is two numbers per leaf.

    Raises:
      ValueError: if `decay` is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.adaptive_spike_clip(0.5)
      >>> params = jnp.zeros(2)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grads in ([3.0, 4.0], [1.0, 16.0]):
      ...     updates, state = update(jnp.array(grads), state, params)
      >>> print(updates)  # a third of 4 and two thirds of 16
      [ 1. 12.]

    Notes:
      - Guarantees: as for `clip_by`. No coordinate exceeds the debiased average of the largest moduli, the current one
        included. Coordinates within it are returned unchanged.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Placement: before the optimizer, and before `scale_by_adaptive_norm`. Up to the first reset, Stable-SPAM is
        `chain(contrib.adaptive_spike_clip(), contrib.scale_by_adaptive_norm(), contrib.reset_state_every(adam(1e-3),
        1000))`. At a reset the published code restarts Adam's count, without a warm-up.
      - Differs from the paper: the published code restarts its count at every reset, which breaks the debiasing; here
        it continues. Leaves of zeros do not enter the average.

    References:
      AdaClip of Huang et al., Stable-SPAM, 2025, arXiv:2502.17055.

    See also:
      `spam_clip`, `scale_by_adaptive_norm`; `thresholds.average` with any norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    return clip_by(norms.leaf_peaks(), thresholds.average(decay), axes=axes, record=record)


def scale_by_adaptive_norm(
    b1: Number = 0.7, b2: Number = 0.9, *, eps: Number = 1e-8, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf to the norm :math:`\hat m / (\sqrt{\hat v} + \epsilon)`: near 1, less after a spike.

    .. math:: m \leftarrow b_1 m + (1 - b_1) n, \quad v \leftarrow b_2 v + (1 - b_2) n^2, \quad
        u \leftarrow \frac{u}{n} \frac{\hat m}{\sqrt{\hat v} + \epsilon}, \qquad n = \|u\|

    It is a normaliser, not a clip: small gradients are scaled up to the same norm as large ones.

    Args:
      b1: decay of the average of norms, in [0, 1); 0.7 in the paper.
      b2: decay of the average of their squares, in [0, 1); 0.9 in the paper.
      eps: added to the root, at least 0.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is three numbers per leaf.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.scale_by_adaptive_norm()
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
      >>> print(updates)
      [0.6 0.8]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each leaf is kept.
      - Edge cases: a leaf of zeros stays 0 and enters the averages, as in the authors' code. A non-finite leaf is
        returned unchanged and does not change its averages.
      - Placement: before the optimizer; see `adaptive_spike_clip`.
      - Differs from the paper: the counts never restart.

    References:
      AdaGN of Huang et al., Stable-SPAM, 2025, arXiv:2502.17055.

    See also:
      `adaptive_spike_clip`; `thresholds.normalised` with any norm; `thresholds.exactly` for a norm that is always the
      same.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    return clip_by(norms.leaf_norm(), thresholds.normalised(b1, b2, eps=eps), axes=axes, record=record)


def _with_modulus(leaf: jax.Array, size: jax.Array, where: jax.Array) -> jax.Array:
    """The leaf, with the modulus `size` for the coordinates in `where`."""
    if jnp.iscomplexobj(leaf):
        modulus = arithmetic.modulus(leaf)
        moved = scaling.rescale(leaf, scaling.factor(modulus, jnp.where(where, size, modulus)))
    else:
        moved = jnp.sign(leaf) * arithmetic.narrowed(size, leaf.dtype)
    return jnp.where(where, moved, leaf)
