"""compressed-tensors: integer weights as vLLM and transformers read them.

The arrays of each weight are described in `pack_quantized` and, where the inputs of a weight are rounded too, in
`int_quantized`; `quantization_config` in config.json says which modules have which bits and groups.

Only what the format can say is written: codes in the full range, one matrix per Linear or Embedding, scales in the
dtype of the model (readers cast them to it).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints import int_quantized, pack_quantized
from jaxquant.checkpoints.compressed_tensors_config import AXES, check_spec, describe, find_spec, format_of, read_groups
from jaxquant.checkpoints.huggingface import CONFIG
from jaxquant.checkpoints.int_quantized import INPUT_ZERO
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.tensors import Tensors, check_scale, same_bits, write_tensors
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.spec import QuantSpec

MODEL_DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = {layout.FORMAT: layout for layout in (pack_quantized, int_quantized)}
PARTS = {part for layout in LAYOUTS.values() for part in layout.PARTS}


def write_compressed_tensors(
    directory: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, Any], classes: Mapping[str, str]
) -> None:
    """Writes tensors and config.json into an existing directory, and reads the codes and scales back to be sure.

    Args:
      directory: an existing directory without safetensors.
      hf_config: the model's config.json.
      tensors: by Hugging Face's names. Floating arrays `[out, in]` as they lie in a checkpoint; QTensors under the
        names of the weights that they stand for ("model.layers.0.mlp.up_proj.weight"), `[in, out]` contracted over -2,
        or `[rows, features]` contracted over -1 for an embedding.
      classes: "Linear" or "Embedding" for every such module of the model, quantized or not, a tied output head
        included.

    Raises:
      ValueError: something cannot be expressed in the format, or nothing is quantized. Nothing has been written then.
      OSError: the disk refuses, or what it returns is not what was written.
    """
    quantized = {name.removesuffix(".weight"): leaf for name, leaf in tensors.items() if is_qtensor(leaf)}
    _check_expressible(tensors, quantized, classes)
    stored = {name: leaf for name, leaf in tensors.items() if not is_qtensor(leaf)}
    for module, q in quantized.items():
        stored |= {f"{module}.{part}": array for part, array in LAYOUTS[format_of(q.spec)].pack(q).items()}
    write_tensors(directory, stored)
    quantization_config = describe({module: q.spec for module, q in quantized.items()}, classes)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]  # transformers 5 and 4
    dtype = next(iter(quantized.values())).dtype
    config = {**hf_config, **dict.fromkeys(dtype_keys, dtype), "quantization_config": quantization_config}
    write_json(directory / CONFIG, config)
    read = CompressedTensors(directory, quantization_config, classes)
    for module, q in quantized.items():
        again = read[f"{module}.weight"]
        if not all(same_bits(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True)):
            raise OSError(f"{directory}: {module} reads back differently from what was written; check the disk")


def check_floats(directory: Path, tensors: Tensors, names: Iterable[str]) -> None:
    """Raises ValueError for the first of some tensors of a directory that holds no parameter of a float model."""
    for name in sorted(names):
        dtype, _ = tensors.layout(name)
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"{directory}: tensor {name} is {dtype}; expected one of {', '.join(MODEL_DTYPES)}")


class CompressedTensors(Mapping[str, Any]):
    """The tensors of a compressed-tensors directory by name, each read when it is asked for.

    Quantized weights are QTensors under the name of the weight, `[in, out]`, or `[rows, features]` for an embedding;
    others NumPy arrays `[out, in]` as stored.

    Attributes:
      specs: of the quantized weights, by name.

    Raises, when it is made:
      FileNotFoundError, ValueError: as `Tensors`; or the configuration is not understood, or does not fit the tensors.
    """

    def __init__(self, directory: Path, quantization_config: Mapping[str, Any], classes: Mapping[str, str]):
        self._tensors, self._classes = Tensors(directory), classes
        groups = read_groups(quantization_config)
        parts: dict[str, set[str]] = {}
        for name in self._tensors:
            module, _, part = name.rpartition(".")
            parts.setdefault(module, set()).add(part)
        modules = sorted(module for module, found in parts.items() if found & PARTS)
        self.specs = {f"{m}.weight": find_spec(m, classes.get(m, "Linear"), groups) for m in modules}
        self._parts = {m: self._check(m, parts[m] - {"bias"}) for m in modules}
        quantized = {f"{m}.{part}" for m, found in self._parts.items() for part in found}
        self._plain = {name for name in self._tensors if name not in quantized}
        check_floats(directory, self._tensors, self._plain)
        scales = {name for name in quantized if name.endswith("_scale")}
        dtypes = {self._tensors.layout(name)[0] for name in scales}
        if not dtypes <= {*MODEL_DTYPES} or len(dtypes) > 1:
            raise ValueError(f"{directory}: scales of {sorted(dtypes)}; expected one of {', '.join(MODEL_DTYPES)}")

    def __getitem__(self, name: str) -> Any:
        if name in self._plain:
            return self._tensors[name]
        spec, module = self.specs[name], name.removesuffix(".weight")
        arrays = {part: self._tensors[f"{module}.{part}"] for part in self._parts[module]}
        for part in sorted(arrays):
            if part.endswith("_scale"):
                check_scale(f"{module}.{part}", arrays[part])
        try:
            q = LAYOUTS[format_of(spec)].unpack(arrays, spec)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        contract, out = AXES[self._classes.get(module, "Linear")]
        return dataclasses.replace(q, contract=contract, out=out)

    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, or of the weight that a QTensor stands for."""
        return self._tensors.dtype(name if name in self._plain else f"{name.removesuffix('.weight')}.weight_scale")

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self.specs

    def __len__(self) -> int:
        return len(self._plain) + len(self.specs)

    def _check(self, module: str, found: set[str]) -> set[str]:
        """Compares the parts of a weight with its spec; returns those that there are."""
        spec = self.specs[f"{module}.weight"]
        layout = LAYOUTS[format_of(spec)]
        missing = sorted(layout.REQUIRED - found)
        try:
            shapes = {} if missing else layout.shapes(*self._matrix_shape(module, spec), spec)
        except ValueError as error:  # its groups do not divide the inputs
            raise ValueError(f"{module}: {error}") from error
        missing += sorted(shapes.keys() - found)
        if missing:
            raise ValueError(
                f"{module}.{missing[0]} is missing, but the quantization_config says {layout.FORMAT} with {spec}; "
                "download or write the checkpoint again"
            )
        if INPUT_ZERO in found and spec.static_activations:
            shapes[INPUT_ZERO] = [(1,)]
        left_over = sorted(found - shapes.keys())
        if left_over:
            raise ValueError(f"{module}.{left_over[0]} is not supported beside {layout.FORMAT} codes of {spec}")
        for part, allowed in shapes.items():
            dtype, shape = self._tensors.layout(f"{module}.{part}")
            if shape not in allowed or dtype != layout.DTYPES.get(part, dtype):
                raise ValueError(
                    f"{module}.{part} is {dtype}{list(shape)}, which does not fit {spec}; expected "
                    f"{layout.DTYPES.get(part, '')}{list(allowed[0])}"
                )
        return found

    def _matrix_shape(self, module: str, spec: QuantSpec) -> tuple[int, int]:
        """Outputs and inputs of a weight."""
        if spec.activations is not None:
            _, shape = self._tensors.layout(f"{module}.weight")
        else:
            stored = self._tensors[f"{module}.weight_shape"]
            shape = tuple(stored.tolist()) if stored.ndim == 1 and np.issubdtype(stored.dtype, np.integer) else ()
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"the shape of its weight is {list(shape)}, but two sizes are expected")
        return shape[0], shape[1]


