"""optaxclip: gradient clipping for JAX and optax.

Every clipper is an optax `GradientTransformation`: chain it with the optimizer, inside a jitted train step;
its docstring says at which place.

====================  =============================================================================================
`clip_by`             the mechanism: a norm (how big is each group?) and a threshold (how big may it be?)
`norms`               what can be measured: all leaves, groups, leaves, units, matrices, relative change
`thresholds`          what can be permitted: fixed, relative to the parameters, from the history of the norms
values                `clip`, `clip_by_value`, `zero_nonfinite`
a fixed bound         `clip_by_global_norm`, `clip_by_leaf_norm`, `clip_by_block_rms`, `clip_by_norm_range`,
                      `smooth_clip_by_global_norm`
singular values       `clip_by_spectral_norm`: of each matrix the largest, by scaling it; `clip_singular_values`: each
relative to weights   `adaptive_grad_clip`
the norms so far      `autoclip`: a quantile of them; `zclip`, `clip_by_history`: their mean and deviation;
                      `adagc`: a moving average
inside momentum       `clipped_momentum`
each example          `per_example.clipped_value_and_grad`: in the place of `jax.value_and_grad`;
                      `per_example.track_quantile`: its bound follows the norms;
                      `per_example_global_norm_clip`, `per_example_layer_norm_clip`: for gradients that are there
around an optimizer   `skip_nonfinite`, `skip_spikes`: steps that are not taken; `skip_micro_steps`: micro-batches
                      that `optax.MultiSteps` leaves out
around a clipper      `with_carry`: no bias; `as_function`: for what knows nothing of optax
in the backward pass  `clip_cotangents`: the gradient that flows back through an array
a tree in hand        `clip_tree`: clipped, and its norm, without an optimizer
to log                `clip_stats`: what a clipper with `record=`, or a skip, did; `global_norm`: range-safe, and
                      global on every mesh
`diagnostics`         what recorded norms say: a summary, what other clippers would have done, plots
another method        `migrate`: the state of a run in another transformation, with what of it still has a place
`contrib`             twelve more methods: young, costly, or an optimizer as much as a clip
====================  =============================================================================================
"""

from optaxclip import contrib, diagnostics, norms, per_example, thresholds
from optaxclip.backward import clip_cotangents
from optaxclip.clippers.averages import adagc
from optaxclip.clippers.deviations import clip_by_history, zclip
from optaxclip.clippers.elementwise import clip, clip_by_value, zero_nonfinite
from optaxclip.clippers.fixed import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_norm_range,
    smooth_clip_by_global_norm,
)
from optaxclip.clippers.momentum import clipped_momentum
from optaxclip.clippers.quantiles import autoclip
from optaxclip.clippers.relative import adaptive_grad_clip
from optaxclip.clippers.spectral import clip_by_spectral_norm, clip_singular_values
from optaxclip.core import Norm, Threshold, clip_by
from optaxclip.functions import as_function, clip_tree, global_norm
from optaxclip.migration import migrate
from optaxclip.per_example.stacked import per_example_global_norm_clip, per_example_layer_norm_clip
from optaxclip.records import ClipStats, clip_stats
from optaxclip.wrappers.carry import with_carry
from optaxclip.wrappers.micro_steps import skip_micro_steps
from optaxclip.wrappers.skips import skip_nonfinite, skip_spikes

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 -- in the order in which one meets them
    # a fixed bound
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_block_rms",
    "clip_by_norm_range",
    "smooth_clip_by_global_norm",
    "clip",
    "clip_by_value",
    "clip_by_spectral_norm",
    "clip_singular_values",
    # a bound that follows the parameters, or the norms so far
    "adaptive_grad_clip",
    "autoclip",
    "zclip",
    "clip_by_history",
    "adagc",
    # around an optimizer, and in its place
    "skip_nonfinite",
    "skip_spikes",
    "skip_micro_steps",
    "zero_nonfinite",
    "with_carry",
    "clipped_momentum",
    # single examples, and the backward pass
    "per_example",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "clip_cotangents",
    # what happened
    "clip_stats",
    "ClipStats",
    "global_norm",
    "clip_tree",
    "diagnostics",
    "migrate",
    # to build another
    "clip_by",
    "norms",
    "thresholds",
    "Norm",
    "Threshold",
    "as_function",
    "contrib",
]
