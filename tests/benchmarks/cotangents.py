"""How much clipping in the backward pass adds to a train step.

Claim: on a recurrent network (64 steps of 256 units, batch 32) and on an MLP (four layers of 512 units, batch 128),
clipping the cotangent of every step or layer with `clip_cotangents` takes as long as a `jax.custom_vjp` written by hand
around the same clip: within 2 %. Without a transformation, `clip_cotangents(h, optax.identity())`, it is the same
program as without it.

    python -m tests.benchmarks.cotangents
    python -m tests.benchmarks.cotangents --repeats 101 --json cotangents.json

How it measures. A step is loss, gradient and an update of SGD with momentum, compiled ahead of time, parameters and
momentum donated. Each repeat runs every program once, in an order of its own, after two to warm up. A ratio is that of
two programs in the same repeat. Printed are the medians of steps and ratios, with the quartiles of the ratios. "by
hand" is the shortest clip that one can write, by a plain sum of squares: what it takes less, the range-safe norm takes.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks import interleaved, show_environment, write_json

Clip = Callable[[jax.Array, jax.Array], jax.Array]  # an array and its row of the taps -> the array

NONE = "no clip"
OURS = "clip_cotangents(clip_by_global_norm)"
OUR_VALUE = "clip_cotangents(clip)"
SAME = "the same clip in a custom_vjp"
SAME_VALUE = "the same clip by value in a custom_vjp"
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)


def main() -> None:
    args = parse_arguments()
    show_environment()
    print(f"median of {args.repeats}")
    results = {}
    for name, model in models(args).items():
        results[name] = summary(
            interleaved({clip: compile_step(*model, make) for clip, make in CLIPS.items()}, args.repeats)
        )
        show(name, results[name])
    write_json(args.json, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--steps", type=int, default=64, help="of the recurrent network")
    parser.add_argument("--units", type=int, default=256, help="of the recurrent network; the MLP has twice as many")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def by_hand(clip: Callable[[jax.Array], jax.Array]) -> Clip:
    """What one writes without the library, where nothing is traced and nothing is recorded."""

    @jax.custom_vjp
    def identity(x: jax.Array) -> jax.Array:
        return x

    identity.defvjp(lambda x: (x, None), lambda _, cotangent: (clip(cotangent),))
    return lambda x, tap: identity(x)


def in_library(tx: optax.GradientTransformation, *, tapped: bool = False) -> Clip:
    return lambda x, tap: optaxclip.clip_cotangents(x, tx, tap=tap if tapped else None)


def plain(x: jax.Array) -> jax.Array:
    return x * jnp.minimum(1.0, 0.1 * jax.lax.rsqrt(jnp.sum(x * x)))


BY_NORM, BY_VALUE = optaxclip.clip_by_global_norm(0.1), optaxclip.clip(0.01)
CLIPS: dict[str, Clip] = {
    NONE: lambda x, tap: x,
    "clip_cotangents(identity)": in_library(optax.identity()),
    "by hand": by_hand(plain),
    SAME: by_hand(optaxclip.as_function(BY_NORM)),
    OURS: in_library(BY_NORM),
    f"{OURS} and a tap": in_library(BY_NORM, tapped=True),
    SAME_VALUE: by_hand(optaxclip.as_function(BY_VALUE)),
    OUR_VALUE: in_library(BY_VALUE),
}


def models(args: argparse.Namespace) -> dict[str, tuple[Callable[..., jax.Array], Any, jax.Array, int]]:
    """By name: (loss of parameters, data, taps and a clip), parameters, data, and how many places are clipped."""
    rng, units, wide = np.random.default_rng(0), args.units, 2 * args.units

    def numbers(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    recurrent = {"in": numbers(64, units, scale=0.1), "hidden": numbers(units, units, scale=1.2 / units**0.5)}
    layers = [numbers(wide, wide, scale=1.5 / wide**0.5) for _ in range(4)]
    return {
        f"recurrent network, {args.steps} steps": (rnn, recurrent, numbers(args.steps, 32, 64), args.steps),
        "MLP, 4 layers": (mlp, layers, numbers(128, wide), len(layers)),
    }


def rnn(params: Any, inputs: jax.Array, taps: jax.Array, clip: Clip) -> jax.Array:
    def step(hidden: jax.Array, along: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, tap = along
        hidden = jnp.tanh(clip(hidden, tap) @ params["hidden"] + row @ params["in"])
        return hidden, jnp.sum(jnp.square(hidden))

    start = jnp.zeros((inputs.shape[1], params["hidden"].shape[0]))
    return jnp.sum(jax.lax.scan(step, start, (inputs, taps))[1]) / len(inputs)


def mlp(params: Any, inputs: jax.Array, taps: jax.Array, clip: Clip) -> jax.Array:
    for layer, tap in zip(params, taps, strict=True):
        inputs = jax.nn.relu(clip(inputs, tap) @ layer)
    return jnp.sum(jnp.square(inputs))


def compile_step(
    loss: Callable[..., jax.Array], params: Any, data: jax.Array, places: int, clip: Clip
) -> Callable[[], Any]:
    """A step that goes on from where its last call ended."""

    def step(params: Any, state: Any, data: jax.Array, taps: jax.Array) -> tuple[Any, Any, jax.Array]:
        grads, norms = jax.grad(loss, argnums=(0, 2))(params, data, taps, clip)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, norms

    params = jax.tree.map(jnp.copy, params)  # donated
    carry = params, OPTIMIZER.init(params)
    taps = jnp.zeros((places, 2))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, data, taps).compile()

    def run() -> Any:
        nonlocal carry
        *carry, norms = compiled(*carry, data, taps)
        return carry, norms

    return run


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per program: the median step, its ratio to the step without a clip, and to the same clip written by hand."""
    rows = {}
    for name, step in times.items():
        rows[name] = {"step_ms": statistics.median(step), **ratios("of_bare", step, times[NONE])}
        peer = {OURS: SAME, OUR_VALUE: SAME_VALUE}.get(name)
        if peer:
            rows[name] |= ratios("of_custom_vjp", step, times[peer])
    return rows


def ratios(name: str, step: list[float], base: list[float]) -> dict[str, float]:
    each = sorted(a / b for a, b in zip(step, base, strict=True))
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows as a Markdown table."""
    print(f"\n{title}\n")
    print(f"| {'step':46} | step ms | of no clip         | of the same custom_vjp |")
    print("|---|---:|---:|---:|")
    for name, row in rows.items():
        cells = [
            f"{row[key]:.3f} ({row[f'{key}_low']:.3f}-{row[f'{key}_high']:.3f})" if key in row else ""
            for key in ("of_bare", "of_custom_vjp")
        ]
        print(f"| {name:46} | {row['step_ms']:7.2f} | {cells[0]:>19} | {cells[1]:>22} |")


if __name__ == "__main__":
    main()
