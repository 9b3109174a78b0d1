"""Models on a mesh of eight devices: the same statistics and results as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_calibrate import check
from test_quantized import assert_same

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.quantized import quantized

P = PartitionSpec
SPECS = [int8(), int4(group_size=8), int3(group_size=8, symmetric=False)]


def mesh_of(kind=AxisType.Auto, data=2, model=4):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind, kind))


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


def same_statistics(got, want, but=()):
    assert set(got.products) == set(want.products)
    assert got.notes == want.notes
    for path, product in want.products.items():
        found = got.products[path]
        assert (found.contract, found.out) == (product.contract, product.out)
        for a, b in zip(jax.tree.leaves(found.inputs), jax.tree.leaves(product.inputs), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5 * float(jnp.max(jnp.abs(b)) + 1e-9))


def dense_of(tree):
    return jax.tree.map(lambda a: dequantize(a) if is_qtensor(a) else a, tree, is_leaf=is_qtensor)


def quantize_all(params, spec, **axes):
    return jax.tree.map(lambda a: quantize(a, spec, **axes), params)


def put(tree, mesh, specs):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)


def split_qtensor(q, mesh, spec):
    """The QTensor on the mesh, its arrays split as the weight is; the scales of a split contracting axis are not."""
    return jax.tree.map(
        lambda a: jax.device_put(
            a, NamedSharding(mesh, P(*(n if a.shape[i] % 4 == 0 else None for i, n in enumerate(spec))))
        ),
        q,
    )


@pytest.fixture(scope="module")
def single():
    """Statistics on one device."""
    return calibrate(model, params_of(), [inputs(), inputs(8, 1)])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_calibrate_under_a_mesh(kind, single):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = put(params_of(), mesh, SPLIT if kind == AxisType.Auto else {k: P() for k in SPLIT})
        batches = [put(x, mesh, P("data")) for x in (inputs(), inputs(8, 1))]
        same_statistics(calibrate(jax.jit(model), params, batches), single)


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_under_a_mesh_of_auto_axes(spec):
    mesh, qparams, x = mesh_of(), quantize_all(params_of(), spec), inputs()
    want = model(dense_of(qparams), x)
    placed = {k: split_qtensor(q, mesh, SPLIT[k]) for k, q in qparams.items()}
    run = jax.jit(quantized(model), out_shardings=NamedSharding(mesh, P("data", None, "model")))
    got = run(placed, put(x, mesh, P("data")))
    assert_same(got, want)
    assert got.sharding.spec == P("data", None, "model")
    assert placed["head"].values.sharding.spec == P(None, "model")


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_under_a_mesh_of_explicit_axes(spec):
    mesh, qparams, x = mesh_of(AxisType.Explicit), quantize_all(params_of(), spec), inputs()
    want = model(dense_of(qparams), x)
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


# ------------------------------------------------------------------------------------------------------------ shard_map


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


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_calibrate_tensor_parallel_shards(shape, check_vma, single):
    fn = tensor_parallel(mesh_of(AxisType.Auto, *shape), check_vma)
    stats = calibrate(fn, params_of(), [inputs(), inputs(8, 1)])
    if check_vma or shape == (1, 8):
        same_statistics(stats, single)
    else:  # positions of tokens on other devices are not known, so the split is another one; no token is lost
        for path, product in single.products.items():
            assert stats.products[path].inputs.gram.shape == product.inputs.gram.shape
            assert jnp.all(stats.products[path].inputs.count > 0.8 * product.inputs.count)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_quantized_tensor_parallel_shards(spec, check_vma):
    qparams, x = quantize_all(params_of(), spec), inputs()
    fn = tensor_parallel(mesh_of(), check_vma)
    assert_same(quantized(fn)(qparams, x), model(dense_of(qparams), x))


def test_a_mask_reaches_shards():
    real = np.arange(6) < np.arange(1, 9)[:, None]
    want = calibrate(model, params_of(), [inputs()], mask=lambda _: real)
    got = calibrate(tensor_parallel(mesh_of()), params_of(), [inputs()], mask=lambda _: real)
    same_statistics(got, want)
    assert got.notes == ()


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
    assert_same(quantized(fn)(qparams, x), expert_layers(dense_of(qparams), x))


def test_one_expert_on_each_device_squeezed():
    mesh = jax.make_mesh((8,), ("experts",), axis_types=(AxisType.Auto,))
    local = lambda p, x: (jnp.tanh(x[0] @ p["up"][0]) @ p["down"].reshape(24, 16))[None]  # noqa: E731
    fn = mapped(local, mesh, ({"up": P("experts"), "down": P("experts")}, P("experts")), P("experts"))
    params, x = expert_params(), normal(8, 20, 16)
    same_statistics(calibrate(fn, params, [x]), calibrate(expert_layers, params, [x]))
    qparams = quantize_all(params, int4(group_size=8))
    assert_same(quantized(fn)(qparams, x), expert_layers(dense_of(qparams), x))


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
    assert_same(quantized(fn)(qparams, x), fn(dense_of(qparams), x))


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
    assert_same(quantized(fn)(qparams, x), fn(dense_of(qparams), x))


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


def explicit_model(params, x):
    """Tensor-parallel with explicit types, where a product over a split axis says what becomes of its result."""
    for i in range(2):
        y = jnp.tanh(x @ params["up"][i])
        x = x + jnp.einsum("btf,fd->btd", y, params["down"][i], out_sharding=P("data", None, None))
    return x @ params["head"]


def test_calibrate_tensor_parallel_under_explicit_axes(single):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, batches = put(params_of(), mesh, SPLIT), [put(x, mesh, P("data")) for x in (inputs(), inputs(8, 1))]
        same_statistics(calibrate(explicit_model, params, batches), single)


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_tensor_parallel_under_explicit_axes(spec):
    mesh, qparams, x = mesh_of(AxisType.Explicit), quantize_all(params_of(), spec), inputs()
    want = model(dense_of(qparams), x)
    with jax.set_mesh(mesh):
        got = quantized(explicit_model)(
            {k: split_qtensor(q, mesh, SPLIT[k]) for k, q in qparams.items()}, put(x, mesh, P("data"))
        )
    assert_same(got, want)
    assert got.sharding.spec == P("data", None, "model")


def test_gradients_through_shards():
    qparams, x = quantize_all(params_of(), int4(group_size=8)), inputs()
    fn = tensor_parallel(mesh_of())
    got = jax.grad(lambda x: jnp.sum(jnp.sin(quantized(fn)(qparams, x))))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(model(dense_of(qparams), x))))(x)
    assert_same(got, want, 1e-4)


def test_tokens_split_over_devices_are_held_out_as_on_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    fn = mapped(lambda w, x: x @ w, mesh, (P(), P("data")), P("data"))
    x = normal(64, 16)
    check(calibrate(fn, normal(16, 8), [x]).products[""].inputs, {(): (np.asarray(x), np.arange(64))}, (), 16)
