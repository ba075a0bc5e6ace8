"""What other libraries' clips do with the same gradients: the tables of notebooks/beside.md.

    python -m tests.benchmarks.comparison

Each cell is what a library returned in this run; "-" where it has nothing that could be asked. Libraries that are
missing are left out: `pip install -e ".[test,parity]"` has all of them. All clip by global norm, as it is called there:
`optaxclip.clip_by_global_norm`, `optax.clip_by_global_norm`, `jax_privacy.clipping.clip_pytree`,
`torch.nn.utils.clip_grad_norm_`, and `ZClip` with a `max_grad_norm`, which in its first steps is that bound. Norms are
taken in float64, by NumPy.

Methods with a history: norms with lognormal noise rise tenfold at step 500, and the steps are counted until an update
keeps as much of its norm as before, as in `level_shift`. Ours is at the settings of the sources
(`tests/support/published.py`), which differ from our defaults in the warm-up. ZClip is without `max_norm`, AutoClip the
90th percentile of the last 1,000.

"adds to a step" is on 25 million float32 parameters in 100 leaves. For the JAX libraries it is a compiled and donated
step of clip, Adam and update, less the same without the clip; what runs in PyTorch fuses with nothing, and its time is
that of the call. Median of 15, in turns.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from tests.benchmarks import interleaved, show_environment
from tests.benchmarks.libraries import DEVICES, NOTHING, Jax, adam_step, has, libraries, norm_of, number
from tests.reference import packages, sequences
from tests.support import published
from tests.support.driving import drive, steps_to_follow

SHIFT, AFTER = 500, 10_000  # the step at which norms rise, and for how long they are watched


# The questions.


def norm_after(leaf: np.ndarray, bound: float, library: Any) -> str:
    """The norm of a clipped leaf, in units of the bound."""
    return number(norm_of(library({"a": leaf}, bound)) / bound)


def after_a_nan(library: Any) -> str:
    """What comes out where one of two leaves has a NaN, and the norms of both would be clipped."""
    tree = {"bad": np.array([np.nan, 3.0], np.float32), "good": np.array([4.0], np.float32)}
    out = library(tree, 1.0)
    bad, good = np.asarray(out["bad"], np.float64), float(np.asarray(out["good"])[0])
    if np.isnan(good):
        return "all NaN"
    return (
        "as it came" if good == 4 and bad[1] == 3 else f"NaN is {number(bad[0])}, 3 and 4 are {bad[1]:.2f}, {good:.2f}"
    )


def follows(after: Callable[[np.ndarray], np.ndarray]) -> str:
    """How long a clipper with a history goes on to clip after norms have risen for good."""
    rng = np.random.default_rng(0)
    given = sequences.with_shift(sequences.lognormal(rng, SHIFT + AFTER, scale=1.0, spread=0.1, drift=1.0), at=SHIFT)
    steps = steps_to_follow(given, after(given), SHIFT)
    return f"not in {AFTER:,}" if steps is None else f"{steps}"


def followers() -> dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]]:
    """Methods with a history, and by library the norms after them."""
    found = {
        "ZClip follows a tenfold rise of the norms after so many steps": {
            "optaxclip": lambda given: drive(published.zclip(), given)[0],
            "zclip": lambda given: packages.zclip(given, max_grad_norm=None)[0],
        },
        "AutoClip, of 1,000 norms": {
            "optaxclip": lambda given: drive(published.autoclip(90.0, window=1000), given)[0],
            "autoclip": lambda given: packages.autoclip(given, quantile=0.9, history_length=1000)[0],
        },
        "AdaGC": {
            "optaxclip": lambda given: drive(published.adagc(), given)[0],
            "pytorch_optimizer": lambda given: packages.adagc(given[:, None])[0][:, 0],
        },
    }
    here = {"optaxclip"} | (
        {name for name in ("zclip", "autoclip", "pytorch_optimizer") if has(name)} if has("torch") else set()
    )
    return {title: {name: after for name, after in row.items() if name in here} for title, row in found.items()}


QUESTIONS: dict[str, Callable[[Any], str]] = {
    "float32, norm 2e25: norm after, of the bound": partial(norm_after, np.full(4, 1e25, np.float32), 1.0),
    "float32, norm 2e-25, bound 1e-26: likewise": partial(norm_after, np.full(4, 1e-25, np.float32), 1e-26),
    "float32, norm 2e-7, bound 1e-7: likewise": partial(norm_after, np.full(4, 1e-7, np.float32), 1e-7),
    "float16, norm 20,000, bound 1: likewise": partial(norm_after, np.full(10_000, 200, np.float16), 1.0),
    "a NaN in one of two leaves: what comes out": after_a_nan,
    "derivative through the clip at a gradient of 0": lambda library: library.slope_at_zero(),
    f"`shard_map`, {DEVICES} devices: norm after, of the bound": lambda library: library.norm_in_shard_map(),
}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    show_environment()
    clips, with_history = libraries(), followers()
    columns = dict.fromkeys([*clips, *(name for row in with_history.values() for name in row)])
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for question, answer in QUESTIONS.items():
        show(question, columns, {name: answer(library) for name, library in clips.items()})
    for title, row in with_history.items():
        show(title, columns, {name: follows(after) for name, after in row.items()})
    programs = {name: library.timed() for name, library in clips.items()}
    times = interleaved(programs | {"adam": adam_step(lambda grads: grads)}, 15)
    show(
        "adds to a step of 25 million parameters, ms",
        columns,
        {name: added(times, clips[name], name) for name in clips},
    )


def added(times: dict[str, list[float]], library: Any, name: str) -> str:
    base = times["adam"] if isinstance(library, Jax) else [0.0] * len(times[name])
    return number(statistics.median(each - without for each, without in zip(times[name], base, strict=True)))


def show(question: str, columns: Any, cells: dict[str, str]) -> None:
    print(f"| {question} | {' | '.join(cells.get(name, NOTHING) for name in columns)} |", flush=True)


if __name__ == "__main__":
    main()
