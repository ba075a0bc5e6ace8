"""How the time of a clip by global norm grows with parameters, with leaves and with devices.

Claim: at every number of parameters and of leaves the clip adds no more to a step of Adam than optax's; from 10^7
parameters on at most 1.2 times what reading the gradients takes. On a GPU 3,000 leaves take at most 1.5 times as long
as one of the same size.

    python -m tests.benchmarks.scaling
    python -m tests.benchmarks.scaling --largest 1e9 --json scaling.json
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.benchmarks.scaling --over devices

How it measures. Parameters are in one leaf; leaves share 10^7 parameters; devices share 2 x 10^7, in eight leaves that
are split along their first axis, under `jit` with shardings and in `shard_map`. A step is clip, Adam and update,
compiled ahead of time, parameters and state donated. Each repeat runs every program once, in an order of its own; what
a clip adds is its step less that of Adam alone in the same repeat, and medians are printed. "floor" is the bytes of the
gradients over the bandwidth at which the same run changes them in place. Devices that are threads of one processor show
what collectives cost and not how a cluster scales. In
`shard_map` optax's clip takes the norm of each device's share, without a collective. Needs 20 bytes per parameter.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip
from tests.benchmarks import interleaved, overhead, show_environment, trees, write_json

ADAM = optax.adam(1e-4)
CLIPS = {"adam": optax.identity(), "optax": optax.clip_by_global_norm(1.0), "ours": optaxclip.clip_by_global_norm(1.0)}
LEAVES = (1, 10, 100, 1000, 3000)


def main() -> None:
    args = parse_arguments()
    show_environment()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, cases in {"parameters": parameters, "leaves": leaves, "devices": devices}.items():
        if name in args.over:
            show_head(name)
            found[name] = {}
            for title, case in cases(args):
                found[name][title] = case()
                show_row(title, found[name][title])
    write_json(args.json, results=found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--over", nargs="+", choices=["parameters", "leaves", "devices"], default=["parameters", "leaves"]
    )
    parser.add_argument("--largest", type=float, default=1e8, help="number of parameters")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


Case = tuple[str, Callable[[], dict[str, float]]]


def parameters(args: argparse.Namespace) -> Iterator[Case]:
    for size in (10**k for k in range(5, 10) if 10**k <= args.largest):
        yield f"{size:.0e}", partial(added, [jax.ShapeDtypeStruct((size,), np.float32)], args.repeats)


def leaves(args: argparse.Namespace) -> Iterator[Case]:
    size = int(min(args.largest, 1e7))
    for count in LEAVES:
        shapes = [jax.ShapeDtypeStruct((size // count,), np.float32)] * count
        yield f"{count:,}", partial(added, shapes, args.repeats)


def devices(args: argparse.Namespace) -> Iterator[Case]:
    shapes = [jax.ShapeDtypeStruct((2560, 1000), np.float32)] * 8
    for count in (count for count in (1, 2, 4, 8) if count <= jax.device_count()):
        mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
        yield f"{count}, jit", partial(added, shapes, args.repeats, mesh)
        yield f"{count}, shard_map", partial(added, shapes, args.repeats, mesh, manual=True)


def added(shapes: Any, repeats: int, mesh: Any = None, *, manual: bool = False) -> dict[str, float]:
    """The floor, Adam's step, what both clips add to it, and the ratios of ours, in milliseconds."""
    times = interleaved({name: program(clip, shapes, mesh, manual) for name, clip in CLIPS.items()}, repeats)
    ours, optax_ = (overhead.added_time(times[name], times["adam"]) for name in ("ours", "optax"))
    floor = 1e3 * trees.nbytes(shapes) / overhead.bandwidth(shapes, repeats)
    row = {"floor": floor, "adam": statistics.median(times["adam"]), "optax": optax_, "ours": ours}
    return row | {"of_floor": ours / floor, "of_optax": ours / optax_}


def program(clip: Any, shapes: Any, mesh: Any, manual: bool) -> Callable[[], Any]:
    """A function that takes a step of this clip and Adam, with parameters, gradients and states of its own."""
    place = (
        jax.device_put if mesh is None else partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    )
    grads, params = (jax.tree.map(place, trees.random_like(shapes, scale=0.01, seed=seed)) for seed in (0, 1))
    tx = optax.chain(clip, ADAM)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(lambda leaf: place(leaf) if jnp.ndim(leaf) else leaf, tx.init(params))
    if manual:
        split = jax.tree.map(lambda leaf: PartitionSpec("data") if jnp.ndim(leaf) else PartitionSpec(), state)
        data = PartitionSpec("data")
        step = jax.shard_map(step, mesh=mesh, in_specs=(data, split, data), out_specs=(data, split))
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()

    def take() -> Any:
        nonlocal params, state
        params, state = run(params, state, grads)
        return params, state

    return take


COLUMNS = {"floor": 8, "adam": 7, "optax": 10, "ours": 9, "of_floor": 12, "of_optax": 10}  # and their widths


def show_head(over: str) -> None:
    """Prints the head of a Markdown table."""
    print(f"\n| {over:12} | floor ms | adam ms | optax adds | ours adds | of the floor | of optax's |")
    print("|---|" + "---:|" * len(COLUMNS), flush=True)


def show_row(name: str, row: dict[str, float]) -> None:
    cells = [f"{row[column]:.3g}" for column in COLUMNS]
    numbers = " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
    print(f"| {name:12} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
