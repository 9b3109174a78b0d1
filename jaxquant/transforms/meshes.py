"""Weights on a mesh of devices, which may belong to several processes.

Statistics and methods run on all devices of the mesh that a weight lies on: a method works on output channels, which
hardly depend on each other, so these are split over all axes, and Gram matrices are the same everywhere. Meshes with
explicit axes are replaced by ones with automatic axes meanwhile.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxquant.transforms.calibrate import Statistics


def automatic_twins(tree: Any) -> dict[Mesh, Mesh]:
    """For each mesh of a tree's arrays that has explicit axes, one of the same devices whose axes are automatic."""
    explicit = {mesh for a in jax.tree.leaves(tree) if (mesh := _mesh_of(a)) and AxisType.Explicit in mesh.axis_types}
    return {m: Mesh(m.devices, m.axis_names, axis_types=(AxisType.Auto,) * len(m.axis_names)) for m in explicit}


def moved(tree: Any, twins: Mapping[Mesh, Mesh]) -> Any:
    """The tree, with arrays on other meshes of the same devices; no data moves."""

    def one(a):
        mesh = _mesh_of(a)
        return jax.device_put(a, NamedSharding(twins[mesh], a.sharding.spec)) if mesh and mesh in twins else a

    return jax.tree.map(one, tree) if twins else tree


def moved_statistics(stats: Statistics | None, twins: Mapping[Mesh, Mesh]) -> Statistics | None:
    """The same for statistics; products that share theirs go on sharing them."""
    if stats is None or not twins:
        return stats
    inputs = {id(product.inputs): product.inputs for product in stats.products.values()}
    inputs = {key: moved(value, twins) for key, value in inputs.items()}
    products = {p: dataclasses.replace(v, inputs=inputs[id(v.inputs)]) for p, v in stats.products.items()}
    return dataclasses.replace(stats, products=products)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree lie on: that of the first which is on several devices."""
    meshes = (_mesh_of(a) for a in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if mesh is not None and mesh.size > 1), None)


def split(mesh: Mesh, axis: str | tuple[str, ...], shape: Sequence[int], along: int) -> NamedSharding:
    """Splits an array along one of its axes over axes of a mesh, where the devices divide it; otherwise copies."""
    names = (axis,) if isinstance(axis, str) else axis
    if not set(names) <= set(mesh.axis_names) or shape[along] % math.prod(mesh.shape[name] for name in names):
        return NamedSharding(mesh, PartitionSpec())
    spec: list[Any] = [None] * len(shape)
    spec[along] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """The tree on a mesh with an axis "model", over which the last axis of every matrix is split; no mesh: as it is."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: put(a, split(mesh, "model", a.shape, -1) if a.ndim > 1 else whole), tree)


def put_batch(a: Any, mesh: Mesh | None) -> jax.Array:
    """An array on a mesh, its first axis split over the axis "data"; no mesh: where arrays lie by default."""
    return jnp.asarray(a) if mesh is None else put(a, split(mesh, "data", a.shape, 0))


def put(a: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on devices of all of them."""
    a = np.asarray(a)
    return jax.make_array_from_callback(a.shape, sharding, lambda at: a[at])


def fetched(tree: Any) -> Any:
    """The tree with whole NumPy arrays, also of what lies on devices of several processes, all of which must ask."""

    def one(a):
        if isinstance(a, jax.Array) and not a.is_fully_addressable and not a.is_fully_replicated:
            a = multihost_utils.process_allgather(a, tiled=True)
        return np.asarray(a)

    return jax.tree.map(one, tree)


def _mesh_of(a: Any) -> Mesh | None:
    sharding = a.sharding if isinstance(a, jax.Array) else None
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def set_one(twins: Mapping[Mesh, Mesh]) -> contextlib.AbstractContextManager:
    """A context in which a twin is the mesh that is set; nothing without any."""
    return jax.set_mesh(next(iter(twins.values()))) if twins else contextlib.nullcontext()
