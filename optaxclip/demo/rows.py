"""The rows of the table: what is compared, one line each."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import optaxclip
from optaxclip.demo.watching import watch


class Row(NamedTuple):
    """One way to train.

    Attributes:
      name: what `--clippers` calls it.
      shown: what the table calls it.
      optimizer: from the learning rate to the whole optimizer.
    """

    name: str
    shown: str
    optimizer: Callable[[float], optax.GradientTransformation]


def _named(clipper: Callable[..., optax.GradientTransformation], arguments: tuple[float, ...]) -> tuple[str, str]:
    package = clipper.__module__.partition(".")[0]
    name = clipper.__name__ if package == "optaxclip" else f"{package}.{clipper.__name__}"
    return name, f"{name}({', '.join(map(str, arguments))})"


def _clip_gradients(clipper: Callable[..., optax.GradientTransformation], *arguments: float) -> Row:
    """A clipper before Adam."""
    name, shown = _named(clipper, arguments)
    return Row(name, shown, lambda rate: optax.chain(watch(clipper(*arguments)), optax.adam(rate)))


def _clip_changes(clipper: Callable[..., optax.GradientTransformation], *arguments: float) -> Row:
    """A clipper after Adam and the learning rate: it sees by how much the parameters are about to change."""
    name, shown = _named(clipper, arguments)
    return Row(name, f"{shown} after Adam", lambda rate: optax.chain(optax.adam(rate), watch(clipper(*arguments))))


_ALL = [
    Row("none", "no clipping", optax.adam),
    _clip_gradients(optax.clip_by_global_norm, 1.0),
    _clip_gradients(optaxclip.clip_by_global_norm, 1.0),
    _clip_gradients(optaxclip.smooth_clip_by_global_norm, 1.0),
    _clip_gradients(optaxclip.clip_by_norm_range, 0.5, 1.0),
    _clip_gradients(optaxclip.clip_by_leaf_norm, 1.0),
    _clip_gradients(optaxclip.clip_by_block_rms, 0.01),
    _clip_gradients(optaxclip.clip_by_value, -0.1, 0.1),
    _clip_gradients(optaxclip.adaptive_grad_clip, 0.01),
    _clip_changes(optaxclip.clippy, 0.1, 0.01),
]

ROWS = {row.name: row for row in _ALL}
