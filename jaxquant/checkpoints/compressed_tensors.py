"""compressed-tensors' `pack-quantized`: integer weights as vLLM and transformers read them.

The arrays of each weight are described in `pack_quantized`; `quantization_config` in config.json says which modules
have which bits and groups.

Only what the format can say is written: codes in the full range, one matrix per Linear, scales in the dtype
of the model (readers cast them to it).
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.compressed_tensors_config import check_spec, describe, find_spec, read_groups
from jaxquant.checkpoints.huggingface import CONFIG
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.pack_quantized import PARTS, old_words, pack, unpack, words
from jaxquant.checkpoints.tensors import Tensors, same_bits, write_tensors
from jaxquant.numerics.qtensor import QTensor, is_qtensor

MODEL_DTYPES = ("float32", "bfloat16", "float16")


def write_compressed_tensors(
    directory: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, Any], linears: Collection[str]
) -> None:
    """Writes tensors and config.json into an existing directory, and reads the codes and scales back to be sure.

    Args:
      directory: an existing directory without safetensors.
      hf_config: the model's config.json.
      tensors: by Hugging Face's names. Floating arrays `[out, in]` as they lie in a checkpoint; QTensors `[in, out]`
        under the names of the weights that they stand for ("model.layers.0.mlp.up_proj.weight").
      linears: every Linear module of the model, quantized or not, a tied output head included.

    Raises:
      ValueError: something cannot be expressed in the format, or nothing is quantized. Nothing has been written then.
      OSError: the disk refuses, or what it returns is not what was written.
    """
    quantized = {name.removesuffix(".weight"): leaf for name, leaf in tensors.items() if is_qtensor(leaf)}
    _check_expressible(tensors, quantized, linears)
    stored = {name: leaf for name, leaf in tensors.items() if not is_qtensor(leaf)}
    for module, q in quantized.items():
        stored |= {f"{module}.{part}": array for part, array in pack(q).items()}
    write_tensors(directory, stored)
    quantization_config = describe({module: q.spec for module, q in quantized.items()}, linears)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]  # transformers 5 and 4
    dtype = next(iter(quantized.values())).dtype
    config = {**hf_config, **dict.fromkeys(dtype_keys, dtype), "quantization_config": quantization_config}
    write_json(directory / CONFIG, config)
    read = CompressedTensors(directory, quantization_config)
    for module, q in quantized.items():
        again = read[f"{module}.weight"]
        if not all(same_bits(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True)):
            raise OSError(f"{directory}: {module} reads back differently from what was written; check the disk")


class CompressedTensors(Mapping[str, Any]):
    """The tensors of a pack-quantized directory by name, each read when it is asked for.

    Quantized weights are QTensors `[in, out]` under the name of the weight, others NumPy arrays `[out, in]` as stored.

    Attributes:
      specs: of the quantized weights, by name.

    Raises, when it is made:
      FileNotFoundError, ValueError: as `Tensors`; or the configuration is not understood, or does not fit the tensors.
    """

    def __init__(self, directory: Path, quantization_config: Mapping[str, Any]):
        self._tensors = Tensors(directory)
        groups = read_groups(quantization_config)
        modules = {name.removesuffix(".weight_packed") for name in self._tensors if name.endswith(".weight_packed")}
        self._plain = set()
        for name in self._tensors:
            module, _, part = name.rpartition(".")
            if module not in modules or part == "bias":
                self._plain.add(name)
            elif part not in PARTS:
                raise ValueError(f"{directory}: {name} beside packed codes is not supported")
        self.specs = {f"{module}.weight": find_spec(module, groups) for module in sorted(modules)}
        self._in_features = {name: self._check(name) for name in self.specs}
        dtypes = {self._tensors.layout(f"{name}_scale")[0] for name in self.specs}
        if not dtypes <= {*MODEL_DTYPES} or len(dtypes) > 1:
            raise ValueError(f"{directory}: scales of {sorted(dtypes)}; expected one of {', '.join(MODEL_DTYPES)}")

    def __getitem__(self, name: str) -> Any:
        if name in self._plain:
            return self._tensors[name]
        spec = self.specs[name]
        zero_point = None if spec.symmetric else self._tensors[f"{name}_zero_point"]
        packed, scale = self._tensors[f"{name}_packed"], self._tensors[f"{name}_scale"]
        return unpack(packed, scale, zero_point, self._in_features[name], spec)

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self.specs

    def __len__(self) -> int:
        return len(self._plain) + len(self.specs)

    def _check(self, name: str) -> int:
        """Compares the tensors of a weight with its spec; returns its input features."""
        spec = self.specs[name]
        parts = ("scale", "shape") if spec.symmetric else ("scale", "shape", "zero_point")
        missing = [f"{name}_{part}" for part in parts if f"{name}_{part}" not in self._tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing beside {name}_packed; download or write the checkpoint again")
        if spec.symmetric and f"{name}_zero_point" in self._tensors:
            raise ValueError(f"{name}_zero_point beside symmetric codes is not supported")
        n, k = _matrix_shape(name, self._tensors[f"{name}_shape"])
        groups = spec.num_groups(k)
        dtype, packed = self._tensors.layout(f"{name}_packed")
        _, scale = self._tensors.layout(f"{name}_scale")
        widths = {words(k, spec.bits), old_words(k, spec.bits)}
        if dtype != "int32" or packed not in {(n, width) for width in widths} or scale != (n, groups):
            raise ValueError(
                f"{name} of {n} x {k} has packed codes {dtype}{list(packed)} and scales {list(scale)}, "
                f"which do not fit {spec}"
            )
        zeros = ("int32", (words(n, spec.bits), groups))
        if not spec.symmetric and self._tensors.layout(f"{name}_zero_point") != zeros:
            raise ValueError(f"{name}_zero_point does not fit {spec}; expected {zeros[0]}{list(zeros[1])}")
        return k


def _matrix_shape(name: str, shape: np.ndarray) -> tuple[int, int]:
    if shape.shape != (2,) or not np.issubdtype(shape.dtype, np.integer) or np.any(shape < 1):
        raise ValueError(f"{name}_shape is {shape.tolist()}, but two sizes are expected")
    return int(shape[0]), int(shape[1])


def _check_expressible(tensors: Mapping[str, Any], quantized: Mapping[str, QTensor], linears: Collection[str]) -> None:
    """Raises ValueError for the first thing that the format cannot say."""
    if not quantized:
        raise ValueError("nothing is quantized, and compressed-tensors stores quantized models; use format='jaxquant'")
    for name, leaf in tensors.items():
        try:
            if not is_qtensor(leaf):
                _check_array(leaf)
            elif name.removesuffix(".weight") not in linears:
                raise ValueError("it is quantized but no Linear of the model; leave it as it is, or format='jaxquant'")
            else:
                _check_qtensor(leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    dtypes = sorted({q.dtype for q in quantized.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the quantized weights stand for weights of {dtypes}, but the format has one dtype per model")


def _check_qtensor(q: QTensor) -> None:
    q.validate()
    check_spec(q.spec)
    if q.ndim != 2 or q.contract != (-2,):
        raise ValueError(f"{list(q.shape)} contracted over {q.contract}; expected [in, out] contracted over (-2,)")
    if q.dtype not in MODEL_DTYPES or q.scale.dtype.name != q.dtype:
        raise ValueError(
            f"it stands for {q.dtype} and has {q.scale.dtype} scales; readers cast scales to the model's dtype, so "
            f"both must be the same one of {', '.join(MODEL_DTYPES)}"
        )
    if len(jax.tree.leaves(q)) > 2 + (q.zero_point is not None):
        raise ValueError("it holds more than codes and scales, which the format has no place for")


def _check_array(array: Any) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.name not in MODEL_DTYPES:
        raise ValueError(f"it is {array.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")
