"""A small model, and what lays it out over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from functions import normal
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxquant.numerics.affine import quantize
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.calibrate import calibrate

P = PartitionSpec
SPECS = [int8(), int4(group_size=8), int3(group_size=8, symmetric=False)]


def mesh_of(kind=AxisType.Auto, data=2, model=4):
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind, kind), devices=devices)


def params_of():
    return {"up": normal(2, 16, 64), "down": normal(2, 64, 16), "head": normal(16, 32)}


def inputs(n=8, seed=0):
    return normal(n, 6, 16, seed=seed)


def model(params, x):
    """Two layers, tensor-parallel: the inner width is split."""

    def step(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = lax.scan(step, x, {k: params[k] for k in ("up", "down")})
    return x @ params["head"]


SPLIT = {"up": P(None, None, "model"), "down": P(None, "model", None), "head": P(None, "model")}


def same_statistics(got, want):
    assert set(got.products) == set(want.products)
    assert got.notes == want.notes
    for path, product in want.products.items():
        found = got.products[path]
        assert (found.contract, found.out) == (product.contract, product.out)
        for a, b in zip(jax.tree.leaves(found.inputs), jax.tree.leaves(product.inputs), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5 * float(jnp.max(jnp.abs(b)) + 1e-9))


def quantize_all(params, spec, **axes):
    return jax.tree.map(lambda a: quantize(a, spec, **axes), params)


def put(tree, mesh, specs):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)


def placed_params(params, mesh, kind):
    """The model's parameters: split where axes are automatic, on each device whole where they are explicit."""
    return put(params, mesh, SPLIT if kind == AxisType.Auto else {k: P() for k in SPLIT})


def split_qtensor(q, mesh, spec):
    """The QTensor on the mesh, its arrays split as the weight is; the scales of a split contracting axis are not."""
    return jax.tree.map(
        lambda a: jax.device_put(
            a, NamedSharding(mesh, P(*(n if a.shape[i] % 4 == 0 else None for i, n in enumerate(spec))))
        ),
        q,
    )


@functools.cache
def on_one_device():
    """Statistics on one device."""
    return calibrate(model, params_of(), [inputs(), inputs(8, 1)])
