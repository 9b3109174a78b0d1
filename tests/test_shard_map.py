"""Models inside `shard_map`: weights, tokens and experts split over eight devices, the same as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, check, expected, oracle
from functions import normal
from jax import lax
from jax.sharding import AxisType
from meshes import (
    SPECS,
    SPLIT,
    P,
    inputs,
    mesh_of,
    model,
    on_one_device,
    params_of,
    quantize_all,
    same_statistics,
)

from jaxquant.methods.llm_int8 import LLMInt8
from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.spec import int4
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantized import quantized


def mapped(fn, mesh, in_specs, out_specs, check_vma=True):
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def tensor_parallel(mesh, check_vma=True):
    """Megatron's layers: columns of `up`, rows of `down`, columns of `head`; tokens over the other axis."""

    def local(params, x):
        def step(x, w):
            return x + lax.psum(jnp.tanh(x @ w["up"]) @ w["down"], "model"), None

        x, _ = lax.scan(step, x, {k: params[k] for k in ("up", "down")})
        return x @ params["head"]

    return mapped(local, mesh, (SPLIT, P("data")), P("data", None, "model"), check_vma)


MESHES = [(8, 1), (2, 4), (1, 8)]  # devices that tokens are split over, and weights


@pytest.mark.parametrize("shape", MESHES)
def test_calibrate_tensor_parallel_shards(shape):
    stats = calibrate(tensor_parallel(mesh_of(AxisType.Auto, *shape)), params_of(), [inputs(), inputs(8, 1)])
    same_statistics(stats, on_one_device())


