"""The definition of every product with a quantized weight: round the input, dequantize the weight, multiply."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import decode, encode, fake_quantize, per_code
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec, compute_dtype


def dense(q: QTensor) -> jax.Array:
    """The weight in canonical layout, `[*lead, K, *out]`, in `q.dtype`."""
    codes, n_out = q.codes, len(q.out)
    return decode(codes, *per_code(q.scale, q.zero_point, codes.shape, n_out)).astype(q.dtype)


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """`[*lead, T, K] · [*lead, K, *out] -> [*lead, T, *out]`, see `kernels.matmul.quantized_matmul`."""
    lead = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (lead, lead))
    scale = None if q.input_scale is None else q.input_scale.reshape(*q.input_scale.shape[: x.ndim - 2], 1, 1)
    return lax.dot_general(round_input(x, scale, q.spec.activations), dense(q), dims, precision, preferred_element_type)


def ragged_matmul(x: jax.Array, q: QTensor, groups: jax.Array, preferred_element_type, precision) -> jax.Array:
    """`[T, K] · [E, K, N] -> [T, N]`, see `kernels.matmul.quantized_ragged_matmul`."""
    scale, activations = q.input_scale, q.spec.activations
    if activations is not None and not activations.static and activations.granularity == "per_tensor":
        raise ValueError("a dynamic per_tensor range would be one for the rows of all experts; use per_token")
    if scale is not None:  # that of each row's expert
        scale = jnp.repeat(scale.reshape(-1, 1), groups, axis=0, total_repeat_length=len(x))
    return lax.ragged_dot(round_input(x, scale, activations), dense(q), groups, precision, preferred_element_type)


def round_input(x: jax.Array, scale: jax.Array | None, activations: ActivationSpec | None) -> jax.Array:
    """The inputs that the codes of a product's input stand for.

    The derivative is straight-through: 1 where x is no more than half a step beyond the codes, 0 elsewhere. A dynamic
    range is that of x itself, so nothing lies further out, and its scale is differentiated too.

    Args:
      x: float `[*lead, T, K]`.
      scale: static ranges: the scale of the codes, which broadcasts with x. Else None.
      activations: None returns x as it is.

    Returns:
      The shape and dtype of x.

    Raises:
      ValueError: a static range without a scale.
    """
    if activations is None:
        return x
    if activations.static and scale is None:
        raise ValueError("static activations need a QTensor with an input_scale; quantize_params puts it there")
    if scale is None:
        contract = (-1,) if activations.granularity == "per_token" else (-2, -1)
        return fake_quantize(x, activations.spec, contract=contract, out=())
    spec = activations.spec
    wide, scale = x.astype(compute_dtype(x.dtype)), scale.astype(compute_dtype(x.dtype))
    codes = encode(lax.stop_gradient(wide), scale, None, spec).astype(wide.dtype)
    inside = jnp.clip(wide / scale, spec.min_code - 0.5, spec.max_code + 0.5)
    return ((codes + (inside - lax.stop_gradient(inside))) * scale).astype(x.dtype)
