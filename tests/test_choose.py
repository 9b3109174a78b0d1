"""`Best` and `MixedPrecision` against choices made by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import correlated, weights

import jaxquant as jq
from jaxquant.numerics.qtensor import is_qtensor

K, N = 48, 32
W4 = jq.int4(group_size=16)


def function(params, x):
    h = jnp.tanh(x @ params["q"]) * (x @ params["k"])
    return h @ params["o"]


def given():
    x = correlated(K, 400)
    x[:, [3, 17]] *= 20
    params = {"q": jnp.asarray(weights(K, N)), "k": jnp.asarray(weights(K, N, seed=2)), "o": jnp.asarray(weights(N, N))}
    return params, jq.calibrate(function, params, [jnp.asarray(x)])


def errors(params, stats, config):
    _, report = jq.quantize_params(params, stats, config)
    return {row.path: row.error for row in report.layers}


def test_the_best_method_of_each_weight_is_kept():
    params, stats = given()
    configs = [jq.RTN(W4), jq.GPTQ(W4), jq.GPTQ(W4, clip="diagonal")]
    each = [errors(params, stats, config) for config in configs]
    calls = []
    qparams, report = jq.quantize_params(params, stats, jq.Best(configs), progress=lambda *n: calls.append(n))
    best = {row.path: row.error for row in report.layers}
    assert best == {path: pytest.approx(min(e[path] for e in each), rel=1e-5) for path in params}
    assert len({row.method for row in report.layers}) == 1  # GPTQ, with one or the other choice of scales
    assert all(q.channel_scale is None for q in jax.tree.leaves(qparams, is_leaf=is_qtensor))
    assert calls[-1] == (9, 9)


def test_weights_on_one_input_agree_where_a_method_scales_channels():
    params, stats = given()
    configs = [jq.GPTQ(W4), jq.AWQ(W4, grid=4), jq.Chain(jq.AWQ(W4, grid=4), jq.GPTQ(W4))]
    each = [errors(params, stats, config) for config in configs]
    qparams, report = jq.quantize_params(params, stats, jq.Best(configs))
    best = {row.path: row.error for row in report.layers}
    together = min(e["q"] + e["k"] for e in each)
    assert best["q"] + best["k"] == pytest.approx(together, rel=1e-5)
    assert best["o"] == pytest.approx(min(e["o"] for e in each), rel=1e-5)
    np.testing.assert_array_equal(qparams["q"].channel_scale, qparams["k"].channel_scale)
    assert {q.channel_scale is None for q in jax.tree.leaves(qparams, is_leaf=is_qtensor)} == {False}
    x = jnp.asarray(correlated(K, 20))
    assert np.all(np.isfinite(jq.quantized(function)(qparams, x)))


@pytest.mark.parametrize("budget", [2.6, 3.5, 4.2, 5.0, 9.0])
def test_bits_are_spent_where_they_help_most(budget):
    params, stats = given()
    configs = [jq.RTN(jq.QuantSpec(bits=bits)) for bits in (2, 3, 4, 8)]
    each = []
    for config in configs:
        q, report = jq.quantize_params(params, stats, config)
        each.append({row.path: (q[row.path].nbytes, row.error) for row in report.layers})
    bytes_allowed = budget / 8 * sum(w.size for w in params.values())
    tried = []
    for choice in itertools.product(range(4), repeat=3):
        size, error = (sum(each[i][path][part] for i, path in zip(choice, params, strict=True)) for part in (0, 1))
        if size <= bytes_allowed:
            tried.append((error, choice))
    if not tried:
        with pytest.raises(ValueError, match=r"budget_bits=2.6 is less than the smallest configs take, 2.\d+ bits"):
            jq.quantize_params(params, stats, jq.MixedPrecision(budget, configs))
        return
    qparams, report = jq.quantize_params(params, stats, jq.MixedPrecision(budget, configs))
    assert sum(row.error for row in report.layers) == pytest.approx(min(tried)[0], rel=1e-5)
    assert sum(q.nbytes for q in qparams.values()) <= bytes_allowed
    bits = {row.path: row.bits for row in report.layers}
    assert [bits[path] for path in params] == [configs[i].spec.bits for i in min(tried)[1]]


def test_rules_may_leave_a_part_open():
    params, stats = given()
    rules = [("o", jq.RTN(jq.int8())), (".*", jq.Best([jq.RTN(W4), jq.GPTQ(W4)]))]
    _, report = jq.quantize_params(params, stats, rules)
    assert {row.path: row.method for row in report.layers} == {"q": "GPTQ", "k": "GPTQ", "o": "RTN"}


def test_a_stack_of_layers_is_one_weight():
    params, x = {"w": jnp.asarray(weights(3, K, K))}, jnp.asarray(correlated(K, 300))
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    stats = jq.calibrate(fn, params, [x])
    qparams, report = jq.quantize_params(params, stats, jq.Best([jq.RTN(W4), jq.GPTQ(W4)]))
    assert [row.index for row in report.layers] == [(0,), (1,), (2,)]
    assert len({row.method for row in report.layers}) == 1
    assert jq.quantized(fn)(qparams, x).shape == x.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jq.Best([jq.RTN(W4)]), "two configs or more"),
        (lambda: jq.Best([jq.RTN(W4), jq.RTN(jq.int8())]), "methods of one spec"),
        (lambda: jq.Best([jq.RTN(W4), jq.SmoothQuant]), "methods of one spec|cannot choose"),
        (lambda: jq.Best([jq.RTN(W4), jq.Best([jq.RTN(W4), jq.GPTQ(W4)])]), "cannot choose"),
        (lambda: jq.MixedPrecision(0, [jq.RTN(W4), jq.GPTQ(W4)]), "budget_bits=0 must be a positive number"),
        (lambda: jq.MixedPrecision(float("nan"), [jq.RTN(W4), jq.GPTQ(W4)]), "budget_bits=nan must be"),
        (lambda: jq.quantize_params(given()[0], None, jq.Best([jq.RTN(W4), jq.GPTQ(W4)])), "needs calibration"),
        (
            lambda: jq.quantize_params(given()[0], None, jq.MixedPrecision(4, [jq.RTN(W4), jq.RTN(jq.int8())])),
            "needs cal",
        ),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
