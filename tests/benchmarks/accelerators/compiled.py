"""Compiles an optimizer step for devices that are not here."""

import os
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.benchmarks import trees
from tests.benchmarks.accelerators import machines
from tests.benchmarks.accelerators.counts import ordinary_run, worst_run
from tests.benchmarks.accelerators.hlo import parsed

ADAM_READS = 7  # of gradients, parameters and both moments; all but the gradients are written as well


class Figures(NamedTuple):
    """The columns of the table. The unit of memory is the gradients of one device."""

    reads: float
    worst_reads: float
    kernels: int
    conditionals: int
    loops: int
    host: int
    collectives: Counter[Any]
    temporary: float
    seconds: float


def step_of(tx: Any) -> Any:
    """A step of an optimizer."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def lowered_for_one(tx: Any, shapes: Any, device: Any) -> Any:
    """The step for one device."""
    there = NamedSharding(Mesh(np.array([device]), ("all",)), PartitionSpec())
    step = jax.jit(step_of(tx), in_shardings=there, out_shardings=there, donate_argnums=(0, 1))
    return step.lower(shapes, jax.eval_shape(tx.init, shapes), shapes)


def compiled_for(platform: str, lowered: Any) -> tuple[Any, float]:
    """The compiled program, and the processor seconds that it took."""
    start = sum(os.times()[:4])
    compiled = lowered.compile(compiler_options=machines.OPTIONS[platform])
    return compiled, sum(os.times()[:4]) - start


def figures(platform: str, lowered: Any, gradient_bytes: float) -> tuple[Figures, str]:
    """What the program would do, and its text."""
    compiled, seconds = compiled_for(platform, lowered)
    text = compiled.as_text()
    module = parsed(text)
    ordinary, worst = ordinary_run(module, platform), worst_run(module, platform)
    found = Figures(
        reads=ordinary.bytes / gradient_bytes - ADAM_READS,
        worst_reads=worst.bytes / gradient_bytes - ADAM_READS,
        kernels=ordinary.kernels,
        conditionals=ordinary.conditionals,
        loops=ordinary.loops,
        host=ordinary.host,
        collectives=ordinary.collectives,
        temporary=compiled.memory_analysis().temp_size_in_bytes / gradient_bytes,
        seconds=seconds,
    )
    return found, text


def figures_of(platform: str, tx: Any, shapes: Any, device: Any) -> tuple[Figures, str]:
    """The same of an optimizer on one device."""
    jax.clear_caches()  # so that no program is built on what an earlier one left, and memory does not grow
    return figures(platform, lowered_for_one(tx, shapes, device), trees.nbytes(shapes))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
