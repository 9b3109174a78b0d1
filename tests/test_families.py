"""Every family of checkpoints against transformers: what is computed, which configurations are read, and the files."""

import copy
import functools
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import jaxquant as jq
from jaxquant.checkpoints.tensors import same_bits
from jaxquant.inspection import inspect_checkpoint
from jaxquant.models.config import FAMILIES, from_hf
from jaxquant.models.model import Model
from jaxquant.models.names import parameter_shapes, params_from_tensors, tensors_from_params

torch = pytest.importorskip("torch")

VOCABULARY = 96
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24)).astype(np.int32)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
TIED = {"tie_word_embeddings": True}
MHA = {"num_key_value_heads": 4}
TWO = {"num_hidden_layers": 2, "head_dim": 24}
SOFT_CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
NO_CAPS = dict.fromkeys(SOFT_CAPS)
LINEAR = {"rope_type": "linear", "factor": 4.0}
ROPES = {"rope_theta": 1e5, "rope_local_base_freq": 100.0, "rope_scaling": LINEAR, "final_logit_softcapping": 2.0}
NEW_ROPES = {"rope_parameters": {FULL: {"rope_theta": 50.0}, SLIDING: LINEAR}, "use_bidirectional_attention": False}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # some families' own are outside the vocabulary
PHI3 = {"num_hidden_layers": 2}
FACTORS = {"long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}
LONG_ROPE = {"rope_scaling": {"type": "longrope", **FACTORS}, "partial_rotary_factor": 0.75}
LONG = {**LONG_ROPE, "original_max_position_embeddings": 20}  # of 24 tokens
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "init_std": 0.1}
VARIANTS = {  # family, changes, and the window of each layer, which is shorter than the 24 tokens
    "llama_bias_of_attention": ("llama", {"attention_bias": True, **TIED}, (None, None, None)),
    "llama_bias_of_mlp": ("llama", {"mlp_bias": True}, (None, None, None)),
    "mistral": ("mistral", {"sliding_window": 7}, (7, 7, 7)),
    "mistral_no_window": ("mistral", {"sliding_window": None, "head_dim": 32, **TIED}, (None, None, None)),
    "mistral_window_of_one": ("mistral", {"sliding_window": 1, "num_key_value_heads": 4}, (1, 1, 1)),
    "qwen2": ("qwen2", {"rope_theta": 1e6, "rms_norm_eps": 1e-3}, (None, None, None)),
    "qwen2_window": ("qwen2", {**WINDOW, "max_window_layers": 1, **TIED}, (None, 7, 7)),
    "qwen2_layer_types": ("qwen2", {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING], "head_dim": 24}, (7, None, 7)),
    "qwen3": ("qwen3", {"num_hidden_layers": 1, **TIED}, (None,)),
    "qwen3_biases_and_window": (
        "qwen3",
        {**WINDOW, "max_window_layers": 2, "head_dim": 32, "attention_bias": True, "num_key_value_heads": 1},
        (None, None, 7),
    ),
    "gemma2": ("gemma2", {**TWO, "sliding_window": 7, "query_pre_attn_scalar": 40, **SOFT_CAPS}, (7, None)),
    "gemma2_no_caps": (
        "gemma2",
        {**TWO, **MHA, **NO_CAPS, "sliding_window": 7, "layer_types": [FULL, SLIDING], "tie_word_embeddings": False},
        (None, 7),
    ),
    "gemma3": (
        "gemma3_text",
        {**TWO, **ROPES, "num_hidden_layers": 3, "sliding_window": 7, "sliding_window_pattern": 2},
        (7, None, 7),
    ),
    "gemma3_new_words": (
        "gemma3_text",
        {**TWO, **MHA, **NEW_ROPES, "sliding_window": 7, "layer_types": [FULL, SLIDING], "attention_bias": True},
        (None, 7),
    ),
    "phi3": ("phi3", {**PHI3, **MHA, "sliding_window": 7}, (7, 7)),
    "phi3_long": ("phi3", {**PHI3, **LONG}, (None, None)),
    "phi3_short": ("phi3", {**PHI3, **LONG, "original_max_position_embeddings": 24}, (None, None)),
    "mixtral": ("mixtral", {"num_hidden_layers": 2, "num_local_experts": 4, "rope_theta": 1e4}, (None, None)),
    "mixtral_window": (
        "mixtral",
        {**MHA, **TIED, "num_hidden_layers": 1, "num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 7},
        (7,),
    ),
    "qwen3_moe": ("qwen3_moe", {**TWO, **EXPERTS, "norm_topk_prob": True}, (None, None)),
    "qwen3_moe_window": (
        "qwen3_moe",
        {**TWO, **EXPERTS, **WINDOW, "num_experts_per_tok": 1, "attention_bias": True, "num_hidden_layers": 1},
        (7,),
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 24, "n_inner": 96}, (None, None)),
    "gpt2_untied": (
        "gpt2",
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False},
        (None,),
    ),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 64}, (None, None)),
    "opt_untied": ("opt", {**OPT, "max_position_embeddings": 24, "tie_word_embeddings": False}, (None, None)),
    "qwen3_layer_types": ("qwen3", {**WINDOW, "layer_types": [FULL, SLIDING, FULL], "head_dim": 24}, (None, 7, None)),
}


