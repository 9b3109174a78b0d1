"""Llama 1 to 3 and what shares their architecture: `LlamaForCausalLM` in Hugging Face's config.json."""

from jaxquant.models.family import Family, TensorName


def _kernel(module: str) -> TensorName:
    return TensorName(f"layers/{module.replace('.', '/')}/kernel", f"model.layers.{{layer}}.{module}.weight", True)


def _norm(module: str) -> TensorName:
    return TensorName(f"layers/{module}/scale", f"model.layers.{{layer}}.{module}.weight", False)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    tensors=(
        TensorName("embed_tokens/embedding", "model.embed_tokens.weight", False),
        _norm("input_layernorm"),
        _kernel("self_attn.q_proj"),
        _kernel("self_attn.k_proj"),
        _kernel("self_attn.v_proj"),
        _kernel("self_attn.o_proj"),
        _norm("post_attention_layernorm"),
        _kernel("mlp.gate_proj"),
        _kernel("mlp.up_proj"),
        _kernel("mlp.down_proj"),
        TensorName("norm/scale", "model.norm.weight", False),
    ),
    head=TensorName("lm_head/kernel", "lm_head.weight", True),
    ignored_tensors=r".*rotary_emb\.inv_freq",
    fixed={
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
        "is_encoder_decoder": False,
    },
    harmless=frozenset(
        {
            "_attn_implementation_autoset",
            "_name_or_path",
            "architectures",
            "attention_dropout",  # training only
            "bos_token_id",
            "chunk_size_feed_forward",
            "dtype",
            "eos_token_id",
            "id2label",
            "initializer_range",
            "label2id",
            "output_attentions",
            "output_hidden_states",
            "pad_token_id",
            "problem_type",
            "quantization_config",  # says how the tensors are stored, which `checkpoints` reads
            "return_dict",
            "torch_dtype",
            "transformers_version",
            "use_cache",
        }
    ),
)
