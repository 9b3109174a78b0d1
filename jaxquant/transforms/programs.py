"""The compiled programs that apply methods to matrices of one kind, and the memory that they take."""

import functools
import math
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from jaxquant.numerics.batching import one_by_one_on_cpu
from jaxquant.numerics.bits import join_bits, packed, split_bits, unpacked
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms import choose, memory
from jaxquant.transforms.jobs import Job, chunks
from jaxquant.transforms.judge import solve_one
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.tracing import compat

_compiler = ThreadPoolExecutor(1)  # one program after the other, so that none of two alike is compiled twice


@functools.partial(jax.jit, static_argnums=0, compiler_options=compat.COMPILER_OPTIONS)
def run(config, bits, w: jax.Array, inputs: InputStatistics | None, channel_scale: jax.Array | None = None):
    """`solve_one` for each of some matrices `[count, in, out]`, codes unpacked; `split_bits` gives config and bits."""

    def solve(bits, *arrays):
        q, facts = solve_one(join_bits(config, bits), *arrays)
        return unpacked(q), facts

    return jax.vmap(one_by_one_on_cpu(solve), (None, 0, 0, 0))(bits, w, inputs, channel_scale)


def compile_ahead(jobs: list[Job]) -> list[Future]:
    """Begins to compile the programs of jobs, which may have types for statistics, while Python and XLA do other work.

    JAX keeps them, but does not know of those that are under way: wait for all before the jobs run.
    """
    kinds = {spans[0].job.kind: (spans[0].job, size) for spans, size in chunks(jobs)}
    return [
        _compiler.submit(run.lower(*split_bits(job.config), *job.types(size)).compile) for job, size in kinds.values()
    ]


def needed_memory(jobs: list[Job]) -> MemoryEstimate:
    """What `quantize_params` allocates for some jobs; compiles their programs."""
    jobs = [candidate for job in jobs for candidate in choose.candidates(job)]
    results, chunk, seen = dict.fromkeys(jobs, 0), 0, set()
    for spans, size in chunks(jobs):
        job = spans[0].job
        if job.kind not in seen:
            seen.add(job.kind)
            types = job.types(size)
            lowered = run.lower(*split_bits(job.config), *types)
            made, _ = lowered.out_info
            kept = jax.eval_shape(functools.partial(packed, config=job.config), made)
            given, result = memory.types_bytes(types), memory.types_bytes(kept)
            repacked = 0 if kept.values.shape == made.values.shape else memory.types_bytes(made.values)
            running = given + memory.compiled_bytes(lowered.compile()) + result + repacked
            chunk = max(chunk, running, 2 * given)  # the matrices of several weights are put together first
        for span in spans:
            results[span.job] += math.ceil(result * span.size / size)
    parts = {
        "quantized weights": sum(results.values()),
        "matrices at work": max(chunk, *results.values()),  # or, at the end, the copy that puts a weight together
    }
    return MemoryEstimate(
        "quantize_params", parts, "quantize fewer weights per call through rules with None for others"
    )
