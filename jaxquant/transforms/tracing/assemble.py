"""Puts the moments of a weight's uses together, with their leading axes in the weight's own order."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics import statistics
from jaxquant.numerics.statistics import InputStatistics, Moments
from jaxquant.transforms.tracing.recorder import Use

Uses = Mapping[Use, set[int]]


def roles(uses: Uses, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The contracting and the output axes of a weight; None if its uses contradict each other.

    An axis of size 1 has the role that any use gives it; one that all have squeezed away is an output axis if it comes
    after an axis that is summed over. An axis of which a program takes one part for one product and
    another part for the next is an output axis if those products share an input, as the parts of a fused projection
    do; otherwise it stacks layers.
    """
    wide = {a for a, n in enumerate(sizes) if n > 1}
    if len({frozenset(use.contract) & wide for use in uses}) > 1:
        return None
    contract = {a for use in uses for a in use.contract}
    stacked = {f.axis for use in uses for f in use.batch}
    out = {a for use in uses for a in use.out} - contract
    if out & stacked & wide:
        return None
    out -= stacked
    rest = set(range(len(sizes))) - contract - stacked
    taken = {lead.factor.axis for use in uses for lead in use.leads}
    out |= {a for a in rest if (_shares_input(uses, a) if a in taken else a > min(contract))}
    return tuple(sorted(contract)), tuple(sorted(out))


def _shares_input(uses: Uses, axis: int) -> bool:
    """Whether all parts of an axis that are used are taken by index, and read the same inputs."""
    reads: dict[tuple, set] = {}
    for use, sites in uses.items():
        parts = tuple((lead.factor, lead.at) for lead in use.leads if lead.factor.axis == axis and lead.how == "static")
        if not parts or len(parts) < sum(lead.factor.axis == axis for lead in use.leads):
            return False
        reads.setdefault(parts, set()).update(sites)
    if len(reads) == 1:  # one layer of a stack, or one column of a matrix
        return all(axis > min(use.contract) for use in uses)
    return len({frozenset(sites) for sites in reads.values()}) == 1


def assemble(
    uses: Uses,
    total: list[Moments],
    contract: tuple[int, ...],
    out: tuple[int, ...],
    sizes: tuple[int, ...],
    shared: dict,
) -> InputStatistics:
    """Statistics of one weight's inputs.

    Args:
      uses: its uses, and the sites that they read.
      total: moments of each site.
      contract, out: the roles of its axes.
      sizes: of its axes.
      shared: results by what they are made of, so that weights that share inputs share one object.
    """
    axes = [a for a in range(len(sizes)) if a not in contract + out]
    reads = {(tuple(use.positions(axes, sizes).tolist()), site) for use, sites in uses.items() for site in sites}
    grid = tuple(sizes[a] for a in axes)
    key = tuple(sorted(reads)), grid
    if key not in shared:
        positions = tuple(at for at, _ in key[0])
        shared[key] = _finished(positions, grid, [total[site] for _, site in key[0]])
    return shared[key]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finished(positions: tuple[tuple[int, ...], ...], grid: tuple[int, ...], moments: list[Moments]) -> InputStatistics:
    """Statistics `[*grid, ...]`, merged from stacks of moments whose entries belong at the given positions, if any."""
    rows: list[list[int]] = [[] for _ in range(math.prod(grid))]
    for row, position in enumerate(position for at in positions for position in at):
        if position >= 0:
            rows[position].append(row)
    stacks = [_flattened(m, len(at)) for m, at in zip(moments, positions, strict=True)]
    blank = sum(map(len, positions))
    if len(set(map(len, rows))) > 1:
        stacks.append(statistics.empty_like(jax.tree.map(lambda a: a[:1], stacks[0])))
    stack = jax.tree.map(lambda *a: jnp.concatenate(a), *stacks)
    result = None
    for i in range(max(map(len, rows))):
        order = np.asarray([r[i] if i < len(r) else blank for r in rows])
        in_order = np.array_equal(order, np.arange(blank))  # as of layers that a scan or a list has gone through
        part = stack if in_order else jax.tree.map(lambda a, order=order: a[order], stack)
        result = part if result is None else statistics.merge(result, part)
    return statistics.finish(jax.tree.map(lambda a: a.reshape(*grid, *a.shape[1:]), result))


def _flattened(m: Moments, count: int) -> Moments:
    lead = m.count.ndim
    return jax.tree.map(lambda a: a.reshape(count, *a.shape[lead:]), m)
