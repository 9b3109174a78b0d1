"""quantize_params: grouping, guards, rules and the report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec, int4, int8
from jaxquant.transforms import quantize as module
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.quantize import quantize_params

K, N, LAYERS = 32, 24, 3


def model(params, x):
    for layer in params["list"]:
        x = jnp.tanh(x @ layer["w"] + layer["bias"]) @ layer["back"]

    def step(x, w):
        return jnp.tanh(x @ w["in"]) @ w["out"], None

    return jax.lax.scan(step, x, params["stack"])[0]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[-2] ** 0.5


@pytest.fixture(scope="module")
def given():
    layers = [{"w": normal(i, K, N), "back": normal(10 + i, N, K), "bias": jnp.zeros(N)} for i in range(2)]
    params = {"list": layers, "stack": {"in": normal(20, LAYERS, K, N), "out": normal(21, LAYERS, N, K)}}
    x = normal(30, 16, 64, K) @ normal(31, K, K) * 3
    return params, calibrate(model, params, [x])


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=is_qtensor)


def test_stacks_and_lists_give_what_each_matrix_alone_gives(given):
    params, stats = given
    config = GPTQ(int4(group_size=8))
    tree, report = quantize_params(params, stats, config)
    for i in range(LAYERS):
        inputs = jax.tree.map(lambda a, i=i: a[i], stats.products["stack/in"].inputs)
        alone, _ = config.quantize(params["stack"]["in"][i], inputs)
        differ = np.mean(np.asarray(alone.codes != tree["stack"]["in"].codes[i]))
        assert differ < 0.01  # float32: ties may flip with the order of sums
    assert tree["list"][0]["bias"] is params["list"][0]["bias"]
    assert len(report.layers) == 4 + 2 * LAYERS
    assert report.unchanged == ("list/0/bias", "list/1/bias")


def test_equal_shapes_run_in_one_program_however_they_are_cut(given, monkeypatch):
    params, stats = given
    traced = []
    original = module._one
    monkeypatch.setattr(module, "_one", lambda *a: traced.append(1) or original(*a))
    config = RTN(QuantSpec(bits=5))
    whole, _ = quantize_params(params, stats, config)
    assert len(traced) == 2  # [K, N] and [N, K]
    module._run.clear_cache()
    traced.clear()
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 4 * K * (K + N))  # 4 at once, of 5 or more
    cut, _ = quantize_params(params, stats, config)
    assert len(traced) == 2
    for a, b in zip(leaves(whole), leaves(cut), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_report_agrees_with_numpy(given):
    params, stats = given
    tree, report = quantize_params(params, stats, GPTQ(int4(group_size=8)))
    layer = next(layer for layer in report.layers if layer.path == "list/0/w")
    x = np.asarray(stats.products["list/0/w"].inputs.held_out, np.float64)
    w = np.asarray(params["list"][0]["w"], np.float64)
    for q, error in [
        (tree["list"][0]["w"], layer.error),
        (quantize(params["list"][0]["w"], int4(group_size=8)), layer.rtn_error),
    ]:
        found = np.square(x @ (np.asarray(dequantize(q), np.float64) - w)).sum() / np.square(x @ w).sum()
        assert error == pytest.approx(found, rel=1e-3)
    assert layer.error < layer.rtn_error
    assert report.bytes_before == sum(a.nbytes for a in jax.tree.leaves(params))
    assert report.bytes_after == sum(a.nbytes for a in jax.tree.leaves(tree)) < report.bytes_before / 3.5
    assert json.loads(report.to_json())["layers"][0]["path"] == report.layers[0].path


@dataclasses.dataclass(frozen=True)
class Worse(GPTQ):
    """Throws the weights away."""

    def quantize(self, w, stats):
        return RTN(self.spec).quantize(jnp.zeros_like(w) + 0.5, stats)


def with_inputs(stats, path, **fields):
    product = stats.products[path]
    changed = dataclasses.replace(product, inputs=dataclasses.replace(product.inputs, **fields))
    return dataclasses.replace(stats, products={**stats.products, path: changed})


@pytest.mark.parametrize(
    ("config", "fields", "reason"),
    [
        (Worse(int4(group_size=8)), {}, "worse than RTN on held-out tokens"),
        (Worse(int4(group_size=8)), {"count": jnp.float32(0)}, "no calibration tokens"),
        (Worse(int4(group_size=8)), {"held_out": jnp.zeros((4, K))}, "no held-out tokens to judge by"),
        (Worse(int4(group_size=8)), {"held_out": jnp.full((4, K), 1e30)}, "statistics are not finite"),
    ],
)
def test_falls_back_to_rounding_and_says_why(given, config, fields, reason):
    params, stats = given
    tree, report = quantize_params(params, with_inputs(stats, "list/0/w", **fields), [("list/0/w", config)])
    assert [layer.fallback for layer in report.layers] == [reason]
    expected = quantize(params["list"][0]["w"], config.spec)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(tree["list"][0]["w"], dtype="float32"), expected)


def test_rules(given):
    params, stats = given
    rules = [("stack/in", None), ("stack/.*", RTN(int8())), ("list/.*/w", RTN(int4()))]
    tree, _ = quantize_params(params, stats, rules)
    assert tree["stack"]["in"] is params["stack"]["in"]
    assert tree["stack"]["out"].spec == int8()
    assert tree["list"][1]["w"].spec == int4()
    assert not is_qtensor(tree["list"][1]["back"])
    again, _ = quantize_params(tree, stats, [("stack/in", RTN(int8()))])
    assert again["stack"]["out"] is tree["stack"]["out"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([("nothing", RTN(int8()))], "rule 'nothing' takes no weight"),
        ([(".*bias", RTN(int8()))], "takes no weight"),
        ([(".*", RTN(int8())), ("list/0/w", None)], "rule 'list/0/w' takes no leaf"),
        ([("stack", RTN(int8()))], "patterns match whole paths"),
        ([(".*", None)], "quantizes nothing"),
        ([("(", RTN(int8()))], "no regular expression"),
        ([("a", 3)], "no method config"),
        ("gptq", "no method config"),
        (RTN(int4(group_size=5)), "group_size=5 does not divide the contracting dimension"),
    ],
)
def test_bad_recipes(given, recipe, message):
    with pytest.raises(ValueError, match=message):
        quantize_params(*given, recipe)


def test_bad_weights_and_statistics(given):
    params, stats = given
    with pytest.raises(ValueError, match="GPTQ needs calibration statistics"):
        quantize_params(params, None, [("list/0/w", GPTQ(int4()))])
    broken = {**params, "stack": {**params["stack"], "in": params["stack"]["in"].at[1, 2, 3].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"'stack/in': 1 of its 2304 entries are not finite"):
        quantize_params(broken, stats, RTN(int8()))
    with pytest.raises(ValueError, match="no calibration token has finite inputs"):
        calibrate(model, params, [jnp.full((2, 8, K), jnp.nan)])


def test_without_statistics_names_tell_weights_apart():
    params = {"dense": {"kernel": normal(0, 2, K, N), "bias": normal(1, 2, N)}, "norm": {"scale": jnp.ones((2, K))}}
    tree, report = quantize_params(params, None, RTN(int8()))
    assert is_qtensor(tree["dense"]["kernel"])
    assert report.unchanged == ("dense/bias", "norm/scale")
    assert tree["dense"]["kernel"].scale.shape == (2, 1, N)


def test_a_looked_up_embedding_is_quantized_by_row_when_a_rule_names_it():
    params = {"table": normal(0, 40, K), "w": normal(1, K, N)}
    stats = calibrate(lambda p, ids: p["table"][ids] @ p["w"], params, [jnp.arange(40).reshape(4, 10)])
    assert not is_qtensor(quantize_params(params, stats, RTN(int8()))[0]["table"])
    tree, _ = quantize_params(params, stats, [("table", RTN(int8()))])
    assert tree["table"].contract == (-1,)
    assert tree["table"].scale.shape == (1, 40)


def test_a_use_that_cannot_be_followed_is_in_the_report():
    params = {"w": normal(1, K, N)}
    stats = calibrate(lambda p, x: (x @ p["w"], jnp.sum(p["w"] * 2)), params, [normal(2, 64, K)])
    _, report = quantize_params(params, stats, RTN(int8()))
    assert "`mul`" in report.notes["w"]
