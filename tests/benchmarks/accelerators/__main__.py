"""The command; the package's docstring says what it measures."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tests.benchmarks import accelerators, trees
from tests.benchmarks.accelerators import bounds, machines, sharded, steps
from tests.benchmarks.accelerators.compiled import Figures, figures_of, first_line

COLUMNS = ("reads", "at worst", "kernels", "conditionals", "loops", "host", "collectives", "temporary", "compile s")
HEADER = f"| step | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}"


def main() -> None:
    args = parse_arguments()
    if absent := machines.missing(args.platform):
        sys.exit(absent)
    devices = machines.devices(args.platform, args.topology)
    print(f"{machines.name(args.platform, args.topology)}, jax {jax.__version__}, optax {optax.__version__}")
    if args.check:
        sys.exit(bounds.check(args.platform, devices[0]))
    if args.sharded:
        sharded.show(args.platform, chosen(args.clip, sharded.STEPS), devices)
    else:
        show(args, devices[0])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.accelerators",
        description=accelerators.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("platform", choices=machines.PLATFORMS)
    parser.add_argument("--tree", choices=list(steps.TREES), default="gpt2s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clip", nargs="+", default=[], metavar="NAME", help="only these steps")
    parser.add_argument("--topology", default="v5e:2x2", help="of the TPUs, such as v6e:2x2")
    parser.add_argument("--hlo", type=Path, help="write the compiled programs to this folder")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compile all transformations and hold some to their bounds")
    mode.add_argument("--sharded", action="store_true", help="count the collectives on 2x2 devices")
    args = parser.parse_args()
    if args.sharded and args.platform != "tpu":
        parser.error("--sharded compiles for a TPU: one GPU is described")
    return args


def chosen(names: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """The steps of these names, or all."""
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no step is called {unknown[0]!r}; there are {'; '.join(known)}")
    return {name: known[name] for name in names or known}


def show(args: argparse.Namespace, device: Any) -> None:
    """Prints the table, row by row."""
    shapes = steps.TREES[args.tree](np.dtype(args.dtype))
    print(f"{args.tree}: {len(jax.tree.leaves(shapes))} leaves, {trees.nbytes(shapes) / 1e6:.0f} MB of {args.dtype}\n")
    makes = chosen(args.clip, steps.steps())
    # The first compilation also starts the compiler.
    figures_of(args.platform, optax.identity(), steps.TREES["one"](), device)
    print(HEADER, flush=True)
    for name, make in makes.items():
        print(row(name, make, shapes, device, args), flush=True)


def row(name: str, make: steps.Make, shapes: Any, device: Any, args: argparse.Namespace) -> str:
    """A line of the table."""
    try:
        found, text = figures_of(args.platform, make(), shapes, device)
    except Exception as error:  # noqa: BLE001  # whatever a compiler raises is a result
        return f"| `{name}` | does not compile: {first_line(error)} |"
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)
        (args.hlo / f"{re.sub('[^A-Za-z0-9.]+', '_', name)}.txt").write_text(text)
    return f"| `{name}` | {' | '.join(cells(found))} |"


def cells(found: Figures) -> list[str]:
    return [
        f"{found.reads:.2f}",
        f"{found.worst_reads:.2f}",
        *map(str, (found.kernels, found.conditionals, found.loops, found.host, found.collectives.total())),
        f"{found.temporary:.2f}",
        f"{found.seconds:.1f}",
    ]


if __name__ == "__main__":
    main()
