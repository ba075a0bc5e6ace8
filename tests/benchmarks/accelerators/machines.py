"""The machines that programs are compiled for. None of them is needed here: XLA's compilers come with wheels."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

PLATFORMS = ("gpu", "tpu")
H100 = Path(__file__).with_name("h100.txtpb")
NEEDED = {"gpu": ("jax_cuda12_plugin", "nvidia.cuda_nvcc"), "tpu": ("libtpu",)}
# libtpu would ask a cloud's metadata server what it runs on, and lock TPUs that are not touched here.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# GPUs: time no variants of a kernel, which takes a GPU. (It chooses among them by rules instead.)
OPTIONS = {"gpu": {"xla_gpu_autotune_level": 0}, "tpu": {}}


def missing(platform: str) -> str:
    """What to install so that programs can be compiled for this platform; nothing if it is there."""
    absent = [name for name in NEEDED[platform] if not _is_there(name)]
    if not absent:
        return ""
    return f"{', '.join(absent)}: not installed. To compile for a {platform.upper()}: pip install '.[aot-{platform}]'"


def devices(platform: str, topology: str) -> list[Any]:
    """The devices of a TPU topology, such as "v5e:2x2", or one H100. Programs can be compiled for them, not run."""
    jax.config.update("jax_platforms", "cpu")
    if platform == "gpu":
        described = topologies.get_topology_desc(platform="cuda", target_config=H100.read_text(), topology="1x1x1")
        return list(described.devices)
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)


def name(platform: str, topology: str) -> str:
    return "H100 SXM" if platform == "gpu" else f"TPU {topology}"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
