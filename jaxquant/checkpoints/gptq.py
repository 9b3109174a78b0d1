"""GPTQ checkpoints: integer weights as AutoGPTQ, GPTQModel, transformers and vLLM read them.

With b bits, groups of g inputs and G = K / g of them, a Linear `[out, in]` = (N, K) stores in place of its `weight`

    qweight  int32 [K·b / 32, N]: of each output, the codes + 2^(b-1) along the inputs, a dense bitstream
    qzeros   int32 [G, N·b / 32]: of each group, the zero points along the outputs, a stream as above
    scales   float16 [G, N]
    g_idx    int32 [K], the group of each input

so K and N are multiples of 32. In `gptq` (v1) the stream of zero points holds each minus one, in `gptq_v2` as it is.

Sources: AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel, nn_modules/qlinear and utils/model.py; vLLM,
layers/quantization/gptq.py.

Readers and writers of v1 disagree as soon as a zero point is 0, and GPTQModel refuses asymmetric v1 files of others. So
symmetric models are written as v1, which all read, and asymmetric ones as v2. Both are read, a stored field f of v1 as
(f + 1) mod 2^b, which is what vLLM and AutoGPTQ make of it.

Where `g_idx` does not ascend (`desc_act`, act-order without static groups), the rows of codes are put into the order of
their groups, and the QTensor has an `input_order`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.gptq_config import COPY, V1, V2, check_spec, describe, read_config, version_of
from jaxquant.checkpoints.group_index import ascends, groups_of_inputs, in_order_of_groups, in_order_of_inputs
from jaxquant.checkpoints.modules import (
    MODEL_DTYPES,
    HalfScaledTensors,
    check_half_scaled,
    check_linears,
    check_read_back,
    exactly,
    one_dtype,
    quantized_modules,
    write_config,
    write_quantized,
)
from jaxquant.checkpoints.words import pack_codes, pack_unsigned, unpack_signed, unpack_values, words
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec


def write_gptq(
    directory: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, Any], classes: Mapping[str, str]
) -> None:
    """Writes tensors and configurations into an existing directory, and reads them back to be sure.

    Arguments and errors as `write_compressed_tensors`; only Linears may be quantized.
    """
    quantized = quantized_modules(tensors, "gptq")
    check_linears(tensors, classes, _check_qtensor)
    dtype = one_dtype(quantized)
    specs = {module: q.spec for module, q in quantized.items()}
    version, act_order = version_of(specs), any(q.input_order is not None for q in quantized.values())
    write_quantized(directory, tensors, quantized, lambda q: pack(q, version))
    quantization_config = describe(specs, classes, act_order=act_order)
    write_config(directory, hf_config, dtype, quantization_config, COPY)
    check_read_back(directory, GPTQTensors(directory, quantization_config, classes, tensors, dtype), quantized)


class GPTQTensors(HalfScaledTensors):
    """The tensors of a GPTQ directory."""

    def _read_specs(self, quantization_config: Mapping[str, Any]) -> dict[str, QuantSpec]:
        self._config = read_config(quantization_config)
        specs = {module: self._config.spec(module) for module in self._parts}
        for module, spec in specs.items():
            self._check(module, spec)
        self._reordered = not all(self._ascends(module) for module in specs)
        if self._reordered and not self._config.act_order:
            raise ValueError(
                f"{self._directory}: a g_idx does not ascend, but the quantization_config says desc_act=false"
            )
        return specs

    def _check(self, module: str, spec: QuantSpec) -> None:
        """Compares the parts of a weight with its spec."""
        k, n = self._matrix_shape(module, spec.bits)
        try:
            groups = spec.num_groups(k)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        self._expect(module, "qweight", "int32", (words(k, spec.bits), n))
        self._expect(module, "qzeros", "int32", (groups, words(n, spec.bits)))
        self._expect(module, "scales", MODEL_DTYPES, (groups, n))
        if "g_idx" in self._parts[module]:
            self._expect(module, "g_idx", "int32", (k,))
        elif self._config.act_order:
            raise ValueError(f"{module}.g_idx is missing, but the quantization_config says desc_act=true")
        left_over = sorted(self._parts[module] - {"qweight", "qzeros", "scales", "g_idx"})
        if left_over:
            raise ValueError(f"{module}.{left_over[0]} is not supported beside GPTQ's codes")

    def _matrix_shape(self, module: str, bits: int) -> tuple[int, int]:
        """Inputs and outputs of a weight."""
        _, shape = self._tensors.layout(f"{module}.qweight")
        if len(shape) != 2 or 0 in shape or shape[0] * 32 % bits or shape[1] % 32 or shape[0] * 32 // bits % 32:
            raise ValueError(
                f"{module}.qweight has shape {list(shape)}, which are no codes of {bits} bits; "
                "inputs and outputs must be multiples of 32"
            )
        return shape[0] * 32 // bits, shape[1]

    def _ascends(self, module: str) -> bool:
        """Whether the groups of a weight follow one another. ValueError unless all are of one size."""
        if "g_idx" not in self._parts[module]:
            return True
        _, (groups, _) = self._tensors.layout(f"{module}.scales")
        return ascends(f"{module}.g_idx", self._tensors[f"{module}.g_idx"], groups)

    def _unpack(self, module: str) -> QTensor:
        name, arrays = f"{module}.weight", self._read_parts(module)
        try:
            q = unpack(arrays, self.specs[name], self._config.version, self.dtype(name))
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        if self._reordered and "g_idx" in arrays and q.spec.group_size is not None:
            return in_order_of_groups(q, arrays["g_idx"])
        return q


def pack(q: QTensor, version: str) -> dict[str, np.ndarray]:
    """A QTensor of one matrix as the arrays of the format, of the version `V1` or `V2`; its scales are float16's."""
    zeros = q.unsigned_zero_point if version == V2 else q.unsigned_zero_point - jnp.uint8(1)
    scales = exactly(q.scale, "float16")
    assert scales is not None
    return {
        "qweight": np.ascontiguousarray(pack_codes(in_order_of_inputs(q)).T),
        "qzeros": pack_unsigned(zeros.T, q.spec.bits),
        "scales": scales,
        "g_idx": groups_of_inputs(q),
    }


