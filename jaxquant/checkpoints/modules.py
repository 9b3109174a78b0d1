"""What the formats of quantized Hugging Face checkpoints have in common.

A quantized module ("model.layers.0.mlp.up_proj") has several tensors in place of its weight, its parts. Here they are
one QTensor again, under the name of the weight that it stands for. Everything else is an array as it is stored.
"""

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.group_index import groups_of_inputs, in_order_of_inputs
from jaxquant.checkpoints.huggingface import CONFIG
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.tensors import Tensors, check_scale, same_bits, write_tensors
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.spec import QuantSpec

MODEL_DTYPES = ("float32", "bfloat16", "float16")
AXES = {"Linear": ((-2,), (-1,)), "Embedding": ((-1,), (-2,))}  # contract and out of the weights of a class of modules
Understood = Mapping[str, tuple | None]  # of each key of a configuration: its values, or None where any will do


class QuantizedTensors(abc.ABC, Mapping[str, Any]):
    """The tensors of a directory by name, each read when it is asked for.

    Quantized weights are QTensors under the name of the weight, `[in, out]`, or `[rows, features]` for an embedding;
    others NumPy arrays `[out, in]` as stored.

    Attributes:
      specs: of the quantized weights, by name.

    Raises, when it is made:
      FileNotFoundError, ValueError: as `Tensors`; or the configuration is not understood, or does not fit the tensors.
    """

    specs: dict[str, QuantSpec]

    def __init__(self, directory: Path, marks: Set[str]):
        """Finds the quantized modules: those with a part of `marks`."""
        self._directory, self._tensors = directory, Tensors(directory)
        parts: dict[str, set[str]] = {}
        for name in self._tensors:
            module, _, part = name.rpartition(".")
            parts.setdefault(module, set()).add(part)
        self._parts = {module: parts[module] - {"bias"} for module in sorted(parts) if parts[module] & marks}
        quantized = {f"{module}.{part}" for module, found in self._parts.items() for part in found}
        self._plain = set(self._tensors) - quantized
        check_floats(directory, self._tensors, self._plain)

    @abc.abstractmethod
    def _unpack(self, module: str) -> QTensor:
        """Reads a quantized weight."""

    @abc.abstractmethod
    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, or of the weight that a QTensor stands for."""

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name] if name in self._plain else self._unpack(self._module(name))

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self.specs

    def __len__(self) -> int:
        return len(self._plain) + len(self.specs)

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor that is not quantized in its file, without reading it."""
        return self._tensors.nbytes(name)

    def _module(self, name: str) -> str:
        if name not in self.specs:
            raise KeyError(name)
        return name.removesuffix(".weight")

    def _check_linears(self, classes: Mapping[str, str]) -> None:
        """Raises ValueError for a quantized module that is no Linear of the model."""
        for module in self._parts:
            if classes.get(module) != "Linear":
                raise ValueError(f"{self._directory}: {module} is quantized, but no Linear of the model")

    def _expect(self, module: str, part: str, dtype: str | Iterable[str], shape: tuple[int, ...]) -> None:
        """Raises ValueError for a part that is missing, or not an array of that dtype and shape."""
        if part not in self._parts[module]:
            raise ValueError(f"{module}.{part} is missing; download or write the checkpoint again")
        found, sizes = self._tensors.layout(f"{module}.{part}")
        allowed = (dtype,) if isinstance(dtype, str) else tuple(dtype)
        if found not in allowed or sizes != shape:
            raise ValueError(f"{module}.{part} is {found}{list(sizes)}; expected {' or '.join(allowed)}{list(shape)}")


