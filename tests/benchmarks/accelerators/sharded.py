"""Collectives of a step on 2x2 devices: for an Auto mesh, where XLA places them, and in `shard_map`, where we do.

Kernels are split over both axes of the mesh, embeddings over "data", and vectors are whole: there are two sets of axes
over which something is split.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from tests.benchmarks import trees
from tests.benchmarks.accelerators import steps
from tests.benchmarks.accelerators.compiled import figures, first_line, step_of

AXES = ("data", "model")
SHAPES = trees.gpt2(layers=2, width=512, vocabulary=8192)


def _spec(path: Any, leaf: Any) -> P:
    if leaf.ndim < 2:
        return P()
    return P("data") if len(path) == 1 else P(*AXES)


SPECS = jax.tree.map_with_path(_spec, SHAPES)

# Functions of the library's argument `axes`.
STEPS: dict[str, Callable[[Any], Any]] = {
    steps.ADAM: lambda _: steps.adam(),
    "optax.clip_by_global_norm": lambda _: optax.chain(optax.clip_by_global_norm(1.0), steps.adam()),
    "optax.adaptive_grad_clip": lambda _: optax.chain(optax.adaptive_grad_clip(0.01), steps.adam()),
    "clip_by_global_norm": lambda axes: optax.chain(oc.clip_by_global_norm(1.0, axes=axes), steps.adam()),
    "clip_by_global_norm, record=100": lambda axes: optax.chain(
        oc.clip_by_global_norm(1.0, axes=axes, record=100), steps.adam()
    ),
    "clip_by_leaf_norm": lambda axes: optax.chain(oc.clip_by_leaf_norm(1.0, axes=axes), steps.adam()),
    "clip_by_leaf_norm, record=100": lambda axes: optax.chain(
        oc.clip_by_leaf_norm(1.0, axes=axes, record=100), steps.adam()
    ),
    "clip_by_block_rms": lambda axes: optax.chain(oc.clip_by_block_rms(1.0, axes=axes), steps.adam()),
    "adaptive_grad_clip": lambda axes: optax.chain(oc.adaptive_grad_clip(0.01, axes=axes), steps.adam()),
    "zclip": lambda axes: optax.chain(oc.zclip(axes=axes), steps.adam()),
    "autoclip": lambda axes: optax.chain(oc.autoclip(axes=axes), steps.adam()),
    "adagc": lambda axes: optax.chain(oc.adagc(axes=axes), steps.adam()),
    "skip_nonfinite(adam)": lambda axes: oc.skip_nonfinite(steps.adam(), axes=axes),
    "skip_spikes(adam)": lambda axes: oc.skip_spikes(steps.adam(), oc.thresholds.mean_std(6.0), axes=axes),
}


HEADER = "| step | in | reads | at worst | conditionals | collectives |\n|---|---|---:|---:|---:|---|"


def show(platform: str, makes: dict[str, Callable[[Any], Any]], devices: list[Any]) -> None:
    """Prints two rows for each step."""
    mesh = Mesh(np.array(devices).reshape(2, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    print(f"{len(jax.tree.leaves(SHAPES))} leaves, {trees.nbytes(SHAPES) / 1e6:.0f} MB on 2x2 devices\n\n{HEADER}")
    for name, make in makes.items():
        for mode, lowered in {"`jit`, Auto mesh": on_auto_mesh, "`shard_map`": in_shard_map}.items():
            print(f"| `{name}` | {mode} | {cells(platform, lowered, make, mesh)} |", flush=True)


def cells(platform: str, lowered: Callable[..., Any], make: Callable[[Any], Any], mesh: Mesh) -> str:
    """What the program does, for the table."""
    try:
        found, _ = figures(platform, lowered(make, mesh), bytes_of_one(mesh))
    except Exception as error:  # noqa: BLE001  # whatever a compiler raises is a result
        return f"does not compile: {first_line(error)}"
    collectives = [f"{number} {kind}" for kind, number in sorted(named(found.collectives, mesh).items())]
    counts = (f"{found.reads:.2f}", f"{found.worst_reads:.2f}", str(found.conditionals))
    return " | ".join((*counts, ", ".join(collectives) or "0"))


def on_auto_mesh(make: Callable[[Any], Any], mesh: Mesh) -> Any:
    """A step in plain `jit`."""
    tx = make("auto")
    params, state = _placed(SPECS, mesh), _placed(state_specs(tx), mesh)
    step = jax.jit(
        step_of(tx), in_shardings=(params, state, params), out_shardings=(params, state), donate_argnums=(0, 1)
    )
    return step.lower(SHAPES, jax.eval_shape(tx.init, SHAPES), SHAPES)


def in_shard_map(make: Callable[[Any], Any], mesh: Mesh) -> Any:
    """A step in which each device has its own shards."""
    tx = make(SPECS)
    state = state_specs(tx)
    step = jax.shard_map(step_of(tx), mesh=mesh, in_specs=(SPECS, state, SPECS), out_specs=(SPECS, state))
    return jax.jit(step, donate_argnums=(0, 1)).lower(SHAPES, jax.eval_shape(tx.init, SHAPES), SHAPES)


def state_specs(tx: Any) -> Any:
    """What has the shape of a parameter is split as that is; all else is whole."""
    state = jax.eval_shape(tx.init, SHAPES)
    return optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        SPECS,
        transform_non_params=lambda entries: jax.tree.map(lambda _: P(), entries),
    )


def bytes_of_one(mesh: Mesh) -> int:
    """The bytes of one device's gradients."""
    shardings = jax.tree.leaves(_placed(SPECS, mesh))
    shards = [
        jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)
        for sharding, leaf in zip(shardings, jax.tree.leaves(SHAPES), strict=True)
    ]
    return trees.nbytes(shards)


def named(collectives: Counter[Any], mesh: Mesh) -> Counter[str]:
    """The collectives by kind and mesh axes."""
    found: Counter[str] = Counter()
    for (kind, *groups), number in collectives.items():
        found[f"{kind} over {axes_of(groups[0], mesh) if groups else 'unknown axes'}"] += number
    return found


def axes_of(group: tuple[int, ...], mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ."""
    indices = np.array(np.unravel_index(group, mesh.devices.shape))
    return " and ".join(axis for axis, index in zip(AXES, indices, strict=True) if len(set(index.tolist())) > 1)


def _placed(specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))
