"""Resets the state of an optimizer periodically."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts, states, trees
from optaxclip._arrays.parameters import NO_PARAMS, parameters
from optaxclip._arrays.trees import Tree
from optaxclip.core import Updates


class ResetState(NamedTuple):
    """State of `reset_state_every`.

    Attributes:
      reset_step: int32 scalar, the number of updates.
      inner_state: the state of the wrapped transformation.
    """

    reset_step: jax.Array
    inner_state: Tree


def reset_state_every(
    inner: optax.GradientTransformation, period: int = 500, *, warmup_steps: int = 150
) -> optax.GradientTransformationExtraArgs:
    r"""Resets the state that an optimizer keeps per parameter, every `period` steps.

    A spike stays in Adam's moments for hundreds of steps; a reset removes it. The state returns to its initial value;
    counts and schedules continue. After a reset, the updates start small and grow along a half cosine:

    .. math:: u \leftarrow u \cdot \Bigl(1 - 0.99 \cdot \tfrac12 \bigl(1 + \cos\tfrac{\pi j}{W + 1}\bigr)\Bigr),
        \qquad j = t \bmod P < W,\ t \ge P

    Args:
      inner: the optimizer.
      period: P, the number of steps from one reset to the next, at least 1; 500 in the paper. A reset comes before the
        gradient of its step enters the state.
      warmup_steps: W, over how many steps the updates grow after a reset, at least 0; 150 in the paper.

    Returns:
      An optax transformation. Its state is the inner state and a step count. Its `update` needs `params`.

    Raises:
      ValueError: if `period` is less than 1, or `warmup_steps` is negative; at update, without `params`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.contrib.reset_state_every(optax.ema(0.9, debias=False), 4, warmup_steps=2)
      >>> params = jnp.zeros(1)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for _ in range(6):
      ...     updates, state = update(jnp.ones(1), state, params)
      ...     print(f"{updates[0]:.3f}", end=" ")
      0.100 0.190 0.271 0.001 0.049 0.271

    Notes:
      - Guarantees: outside the warm-up after a reset, and in the first `period - 1` steps, the updates are those of
        `inner`, unchanged.
      - Edge cases: `optax.tree.map_params` decides which part of the state is per parameter.
      - Placement: around the optimizer, and inside `optax.MultiSteps`. Around `optax.MultiSteps` it would also reset
        the sum of gradients. SPAM is `chain(contrib.spam_clip(period=500), contrib.reset_state_every(adam(1e-3),
        500))`.
      - Differs from other code: the class in the published code has a warm-up of 50 steps by default. The port in
        pytorch_optimizer also runs the warm-up one step ahead.

    References:
      Huang et al., SPAM: spike-aware Adam with momentum reset for stable LLM training, ICLR 2025, arXiv:2501.06842.

    See also:
      `spam_clip`, `adaptive_spike_clip`.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(period=period, warmup_steps=warmup_steps)
    checks.transformation("inner", inner)
    period = checks.whole("period", period)
    warmup_steps = checks.whole("warmup_steps", warmup_steps, at_least=0)
    wrapped = optax.with_extra_args_support(inner)

    def init(params: Tree) -> ResetState:
        return ResetState(jnp.zeros((), jnp.int32), wrapped.init(params))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra_args: Any) -> tuple[Updates, ResetState]:
        if params is None:
            raise ValueError(NO_PARAMS)
        state = states.of_kind(ResetState, state, "reset_state_every")
        step = jnp.asarray(optax.safe_increment(state.reset_step))
        phase = step % period
        before = _reset_if(phase == 0, wrapped, state.inner_state, _known_at_init(wrapped, state, params, updates))
        updates, after = wrapped.update(updates, before, params, **extra_args)
        grows = (step >= period) & (phase < warmup_steps)
        factor = 1 - 0.99 * (1 + jnp.cos(jnp.pi * phase.astype(jnp.float32) / (warmup_steps + 1))) / 2

        def scaled(leaf: Any) -> Any:
            if not dtypes.is_inexact(leaf):
                return leaf
            leaf = jnp.asarray(leaf)
            wide = leaf.astype(dtypes.wide(leaf.dtype))
            return jnp.where(grows, (wide * factor.astype(wide.dtype)).astype(leaf.dtype), leaf)

        return jax.tree.map(scaled, updates), ResetState(step, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _known_at_init(tx: optax.GradientTransformationExtraArgs, state: ResetState, params: Tree, updates: Updates) -> Any:
    """The parameters that the inner state was made from: all of `params`, or only those that have a gradient."""
    arrays = parameters(params, updates)
    if arrays is params or _has_structure(tx, arrays, state.inner_state):
        return arrays
    return jax.tree.map(lambda update, param: None if update is None else param, updates, arrays, is_leaf=trees.is_none)


def _has_structure(tx: optax.GradientTransformationExtraArgs, params: Tree, state: Tree) -> bool:
    return jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)


def _reset_if(resets: jax.Array, tx: optax.GradientTransformationExtraArgs, state: Tree, params: Tree) -> Any:
    """The state; if `resets` is set, with its parts per parameter at their initial value."""
    per_param: Any = optax.tree.map_params(
        tx,
        lambda _: True,
        state,
        transform_non_params=lambda other: jax.tree.map(lambda _: False, other),
    )
    return jax.tree.map(functools.partial(_put_back_if, resets), per_param, state, tx.init(params))


def _put_back_if(resets: jax.Array, is_per_param: bool, now: Any, first: Any) -> Any:
    if not is_per_param:
        return now
    if jnp.shape(now) != jnp.shape(first):
        raise ValueError(
            f"params and the inner state differ in shape: {jnp.shape(first)} and {jnp.shape(now)}. In shard_map, pass "
            "the piece of the parameters that belongs to this piece of the state"
        )
    return jnp.where(resets, layouts.like(first, now), now)  # on an Explicit mesh, `first` may be unsharded
