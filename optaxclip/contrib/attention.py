"""Bounds the logits of attention by scaling the weights of queries and keys."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import dtypes, layouts, mesh, trees
from optaxclip._arrays.leaves import Leaf, Leaves
from optaxclip._arrays.parameters import beside, drop_missing
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic
from optaxclip.core import Updates

_KINDS = ("query", "key")
_NO_LOGITS = object()  # stands for None in a tree, as a leaf


@dataclasses.dataclass(frozen=True)
class Projection:
    """The layout of the heads in a leaf of query or key weights, for `qk_clip`.

    Attributes:
      kind: "query" or "key".
      axis: the axis of the heads. Each index is a head, or the heads are consecutive blocks along it. The default -2
        fits kernels of shape (model, heads, entries) and their biases. Use -1 for kernels of shape (model, heads *
        entries), and 0 for those of PyTorch.
      tail: the number of entries at the end of each head that get another factor. In a query, they are the rotary part
        of multi-head latent attention. All heads share the rotary key, so these entries get the whole factor. In a key,
        they are the values, which do not change.

    Example:
      The up-projections of latent attention, with 64 rotary entries and 128 values per head:

      >>> from optaxclip.contrib import Projection, qk_clip
      >>> specs = {"q_up": Projection("query", tail=64), "kv_up": Projection("key", tail=128)}
      >>> tx = qk_clip(projections=lambda path: specs.get(path.split("/")[-1]))  # for paths such as "layers/0/q_up"

    See also:
      `qk_clip`, which takes it.
    """

    kind: str
    axis: int = -2
    tail: int = 0

    def __post_init__(self) -> None:
        checks.one_of("kind", self.kind, _KINDS)
        if not checks.is_whole(self.axis):
            raise ValueError(f"axis must be a whole number, got {self.axis!r}")
        checks.whole("tail", self.tail, at_least=0)


# A prefix pytree of Projection and None, or a function of a leaf's path.
Projections: TypeAlias = Tree | Callable[[str], Projection | None]


def qk_clip(
    max_logit: Number = 100.0, *, projections: Projections, alpha: Number = 0.5, queries_per_key: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the query and key weights of each head whose largest attention logit exceeds `max_logit`.

    .. math:: w_q + u_q \leftarrow \eta_h^\alpha (w_q + u_q),
        \quad w_k + u_k \leftarrow \eta_h^{1 - \alpha} (w_k + u_k), \qquad \eta_h = \min(1, \tau / S_h)

    Args:
      max_logit: the bound :math:`\tau` on the logits before the softmax, more than 0: a number or a scalar array. 100
        in the report of Kimi K2.
      projections: which leaves make queries and keys: a prefix pytree of `Projection` and None (for all other leaves),
        or a function from a leaf's whole path ("layers/0/q/kernel") to one of these. A function that names no leaf is
        an error, unless `optax.masked` hides some leaves.
      alpha: the share of the query in the factor, from 0 to 1: a number or a scalar array.
      queries_per_key: how many query heads share a key head: 1, or more in grouped-query attention. Query heads that
        share a key head must be consecutive.

    Returns:
      A transformation without state (`optax.EmptyState`). Its `update` needs `params`, and a keyword argument
      ``max_logits``: the largest logit of each query head in this batch, :math:`S_h`, including the scale of the
      attention. Pass one array over the heads for all layers, or a dict from the path of a layer to its array. For
      stacked layers, the array has the axes of the layers in front, as the leaves do. None means no logits at this
      step, and changes nothing.

    Raises:
      ValueError: if an argument is of the wrong kind. At update: without `params` or logits; if the logits do not fit
        the leaves, or differ between devices that share a leaf; if `projections` names no leaf; if it names only
        queries or only keys, while `alpha` splits the factor between both; if heads of queries and keys differ in size.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optaxclip.contrib import Projection, qk_clip
      >>> params = {"query": jnp.full((1, 2, 1), 8.0), "key": jnp.full((1, 2, 1), 2.0), "out": jnp.ones(2)}
      >>> tx = qk_clip(projections={"query": Projection("query"), "key": Projection("key"), "out": None})
      >>> updates = {"query": jnp.full((1, 2, 1), 1.0), "key": jnp.zeros((1, 2, 1)), "out": jnp.ones(2)}
      >>> max_logits = jnp.array([400.0, 50.0])
      >>> updates, _ = jax.jit(tx.update)(updates, tx.init(params), params, max_logits=max_logits)
      >>> print((params["query"] + updates["query"]).ravel())  # 9 * (100 / 400) ** 0.5 in the first head
      [4.5 9. ]
      >>> print((params["key"] + updates["key"]).ravel())
      [1. 2.]

    Notes:
      - Guarantees: a head within the bound is returned unchanged. Factors are applied in float32 or wider.
      - Edge cases: a NaN or infinite logit changes nothing: its factor would be 0, and a head of zeros never learns
        again. Skip such steps with `skip_nonfinite`. For the same reason, no factor is below the precision of the
        updates or the weights, 1/128 in bfloat16; the next step clips the rest. A leaf whose update is None does not
        change.
      - Micro-batches: `optax.MultiSteps` only passes on the logits of the last micro-batch. Keep the largest of all
        micro-batches, and pass that with the last one.
      - Missing leaves: name the queries and the keys of each layer. A layer with only one of them gets only its share
        of the factor; this is an error only if all layers lack the same one. For queries alone, pass `alpha=1`; for
        keys alone, `alpha=0`.
      - Placement: last in the chain, after the learning rate. Nothing after it may scale the updates.
      - Meshes: inside `shard_map`, take the largest logits (`jax.lax.pmax`) over each axis that does not split the
        leaves. If an axis splits the heads, pass the logits of this device's heads.
      - Grouped queries: a key head and all its query heads get the factor of their largest logit, as in Megatron-LM.
      - Latent attention: name the up-projections. Rotary entries of a query get the whole :math:`\eta_h`, because their
        shared key does not change. Leave out the shared rotary key and the down-projections.
      - Normalisation: if queries and keys are normalised after the projections, scaling the weights changes no logit.

    References:
      Kimi Team, Kimi K2: open agentic intelligence, arXiv:2507.20534, algorithm 1.

    See also:
      `skip_nonfinite`; `clip_cotangents`, for the gradient that flows back through attention.

      Notebook: `notebooks/recipes.ipynb`, logits of attention.
    """
    checks.static_together(queries_per_key=queries_per_key)
    max_logit = checks.number("max_logit", max_logit, positive=True)
    alpha = checks.number("alpha", alpha, at_most=1.0)
    queries_per_key = checks.whole("queries_per_key", queries_per_key)
    example = "Projections and None, such as {'query': Projection('query'), 'out': None}"
    checks.per_leaf("projections", projections, _is_projection, example, "names no leaf")

    def update(updates: Updates, state: Any, params: Tree = None, **extra_args: Any) -> tuple[Updates, Any]:
        if "max_logits" not in extra_args:
            raise ValueError("qk_clip needs the largest logit of each head, or None: call update(..., max_logits=...)")
        filled, params = beside(updates, params)
        mesh.require_reduced(filled, params)
        leaves = Leaves(filled, params, axes=None)  # nothing is measured
        weights = leaves.params()
        named = leaves.lookup("projections", projections)
        if others := [spec for spec in named if spec is not None and not _is_projection(spec)]:
            raise ValueError(f"projections must give a Projection or None for each leaf, got {others[0]!r}")
        _require_all_of_the_factor(leaves, filled, named, projections, alpha)
        paths = [path if spec else None for path, spec in zip(leaves.paths, named, strict=True)]
        by_leaf = _logits_of(paths, extra_args["max_logits"])
        _require_heads_of_one_size(leaves, named, by_leaf, queries_per_key)

        def scaled(leaf: Leaf, param: Leaf, spec: Projection | None, logits: jax.Array | None) -> jax.Array:
            if spec is None or logits is None:
                return leaf.value
            if more := layouts.varying(logits) - layouts.varying(param.value):
                raise ValueError(
                    f"max_logits differ between the devices along mesh axes {tuple(sorted(more))}, which share the "
                    f"leaf {leaf.path!r}: pass the largest of all, jax.lax.pmax(max_logits, {tuple(sorted(more))})"
                )
            logs = _logs(logits, max_logit, queries_per_key)
            heads = jnp.repeat(logs, queries_per_key, axis=-1) if spec.kind == "query" else logs
            return _rescaled(leaf.value, param.value, _exponents(leaf, spec, heads, alpha))

        clipped = leaves.updated(list(map(scaled, leaves, weights, named, by_leaf)))
        return clipped if filled is updates else drop_missing(updates, clipped), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _is_projection(value: Any) -> TypeGuard[Projection]:
    return isinstance(value, Projection)


