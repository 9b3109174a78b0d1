"""The one entry to products with quantized weights.

Every implementation is a module with `declines(x, q)`, which says why it cannot run or returns None, and `matmul`. What
they compute is that of `kernels.reference`, to within rounding. Which one runs depends on the layout, the spec and the
shapes alone, so it can be told, and tested, without the hardware.
"""

import jax

from jaxquant.kernels import cpu, int8, mixed, mosaic_gpu, mosaic_tpu, reference, xla
from jaxquant.numerics import adapters
from jaxquant.numerics.qtensor import QTensor

IMPLEMENTATIONS = {  # the first that does not decline is taken
    "mixed": mixed,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "cpu": cpu,
    "int8": int8,
    "xla": xla,
    "reference": reference,
}


def quantized_matmul(
    x: jax.Array, q: QTensor, *, preferred_element_type=None, precision=None, implementation: str | None = None
) -> jax.Array:
    """Multiplies an input, rounded as `q.spec.activations` says, with a quantized weight; differentiable in x.

    So it is in the low-rank part that the weight may have (`adapter_in`, `adapter_out`).

    Args:
      x: float `[*lead, T, K]`, in the dtype `q.dtype`.
      q: weight with the same leading axes and K input channels.
      preferred_element_type: dtype of the accumulation and the result, as in `jax.lax.dot_general`.
      precision: as in `jax.lax.dot_general`.
      implementation: a name in `IMPLEMENTATIONS`, for tests and measurements; None takes the first that can run.

    Returns:
      `[*lead, T, *out]`.

    Raises:
      ValueError: there is no such implementation, or it cannot run; the message says why, of this and all others.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.kernels.matmul import quantized_matmul
      >>> q = jq.quantize(jnp.array([[127.0], [64.0]]), jq.int8(narrow_range=True))
      >>> quantized_matmul(jnp.array([[1.0, 2.0]]), q).tolist()
      [[255.0]]
    """
    codes = adapters.without(q)
    y = IMPLEMENTATIONS[chosen(x, codes, implementation)].matmul(x, codes, preferred_element_type, precision)
    return y if q.adapter_in is None else y + adapters.matmul(x, q, preferred_element_type, precision)


def chosen(x: jax.Array, q: QTensor, implementation: str | None = None) -> str:
    """The name of the implementation that `quantized_matmul` runs. Arguments and errors as there."""
    if implementation is None:
        return next(name for name, module in IMPLEMENTATIONS.items() if module.declines(x, q) is None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if IMPLEMENTATIONS[implementation].declines(x, q) is not None:
        reasons = {name: module.declines(x, q) for name, module in IMPLEMENTATIONS.items()}
        told = "; ".join(f"{name}: {reason or 'can run'}" for name, reason in reasons.items())
        raise ValueError(f"implementation={implementation!r} cannot run here. {told}")
    return implementation


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
    y = reference.ragged_matmul(x, adapters.without(q), groups, preferred_element_type, precision)
    return y if q.adapter_in is None else y + adapters.ragged_matmul(x, q, groups, preferred_element_type, precision)
