"""How much every clip adds to an optimizer step, in time and in temporary memory.

Claim: on the tree of GPT-2 small (148 leaves, 498 MB in float32), a clip before Adam takes at most 1.2 bare norm passes
longer than Adam alone, `adaptive_grad_clip` 2, and a tenth of the gradients in temporary memory; optax's clip takes
most of ten passes and all of the gradients.

    python -m tests.benchmarks.overhead
    python -m tests.benchmarks.overhead --clips all --json overhead.json
    python -m tests.benchmarks.overhead --clips clip_by_leaf_norm "autoclip, window=1000" --repeats 31
    python -m tests.benchmarks.overhead --tree stacked --clips adaptive_grad_clip "adaptive_grad_clip, stacked"
    python -m tests.benchmarks.overhead --dtype bfloat16
    python -m tests.benchmarks.overhead --tree small --clips clip_by_leaf_norm

How it measures. A step is `update` and `apply_updates`, compiled ahead of time, with parameters and optimizer state
donated: both are handed from program to program, so that all of them work on the same memory. The gradients are given
and kept; their norm is some hundred times the bound, so that every clip clips. Each repeat runs every program once, in
an order of its own. What a clip adds in a repeat is its step less the step of `adam` alone in the same repeat, and the
medians of these differences are printed: slow drifts of the machine fall out. "norm passes" is that as a multiple of
the median of reading the gradients once; "of optax's" beside what the namesake in optax adds, or its clip by global
norm. "temporary %" is what the compiled program allocates beside its arguments and results, as a part of the gradients.
The first lines give the bandwidth of changing every number in place, and how long reading the gradients takes at that.
Needs 3 GB, with all clips 8.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.benchmarks import clips, interleaved, show_environment, trees, write_json

BARE = "bare norm pass"
ADAM = "adam"
ADAM_ALONE = optax.adam(1e-4)


class Program(NamedTuple):
    """A compiled step: `run(params, shared_state, own_state, grads) -> (params, shared_state, own_state)`.

    All programs that are measured together go on from one `shared_state`: there is memory for one.
    """

    run: Callable[..., Any]
    own_state: Any
    temporary_bytes: int


def main() -> None:
    args = parse_arguments()
    sizes = {} if args.tree == "small" else {"layers": args.layers, "width": args.width, "vocabulary": args.vocabulary}
    shapes = trees.TREES[args.tree](np.dtype(args.dtype), **sizes)
    size = trees.nbytes(shapes)
    show_environment()
    print(f"{args.tree}: {len(jax.tree.leaves(shapes))} leaves, {size / 1e6:.0f} MB of {args.dtype} gradients")
    moved = bandwidth(shapes, args.repeats)
    at_that = 1e3 * size / moved
    print(f"changing them in place moves {moved / 1e9:.1f} GB/s, at which reading them takes {at_that:.2f} ms")
    bare, programs = compile_all(clips.chosen(args.clips, args.tree), shapes)
    dense = trees.random_like(shapes, scale=0.01, seed=0)
    results = {}
    for name, grads in {"all leaves non-zero": dense, "a tenth of the leaves zero": trees.with_zeros(dense)}.items():
        times = measure(bare, programs, grads, args.repeats)
        results[name] = summary(times, programs, size, peer=clips.peer)
        show(f"{name}, median of {args.repeats}", results[name])
    write_json(args.json, tree=args.tree, dtype=args.dtype, bandwidth=moved, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = tree_parser(__doc__)
    parser.add_argument("--tree", choices=list(trees.TREES), default="gpt2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clips", nargs="*", default=[], metavar="NAME", help='measure these too, or "all"')
    return parser.parse_args()


def tree_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark on the tree of GPT-2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--width", type=int, default=768, help="smaller for a quick look")
    parser.add_argument("--vocabulary", type=int, default=50257, help="smaller for a quick look")
    return parser


def compile_all(transformations: dict[str, Any], shapes: Any) -> tuple[Any, dict[str, Program]]:
    """The compiled bare norm pass, and the compiled steps by name."""
    bare = jax.jit(norm_pass).lower(shapes).compile()
    steps = {ADAM: compile_step(optax.identity(), shapes)}
    for name, tx in transformations.items():
        steps[name] = compile_step(tx, shapes, ADAM_ALONE if name not in clips.OPTIMIZERS else None)
    return bare, steps


def bandwidth(shapes: Any, repeats: int) -> float:
    """Bytes per second, read and written, of changing the sign of every number in place."""
    tree = trees.random_like(shapes, scale=1.0, seed=2)
    negate = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0).lower(shapes).compile()

    def run() -> Any:
        nonlocal tree
        tree = negate(tree)
        return tree

    (times,) = interleaved({"copy": run}, repeats).values()
    return 2 * trees.nbytes(shapes) / (statistics.median(times) / 1e3)


def norm_pass(tree: Any) -> jax.Array:
    """The least that a clip by global norm can do: read everything once."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def compile_step(clip: Any, shapes: Any, shared: Any = ADAM_ALONE) -> Program:
    """A step of `clip` and the optimizer `shared`, or of `clip` alone, which hands on Adam's state."""

    def step(params: Any, shared_state: Any, own_state: Any, grads: Any) -> tuple[Any, Any, Any]:
        updates, own_state = clip.update(grads, own_state, params)
        if shared:
            updates, shared_state = shared.update(updates, shared_state, params)
        return optax.apply_updates(params, updates), shared_state, own_state

    own_state, shared_state = jax.eval_shape(clip.init, shapes), jax.eval_shape(ADAM_ALONE.init, shapes)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(shapes, shared_state, own_state, shapes).compile()
    return program(compiled, own_state)


