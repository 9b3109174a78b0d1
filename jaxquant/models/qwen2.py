"""Qwen2 and Qwen2.5, dense: `Qwen2ForCausalLM`, with biases on queries, keys and values (arXiv:2407.10671)."""

from jaxquant.models.family import DEFAULTS, FIXED, Family

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    parts={"qkv_bias": True, "o_bias": False, "mlp_bias": False, "qk_norm": False},
    defaults={
        **DEFAULTS,
        "layer_types": None,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    fixed={**FIXED, "model_type": "qwen2", "use_mrope": False},
)
