"""The arrays of one weight in compressed-tensors' `int-quantized` layout, for weights whose inputs are rounded too.

A Linear `[out, in]` = (N, K) stores

    weight             int8 [N, K], the codes, one per byte whatever their width
    weight_scale       [N, G], G = K / group_size, or 1 per channel; in the model's dtype
    weight_zero_point  int8 [N, G], where the weights are asymmetric
    input_scale        [1], the scale of the inputs' codes where their range is static; in the model's dtype
    input_zero_point   int8 [1], where that range is asymmetric

and nothing for ranges that are found at run time.

Source: compressed-tensors 0.20, compressors/naive_quantized and quantization/lifecycle/initialize.py. Some releases
also write `input_zero_point` beside symmetric inputs, as a zero.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec

FORMAT = "int-quantized"
INPUT_ZERO = "input_zero_point"
DTYPES = {"weight": "int8", "weight_zero_point": "int8", INPUT_ZERO: "int8"}  # scales are floats
REQUIRED = {"weight"}
PARTS = ("weight_scale", "weight_zero_point", "input_scale", INPUT_ZERO)  # beside `weight`, which floats have too


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """A QTensor of one matrix as the arrays of the format."""
    arrays = {"weight": q.codes.T, "weight_scale": q.scale.T}
    if q.zero_point is not None:
        arrays["weight_zero_point"] = q.zero_point.T
    if q.input_scale is not None:
        arrays["input_scale"] = q.input_scale.reshape(1)
    if q.input_zero_point is not None:
        arrays[INPUT_ZERO] = q.input_zero_point.reshape(1)
    return {part: np.ascontiguousarray(np.asarray(a)) for part, a in arrays.items()}


def unpack(arrays: Mapping[str, np.ndarray], spec: QuantSpec) -> QTensor:
    """The QTensor `[K, N]` of the arrays: the inverse of `pack`, with the scale's dtype. Shapes must be right.

    Raises:
      ValueError: a code is outside its width, or the zero point of symmetric inputs is not zero.
    """
    activations = spec.activations
    assert activations is not None
    if activations.symmetric and np.any(arrays.get(INPUT_ZERO, 0)):
        raise ValueError(f"{INPUT_ZERO}={arrays[INPUT_ZERO].tolist()} beside symmetric inputs is not supported")
    for part, width in (("weight", spec), ("weight_zero_point", spec), (INPUT_ZERO, activations.spec)):
        if part in arrays and not width.min_code <= arrays[part].min() <= arrays[part].max() <= width.max_code:
            reach = f"from {arrays[part].min()} to {arrays[part].max()}"
            raise ValueError(f"{part} has codes {reach}, which {width.bits} bits do not hold")
    codes, scale = (jnp.asarray(arrays[part].T) for part in ("weight", "weight_scale"))
    zeros = None if spec.symmetric else jnp.asarray(arrays["weight_zero_point"].T)
    q = QTensor.from_codes(codes, scale, zeros, spec, dtype=scale.dtype)
    if not spec.static_activations:
        return q
    input_scale, zero = (
        jnp.asarray(arrays[p].reshape(1, 1)) if p in arrays else None for p in ("input_scale", INPUT_ZERO)
    )
    return dataclasses.replace(q, input_scale=input_scale, input_zero_point=None if activations.symmetric else zero)


def shapes(n: int, k: int, spec: QuantSpec) -> dict[str, list[tuple[int, ...]]]:
    """The parts that a weight has, and the shapes that each may have."""
    groups = spec.num_groups(k)
    parts: dict[str, list[tuple[int, ...]]] = {"weight": [(n, k)], "weight_scale": [(n, groups)]}
    if not spec.symmetric:
        parts["weight_zero_point"] = [(n, groups)]
    if spec.static_activations:
        parts["input_scale"] = [(1,)]
        if spec.activations is not None and not spec.activations.symmetric:
            parts[INPUT_ZERO] = [(1,)]
    return parts
