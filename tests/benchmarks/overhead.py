"""How much a clip adds to an optimizer step, in time and in temporary memory.

Claim: on the tree of GPT-2 small (148 leaves, 498 MB in float32), `chain(clip_by_global_norm(1.0), adam)` takes at most
1.5 bare norm passes longer than `adam` alone, and at most 0.2 of what optax's clip adds, also where a tenth of the
leaves is zero; its temporary memory is under 10 % of the gradients.

    python -m tests.benchmarks.overhead
    python -m tests.benchmarks.overhead --repeats 31 --clippers leaf_norm block_rms agc --json overhead.json

How it measures. A step is `update` and `apply_updates`, compiled ahead of time, with parameters and optimizer state
donated: both are handed from program to program, so that all of them work on the same memory. The gradients are given
and kept; their norm is some hundred times the bound, so that every clip clips. Each repeat runs every program once, in
an order of its own. What a clip adds in a repeat is its step less the step of `adam` alone in the same repeat, and the
medians of these differences are printed: slow drifts of the machine fall out. "temporary %" is what the compiled
program allocates beside its arguments and results, as a part of the gradients. Needs 3 GB.
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

import optaxclip
from tests.benchmarks import gpt2, show_environment, write_json

BARE = "bare norm pass"
ADAM = "adam"
OPTAX = "optax.clip_by_global_norm"
OURS = "clip_by_global_norm"
ADAM_ALONE = optax.adam(1e-4)
# Gradients are about 0.01 each, parameters 0.02: every bound is below the norms that it meets.
MORE = {
    "recorded": lambda: optaxclip.clip_by_global_norm(1.0, record=256),
    "leaf_norm": lambda: optaxclip.clip_by_leaf_norm(0.1),
    "leaf_norm_recorded": lambda: optaxclip.clip_by_leaf_norm(0.1, record=256),
    "block_rms": lambda: optaxclip.clip_by_block_rms(0.005),
    "agc": lambda: optaxclip.adaptive_grad_clip(0.01),
    "agc_recorded": lambda: optaxclip.adaptive_grad_clip(0.01, record=256),
    "optax_block_rms": lambda: optax.clip_by_block_rms(0.005),
    "optax_agc": lambda: optax.adaptive_grad_clip(0.01),
}


class Program(NamedTuple):
    """A compiled step: `run(params, shared_state, own_state, grads) -> (params, shared_state, own_state)`.

    All programs that are measured together go on from one `shared_state`: there is memory for one.
    """

    run: Callable[..., Any]
    own_state: Any
    temporary_bytes: int


def main() -> None:
    args = parse_arguments()
    shapes = gpt2.shapes(layers=args.layers, width=args.width, vocabulary=args.vocabulary)
    count, size = len(jax.tree.leaves(shapes)), nbytes(shapes)
    show_environment()
    print(f"{count} leaves, {size / 1e6:.0f} MB of gradients, median of {args.repeats}")
    bare, programs = compile_all(clippers(args.clippers), shapes)
    dense = random_tree(shapes, scale=0.01, seed=0)
    results = {}
    for name, grads in {"all leaves non-zero": dense, "a tenth of the leaves zero": with_zeros(dense)}.items():
        times = measure(bare, programs, grads, args.repeats)
        results[name] = summary(times, programs, size)
        show(name, results[name])
    write_json(args.json, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = gpt2_parser(__doc__)
    parser.add_argument("--clippers", nargs="*", choices=list(MORE), default=[], help="measure these too")
    return parser.parse_args()


def gpt2_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark on the tree of GPT-2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--width", type=int, default=768, help="smaller for a quick look")
    parser.add_argument("--vocabulary", type=int, default=50257, help="smaller for a quick look")
    return parser


def clippers(more: list[str]) -> dict[str, optax.GradientTransformation]:
    """The clips to compare, by name."""
    fixed = {OPTAX: optax.clip_by_global_norm(1.0), OURS: optaxclip.clip_by_global_norm(1.0)}
    return fixed | {name: MORE[name]() for name in more}


def compile_all(clips: dict[str, optax.GradientTransformation], shapes: Any) -> tuple[Any, dict[str, Program]]:
    """The compiled bare norm pass, and the compiled steps by name."""
    bare = jax.jit(norm_pass).lower(shapes).compile()
    return bare, {name: compile_step(clip, shapes) for name, clip in {ADAM: optax.identity(), **clips}.items()}


def norm_pass(tree: Any) -> jax.Array:
    """The least that a clip by global norm can do: read everything once."""
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


def compile_step(clip: optax.GradientTransformation, shapes: Any) -> Program:
    tx = optax.chain(clip, optax.adam(1e-4))

    def step(params: Any, adam_state: Any, clip_state: Any, grads: Any) -> tuple[Any, Any, Any]:
        updates, (clip_state, adam_state) = tx.update(grads, (clip_state, adam_state), params)
        return optax.apply_updates(params, updates), adam_state, clip_state

    clip_state, adam_state = jax.eval_shape(tx.init, shapes)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(shapes, adam_state, clip_state, shapes).compile()
    return program(compiled, clip_state)


def program(compiled: Any, own_state: Any) -> Program:
    """A compiled step, with zeros for a state of these shapes."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), own_state)
    return Program(compiled, zeros, compiled.memory_analysis().temp_size_in_bytes)


def measure(
    bare: Any, programs: dict[str, Program], grads: Any, repeats: int, shared: Any = ADAM_ALONE
) -> dict[str, list[float]]:
    """Milliseconds of every program in every repeat. The state that they share is that of `shared`."""
    params = random_tree(grads, scale=0.02, seed=1)
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
    times: dict[str, list[float]], programs: dict[str, Program], size: int, *, base: str = ADAM, peer: str = OPTAX
) -> dict[str, dict[str, float]]:
    """Per program: the median step, what it adds to `base`, that as part of a norm pass, and of what `peer` adds."""
    added = {name: added_time(times[name], times[base]) for name in programs}
    norm = statistics.median(times[BARE])
    rows = {BARE: {"step_ms": norm}}
    for name, program in programs.items():
        temporary = 100 * program.temporary_bytes / size
        rows[name] = {"step_ms": statistics.median(times[name]), "temporary_percent": temporary}
        if name != base:
            ratios = {"norm_passes": added[name] / norm, "of_optax": added[name] / added[peer]}
            rows[name] |= {"added_ms": added[name], **ratios}
    return rows


def added_time(step: list[float], adam: list[float]) -> float:
    return statistics.median(a - b for a, b in zip(step, adam, strict=True))


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows as a Markdown table."""
    columns = ["step_ms", "added_ms", "norm_passes", "of_optax", "temporary_percent"]
    print(f"\n{title}\n")
    print(f"| {'program':26} | step ms | added ms | norm passes | of optax's | temporary % |")
    print("|---|" + "---:|" * len(columns))
    widths = [7, 8, 11, 10, 11]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        print(f"| {name:26} | " + " | ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)) + " |")


def random_tree(shapes: Any, *, scale: float, seed: int) -> Any:
    """Normal float32 values of this scale."""
    rng, scale = np.random.default_rng(seed), np.float32(scale)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * scale), shapes)


def with_zeros(tree: Any) -> Any:
    """The same tree with every tenth leaf zero; the other leaves are shared, not copied."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([jnp.zeros_like(leaf) if i % 10 == 5 else leaf for i, leaf in enumerate(leaves)])


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
