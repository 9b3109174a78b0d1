"""How large the inputs of linear layers are, channel by channel, and which channels stand out."""

import re
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from jaxquant.models.stacking import layer_of
from jaxquant.reporting.opened import short_name
from jaxquant.transforms.calibrate import Statistics

OUTLIER = 6.0  # times the median channel
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


class Outlier(NamedTuple):
    """A channel whose largest |x| is more than `OUTLIER` times that of the median channel.

    Attributes:
      channel: which one.
      lowest, highest: its smallest and largest x, or 0 if that is beyond.
    """

    channel: int
    lowest: float
    highest: float

    @property
    def absmax(self) -> float:
        """Its largest |x|."""
        return max(-self.lowest, self.highest)


class LayerRange(NamedTuple):
    """The channels of one input in one layer.

    Attributes:
      layer: which one.
      quantiles: of the largest |x| over the channels, at `QUANTILES`.
      outliers: the largest first.
    """

    layer: int
    quantiles: tuple[float, ...]
    outliers: tuple[Outlier, ...]


def input_ranges(stats: Statistics, num_layers: int) -> dict[str, tuple[LayerRange, ...]]:
    """The ranges of every input, layer by layer, by the names of the linear layers that share it.

    Layers whose input is zero are left out; a channel's range is that over all experts.
    """
    lowest, highest = (_tree(stats, name) for name in ("lowest", "highest"))
    found: dict[str, list[LayerRange]] = {}
    for layer in range(num_layers):
        low, high = layer_of(lowest, layer), layer_of(highest, layer)
        for name, path in _inputs(stats).items():
            if path in low:
                ranges = _layer_range(layer, np.asarray(low[path]), np.asarray(high[path]))
                found.setdefault(name, []).extend(ranges)
    return {name: tuple(ranges) for name, ranges in found.items() if ranges}


def held_out_rows(stats: Statistics, layer: int) -> dict[str, jax.Array]:
    """Rows `[*experts, R, in]` of what each weight of a layer is multiplied with, by its path in a stack."""
    return layer_of(_tree(stats, "held_out"), layer)


def _tree(stats: Statistics, field: str) -> dict:
    """One field of the statistics, as a tree like that of the parameters."""
    fields = {path: getattr(product.inputs, field) for path, product in stats.products.items()}
    return traverse_util.unflatten_dict(fields, sep="/")


def _inputs(stats: Statistics) -> dict[str, str]:
    """For each input a path in a stack of a weight that reads it, by the names of all that do."""
    readers: dict[int, dict[str, None]] = {}
    for path, product in stats.products.items():
        readers.setdefault(id(product.inputs), {})[re.sub(r"^layers/\d+/", "layers/", path)] = None
    return {", ".join(map(short_name, paths)): next(iter(paths)) for paths in readers.values()}


def _layer_range(layer: int, low: np.ndarray, high: np.ndarray) -> list[LayerRange]:
    low, high = (a.astype(np.float64).reshape(-1, a.shape[-1]) for a in (low, high))
    low, high = low.min(0), high.max(0)
    absmax = np.maximum(-low, high)
    if not absmax.any():
        return []
    large = [int(c) for c in np.argsort(-absmax, kind="stable") if absmax[c] > OUTLIER * np.median(absmax)]
    outliers = tuple(Outlier(c, float(low[c]), float(high[c])) for c in large)
    return [LayerRange(layer, tuple(map(float, np.quantile(absmax, QUANTILES))), outliers)]
