"""The transformations that the benchmarks compare, by name."""

from collections.abc import Callable
from typing import Any

import optax

import optaxclip as oc
from optaxclip import contrib
from tests.benchmarks import trees

Make = Callable[[], optax.GradientTransformation]

# Gradients are about 0.01 each, parameters 0.02: every bound is below the norms that it meets.
OURS: dict[str, Make] = {
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(1.0),
    "clip_by_global_norm, record=256": lambda: oc.clip_by_global_norm(1.0, record=256),
    "clip": lambda: oc.clip(0.005),
    "tanh_clip": lambda: contrib.tanh_clip(0.005),
    "arcsinh_clip": lambda: contrib.arcsinh_clip(0.005),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm(0.1),
    "clip_by_leaf_norm, record=256": lambda: oc.clip_by_leaf_norm(0.1, record=256),
    "clip_by_block_rms": lambda: oc.clip_by_block_rms(0.005),
    "clip_by_norm_range": lambda: oc.clip_by_norm_range(0.1, 1.0),
    "smooth_clip_by_global_norm": lambda: oc.smooth_clip_by_global_norm(1.0),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.01),
    "clippy": lambda: contrib.clippy(0.1, 1e-7),
    "autoclip": oc.autoclip,
    "autoclip, window=1000": lambda: oc.autoclip(window=1000),
    "percentile_clip": contrib.percentile_clip,
    "zclip": oc.zclip,
    "adagc": oc.adagc,
    "aggc": lambda: contrib.aggc(lambda path: path.split("/")[0], 2.0),
    "clip_by_history": oc.clip_by_history,
    "clip_by_tracked_quantile": contrib.clip_by_tracked_quantile,
    "clip_norm_growth": contrib.clip_norm_growth,
    "adaptive_spike_clip": contrib.adaptive_spike_clip,
    "scale_by_adaptive_norm": contrib.scale_by_adaptive_norm,
    "zero_nonfinite": oc.zero_nonfinite,
    # With a state per coordinate, which they read and write besides.
    "spam_clip": contrib.spam_clip,
    "clipped_momentum": lambda: oc.clipped_momentum(1.0),
    "mixed_clip": lambda: contrib.mixed_clip(1.0),
    "centered_clip": lambda: contrib.centered_clip(1.0),
    "with_carry": lambda: oc.with_carry(oc.clip_by_global_norm(1.0)),
}
# For the tree whose blocks are stacked.
STACKED: dict[str, Make] = {
    "adaptive_grad_clip, stacked": lambda: oc.adaptive_grad_clip(0.01, stacked=trees.LAYER_AXES),
    "clip_by_leaf_norm, stacked": lambda: oc.clip_by_leaf_norm(0.1, stacked=trees.LAYER_AXES),
}
# Instead of Adam.
OPTIMIZERS: dict[str, Make] = {
    "scale_by_acclip": lambda: optax.chain(contrib.scale_by_acclip(), optax.scale_by_learning_rate(1e-4)),
    "scale_by_stable_adam": lambda: optax.chain(contrib.scale_by_stable_adam(), optax.scale_by_learning_rate(1e-4)),
}
OPTAX: dict[str, Make] = {
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "optax.clip": lambda: optax.clip(0.005),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(0.005),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
}
FIRST = ("optax.clip_by_global_norm", "clip_by_global_norm")


def peer(name: str) -> str:
    """The clip of optax beside which a clip is put: its namesake, or else that by global norm."""
    namesake = "optax." + name.split(",", maxsplit=1)[0].removeprefix("optax.")
    return namesake if namesake in OPTAX else FIRST[0]


def chosen(names: list[str], tree: str) -> dict[str, Any]:
    """Makes the clips of these names; of every clip there is for this tree if one of them is "all"."""
    known = OPTAX | OURS | (STACKED if tree == "stacked" else {}) | OPTIMIZERS
    if "all" in names:
        return {name: make() for name, make in known.items()}
    wanted = dict.fromkeys([*FIRST, *(peer(name) for name in names), *names])
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no clip is called {unknown[0]!r} on this tree; there are {', '.join(known)}")
    return {name: known[name]() for name in wanted}
