"""Collects statistics while a function is interpreted, sharing those of products that share an input.

A *site* is one input that weights are multiplied with; its moments are arrays and flow through JAX's control flow. A
*use* says, statically, which product of which weight reads it. Scopes number their sites from 0 and `absorb` renumbers.
"""

import dataclasses
from collections.abc import Iterable

from jaxquant.numerics.statistics import Moments
from jaxquant.transforms.tracing.views import Lead


@dataclasses.dataclass(frozen=True)
class Use:
    """A product of a weight: its path, the roles of its own axes, and at which positions it was taken.

    The axes of the use's moments are: one per "scan" lead, one per "traced" lead, one per batch axis, then channels.
    """

    path: str
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    out: tuple[int, ...]
    leads: tuple[Lead, ...]

    @property
    def stacked(self) -> list[int]:
        """The weight's own axes that the leading axes of the moments are, in order."""
        order = [lead.axis for lead in self.leads if lead.how == "scan"]
        return order + [lead.axis for lead in self.leads if lead.how == "traced"] + list(self.batch)


@dataclasses.dataclass
class Recorder:
    """Statistics of one scope.

    Attributes:
      moments: of each site.
      scans: tokens of the scans that stack each site's moments; a scan not among them sums them.
      uses: sites that each use reads.
    """

    moments: list[Moments] = dataclasses.field(default_factory=list)
    scans: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    uses: dict[Use, set[int]] = dataclasses.field(default_factory=dict)
    known: dict = dataclasses.field(default_factory=dict)

    def record(self, use: Use, x, signature: tuple, make) -> None:
        """Notes a use whose input is `x` seen as `signature`; `make()` computes its moments if no use did before."""
        key = (id(x), signature)
        if key not in self.known:
            self.moments.append(make())
            self.scans.append(tuple(lead.at for lead in use.leads if lead.how == "scan"))
            self.known[key] = (len(self.moments) - 1, x)  # x is kept, so that its id stays its own
        self.uses.setdefault(use, set()).add(self.known[key][0])

    def absorb(self, inner: "Recorder", moments: Iterable[Moments]) -> None:
        """Takes over the sites of an inner scope, whose moments are now the given ones."""
        first = len(self.moments)
        self.moments.extend(moments)
        self.scans.extend(inner.scans)
        for use, sites in inner.uses.items():
            self.uses.setdefault(use, set()).update(first + s for s in sites)
