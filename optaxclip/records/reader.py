"""Reads the records in an optimizer's state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import states
from optaxclip._arrays.trees import Tree
from optaxclip.records import moments, restored
from optaxclip.records.names import Names
from optaxclip.records.recorder import ClipStats, RecordedState, axes_from_bytes, excess, last_step


def clip_stats(
    opt_state: Tree,
    *,
    per_group: bool = False,
    history: bool | str = False,
    since: int | jax.Array = 0,
    numeric: bool = False,
) -> dict[str, Any]:
    """Reads what the clippers and skips in an optimizer's state did, as a flat dict ready to log.

    For a clipper that was built with `record=`:

    ========================  =========================================================================================
    `clip_steps`              steps so far
    `clip_norm`               norm in the last step
    `clip_limit`              bound in the last step, the upper end of the band: larger norms are clipped
    `clip_scale`              factor of the updates in the last step; 1 if they were not scaled
    `clip_norm_after`         norm in the last step after the clip
    `clipped_share`           share of all steps in which some group was scaled
    `recent_steps`            number of recorded steps after `since`
    `recent_clipped_share`    share of these in which some group was scaled
    `nonfinite_steps`         number of steps in which some norm was infinite or NaN
    `first_nonfinite_step`    first of these steps, counted from 1; 0 if there was none
    `first_nonfinite_leaves`  number of leaves that were not finite in that step
    `first_nonfinite_leaf`    path of the first of these leaves, in tree order; "" if there was none
    `first_nonfinite_report`  number and path in words, and where to look; "" if there was none
    `threshold_mean`          mean of the norms that the threshold has taken in, or of their logarithms if it compares
                              those; for `thresholds.zscore`, `thresholds.mean_std`, and methods built on them
    `threshold_std`           population standard deviation about that mean
    `norm_axes`               mesh axes that the norm was taken over, as in "data,model"; absent if there were none
    ========================  =========================================================================================

    With several groups, norm, limit, scale, mean and deviation are those of the group furthest outside its band.

    For `skip_nonfinite` and `skip_spikes`:

    =====================  ============================================================================================
    `skip_steps`           steps so far
    `skipped_steps`        number of skipped steps, the sum of the three reasons below
    `skipped_in_row`       number of steps skipped in a row, up to the last step
    `skipped_nonfinite`    steps skipped because a gradient or the loss was infinite or NaN
    `skipped_norm`         steps skipped because a norm was above its bound
    `skipped_loss`         steps skipped because the loss was above its bound, and no norm was
    =====================  ============================================================================================

    Args:
      opt_state: the state of any chain, partition, wrapper or nesting of these; also a copy on the host, or the dicts
        of a checkpoint that was restored without a template. With several clippers or several skips, the keys of each
        start with its place: "0/clip_norm", "decoder/clip_norm".
      per_group: whether to add norm, limit and scale of every group, as "clip_norm/<path of the group>".
      history: False (the default) for the last step. True returns steps, norm, limit and scale as NumPy arrays over the
        recorded steps, oldest first. "first_nonfinite" returns the steps up to the first non-finite one, and a few
        after it, however long ago it was. If there was none, it returns the last steps.
      since: a step, at least 0 (the default). `recent_clipped_share` counts only recorded steps after it: pass the
        `clip_steps` of your last log entry.
      numeric: whether to leave out strings, as for TensorBoard.

    Returns:
      A dict of Python numbers and strings; with `history`, also of arrays. In a jitted function, a dict of scalar
      arrays.

    Raises:
      ValueError: if an argument is out of range, if the state has no record, if `history` is requested in a jitted
        function, or if the states of several replicas are stacked.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=True), optax.adam(1e-3))
      >>> params = {"w": jnp.ones(2)}
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grads in ([0.3, 0.4], [3.0, 4.0]):
      ...     updates, state = update({"w": jnp.array(grads)}, state, params)
      >>> for name, value in optaxclip.clip_stats(state, numeric=True).items():
      ...     print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value!r}")
      clip_steps: 2
      clip_norm: 5.0
      clip_limit: 1.0
      clip_scale: 0.2
      clip_norm_after: 1.0
      clipped_share: 0.5
      recent_steps: 1
      recent_clipped_share: 1.0
      nonfinite_steps: 0
      first_nonfinite_step: 0
      first_nonfinite_leaves: 0

    Notes:
      - Logs: `wandb.log(clip_stats(state, numeric=True))`, or one `writer.scalar` per item.
      - Names: after a restore without a template, the names of leaves and groups are unknown, and their numbers are
        used, as in "#7". `migrate` restores the names, and so does the next step.

    See also:
      `ClipStats`, which is the record; `diagnostics.from_state`, for the norms as a history.

      Notebooks: `notebooks/quickstart.ipynb`, a clipped and recorded run in twenty lines; `notebooks/long_run.ipynb`,
        what led to a NaN; `notebooks/recipes.ipynb`, logs, loops, other libraries, checkpoints.
    """
    checks.flag("per_group", per_group)
    if not isinstance(history, bool) and not (type(history) is str and history == KEPT):
        raise ValueError(f"history must be True, False or {KEPT!r}, got {history!r}")
    if isinstance(since, jax.Array) and jnp.issubdtype(since.dtype, jnp.integer) and not isinstance(since, Tracer):
        since = int(since) if since.ndim == 0 else since  # `clip_steps` of a jitted function
    since = checks.whole("since", since, at_least=0)
    checks.flag("numeric", numeric)
    wanted = Wanted(per_group, history, since, numeric)
    found = {
        place + name: value
        for kind in _kinds()
        for place, record in _found(opt_state, kind).items()
        for name, value in summary(record, wanted).items()
    }
    if not found:
        raise _no_record(opt_state)
    return {name: value for name, value in found.items() if not (numeric and isinstance(value, str))}


KEPT = "first_nonfinite"  # a value of `history`


def _no_record(opt_state: Tree) -> ValueError:
    return ValueError(
        f"there is no record in this state, {states.described(opt_state)}: build the clipper with record=True, or "
        "record=100 for the last 100 steps. To record a run that has started, convert its state: "
        "state, report = optaxclip.migrate(tx, params, old_state)"
    )


class Recorded(NamedTuple):
    """The recorded steps of one clipper on the host, oldest first.

    Attributes:
      steps: int32 of shape (k,), counted from 1.
      norm: floats of shape (k, G), the norms.
      limit: floats of shape (k, G), the bounds; inf if there is none.
      scale: floats of shape (k, G), the factors of the groups.
      names: the paths of groups and leaves.
    """

    steps: np.ndarray
    norm: np.ndarray
    limit: np.ndarray
    scale: np.ndarray
    names: Names


def is_recorded(opt_state: Tree) -> bool:
    """Whether a state has a clipper's record."""
    return bool(_found(opt_state, RecordedState))


