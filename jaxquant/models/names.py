"""Parameters of a decoder from the tensors of a Hugging Face checkpoint, and back.

Only the layout changes: layers and experts are stacked, kernels transposed. Values and dtypes stay what they are.
A leaf may be a quantized tensor too: any pytree whose array leaves all have the layer axis in front and whose `shape`
is that of the kernel it stands for, `[in, out]`. It is stacked leaf by leaf and never transposed.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxquant.models.config import FAMILIES, DecoderConfig
from jaxquant.models.decoder import Decoder
from jaxquant.models.family import TensorName
from jaxquant.models.stacking import is_stacked, layer_path


@functools.lru_cache(maxsize=32)  # the shapes come from a trace
def parameter_shapes(config: DecoderConfig, stacked: bool = True) -> Mapping[str, tuple[int, ...]]:
    """Returns the shape of every parameter of the decoder, by path ("layers/mlp/up_proj/kernel")."""
    if not stacked:
        shapes = parameter_shapes(config)
        layers = {path: shape for path, shape in shapes.items() if path.startswith("layers/")}
        apart = {layer_path(p, i): shape[1:] for i in range(config.num_layers) for p, shape in layers.items()}
        return MappingProxyType({path: shapes[path] for path in shapes.keys() - layers.keys()} | apart)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Decoder(config, jnp.dtype("float32")).init, jax.random.key(0), tokens)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    return MappingProxyType({path: leaf.shape for path, leaf in flat.items()})


def params_from_tensors(config: DecoderConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested parameters of the decoder from a checkpoint's tensors, by their Hugging Face names.

    Tensors are taken from the mapping one after another, so a mapping that reads from disk on access keeps one
    parameter at a time beside the result. `lm_head.weight` is left aside when the model ties its embedding. Raises
    ValueError for a tensor that is missing, one that belongs nowhere, and one of the wrong shape.
    """
    check_names(config, tensors)
    return outer_params(config, tensors) | layer_params(config, tensors, range(config.num_layers))


def layer_params(config: DecoderConfig, tensors: Mapping[str, Any], layers: range) -> dict[str, Any]:
    """Returns the parameters of some layers, as `{"layers": ...}`, stacked. Errors as `params_from_tensors`."""
    return _params(config, [entry for entry in _entries(config) if entry.stacked], tensors, layers)


