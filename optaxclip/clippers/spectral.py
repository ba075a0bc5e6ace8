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
from optaxclip._arrays.parameters import beside, drop_missing
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, scaling
from optaxclip._numerics.matrices import capping, stacks
from optaxclip.core import Leaf, Leaves, State, Updates, clip_by, upper_end


def clip_by_spectral_norm(
    max_norm: Bound, *, units: str = "io", stacked: norms.Stacked = None, axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix so that its largest singular value is at most `max_norm`.

    .. math:: u_l \leftarrow u_l \cdot \min(1, c / \sigma_1(u_l))

    Args:
      max_norm: the bound c on each spectral norm, at least 0, in the units of the gradient: a number, an array, an
        optax schedule, or a prefix pytree of these for different bounds on different leaves.
      units: how a leaf of rank over 2 becomes a matrix. `"io"`: the last axis against all others (kernels [in, out] or
        HWIO, as in Flax). `"oi"`: the first axis against all others (kernels [out, in, ...], as in PyTorch and
        Equinox).
      stacked: how many of a leaf's leading axes run over independent matrices; see `clip_by_leaf_norm`.
      axes: which mesh axes split the leaves; see `clip_by`. Inside `shard_map`, every device needs whole matrices.
        Leaves that are split over their `stacked` axes need PartitionSpecs.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count; `record=` adds a record.

    Raises:
      ValueError: if `max_norm` is negative or NaN, `units` is unknown, or `stacked` exceeds a leaf's rank; at update,
        if `shard_map` splits a matrix over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_spectral_norm(2.0)
      >>> updates, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), tx.init(None))
      >>> print(updates)
      [[1.5 0. ]
       [0.  2. ]]

    Notes:
      - Guarantees: as for `clip_by`. Direction, rank and condition number of each matrix are kept. A matrix is returned
        unchanged if its norm is below the bound by more than its own error: rounding on CPUs, 1e-5 elsewhere. The 1e-5
        was computed with the matrix units of TPUs and GPUs emulated on a CPU, not measured on a device.
      - Edge cases: vectors and scalars (biases, gains) are clipped by their 2-norm, which is their only singular value.
      - Placement: before the optimizer. Or after the optimizer and before the learning rate: there it bounds how much a
        step changes the output of a layer. The norm that `clip_by_leaf_norm` measures is larger, by a factor of up to
        the root of the rank.
      - Differs from the paper: the paper divides the weights by their norm, whatever its size. It estimates the norm by
        one step of power iteration. The estimate never exceeds the true norm. Here updates are scaled, and only those
        beyond the bound.

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
    max_value: Bound, *, smooth: bool = False, units: str = "io", stacked: norms.Stacked = None, axes: Axes = "auto"
) -> optax.GradientTransformationExtraArgs:
    r"""Caps every singular value of each matrix at `max_value`, and keeps its singular vectors.

    .. math:: U S V^T \leftarrow U \min(S, c) V^T, \qquad smooth: U \frac{S}{\sqrt{1 + (S / c)^2}} V^T

    Args:
      max_value: the cap c, at least 0, in the units of the gradient: a number, an array, an optax schedule, or a prefix
        pytree of these.
      smooth: whether to use the smooth cap. It brings a singular value of c to 0.71 c.
      units: how a leaf of rank over 2 becomes a matrix. `"io"`: the last axis against all others (kernels [in, out] or
        HWIO, as in Flax). `"oi"`: the first axis against all others (kernels [out, in, ...], as in PyTorch and
        Equinox).
      stacked: how many of a leaf's leading axes run over independent matrices; see `clip_by_leaf_norm`.
      axes: which mesh axes split the leaves; see `clip_by`. Inside `shard_map`, every device needs whole matrices.
        Leaves that are split over their `stacked` axes need PartitionSpecs.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count.

    Raises:
      ValueError: if `max_value` is negative or NaN, `units` is unknown, or `stacked` exceeds a leaf's rank; at update,
        if `shard_map` splits a matrix over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_singular_values(2.0)
      >>> updates, _ = tx.update(jnp.array([[1.0, 0.0], [0.0, 5.0]]), tx.init(None))
      >>> print(updates.round(4))  # the 5 is capped, the 1 is not
      [[1. 0.]
       [0. 2.]]

      Muon brings all singular values to 1, also those of noise. This function caps the large ones and keeps the rest.
      The two agree, up to the factor c, only if the cap is far below all singular values:

      >>> tx = optaxclip.clip_singular_values(0.1)
      >>> updates, _ = tx.update(jnp.array([[0.0, 3.0], [-4.0, 0.0]]), tx.init(None))
      >>> print(updates.round(4) + 0.0)  # 0.1 times the orthogonal factor
      [[ 0.   0.1]
       [-0.1  0. ]]

    Notes:
      - Guarantees: in float32 the error is at most `1e-3 * c` plus 20 eps of the largest singular value, in the
        spectral norm. This holds for caps down to a thousandth of the largest singular value. For smaller caps the
        result stays finite, and its norm is at most the cap plus that error.
      - Within the cap: without `smooth=`, a matrix is returned unchanged if its singular values are below the cap by
        more than their error.
      - Derivatives: first derivatives are finite everywhere, also at equal or zero singular values. Second derivatives
        are finite where singular values are distinct and positive.
      - Accelerators: the accuracy on TPUs and GPUs was computed with their matrix units emulated on a CPU, not measured
        on a device.
      - Edge cases: vectors and scalars (biases, gains) have one singular value, their 2-norm, which the same formula
        caps. A matrix of zeros stays 0. A non-finite matrix is returned unchanged. A cap of 0 gives zeros; inf changes
        nothing.
      - Placement: before the optimizer, against spikes in a few singular directions: a norm clip would shrink all
        directions. Or after the optimizer and before the learning rate.
      - Cost on CPUs: one decomposition of each matrix beyond the cap. At 1024 x 1024 it takes 0.15 to 0.3 s on two
        cores.
      - Cost on accelerators: 92 matrix products in full precision, or 54 with `smooth=True`.
      - Compile time: 11 s of processor time for a 512 x 512 matrix on a TPU v5e (jax 0.10.2). Matrices of one shape, or
        its transpose, share one program.
      - Differs from the paper: SPECTRA computes the smooth cap by ten coupled Newton-Schulz steps. Their error is 28 %
        for a singular value of 60 times the cap, and 95 % at 1000 times. For vectors, SPECTRA jumps from the identity
        to 0.71 c at a norm of c. This function is continuous.

    References:
      Jiang, Semenov, Stich, Enhancing LLM training via spectral clipping (SPECTRA), 2026, arXiv:2603.14315.
      Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; `optax.contrib.muon`.

    See also:
      `clip_by_spectral_norm`, which keeps the direction of the matrix.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(smooth=smooth, stacked=stacked)
    checks.bound("max_value", max_value)
    checks.flag("smooth", smooth)
    checks.one_of("units", units, stacks.UNITS)
    checks.axes(axes)
    vectors = norms.leaf_norm(stacked=stacked)

    def init(params: Tree) -> State:
        del params
        return bounds.init(max_value)

    def update(updates: Updates, state: State, params: Tree = None, **extra_args: Any) -> tuple[Updates, State]:
        del extra_args
        filled, params = beside(updates, params)
        leaves = Leaves(filled, params, axes)
        layers = stacks.layers(stacked, leaves)
        matrices = stacks.of_leaves(leaves, layers, units)
        # Only vectors need their norms here. Matrices get one zero each, for the shape.
        zeros = {i: _zeros(stack, leaves[i], layers[i]) for i, stack in matrices.items()}
        sizes = leaves.to_tree(stacks.with_vectors(leaves, layers, zeros))
        (cap,), state = bounds.resolve([max_value], state, sizes)
        caps = groups.over_groups(upper_end, sizes, cap)
        factors = groups.over_groups(_factor(smooth), sizes, caps)
        clipped = [
            leaf.value if i in matrices or factor is None else scaling.rescale(leaf.value, factor)
            for i, (leaf, factor) in enumerate(zip(leaves, vectors.assign(leaves, factors), strict=True))
        ]
        for i, one in _capped(matrices, leaves.from_tree(caps), smooth).items():
            clipped[i] = _as_leaf(one, jnp.asarray(leaves[i].value), layers[i], units)
        return drop_missing(updates, leaves.updated(clipped)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(stack: jax.Array, leaf: Leaf, layers: int) -> jax.Array:
    return jnp.zeros(jnp.shape(leaf.value)[:layers], dtypes.accumulator(stack.dtype))


def _factor(smooth: bool) -> Callable[[jax.Array, jax.Array], scaling.Factor]:
    """The factor from the norm of a vector, its only singular value, to the capped norm."""

    def capped(norm: jax.Array, cap: jax.Array) -> jax.Array:
        low, high = jnp.minimum(norm, cap), jnp.maximum(norm, cap)
        if not smooth:
            return low
        share = arithmetic.quotient(low, jnp.where(high > 0, high, jnp.ones_like(high)))
        return low / jnp.sqrt(1 + jnp.square(share))

    return lambda norm, cap: scaling.factor(norm, capped(norm, cap))


def _capped(matrices: dict[int, jax.Array], caps: list[Any], smooth: bool) -> dict[int, capping.Capped]:
    """The stacks with capped singular values, by the index of their leaf."""
    columns = {i: layouts.whole(caps[i]).reshape(-1) for i in matrices}
    return stacks.together(lambda stack, cap: capping.capped(stack, cap, smooth), matrices, columns)


# At module level and jitted, so that eager calls do not recompile.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _as_leaf(capped: capping.Capped, leaf: jax.Array, layers: int, units: str) -> jax.Array:
    # A kept leaf is returned itself: on the way to float32 and back, subnormal numbers may become 0.
    kept = capped.kept.reshape(leaf.shape[:layers] + (1,) * (leaf.ndim - layers))
    kept = layouts.like(jnp.broadcast_to(kept, leaf.shape), leaf)
    matrices = arithmetic.narrowed(stacks.as_leaf(capped.matrices, leaf.shape, layers, units), leaf.dtype)
    return jnp.where(kept, leaf, layouts.like(matrices, leaf))
