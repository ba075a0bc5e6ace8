"""How much a wrapper that leaves out steps adds to an optimizer step, in time and in temporary memory.

Claim: on the tree of GPT-2 small (148 leaves, 498 MB in float32) `skip_nonfinite` and `skip_spikes` add to a step of
Adam, alone or behind `clip_by_global_norm`, at most 1.5 bare norm passes and a quarter of what `optax.apply_if_finite`
adds; their temporary memory is under 1 % of the gradients.

    python -m tests.benchmarks.skips
    python -m tests.benchmarks.skips --repeats 31 --json skips.json

Measured as in the benchmark `overhead`: a step is `update` and `apply_updates`, compiled ahead of time, everything but
the gradients donated. What a wrapper adds in a repeat is its step less that of its inner transformation in the same
repeat. Once the gradients are ordinary, so that all take the step, and once there is a NaN in them, so that only the
bare ones do. Needs 3 GB.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optaxclip
from optaxclip import thresholds
from tests.benchmarks import environment, gpt2, overhead

INNERS = {
    "adam": lambda: optax.chain(optax.identity(), optax.adam(1e-4)),
    "clip, adam": lambda: optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-4)),
}
BARE = "bare"
OPTAX = "optax.apply_if_finite"
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    BARE: lambda inner: inner,
    OPTAX: lambda inner: optax.apply_if_finite(inner, 5),
    "skip_nonfinite": optaxclip.skip_nonfinite,
    "skip_spikes(mean_std(6))": lambda inner: optaxclip.skip_spikes(inner, thresholds.mean_std(6.0)),
}


class Program(NamedTuple):
    """A compiled step: `run(params, inner_state, rest, grads) -> (params, inner_state, rest)`."""

    run: Callable[..., Any]
    rest: Any
    temporary_bytes: int


def main() -> None:
    args = parse_arguments()
    shapes = gpt2.shapes(layers=args.layers, width=args.width, vocabulary=args.vocabulary)
    count, size = len(jax.tree.leaves(shapes)), overhead.nbytes(shapes)
    print(*(f"{key} {value}" for key, value in environment().items()), sep=", ")
    print(f"{count} leaves, {size / 1e6:.0f} MB of gradients, median of {args.repeats}")
    norm_pass = jax.jit(overhead.norm_pass).lower(shapes).compile()
    grads = overhead.random_tree(shapes, scale=0.01, seed=0)
    given = {"ordinary gradients": grads, "a NaN in every step": with_nan(grads)}
    results = {}
    for inner, make in INNERS.items():
        programs = {name: compile_step(wrap(make()), shapes) for name, wrap in WRAPPERS.items()}
        for name, each in given.items():
            rows = summary(measure(norm_pass, programs, each, args.repeats), programs, size)
            results[f"{inner}, {name}"] = rows
            overhead.show(f"{inner}, {name}", rows)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--width", type=int, default=768, help="smaller for a quick look")
    parser.add_argument("--vocabulary", type=int, default=50257, help="smaller for a quick look")
    return parser.parse_args()


def compile_step(tx: Any, shapes: Any) -> Program:
    def step(params: Any, inner_state: Any, rest: Any, grads: Any) -> tuple[Any, Any, Any]:
        updates, state = tx.update(grads, joined(inner_state, rest), params)
        return optax.apply_updates(params, updates), *split(state)

    inner_state, rest = split(jax.eval_shape(tx.init, shapes))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(shapes, inner_state, rest, shapes).compile()
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return Program(compiled, rest, compiled.memory_analysis().temp_size_in_bytes)


def split(state: Any) -> tuple[Any, Any]:
    """The inner state, which all programs share, and what a wrapper has around it."""
    return (state.inner_state, state._replace(inner_state=())) if hasattr(state, "inner_state") else (state, ())


def joined(inner_state: Any, rest: Any) -> Any:
    return rest._replace(inner_state=inner_state) if rest else inner_state


def with_nan(grads: Any) -> Any:
    """The same tree with one NaN; the other leaves are shared, not copied."""
    return grads | {"ln_f": jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), grads["ln_f"])}


def measure(norm_pass: Any, programs: dict[str, Program], grads: Any, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every program in every repeat."""
    params = overhead.random_tree(grads, scale=0.02, seed=1)
    inner_state = INNERS["adam"]().init(params)  # the clip has none
    rests = {name: jax.tree.map(jnp.copy, program.rest) for name, program in programs.items()}  # donated
    times: dict[str, list[float]] = {name: [] for name in [overhead.BARE, *programs]}
    order, shuffle = list(times), random.Random(0).shuffle
    for repeat in range(-2, repeats):  # the first two warm up
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            if name == overhead.BARE:
                norm_pass(grads).block_until_ready()
            else:
                carry = programs[name].run(params, inner_state, rests[name], grads)
                params, inner_state, rests[name] = jax.block_until_ready(carry)
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(times: dict[str, list[float]], programs: dict[str, Program], size: int) -> dict[str, dict[str, float]]:
    """Per program: the median step, what it adds, and that as a part of a norm pass and of what optax adds."""
    added = {name: overhead.added_time(times[name], times[BARE]) for name in programs}
    norm = statistics.median(times[overhead.BARE])
    rows: dict[str, dict[str, float]] = {overhead.BARE: {"step_ms": norm}}
    for name, program in programs.items():
        rows[name] = {
            "step_ms": statistics.median(times[name]),
            "temporary_percent": 100 * program.temporary_bytes / size,
        }
        if name != BARE:
            ratios = {"norm_passes": added[name] / norm, "of_optax": added[name] / added[OPTAX]}
            rows[name] |= {"added_ms": added[name], **ratios}
    return rows


if __name__ == "__main__":
    main()