def present_in_layer(config: DecoderConfig, tensors: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Returns those parameters of one layer that are there whole, by their path in a stack, without the layer axis.

    Raises ValueError for one of the wrong shape.
    """
    shapes, one = parameter_shapes(config), range(layer, layer + 1)
    found = {}
    for entry in _entries(config):
        if entry.stacked and all(name in tensors for _, name in _named_places(config, entry, one)):
            stack = _parameter(config, entry, shapes[entry.path], tensors, one)
            found[entry.path] = jax.tree.map(lambda array: array[0], stack)
    return found


def outer_params(config: DecoderConfig, tensors: Mapping[str, Any], only: str | None = None) -> dict[str, Any]:
    """Returns the parameters outside of the layers, or the subtree `only` of them. Errors as `params_from_tensors`."""
    entries = [entry for entry in _entries(config) if not entry.stacked]
    return _params(config, [e for e in entries if only in (None, e.path.partition("/")[0])], tensors, range(0))


def _params(config, entries: list[TensorName], tensors: Mapping[str, Any], layers: range) -> dict[str, Any]:
    shapes = parameter_shapes(config)
    params = {entry.path: _parameter(config, entry, shapes[entry.path], tensors, layers) for entry in entries}
    return traverse_util.unflatten_dict(params, sep="/")


def tensors_from_params(config: DecoderConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a checkpoint, by their Hugging Face names; the inverse of `params_from_tensors`.

    Layers may be stacked or not. Plain arrays come back as contiguous NumPy arrays, as safetensors' writer requires, in
    the checkpoint's `[out, in]`; quantized leaves come back unstacked. Raises ValueError when the paths are not those
    of the decoder.
    """
    flat, stacked = traverse_util.flatten_dict(params, sep="/"), is_stacked(params)
    expected = parameter_shapes(config, stacked).keys()
    if flat.keys() != expected:
        raise ValueError(
            f"params: missing {sorted(expected - flat.keys())}, left over {sorted(flat.keys() - expected)}; they must "
            f"be those of a {config.architecture} with {config.num_layers} layers"
        )
    return {
        name: _to_tensor(entry, _part(flat, entry, place, stacked))
        for entry in _entries(config)
        for place, name in _named_places(config, entry, range(config.num_layers))
    }


def some_tensors(config: DecoderConfig, params: Mapping[str, Any], layers: range) -> dict[str, Any]:
    """Returns the tensors of some of the parameters: those of `layers`, stacked, or of what is outside of the layers.

    As `tensors_from_params` gives those of all.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    return {
        name: _to_tensor(entry, _part(flat, entry, (*(i - layers.start for i in place[:1]), *place[1:]), True))
        for entry in _entries(config)
        if entry.path in flat
        for place, name in _named_places(config, entry, layers)
    }


def tensor_paths(config: DecoderConfig) -> dict[str, str]:
    """Returns the path of the parameter that each tensor of a checkpoint belongs to, by Hugging Face's names."""
    return {name: entry.path for entry in _entries(config) for name in tensor_names(config, entry)}


def full_names(config: DecoderConfig, found: Iterable[str]) -> dict[str, str]:
    """Returns the names that tensors of a checkpoint should have, where it was saved without its output head.

    transformers then leaves out the first part of every name.
    """
    found, prefix = list(found), FAMILIES[config.architecture].prefix
    if any(name.startswith(prefix) for name in found):
        return {}
    expected = tensor_paths(config)
    full = {name: f"{prefix}{name}" for name in found}
    return {name: whole for name, whole in full.items() if whole in expected or holds_nothing(config, whole)}


def modules(config: DecoderConfig) -> dict[str, str]:
    """Returns Hugging Face's names of all Linear and Embedding modules of the model, with their class.

    The output head is a Linear even where it shares its weight. GPT-2 has Conv1D modules in place of Linear ones.
    """
    family = FAMILIES[config.architecture]
    weights = [
        (name, "Linear" if entry.transposed else "Embedding")
        for entry in dict.fromkeys((*_entries(config), family.head))
        if entry.transposed or entry.path.endswith("/embedding")
        for name in tensor_names(config, entry)
    ]
    return {name.removesuffix(".weight"): kind for name, kind in weights}


def _entries(config: DecoderConfig) -> tuple[TensorName, ...]:
    """Those of the family's tensors that this decoder has: not every model has biases, or a head of its own."""
    family, shapes = FAMILIES[config.architecture], parameter_shapes(config)
    return tuple(entry for entry in (*family.tensors, family.head) if entry.path in shapes)


def tensor_names(config: DecoderConfig, entry: TensorName) -> list[str]:
    """Returns the names of the tensors that a parameter is made of, layer by layer and expert by expert."""
    return [name for _, name in _named_places(config, entry, range(config.num_layers))]


def _named_places(config: DecoderConfig, entry: TensorName, layers: range) -> list[tuple[tuple[int, ...], str]]:
    """The names of a parameter's tensors, each with its place along the axes of layers and of experts."""
    if not entry.stacked:
        return [((), entry.name)]
    if not entry.of_experts:
        return [((layer,), entry.name.format(layer=layer)) for layer in layers]
    places = itertools.product(layers, range(config.num_experts))
    return [((layer, expert), entry.name.format(layer=layer, expert=expert)) for layer, expert in places]


def check_names(config: DecoderConfig, found: Iterable[str]) -> None:
    """Raises ValueError for a tensor that is missing, and for one that belongs nowhere."""
    found, family = set(found), FAMILIES[config.architecture]
    expected = {name for entry in _entries(config) for name in tensor_names(config, entry)}
    missing = sorted(expected - found)
    left_over = sorted(name for name in found - expected if not holds_nothing(config, name))
    if config.tie_embeddings and family.head.name in left_over:
        left_over.remove(family.head.name)
    if missing:
        raise ValueError(f"{_some(missing)} missing from the checkpoint; {_described(config)} has {len(expected)}")
    if left_over:
        raise ValueError(f"{_some(left_over)} in the checkpoint but not in {_described(config)}")


def holds_nothing(config: DecoderConfig, name: str) -> bool:
    """Whether a tensor holds nothing that is learned."""
    return re.fullmatch(FAMILIES[config.architecture].ignored_tensors, name) is not None


def check_dtypes(config: DecoderConfig, dtype_of: Callable[[str], str]) -> None:
    """Raises ValueError for tensors of one kind whose dtype is not the same in all layers, which are stacked."""
    for entry in _entries(config):
        first, *others = tensor_names(config, entry)
        for name in others:
            if dtype_of(name) != dtype_of(first):
                raise ValueError(
                    f"tensor {name} is {dtype_of(name)} and {first} is {dtype_of(first)}; layers are stacked, so cast "
                    "them to one dtype"
                )


def _described(config: DecoderConfig) -> str:
    tied = "tied" if config.tie_embeddings else "untied"
    return f"a {config.architecture} with {config.num_layers} layers and {tied} embeddings"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensors {', '.join(names[:5])}{more}"


def _parameter(
    config: DecoderConfig, entry: TensorName, shape: tuple[int, ...], tensors: Mapping[str, Any], layers: range
):
    names = [name for _, name in _named_places(config, entry, layers)]
    lead = entry.stacked + entry.of_experts
    leaves = _checked(entry, shape[lead:], ((name, tensors[name]) for name in names))
    if not entry.stacked:
        (leaf,) = leaves
        return jax.tree.map(jnp.array, leaf)  # a copy: the caller's memory may be a file's or another library's
    return _stack(leaves, (len(layers), *shape[1:lead]))


def _checked(entry: TensorName, shape: tuple[int, ...], named: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    """Yields the leaves in the parameter's orientation, or raises for one of the wrong shape."""
    for name, tensor in named:
        transposed = entry.transposed and _is_array(tensor)
        expected = shape[::-1] if transposed else shape
        if tuple(tensor.shape) != expected:
            raise ValueError(f"tensor {name} has shape {list(tensor.shape)}; the configuration says {list(expected)}")
        yield tensor.T if transposed else tensor


def _stack(leaves: Iterator[Any], lead: tuple[int, ...]):
    """Stacks pytrees of arrays along leading axes, filling the result one at a time."""
    first = next(leaves)  # (all have one dtype: see `check_dtypes`)
    stacked = jax.tree.map(lambda leaf: np.empty((math.prod(lead), *leaf.shape), leaf.dtype), first)

    def fill(index, leaf):
        jax.tree.map(lambda whole, part: np.copyto(whole[index], np.asarray(part)), stacked, leaf)

    fill(0, first)
    for index, leaf in enumerate(leaves, start=1):
        fill(index, leaf)
    return jax.tree.map(lambda whole: jnp.asarray(whole.reshape(*lead, *whole.shape[1:])), stacked)


def _part(flat: Mapping[str, Any], entry: TensorName, place: tuple[int, ...], stacked: bool):
    if not entry.stacked:
        return flat[entry.path]
    leaf, index = (flat[entry.path], place) if stacked else (flat[layer_path(entry.path, place[0])], place[1:])
    return jax.tree.map(lambda array: array[index], leaf) if index else leaf


def _to_tensor(entry: TensorName, leaf):
    if not _is_array(leaf):
        return leaf
    tensor = np.asarray(leaf)
    return np.ascontiguousarray(tensor.T if entry.transposed else tensor)


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
