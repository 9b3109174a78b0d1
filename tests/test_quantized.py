"""Functions run with quantized weights, against the same functions on the dequantized weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import CASES, Seen, normal
from jax import lax
from test_calibrate import axes_of

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.quantized import quantized


def specs(case):
    return {
        "int8": int8(),
        "int4_group": int4(group_size=case.group),
        "int3_asymmetric_group": int3(group_size=case.group, symmetric=False),
        "int8_per_tensor": int8(granularity="per_tensor"),
    }


def quantize_case(case, spec):
    """The case's parameters, with every weight that a product consumes quantized; and the same dequantized."""
    params = case.params()
    axes, used = axes_of(case, params), consumed(case.name)

    def one(path, leaf):
        shape, contract, out = axes[path]
        negative = [tuple(a - len(shape) for a in axes) for axes in (contract, out)]
        return quantize(leaf, spec, contract=negative[0], out=negative[1])

    @jax.jit
    def both(leaves):
        q = {path: one(path, leaf) for path, leaf in leaves.items()}
        return q, {path: dequantize(a) for path, a in q.items()}

    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}
    trees = both({path: jnp.asarray(named[path]) for path in used})
    return [jax.tree.unflatten(structure, [t.get(path, leaf) for path, leaf in named.items()]) for t in trees]


@functools.cache
def consumed(name):
    """Paths of the weights that the products of a case consume."""
    case, seen = CASES[name], Seen()
    for batch in case.batches():
        case.reference(case.params(), batch, seen)
    return tuple(seen.inputs)


def nbytes(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree) if hasattr(a, "nbytes"))