def _require_all_of_the_factor(
    leaves: Leaves, tree: Tree, named: list[Any], projections: Projections, alpha: Any
) -> None:
    """Raises ValueError if projections would silently turn off the clip, or a share of it.

    Missing leaves (None, for example of frozen parameters) count as named.
    """
    missing = trees.empty_nodes(tree)
    if not leaves or any(isinstance(node, optax.MaskedNode) for _, node in missing):
        return  # the other leaves may be another transformation's, as in `optax.multi_transform`
    if trees.is_function(projections):
        specs = [*named, *(projections(path) for path, _ in missing)]
    else:
        specs = jax.tree.leaves(projections)
    leaves.require_any([spec is not None for spec in specs], projections, "projections names no leaf of")
    specs = list(filter(_is_projection, specs))
    kinds = {spec.kind for spec in specs}
    has_rotary = any(spec.kind == "query" and spec.tail for spec in specs)  # rotary entries get the whole factor
    if len(kinds) != 1 or has_rotary or not isinstance(alpha, float):
        return
    named_kind, other, whole = ("queries", "keys", 1.0) if "query" in kinds else ("keys", "queries", 0.0)
    if alpha != whole:
        raise ValueError(
            f"projections names {named_kind} but no {other}, so at alpha={alpha:g} only a share of the factor applies: "
            f"name the leaves of both, or pass alpha={whole:g}"
        )


