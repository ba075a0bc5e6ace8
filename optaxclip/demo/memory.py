"""Whether what is asked for fits into memory, calculated before any of it is allocated.

Linux promises memory that it does not have, and kills the process when it is used: there is no error to catch.
"""

import math
import os
import stat
from pathlib import Path

import jax

from optaxclip.demo.ending import InputError

MEMINFO = Path("/proc/meminfo")
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # versions 2 and 1


def require(option: str, asked: int, bytes_each: float, otherwise: str = "") -> None:
    """Refuses a number that does not fit.

    Args:
      option: what it was asked for with.
      asked: the number.
      bytes_each: how much memory each one needs.
      otherwise: what helps, other than a smaller number.

    Raises:
      InputError: if it is too large; the message names the largest that fits.
    """
    there = min(free(), _of_the_device())
    if asked * bytes_each > there:
        raise InputError(
            f"argument {option}: {asked} needs {_gib(asked * bytes_each)} of memory, and {_gib(there)} is free: "
            f"ask for at most {int(there // bytes_each)}{otherwise}"
        )


def require_file(path: Path, bytes_each: float) -> None:
    """Refuses a file that does not fit, and a device, which may never end. A pipe has no size that could be checked.

    Args:
      path: the file; if there is none, reading it says so.
      bytes_each: how much memory each of its bytes needs.

    Raises:
      InputError: if it can't be read.
    """
    try:
        status = path.stat()
    except OSError:
        return
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        raise InputError(f"cannot read {str(path)!r}: it is a device; name a file or a pipe")
    there = free()
    if status.st_size * bytes_each > there:
        raise InputError(
            f"cannot read {str(path)!r}: {_gib(status.st_size)} need {_gib(status.st_size * bytes_each)} of memory, "
            f"and {_gib(there)} is free: cut it to at most {int(there // bytes_each)} bytes"
        )


def free() -> float:
    """How many bytes this process can still have: at most so many; inf where the system does not say."""
    return min(_of_the_machine(), *map(_limit, CGROUPS))


def _of_the_machine() -> float:
    if MEMINFO.exists():
        fields = (line.split() for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return next((1024.0 * int(size) for name, size, *_ in fields if name == "MemAvailable:"), math.inf)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # macOS
    except (AttributeError, ValueError, OSError):
        return math.inf


def _limit(file: Path) -> float:
    try:
        return float(file.read_text(encoding="ascii"))  # version 2 says "max" where there is none
    except (OSError, ValueError):
        return math.inf


def _of_the_device() -> float:
    found = jax.local_devices()[0].memory_stats() or {}  # none for the CPU
    return float(found.get("bytes_limit", math.inf))


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB" if size < 1e3 * 2**30 else f"{size / 2**30:,.0f} GiB"