def constants(jaxpr):
    """Every array that a program holds, its inner programs included."""
    yield from jaxpr.consts
    for eqn in jaxpr.jaxpr.eqns:
        yield from (v.val for v in eqn.invars if hasattr(v, "val"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "consts"):
                yield from constants(inner)
            elif hasattr(inner, "eqns"):
                yield from constants(jax.extend.core.ClosedJaxpr(inner, ()))


def assert_same(got, want, atol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.max(np.abs(np.asarray(b, np.float64)), initial=0.0) or 1.0
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale, atol=atol)


LOOSE = {"cast_to_bf16": 1e-2}  # the dequantized weights are rounded to bfloat16, and the codes are not


@pytest.mark.parametrize("name", CASES)
def test_quantized_is_the_function_of_the_dequantized_weights(name):
    case = CASES[name]
    plain = jax.jit(case.apply)
    for label, spec in specs(case).items():
        qparams, dense = quantize_case(case, spec)
        x = case.batches()[0]
        run = quantized(case.apply)
        assert_same(run(qparams, x), plain(dense, x), LOOSE.get(name, 2e-5))
        weights = [a for a in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(a)]
        if label == "int8" and case.group > 1:
            assert nbytes(weights) < 0.5 * sum(4 * q.size for q in weights)
            smallest = min(q.size for q in weights)
            traced = jax.make_jaxpr(run)(qparams, x)
            sizes = [np.size(c) for c in constants(traced) if jnp.issubdtype(jnp.result_type(c), jnp.floating)]
            assert max(sizes, default=0) < smallest


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
    "weights_in_custom_derivatives",
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


def dense_of(params):
    return jax.tree.map(lambda a: dequantize(a) if is_qtensor(a) else a, params, is_leaf=is_qtensor)


def test_under_jit_vmap_and_scan():
    params, x, run = linear_params(), normal(5, 3, 16), quantized(linear)
    want = linear(dense_of(params), x)
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
    want = jax.vmap(linear)(dense_of(params), x)
    assert_same(got, want)
    axes = {"w": 0, "b": None}
    got = jax.vmap(quantized(linear), in_axes=(axes, None))(params | {"b": normal(8)}, x[0])
    assert_same(got, jax.vmap(linear, in_axes=(axes, None))(dense_of(params) | {"b": normal(8)}, x[0]))


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
    want = lax.fori_loop(0, 3, lambda i, x: linear(dense_of(params), x), x)
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
        assert_same(run(params, *args, **options), fn(dense_of(params), *args, **options))


def test_numpy_inputs_and_donated_buffers():
    params, x = linear_params(), np.asarray(normal(5, 8, seed=3))
    fn = lambda p, x: x + linear(p, jnp.concatenate([x, x], 1))  # noqa: E731
    want = fn(dense_of(params), jnp.asarray(x))
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
    assert_same(quantized(fn)(params, x), fn(dense_of(params), x))


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
    assert_same(quantized(nest(12))(params, x), linear(dense_of(params), x))


def test_tracers_do_not_leak():
    case = CASES["remat_in_scan_in_jit"]
    qparams, _ = quantize_case(case, int8())
    with jax.checking_leaks():
        quantized(case.apply)(qparams, case.batches()[0])


# -------------------------------------------------------------------------------------------------------------- lookups


@pytest.mark.parametrize("spec", [int8(), int4(group_size=8), int3(group_size=8, symmetric=False)])
@pytest.mark.parametrize("mode", [None, "fill", "clip", "wrap"])
def test_lookups_out_of_range_are_those_of_take(spec, mode):
    ids = jnp.array([[0, 5, 24], [-1, -30, 100]])
    w = quantize(normal(24, 16), spec, contract=(-1,), out=(-2,))
    fns = [lambda w, i: jnp.take(w, i, axis=0, mode=mode), lambda w, i: jnp.take(w.T, i, axis=1, mode=mode)]
    if mode is None:
        fns += [lambda w, i: w[i % 24], lambda w, i: w.at[i].get(mode="fill", fill_value=0.5)]
        fns += [lambda w, i: w.at[i % 24].get(mode="promise_in_bounds"), lambda w, i: w[i]]
    for fn in fns:
        np.testing.assert_allclose(quantized(fn)(w, ids), fn(dequantize(w), ids), rtol=1e-6)


def test_one_id_and_a_table_of_one_row():
    w = quantize(normal(1, 16), int4(group_size=8), contract=(-1,), out=(-2,))
    for ids in (jnp.int32(0), jnp.zeros((3,), jnp.int32), jnp.zeros((0,), jnp.int32)):
        fn = lambda w, i: jnp.take(w, i, axis=0)  # noqa: E731
        np.testing.assert_allclose(quantized(fn)(w, ids), fn(dequantize(w), ids))


def test_experts_of_each_token_are_looked_up():
    w, ids = quantize(normal(4, 16, 8), int4(group_size=8)), jnp.array([3, 0, 1, 1, 2])
    fn = lambda w, x: jnp.einsum("tk,tkn->tn", x, w[ids])  # noqa: E731
    assert_same(quantized(fn)(w, normal(5, 16)), fn(dequantize(w), normal(5, 16)))


# --------------------------------------------------------------------------------------------------------------- strict


STRICT = {
    "mask": (lambda w, x: x @ (w * (w > 0).astype(w.dtype)), "`(gt|mul)` meets the quantized weight 'w'"),
    "scaled": (lambda w, x: x @ (2 * w), "`mul` meets the quantized weight 'w'"),
    "two weights": (lambda w, x: x @ (w @ w), "`dot_general` meets the quantized weight 'w'"),
    "norm": (lambda w, x: jnp.linalg.norm(w), "'w'"),
    "other axis": (lambda w, x: x @ w.T, r"`dot_general` .* it sums over axes \(1,\) .* quantized along axes \(0,\)"),
    "grad": (
        lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x),
        r"`dot_general` .* it sums over axes \(1,\)",
    ),
    "part of inputs": (lambda w, x: x[:, :8] @ w[:8], "`slice` .* it cuts the weight along an axis that groups"),
    "half of inputs": (lambda w, x: x[:, :8] @ w.reshape(2, 8, 16)[1], "`slice` .* it cuts the weight along an axis"),
    "half summed": (
        lambda w, x: jnp.einsum("tk,ckn->tcn", x[:, :8], w.reshape(2, 8, 16)),
        "`dot_general` .* a part of an axis",
    ),
    "rows": (lambda w, x: w[jnp.array([0, 3])], "`gather` .* looks up positions along an axis that groups"),
    "scanned inputs": (
        lambda w, x: lax.scan(lambda c, r: (c + r, None), jnp.zeros(16), w)[0],
        "`scan` .* slices an axis",
    ),
    "carried": (lambda w, x: lax.scan(lambda w, _: (2 * w, None), w, None, 2)[0], "`scan` .* carried from iteration"),
    "while": (lambda w, x: lax.while_loop(lambda w: w[0, 0] > 9, lambda w: w + 1, w), "`while` .* is carried"),
    "condition": (
        lambda w, x: lax.while_loop(lambda x: (x @ w)[0, 0] > 9, lambda x: x + 1, x),
        "`while` .* when the loop ends",
    ),
    "chosen": (lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: w.T), "`cond` .* leaves its body"),
    "stacked": (lambda w, x: lax.scan(lambda c, _: (c, w), 0, None, 2)[1], "`scan` .* leaves its body"),
    "reversed": (lambda w, x: x @ w[::-1], "`rev`"),
    "strided": (lambda w, x: x @ w[:, ::2], "`slice`|`gather`"),
    "concatenated": (lambda w, x: x @ jnp.concatenate([w, w], 1), "`concatenate`"),
    "broadcast": (lambda w, x: jnp.broadcast_to(w, (2, 16, 16)), "`broadcast_in_dim`"),
    "integers": (lambda w, x: w.astype(jnp.int32), "`convert_element_type`"),
    "updated": (lambda w, x: x @ w.at[0].set(1.0), "`scatter`"),
    "no iterations": (lambda w, x: lax.scan(lambda x, _: (x @ w, None), x, None, 0)[0], "`scan` .* no iterations"),
}


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("spec", [int8(), int4(group_size=8)])
def test_uses_without_a_kernel_are_errors_or_dense_copies(name, spec):
    fn, message = STRICT[name]
    params, x = {"w": quantize(normal(16, 16), spec)}, normal(5, 16)
    apply = lambda params, x: fn(params["w"], x)  # noqa: E731
    with pytest.raises(TypeError, match=message) as error:
        quantized(apply)(params, x)
    assert "'w'" in str(error.value)
    assert "quantized(fn, allow_dense=True)" in str(error.value)
    with pytest.warns(UserWarning, match=message):
        got = quantized(apply, allow_dense=True)(params, x)
    assert_same(got, apply(dense_of(params), x))