def model_inputs(batches, shards):
    """What the weights are multiplied with, if each of so many shards of a batch counts its tokens from the first."""

    def reference(params, x, see):
        at = np.arange(x.size // 16) % (x.size // 16 // shards)
        for i in range(2):
            see("up", x, i, at)
            y = jnp.tanh(x @ params["up"][i])
            see("down", y, i, at)
            x = x + y @ params["down"][i]
        see("head", x, (), at)

    return oracle(batches, reference, params_of())


WIDTHS = {"up": ((2,), 16), "down": ((2,), 64), "head": ((), 16)}  # layers and input channels


@pytest.mark.parametrize("shape", MESHES)
def test_without_vma_tokens_are_held_out_by_their_position_in_the_shard(shape):
    """JAX does not say then over which devices tokens are split; every statistic is exact for that other choice."""
    batches = [inputs(), inputs(8, 1)]
    stats = calibrate(tensor_parallel(mesh_of(AxisType.Auto, *shape), check_vma=False), params_of(), batches)
    found = model_inputs(batches, shards=shape[0])
    assert (set(stats.products), stats.notes) == (set(found), ())
    for path, leads in found.items():
        check(stats.products[path].inputs, leads, *WIDTHS[path])


@pytest.mark.parametrize("check_vma", [True, False])
def test_tokens_on_several_devices_weigh_the_same(check_vma):
    """Without vma each of four devices counts its copy: the moments are the same, the counts four times as large."""
    batches = [inputs().at[0, 0, 0].set(jnp.nan), inputs(8, 1)]
    fn = mapped(model, mesh_of(), (P(), P("data")), P("data"), check_vma)
    stats, times = calibrate(fn, params_of(), batches), 1 if check_vma else 4
    for path, leads in model_inputs(batches, shards=1 if check_vma else 2).items():
        got, (_, k) = stats.products[path].inputs, WIDTHS[path]
        for i, rows in leads.items():
            want = expected(*rows, k)
            assert want["dropped"] == 1
            assert (got.count[i], got.dropped[i]) == (times * want["count"], times)
            for name in ("gram", "absmax", "mean_abs"):
                np.testing.assert_allclose(getattr(got, name)[i], want[name], atol=1e-5 * want[name].max())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_quantized_tensor_parallel_shards(spec, check_vma):
    qparams, x = quantize_all(params_of(), spec), inputs()
    fn = tensor_parallel(mesh_of(), check_vma)
    assert_same(quantized(fn)(qparams, x), model(dequantize_params(qparams), x))


def test_a_mask_reaches_shards():
    real = np.arange(6) < np.arange(1, 9)[:, None]
    want = calibrate(model, params_of(), [inputs()], mask=lambda _: real)
    got = calibrate(tensor_parallel(mesh_of()), params_of(), [inputs()], mask=lambda _: real)
    same_statistics(got, want)
    assert got.notes == ()


def test_a_mask_does_not_reach_shards_without_vma_which_is_noted():
    real = np.arange(6) < np.arange(1, 9)[:, None]
    stats = calibrate(tensor_parallel(mesh_of(), check_vma=False), params_of(), [inputs()], mask=lambda _: real)
    why = "the mask [8, 6] does not fit its input rows [4, 6], which all count as tokens"
    assert stats.notes == tuple((path, why) for path in WIDTHS)
    for path, leads in model_inputs([inputs()], shards=2).items():
        check(stats.products[path].inputs, leads, *WIDTHS[path])


def expert_layers(params, x):
    y = jnp.tanh(jnp.einsum("ecd,edf->ecf", x, params["up"]))
    return jnp.einsum("ecf,efd->ecd", y, params["down"])


def expert_params(e=8):
    return {"up": normal(e, 16, 24), "down": normal(e, 24, 16)}


@pytest.mark.parametrize("e", [8, 16])
@pytest.mark.parametrize("how", ["einsum", "scan", "vmap"])
def test_experts_over_devices(how, e):
    mesh = jax.make_mesh((8,), ("experts",), axis_types=(AxisType.Auto,))
    one = lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"]  # noqa: E731
    local = {
        "einsum": expert_layers,
        "scan": lambda p, x: lax.scan(lambda _, wx: (None, one(*wx)), None, (p, x))[1],
        "vmap": jax.vmap(one),
    }[how]
    split = {"up": P("experts"), "down": P("experts")}
    fn = mapped(local, mesh, (split, P("experts")), P("experts"))
    params, x = expert_params(e), normal(e, 20, 16)
    same_statistics(calibrate(fn, params, [x]), calibrate(expert_layers, params, [x]))
    qparams = quantize_all(params, int4(group_size=8))
    assert_same(quantized(fn)(qparams, x), expert_layers(dequantize_params(qparams), x))


def test_one_expert_on_each_device_squeezed():
    mesh = jax.make_mesh((8,), ("experts",), axis_types=(AxisType.Auto,))
    local = lambda p, x: (jnp.tanh(x[0] @ p["up"][0]) @ p["down"].reshape(24, 16))[None]  # noqa: E731
    fn = mapped(local, mesh, ({"up": P("experts"), "down": P("experts")}, P("experts")), P("experts"))
    params, x = expert_params(), normal(8, 20, 16)
    same_statistics(calibrate(fn, params, [x]), calibrate(expert_layers, params, [x]))
    qparams = quantize_all(params, int4(group_size=8))
    assert_same(quantized(fn)(qparams, x), expert_layers(dequantize_params(qparams), x))


@pytest.mark.parametrize("first", ["up", "shared"])
def test_one_expert_on_each_device_beside_a_shared_one(first):
    mesh = jax.make_mesh((8,), ("experts",), axis_types=(AxisType.Auto,))

    def local(p, x):
        ys = {"up": lambda: x[0] @ p["up"][0], "shared": lambda: x[0] @ p["shared"]}
        y = ys.pop(first)()
        return (y + ys.popitem()[1]())[None]

    fn = mapped(local, mesh, ({"up": P("experts"), "shared": P()}, P("experts")), P("experts"))
    params, x = {"up": normal(8, 16, 24), "shared": normal(16, 24)}, normal(8, 20, 16)
    got = calibrate(fn, params, [x]).products
    tokens = np.asarray(x).reshape(-1, 16), np.arange(160)
    check(got["shared"].inputs, {(): tokens}, (), 16)
    experts = {(i,): (np.asarray(x[i]), np.arange(20)) for i in range(8)}
    check(got["up"].inputs, experts, (8,), 16)


def test_tokens_and_columns_split_over_one_axis():
    """Each device has columns of `w` and tokens of its own; `v`, which is whole, sees all tokens."""
    mesh = jax.make_mesh((8,), ("both",), axis_types=(AxisType.Auto,))
    fn = mapped(lambda p, x: (x @ p["w"], x @ p["v"]), mesh, ({"w": P(None, "both"), "v": P()}, P("both")), P("both"))
    x = normal(64, 16)
    got = calibrate(fn, {"w": normal(16, 24), "v": normal(16, 8)}, [x]).products["v"].inputs
    check(got, {(): (np.asarray(x), np.arange(64))}, (), 16)


def test_one_of_several_local_experts_is_noted():
    mesh = jax.make_mesh((8,), ("experts",), axis_types=(AxisType.Auto,))
    local = lambda p, x: (x[0] @ p["up"][0] + x[1] @ p["up"][1])[None]  # noqa: E731
    fn = mapped(local, mesh, ({"up": P("experts"), "down": P("experts")}, P("experts")), P("experts"))
    x, params = normal(16, 20, 16), expert_params(16)
    both = lambda p, x: (fn(p, x), x[0] @ p["down"][0].T)  # noqa: E731
    stats = calibrate(both, params, [x])
    assert set(stats.products) == {"down"}
    assert stats.notes == (("up", "`dot_general`: it takes a part of an axis that is split over devices"),)
    qparams = {"up": quantize(params["up"], int4(group_size=8)), "down": params["down"]}
    assert_same(quantized(fn)(qparams, x), fn(dequantize_params(qparams), x))


def test_loops_and_conditionals_inside_shards():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(params, x):
        x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, None, 2)
        x = lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ params["l"][i]), x)
        return lax.cond(jnp.sum(x) > 0, lambda: x @ params["w"], lambda: x @ params["v"])

    fn = mapped(local, mesh, (P(), P("data")), P("data"))
    params = {"w": normal(16, 16), "v": normal(16, 16, seed=1), "l": normal(2, 16, 16)}
    stats, x = calibrate(fn, params, [normal(64, 16)]), normal(64, 16)
    n = sum(float(stats.products[k].inputs.count) for k in ("w", "v"))
    held = sum(int(jnp.sum(jnp.any(stats.products[k].inputs.held_out != 0, -1))) for k in ("w", "v"))
    assert n + held == 3 * 64
    qparams = quantize_all(params, int4(group_size=8))
    assert_same(quantized(fn)(qparams, x), fn(dequantize_params(qparams), x))


