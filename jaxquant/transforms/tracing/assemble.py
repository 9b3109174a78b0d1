"""Puts the moments of a weight's uses together, with their leading axes in the weight's own order."""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxquant.numerics import statistics
from jaxquant.numerics.statistics import InputStatistics, Moments
from jaxquant.transforms.tracing.recorder import Use


def assemble(
    uses: Mapping[Use, set[int]], total: list[Moments], sizes: tuple[int, ...], shared: dict
) -> InputStatistics:
    """Statistics of one weight's inputs.

    Args:
      uses: its uses, all with the same contracting axes, and the sites they read.
      total: moments of each site.
      sizes: of the weight's axes.
      shared: results by what they are made of, so that weights that share inputs share one object.
    """
    first = next(iter(uses))
    leads = [a for a in range(len(sizes)) if a not in first.contract + first.out]
    pieces: dict[tuple, list] = {}
    for use, sites in uses.items():
        at = {lead.axis: lead.at for lead in use.leads if lead.how == "static"}
        position = tuple(at.get(a) for a in leads)
        pieces.setdefault(position, []).append((tuple(use.stacked), tuple(sorted(sites))))
    widths = tuple(sizes[a] for a in leads)
    order = {axis: i for i, axis in enumerate(leads)}
    recipe = tuple(sorted(
        ((p, tuple(sorted({(tuple(order[a] for a in stacked), sites) for stacked, sites in reads})))
         for p, reads in pieces.items()), key=str))  # fmt: skip
    if (recipe, widths) not in shared:
        shared[recipe, widths] = statistics.finish(_build(recipe, widths, total))
    return shared[recipe, widths]


def _build(recipe: tuple, widths: tuple[int, ...], total: list[Moments]) -> Moments:
    by_position = {position: _summed(reads, total, position) for position, reads in recipe}
    if list(by_position) == [(None,) * len(widths)]:
        return by_position[(None,) * len(widths)]
    static = [i for i in range(len(widths)) if any(p[i] is not None for p in by_position)]
    grid = [range(n) if i in static else (None,) for i, n in enumerate(widths)]
    blank = statistics.empty_like(next(iter(by_position.values())))
    stack = [by_position.get(p, blank) for p in itertools.product(*grid)]
    ragged = [p for p in by_position if p not in set(itertools.product(*grid))]
    if ragged:
        raise ValueError(f"the model takes layers of one weight both one by one and in a loop, at positions {ragged}")
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    split = jax.tree.map(lambda a: a.reshape(*(widths[i] for i in static), *a.shape[1:]), stacked)
    rest = [i for i in range(len(widths)) if i not in static]
    return _transposed(split, [*static, *rest])


def _summed(reads: tuple, total: list[Moments], position: tuple) -> Moments:
    """Moments of all sites that one position reads, with the stacked axes in the weight's order."""
    result = None
    for stacked, sites in reads:
        free = [i for i, p in enumerate(position) if p is None]
        missing = [i for i in free if i not in stacked]  # axes of size 1, squeezed away
        ones = (1,) * len(missing)
        for site in sites:
            m = jax.tree.map(lambda a, ones=ones: a.reshape(ones + a.shape), total[site])
            m = _transposed(m, [*missing, *stacked])
            result = m if result is None else statistics.merge(result, m)
    return result


def _transposed(m: Moments, axes: list[int]) -> Moments:
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return jax.tree.map(lambda a: jnp.transpose(a, [*order, *range(len(order), a.ndim)]), m)
