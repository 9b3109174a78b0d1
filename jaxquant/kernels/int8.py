"""Products of 8-bit (or narrower) inputs with 8-bit (or narrower) weights, summed up as integers.

With input codes a, scale s and zero point y of each row, and weight codes c, scale t and zero point z of each column
(and group of input channels):

    Σ_k s (a_k - y) · t (c_k - z) = s t (Σ a_k c_k - y Σ c_k - z Σ a_k + K y z)

Every sum is one of integers, exact in int32. `kernels.reference` is the definition, to within its own rounding.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import reference
from jaxquant.numerics.activations import encode_input
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import compute_dtype

LARGEST_GROUP = 2**31 // 2**14  # products of 8-bit codes whose sum int32 holds


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    del x
    if q.spec.activations is None:
        return "the inputs are not rounded"
    if q.outlier_weight is not None:
        return "outliers are not rounded"
    size = math.prod(q.in_shape)
    if size // q.spec.num_groups(size) > LARGEST_GROUP:
        return f"int32 does not hold sums of more than {LARGEST_GROUP} products"
    return None


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """As `reference.matmul`, whose derivative it has; `precision` is that of the derivative."""

    return reference.with_derivative(_matmul, x, q, preferred_element_type, precision)


def _matmul(x: jax.Array, q: QTensor, preferred_element_type) -> jax.Array:
    assert q.spec.activations is not None
    wide, lead = compute_dtype(x.dtype), x.shape[:-2]
    x, static = reference.prepared(x, q)
    a, s, y = encode_input(x, static, q.spec.activations)
    codes = q.codes
    c, t, z = jax.tree.map(lambda w: w.reshape(*w.shape[: x.ndim - 1], -1), (codes, q.scale, q.zero_point))
    groups = q.scale.shape[x.ndim - 2]

    def add_group(total, parts):
        a, c, t, z = parts
        return total + _sums(a, c, y, z).astype(wide) * t.astype(wide), None

    def by_group(axis, w):  # [G, ...]
        return jnp.moveaxis(w.reshape(*w.shape[:axis], groups, -1, *w.shape[axis + 1 :]), axis, 0)

    parts = by_group(x.ndim - 1, a), *jax.tree.map(functools.partial(by_group, x.ndim - 2), (c, t, z))
    total = jnp.zeros((*lead, x.shape[-2], c.shape[-1]), wide)
    if groups == 1:
        total, _ = add_group(total, jax.tree.map(lambda w: w[0], parts))
    else:
        total, _ = lax.scan(add_group, total, parts)
    rounded = jnp.all(jnp.isfinite(x), -1, keepdims=True)  # no code stands for NaN or infinity
    total = jnp.where(rounded, total * s.astype(wide), jnp.nan)
    return total.astype(preferred_element_type or x.dtype).reshape(*total.shape[:-1], *codes.shape[x.ndim - 1 :])


def _sums(a: jax.Array, c: jax.Array, y: jax.Array | None, z: jax.Array | None) -> jax.Array:
    """The sum in the module's formula, int32 `[*lead, T, N]`."""
    total = reference.product(a, c, jnp.int32)
    wide = [None if v is None else v.astype(jnp.int32) for v in (y, z)]
    if wide[0] is not None:
        total -= wide[0] * jnp.sum(c, -2, keepdims=True, dtype=jnp.int32)
    if wide[1] is not None:
        total -= wide[1] * jnp.sum(a, -1, keepdims=True, dtype=jnp.int32)
    if wide[0] is not None and wide[1] is not None:
        total += a.shape[-1] * wide[0] * wide[1]
    return total
