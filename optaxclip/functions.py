"""What is done to a tree in hand, without an optimizer: its norm, and a transformation as a function."""

from collections.abc import Callable

import jax
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import mesh
from optaxclip._arrays.leaves import Leaves
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import tree_norms
from optaxclip.core import Updates


def global_norm(tree: Tree, *, ord: float = 2, axes: mesh.Axes = "auto") -> jax.Array:
    r"""Measures the norm of all leaves of a pytree together, over the whole float range and on every mesh.

    .. math:: \|x\|_p = \Bigl(\sum_{\mathrm{leaves}} \sum_i |x_i|^p\Bigr)^{1/p}

    Args:
      tree: pytree of arrays of any shapes and dtypes. Complex entries count by modulus. Integer, boolean, float0 and
        PRNG-key leaves are not counted.
      ord: p, a number of at least 1, or inf for the largest modulus.
      axes: which mesh axes split the leaves, in `shard_map` and `pmap`. `"auto"` reads them from the types
        (`check_vma=True`). Otherwise a name, a tuple of names, a prefix pytree of PartitionSpec, or None for this
        device's share alone.

    Returns:
      A scalar: float32, or float64 if a leaf is. 0 for an empty tree; inf or NaN where an entry is. A norm past the
      largest float is the largest float.

    Raises:
      ValueError: if `ord` is below 1 or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> print(optaxclip.global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
      >>> print(optaxclip.global_norm(jnp.array([3e30, 4e30])))  # a plain sum of squares is inf here
      5e+30

    See also:
      `norms.global_norm`, the same for `clip_by` to measure; `clip_stats`, for the norms that a clipper has measured.

      Notebook: `notebooks/scaling_out.ipynb`, on several devices.
    """
    p = checks.order("ord", ord)
    checks.axes(axes)
    return tree_norms.of_all(Leaves(tree, axes=axes), p)


def as_function(tx: optax.GradientTransformation, params: Tree = None) -> Callable[[Updates], Updates]:
    """Turns a stateless transformation into a function of the gradients alone.

    Use it where optax is unknown: as `pre_clipping_transform` of jax-privacy's `clipped_grad`, or in `jax.vmap` over
    examples.

    Args:
      tx: a transformation without state, or a chain of these.
      params: the parameters, for transformations that need them.

    Returns:
      A function `gradients -> updates`.

    Raises:
      ValueError: if `tx` is no transformation; when called, if it has a state, which a function would forget.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> clip = optaxclip.as_function(optaxclip.clip_by_global_norm(1.0))
      >>> print(jax.vmap(clip)(jnp.array([[3.0, 4.0], [0.3, 0.4]])))  # each row by itself
      [[0.6 0.8]
       [0.3 0.4]]

    See also:
      `clip_by` with `axes=None`, for examples that are spread over devices.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, clipping each example.
    """
    checks.transformation("tx", tx)
    return stateless("as_function", tx, params)


_FORGOTTEN = "which every call would start anew: call its update yourself"


def stateless(
    caller: str, tx: optax.GradientTransformation, params: Tree, advice: str = _FORGOTTEN
) -> Callable[[Updates], Updates]:
    """As `as_function`, for `caller`; `advice` is how the message goes on where there is a state."""

    def apply(updates: Updates) -> Updates:
        state = empty_state(caller, tx, updates if params is None else params, advice)
        updates, _ = tx.update(updates, state, params)
        return updates

    return apply


def empty_state(
    caller: str, tx: optax.GradientTransformation, params: Tree, advice: str = _FORGOTTEN
) -> optax.OptState:
    """The state of a transformation that must have none.

    Raises:
      ValueError: in the name of `caller` and with `advice`, if there are arrays in it.
    """
    state = tx.init(params)
    if kept := jax.tree.leaves(state):
        raise ValueError(
            f"{caller} needs a transformation without state, and this one keeps {len(kept)} arrays "
            f"({type(state).__name__}), {advice}"
        )
    return state
