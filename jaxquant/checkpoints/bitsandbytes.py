"""bitsandbytes checkpoints of LLM.int8(): 8-bit weights as transformers reads them.

A Linear `[out, in]` = (N, K) stores

    weight         int8 [N, K], the codes, -127 to 127
    SCB            float32 [N], the largest size in each row: the weight is weight · SCB · (1 / 127)
    weight_format  uint8, 0 for this order of the codes

and all inputs of the model are rounded as they come, but for the channels that reach `llm_int8_threshold`. Those are
multiplied with dequantized codes: no float weights are kept.

Sources: bitsandbytes 0.50, nn/modules.py (Linear8bitLt, Int8Params) and backends/default/ops.py; transformers'
BitsAndBytesConfig.

SCB · (1 / 127) is rounded to float32, where two SCB share one number in sixty. An SCB from elsewhere may be written as
 its neighbour, which stands for the same weight.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.modules import (
    MODEL_DTYPES,
    QuantizedTensors,
    Understood,
    check_linears,
    check_read_back,
    check_understood,
    one_dtype,
    quantized_modules,
    write_config,
    write_quantized,
)
from jaxquant.checkpoints.tensors import check_scale
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec, QuantSpec

METHOD = "bitsandbytes"
FLOAT32 = np.float32
STEP = FLOAT32(1 / 127)
_TOP: Understood = {
    "quant_method": (METHOD,),
    "load_in_8bit": (True,),
    "load_in_4bit": (False,),
    "_load_in_8bit": (True,),
    "_load_in_4bit": (False,),
    "llm_int8_threshold": None,
    "llm_int8_has_fp16_weight": (False,),
    "llm_int8_skip_modules": None,  # the tensors tell which modules are quantized
    "llm_int8_enable_fp32_cpu_offload": None,
    **dict.fromkeys(  # for 4 bits
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
    ),
}


def write_bitsandbytes(
    directory: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, Any], classes: Mapping[str, str]
) -> None:
    """Writes tensors and config.json into an existing directory, and reads the codes and scales back to be sure.

    Arguments and errors as `write_compressed_tensors`; only Linears may be quantized, all with the same rounded inputs.
    """
    quantized = quantized_modules(tensors, METHOD)
    check_linears(tensors, classes, _check_qtensor)
    _one_threshold(q.spec for q in quantized.values())
    dtype = one_dtype(quantized)
    write_quantized(directory, tensors, quantized, pack)
    quantization_config = describe({module: q.spec for module, q in quantized.items()}, classes)
    write_config(directory, hf_config, dtype, quantization_config)
    check_read_back(directory, BitsAndBytesTensors(directory, quantization_config, classes, tensors, dtype), quantized)


def _one_threshold(specs: Iterable[QuantSpec]) -> float:
    """The threshold of all weights; ValueError if they have several."""
    thresholds = {_threshold(spec) for spec in specs}
    if len(thresholds) > 1:
        raise ValueError(f"weights have thresholds of {sorted(thresholds)}, but the format has one for all")
    return float(thresholds.pop())  # transformers does not take an integer


def describe(specs: Mapping[str, QuantSpec], classes: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` for quantized modules (name -> spec) among those of a model (name -> class)."""
    skipped = [m for m, kind in classes.items() if kind == "Linear" and m not in specs]
    return {
        "quant_method": METHOD,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "_load_in_8bit": True,
        "_load_in_4bit": False,
        "llm_int8_threshold": _one_threshold(specs.values()),
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }


