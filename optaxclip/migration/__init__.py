"""Converts the state of one transformation for another."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import callers, trees
from optaxclip._arrays.trees import Tree
from optaxclip.migration.carrying import fresh
from optaxclip.migration.matching import matches
from optaxclip.migration.parts import Part, Parts, Place, is_per_parameter, shapes
from optaxclip.migration.report import Report, reported, shown

__all__ = ["Migrated", "Report", "migrate"]


class Migrated(NamedTuple):
    """What `migrate` returns.

    Attributes:
      state: a state of the new transformation.
      report: what was kept, what is new, and what was dropped. Print it.
    """

    state: Any
    report: Report


def migrate(tx: optax.GradientTransformation, params: Tree, old_state: Tree) -> Migrated:
    """Converts the state of a running optimizer for a new transformation, and keeps everything that fits.

    Use it to add a clip, a skip or a record to a run with a checkpoint, or to change a threshold or a length. The
    moments and counts of the optimizer continue, and so do the statistics of the clips.

    Args:
      tx: the new transformation.
      params: the current parameters.
      old_state: the state of the old transformation. It may hold NumPy arrays, come from a pickle, or be the nested
        dicts and lists of a checkpoint that was restored without a template (orbax, Flax's msgpack).

    Returns:
      `(state, report)`. The state is a state of `tx`, in new arrays. The report has the paths of what was kept, of what
      is new and of what was dropped; `print(report)` lists them.

    Raises:
      ValueError: if `tx` is not a transformation, or if `old_state` holds no arrays but something else, such as a path.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> params = {"w": jnp.ones(2)}
      >>> old = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
      >>> _, old_state = old.update({"w": jnp.array([3.0, 4.0])}, old.init(params), params)
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=10), optax.adam(1e-3))
      >>> state, report = optaxclip.migrate(tx, params, old_state)
      >>> print(report)
      kept:
        1/0: ScaleByAdamState
      new:
        0/clip_stats: ClipStats
      dropped: nothing
      >>> print(state[1][0].mu["w"])  # a tenth of the clipped gradient
      [0.06 0.08]

    Notes:
      - Matching: parts of the same type are matched in their order, in any nesting of chains, partitions, masks and
        wrappers. If several fit, a part with the same keys comes first, then a part that can stay unchanged. A
        checkpoint without types knows parts by their fields only, so it can't tell Adam from AdaBelief.
      - Dropped: there is a `UserWarning` in two cases: something per parameter, such as Adam's moments, is dropped for
        a parameter that still exists; or the state has more than clips, and nothing of it is kept.
      - Replicas: if the state has a leading axis for devices, pass one replica: `jax.tree.map(lambda x: x[0], state)`.
      - Parameters: arrays per parameter, such as moments, are matched by path and shape. A new parameter starts without
        moments, but with Adam's old count. With the default decays, its first updates are then up to 6.6 times those of
        a new run.
      - Statistics: they are kept even if they measured something else. If you change the norm, or the unit of a
        threshold, while the type stays the same, take the threshold's state from `tx.init(params)`. Statistics start
        again if a threshold moves to the other side of the optimizer, if the number of groups changes, or if `scale`
        changes. If you put a clip in front of one of the same type, the new one takes over the statistics, because the
        place in the chain decides.
      - Windows: a shorter window keeps the newest norms, a longer one keeps all.
      - Injected hyperparameters: the values of the old state are kept, as in any restored checkpoint, because they may
        have changed during the run. The report shows where the values of `tx` differ. To use those, set
        `state.hyperparams`. If a hyperparameter has a schedule in only one of the two transformations, it is taken from
        `tx`.
      - Schedules: a new schedule starts at step 0.
      - Flax NNX: build an `nnx.Optimizer` with `tx`, then set `optimizer.opt_state = nnx.data(to_opt_state(state))`,
        with `to_opt_state` from `flax.nnx.training.optimizer`.
      - Memory: the old state, the new state and the state from `init` exist at the same time. If the device has no room
        for them, pass NumPy arrays, `jax.device_get(old_state)`.

    See also:
      `clip_stats`, which reads a state.

      Notebooks: `notebooks/long_run.ipynb`, a run that continues after a NaN; `notebooks/recipes.ipynb`, checkpoints.
    """
    checks.transformation("tx", tx)
    _require_arrays(old_state)
    initial = tx.init(params)
    known = shapes(params)
    new = Parts(initial, params)
    old = Parts(old_state, params, like=new)
    found = matches(new.parts, old.parts, lambda part: any(is_per_parameter(place, known) for place in part.places))
    values = {(match.new, path): one.value for match in found for path, one in match.kept.items()}
    used = {(match.old, path) for match in found for path in match.kept}
    leaves = [fresh(values[place[:2]], place.leaf) if place[:2] in values else place.leaf for place in new.places]
    dropped = [place for place in old.places if place[:2] not in used and is_per_parameter(place, known)]
    if dropped:
        _warn_of_dropped(dropped)
    elif new.places and not found and any(map(_may_be_missed, old.parts)):
        _warn(
            "nothing of the old state fits the new transformation, so all of its state is new. Pass the state of an "
            "optimizer of this model; of stacked replicas pass one: jax.tree.map(lambda x: x[0], old_state)"
        )
    return Migrated(jax.tree.unflatten(jax.tree.structure(initial), leaves), reported(new.places, old.places, found))


def _require_arrays(old_state: Tree) -> None:
    leaves = jax.tree.leaves(old_state)
    if leaves and not any(
        isinstance(leaf, np.ndarray | np.generic | jax.Array | bool | int | float) for leaf in leaves
    ):
        raise ValueError(f"old_state must be a state with arrays in it, got one of {type(leaves[0]).__name__}")


def _may_be_missed(part: Part) -> bool:
    """Whether a part belongs to another library. The state of a clip may be dropped without a warning."""
    return not type(part.node).__module__.startswith("optaxclip.")


def _warn_of_dropped(places: Sequence[Place]) -> None:
    """Warns if something was dropped that parameters still need."""
    paths = [shown(place.path) for place in places]
    _warn(
        "the new transformation has no place for what the old state keeps per parameter, and drops it: "
        f"{trees.listed(paths)}. To keep it, use the same optimizer in tx as before"
    )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=callers.steps_up())
