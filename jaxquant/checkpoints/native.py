"""The native format `jaxquant`: any parameter tree, bit for bit.

A directory with the arrays in safetensors files, each under its path ("layers/mlp/up_proj/kernel/values"), and
`jaxquant.json`, which says how they make up the tree:

    {"format": "jaxquant", "version": 1, "tree": NODE}

    NODE  null                                                       None
          {"dict": [[key, NODE], ...]}                               keys are all strings or all integers
          {"list": [NODE, ...]}, {"tuple": [NODE, ...]}
          {"array": name, "dtype": dtype, "shape": [...]}            a tensor of the files
          {"qtensor": {"spec": {...}, "dtype": ..., ..., "values": NODE, "scale": NODE, ...}}

A QTensor's arrays that are None are left out. In names, "/" inside a key is written "%2F" and "%" is written "%25".
Eight-bit dtypes that safetensors' NumPy reader does not know (float8) are stored as uint8.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.directory import new_directory
from jaxquant.checkpoints.json_file import read_json, write_json
from jaxquant.checkpoints.tensors import STORABLE, Tensors, check_scale, write_tensors
from jaxquant.numerics.qtensor import QTensor, is_packed
from jaxquant.numerics.spec import ActivationSpec, QuantSpec

HEADER = "jaxquant.json"
FORMAT = "jaxquant"
VERSION = 1
_AXES = ("contract", "out", "in_shape")  # a QTensor's static fields that are tuples of integers
_OPTIONAL = (
    *("zero_point", "input_scale", "input_zero_point", "channel_scale"),
    *("outlier_index", "outlier_weight", "input_order", "adapter_in", "adapter_out"),
)
_ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if f.name not in (*_AXES, "spec", "dtype", "prepared"))


def save_tree(path: str | os.PathLike, tree: Any, *, overwrite: bool = False) -> None:
    """Writes a parameter tree into a new directory.

    Args:
      path: the directory; it appears whole or not at all.
      tree: nested dicts (all keys of one dict strings, or all integers), lists, tuples and None, with arrays and
        QTensors as leaves.
      overwrite: replaces an existing checkpoint.

    Raises:
      TypeError: the tree holds something else; the message names its path.
      ValueError: a QTensor is invalid, or an array has a dtype that cannot be stored.
      OSError: the directory cannot be written, exists (FileExistsError), or reads back differently.
    """
    with new_directory(path, overwrite=overwrite) as directory:
        write_tree(directory, tree)


def load_tree(path: str | os.PathLike) -> Any:
    """Reads a parameter tree that `save_tree` wrote; its arrays are JAX arrays.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, the header does not fit the arrays, or a 64-bit array meets a JAX without
        `jax_enable_x64`.
    """
    return read_tree(Path(os.path.expanduser(path)))


def write_tree(directory: Path, tree: Any) -> None:
    """Writes the tree into an existing directory. Arguments and errors as `save_tree`."""
    node, tensors = describe_tree(tree)
    write_tensors(directory, tensors)
    write_json(directory / HEADER, {"format": FORMAT, "version": VERSION, "tree": node})


def write_header(directory: Path, parts: Sequence[Any]) -> None:
    """Writes the header of a tree whose arrays were written in parts, from those of the parts; see `header_of`."""
    write_json(directory / HEADER, {"format": "jaxquant", "version": VERSION, "tree": _joined(parts)})


def header_of(directory: Path) -> Any:
    """What the header of a directory says of its tree."""
    return read_json(directory / HEADER)["tree"]


def read_tree(directory: Path) -> Any:
    """Reads the tree of a directory. Errors as `load_tree`."""
    file = directory / HEADER
    return build_tree(file, read_header(file, FORMAT), Tensors(directory))


def describe_tree(tree: Any) -> tuple[Any, dict[str, Any]]:
    """The node of a tree, and its arrays by name. Errors as `save_tree`."""
    tensors: dict[str, Any] = {}
    return _describe(tree, (), tensors), tensors


def read_header(file: Path, format: str) -> Any:
    """The node in the header of a directory of some format. Errors as `load_tree`."""
    header = read_json(file)
    if header.get("format") != format or "tree" not in header:
        raise ValueError(f"{file} is no header of a {format} checkpoint")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{file}: version {header.get('version')!r} is not known, only {VERSION}; a newer jaxquant may read it"
        )
    return header["tree"]


def build_tree(file: Path, node: Any, tensors: Mapping[str, Any]) -> Any:
    """The tree of a header's node and arrays by name. Errors as `load_tree`."""
    reader = _Reader(tensors)
    try:
        tree = reader.build(node, ())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
    left_over = sorted(set(reader.tensors) - reader.used)
    if left_over:
        raise ValueError(f"{file} does not mention the tensor {left_over[0]}, which the files hold")
    return tree


