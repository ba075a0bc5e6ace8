"""What follows the history of norms: a rule for one group, lifted over all of them.

A rule knows one norm and its own state. `per_group` makes a Threshold of it: every group of every Norm, be it all
leaves, a leaf or a unit, gets a state of its own, and the statistics of each are guarded alone.
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
    """How much one group may have, from its own history.

    Attributes:
      init: `dtype -> state` before the first norm.
      limit: `(norm, state, *shared) -> ((lower, upper), state)`, with `norm` positive and finite.
      shared: from the norms of all groups, a vector, what `limit` is told besides.
      takes_zero: whether a norm of 0 is an observation, too.
      signed: whether `limit` is right for finite numbers of any sign, too.
    """

    init: Callable[[Any], RuleState]
    limit: Callable[..., tuple[tuple[Any, Any], RuleState]]
    shared: Callable[[jax.Array], tuple[Any, ...]] = lambda norms: ()
    takes_zero: bool = False
    signed: bool = False


def of_logarithms(rule: Rule) -> Rule:
    """A rule for numbers of any sign, applied to the logarithms of norms.

    Its state holds logarithms, and the upper end of the band is the exponential of its own; there is no lower end.
    """

    def limit(norm: jax.Array, state: RuleState, *shared: Any) -> tuple[tuple[float, jax.Array], RuleState]:
        # XLA's logarithm of a subnormal loss (jax 0.8 to 0.12) is -inf.
        log_norm = jnp.log(jnp.maximum(norm, float(jnp.finfo(norm.dtype).tiny)))
        (_, upper), after = rule.limit(log_norm, state, *shared)
        # The exponential of the logarithm may round below the norm, which would be clipped by an ulp.
        bound = jnp.where(log_norm <= upper, jnp.maximum(exponential(upper), norm), exponential(upper))
        return (0.0, bound), after

    return rule._replace(limit=limit, signed=False)


def exponential(log: jax.Array) -> jax.Array:
    """The exponential as a positive normal number: where it is beyond the largest float, that."""
    info = jnp.finfo(log.dtype)
    most = float(np.nextafter(np.log(info.max), info.dtype.type(0)))  # rounded, the logarithm may be that of inf
    size = jnp.exp(jnp.minimum(log, most))
    return jnp.where(log > most, jnp.full_like(log, bounds.highest(log.dtype)), jnp.maximum(size, float(info.tiny)))


_OUTLIER = 10  # times the mean so far: more is no observation that a mean survives


def bounded_at_first(
    rule: Rule, warmup_max_norm: Number | None, so_far: Callable[[RuleState], tuple[jax.Array, jax.Array]]
) -> Rule:
    """A rule that bounds nothing in its warm-up, with a bound there.

    Its statistics take norms in as measured, not as clipped: the mean could never exceed the bound. But a norm of 1e25
    would stay in a mean and its deviation for thousands of steps. So a norm counts for no more than the bound, or ten
    times the mean so far where that is more.

    Args:
      rule: for positive numbers.
      warmup_max_norm: the bound; None is none, and leaves the rule as it is.
      so_far: from a state to whether the next norm belongs to the warm-up, and the mean of the norms, 0 for none,
        inf for statistics that take in every norm as measured.
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
    """A rule for one group as a Threshold for all.

    A norm that is 0, infinite or NaN is no observation: the state of its group stays bit for bit, the others go on.
    For a number of any sign, which the `signed` of the result judges, 0 and below are observations.

    Args:
      rule: the rule. Its state's arrays get the groups as a leading axis.
      max_groups: the largest number of groups allowed.
    """

    def init(norms: Norms) -> State:
        number = groups.number(norms)
        if max_groups is not None and number > max_groups:
            raise ValueError(
                f"there are {number} groups, and the history of each takes {_nbytes(rule.init(jnp.float32)):,} bytes; "
                f"pass window=, or a norm with at most {max_groups} groups"
            )
        one = rule.init(groups.dtype(norms))
        # Without groups one stands in: checkpoints refuse empty arrays.
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
    """Raises unless a state is one that `init` makes for these norms, by these arguments."""
    caller = "a threshold that follows the history of norms"
    if type(state) is not type(expected):
        raise ValueError(states.wrong(caller, states.described(expected), states.described(state)))
    came, needed = [list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (state, expected)]
    if came != needed:
        kind = states.described(expected)
        raise ValueError(
            states.wrong(caller, f"a {kind} with arrays of shapes {needed}", f"one with {came}")
            + " (in shard_map, of the same pieces of the leaves)"
        )


def _nbytes(state: RuleState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def taken_in(
    patience: int | None, spikes: jax.Array, is_spike: jax.Array, norm: jax.Array, bound: Any
) -> tuple[jax.Array, jax.Array]:
    """What statistics that keep spikes out take in, and the number of spikes in a row with this norm.

    A spike counts as the bound that it was clipped to. But norms that stay above the bound are no spikes, they are the
    new level, and the bound would never get there: after `patience` in a row a norm counts as itself.
    """
    spikes = jnp.where(is_spike, jnp.asarray(optax.safe_increment(spikes)), jnp.zeros_like(spikes))
    is_kept_out = is_spike if patience is None else is_spike & (spikes <= patience)
    return jnp.where(is_kept_out, bound, norm), spikes


def no_steps() -> jax.Array:
    """A count at its start."""
    return jnp.zeros((), jnp.int32)
