"""One row for every public transformation: how it is built, what it bounds, and what it promises.

The tests run over these rows, so a new method is tested by writing its row. What a method needs or cannot do is a
field of its row, never an `if` in a test.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc
from optaxclip import contrib
from tests.reference import fixed

DTYPES = ("float32", "bfloat16", "float16", "complex64")
TWO = DTYPES[:2]  # for rows that differ from others only in what no dtype changes


def _floats_of_jax() -> list[np.dtype[Any]]:
    """Every float dtype narrower than 16 bits that this jax names."""
    kinds = [jnp.dtype(name) for name in dir(jnp) if re.fullmatch(r"b?float\d+(_\w+)?", name)]
    return [kind for kind in kinds if jnp.finfo(kind).bits < 16]


def _can_be_clipped(dtype: np.dtype[Any]) -> bool:
    """Whether a float dtype has 0 and -1, and XLA converts it: 6 bits crash it (jax 0.12)."""
    return jnp.finfo(dtype).bits != 6 and list(np.asarray([0.0, -1.0]).astype(dtype).astype(float)) == [0, -1]


# Computed, so that the dtypes of a newer jax join by themselves.
NARROW = tuple(dtype for dtype in _floats_of_jax() if _can_be_clipped(dtype))
REFUSED = tuple(dtype for dtype in _floats_of_jax() if not _can_be_clipped(dtype))

Leaves = dict[str, np.ndarray]
Band = tuple[float, float]


# The tree on which the rows are tested.


def numbers(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Numbers of modulus between `scale / 2` and `2 * scale`, of either sign or of any phase."""
    rng = np.random.default_rng(seed)
    size = scale * rng.uniform(0.5, 2.0, shape)
    if dtype == "complex64":
        return jax.device_put((size * np.exp(2j * np.pi * rng.uniform(size=shape))).astype(dtype))
    return jax.device_put((size * rng.choice([-1.0, 1.0], shape)).astype(jnp.dtype(dtype)))


def tree(seed: int, dtype: str, scale: float = 1.0) -> dict[str, Any]:
    return {
        "dense": {"kernel": numbers(seed, (4, 3), dtype, scale), "bias": numbers(seed + 1, (3,), dtype, scale)},
        "scale": numbers(seed + 2, (), dtype, scale),
    }


def params(dtype: str) -> dict[str, Any]:
    return tree(100, dtype)


def by_path(tree: Any) -> Leaves:
    """The leaves as float64 or complex128, by "a/b/0" paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): fixed.wide(leaf) for path, leaf in leaves}


# How a method divides the coordinates of a tree into groups, each with a norm of its own: name -> the group's numbers.


def together(leaves: Leaves) -> Leaves:
    return {"all": np.concatenate([np.ravel(leaf) for leaf in leaves.values()])}


def per_leaf(leaves: Leaves) -> Leaves:
    return {path: np.ravel(leaf) for path, leaf in leaves.items()}


def whole(leaves: Leaves) -> Leaves:
    """Each leaf, in its shape: a matrix, or a vector of at least one number."""
    return {path: np.atleast_1d(leaf) for path, leaf in leaves.items()}


def per_label(label: Callable[[str], str]) -> Callable[[Leaves], Leaves]:
    def split(leaves: Leaves) -> Leaves:
        labels = {label(path) for path in leaves}
        return {one: together({p: x for p, x in leaves.items() if label(p) == one})["all"] for one in labels}

    return split


def per_unit(units: str, stacked: Callable[[str], int] = lambda _: 0) -> Callable[[Leaves], Leaves]:
    def split(leaves: Leaves) -> Leaves:
        groups = {}
        for path, leaf in leaves.items():
            first = leaf.shape[: stacked(path)]
            for index in np.ndindex(*first):
                layer = leaf[index]
                axes = fixed.unit_axes(layer.shape, units)
                rows = np.moveaxis(layer, axes, range(-len(axes), 0)) if axes else layer
                kept = layer.ndim - len(axes)
                for unit in np.ndindex(*rows.shape[:kept]):
                    groups[f"{path}{[*index, *unit]}"] = np.ravel(rows[unit])
        return groups

    return split


def per_coordinate(leaves: Leaves) -> Leaves:
    return {f"{path}{list(i)}": np.ravel(leaf[i]) for path, leaf in leaves.items() for i in np.ndindex(*leaf.shape)}


# What is measured of a group of updates u with parameters w.


def norm(ord: float = 2) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda u, _: fixed.vector_norm(u, ord)


def spectral(u: np.ndarray, _: np.ndarray) -> float:
    return float(np.linalg.norm(u, 2)) if np.all(np.isfinite(u)) else np.inf


def rms(u: np.ndarray, _: np.ndarray) -> float:
    return fixed.vector_norm(u) / np.sqrt(u.size)


def change(relative: float, absolute: float) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda u, w: fixed.relative_change(u, w, relative, absolute)


# The band in which the norm of a group must lie, from the group's name and its parameters.


def within(low: float, high: float) -> Callable[[str, np.ndarray], Band]:
    return lambda _name, _w: (low, high)


def at_most(high: float) -> Callable[[str, np.ndarray], Band]:
    return within(0.0, high)


def at_most_each(highs: Mapping[str, float]) -> Callable[[str, np.ndarray], Band]:
    """The bound of the first entry that the group's name starts with."""
    return lambda name, _: next((0.0, high) for start, high in highs.items() if name.startswith(start))


