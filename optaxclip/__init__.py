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
relative to weights   `adaptive_grad_clip`, `clippy`
the norms so far      `autoclip`, `percentile_clip`, `clip_by_tracked_quantile`: a quantile of them;
                      `zclip`, `clip_by_history`: their mean and deviation; `adagc`, `aggc`: a moving average;
                      `clip_norm_growth`: the last one
spiking coordinates   `spam_clip`, `adaptive_spike_clip` (with `scale_by_adaptive_norm`)
inside momentum       `clipped_momentum`, `mixed_clip`; `scale_by_acclip`, `scale_by_stable_adam`
each example          `per_example.clipped_value_and_grad`: in the place of `jax.value_and_grad`;
                      `per_example_global_norm_clip`, `per_example_layer_norm_clip`: for gradients that are there
around an optimizer   `skip_nonfinite`, `skip_spikes`: steps that are not taken; `reset_state_every`
around a clipper      `with_carry`: no bias; `as_function`: for what knows nothing of optax
in the backward pass  `clip_cotangents`: the gradient that flows back through an array
to log                `clip_stats`: what a clipper with `record=`, or a skip, did; `global_norm`: range-safe, and
                      global on every mesh
`diagnostics`         what recorded norms say: a summary, which clipper and bound they speak for, plots
====================  =============================================================================================
"""

from optaxclip import starting as starting  # first: it acts while the others import jax, which takes a while

# isort: split
from optaxclip import diagnostics, norms, per_example, thresholds
from optaxclip.backward import clip_cotangents
from optaxclip.clippers.averages import adagc, aggc, clip_by_history, clip_norm_growth, zclip
from optaxclip.clippers.elementwise import clip, clip_by_value, zero_nonfinite
from optaxclip.clippers.fixed import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_norm_range,
    smooth_clip_by_global_norm,
)
from optaxclip.clippers.momentum import clipped_momentum, mixed_clip
from optaxclip.clippers.quantiles import autoclip, clip_by_tracked_quantile, percentile_clip
from optaxclip.clippers.relative import adaptive_grad_clip, clippy
from optaxclip.clippers.scale_by import scale_by_acclip, scale_by_stable_adam
from optaxclip.clippers.spectral import clip_by_spectral_norm, clip_singular_values
from optaxclip.clippers.spikes import adaptive_spike_clip, scale_by_adaptive_norm, spam_clip
from optaxclip.core import Norm, Threshold, clip_by
from optaxclip.per_example.stacked import per_example_global_norm_clip, per_example_layer_norm_clip
from optaxclip.recorder import ClipStats
from optaxclip.stats import clip_stats
from optaxclip.sums import global_norm
from optaxclip.wrappers.carry import with_carry
from optaxclip.wrappers.functions import as_function
from optaxclip.wrappers.resets import reset_state_every
from optaxclip.wrappers.skips import skip_nonfinite, skip_spikes

__version__ = "0.1.0"

__all__ = [
    "ClipStats",
    "Norm",
    "Threshold",
    "adagc",
    "adaptive_grad_clip",
    "adaptive_spike_clip",
    "aggc",
    "as_function",
    "autoclip",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_history",
    "clip_by_leaf_norm",
    "clip_by_norm_range",
    "clip_by_spectral_norm",
    "clip_by_tracked_quantile",
    "clip_by_value",
    "clip_cotangents",
    "clip_norm_growth",
    "clip_singular_values",
    "clip_stats",
    "clipped_momentum",
    "clippy",
    "diagnostics",
    "global_norm",
    "mixed_clip",
    "norms",
    "per_example",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "percentile_clip",
    "reset_state_every",
    "scale_by_acclip",
    "scale_by_adaptive_norm",
    "scale_by_stable_adam",
    "skip_nonfinite",
    "skip_spikes",
    "smooth_clip_by_global_norm",
    "spam_clip",
    "thresholds",
    "with_carry",
    "zclip",
    "zero_nonfinite",
]
