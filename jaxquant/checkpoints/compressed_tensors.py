"""compressed-tensors' `pack-quantized`: integer weights as vLLM and transformers read them.

A Linear `[out, in]` = (N, K) with b-bit codes stores, in place of its `weight`,

    weight_packed  int32 [N, ceil(K·b / 32)]: per row, the codes + 2^(b-1) as a dense little-endian bitstream along K
    weight_scale   [N, K / group_size], or [N, 1] per channel, in the model's dtype
    weight_shape   int64 [2], (N, K)

and `quantization_config` in config.json says which modules have which bits and groups. Source: compressed-tensors 0.20,
compressors/pack_quantized. Since its release 0.18 the stream is dense at 3, 5, 6 and 7 bits too; before, a word held
only whole codes. The dense layout is written; the older one is recognized by its width and refused.

Only what the format can say is written: symmetric codes in the full range, one matrix per Linear, scales in the dtype
of the model (readers cast them to it).
"""

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.compressed_tensors_config import check_spec, describe, find_spec, read_groups
from jaxquant.checkpoints.huggingface import CONFIG
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.tensors import Tensors, same_bits, write_tensors
from jaxquant.numerics.packing import pack_bits, packed_size, unpack_bits
from jaxquant.numerics.qtensor import PACKED_BITS, QTensor, is_qtensor
from jaxquant.numerics.spec import QuantSpec

MODEL_DTYPES = ("float32", "bfloat16", "float16")
_PARTS = ("weight_packed", "weight_scale", "weight_shape")


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
        if not same_bits(again.values, q.values) or not same_bits(again.scale, q.scale):
            raise OSError(f"{directory}: {module} reads back differently from what was written; check the disk")


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """A QTensor `[K, N]` as the three arrays of the format."""
    k, n = q.shape
    rows = np.asarray(q.values).T if q.spec.bits <= PACKED_BITS else np.asarray(_pack_rows(q))
    rows = np.ascontiguousarray(_resized(rows, 4 * _words(k, q.spec.bits)))
    return {
        "weight_packed": rows.view("<i4"),
        "weight_scale": np.ascontiguousarray(np.asarray(q.scale).T),
        "weight_shape": np.array([n, k], np.int64),
    }


def unpack(packed: np.ndarray, scale: np.ndarray, k: int, spec: QuantSpec) -> QTensor:
    """The QTensor `[k, N]` of `weight_packed` and `weight_scale`: the inverse of `pack`, with the scale's dtype."""
    rows = _resized(np.ascontiguousarray(packed).view(np.uint8), packed_size(k, spec.bits))
    scales = jnp.asarray(scale.T)
    if spec.bits <= PACKED_BITS:
        return QTensor(jnp.asarray(rows.T), scales, None, spec, scale.dtype.name, (-2,), (-1,), (k,))
    return _unpack_rows(jnp.asarray(rows), scales, k, spec)


@jax.jit
def _pack_rows(q: QTensor) -> jax.Array:
    """The streams of codes that are not stored as one, uint8 `[N, packed_size(K)]`."""
    return pack_bits(q.unsigned_codes.T, q.spec.bits, 1)


@partial(jax.jit, static_argnums=(2, 3))
def _unpack_rows(rows: jax.Array, scales: jax.Array, k: int, spec: QuantSpec) -> QTensor:
    """The inverse of `_pack_rows`."""
    unsigned = unpack_bits(rows, spec.bits, k, 1).T
    codes = (unsigned.astype(jnp.int16) - jnp.int16(2 ** (spec.bits - 1))).astype(jnp.int8)
    return QTensor.from_codes(codes, scales, None, spec, dtype=scales.dtype)


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
            elif part not in _PARTS:
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
        return unpack(self._tensors[f"{name}_packed"], self._tensors[f"{name}_scale"], self._in_features[name], spec)

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self.specs

    def __len__(self) -> int:
        return len(self._plain) + len(self.specs)

    def _check(self, name: str) -> int:
        """Compares the three tensors of a weight with its spec; returns its input features."""
        missing = [f"{name}_{part}" for part in ("scale", "shape") if f"{name}_{part}" not in self._tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing beside {name}_packed; download or write the checkpoint again")
        n, k = _matrix_shape(name, self._tensors[f"{name}_shape"])
        bits = self.specs[name].bits
        dtype, packed = self._tensors.layout(f"{name}_packed")
        _, scale = self._tensors.layout(f"{name}_scale")
        if bits in (3, 5, 6, 7) and packed == (n, -(-k // (32 // bits))) != (n, _words(k, bits)):
            raise ValueError(
                f"{name} has {bits}-bit codes in the layout of compressed-tensors before 0.18, which is not read; "
                "load and save it with a newer release"
            )
        if dtype != "int32" or packed != (n, _words(k, bits)) or scale != (n, self.specs[name].num_groups(k)):
            raise ValueError(
                f"{name} of {n} x {k} has packed codes {dtype}{list(packed)} and scales {list(scale)}, "
                f"which do not fit {self.specs[name]}"
            )
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
    if len(jax.tree.leaves(q)) > 2:
        raise ValueError("it holds more than codes and scales, which the format has no place for")


def _check_array(array: Any) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.name not in MODEL_DTYPES:
        raise ValueError(f"it is {array.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")


def _words(k: int, bits: int) -> int:
    return math.ceil(k * bits / 32)


def _resized(rows: np.ndarray, width: int) -> np.ndarray:
    """Cuts off or appends zero bytes: the two paddings of a stream, to whole words and to eight codes."""
    rows = rows[:, :width]
    return np.pad(rows, [(0, 0), (0, width - rows.shape[1])])
