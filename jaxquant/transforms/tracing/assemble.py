"""Puts the moments of a weight's uses together, with their leading axes in the weight's own order."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

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


class Inputs(NamedTuple):
    """Where the statistics of a weight's inputs come from; equal for weights that share their inputs.

    Attributes:
      reads: (positions in the grid of what the moments stack, site), sorted.
      grid: sizes of the weight's axes that stack matrices.
    """

    reads: tuple[tuple[tuple[int, ...], int], ...]
    grid: tuple[int, ...]

    @property
    def sites(self) -> set[int]:
        """The sites that are read."""
        return {site for _, site in self.reads}


def inputs_of(uses: Uses, contract: tuple[int, ...], out: tuple[int, ...], sizes: tuple[int, ...]) -> Inputs:
    """What the uses of one weight read; its axes have these roles and sizes."""
    axes = [a for a in range(len(sizes)) if a not in contract + out]
    reads = {(tuple(use.positions(axes, sizes).tolist()), site) for use, sites in uses.items() for site in sites}
    return Inputs(tuple(sorted(reads)), tuple(sizes[a] for a in axes))


def used_axes(
    uses: Uses, sizes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...], Inputs]], list[tuple[str, str]]]:
    """The contracting axes, the output axes and the inputs of each weight that is used, by path.

    `sizes` are the shapes of the weights. The second result are notes (path, what happened) of those whose uses
    contradict each other, which are left out.
    """
    found, notes = {}, []
    for path in dict.fromkeys(use.path for use in uses):
        own = {use: sites for use, sites in uses.items() if use.path == path}
        axes = roles(own, sizes[path])
        if axes is None:
            ways = sorted({(use.contract, use.out) for use in own})
            notes.append((path, f"its products use its axes differently; (summed over, kept): {ways}"))
            continue
        found[path] = (*axes, inputs_of(own, *axes, sizes[path]))
    return found, notes


def assemble(inputs: Inputs, total: list[Moments], last: bool) -> InputStatistics:
    """Statistics of the inputs of one or several weights.

    Args:
      inputs: where they come from.
      total: moments of each site.
      last: whether these moments are read for the last time; where possible, their memory is that of the result.
    """
    positions = tuple(at for at, _ in inputs.reads)
    moments = [total[site] for _, site in inputs.reads]
    layers = tuple(range(math.prod(inputs.grid)))
    if last and positions == (layers,) and moments[0].count.shape == inputs.grid:
        return _finished_in_place(moments[0].gram, dataclasses.replace(moments[0], gram=moments[0].count))
    return _finished(positions, inputs.grid, moments)


@functools.partial(jax.jit, donate_argnums=0)
def _finished_in_place(gram: jax.Array, rest: Moments) -> InputStatistics:  # only the gram is large
    return statistics.finish(dataclasses.replace(rest, gram=gram))


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
