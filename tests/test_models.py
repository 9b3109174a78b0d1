"""The decoder against transformers, its names and configurations, and the shipped model."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import transformers
from safetensors.numpy import load_file

from jaxquant.evaluation.corpus import standard_library_text
from jaxquant.models import TINYLM
from jaxquant.models.config import from_hf
from jaxquant.models.model import Model
from jaxquant.models.names import parameter_shapes, params_from_tensors, tensors_from_params
from jaxquant.numerics.affine import quantize
from jaxquant.numerics.spec import QuantSpec
from jaxquant.transforms.dequantize import dequantize_params

torch = pytest.importorskip("torch")

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1},
    "kv_heads_by_default": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12},
    "theta": {"rope_theta": 500000.0},
    "llama3_of_transformers_4": {"rope_theta": 5000.0, "rope_scaling": LLAMA3},
    "llama3_of_transformers_5": {"rope_parameters": {**LLAMA3, "rope_theta": 5000.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "one_layer": {"num_hidden_layers": 1},
}


def torch_model(hf_config: dict) -> "torch.nn.Module":
    config = transformers.LlamaConfig(**{key: value for key, value in hf_config.items() if key != "architectures"})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # transformers' initial values hide errors: they are small, and norms are 1
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return model


def tensors_of(model: "torch.nn.Module") -> dict:
    """The model's tensors as in a file: NumPy arrays, bfloat16 included, and no head where it is tied."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: as_numpy(tensor) for name, tensor in model.state_dict().items() if name not in tied}


def as_numpy(tensor: "torch.Tensor") -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def torch_logits(model: "torch.nn.Module", tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.int64)).logits.float().numpy()


def random_tokens(vocab_size: int, shape=(2, 40)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)


