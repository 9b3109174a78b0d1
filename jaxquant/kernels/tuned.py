"""Tiles that were timed on a device: a JSON file that `kernels.tune` writes, and `prepare` gives to weights.

A weight carries its tiles in its layout, which is static: a program that was compiled with others is not run with them,
and nothing is looked up elsewhere.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxquant.kernels.tuning import GPU_CHIPS, TPU_CHIPS, GpuTiles, TpuTiles
from jaxquant.numerics.prepared import Prepared
from jaxquant.numerics.qtensor import QTensor

FORMAT = "jaxquant tiles, 1"
Tiles = GpuTiles | TpuTiles
KINDS = {**dict.fromkeys(GPU_CHIPS, GpuTiles), **{chip: TpuTiles for chip in TPU_CHIPS if chip is not None}}


class Product(NamedTuple):
    """What a kernel is built for, but for the number of tokens.

    Attributes:
      channels, outputs: K and N.
      bits: of a code in memory, 4 or 8.
      group: input channels that share a scale.
      rounded: whether inputs are rounded.
    """

    channels: int
    outputs: int
    bits: int
    group: int
    rounded: bool


@dataclasses.dataclass(frozen=True)
class TunedTiles:
    """The quickest tiles of products on one chip.

    Attributes:
      chip: a name of `prepare`.
      rows: (product, tokens, tiles).
    """

    chip: str
    rows: tuple[tuple[Product, int, Tiles], ...]

    def of(self, q: QTensor) -> tuple[tuple[int, Tiles], ...]:
        """The tiles of one weight, as `Prepared` has them; none if its product was not timed."""
        own = [(m, tiles) for product, m, tiles in self.rows if product == product_of(q)]
        return tuple(sorted(own, key=lambda row: row[0]))

    def to_json(self, about: Mapping[str, Any]) -> str:
        """What `read_tiles` reads from a file, with what else is to be said `about` it."""
        rows = [{**product._asdict(), "tokens": m, "tiles": _stated(tiles)} for product, m, tiles in self.rows]
        return json.dumps({"format": FORMAT, "chip": self.chip, "rows": rows, **about}, indent=1) + "\n"


def read_tiles(path: str | os.PathLike) -> TunedTiles:
    """Reads a file of `TunedTiles.to_json`.

    Raises:
      ValueError: it is no such file.
      OSError: it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_bytes())
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        return TunedTiles(found["chip"], tuple(_read(row, KINDS[found["chip"]]) for row in found["rows"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no file of `jaxquant tune` ({type(error).__name__}: {why}); write it again"
        ) from error


def product_of(q: QTensor) -> Product:
    """The product with a weight; leading axes do not count."""
    channels = math.prod(q.in_shape)
    outputs = math.prod(q.shape[axis] for axis in q.out)
    group = channels // q.spec.num_groups(channels)
    return Product(channels, outputs, 4 if q.spec.bits <= 4 else 8, group, q.spec.activations is not None)


def with_tiles(q: QTensor, tiles: tuple[tuple[int, Tiles], ...]) -> QTensor:
    """A prepared weight with tiles of its own."""
    assert isinstance(q.prepared, Prepared)
    return dataclasses.replace(q, prepared=dataclasses.replace(q.prepared, tiles=tiles))


def _stated(tiles: Tiles) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(tiles).items() if name != "memory"}


def _read(row: Mapping[str, Any], kind: type) -> tuple[Product, int, Tiles]:
    product, tiles = Product(**{name: row[name] for name in Product._fields}), row["tiles"]
    sizes = [*product[:-1], row["tokens"], *(tiles[name] for name in tiles if name != "split")]
    flags = [product.rounded, tiles.get("split") or False]
    if not all(type(size) is int and size > 0 for size in sizes) or not all(type(flag) is bool for flag in flags):
        raise ValueError(f"{row} holds what is no size")
    return product, row["tokens"], kind(**tiles)