def hf_config_of(family: str, changes: dict) -> dict:
    changes = copy.deepcopy(changes)  # transformers writes into the objects in it
    common = {"vocab_size": VOCABULARY} if family in ("gpt2", "opt") else SMALL
    return {**common, "architectures": [ARCHITECTURES[family]], "model_type": family, **TOKEN_IDS, **changes}


def written_by_transformers(hf_config: dict) -> dict:
    """The configuration in the words of transformers 5, with its defaults for the keys that are missing."""
    return transformers.AutoConfig.for_model(**hf_config).to_dict()


def torch_model(hf_config: dict) -> "torch.nn.Module":
    """A random model; transformers' own initial values would hide errors: biases are 0 and norms 1."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = re.search(r"norm\.weight$|ln_.\.weight$", name) and "gemma" not in hf_config["model_type"]  # they add 1
        torch.nn.init.normal_(parameter, mean=float(bool(norm)), std=0.15)
    return model


@functools.cache
def reference(variant: str) -> "torch.nn.Module":
    family, changes, _ = VARIANTS[variant]
    return torch_model(hf_config_of(family, changes))


@functools.cache
def tensors_of(variant: str) -> Mapping[str, np.ndarray]:
    """The tensors of the reference as they lie in a checkpoint, which has other names than the model for experts."""
    with tempfile.TemporaryDirectory() as directory:
        reference(variant).save_pretrained(directory)
        return MappingProxyType(load_file(Path(directory) / "model.safetensors"))


def torch_logits(model: "torch.nn.Module") -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def relative_error(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# What is computed


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant):
    family, changes, _ = VARIANTS[variant]
    model = Model.from_hf(hf_config_of(family, changes))
    params = params_from_tensors(model.config, tensors_of(variant))
    assert relative_error(model.apply(params, TOKENS), torch_logits(reference(variant))) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_those_of_transformers(variant):
    family, changes, _ = VARIANTS[variant]
    config = from_hf(hf_config_of(family, changes))
    tensors = tensors_of(variant)
    params = params_from_tensors(config, tensors)
    found = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)}
    assert found == parameter_shapes(config).keys()
    written = tensors_from_params(config, params)
    assert written.keys() == tensors.keys()
    assert all(same_bits(written[name], tensors[name]) for name in tensors)


def test_biases_and_norms_have_flax_names():
    shapes = parameter_shapes(from_hf(hf_config_of("qwen2", {})))
    assert shapes["layers/self_attn/q_proj/bias"] == (3, 64)
    assert shapes["layers/self_attn/k_proj/bias"] == (3, 32)
    assert "layers/self_attn/o_proj/bias" not in shapes
    shapes = parameter_shapes(from_hf(hf_config_of("qwen3", {"head_dim": 24, "attention_bias": True})))
    assert shapes["layers/self_attn/k_norm/scale"] == (3, 24)
    assert shapes["layers/self_attn/o_proj/bias"] == (3, 64)


def test_windows_do_not_change_the_program():
    def lines(changes: dict) -> int:
        model = Model.from_hf(hf_config_of("qwen2", changes))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return len(jax.jit(model.apply).lower(params, TOKENS).as_text().splitlines())

    mixed = {**WINDOW, "num_hidden_layers": 5, "layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING]}
    assert lines({}) == lines(mixed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recipe_takes_the_linear_kernels_and_every_rule_matches(variant):
    family, changes, _ = VARIANTS[variant]
    model = Model.from_hf(hf_config_of(family, changes))
    rules, paths = model.recipe("some config"), parameter_shapes(model.config)
    first = {path: next(rule for rule in rules if re.fullmatch(rule[0], path)) for path in paths}
    taken = {path for path, (_, config) in first.items() if config}
    assert taken == {path for path in paths if path.startswith("layers/") and path.endswith("_proj/kernel")}
    assert {pattern for pattern, _ in first.values()} == {pattern for pattern, _ in rules}


# Which configurations are read


@pytest.mark.parametrize("variant", VARIANTS)
def test_old_and_new_words_mean_the_same(variant):
    family, changes, windows = VARIANTS[variant]
    hf_config = hf_config_of(family, changes)
    assert from_hf(hf_config) == from_hf(written_by_transformers(hf_config))
    assert from_hf(hf_config).windows == windows


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ARCHITECTURES),
        *((qwen, {"use_sliding_window": True}) for qwen in ("qwen2", "qwen3", "qwen3_moe")),
        ("gpt2", {"n_inner": None}),
    ],
)
def test_missing_keys_have_the_defaults_of_transformers(family, changes):
    sizes = {
        "vocab_size": 10,
        "hidden_size": 640,
        "intermediate_size": 8,
        "num_attention_heads": 32,
        "num_hidden_layers": 30,
    }
    own = {common: word for word, common in FAMILIES[ARCHITECTURES[family]].spellings.items()}
    sizes = {own.get(key, key): size for key, size in sizes.items()}
    hf_config = {"architectures": [ARCHITECTURES[family]], "model_type": family, **sizes, **changes}
    assert from_hf(hf_config) == from_hf(written_by_transformers(hf_config))


def test_the_table_has_every_family():
    assert set(ARCHITECTURES.values()) == FAMILIES.keys()
    assert {family for family, _, _ in VARIANTS.values()} == ARCHITECTURES.keys()


MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PHI3_MINI_4K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}
PUBLISHED = {  # config.json as on the hub, and the number of parameters of the model
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "Mistral-7B-v0.3": (
        {
            **MISTRAL_7B,
            "attention_dropout": 0.0,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "transformers_version": "4.42.0.dev0",
            "vocab_size": 32768,
        },
        7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        {
            **QWEN2_5_7B,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen2.5-7B": (QWEN2_5_7B, 7_615_616_512),
    "Qwen3-0.6B": (QWEN3_0_6B, 596_049_920),
    "gemma-2-2b": (GEMMA2_2B, 2_614_341_888),
    "gemma-3-1b-it": (GEMMA3_1B, 999_885_952),
    "Phi-3-mini-4k-instruct": (PHI3_MINI_4K, 3_821_079_552),
    "Phi-4-mini-instruct": (
        {
            **PHI3_MINI_4K,
            "eos_token_id": 199999,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        3_836_021_760,
    ),
    "Mixtral-8x7B-v0.1": (
        {
            **MISTRAL_7B,
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        {
            **QWEN3_0_6B,
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "opt-125m": (
        {
            "_remove_final_layer_norm": False,
            "activation_dropout": 0.0,
            "activation_function": "relu",
            "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "do_layer_norm_before": True,
            "dropout": 0.1,
            "eos_token_id": 2,
            "ffn_dim": 3072,
            "hidden_size": 768,
            "init_std": 0.02,
            "layerdrop": 0.0,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 1,
            "prefix": "</s>",
            "torch_dtype": "float16",
            "transformers_version": "4.21.0.dev0",
            "use_cache": True,
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
        125_239_296,
    ),
}


WINDOWS = {
    "Mistral-7B-v0.1": {4096},
    "gemma-2-2b": {4096, None},
    "gemma-3-1b-it": {512, None},
    "Phi-3-mini-4k-instruct": {2047},
    "Phi-4-mini-instruct": {262144},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    hf_config, parameters = PUBLISHED[name]
    config = from_hf(hf_config)
    assert config == from_hf(written_by_transformers(hf_config))
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == parameters
    assert set(config.windows) == WINDOWS.get(name, {None})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"model_type": "llama"}, r"model_type='llama' is not supported; MistralForCausalLM is computed"),
        ("mistral", {"attention_bias": True}, r"attention_bias=True is not supported.*attention_bias=False only"),
        ("mistral", {"layer_types": [FULL] * 3}, r"layer_types=\[.*\] is unknown for MistralForCausalLM"),
        ("mistral", {"sliding_window": 0}, r"sliding_window=0 must be a whole number from 1"),
        ("qwen2", {"use_mrope": True}, r"use_mrope=True is not supported; Qwen2ForCausalLM is computed with use_mrope"),
        ("qwen2", {"attention_bias": True}, r"attention_bias=True is unknown for Qwen2ForCausalLM"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_type='yarn' is not supported; supported"),
        ("qwen2", {"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported"),
        ("qwen2", {"layer_types": [SLIDING] * 3}, r"but there is no window; needed are use_sliding_window=True and a"),
        ("qwen3", {"layer_types": [FULL] * 2}, r"layer_types=\['full_.*a list of num_hidden_layers=3 entries that are"),
        ("qwen3", {"layer_types": [FULL, FULL, "conv"]}, r"'conv'\] is not supported; .*'full_attention' or 'sliding_"),
        ("qwen3", {"layer_types": FULL}, r"layer_types='full_attention' is not supported"),
        ("qwen3", {"mlp_bias": True}, r"mlp_bias=True is unknown for Qwen3ForCausalLM"),
        ("qwen3", {"num_experts": 8}, r"num_experts=8 is unknown for Qwen3ForCausalLM"),
        (
            "gemma2",
            {"hidden_activation": "gelu"},
            r"hidden_activation='gelu' is not supported.*'gelu_pytorch_tanh' only",
        ),
        ("gemma2", {"attn_logit_softcapping": 0.0}, r"attn_logit_softcapping=0\.0 must be a number above 0"),
        ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
        ("gemma2", {"sliding_window": None}, r"but there is no window"),
        ("gemma2", {"sliding_window_pattern": 3}, r"sliding_window_pattern=3 is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0 is not supported"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, r"must be an object with full_attention and slid"),
        ("gemma3_text", {**NEW_ROPES, "rope_theta": 70.0}, r"rope_parameters\.full_attention=.* contradicts"),
        ("gemma3_text", {"model_type": "gemma3"}, r"model_type='gemma3' is not supported"),
        ("phi3", {**LONG, "head_dim": 24}, r"long_factor=\[.* must be a list of 9 numbers|short_factor=.*9 numbers"),
        (
            "phi3",
            {"rope_scaling": LINEAR},
            r"rope_type='linear' is not supported; supported: \['default', 'longrope', 'su",
        ),
        ("phi3", {"rope_scaling": {"type": "su"}}, r"rope_type='su' has the settings \[\]; supported: \['attention_f"),
        ("phi3", {**LONG, "original_max_position_embeddings": 1}, r"=1 must be more than one position"),
        ("phi3", {"partial_rotary_factor": 1.5}, r"partial_rotary_factor=1\.5 must be a number above 0, up to 1"),
        ("phi3", {"partial_rotary_factor": 0.01}, r"head_dim=0 is nothing"),
        ("phi3", {"embd_layer": "mixed"}, r"embd_layer='mixed' is unknown for Phi3ForCausalLM"),
        ("mixtral", {"num_experts_per_tok": 9}, r"experts_per_token=9, but there are only num_experts=8"),
        ("mixtral", {"num_experts": 4, "num_local_experts": 8}, r"num_local_experts=8 contradicts num_local_experts=4"),
        ("mixtral", {"num_local_experts": 0}, r"num_local_experts=0 must be a whole number from 1"),
        ("mixtral", {"num_local_experts": 2**30}, r"num_local_experts=1073741824 must be .* to 10000"),
        (
            "mixtral",
            {"num_local_experts": 1000, "num_hidden_layers": 10**4},
            r"num_layers=10000 with num_experts=1000 each",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, r"shared_expert_intermediate_size=8 is unknown"),
        ("gpt2", {}, r"\['n_embd', 'n_head', 'n_layer'\] missing; GPT2LMHeadModel needs"),
        ("gpt2", {"hidden_size": 64}, r"hidden_size=64 is unknown for GPT2LMHeadModel; it says n_embd"),
        ("gpt2", {"n_embd": 0, "n_head": 1, "n_layer": 1}, r"n_embd=0 must be a whole number"),
        (
            "gpt2",
            {"n_embd": 8, "n_head": 1, "n_layer": 1, "scale_attn_weights": False},
            r"scale_attn_weights=False is not",
        ),
        ("gpt2", {"n_embd": 8, "n_head": 1, "n_layer": 1, "rope_theta": 1e4}, r"rope_theta=10000\.0 is unknown"),
        ("opt", {**OPT, "do_layer_norm_before": False}, r"do_layer_norm_before=False is not supported"),
        ("opt", {**OPT, "word_embed_proj_dim": 32}, r"word_embed_proj_dim=32 is not supported.*hidden_size only, 64"),
        ("opt", {**OPT, "ffn_dim": None}, r"\['ffn_dim'\] missing"),
        ("qwen3", {"architectures": ["BertModel"]}, r"supported: \['Llama.*'Mistral.*'Qwen2.*'Qwen3"),
    ],
)
def test_unsupported_configurations_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(hf_config_of(family, changes))


def test_a_bias_that_the_configuration_does_not_have_is_named():
    variant = "qwen3_biases_and_window"
    without = from_hf(hf_config_of("qwen3", VARIANTS[variant][1] | {"attention_bias": False}))
    with pytest.raises(ValueError, match=r"k_proj\.bias, .* and 7 more in the checkpoint but not in a Qwen3ForCausal"):
        params_from_tensors(without, tensors_of(variant))


# Parts of a model, and checkpoints that differ from the usual


@pytest.mark.parametrize("variant", ["gemma3", "mixtral", "opt"])
def test_a_model_in_pieces_computes_the_same(variant):
    family, changes, _ = VARIANTS[variant]
    model = Model.from_hf(hf_config_of(family, changes))
    params, blocks = params_from_tensors(model.config, tensors_of(variant)), model.blocks
    last = model.config.num_layers - 1
    layers = jax.tree.map(lambda a: a[:last], params["layers"])
    embeddings = {name: value for name, value in params.items() if name.startswith("embed")}
    x = blocks.apply({"layers": layers, "windows": blocks.windows[:last]}, blocks.embed(embeddings, TOKENS))
    with torch.no_grad():
        states = reference(variant)(torch.from_numpy(TOKENS).long(), output_hidden_states=True).hidden_states
    assert relative_error(x, states[last].numpy()) < 1e-5


def test_a_sequence_longer_than_the_learned_positions_is_refused():
    family, changes, _ = VARIANTS["gpt2"]
    model = Model.from_hf(hf_config_of(family, changes))
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="tokens: 25 in a sequence, but the model has learned 24 positions"):
        jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((1, 25), np.int32))


def test_gpt2_is_read_as_the_hub_has_it(tmp_path):
    """Saved without its head, so that names lack their first part, and with masks."""
    reference("gpt2").transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors | {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.bool_)}, tmp_path / "model.safetensors")
    hf_config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf_config | {"architectures": ["GPT2LMHeadModel"]}))
    model, params = jq.load_pretrained(tmp_path)
    assert relative_error(model.apply(params, TOKENS), torch_logits(reference("gpt2"))) < 1e-5
    inspected = inspect_checkpoint(tmp_path)
    assert inspected.left_aside_nbytes == 24 * 24
    assert all(leaf.stored_nbytes == leaf.nbytes for leaf in inspected.leaves)


def test_experts_without_tokens_are_rounded_and_reported():
    """Two tokens beside padding, of which each chooses one of four experts."""
    variant = "qwen3_moe_window"
    family, changes, _ = VARIANTS[variant]
    model = Model.from_hf(hf_config_of(family, changes))
    params = params_from_tensors(model.config, tensors_of(variant))
    rules = [("layers/mlp/experts/(up|gate)_proj/kernel", jq.GPTQ(jq.int4(group_size=32)))]
    mask = lambda tokens: np.arange(5)[None] < 2  # noqa: E731
    stats = jq.calibrate(model.apply, params, [TOKENS[:1, :5]], recipe=rules, mask=mask)
    assert stats.notes == ()
    products = {path.split("/")[3]: product.inputs for path, product in stats.products.items()}
    assert products["up_proj"] is products["gate_proj"]
    assert products["up_proj"].gram.shape == (1, 4, 64, 64)
    assert 0 < products["up_proj"].count.sum() <= 2  # one may be held out
    qparams, report = jq.quantize_params(params, stats, rules)
    unseen = [layer for layer in report.fallbacks if layer.tokens == 0]
    assert len(unseen) in (4, 6)  # two or three experts
    assert {layer.fallback for layer in unseen} == {"no calibration tokens"}
    for layer in unseen:
        name = layer.path.split("/")[3]
        kernel = params["layers"]["mlp"]["experts"][name]["kernel"][layer.index]
        q = qparams["layers"]["mlp"]["experts"][name]["kernel"]
        np.testing.assert_array_equal(q.codes[layer.index], jq.quantize(kernel, jq.int4(group_size=32)).codes)


# From the checkpoint through calibration and quantization to the files


QUANTIZED = ["mistral", "qwen2_layer_types", "qwen3_biases_and_window", "gemma3", "phi3_long", "mixtral"]
QUANTIZED += ["gpt2", "opt"]


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request, tmp_path_factory):
    """A checkpoint of transformers, loaded, and rounded to 4 bits by the model's own recipe."""
    source = tmp_path_factory.mktemp(request.param)
    reference(request.param).save_pretrained(source)
    model, params = jq.load_pretrained(source)
    qparams, _ = jq.quantize_params(params, None, model.recipe(jq.RTN(jq.int4(group_size=32))))
    return SimpleNamespace(model=model, params=params, qparams=qparams)


