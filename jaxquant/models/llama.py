"""Llama 1 to 3 and what shares their architecture: `LlamaForCausalLM` in Hugging Face's config.json."""

from jaxquant.models.family import DEFAULTS, FIXED, Family, Key

LLAMA = Family(
    architecture="LlamaForCausalLM",
    parts={
        "qkv_bias": Key("attention_bias"),
        "o_bias": Key("attention_bias"),
        "mlp_bias": Key("mlp_bias"),
        "qk_norm": False,
    },
    defaults={
        **DEFAULTS,
        "attention_bias": False,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_key_value_heads": None,
    },
    fixed={**FIXED, "model_type": "llama", "pretraining_tp": 1, "sliding_window": None},
)
