"""Models quantized while they are read: the same parameters, and never all floats in memory."""

import gc
import json

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.checkpoints.tensors import Tensors, write_tensors
from jaxquant.models.names import tensors_from_params

HF_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "max_position_embeddings": 64,
}
NEAREST = jq.RTN(jq.int4(group_size=32))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A float checkpoint in Hugging Face's format."""
    directory, model, rng = tmp_path_factory.mktemp("loading"), jq.Model.from_hf(HF_CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(size=a.shape), a.dtype), shapes)
    write_tensors(directory, tensors_from_params(model.config, params))
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    return directory


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("stacked", [True, False])
def test_the_result_is_that_of_quantizing_what_was_loaded(path, stacked):
    model, params = jq.load_pretrained(path, stacked=stacked)
    embedded = [("embed_tokens/embedding", jq.RTN(jq.int8())), *model.recipe(NEAREST)[1:]]
    for quantize, recipe in ((NEAREST, model.recipe(NEAREST)), (embedded, embedded)):
        want, _ = jq.quantize_params(params, None, recipe)
        loaded, found = jq.load_pretrained(path, stacked=stacked, quantize=quantize)
        same(found, want)
        assert loaded == model


def test_layers_apart_have_rules_of_their_own(path):
    rules = [("layers/2/.*_proj/kernel", NEAREST)]
    model, found = jq.load_pretrained(path, stacked=False, quantize=rules)
    assert isinstance(found["layers"]["2"]["mlp"]["experts"]["up_proj"]["kernel"], jq.QTensor)
    assert not isinstance(found["layers"]["1"]["mlp"]["experts"]["up_proj"]["kernel"], jq.QTensor)
    assert np.isfinite(model.apply(found, np.arange(8)[None])).all()


def test_no_more_than_one_layer_is_float_at_a_time(path, monkeypatch):
    params = jq.load_pretrained(path)[1]
    layer = sum(a.nbytes for a in jax.tree.leaves(params["layers"])) // 6
    outer = sum(a.nbytes for name in params if name != "layers" for a in jax.tree.leaves(params[name]))
    left = sum(a.nbytes // 6 for a in jax.tree.leaves(params["layers"]) if a.ndim < 3) + 6 * layer // 8  # norms, scales
    del params
    gc.collect()  # of earlier tests

    def live():
        return sum(a.nbytes for a in jax.live_arrays() if a.dtype == np.float32)

    before, most, read = live(), 0, Tensors.map

    def measured(self, name):
        nonlocal most
        most = max(most, live() - before)
        return read(self, name)

    monkeypatch.setattr(Tensors, "map", measured)
    jq.load_pretrained(path, quantize=NEAREST)
    quantized, most = most, 0
    jq.load_pretrained(path)
    assert quantized < outer + 2 * layer + left < most


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (
            jq.GPTQ(jq.int4()),
            r"quantize=GPTQ: it needs calibration statistics, and a model that is only read has",
        ),
        ([(".*up_proj/kernel", jq.Best([NEAREST, NEAREST]))], r"quantize=Best: it needs calibration statistics"),
        (
            jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True, granularity="per_tensor"))),
            r"quantize=RTN: it needs",
        ),
        ([("layers/.*up_projection", NEAREST)], r"recipe rule 'layers/\.\*up_projection' takes no weight"),
        ([(".*", None)], r"the recipe quantizes nothing"),
        (jq.RTN(jq.int4(group_size=24)), r"'layers/.*/kernel': .*24"),
        ("rtn", r"recipe='rtn' is no method config"),
    ],
)
def test_what_cannot_be_done_while_reading_is_refused(path, quantize, message):
    with pytest.raises(ValueError, match=message):
        jq.load_pretrained(path, quantize=quantize)


def test_a_quantized_model_is_refused(path, tmp_path):
    model, params = jq.load_pretrained(path, quantize=NEAREST)
    jq.save(tmp_path / "out", model, params)
    with pytest.raises(ValueError, match=r"is quantized already; leave out quantize="):
        jq.load_pretrained(tmp_path / "out", quantize=NEAREST)
