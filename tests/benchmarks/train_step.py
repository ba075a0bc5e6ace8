"""How much a clip adds to a whole train step of a small transformer, forward and backward pass included.

Claim: under 2 %.

    python -m tests.benchmarks.train_step
    python -m tests.benchmarks.train_step --layers 12 --width 768 --repeats 31 --json train_step.json

The model is a decoder of pre-norm blocks (attention with four heads, MLP four times as wide) on bytes; batch, length
and size are options. A step is loss, gradient, clip, Adam and update, compiled ahead of time, parameters and optimizer
state donated and handed from program to program. Each repeat runs every program once, in an order of its own; printed
are the medians of the steps, and of the ratios to the step without a clip in the same repeat, with their quartiles.
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

from tests.benchmarks import clips, interleaved, show_environment, trees, write_json

HEADS = 4
NO_CLIP = "no clip"
CLIPS = (
    "clip_by_leaf_norm",
    "clip_by_block_rms",
    "adaptive_grad_clip",
    "autoclip",
    "zclip",
    "adagc",
    "clip_by_history",
)


def main() -> None:
    args = parse_arguments()
    params = init(args)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (args.batch, args.length + 1)))
    show_environment()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, {args.batch} sequences of {args.length}, median of {args.repeats}\n")
    transformations = {NO_CLIP: optax.identity(), **clips.chosen(CLIPS, "gpt2")}
    rows = summary(interleaved(programs(transformations, params, tokens), args.repeats))
    show(rows)
    write_json(args.json, parameters=size, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def init(args: argparse.Namespace) -> Any:
    """Random parameters."""
    shapes = trees.gpt2(layers=args.layers, width=args.width, vocabulary=256)
    return trees.random_like(shapes, scale=args.width**-0.5, seed=0)


def loss(params: Any, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy of the next byte."""
    x = params["wte"][tokens[:, :-1]] + params["wpe"][: tokens.shape[1] - 1]
    for block in params["blocks"]:
        x = x + attend(block["attn"], normed(block["ln_1"], x))
        x = x + dense(block["mlp"]["out"], jax.nn.gelu(dense(block["mlp"]["in"], normed(block["ln_2"], x))))
    logits = normed(params["ln_f"], x) @ params["wte"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def attend(weights: Any, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = jnp.split(dense(weights["qkv"], x).reshape(batch, length, 3 * HEADS, width // HEADS), 3, axis=2)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return dense(weights["out"], out.reshape(batch, length, width))


def dense(weights: Any, x: jax.Array) -> jax.Array:
    return x @ weights["kernel"] + weights["bias"]


def normed(weights: Any, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x) * (1 + weights["scale"]) + weights["bias"]


def programs(transformations: dict[str, Any], params: Any, tokens: jax.Array) -> dict[str, Callable[[], Any]]:
    """A function per clip that takes a step; parameters and Adam's state go from each to the next."""
    adam = optax.adam(1e-4)
    shared = params, adam.init(params)

    def compiled(clip: Any) -> Callable[[], Any]:
        def step(params: Any, state: Any, own: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
            updates, own = clip.update(jax.grad(loss)(params, tokens), own, params)
            updates, state = adam.update(updates, state, params)
            return optax.apply_updates(params, updates), state, own

        own = clip.init(shared[0])
        run = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*shared, own, tokens).compile()

        def take() -> Any:
            nonlocal shared, own
            params, state, own = run(*shared, own, tokens)
            shared = params, state
            return shared, own

        return take

    return {name: compiled(clip) for name, clip in transformations.items()}


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per program: the median step, and the quartiles of its ratios to the step without a clip."""
    rows = {}
    for name, each in times.items():
        ratios = [step / base for step, base in zip(each, times[NO_CLIP], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"step_ms": statistics.median(each), "ratio": middle, "low": low, "high": high}
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows as a Markdown table."""
    print(f"| {'clip':26} | step ms | of no clip (quartiles) |")
    print("|---|---:|---:|")
    for name, row in rows.items():
        cell = f"{row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
        print(f"| {name:26} | {row['step_ms']:7.1f} | {cell:>22} |")


if __name__ == "__main__":
    main()
