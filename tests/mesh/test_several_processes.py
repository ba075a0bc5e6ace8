"""Two real processes on this machine, with four devices each, through the script that users start on two machines."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "notebooks" / "several_processes.py"
STEPS = 8


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def start(folder, optimizer, *, processes=2, steps=STEPS):
    """The running processes. Eight devices in all."""
    port = free_port()
    bad = ["--bad-step", "3"] if optimizer == "skip_spikes" else []
    command = [sys.executable, str(SCRIPT), "--coordinator", f"localhost:{port}", "--processes", str(processes), *bad]
    options = ["--cpu-devices", str(8 // processes), "--optimizer", optimizer, "--steps", str(steps)]
    return [
        subprocess.Popen(
            [*command, *options, "--process", str(i), "--folder", str(folder)],
            cwd=SCRIPT.parents[1],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def environment():
    plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return plain | {"PYTHONPATH": str(SCRIPT.parents[1])}


def finished(processes):
    """What the processes printed. They have to end well."""
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


def norms(printed):
    return [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]


def arrays(folder, process, step=STEPS):
    with np.load(folder / f"process-{process}-step-{step}.npz") as saved:
        return list(saved.values())


# One with statistics, and one that skips a step with a NaN and clips the others by the global norm.
@pytest.mark.parametrize("optimizer", ["zclip", "skip_spikes"])
def test_two_processes_train_as_one_does(optimizer, tmp_path):
    printed = finished(start(tmp_path / "one", optimizer, processes=1))[0]
    two = finished(start(tmp_path / "two", optimizer))[0]
    one_norms, two_norms = norms(printed), norms(two)
    assert len(one_norms) == STEPS
    np.testing.assert_allclose(two_norms, one_norms, rtol=1e-5)
    assert np.isnan(one_norms).sum() == (optimizer == "skip_spikes")

    both = [arrays(tmp_path / "two", process) for process in range(2)]
    for mine, other, alone in zip(*both, arrays(tmp_path / "one", 0), strict=True):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, alone, rtol=1e-4, atol=1e-5)


def test_two_processes_go_on_after_they_were_killed(tmp_path):
    """With the one whose state holds all kinds: Adam's, statistics, and counts of steps."""
    optimizer = "skip_spikes"
    killed = start(tmp_path / "killed", optimizer, steps=10_000)
    try:
        wait_for(tmp_path / "killed" / "process-0-step-4.npz", killed)
    finally:
        for process in killed:
            process.kill()
            process.communicate()
    # They may have come further than the run to compare with.
    reached = max(int(file.stem.split("-")[-1]) for file in (tmp_path / "killed").glob("process-*.npz"))
    finished(start(tmp_path / "killed", optimizer, steps=reached + 3))
    finished(start(tmp_path / "through", optimizer, steps=reached + 3))
    for again, through in zip(
        arrays(tmp_path / "killed", 1, reached + 3), arrays(tmp_path / "through", 1, reached + 3), strict=True
    ):
        np.testing.assert_array_equal(again, through)


def wait_for(file, processes):
    end = time.monotonic() + 120
    while not file.exists():
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            raise AssertionError([process.communicate(timeout=5)[0] for process in processes if process.kill() is None])
        time.sleep(0.01)