def test_the_linear_layers_are_quantized_and_nothing_else(quantized):
    flat, _ = jax.tree.flatten_with_path(quantized.qparams, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    for path, leaf in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert isinstance(leaf, jq.QTensor) == bool(re.fullmatch(r"layers/.*_proj/kernel", name)), name


@pytest.mark.parametrize("format", ["jaxquant", "compressed-tensors"])
def test_what_is_saved_is_loaded_bit_for_bit(quantized, tmp_path, format):
    if format == "compressed-tensors" and quantized.model.config.architecture == "GPT2LMHeadModel":
        with pytest.raises(
            ValueError, match=r"c_attn\.weight: it is quantized but no Linear or Embedding of the model"
        ):
            jq.save(tmp_path / "out", quantized.model, quantized.qparams, format=format)
        return
    jq.save(tmp_path / "out", quantized.model, quantized.qparams, format=format)
    model, params = jq.load_pretrained(tmp_path / "out")
    assert model.config == quantized.model.config
    assert jax.tree.structure(params) == jax.tree.structure(quantized.qparams)
    assert all(map(same_bits, jax.tree.leaves(params), jax.tree.leaves(quantized.qparams)))
    ours = np.asarray(quantized.model.apply(quantized.qparams, TOKENS))
    np.testing.assert_array_equal(model.apply(params, TOKENS), ours)
    if format == "compressed-tensors":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert relative_error(ours, torch_logits(theirs)) < 1e-5


@pytest.mark.parametrize("quantized", ["mistral", "gemma3", "opt"], indirect=True)
def test_what_is_saved_predicts_as_the_float_model_does(quantized, tmp_path):
    """The reloaded model is far nearer to the float one than 2 bits, or no linear layers at all, would be."""
    jq.save(tmp_path / "out", quantized.model, quantized.qparams, format="compressed-tensors")
    model, params = jq.load_pretrained(tmp_path / "out")
    two_bits, _ = jq.quantize_params(quantized.params, None, model.recipe(jq.RTN(jq.QuantSpec(bits=2))))
    nothing = jax.tree.map_with_path(lambda k, a: a * 0 if "_proj" in str(k) else a, quantized.params)
    kl = [
        jq.compare(model.apply, tree, quantized.params, TOKENS.ravel(), context=24, batch_size=2).kl.mean
        for tree in (params, two_bits, nothing)
    ]
    assert 0 < kl[0] < min(kl[1:]) / 8
