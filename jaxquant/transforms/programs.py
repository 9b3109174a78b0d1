"""The compiled programs that apply methods to matrices of one kind, and the memory that they take."""

import functools
import math
from typing import Any

import jax

from jaxquant.numerics.batching import one_by_one_on_cpu
from jaxquant.numerics.bits import join_bits, packed, split_bits, unpacked
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms import choose, memory
from jaxquant.transforms.jobs import Job, chunks
from jaxquant.transforms.judge import solve_one
from jaxquant.transforms.memory import MemoryEstimate


@functools.partial(jax.jit, static_argnums=0)
def run(config, bits, w: jax.Array, inputs: InputStatistics | None, channel_scale: jax.Array | None = None):
    """`solve_one` for each of some matrices `[count, in, out]`, codes unpacked; `split_bits` gives config and bits."""

    def solve(bits, *arrays):
        q, facts = solve_one(join_bits(config, bits), *arrays)
        return unpacked(q), facts

    return jax.vmap(one_by_one_on_cpu(solve), (None, 0, 0, 0))(bits, w, inputs, channel_scale)


class Programs:
    """What `run` will be for some jobs. Of their statistics only the types are read."""

    def __init__(self, jobs: list[Job]):
        self._jobs = [candidate for job in jobs for candidate in choose.candidates(job)]
        self._lowered: dict[tuple, _Lowered] = {}
        for spans, size in chunks(self._jobs):
            job = spans[0].job
            if job.kind not in self._lowered:
                self._lowered[job.kind] = _Lowered(job, size)

    def compile(self) -> MemoryEstimate:
        """Compiles them, and says what `quantize_params` allocates for the jobs."""
        chunk = max(lowered.compile() for lowered in self._lowered.values())
        results = [self._lowered[job.kind].result_bytes(job.count) for job in self._jobs]
        parts = {
            "quantized weights": sum(results),
            "matrices at work": max(chunk, *results),  # or, at the end, the copy that puts a weight together
        }
        remedy = "quantize fewer weights per call through rules with None for others"
        return MemoryEstimate("quantize_params", parts, remedy)


class _Lowered:
    """The program of one kind of jobs."""

    def __init__(self, job: Job, size: int):
        types = job.types(size)
        self._size, self._program = size, run.lower(*split_bits(job.config), *types)
        made, _ = self._program.out_info
        kept: Any = jax.eval_shape(functools.partial(packed, config=job.config), made)
        self._given, self._result = memory.types_bytes(types), memory.types_bytes(kept)
        self._repacked = 0 if kept.values.shape == made.values.shape else memory.types_bytes(made.values)

    def compile(self) -> int:
        """Compiles it, and returns the bytes that are held while it runs, its arguments among them."""
        running = memory.compiled_bytes(self._program.compile()) + self._given + self._result + self._repacked
        return max(running, 2 * self._given)  # the matrices of several weights are put together first

    def result_bytes(self, count: int) -> int:
        """Bytes of some quantized matrices."""
        return math.ceil(self._result * count / self._size)
