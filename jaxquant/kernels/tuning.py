"""Tiles of the kernels, by chip and shape: plain data, and the functions that look it up."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """How a Mosaic GPU kernel cuts a product.

    Attributes:
      tile_m: tokens of a tile.
      tile_n: outputs of a tile, 64 for each of the two or four warpgroups that multiply.
      tile_k: the longest step along K; groups that are no multiples of it make it shorter.
      stages: steps whose loads may be under way at a time, if shared memory has room for as many.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    stages: int


@dataclasses.dataclass(frozen=True)
class GpuChip:
    """What a kernel is cut for.

    Attributes:
      processors: streaming multiprocessors.
      shared_memory: bytes that a program on one of them may use.
      flops_per_byte: bfloat16 operations, multiplications and additions counted, in the time of loading a byte.
    """

    processors: int
    shared_memory: int
    flops_per_byte: float


GPU_CHIPS = {"h100": GpuChip(132, 232_448, 240.0), "h200": GpuChip(132, 232_448, 184.0)}  # on SXM boards
_HOPPER = {  # the most tokens for which a row holds; where there are more, XLA multiplies with dequantized weights
    8: GpuTiles(tile_m=8, tile_n=128, tile_k=128, stages=8),
    16: GpuTiles(tile_m=16, tile_n=128, tile_k=128, stages=8),
    32: GpuTiles(tile_m=32, tile_n=128, tile_k=128, stages=8),
    64: GpuTiles(tile_m=64, tile_n=128, tile_k=128, stages=6),
    512: GpuTiles(tile_m=128, tile_n=128, tile_k=128, stages=4),
}
GPU_TILES = {"h100": _HOPPER, "h200": _HOPPER}  # chosen by compiling and by counting bytes; none was timed on a chip


def gpu_tiles(chip: str, tokens: int) -> GpuTiles | None:
    """The tiles for a number of tokens; None where they are so many that no kernel pays.

    Raises:
      KeyError: there is no table for the chip.
    """
    return next((tiles for most, tiles in GPU_TILES[chip].items() if tokens <= most), None)
