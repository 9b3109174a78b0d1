"""What a call will allocate at its peak, said before it begins, and refused where it cannot fit.

Sizes of results are static facts. Sizes of what is held meanwhile (activations, temporaries of a method) are the
compiler's own, of the very program that then runs. What is held already when a call begins is not counted again.
Nor is what no compiler tells: on a CPU, what matrix products pack for themselves and what compiling smaller programs
takes, so an estimate is no strict bound there (some 100 MiB were measured above it in a first call).
"""

import ctypes
import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

logger = logging.getLogger("jaxquant")

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (  # of a container: limit, usage and what makes it up, by versions 2 and 1 of cgroups
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The peak of what a call allocates on each device, beside what is held when it begins.

    Attributes:
      call: the function that is called.
      parts: bytes, by what they hold.
      remedy: how to call it so that it takes less.
    """

    call: str
    parts: Mapping[str, int]
    remedy: str

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def __str__(self):
        parts = ", ".join(f"{name} {shown(size)}" for name, size in self.parts.items())
        return f"{self.call} will allocate about {shown(self.nbytes)} ({parts})"


def ensure_fits(estimate: MemoryEstimate, arrays: Any, level: int = logging.INFO) -> None:
    """Logs an estimate, for the devices that hold `arrays`, at a level of `logging`.

    Raises:
      ValueError: it is more than is available there. Where that is not known, nothing is refused.
    """
    devices = {device for a in jax.tree.leaves(arrays) if isinstance(a, jax.Array) for device in a.devices()}
    devices = devices or set(jax.devices()[:1])
    free = available(devices)
    known = "free memory is not known" if free is None else f"{shown(free)} are available"
    logger.log(level, "%s; %s", estimate, known)
    if free is not None and estimate.nbytes > free:
        raise ValueError(f"{estimate}, but {shown(free)} are available; {estimate.remedy}")


def available(devices: Iterable[jax.Device]) -> int | None:
    """Bytes that can still be allocated on each of some devices; None if that is not known.

    Those of other processes tell nothing, and are taken to have as much as the ones of this process.
    """
    devices = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in devices]
    if all(s is not None and "bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    host = _host_available() if all(device.platform == "cpu" for device in devices) else None
    return None if host is None else host // len(stats)  # devices of a host share its memory


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program holds on a device while it runs, beside its arguments and results."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def give_back() -> None:
    """Gives memory of the host that was freed back to the system, where the C library would keep it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def types_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of what it holds the types of."""
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def shown(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _host_available() -> int | None:
    found = [
        size for size in (_system_available(), *itertools.starmap(_container_available, _LIMITS)) if size is not None
    ]
    return min(found, default=None)


def _system_available() -> int | None:
    try:
        fields = _fields(Path("/proc/meminfo"))
        return 1024 * fields["MemAvailable:"]
    except (OSError, KeyError):  # no Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not tell
        return None


def _container_available(limit: str, usage: str, stat: str) -> int | None:
    try:
        most, used = (int((_CGROUP / name).read_text()) for name in (limit, usage))
        fields = _fields(_CGROUP / stat)
        return most - used + fields["active_file"] + fields["inactive_file"]  # files' pages are given up when needed
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return None


def _fields(file: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}
