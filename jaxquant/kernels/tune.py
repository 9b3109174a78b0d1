"""Times the tiles that a kernel could be built with, on the device that it is for.

What is quickest depends on the chip, the compiler and the shape; the tables of `kernels.tuning` hold for shapes in
general. Candidates that the compiler refuses, or that a device has no room for, are passed over and reported.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels.matmul import quantized_matmul
from jaxquant.kernels.mosaic_gpu import OLDEST_JAX
from jaxquant.kernels.tuned import Product, Tiles, TunedTiles, product_of, with_tiles
from jaxquant.kernels.tuning import GPU_CHIPS, GPU_MOST_TOKENS, TPU_CHIPS, TPU_LANES, GpuTiles, TpuTiles, tpu_tiles
from jaxquant.numerics.affine import quantize
from jaxquant.numerics.prepared import Platform, Prepared
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec, QuantSpec

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))  # K, N of a model with 8 billion weights
TOKENS = (1, 16, 64, 256)
WEIGHTS = {
    "w4g128": QuantSpec(4, 128),
    "w8": QuantSpec(8),
    "w8a8": QuantSpec(8, activations=ActivationSpec()),
    "w4g128a8": QuantSpec(4, 128, activations=ActivationSpec()),
}
_TPUS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "7": "tpu7x"}
ROUNDS, CALLS = 5, 10
COPIES, CACHED = 8, 2**28  # of a weight that a program multiplies with in turn; bytes beyond which no cache has it

Timer = Callable[[jax.Array, QTensor], float]


def chip_of(device: Any) -> str:
    """The name by which `prepare` knows a device.

    Raises:
      ValueError: there is no kernel for it.
    """
    kind = device.device_kind.lower()
    found = next((chip for chip in GPU_CHIPS if chip in kind), None) if device.platform == "gpu" else None
    if device.platform == "tpu":
        found = next((chip for name, chip in _TPUS.items() if name in kind), None)
    if found in GPU_CHIPS and jax.__version_info__ < OLDEST_JAX:
        raise ValueError(f"JAX {jax.__version__} has no kernels for GPUs; tune with {'.'.join(map(str, OLDEST_JAX))}")
    if found is None:
        raise ValueError(
            f"tune times kernels on a TPU or an NVIDIA H100 or H200, and this is {device.device_kind!r}; run it there"
        )
    return found


def tune(
    chip: str,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    weights: Iterable[str] = ("w4g128", "w8"),
    *,
    timer: Timer | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[TunedTiles, list[str]]:
    """The quickest tiles of each product, and why others could not run, a line each.

    Args:
      chip: of this machine's device, see `chip_of`.
      shapes: K and N of the weights.
      tokens: M of the inputs.
      weights: kinds of codes, of `WEIGHTS`.
      timer: seconds of `x · q` for a prepared weight that carries its tiles; None runs it on the device.
      progress: called as the work goes on.

    Raises:
      ValueError: a kind of weight is unknown, or no candidate ran.
    """
    if unknown := sorted({*weights} - {*WEIGHTS}):
        raise ValueError(f"weights={unknown} are unknown; choose of {', '.join(WEIGHTS)}")
    platform: Platform = "gpu" if chip in GPU_CHIPS else "tpu"
    timer = timer or functools.partial(seconds, f"mosaic_{platform}")
    rows, failed = [], list[str]()
    cases = [*itertools.product(weights, shapes)]
    for done, (name, (k, n)) in enumerate(cases):
        progress("timing", done, len(cases))
        w = jax.random.normal(jax.random.key(0), (k, n), jnp.bfloat16)
        q = quantize(w, WEIGHTS[name]).laid_out(Prepared(platform, chip))
        for m in tokens:
            times: list[tuple[float, Tiles]] = []
            x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
            for tiles in candidates(chip, m, product_of(q)):
                try:
                    times.append((timer(x, with_tiles(q, ((m, tiles),))), tiles))
                except Exception as error:  # whatever a compiler raises: the candidate is none, and is reported
                    failed.append(f"{name} {m}×{k}×{n} {tiles}: {type(error).__name__}: {error}".splitlines()[0])
            if times:
                rows.append((product_of(q), m, min(times, key=lambda timed: timed[0])[1]))
    progress("timing", len(cases), len(cases))
    if not rows:
        raise ValueError(f"no candidate ran on {chip}: {failed[0] if failed else 'no shape fits its kernels'}")
    return TunedTiles(chip, tuple(rows)), failed


def candidates(chip: str, tokens: int, product: Product) -> list[Tiles]:
    """Tiles to try, each of which differs for this product."""
    if chip in TPU_CHIPS:
        sizes = itertools.product((64, 128, 256, 512), (256, 512, 1024), (1024, 2048, 4096, 8192))
        group = TPU_LANES if product.group == product.channels else product.group
        what = (product.channels, product.outputs, group, product.bits, product.rounded)
        cut = [tpu_tiles(chip, tokens, *what, own=((tokens, TpuTiles(*size)),), table=()) for size in sizes]
        return [*dict.fromkeys(dataclasses.replace(tiles, memory=0) for tiles in cut if tiles is not None)]
    if tokens > GPU_MOST_TOKENS:
        return []
    tile_m = next((size for size in (8, 16, 32, 64) if tokens <= size), 128)
    choices = itertools.product((128, 256), (64, 128), (4, 6, 8), (False, True))
    return [GpuTiles(tile_m, *choice) for choice in choices if product.outputs % choice[0] == 0]


def seconds(implementation: str, x: jax.Array, q: QTensor) -> float:
    """The median time of a product on the device, of a program that multiplies with copies of the weight in turn."""
    copies = [jax.tree.map(jnp.copy, q) for _ in range(max(1, min(COPIES, CACHED // q.nbytes)))]

    @jax.jit
    def run(x, copies):
        return [quantized_matmul(x, q, implementation=implementation) for q in copies]

    def once() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            out = run(x, copies)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / CALLS / len(copies)

    once()
    return median(once() for _ in range(ROUNDS))
