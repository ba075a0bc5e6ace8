"""What becomes of a training in which steps go wrong.

A linear regression, 10,000 steps of noisy gradients. At random, or in bursts of 50 steps of one kind, all gradients are
NaN, infinite, 1e30 or zero, those of one leaf are NaN, a single one is infinite, or the loss is NaN. The first 100
steps are good. The table says for each optimizer whether its parameters are finite at the end, how many of the steps
moved nothing, and the loss at the end.

Claim: with `skip_nonfinite` or `skip_spikes` around it Adam ends where it ends without faults. Alone, or inside
`optax.apply_if_finite`, it does not.

    python -m tests.benchmarks.faults
    python -m tests.benchmarks.faults --steps 100000 --json faults.json
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc
from optaxclip import thresholds
from tests.benchmarks import show_environment, write_json

GOOD = 100  # steps before the first fault
BURST = 50
KINDS = ("none", "nan", "inf", "1e30", "zero", "leaf", "coordinate", "loss", "high loss")
IN_TABLE = KINDS[1:-1]  # a high loss is nothing to an optimizer that does not see it
FAULTS: dict[str, float] = {"no faults": 0.0, "1 % of steps": 0.01, "5 % of steps": 0.05, "20 % of steps": 0.2}
BURSTS = "bursts of 50"

Params = dict[str, jax.Array]


def clipped_adam() -> Any:
    return optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-2))


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: optax.adam(1e-2),
    "optax.apply_if_finite(adam, 5)": lambda: optax.apply_if_finite(optax.adam(1e-2), 5),
    "skip_nonfinite(chain(clip, adam))": lambda: oc.skip_nonfinite(clipped_adam()),
    "skip_spikes(chain(clip, adam), mean_std(6))": lambda: oc.skip_spikes(clipped_adam(), thresholds.mean_std(6.0)),
}


class Run(NamedTuple):
    """A training: the last parameters and optimizer state, and at each step whether it moved the parameters."""

    params: Params
    state: Any
    moved: np.ndarray


def main() -> None:
    args = parse_arguments()
    show_environment()
    results = {fault: measure(codes(fault, args.steps)) for fault in [*FAULTS, BURSTS]}
    show(results, args.steps)
    write_json(args.json, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def codes(fault: str, steps: int, kinds: tuple[str, ...] = IN_TABLE, seed: int = 0) -> np.ndarray:
    """Which of KINDS happens at each step."""
    rng = np.random.default_rng(seed)
    numbers = np.array([KINDS.index(kind) for kind in kinds], np.int32)
    if fault == BURSTS:
        code = np.zeros(steps, np.int32)
        for start in range(GOOD, steps - BURST, 10 * BURST):
            first = start + rng.integers(0, 8 * BURST)
            code[first : first + BURST] = rng.choice(numbers)
    else:
        code = np.where(rng.random(steps) < FAULTS[fault], rng.choice(numbers, steps), 0).astype(np.int32)
    code[:GOOD] = 0
    return code


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 4))
    y = x @ rng.standard_normal((4, 3)) + rng.standard_normal(3) + 0.5 * rng.standard_normal((64, 3))
    return np.float32(x), np.float32(y)


def loss(params: Params) -> jax.Array:
    x, y = data()
    return jnp.mean(jnp.square(x @ params["w"] + params["b"][None] - y)) / 2


def damaged(code: jax.Array, grads: Params, value: jax.Array) -> tuple[Params, jax.Array]:
    """Gradients and loss as a fault leaves them."""

    def full(number: float) -> Params:
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, number), grads)

    versions = {
        "none": grads,
        "nan": full(jnp.nan),
        "inf": full(-jnp.inf),
        "1e30": full(1e30),
        "zero": full(0.0),
        "leaf": grads | {"w": full(jnp.nan)["w"]},
        "coordinate": grads | {"b": grads["b"].at[1].set(jnp.inf)},
        "loss": grads,
        "high loss": grads,
    }
    chosen = jax.tree.map(lambda *leaves: jnp.stack(leaves)[code], *(versions[kind] for kind in KINDS))
    value = jnp.where(code == KINDS.index("high loss"), value + 100, value)
    return chosen, jnp.where(code == KINDS.index("loss"), jnp.nan, value)


def train(
    tx: Any, code: np.ndarray, numbers: np.ndarray | None = None, options: Any = None, *, level: float = 0.0
) -> Run:
    """Steps of `tx` with these faults. The noise of a step is that of its number, by default its place.

    `options` are those of the compiler. `level` is added to the losses, which may then be negative.
    """
    tx = optax.with_extra_args_support(tx)
    numbers = np.arange(len(code)) if numbers is None else numbers

    @functools.partial(jax.jit, compiler_options=options)
    def run(code: jax.Array, numbers: jax.Array) -> tuple[Params, Any, jax.Array]:
        def step(carry: tuple[Params, Any], row: tuple[jax.Array, jax.Array]) -> tuple[tuple[Params, Any], jax.Array]:
            params, state = carry
            code, number = row
            value, grads = jax.value_and_grad(loss)(params)
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(2), number), 16)
            grads = {"w": grads["w"] + 0.2 * noise[:12].reshape(4, 3), "b": grads["b"] + 0.2 * noise[12:15]}
            grads, value = damaged(code, grads, value + level + 0.05 * noise[15])
            updates, state = tx.update(grads, state, params, value=value)
            total = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(updates))
            return (optax.apply_updates(params, updates), state), jnp.isfinite(total) & (total > 0)

        first = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
        (params, state), moved = jax.lax.scan(step, (first, tx.init(first)), (code, numbers))
        return params, state, moved

    params, state, moved = run(jnp.asarray(code), jnp.asarray(numbers))
    return Run(params, state, np.asarray(moved))


def survives(run: Run) -> bool:
    return all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(run.params))


def measure(code: np.ndarray) -> dict[str, dict[str, Any]]:
    """Per optimizer what became of it."""
    rows = {}
    for name, make in OPTIMIZERS.items():
        run = train(make(), code)
        rows[name] = {
            "survives": survives(run),
            "faults": int(np.sum(code > 0)),
            "lost": int(np.sum(~run.moved)),
            "loss": float(loss(run.params)),
        }
    return rows


def show(results: dict[str, dict[str, dict[str, Any]]], steps: int) -> None:
    """Prints a Markdown table."""
    print(f"\n{steps:,} steps\n")
    print("| faults | optimizer | survives | steps lost | final loss |")
    print("|---|---|---|---:|---:|")
    for fault, rows in results.items():
        for name, row in rows.items():
            count = f"{fault}: {row['faults']:,}" if row["faults"] else fault
            print(f"| {count} | {name} | {'yes' if row['survives'] else 'no'} | {row['lost']:,} | {row['loss']:.4f} |")


if __name__ == "__main__":
    main()
