"""Where the marks of the report's figures stand: numbers in, positions out. The page draws them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.reporting.collect import BASELINE, Row
from jaxquant.reporting.ranges import LayerRange

WIDTH, HEIGHT = 380.0, 240.0  # of a figure, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 30.0, 40.0  # around what is plotted
TICKS = 7  # at most, and so many names of layers
NEAR = 18.0  # units in which two labels would lie over one another
DOTS = 24  # outliers that are drawn of one layer
DTYPES = (("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4))


class Axis(NamedTuple):
    """An axis from `low` at `start` to `high` at `end`, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The position of a value."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions, and what is written there."""
        values = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        return [(self.at(value), f"{value:.3g}") for value in values]


def _linear_ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) / (m * step) <= TICKS)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        inside = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(inside) <= TICKS:
            break
    else:
        inside = inside[:: -(-len(inside) // TICKS)]
    return inside if len(inside) > 2 else [float(f"{v:.3g}") for v in np.geomspace(low, high, 5)[1:-1]]


def _log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis for positive values, with room on both sides."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.1, 1.02)
    return Axis(low / room, high * room, start, end, log=True)


class Bar(NamedTuple):
    """One bar of the chart of sizes: a size relative to 32 bits, `key` names a checkpoint or is empty."""

    label: str
    key: str
    size: float


def size_bars(rows: Sequence[Row]) -> list[Bar]:
    """Sizes of plain dtypes, and of the linear layers and of all that checkpoints hold, scales included."""
    bars = [Bar(name, "", bits / 32) for name, bits in DTYPES]
    for row in rows:
        if row.key == BASELINE:
            continue
        if row.storage.bits_per_weight is not None:
            bars.append(Bar("linear layers", row.key, row.storage.bits_per_weight / 32))
        if row.nbytes is not None and row.num_weights:
            bars.append(Bar("whole model", row.key, row.nbytes / row.num_weights / 4))
    return bars


class Point(NamedTuple):
    """One checkpoint in the plot of perplexity."""

    row: Row
    x: float
    y: float


class Scatter(NamedTuple):
    """Perplexity against bits per weight; `labels` are the keys of points, those that lie together in one."""

    x: Axis
    y: Axis
    points: list[Point]
    labels: list[tuple[float, float, str]]


def perplexity_plot(rows: Sequence[Row]) -> Scatter | None:
    """The plot of the checkpoints of which both are known; None if there is none."""
    known = [
        (row, row.storage.bits_per_weight, row.perplexity)
        for row in rows
        if row.storage.bits_per_weight and row.perplexity is not None and math.isfinite(row.perplexity)
    ]
    if not known:
        return None
    x = Axis(0, max(bits for _, bits, _ in known) * 1.08, LEFT, WIDTH - RIGHT)
    y = _log_axis([value for _, _, value in known], HEIGHT - BOTTOM, TOP)
    points = [Point(row, x.at(bits), y.at(value)) for row, bits, value in known]
    return Scatter(x, y, points, _labels(points))


def _labels(points: Sequence[Point]) -> list[tuple[float, float, str]]:
    labels: list[tuple[float, float, str]] = []
    for point in points:
        near = [i for i, (x, y, _) in enumerate(labels) if abs(x - point.x) < NEAR and abs(y - point.y) < NEAR]
        if near:
            x, y, text = labels[near[0]]
            labels[near[0]] = (x, min(y, point.y), f"{text}, {point.row.key}")
        else:
            labels.append((point.x, point.y, point.row.key))
    return labels


class Cell(NamedTuple):
    """One weight of the heat map: its error, and how hot that is, from 0 to 1; both None where there is none."""

    error: float | None
    heat: float | None


class HeatMap(NamedTuple):
    """Errors by layer and linear layer: `columns` are names of linear layers, `lines` have a cell for each."""

    columns: list[str]
    lines: list[list[Cell]]


def heat_maps(rows: Sequence[Row], num_layers: int) -> dict[str, HeatMap]:
    """The errors of each model that has some, by its key; the logarithm of the error is the heat, on one scale."""
    found = [e for row in rows for column in row.errors.values() for e in column.values() if e > 0]
    low, high = (math.log(f(found)) for f in (min, max)) if found else (0.0, 0.0)

    def cell(error: float | None) -> Cell:
        if not error:
            return Cell(error, error)
        return Cell(error, (math.log(error) - low) / (high - low) if high > low else 0.5)

    maps = {}
    for row in rows:
        if row.errors:
            columns = list(row.errors)
            lines = [[cell(row.errors[name].get(layer)) for name in columns] for layer in range(num_layers)]
            maps[row.key] = HeatMap(columns, lines)
    return maps


class Band(NamedTuple):
    """The channels of one layer: positions of its quantiles, from the smallest, and of outliers with what they are."""

    layer: int
    x: float
    quantiles: tuple[float, ...]
    outliers: list[tuple[float, str]]


class RangePlot(NamedTuple):
    """The largest |x| of the channels of one input, layer by layer."""

    name: str
    y: Axis
    half: float
    bands: list[Band]
    labels: list[tuple[float, str]]


def range_plots(ranges: Mapping[str, Sequence[LayerRange]], num_layers: int) -> list[RangePlot]:
    """A plot for each input; channels that are always zero are drawn at the smallest size that is not."""
    plots = []
    for name, layers in ranges.items():
        values = [v for r in layers for v in (*r.quantiles, *(o.absmax for o in r.outliers)) if v > 0]
        y = _log_axis(values, HEIGHT - BOTTOM, TOP)
        slot = (WIDTH - LEFT - RIGHT) / num_layers
        bands = [_band(r, LEFT + (r.layer + 0.5) * slot, y, min(values)) for r in layers]
        every = -(-num_layers // (2 * TICKS))
        labels = [(band.x, str(band.layer)) for band in bands if band.layer % every == 0]
        plots.append(RangePlot(name, y, round(min(9.0, 0.3 * slot), 2), bands, labels))
    return plots


def _band(r: LayerRange, x: float, y: Axis, least: float) -> Band:
    outliers = [
        (y.at(o.absmax), f"layer {r.layer}, channel {o.channel}: {o.lowest:.3g} to {o.highest:.3g}")
        for o in r.outliers[:DOTS]
    ]
    return Band(r.layer, round(x, 2), tuple(y.at(max(q, least)) for q in r.quantiles), outliers)


def hottest(rows: Sequence[Row]) -> float:
    """The divergence that gets the full colour in passages of text: that of all but one token in a hundred."""
    found = [token.kl for row in rows for token in row.passage if token.kl is not None]
    return max(float(np.quantile(found, 0.99)), 1e-12) if found else 1.0
