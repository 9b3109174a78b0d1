"""The low-rank part of a weight that is kept in floating point beside its codes (LoRA, arXiv:2106.09685)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.qtensor import QTensor


def without(q: QTensor) -> QTensor:
    """The codes alone."""
    return q if q.adapter_in is None else dataclasses.replace(q, adapter_in=None, adapter_out=None)


def dense(q: QTensor) -> jax.Array:
    """The low-rank part, `[*lead, K, *out]`, in its own dtype."""
    first, second = factors(q)
    product = jnp.matmul(first, second.reshape(*second.shape[: first.ndim - 1], -1), precision=lax.Precision.HIGHEST)
    return product.reshape(*first.shape[:-1], *second.shape[first.ndim - 1 :])


def factors(q: QTensor) -> tuple[jax.Array, jax.Array]:
    """The factors `[*lead, K, r]` and `[*lead, r, *out]`."""
    assert q.adapter_in is not None
    assert q.adapter_out is not None
    axis = q.adapter_out.ndim - 1 - len(q.out)
    lead, rank = q.adapter_out.shape[:axis], q.adapter_out.shape[axis]
    return q.adapter_in.reshape(*lead, -1, rank), q.adapter_out


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """x times the low-rank part, `[*lead, T, K] -> [*lead, T, *out]`, in the result type of a product of x."""
    first, second = (a.astype(x.dtype) for a in factors(q))
    lead = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (lead, lead))
    inner = lax.dot_general(x, first, dims, precision)
    return lax.dot_general(inner, second, dims, precision, preferred_element_type)


def ragged_matmul(x: jax.Array, q: QTensor, groups: jax.Array, preferred_element_type, precision) -> jax.Array:
    """Rows of x `[T, K]` times the low-rank parts of their experts, `[T, N]`."""
    first, second = (a.astype(x.dtype) for a in factors(q))
    inner = lax.ragged_dot(x, first, groups, precision)
    return lax.ragged_dot(inner, second, groups, precision, preferred_element_type)
