"""Functions trained with rounded numbers, against the same functions on dequantized weights and by hand."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_same, axes_of, consumed, quantize_case
from functions import CASES, normal
from jax import lax
from jax.sharding import AxisType
from meshes import P, inputs, mesh_of, model, params_of, placed_params, put
from programs import equations

from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.lsq import LSQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.affine import fake_quantize
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, int4, int8
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.training.fake_quantized import fake_quantized
from jaxquant.transforms.training.schedule import Schedule

INPUTS = ActivationSpec(symmetric=False)  # of a symmetric range, the extreme lies half way between two codes

FOLLOWED = [
    "nested_scan",
    "layer_axis_in_the_middle",
    "take_layers",
    "remat_in_scan_in_jit",
    "heads_in_another_order",
    "fused_qkv_indexed",
    "tied_embedding",
    "experts_ragged",
    "experts_with_one_input",
    "axes_of_size_one",
    "nnx_scan_remat",
]


def is_float(a):
    return jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)


def in_float64(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, "float64") if is_float(a) else a, tree)


def total(outs):
    return sum(jnp.sum(jnp.sin(o)) for o in jax.tree.leaves(outs) if is_float(o))


@pytest.mark.parametrize("name", FOLLOWED)
def test_it_is_the_quantized_function_and_has_its_gradient(name, float64):
    """With rounded inputs; the gradient is that with respect to the inputs."""
    # in float32, an input close to half way between two codes may be rounded to the other one in another program
    case = replace(CASES[name], params=lambda: in_float64(CASES[name].params()))
    spec, x = int4(group_size=case.group, symmetric=False, activations=INPUTS), in_float64(case.batches()[0])
    params, (qparams, _) = case.params(), quantize_case(case, spec)
    run = fake_quantized(case.apply, RTN(spec))
    if not is_float(x):
        assert_same(run(params, x), quantized(case.apply)(qparams, x))
        return

    def both(fn, params):
        return jax.jit(jax.value_and_grad(lambda x: total(fn(params, x))))(x)

    assert_same(both(run, params), both(quantized(case.apply), qparams), 1e-6)


def fake_case(case, used, params, spec):
    """The parameters, with those at the paths `used` rounded by `fake_quantize`."""
    axes = axes_of(case, params)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}
    for path in used:
        shape, *roles = axes[path]
        contract, out = (tuple(a - len(shape) for a in role) for role in roles)
        named[path] = fake_quantize(named[path], spec, contract=contract, out=out)
    return jax.tree.unflatten(structure, list(named.values()))


@pytest.mark.parametrize("name", ["checkpointed", "experts_vmapped", "weights_in_custom_derivatives"])
def test_gradients_of_weights_are_those_of_weights_rounded_by_hand(name):
    case, x = CASES[name], CASES[name].batches()[0]
    spec = QuantSpec(bits=2, group_size=case.group)
    run, used = fake_quantized(case.apply, RTN(spec)), consumed(name)
    got = jax.jit(jax.value_and_grad(lambda p: total(run(p, x))))(case.params())
    want = jax.jit(jax.value_and_grad(lambda p: total(case.apply(fake_case(case, used, p, spec), x))))(case.params())
    assert_same(got, want, 1e-6)


# ----------------------------------------------------------------------------------------------------- by hand, float64


def rounded_by_hand(x, bits, symmetric, axis):
    """Codes, scale and zero point, each as `x`; the ranges run along `axis`."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0)
    scale = np.maximum(-least, most) * 2 / (high - low) if symmetric else (most - least) / (high - low)
    zero = 0 * scale if symmetric else np.clip(np.round(low - least / scale), low, high)
    return np.clip(np.round(x / scale) + zero, low, high), scale, zero


def surrogate(x, x0, bits, symmetric, axis):
    """What straight-through differentiates: rounding moves by as much as its argument, from where it is at `x0`."""
    codes, scale0, zero = rounded_by_hand(x0, bits, symmetric, axis)
    scale = rounded_by_hand(x, bits, symmetric, axis)[1]
    return (codes + x / scale - x0 / scale0 - zero) * scale


