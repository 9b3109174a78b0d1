"""Products of integers against the definition in floating point, and LLM.int8() against its paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import rtn
from samples import correlated, statistics_of, weights

import jaxquant as jq
from jaxquant.kernels import int8, reference
from jaxquant.kernels.matmul import quantized_matmul

K, N, T = 48, 20, 30
ACTIVATIONS = {
    "per token": jq.ActivationSpec(),
    "per token, asymmetric": jq.ActivationSpec(symmetric=False),
    "per tensor": jq.ActivationSpec(granularity="per_tensor"),
    "4 bits": jq.ActivationSpec(bits=4),
    "static": jq.ActivationSpec(static=True),
    "static, asymmetric": jq.ActivationSpec(static=True, symmetric=False),
}
WEIGHTS = {
    "int8": jq.int8(),
    "int8 tensor": jq.int8(granularity="per_tensor"),
    "int8 asymmetric": jq.int8(symmetric=False),
    "int4 groups": jq.int4(group_size=16),
    "int4 asymmetric groups": jq.int4(group_size=16, symmetric=False),
}


def given(spec, activations, lead=()):
    x, w = correlated(K, T, np.float64), weights(*lead, K, N, dtype=np.float64)
    q = jq.quantize(jnp.asarray(w), dataclasses.replace(spec, activations=activations))
    if activations is not None and activations.static:
        q = dataclasses.replace(q, input_scale=jnp.full((*lead, 1, 1), np.ptp(x) / 255))
    if activations is not None and activations.static and not activations.symmetric:
        q = dataclasses.replace(q, input_zero_point=jnp.full((*lead, 1, 1), -9, jnp.int8))
    return jnp.asarray(x), q


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("spec", WEIGHTS)
def test_sums_of_integers_are_the_definition(spec, activations):
    x, q = given(WEIGHTS[spec], ACTIVATIONS[activations])
    want = reference.matmul(x, q, None, None)
    np.testing.assert_allclose(int8.matmul(x, q, None, None), want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


@pytest.mark.usefixtures("float64")
def test_stacks_and_several_output_axes():
    x, q = given(jq.int8(), jq.ActivationSpec(), lead=(3,))
    xs = jnp.stack([x, 2 * x, x[::-1]])
    found = quantized_matmul(xs, q)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], q)
        np.testing.assert_allclose(found[i], quantized_matmul(xs[i], one), rtol=1e-12)
    heads = jq.quantize(
        jnp.asarray(weights(K, 4, 5)), jq.int8(activations=jq.ActivationSpec()), contract=(-3,), out=(-2, -1)
    )
    assert quantized_matmul(x.astype(jnp.float32), heads).shape == (T, 4, 5)


@pytest.mark.parametrize("spec", ["int8", "int4 groups"])
def test_the_compiled_program_multiplies_int8_with_int8(spec):
    x, q = given(WEIGHTS[spec], jq.ActivationSpec())
    lowered = jax.jit(jq.quantized(lambda w, x: x @ w)).lower(q, x.astype(jnp.float32))
    (line,) = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert "xi8>, tensor<" in line
    assert line.rstrip().endswith("xi32>")
    assert "s32[" in next(line for line in lowered.compile().as_text().splitlines() if " dot(" in line)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activations", ["per token", "per token, asymmetric", "static, asymmetric"])
def test_derivatives_are_those_of_the_definition(activations):
    x, q = given(jq.int8(), ACTIVATIONS[activations])
    seed = jnp.asarray(weights(T, N, dtype=np.float64))
    for transform in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))[1]):
        found, want = (
            transform(lambda x, m=m: jnp.sum(seed * m.matmul(x, q, None, None)))(x) for m in (int8, reference)
        )
        np.testing.assert_allclose(found, want, rtol=1e-12)
    assert np.abs(jax.grad(lambda x: jnp.sum(quantized_matmul(x, q)))(x)).max() > 0.1


def test_what_is_not_rounded_is_left_to_the_definition():
    x, q = given(jq.int8(), None)
    assert int8.declines(x, q) == "the inputs are not rounded"
    np.testing.assert_array_equal(quantized_matmul(x, q), reference.matmul(x, q, None, None))
    wide = jq.quantize(jnp.ones((2**18, 1)), jq.int8(activations=jq.ActivationSpec()))
    assert "int32 does not hold" in int8.declines(x, wide)
    assert float(quantized_matmul(jnp.ones((1, 2**18)), wide)[0, 0]) == pytest.approx(2**18, rel=0.02)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_stay_so(static, bad):
    """Or a broken model would look like a bad one."""
    x, q = given(jq.int8(), jq.ActivationSpec(static=static))
    q = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == np.float64 else a, q)
    found = quantized_matmul(x.astype(jnp.float32).at[3, 5].set(bad), q)
    assert np.all(np.isnan(found[3]))
    assert np.all(np.isfinite(np.delete(found, 3, 0)))


def by_the_paper(x, w, codes, scale, kept, threshold=6.0):
    """Equation 8 of arXiv:2208.07339, one token at a time, with float weights for the channels that are kept."""
    outliers = np.abs(x).max(0) >= threshold
    dense = codes * scale
    dense[kept] = w[kept]
    result = x[:, outliers] @ dense[outliers]
    for t, row in enumerate(x):
        rest = np.where(outliers, 0, row)
        step = np.abs(rest).max() * (2 / 255)
        result[t] += np.clip(np.round(rest * (1 / step)), -128, 127) * step @ (codes * scale)
    return result


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("more", [0, 2])
def test_outliers_stay_in_floating_point(more):
    """With `more` channels that only the input at hand makes outliers: then dequantized weights are used for them."""
    x, w = np.clip(correlated(K, T, np.float64), -5, 5), weights(K, N, dtype=np.float64)
    x[:, [4, 30]] *= 50
    stats = statistics_of(x)
    config = jq.LLMInt8().for_inputs(stats)
    assert config.outliers == 8  # two, in multiples of eight
    q, info = config.quantize(jnp.asarray(w), stats)
    q.validate()
    assert int(info["outliers"]) == 2
    kept = np.asarray(q.outlier_index[:, 0])
    assert {4, 30} < set(kept.tolist())
    x[3, [c for c in range(K) if c not in kept][:more]] = 7
    codes, scale, _ = rtn(w, 8, True, "per_channel")
    np.testing.assert_array_equal(q.codes, codes)
    found = jax.jit(quantized_matmul)(jnp.asarray(x), q)
    np.testing.assert_allclose(found, by_the_paper(x, w, codes, scale, kept), rtol=1e-10, atol=1e-10)
    plain = jq.quantize(jnp.asarray(w), jq.int8(activations=jq.ActivationSpec()))
    errors = [np.abs(y - x @ w).mean() for y in (found, quantized_matmul(jnp.asarray(x), plain))]
    assert errors[0] < 0.2 * errors[1]


def test_a_model_with_outliers(tmp_path):
    x = correlated(K, 400)
    x[:, [4, 30]] *= 60

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x + 0.01 * jnp.tanh(x @ w), x @ w), x, params["w"])

    params = {"w": jnp.asarray(weights(3, K, K))}
    stats = jq.calibrate(fn, params, [jnp.asarray(x)])
    qparams, report = jq.quantize_params(params, stats, jq.LLMInt8())
    assert not report.fallbacks
    assert all(row.error < 0.01 * row.rtn_error for row in report.layers)
    assert all(row.info["outliers"] >= 2 for row in report.layers)
    out, want = jq.quantized(fn)(qparams, jnp.asarray(x))[1], fn(params, jnp.asarray(x))[1]
    assert np.abs(out - want).mean() < 0.02 * np.abs(want).mean()
    grad = jax.grad(lambda x: jnp.sum(jq.quantized(fn)(qparams, x)[0]))(jnp.asarray(x))
    assert np.all(np.isfinite(grad))
    jq.save(tmp_path / "tree", None, qparams)
    jax.tree.map(np.testing.assert_array_equal, jq.load(tmp_path / "tree"), qparams)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jq.LLMInt8(threshold=0), "threshold=0 of outliers must be positive"),
        (lambda: jq.LLMInt8(threshold=-6.0), "threshold=-6.0 of outliers must be positive"),
        (lambda: jq.LLMInt8(outliers=-1), "outliers=-1 must be a whole number"),
        (lambda: jq.ActivationSpec(static=True, outlier_threshold=6.0), "dynamic per_token ranges only"),
        (lambda: jq.LLMInt8(outliers=8).quantize(jnp.ones((K, N)), None), "LLMInt8 needs calibration statistics"),
        (lambda: jq.quantize_params({"w": jnp.ones((K, N))}, None, jq.LLMInt8()), "LLMInt8 needs calibration"),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_qtensor_must_have_all_of_its_outliers():
    stats = statistics_of(10 * correlated(K, T))
    q, _ = jq.LLMInt8(outliers=8).quantize(jnp.asarray(weights(K, N)), stats)
    with pytest.raises(ValueError, match="outlier_index is None"):
        dataclasses.replace(q, outlier_index=None).validate()
    with pytest.raises(ValueError, match=r"outlier_index is int32\[8, 1\]"):
        dataclasses.replace(q, outlier_weight=q.outlier_weight[:7]).validate()
