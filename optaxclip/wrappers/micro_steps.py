"""Which micro-batches `optax.MultiSteps` leaves out of its sum of gradients."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import core, norms, thresholds
from optaxclip._arguments import bounds, checks
from optaxclip._arrays.mesh import Axes
from optaxclip._arrays.parameters import beside
from optaxclip._arrays.trees import Tree
from optaxclip.core import Bound, Norm, Updates
from optaxclip.wrappers import verdicts


class MicroStep(NamedTuple):
    """The `skip_state` of `optax.MultiSteps` for the last micro-batch. Both fields are boolean scalars.

    Attributes:
      micro_skipped: whether the micro-batch was left out.
      micro_nonfinite: whether a gradient was infinite or NaN.
    """

    micro_skipped: jax.Array
    micro_nonfinite: jax.Array


def skip_micro_steps(
    max_norm: Bound = math.inf, *, norm: Norm = norms.global_norm(), axes: Axes = "auto"
) -> optax.ShouldSkipUpdateFunction:
    """Makes `optax.MultiSteps` leave out micro-batches with a norm above `max_norm`, or a non-finite one.

    A bad micro-batch then costs one micro-batch, not the whole step: the next one takes its place in the sum.

    Args:
      max_norm: the bound, at least 0, in the units of the norm: a number, an array, a prefix pytree of these if the
        norm has several groups, or a schedule of the number of gradient steps. By default, only non-finite
        micro-batches are left out.
      norm: what to measure, from `optaxclip.norms`. Leaves that it excludes, for example by `include=`, may be NaN.
      axes: which mesh axes split the leaves; see `clip_by`. All devices make the same decision.

    Returns:
      A function for `should_skip_update_fn` of `optax.MultiSteps`. The `skip_state` there is a `MicroStep`.

    Raises:
      ValueError: if `max_norm` is negative or NaN, `norm` is not a Norm, or `axes` is of the wrong kind.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optaxclip.skip_micro_steps())
      >>> params = jnp.zeros(1)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grad in (1.0, jnp.nan, 3.0):  # the mean of 1 and 3
      ...     updates, state = update(jnp.array([grad]), state, params)
      ...     print(updates[0], state.skip_state.micro_skipped)
      0.0 False
      0.0 True
      -2.0 False

    Notes:
      - Guarantees: a micro-batch that is left out changes neither the sum nor its number of micro-batches.
      - Edge cases: gradients of 1e30 have a finite norm, so they do not count as non-finite. Leaves without floats are
        not checked. Without `params`, no gradient may be None.
      - Placement: in `optax.MultiSteps`. `skip_nonfinite` around `optax.MultiSteps` does the same, and counts.
      - Differs from optax: `optax.skip_not_finite` and `optax.skip_large_updates` let each device of a `shard_map`
        decide alone. `optax.skip_large_updates` also leaves out norms above 1.8e19, because its sum of squares
        overflows.

    See also:
      `skip_spikes`, around the optimizer, with thresholds that follow the norms.

      Notebook: `notebooks/recipes.ipynb`, accumulated gradients.
    """
    checks.bound("max_norm", max_norm)
    checks.instance("norm", norm, Norm, "norms.global_norm()")
    checks.axes(axes)
    threshold = thresholds.constant(max_norm)

    def should_skip(
        updates: Updates, gradient_step: jax.typing.ArrayLike, params: Tree = None
    ) -> tuple[jax.Array, MicroStep]:
        filled, known = beside(updates, params)
        leaves = core.Leaves(filled, known, axes, told={})
        # A scheduled bound depends on the number of gradient steps, which optax counts.
        judged = core.judge(norm, threshold, leaves, bounds.ScheduleState(jnp.asarray(gradient_step)))
        verdict = verdicts.of_norms(judged, leaves)
        is_skipped = verdict.high | ~verdict.finite
        return is_skipped, MicroStep(is_skipped, ~verdict.finite)

    return should_skip
