"""Tensors in safetensors files: `model.safetensors`, or shards listed in `model.safetensors.index.json`.

The layout is Hugging Face's (https://huggingface.co/docs/safetensors). Tensors are read one at a time, into memory of
their own; those that are copied or looked through at once can be mapped instead, which takes none. (A file that shrinks
under a map kills the process, so maps are not kept.) A shard that the index names must lie in the directory itself;
symbolic links are followed within it and within the hub's cache, which is made of them.
"""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxquant.checkpoints.json_file import check_link, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the size at which Hugging Face starts another file
PICKLES = ("*.bin", "*.pth", "*.pt")

# What NumPy's reader of safetensors knows, by the format's own names and by NumPy's.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
STORABLE = frozenset(_DTYPES.values())


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a directory by name, each read when it is asked for.

    Arrays have the dtype and shape of the file (bfloat16 from `ml_dtypes`) and own their memory.

    Raises, when it is made:
      FileNotFoundError: the directory holds no safetensors, or a shard is missing.
      ValueError: a file is truncated or corrupt, the index does not describe the shards or points outside the
        directory, or a dtype is not one of `STORABLE`.
    """

    def __init__(self, directory: Path):
        self._places: dict[str, _Place] = {}
        index = _read_index(directory)
        for file in _files(directory, index):
            places = _read_header(file)
            for name in places:
                if name in self._places:
                    raise ValueError(f"{directory}: tensor {name} lies in two files, {file.name} is the second")
            _check_index(file, places, index)
            self._places |= places

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        array = np.empty(place.shape, place.dtype)
        _check_place(place)
        with open(place.file, "rb") as file:
            file.seek(place.start)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise ValueError(f"{place.file} has become shorter while it was read; download or write it again")
        return array

    @property
    def mapped(self) -> "MappedTensors":
        """The same tensors as read-only memory maps, whose pages are the file's and not the process's."""
        return MappedTensors(self)

    def map(self, name: str) -> np.ndarray:
        """One tensor of `mapped`. Errors as when it is read."""
        place = self._places[name]
        _check_place(place)
        if not math.prod(place.shape):
            return np.empty(place.shape, place.dtype)
        whole = np.memmap(place.file, np.uint8, "r", place.start, (math.prod(place.shape) * place.dtype.itemsize,))
        return np.asarray(whole).view(place.dtype).reshape(place.shape)

    @classmethod
    def of_file(cls, file: Path) -> "Tensors":
        """The tensors of one file of whatever name. Errors as above."""
        tensors = cls.__new__(cls)
        tensors._places = _read_header(file)
        return tensors

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The same tensors, some of them under other names, which are given by the old ones."""
        other = copy.copy(self)
        other._places = {names.get(name, name): place for name, place in self._places.items()}
        return other

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype (NumPy's name for it) and shape of a tensor, without reading it."""
        place = self._places[name]
        return place.dtype.name, place.shape

    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, without reading it."""
        return self._places[name].dtype.name

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor in its file, without reading it."""
        dtype, shape = self.layout(name)
        return jnp.dtype(dtype).itemsize * math.prod(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class MappedTensors(Mapping[str, np.ndarray]):
    """The tensors of `Tensors` by name, each mapped when it is asked for."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors.map(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def check_scale(name: str, scale: np.ndarray) -> None:
    """Raises ValueError for a scale that is not finite, and for one of inputs or channels that is not positive."""
    positive = not name.endswith(("input_scale", "channel_scale")) or (scale > 0).all()
    if not np.isfinite(scale).all() or not positive:
        raise ValueError(f"{name} holds what is no scale: zeros, negative numbers, NaN or infinity")


def write_tensors(directory: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays into one file, or into shards of at most `SHARD_BYTES` with an index, and reads them back.

    Args:
      directory: an existing directory without safetensors.
      tensors: name -> NumPy or JAX array of a dtype in `STORABLE`.

    Raises:
      ValueError: a dtype has no place in the file.
      OSError: the disk refuses, or what it returns is not what was written.
    """
    for name, array in tensors.items():
        if array.dtype.name not in STORABLE or not array.dtype.isnative:
            raise ValueError(f"{name} is {array.dtype}, which cannot be stored; cast it to one of {sorted(STORABLE)}")
    shards = _shards(tensors)
    if len(shards) == 1:
        _write_file(directory / SINGLE, tensors, shards[0])
    else:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for file, names in zip(files, shards, strict=True):
            _write_file(directory / file, tensors, names)
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum(array.nbytes for array in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _verify(directory, tensors)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays agree in dtype, shape and every bit (NaNs included)."""
    a, b = np.asarray(a, order="C"), np.asarray(b, order="C")
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _verify(directory: Path, tensors: Mapping[str, Any]) -> None:
    read = Tensors(directory)
    for name, array in tensors.items():
        if name not in read or not same_bits(read[name], array):
            raise OSError(f"{directory}: tensor {name} reads back differently from what was written; check the disk")


def _shards(tensors: Mapping[str, Any]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def _write_file(file: Path, tensors: Mapping[str, Any], names: Iterable[str]) -> None:
    # In C order, because the writer takes the bytes as they lie, without a look at the strides.
    arrays = {name: np.asarray(tensors[name], order="C") for name in names}
    try:
        save_file(arrays, file, metadata={"format": "pt"})  # transformers refuses a file without this
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    os.chmod(file, file.parent.stat().st_mode & 0o666)  # the writer makes files that only their owner can read


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if the directory has a single file."""
    if (directory / SINGLE).exists():
        return None
    if not (directory / INDEX).exists():
        pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
        if pickles:
            raise FileNotFoundError(
                f"{directory} holds PyTorch pickles only ({pickles[0]}), which can run code when they are read; "
                "convert it to safetensors, for example with transformers' save_pretrained"
            )
        raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}; it is no checkpoint")
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{directory / INDEX} has no 'weight_map' from tensor names to files; download it again")
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{directory / INDEX} places {name} in {file!r}; expected the name of a .safetensors file "
                "in the directory itself"
            )
    return index


def write_index(directory: Path, files: Iterable[str]) -> None:
    """Writes the index of files of a directory; raises OSError or ValueError for one that is missing or damaged."""
    places = {name: place for file in files for name, place in _read_header(directory / file).items()}
    size = sum(place.dtype.itemsize * math.prod(place.shape) for place in places.values())
    weight_map = {name: place.file.name for name, place in places.items()}
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _files(directory: Path, index: Mapping[str, str] | None) -> list[Path]:
    return [directory / name for name in sorted({SINGLE} if index is None else set(index.values()))]


class _Place(NamedTuple):
    """Where a tensor lies: the file, and its first byte there."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]


def _check_place(place: _Place) -> None:
    if not place.file.is_file():
        raise FileNotFoundError(f"{place.file} has disappeared while it was read; download or write it again")
    if place.file.stat().st_size < place.start + place.dtype.itemsize * math.prod(place.shape):
        raise ValueError(f"{place.file} has become shorter while it was read; download or write it again")


def _read_header(file: Path) -> dict[str, _Place]:
    """The tensors of a file. The format's own reader checks that they fit together, and that the file is whole."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; download or write the checkpoint again")
    check_link(file)
    try:
        safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no readable safetensors file ({error}); it may be truncated, download or write it again"
        ) from error
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {name: _place(file, name, 8 + size, entry) for name, entry in header.items()}


def _place(file: Path, name: str, base: int, entry: dict[str, Any]) -> _Place:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{file}: tensor {name} has dtype {entry['dtype']}; only {', '.join(_DTYPES)} are read")
    dtype = jnp.dtype(_DTYPES[entry["dtype"]])
    return _Place(file, base + entry["data_offsets"][0], dtype, tuple(entry["shape"]))


def _check_index(file: Path, names: Iterable[str], index: Mapping[str, str] | None) -> None:
    expected = set() if index is None else {name for name, place in index.items() if place == file.name}
    missing = sorted(expected.difference(names))
    if missing:
        raise ValueError(f"{file} lacks {missing[0]}, which {INDEX} places there; download the checkpoint again")
