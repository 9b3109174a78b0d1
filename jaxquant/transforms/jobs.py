"""Weights to quantize, taken apart into matrices `[in, out]` that run together, and put together again."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.numerics.layout import to_canonical
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms import meshes
from jaxquant.transforms.tracing import compat

CHUNK_BYTES = 2**25  # matrices and statistics that one compiled call works on, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One weight to quantize.

    Attributes:
      path, leaf, config: where it lies, its array, and its method config.
      contract, out: its axes' roles, negative.
      inputs: the statistics of its inputs, `[*lead, ...]`, if there are any.
      channel_scale: `[*lead, K]`, for methods that scale channels.
      facts: what they say about it, by name, `[*lead]`.
    """

    path: str
    leaf: Any
    config: Any
    contract: tuple[int, ...]
    out: tuple[int, ...]
    inputs: InputStatistics | None
    channel_scale: jax.Array | None = None
    facts: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Sizes of the contracting axes."""
        return tuple(self.leaf.shape[a] for a in self.contract)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the axes that stack matrices."""
        named = self.contract + self.out
        return tuple(n for i, n in enumerate(self.leaf.shape) if i - self.leaf.ndim not in named)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of devices that it lies on, if it is on several."""
        return meshes.mesh_of(self.leaf)

    @property
    def count(self) -> int:
        """How many matrices it is."""
        return math.prod(self.lead)

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of a matrix."""
        return math.prod(self.in_shape), math.prod(self.leaf.shape[a] for a in self.out)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind run in one compiled program."""
        dtype = None if self.inputs is None else self.inputs.gram.dtype
        return self.config, self.shape, self.leaf.dtype, dtype

    def types(self, size: int) -> tuple[jax.ShapeDtypeStruct, Any, Any]:
        """The types of `size` of its matrices, of their statistics and channel scales, placed as they will be."""
        arrays = jax.tree.leaves((self.leaf, self.inputs))
        fixed = {a.sharding for a in arrays if isinstance(a, jax.Array) and a.committed and len(a.devices()) == 1}
        place = fixed.pop() if len(fixed) == 1 else None

        def stacked(shape, dtype):
            return jax.ShapeDtypeStruct((size, *shape), jax.dtypes.canonicalize_dtype(dtype), sharding=place)

        inputs = jax.tree.map(lambda a: stacked(a.shape[len(self.lead) :], a.dtype), self.inputs)
        scale = None
        if self.inputs is not None and hasattr(self.config, "channel_scale"):
            scale = stacked(self.shape[:1], self.inputs.gram.dtype)
        return stacked(self.shape, self.leaf.dtype), inputs, scale

    def assemble(self, pieces: list[QTensor]) -> QTensor:
        """The weight's QTensor, from those of its matrices `[count, in, out]`."""
        out_shape = tuple(self.leaf.shape[a] for a in self.out)

        def joined(*arrays):
            a = jnp.concatenate(arrays)
            wide = out_shape if a.shape[-1] == math.prod(out_shape) else (1,) * len(out_shape)
            return a.reshape(*self.lead, a.shape[1], *wide)

        q = jax.tree.map(joined, *pieces)
        return dataclasses.replace(q, contract=self.contract, out=self.out, in_shape=self.in_shape)


class Span(NamedTuple):
    """Matrices of one weight that stand next to each other."""

    job: Job
    start: int
    size: int

    def matrices(self) -> tuple[jax.Array, InputStatistics | None, jax.Array | None]:
        """The matrices `[size, in, out]`, their statistics and their channel scales `[size, ...]`."""
        job = self.job
        w, (inputs, scale) = _part(
            job.leaf, (job.inputs, job.channel_scale), self.start, self.size, job.contract, job.out, job.mesh
        )
        return w, inputs, scale


def chunks(jobs: list[Job]) -> Iterator[tuple[list[Span], int]]:
    """Matrices of one kind, as many as one call may work on; and how many those are in a full chunk.

    Chunks of one kind have about one size, so that little of the last is missing.
    """
    kinds: dict[tuple, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    for (_, (k, n), _, _), members in kinds.items():
        count = sum(job.count for job in members)
        most = max(1, CHUNK_BYTES // (4 * k * (k + n)))
        size = -(-count // -(-count // most))
        spans: list[Span] = []
        room = size
        for job in members:
            start = 0
            while start < job.count:
                spans.append(Span(job, start, min(job.count - start, room)))
                start, room = start + spans[-1].size, room - spans[-1].size
                if not room:
                    yield spans, size
                    spans, room = [], size
        if spans:
            yield spans, size


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6), compiler_options=compat.COMPILER_OPTIONS)
def _part(leaf, others, start, size: int, contract: tuple[int, ...], out: tuple[int, ...], mesh: Mesh | None):
    lead = leaf.ndim - len(contract) - len(out)
    w = to_canonical(leaf, contract, out)
    w = w.reshape(math.prod(w.shape[:lead]), w.shape[lead], math.prod(w.shape[lead + 1 :]))
    others = jax.tree.map(lambda a: a.reshape(len(w), *a.shape[lead:]), others)
    w, others = take((w, others), start, size)
    if mesh is None:
        return w, others
    w = lax.with_sharding_constraint(w, meshes.split(mesh, mesh.axis_names, w.shape, -1))
    return w, lax.with_sharding_constraint(others, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, compiler_options=compat.COMPILER_OPTIONS)
def count_not_finite(leaf: jax.Array) -> jax.Array:
    """How many entries are NaN or infinite; compiled, or a large array of booleans would be written first."""
    return jnp.sum(~jnp.isfinite(leaf))


@functools.partial(jax.jit, static_argnums=2)
def take(tree, start, size: int):
    """Some of the matrices of a stack, or of a tree of stacks."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), tree)
