"""Ours at the settings of the sources, where the defaults differ: what bounds the warm-up."""

import functools

import optaxclip as oc

autoclip = functools.partial(oc.autoclip, warmup_max_norm=None)
zclip = functools.partial(oc.zclip, warmup_max_norm=None)
clip_by_history = functools.partial(oc.clip_by_history, warmup_max_norm=None)
adagc = functools.partial(oc.adagc, warmup_take_in="clipped")
