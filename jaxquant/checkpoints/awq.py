"""AWQ checkpoints, `gemm` version: 4-bit weights as AutoAWQ, transformers and vLLM read them.

With groups of g inputs and G = K / g of them, a Linear `[out, in]` = (N, K) stores in place of its `weight`

    qweight  int32 [K, N / 8]: of each input, the codes + 8 along the outputs
    qzeros   int32 [G, N / 8]: of each group, the zero points + 8
    scales   float16 [G, N]

where the eight codes of a word, from its lowest four bits up, are those of the outputs 0, 2, 4, 6, 1, 3, 5, 7.

Sources: AutoAWQ, awq/modules/linear/gemm.py, awq/utils/packing_utils.py and awq/models/_config.py; vLLM,
layers/quantization/awq.py; transformers' AwqConfig; GPTQModel 7.7, whose files are read too.

Readers expect zero points. A symmetric weight is written with those of a symmetric one, and read back with them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.modules import (
    MODEL_DTYPES,
    HalfScaledTensors,
    Understood,
    check_codes,
    check_half_scaled,
    check_linears,
    check_read_back,
    check_understood,
    exactly,
    one_dtype,
    quantized_modules,
    read_group_size,
    write_config,
    write_quantized,
)
from jaxquant.checkpoints.words import pack_unsigned, unpack_signed
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec

METHOD = "awq"
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of the outputs in a word
HEAD = "lm_head"
WHERE = "quantization_config"
_TOP: Understood = {
    "quant_method": (METHOD,),
    "bits": (4,),
    "w_bit": (4,),
    "group_size": None,
    "q_group_size": None,
    "zero_point": (True, False),
    "version": ("gemm", "GEMM"),
    "method": (METHOD,),  # from here on, words of GPTQModel
    "format": ("gemm",),
    "checkpoint_format": ("gemm",),
    "pack_dtype": ("int32",),
    "desc_act": (False,),
    "lm_head": (True, False),  # the tensors tell which modules are quantized
    "dynamic": (None, {}),
    "modules_to_not_convert": None,  # the tensors tell which modules are quantized
    **dict.fromkeys(  # how others compute with the codes, or found them
        ("backend", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "quant_path", "meta")
    ),
}


def write_awq(
    directory: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, Any], classes: Mapping[str, str]
) -> None:
    """Writes tensors and config.json into an existing directory, and reads the codes and scales back to be sure.

    Arguments and errors as `write_compressed_tensors`; only Linears other than the output head may be quantized, all
    of them with the same groups.
    """
    quantized = quantized_modules(tensors, METHOD)
    check_linears(tensors, classes, _check_qtensor)
    if HEAD in quantized:
        raise ValueError(f"{HEAD} is quantized, which readers of {METHOD} do not expect; leave it as it is")
    _group_size(q.spec for q in quantized.values())
    dtype = one_dtype(quantized)
    write_quantized(directory, tensors, quantized, pack)
    quantization_config = describe({module: q.spec for module, q in quantized.items()}, classes)
    write_config(directory, hf_config, dtype, quantization_config)
    check_read_back(directory, AWQTensors(directory, quantization_config, classes, tensors, dtype), quantized)


def _group_size(specs: Iterable[QuantSpec]) -> int:
    """The format's word for the groups of all weights; ValueError if they have several."""
    groups = sorted({spec.group_size or -1 for spec in specs})
    if len(groups) > 1:
        raise ValueError(f"weights have groups of {groups}, but the format has one group_size; use format='gptq'")
    return groups[0]


