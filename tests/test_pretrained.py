"""Loading and saving models, and what transformers computes from the files."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import jaxquant as jq
from jaxquant import workflows
from jaxquant.checkpoints.tensors import same_bits
from jaxquant.models import TINYLM
from jaxquant.models.model import Model
from jaxquant.models.names import tensors_from_params
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.pretrained import check_save

torch = pytest.importorskip("torch")

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9)).astype(np.int32)
PACKED = jq.int4(group_size=32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Makes small random Llamas as transformers saves them, with a tokenizer file; each one once."""
    made = {}

    def make(*, tied=False, dtype="float32"):
        key = tied, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("llama")
            config = transformers.LlamaConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
                tie_word_embeddings=tied,
                pad_token_id=None,
            )
            torch.manual_seed(0)
            transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(made[key])
            (made[key] / "tokenizer.json").write_text("{}")
        return made[key]

    return make


def quantized(params, spec, only=".*layers/.*kernel"):
    """The parameters with the kernels of the layers rounded to nearest."""

    def visit(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jq.quantize(leaf, spec) if re.fullmatch(only, name) else leaf

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_qtensor)


def assert_same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(same_bits, jax.tree.leaves(a), jax.tree.leaves(b)))


def logits_of_transformers(directory, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def relative_error(ours, theirs):
    return np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float_parameters_keep_their_dtype(checkpoints, dtype):
    model, params = jq.load_pretrained(checkpoints(dtype=dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert model.dtype == dtype
    model, again = jq.load_pretrained(checkpoints(dtype=dtype), dtype="float32")
    assert model.dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {dtype}
    assert params["layers"]["mlp"]["up_proj"]["kernel"].shape == (2, 64, 128)


@pytest.mark.parametrize("dtype", ["int8", "bf16", "float8_e4m3fn"])
def test_a_dtype_that_nothing_can_be_computed_in_is_refused(checkpoints, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is none to compute in"):
        jq.load_pretrained(checkpoints(dtype="float32"), dtype=dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_float_logits_are_those_of_transformers(checkpoints, tied):
    model, params = jq.load_pretrained(checkpoints(tied=tied))
    assert relative_error(model.apply(params, TOKENS), logits_of_transformers(checkpoints(tied=tied))) < 1e-5


def test_shards_of_transformers_are_one_model(checkpoints, tmp_path):
    source = checkpoints(tied=False)
    whole = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, params = jq.load_pretrained(tmp_path)
    assert_same_params(params, jq.load_pretrained(source)[1])
    assert relative_error(model.apply(params, TOKENS), logits_of_transformers(tmp_path)) < 1e-5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # which says that it is heeded
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(
    ("tied", "group_size", "symmetric"), [(True, 32, True), (False, None, True), (False, 32, False)]
)
def test_transformers_computes_the_same_from_compressed_tensors(
    checkpoints, tmp_path, bits, tied, group_size, symmetric
):
    model, params = jq.load_pretrained(checkpoints(tied=tied))
    qparams = quantized(params, jq.QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric))
    jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    ours = model.apply(qparams, TOKENS)
    # compressed-tensors 0.20 expects packed zero points in the shape of plain ones unless it dequantizes as it loads
    options = {} if symmetric else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    assert relative_error(ours, logits_of_transformers(tmp_path / "out", **options)) < 1e-4
    assert relative_error(model.apply(params, TOKENS), np.asarray(ours)) > 1e-3
    again, read = jq.load_pretrained(tmp_path / "out")
    assert_same_params(read, qparams)
    assert again.dtype == model.dtype
    np.testing.assert_array_equal(again.apply(read, TOKENS), ours)


def test_transformers_computes_the_same_from_several_specs_and_a_quantized_head(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints())
    qparams = quantized(params, PACKED, ".*self_attn/.*kernel")
    qparams = quantized(qparams, jq.int8(), ".*(mlp/(up|down)_proj|lm_head)/kernel")  # gate_proj stays as it is
    jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    ours = model.apply(qparams, TOKENS)
    assert relative_error(ours, logits_of_transformers(tmp_path / "out")) < 1e-4
    assert_same_params(jq.load_pretrained(tmp_path / "out")[1], qparams)


@pytest.mark.parametrize("format", ["jaxquant", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_saved_is_loaded_bit_for_bit_with_its_companions(checkpoints, tmp_path, format, dtype):
    model, params = jq.load_pretrained(checkpoints(dtype=dtype))
    qparams = quantized(params, PACKED)
    jq.save(tmp_path / "out", model, qparams, format=format)
    again, read = jq.load_pretrained(tmp_path / "out")
    assert_same_params(read, qparams)
    assert again.config == model.config
    assert again.dtype == dtype
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "_name_or_path" not in config
    assert config["dtype"] == dtype
    jq.save(tmp_path / "again", again, read)  # in the other format too, with the tokenizer of the copy
    assert_same_params(jq.load_pretrained(tmp_path / "again")[1], qparams)
    assert (tmp_path / "again" / "tokenizer.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_scales_that_the_model_dtype_has_are_written_in_it(checkpoints, tmp_path, scale_dtype):
    model, params = jq.load_pretrained(checkpoints())
    qparams = quantized(params, jq.int4(group_size=32, scale_dtype=scale_dtype))
    jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    _, read = jq.load_pretrained(tmp_path / "out")
    for q, again in zip(*(jax.tree.leaves(p, is_leaf=is_qtensor) for p in (qparams, read)), strict=True):
        if is_qtensor(q):
            assert same_bits(again.values, q.values)
            assert same_bits(again.scale, q.scale.astype(jnp.float32))


def test_float_parameters_are_saved_natively_and_not_as_compressed_tensors(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints())
    jq.save(tmp_path / "out", model, params)
    assert_same_params(jq.load_pretrained(tmp_path / "out")[1], params)
    with pytest.raises(ValueError, match="nothing is quantized"):
        jq.save(tmp_path / "ct", model, params, format="compressed-tensors")


def test_a_checkpoint_may_replace_the_one_it_was_loaded_from(checkpoints, tmp_path):
    shutil.copytree(checkpoints(), tmp_path / "out")
    model, params = jq.load_pretrained(tmp_path / "out")
    qparams = quantized(params, PACKED)
    jq.save(tmp_path / "out", model, qparams, overwrite=True)
    assert_same_params(jq.load_pretrained(tmp_path / "out")[1], qparams)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_bare_tree(tmp_path):
    tree = {"w": jq.quantize(jnp.ones((8, 4)), jq.int4()), "b": [jnp.zeros(4)]}
    jq.save(tmp_path / "out", None, tree)
    assert_same_params(jq.load(tmp_path / "out"), tree)
    with pytest.raises(ValueError, match=r"a parameter tree without a model; read it with jaxquant\.load"):
        jq.load_pretrained(tmp_path / "out")


def test_the_tree_of_a_model_can_be_loaded_alone(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints())
    jq.save(tmp_path / "out", model, params)
    assert_same_params(jq.load(tmp_path / "out"), params)


def test_the_packaged_model(tmp_path):
    model, params = jq.load_pretrained(TINYLM)
    jq.save(tmp_path / "out", model, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("import os")["input_ids"]) == "import os"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (jq.int8(narrow_range=True), "narrow_range has no place in the format"),
        (jq.int8(granularity="per_tensor"), "granularity per_tensor is not supported"),
    ],
)
def test_what_compressed_tensors_cannot_say_is_refused_and_nothing_is_left(checkpoints, tmp_path, spec, message):
    model, params = jq.load_pretrained(checkpoints())
    with pytest.raises(ValueError, match=message):
        jq.save(tmp_path / "out", model, quantized(params, spec), format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_tied_embedding_is_saved_natively_only(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints(tied=True))
    per_row = jq.quantize(params["embed_tokens"]["embedding"], jq.int8(), contract=(-1,), out=(-2,))
    qparams = {**quantized(params, PACKED), "embed_tokens": {"embedding": per_row}}
    with pytest.raises(ValueError, match="embed_tokens/embedding is the output head too"):
        jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    jq.save(tmp_path / "out", model, qparams)
    assert_same_params(jq.load_pretrained(tmp_path / "out")[1], qparams)


def test_wrong_arguments_of_save(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints())
    with pytest.raises(ValueError, match="format='gguf' is not one of jaxquant, compressed-tensors"):
        jq.save(tmp_path / "out", model, params, format="gguf")
    with pytest.raises(ValueError, match="format='compressed-tensors' needs a model"):
        jq.save(tmp_path / "out", None, params, format="compressed-tensors")
    with pytest.raises(TypeError, match="model is a function; give a model from load_pretrained, or None"):
        jq.save(tmp_path / "out", quantized, params)
    with pytest.raises(ValueError, match=r"params: lm_head/kernel has shape None.* has \(64, 96\)"):
        jq.save(tmp_path / "out", model, {k: v for k, v in params.items() if k != "lm_head"})
    with pytest.raises(ValueError, match=r"params: norm/scale has shape \(3,\)"):
        jq.save(tmp_path / "out", model, {**params, "norm": {"scale": jnp.ones(3)}})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with pytest.raises(FileExistsError, match="is not empty"):
        jq.save(tmp_path, model, params)


def test_check_save_foresees_what_save_refuses(tmp_path):
    check_save(tmp_path / "out", jq.int8(symmetric=False))
    check_save(tmp_path / "out", jq.int4(), format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="narrow_range has no place"):
        check_save(tmp_path / "out", jq.int8(narrow_range=True), format="compressed-tensors")
    with pytest.raises(ValueError, match="format='gguf' is not one of"):
        check_save(tmp_path / "out", jq.int8(), format="gguf")
    jq.save(tmp_path / "out", None, {})
    with pytest.raises(FileExistsError, match=r"pass overwrite=True \(--overwrite\)"):
        check_save(tmp_path / "out", jq.int8())
    check_save(tmp_path / "out", jq.int8(), overwrite=True)
    assert jq.load(tmp_path / "out") == {}


def test_a_model_that_was_not_loaded_is_saved_without_companions(checkpoints, tmp_path):
    hf_config = json.loads((checkpoints() / "config.json").read_text())
    model = Model.from_hf(hf_config)
    params = model.init(jax.random.key(0))
    jq.save(tmp_path / "out", model, params)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "jaxquant.json",
        "model.safetensors",
    ]
    assert_same_params(jq.load_pretrained(tmp_path / "out")[1], params)


# What is wrong on disk


def packed_checkpoint(checkpoints, directory):
    model, params = jq.load_pretrained(checkpoints())
    jq.save(directory, model, quantized(params, PACKED), format="compressed-tensors")


def edit_config(directory, change):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_layers_that_are_quantized_differently_cannot_be_stacked(checkpoints, tmp_path):
    packed_checkpoint(checkpoints, tmp_path / "out")

    def second_layer_per_channel(config):
        groups = config["quantization_config"]["config_groups"]
        other = json.loads(json.dumps(groups["group_0"]))
        other["weights"] |= {"strategy": "channel", "group_size": None}
        groups["group_1"] = {**other, "targets": [r"re:.*\.1\.self_attn\.q_proj"]}

    edit_config(tmp_path / "out", second_layer_per_channel)
    edit_tensors(
        tmp_path / "out",
        lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.weight_scale": np.ones((64, 1), np.float32)}),
    )
    with pytest.raises(
        ValueError, match=r"layers.\{layer\}.self_attn.q_proj.weight is not quantized alike in all layers"
    ):
        jq.load_pretrained(tmp_path / "out", stacked=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(architectures=["BertLMHeadModel"]),
            r"architectures=\['BertLMHeadModel'\] is not supported",
        ),
        (
            lambda c: c.update(quantization_config={"quant_method": "hqq"}),
            "quant_method='hqq' is not read; supported",
        ),
        (
            lambda c: c.update(quantization_config="gptq"),
            "quantization_config='gptq' is not supported; expected an object",
        ),
        (lambda c: c.update(quantization_config={}), "quant_method=None is not read"),
        (lambda c: c.update(num_hidden_layers=3), "model.layers.2.* missing from the checkpoint"),
        (lambda c: c.update(vocab_size=97), "has shape .*the configuration says"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_clear_error(checkpoints, tmp_path, change, message):
    shutil.copytree(checkpoints(), tmp_path / "out")
    edit_config(tmp_path / "out", change)
    with pytest.raises(ValueError, match=message) as caught:
        jq.load_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_native_checkpoint_that_is_not_of_its_model(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints())
    jq.save(tmp_path / "out", model, params)
    edit_config(tmp_path / "out", lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"params: layers/.* has shape \(2, .* config.json has \(3, "):
        jq.load_pretrained(tmp_path / "out")


def test_64_bit_parameters_are_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints(), tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda t: t.update({name: a.astype(np.float64) for name, a in t.items()}))
    with pytest.raises(ValueError, match=r"tensor .* is float64; expected one of float32, bfloat16, float16"):
        jq.load_pretrained(tmp_path / "out")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        jq.load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no local directory"):
        jq.load_pretrained(tmp_path / "gone")


def test_models_of_two_directories_share_one_compiled_function(checkpoints, tmp_path):
    model, params = jq.load_pretrained(checkpoints())
    jq.save(tmp_path / "out", model, params)
    again, _ = jq.load_pretrained(tmp_path / "out")
    assert again.apply is model.apply
    assert dataclasses.replace(again, hf_config=model.hf_config) == model


def test_layers_of_different_dtypes_are_refused(tmp_path):
    """They are stacked, and one of them would be cast to the dtype of the first without a word."""
    model = jq.Model.from_hf(json.loads((TINYLM / "config.json").read_text()) | {"num_hidden_layers": 2})
    tensors = tensors_from_params(model.config, model.init(jax.random.key(0)))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(model.hf_config)
    message = rf"{name} is float16 and .*layers\.0\.mlp\.up_proj\.weight is float32; layers are stacked"
    with pytest.raises(ValueError, match=message):
        jq.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):  # before any work
        workflows.quantize_checkpoint(tmp_path, tmp_path / "out", jq.RTN(jq.int4(group_size=128)))
