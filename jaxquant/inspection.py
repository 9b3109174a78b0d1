"""What a checkpoint holds: its parameters, what they take on disk and in memory, and how their values are spread."""

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant import opening, pretrained
from jaxquant.checkpoints.native import HEADER, path_of
from jaxquant.checkpoints.orbax import OrbaxArrays
from jaxquant.checkpoints.tensors import Tensors
from jaxquant.models.config import DecoderConfig
from jaxquant.models.names import tensor_paths
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.transforms.tracing.interpreter import named_leaves

BINS = 16
_BLOCK = 2**20  # entries that are counted together, so that no whole leaf is ever copied
_BARS = " ▁▂▃▄▅▆▇█"


class Histogram(NamedTuple):
    """How often which values occur.

    Attributes:
      values: of a quantized weight, every code of its width, one per count; of an array, the edges of `BINS` bins
        between its smallest and its largest finite entry, one more than counts, or none if it has no such entry.
      counts: entries per code or bin.
    """

    values: list[int] | list[float]
    counts: list[int]

    def bars(self) -> str:
        """One line of at most `BINS` bars, blank where nothing is."""
        width = max(1, len(self.counts) // BINS)
        sums = [sum(self.counts[i : i + width]) for i in range(0, len(self.counts), width)]
        return "".join(_BARS[math.ceil(n * (len(_BARS) - 1) / max(sums))] for n in sums if max(sums))


class Leaf(NamedTuple):
    """One leaf of a checkpoint's parameter tree.

    Attributes:
      path, shape: of the parameter; a quantized weight counts as one leaf.
      stored_as: its dtype, or what its codes are.
      bits: of a code, or of an entry.
      group_size, symmetric: of its codes; None if it is not quantized, group_size also without groups.
      stored_nbytes: bytes of its tensors in the files, scales and all else that belongs to it included.
      nbytes: bytes that it takes in memory.
      nonfinite: entries of an array that are NaN or infinite; they are not in the histogram.
      histogram: of its codes, or of its entries.
    """

    path: str
    shape: tuple[int, ...]
    stored_as: str
    bits: int
    group_size: int | None
    symmetric: bool | None
    stored_nbytes: int
    nbytes: int
    nonfinite: int
    histogram: Histogram


class Inspection(NamedTuple):
    """The leaves of a checkpoint, and the bytes of tensors in its files that belong to none, as a tied output head."""

    leaves: tuple[Leaf, ...]
    left_aside_nbytes: int

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(leaf.stored_nbytes for leaf in self.leaves) + self.left_aside_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves in memory."""
        return sum(leaf.nbytes for leaf in self.leaves)


def inspect_checkpoint(name: str | os.PathLike) -> Inspection:
    """Reads whatever `load_pretrained` or `load` reads, and describes it.

    Raises:
      FileNotFoundError, ValueError: as there.
    """
    directory = opening.find_model(name)
    if opening.holds_bare_tree(directory):
        config, params = None, pretrained.load(directory)
    else:
        model, params = pretrained.load_pretrained(directory)
        config = model.config
    named = named_leaves(params, is_qtensor)
    stored = _stored(directory, config, {path for path, _ in named})
    leaves = tuple(_leaf(path, leaf, stored[path]) for path, leaf in named)
    return Inspection(leaves, stored.total() - sum(leaf.stored_nbytes for leaf in leaves))


def _stored(directory: Path, config: DecoderConfig | None, paths: set[str]) -> Counter[str]:
    """Bytes in the files by the parameter that they belong to, under their own name where that is none."""
    sizes = Counter[str]()
    if config is None or (directory / HEADER).is_file():
        orbax = opening.holds_orbax(directory)
        tensors: Tensors | OrbaxArrays = OrbaxArrays(directory) if orbax else Tensors(directory)
        owner = functools.partial(_native_owner, paths)
    else:
        tensors, owner = opening.stored_tensors(directory, config), functools.partial(_owner, tensor_paths(config))
    for name in tensors:
        sizes[owner(name)] += tensors.nbytes(name)
    return sizes


def _native_owner(paths: set[str], name: str) -> str:
    path = path_of(name)
    for known in (path, re.sub(r"^layers/\d+/", "layers/", path)):  # layers that lie apart may be loaded as a stack
        for owner in (known, known.rpartition("/")[0]):  # an array, or one of a QTensor's
            if owner in paths:
                return owner
    return path


def _owner(owners: Mapping[str, str], name: str) -> str:
    weight = name.rpartition(".")[0] + ".weight"  # whatever the parts of a quantized module are called
    return owners.get(name) or owners.get(weight, name)


def _leaf(path: str, leaf: Any, stored: int) -> Leaf:
    shape = tuple(leaf.shape)
    if is_qtensor(leaf):
        s, codes = leaf.spec, _codes(leaf)
        return Leaf(path, shape, kind_of(leaf), s.bits, s.group_size, s.symmetric, stored, leaf.nbytes, 0, codes)
    nonfinite, entries = _entries(leaf)
    bits = 8 * leaf.dtype.itemsize
    return Leaf(path, shape, kind_of(leaf), bits, None, None, stored, leaf.nbytes, nonfinite, entries)


def kind_of(leaf: Any) -> str:
    """What an array or a QTensor is stored as, for people: a dtype, or "4 bits, groups of 128, symmetric"."""
    if not is_qtensor(leaf):
        return str(leaf.dtype)
    s = leaf.spec
    group = f"groups of {s.group_size}" if s.group_size else s.granularity.replace("_", " ")
    inputs = "" if s.activations is None else f", {s.activations.kind} {s.activations.bits}-bit inputs"
    return f"{s.bits} bits, {group}, {'symmetric' if s.symmetric else 'asymmetric'}{inputs}"


def _codes(q: QTensor) -> Histogram:
    least = -(2 ** (q.spec.bits - 1))
    counts = np.zeros(2**q.spec.bits, np.int64)
    for matrix in _matrices(q):
        for block in _blocks(np.asarray(matrix.codes)):
            counts += np.bincount(block.astype(np.int16) - least, minlength=len(counts))
    return Histogram(list(range(least, -least)), counts.tolist())


def _matrices(q: QTensor) -> Iterator[QTensor]:
    """The QTensors of each matrix of a stack, whose codes alone are to be read: only one is unpacked at a time."""
    lead = q.ndim - len(q.in_shape) - len(q.out)
    for index in np.ndindex(q.values.shape[:lead]):
        yield QTensor(q.values[index], q.scale, None, q.spec, q.dtype, q.contract, q.out, q.in_shape)


def _entries(array: jax.Array) -> tuple[int, Histogram]:
    """How many entries are not finite, and the histogram of the others."""
    flat = np.asarray(array)
    low, high, finite = math.inf, -math.inf, 0
    for block in _finite_blocks(flat):
        finite += block.size
        low, high = min(low, block.min(initial=math.inf)), max(high, block.max(initial=-math.inf))
    if not finite:
        return flat.size, Histogram([], [])
    edges = np.histogram_bin_edges([], BINS, (low, high))
    counts = np.zeros(BINS, np.int64)
    for block in _finite_blocks(flat):
        counts += np.histogram(block, BINS, (edges[0], edges[-1]))[0]
    return flat.size - finite, Histogram(edges.tolist(), counts.tolist())


def _finite_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    for block in _blocks(array):
        wide = block.astype(np.float64)
        finite = np.isfinite(wide)
        yield wide if finite.all() else wide[finite]


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK))
