"""The definition of every product with a quantized weight: dequantize, then multiply."""

import jax
from jax import lax

from jaxquant.numerics.affine import decode, per_code
from jaxquant.numerics.qtensor import QTensor


def dense(q: QTensor) -> jax.Array:
    """The weight in canonical layout, `[*lead, K, *out]`, in `q.dtype`."""
    codes, n_out = q.codes, len(q.out)
    return decode(codes, *per_code(q.scale, q.zero_point, codes.shape, n_out)).astype(q.dtype)


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """`[*lead, T, K] · [*lead, K, *out] -> [*lead, T, *out]`, see `kernels.matmul.quantized_matmul`."""
    lead = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (lead, lead))
    return lax.dot_general(x, dense(q), dims, precision, preferred_element_type)


def ragged_matmul(x: jax.Array, q: QTensor, groups: jax.Array, preferred_element_type, precision) -> jax.Array:
    """`[T, K] · [E, K, N] -> [T, N]`, see `kernels.matmul.quantized_ragged_matmul`."""
    return lax.ragged_dot(x, dense(q), groups, precision, preferred_element_type)
