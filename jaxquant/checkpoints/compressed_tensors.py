"""compressed-tensors: integer weights as vLLM and transformers read them.

The arrays of each weight are described in `pack_quantized` and, where the inputs of a weight are rounded too, in
`int_quantized`; `quantization_config` in config.json says which modules have which bits and groups.

Where `actorder` is "group", a `weight_g_idx`, int32 [K], is beside them: the group of each input, in whose order the
codes lie; -1 throughout stands for groups in the order of the inputs.

Only what the format can say is written: codes in the full range, one matrix per Linear or Embedding, scales that the
dtype of the model has (readers cast them to it).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints import int_quantized, pack_quantized
from jaxquant.checkpoints.compressed_tensors_config import (
    Group,
    check_spec,
    describe,
    find_group,
    format_of,
    read_groups,
)
from jaxquant.checkpoints.group_index import ascends, groups_of_inputs, in_order_of_groups, in_order_of_inputs
from jaxquant.checkpoints.int_quantized import INPUT_ZERO
from jaxquant.checkpoints.modules import (
    AXES,
    MODEL_DTYPES,
    QuantizedTensors,
    check_array,
    check_matrix,
    check_read_back,
    exactly,
    one_dtype,
    quantized_modules,
    write_config,
    write_quantized,
)
from jaxquant.checkpoints.tensors import check_scale
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.spec import QuantSpec

LAYOUTS = {layout.FORMAT: layout for layout in (pack_quantized, int_quantized)}
PARTS = {part for layout in LAYOUTS.values() for part in layout.PARTS}
INDEX = "weight_g_idx"


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
    quantized = quantized_modules(tensors, "compressed-tensors")
    _check_expressible(tensors, classes)
    dtype = one_dtype(quantized)
    act_order = any(q.input_order is not None for q in quantized.values())
    write_quantized(directory, tensors, quantized, lambda q: _pack(q, dtype, act_order))
    specs = {module: q.spec for module, q in quantized.items()}
    quantization_config = describe(specs, classes, act_order=act_order)
    write_config(directory, hf_config, dtype, quantization_config)
    check_read_back(directory, CompressedTensors(directory, quantization_config, classes), quantized)


class CompressedTensors(QuantizedTensors):
    """The tensors of a compressed-tensors directory. Embeddings may be quantized too."""

    def __init__(self, directory: Path, quantization_config: Mapping[str, Any], classes: Mapping[str, str]):
        groups = read_groups(quantization_config)
        super().__init__(directory, PARTS)
        self._classes = classes
        of_modules = {module: find_group(module, classes.get(module, "Linear"), groups) for module in self._parts}
        self.specs = {f"{module}.weight": group.spec for module, group in of_modules.items()}
        for module, group in of_modules.items():
            self._check(module, self._parts[module], group)
        self._reordered = not all(map(self._ascends, self._parts))
        scales = {f"{m}.{part}" for m, found in self._parts.items() for part in found if part.endswith("_scale")}
        dtypes = {self._tensors.layout(name)[0] for name in scales}
        if not dtypes <= {*MODEL_DTYPES} or len(dtypes) > 1:
            raise ValueError(f"{directory}: scales of {sorted(dtypes)}; expected one of {', '.join(MODEL_DTYPES)}")

    def _unpack(self, module: str) -> QTensor:
        spec = self.specs[f"{module}.weight"]
        arrays = {part: self._tensors[f"{module}.{part}"] for part in self._parts[module]}
        index = arrays.pop(INDEX, None)
        for part in sorted(arrays):
            if part.endswith("_scale"):
                check_scale(f"{module}.{part}", arrays[part])
        try:
            q = LAYOUTS[format_of(spec)].unpack(arrays, spec)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        if self._reordered and spec.group_size is not None:  # of all, so that layers can be stacked
            q = in_order_of_groups(q, groups_of_inputs(q) if index is None or (index == -1).all() else index)
        contract, out = AXES[self._classes.get(module, "Linear")]
        return dataclasses.replace(q, contract=contract, out=out)

    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, or of the weight that a QTensor stands for."""
        return self._tensors.dtype(name if name in self._plain else f"{name.removesuffix('.weight')}.weight_scale")

    def _ascends(self, module: str) -> bool:
        """Whether the groups of a weight follow one another. ValueError unless all are of one size."""
        name = f"{module}.{INDEX}"
        if name not in self._tensors or ((index := self._tensors[name]) == -1).all():
            return True
        _, (_, groups) = self._tensors.layout(f"{module}.weight_scale")
        return ascends(name, index, groups)

    def _check(self, module: str, found: set[str], group: Group) -> None:
        """Compares the parts of a weight with what its group says."""
        spec, layout = group.spec, LAYOUTS[format_of(group.spec)]
        missing = sorted(layout.REQUIRED - found)
        try:
            shapes = {} if missing else self._shapes(module, group)
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
            wanted = "int32" if part == INDEX else layout.DTYPES.get(part, "")
            if shape not in allowed or dtype != (wanted or dtype):
                raise ValueError(
                    f"{module}.{part} is {dtype}{list(shape)}, which does not fit {spec}; expected "
                    f"{wanted}{list(allowed[0])}"
                )

    def _shapes(self, module: str, group: Group) -> dict[str, list[tuple[int, ...]]]:
        """The parts that a weight has, and the shapes that each may have."""
        n, k = self._matrix_shape(module, group.spec)
        shapes = LAYOUTS[format_of(group.spec)].shapes(n, k, group.spec)
        return {**shapes, INDEX: [(k,)]} if group.act_order else shapes

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


def _check_expressible(tensors: Mapping[str, Any], classes: Mapping[str, str]) -> None:
    """Raises ValueError for the first thing that the format cannot say."""
    for name, leaf in tensors.items():
        try:
            if not is_qtensor(leaf):
                check_array(leaf)
            elif name.removesuffix(".weight") not in classes:
                raise ValueError(
                    "it is quantized but no Linear or Embedding of the model; leave it as it is, or format='jaxquant'"
                )
            else:
                _check_qtensor(leaf, classes[name.removesuffix(".weight")])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_qtensor(q: QTensor, kind: str) -> None:
    q.validate()
    check_spec(q.spec)
    check_matrix(q, kind)
    if kind == "Embedding" and q.spec.activations is not None:
        raise ValueError("its inputs are token ids, which cannot be rounded; leave out `activations`")
    if q.dtype not in MODEL_DTYPES:
        raise ValueError(f"it stands for {q.dtype}; cast it to one of {', '.join(MODEL_DTYPES)}")
    if any(scale is not None and exactly(scale, q.dtype) is None for scale in (q.scale, q.input_scale)):
        raise ValueError(
            f"it stands for {q.dtype} and has {q.scale.dtype} scales; readers cast scales to the model's dtype, which "
            "would change them"
        )


def _pack(q: QTensor, dtype: str, act_order: bool) -> dict[str, np.ndarray]:
    """The arrays of one weight; `act_order` says whether a g_idx is beside all codes with groups."""
    arrays = LAYOUTS[format_of(q.spec)].pack(_with_scales_of(in_order_of_inputs(q), dtype))
    return arrays | {INDEX: groups_of_inputs(q)} if act_order and q.spec.group_size is not None else arrays


def _with_scales_of(q: QTensor, dtype: str) -> QTensor:
    """The same weight with its scales, which must be numbers of a dtype, in it."""
    input_scale = None if q.input_scale is None else jnp.asarray(q.input_scale, dtype)
    return dataclasses.replace(q, scale=jnp.asarray(q.scale, dtype), input_scale=input_scale)
