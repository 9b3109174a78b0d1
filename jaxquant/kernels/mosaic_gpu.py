"""Products of floats with int4 or int8 weights on Hopper GPUs, by a Mosaic GPU kernel.

Weights must have been prepared for a "h100" or "h200". The program for a GPU runs the kernel; for any other platform it
is the definition. Zero points stay outside of the kernel: with codes c, scale s and zero point z of each output and
group g of input channels,

    Σ_k x_k s_g (c_k - z_g) = Σ_k x_k s_g c_k - Σ_g s_g z_g Σ_{k in g} x_k

The definition rounds a dequantized weight to the dtype of the input; so does the kernel for 64 tokens and more, and
below, where it scales sums, it need not.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import platforms, reference
from jaxquant.kernels.tuning import GPU_CHIPS, GPU_MOST_TOKENS, GPU_TILES, GpuTiles, gpu_tiles
from jaxquant.numerics.qtensor import QTensor

OLDEST_JAX = (0, 11)  # whose Mosaic GPU has the operations that the kernel needs
SHORTEST_STEP = 64  # along K: four-bit codes of a shorter one do not fill the shortest swizzled row


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, OLDEST_JAX))}"
    if q.prepared is None or q.prepared.platform != "gpu" or q.prepared.chip not in GPU_TILES:
        return f"the weight is not prepared for one of {', '.join(GPU_TILES)}"
    if q.spec.activations is not None:
        return "the inputs are rounded"
    if q.spec.granularity == "per_tensor":
        return "all outputs share one scale"
    if x.ndim > 2:
        return "there are leading axes"
    if any(axis is not None for a in jax.tree.leaves((x, q)) for axis in jax.typeof(a).sharding.spec):
        return "arrays are sharded explicitly, outside of `shard_map`"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"inputs are {x.dtype}, not bfloat16 or float16"
    if q.scale.dtype == jnp.float64:
        return "scales are float64"
    return _shape_declines(len(x), math.prod(q.values.shape[:-1]), q)


def _shape_declines(m: int, n: int, q: QTensor) -> str | None:
    assert q.prepared is not None
    assert q.prepared.chip is not None
    if m > GPU_MOST_TOKENS:
        return f"{m} tokens are so many that it pays to dequantize"
    if 0 in (m, n) or gpu_tiles(q.prepared.chip, m, n, q.prepared.tiles) is None:
        return f"the result is {m} × {n}, and there are no tiles for it"
    size = math.prod(q.in_shape)
    group = size // q.spec.num_groups(size)
    if group % SHORTEST_STEP or group == 0:
        return f"{group} input channels share a scale, no multiple of {SHORTEST_STEP}"
    return None


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """As `reference.matmul`; see `platforms.matmul`."""
    return platforms.matmul(
        x,
        q,
        preferred_element_type,
        precision,
        platform="cuda",
        kernel=kernel_matmul,
        declines=declines,
        stacked=False,
    )


def kernel_matmul(x: jax.Array, q: QTensor, dtype, interpret=None) -> jax.Array:
    """`[M, K] · [K, *out] -> [M, *out]` of `dtype`, by the kernel; `interpret` is an `InterpretGPUParams` for tests."""
    from jaxquant.kernels import mosaic_gpu_kernel  # here: it imports a compiler, which most programs do not need

    assert q.prepared is not None
    assert q.prepared.chip is not None
    x, _ = reference.prepared(x, q)
    values = q.prepared.integers(q.values, q.spec.bits).reshape(-1, x.shape[1])
    scale, zero = jax.tree.map(_by_group, (q.scale, q.zero_point))
    group = x.shape[1] // len(scale)
    tiles = gpu_tiles(q.prepared.chip, len(x), len(values), q.prepared.tiles)
    assert tiles is not None
    chip, wide = GPU_CHIPS[q.prepared.chip], dtype if zero is None else jnp.float32
    out = mosaic_gpu_kernel.product(x, values, scale, cut(tiles, group), chip, wide, interpret)
    if zero is not None:
        sums = jnp.sum(x.reshape(len(x), -1, group), -1, dtype=jnp.float32)
        shifts = scale.astype(jnp.float32) * zero.astype(jnp.float32)
        out -= jnp.matmul(sums, shifts, precision=lax.Precision.HIGHEST)
    return reference.varying_as((x, q), out.astype(dtype).reshape(len(x), *q.values.shape[:-1]))


def cut(tiles: GpuTiles, group: int) -> GpuTiles:
    """The tiles with steps along K that do not cross from one group of input channels to the next."""
    return dataclasses.replace(tiles, tile_k=math.gcd(tiles.tile_k, group))


def _by_group(a: jax.Array) -> jax.Array:
    return a.reshape(len(a), -1)