def _joined(nodes: Sequence[Any]) -> Any:
    """The node of the dict that has the keys of all of some dicts, and where they share one, of all dicts below it."""
    if len(nodes) == 1:
        return nodes[0]
    found: dict[str, list] = {}
    for node in nodes:
        for key, child in node["dict"]:
            found.setdefault(key, []).append(child)
    return {"dict": [[key, _joined(children)] for key, children in found.items()]}


def path_of(name: str) -> str:
    """The path in the tree of the array that a tensor's name stands for; that of a QTensor's array ends in its part."""
    return name.replace("%5F", "_").replace("%2F", "/").replace("%25", "%")


def _describe(tree: Any, path: tuple[str, ...], tensors: dict[str, Any]) -> Any:
    """The node of a tree; puts its arrays into `tensors` under their names."""
    if tree is None:
        return None
    if type(tree) is dict:
        return {"dict": [[key, _describe(tree[key], (*path, str(key)), tensors)] for key in _keys(tree, path)]}
    if type(tree) in (list, tuple):
        children = [_describe(child, (*path, str(i)), tensors) for i, child in enumerate(tree)]
        return {type(tree).__name__: children}
    if isinstance(tree, QTensor):
        return {"qtensor": _describe_qtensor(tree, path, tensors)}
    if isinstance(tree, jax.Array | np.ndarray):
        return _describe_array(tree, path, tensors)
    raise TypeError(
        f"{_shown(path)} is a {type(tree).__name__}; only dicts, lists, tuples and None with arrays and QTensors as "
        "leaves are saved"
    )


def _keys(tree: dict, path: tuple[str, ...]) -> list:
    if {type(key) for key in tree} not in ({str}, {int}, set()):  # JAX cannot order others either
        raise TypeError(f"{_shown(path)} has keys {list(tree)[:4]}; use all strings or all integers")
    return list(tree)


def _describe_qtensor(q: QTensor, path: tuple[str, ...], tensors: dict[str, Any]) -> dict[str, Any]:
    try:
        q.validate()
    except ValueError as error:
        raise ValueError(f"{_shown(path)}: {error}") from error
    static = {"spec": dataclasses.asdict(q.spec), "dtype": q.dtype, **{name: list(getattr(q, name)) for name in _AXES}}
    arrays = {name: getattr(q, name) for name in _ARRAYS}
    return static | {k: _describe(v, (*path, k), tensors) for k, v in arrays.items() if v is not None}


def _describe_array(array: Any, path: tuple[str, ...], tensors: dict[str, Any]) -> dict[str, Any]:
    name = "/".join(key.replace("%", "%25").replace("/", "%2F") for key in path)
    name = name.replace("__metadata__", "%5F_metadata__") if path == ("__metadata__",) else name  # safetensors' own
    node = {"array": name, "dtype": array.dtype.name, "shape": list(array.shape)}
    if array.dtype.name not in STORABLE and _is_raw(array.dtype):
        array = np.asarray(array, order="C").view(np.uint8)
    tensors[name] = array
    return node


def _is_raw(dtype: np.dtype) -> bool:
    """Whether a dtype is a number of one byte, which can be stored as uint8."""
    return dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.number)


