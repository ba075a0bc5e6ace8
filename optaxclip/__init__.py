"""optaxclip: gradient clipping for JAX and optax.

Every clipper is an optax `GradientTransformation`: chain it with the optimizer, inside a jitted train step. Each
docstring says where in the chain the clipper belongs.

====================  =============================================================================================
`clip_by`             the mechanism: a norm (how large is each group?) and a threshold (how large may it be?)
`norms`               what to measure: all leaves, groups, leaves, units, matrices, relative change
`thresholds`          how large a norm may be: fixed, relative to the parameters, from the history of the norms
values                `clip`, `clip_by_value`, `zero_nonfinite`
a fixed bound         `clip_by_global_norm`, `clip_by_leaf_norm`, `clip_by_block_rms`, `clip_by_norm_range`,
                      `smooth_clip_by_global_norm`
singular values       `clip_by_spectral_norm`: scales each matrix; `clip_singular_values`: caps each singular value
relative to weights   `adaptive_grad_clip`
history of the norms  `autoclip`: their quantile; `zclip`, `clip_by_history`: their mean and deviation; `adagc`: their
                      moving average
inside momentum       `clipped_momentum`
per example           `per_example.clipped_value_and_grad`: replaces `jax.value_and_grad`;
                      `per_example.track_quantile`: a bound that follows the norms;
                      `per_example_global_norm_clip`, `per_example_layer_norm_clip`: for gradients that you already have
around an optimizer   `skip_nonfinite`, `skip_spikes`: skip steps; `skip_micro_steps`: skips micro-batches in
                      `optax.MultiSteps`
around a clipper      `with_carry`: removes the bias of clipping; `as_function`: a clipper as a plain function
in the backward pass  `clip_cotangents`: clips the gradient that flows back through an array
without an optimizer  `clip_tree`: a clipped pytree and its norm
logging               `clip_stats`: what a clipper with `record=`, or a skip, did; `global_norm`: right over the whole
                      float range and on every mesh
`diagnostics`         what recorded norms show: a summary, what other clippers would have done, plots
`migrate`             carries the state of a run over to another transformation
`contrib`             sixteen more methods: young, costly, or an optimizer as much as a clip
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

__all__ = [  # noqa: RUF022 -- in the order in which a reader meets them
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
    # a bound that follows the parameters, or the history of the norms
    "adaptive_grad_clip",
    "autoclip",
    "zclip",
    "clip_by_history",
    "adagc",
    # around an optimizer, or part of one
    "skip_nonfinite",
    "skip_spikes",
    "skip_micro_steps",
    "zero_nonfinite",
    "with_carry",
    "clipped_momentum",
    # per example, and the backward pass
    "per_example",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "clip_cotangents",
    # logging and diagnostics
    "clip_stats",
    "ClipStats",
    "global_norm",
    "clip_tree",
    "diagnostics",
    "migrate",
    # to build your own
    "clip_by",
    "norms",
    "thresholds",
    "Norm",
    "Threshold",
    "as_function",
    "contrib",
]