def at_most_part_of_w(ratio: float, floor: float = 0.0, offset: float = 0.0) -> Callable[[str, np.ndarray], Band]:
    return lambda _, w: (0.0, ratio * max(fixed.vector_norm(w), floor) + offset)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A transformation and what it promises.

    Attributes:
      name: the test id.
      public: the name in `optaxclip.__all__` that the row stands for.
      factory: called with `args` and `kwargs`, it builds the transformation.
      groups: how the coordinates are divided into groups.
      measure: the norm of one group.
      band: where that norm lies after the first step.
      needs_params: whether `update` needs the parameters.
      first_passes: the first step is never clipped, so that no bound can be tested after one.
      static_args: the arguments that `optax.inject_hyperparams` must not inject: functions of a path, and what the
        error without them names.
      direction_preserving: each group is multiplied by a positive number.
      sums: coordinates are sums of others, so that one near 0 has their rounding.
      idempotent: a second application changes nothing more.
      elementwise: bounds values and not norms, so that inf is clipped and NaN is not contagious.
      zeroes: what comes out as zeros where a coordinate is not finite: "step", "coordinate", or nothing.
      stateless: the state is `optax.EmptyState()`.
      any_tree: works for trees of every structure; no bound or label is tied to the tree of this file.
      inside: gradients of this scale lie inside every band and pass unchanged; None where nothing passes unchanged.
      untouched: paths of leaves that are neither counted nor changed.
      param_state: the fields of the state that have an entry per parameter.
      bounds_weights: what it bounds is the weights after the step: nothing can be asked of the updates alone.
      counts_entries: a leaf of zeros changes the norm of its group, and so does a missing gradient.
      takes_zero: a zero gradient changes the statistics.
      combines: a norm, a threshold, a schedule or a record that other rows have: what optax does around it, leaves of
        other kinds and what differs without jit are tested of those.
      dtypes: which dtypes the method is for.
    """

    name: str
    public: str
    factory: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Callable[[Leaves], Leaves]
    measure: Callable[[np.ndarray, np.ndarray], float] = dataclasses.field(default_factory=norm)
    band: Callable[[str, np.ndarray], Band]
    needs_params: bool = False
    first_passes: bool = False
    static_args: tuple[str, ...] = ()
    direction_preserving: bool = True
    sums: bool = False
    idempotent: bool = True
    elementwise: bool = False
    zeroes: str = ""
    stateless: bool = True
    any_tree: bool = True
    inside: float | None = 1e-3
    untouched: tuple[str, ...] = ()
    param_state: tuple[str, ...] = ()
    bounds_weights: bool = False
    counts_entries: bool = False
    takes_zero: bool = False
    combines: bool = False
    dtypes: tuple[str, ...] = DTYPES

    def make(self) -> Any:
        return self.factory(*self.args, **self.kwargs)

    def split(self, tree: Any) -> Leaves:
        """The groups of `tree`, by name."""
        leaves = {path: leaf for path, leaf in by_path(tree).items() if path not in self.untouched}
        return self.groups(leaves)

    def measured(self, updates: Any, params: Any) -> dict[str, tuple[float, float, float]]:
        """Of each group: its norm, and the band in which that has to lie."""
        weights = self.split(params)
        return {name: (self.measure(u, weights[name]), *self.band(name, weights[name]))
                for name, u in self.split(updates).items()}  # fmt: skip


# Arguments for the rows. Labels and the like are given once as a function of the path and once as a prefix pytree.

BOUNDS = {"dense": 0.5, "scale": 0.1}


def halving(count: jax.Array) -> jax.Array:
    """A schedule: 1, 1/2, 1/3, ..."""
    return 1.0 / (1.0 + jnp.asarray(count, jnp.float32))


def top(path: str) -> str:
    return path.split("/", maxsplit=1)[0]


def kernels(path: str) -> int:
    """The first axis of a kernel indexes layers."""
    return int(path.endswith("kernel"))


def told_its_norm(max_norm: Any, record: int = 0) -> optax.GradientTransformationExtraArgs:
    """A clip by a norm that it is told, with its caller: who measures it."""
    tx = oc.clip_by(oc.norms.known("grad_norm"), oc.thresholds.constant(max_norm), record=record)
    measured = oc.global_norm  # as it is now: tests of meshes give it axes while a row is made

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of `init` are enough
            return tx.update(updates, state, params, grad_norm=measured(updates), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def told_its_logits(max_logit: Any) -> optax.GradientTransformationExtraArgs:
    """`qk_clip` of a kernel with three heads, with its caller: who measures their logits."""
    query = contrib.Projection("query", axis=1)

    def is_query(path: str) -> bool:
        return "kernel" in path or "dense/float" in path  # those of narrow floats are named by their dtypes

    tx = contrib.qk_clip(max_logit, projections=lambda path: query if is_query(path) else None, alpha=1.0)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        heads = [leaf.shape[1] for path, (_, leaf) in zip(paths, leaves, strict=True) if is_query(path)]
        return tx.update(updates, state, params, max_logits=jnp.full(heads[0], 400.0) if heads else None, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


ROWS = (
    # The names of optax.
    Row(
        name="clip",
        public="clip",
        factory=oc.clip,
        args=(1.0,),
        groups=per_coordinate,
        band=at_most(1.0),
        direction_preserving=False,
        elementwise=True,
    ),
    Row(
        name="clip_by_global_norm",
        public="clip_by_global_norm",
        factory=oc.clip_by_global_norm,
        args=(1.0,),
        groups=together,
        band=at_most(1.0),
    ),
    Row(
        name="clip_by_global_norm-p1",
        public="clip_by_global_norm",
        factory=oc.clip_by_global_norm,
        args=(1.0,),
        kwargs={"ord": 1},
        static_args=("ord", "record"),
        groups=together,
        measure=norm(1),
        band=at_most(1.0),
    ),
    Row(
        name="clip_by_global_norm-scheduled",
        public="clip_by_global_norm",
        factory=oc.clip_by_global_norm,
        args=(halving,),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by_block_rms",
        public="clip_by_block_rms",
        factory=oc.clip_by_block_rms,
        args=(0.5,),
        groups=per_leaf,
        measure=rms,
        band=at_most(0.5),
    ),
    Row(
        name="adaptive_grad_clip",
        public="adaptive_grad_clip",
        factory=oc.adaptive_grad_clip,
        args=(0.1,),
        groups=per_unit("io"),
        band=at_most_part_of_w(0.1, floor=1e-3),
        needs_params=True,
    ),
    Row(
        name="adaptive_grad_clip-oi",
        public="adaptive_grad_clip",
        factory=oc.adaptive_grad_clip,
        args=(0.1, 1e-3),
        kwargs={"units": "oi"},
        groups=per_unit("oi"),
        band=at_most_part_of_w(0.1, floor=1e-3),
        needs_params=True,
    ),
    Row(
        name="adaptive_grad_clip-leaf-scheduled",
        public="adaptive_grad_clip",
        factory=oc.adaptive_grad_clip,
        args=(halving,),
        kwargs={"units": "leaf"},
        groups=per_leaf,
        band=at_most_part_of_w(1.0, floor=1e-3),
        needs_params=True,
        idempotent=False,
        stateless=False,
        inside=1e-2,
    ),
    # Fixed thresholds.
    Row(
        name="clip_by_value",
        public="clip_by_value",
        factory=oc.clip_by_value,
        args=(-0.5, 1.0),
        groups=per_coordinate,
        # The signed number itself where it is real, and the modulus, which is at most 1, where it is complex.
        measure=lambda u, _: float(np.abs(u[0]) if np.iscomplexobj(u) else u[0]),
        band=within(-0.5, 1.0),
        direction_preserving=False,
        elementwise=True,
    ),
    Row(
        name="tanh_clip",
        public="tanh_clip",
        factory=contrib.tanh_clip,
        args=(1.0,),
        groups=per_coordinate,
        measure=norm(np.inf),
        band=at_most(1.0),
        direction_preserving=False,
        idempotent=False,
        elementwise=True,
        inside=None,
    ),
    Row(
        name="arcsinh_clip-scheduled",
        dtypes=("float32",),
        public="arcsinh_clip",
        factory=contrib.arcsinh_clip,
        args=(halving,),
        groups=per_coordinate,
        measure=norm(np.inf),
        band=at_most(float(np.arcsinh(np.finfo(np.float32).max))),
        direction_preserving=False,
        idempotent=False,
        stateless=False,
        elementwise=True,
        inside=None,
    ),
    Row(
        name="clip_by_leaf_norm",
        public="clip_by_leaf_norm",
        factory=oc.clip_by_leaf_norm,
        args=(0.5,),
        groups=per_leaf,
        band=at_most(0.5),
    ),
    Row(
        name="clip_by_leaf_norm-bound_per_leaf",
        public="clip_by_leaf_norm",
        factory=oc.clip_by_leaf_norm,
        args=(BOUNDS,),
        groups=per_leaf,
        band=at_most_each(BOUNDS),
        any_tree=False,
    ),
    Row(
        name="clip_by_leaf_norm-stacked",
        public="clip_by_leaf_norm",
        factory=oc.clip_by_leaf_norm,
        args=(0.5,),
        kwargs={"stacked": kernels},
        static_args=("stacked",),
        groups=per_unit("leaf", kernels),
        band=at_most(0.5),
    ),
    Row(
        name="clip_by_norm_range",
        public="clip_by_norm_range",
        factory=oc.clip_by_norm_range,
        args=(0.01, 1.0),
        groups=together,
        band=within(0.01, 1.0),
        inside=0.1,
    ),
    Row(
        name="clip_by_norm_range-leaf_norm",
        public="clip_by_norm_range",
        factory=lambda low, high: oc.clip_by_norm_range(low, high, norm=oc.norms.leaf_norm()),
        args=(0.25, 0.5),
        groups=per_leaf,
        band=within(0.25, 0.5),
        inside=None,
    ),
    Row(
        name="smooth_clip_by_global_norm",
        public="smooth_clip_by_global_norm",
        factory=oc.smooth_clip_by_global_norm,
        args=(1.0,),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        inside=None,
    ),
    Row(
        name="clip_by_spectral_norm",
        public="clip_by_spectral_norm",
        factory=oc.clip_by_spectral_norm,
        args=(0.5,),
        groups=whole,
        measure=spectral,
        band=at_most(0.5),
    ),
    Row(
        name="clip_singular_values",
        public="clip_singular_values",
        factory=oc.clip_singular_values,
        args=(0.5,),
        groups=whole,
        measure=spectral,
        band=at_most(0.5),
        direction_preserving=False,
        sums=True,
    ),
    Row(
        name="clip_singular_values-smooth-scheduled",
        public="clip_singular_values",
        factory=oc.clip_singular_values,
        args=(halving,),
        kwargs={"smooth": True},
        groups=whole,
        measure=spectral,
        band=at_most(1.0),
        direction_preserving=False,
        sums=True,
        idempotent=False,
        stateless=False,
        inside=None,
    ),
    Row(
        name="clippy",
        public="clippy",
        factory=contrib.clippy,
        args=(0.1, 1e-7),
        groups=per_leaf,
        measure=change(0.1, 1e-7),
        band=at_most(1.0),
        needs_params=True,
    ),
    # From the history of the norms. Where the first norm always passes there is no bound to test after one step.
    Row(
        name="autoclip",
        dtypes=TWO,
        public="autoclip",
        factory=oc.autoclip,
        args=(10.0,),
        static_args=("warmup_steps", "record"),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="autoclip-window",
        dtypes=TWO,
        public="autoclip",
        factory=oc.autoclip,
        args=(10.0,),
        kwargs={"window": 3},
        static_args=("window", "warmup_steps", "record"),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="percentile_clip",
        dtypes=TWO,
        public="percentile_clip",
        factory=contrib.percentile_clip,
        args=(5.0,),
        kwargs={"window": 4},
        static_args=("window", "record"),
        groups=per_leaf,
        band=at_most(np.inf),
        first_passes=True,
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by_tracked_quantile",
        dtypes=TWO,
        public="clip_by_tracked_quantile",
        factory=contrib.clip_by_tracked_quantile,
        args=(0.5,),
        kwargs={"initial": 0.5},
        static_args=(),
        groups=together,
        band=at_most(0.5),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="zclip",
        public="zclip",
        factory=oc.zclip,
        args=(2.5,),
        kwargs={"warmup_steps": 2},
        static_args=("warmup_steps", "patience", "record"),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="zclip-scheduled-recorded",
        combines=True,
        dtypes=TWO,
        public="zclip",
        factory=oc.zclip,
        args=(2.5,),
        kwargs={"warmup_steps": 2, "max_norm": halving, "clip_to": "edge", "record": 3},
        static_args=("warmup_steps", "patience", "record"),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="adagc",
        dtypes=TWO,
        public="adagc",
        factory=oc.adagc,
        args=(1.05,),
        kwargs={"warmup_steps": 2},
        static_args=("warmup_steps", "record"),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="aggc",
        dtypes=TWO,
        public="aggc",
        factory=contrib.aggc,
        args=(top, 2.0),
        kwargs={"min_ratio": 0.5},
        static_args=("labels",),
        groups=per_label(top),
        band=at_most(np.inf),
        first_passes=True,
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by_history",
        dtypes=TWO,
        public="clip_by_history",
        factory=oc.clip_by_history,
        args=(3.0,),
        kwargs={"window": 4, "warmup_steps": 2},
        static_args=("window", "warmup_steps", "record"),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_norm_growth",
        dtypes=TWO,
        public="clip_norm_growth",
        factory=contrib.clip_norm_growth,
        args=(1.01,),
        kwargs={},
        static_args=(),
        groups=per_leaf,
        band=at_most(np.inf),
        first_passes=True,
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by-unit_norm-zscore-ema_ratio",
        combines=True,
        dtypes=TWO,
        public="clip_by",
        factory=lambda z, ratio: oc.clip_by(
            oc.norms.unit_norm(),
            oc.thresholds.chain(
                oc.thresholds.zscore(z, warmup_steps=1), oc.thresholds.ema_ratio(ratio), oc.thresholds.constant(0.5)
            ),
        ),
        args=(2.5, 1.05),
        kwargs={},
        static_args=(),
        groups=per_unit("io"),
        band=at_most(0.5),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by-spectral_norm-zscore",
        combines=True,
        dtypes=TWO,
        public="clip_by",
        factory=lambda z, c: oc.clip_by(
            oc.norms.spectral_norm(),
            oc.thresholds.chain(oc.thresholds.zscore(z, warmup_steps=1), oc.thresholds.constant(c)),
        ),
        args=(2.5, 0.5),
        groups=whole,
        measure=spectral,
        band=at_most(0.5),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by-leaf_rms-mean_std-quantile",
        combines=True,
        dtypes=TWO,
        public="clip_by",
        factory=lambda k, q: oc.clip_by(
            oc.norms.leaf_rms(stacked=kernels),
            oc.thresholds.chain(
                oc.thresholds.mean_std(k, window=3, warmup_steps=1, ddof=1, include_current=True),
                oc.thresholds.quantile(q),
            ),
        ),
        args=(1.0, 0.5),
        kwargs={},
        static_args=(),
        groups=per_unit("leaf", kernels),
        band=at_most(np.inf),
        first_passes=True,
        idempotent=False,
        stateless=False,
        measure=rms,
    ),
    Row(
        name="clip_by-global_norm-ema_band-growth",
        combines=True,
        dtypes=TWO,
        public="clip_by",
        factory=lambda high, growth: oc.clip_by(
            oc.norms.global_norm(),
            oc.thresholds.chain(
                oc.thresholds.ema_band(high, max_down=0.5, max_up=2.0, min_norm=1.0),
                oc.thresholds.growth(growth),
                oc.thresholds.tracked_quantile(0.9, initial=2.0),
                oc.thresholds.order_statistic(50.0, window=3),
            ),
        ),
        args=(2.0, 1.5),
        kwargs={},
        static_args=(),
        groups=together,
        band=at_most(2.0),
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by-leaf_norm-times-at_least",
        dtypes=TWO,
        public="clip_by",
        factory=lambda k, least: oc.clip_by(
            oc.norms.leaf_norm(),
            oc.thresholds.chain(
                oc.thresholds.times(k, oc.thresholds.mean_std(warmup_steps=1, window=3, warmup_max_norm=0.5)),
                oc.thresholds.at_least(least, oc.thresholds.growth()),
            ),
            record=2,
        ),
        args=(halving, 0.1),
        groups=per_leaf,
        band=at_most(0.5),
        idempotent=False,
        stateless=False,
    ),
    # State per coordinate, a clip inside momentum, wrappers.
    Row(
        name="spam_clip",
        dtypes=("float32", "float16", "complex64"),  # XLA on the newest jax flushes subnormals in bfloat16
        public="spam_clip",
        factory=contrib.spam_clip,
        param_state=("spam_rms",),
        args=(4.0,),
        kwargs={"decay": 0.5, "warmup_steps": 1, "period": 5},
        static_args=("warmup_steps", "period"),
        groups=per_coordinate,
        band=at_most(np.inf),
        idempotent=False,
        stateless=False,
        first_passes=True,
        elementwise=True,
        direction_preserving=False,
    ),
    Row(
        name="adaptive_spike_clip",
        public="adaptive_spike_clip",
        factory=contrib.adaptive_spike_clip,
        args=(0.9,),
        kwargs={},
        static_args=(),
        groups=per_leaf,
        band=at_most(np.inf),
        idempotent=False,
        stateless=False,
        first_passes=True,
        direction_preserving=False,
    ),
    Row(
        name="scale_by_adaptive_norm",
        public="scale_by_adaptive_norm",
        factory=contrib.scale_by_adaptive_norm,
        takes_zero=True,
        args=(),
        kwargs={"eps": 0.0},
        static_args=(),
        groups=per_leaf,
        band=within(1.0, 1.0),
        idempotent=False,
        stateless=False,
        inside=None,
    ),
    Row(
        name="scale_by_acclip",
        public="scale_by_acclip",
        factory=contrib.scale_by_acclip,
        param_state=("acclip_momentum", "acclip_size"),
        args=(0.9, 0.99),
        kwargs={"alpha": 2.0},
        static_args=("alpha",),
        groups=per_coordinate,
        band=at_most(np.inf),
        idempotent=False,
        stateless=False,
        first_passes=True,
        elementwise=True,
        inside=None,
        direction_preserving=False,
    ),
    Row(
        name="scale_by_stable_adam",
        public="scale_by_stable_adam",
        factory=contrib.scale_by_stable_adam,
        takes_zero=True,
        param_state=("adam_mean", "adam_rms"),
        args=(),
        kwargs={},
        static_args=(),
        groups=per_leaf,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
        measure=norm(np.inf),
        inside=None,
        direction_preserving=False,
    ),
    Row(
        name="clipped_momentum",
        public="clipped_momentum",
        factory=oc.clipped_momentum,
        param_state=("clipped_average",),
        args=(halving, 0.5),
        kwargs={},
        static_args=(),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
        inside=None,
    ),
    Row(
        name="mixed_clip",
        dtypes=TWO,
        public="mixed_clip",
        factory=contrib.mixed_clip,
        param_state=("mixed_average",),
        args=(1.0,),
        kwargs={"smooth": True},
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        stateless=False,
        inside=None,
    ),
    Row(
        name="centered_clip",
        dtypes=TWO,
        public="centered_clip",
        factory=contrib.centered_clip,
        param_state=("clip_center",),
        args=(1.0,),
        groups=together,
        band=at_most(1.0),
        takes_zero=True,
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="reset_state_every",
        dtypes=TWO,
        public="reset_state_every",
        factory=lambda c: contrib.reset_state_every(oc.clipped_momentum(c, 0.5), 2, warmup_steps=1),
        args=(1.0,),
        kwargs={},
        static_args=(),
        groups=together,
        band=at_most(1.0),
        param_state=("clipped_average",),
        idempotent=False,
        stateless=False,
        needs_params=True,
        inside=None,
        direction_preserving=False,
    ),
    Row(
        name="skip_nonfinite",
        dtypes=("float32",),
        public="skip_nonfinite",
        factory=lambda c: oc.skip_nonfinite(oc.clip_by_leaf_norm(c)),
        args=(0.5,),
        groups=per_leaf,
        band=at_most(0.5),
        stateless=False,
        zeroes="step",
    ),
    Row(
        name="skip_spikes",
        dtypes=("float32",),
        public="skip_spikes",
        factory=lambda c: oc.skip_spikes(
            oc.clip_by_global_norm(c), oc.thresholds.mean_std(6.0, window=4, warmup_steps=2), norm=oc.norms.leaf_norm()
        ),
        args=(1.0,),
        groups=together,
        band=at_most(1.0),
        stateless=False,
        zeroes="step",
    ),
    Row(
        name="with_carry",
        dtypes=TWO,
        public="with_carry",
        factory=lambda c: oc.with_carry(oc.clip_by_global_norm(c)),
        args=(1.0,),
        groups=together,
        band=at_most(1.0),
        param_state=("carry",),
        idempotent=False,
        stateless=False,
        inside=None,  # -0 plus a carry of 0 is 0
    ),
    Row(
        name="zero_nonfinite",
        dtypes=("float32", "complex64"),
        public="zero_nonfinite",
        factory=oc.zero_nonfinite,
        groups=per_coordinate,
        band=at_most(np.inf),
        first_passes=True,
        elementwise=True,
        zeroes="coordinate",
    ),
    # With a record.
    Row(
        name="clip_by_global_norm-recorded",
        dtypes=TWO,
        public="clip_by_global_norm",
        factory=oc.clip_by_global_norm,
        args=(1.0,),
        kwargs={"record": 3},
        static_args=("record",),
        groups=together,
        band=at_most(1.0),
        stateless=False,
    ),
    Row(
        name="adaptive_grad_clip-scheduled-recorded",
        combines=True,
        dtypes=TWO,
        public="adaptive_grad_clip",
        factory=oc.adaptive_grad_clip,
        args=(halving,),
        kwargs={"record": 2},
        static_args=("record",),
        groups=per_unit("io"),
        band=at_most_part_of_w(1.0, floor=1e-3),
        needs_params=True,
        idempotent=False,
        stateless=False,
        inside=1e-2,
    ),
    # Any norm with any threshold.
    Row(
        name="clip_by-leaf_norm-between",
        public="clip_by",
        factory=lambda low, high: oc.clip_by(oc.norms.leaf_norm(), oc.thresholds.between(low, high)),
        args=(0.01, 1.0),
        groups=per_leaf,
        band=within(0.01, 1.0),
        inside=0.1,
    ),
    Row(
        name="clip_by-inf_norm-exactly",
        public="clip_by",
        factory=lambda c: oc.clip_by(oc.norms.global_norm(ord=np.inf), oc.thresholds.exactly(c)),
        args=(0.5,),
        groups=together,
        measure=norm(np.inf),
        band=within(0.5, 0.5),
        inside=None,
    ),
    Row(
        name="clip_by-global_rms-constant",
        public="clip_by",
        factory=lambda c: oc.clip_by(oc.norms.global_rms(), oc.thresholds.constant(c)),
        args=(0.5,),
        groups=together,
        measure=rms,
        band=at_most(0.5),
        counts_entries=True,
    ),
    Row(
        name="clip_by-leaf_rms-exactly",
        public="clip_by",
        factory=lambda c: oc.clip_by(oc.norms.leaf_rms(), oc.thresholds.exactly(c)),
        args=(halving,),
        groups=per_leaf,
        measure=rms,
        band=within(1.0, 1.0),
        idempotent=False,
        stateless=False,
        inside=None,
    ),
    Row(
        name="clip_by-group_norm-constant",
        public="clip_by",
        factory=lambda c: oc.clip_by(oc.norms.group_norm(top), oc.thresholds.constant(c)),
        args=(0.5,),
        groups=per_label(top),
        band=at_most(0.5),
    ),
    Row(
        name="clip_by-group_norm-bound_per_group",
        public="clip_by",
        factory=lambda labels, c: oc.clip_by(oc.norms.group_norm(labels), oc.thresholds.constant(c)),
        args=({"dense": "body", "scale": "head"}, {"body": 0.5, "head": halving}),
        groups=per_label(top),
        band=at_most_each({"dense": 0.5, "scale": 1.0}),
        idempotent=False,
        stateless=False,
        any_tree=False,
    ),
    Row(
        name="clip_by-unit_norm-relative_to_params",
        public="clip_by",
        factory=lambda ratio, offset: oc.clip_by(
            oc.norms.unit_norm("io", stacked=kernels), oc.thresholds.relative_to_params(ratio, offset=offset)
        ),
        args=(0.1, 0.01),
        groups=per_unit("io", kernels),
        band=at_most_part_of_w(0.1, offset=0.01),
        needs_params=True,
    ),
    Row(
        name="clip_by-leaf_norm-relative_to_params-constant",
        dtypes=TWO,
        public="clip_by",
        factory=lambda ratio, c: oc.clip_by(
            oc.norms.leaf_norm(),
            oc.thresholds.chain(oc.thresholds.relative_to_params(ratio, floor=1e-3), oc.thresholds.constant(c)),
        ),
        args=(0.1, halving),
        groups=per_leaf,
        # The parameters' norms are far below 10, so it is their tenth that holds at the first step.
        band=at_most_part_of_w(0.1, floor=1e-3),
        needs_params=True,
        idempotent=False,
        stateless=False,
    ),
    Row(
        name="clip_by-leaf_norm-mixed_bounds",
        public="clip_by",
        factory=lambda c: oc.clip_by(oc.norms.leaf_norm(stacked=kernels), oc.thresholds.constant(c)),
        args=({"dense": halving, "scale": np.float32(0.1)},),
        groups=per_unit("leaf", kernels),
        band=at_most_each({"dense": 1.0, "scale": 0.1}),
        idempotent=False,
        stateless=False,
        any_tree=False,
    ),
    Row(
        name="clip_by-included-smooth",
        public="clip_by",
        factory=lambda c: oc.clip_by(
            oc.norms.global_norm(include=lambda path: path != "scale"), oc.thresholds.smooth(c)
        ),
        args=(1.0,),
        groups=together,
        band=at_most(1.0),
        idempotent=False,
        inside=None,
        untouched=("scale",),
    ),
    Row(
        name="qk_clip",
        public="qk_clip",
        factory=told_its_logits,
        args=(100.0,),
        groups=per_coordinate,
        band=within(0.0, np.inf),
        bounds_weights=True,
        needs_params=True,
        direction_preserving=False,
        idempotent=False,
        inside=None,
        any_tree=False,
    ),
    Row(
        name="clip_by-known",
        public="clip_by",
        factory=told_its_norm,
        args=(1.0,),
        static_args=("record",),
        groups=together,
        band=at_most(1.0),
    ),
    Row(
        name="clip_by-relative_change-between",
        public="clip_by",
        factory=lambda low, high: oc.clip_by(oc.norms.relative_change(0.1, 1e-3), oc.thresholds.between(low, high)),
        args=(0.5, 1.0),
        groups=per_leaf,
        measure=change(0.1, 1e-3),
        band=within(0.5, 1.0),
        needs_params=True,
        inside=None,
    ),
)

# Public callables that transform nothing, each with what it is instead.
NOT_TRANSFORMATIONS = {
    "Projection": "the type of what says how heads lie in a leaf",
    "ClipStats": "the type of a record",
    "Norm": "the type of what is measured",
    "Threshold": "the type of what is permitted",
    "as_function": "calls a transformation",
    "clip_cotangents": "calls a transformation in the backward pass",
    "clip_stats": "reads the records in a state",
    "clip_tree": "clips a tree without an optimizer",
    "global_norm": "measures a tree",
    "migrate": "brings a state into another transformation",
    "per_example_global_norm_clip": "adds up gradients that are clipped",
    "per_example_layer_norm_clip": "adds up gradients that are clipped",
    "skip_micro_steps": "makes a rule for optax.MultiSteps",
}
