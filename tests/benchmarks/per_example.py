"""The gradient of a batch with each example clipped, in time and in temporary memory.

Claim: on a multilayer perceptron at batch 128, on a CPU with jax 0.10 or 0.12, `per_example.clipped_value_and_grad`
with `clip_by_global_norm` (two passes) takes at most twice the ordinary gradient, and is at least 5 times faster than
`jax_privacy.clipped_grad` without microbatches. In microbatches of 8, in one pass as well, its temporary memory is
under a tenth of that of all gradients at once.

    python -m tests.benchmarks.per_example
    python -m tests.benchmarks.per_example --repeats 31 --json per_example.json

Programs are compiled ahead of time and run once in every repeat, in an order of their own; medians of all repeats. The
ratio is that of a program to the ordinary gradient of the mean loss, in the same repeat. Temporary memory is what the
compiler reports, beside arguments and results. "As chosen" is two passes for the perceptrons and one for the others.
jax-privacy is measured where it is installed (`pip install jax-privacy==2.0.0`), with its own defaults, and with
microbatches of 8.
"""

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip import per_example
from tests.benchmarks import interleaved, show_environment, write_json

ORDINARY = "ordinary gradient"
CHOSEN, ONE = "as chosen", "one pass"
PRIVACY = "jax_privacy.clipped_grad"
MICROBATCH = 8


class Model(NamedTuple):
    """A loss of one example, its parameters, and a batch."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, jax.Array]


def main() -> None:
    args = parse_arguments()
    show_environment()
    results = {}
    for title, model in models(args.batch).items():
        programs = {name: compiled(step, model) for name, step in steps(model).items()}
        calls = {name: partial(program, model.params, *model.batch) for name, program in programs.items()}
        rows = summary(interleaved(calls, args.repeats), programs)
        show(f"{title}, batch {args.batch}, median of {args.repeats}", rows)
        results[title] = rows
    write_json(args.json, results=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def models(number: int) -> dict[str, Model]:
    """What to measure: matrices that an example meets once, matrices that it meets at every place, and convolutions."""
    rng = np.random.default_rng(0)
    return {
        "MLP 256-256-256-10": perceptron(rng, (256, 256, 256, 10), number),
        "MLP 784-512-256-10": perceptron(rng, (784, 512, 256, 10), number),
        "attention, 32 places of 64": attention(rng, 32, 64, number),
        "convolution, 16 x 16 x 8": convolution(rng, number),
    }


def matrix(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def numbers(rng: np.random.Generator, number: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(rng.normal(size=(number, *shape)), jnp.float32), jnp.asarray(rng.integers(0, 10, number))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return -jax.nn.log_softmax(logits)[label]


def perceptron(rng: np.random.Generator, sizes: tuple[int, ...], number: int) -> Model:
    params = [{"w": matrix(rng, *pair), "b": jnp.zeros(pair[1])} for pair in itertools.pairwise(sizes)]

    def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], label)

    return Model(loss, params, numbers(rng, number, sizes[0]))


def attention(rng: np.random.Generator, places: int, width: int, number: int) -> Model:
    params = {name: matrix(rng, width, width) for name in "qkvo"} | {"out": matrix(rng, width, 10)}

    def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        weights = jax.nn.softmax((x @ params["q"]) @ (x @ params["k"]).T / np.sqrt(width))
        x = x + jax.nn.relu(weights @ (x @ params["v"])) @ params["o"]
        return cross_entropy(jnp.mean(x, axis=0) @ params["out"], label)

    return Model(loss, params, numbers(rng, number, places, width))


def convolution(rng: np.random.Generator, number: int) -> Model:
    params = {"first": matrix(rng, 3, 3, 8, 16), "second": matrix(rng, 3, 3, 16, 16), "out": matrix(rng, 16, 10)}

    def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        x = x[None]
        for name in ("first", "second"):
            numbering = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=numbering))
        return cross_entropy(jnp.mean(x, axis=(0, 1, 2)) @ params["out"], label)

    return Model(loss, params, numbers(rng, number, 16, 16, 8))


def steps(model: Model) -> dict[str, Callable[..., Any]]:
    """The programs: `(params, x, label) -> (value, gradients)`, or gradients and values."""

    def mean_loss(params: Any, *batch: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(model.loss, (None, 0, 0))(params, *batch))

    clip = optaxclip.clip_by_global_norm(1.0)
    forms = {CHOSEN: clip, ONE: optax.chain(clip)}  # of a chain it is not known what it does to a gradient
    programs: dict[str, Callable[..., Any]] = {ORDINARY: jax.value_and_grad(mean_loss)}
    for size, (name, tx) in itertools.product((None, MICROBATCH), forms.items()):
        options: dict[str, Any] = {"batch_argnums": (1, 2), "microbatch_size": size}
        programs[named(name, size)] = per_example.clipped_value_and_grad(model.loss, tx, **options)
    return programs | privacy(model)


def named(name: str, microbatch_size: int | None) -> str:
    return name if microbatch_size is None else f"{name}, microbatches of {microbatch_size}"


def privacy(model: Model) -> dict[str, Callable[..., Any]]:
    """The same of jax-privacy, if it is installed."""
    if importlib.util.find_spec("jax_privacy") is None:
        return {}
    import jax_privacy  # noqa: PLC0415  # only where it is there

    count = model.batch[0].shape[0]
    options: dict[str, Any] = {"batch_argnums": (1, 2), "keep_batch_dim": False, "normalize_by": count}
    options |= {"l2_clip_norm": 1.0, "return_values": True}
    return {
        named(PRIVACY, size): jax_privacy.clipped_grad(model.loss, microbatch_size=size, **options).fun
        for size in (None, MICROBATCH)
    }


def compiled(step: Callable[..., Any], model: Model) -> Any:
    return jax.jit(step).lower(model.params, *model.batch).compile()


def summary(times: dict[str, list[float]], programs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per program: the median, that of its ratios, and temporary memory."""

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))

    rows = {}
    for name, program in programs.items():
        temporary = program.memory_analysis().temp_size_in_bytes / 1e6
        rows[name] = {"ms": statistics.median(times[name]), "of_ordinary": ratio(name, ORDINARY)}
        rows[name] |= {"of_chosen": ratio(name, CHOSEN), "temporary_mb": temporary}
    return rows


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows as a Markdown table."""
    print(f"\n{title}\n")
    print(f"| {'program':42} | ms | of the ordinary | of the chosen | temporary MB |")
    print("|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        print(
            f"| {name:42} | {row['ms']:.2f} | {row['of_ordinary']:.2f} | {row['of_chosen']:.2f} "
            f"| {row['temporary_mb']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