class HalfScaledTensors(QuantizedTensors):
    """The tensors of a GPTQ or an AWQ directory, of which the scales may have another dtype than the model.

    Args:
      directory: where they lie.
      quantization_config: that of config.json.
      classes: "Linear" or "Embedding" for every such module of the model.
      names: of the tensors that the float model has. AutoGPTQ writes biases of zeros where it has none.
      model_dtype: that of config.json; where it says none, weights stand for weights in the dtype of their scales.
    """

    def __init__(
        self,
        directory: Path,
        quantization_config: Mapping[str, Any],
        classes: Mapping[str, str],
        names: Collection[str],
        model_dtype: str | None,
    ):
        super().__init__(directory, {"qweight"})
        for bias in [f"{module}.bias" for module in self._parts]:
            if bias in self._plain - {*names} and not self._tensors[bias].any():
                self._plain.remove(bias)
        self._dtype = model_dtype if model_dtype in MODEL_DTYPES else None
        self._check_linears(classes)
        specs = self._read_specs(quantization_config)
        self.specs = {f"{module}.weight": self._with_scale_dtype(module, spec) for module, spec in specs.items()}

    @abc.abstractmethod
    def _read_specs(self, quantization_config: Mapping[str, Any]) -> dict[str, QuantSpec]:
        """Compares the parts of each module with the configuration; returns its codes."""

    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, or of the weight that a QTensor stands for."""
        if name in self._plain:
            return self._tensors.dtype(name)
        return self._dtype or self._tensors.dtype(f"{self._module(name)}.scales")

    def _with_scale_dtype(self, module: str, spec: QuantSpec) -> QuantSpec:
        scales = self._tensors.dtype(f"{module}.scales")
        return dataclasses.replace(spec, scale_dtype=None if self._dtype in (None, scales) else scales)

    def _read_parts(self, module: str) -> dict[str, np.ndarray]:
        arrays = {part: self._tensors[f"{module}.{part}"] for part in sorted(self._parts[module])}
        check_scale(f"{module}.scales", arrays["scales"])
        return arrays


def check_floats(directory: Path, tensors: Tensors, names: Iterable[str]) -> None:
    """Raises ValueError for the first of some tensors of a directory that holds no parameter of a float model."""
    for name in sorted(names):
        dtype, _ = tensors.layout(name)
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"{directory}: tensor {name} is {dtype}; expected one of {', '.join(MODEL_DTYPES)}")


def check_understood(where: str, given: Any, understood: Understood) -> None:
    """Raises ValueError for a configuration with a key or a value that is not understood, or that is no object."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} is not supported; expected an object")
    for key, value in given.items():
        values = understood.get(key, ())
        if values is not None and not any(type(value) is type(v) and value == v for v in values):
            raise ValueError(f"{where}: {key}={value!r} is not supported")


def quantized_modules(tensors: Mapping[str, Any], format: str) -> dict[str, QTensor]:
    """The quantized weights among tensors, by module; ValueError if there are none."""
    found = {name.removesuffix(".weight"): leaf for name, leaf in tensors.items() if is_qtensor(leaf)}
    if not found:
        raise ValueError(f"nothing is quantized, and {format} stores quantized models; use format='jaxquant'")
    return found


