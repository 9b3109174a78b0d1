"""LoRA adapters, added to the weights of a checkpoint as it is loaded."""

import json
import math
import re

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_families import TOKENS, reference, relative_error, tensors_of, torch_logits

import jaxquant as jq

torch = pytest.importorskip("torch")

CONFIG = {  # as PEFT 0.21 writes it, without what it leaves null
    "alpha_pattern": {},
    "base_model_name_or_path": "somewhere",
    "bias": "none",
    "corda_config": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
WIDE = "transformer.h.1.attn.c_attn"  # [in, out]
SIZES = {QUERY: (64, 64), DOWN: (96, 64), WIDE: (64, 192)}  # in, out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directories of two models."""
    found = {}
    for variant in ("llama_bias_of_mlp", "gpt2"):
        found[variant] = tmp_path_factory.mktemp(variant)
        reference(variant).save_pretrained(found[variant])
    return found


def write(directory, changes, ranks):
    """An adapter for the modules with the ranks given; returns its A and B."""
    rng, tensors = np.random.default_rng(0), {}
    for module, rank in ranks.items():
        size = SIZES[module]
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(rank, size[0])).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(size[1], rank)).astype(np.float32)
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, directory / "adapter_model.safetensors")
    return {
        module: [tensors[f"base_model.model.{module}.lora_{part}.weight"].astype(np.float64) for part in "AB"]
        for module in ranks
    }


@pytest.mark.parametrize(
    ("variant", "changes", "ranks", "scales"),
    [
        ("llama_bias_of_mlp", {}, {QUERY: 4, DOWN: 4}, {QUERY: 2.0, DOWN: 2.0}),
        (
            "llama_bias_of_mlp",
            {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {QUERY: 3, "k_proj": 1}},
            {QUERY: 4, DOWN: 2},
            {QUERY: 1.5, DOWN: 8 / math.sqrt(2)},
        ),
        ("gpt2", {"fan_in_fan_out": True, "r": 3}, {WIDE: 3}, {WIDE: 8 / 3}),
    ],
)
def test_the_change_is_added(base, tmp_path, variant, changes, ranks, scales):
    arrays = write(tmp_path / "adapter", changes, ranks)
    model, params = jq.load_pretrained(base[variant], adapter=tmp_path / "adapter")
    theirs = reference(variant)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    try:
        for module, (a, b) in arrays.items():
            change = scales[module] * b @ a
            weight = theirs.get_submodule(module).weight.data
            weight += torch.from_numpy(change.T if module == WIDE else change).float()
        want = torch_logits(theirs)
    finally:
        theirs.load_state_dict(before)
    assert relative_error(model.apply(params, TOKENS), want) < 1e-5
    assert relative_error(torch_logits(theirs), want) > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"use_dora=True might change what the adapter computes.*merge_and_unload"),
        ({"peft_type": "VERA"}, r"peft_type='VERA' is not merged; supported: \('LORA',\)"),
        ({"peft_type": None}, r"peft_type=None is not merged"),
        ({"bias": "all"}, r"bias='all' is not merged"),
        ({"init_lora_weights": "pissa_niter_16"}, r"init_lora_weights='pissa_niter_16' is not merged"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] might change"),
        ({"invented": 1}, r"invented=1 might change"),
        ({"r": 8}, r"q_proj has .* expected A \[8, in\] and B \[out, 8\]"),
        ({"r": 0}, r"r=0, lora_alpha=8 for model\.layers\.1\.self_attn\.q_proj; expected numbers"),
        ({"lora_alpha": "8"}, r"lora_alpha='8'"),
        ({"rank_pattern": {"(a+)+": 2}}, r"rank_pattern=.* is not supported; expected names of modules"),
    ],
)
def test_what_is_not_plain_lora_is_refused(base, tmp_path, changes, message):
    write(tmp_path / "adapter", changes, {QUERY: 4})
    with pytest.raises(ValueError, match=message):
        jq.load_pretrained(base["llama_bias_of_mlp"], adapter=tmp_path / "adapter")


def test_tensors_that_do_not_fit_are_named(base, tmp_path):
    write(tmp_path / "adapter", {}, {QUERY: 4})
    with pytest.raises(
        ValueError, match=re.escape("model.layers.1.self_attn.q_proj.weight of shape [64, 64], which the")
    ):
        jq.load_pretrained(base["gpt2"], adapter=tmp_path / "adapter")
    name = "base_model.model.lm_head.weight"
    save_file({name: np.zeros((2, 2), np.float32)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is no part of a linear layer's LoRA"):
        jq.load_pretrained(base["gpt2"], adapter=tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        jq.load_pretrained(base["gpt2"], adapter=tmp_path / "adapter")


def test_quantized_models_take_no_adapter(base, tmp_path):
    write(tmp_path / "adapter", {}, {QUERY: 4})
    model, params = jq.load_pretrained(base["llama_bias_of_mlp"])
    jq.save(tmp_path / "native", model, params)
    with pytest.raises(ValueError, match="an adapter is added to float checkpoints in Hugging Face's format only"):
        jq.load_pretrained(tmp_path / "native", adapter=tmp_path / "adapter")


def test_the_dtype_of_the_weights_stays(base, tmp_path):
    write(tmp_path / "adapter", {}, {DOWN: 4})
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors_of("llama_bias_of_mlp").items()}
    (tmp_path / "half").mkdir()
    save_file(tensors, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "half" / "config.json").write_text((base["llama_bias_of_mlp"] / "config.json").read_text())
    _, params = jq.load_pretrained(tmp_path / "half", adapter=tmp_path / "adapter")
    assert params["layers"]["mlp"]["down_proj"]["kernel"].dtype == np.float16
