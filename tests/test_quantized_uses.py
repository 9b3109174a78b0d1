"""Lookups, slices, and uses of a quantized weight that no kernel covers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same
from functions import normal
from jax import lax

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantized import quantized


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
    assert_same(got, apply(dequantize_params(params), x))


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
