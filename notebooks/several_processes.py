"""One training run with clipping on several processes.

Start it on every machine, each with its own --process:

    python several_processes.py --coordinator 10.0.0.1:1234 --processes 2 --process 0
    python several_processes.py --coordinator 10.0.0.1:1234 --processes 2 --process 1

It runs on all devices that jax finds. --cpu-devices 4 splits each machine's CPU into four devices. Inside `shard_map`
every device has a shard of the parameters, of the optimizer's state and of the batch (FSDP). The clipper needs no
arguments for this. It reads from the types which arrays are shards, and measures the norm over all of them.

With --folder each process saves the whole state after every step, on its own machine. Started again, it continues from
there.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

ADAM = optax.adam(1e-2)
OPTIMIZERS = {
    "clip_by_global_norm": optax.chain(optaxclip.clip_by_global_norm(1.0), ADAM),
    "zclip": optax.chain(optaxclip.zclip(warmup_steps=3, max_norm=None), ADAM),
    "skip_spikes": optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_global_norm(1.0), ADAM),
        optaxclip.thresholds.mean_std(3.0, window=8, warmup_steps=4),
    ),
}
SIZES = {"hidden": (16, 32), "bias": (32,), "out": (32, 1), "scale": ()}
SPECS = {"hidden": P("data"), "bias": P("data"), "out": P("data"), "scale": P()}
BATCH = 64


def main() -> None:
    """Trains with the settings of the command line."""
    args = parse_arguments()
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)

    tx = OPTIMIZERS[args.optimizer]
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = initial_params()
    specs = (SPECS, state_specs(tx, params))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))
    checkpoints = args.folder and Checkpoints(args.folder, args.process)
    step, carry = 0, (params, tx.init(params))
    if checkpoints:
        step, carry = checkpoints.newest(carry)
    carry = jax.tree.map(spread, carry, shardings)
    train_step = jax.jit(
        jax.shard_map(
            lambda carry, x, y: one_step(tx, *carry, x, y),
            mesh=mesh,
            in_specs=(specs, P("data"), P("data")),
            out_specs=(specs, P(), P()),
        ),
        donate_argnums=0,
    )
    while step < args.steps:
        batch = [spread(array, NamedSharding(mesh, P("data"))) for array in batch_of(step, args.bad_step)]
        carry, loss, norm = train_step(carry, *batch)
        step += 1
        if checkpoints:
            checkpoints.save(step, carry)
        if jax.process_index() == 0:
            print(f"step {step:3d}  loss {loss:.6f}  norm of the gradients {norm:.6f}", flush=True)


def one_step(tx, params, state, x, y):
    """One step of one device, with its shards of the parameters, of the state and of the batch."""

    def loss_of(params):
        # The transpose of all_gather sums over the devices, and gives each device its shard of the gradient.
        whole = {
            name: jax.lax.all_gather(leaf, "data", tiled=True) if SPECS[name] else leaf for name, leaf in params.items()
        }
        hidden = jax.nn.relu(x @ whole["hidden"] + whole["bias"])
        return jnp.mean((whole["scale"] * (hidden @ whole["out"])[:, 0] - y) ** 2) / jax.lax.axis_size("data")

    loss, grads = jax.value_and_grad(loss_of)(params)
    loss = jax.lax.psum(loss, "data")
    updates, state = tx.update(grads, state, params, value=loss)
    return (optax.apply_updates(params, updates), state), loss, optaxclip.global_norm(grads)


def state_specs(tx, params):
    """State of a parameter is sharded like the parameter; all other state is the same on every device."""
    return optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        jax.eval_shape(tx.init, params),
        SPECS,
        transform_non_params=lambda _: P(),
    )


def initial_params():
    """The same parameters on every process."""
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=size, scale=0.3), jnp.float32) for name, size in SIZES.items()}


def batch_of(step, bad_step):
    """The same batch on every process. In the bad step the last example, on the last device, is NaN."""
    rng = np.random.default_rng([1, step])
    x = rng.normal(size=(BATCH, 16)).astype(np.float32)
    y = np.sin(x).sum(axis=1)
    if step + 1 == bad_step:
        x[-1] = np.nan
    return x, y


def spread(array, sharding):
    """Spreads an array that every process has over all devices."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Checkpoints:
    """Files of one process with the last two states. Each holds the whole state, for any number of devices."""

    def __init__(self, folder, process):
        self.folder, self.start = folder, f"process-{process}-step-"

    def steps(self):
        """The steps that have a checkpoint, in order."""
        return sorted(int(file.stem.removeprefix(self.start)) for file in self.folder.glob(f"{self.start}*.npz"))

    def file(self, step):
        """The file of a step."""
        return self.folder / f"{self.start}{step}.npz"

    def save(self, step, carry):
        """Saves this state, and deletes all but the last two."""
        whole = multihost_utils.process_allgather(carry, tiled=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"unfinished-{self.file(step).name}"
        np.savez(unfinished, *jax.tree.leaves(whole))
        unfinished.replace(self.file(step))  # a kill while writing leaves the last checkpoint intact
        for old in self.steps()[:-2]:
            self.file(old).unlink()

    def newest(self, carry):
        """The newest step that all processes have, and its state. Without one, step 0 and `carry`."""
        # Each step needs all processes, so none is two steps ahead of another.
        mine = self.steps()[-1] if self.steps() else 0
        step = int(np.min(multihost_utils.process_allgather(np.asarray(mine))))
        if step == 0:
            return 0, carry
        with np.load(self.file(step)) as arrays:
            return step, jax.tree.unflatten(jax.tree.structure(carry), list(arrays.values()))


def parse_arguments():
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", default="localhost:1234", help="address and a free port of the first machine")
    parser.add_argument("--processes", type=int, default=1, help="number of processes")
    parser.add_argument("--process", type=int, default=0, help="number of this process, from 0")
    parser.add_argument("--cpu-devices", type=int, help="split the CPU into this many devices")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="skip_spikes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bad-step", type=int, help="the step in which one example is NaN")
    parser.add_argument("--folder", type=Path, help="save here, and continue from what is here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
