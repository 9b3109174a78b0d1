"""Collects statistics while a function is interpreted, sharing those of products that share an input.

A *site* is one input that weights are multiplied with; its moments are arrays and flow through JAX's control flow. A
*use* says, statically, which product of which weight reads it. Scopes number their sites from 0 and `absorb` renumbers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxquant.numerics import statistics
from jaxquant.numerics.statistics import Moments
from jaxquant.transforms.tracing.views import Factor, Lead


@dataclasses.dataclass(frozen=True)
class Use:
    """A product of a weight: its path, the roles of its own axes, and at which positions it was taken.

    Attributes:
      contract, out: the weight's own axes that the product sums over, and that stand in its result.
      batch: factors that it runs over.
      leads: factors at which one position was taken before.
      starts: (axis, first position) of axes that a slice has cut.
      same: factors of "scan" leads over which the input does not change.

    The axes of the use's moments are: one per "scan" lead, one per "traced" lead, one per batch factor, then channels.
    """

    path: str
    contract: tuple[int, ...]
    out: tuple[int, ...]
    batch: tuple[Factor, ...]
    leads: tuple[Lead, ...]
    starts: tuple[tuple[int, int], ...] = ()
    same: tuple[Factor, ...] = ()

    @property
    def stacked(self) -> list[Factor]:
        """The factors that the leading axes of the moments are, in order."""
        order = [lead.factor for how in ("scan", "traced") for lead in self.leads if lead.how == how]
        return [*order, *self.batch]

    def positions(self, axes: list[int], sizes: tuple[int, ...]) -> np.ndarray:
        """For each matrix that the moments stack, its position in the grid of some of the weight's axes; -1 if it only
        repeats the one before.

        Args:
          axes: the weight's own axes that stack matrices; positions along others count as the same.
          sizes: of all of the weight's axes.

        Returns:
          Positions `[product of the sizes of stacked]` in the flattened grid.
        """
        strides = {a: math.prod(sizes[b] for b in axes if b > a) for a in axes}
        start = sum(strides.get(axis, 0) * first for axis, first in self.starts)
        for lead in self.leads:
            if lead.at is not None and lead.how == "static":
                start += strides.get(lead.factor.axis, 0) * lead.factor.stride * lead.at
        result = np.full((), start)
        for f in self.stacked:
            result = np.add.outer(result, strides.get(f.axis, 0) * f.stride * np.arange(f.size))
        for dim, f in enumerate(self.stacked):
            if f in self.same and f.axis not in axes:
                result[(slice(None),) * dim + (slice(1, None),)] = -1
        return result.reshape(-1)

    def widened(self, shards: Mapping[int, int]) -> "Use":
        """The use outside of `shard_map`, where each axis is that many times as wide; only whole axes are stacked."""

        def wide(f: Factor) -> Factor:
            return f._replace(size=f.size * shards.get(f.axis, 1))

        leads = tuple(lead._replace(factor=wide(lead.factor)) for lead in self.leads)
        return dataclasses.replace(
            self, batch=tuple(map(wide, self.batch)), leads=leads, same=tuple(map(wide, self.same))
        )


@dataclasses.dataclass
class Recorder:
    """Statistics of one scope.

    Attributes:
      moments: of each site.
      scans: tokens of the scans that stack each site's moments; a scan not among them sums them.
      uses: sites that each use reads.
      known: what each site was made of, and its number.
      keeps: whether statistics can leave this scope; those of a loop's condition cannot.
      total: of each site, moments of earlier batches that are to be merged in; only the outermost scope has them.
      included: sites whose moments have their total merged in already.
    """

    moments: list[Moments] = dataclasses.field(default_factory=list)
    scans: list[tuple[int | None, ...]] = dataclasses.field(default_factory=list)
    uses: dict[Use, set[int]] = dataclasses.field(default_factory=dict)
    known: dict = dataclasses.field(default_factory=dict)
    keeps: bool = True
    total: list[Moments] | None = None
    included: set[int] = dataclasses.field(default_factory=set)

    def record(self, use: Use, arrays: tuple, signature: tuple, make: Callable[[], Moments]) -> None:
        """Notes a use whose moments `make()` computes, unless a use before it read the same.

        Args:
          use: the use.
          arrays: the input, and every other array that the moments depend on.
          signature: all else that they depend on.
          make: called if no use in this scope had the same arrays and signature.
        """
        key = (*map(id, arrays), signature)
        if key not in self.known:
            self.moments.append(make())
            self.scans.append(tuple(lead.loop for lead in use.leads if lead.how == "scan"))
            self.known[key] = (len(self.moments) - 1, arrays)  # the arrays are kept, so that their ids stay theirs
        self.uses.setdefault(use, set()).add(self.known[key][0])

    def include(self, site: int) -> Moments | None:
        """The total of a site of the scope that is absorbed next, for a caller that merges it in; None without one."""
        if self.total is None:
            return None
        self.included.add(len(self.moments) + site)
        return self.total[len(self.moments) + site]

    def merged(self) -> list[Moments]:
        """The moments of each site, with its total."""
        pairs = zip(self.total or self.moments, self.moments, strict=True)
        done = self.included if self.total is not None else range(len(self.moments))
        return [new if i in done else statistics.merge(total, new) for i, (total, new) in enumerate(pairs)]

    def absorb(self, inner: "Recorder", moments: Iterable[Moments]) -> None:
        """Takes over the sites of an inner scope, whose moments are now the given ones."""
        first = len(self.moments)
        self.moments.extend(moments)
        self.scans.extend(inner.scans)
        for use, sites in inner.uses.items():
            self.uses.setdefault(use, set()).update(first + s for s in sites)
