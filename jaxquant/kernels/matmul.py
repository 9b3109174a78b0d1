"""The one entry to products with quantized weights."""

import jax

from jaxquant.kernels import int8, mixed, reference
from jaxquant.numerics.qtensor import QTensor


def quantized_matmul(x: jax.Array, q: QTensor, *, preferred_element_type=None, precision=None) -> jax.Array:
    """Multiplies an input, rounded as `q.spec.activations` says, with a quantized weight; differentiable in x.

    Args:
      x: float `[*lead, T, K]`, in the dtype `q.dtype`.
      q: weight with the same leading axes and K input channels.
      preferred_element_type: dtype of the accumulation and the result, as in `jax.lax.dot_general`.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*lead, T, *out]`.
    """
    chosen = mixed if q.outlier_weight is not None else int8 if int8.declines(q) is None else reference
    return chosen.matmul(x, q, preferred_element_type, precision)


def quantized_ragged_matmul(
    x: jax.Array, q: QTensor, groups: jax.Array, *, preferred_element_type=None, precision=None
) -> jax.Array:
    """Multiplies consecutive rows of x with the weights of their experts, as `jax.lax.ragged_dot` does.

    Args:
      x: float `[T, K]`, in the dtype `q.dtype`.
      q: weight with one leading axis (experts) and one output axis.
      groups: integer `[E]`, rows of x per expert.
      preferred_element_type: as in `quantized_matmul`.
      precision: as in `quantized_matmul`.

    Returns:
      `[T, N]`.
    """
    return reference.ragged_matmul(x, q, groups, preferred_element_type, precision)
