"""Models whose layers are not stacked, so that each may be quantized in its own way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from safetensors.numpy import load_file
from samples import statistics_of

import jaxquant as jq
from jaxquant import workflows
from jaxquant.kernels.matmul import quantized_matmul
from jaxquant.models.stacking import is_stacked, stack_layers, unstack_layers
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.opening import open_pretrained

HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
}
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 32))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A checkpoint with windows that differ by layer; its model and stacked parameters, and unstacked ones."""
    path = tmp_path_factory.mktemp("stacking") / "model"
    model = jq.Model.from_hf(HF_CONFIG)
    params = jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, model.init(jax.random.key(0)))
    jq.save(path, model, params)
    return path, jq.load_pretrained(path), jq.load_pretrained(path, stacked=False)


def qtensors(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor) if is_qtensor(leaf)]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_unstacked_model_computes_the_same(given):
    _, (model, params), (other, apart) = given
    assert (model.stacked, other.stacked) == (True, False)
    assert (is_stacked(params), is_stacked(apart)) == (True, False)
    assert apart["layers"]["2"]["mlp"]["up_proj"]["kernel"].shape == (64, 128)
    same(unstack_layers(params), apart)
    same(stack_layers(apart), params)
    np.testing.assert_allclose(other.apply(apart, TOKENS), model.apply(params, TOKENS), atol=1e-5)
    assert jax.tree.structure(other.init(jax.random.key(1))) == jax.tree.structure(apart)


def test_layers_apart_get_the_codes_of_the_stack(given):
    _, (model, params), (other, apart) = given
    found = []
    for m, p in ((model, params), (other, apart)):
        config = jq.GPTQ(jq.int4(group_size=32), act_order=False)
        found.append(jq.quantize_params(p, jq.calibrate(m.apply, p, [TOKENS]), m.recipe(config)))
    (stack, report), (layers, other_report) = found
    codes, others = ([q.codes for q in qtensors(tree)] for tree in (unstack_layers(stack), layers))
    assert len(codes) == len(others) == 21
    assert np.mean([np.mean(a != b) for a, b in zip(codes, others, strict=True)]) < 1e-3  # rounding of the statistics
    assert len(report.layers) == len(other_report.layers) == 21


@pytest.fixture(scope="module")
def mixed(given):
    """Layers of different bits."""
    _, _, (model, params) = given
    stats = jq.calibrate(model.apply, params, [TOKENS])
    choice = jq.MixedPrecision(4.6, [jq.RTN(jq.QuantSpec(bits=b, group_size=32)) for b in (3, 4, 8)])
    return jq.quantize_params(params, stats, model.recipe(choice))


def test_bits_are_chosen_by_layer(mixed):
    params, report = mixed
    bits = {layer.path: layer.bits for layer in report.layers}
    assert len(bits) == 21
    names = "mlp/down_proj", "mlp/up_proj", "self_attn/o_proj"
    assert any(len({bits[f"layers/{i}/{name}/kernel"] for i in range(3)}) > 1 for name in names)
    quantized = qtensors(params)
    assert 8 * sum(q.nbytes for q in quantized) <= 4.6 * sum(q.size for q in quantized)


@pytest.mark.parametrize("format", ["jaxquant", "compressed-tensors"])
def test_layers_of_different_bits_are_saved_and_loaded(given, mixed, format, tmp_path):
    _, _, (model, _) = given
    params, _ = mixed
    jq.save(tmp_path / "out", model, params, format=format)
    loaded, found = jq.load_pretrained(tmp_path / "out", dtype="float32")  # not stacked, since they cannot be
    assert not loaded.stacked
    same(found, params)
    np.testing.assert_array_equal(loaded.apply(found, TOKENS), model.apply(params, TOKENS))
    with pytest.raises(
        ValueError, match=r"not quantized alike.*a stack of layers has one spec; load it with stacked=F"
    ):
        jq.load_pretrained(tmp_path / "out", stacked=True)
    if format == "compressed-tensors":
        groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
        assert len(groups) > 1
        assert "model.layers.2.mlp.up_proj.weight_packed" in load_file(tmp_path / "out" / "model.safetensors")


def test_unstacked_parameters_of_one_spec_load_as_a_stack(given, tmp_path):
    _, (_, params), (model, apart) = given
    jq.save(tmp_path / "float", model, apart)
    loaded, found = jq.load_pretrained(tmp_path / "float")
    assert loaded.stacked
    same(found, params)
    same(
        open_pretrained(tmp_path / "float").layers(range(1, 3))["layers"],
        jax.tree.map(lambda a: a[1:], params["layers"]),
    )


def test_a_model_saves_only_parameters_of_its_shape(given, tmp_path):
    _, (model, params), (other, apart) = given
    for m, p in ((model, apart), (other, params)):
        with pytest.raises(ValueError, match=r"params: layers/.* has shape"):
            jq.save(tmp_path / "out", m, p)


def test_channel_scales_fold_layer_by_layer(given):
    _, _, (model, params) = given
    stats = jq.calibrate(model.apply, params, [TOKENS])
    config = jq.AWQ(jq.int4(group_size=32))
    quantized, _ = jq.quantize_params(params, stats, model.recipe(config, foldable=True))
    assert quantized["layers"]["1"]["mlp"]["up_proj"]["kernel"].channel_scale is not None
    assert quantized["layers"]["1"]["self_attn"]["o_proj"]["kernel"].channel_scale is None  # heads share their values
    folded = jq.fold(quantized, model.fold_pairs)
    assert all(q.channel_scale is None for q in qtensors(folded))
    np.testing.assert_allclose(model.apply(folded, TOKENS), model.apply(quantized, TOKENS), atol=1e-4)


def test_layers_may_keep_different_numbers_of_outliers():
    x = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    x[:, :10] *= 20
    layers = {}
    for i, outliers in enumerate((8, 16)):
        method = jq.LLMInt8(threshold=3.0, outliers=outliers)
        layers[str(i)] = {"w": method.quantize(normal(32, 32, seed=i), statistics_of(x))[0]}
    stack = stack_layers({"layers": layers})["layers"]["w"]
    stack.validate()
    assert stack.outlier_index.shape == (2, 16, 1)
    np.testing.assert_array_equal(jq.dequantize(stack), np.stack([jq.dequantize(q["w"]) for q in layers.values()]))
    each = np.stack([quantized_matmul(jnp.asarray(x), q["w"]) for q in layers.values()])
    np.testing.assert_allclose(quantized_matmul(jnp.stack([x, x]), stack), each, rtol=1e-5, atol=1e-4)


def test_choices_among_all_layers_are_none_for_one_layer_at_a_time(given, tmp_path):
    path, *_ = given
    choice = jq.MixedPrecision(4.6, [jq.RTN(jq.int4()), jq.RTN(jq.int8())])
    with pytest.raises(ValueError, match=r"looks at all layers at once.*use quantize_params"):
        workflows.quantize_checkpoint(path, tmp_path / "out", choice)


def test_trees_that_are_no_models_are_refused(given, tmp_path):
    path, (model, params), (_, apart) = given
    numbered = {int(name): layer for name, layer in apart["layers"].items()}
    for layers in ({}, numbered, jnp.ones(3)):
        tree = {**params, "layers": layers}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        jq.save(out, None, tree)
        (out / "config.json").write_text((path / "config.json").read_text())
        with pytest.raises(ValueError, match=r"params: .* has shape"):
            jq.load_pretrained(out)
    assert dataclasses.replace(model, stacked=False) == jq.load_pretrained(path, stacked=False)[0]