def _require_heads_of_one_size(
    leaves: Leaves, named: Sequence[Projection | None], by_leaf: Sequence[jax.Array | None], queries_per_key: int
) -> None:
    """Raises ValueError if blocks are not whole heads: query and key heads must have the same size."""
    sizes: dict[tuple[int, str], dict[int, str]] = {}  # (logits, kind) -> size -> path of a leaf
    for leaf, spec, logits in zip(leaves, named, by_leaf, strict=True):
        if spec is not None and logits is not None:
            layout = _layout(leaf, spec, _heads(logits.shape, spec, queries_per_key))
            own = layout.size - spec.tail
            # If each index is a head, and there is no tail, the axis of the entries is unknown.
            if own and (layout.block > 1 or spec.tail):
                sizes.setdefault((id(logits), spec.kind), {}).setdefault(own, leaf.path)
    for (of, kind), queries in sizes.items():
        keys = sizes.get((of, "key"), {}) if kind == "query" else {}
        # Layers with heads of different sizes may share an array.
        if keys and queries.keys() != keys.keys():
            size, path = next(((n, at) for n, at in queries.items() if n not in keys), next(iter(queries.items())))
            other, beside = next(((n, at) for n, at in keys.items() if n not in queries), next(iter(keys.items())))
            raise ValueError(
                f"query heads of the leaf {path!r} have {size} entries, key heads of the leaf {beside!r} have {other} "
                f"(without tails): queries_per_key={queries_per_key} must be the number of query heads per key head, "
                "and max_logits must have one entry per query head"
            )


def _logits_of(paths: Sequence[str | None], max_logits: Tree) -> list[jax.Array | None]:
    """The logits for each path that is not None: the entry at the path of the leaf, or at the start of it.

    Raises:
      ValueError: if a leaf has no entry, an entry has no leaf, or an entry is not an array of real numbers.
    """
    marked = jax.tree.map(lambda entry: _NO_LOGITS if entry is None else entry, max_logits, is_leaf=trees.is_none)
    flat = zip(trees.paths(marked), jax.tree.leaves(marked), strict=True)
    entries = {path: _as_logits(path, entry) for path, entry in flat}
    places = [None if path is None else _place(path, entries) for path in paths]
    if unused := sorted(entries.keys() - set(places) - {""}):
        raise ValueError(f"max_logits has an entry for {unused[0]!r}, but projections names no leaf there")
    return [None if place is None else entries[place] for place in places]


def _place(path: str, entries: Mapping[str, Any]) -> str:
    """The path of the entry for a leaf."""
    found = [start for start in entries if start in ("", path) or path.startswith(start + "/")]
    if not found:
        raise ValueError(f"max_logits has no entry for the leaf {path!r}; it has {trees.listed(list(entries))}")
    return max(found, key=len)


def _as_logits(path: str, entry: Any) -> jax.Array | None:
    if entry is _NO_LOGITS:
        return None
    is_real = isinstance(entry, jax.Array | np.ndarray) and checks.is_real(entry)
    if not is_real or entry.ndim == 0:
        got = f"{entry.dtype} of shape {entry.shape}" if hasattr(entry, "dtype") else repr(entry)
        where = f" at {path!r}; pass a list of numbers as an array, jnp.asarray(max_logits)" if path else ""
        raise ValueError(f"max_logits must hold arrays of real numbers, one per head, got {got}{where}")
    array = jnp.asarray(entry)
    return array.astype(dtypes.accumulator(array.dtype))


