"""The rows of the table: what is compared, one line each."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax

import optaxclip
from optaxclip import contrib, thresholds
from optaxclip.demo.watching import watch

SKIP = "skip_spikes"
WINDOW = 32  # norms that a step is compared with before it may be skipped

Clipper: TypeAlias = Callable[..., optax.GradientTransformation]


class Row(NamedTuple):
    """One way to train.

    Attributes:
      name: what `--clippers` calls it.
      shown: what the table calls it.
      around: from an optimizer, and the number of steps to record, to the optimizer with the clip.
      clipper: makes the clipper alone, for `replay`; None if the row has none that could be replayed.
    """

    name: str
    shown: str
    around: Callable[[optax.GradientTransformation, int], optax.GradientTransformation]
    clipper: Callable[[], optax.GradientTransformation] | None


def _named(clipper: Clipper, arguments: tuple[Any, ...]) -> tuple[str, str]:
    package = clipper.__module__.partition(".")[0]
    name = clipper.__name__ if package == "optaxclip" else f"{package}.{clipper.__name__}"
    return name, f"{name}({', '.join(getattr(each, '__name__', str(each)) for each in arguments)})"


def layer(path: str) -> str:
    """The group of a parameter, for `aggc`: a bias belongs to its matrix. A stack of matrices is one group."""
    return path.removesuffix("_bias")


def _watched(clipper: Clipper, arguments: tuple[Any, ...], steps: int) -> optax.GradientTransformation:
    """The clipper, watched. What `clip_by` made also records its steps."""
    if "record" in inspect.signature(clipper).parameters:
        return watch(clipper(*arguments, record=steps))
    return watch(clipper(*arguments))


def _clip_gradients(clipper: Clipper, *arguments: Any) -> Row:
    """A clipper before the optimizer."""
    name, shown = _named(clipper, arguments)
    return Row(
        name,
        shown,
        lambda optimizer, steps: optax.chain(_watched(clipper, arguments, steps), optimizer),
        lambda: clipper(*arguments),
    )


def _clip_changes(clipper: Clipper, *arguments: Any) -> Row:
    """A clipper after the optimizer: it sees by how much the parameters are about to change."""
    name, shown = _named(clipper, arguments)
    return Row(
        name,
        f"{shown}, last",
        lambda optimizer, steps: optax.chain(optimizer, _watched(clipper, arguments, steps)),
        lambda: clipper(*arguments),
    )


def _skip_spikes(deviations: float, bound: float) -> Row:
    """Steps whose norm stands out are skipped. In the others the gradient is clipped to the bound."""
    threshold = thresholds.mean_std(deviations, window=WINDOW, warmup_steps=WINDOW)

    def around(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        del steps  # it keeps no record: the training logs the norms
        clip = watch(optaxclip.clip_by_global_norm(bound))
        return optaxclip.skip_spikes(optax.chain(clip, optimizer), threshold)

    return Row(SKIP, f"skip_spikes(.., mean_std({deviations}))", around, None)


UNCLIPPED = Row("none", "no clipping", lambda optimizer, _: optimizer, None)

_ALL = [
    UNCLIPPED,
    _clip_gradients(optax.clip_by_global_norm, 1.0),
    _clip_gradients(optaxclip.clip_by_global_norm, 1.0),
    _clip_gradients(optaxclip.smooth_clip_by_global_norm, 1.0),
    _clip_gradients(optaxclip.clip_by_norm_range, 0.5, 1.0),
    _clip_gradients(optaxclip.clip_by_leaf_norm, 1.0),
    _clip_gradients(optaxclip.clip_by_block_rms, 0.01),
    _clip_gradients(optaxclip.clip_by_value, -0.1, 0.1),
    _clip_gradients(optaxclip.adaptive_grad_clip, 0.01),
    _clip_changes(contrib.clippy, 0.1, 0.01),
    _clip_gradients(optaxclip.autoclip, 10.0),
    _clip_gradients(contrib.percentile_clip, 5.0),
    _clip_gradients(contrib.clip_by_tracked_quantile, 0.5),
    _clip_gradients(optaxclip.zclip, 2.5),
    _clip_gradients(optaxclip.adagc, 1.05),
    _clip_gradients(contrib.aggc, layer, 2.0),
    _clip_gradients(optaxclip.clip_by_history, 3.0),
    _clip_gradients(contrib.clip_norm_growth, 1.01),
    _skip_spikes(3.0, 1.0),
]

ROWS = {row.name: row for row in _ALL}
