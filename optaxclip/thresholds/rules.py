"""Rules that follow the history of norms: each is written for one group, and applied to all of them.

A rule sees one norm and its own state. `per_group` turns it into a Threshold. Each group of a Norm (all leaves, a leaf,
a unit) gets its own state. A zero or non-finite norm only holds back the statistics of its own group.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import groups, states
from optaxclip.core import Norms, State, Threshold

RuleState: TypeAlias = Any  # a NamedTuple of arrays


class Rule(NamedTuple):
    """How large the norm of one group may be, from its own history.

    Attributes:
      init: `dtype -> state`, the state before the first norm.
      limit: `(norm, state, *shared) -> ((lower, upper), state)`, with `norm` positive and finite.
      shared: `norms -> arguments`, what else `limit` gets, from the vector of the norms of all groups.
      takes_zero: whether a norm of 0 is an observation.
      signed: whether `limit` is also right for finite numbers of any sign.
    """

    init: Callable[[Any], RuleState]
    limit: Callable[..., tuple[tuple[Any, Any], RuleState]]
    shared: Callable[[jax.Array], tuple[Any, ...]] = lambda norms: ()
    takes_zero: bool = False
    signed: bool = False


def of_logarithms(rule: Rule) -> Rule:
    """A rule for numbers of any sign, applied to the logarithms of norms.

    Its state holds logarithms. The upper end of the band is the exponential of the rule's own; there is no lower end.
    """

    def limit(norm: jax.Array, state: RuleState, *shared: Any) -> tuple[tuple[float, jax.Array], RuleState]:
        # The logarithm of a subnormal loss is -inf in XLA (jax 0.8 to 0.12).
        log_norm = jnp.log(jnp.maximum(norm, float(jnp.finfo(norm.dtype).tiny)))
        (_, upper), after = rule.limit(log_norm, state, *shared)
        # The exponential of the logarithm may round below the norm, and would then clip it by an ulp.
        bound = jnp.where(log_norm <= upper, jnp.maximum(exponential(upper), norm), exponential(upper))
        return (0.0, bound), after

    return rule._replace(limit=limit, signed=False)


def exponential(log: jax.Array) -> jax.Array:
    """The exponential, clipped to the positive normal floats."""
    info = jnp.finfo(log.dtype)
    most = float(np.nextafter(np.log(info.max), info.dtype.type(0)))  # rounded up, its exponential would be inf
    size = jnp.exp(jnp.minimum(log, most))
    return jnp.where(log > most, jnp.full_like(log, bounds.highest(log.dtype)), jnp.maximum(size, float(info.tiny)))


_OUTLIER = 10  # times the mean so far: a larger norm would spoil the mean


def bounded_at_first(
    rule: Rule, warmup_max_norm: Number | None, so_far: Callable[[RuleState], tuple[jax.Array, jax.Array]]
) -> Rule:
    """Adds a bound to the warm-up of a rule that has none there.

    Raw norms enter the statistics: with clipped norms, the mean could never exceed the bound. But a norm of 1e25 would
    stay in the mean and deviation for thousands of steps. So a norm counts for at most the bound or ten times the mean
    so far, whichever is larger.

    Args:
      rule: for positive numbers.
      warmup_max_norm: the bound; None returns the rule unchanged.
      so_far: `state -> (is_warm, mean)`: whether the next norm belongs to the warm-up, and the mean of the norms so
        far. A mean of 0 means no norms yet; inf means that every norm counts as measured.
    """
    if warmup_max_norm is None:
        return rule

    def limit(norm: jax.Array, state: RuleState, *shared: Any) -> tuple[tuple[Any, Any], RuleState]:
        is_warm, mean = so_far(state)
        most = jnp.minimum(jnp.asarray(warmup_max_norm, norm.dtype), bounds.highest(norm.dtype))
        tenfold = _OUTLIER * jnp.minimum(mean, bounds.highest(norm.dtype) / _OUTLIER)
        counted = jnp.where(is_warm, jnp.minimum(norm, jnp.maximum(most, tenfold)), norm)
        (lower, upper), after = rule.limit(counted, state, *shared)
        return (lower, jnp.where(is_warm, jnp.minimum(upper, most), upper)), after

    return rule._replace(limit=limit, signed=False)


def per_group(rule: Rule, *, max_groups: int | None = None) -> Threshold:
    """Turns a rule for one group into a Threshold for all groups.

    A norm that is 0, infinite or NaN is not an observation: the state of its group stays unchanged, bit for bit, and
    the other groups continue. The `signed` Threshold of the result judges numbers of any sign; there, 0 and negative
    numbers are observations.

    Args:
      rule: the rule. The arrays of its state get a leading axis for the groups.
      max_groups: the largest number of groups allowed.
    """

    def init(norms: Norms) -> State:
        number = groups.number(norms)
        if max_groups is not None and number > max_groups:
            raise ValueError(
                f"a history of {_nbytes(rule.init(jnp.float32)):,} bytes per group is too large for {number} groups: "
                f"pass window=, or a norm with at most {max_groups} groups"
            )
        one = rule.init(groups.dtype(norms))
        # Without groups there is one placeholder: checkpoints refuse empty arrays.
        return jax.tree.map(lambda leaf: jnp.tile(leaf, (max(number, 1), *(1 for _ in leaf.shape))), one)

    def limit(
        signed: bool, norms: Norms, state: State, param_norms: Any, /, **extra_args: Any
    ) -> tuple[tuple[Norms, Norms], State]:
        del param_norms, extra_args
        if not groups.number(norms):
            return (0.0, None), state
        flat, back = groups.as_vector(norms)
        _require_like(state, jax.eval_shape(init, norms))
        is_seen = jnp.isfinite(flat) & ((flat > 0) | rule.takes_zero | signed)
        seen = jnp.where(is_seen, flat, jnp.ones_like(flat))
        shared = rule.shared(flat)

        def one(norm: jax.Array, state: RuleState) -> Any:
            (lower, upper), after = rule.limit(norm, state, *shared)
            return (None if isinstance(lower, float) and lower == 0.0 else lower), upper, after

        lower, upper, after = jax.vmap(one)(seen, state)
        low = 0.0 if lower is None else back(jnp.where(is_seen, lower, 0))
        high = back(jnp.where(is_seen, upper, bounds.highest(flat.dtype)))
        return (low, high), jax.tree.map(functools.partial(_where_seen, is_seen), after, state)

    signed = Threshold(init, functools.partial(limit, True)) if rule.signed else None
    return Threshold(init, functools.partial(limit, False), signed)


def _where_seen(is_seen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(is_seen, tuple(range(1, new.ndim))), new.astype(old.dtype), old)


def _require_like(state: State, expected: State) -> None:
    """Raises ValueError unless the state is one that `init` makes for these norms and arguments."""
    caller = "a threshold that follows the history of norms"
    if type(state) is not type(expected):
        raise ValueError(states.wrong(caller, states.described(expected), states.described(state)))
    came, needed = [list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (state, expected)]
    if came != needed:
        kind = states.described(expected)
        raise ValueError(
            states.wrong(caller, f"a {kind} with arrays of shapes {needed}", f"one with {came}")
            + " (in shard_map, init and update must see the same pieces of the leaves)"
        )


def _nbytes(state: RuleState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def taken_in(
    patience: int | None, spikes: jax.Array, is_spike: jax.Array, norm: jax.Array, bound: Any
) -> tuple[jax.Array, jax.Array]:
    """The value that enters statistics which exclude spikes, and the number of spikes in a row.

    A spike counts as the bound that it was clipped to. But norms that stay above the bound are a new level, which the
    bound would never reach. So after `patience` spikes in a row, a norm counts as itself.
    """
    spikes = jnp.where(is_spike, jnp.asarray(optax.safe_increment(spikes)), jnp.zeros_like(spikes))
    is_kept_out = is_spike if patience is None else is_spike & (spikes <= patience)
    return jnp.where(is_kept_out, bound, norm), spikes


def no_steps() -> jax.Array:
    """A step count of 0."""
    return jnp.zeros((), jnp.int32)
