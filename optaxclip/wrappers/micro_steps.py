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
    """What `optax.MultiSteps` keeps of the last micro-batch as its `skip_state`. Both are boolean scalars.

    Attributes:
      micro_skipped: whether it was left out.
      micro_nonfinite: whether that was because a gradient was infinite or NaN.
    """

    micro_skipped: jax.Array
    micro_nonfinite: jax.Array


def skip_micro_steps(
    max_norm: Bound = math.inf, *, norm: Norm = norms.global_norm(), axes: Axes = "auto"
) -> optax.ShouldSkipUpdateFunction:
    """Makes the rule by which `optax.MultiSteps` leaves out a micro-batch: a norm above `max_norm`, or not finite.

    One bad micro-batch then costs one micro-batch: another takes its place in the sum.

    Args:
      max_norm: the bound, at least 0, in the units of the norm: a number, an array, a prefix pytree of these where the
        norm has several groups, or a schedule, which is called with the number of gradient steps. By default only what
        is not finite is left out.
      norm: what to measure, from `optaxclip.norms`. Leaves that it leaves out, as by `include=`, may be NaN.
      axes: which mesh axes split the leaves; see `clip_by`. All devices make the same decision.

    Returns:
      A function for `should_skip_update_fn` of `optax.MultiSteps`. The `skip_state` there is a `MicroStep`.

    Raises:
      ValueError: if `max_norm` is negative or NaN, `norm` is no Norm, or `axes` names none.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optaxclip.skip_micro_steps())
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for grad in (1.0, jnp.nan, 3.0):  # the mean of 1 and 3
      ...     updates, state = tx.update(jnp.array([grad]), state, params)
      ...     print(updates[0], state.skip_state.micro_skipped)
      0.0 False
      0.0 True
      -2.0 False

    Notes:
      - Guarantees: a micro-batch that is left out changes neither the sum nor the number of micro-batches in it.
      - Edge cases: gradients of 1e30 have a finite norm. Leaves without floats are not checked. Without `params`, a
        gradient may not be missing (None).
      - Placement: in `optax.MultiSteps`. Around it `skip_nonfinite` does the same, and counts.
      - Differs from optax: `optax.skip_not_finite` and `optax.skip_large_updates` let each device of a `shard_map`
        decide alone. A sum of squares overflows to inf, so the second leaves out norms above 1.8e19.

    See also:
      `skip_spikes`, with statistics, around the optimizer.

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
        # A schedule of the bound counts gradient steps, which optax does.
        judged = core.judge(norm, threshold, leaves, bounds.ScheduleState(jnp.asarray(gradient_step)))
        verdict = verdicts.of_norms(judged, leaves)
        is_skipped = verdict.high | ~verdict.finite
        return is_skipped, MicroStep(is_skipped, ~verdict.finite)

    return should_skip
