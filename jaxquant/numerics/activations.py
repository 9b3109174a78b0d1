"""What happens to the input of a product with a quantized weight: channels are divided, then numbers are rounded."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import Qparams, choose_qparams, decode, encode, fake_quantize, fake_quantize_to
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, compute_dtype
from jaxquant.numerics.statistics import InputStatistics, divided

PERCENTILE = 99.9  # of the inputs that a range of that kind covers
SHRINKS = 50  # ranges that are tried for the smallest error


def divide_channels(x: jax.Array, channel_scale: jax.Array | None) -> jax.Array:
    """`x` divided by channel scales that broadcast with it, in at least float32, in the dtype of x; by 1 for None."""
    if channel_scale is None:
        return x
    wide = compute_dtype(x.dtype)
    return (x.astype(wide) / channel_scale.astype(wide)).astype(x.dtype)


def static_qparams(q: QTensor) -> Qparams | None:
    """Scale and zero point of the codes of a weight's inputs, as they lie in the QTensor; None for dynamic ranges."""
    return None if q.input_scale is None else (q.input_scale, q.input_zero_point)


def round_input(x: jax.Array, static: Qparams | None, activations: ActivationSpec | None) -> jax.Array:
    """The inputs that the codes of a product's input stand for.

    The derivative is straight-through: 1 where x is no more than half a step beyond the codes, 0 elsewhere. A dynamic
    range is that of x itself, so nothing lies further out, and its scale is differentiated too.

    Args:
      x: float `[*lead, T, K]`.
      static: static ranges: the scale and zero point of the codes, which broadcast with x. Else None.
      activations: None returns x as it is.

    Returns:
      The shape and dtype of x.

    Raises:
      ValueError: a static range without a scale.
    """
    if activations is None:
        return x
    _check(static, activations)
    if static is None:
        return fake_quantize(x, activations.spec, contract=_contract(activations), out=())
    return fake_quantize_to(x, *static, activations.spec)


def encode_input(
    x: jax.Array, static: Qparams | None, activations: ActivationSpec
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The codes whose numbers `round_input` gives.

    Args:
      x, static, activations: as there.

    Returns:
      Codes, int8 `[*lead, T, K]`, and their scales and zero points, in the dtype of x: `[*lead, T, 1]`, or
      `[*lead, 1, 1]` for one range. The zero point is None if symmetric.
    """
    _check(static, activations)
    spec = dataclasses.replace(activations.spec, scale_dtype=x.dtype.name)
    if static is None:
        found = choose_qparams(x, spec, contract=_contract(activations), out=())
        static = jax.tree.map(lambda a: a.reshape(*x.shape[:-2], -1, 1), found)
    scale, zero_point = static
    return encode(x, scale, zero_point, spec), scale, zero_point


def _check(static: Qparams | None, activations: ActivationSpec) -> None:
    if activations.static and static is None:
        raise ValueError("static activations need a QTensor with an input_scale; quantize_params puts it there")


def _contract(activations: ActivationSpec) -> tuple[int, ...]:
    """The axes of an input that share a dynamic range."""
    return (-1,) if activations.granularity == "per_token" else (-2, -1)


def choose_static(inputs: InputStatistics, spec: QuantSpec, dtype) -> Qparams:
    """The scale and zero point, both `[1, 1]`, of a product's inputs.

    Args:
      inputs: statistics of one matrix' inputs; rows of zeros in the sample are not counted.
      spec: that of the weight; its activations are static, and say how the range is chosen.
      dtype: of the scale.
    """
    activations = spec.activations
    assert activations is not None
    codes = dataclasses.replace(activations.spec, scale_dtype=jnp.dtype(dtype).name)
    rows = inputs.held_out
    real = jnp.any(rows != 0, -1, keepdims=True)
    reach = jnp.stack([jnp.min(inputs.lowest), jnp.max(inputs.highest)])
    if activations.range == "percentile":
        found = _percentiles(jnp.where(real, rows, jnp.nan), activations.symmetric)
    elif activations.range == "mse":
        found = _closest(reach, rows, codes)
    else:
        found = reach
    reach = jnp.where(jnp.any(real), jnp.clip(found, reach[0], reach[1]), reach)
    return choose_qparams(reach[:, None], codes)


def with_static_qparams(q: QTensor, inputs: InputStatistics) -> QTensor:
    """A QTensor `[K, N]` with the scale and zero point of its inputs, if their range is static."""
    if not q.spec.static_activations:
        return q
    if q.channel_scale is not None:
        inputs = divided(inputs, q.channel_scale[:, 0])
    scale, zero_point = choose_static(inputs, q.spec, q.scale.dtype)
    return dataclasses.replace(q, input_scale=scale, input_zero_point=zero_point)


def _percentiles(rows: jax.Array, symmetric: bool) -> jax.Array:
    """The range `[2]` that leaves out the largest inputs, or as many at each end; NaNs are not counted."""
    outside = 1 - PERCENTILE / 100
    if symmetric:
        return jnp.nanquantile(jnp.abs(rows), 1 - outside) * jnp.array([-1, 1], rows.dtype)
    return jnp.nanquantile(rows, jnp.array([outside / 2, 1 - outside / 2], rows.dtype))


def _closest(reach: jax.Array, rows: jax.Array, codes: QuantSpec) -> jax.Array:
    """The range, of those that are a share of `reach`, with the smallest squared error of the rounded rows."""

    def error(share):
        scale, zero_point = choose_qparams((share * reach)[:, None], codes)
        return jnp.sum(jnp.square(decode(encode(rows, scale, zero_point, codes), scale, zero_point, rows.dtype) - rows))

    shares = 1 - jnp.arange(SHRINKS, dtype=rows.dtype) / SHRINKS
    return shares[jnp.argmin(lax.map(error, shares))] * reach
