"""The error that rounding makes in a product's output, on a sample of its inputs."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.activations import divide_channels, round_input, static_qparams
from jaxquant.numerics.affine import dense, scaled_dense
from jaxquant.numerics.qtensor import QTensor


def output_error(w: jax.Array, q: QTensor, x: jax.Array) -> jax.Array:
    """‖x̂Ŵ - xW‖², with inputs x̂ divided and rounded as the QTensor says.

    It is taken from x (Ŵ - W) and (x̂ - x) Ŵ, because the difference of two large products would lose it.

    Args:
      w: float `[K, N]`.
      q: what stands for it, with axes `[K, N]`.
      x: rows of inputs, `[T, K]`, whose dtype is that of the computation.
    """
    error = product(x, dense(q).astype(q.dtype).astype(x.dtype) - w.astype(x.dtype))
    if q.spec.activations is not None:
        x = divide_channels(x, None if q.channel_scale is None else q.channel_scale[:, 0])
        shift = round_input(x, static_qparams(q), q.spec.activations) - x
        error += product(shift, scaled_dense(q).astype(q.dtype))
    return energy(error)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x W in the dtype of x, as exactly as it goes."""
    return jnp.matmul(x, w.astype(x.dtype), precision=lax.Precision.HIGHEST)


def energy(y: jax.Array) -> jax.Array:
    """‖y‖²."""
    return jnp.sum(jnp.square(y))
