"""The textbook formulas: ranges to scales, numbers to codes, and back.

With signed codes in [min_code, max_code] and `steps` between them:

    symmetric    S = max|x| / (steps / 2),                         Z = 0
    asymmetric   S = (max(x, 0) - min(x, 0)) / steps,              Z = clamp(round(min_code - min(x, 0) / S))
    x_q = clamp(round(x / S) + Z),    x ≈ S · (x_q - Z)

A range of zero takes S = 1, so zeros stay zeros, and S is never too small to be stored or to have a reciprocal. 0.0 is
always represented exactly. S is rounded to its storage dtype before any code is chosen, so the codes are the best ones
for the scale that is kept. (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; the full symmetric range, 7.5 steps each side at 4 bits, is that of GPTQ and
compressed-tensors.)

In floating point, x / S is x · (1 / S) and max|x| / (steps / 2) is max|x| · (2 / steps), each of the two operations
rounded. XLA compiles a division by a broadcast number to that anyway, but only where it sees the broadcast, and in the
full symmetric range the extreme of every group lies half way between two codes: written as a division, the same
weights would get other codes in another program.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import adapters
from jaxquant.numerics.layout import check_layout, from_canonical, to_canonical
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec, compute_dtype

Qparams = tuple[jax.Array, jax.Array | None]  # scales and zero points; None if symmetric


def choose_qparams(
    x: jax.Array, spec: QuantSpec, *, contract: Sequence[int] | None = None, out: Sequence[int] | None = None
) -> Qparams:
    """Scales and zero points from the extremes of the data.

    Args:
      x: float, any shape.
      spec: granularity, bits and symmetry.
      contract: negative axes that share scales. Default: `(-2,)` (a weight `[..., in, out]`); `(-1,)` for per_token
        specs and one-dimensional arrays.
      out: negative output axes. Default: `(-1,)`, or none where `contract` defaults to `(-1,)`. Axes in neither are
        leading ones, quantized independently.

    Returns:
      `(scale, zero_point)`, both `[*lead, groups, *out]`; scale in `spec.scale_dtype` or x's dtype, zero_point int8 or
      None if symmetric.

    Raises:
      ValueError: the group size does not divide the contracting axes, or the axes are no layout.
      TypeError: x is not floating.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> scale, zero_point = jq.choose_qparams(jnp.array([[-3.0], [12.0]]), jq.int4(symmetric=False))
      >>> scale.tolist(), zero_point.tolist()  # 16 codes from -3 to 12
      ([[1.0]], [[-5]])
    """
    contract, out = resolve_axes(x, spec, contract, out)
    return _choose(to_canonical(x, contract, out), spec, len(out))


def quantize(
    x: jax.Array, spec: QuantSpec, *, contract: Sequence[int] | None = None, out: Sequence[int] | None = None
) -> QTensor:
    """Rounds an array to codes, with scales from its own extremes. Arguments and errors as `choose_qparams`.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> q = jq.quantize(jnp.array([[-7.0, 1.4], [3.0, 0.6]]), jq.int4(narrow_range=True))
      >>> q.codes.tolist(), q.scale.shape  # a weight [in, out], one scale per output
      ([[-7, 7], [3, 3]], (1, 2))
    """
    contract, out = resolve_axes(x, spec, contract, out)
    w = to_canonical(x, contract, out)
    scale, zero_point = _choose(w, spec, len(out))
    codes = encode(w, *per_code(scale, zero_point, w.shape, len(out)), spec)
    axes = {"contract": contract, "out": out, "in_shape": tuple(x.shape[a] for a in contract)}
    return QTensor.from_codes(codes, scale, zero_point, spec, dtype=x.dtype, **axes)


def dequantize(q: QTensor, dtype=None) -> jax.Array:
    """The weight that the codes stand for, with its own axes, in `dtype` (default: `q.dtype`).

    It is computed in at least float32 and rounded once, to the result's dtype.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> q = jq.quantize(jnp.array([[-7.0], [3.2]]), jq.int4(narrow_range=True))
      >>> jq.dequantize(q).tolist()
      [[-7.0], [3.0]]
    """
    return from_canonical(dense(q), q.contract, q.out, q.in_shape).astype(dtype or q.dtype)


def dense(q: QTensor) -> jax.Array:
    """The weight that the codes stand for, in the canonical layout `[*lead, K, *out]`, in at least float32."""
    w = scaled_dense(q)
    if q.outlier_index is not None and q.outlier_weight is not None:
        axis = w.ndim - 1 - len(q.out)
        index = jnp.broadcast_to(q.outlier_index, q.outlier_weight.shape)
        w = jnp.put_along_axis(w, index, q.outlier_weight.astype(w.dtype), axis, inplace=False)
    if q.input_order is not None:
        axis = w.ndim - 1 - len(q.out)
        w = take_along(w, jnp.argsort(q.input_order, axis), axis - w.ndim, axis)
    if q.channel_scale is not None:
        w = w / q.channel_scale.astype(w.dtype)
    return w if q.adapter_in is None else w + adapters.dense(q).astype(w.dtype)


def scaled_dense(q: QTensor) -> jax.Array:
    """`(codes - zero_point) · scale`: as `dense`, but not divided by `channel_scale`, its rows in `input_order`."""
    codes = q.codes
    return decode(codes, *per_code(q.scale, q.zero_point, codes.shape, len(q.out)))


def fake_quantize(
    x: jax.Array, spec: QuantSpec, *, contract: Sequence[int] | None = None, out: Sequence[int] | None = None
) -> jax.Array:
    """Quantizes and dequantizes, with a straight-through derivative (Bengio et al. 2013, arXiv:1308.3432).

    Rounding has derivative 1, and so has clamping: the range is that of x itself, so nothing lies further beyond the
    codes than the half step of rounding. The scale is a differentiable function of x. Arguments and errors as
    `choose_qparams`; the result has x's shape and dtype.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> spec, x = jq.int4(narrow_range=True), jnp.array([[-7.0], [3.2]])
      >>> jq.fake_quantize(x, spec).tolist()
      [[-7.0], [3.0]]
      >>> float(jax.grad(lambda x: jq.fake_quantize(x, spec)[1, 0])(x)[1, 0])  # straight through
      1.0
    """
    contract, out = resolve_axes(x, spec, contract, out)

    def rounded(x):
        w = to_canonical(x, contract, out).astype(compute_dtype(x.dtype))
        scale, zero = _range_to_scale(w, spec, len(out), jnp.dtype(spec.scale_dtype or x.dtype))
        scale, zero = per_code(scale.astype(w.dtype), lax.stop_gradient(zero), w.shape, len(out))
        codes = _float_codes(*lax.stop_gradient((w, scale, zero)), spec)
        steps = w * (1 / scale)
        codes += steps - lax.stop_gradient(steps)  # zero, with the derivative of w / scale
        in_shape = tuple(x.shape[a] for a in contract)
        return from_canonical((codes - zero) * scale, contract, out, in_shape).astype(x.dtype)

    return _keeping_inputs_alone(rounded)(x)


def fake_quantize_to(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: QuantSpec) -> jax.Array:
    """Quantizes and dequantizes with given scales; the arrays broadcast elementwise.

    Rounding has derivative 1, and clamping 1 as far as half a step beyond the codes and 0 further out: whatever rounds
    to a code passes its gradient, the largest weight too. Scales and zero points are differentiated as in LSQ
    (arXiv:1902.08153) and LSQ+ (arXiv:2004.09576).

    Args:
      x: float.
      scale: positive.
      zero_point: whole numbers, of any dtype, or floats, which are rounded with derivative 1; None if symmetric.
      spec: of the codes.

    Returns:
      The dtype of x.
    """

    def rounded(x, scale, zero_point):
        wide, scale = x.astype(compute_dtype(x.dtype)), scale.astype(compute_dtype(x.dtype))
        zero = jnp.zeros_like(scale) if zero_point is None else _rounded(zero_point.astype(scale.dtype))
        codes = _float_codes(*lax.stop_gradient((wide, scale, zero)), spec)
        low, high = code_limits(spec, wide.dtype)
        inside = jnp.clip(wide * (1 / scale) + zero, low - 0.5, high + 0.5)
        return ((codes + (inside - lax.stop_gradient(inside)) - zero) * scale).astype(x.dtype)

    return _keeping_inputs_alone(rounded)(x, scale, zero_point)


def _keeping_inputs_alone(fn):
    """`fn`, which a derivative computes again from its inputs: reading its many intermediate results would take longer.

    Where it does not stand in a loop, XLA may still share what it computes twice.
    """
    return jax.checkpoint(fn, prevent_cse=False)


def _rounded(x):
    return lax.stop_gradient(jnp.round(x)) + (x - lax.stop_gradient(x))


def encode(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: QuantSpec) -> jax.Array:
    """clamp(round(x / scale) + zero_point) as int8; the arrays broadcast elementwise."""
    return _float_codes(x, scale, zero_point, spec).astype(jnp.int8)


def _float_codes(x, scale, zero_point, spec):
    dtype = compute_dtype(x.dtype)
    steps = jnp.round(x.astype(dtype) * (1 / scale.astype(dtype)))
    if zero_point is not None:
        steps += zero_point.astype(dtype)
    return jnp.clip(steps, *code_limits(spec, dtype))


def decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, dtype=None) -> jax.Array:
    """(codes - zero_point) · scale in `dtype` (default: at least float32); the arrays broadcast elementwise."""
    dtype = compute_dtype(scale.dtype) if dtype is None else dtype
    steps = codes.astype(dtype)
    if zero_point is not None:
        steps -= zero_point.astype(dtype)
    return steps * scale.astype(dtype)


def per_code(scale: jax.Array, zero_point: jax.Array | None, shape: tuple[int, ...], n_out: int) -> tuple[Any, Any]:
    """Repeats scales and zero points `[*lead, groups, *out]` to one per code of `shape` `[*lead, K, *out]`."""
    axis = len(shape) - 1 - n_out

    def repeated(a):
        grouped = (*shape[:axis], a.shape[axis], shape[axis] // a.shape[axis], *shape[axis + 1 :])
        return jnp.broadcast_to(jnp.expand_dims(a, axis + 1), grouped).reshape(shape)

    return jax.tree.map(repeated, (scale, zero_point))


def take_along(a: jax.Array, index: jax.Array, axis: int, leads: int) -> jax.Array:
    """Positions of a negative axis of `a` `[*lead, ...]`, by index `[*lead, n, 1, ...]` within bounds."""
    take = functools.partial(jnp.take, axis=axis, mode="clip")
    for _ in range(leads):
        take = jax.vmap(take)
    return take(a, index.reshape(*a.shape[:leads], -1))


def resolve_axes(x, spec, contract, out) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layout of `x`, with the defaults of `choose_qparams`; raises where there is none."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"only floating arrays can be quantized, not {x.dtype}{list(x.shape)}")
    rows = contract is None and (x.ndim == 1 or spec.granularity == "per_token")
    contract = ((-1,) if rows else (-2,)) if contract is None else tuple(contract)
    last = () if rows else tuple(a for a in (-2, -1) if a not in contract and -a <= x.ndim)
    out = last if out is None else tuple(out)
    check_layout(x.ndim, contract, out)
    spec.num_groups(math.prod(x.shape[a] for a in contract))
    return contract, out


def _choose(w, spec, n_out):
    dtype = jnp.dtype(spec.scale_dtype or w.dtype)
    scale, zero = _range_to_scale(w.astype(compute_dtype(w.dtype)), spec, n_out, dtype)
    return scale, None if spec.symmetric else zero.astype(jnp.int8)


def _range_to_scale(w, spec, n_out, scale_dtype):
    """Scale (rounded to its storage dtype) and float zero point of canonical `w`, both `[*lead, groups, *out]`."""
    if spec.symmetric:
        (half,) = _extremes(jnp.abs(w), spec, n_out, jnp.max)
        low = half
    else:
        low, high = _extremes(w, spec, n_out, jnp.min, jnp.max)
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        half = high * 0.5 - low * 0.5  # the whole could overflow
    scale = half_range_to_scale(half, spec, scale_dtype)
    if spec.symmetric:
        return scale, jnp.zeros(scale.shape, w.dtype)
    min_code, max_code = code_limits(spec, w.dtype)
    zero = jnp.round(min_code - low * (1 / scale.astype(w.dtype)))
    return scale, jnp.clip(zero, min_code, max_code)


def half_range_to_scale(half: jax.Array, spec: QuantSpec, scale_dtype) -> jax.Array:
    """The scale, rounded to its storage dtype, of ranges of which `half` (max|x| if symmetric) is half the width."""
    smallest = max(float(jnp.finfo(scale_dtype).smallest_subnormal), float(jnp.finfo(half.dtype).tiny))
    largest = min(float(jnp.finfo(d).max) for d in (scale_dtype, half.dtype))
    scale = jnp.clip(half * _two_over_steps(spec, half.dtype), smallest, largest)
    return jnp.where(half > 0, scale, jnp.ones_like(scale)).astype(scale_dtype)


def _two_over_steps(spec, dtype):
    """2 / steps, a scalar. It is divided here: a device may round the quotient of traced numbers otherwise."""
    if isinstance(spec.bits, int):
        return 2 / spec.steps
    return jnp.asarray([2 / (2**bits - 1 - spec.narrow_range) for bits in range(2, 9)], dtype)[spec.bits - 2]


def code_limits(spec, dtype):
    """The smallest and the largest code, scalars of `dtype`."""
    return jnp.asarray(spec.min_code, dtype), jnp.asarray(spec.max_code, dtype)


def _extremes(w, spec, n_out, *reductions):
    """What reductions make of each range of canonical `w`, `[*lead, groups, *out]` each."""
    axis = w.ndim - 1 - n_out
    if spec.granularity == "per_tensor":
        axes = tuple(range(axis, w.ndim))
        return [reduce(w, axes, keepdims=True) for reduce in reductions]
    groups = spec.num_groups(w.shape[axis])
    w = w.reshape(*w.shape[:axis], groups, w.shape[axis] // groups, *w.shape[axis + 1 :])
    return [reduce(w, axis + 1) for reduce in reductions]
