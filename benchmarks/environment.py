"""Where a benchmark ran, which is printed above every table; and other programs that it runs."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import date

import jax

from jaxquant.kernels.tune import chip_of

PEERS = ("--peer", "--llmcompressor", "--torch", "--qwix")  # options that name an interpreter


def _cores() -> str:
    allowed, present = len(os.sched_getaffinity(0)), os.cpu_count()
    return f"{present} cores" if allowed == present else f"pinned to {allowed} of {present} cores"


def _command() -> str:
    before = [None, *sys.argv]
    return shlex.join(["python", *("PYTHON" if b in PEERS else a for a, b in zip(sys.argv, before, strict=False))])


def describe(peer: str | None = None) -> dict[str, str]:
    """Command, date, device and versions, those in the environment of a peer's interpreter too if one is given."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "command": _command(),
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {_cores()})",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **({} if peer is None else _peer_versions(peer)),
    }


def chip() -> str | None:
    """The name by which `prepare` knows this machine's device; None where there is no kernel for it."""
    try:
        return chip_of(jax.devices()[0])
    except ValueError:
        return None


def run(command: list) -> dict:
    """What a process printed as its last line, as JSON."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _peer_versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m; print(*(m.version(p) for p in ('llmcompressor', 'torch')))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("llm-compressor", "torch"), found, strict=True))


def line(peer: str | None = None) -> str:
    """The same in one line of Markdown."""
    about = describe(peer)
    command = about.pop("command")
    return f"`{command}` · " + " · ".join(f"{k} {v}" if k not in ("date", "device") else v for k, v in about.items())
