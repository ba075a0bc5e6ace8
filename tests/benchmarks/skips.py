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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxclip
from optaxclip import thresholds
from tests.benchmarks import overhead, show_environment, trees, write_json

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


def main() -> None:
    args = overhead.tree_parser(__doc__).parse_args()
    shapes = trees.gpt2(layers=args.layers, width=args.width, vocabulary=args.vocabulary)
    count, size = len(jax.tree.leaves(shapes)), trees.nbytes(shapes)
    show_environment()
    print(f"{count} leaves, {size / 1e6:.0f} MB of gradients, median of {args.repeats}")
    norm_pass = jax.jit(overhead.norm_pass).lower(shapes).compile()
    grads = trees.random_like(shapes, scale=0.01, seed=0)
    given = {"ordinary gradients": grads, "a NaN in every step": with_nan(grads)}
    results = {}
    for inner, make in INNERS.items():
        programs = {name: compile_step(wrap(make()), shapes) for name, wrap in WRAPPERS.items()}
        for name, each in given.items():
            times = overhead.measure(norm_pass, programs, each, args.repeats, INNERS["adam"]())  # the clip has no state
            rows = overhead.summary(times, programs, size, base=BARE, peer=lambda _: OPTAX)
            results[f"{inner}, {name}"] = rows
            overhead.show(f"{inner}, {name}", rows)
    write_json(args.json, results=results)


def compile_step(tx: Any, shapes: Any) -> overhead.Program:
    def step(params: Any, inner_state: Any, rest: Any, grads: Any) -> tuple[Any, Any, Any]:
        updates, state = tx.update(grads, joined(inner_state, rest), params)
        return optax.apply_updates(params, updates), *split(state)

    inner_state, rest = split(jax.eval_shape(tx.init, shapes))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(shapes, inner_state, rest, shapes).compile()
    return overhead.program(compiled, rest)


def split(state: Any) -> tuple[Any, Any]:
    """The inner state, which all programs share, and what a wrapper has around it."""
    return (state.inner_state, state._replace(inner_state=())) if hasattr(state, "inner_state") else (state, ())


def joined(inner_state: Any, rest: Any) -> Any:
    return rest._replace(inner_state=inner_state) if rest else inner_state


def with_nan(grads: Any) -> Any:
    """The same tree with one NaN; the other leaves are shared, not copied."""
    return grads | {"ln_f": jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), grads["ln_f"])}


if __name__ == "__main__":
    main()
