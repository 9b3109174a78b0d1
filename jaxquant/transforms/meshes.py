"""Weights on a mesh with explicit axes: methods run sharded as the compiler sees fit, as on any other mesh."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

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


def _mesh_of(a: Any) -> Mesh | None:
    sharding = a.sharding if isinstance(a, jax.Array) else None
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def set_one(twins: Mapping[Mesh, Mesh]) -> contextlib.AbstractContextManager:
    """A context in which a twin is the mesh that is set; nothing without any."""
    return jax.set_mesh(next(iter(twins.values()))) if twins else contextlib.nullcontext()
