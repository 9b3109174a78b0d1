"""Products of integers with weights prepared for a CPU, against float64 NumPy and the definition."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import equations
from samples import correlated, weights

import jaxquant as jq
from jaxquant.kernels import cpu, reference
from jaxquant.kernels.matmul import chosen, quantized_matmul

K, N = 128, 48
SPECS = {
    f"{bits} bits, {group or 'channel'}{'' if symmetric else ', asymmetric'}": jq.QuantSpec(
        bits=bits, group_size=group, symmetric=symmetric
    )
    for bits, group, symmetric in itertools.product((2, 4, 8), (None, 64), (True, False))
}
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}  # the last two are those of the result's dtype


def dense(q):
    """The weight `[K, N]` that the codes stand for, in float64."""
    repeated = [
        np.repeat(np.asarray(a, np.float64), q.in_shape[0] // a.shape[0], 0)
        for a in (q.scale, q.scale * 0 if q.zero_point is None else q.zero_point)
    ]
    return (np.asarray(q.codes, np.float64) - repeated[1]) * repeated[0]


def assert_near(found, want, tolerance):
    """Rows compared by their largest entry."""
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    size = np.abs(want).max(-1, keepdims=True)
    np.testing.assert_array_less(np.abs(found - want) / np.where(size > 0, size, 1), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 7, cpu.MOST_ROWS + 3])
@pytest.mark.parametrize("spec", SPECS)
def test_float_inputs(spec, rows, dtype):
    x = jnp.asarray(correlated(K, rows) * 10.0 ** (np.arange(rows) % 4 - 2)[:, None], dtype)
    q = jq.quantize(jnp.asarray(weights(K, N), dtype), SPECS[spec])
    prepared = jq.prepare(q, "cpu")
    assert chosen(x, prepared) == "cpu"
    assert_near(quantized_matmul(x, prepared), np.asarray(x, np.float64) @ dense(q), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("activations", [{}, {"granularity": "per_tensor"}, {"bits": 4}], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_rounded_inputs(spec, activations, rows):
    x, spec = jnp.asarray(correlated(K, rows)), SPECS[spec]
    q = jq.quantize(jnp.asarray(weights(K, N)), dataclasses.replace(spec, activations=jq.ActivationSpec(**activations)))
    found = quantized_matmul(x, jq.prepare(q, "cpu"), implementation="cpu")
    assert_near(found, reference.matmul(x, q, None, None), 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from([2, 3, 4, 6, 8]), st.booleans(), st.integers(0, 2**32 - 1))
def test_sums_of_integers_are_exact(rows, bits, extreme, seed):
    """Of inputs that are integers, with every code or only the outermost ones, the result is the very number."""
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.choice([low, high], (64, 5)) if extreme else rng.integers(low, high + 1, (64, 5))
    x = rng.integers(-127, 128, (rows, 64))
    x[:, 0] = 127  # the unit of the digits is 1
    q = jq.QTensor.from_codes(
        jnp.asarray(codes, jnp.int8), jnp.ones((2, 5)), None, jq.QuantSpec(bits=bits, group_size=32), dtype="float32"
    )
    x[:, 32] = -127
    np.testing.assert_array_equal(quantized_matmul(jnp.asarray(x, jnp.float32), jq.prepare(q, "cpu")), x @ codes)


def test_stacks_scans_and_several_output_axes():
    w, x = jnp.asarray(weights(3, K, 4, 12)), jnp.asarray(np.stack([correlated(K, 5, seed=i) for i in range(3)]))
    q = jq.quantize(w, jq.int4(group_size=32), contract=(-3,), out=(-2, -1))
    prepared = jq.prepare(q, "cpu")
    want = jax.vmap(lambda x, w: jnp.tensordot(x, w, 1))(x, jq.dequantize(q))
    for found in (
        quantized_matmul(x, prepared, implementation="cpu"),
        jax.vmap(quantized_matmul)(x, prepared),
        jax.lax.scan(lambda c, xq: (c, quantized_matmul(*xq)), 0, (x, prepared))[1],
    ):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_the_derivative_is_that_of_the_dequantized_weight():
    x, w = jnp.asarray(correlated(K, 3)), jnp.asarray(weights(K, N))
    q = jq.quantize(w, jq.int4(group_size=32))
    seed = jnp.asarray(weights(3, N, seed=5))
    found = jax.grad(lambda x: jnp.sum(seed * quantized_matmul(x, jq.prepare(q, "cpu"))))(x)
    np.testing.assert_allclose(found, seed @ jq.dequantize(q).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_rows_of_zeros_are_zero(bad):
    x = jnp.zeros((3, K)).at[1].set(1.0).at[1, 7].set(bad)
    y = np.asarray(quantized_matmul(x, jq.prepare(jq.quantize(jnp.asarray(weights(K, N)), jq.int4()), "cpu")))
    assert np.isnan(y[1]).all()
    assert (y[[0, 2]] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8])
def test_no_product_with_a_float_weight_is_left(rows, bits):
    """What multiplies few rows are integers, two rows of them or more."""
    q = jq.prepare(jq.quantize(jnp.asarray(weights(K, N)), jq.QuantSpec(bits=bits)), "cpu")
    jaxpr = jax.make_jaxpr(quantized_matmul)(jnp.ones((rows, K)), q)
    dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) == (2 if bits == 4 else 1)
    for eqn in dots:
        assert {v.aval.dtype for v in eqn.invars} == {np.dtype("int8")}
        assert eqn.invars[0].aval.shape[0] >= 2


def test_reasons_for_declining():
    x, w = jnp.ones((2, K)), jnp.asarray(weights(K, N))
    prepared = jq.prepare(jq.quantize(w, jq.int4(group_size=16)), "cpu")
    assert cpu.declines(x, prepared) == "groups of 16 are no whole runs of 32"
    assert cpu.declines(x, jq.quantize(w, jq.int4())) == "the weight is not prepared for a CPU"
    activations = jq.ActivationSpec(symmetric=False)
    shifted = jq.prepare(jq.quantize(w, jq.int8(activations=activations)), "cpu")
    assert cpu.declines(x, shifted) == "the inputs have zero points"
    assert_near(quantized_matmul(x, shifted), reference.matmul(x, shifted, None, None), 1e-5)
    assert cpu.declines(np.ones((2, K)), jq.prepare(jq.quantize(w, jq.int4()), "cpu")) == "float64 has no digits"
    with pytest.raises(ValueError, match=r"'cpu' cannot run here.*cpu: groups of 16 are no whole runs of 32"):
        quantized_matmul(x, prepared, implementation="cpu")
