"""Mistral 7B and Nemo: `MistralForCausalLM`, Llama with one sliding window for all layers (arXiv:2310.06825)."""

from jaxquant.models.family import DEFAULTS, FIXED, Family

MISTRAL = Family(
    architecture="MistralForCausalLM",
    parts={"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False},
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,  # of a missing key; null, as in v0.2 and later, is no window
    },
    fixed={**FIXED, "attention_bias": False, "mlp_bias": False, "model_type": "mistral"},
)
