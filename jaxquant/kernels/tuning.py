"""Tiles of the kernels, by chip and shape: plain data, and the functions that look it up."""

import dataclasses
from collections.abc import Sequence


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
# The most tokens, and the tiles for them; of those that fit, the first are taken. An H200 ran them, and up to 64
# tokens it beat bfloat16 (benchmarks/README.md); whether others are quicker has hardly been searched. They compile
# without spilling registers, and are wide because a tile of tokens is read once for each tile of outputs: by count, a
# processor that multiplies at full speed reads 24 bytes per cycle for tiles of 128 × 256, 40 for 128 × 128.
_HOPPER = (
    (8, GpuTiles(tile_m=8, tile_n=256, tile_k=128, stages=8)),
    (16, GpuTiles(tile_m=16, tile_n=256, tile_k=128, stages=8)),
    (32, GpuTiles(tile_m=32, tile_n=256, tile_k=128, stages=8)),
    (64, GpuTiles(tile_m=64, tile_n=256, tile_k=128, stages=6)),
    (1024, GpuTiles(tile_m=128, tile_n=256, tile_k=64, stages=6)),  # longer steps spill registers
    (8, GpuTiles(tile_m=8, tile_n=128, tile_k=128, stages=8)),
    (16, GpuTiles(tile_m=16, tile_n=128, tile_k=128, stages=8)),
    (32, GpuTiles(tile_m=32, tile_n=128, tile_k=128, stages=8)),
    (64, GpuTiles(tile_m=64, tile_n=128, tile_k=128, stages=6)),
    (1024, GpuTiles(tile_m=128, tile_n=128, tile_k=128, stages=4)),
)
GPU_TILES = {"h100": _HOPPER, "h200": _HOPPER}
# At 1024 tokens and 4096 × 28672 an H200 took 374 µs where XLA took 456; at 2048 tokens there was no difference.
GPU_MOST_TOKENS = 1024


def gpu_tiles(chip: str, tokens: int, outputs: int, own: Sequence[tuple[int, GpuTiles]] = ()) -> GpuTiles | None:
    """The tiles for a product; None where there are none, for so many tokens or for such a number of outputs.

    Those of its `own` come before the table's.

    Raises:
      KeyError: there is no table for the chip.
    """
    rows = (*own, *GPU_TILES[chip])
    return next((tiles for most, tiles in rows if tokens <= most and outputs % tiles.tile_n == 0), None)


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """How a Mosaic TPU kernel cuts a product.

    Attributes:
      tile_m: tokens of a tile.
      tile_n: outputs of a tile.
      tile_k: input channels whose weights are loaded at a time.
      memory: bytes of fast memory for it all; `tpu_tiles` fills it in.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    memory: int = 0


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """What a kernel is cut for.

    Attributes:
      memory: bytes of fast memory (VMEM) that a program may use.
      depth: input channels that the matrix unit takes at a time; for shorter groups it is not filled.
      integers: whether it multiplies int8.
    """

    memory: int
    depth: int
    integers: bool


TPU_LANES = 128  # numbers in a row of a register
TPU_SUBLANES = 16  # rows of bfloat16 in a register
_MIB = 2**20
TPU_CHIPS = {  # a quarter of the memory is left to the compiler; None is what all of them have
    "v4": TpuChip(12 * _MIB, 128, False),
    "v5e": TpuChip(96 * _MIB, 128, True),
    "v5p": TpuChip(48 * _MIB, 128, True),
    "v6e": TpuChip(96 * _MIB, 256, True),
    "tpu7x": TpuChip(48 * _MIB, 256, False),
    None: TpuChip(12 * _MIB, 128, False),
}
# The largest tiles; of those that fit in memory, the first are taken. None was timed on a chip: they rank first by the
# cycles that the compiler estimates (benchmarks/tpu_cycles.py). Wide tiles with all of K take few steps, each of which
# costs about 0.35 µs. Tiles of 256 tokens overlap better than those of 512; but where weights are scaled before they
# are multiplied, which each tile of tokens does anew, more tokens share that.
_SHALLOW = (
    TpuTiles(tile_m=256, tile_n=1024, tile_k=8192),
    TpuTiles(tile_m=128, tile_n=512, tile_k=4096),
    TpuTiles(tile_m=64, tile_n=512, tile_k=2048),
    TpuTiles(tile_m=32, tile_n=256, tile_k=2048),
    TpuTiles(tile_m=32, tile_n=128, tile_k=512),
)
_DEEP = TpuTiles(tile_m=512, tile_n=1024, tile_k=8192), *_SHALLOW
TPU_TILES = {"v4": _SHALLOW, "v5e": _SHALLOW, "v5p": _SHALLOW, "v6e": _DEEP, "tpu7x": _DEEP, None: _SHALLOW}


def tpu_tiles(
    chip: str | None,
    tokens: int,
    channels: int,
    outputs: int,
    group: int,
    bits: int,
    rounded: bool,
    *,
    own: Sequence[tuple[int, TpuTiles]] = (),
    table: Sequence[TpuTiles] | None = None,
) -> TpuTiles | None:
    """The tiles for a product; None where fast memory has no room for any.

    Args:
      chip: a key of `TPU_CHIPS`.
      tokens, channels, outputs: M, K and N; the last two multiples of 128.
      group: input channels of which a tile must hold a multiple, itself one of 128.
      bits: of a weight in memory, 4 or 8.
      rounded: whether the kernel rounds the input, which may then be float32.
      own: the most tokens, and tiles for them, that come before the table's.
      table: the largest tiles; None is the chip's.
    """
    largest = next(([tiles] for most, tiles in own if tokens <= most), [])
    largest += TPU_TILES[chip] if table is None else table

    def cut(tiles: TpuTiles) -> TpuTiles:
        tile_m = tokens if tokens < TPU_SUBLANES else _even(tokens, tiles.tile_m, TPU_SUBLANES)
        tile_n = _even(outputs, tiles.tile_n, TPU_LANES)
        tile_k = max(
            t for t in range(group, channels + 1, group) if channels % t == 0 and t <= max(tiles.tile_k, group)
        )
        loaded = tile_m * channels * (4 if rounded else 2) + tile_k * tile_n * bits // 8 + tile_m * tile_n * 4
        qparams = tile_k // group * tile_n * (4 + 1)
        summed = tile_m * tile_n * 4
        chunk = max(group, 512) * tile_n * 4
        kept = tile_m * channels * 2 * rounded + qparams * 16 + summed
        return TpuTiles(tile_m, tile_n, tile_k, 2 * (loaded + qparams) + kept + summed + chunk + 2 * _MIB)

    return next((t for t in map(cut, largest) if t.memory <= TPU_CHIPS[chip].memory), None)


def _even(size: int, most: int, unit: int) -> int:
    """Of equal tiles, multiples of `unit`, and no larger than `most`, as few as cover `size`: how large they are."""
    count = -(-size // most)
    return -(-size // (count * unit)) * unit
