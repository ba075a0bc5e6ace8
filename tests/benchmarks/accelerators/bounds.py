"""What CI holds the compiled programs to."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax

import optaxclip as oc
from tests import table
from tests.benchmarks import clips
from tests.benchmarks.accelerators import steps
from tests.benchmarks.accelerators.compiled import Figures, compiled_for, figures_of, first_line, lowered_for_one

READS_MORE = 0.1  # of the gradients, than optax's counterpart
TEMPORARY = 0.1  # of the gradients; optax's clip takes 0.07 on a TPU, and a copy of the largest leaf would be 0.64
GLOBAL_NORM, ADAPTIVE = "optax.clip_by_global_norm", "optax.adaptive_grad_clip"


class Bounded(NamedTuple):
    """A step and the transformation of optax whose reads it is held to."""

    make: steps.Make
    peer: str = GLOBAL_NORM


BOUNDED = {
    "clip_by_global_norm": Bounded(partial(steps.before_adam, lambda: oc.clip_by_global_norm(1.0))),
    "clip_by_global_norm, record=100": Bounded(steps.MORE["clip_by_global_norm, record=100"]),
    "clip_by_leaf_norm": Bounded(partial(steps.before_adam, lambda: oc.clip_by_leaf_norm(1.0))),
    "adaptive_grad_clip": Bounded(partial(steps.before_adam, lambda: oc.adaptive_grad_clip(0.01)), ADAPTIVE),
    "zclip": Bounded(partial(steps.before_adam, oc.zclip)),
    "skip_nonfinite(adam)": Bounded(steps.MORE["skip_nonfinite(adam)"]),
    "skip_spikes(adam)": Bounded(steps.MORE["skip_spikes(adam)"]),
}


def check(platform: str, device: Any) -> int:
    """Prints every violation. The exit code."""
    found = [*uncompiled(platform, device), *exceeded(platform, device)]
    print(*found, f"{len(found)} violations" if found else "All bounds hold.", sep="\n")
    return int(bool(found))


def uncompiled(platform: str, device: Any) -> Iterator[str]:
    """Transformations that do not compile, on the small tree of the table of tests."""
    shapes = jax.eval_shape(partial(table.params, "float32"))
    for name, make in steps.rows(any_tree=False).items():
        jax.clear_caches()
        try:
            compiled_for(platform, lowered_for_one(make(), shapes, device))
        except Exception as error:  # noqa: BLE001  # whatever a compiler raises is a violation
            yield f"{name}: does not compile: {first_line(error)}"


def exceeded(platform: str, device: Any) -> Iterator[str]:
    """Bounds that do not hold, on three layers of GPT-2."""
    shapes = steps.TREES["gpt2s"]()
    peers = {
        name: figures_of(platform, steps.before_adam(clips.OPTAX[name]), shapes, device)[0]
        for name in (GLOBAL_NORM, ADAPTIVE)
    }
    for name, (make, peer) in BOUNDED.items():
        found, _ = figures_of(platform, make(), shapes, device)
        yield from (f"{name}: {each}" for each in violations(found, peer, peers[peer]))


def violations(found: Figures, peer: str, of_peer: Figures) -> Iterator[str]:
    """What exceeds its bound, in words."""
    most = of_peer.worst_reads + READS_MORE
    if found.worst_reads > most:
        yield (
            f"reads the gradients {found.worst_reads:.2f} times more than Adam in the worst case,"
            f" {found.reads:.2f} in the ordinary one; at most {most:.2f}, which is {READS_MORE} more than {peer}"
        )
    if found.temporary > TEMPORARY:
        yield f"takes {found.temporary:.2f} of the gradients in temporary memory; at most {TEMPORARY}"
    if found.conditionals:
        yield f"has {found.conditionals} conditionals; at most 0"
    if found.host:
        yield f"has {found.host} transfers between device and host; at most 0"
