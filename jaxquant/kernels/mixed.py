"""Products in which input channels with outliers stay in floating point (LLM.int8(), arXiv:2208.07339)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import int8
from jaxquant.kernels.reference import product
from jaxquant.numerics.affine import scaled_dense
from jaxquant.numerics.qtensor import QTensor


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    del x
    return "no outliers are kept" if q.outlier_weight is None else None


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """As `reference.matmul`, for a weight with `outlier_weight`.

    A channel is an outlier where any row of the input reaches the threshold. Channels of which the weight keeps float
    rows use those, others dequantized ones; the latter are rare, and cost nothing where there are none.
    """
    activations, index, rows = q.spec.activations, q.outlier_index, q.outlier_weight
    assert activations is not None
    assert activations.outlier_threshold is not None
    assert index is not None
    assert rows is not None
    rest = dataclasses.replace(q.spec, activations=dataclasses.replace(activations, outlier_threshold=None))
    plain = dataclasses.replace(q, spec=rest, outlier_index=None, outlier_weight=None)
    large = jnp.max(jnp.abs(x), -2, keepdims=True) >= activations.outlier_threshold  # [*lead, 1, K]
    result = int8.matmul(jnp.where(large, 0, x), plain, preferred_element_type, precision)

    index = index.reshape(*x.shape[:-2], 1, -1)
    outside = jnp.where(large, x, 0)
    kept = jnp.take_along_axis(outside, index, -1, mode="fill", fill_value=0)
    result += product(kept, rows.astype(x.dtype), preferred_element_type, precision)

    listed = jnp.put_along_axis(jnp.zeros(large.shape, bool), index, True, -1, inplace=False)
    others = large & ~listed

    def with_others():
        w = scaled_dense(q).astype(x.dtype)
        return result + product(jnp.where(others, x, 0), w, preferred_element_type, precision)

    return lax.cond(jnp.any(others), with_others, lambda: result)
