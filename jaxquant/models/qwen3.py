"""Qwen3, dense: `Qwen3ForCausalLM`, which normalizes queries and keys head by head (arXiv:2505.09388)."""

from jaxquant.models.family import DEFAULTS, FIXED, Family, Key

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    parts={"qkv_bias": Key("attention_bias"), "o_bias": Key("attention_bias"), "mlp_bias": False, "qk_norm": True},
    defaults={
        **DEFAULTS,
        "attention_bias": False,
        "head_dim": 128,
        "layer_types": None,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    fixed={**FIXED, "model_type": "qwen3"},
)
