"""Task `decoder`: a small pre-norm transformer reads the Python language reference.

That of `optaxclip.demo.decoder`, narrower. It is trained by SGD with momentum: under AdamW a clip before the optimizer
hardly matters, as `python -m optaxclip` shows.
"""

from typing import Any

import jax
import numpy as np
import optax

from optaxclip.demo import decoder
from tests.benchmarks.sweep import characters
from tests.benchmarks.sweep.tasks import Measured, half_decades

WIDTH = 32
MEASURED = 64  # sequences of each part, evenly spread


def _init(rng: np.random.Generator, data: Any) -> Any:
    return decoder.init(jax.random.key(int(rng.integers(2**31))), len(data["alphabet"]), WIDTH)


def _measure(params: Any, data: Any) -> Measured:
    parts = (characters.spread(data[part], MEASURED) for part in ("train", "held_out"))
    return Measured(*(decoder.batch_loss(params, part) for part in parts))


DECODER = characters.CHARACTERS._replace(
    name="decoder",
    about=f"pre-norm transformer, {decoder.LAYERS} layers, width {WIDTH}, on the Python language reference",
    steps=150,
    optimizer="SGD with momentum 0.9",
    scaling=lambda: optax.trace(0.9),
    init=_init,
    batch_size=4,
    objective=decoder.batch_loss,
    measure=_measure,
    rates=half_decades(-3, 0),
    together=False,
)