def test_float_rows_of_outliers_go_where_their_input_channels_are():
    x = normal(40, 32).at[:, jnp.array([1, 13, 14, 29])].multiply(40.0)
    q, _ = LLMInt8(outliers=4).quantize(
        normal(32, 16), calibrate(lambda w, x: x @ w, normal(32, 16), [x]).products[""].inputs
    )
    q = dataclasses.replace(q, outlier_weight=-3 * q.outlier_weight)  # nothing else has them
    fn = mapped(lambda x, w: lax.psum(x @ w, "model"), mesh_of(), (P(None, "model"), P("model")), P())
    got, want = quantized(lambda w, x: fn(x, w))(q, x), x @ dequantize(q)
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    ("spec", "group_size", "why"),
    [
        (P(("data", "model")), None, "split over several mesh axes"),
        (P("model"), 16, "32 input channels do not split into 4 shards of whole groups"),
    ],
)
def test_shards_that_codes_cannot_be_cut_into_are_errors(spec, group_size, why):
    def local(params, x):
        return lax.psum(x @ params["w"], tuple(jax.tree.leaves(tuple(spec))))

    fn = mapped(local, mesh_of(), ({"w": spec}, P(None, *spec)), P())
    params, x = {"w": quantize(normal(32, 16), int4(group_size=group_size))}, normal(40, 32)
    with pytest.raises(TypeError, match=f"`shard_map` meets the quantized weight 'w': .*{why}"):
        quantized(fn)(params, x)
    with pytest.warns(UserWarning, match=why):
        got = quantized(fn, allow_dense=True)(params, x)
    assert_same(got, x @ dequantize(params["w"]))


def test_a_weight_that_cannot_be_followed_into_shards_is_noted():
    spec = P(("data", "model"))
    local = lambda p, x: lax.psum(x @ p["w"], ("data", "model")) @ p["v"]  # noqa: E731
    fn = mapped(local, mesh_of(), ({"w": spec, "v": P()}, P(None, *spec)), P())
    stats = calibrate(fn, {"w": normal(32, 16), "v": normal(16, 8)}, [normal(40, 32)])
    assert stats.notes == (("w", "`shard_map`: one axis of the weight is split over several mesh axes"),)
    check(stats.products["v"].inputs, {(): (np.asarray(normal(40, 32) @ normal(32, 16)), np.arange(40))}, (), 16)


def test_gradients_through_shards():
    qparams, x = quantize_all(params_of(), int4(group_size=8)), inputs()
    fn = tensor_parallel(mesh_of())
    got = jax.grad(lambda x: jnp.sum(jnp.sin(quantized(fn)(qparams, x))))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(model(dequantize_params(qparams), x))))(x)
    assert_same(got, want, 1e-4)


def test_tokens_split_over_devices_are_held_out_as_on_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    fn = mapped(lambda w, x: x @ w, mesh, (P(), P("data")), P("data"))
    x = normal(64, 16)
    check(calibrate(fn, normal(16, 8), [x]).products[""].inputs, {(): (np.asarray(x), np.arange(64))}, (), 16)
