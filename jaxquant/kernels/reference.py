"""The definition of every product with a quantized weight.

Divide the input by the channel scale, put it into the order of the codes, round it, dequantize the weight, multiply.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.activations import divide_channels, round_input, static_qparams
from jaxquant.numerics.affine import Qparams, scaled_dense, take_along
from jaxquant.numerics.qtensor import QTensor


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    del x
    return None if q.outlier_weight is None else "outliers are not told apart"


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """`[*lead, T, K] · [*lead, K, *out] -> [*lead, T, *out]`, see `kernels.matmul.quantized_matmul`."""

    def run(x, q):
        x, static = prepared(x, q)
        x = round_input(x, static, q.spec.activations)
        return product(x, scaled_dense(q).astype(q.dtype), preferred_element_type, precision)

    return jax.checkpoint(run)(x, q)  # or the dense weight would be kept for the derivative


def with_derivative(fn: Callable, x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """`fn(x, q, preferred_element_type)`, which computes what `matmul` does, with the derivative of `matmul`."""

    @jax.custom_jvp
    def run(x, q):
        return fn(x, q, preferred_element_type)

    @run.defjvp
    def derivative(primals, tangents):
        definition = lambda x, q: matmul(x, q, preferred_element_type, precision)  # noqa: E731
        return run(*primals), jax.jvp(definition, primals, tangents)[1]

    return run(x, q)


def product(x: jax.Array, w: jax.Array, preferred_element_type, precision=None) -> jax.Array:
    """`[*lead, T, K] · [*lead, K, *out] -> [*lead, T, *out]`."""
    lead = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (lead, lead))
    return lax.dot_general(x, w, dims, precision, preferred_element_type)


def prepared(x: jax.Array, q: QTensor) -> tuple[jax.Array, Qparams | None]:
    """Inputs `[*lead, T, K]` as they meet a weight's codes, and their static qparams, `[*lead, 1, 1]`.

    They are divided by its channel scale, and in its input order.
    """
    static, channels = jax.tree.map(
        lambda a: a.reshape(*a.shape[: x.ndim - 2], 1, -1), (static_qparams(q), q.channel_scale)
    )
    x = divide_channels(x, channels)
    return x if q.input_order is None else take_along(x, q.input_order, -1, x.ndim - 2), static


def ragged_matmul(x: jax.Array, q: QTensor, groups: jax.Array, preferred_element_type, precision) -> jax.Array:
    """`[T, K] · [E, K, N] -> [T, N]`, see `kernels.matmul.quantized_ragged_matmul`."""
    activations = q.spec.activations
    if q.outlier_weight is not None:
        raise ValueError("outliers of rows that belong to different experts are not told apart; use another method")
    if activations is not None and not activations.static and activations.granularity == "per_tensor":
        raise ValueError("a dynamic per_tensor range would be one for the rows of all experts; use per_token")

    def run(x, q, groups):
        static, channels, order = jax.tree.map(  # those of each row's expert
            lambda a: jnp.repeat(a.reshape(len(a), -1), groups, axis=0, total_repeat_length=len(x)),
            (static_qparams(q), q.channel_scale, q.input_order),
        )
        x = divide_channels(x, channels)
        x = x if order is None else jnp.take_along_axis(x, order, -1)
        x = round_input(x, static, activations)
        return lax.ragged_dot(x, scaled_dense(q).astype(q.dtype), groups, precision, preferred_element_type)

    return jax.checkpoint(run)(x, q, groups)


def varying_as(operands, out: jax.Array) -> jax.Array:
    """The result of a kernel, which inside `shard_map` does not know over which axes of a mesh it varies."""
    axes = {axis for a in jax.tree.leaves(operands) for axis in jax.typeof(a).manual_axis_type.varying}
    missing = tuple(sorted(axes - jax.typeof(out).manual_axis_type.varying))
    return lax.pcast(out, missing, to="varying") if missing else out
