"""What quantizing a checkpoint layer by layer will take, said before it begins: memory, disk and time.

Sizes follow from shapes; those of what is computed in between, from the traced function, or, behind float layers, from
the compiled program. The time is a guess: operations, counted, at the speed of one product of matrices, measured;
compiling comes on top.
"""

import dataclasses
import glob
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.methods.rtn import RTN
from jaxquant.transforms import memory
from jaxquant.transforms.jobs import CHUNK_BYTES
from jaxquant.transforms.memory import MemoryEstimate, shown
from jaxquant.transforms.recipe import needs_statistics
from jaxquant.transforms.stream import Needs

logger = logging.getLogger("jaxquant")

_SOLVER = 4  # passes of a method over its Gram matrix, beside a weight of the same height
_AT_WORK = 5  # copies of a weight and its Gram matrix that a method works on
_HEADER = 3000  # bytes that a parameter takes in headers and the index, at most


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What there is to do.

    Attributes:
      layer: the parameters of one layer by path.
      configs: the method configs of those that are quantized.
      count: how many such layers there are.
      outer: bytes of the parameters outside of the layers, which are kept as they are.
      activations: bytes of the inputs of one layer for all samples; 0 without calibration.
      held: bytes of what is kept of all samples between two steps of quantizing a layer, at most.
      tokens: in all samples.
      calibration: what calibrating one layer takes for one batch; None without calibration.
    """

    layer: Mapping[str, Any]
    configs: Mapping[str, Any]
    count: int
    outer: int
    activations: int
    held: int
    tokens: int
    calibration: Needs | None

    def check(self, path: str | os.PathLike) -> None:
        """Logs the peak of memory, the room that the directory `path` will take, and the time.

        Raises:
          ValueError: there is not enough memory, or no room on the disk.
        """
        memory.ensure_fits(self.memory, dict(self.layer))
        target = Path(os.path.abspath(os.path.expanduser(path)))
        begun = target.parent.glob(f".{glob.escape(target.name)}.unfinished/**/*")  # it is continued, or removed
        free = shutil.disk_usage(target.parent).free + sum(file.stat().st_size for file in begun if file.is_file())
        room = self.checkpoint + 2 * self.activations
        what = f"{shown(room)} on disk (the checkpoint {shown(self.checkpoint)}, to go on with after an interruption "
        what += f"{shown(2 * self.activations)})"
        logger.info("it will take about %s; %s are free", what, shown(free))
        if room > free:
            raise ValueError(f"{target} takes about {what}, but {shown(free)} are free; make room, or write elsewhere")
        logger.info("it will take about %s, beside compiling", duration(self.operations / _operations_per_second()))

    @property
    def memory(self) -> MemoryEstimate:
        """The peak of memory, beside what is held already."""
        parts = {} if self.calibration is None else dict(self.calibration.memory.parts)
        statistics = parts.pop("statistics", 0)
        matrices = [4 * k * (k + n) for k, n in self._shapes.values()]
        working = _AT_WORK * min(max(CHUNK_BYTES, *matrices), sum(matrices)) + self._quantized
        held = {
            "one layer": sum(leaf.nbytes for leaf in self.layer.values()),
            "activations": self.held + self.activations,  # those that the last layer has left are being written
            "statistics": statistics,
            "work": max(sum(parts.values()), statistics, working),
        }
        remedy = "use fewer or shorter samples (--num-samples, --seq-len), or a machine with more memory"
        return MemoryEstimate("quantizing layer by layer", {k: v for k, v in held.items() if v}, remedy)

    @property
    def checkpoint(self) -> int:
        """Bytes of the checkpoint on disk."""
        return self.outer + self.count * (self._quantized + _HEADER * len(self.layer))

    @property
    def operations(self) -> float:
        """Additions and multiplications: of the passes, of the statistics, and of the methods."""
        forward = 2 * self.tokens * sum(k * n for k, n in self._shapes.values())
        grams = 0 if self.calibration is None else self.tokens * self.calibration.statistics / 4
        solved = [self._shapes[path] for path, config in self.configs.items() if needs_statistics(config)]
        return self.count * (forward + grams + sum(2.0 * _SOLVER * k * k * (k + n) for k, n in solved))

    @property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the weights that are quantized; of stacked experts, outputs of all."""
        shapes = {path: self.layer[path].shape for path in self.configs}
        return {path: (shape[-2], math.prod(shape) // shape[-2]) for path, shape in shapes.items()}

    @property
    def _quantized(self) -> int:
        """Bytes of one layer when it is quantized."""
        return sum(_nbytes(leaf, self.configs.get(path)) for path, leaf in self.layer.items())


def duration(seconds: float) -> str:
    """A time, for people."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _nbytes(leaf: Any, config: Any) -> int:
    """Bytes of a parameter, when it is quantized by a config; without outliers, of which nothing is known yet."""
    if config is None:
        return leaf.nbytes
    spec = dataclasses.replace(config.spec, activations=None)
    matrix = jax.ShapeDtypeStruct(leaf.shape[-2:], leaf.dtype)
    q, _ = jax.eval_shape(lambda w: RTN(spec).quantize(w, None), matrix)
    scales = leaf.dtype.itemsize * math.prod(leaf.shape[:-1]) if hasattr(config, "channel_scale") else 0
    return math.prod(leaf.shape[:-2]) * memory.types_bytes(q) + scales


def _operations_per_second() -> float:
    size = 1024
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    a = jnp.ones((size, size), jnp.float32)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(multiply(a))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
