"""Products with int4 or int8 weights on TPUs, of floats or of inputs rounded to 8 bits, by a Mosaic TPU kernel.

Weights must have been prepared for a "tpu"; with a chip, tiles are larger and scales come where its matrix unit is kept
busy, without one the kernel is one that all of them run. The program for a TPU runs the kernel; for any other platform
it is the definition.

The matrix unit takes bfloat16. A float32 input is written as the sum of three of those,

    x = x₁ + x₂ + x₃,    x₁ = bf16(x),    x₂ = bf16(x - x₁),    x₃ = x - x₁ - x₂,

which are multiplied as more rows of one product; codes are exact in bfloat16, so the result is as exact as float32 is.

The definition rounds a dequantized weight to the dtype of the input; so does the kernel where it scales weights, and
where it scales sums, it need not.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import int8, platforms, reference
from jaxquant.kernels.tuning import TPU_CHIPS, TPU_LANES, TpuTiles, tpu_tiles
from jaxquant.numerics.qtensor import QTensor

POST_SCALED = 128  # tokens up to which sums are scaled, whatever the matrix unit


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    if q.prepared is None or q.prepared.platform != "tpu":
        return "the weight is not prepared for a TPU"
    if q.spec.granularity == "per_tensor":
        return "all outputs share one scale"
    if any(axis is not None for a in jax.tree.leaves((x, q)) for axis in jax.typeof(a).sharding.spec):
        return "arrays are sharded explicitly, outside of `shard_map`"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"inputs are {x.dtype}, not bfloat16 or float32"
    if q.scale.dtype == jnp.float64:
        return "scales are float64"
    return _activations_decline(q) or _shape_declines(x, q)


def _activations_decline(q: QTensor) -> str | None:
    activations = q.spec.activations
    assert q.prepared is not None
    if activations is None:
        return None
    if q.outlier_weight is not None:
        return "outliers are not told apart"
    if not TPU_CHIPS[q.prepared.chip].integers:
        which = q.prepared.chip or "a TPU of any generation"
        return f"the inputs are rounded, and the weight is prepared for {which}, which need not multiply integers"
    if activations.static or activations.granularity != "per_token" or not activations.symmetric:
        return "the inputs are rounded otherwise than each row in a symmetric range of its own"
    return None


def _shape_declines(x: jax.Array, q: QTensor) -> str | None:
    _, k, n, groups = _sizes(x, q)
    if 0 in x.shape or n == 0:
        return "the result has no entries, or is a sum of none"
    for size, what in ((k, "input channels"), (n, "outputs"), (k // groups, "input channels share a scale")):
        if size % TPU_LANES:
            return f"{size} {what}, no multiple of {TPU_LANES}"
    if q.spec.activations is not None and k // groups > int8.LARGEST_GROUP:
        return f"int32 does not hold sums of more than {int8.LARGEST_GROUP} products"
    if _tiles(x, q) is None:
        return f"fast memory does not hold {k} input channels, {k // groups} of which share a scale"
    return None


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """As `reference.matmul`; see `platforms.matmul`."""
    return platforms.matmul(
        x,
        q,
        preferred_element_type,
        precision,
        platform="tpu",
        kernel=kernel_matmul,
        declines=declines,
        stacked=True,
    )


def kernel_matmul(x: jax.Array, q: QTensor, dtype, interpret=False) -> jax.Array:
    """`[*lead, M, K] · [*lead, K, *out] -> [*lead, M, *out]` of `dtype`, by the kernel.

    `interpret` is an `InterpretParams` for tests.
    """
    from jaxquant.kernels import mosaic_tpu_kernels  # here: it imports a compiler, which most programs do not need

    rows, _ = reference.prepared(x, q)
    m, n = x.shape[-2], _sizes(x, q)[2]

    def flat(a):  # [S, ·, ·]
        a = a.reshape(-1, a.shape[x.ndim - 2], math.prod(a.shape[x.ndim - 1 :]))
        return reference.varying_as((x, q), a)

    rows, values, scale, zero = jax.tree.map(flat, (rows, q.values, q.scale, q.zero_point))
    tiles, parts = _tiles(x, q), _parts(x, q)
    assert tiles is not None
    out = mosaic_tpu_kernels.product(
        jnp.concatenate(_in_parts(rows), 1) if parts > 1 else rows,
        values,
        scale.astype(jnp.float32) if scale.dtype == jnp.float16 else scale,
        zero,
        tiles,
        dtype if parts == 1 and dtype in (jnp.bfloat16, jnp.float32) else jnp.float32,
        rounded=None if q.spec.activations is None else q.spec.activations.spec,
        pre_scaled=_pre_scaled(x, q),
        interpret=interpret,
    )
    out = jnp.sum(out.reshape(-1, parts, m, n), 1).astype(dtype)
    return out.reshape(*x.shape[:-1], *q.values.shape[x.ndim - 1 :])


def _pre_scaled(x: jax.Array, q: QTensor) -> bool:
    m, k, _, groups = _sizes(x, q)
    if groups == 1 or x.dtype != jnp.bfloat16:
        return False
    assert q.prepared is not None
    return m > POST_SCALED and k // groups < TPU_CHIPS[q.prepared.chip].depth


def _parts(x: jax.Array, q: QTensor) -> int:
    """How many numbers that the matrix unit takes an input is written as."""
    return 3 if q.spec.activations is None and x.dtype == jnp.float32 else 1


def _in_parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 numbers whose sum is a float32 one."""
    parts = []
    for _ in range(3):
        parts.append(lax.reduce_precision(x, 8, 7))  # unlike a cast there and back, XLA never drops it
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def _sizes(x: jax.Array, q: QTensor) -> tuple[int, int, int, int]:
    """M, K, N and the number of groups along K."""
    k = math.prod(q.in_shape)
    return x.shape[-2], k, math.prod(q.values.shape[x.ndim - 1 :]), q.spec.num_groups(k)


def _tiles(x: jax.Array, q: QTensor) -> TpuTiles | None:
    m, k, n, groups = _sizes(x, q)
    assert q.prepared is not None
    group = TPU_LANES if groups == 1 else k // groups
    bits, rounded = (4 if q.spec.bits <= 4 else 8), q.spec.activations is not None
    return tpu_tiles(q.prepared.chip, m * _parts(x, q), k, n, group, bits, rounded, own=q.prepared.tiles)