def _logs(logits: jax.Array, max_logit: Any, queries_per_key: int) -> jax.Array:
    """The logarithm of the factor of each key head."""
    logits = layouts.whole(logits)  # small, and heads are grouped and repeated next
    known = jnp.where(jnp.isfinite(logits), logits, jnp.zeros_like(logits))
    largest = jnp.max(known.reshape(*logits.shape[:-1], logits.shape[-1] // queries_per_key, queries_per_key), axis=-1)
    bound = jnp.asarray(max_logit, largest.dtype)
    beyond = largest > bound
    eta = jnp.where(beyond, bound / jnp.where(beyond, largest, jnp.ones_like(largest)), jnp.ones_like(largest))
    return jnp.log(jnp.maximum(eta, jnp.finfo(eta.dtype).tiny))


class _Layout(NamedTuple):
    """Where the heads of a leaf are: each has `block` indices of `axis`, and `size` entries along the axis `along`."""

    axis: int
    block: int
    along: int
    size: int


def _heads(shape: tuple[int, ...], spec: Projection, queries_per_key: int) -> tuple[int, ...]:
    """The shape of the heads of a leaf, from that of the logits."""
    *front, number = shape
    if number % queries_per_key:
        raise ValueError(f"max_logits must have a multiple of queries_per_key={queries_per_key} heads, got {number}")
    return shape if spec.kind == "query" else (*front, number // queries_per_key)


def _layout(leaf: Leaf, spec: Projection, heads: tuple[int, ...]) -> _Layout:
    """Where the heads of this shape are in a leaf.

    Raises:
      ValueError: if the heads, or their tails, do not fit the leaf.
    """
    shape, (*front, number) = jnp.shape(leaf.value), heads
    axis = spec.axis + len(shape) if spec.axis < 0 else spec.axis
    fits = (
        len(front) <= axis < len(shape)
        and list(shape[: len(front)]) == front
        and number > 0
        and shape[axis] % number == 0
    )
    if not fits:
        raise ValueError(
            f"leaf {leaf.path!r} of shape {shape} has no heads of shape {heads} at {spec}: its leading axes must be "
            "those of max_logits, and its axis of heads must be a multiple of their number"
        )
    block = shape[axis] // number
    along, size = (axis, block) if block > 1 else (axis + 1, shape[axis + 1] if axis + 1 < len(shape) else 0)
    if spec.tail > size:
        raise ValueError(f"tail must fit into a head of {size} entries of the leaf {leaf.path!r}, got {spec}")
    return _Layout(axis, block, along, size)


def _exponents(leaf: Leaf, spec: Projection, heads: jax.Array, alpha: Any) -> jax.Array:
    """The logarithm of the factor of each entry, in a shape that broadcasts to the leaf."""
    shape, front = jnp.shape(leaf.value), heads.ndim - 1
    axis, block, along, size = _layout(leaf, spec, heads.shape)
    logs = jnp.expand_dims(jnp.repeat(heads, block, axis=-1), range(front, axis))
    logs = jnp.expand_dims(logs, range(axis + 1, len(shape)))
    own, rest = (alpha, 1.0) if spec.kind == "query" else (1 - alpha, 0.0)
    if not spec.tail:
        return logs * own
    is_tail = np.arange(shape[along]) % size >= size - spec.tail
    power = jnp.where(is_tail, rest, jnp.asarray(own, logs.dtype))
    return logs * jnp.expand_dims(power, (*range(along), *range(along + 1, len(shape)))).astype(logs.dtype)


def _rescaled(update: jax.Array, param: jax.Array, exponents: jax.Array) -> jax.Array:
    """The update that multiplies the new parameter by exp(`exponents`)."""
    dtype = np.promote_types(dtypes.wide(update.dtype), dtypes.wide(param.dtype))
    # The update is rounded: with a factor below eps, it may become -w and the head 0. So no factor is below eps.
    smallest = max(float(jnp.finfo(kind.dtype).eps) for kind in (update, param))
    minus = jnp.expm1(jnp.maximum(exponents, math.log(smallest)))
    wide = update.astype(dtype)
    minus = minus.astype(dtype) + jnp.zeros_like(wide)  # with the layout of the leaf
    moved = wide + (param.astype(dtype) + wide) * minus
    return jnp.where((minus == 0) | ~jnp.isfinite(update), update, arithmetic.narrowed(moved, update.dtype))
