"""Published methods that are young, costly, or an optimizer as much as a clip; README.md here has the criteria.

====================  =============================================================================================
values                `tanh_clip`, `arcsinh_clip`: smooth
relative to weights   `clippy`: by the worst coordinate
history of the norms  `percentile_clip`, `clip_by_tracked_quantile`: a quantile; `aggc`: a band around a moving average;
                      `clip_norm_growth`: a multiple of the last norm
spiking coordinates   `spam_clip`, with `reset_state_every` around the optimizer; `adaptive_spike_clip`, with
                      `scale_by_adaptive_norm`
attention logits      `qk_clip`: scales the weights of queries and keys, which `Projection` describes
inside momentum       `mixed_clip`; `centered_clip`, around the last update; `scale_by_acclip`, `scale_by_stable_adam`
====================  =============================================================================================
"""

from optaxclip.contrib.attention import Projection, qk_clip
from optaxclip.contrib.averages import aggc, clip_norm_growth
from optaxclip.contrib.centered import centered_clip
from optaxclip.contrib.elementwise import arcsinh_clip, tanh_clip
from optaxclip.contrib.momentum import mixed_clip
from optaxclip.contrib.quantiles import clip_by_tracked_quantile, percentile_clip
from optaxclip.contrib.relative import clippy
from optaxclip.contrib.resets import reset_state_every
from optaxclip.contrib.scale_by import scale_by_acclip, scale_by_stable_adam
from optaxclip.contrib.spikes import adaptive_spike_clip, scale_by_adaptive_norm, spam_clip

__all__ = [
    "Projection",
    "adaptive_spike_clip",
    "aggc",
    "arcsinh_clip",
    "centered_clip",
    "clip_by_tracked_quantile",
    "clip_norm_growth",
    "clippy",
    "mixed_clip",
    "percentile_clip",
    "qk_clip",
    "reset_state_every",
    "scale_by_acclip",
    "scale_by_adaptive_norm",
    "scale_by_stable_adam",
    "spam_clip",
    "tanh_clip",
]
