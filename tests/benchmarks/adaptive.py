"""What the histories of norms cost: bytes of state, and microseconds per step.

Claim: a window of 1,000 adds under 1 ms to a step with a norm of its own for each of 148 leaves. (What whole clippers
add to a step of Adam is the benchmark `overhead`.)

    python -m tests.benchmarks.adaptive
    python -m tests.benchmarks.adaptive --repeats 41 --json adaptive.json

How it measures. A program is the update of one clipper on 148 leaves of four numbers, compiled ahead of time, its state
donated; each timing is the mean of ten steps. Each repeat runs every program once, in an order of its own. What a
method adds in a repeat is its time less that of a constant bound with the same norm in the same repeat, and the medians
of these differences are printed. Before, every program takes 1,100 steps, so that all windows are full.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optaxclip
from optaxclip import clip_by, norms, thresholds
from tests.benchmarks import overhead, show_environment, trees, write_json

LEAVES = 148
STEPS = 10  # per timing
FULL = 1100  # steps that fill every window
CONSTANT = "constant"

THRESHOLDS: dict[str, Callable[[], optaxclip.Threshold]] = {
    CONSTANT: lambda: thresholds.constant(1.0),
    "quantile": lambda: thresholds.quantile(0.1),
    "quantile, window 100": lambda: thresholds.quantile(0.1, window=100),
    "quantile, window 1,000": lambda: thresholds.quantile(0.1, window=1000),
    "order_statistic, window 100": lambda: thresholds.order_statistic(5.0),
    "order_statistic, window 1,000": lambda: thresholds.order_statistic(5.0, window=1000),
    "tracked_quantile": lambda: thresholds.tracked_quantile(0.5),
    "zscore": thresholds.zscore,
    "mean_std, window 128": thresholds.mean_std,
    "mean_std, window 1,000": lambda: thresholds.mean_std(window=1000),
    "ema_ratio": lambda: thresholds.ema_ratio(warmup_max_norm=1.0),
    "ema_band": lambda: thresholds.ema_band(1.5, min_ratio=0.8),
    "growth": thresholds.growth,
}
NORMS = {"global norm": norms.global_norm(), f"{LEAVES} leaf norms": norms.leaf_norm()}


def main() -> None:
    args = parse_arguments()
    show_environment()
    results: dict[str, Any] = {kind: measure(norm, args.repeats) for kind, norm in NORMS.items()}
    show(results)
    write_json(args.json, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def measure(norm: optaxclip.Norm, repeats: int) -> dict[str, dict[str, float]]:
    """Per threshold: bytes of state, microseconds of a step, and how many of them it adds."""
    rng = np.random.default_rng(0)
    grads = {f"leaf_{i:03d}": jnp.asarray(rng.lognormal(size=4), jnp.float32) for i in range(LEAVES)}
    programs, states = {}, {}
    for name, make in THRESHOLDS.items():
        tx = clip_by(norm, make())
        states[name] = tx.init(grads)
        shapes = jax.eval_shape(lambda state=states[name]: state)
        programs[name] = jax.jit(tx.update, donate_argnums=1).lower(grads, shapes).compile()
        for _ in range(FULL):
            _, states[name] = programs[name](grads, states[name])
    times: dict[str, list[float]] = {name: [] for name in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            jax.block_until_ready(programs[name](grads, jax.tree.map(jnp.copy, states[name])))  # warm caches
            start = time.perf_counter()
            for _ in range(STEPS):
                updates, states[name] = programs[name](grads, states[name])
            jax.block_until_ready((updates, states[name]))
            times[name].append(1e6 * (time.perf_counter() - start) / STEPS)
    return {
        name: {
            "state_bytes": trees.nbytes(states[name]),
            "step_us": statistics.median(times[name]),
            "added_us": overhead.added_time(times[name], times[CONSTANT]),
        }
        for name in programs
    }


def show(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints a Markdown table, with three columns for each norm."""
    print(f"\n{LEAVES} leaves of four numbers\n")
    cells = [f"{what}, {kind}" for kind in results for what in ("state bytes", "added us")]
    print(f"| {'threshold':29} | " + " | ".join(cells) + " |")
    print("|---|" + "---:|" * len(cells))
    for name in THRESHOLDS:
        rows = [results[kind][name] for kind in results]
        numbers = [text for row in rows for text in (f"{row['state_bytes']:,}", f"{row['added_us']:.0f}")]
        print(f"| {name:29} | " + " | ".join(f"{n:>{len(c)}}" for n, c in zip(numbers, cells, strict=True)) + " |")


if __name__ == "__main__":
    main()
