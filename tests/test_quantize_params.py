"""quantize_params: grouping, guards, rules and the report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import CASES, E
from PIL import Image

from jaxquant.methods.chain import Chain
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec, int4, int8
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms import jobs, programs
from jaxquant.transforms.calibrate import ProductStatistics, Statistics, calibrate
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.report import LayerReport, Report

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
    original = programs.one_by_one_on_cpu  # is called when a program is traced
    monkeypatch.setattr(programs, "one_by_one_on_cpu", lambda fn: traced.append(1) or original(fn))
    programs.run.clear_cache()
    config = RTN(QuantSpec(bits=5))
    whole, _ = quantize_params(params, stats, config)
    assert len(traced) == 2  # [K, N] and [N, K]
    programs.run.clear_cache()
    traced.clear()
    monkeypatch.setattr(jobs, "CHUNK_BYTES", 4 * 4 * K * (K + N))  # 4 at once, of 5 or more
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


class BranchesOnBits(RTN):
    """Reads its bits, so it is compiled for them."""

    def quantize(self, w, stats=None):
        return RTN(self.spec).quantize(w if self.spec.bits < 4 else -w, stats)


class Narrow(GPTQ):
    """Has no form with eight bits."""

    def __post_init__(self):
        super().__post_init__()
        assert self.spec.bits < 5


class OwnSpec(RTN):
    """Makes codes of another spec than it says."""

    def quantize(self, w, stats=None):
        return RTN(int4(group_size=4)).quantize(w, stats)


@pytest.mark.parametrize("kind", [BranchesOnBits, Narrow, OwnSpec])
def test_methods_of_other_people_may_read_their_bits(given, kind):
    params, stats = given
    config = kind(int4(group_size=8))
    tree, _ = quantize_params({"w": params["list"][0]["w"]}, None if kind is OwnSpec else stats_of_one(stats), config)
    tree["w"].validate()
    assert tree["w"].spec.bits == 4


def stats_of_one(stats):
    return dataclasses.replace(stats, products={"w": stats.products["list/0/w"]})


def test_without_jit(given):
    params, stats = given
    config = RTN(int4(group_size=8))
    want, _ = quantize_params({"w": params["list"][0]["w"]}, stats_of_one(stats), config)
    with jax.disable_jit():
        found, _ = quantize_params({"w": params["list"][0]["w"]}, stats_of_one(stats), config)
    np.testing.assert_array_equal(found["w"].values, want["w"].values)


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


# ---------------------------------------------------------------------------------------------------- shapes and leaves


@dataclasses.dataclass(frozen=True)
class Weighted(RTN):
    """Rounds what depends on the statistics of each input; as a kind of RTN, it never falls back."""

    def quantize(self, w, stats=None):
        scale = 1.0 if stats is None else jnp.sqrt(jnp.diagonal(stats.gram)) + stats.gram[0] + stats.absmax
        return RTN(self.spec).quantize(w * jnp.reshape(scale, (-1, 1)), None)


def statistics_of(k, *lead, tokens=200):
    """Statistics of correlated random inputs, some of them held out."""
    x = np.random.default_rng(k).normal(size=(*lead, tokens, k)) @ np.random.default_rng(1).normal(size=(k, k))
    x = jnp.asarray(x, jnp.float32)
    kept, held = x[..., :-20, :], x[..., -20:, :]
    gram = jnp.einsum("...ti,...tj->...ij", kept, kept) / kept.shape[-2]
    size, count = jnp.abs(kept), jnp.full(lead, kept.shape[-2], jnp.float32)
    return InputStatistics(
        gram, -jnp.max(size, -2), jnp.max(size, -2), jnp.mean(size, -2), count, jnp.zeros(lead), held
    )


@pytest.mark.parametrize(
    ("shape", "contract", "out"),
    [
        ((K, 4, 6), (0,), (1, 2)),  # DenseGeneral to heads
        ((4, 8, N), (0, 1), (2,)),  # and from heads
        ((N, K), (1,), (0,)),  # as PyTorch stores it
        ((K, 3, N), (0,), (2,)),  # layers in the middle
        ((2, K, 3, N), (1,), (3,)),  # layers and experts
        ((4, 2, 8, N), (0, 2), (3,)),
        ((K, 1), (0,), (1,)),
        ((K, N, 1), (0,), (1,)),
        ((K,) * 2, (0,), ()),
    ],
)
@pytest.mark.parametrize("config", [Weighted(int4(group_size=8)), Weighted(int4(granularity="per_tensor"))])
def test_any_axes_give_what_the_flattened_matrix_gives(shape, contract, out, config):
    w = normal(3, *shape)
    lead = tuple(n for a, n in enumerate(shape) if a not in contract + out)
    inputs = statistics_of(K, *lead)
    stats = Statistics({"w": ProductStatistics(contract, out, inputs)}, frozenset(), ())
    tree, report = quantize_params({"w": w}, stats, config)
    tree["w"].validate()
    assert tree["w"].shape == shape
    order = [a for a in range(len(shape)) if a not in contract + out] + [*contract, *out]
    flat = np.transpose(w, order).reshape(*lead, K, -1)
    got = np.transpose(dequantize(tree["w"]), order).reshape(*lead, K, -1)
    for i, at in enumerate(np.ndindex(lead)):
        alone, _ = config.quantize(jnp.asarray(flat[at]), jax.tree.map(lambda a, at=at: a[at], inputs))
        np.testing.assert_allclose(got[at], dequantize(alone), rtol=1e-6)
        assert (report.layers[i].index, report.layers[i].shape) == (at, (K, flat.shape[-1]))


def test_other_leaves_are_the_same_objects():
    case = CASES["leaves_of_every_kind"]
    params = case.params()
    stats = calibrate(case.apply, params, case.batches())
    tree, report = quantize_params(params, stats, RTN(int4()))
    for path in ("unused", "steps", "flag", "key", "scalar", "number", "empty"):
        assert tree[path] is params[path]
        assert path in report.unchanged
    assert tree["none"] is None
    assert is_qtensor(tree["w"])
    assert is_qtensor(tree["numpy"])  # an array of NumPy's
    json.loads(report.to_json())
    without, report = quantize_params(params, None, RTN(int4()))
    assert {path for path in without if is_qtensor(without[path])} == {"w", "unused", "numpy"}
    assert report.layers[0].tokens is report.layers[0].error is None


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_dequantized_parameters_are_those_of_the_model_to_half_a_step(given, dtype):
    params, stats = given
    qparams, _ = quantize_params(params, stats, RTN(int4()))
    found = dequantize_params(qparams, dtype)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert found["list"][0]["bias"] is params["list"][0]["bias"]
    for a, q, w in zip(leaves(found), leaves(qparams), leaves(params), strict=True):
        if is_qtensor(q):
            assert a.dtype == (dtype or w.dtype)
            reach = np.abs(np.asarray(w)).max(-2, keepdims=True) * (1 / 15 + 1e-3)  # half of a step, and of float16
            assert (np.abs(np.asarray(a, np.float32) - np.asarray(w)) <= reach).all()


def test_an_expert_without_tokens_is_rounded_and_reported():
    case = CASES["experts_ragged"]
    params = case.params()
    stats = calibrate(case.apply, params, case.batches())
    tree, report = quantize_params(params, stats, GPTQ(int4(group_size=8)))
    last = [layer for layer in report.layers if layer.index == (E - 1,)]
    assert [(layer.name, layer.fallback, layer.tokens) for layer in last] == [
        (f"down[{E - 1}]", "no calibration tokens", 0),
        (f"up[{E - 1}]", "no calibration tokens", 0),
    ]
    nearest = quantize(params["up"][E - 1], int4(group_size=8))
    np.testing.assert_array_equal(dequantize(tree["up"])[E - 1], dequantize(nearest))
    assert all(layer.tokens > 0 for layer in report.layers if layer.index != (E - 1,))


def test_a_tied_embedding_is_quantized_along_its_products_axis():
    case = CASES["tied_embedding"]
    stats = calibrate(case.apply, case.params(), case.batches())
    tree, _ = quantize_params(case.params(), stats, GPTQ(int4(group_size=8)))
    assert (tree["embedding"].contract, tree["embedding"].out) == ((-1,), (-2,))


def test_weights_keep_their_dtype_and_scales_have_it():
    params = {"w": normal(1, K, N).astype(jnp.bfloat16)}
    stats = calibrate(lambda p, x: x @ p["w"], params, [normal(2, 64, K).astype(jnp.bfloat16)])
    tree, _ = quantize_params(params, stats, GPTQ(int4(group_size=8)))
    assert (tree["w"].dtype, tree["w"].scale.dtype) == ("bfloat16", jnp.bfloat16)


def test_progress_counts_matrices(given):
    calls = []
    quantize_params(*given, RTN(int8()), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 10), (10, 10)]


def test_statistics_of_another_tree_are_refused(given):
    params, stats = given
    other = {**params, "stack": {"in": normal(1, LAYERS + 1, K, N), "out": params["stack"]["out"]}}
    with pytest.raises(ValueError, match=r"'stack/in': its statistics are for .* calibrate with the tree"):
        quantize_params(other, stats, RTN(int8()))


def test_a_group_size_that_does_not_fit_names_those_that_do(given):
    message = "'list/0/back': group_size=16 does not divide the contracting dimension 24; choose one of 24, or"
    with pytest.raises(ValueError, match=message):
        quantize_params(*given, RTN(int4(group_size=16)))


def test_no_work_is_done_before_all_is_checked(given, monkeypatch):
    params, stats = given
    monkeypatch.setattr("jaxquant.transforms.quantize.run", None)
    broken = {**params, "stack": {**params["stack"], "out": params["stack"]["out"].at[0, 0, 0].set(jnp.inf)}}
    with pytest.raises(ValueError, match="not finite"):
        quantize_params(broken, stats, RTN(int8()))


def test_without_statistics_a_bare_config_passes_over_what_is_named_otherwise():
    names = ("layers/norm/g", "pos_embedding", "mlp/bias", "mlp/gamma", "mlp/kernel", "up")
    params = {name: normal(i, 3, 32) for i, name in enumerate(names)}
    _, report = quantize_params(params, None, RTN(int8()))
    assert {layer.path for layer in report.layers} == {"mlp/kernel", "up"}


@pytest.mark.parametrize("config", [GPTQ(int4()), Chain(SmoothQuant(0.5), RTN(int4())), RTN(int4(), clip="output")])
def test_what_is_only_looked_up_has_no_statistics(config):
    params = {"table": normal(0, 64, 16), "w": normal(1, 16, 16)}
    stats = calibrate(lambda p, ids: p["table"][ids] @ p["w"], params, [jnp.arange(64)])
    with pytest.raises(ValueError, match=r"'table' is only looked up, .* leave it out by a rule \('table', None\)"):
        quantize_params(params, stats, [(".*", config)])


def test_without_held_out_tokens_no_error_is_reported():
    params, x = {"w": normal(0, 16, 16)}, normal(1, 1, 16)
    for config in (RTN(int4()), GPTQ(int4())):
        _, report = quantize_params(params, calibrate(lambda p, x: x @ p["w"], params, [x]), config)
        assert (report.layers[0].error, report.layers[0].rtn_error) == (None, None)


def test_the_report_is_drawn(tmp_path):
    rows = [
        LayerReport(path, (i,), (8, 8), "GPTQ", 4, None, True, "none", 10, 0, 0.1, error, None, {}, 0.0)
        for path in ("layers/a/kernel", "layers/b/kernel")
        for i, error in enumerate((0.1, 0.001, None))
    ]
    Report(tuple(rows), (), {}, 0, 0).heat_map(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in ((253, 231, 36), (68, 1, 84)):  # the ends of the scale
        assert (np.abs(pixels.astype(int) - color).max(1) < 3).sum() > 1000
    with pytest.raises(ValueError, match="no matrix of this report has an error to draw"):
        Report((), (), {}, 0, 0).heat_map(tmp_path / "none.png")
