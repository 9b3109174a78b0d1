"""Models on a mesh of eight devices: the same statistics and results as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same
from jax import lax
from jax.sharding import AxisType, NamedSharding
from meshes import (
    SPECS,
    SPLIT,
    P,
    inputs,
    mesh_of,
    model,
    on_one_device,
    params_of,
    placed_params,
    put,
    quantize_all,
    same_statistics,
    split_qtensor,
)

from jaxquant.methods.chain import Chain
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.numerics.spec import int4, int8
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.quantized import quantized


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_calibrate_under_a_mesh(kind):
    mesh, want = mesh_of(kind), on_one_device()
    with jax.set_mesh(mesh):
        params = placed_params(params_of(), mesh, kind)
        batches = [put(x, mesh, P("data")) for x in (inputs(), inputs(8, 1))]
        same_statistics(calibrate(jax.jit(model), params, batches), want)


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_under_a_mesh_of_auto_axes(spec):
    mesh, qparams, x = mesh_of(), quantize_all(params_of(), spec), inputs()
    want = model(dequantize_params(qparams), x)
    placed = {k: split_qtensor(q, mesh, SPLIT[k]) for k, q in qparams.items()}
    run = jax.jit(quantized(model), out_shardings=NamedSharding(mesh, P("data", None, "model")))
    got = run(placed, put(x, mesh, P("data")))
    assert_same(got, want)
    assert got.sharding.spec == P("data", None, "model")
    assert placed["head"].values.sharding.spec == P(None, "model")


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_under_a_mesh_of_explicit_axes(spec):
    mesh, qparams, x = mesh_of(AxisType.Explicit), quantize_all(params_of(), spec), inputs()
    want = model(dequantize_params(qparams), x)
    with jax.set_mesh(mesh):
        got = quantized(model)(put(qparams, mesh, jax.tree.map(lambda _: P(), qparams)), put(x, mesh, P("data")))
    assert_same(got, want)
    assert got.sharding.spec == P("data", None, None)


def test_a_sharding_constraint_survives():
    mesh = mesh_of()

    def fn(params, x):
        return lax.with_sharding_constraint(model(params, x), NamedSharding(mesh, P(None, "data", None)))

    got = jax.jit(quantized(fn))(quantize_all(params_of(), int8()), inputs())
    assert got.sharding.spec == P(None, "data")


def explicit_model(params, x):
    """Tensor-parallel with explicit types, where a product over a split axis says what becomes of its result."""
    for i in range(2):
        y = jnp.tanh(x @ params["up"][i])
        x = x + jnp.einsum("btf,fd->btd", y, params["down"][i], out_sharding=P("data", None, None))
    return x @ params["head"]


def test_calibrate_tensor_parallel_under_explicit_axes():
    mesh, want = mesh_of(AxisType.Explicit), on_one_device()
    with jax.set_mesh(mesh):
        params, batches = put(params_of(), mesh, SPLIT), [put(x, mesh, P("data")) for x in (inputs(), inputs(8, 1))]
        same_statistics(calibrate(explicit_model, params, batches), want)


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_tensor_parallel_under_explicit_axes(spec):
    mesh, qparams, x = mesh_of(AxisType.Explicit), quantize_all(params_of(), spec), inputs()
    want = model(dequantize_params(qparams), x)
    with jax.set_mesh(mesh):
        got = quantized(explicit_model)(
            {k: split_qtensor(q, mesh, SPLIT[k]) for k, q in qparams.items()}, put(x, mesh, P("data"))
        )
    assert_same(got, want)
    assert got.sharding.spec == P("data", None, "model")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "config", [GPTQ(int4(group_size=8)), Chain(SmoothQuant(0.5), RTN(int8()))], ids=["gptq", "smoothquant"]
)
def test_methods_give_sharded_weights_the_codes_of_one_device(kind, config):
    batches, mesh = [inputs(), inputs(8, 1)], mesh_of(kind)
    want, _ = quantize_params(params_of(), on_one_device(), config)
    with jax.set_mesh(mesh):
        params = put(params_of(), mesh, SPLIT)
        stats = calibrate(explicit_model if kind == AxisType.Explicit else model, params, batches)
        got, _ = quantize_params(params, stats, config)
    for name, q in got.items():
        assert q.scale.sharding.mesh == mesh
        assert not q.values.sharding.is_fully_replicated
        assert np.mean(np.asarray(q.codes) == np.asarray(want[name].codes)) > 0.99