def recorded(opt_state: Tree, history: bool | str) -> dict[str, Recorded]:
    """Returns what each clipper in a state recorded, by its place: the `history` of `clip_stats` as arrays.

    Raises:
      ValueError: as `clip_stats`.
    """
    found = _found(opt_state, RecordedState)
    if not found:
        raise _no_record(opt_state)
    return {place.removesuffix("/"): _recorded(_stats(record), history) for place, record in found.items()}


def _recorded(stats: ClipStats, history: bool | str) -> Recorded:
    _require_concrete(stats)
    stats = jax.device_get(stats)
    return Recorded(*_rows(stats, np, history), stats.names)


class Wanted(NamedTuple):
    """The arguments of `clip_stats`."""

    per_group: bool
    history: bool | str
    since: int
    numeric: bool


@functools.singledispatch
def summary(record: Any, wanted: Wanted) -> dict[str, Any]:
    """Returns what `clip_stats` says of a record. Each type of record registers its own rule."""
    raise NotImplementedError(type(record))


def _kinds() -> list[type]:
    return [kind for kind in summary.registry if kind is not object]


def _found(opt_state: Tree, kind: type) -> dict[str, Any]:
    """Returns the records of one type, by the shortest key that distinguishes their places."""
    is_record = functools.partial(restored.is_of, kind)
    flat = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_record)
    records = [(path, restored.as_kind(kind, node)) for path, node in flat if is_record(node)]
    return dict(zip(_distinct([path for path, _ in records]), [record for _, record in records], strict=True))