def finite_differences(fn, x, h=1e-6):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = h
        grad[i] = (fn(x + e) - fn(x - e)) / (2 * h)
    return grad


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_finite_differences_of_the_surrogate(symmetric, float64):
    """Of a layer with rounded weights and inputs, in all of them; through the ranges too."""
    rng = np.random.default_rng(0)
    w, x, g = rng.normal(size=(6, 5)), rng.normal(size=(4, 6)), rng.normal(size=(4, 5))
    spec = QuantSpec(bits=2, symmetric=symmetric, activations=ActivationSpec(bits=3, symmetric=symmetric))

    def loss(w, x):
        return np.sum(g * (surrogate(x, x0, 3, symmetric, 1) @ surrogate(w, w0, 2, symmetric, 0)))

    w0, x0 = w, x
    run = fake_quantized(lambda w, x: x @ w, RTN(spec))
    value, got = jax.value_and_grad(lambda w, x: jnp.sum(jnp.asarray(g) * run(w, x)), (0, 1))(*map(jnp.asarray, (w, x)))
    np.testing.assert_allclose(value, loss(w, x), rtol=1e-9)
    np.testing.assert_allclose(got[0], finite_differences(lambda w: loss(w, x), w), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], finite_differences(lambda x: loss(w, x), x), rtol=1e-4, atol=1e-6)


def test_gradients_in_a_rematerialized_loop_are_finite_differences_of_the_surrogate(float64):
    """Of stacked layers with rounded weights and inputs."""
    rng = np.random.default_rng(2)
    w0, x, g = rng.normal(size=(3, 6, 6)) / 2, rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    spec = QuantSpec(bits=3, symmetric=False, activations=replace(INPUTS, bits=4))

    def by_hand(w, rounded_at=None):
        """The loss and each layer's inputs, which are rounded as if they were those given, if any are."""
        h, seen = x, []
        for i in range(3):
            seen.append(h)
            h0 = h if rounded_at is None else rounded_at[i]
            h = h + np.tanh(surrogate(h, h0, 4, False, 1) @ surrogate(w[i], w0[i], 3, False, 0))
        return np.sum(g * h), seen

    want, inputs = by_hand(w0)

    def layers(w, x):
        layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
        return jnp.sum(jnp.asarray(g) * lax.scan(layer, x, w)[0])

    got = jax.value_and_grad(fake_quantized(layers, RTN(spec)))(jnp.asarray(w0), jnp.asarray(x))
    np.testing.assert_allclose(got[0], want, rtol=1e-9)
    np.testing.assert_allclose(got[1], finite_differences(lambda w: by_hand(w, inputs)[0], w0), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_layer_written_by_hand(float64):
    """The largest weight of a column passes its own gradient, and gets that of the scale which it makes."""
    rng = np.random.default_rng(1)
    w, x, g = rng.normal(size=(6, 5)), rng.normal(size=(4, 6)), rng.normal(size=(4, 5))
    codes, scale, _ = rounded_by_hand(w, 2, True, 0)
    outer = x.T @ g
    want = outer.copy()
    for n in range(5):
        k = np.argmax(np.abs(w[:, n]))
        of_scale = np.sum(outer[:, n] * (codes[:, n] - w[:, n] / scale[0, n]))
        want[k, n] += of_scale * np.sign(w[k, n]) * 2 / 3
    run = fake_quantized(lambda w, x: x @ w, RTN(QuantSpec(bits=2)))
    got = jax.grad(lambda w: jnp.sum(jnp.asarray(g) * run(w, jnp.asarray(x))))(jnp.asarray(w))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert np.all(np.abs(codes - w / scale).max(0) > 0.499)  # the largest lies half a step beyond the codes, or below


def test_two_bits_are_trained_to_a_fraction_of_the_error_of_rounding():
    """Which takes the gradient through the scale: with a constant one, 0.35 of the error are left here."""
    x, params = normal(512, 32, seed=3) * 3, {"a": normal(32, 64, seed=4), "b": normal(64, 16, seed=5)}
    net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    run, want, steps = fake_quantized(net, RTN(QuantSpec(bits=2))), net(params, x), 400
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, _):
        params, state = carry
        error, g = jax.value_and_grad(lambda p: jnp.mean((run(p, x) - want) ** 2))(params)
        updates, state = adam.update(g, state)
        return (optax.apply_updates(params, updates), state), error

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        errors = jax.jit(lambda p: lax.scan(step, (p, adam.init(p)), None, steps)[1])(params)
    assert errors[-1] < 0.27 * errors[0]


# ------------------------------------------------------------------------------------------------------------- composed


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh, params, x = mesh_of(kind), params_of(), inputs()
    run = fake_quantized(model, RTN(int4(group_size=8, symmetric=False, activations=INPUTS)))
    gradient = jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(run(p, x))))
    want = jax.jit(gradient)(params, x)
    with jax.set_mesh(mesh):
        got = jax.jit(gradient)(placed_params(params, mesh, kind), put(x, mesh, P("data")))
    assert_same(got, want, 1e-4)