def relative_error(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@functools.cache
def small_tensors() -> dict:
    return tensors_of(torch_model(SMALL))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant):
    hf_config = SMALL | VARIANTS[variant]
    reference = torch_model(hf_config)
    model = Model.from_hf(hf_config)
    tokens = random_tokens(97)
    logits = model.apply(params_from_tensors(model.config, tensors_of(reference)), tokens)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, torch_logits(reference, tokens)) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_load_and_compute(dtype):
    reference = torch_model(SMALL)
    half = {name: tensor.to(getattr(torch, dtype)) for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(half)
    params = params_from_tensors(from_hf(SMALL), {name: as_numpy(tensor) for name, tensor in half.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    tokens = random_tokens(97)
    expected = torch_logits(reference, tokens)
    assert relative_error(Model.from_hf(SMALL, "float32").apply(params, tokens), expected) < 1e-5
    assert relative_error(Model.from_hf(SMALL, dtype).apply(params, tokens), expected) < 0.05


def test_the_future_does_not_matter():
    model = Model.from_hf(SMALL)
    params = model.init(jax.random.key(0))
    tokens = random_tokens(97)
    changed = np.concatenate([tokens[:, :20], tokens[:, 20:][:, ::-1]], axis=1)
    np.testing.assert_array_equal(model.apply(params, tokens)[:, :20], model.apply(params, changed)[:, :20])


def test_parameters_are_stacked_kernels():
    shapes = parameter_shapes(from_hf(SMALL))
    assert shapes["layers/self_attn/k_proj/kernel"] == (3, 32, 16)
    assert shapes["layers/mlp/down_proj/kernel"] == (3, 48, 32)
    assert shapes["embed_tokens/embedding"] == (97, 32)
    assert shapes["lm_head/kernel"] == (32, 97)
    assert "lm_head/kernel" not in parameter_shapes(from_hf(SMALL | VARIANTS["tied"]))


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_tensors_round_trip(variant):
    config = from_hf(SMALL | VARIANTS[variant])
    tensors = tensors_of(torch_model(SMALL | VARIANTS[variant]))
    written = tensors_from_params(config, params_from_tensors(config, tensors))
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
        assert written[name].flags.c_contiguous


def quantized_layers(params: dict, spec: QuantSpec) -> dict:
    return params | {"layers": jax.tree.map(lambda a: quantize(a, spec) if a.ndim == 3 else a, params["layers"])}


@pytest.mark.parametrize("spec", [QuantSpec(bits=4, group_size=16), QuantSpec(bits=8, symmetric=False)])
def test_quantized_parameters_round_trip_and_run(spec):
    model = Model.from_hf(SMALL)
    params = quantized_layers(params_from_tensors(model.config, small_tensors()), spec)
    tensors = tensors_from_params(model.config, params)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (48, 32)
    again = params_from_tensors(model.config, tensors)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tokens = random_tokens(97)
    assert relative_error(model.apply(params, tokens), model.apply(dequantize_params(params), tokens)) < 1e-5


def test_wrong_shape_names_tensor_and_both_shapes():
    tensors = small_tensors() | {"model.layers.2.self_attn.k_proj.weight": np.zeros((32, 16), np.float32)}
    expected = r"model\.layers\.2\.self_attn\.k_proj\.weight has shape \[32, 16\]; the configuration says \[16, 32\]"
    with pytest.raises(ValueError, match=expected):
        params_from_tensors(from_hf(SMALL), tensors)


def test_missing_tensor_is_named():
    tensors = {name: tensor for name, tensor in small_tensors().items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight missing from the checkpoint"):
        params_from_tensors(from_hf(SMALL), tensors)


def test_left_over_tensor_is_named():
    tensors = small_tensors() | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    with pytest.raises(ValueError, match=r"q_proj\.bias in the checkpoint but not in a LlamaForCausalLM with 3 layers"):
        params_from_tensors(from_hf(SMALL), tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.2.* and 4 more in the checkpoint"):
        params_from_tensors(from_hf(SMALL | {"num_hidden_layers": 2}), small_tensors())


def test_tensors_without_content_are_left_aside():
    config = from_hf(SMALL | {"tie_word_embeddings": True})
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    params = params_from_tensors(config, small_tensors() | harmless)
    assert "lm_head" not in params


def test_writing_refuses_foreign_parameters():
    params = params_from_tensors(from_hf(SMALL), small_tensors())
    with pytest.raises(ValueError, match=r"missing \[\], left over \['lm_head/kernel'\]"):
        tensors_from_params(from_hf(SMALL | {"tie_word_embeddings": True}), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"architectures=\['MambaForCausalLM'\].*supported: \['Llama"),
        ({"architectures": None}, r"architectures=None is not supported"),
        ({"model_type": "mistral"}, r"model_type='mistral' is not supported.*model_type='llama' only"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported.*hidden_act='silu' only"),
        ({"pretraining_tp": 2}, r"pretraining_tp=2 is not supported"),
        ({"sliding_window": 4096}, r"sliding_window=4096 is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"logit_scale": 2.0}, r"logit_scale=2\.0 is unknown for LlamaForCausalLM"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            r"rope_type='yarn' is not supported; supported: \['default'",
        ),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_type='default' has the settings \['factor'\]; supported: \[\]"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, r"rope_type='llama3' contradicts type='linear'"),
        ({"rope_parameters": {**LLAMA3, "beta": 1}}, r"rope_type='llama3' has the settings \['beta', 'factor'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"settings \['partial_rotary_factor'\]",
        ),
        ({"rope_theta": 10**400}, r"rope_theta=10+ must be a number above 0"),
        ({"rms_norm_eps": 10**40}, r"rms_norm_eps=10+ must be a number above 0"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, r"contradicts rope_theta and rope_scaling"),
        ({"num_key_value_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, r"head_dim=7 is odd"),
    ],
)
def test_unsupported_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(SMALL | changes)


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"\['vocab_size'\] missing"):
        from_hf({key: value for key, value in SMALL.items() if key != "vocab_size"})


def test_what_transformers_writes_is_read(tmp_path):
    torch_model(SMALL).save_pretrained(tmp_path)
    hf_config = json.loads((tmp_path / "config.json").read_text())
    assert from_hf(hf_config | {"quantization_config": {"quant_method": "gptq"}}) == from_hf(SMALL)


def test_equal_models_share_what_was_compiled():
    model, again = Model.from_hf(SMALL, "float32"), Model.from_hf(dict(SMALL), jnp.float32)
    assert model == again
    assert hash(model) == hash(again)
    assert model.apply is again.apply
    assert model.apply is not Model.from_hf(SMALL, "bfloat16").apply
    assert json.loads(model.hf_config) == SMALL


def test_depth_does_not_change_the_program():
    def lines(layers: int) -> int:
        model = Model.from_hf(SMALL | {"num_hidden_layers": layers})
        params = jax.eval_shape(model.init, jax.random.key(0))
        return len(jax.jit(model.apply).lower(params, random_tokens(97)).as_text().splitlines())

    assert lines(2) == lines(5)


def test_recipe_matches_every_parameter():
    for variant in ("gqa", "tied"):
        model = Model.from_hf(SMALL | VARIANTS[variant])
        rules = model.recipe("some config")
        paths = parameter_shapes(model.config)
        chosen = {path: next(config for rule, config in rules if re.fullmatch(rule, path)) for path in paths}
        assert {path for path, config in chosen.items() if config} == {
            path for path in paths if path.startswith("layers/") and path.endswith("kernel")
        }
        assert all(any(re.fullmatch(rule, path) for path in paths) for rule, _ in rules)


@pytest.mark.parametrize("token", [-1, 97, 2**31 - 1])
def test_a_token_outside_the_vocabulary_gives_no_number(token):
    model = Model.from_hf(SMALL)
    logits = model.apply(model.init(jax.random.key(0)), jnp.asarray([[1, token, 2], [1, 3, 2]]))
    assert np.isnan(logits[0, 1:]).all()
    assert np.isfinite(logits[1]).all()


def test_tokens_outside_the_vocabulary_are_named():
    model = Model.from_hf(SMALL)
    model.check_tokens(random_tokens(97))
    tokens = random_tokens(97)
    tokens[1, 7] = 97
    with pytest.raises(ValueError, match=r"token 97 at position \[1, 7\] is outside the vocabulary: ids are 0 to 96"):
        model.check_tokens(tokens)
    with pytest.raises(ValueError, match=r"token -1 at position \[0\]"):
        model.check_tokens(jnp.array([-1, 200]))
    with pytest.raises(ValueError, match="dtype float32"):
        model.check_tokens(np.zeros(3, np.float32))


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "  é 漢字 😀\r\n\t\x00 a,b . 'x  ", "", "<|endoftext|>"])
def test_tokenizer_of_tinylm_round_trips(text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINYLM)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 4096


def test_tinylm_gives_the_logits_of_transformers():
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINYLM, dtype=torch.float32)
    model = Model.from_hf(json.loads((TINYLM / "config.json").read_text()))
    params = params_from_tensors(model.config, tensors_of(reference))
    tokens = random_tokens(model.config.vocab_size, (1, 512))
    assert relative_error(model.apply(params, tokens), torch_logits(reference, tokens)) < 1e-4
    assert sum(file.stat().st_size for file in TINYLM.iterdir()) < 10e6


def test_tinylm_has_learned_more_than_its_training_text():
    tensors = load_file(TINYLM / "model.safetensors")
    model = Model.from_hf(json.loads((TINYLM / "config.json").read_text()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINYLM)
    text = "".join(standard_library_text("held_out"))[:40_000]
    tokens = np.array(tokenizer(text)["input_ids"][: 16 * 513]).reshape(16, 513)
    logits = model.apply(params_from_tensors(model.config, tensors), tokens[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    assert loss < 5.0  # a guess has log(4096) = 8.3