def unpack(arrays: Mapping[str, np.ndarray], spec: QuantSpec, version: str, dtype: str) -> QTensor:
    """The QTensor `[K, N]` of the arrays, with the scales' dtype, whose codes lie in the order of the inputs.

    Args:
      arrays: by the last part of their names, of the right shapes. `g_idx` is not looked at.
      spec: of the codes.
      version: `V1` or `V2`.
      dtype: that of the weight it stands for.

    Raises:
      ValueError: symmetric codes have zero points.
    """
    qweight, scales, half = arrays["qweight"], arrays["scales"], 2 ** (spec.bits - 1)
    k = qweight.shape[0] * 32 // spec.bits
    zeros = np.asarray(unpack_signed(arrays["qzeros"], qweight.shape[1], spec.bits)).T
    if version == V1:
        zeros = ((zeros.astype(np.int16) + 1 + half) % (2 * half) - half).astype(np.int8)
    if spec.symmetric and zeros.any():
        raise ValueError(f"qzeros holds other zero points than {half}, but the quantization_config says sym=true")
    values = unpack_values(np.ascontiguousarray(qweight.T), k, spec)
    zero_point = None if spec.symmetric else jnp.asarray(zeros)
    return QTensor(values, jnp.asarray(scales), zero_point, spec, dtype, (-2,), (-1,), (k,))


def _check_qtensor(q: QTensor) -> None:
    check_spec(q.spec)
    if any(size % 32 for size in q.shape):
        raise ValueError(f"its shape is {list(q.shape)}, and the format packs multiples of 32 inputs and outputs")
    check_half_scaled(q)