def is_traced(stats: tuple[Any, ...]) -> bool:
    """Whether a record is seen inside a jitted function."""
    return any(isinstance(leaf, Tracer) for leaf in stats)


def require_one(steps: Any, ndim: int) -> None:
    """Raises ValueError if records of several replicas are stacked."""
    if steps.ndim != ndim:
        raise ValueError("the record has leading axes: pass one replica, jax.tree.map(lambda x: x[0], state)")


@summary.register
def _of_clips(state: RecordedState, wanted: Wanted) -> dict[str, Any]:
    stats = _stats(state)
    compared = moments.of_threshold(state.threshold_state)
    if wanted.history:
        _require_concrete(stats)
    if is_traced(stats):
        return _numbers(stats, compared, jnp, wanted)
    stats, compared = jax.device_get((stats, compared))
    with np.errstate(all="ignore"):  # a record may hold inf and NaN
        numbers = _numbers(stats, compared, np, wanted)
    return {name: _plain(value) for name, value in numbers.items()} | _texts(stats)


def _stats(state: RecordedState) -> ClipStats:
    stats = restored.unboxed(restored.as_kind(ClipStats, state.clip_stats))
    require_one(stats.clip_steps, 1)
    return stats


def _require_concrete(stats: ClipStats) -> None:
    if is_traced(stats):
        raise ValueError("history needs a concrete state: call clip_stats outside the jitted function")


def _numbers(stats: ClipStats, compared: tuple[Any, Any] | None, xp: Any, wanted: Wanted) -> dict[str, Any]:
    """Returns everything but the strings, by NumPy or by jax.numpy."""
    rows = _rows(stats, xp, wanted.history)
    by_group = {
        "clip_norm": rows.norm,
        "clip_limit": rows.limit,
        "clip_scale": rows.scale,
        "clip_norm_after": xp.where(rows.scale < 1, rows.limit, rows.norm * rows.scale),
    }
    furthest = _furthest(rows, xp)
    found = {name: xp.take_along_axis(each, furthest[..., None], axis=-1)[..., 0] for name, each in by_group.items()}
    if compared is not None and compared[0].size == rows.norm.shape[-1]:  # else of units, which are not recorded
        means = dict(zip(("threshold_mean", "threshold_std"), compared, strict=True))
        now = _furthest(_rows(stats, xp, history=False), xp)
        found |= {name: each[now] for name, each in means.items()}
        by_group |= means
    steps = rows.steps if wanted.history else stats.recorded_steps
    found = {"clip_steps": steps, **found, **_counts(stats, xp, wanted.since)}
    if wanted.per_group and stats.names.groups != ("",):  # a global norm has no path
        for number in range(rows.norm.shape[-1]):
            found |= {f"{name}/{stats.names.group(number)}": each[..., number] for name, each in by_group.items()}
    return found


class _Rows(NamedTuple):
    """Rows of a ring: one row, or several with the steps as leading axis."""

    steps: Any
    norm: Any
    limit: Any
    scale: Any


