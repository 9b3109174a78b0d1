"""Orbax: any parameter tree on any devices, each array shard by shard, so that no host ever holds a whole one.

A directory with `jaxquant.json`, as in the native format,

    {"format": "orbax", "version": 1, "tree": NODE, "empty": [[name, dtype, shape], ...]}

and `arrays`, what Orbax writes of the dict of all arrays by name (OCDBT, not compressed). It does not store arrays
without an entry; those are listed under `empty`.

One process writes and reads.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from jaxquant.checkpoints.directory import FOLDER, MANIFEST
from jaxquant.checkpoints.json_file import read_json, write_json
from jaxquant.checkpoints.native import HEADER, build_tree, describe_tree, path_of, read_header
from jaxquant.checkpoints.tensors import same_bits

FORMAT = "orbax"
LIMIT = 2**31  # of the sizes of axes
Placement = Callable[[str, jax.ShapeDtypeStruct], Sharding]


def write_orbax(directory: Path, tree: Any) -> None:
    """Writes a tree into an existing directory, and reads every array back. Arguments and errors as `write_tree`."""
    if jax.process_count() > 1:
        raise ValueError(f"format='orbax' is written by one process, and this is one of {jax.process_count()}")
    node, arrays = describe_tree(tree)
    empty = {name: a for name, a in arrays.items() if not a.size}
    stored = {name: a for name, a in arrays.items() if a.size}
    if stored:
        _checkpointer().save((directory / FOLDER).absolute(), args=ocp.args.PyTreeSave(stored))
    listed = [[name, a.dtype.name, list(a.shape)] for name, a in empty.items()]
    write_json(directory / HEADER, {"format": FORMAT, "version": 1, "tree": node, "empty": listed})
    read = OrbaxArrays(directory)
    for name, array in stored.items():
        sharding = array.sharding if isinstance(array, jax.Array) else None
        if name not in read or not _same(read.restore(name, sharding), array):
            raise OSError(f"{directory}: array {name} reads back differently from what was written; check the disk")


def read_orbax(directory: Path, placement: Placement | None = None) -> Any:
    """Reads the tree of a directory.

    Args:
      directory: what `write_orbax` wrote.
      placement: the sharding of an array by its path ("layers/mlp/up_proj/kernel/values") and its shape and dtype;
        None puts everything on the first device.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or a sharding does not fit its array.
    """
    file = directory / HEADER
    return build_tree(file, read_header(file, FORMAT), OrbaxArrays(directory, placement))


class OrbaxArrays(Mapping[str, Any]):
    """The arrays of a directory by name, each read when it is asked for. Arguments and errors as `read_orbax`."""

    def __init__(self, directory: Path, placement: Placement | None = None):
        self._directory, self._placement = directory, placement
        self._layouts: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._empty = _read_empty(directory / HEADER)
        if (directory / FOLDER).is_dir():
            self._layouts = self._read_layouts()

    def __getitem__(self, name: str) -> Any:
        if name in self._empty:
            return jnp.zeros(*self._empty[name])
        dtype, shape = self._layouts[name]
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            return self.restore(name, None)
        if self._placement is None:
            return self.restore(name, SingleDeviceSharding(jax.devices()[0]))
        sharding = self._placement(path_of(name), jax.ShapeDtypeStruct(shape, dtype))
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(f"the sharding of {path_of(name)} does not fit {list(shape)}: {error}") from error
        return self.restore(name, sharding)

    def restore(self, name: str, sharding: Sharding | None) -> Any:
        """Reads an array on devices; None reads a NumPy array."""
        args = ocp.RestoreArgs(np.ndarray) if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)
        wanted = ocp.args.PyTreeRestore({name: 0}, {name: args}, partial_restore=True)
        return self._ask(lambda checkpointer, path: checkpointer.restore(path, args=wanted))[name]

    def nbytes(self, name: str) -> int:
        """The bytes of an array in its files, without reading it."""
        if name in self._empty:
            return 0
        dtype, shape = self._layouts[name]
        return dtype.itemsize * math.prod(shape)

    def __iter__(self) -> Iterator[str]:
        yield from self._empty
        yield from self._layouts

    def __len__(self) -> int:
        return len(self._empty) + len(self._layouts)

    def _read_layouts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtypes and shapes, which the files have room for: a few bytes may say that there are terabytes."""
        folder = self._directory / FOLDER
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder / MANIFEST} is missing; write the checkpoint again")
        tree = self._ask(lambda checkpointer, path: checkpointer.metadata(path).item_metadata.tree)
        if not isinstance(tree, dict) or any(getattr(leaf, "shape", None) is None for leaf in tree.values()):
            raise ValueError(f"{folder} holds something else than arrays by name; write the checkpoint again")
        layouts = {name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in tree.items()}
        room = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        needed = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layouts.values())
        if needed > room or any(size < 1 for _, shape in layouts.values() for size in shape):
            raise ValueError(f"{folder} should hold {needed} bytes, but its files have {room}; write it again")
        return layouts

    def _ask(self, question: Callable[[ocp.Checkpointer, Path], Any]) -> Any:
        try:
            return question(_checkpointer(), (self._directory / FOLDER).absolute())
        except Exception as error:  # of whatever library reads the files, or of what it makes of damaged ones
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"{self._directory / FOLDER} is damaged, Orbax does not read it ({reason}); write the checkpoint again"
            ) from error


def is_orbax(directory: Path) -> bool:
    """Whether a directory with a header holds what `write_orbax` writes."""
    return read_json(directory / HEADER).get("format") == FORMAT


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))


def _read_empty(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the arrays without an entry."""
    listed, found = read_json(file).get("empty"), {}
    for entry in listed if isinstance(listed, list) else [listed]:
        match entry:
            case [str(name), str(dtype), list(shape)] if 0 in shape and all(
                type(n) is int and 0 <= n < LIMIT for n in shape
            ):
                try:
                    found[name] = tuple(shape), jnp.dtype(dtype)
                except TypeError as error:
                    raise ValueError(f"{file}: {name!r}: {error}") from error
            case _:
                raise ValueError(f"{file}: {str(entry)[:80]!r} is no name, dtype and shape of an empty array")
    return found


def _same(read: Any, written: Any) -> bool:
    """Whether two arrays agree in every bit, on each device."""
    if not isinstance(written, jax.Array):
        return same_bits(read, written)
    pairs = zip(read.addressable_shards, written.addressable_shards, strict=True)
    return all(a.device == b.device and same_bits(a.data, b.data) for a, b in pairs)
