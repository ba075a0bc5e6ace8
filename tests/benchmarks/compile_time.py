"""How much a clip adds to the compile time of an optimizer step with many small leaves.

Claim: on 1,000 leaves of 32x32, `chain(clip_by_global_norm(1.0), adam)` takes no longer to compile than with optax's
clip: small leaves of one shape share one reduction.

    python -m tests.benchmarks.compile_time
    python -m tests.benchmarks.compile_time --leaves 200 --repeats 5 --json compile_time.json
    python -m tests.benchmarks.compile_time --gpt2

How it measures. Each repeat takes every program once, in an order of its own, with jax's caches cleared before each and
the persistent compilation cache off: a new `jit` is traced, lowered and compiled, and the three are timed. What a clip
adds is its time less that of `adam` alone in the same repeat; medians are printed. Only shapes are given, nothing runs.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import optax

import optaxclip
from tests.benchmarks import show_environment, trees, write_json

ADAM = "adam"
OPTAX = "optax.clip_by_global_norm"
OURS = "clip_by_global_norm"
STAGES = ("trace", "lower", "compile")


def main() -> None:
    args = parse_arguments()
    jax.config.update("jax_enable_compilation_cache", False)
    shapes = trees.gpt2() if args.gpt2 else trees.small(leaves=args.leaves)
    show_environment()
    print(f"{len(jax.tree.leaves(shapes))} leaves, median of {args.repeats}\n")
    rows = summary(measure(programs(), shapes, args.repeats))
    show(rows)
    write_json(args.json, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--gpt2", action="store_true", help="the tree of GPT-2 small instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def programs() -> dict[str, optax.GradientTransformation]:
    """The optimizers to compare, by name."""
    return {
        ADAM: optax.adam(1e-4),
        OPTAX: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)),
        OURS: optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-4)),
    }


def measure(
    optimizers: dict[str, optax.GradientTransformation], shapes: Any, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds of every stage, for every program in every repeat."""
    for tx in optimizers.values():  # the first compilations of a process are slower
        time_stages(tx, jax.tree.leaves(shapes)[:2])
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in optimizers}
    order, shuffle = list(optimizers), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(time_stages(optimizers[name], shapes))
    return seconds


def time_stages(tx: optax.GradientTransformation, shapes: Any) -> dict[str, float]:
    """Seconds to trace, lower and compile a donated step."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, shapes)
    jax.clear_caches()  # functions that are jitted at module level keep their traces otherwise
    marks = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(shapes, state, shapes)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    return {stage: marks[i + 1] - marks[i] for i, stage in enumerate(STAGES)}


def summary(seconds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians per program: all stages, what the clip adds to them and to the trace alone, and the part of optax's."""
    rows = {}
    for name, repeats in seconds.items():
        rows[name] = {stage: statistics.median(repeat[stage] for repeat in repeats) for stage in STAGES}
        rows[name]["total"] = statistics.median(sum(repeat.values()) for repeat in repeats)
        if name != ADAM:
            rows[name]["added"] = added(repeats, seconds[ADAM], STAGES)
            rows[name]["added_trace"] = added(repeats, seconds[ADAM], ("trace",))
            rows[name]["of_optax"] = rows[name]["added"] / added(seconds[OPTAX], seconds[ADAM], STAGES)
    return rows


def added(repeats: list[dict[str, float]], adam: list[dict[str, float]], stages: tuple[str, ...]) -> float:
    return statistics.median(sum(a[s] - b[s] for s in stages) for a, b in zip(repeats, adam, strict=True))


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows as a Markdown table."""
    columns = [*STAGES, "total", "added", "added_trace", "of_optax"]
    print(f"| {'program':26} | trace s | lower s | compile s | total s | added s | added trace s | of optax's |")
    print("|---|" + "---:|" * len(columns))
    widths = [7, 7, 9, 7, 7, 13, 10]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        print(f"| {name:26} | " + " | ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)) + " |")


if __name__ == "__main__":
    main()