def _rows(stats: ClipStats, xp: Any, history: bool | str) -> _Rows:
    """Returns the rows of a ring, oldest first; or only the last row of the first ring.

    A ring that was restored into another length may have rows of older steps. They are ignored.
    """
    ring = "kept" if history == KEPT else "clip"
    steps, norm, limit, scale = (getattr(stats, f"{ring}_{name}") for name in _Rows._fields)
    last = last_step(xp, ring, len(steps), stats.recorded_steps, stats.first_nonfinite_step)
    is_recent = (steps > last - len(steps)) & (steps > 0)
    steps = xp.where(is_recent, steps, 0)
    order = xp.argsort(steps)
    at = order[steps[order] > 0] if history else order[-1]
    norm, scale = xp.where(is_recent[:, None], norm, 0), xp.where(is_recent[:, None], scale, 1)
    # Where nothing bounds, the record has the largest float.
    limit = xp.where(is_recent[:, None] & (limit < bounds.highest(limit.dtype)), limit, np.inf).astype(limit.dtype)
    return _Rows(steps[at], norm[at], limit[at], scale[at])


def _furthest(rows: _Rows, xp: Any) -> Any:
    """Returns the group that is furthest outside its band."""
    return xp.argmax(excess(xp, rows.norm, rows.limit, rows.scale), axis=-1)


def _counts(stats: ClipStats, xp: Any, since: int) -> dict[str, Any]:
    steps = stats.clip_steps
    is_asked = (steps > xp.maximum(since, stats.recorded_steps - len(steps))) & (steps > 0)
    clipped = xp.sum(is_asked & xp.any(stats.clip_scale != 1, axis=-1))
    asked = xp.sum(is_asked)
    return {
        "clipped_share": stats.clipped_steps / xp.maximum(stats.recorded_steps, 1),
        "recent_steps": asked,
        "recent_clipped_share": clipped / xp.maximum(asked, 1),
        "nonfinite_steps": stats.nonfinite_steps,
        "first_nonfinite_step": stats.first_nonfinite_step,
        "first_nonfinite_leaves": stats.first_nonfinite_leaves,
    }


def _texts(stats: ClipStats) -> dict[str, str]:
    """Returns the strings, which a jitted function can't return."""
    number = int(stats.first_nonfinite_leaf)
    leaf = stats.names.leaf(number) if number >= 0 else ""
    found = {"first_nonfinite_leaf": leaf, "first_nonfinite_report": _report(stats, leaf)}
    if axes := axes_from_bytes(stats.norm_axes):
        found["norm_axes"] = axes
    return found


def _report(stats: ClipStats, leaf: str) -> str:
    """Says how many leaves were not finite in the first such step, and where to look."""
    if not stats.first_nonfinite_step:
        return ""
    bad, number = int(stats.first_nonfinite_leaves), len(stats.names.leaves)
    share = f"{bad} of {number} leaves" if stats.names.are_known else f"{bad} of the leaves"
    if not bad:
        return f"{share}: the norm alone is not finite"
    if bad == number > 1:
        return f"{share}: look in the forward pass"
    return f"{share}, first in tree order {leaf}" if bad > 1 else f"{share}: {leaf}"


def _plain(value: Any) -> Any:
    """Returns a Python number for a scalar. An array stays unchanged."""
    return value if np.ndim(value) else value.item()


_WRAPPERS = ("inner_state", "inner_states", "inner_opt_state")  # fields of optax's wrappers


def _distinct(paths: list[tuple[Any, ...]]) -> list[str]:
    """Returns a short key that distinguishes each path, as in "0/" or "decoder/"; "" if there is only one."""
    if len(paths) < 2:
        return [""] * len(paths)
    names = [[jax.tree_util.keystr((key,), simple=True) for key in path] for path in paths]
    telling = [[name for name in path if name not in _WRAPPERS] for path in names]
    names = telling if len(set(map(tuple, telling))) == len(names) else names
    for end in (0, -1):  # drop what all paths start or end with
        while min(map(len, names)) > 1 and len({path[end] for path in names}) == 1:
            names = [path[1:] if end == 0 else path[:-1] for path in names]
    joined = ["/".join([*path, ""]) for path in names]
    # Keys that contain a "/" may make two of them equal. jax's own notation distinguishes them.
    return joined if len(set(joined)) == len(joined) else [jax.tree_util.keystr(path) + "/" for path in paths]
