"""Which processor of a GPU works on which part of a product.

A product is cut into tiles of the result, each of so many steps along K. Where the tiles are fewer than the processors,
or not much more, whole ones would leave processors idle; then each processor takes an equal run of all steps of all
tiles ("split-K", or "stream-K" as the runs need not end where tiles do), and writes its sum of a tile's steps apart.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.kernels.tuning import GpuChip, GpuTiles

SUM_LAUNCH = 32_768  # bytes that a processor could load while the sum of partial results is launched


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which processor does what: each a run of consecutive steps, of all steps of all tiles.

    Attributes:
      tiles: of the result.
      steps: along K, for each of them.
      processors: that share the work.
      split: whether a tile may have several; otherwise processors take whole tiles in turn.
    """

    tiles: int
    steps: int
    processors: int
    split: bool

    @property
    def share(self) -> int:
        """Steps of one processor, at most."""
        if self.split:
            return -(-self.tiles * self.steps // self.processors)
        return -(-self.tiles // self.processors) * self.steps

    @property
    def sharers(self) -> np.ndarray:
        """How many processors each tile has, int `[tiles]`."""
        if not self.split:
            return np.ones(self.tiles, int)
        start = np.arange(self.tiles) * self.steps
        return (start + self.steps - 1) // self.share - start // self.share + 1

    def runs(self, processor):
        """The number of tiles that a processor works on, and a function from 0, 1, … to the parts of them.

        A part is the index of the tile, its first step, one past its last, and which of the tile's partial sums it is.
        """
        if not self.split:
            count = lax.div(self.tiles - processor + self.processors - 1, self.processors)
            return count, lambda i: (processor + i * self.processors, 0, self.steps, 0)
        begin = processor * self.share
        end = jnp.minimum(begin + self.share, self.tiles * self.steps)
        first = lax.div(begin, self.steps)

        def part(i):
            tile = first + i
            start = tile * self.steps
            low, high = jnp.maximum(begin - start, 0), jnp.minimum(end - start, self.steps)
            return tile, low, high, processor - lax.div(start, self.share)

        return lax.div(end - 1, self.steps) - first + 1, part


def schedule_of(m: int, k: int, n: int, bits: int, tiles: GpuTiles, chip: GpuChip) -> Schedule:
    """Splits tiles where that is quicker, by the bytes that a processor could load in the time that it takes."""
    count, steps = m // tiles.tile_m * (n // tiles.tile_n), k // tiles.tile_k
    whole, split = (Schedule(count, steps, chip.processors, split) for split in (False, True))
    if tiles.split is not None:
        return split if tiles.split else whole
    loads = tiles.tile_n * tiles.tile_k * bits // 8
    step = max(loads, 2 * tiles.tile_m * tiles.tile_n * tiles.tile_k / chip.flops_per_byte)
    sums = int(split.sharers.max()) * tiles.tile_m * tiles.tile_n * 4 * count / chip.processors
    return split if split.share * step + 2 * sums + SUM_LAUNCH < whole.share * step else whole
