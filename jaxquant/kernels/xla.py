"""Products of float inputs with weights that are prepared for an accelerator, in formulations that XLA fuses well.

With t the scales and z the zero points of the groups g of channels,

    Σ_k x_k t_g (c_k - z_g) = Σ_g t_g (Σ_k x_k c_k - z_g Σ_k x_k)

so codes enter the product as they are, cast inside of it, and the scales come after. With one group that is one fused
product. With several it is a product of stacks, one matrix per group, which pays for few rows; for many its float32
partial sums are larger than the weight, so that is dequantized once instead.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import reference
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import compute_dtype

MOST_ROWS = 64  # that are multiplied group by group
FEWEST_ROWS = 16  # for which GPUs have fused products


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    del x
    if q.prepared is None or q.prepared.platform == "cpu":
        return "the weight is not prepared for an accelerator"
    if q.spec.activations is not None:
        return "the inputs are rounded"
    return None if q.outlier_weight is None else "outliers are not told apart"


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """As `reference.matmul`, whose derivative it has."""
    groups = q.spec.num_groups(math.prod(q.in_shape))
    if groups > 1 and x.shape[-2] > MOST_ROWS:
        return reference.matmul(x, q, preferred_element_type, precision)
    run = functools.partial(_matmul, precision)
    return reference.with_derivative(run, x, q, preferred_element_type, precision)


def _matmul(precision, x: jax.Array, q: QTensor, preferred_element_type) -> jax.Array:
    assert q.prepared is not None
    x, _ = reference.prepared(x, q)
    lead, rows, wide = x.ndim - 2, x.shape[-2], compute_dtype(x.dtype)
    codes = q.prepared.integers(q.values, q.spec.bits)
    sizes = codes.shape
    out = sizes[lead:-1] if q.contract_last else sizes[lead + 1 :]
    t, z = jax.tree.map(lambda a: a.reshape(*sizes[:lead], a.shape[lead], 1, -1), (q.scale, q.zero_point))
    groups = t.shape[lead]
    if groups > 1:
        x = jnp.pad(x, [(0, 0)] * lead + [(0, max(0, FEWEST_ROWS - rows)), (0, 0)])
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, lead)  # [*lead, G, T, K/G]
    if q.contract_last:
        c = jnp.moveaxis(codes.reshape(*sizes[:lead], -1, groups, x.shape[-1]), -2, lead)  # [*lead, G, N, K/G]
    else:
        c = codes.reshape(*sizes[:lead], groups, x.shape[-1], -1)
    stacks = tuple(range(lead + 1))
    dims = ((lead + 2,), (lead + 2 if q.contract_last else lead + 1,)), (stacks, stacks)
    y = lax.dot_general(x, c.astype(x.dtype), dims, precision, wide)
    if z is not None:
        y -= z.astype(wide) * jnp.sum(x, -1, keepdims=True, dtype=wide)
    y = jnp.sum(y * t.astype(wide), lead)[..., :rows, :]
    return y.astype(preferred_element_type or x.dtype).reshape(*y.shape[:-1], *out)
