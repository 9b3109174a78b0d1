"""What `quantize_params` did to each weight, for people and for machines."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One matrix: a weight, or one layer or expert of a stacked weight.

    Attributes:
      path: of the weight in the parameter tree.
      index: position along its leading axes; empty for a weight without them.
      shape: `(in, out)`, the contracting axes and the output axes flattened.
      method: name of the method that was asked for.
      bits, group_size, symmetric: of its codes.
      activations: whether its inputs are rounded, "none", "dynamic" or "static".
      tokens: calibration tokens behind its statistics; None where there are none.
      dropped_rows: tokens left out because they were not finite.
      rtn_error, error: relative squared output error ‖x̂Ŵ-xW‖²/‖xW‖² on held-out tokens, of rounding to nearest and of
        the weight that was kept, both with inputs rounded to x̂; None without held-out tokens.
      fallback: why rounding to nearest was kept in place of the method's answer; None where it was not.
      info: what the method itself reports (GPTQ: damping, dead channels); None where a number is not finite.
      seconds: its share of the wall clock, without compiling the method.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, int]
    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    activations: str
    tokens: int | None
    dropped_rows: int | None
    rtn_error: float | None
    error: float | None
    fallback: str | None
    info: dict[str, float | None]
    seconds: float

    @property
    def name(self) -> str:
        """Path and position, "layers/mlp/up_proj/kernel[3]"."""
        return self.path + (f"[{','.join(map(str, self.index))}]" if self.index else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `quantize_params`.

    Attributes:
      layers: one entry per matrix.
      unchanged: paths left as they were.
      notes: per path, uses of a weight that calibration could not follow; `quantized` refuses those of a quantized one.
      bytes_before, bytes_after: of the whole tree, as memory holds it.
      calibration: the data that it was calibrated with, where `quantize_checkpoint` read them: "source", "sequences",
        "tokens" and "sha256" of the token ids and of which of them are real.
    """

    layers: tuple[LayerReport, ...]
    unchanged: tuple[str, ...]
    notes: dict[str, str]
    bytes_before: int
    bytes_after: int
    calibration: dict[str, Any] | None = None

    @property
    def fallbacks(self) -> tuple[LayerReport, ...]:
        """The matrices that kept rounding to nearest although another method was asked for."""
        return tuple(layer for layer in self.layers if layer.fallback)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` made this of, also after it was JSON."""
        rows = [{**row, "index": tuple(row["index"]), "shape": tuple(row["shape"])} for row in fields["layers"]]
        layers = tuple(LayerReport(**row) for row in rows)
        return cls(**{**fields, "layers": layers, "unchanged": tuple(fields["unchanged"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def heat_map(self, file: str | os.PathLike) -> None:
        """Draws the output error of every matrix into a PNG file, layers from left to right and weights downwards.

        Matrices without an error, because there were no held-out tokens, stay blank.

        Raises:
          ValueError: no matrix has one.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: nothing global
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        paths = list(dict.fromkeys(layer.path for layer in self.layers))
        places = {path: itertools.count() for path in paths}
        cells = [(paths.index(layer.path), next(places[layer.path]), layer.error) for layer in self.layers]
        errors = np.full((len(paths), max((column for _, column, _ in cells), default=0) + 1), np.nan)
        for row, column, error in cells:
            errors[row, column] = error or np.nan
        if not np.isfinite(errors).any():
            raise ValueError("no matrix of this report has an error to draw; quantize with calibration statistics")
        size = (3 + 0.45 * errors.shape[1], 1.2 + 0.35 * len(paths))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(errors, norm=LogNorm(), cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(paths)), [path.removesuffix("/kernel") for path in paths])
        axes.set_xticks(range(errors.shape[1]))
        axes.set(xlabel="layer", title="relative output error on held-out tokens")
        figure.colorbar(image)
        FigureCanvasAgg(figure).print_png(os.fspath(file))

    def table(self) -> Table:
        """The report as a rich table, one row per matrix."""
        caption = f"{self.bytes_before:,} → {self.bytes_after:,} bytes, {len(self.fallbacks)} fallbacks"
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=caption)
        for column in ("weight", "shape", "method", "bits", "tokens", "RTN error", "error", "note"):
            left = column in ("weight", "method", "note")
            table.add_column(column, justify="left" if left else "right", overflow="fold")
        for layer in self.layers:
            bits = f"{layer.bits}" + (f" g{layer.group_size}" if layer.group_size else "")
            bits += "" if layer.activations == "none" else f" {layer.activations}"
            numbers = ("–" if e is None else f"{e:.2e}" for e in (layer.rtn_error, layer.error))
            tokens = "–" if layer.tokens is None else f"{layer.tokens:,}"
            shape = "×".join(map(str, layer.shape))
            table.add_row(layer.name, shape, layer.method, bits, tokens, *numbers, layer.fallback or "")
        for path, note in self.notes.items():
            table.add_row(path, "", "", "", "", "", "", note)
        return table


def joined_reports(reports: Sequence[Report], paths: Sequence[str]) -> Report:
    """The report on a tree of these paths, from those on parts of it that were quantized one after the other."""
    found: dict[str, list[LayerReport]] = {path: [] for path in paths}
    for row in itertools.chain.from_iterable(report.layers for report in reports):
        found[row.path].append(row)
    return dataclasses.replace(
        reports[-1],
        layers=tuple(itertools.chain.from_iterable(found.values())),
        unchanged=tuple(path for path, rows in found.items() if not rows),
        notes={path: note for report in reports for path, note in report.notes.items()},
        bytes_before=reports[0].bytes_before,
    )


def stacked_reports(reports: Sequence[Report]) -> Report:
    """The report on a stack of layers, from one on each of them: a stack of that layer alone."""
    rows = [
        dataclasses.replace(row, index=(layer, *row.index[1:]))
        for layer, report in enumerate(reports)
        for row in report.layers
    ]
    order = {path: i for i, path in enumerate(dict.fromkeys(row.path for row in rows))}
    return dataclasses.replace(
        reports[0],
        layers=tuple(sorted(rows, key=lambda row: order[row.path])),
        bytes_before=sum(report.bytes_before for report in reports),
        bytes_after=sum(report.bytes_after for report in reports),
    )