def describe(specs: Mapping[str, QuantSpec], classes: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` for quantized modules (name -> spec) among those of a model (name -> class)."""
    left = [m for m, kind in classes.items() if kind == "Linear" and m not in specs and m != HEAD]
    return {
        "quant_method": METHOD,
        "bits": 4,
        "group_size": _group_size(specs.values()),
        "zero_point": True,
        "version": "gemm",
        "backend": "autoawq",
        "modules_to_not_convert": left or None,
    }


class AWQTensors(HalfScaledTensors):
    """The tensors of an AWQ directory."""

    def _read_specs(self, quantization_config: Mapping[str, Any]) -> dict[str, QuantSpec]:
        spec = _read_config(quantization_config)
        for module in self._parts:
            self._check(module, spec)
        return dict.fromkeys(self._parts, spec)

    def _check(self, module: str, spec: QuantSpec) -> None:
        """Compares the parts of a weight with its spec."""
        _, shape = self._tensors.layout(f"{module}.qweight")
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{module}.qweight has shape {list(shape)}; expected two sizes")
        try:
            groups = spec.num_groups(shape[0])
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        self._expect(module, "qweight", "int32", shape)
        self._expect(module, "qzeros", "int32", (groups, shape[1]))
        self._expect(module, "scales", MODEL_DTYPES, (groups, 8 * shape[1]))
        left_over = sorted(self._parts[module] - {"qweight", "qzeros", "scales"})
        if left_over:
            raise ValueError(f"{module}.{left_over[0]} is not supported beside AWQ's codes")

    def _unpack(self, module: str) -> QTensor:
        name = f"{module}.weight"
        try:
            return unpack(self._read_parts(module), self.specs[name], self.dtype(name))
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """A QTensor of one matrix as the arrays of the format; its scales are float16's."""
    scales = exactly(q.scale, "float16")
    assert scales is not None
    return {"qweight": _words(q.unsigned_codes), "qzeros": _words(q.unsigned_zero_point), "scales": scales}


def unpack(arrays: Mapping[str, np.ndarray], spec: QuantSpec, dtype: str) -> QTensor:
    """The QTensor `[K, N]` of the arrays, with the scales' dtype: the inverse of `pack`. Shapes must be right.

    Raises:
      ValueError: symmetric codes have zero points.
    """
    zeros = _codes(arrays["qzeros"])
    if spec.symmetric and zeros.any():
        raise ValueError("qzeros holds other zero points than 8, but the quantization_config says zero_point=false")
    scale = jnp.asarray(arrays["scales"])
    return QTensor.from_codes(_codes(arrays["qweight"]), scale, None if spec.symmetric else zeros, spec, dtype=dtype)


def _words(unsigned: jax.Array) -> np.ndarray:
    """Codes `[rows, N]` in words `[rows, N / 8]`."""
    eights = unsigned.reshape(len(unsigned), -1, 8)[..., ORDER]
    return pack_unsigned(eights.reshape(unsigned.shape).T, 4)


def _codes(packed: np.ndarray) -> jax.Array:
    """Signed codes `[rows, N]` of words `[rows, N / 8]`."""
    eights = unpack_signed(packed, 8 * packed.shape[1], 4).T.reshape(len(packed), -1, 8)
    return eights[..., np.argsort(ORDER)].reshape(len(packed), -1)


def check_spec(spec: QuantSpec) -> None:
    """Raises ValueError, with the reason, for codes that the format cannot express."""
    check_codes(METHOD, spec, (4,))


def _check_qtensor(q: QTensor) -> None:
    check_spec(q.spec)
    if q.shape[1] % 8:
        raise ValueError(f"its shape is {list(q.shape)}, and the format packs multiples of 8 outputs")
    if q.input_order is not None:
        raise ValueError("its codes are not in the order of the inputs; use format='gptq'")
    check_half_scaled(q)


def _read_config(given: Mapping[str, Any]) -> QuantSpec:
    """The codes that a configuration describes; ValueError for a key or a value that is not understood."""
    check_understood(WHERE, given, _TOP)
    if "bits" not in given and "w_bit" not in given:
        raise ValueError(f"{WHERE}: bits is missing")
    group_size = read_group_size(WHERE, given.get("group_size", given.get("q_group_size", 128)))
    return QuantSpec(4, group_size, not given.get("zero_point", True))
