"""Clippers of the singular values of matrices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays import dtypes, groups, layouts
from optaxclip._arrays.mesh import Axes
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._numerics import arithmetic, scaling
from optaxclip._numerics.matrices import capping, stacks
from optaxclip.core import Leaf, Leaves, State, Updates, clip_by, upper_end


def clip_by_spectral_norm(
    max_norm: Bound, *, units: str = "io", stacked: Any = None, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix so that its largest singular value is at most `max_norm`.

    .. math:: u_l \leftarrow u_l \cdot \min(1, c / \sigma_1(u_l))

    Args:
      max_norm: the bound c on each spectral norm, at least 0, in the units of the gradient: a number, an array, an
        optax schedule, or a prefix pytree of these for different bounds on different leaves.
      units: which matrix a leaf of rank over 2 is. `"io"`: its last axis against all others (kernels [in, out] or
        HWIO, as in Flax); `"oi"`: its first axis against all others (kernels [out, in, ...], as in PyTorch and
        Equinox).
      stacked: how many leading axes of a leaf index independent matrices; see `clip_by_leaf_norm`.
      axes: over which mesh axes the leaves are split; see `clip_by`. In `shard_map` a matrix must be whole on every
        device, and leaves that are split over their `stacked` axes need PartitionSpecs.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps, and with `record`
      it keeps a record.

    Guarantees:
      The direction of each matrix is kept, and its rank and condition with it. The spectral norm afterwards is at most
      `max_norm (1 + 1e-5)` in float32, for norms up to the largest float. A matrix within is returned bit for bit, if
      by more than the norm is off: by rounding on CPUs, by 1e-5 elsewhere (by calculation, with the matrix units of
      TPUs and GPUs emulated on a CPU; not measured on a device).

    Edge cases:
      Vectors and numbers (biases, gains) are clipped by their 2-norm, which is their only singular value. A matrix of
      zeros stays 0. One with an infinite or NaN entry is returned as it came. Bound 0 gives zeros, inf changes nothing.

    Placement:
      Before the optimizer; or after it and before the learning rate, where it bounds by how much a step can change what
      a layer puts out. The norm of `clip_by_leaf_norm` is larger by up to the root of the rank.

    Raises:
      ValueError: if `max_norm` is negative or NaN, `units` unknown, `stacked` exceeds a leaf's rank; at update, in
        `shard_map`, for a matrix that is split over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_spectral_norm(2.0)
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), tx.init(None))
      >>> print(updates)
      [[1.5 0. ]
       [0.  2. ]]

    Differs from the paper:
      There the weights are divided by their norm, whatever it is, and the norm comes from one step of power iteration,
      which is never above it. Here updates are scaled, and only those beyond the bound.

    References:
      Miyato, Kataoka, Koyama, Yoshida, Spectral normalization for generative adversarial networks, ICLR 2018,
      arXiv:1802.05957, for the norm.

    See also:
      `clip_singular_values`, which leaves the smaller singular values alone; `norms.spectral_norm` with another
      threshold.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(stacked=stacked, record=record)
    checks.bound("max_norm", max_norm)
    norm = norms.spectral_norm(units=units, stacked=stacked)
    return clip_by(norm, thresholds.constant(max_norm), axes=axes, record=record)


def clip_singular_values(
    max_value: Bound, *, soft: bool = False, units: str = "io", stacked: Any = None, axes: Axes = "auto"
) -> optax.GradientTransformationExtraArgs:
    r"""Caps every singular value of each matrix at `max_value`, and leaves its singular vectors alone.

    .. math:: U S V^T \leftarrow U \min(S, c) V^T, \qquad soft: U \frac{S}{\sqrt{1 + (S / c)^2}} V^T

    Args:
      max_value: the cap c, at least 0, in the units of the gradient: a number, an array, an optax schedule, or a prefix
        pytree of these.
      soft: whether the cap is approached without a kink; a singular value of c becomes 0.71 c.
      units: which matrix a leaf of rank over 2 is. `"io"`: its last axis against all others (kernels [in, out] or
        HWIO, as in Flax); `"oi"`: its first axis against all others (kernels [out, in, ...], as in PyTorch and
        Equinox).
      stacked: how many leading axes of a leaf index independent matrices; see `clip_by_leaf_norm`.
      axes: over which mesh axes the leaves are split; see `clip_by`. In `shard_map` a matrix must be whole on every
        device, and leaves that are split over their `stacked` axes need PartitionSpecs.

    Returns:
      A stateless transformation (`optax.EmptyState`); with a schedule it counts its steps.

    Guarantees:
      In float32 the result is off by at most `1e-3 c` and 20 eps of the largest singular value, in the spectral norm,
      for caps down to a thousandth of that; further down it stays finite, and its norm at most the cap and this. A
      matrix whose singular values are within the hard cap, by more than they are off, is returned bit for bit. First
      derivatives are finite everywhere, also where singular values are the same or 0; second ones where they are
      neither. On TPUs and GPUs the accuracy is by calculation, with their matrix units emulated on a CPU; it is not
      measured on a device.

    Edge cases:
      Vectors and numbers (biases, gains) have one singular value, their 2-norm, and are scaled by the same map of it. A
      matrix of zeros stays 0. One with an infinite or NaN entry is returned as it came. Cap 0 gives zeros, inf changes
      nothing.

    Placement:
      Before the optimizer, against spikes that live in a few singular directions, where a norm clip would shrink all of
      them; or after it and before the learning rate. It costs a decomposition of each matrix that is outside: on two
      CPU cores 0.15 to 0.3 s at 1024 x 1024. On accelerators it takes 92 products of matrices in full precision
      (hard) or 54 (soft). For a TPU v5e a 512 x 512 matrix compiles in 11 s of processor time (jax 0.10.2). Matrices
      of one shape, or its transpose, share one program.

    Raises:
      ValueError: if `max_value` is negative or NaN, `units` unknown, `stacked` exceeds a leaf's rank; at update, in
        `shard_map`, for a matrix that is split over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_singular_values(2.0)
      >>> updates, _ = tx.update(jnp.array([[1.0, 0.0], [0.0, 5.0]]), tx.init(None))
      >>> print(updates.round(4))  # the 5 is capped, the 1 is not
      [[1. 0.]
       [0. 2.]]

      Muon brings all singular values to 1, also those that are nothing but noise. This caps what is large and keeps the
      sizes of the rest; only for a cap far below all of them the two are the same, but for the factor c:

      >>> tx = optaxclip.clip_singular_values(0.1)
      >>> updates, _ = tx.update(jnp.array([[0.0, 3.0], [-4.0, 0.0]]), tx.init(None))
      >>> print(updates.round(4) + 0.0)  # 0.1 times the orthogonal factor
      [[ 0.   0.1]
       [-0.1  0. ]]

    Differs from the paper:
      SPECTRA finds the soft cap by ten coupled Newton-Schulz steps, which are off by 28 % for a singular value 60 times
      the cap and by 95 % at 1000 times; and for vectors it goes from the identity to 0.71 c at a norm of c, where this
      is continuous.

    References:
      Jiang, Semenov, Stich, Enhancing LLM training via spectral clipping (SPECTRA), 2026, arXiv:2603.14315.
      Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; `optax.contrib.muon`.

    See also:
      `clip_by_spectral_norm`, which keeps the direction of the matrix.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(soft=soft, stacked=stacked)
    checks.bound("max_value", max_value)
    checks.flag("soft", soft)
    checks.one_of("units", units, stacks.UNITS)
    checks.axes(axes)
    vectors = norms.leaf_norm(stacked=stacked)

    def init(params: Any) -> State:
        del params
        return bounds.init(max_value)

    def update(updates: Updates, state: State, params: Any = None, **extra_args: Any) -> tuple[Updates, State]:
        del extra_args
        params = parameters(params, updates)
        filled = fill_missing(updates, params)
        leaves = Leaves(filled, params, axes)
        layers = stacks.layers(stacked, leaves)
        matrices = stacks.of_leaves(leaves, layers, units)
        # Vectors have norms, and matrices for the moment only as many zeros as there are of them.
        zeros = {i: _zeros(stack, leaves[i], layers[i]) for i, stack in matrices.items()}
        sizes = leaves.as_tree(stacks.with_vectors(leaves, layers, zeros))
        (cap,), state = bounds.resolve([max_value], state, sizes)
        caps = groups.over_groups(upper_end, sizes, cap)
        factors = groups.over_groups(_factor(soft), sizes, caps)
        clipped = [
            leaf.value if i in matrices or factor is None else scaling.rescale(leaf.value, factor)
            for i, (leaf, factor) in enumerate(zip(leaves, vectors.assign(leaves, factors), strict=True))
        ]
        for i, one in _capped(matrices, leaves.of_tree(caps), soft).items():
            clipped[i] = _as_leaf(one, jnp.asarray(leaves[i].value), layers[i], units)
        return drop_missing(updates, leaves.updated(clipped)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(stack: jax.Array, leaf: Leaf, layers: int) -> jax.Array:
    return jnp.zeros(jnp.shape(leaf.value)[:layers], dtypes.accumulator(stack.dtype))


def _factor(soft: bool) -> Callable[[jax.Array, jax.Array], scaling.Factor]:
    """What takes a norm, the only singular value of a vector, to what becomes of it."""

    def capped(norm: jax.Array, cap: jax.Array) -> jax.Array:
        low, high = jnp.minimum(norm, cap), jnp.maximum(norm, cap)
        if not soft:
            return low
        share = arithmetic.quotient(low, jnp.where(high > 0, high, jnp.ones_like(high)))
        return low / jnp.sqrt(1 + jnp.square(share))

    return lambda norm, cap: scaling.factor(norm, capped(norm, cap))


def _capped(matrices: dict[int, jax.Array], caps: list[Any], soft: bool) -> dict[int, capping.Capped]:
    """The stacks with capped singular values, by their place."""
    columns = {i: layouts.whole(caps[i]).reshape(-1) for i in matrices}
    return stacks.together(lambda stack, cap: capping.capped(stack, cap, soft), matrices, columns)


# At module level and jitted, so that eager calls do not compile anew.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _as_leaf(capped: capping.Capped, leaf: jax.Array, layers: int, units: str) -> jax.Array:
    # The leaf itself where it is kept: in float32 and back, subnormal numbers may become 0.
    kept = capped.kept.reshape(leaf.shape[:layers] + (1,) * (leaf.ndim - layers))
    kept = layouts.like(jnp.broadcast_to(kept, leaf.shape), leaf)
    matrices = arithmetic.narrowed(stacks.as_leaf(capped.matrices, leaf.shape, layers, units), leaf.dtype)
    return jnp.where(kept, leaf, layouts.like(matrices, leaf))