def check_linears(tensors: Mapping[str, Any], classes: Mapping[str, str], check) -> None:
    """Raises ValueError, with its name, for the first tensor that no format of quantized Linears can store.

    Args:
      tensors: arrays and QTensors, by name.
      classes: of the model's modules.
      check: `check(q)` raises ValueError for a weight that one format cannot store.
    """
    for name, leaf in tensors.items():
        try:
            if not is_qtensor(leaf):
                check_array(leaf)
                continue
            leaf.validate()
            if classes.get(name.removesuffix(".weight")) != "Linear":
                raise ValueError("only the weights of Linears are quantized there; leave it as it is")
            check_matrix(leaf, "Linear")
            check(leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or format='jaxquant'") from error


def check_half_scaled(q: QTensor) -> None:
    """Raises ValueError for a weight that stands for no float that models have, or has scales that float16 has not."""
    if q.dtype not in MODEL_DTYPES:
        raise ValueError(f"it stands for {q.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")
    if exactly(q.scale, "float16") is None:
        raise ValueError(f"its {q.scale.dtype} scales are no float16 numbers; quantize with scale_dtype='float16'")


def check_codes(format: str, spec: QuantSpec, bits: tuple[int, ...]) -> None:
    """Raises ValueError, with the reason, for other codes than GPTQ and AWQ have."""
    reason = None
    if spec.bits not in bits:
        reason = f"bits={spec.bits} is none of {', '.join(map(str, bits))}"
    elif spec.narrow_range:
        reason = "narrow_range has no place in the format; use the full range"
    elif spec.granularity not in ("per_channel", "per_group"):
        reason = f"granularity {spec.granularity} is not supported; use per_channel or a group_size"
    elif spec.activations is not None:
        reason = "rounded inputs have no place in the format; leave out `activations`"
    if reason:
        raise ValueError(f"cannot be written as {format}: {reason}")


def read_group_size(where: str, group_size: Any) -> int | None:
    """The size of groups in a configuration where -1 is none; ValueError if it is no size."""
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise ValueError(f"{where}: group_size={group_size!r} is not supported; expected a size, or -1 for none")
    return None if group_size == -1 else group_size


def check_matrix(q: QTensor, kind: str) -> None:
    """Raises ValueError for what is not the matrix of a Linear or an Embedding, or still has a channel scale."""
    if q.ndim != 2 or (q.contract, q.out) != AXES[kind]:
        raise ValueError(
            f"{list(q.shape)} contracted over {q.contract}; expected the matrix of a {kind}, contracted over "
            f"{AXES[kind][0]}"
        )
    if q.adapter_in is not None:
        raise ValueError("adapters have no place in the format; keep them apart, or use format='jaxquant'")
    if q.channel_scale is not None:
        raise ValueError(
            "it has a channel scale that cannot be folded away, and the format has no place for one; quantize with "
            "model.recipe(config, foldable=True)"
        )


def check_array(array: Any) -> None:
    """Raises ValueError for an array of floats that no model is computed in."""
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.name not in MODEL_DTYPES:
        raise ValueError(f"it is {array.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")


def exactly(array: Any, dtype: str) -> np.ndarray | None:
    """The same numbers in another dtype; None where that has not all of them."""
    array = np.asarray(array)
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    wide = np.float64
    return cast if np.array_equal(cast.astype(wide), array.astype(wide)) else None


def check_read_back(directory: Path, read: Mapping[str, Any], quantized: Mapping[str, QTensor]) -> None:
    """Raises OSError for a weight that a directory returns differently: codes, zero points, groups, or any scale."""
    for module, q in quantized.items():
        again = read[f"{module}.weight"]
        if not all(map(same_bits, _comparable(q), _comparable(again))):
            raise OSError(f"{directory}: {module} reads back differently from what was written; check the disk")


def _comparable(q: QTensor) -> list[np.ndarray]:
    """What makes up a weight: the numbers of its scales, zero points and groups even where they are trivial."""
    scales = [None if a is None else np.asarray(a).astype(np.float64) for a in (q.scale, q.input_scale)]
    zero = np.zeros(q.scale.shape, np.int8) if q.zero_point is None else q.zero_point
    values = in_order_of_inputs(q).values
    return [np.asarray(a) for a in (values, *scales, zero, groups_of_inputs(q), q.input_zero_point)]


def write_quantized(
    directory: Path,
    tensors: Mapping[str, Any],
    quantized: Mapping[str, QTensor],
    pack: Callable[[QTensor], Mapping[str, np.ndarray]],
) -> None:
    """Writes tensors, with the arrays that `pack` makes of a quantized weight, by their parts, in its place."""
    stored = {name: leaf for name, leaf in tensors.items() if not is_qtensor(leaf)}
    for module, q in quantized.items():
        stored |= {f"{module}.{part}": array for part, array in pack(q).items()}
    write_tensors(directory, stored)


def write_config(
    directory: Path,
    hf_config: Mapping[str, Any],
    dtype: str,
    quantization_config: Mapping[str, Any],
    copy: str | None = None,
) -> None:
    """Writes the config.json of a model whose quantized weights stand for weights of `dtype`.

    `copy` names a file for the `quantization_config` alone, where older readers look for it.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]  # transformers 5 and 4
    config = {**hf_config, **dict.fromkeys(keys, dtype), "quantization_config": dict(quantization_config)}
    write_json(directory / CONFIG, config)
    if copy is not None:
        write_json(directory / copy, dict(quantization_config))


def one_dtype(quantized: Mapping[str, QTensor]) -> str:
    """The dtype of the weights that QTensors stand for; ValueError if there are several."""
    dtypes = sorted({q.dtype for q in quantized.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the quantized weights stand for weights of {dtypes}, but the format has one dtype per model")
    return dtypes[0]
