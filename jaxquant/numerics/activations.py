"""What happens to the input of a product with a quantized weight: channels are divided, then numbers are rounded."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import choose_qparams, decode, encode, fake_quantize
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
    _check(scale, activations)
    if scale is None:
        return fake_quantize(x, activations.spec, contract=_contract(activations), out=())
    spec = activations.spec
    wide, scale = x.astype(compute_dtype(x.dtype)), scale.astype(compute_dtype(x.dtype))
    codes = encode(lax.stop_gradient(wide), scale, None, spec).astype(wide.dtype)
    inside = jnp.clip(wide / scale, spec.min_code - 0.5, spec.max_code + 0.5)
    return ((codes + (inside - lax.stop_gradient(inside))) * scale).astype(x.dtype)


def encode_input(
    x: jax.Array, scale: jax.Array | None, activations: ActivationSpec
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The codes whose numbers `round_input` gives.

    Args:
      x, scale, activations: as there.

    Returns:
      Codes, int8 `[*lead, T, K]`, and their scales and zero points, in the dtype of x: `[*lead, T, 1]`, or
      `[*lead, 1, 1]` for one range. The zero point is None if symmetric.
    """
    _check(scale, activations)
    spec = dataclasses.replace(activations.spec, scale_dtype=x.dtype.name)
    zero_point = None
    if scale is None:
        axes = {"contract": _contract(activations), "out": ()}
        scale, zero_point = choose_qparams(x, spec, **axes)
        scale, zero_point = jax.tree.map(lambda a: a.reshape(*x.shape[:-2], -1, 1), (scale, zero_point))
    return encode(x, scale, zero_point, spec), scale, zero_point


def _check(scale: jax.Array | None, activations: ActivationSpec) -> None:
    if activations.static and scale is None:
        raise ValueError("static activations need a QTensor with an input_scale; quantize_params puts it there")


def _contract(activations: ActivationSpec) -> tuple[int, ...]:
    """The axes of an input that share a dynamic range."""
    return (-1,) if activations.granularity == "per_token" else (-2, -1)


def static_scale(absmax: jax.Array, rows: jax.Array, spec: QuantSpec, dtype) -> jax.Array | None:
    """The static scale of a product's inputs.

    Args:
      absmax: how far each channel reaches, `[K]`.
      rows: a sample of the inputs, `[T, K]`; rows of zeros are not counted.
      spec: that of the weight; its activations say how the range is chosen.
      dtype: of the result.

    Returns:
      `[1, 1]`; None unless ranges are static.
    """
    activations = spec.activations
    if activations is None or not activations.static:
        return None
    codes = dataclasses.replace(activations.spec, scale_dtype=jnp.dtype(dtype).name)
    reach, real = jnp.max(absmax), jnp.any(rows != 0, -1, keepdims=True)
    if activations.range == "percentile":
        found = jnp.nanquantile(jnp.where(real, jnp.abs(rows), jnp.nan), PERCENTILE / 100)
    elif activations.range == "mse":
        found = _closest(reach, rows, codes)
    else:
        found = reach
    reach = jnp.where(jnp.any(real), jnp.minimum(found, reach), reach)
    return choose_qparams(reach[None, None], codes)[0]


def with_input_scale(q: QTensor, inputs: InputStatistics) -> QTensor:
    """A QTensor `[K, N]` with the static scale of its inputs, if it has one."""
    if q.channel_scale is not None:
        inputs = divided(inputs, q.channel_scale[:, 0])
    return dataclasses.replace(q, input_scale=static_scale(inputs.absmax, inputs.held_out, q.spec, q.scale.dtype))


def _closest(reach: jax.Array, rows: jax.Array, codes: QuantSpec) -> jax.Array:
    """The range, of those that are a share of `reach`, with the smallest squared error of the rounded rows."""

    def error(share):
        scale, _ = choose_qparams((share * reach)[None, None], codes)
        return jnp.sum(jnp.square(decode(encode(rows, scale, None, codes), scale, None, rows.dtype) - rows))

    shares = 1 - jnp.arange(SHRINKS, dtype=rows.dtype) / SHRINKS
    return shares[jnp.argmin(lax.map(error, shares))] * reach
