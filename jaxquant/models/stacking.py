"""Two shapes of a parameter tree: layers stacked in one array per parameter, or each with a subtree of its own.

Stacked layers ("layers/mlp/up_proj/kernel" is `[layers, in, out]`) are what a scan runs over: the program does not grow
with the depth, but a stack is one array, and all of its layers are quantized alike. Unstacked ones
("layers/0/mlp/up_proj/kernel", `[in, out]`) may each be quantized in another way.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.transforms.tracing.interpreter import named_leaves


def is_stacked(params: Any) -> bool:
    """Whether the layers of a decoder's parameters are stacked. True for what is no decoder's parameters at all."""
    layers = params.get("layers") if isinstance(params, Mapping) else None
    return not (isinstance(layers, Mapping) and layers and all(str(name).isdecimal() for name in layers))


def layer_path(path: str, layer: int) -> str:
    """Where a parameter of one layer lies among unstacked ones; `path` is that of the stack."""
    return path.replace("layers/", f"layers/{layer}/", 1)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with their layers apart. QTensors stay what they are, without the layer axis."""
    stack = params["layers"]
    count = len(jax.tree.leaves(stack)[0])
    return {**params, "layers": {str(i): jax.tree.map(lambda a, i=i: a[i], stack) for i in range(count)}}


def layer_of(params: Any, layer: int) -> dict[str, Any]:
    """What parameters there are of one layer, by their path in a stack, without the layer axis."""
    leaves, own = named_leaves(params, is_qtensor), f"layers/{layer}/"
    if not is_stacked(params):
        return {path.replace(own, "layers/", 1): leaf for path, leaf in leaves if path.startswith(own)}
    sizes = {path: jax.tree.leaves(leaf)[0].shape for path, leaf in leaves if path.startswith("layers/")}
    return {
        path: jax.tree.map(lambda a: a[layer], leaf)
        for path, leaf in leaves
        if sizes.get(path, ()) and layer < sizes[path][0]
    }


def alike(params: Mapping[str, Any]) -> bool:
    """Whether all of some unstacked layers are quantized in the same way, so that they can be stacked."""
    return len(set(map(jax.tree.structure, params["layers"].values()))) == 1


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`; raises ValueError if layers are not quantized alike."""
    if not alike(params):
        raise ValueError("layers are not quantized alike, and a stack of layers is one array")
    first, *others = (params["layers"][name] for name in sorted(params["layers"], key=int))
    return {**params, "layers": jax.tree.map(_stacked, first, *others, is_leaf=is_qtensor)}


def _stacked(*parts: Any) -> Any:
    """One leaf of all layers. Of outliers each layer has its own number; what lacks is filled up with no channel."""
    if is_qtensor(parts[0]) and parts[0].outlier_index is not None:
        axis = parts[0].values.ndim - 1 - len(parts[0].out)
        most = max(q.outlier_index.shape[axis] for q in parts)
        parts = tuple(_filled(q, axis, most) for q in parts)
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)


def _filled(q: QTensor, axis: int, size: int) -> QTensor:
    """The QTensor with `size` outliers along an axis of its arrays."""
    index, rows = q.outlier_index, q.outlier_weight
    assert index is not None
    assert rows is not None
    pad = [(0, size - index.shape[axis] if a == axis else 0) for a in range(index.ndim)]
    index = jnp.pad(index, pad, constant_values=math.prod(q.in_shape))
    return dataclasses.replace(q, outlier_index=index, outlier_weight=jnp.pad(rows, pad))
