"""The methods, one line each: the library's and optax's own, with one fixed setting for all tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

import optaxclip
from optaxclip import contrib, norms, thresholds

Transformation: TypeAlias = optax.GradientTransformation
Optimizer: TypeAlias = Callable[[Transformation, jax.Array], Transformation]


class Method(NamedTuple):
    """A way to clip.

    Attributes:
      name: what `--clippers` calls it.
      shown: what the table calls it: its call, arguments that are not defaults or have none included.
      place: where it stands in the chain.
      optimizer: from the task's optimizer without its rate, and the rate, to the whole optimizer.
      together: whether the runs of a program take each step together. One after the other they are faster where the
        method branches, since what is batched takes both branches.
    """

    name: str
    shown: str
    place: str
    optimizer: Optimizer
    together: bool = True


PLACES = {
    "before": "before the optimizer",
    "between": "after the optimizer's scaling, before the learning rate",
    "last": "after the learning rate",
    "instead": "in place of the optimizer's scaling",
    "around": "around clip_by_global_norm(1.0) and the optimizer",
    "both": "before the optimizer, and around it",
    "nowhere": "nowhere",
}


def layer(path: str) -> str:
    """Which layer a parameter belongs to."""
    return path.split("/", maxsplit=1)[0]


def _rate(rate: jax.Array) -> Transformation:
    return optax.scale_by_learning_rate(rate)


def _before(name: str, shown: str, make: Callable[[], Transformation]) -> Method:
    return Method(name, shown, "before", lambda scaling, rate: optax.chain(make(), scaling, _rate(rate)))


def _between(name: str, shown: str, make: Callable[[], Transformation]) -> Method:
    return Method(name, shown, "between", lambda scaling, rate: optax.chain(scaling, make(), _rate(rate)))


def _last(name: str, shown: str, make: Callable[[], Transformation]) -> Method:
    return Method(name, shown, "last", lambda scaling, rate: optax.chain(scaling, _rate(rate), make()))


def _instead(name: str, shown: str, make: Callable[[], Transformation]) -> Method:
    return Method(name, shown, "instead", lambda _, rate: optax.chain(make(), _rate(rate)))


def _around(
    name: str,
    shown: str,
    wrap: Callable[[Any], Transformation],
    clip: Callable[[float], Transformation] = optaxclip.clip_by_global_norm,
) -> Method:
    return Method(name, shown, "around", lambda scaling, rate: wrap(optax.chain(clip(1.0), scaling, _rate(rate))))


def _capped_autoclip() -> Transformation:
    return optaxclip.clip_by(norms.global_norm(), thresholds.chain(thresholds.quantile(0.1), thresholds.constant(1.0)))


def _spam(scaling: Transformation, rate: jax.Array) -> Transformation:
    inner = optax.chain(scaling, _rate(rate))
    return optax.chain(contrib.spam_clip(period=100), contrib.reset_state_every(inner, 100, warmup_steps=30))


UNCLIPPED = Method("none", "no clipping", "nowhere", lambda scaling, rate: optax.chain(scaling, _rate(rate)))

_ALL = [
    UNCLIPPED,
    # optax's own.
    _before("optax.clip", "optax.clip(1.0)", lambda: optax.clip(1.0)),
    _before("optax.clip_by_global_norm", "optax.clip_by_global_norm(1.0)", lambda: optax.clip_by_global_norm(1.0)),
    _between("optax.clip_by_block_rms", "optax.clip_by_block_rms(1.0)", lambda: optax.clip_by_block_rms(1.0)),
    _before("optax.adaptive_grad_clip", "optax.adaptive_grad_clip(0.01)", lambda: optax.adaptive_grad_clip(0.01)),
    _around(
        "optax.apply_if_finite",
        "optax.apply_if_finite(.., 5)",
        lambda inner: optax.apply_if_finite(inner, 5),
        optax.clip_by_global_norm,
    ),
    # A fixed bound.
    _before("clip", "clip(1.0)", lambda: optaxclip.clip(1.0)),
    _before("clip_by_global_norm", "clip_by_global_norm(1.0)", lambda: optaxclip.clip_by_global_norm(1.0)),
    _before("clip_by_leaf_norm", "clip_by_leaf_norm(1.0)", lambda: optaxclip.clip_by_leaf_norm(1.0)),
    _between("clip_by_block_rms", "clip_by_block_rms(1.0)", lambda: optaxclip.clip_by_block_rms(1.0)),
    _before("clip_by_norm_range", "clip_by_norm_range(0.1, 1.0)", lambda: optaxclip.clip_by_norm_range(0.1, 1.0)),
    _before(
        "smooth_clip_by_global_norm",
        "smooth_clip_by_global_norm(1.0)",
        lambda: optaxclip.smooth_clip_by_global_norm(1.0),
    ),
    # Values, without a kink.
    _before("tanh_clip", "tanh_clip(1.0)", lambda: contrib.tanh_clip(1.0)),
    _before("arcsinh_clip", "arcsinh_clip(1.0)", lambda: contrib.arcsinh_clip(1.0)),
    # Singular values.
    # Together, their eigenvalues are one large batch, and with two cores jaxlib 0.10.2 deadlocks in it.
    _between(
        "clip_by_spectral_norm", "clip_by_spectral_norm(1.0)", lambda: optaxclip.clip_by_spectral_norm(1.0)
    )._replace(together=False),
    _before("clip_singular_values", "clip_singular_values(1.0)", lambda: optaxclip.clip_singular_values(1.0))._replace(
        together=False
    ),
    # Relative to the parameters.
    _before("adaptive_grad_clip", "adaptive_grad_clip(0.01)", lambda: optaxclip.adaptive_grad_clip(0.01)),
    _last("clippy", "clippy(0.5, 0.01)", lambda: contrib.clippy(0.5, 0.01)),
    # Bounds that follow the norms.
    _before("autoclip", "autoclip(10.0)", lambda: optaxclip.autoclip(10.0)),
    _before("capped_autoclip", "autoclip(10.0), at most 1.0", _capped_autoclip),
    _before("percentile_clip", "percentile_clip(5.0)", lambda: contrib.percentile_clip(5.0)),
    _before(
        "clip_by_tracked_quantile",
        "clip_by_tracked_quantile(0.5)",
        lambda: contrib.clip_by_tracked_quantile(0.5),
    ),
    _before("zclip", "zclip(2.5)", lambda: optaxclip.zclip(2.5)),
    _before("clip_by_history", "clip_by_history(3.0)", lambda: optaxclip.clip_by_history(3.0)),
    _before("adagc", "adagc(1.05)", lambda: optaxclip.adagc(1.05)),
    _before("aggc", "aggc(layer, 2.0)", lambda: contrib.aggc(layer, 2.0)),
    _between("clip_norm_growth", "clip_norm_growth(1.01)", lambda: contrib.clip_norm_growth(1.01)),
    # Coordinates that spike.
    _before("spam_clip", "spam_clip(5000.0)", lambda: contrib.spam_clip(5000.0)),
    Method("spam", "spam_clip + reset_state_every(.., 100)", "both", _spam),
    _before("adaptive_spike_clip", "adaptive_spike_clip(0.999)", lambda: contrib.adaptive_spike_clip(0.999)),
    _before(
        "stable_spam",
        "adaptive_spike_clip + scale_by_adaptive_norm",
        lambda: optax.chain(contrib.adaptive_spike_clip(), contrib.scale_by_adaptive_norm()),
    ),
    # Inside momentum.
    _instead("clipped_momentum", "clipped_momentum(1.0)", lambda: optaxclip.clipped_momentum(1.0)),
    _instead("mixed_clip", "mixed_clip(1.0)", lambda: contrib.mixed_clip(1.0)),
    _instead("scale_by_acclip", "scale_by_acclip()", contrib.scale_by_acclip),
    _instead("scale_by_stable_adam", "scale_by_stable_adam()", contrib.scale_by_stable_adam),
    # About the last update.
    _before("centered_clip", "centered_clip(1.0)", lambda: contrib.centered_clip(1.0)),
    # Around a clip or an optimizer.
    _before(
        "with_carry",
        "with_carry(clip_by_global_norm(1.0))",
        lambda: optaxclip.with_carry(optaxclip.clip_by_global_norm(1.0)),
    ),
    _before(
        "zero_nonfinite",
        "zero_nonfinite + clip_by_global_norm(1.0)",
        lambda: optax.chain(optaxclip.zero_nonfinite(), optaxclip.clip_by_global_norm(1.0)),
    ),
    _around("skip_nonfinite", "skip_nonfinite(..)", optaxclip.skip_nonfinite),
    _around(
        "skip_spikes",
        "skip_spikes(.., mean_std(6.0))",
        lambda inner: optaxclip.skip_spikes(inner, thresholds.mean_std(6.0)),
    ),
]

METHODS = {method.name: method for method in _ALL}
