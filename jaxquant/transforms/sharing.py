"""Channel scales of weights that share their inputs: found together, kept or dropped together.

Only then can a scale be folded into what makes those inputs. Which weights share theirs is known from the function
itself: `calibrate` gives them the same statistics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.batching import one_by_one_on_cpu
from jaxquant.numerics.bits import join_bits, split_bits
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms.jobs import CHUNK_BYTES, Job, Span
from jaxquant.transforms.report import LayerReport
from jaxquant.transforms.tracing import compat


def groups(jobs: list[Job]) -> list[list[Job]]:
    """The jobs whose method scales channels; those with the same inputs and config together."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        if job.inputs is not None and hasattr(job.config, "channel_scale"):
            found.setdefault((id(job.inputs), job.config), []).append(job)
    return list(found.values())


def with_channel_scales(jobs: list[Job]) -> list[Job]:
    """The jobs, with the scales that their methods choose for each group, and what they say about it."""
    found: dict[str, dict] = {}
    for group in groups(jobs):
        scale, facts = _scales(group)
        found |= {job.path: {"channel_scale": scale, "facts": facts} for job in group}
    return [dataclasses.replace(job, **found.get(job.path, {})) for job in jobs]


def without_lost_scales(jobs: list[Job], layers: dict[str, list[LayerReport]]) -> list[Job]:
    """The jobs to solve again: where one weight of a group fell back and another did not, with a scale of 1 for all."""
    again = []
    for group in groups(jobs):
        fell = np.array([[row.fallback is not None for row in layers[job.path]] for job in group])
        mixed = (fell.any(0) & ~fell.all(0)).reshape(*group[0].lead, 1)
        if mixed.any():
            scale = jnp.where(mixed, 1, jnp.asarray(group[0].channel_scale))
            again += [dataclasses.replace(job, channel_scale=scale) for job in group]
    return again


def _scales(group: list[Job]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Scales `[*lead, K]` and facts `[*lead]` of jobs that share their inputs."""
    job, (k, _) = group[0], group[0].shape
    columns = sum(job.shape[1] for job in group)
    size = min(job.count, max(1, CHUNK_BYTES // (4 * k * (k + columns))))
    parts = []
    for start in range(0, job.count, size):
        start = min(start, job.count - size)  # the last chunk is as large as the others, and overlaps
        matrices = [Span(job, start, size).matrices() for job in group]
        parts.append(_scales_of(*split_bits(job.config), [w for w, *_ in matrices], matrices[0][1]))
    over = -job.count % size  # how far
    parts[-1] = jax.tree.map(lambda a: a[over:], parts[-1])
    return jax.tree.map(lambda *a: jnp.concatenate(a).reshape(*job.lead, *a[0].shape[1:]), *parts)


@functools.partial(jax.jit, static_argnums=0, compiler_options=compat.COMPILER_OPTIONS)
def _scales_of(config, bits, weights: list[jax.Array], inputs: InputStatistics):
    w = jnp.concatenate(weights, -1) if len(weights) > 1 else weights[0]

    def scale(bits, w, inputs):
        return join_bits(config, bits).channel_scale(w, inputs)

    return jax.vmap(one_by_one_on_cpu(scale), (None, 0, 0))(bits, w, inputs)