def test_the_error_names_every_weight_by_its_path():
    params = {"layers": [{"w": quantize(normal(16, 16), int8())}, {"w": quantize(normal(16, 16), int8())}]}
    with pytest.raises(TypeError, match="`add` meets the quantized weight 'layers/0/w', 'layers/1/w'"):
        quantized(lambda p, x: x @ (p["layers"][0]["w"] + p["layers"][1]["w"]))(params, normal(5, 16))


def test_a_weight_may_be_quantized_with_other_roles_than_its_use_needs():
    """Experts quantized as stacked matrices, used as outputs; and the other way round."""
    x = normal(5, 16)
    shared = lambda w, x: jnp.einsum("td,edf->tef", x, w)  # noqa: E731
    own = lambda w, x: jnp.einsum("etd,edf->etf", jnp.stack([x, 2 * x, 3 * x]), w)  # noqa: E731
    for fn in (shared, own):
        for axes in ({"contract": (-2,), "out": (-1,)}, {"contract": (-2,), "out": (-3, -1)}):
            for spec in (int4(group_size=8), int8(granularity="per_tensor")):
                w = quantize(normal(3, 16, 8), spec, **axes)
                assert_same(quantized(fn)(w, x), fn(dequantize(w), x))


@pytest.mark.parametrize("spec", [int8(), int4(group_size=8), int8(granularity="per_tensor")])
def test_slices_of_outputs_and_layers(spec):
    """Every way of taking a part of a weight that leaves its contracting axis whole."""
    x, i = normal(5, 16), jnp.int32(1)
    w = quantize(normal(4, 16, 12), spec)
    fns = [
        lambda w, x: x @ w[2],
        lambda w, x: x @ w[i],
        lambda w, x: x @ w[-5 + 4],
        lambda w, x: x @ w[1:3][1],
        lambda w, x: jnp.einsum("td,edf->etf", x, w[1:3]),
        lambda w, x: lax.scan(lambda c, w: (c, x @ w), None, w[1:])[1],
        lambda w, x: x @ w[0, :, 2:7],
        lambda w, x: x @ w[0, :, 2:3],
        lambda w, x: x @ w[0, :, 2],
        lambda w, x: x @ w[i, :, i],
        lambda w, x: x @ lax.dynamic_slice(w, (i, 0, 7), (1, 16, 12))[0],  # moved inside: starts at 0
        lambda w, x: x @ lax.dynamic_slice(w, (i * 9, 0, 0), (1, 16, 12))[0],
        lambda w, x: x @ w.reshape(4, 16, 3, 4)[3, :, 1],
        lambda w, x: x @ w.reshape(4, 16, 3, 4)[i, :, :, i],
        lambda w, x: x @ w.reshape(2, 2, 16, 12)[1, 0],
        lambda w, x: x @ w.reshape(2, 2, 16, 12)[i, i],
        lambda w, x: jnp.einsum("td,abdf->batf", x, w.reshape(2, 2, 16, 12)),
        lambda w, x: jnp.einsum("abtd,abdf->abtf", x * jnp.ones((2, 2, 1, 1)), w.reshape(2, 2, 16, 12)),
        lambda w, x: jnp.einsum("batd,abdf->batf", x * jnp.ones((2, 2, 1, 1)), w.reshape(2, 2, 16, 12)),
        lambda w, x: jnp.einsum("etd,edf->etf", x * jnp.ones((4, 1, 1)), w.reshape(2, 2, 16, 12).reshape(4, 16, 12)),
        lambda w, x: x @ jnp.moveaxis(w, 0, 1).reshape(16, 48),
        lambda w, x: lax.scan(lambda c, w: (c, x @ w), None, jnp.moveaxis(w.reshape(4, 16, 3, 4), 2, 0))[1],
        lambda w, x: lax.scan(lambda c, w: (c, x @ w[1]), None, jnp.moveaxis(w.reshape(2, 2, 16, 12), 1, 0))[1],
        lambda w, x: [x @ v for v in jnp.split(w[0], [2, 7], axis=1)],
    ]

    def usable(fn):
        try:
            jax.eval_shape(fn, dequantize(w), x)
        except TypeError:
            return False
        return True

    assert all(map(usable, fns))
    run = quantized(lambda w, x: [fn(w, x) for fn in fns])
    assert_same(run(w, x), [fn(dequantize(w), x) for fn in fns])
