"""Products with weights prepared for an accelerator, without a kernel for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import correlated, weights

import jaxquant as jq
from jaxquant.kernels import reference, xla
from jaxquant.kernels.matmul import quantized_matmul

K, N = 96, 40


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("rows", [1, 20, xla.MOST_ROWS + 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_is_the_definition(bits, group, symmetric, rows, platform):
    x, w = jnp.asarray(correlated(K, rows, np.float64)), jnp.asarray(weights(K, N, dtype=np.float64))
    q = jq.quantize(w, jq.QuantSpec(bits=bits, group_size=group, symmetric=symmetric))
    found = quantized_matmul(x, jq.prepare(q, platform), implementation="xla")
    np.testing.assert_allclose(found, x @ jq.dequantize(q), rtol=1e-12, atol=1e-12 * np.abs(found).max())


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_stacks_several_output_axes_and_channel_scales(platform):
    w, x = jnp.asarray(weights(3, K, 4, 10)), jnp.asarray(np.stack([correlated(K, 5, seed=i) for i in range(3)]))
    stats = jq.calibrate(lambda p, x: jnp.einsum("etk,ekhd->ethd", x, p["w"]), {"w": w}, [x])
    q = jq.quantize_params({"w": w}, stats, jq.AWQ(jq.int4(group_size=32)))[0]["w"]
    found = quantized_matmul(x, jq.prepare(q, platform), implementation="xla")
    want = jnp.einsum("etk,ekhd->ethd", x, jq.dequantize(q))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("group", [None, 32])
def test_the_derivative_is_that_of_the_dequantized_weight(group):
    x, seed = jnp.asarray(correlated(K, 3)), jnp.asarray(weights(3, N, seed=5))
    q = jq.quantize(jnp.asarray(weights(K, N)), jq.int4(group_size=group))
    found = jax.grad(lambda x: jnp.sum(seed * quantized_matmul(x, jq.prepare(q, "gpu"), implementation="xla")))(x)
    np.testing.assert_allclose(found, seed @ jq.dequantize(q).T, rtol=1e-5, atol=1e-5)


def test_few_rows_do_not_meet_a_dequantized_weight():
    """No float array of the weight's size but the codes themselves, cast, which XLA fuses into the product."""
    q = jq.prepare(jq.quantize(jnp.asarray(weights(K, N)), jq.int4(group_size=32)), "gpu")
    jaxpr = jax.make_jaxpr(lambda x, q: xla._matmul(None, x, q, None))(jnp.ones((2, K)), q)
    made = [str(eqn.primitive) for eqn in jaxpr.eqns if eqn.outvars[0].aval.size == K * N]
    assert made.count("convert_element_type") == 1
    assert "mul" not in made


def test_reasons_for_declining():
    x, w = jnp.ones((2, K)), jnp.asarray(weights(K, N))
    assert xla.declines(x, jq.quantize(w, jq.int4())) == "the weight is not prepared for an accelerator"
    assert xla.declines(x, jq.prepare(jq.quantize(w, jq.int8()), "cpu")) is not None
    rounded = jq.prepare(jq.quantize(w, jq.int8(activations=jq.ActivationSpec())), "gpu")
    assert xla.declines(x, rounded) == "the inputs are rounded"
    np.testing.assert_allclose(
        quantized_matmul(x, rounded), reference.matmul(x, rounded, None, None), rtol=1e-5, atol=1e-5
    )