@pytest.mark.parametrize("activations", [INPUTS, ActivationSpec(static=True)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_schedule_on_a_mesh(kind, activations):
    mesh, params, x = mesh_of(kind), params_of(), inputs()
    schedule = Schedule(anneal=4, bits=((2, 8),))
    run = fake_quantized(model, LSQ(int4(group_size=8, activations=activations)), schedule=schedule)

    def second(params, x):
        _, state = run.apply(params, run.init(params, x), x)
        return run.apply(params, state, x)[0]

    want = second(params, x)
    with jax.set_mesh(mesh):
        got = second(placed_params(params, mesh, kind), put(x, mesh, P("data")))
    assert_same(got, want, 1e-4)


def layers(params, x):
    def step(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return lax.scan(jax.checkpoint(step), x, params)[0]


def layer_params():
    return {"up": normal(3, 16, 32), "down": normal(3, 32, 16)}


def test_weights_are_rounded_once_outside_of_the_loop():
    run = fake_quantized(layers, RTN(int4(activations=INPUTS)))
    jaxpr = jax.make_jaxpr(run)(layer_params(), normal(4, 16))
    rounded = [eqn.outvars[0].aval.shape for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "round"]
    assert {shape for shape in rounded if shape[-2] == 16 or shape[-2] == 32} == {(3, 16, 32), (3, 32, 16)}
    assert (4, 16) in rounded  # an input


def test_under_vmap_and_with_options():
    def fn(w, x, *, twice=False):
        return {"y": x @ w * (2.0 if twice else 1.0)}

    run, w, x = fake_quantized(fn, RTN(int4(activations=INPUTS))), normal(16, 8), normal(3, 5, 16)
    want = jnp.stack([run(w, a, twice=True)["y"] for a in x])
    assert_same(jax.vmap(functools.partial(run, twice=True), (None, 0))(w, x)["y"], want)
    assert run.__name__ == "fn"


def test_embeddings_are_rounded_per_row_where_a_rule_names_them():
    fn = lambda p, ids: p["table"][ids] @ p["w"]  # noqa: E731
    params, ids = {"table": normal(24, 16), "w": normal(16, 8)}, jnp.array([0, 5, 23])
    rules = [("table", RTN(int8(activations=INPUTS))), ("w", None)]
    want = fake_quantize(params["table"], int8(), contract=(-1,), out=(-2,))[ids] @ params["w"]
    assert_same(fake_quantized(fn, rules)(params, ids), want)
    only_products = fake_quantized(fn, RTN(int4()))(params, ids)
    assert_same(only_products, params["table"][ids] @ fake_quantize(params["w"], int4()))


def test_equal_calls_trace_once():
    traces = []

    def fn(w, x):
        traces.append(1)
        return x @ w

    for seed in range(3):
        fake_quantized(fn, [(".*", RTN(int4()))])(normal(16, 8), normal(4, 16, seed=seed))
    assert len(traces) == 1


# ------------------------------------------------------------------------------------------------------------ bad input


def linear(params, x):
    return x @ params["w"] + params["b"]


REFUSED = {
    "no weight": ([("v", RTN(int4()))], ValueError, "rule 'v' takes no weight that can be quantized"),
    "only none": ([(".*", None)], ValueError, "the recipe quantizes nothing"),
    "another method": (GPTQ(int4()), ValueError, "'w': GPTQ rounds with statistics .* give jq.RTN"),
    "clipped": (RTN(int4(), clip="mse"), ValueError, "'w': RTN with a clip rounds with statistics"),
    "groups": (RTN(int4(group_size=7)), ValueError, "'w': group_size=7 does not divide the contracting dimension 16"),
    "outliers": (
        RTN(int8(activations=ActivationSpec(outlier_threshold=6.0))),
        ValueError,
        "'w': outliers are not told apart in training",
    ),
    "range": (
        RTN(int8(activations=ActivationSpec(static=True, range="mse"))),
        ValueError,
        "'w': range='mse' is chosen from a sample",
    ),
    "static": (
        RTN(int8(activations=ActivationSpec(static=True))),
        ValueError,
        r"'w' has a static range of inputs: call apply\(params, state",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name):
    recipe, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fake_quantized(linear, recipe)({"w": normal(16, 8), "b": normal(8)}, normal(4, 16))


def test_a_weight_that_is_used_otherwise_is_named():
    fn = lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2)  # noqa: E731
    with pytest.raises(TypeError, match=r"'w' cannot be trained .* `(integer_pow|square)`: it is no product"):
        fake_quantized(fn, RTN(int4()))({"w": normal(16, 8)}, normal(4, 16))


def test_no_recipe():
    with pytest.raises(ValueError, match="recipe=4 is no method config"):
        fake_quantized(linear, 4)