def _check_expressible(
    tensors: Mapping[str, Any], quantized: Mapping[str, QTensor], classes: Mapping[str, str]
) -> None:
    """Raises ValueError for the first thing that the format cannot say."""
    if not quantized:
        raise ValueError("nothing is quantized, and compressed-tensors stores quantized models; use format='jaxquant'")
    for name, leaf in tensors.items():
        try:
            if not is_qtensor(leaf):
                _check_array(leaf)
            elif name.removesuffix(".weight") not in classes:
                raise ValueError(
                    "it is quantized but no Linear or Embedding of the model; leave it as it is, or format='jaxquant'"
                )
            else:
                _check_qtensor(leaf, classes[name.removesuffix(".weight")])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    dtypes = sorted({q.dtype for q in quantized.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the quantized weights stand for weights of {dtypes}, but the format has one dtype per model")


def _check_qtensor(q: QTensor, kind: str) -> None:
    q.validate()
    check_spec(q.spec)
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
            "model.recipe(config, foldable=True), or format='jaxquant'"
        )
    if kind == "Embedding" and q.spec.activations is not None:
        raise ValueError("its inputs are token ids, which cannot be rounded; leave out `activations`")
    if q.dtype not in MODEL_DTYPES or q.scale.dtype.name != q.dtype:
        raise ValueError(
            f"it stands for {q.dtype} and has {q.scale.dtype} scales; readers cast scales to the model's dtype, so "
            f"both must be the same one of {', '.join(MODEL_DTYPES)}"
        )


def _check_array(array: Any) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.name not in MODEL_DTYPES:
        raise ValueError(f"it is {array.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")
