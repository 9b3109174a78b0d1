"""Carries out `Best` and `MixedPrecision`: every candidate is solved, and the ones that err least are kept."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxquant.methods.choice import MixedPrecision
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms.jobs import Job
from jaxquant.transforms.report import LayerReport


class Solved(NamedTuple):
    """What came out of one job."""

    q: QTensor
    rows: list[LayerReport]

    @property
    def error(self) -> float:
        """The sum of the relative errors of all matrices."""
        return sum(row.error or 0.0 for row in self.rows)


Solve = Callable[[list[Job]], dict[str, Solved]]


def candidates(job: Job) -> list[Job]:
    """The job with each config that it may get; itself, if that is settled."""
    configs = getattr(job.config, "configs", None)
    if configs is None:
        return [job]
    return [dataclasses.replace(job, config=settled(config, job.inputs)) for config in configs]


def settled(config: Any, inputs: InputStatistics | None) -> Any:
    """A method config with what must be known before it is compiled."""
    return config.for_inputs(inputs) if hasattr(config, "for_inputs") else config


def is_settled(config: Any) -> bool:
    """Whether a method config is known before calibration: no choice among others, nothing to fill in."""
    return not hasattr(config, "configs") and not hasattr(config, "for_inputs")


def solve(jobs: list[Job], run: Solve) -> dict[str, Solved]:
    """Solves jobs, some of which leave their config open; `run` solves those that do not."""
    found = run([job for job in jobs if not hasattr(job.config, "configs")])
    for config in dict.fromkeys(job.config for job in jobs if hasattr(job.config, "configs")):
        open_jobs = [job for job in jobs if job.config == config]
        tried = [run([candidates(job)[i] for job in open_jobs]) for i in range(len(config.configs))]
        units = _units(open_jobs)
        if isinstance(config, MixedPrecision):
            chosen = _allocate(config, units, tried)
        else:
            chosen = [_smallest([sum(t[job.path].error for job in unit) for t in tried]) for unit in units]
        for unit, i in zip(units, chosen, strict=True):
            found |= {job.path: tried[i][job.path] for job in unit}
        if not isinstance(config, MixedPrecision):
            _make_alike(found, open_jobs)
    return found


def _units(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that get the same config: where one scales channels, those that share their inputs."""
    units: dict[Any, list[Job]] = {}
    for job in jobs:
        scaling = any(hasattr(candidate.config, "channel_scale") for candidate in candidates(job))
        units.setdefault(id(job.inputs) if scaling else job.path, []).append(job)
    return list(units.values())


def _smallest(errors: list[float]) -> int:
    return min(range(len(errors)), key=errors.__getitem__)


def _make_alike(found: dict[str, Solved], jobs: list[Job]) -> None:
    """Gives all of them a channel scale if one has it, so that layers can be stacked whichever method won."""
    if any(found[job.path].q.channel_scale is not None for job in jobs):
        for job in jobs:
            q, rows = found[job.path]
            if q.channel_scale is None:
                shape = (*job.lead, job.shape[0], *(1,) * len(q.out))
                found[job.path] = Solved(dataclasses.replace(q, channel_scale=jnp.ones(shape, q.scale.dtype)), rows)


def _allocate(config: MixedPrecision, units: list[list[Job]], tried: list[dict[str, Solved]]) -> list[int]:
    """The index of the config of each unit, of smallest total error within the budget.

    Exact: unit by unit, of all choices so far that take some number of bytes the best is kept, if none that takes fewer
    is as good. Weights of one shape come in the same few sizes, so there are not many such numbers.
    """
    budget = config.budget_bits / 8 * sum(tried[0][job.path].q.size for unit in units for job in unit)
    states: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for unit in units:
        options = [(sum(t[j.path].q.nbytes for j in unit), sum(t[j.path].error for j in unit)) for t in tried]
        longer = sorted(
            (size + more, error + worse, (*path, i))
            for size, error, path in states
            for i, (more, worse) in enumerate(options)
        )
        states = []
        for state in longer:
            if not states or state[1] < states[-1][1]:
                states.append(state)
    fitting = [state for state in states if state[0] <= budget]
    if not fitting:
        least = 8 * states[0][0] / (budget * 8 / config.budget_bits)
        raise ValueError(
            f"budget_bits={config.budget_bits} is less than the smallest configs take, {least:.3f} bits per weight; "
            "raise it, or give configs of fewer bits"
        )
    return list(fitting[-1][2])
