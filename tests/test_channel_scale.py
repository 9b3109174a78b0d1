"""Methods that scale input channels: their formulas, exactness without folding, and sharing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import rtn
from samples import correlated, statistics_of, weights

import jaxquant as jq
from jaxquant.kernels.matmul import quantized_matmul, quantized_ragged_matmul
from jaxquant.numerics.affine import dequantize, scaled_dense
from jaxquant.transforms import sharing

K, N = 48, 20
INT4 = jq.int4(group_size=16)


def middle(s):
    """Scales over the geometric mean of the smallest and the largest."""
    return s / np.sqrt(s.min() * s.max())


def outlying(tokens=200, dtype=np.float32):
    x = correlated(K, tokens, dtype)
    x[:, [3, 17]] *= 40
    return x


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_is_the_papers_formula(alpha):
    x, w = outlying(dtype=np.float64), weights(K, N, dtype=np.float64)
    q, info = jq.SmoothQuant(alpha, jq.int8()).quantize(jnp.asarray(w), statistics_of(x))
    s = middle(np.abs(x).max(0) ** alpha / np.abs(w).max(1) ** (1 - alpha))
    np.testing.assert_allclose(q.channel_scale[:, 0], s, rtol=1e-12)
    s = np.asarray(q.channel_scale[:, 0])  # a last bit would flip the extremes, which lie half way between two codes
    codes, scale, _ = rtn(s[:, None] * w, 8, True, "per_channel")
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_allclose(dequantize(q), codes * scale / s[:, None], rtol=1e-12)
    assert info["alpha"] == alpha


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("static", [False, True])
def test_a_searched_alpha_has_the_smallest_error_of_the_output(static):
    x, w = outlying(dtype=np.float64), jnp.asarray(weights(K, N, dtype=np.float64))
    spec = jq.int8(activations=jq.ActivationSpec(static=static))

    def error(alpha):
        q, _ = jq.SmoothQuant(alpha, spec).quantize(w, statistics_of(x))
        if static:
            reach = np.max(np.abs(x).max(0) * (1 / np.asarray(q.channel_scale[:, 0])))
            q = dataclasses.replace(q, input_scale=jnp.full((1, 1), reach * (2 / 255)))
        return float(jnp.sum(jnp.square(quantized_matmul(jnp.asarray(x), q) - x @ w)))

    _, info = jq.SmoothQuant(None, spec).quantize(w, statistics_of(x))
    errors = [error(a) for a in np.linspace(0, 1, 11)]
    best = min(errors)  # a neighbour may be as good, up to a flipped tie
    assert errors[round(10 * float(info["alpha"]))] < 1.01 * best < 0.5 * errors[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_takes_the_best_of_both_of_its_forms(symmetric):
    """Written from the paper (s = x^r) and its code (s = x^r / w^(1-r)), with the exact error tr(Δᵀ H Δ)."""
    x, w, grid = outlying(dtype=np.float64), weights(K, N, dtype=np.float64), 5
    spec = dataclasses.replace(INT4, symmetric=symmetric)
    q, info = jq.AWQ(spec, clip=None, grid=grid).quantize(jnp.asarray(w), statistics_of(x))
    gram, size = x.T @ x / len(x), np.abs(x).mean(0)
    groups = np.abs(w).reshape(-1, 16, N)
    relative = (groups / groups.max(1, keepdims=True)).mean(2).reshape(K)
    tried = []
    for form in (lambda r: size**r, lambda r: size**r / (relative + 1e-4) ** (1 - r)):
        for r in np.arange(grid) / grid:
            s = middle(form(r))[:, None]
            codes, scale, zero = rtn(s * w, 4, symmetric, "per_group", 16)
            delta = (codes - zero.repeat(16, 0)) * scale.repeat(16, 0) / s - w
            tried.append((np.sum(delta * (gram @ delta)), r, s[:, 0]))
    _, r, s = min(tried, key=lambda t: t[0])
    assert float(info["ratio"]) == pytest.approx(r)
    np.testing.assert_allclose(q.channel_scale[:, 0], s, rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", [INT4, jq.int4(), jq.int4(symmetric=False)], ids=["group", "channel", "asymmetric"])
def test_after_clipping_by_the_output_no_scale_of_awq_can_be_bettered(spec):
    x, w = outlying(dtype=np.float64), weights(K, N, dtype=np.float64)
    q, _ = jq.AWQ(spec, grid=4).quantize(jnp.asarray(w), statistics_of(x))
    gram = x.T @ x / len(x)

    def errors(scale):
        delta = np.asarray(dequantize(dataclasses.replace(q, scale=scale))) - w
        return np.sum(delta * (gram @ delta), 0)  # of each column

    for group in range(len(q.scale)):
        for factor in (0.99, 1.01):
            assert np.all(errors(q.scale) <= errors(q.scale.at[group].multiply(factor)))


@pytest.mark.usefixtures("float64")
def test_a_chain_hands_scaled_weights_and_divided_inputs_on():
    x, w = outlying(dtype=np.float64), jnp.asarray(weights(K, N, dtype=np.float64))
    q, info = jq.Chain(jq.SmoothQuant(0.5), jq.GPTQ(INT4)).quantize(w, statistics_of(x))
    d = np.asarray(jq.SmoothQuant(0.5).quantize(w, statistics_of(x))[0].channel_scale)
    alone, facts = jq.GPTQ(INT4).quantize(d * w, statistics_of(x / d[:, 0]))
    assert np.mean(np.asarray(q.codes == alone.codes)) > 0.999  # the Gram matrices differ in their last bits
    np.testing.assert_allclose(q.channel_scale, d)
    assert set(info) == {"alpha", *facts}


def function(params, x):
    h = jnp.tanh(x @ params["q"]) * (x @ params["k"])
    return h @ params["o"]


def tree():
    return {"q": jnp.asarray(weights(K, N)), "k": jnp.asarray(weights(K, N, seed=2)), "o": jnp.asarray(weights(N, 8))}


CONFIGS = {
    "smoothquant": jq.SmoothQuant(0.5, jq.int8()),
    "awq": jq.AWQ(jq.int4(), grid=4),
    "chain": jq.Chain(jq.AWQ(jq.int4(), grid=4), jq.GPTQ(jq.int4())),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_function_is_exact_without_folding(name, tmp_path):
    """The function with QTensors is the function with what they stand for, scales shared by weights on one input."""
    x, params = jnp.asarray(outlying()), tree()
    qparams, report = jq.quantize_params(params, jq.calibrate(function, params, [x]), CONFIGS[name])
    np.testing.assert_array_equal(qparams["q"].channel_scale, qparams["k"].channel_scale)
    assert not np.allclose(qparams["q"].channel_scale, 1)
    dense = jax.tree.map(dequantize, qparams, is_leaf=lambda a: isinstance(a, jq.QTensor))
    want = function(dense, x)
    np.testing.assert_allclose(jq.quantized(function)(qparams, x), want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    row, fact = report.layers[0], "alpha" if name == "smoothquant" else "ratio"
    assert row.method == {"smoothquant": "SmoothQuant", "awq": "AWQ", "chain": "AWQ+GPTQ"}[name]
    assert 0 <= row.info[fact] <= 1
    jq.save(tmp_path / "tree", None, qparams)
    jax.tree.map(np.testing.assert_array_equal, jq.load(tmp_path / "tree"), qparams)


def test_layers_experts_and_lookups_divide_by_their_own_scales():
    x, w = jnp.asarray(outlying(30)), weights(3, K, N)
    d = jnp.asarray(np.random.default_rng(0).uniform(0.2, 5, (3, K, 1)).astype(np.float32))
    q = dataclasses.replace(jq.quantize(d * w, jq.int8()), channel_scale=d)
    q.validate()
    each = [np.asarray(x @ dequantize(jax.tree.map(lambda a, i=i: a[i], q))) for i in range(3)]
    stacked = jq.quantized(lambda q, x: jax.lax.scan(lambda _, w: (None, x @ w), None, q)[1])(q, x)
    np.testing.assert_allclose(stacked, each, rtol=2e-4, atol=1e-3)
    groups = jnp.array([10, 0, 20])
    ragged = quantized_ragged_matmul(x, q, groups)
    np.testing.assert_allclose(ragged, np.concatenate([each[0][:10], each[2][10:]]), rtol=2e-4, atol=1e-3)
    table = jq.quantize(jnp.asarray(weights(64, K)) * d[0, :, 0], jq.int8(), contract=(-1,), out=(-2,))
    table = dataclasses.replace(table, channel_scale=d[0])
    table.validate()
    tied = jq.quantized(lambda p, ids: p[ids] @ p.T)
    rows = np.asarray(dequantize(table))
    np.testing.assert_allclose(tied(table, jnp.arange(5)), rows[:5] @ rows.T, rtol=2e-4, atol=1e-3)


def test_a_scale_that_one_weight_cannot_use_is_dropped_for_all(monkeypatch):
    """Where one of the weights on an input falls back to rounding to nearest, the others lose the scale too."""
    x, params = jnp.asarray(outlying()), tree()
    params = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    stacked = lambda p, x: jax.lax.scan(lambda c, p: (c, function(p, x)), 0, p)[1]  # noqa: E731
    params["q"] = params["q"].at[1].divide(jnp.geomspace(1e-3, 1e3, K)[:, None])
    kept = sharing._scales

    def broken(group):  # in the second layer, a scale that is good for one of two weights only
        scale, facts = kept(group)
        if len(group) == 2:
            scale = scale.at[1].set(jnp.geomspace(1e-3, 1e3, K))
        return scale, facts

    monkeypatch.setattr(sharing, "_scales", broken)
    config = jq.AWQ(jq.int4(), clip=None, grid=2)
    qparams, report = jq.quantize_params(params, jq.calibrate(stacked, params, [x]), config)
    for name in "qk":
        np.testing.assert_array_equal(qparams[name].channel_scale[1], 1)
        assert not np.allclose(qparams[name].channel_scale[0], 1)
    for row in report.layers:  # without the scale, neither is worse than rounding to nearest, up to a rounding error
        assert row.path == "o" or row.error <= row.rtn_error * (1 + 1e-6)


def test_channels_without_input_or_weight_keep_a_scale_of_one():
    x, w = outlying(), weights(K, N)
    x[:, 5], w[7] = 0, 0
    for config in (jq.SmoothQuant(0.5), jq.SmoothQuant(None), jq.AWQ(INT4)):
        q, _ = config.quantize(jnp.asarray(w), statistics_of(x))
        assert np.all(np.isfinite(q.channel_scale))
        assert np.all(np.asarray(q.channel_scale) > 0)
        assert q.channel_scale[5] == 1
        assert np.all(np.isfinite(dequantize(q)))
    x[:] = 0
    q, _ = jq.AWQ(INT4).quantize(jnp.asarray(w), statistics_of(x))
    np.testing.assert_array_equal(q.channel_scale, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jq.SmoothQuant(1.5), r"alpha=1.5 must be from 0 to 1"),
        (lambda: jq.SmoothQuant(-0.1), r"alpha=-0.1 must be from 0 to 1"),
        (lambda: jq.SmoothQuant(float("nan")), r"alpha=nan must be from 0 to 1"),
        (lambda: jq.AWQ(INT4, grid=0), "grid=0 must be a positive whole number"),
        (lambda: jq.AWQ(INT4, clip="all"), "clip='all' is not one of"),
        (lambda: jq.Chain(jq.GPTQ(INT4)), "two steps or more"),
        (lambda: jq.Chain(jq.GPTQ(INT4), jq.RTN(INT4)), r"GPTQ.* scales no channels"),
        (lambda: jq.Chain(jq.AWQ(INT4), jq.SmoothQuant()), r"SmoothQuant.* cannot be the last step"),
        (lambda: jq.Chain(jq.SmoothQuant(), jq.LLMInt8()), r"LLMInt8.* cannot be the last step"),
        (lambda: jq.quantize_params(tree(), None, jq.AWQ(INT4)), "AWQ needs calibration statistics"),
        (lambda: jq.AWQ(INT4).quantize(tree()["q"], None), "AWQ needs calibration statistics"),
        (
            lambda: jq.quantize_params(tree(), None, jq.RTN(jq.int4(), clip="output")),
            "RTN needs calibration statistics",
        ),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_are_scaled_before_they_are_rounded():
    q, _ = jq.SmoothQuant(0.5, jq.int8()).quantize(tree()["q"], statistics_of(outlying()))
    np.testing.assert_allclose(scaled_dense(q) / q.channel_scale, dequantize(q))
