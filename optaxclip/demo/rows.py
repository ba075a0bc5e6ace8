"""The rows of the table: what is compared, one line each."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax

import optaxclip
from optaxclip import contrib
from optaxclip.demo.watching import watch

Clipper: TypeAlias = Callable[..., optax.GradientTransformation]


class Row(NamedTuple):
    """One way to train.

    Attributes:
      name: what `--clippers` calls it.
      shown: what the table calls it.
      optimizer: from the learning rate, and the number of steps to record, to the whole optimizer.
      clipper: makes what clips in it; None for the row that does not clip.
    """

    name: str
    shown: str
    optimizer: Callable[[float, int], optax.GradientTransformation]
    clipper: Callable[[], optax.GradientTransformation] | None


def _named(clipper: Clipper, arguments: tuple[Any, ...]) -> tuple[str, str]:
    package = clipper.__module__.partition(".")[0]
    name = clipper.__name__ if package == "optaxclip" else f"{package}.{clipper.__name__}"
    return name, f"{name}({', '.join(getattr(each, '__name__', str(each)) for each in arguments)})"


def layer(path: str) -> str:
    """Which of the three layers a parameter belongs to."""
    return path.removesuffix("_bias")


def _watched(clipper: Clipper, arguments: tuple[Any, ...], steps: int) -> optax.GradientTransformation:
    """The clipper, watched; what `clip_by` made records its steps besides."""
    if "record" in inspect.signature(clipper).parameters:
        return watch(clipper(*arguments, record=steps))
    return watch(clipper(*arguments))


def _clip_gradients(clipper: Clipper, *arguments: Any) -> Row:
    """A clipper before Adam."""
    name, shown = _named(clipper, arguments)
    return Row(
        name,
        shown,
        lambda rate, steps: optax.chain(_watched(clipper, arguments, steps), optax.adam(rate)),
        lambda: clipper(*arguments),
    )


def _clip_changes(clipper: Clipper, *arguments: Any) -> Row:
    """A clipper after Adam and the learning rate: it sees by how much the parameters are about to change."""
    name, shown = _named(clipper, arguments)
    return Row(
        name,
        f"{shown} after Adam",
        lambda rate, steps: optax.chain(optax.adam(rate), _watched(clipper, arguments, steps)),
        lambda: clipper(*arguments),
    )


UNCLIPPED = Row("none", "no clipping", lambda rate, _: optax.adam(rate), None)

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
]

ROWS = {row.name: row for row in _ALL}
