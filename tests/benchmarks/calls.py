"""Claim: tracing a clip takes few Python calls of the library, and few hops between its files.

`python -m tests.benchmarks.calls` counts, with `sys.setprofile`, the calls of functions of the library while `update`
is traced (`jax.make_jaxpr`) for two float32 leaves, and how many of them come from another file of the library. What is
traced once and found in a cache afterwards is not counted: the first trace is thrown away.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxclip

_LIBRARY = str(Path(optaxclip.__file__).parent)
_TREE = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}


def count(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """The calls of functions of the library while a function runs, and those among them from another of its files."""
    calls = hops = 0

    def own(frame: FrameType | None) -> str | None:
        while frame is not None:
            if frame.f_code.co_filename.startswith(_LIBRARY):
                return frame.f_code.co_filename
            frame = frame.f_back
        return None

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls, hops
        del arg
        if event == "call" and frame.f_code.co_filename.startswith(_LIBRARY):
            calls += 1
            hops += own(frame.f_back) not in (None, frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return calls, hops


def _traced(tx: optax.GradientTransformationExtraArgs) -> tuple[int, int]:
    state = tx.init(_TREE)

    def trace() -> None:
        def step(*args: Any) -> Any:  # a new function at each call: jax finds the jaxpr of a known one in a cache
            return tx.update(*args)

        jax.make_jaxpr(step)(_TREE, state, _TREE)

    trace()
    return count(trace)


def _per_example() -> tuple[int, int]:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum((x @ params["w"] + params["b"]) ** 2)

    def trace() -> None:
        function = optaxclip.per_example.clipped_value_and_grad(loss, optaxclip.clip_by_global_norm(1.0))
        jax.make_jaxpr(function)(_TREE, jnp.ones((4, 3)))

    trace()
    return count(trace)


def main() -> None:
    """Prints the table."""
    clips = {
        "clip_by_global_norm": optaxclip.clip_by_global_norm(1.0),
        "clip_by_leaf_norm": optaxclip.clip_by_leaf_norm(1.0),
        "zclip": optaxclip.zclip(),
        "adaptive_grad_clip": optaxclip.adaptive_grad_clip(0.01),
        "skip_spikes": optaxclip.skip_spikes(optax.sgd(0.1), optaxclip.thresholds.mean_std(6.0)),
    }
    print("| traced | calls | hops between files |\n|---|---:|---:|")
    for name, (calls, hops) in {name: _traced(tx) for name, tx in clips.items()}.items():
        print(f"| `{name}` | {calls} | {hops} |")
    print("| `per_example` | {} | {} |".format(*_per_example()))


if __name__ == "__main__":
    main()