class BitsAndBytesTensors(QuantizedTensors):
    """The tensors of a bitsandbytes directory. Arguments as `HalfScaledTensors`."""

    def __init__(
        self,
        directory: Path,
        quantization_config: Mapping[str, Any],
        classes: Mapping[str, str],
        names: Collection[str],
        model_dtype: str | None,
    ):
        super().__init__(directory, {"SCB"})
        self._dtype = model_dtype if model_dtype in MODEL_DTYPES else "float16"  # what weights are cast to first
        activations = _read_config(quantization_config)
        scale_dtype = None if self._dtype == "float32" else "float32"
        spec = QuantSpec(8, narrow_range=True, scale_dtype=scale_dtype, activations=activations)
        self._check_linears(classes)
        for module in self._parts:
            self._check(module)
        self.specs = {f"{module}.weight": spec for module in self._parts}

    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, or of the weight that a QTensor stands for."""
        return self._tensors.dtype(name) if name in self._plain else self._dtype

    def _check(self, module: str) -> None:
        _, shape = self._tensors.layout(f"{module}.SCB")
        if len(shape) != 1 or 0 in shape:
            raise ValueError(f"{module}.SCB has shape {list(shape)}; expected one number for each output")
        weight = self._tensors.layout(f"{module}.weight")[1] if "weight" in self._parts[module] else ()
        self._expect(module, "SCB", "float32", shape)
        self._expect(module, "weight", "int8", (*shape, *weight[1:2]))
        left_over = sorted(self._parts[module] - {"weight", "SCB", "weight_format"})
        if left_over:
            raise ValueError(f"{module}.{left_over[0]} is not supported beside bitsandbytes' codes")
        if "weight_format" in self._parts[module]:
            self._expect(module, "weight_format", "uint8", ())
            if self._tensors[f"{module}.weight_format"] != 0:
                raise ValueError(f"{module}.weight_format is not 0, the only one that bitsandbytes reads too")

    def _unpack(self, module: str) -> QTensor:
        codes, largest = (self._tensors[f"{module}.{part}"] for part in ("weight", "SCB"))
        check_scale(f"{module}.SCB", largest)
        try:
            return unpack(codes, largest, self.specs[f"{module}.weight"], self._dtype)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """A QTensor of one matrix as the arrays of the format."""
    largest = _largest(np.asarray(q.scale))
    assert largest is not None
    codes = np.ascontiguousarray(np.asarray(q.codes).T)
    return {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}


def unpack(codes: np.ndarray, largest: np.ndarray, spec: QuantSpec, dtype: str) -> QTensor:
    """The QTensor `[K, N]` of codes `[N, K]` and the largest size in each row; ValueError for a code of -128."""
    if codes.size and codes.min() < spec.min_code:
        raise ValueError(f"weight has a code of {codes.min()}, and the smallest is {spec.min_code}")
    scale = jnp.asarray((largest * STEP)[None])
    q = QTensor.from_codes(jnp.asarray(np.ascontiguousarray(codes.T)), scale, None, spec, dtype=dtype)
    if _threshold(spec) == 0:
        return q
    index, rows = jnp.zeros((0, 1), jnp.int32), jnp.zeros((0, len(codes)), dtype)
    return dataclasses.replace(q, outlier_index=index, outlier_weight=rows)


def check_spec(spec: QuantSpec) -> None:
    """Raises ValueError, with the reason, for codes that the format cannot express."""
    reason, inputs = None, spec.activations
    if (spec.bits, spec.symmetric, spec.granularity) != (8, True, "per_channel"):
        reason = "its weights are symmetric 8-bit codes with a scale for each output"
    elif not spec.narrow_range:
        reason = "its codes reach from -127 to 127; quantize with narrow_range=True"
    elif inputs is None or (inputs.bits, inputs.symmetric, inputs.granularity) != (8, True, "per_token"):
        reason = "its readers round inputs to 8 bits for each token; quantize by LLMInt8"
    if reason:
        raise ValueError(f"cannot be written as {METHOD}: {reason}")


def _check_qtensor(q: QTensor) -> None:
    check_spec(q.spec)
    if q.input_order is not None:
        raise ValueError("its codes are not in the order of the inputs; use another format")
    if q.dtype not in MODEL_DTYPES:
        raise ValueError(f"it stands for {q.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")
    if q.outlier_index is not None and (np.asarray(q.outlier_index) < q.shape[0]).any():
        raise ValueError("it keeps float weights of outliers; quantize by LLMInt8(outliers=0) for this format")
    if _largest(np.asarray(q.scale)) is None:
        raise ValueError(f"its {q.scale.dtype} scales are no float32 numbers over 127; quantize with narrow_range=True")


def _largest(scale: np.ndarray) -> np.ndarray | None:
    """Float32 numbers that give some scales `[1, N]` when they are multiplied with `STEP`; None where one has none."""
    exact = scale[0].astype(np.float64)
    nearest = (exact * 127).astype(FLOAT32)
    found = nearest
    for candidate in (np.nextafter(nearest, FLOAT32(0)), np.nextafter(nearest, FLOAT32(np.inf))):
        found = np.where(found * STEP == exact, found, candidate)
    return found if np.array_equal(found * STEP, exact) else None


def _threshold(spec: QuantSpec) -> float:
    """From which on an input is an outlier; 0 where none is, as in the configuration."""
    assert spec.activations is not None
    return spec.activations.outlier_threshold or 0.0


def _read_config(given: Mapping[str, Any]) -> ActivationSpec:
    """How a configuration rounds inputs; ValueError for a key or a value that is not understood."""
    where = "quantization_config"
    check_understood(where, given, _TOP)
    if not given.get("load_in_8bit", given.get("_load_in_8bit", False)):
        raise ValueError(f"{where}: only load_in_8bit=true is read of {METHOD}")
    threshold = given.get("llm_int8_threshold", 6.0)
    if type(threshold) not in (int, float) or not 0 <= threshold < np.inf:
        raise ValueError(f"{where}: llm_int8_threshold={threshold!r} is not supported; expected a size, or 0 for none")
    return ActivationSpec(outlier_threshold=float(threshold) or None)