def program(compiled: Any, own_state: Any) -> Program:
    """A compiled step, with zeros for a state of these shapes."""
    zeros = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), own_state)
    return Program(compiled, zeros, compiled.memory_analysis().temp_size_in_bytes)


def measure(
    bare: Any, programs: dict[str, Program], grads: Any, repeats: int, shared: Any = ADAM_ALONE
) -> dict[str, list[float]]:
    """Milliseconds of every program in every repeat. The state that they share is that of `shared`."""
    params = trees.random_like(grads, scale=0.02, seed=1)
    shared_state = shared.init(params)
    own_states = {name: jax.tree.map(jnp.copy, program.own_state) for name, program in programs.items()}  # donated
    times: dict[str, list[float]] = {name: [] for name in [BARE, *programs]}
    order, shuffle = list(times), random.Random(0).shuffle
    for repeat in range(-2, repeats):  # the first two warm up
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            if name == BARE:
                bare(grads).block_until_ready()
            else:
                carry = programs[name].run(params, shared_state, own_states[name], grads)
                params, shared_state, own_states[name] = jax.block_until_ready(carry)
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(
    times: dict[str, list[float]],
    programs: dict[str, Program],
    size: int,
    *,
    base: str = ADAM,
    peer: Callable[[str], str],
) -> dict[str, dict[str, float]]:
    """Per program: the median step, what it adds to `base`, that as part of a norm pass, and of what its peer adds."""
    added = {name: added_time(times[name], times[base]) for name in programs}
    norm = statistics.median(times[BARE])
    rows = {BARE: {"step_ms": norm}}
    for name, program in programs.items():
        temporary = 100 * program.temporary_bytes / size
        rows[name] = {"step_ms": statistics.median(times[name]), "temporary_percent": temporary}
        if name != base:
            ratios = {"norm_passes": added[name] / norm, "of_optax": added[name] / added[peer(name)]}
            rows[name] |= {"added_ms": added[name], **ratios}
    return rows


def added_time(step: list[float], base: list[float]) -> float:
    """The median of what a step takes longer than the base in the same repeat."""
    return statistics.median(a - b for a, b in zip(step, base, strict=True))


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows as a Markdown table."""
    columns = ["step_ms", "added_ms", "norm_passes", "of_optax", "temporary_percent"]
    print(f"\n{title}\n")
    print(f"| {'program':31} | step ms | added ms | norm passes | of optax's | temporary % |")
    print("|---|" + "---:|" * len(columns))
    widths = [7, 8, 11, 10, 11]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        print(f"| {name:31} | " + " | ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)) + " |")


if __name__ == "__main__":
    main()
