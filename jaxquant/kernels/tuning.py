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
      split: whether processors share the steps of a tile, so that all have as much to do; None decides by the bytes.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    stages: int
    split: bool | None = None


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
# The most tokens, and the tiles for them; of those that fit, the first are taken. None was timed on a chip. They
# compile without spilling registers, and are wide because a tile of tokens is read once for each tile of outputs: by
# count, a processor that multiplies at full speed reads 24 bytes per cycle for tiles of 128 × 256, 40 for 128 × 128.
_HOPPER = (
    (8, GpuTiles(tile_m=8, tile_n=256, tile_k=128, stages=8)),
    (16, GpuTiles(tile_m=16, tile_n=256, tile_k=128, stages=8)),
    (32, GpuTiles(tile_m=32, tile_n=256, tile_k=128, stages=8)),
    (64, GpuTiles(tile_m=64, tile_n=256, tile_k=128, stages=6)),
    (512, GpuTiles(tile_m=128, tile_n=256, tile_k=64, stages=6)),  # longer steps spill registers
    (8, GpuTiles(tile_m=8, tile_n=128, tile_k=128, stages=8)),
    (16, GpuTiles(tile_m=16, tile_n=128, tile_k=128, stages=8)),
    (32, GpuTiles(tile_m=32, tile_n=128, tile_k=128, stages=8)),
    (64, GpuTiles(tile_m=64, tile_n=128, tile_k=128, stages=6)),
    (512, GpuTiles(tile_m=128, tile_n=128, tile_k=128, stages=4)),
)
GPU_TILES = {"h100": _HOPPER, "h200": _HOPPER}
GPU_MOST_TOKENS = 512  # beyond, one product of XLA with dequantized weights is quicker than dequantizing in each tile


def gpu_tiles(chip: str, tokens: int, outputs: int) -> GpuTiles | None:
    """The tiles for a product; None where there are none, for so many tokens or for such a number of outputs.

    Raises:
      KeyError: there is no table for the chip.
    """
    rows = GPU_TILES[chip]
    return next((tiles for most, tiles in rows if tokens <= most and outputs % tiles.tile_n == 0), None)
