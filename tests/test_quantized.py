"""Functions run with quantized weights, against the same functions on the dequantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, quantize_case
from functions import CASES, normal
from jax import lax
from programs import constants

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantized import quantized


def specs(case):
    return {
        "int8": int8(),
        "int4_group": int4(group_size=case.group),
        "int3_asymmetric_group": int3(group_size=case.group, symmetric=False),
    }


def nbytes(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree) if hasattr(a, "nbytes"))


LOOSE = {"cast_to_bf16": 1e-2}  # the dequantized weights are rounded to bfloat16, and the codes are not


@pytest.mark.parametrize("name", CASES)
def test_quantized_is_the_function_of_the_dequantized_weights(name):
    case = CASES[name]
    plain, atol = jax.jit(case.apply), LOOSE.get(name, 2e-5)
    for label, spec in specs(case).items():
        qparams, dense = quantize_case(case, spec)
        x = case.batches()[0]
        run, want = quantized(case.apply), plain(dense, x)
        assert_same(run(qparams, x), want, atol)
        if label == "int8":
            assert_same(case.reference(dense, x, lambda *_, **__: None), want, atol)
        weights = [a for a in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(a)]
        if label == "int8" and case.group > 1:
            assert nbytes(weights) < 0.5 * sum(4 * q.size for q in weights)
            held = [np.size(a) for a in constants(jax.make_jaxpr(run)(qparams, x)) if is_float(a)]
            assert max(held, default=0) < min(q.size for q in weights)


# ---------------------------------------------------------------------------------------------------------- derivatives

DERIVED = [
    "list_of_layers",
    "scan",
    "scan_reverse",
    "nested_scan",
    "scan_of_blocks",
    "scan_over_time",
    "learned_first_state",
    "checkpointed",
    "cond",
    "fori_loop_over_layers",
    "remat_in_scan_in_jit",
    "vmap_over_inputs",
    "heads_in_another_order",
    "custom_derivatives_downstream",
    "fused_qkv_indexed",
    "embedding",
    "experts_ragged",
    "leaves_of_every_kind",
    "linen",
    "nnx_scan_remat",
]


def named_leaves(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def with_leaves(tree, new):
    """The tree with other leaves at some paths."""
    structure = jax.tree.structure(tree, is_leaf=is_qtensor)
    return jax.tree.unflatten(structure, [new.get(path, leaf) for path, leaf in named_leaves(tree).items()])


def is_float(a):
    return jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)


@pytest.mark.parametrize("name", DERIVED)
def test_gradients_are_those_of_the_dequantized_function(name):
    """With respect to the inputs, if they are floats, and to all leaves that are not quantized."""
    case, x = CASES[name], CASES[name].batches()[0]
    qparams, dense = quantize_case(case, int4(group_size=case.group))
    kept = {p: jnp.asarray(a) for p, a in named_leaves(qparams).items() if not is_qtensor(a) and is_float(a)}
    at = (0, 1) if is_float(x) else 0

    def gradient(fn, params):
        def loss(leaves, x):
            outs = jax.tree.leaves(fn(with_leaves(params, leaves), x))
            return sum(jnp.sum(jnp.sin(o)) for o in outs if is_float(o))

        return jax.jit(jax.grad(loss, argnums=at))(kept, x)

    got, want = gradient(quantized(case.apply), qparams), gradient(case.apply, dense)
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(want))
    assert_same(got, want, 1e-4)


def test_a_custom_derivative_that_takes_a_quantized_weight_is_refused():
    """It would be computed from the dense weight; the function itself runs."""
    case, x = CASES["weights_in_custom_derivatives"], CASES["weights_in_custom_derivatives"].batches()[0]
    qparams, _ = quantize_case(case, int8())
    with pytest.raises(TypeError, match="custom derivative takes the quantized weight 'a'"):
        jax.grad(lambda x: jnp.sum(quantized(case.apply)(qparams, x)))(x)


def test_custom_derivatives_downstream_are_kept():
    case, x = CASES["custom_derivatives_downstream"], CASES["custom_derivatives_downstream"].batches()[0]
    qparams, _ = quantize_case(case, int8())
    y = x @ dequantize(qparams["w"])
    got = jax.grad(lambda x: jnp.sum(quantized(case.apply)(qparams, x)))(x)
    np.testing.assert_allclose(got, jnp.full_like(y, -3 * 7) @ dequantize(qparams["w"]).T, rtol=1e-4)


def test_quantized_leaves_have_no_gradient_but_may_stand_beside_those_that_do():
    case = CASES["list_of_layers"]
    qparams, _ = quantize_case(case, int8())
    grads = jax.grad(lambda p, x: jnp.sum(quantized(case.apply)(p, x)), allow_int=True)(qparams, case.batches()[0])
    assert grads["layers"][0]["up"].values.dtype == jax.dtypes.float0
    assert np.any(np.asarray(grads["layers"][0]["scale"]) != 0)


# ------------------------------------------------------------------------------------------------------------- composed


def linear(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"]


def linear_params(spec=None, **axes):
    return {"w": quantize(normal(16, 8), spec or int4(group_size=8), **axes), "b": normal(8)}


def test_under_jit_vmap_and_scan():
    params, x, run = linear_params(), normal(5, 3, 16), quantized(linear)
    want = linear(dequantize_params(params), x)
    assert_same(jax.jit(run)(params, x), want)
    assert_same(jax.vmap(run, in_axes=(None, 0))(params, x), want)
    assert_same(jax.lax.map(lambda x: run(params, x), x), want)
    assert_same(jax.checkpoint(run)(params, x), want)
    moved = jax.vmap(run, in_axes=(None, 1), out_axes=1)(params, x)
    assert_same(moved, want)


def test_vmap_over_the_experts_of_quantized_weights():
    w, x = normal(3, 16, 8), normal(3, 5, 16)
    params = {"w": quantize(w, int4(group_size=8)), "b": normal(3, 8)}
    got = jax.vmap(quantized(linear))(params, x)
    want = jax.vmap(linear)(dequantize_params(params), x)
    assert_same(got, want)
    axes = {"w": 0, "b": None}
    got = jax.vmap(quantized(linear), in_axes=(axes, None))(params | {"b": normal(8)}, x[0])
    assert_same(got, jax.vmap(linear, in_axes=(axes, None))(dequantize_params(params) | {"b": normal(8)}, x[0]))


def test_scan_over_quantized_layers_outside():
    w = quantize(normal(3, 16, 16), int3(group_size=8, symmetric=False))
    run = quantized(lambda w, x: jnp.tanh(x @ w))
    got, _ = lax.scan(lambda x, w: (run(w, x), None), normal(5, 16), w)
    want, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), normal(5, 16), dequantize(w))
    assert_same(got, want)


def test_quantized_inside_quantized_and_inside_a_loop():
    params, x = {"w": quantize(normal(16, 16), int8()), "b": normal(16)}, normal(5, 16)
    inner = quantized(linear)
    outer = quantized(lambda p, x: lax.fori_loop(0, 3, lambda i, x: inner(p, x), x))
    want = lax.fori_loop(0, 3, lambda i, x: linear(dequantize_params(params), x), x)
    assert_same(outer(params, x), want)


def test_without_quantized_weights_it_is_the_function_itself():
    traces = []
    fn = lambda p, x: (traces.append(1), x @ p)[1]  # noqa: E731
    w, x = normal(16, 8), normal(5, 16)
    np.testing.assert_array_equal(quantized(fn)(w, x), x @ w)
    quantized(fn)(w, x)
    assert len(traces) == 2  # eager, as fn is


def test_equal_shapes_trace_once():
    traces = []
    run = quantized(lambda p, x: (traces.append(1), linear(p, x))[1])
    for seed in range(3):
        run(linear_params(), normal(5, 16, seed=seed))
    assert len(traces) == 1
    run(linear_params(int8()), normal(5, 16))
    run(linear_params(), normal(6, 16))
    assert len(traces) == 3


def test_equal_functions_share_what_was_compiled():
    traces = []

    def fn(params, x):
        traces.append(1)
        return x @ params["w"]

    params = {"w": quantize(normal(32, 8), int8())}
    for _ in range(3):
        quantized(fn)(params, normal(4, 32))
    assert len(traces) == 1


def test_inputs_that_are_no_arrays_are_static():
    def fn(params, x, flag, *, mode="a", scale=None):
        y = linear(params, x) if flag else -linear(params, x)
        return {"a": y, mode: y * (1 if scale is None else scale)}

    params, x = linear_params(), normal(5, 16)
    run = quantized(fn)
    for args, options in [
        ((x, True), {}),
        ((x, False), {"mode": "b"}),
        ((x, None), {"mode": "c", "scale": jnp.float32(2)}),
    ]:
        assert_same(run(params, *args, **options), fn(dequantize_params(params), *args, **options))


def test_an_input_that_cannot_be_static_is_named():
    params = {"w": quantize(normal(32, 8), int8())}
    with pytest.raises(TypeError, match=r"input \{1\} is no array and not hashable"):
        quantized(lambda p, x, s: x @ p["w"])(params, normal(4, 32), {1})


def test_numpy_inputs_and_donated_buffers():
    params, x = linear_params(), np.asarray(normal(5, 8, seed=3))
    fn = lambda p, x: x + linear(p, jnp.concatenate([x, x], 1))  # noqa: E731
    want = fn(dequantize_params(params), jnp.asarray(x))
    assert_same(quantized(fn)(params, x), want)
    assert_same(jax.jit(quantized(fn), donate_argnums=1)(params, jnp.asarray(x)), want)


def test_returned_weights_are_returned_quantized():
    params, x = linear_params(), normal(5, 16)
    _, same = quantized(lambda p, x: (linear(p, x), jax.jit(lambda p: p)(p)))(params, x)
    assert same["w"].spec == params["w"].spec
    jax.tree.map(np.testing.assert_array_equal, same, params)
    half = quantized(lambda p, x: p["w"].astype(jnp.bfloat16))(params, x)
    assert half.dtype == "bfloat16"
    with pytest.raises(TypeError, match="returns a part of the quantized weight 'w'"):
        quantized(lambda p, x: p["w"][:, :4])(params, x)
    with pytest.warns(UserWarning, match="a dense copy was made"):
        part = quantized(lambda p, x: p["w"][:, :4], allow_dense=True)(params, x)
    np.testing.assert_allclose(part, dequantize(params["w"])[:, :4])


def test_parameters_that_loops_hand_on_stay_quantized():
    """Flax's NNX carries and returns the parameters of a module wherever it is used."""

    def fn(params, x):
        step = jax.checkpoint(lambda p, x: (p, linear(p, x)))
        p, x = lax.fori_loop(0, 2, lambda i, s: step(*s), (params, x))
        (p, x), ps = lax.scan(lambda s, w: (step(*s), w), (p, x), params["stack"])
        p, x = lax.while_loop(lambda s: s[1][0, 0] > 9, lambda s: step(*s), (p, x))
        p, x = lax.cond(x[0, 0] > 0, step, lambda p, x: (p, -linear(p, x)), p, x)
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), linear(p, x), ps)[0]

    params = {"w": quantize(normal(16, 16), int4(group_size=8)), "b": normal(16)}
    params["stack"] = quantize(normal(2, 16, 16), int8())
    x = normal(5, 16)
    assert_same(quantized(fn)(params, x), fn(dequantize_params(params), x))


def test_very_deep_nesting():
    def nest(depth):
        if depth == 0:
            return linear
        inner = nest(depth - 1)
        if depth % 3 == 0:
            return lambda p, x: lax.cond(x[0, 0] > -9, inner, lambda p, x: linear(p, x), p, x)
        if depth % 3 == 1:
            return jax.checkpoint(lambda p, x: inner(p, x))
        return lambda p, x: jax.jit(inner)(p, x)

    params, x = linear_params(), normal(5, 16)
    assert_same(quantized(nest(12))(params, x), linear(dequantize_params(params), x))


def test_tracers_do_not_leak():
    case = CASES["remat_in_scan_in_jit"]
    qparams, _ = quantize_case(case, int8())
    with jax.checking_leaks():
        quantized(case.apply)(qparams, case.batches()[0])
