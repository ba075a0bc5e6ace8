"""Benchmarks: one script per claim. Each is run from the repository root with `python -m tests.benchmarks.<name>`."""

import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
import optax


def environment() -> dict[str, str]:
    """What the numbers depend on: the processor or accelerator, its cores, and the versions."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
    }


def show_environment() -> None:
    """Prints it, on one line."""
    print(*(f"{key} {value}" for key, value in environment().items()), sep=", ", flush=True)


def write_json(file: Path | None, **found: Any) -> None:
    """Writes what was found, and the environment, to a file if one is wanted."""
    if file:
        file.write_text(json.dumps({"environment": environment(), **found}, indent=2) + "\n")


def interleaved(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every program in every repeat, each repeat in an order of its own; two more warm up."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    for repeat in range(-2, repeats):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _processor() -> str:
    # platform.processor() is empty on many Linux systems, where /proc/cpuinfo has the name and one entry per core.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
