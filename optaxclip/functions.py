"""Without an optimizer: the norm of a pytree, a clip of a pytree, and a transformation as a function."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from optaxclip import core, norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arrays import mesh, told
from optaxclip._arrays.leaves import Leaves
from optaxclip._arrays.parameters import beside, drop_missing
from optaxclip._arrays.trees import Tree
from optaxclip.core import Bound, Clip, MadeOf, Norm, Norms, Threshold, Updates


def global_norm(tree: Tree, *, ord: float = 2, include: norms.Included = None, axes: mesh.Axes = "auto") -> jax.Array:
    r"""Measures the global norm of a pytree, correct over the whole float range and on every mesh.

    .. math:: \|x\|_p = \Bigl(\sum_{\mathrm{leaves}} \sum_i |x_i|^p\Bigr)^{1/p}

    Args:
      tree: pytree of arrays of any shapes and dtypes. Complex entries count by modulus. Integer, boolean, float0 and
        key leaves do not count.
      ord: p, at least 1, or inf for the largest modulus.
      include: which leaves count: a prefix pytree of booleans, or a function from a leaf's path to a boolean. None
        counts all leaves.
      axes: which mesh axes split the leaves, inside `shard_map` and `pmap`. `"auto"` reads them from the types; it
        needs `check_vma=True`. Otherwise a name, a tuple of names, a prefix pytree of PartitionSpec, or None to measure
        this device's piece alone.

    Returns:
      A scalar: float32, or float64 if a leaf is float64. An empty tree gives 0. An infinite or NaN entry gives inf or
      NaN. A norm beyond the largest float is returned as the largest float.

    Raises:
      ValueError: if `ord` is below 1 or NaN, or `include` includes no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> print(optaxclip.global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
      >>> print(optaxclip.global_norm(jnp.array([3e30, 4e30])))  # a plain sum of squares is inf here
      5e+30

    See also:
      `norms.global_norm`, the same for `clip_by`; `clip_tree`, which also clips; `clip_stats`, for the norms that a
      clipper has measured.

      Notebook: `notebooks/scaling_out.ipynb`, on several devices.
    """
    checks.axes(axes)
    return norms.global_norm(ord, include=include).measure(Leaves(tree, axes=axes))


_ALL = norms.global_norm()


def clip_tree(
    tree: Tree,
    max_norm: Bound | optax.GradientTransformation,
    *,
    norm: Norm = _ALL,
    known_norm: Norms | None = None,
    params: Tree = None,
    axes: mesh.Axes = "auto",
) -> tuple[Tree, Norms]:
    r"""Clips a pytree and returns its norm before the clip, without an optimizer.

    .. math:: u_G \leftarrow u_G \cdot \min(1, c / n_G)

    Args:
      tree: pytree of arrays of any shapes and dtypes. Leaves without floats are returned unchanged.
      max_norm: the bound c, at least 0: a number, an array, or a prefix pytree of these if the norm has several groups.
        Or a stateless clip built on `clip_by`, such as `clip_by_leaf_norm(1.0)`; then leave out `norm` and `axes`.
      norm: what to measure, from `optaxclip.norms`.
      known_norm: the norm, if you already have it; it is not measured again. It must have the structure of what `norm`
        measures.
      params: the parameters, for bounds relative to them.
      axes: which mesh axes split the leaves; see `clip_by`.

    Returns:
      The clipped pytree, and the norm before the clip: a scalar, or a pytree with one norm per group.

    Raises:
      ValueError: if an argument is of the wrong kind; if the clip has state, which a function can't keep; if
        `known_norm` is not a real scalar, or differs between the devices of a `shard_map`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_tree, norms
      >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.6, 0.8])}
      >>> clipped, norm = clip_tree(grads, 1.0, norm=norms.leaf_norm())
      >>> print(clipped["a"], clipped["b"], norm["a"], norm["b"])
      [0.6 0.8] [0.6 0.8] 5.0 1.0
      >>> clipped, norm = clip_tree(grads, 1.0, known_norm=10.0)  # another device has the rest
      >>> print(clipped["a"], norm)
      [0.3 0.4] 10.0

    Notes:
      - Guarantees: as for `clip_by`. Below the bound, the tree is returned unchanged. A tree with an infinite or NaN
        norm is returned unchanged too, so check the norm.

    See also:
      `clip_by_global_norm`, the same in an optax chain; `global_norm`, the norm alone; `norms.known`, a known norm in a
      chain.

      Notebooks: `notebooks/recipes.ipynb`, logs, loops, other libraries, checkpoints; `notebooks/programs.ipynb`, in
      the training loop of PPO.
    """
    made = _made_of(max_norm, norm, axes)
    filled, params = beside(tree, params)
    leaves = Leaves(filled, params, made.axes, told={})
    shapes = core.shapes_of(made.norm, filled, made.axes)
    is_clip = isinstance(max_norm, optax.GradientTransformation)
    state = empty_state("clip_tree", max_norm, filled) if is_clip else made.threshold.init(shapes)
    if jax.tree.leaves(state):
        raise ValueError("max_norm of clip_tree must be a number or an array, got a schedule: pass schedule(step)")
    measured = made.norm.measure(leaves) if known_norm is None else _told(known_norm, shapes)
    judged = core.permit(made.threshold, measured, state, lambda: made.norm.measure(leaves.params()))
    clipped = core.apply(made.norm, leaves, judged.factors)
    return clipped if filled is tree else drop_missing(tree, clipped), measured


def _made_of(max_norm: Any, norm: Norm, axes: mesh.Axes) -> MadeOf:
    if isinstance(max_norm, Threshold):
        raise ValueError("max_norm must be a bound or a clip, got a Threshold: pass clip_by(norm, threshold)")
    if not isinstance(max_norm, optax.GradientTransformation):
        checks.instance("norm", norm, Norm, "norms.global_norm()")
        checks.axes(axes)
        return MadeOf(norm, thresholds.constant(max_norm), axes)
    if not isinstance(max_norm, Clip) or max_norm.made_of is None:
        raise ValueError(
            "max_norm must be a bound or a clip, got a transformation that is not built on clip_by: pass a clip, "
            "such as clip_by_leaf_norm(1.0)"
        )
    if norm is not _ALL or axes != "auto":
        raise ValueError("max_norm is a clip, which has its own norm and axes: leave out norm= and axes=")
    return max_norm.made_of


def _told(known_norm: Any, shapes: Any) -> Any:
    """Known norms, in the structure of the norms that would be measured."""
    flat, treedef = jax.tree.flatten(shapes)
    given = jax.tree.leaves(known_norm)
    if any(each.shape for each in flat):
        raise ValueError("known_norm takes one number per group, but this norm measures arrays: leave it out")
    if jax.tree.structure(known_norm) != treedef:
        raise ValueError(
            f"known_norm must be a scalar for each group, in the structure {treedef}, got "
            f"{jax.tree.structure(known_norm)}"
        )
    return treedef.unflatten([told.scalar("known_norm", each, "norm") for each in given])


def as_function(tx: optax.GradientTransformation, params: Tree = None) -> Callable[[Updates], Updates]:
    """Turns a stateless transformation into a function of the gradients alone.

    Use it where a plain function is expected: as `pre_clipping_transform` of jax-privacy's `clipped_grad`, or in
    `jax.vmap` over examples.

    Args:
      tx: a transformation without state, or a chain of these.
      params: the parameters, for transformations that need them.

    Returns:
      A function `gradients -> updates`.

    Raises:
      ValueError: if `tx` is not a transformation; when called, if it has state, which a function can't keep.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> clip = optaxclip.as_function(optaxclip.clip_by_global_norm(1.0))
      >>> print(jax.vmap(clip)(jnp.array([[3.0, 4.0], [0.3, 0.4]])))  # each row alone
      [[0.6 0.8]
       [0.3 0.4]]

    See also:
      `clip_by` with `axes=None`, if the examples are spread over devices.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, clipping each example.
    """
    checks.transformation("tx", tx)
    return stateless("as_function", tx, params)


_FORGOTTEN = "which a function would reset at every call: call its update yourself"


def stateless(
    caller: str, tx: optax.GradientTransformation, params: Tree, advice: str = _FORGOTTEN
) -> Callable[[Updates], Updates]:
    """As `as_function`. The error for a state names `caller` and ends with `advice`."""

    def apply(updates: Updates) -> Updates:
        state = empty_state(caller, tx, updates if params is None else params, advice)
        updates, _ = tx.update(updates, state, params)
        return updates

    return apply


def empty_state(
    caller: str, tx: optax.GradientTransformation, params: Tree, advice: str = _FORGOTTEN
) -> optax.OptState:
    """The state of a transformation that must be stateless.

    Raises:
      ValueError: if the state holds arrays. The message names `caller` and ends with `advice`.
    """
    state = tx.init(params)
    if kept := jax.tree.leaves(state):
        raise ValueError(
            f"{caller} needs a transformation without state, and this one keeps {len(kept)} arrays "
            f"({type(state).__name__}), {advice}"
        )
    return state