class _Reader:
    """Builds trees from nodes; every error is a TypeError or ValueError that names the path."""

    def __init__(self, tensors: Mapping[str, Any]):
        self.tensors = tensors
        self.used: set[str] = set()

    def build(self, node: Any, path: tuple[str, ...]) -> Any:
        match node:
            case None:
                return None
            case {"dict": list(pairs), **rest} if not rest:
                return self._dict(pairs, path)
            case {"list": list(children), **rest} if not rest:
                return [self.build(child, (*path, str(i))) for i, child in enumerate(children)]
            case {"tuple": list(children), **rest} if not rest:
                return tuple(self.build(child, (*path, str(i))) for i, child in enumerate(children))
            case {"array": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
                return self._array(name, dtype, shape, path)
            case {"qtensor": dict(fields), **rest} if not rest:
                return self._qtensor(fields, path)
        raise ValueError(f"{_shown(path)} is no node of a tree: {str(node)[:80]}")

    def _dict(self, pairs: list, path: tuple[str, ...]) -> dict:
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
                raise ValueError(f"{_shown(path)} has an entry that is no pair of key and node: {str(pair)[:80]}")
        result = {key: self.build(child, (*path, str(key))) for key, child in pairs}
        _keys(result, path)
        if len(result) < len(pairs):
            raise ValueError(f"{_shown(path)} has a key twice")
        return result

    def _array(self, name: str, dtype: str, shape: list, path: tuple[str, ...]) -> Any:
        if name not in self.tensors:
            raise ValueError(f"{_shown(path)} is the tensor {name!r}, which is missing from the files")
        self.used.add(name)
        array, wanted = self.tensors[name], jnp.dtype(dtype)
        if wanted.name not in STORABLE and _is_raw(wanted) and array.dtype == np.uint8:
            array = array.view(wanted)
        if array.dtype != wanted or list(array.shape) != shape:
            raise ValueError(
                f"{_shown(path)} should be {dtype}{shape}, but the file holds {array.dtype}{list(array.shape)}"
            )
        loaded = jnp.asarray(array)
        if loaded.dtype != wanted:  # JAX narrows 64-bit arrays without a word
            raise ValueError(f'{_shown(path)} is {dtype}; to load it, set jax.config.update("jax_enable_x64", True)')
        return loaded

    def _qtensor(self, fields: dict, path: tuple[str, ...]) -> QTensor:
        expected = {"spec", "dtype", *_AXES, *_ARRAYS}
        if not expected.difference(_OPTIONAL) <= fields.keys() <= expected:
            raise ValueError(f"{_shown(path)} has the fields {sorted(fields)}; expected {sorted(expected)}")
        arrays = {name: self.build(fields.get(name), (*path, name)) for name in _ARRAYS}
        try:
            return _qtensor(fields, arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_shown(path)}: {error}") from error


def _qtensor(fields: dict[str, Any], arrays: dict[str, Any]) -> QTensor:
    """Puts a QTensor together, with nothing taken on trust."""
    for name, array in arrays.items():
        if not isinstance(array, jax.Array) and not (array is None and name in _OPTIONAL):
            raise ValueError(f"{name} is no array")
    for name in _AXES:
        if not isinstance(fields[name], list) or not all(type(item) is int for item in fields[name]):
            raise ValueError(f"{name}={fields[name]!r} is no list of integers")
    if len(fields["in_shape"]) != len(fields["contract"]) or min(fields["in_shape"], default=0) < 0:
        raise ValueError(f"in_shape={fields['in_shape']} does not fit contract={fields['contract']}")
    spec = spec_of(fields["spec"])
    if not isinstance(fields["dtype"], str) or not jnp.issubdtype(jnp.dtype(fields["dtype"]), jnp.floating):
        raise ValueError(f"dtype={fields['dtype']!r} is no floating dtype")
    axes: dict[str, Any] = {name: tuple(fields[name]) for name in _AXES}
    q = QTensor(spec=spec, dtype=fields["dtype"], **axes, **arrays)
    q.validate()
    for name in ("input_scale", "channel_scale"):
        if getattr(q, name) is not None:
            check_scale(name, np.asarray(getattr(q, name)))
    if q.outlier_index is not None:
        index, size = np.asarray(q.outlier_index), math.prod(q.in_shape)
        if index.size and (index.min() < 0 or index.max() > size):
            raise ValueError(
                f"outlier_index reaches from {index.min()} to {index.max()}, but there are {size} channels"
            )
    if q.input_order is not None:
        order = np.moveaxis(np.asarray(q.input_order), q.input_order.ndim - 1 - len(q.out), -1)
        if not np.array_equal(np.sort(order), np.broadcast_to(np.arange(order.shape[-1]), order.shape)):
            raise ValueError("input_order does not name every input channel once")
    zero = q.input_zero_point
    if spec.activations is not None and zero is not None:
        _check_codes("input_zero_point", zero, spec.activations.spec)
    every = is_packed(spec) or spec.bits == 8  # then what is stored can be no other code of the full range
    for name in ("zero_point",) if every and not spec.narrow_range else ("codes", "zero_point"):
        if getattr(q, name) is not None:
            _check_codes(name, getattr(q, name), spec)
    return q


def _check_codes(name: str, codes: jax.Array, spec: QuantSpec) -> None:
    if codes.size and (codes.min() < spec.min_code or codes.max() > spec.max_code):
        raise ValueError(f"{name} reach from {codes.min()} to {codes.max()}, which {spec} does not")


def spec_of(fields: Any) -> QuantSpec:
    """The spec that `dataclasses.asdict` made this of, also after it was JSON; raises TypeError or ValueError."""
    if not isinstance(fields, dict):
        raise TypeError(f"spec={fields!r} must be a mapping")
    activations = fields.get("activations")
    return QuantSpec(**{**fields, "activations": None if activations is None else ActivationSpec(**activations)})


def _shown(path: tuple[str, ...]) -> str:
    return "/".join(path) or "the tree"
