"""Where a benchmark ran: printed above every table."""

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import date

import jax


def describe() -> dict[str, str]:
    """Command, date, device and versions."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def line() -> str:
    """The same in one line of Markdown."""
    about = describe()
    command = about.pop("command")
    return f"`{command}` · " + " · ".join(f"{k} {v}" if k not in ("date", "device") else v for k, v in about.items())
