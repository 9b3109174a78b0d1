"""Phi-3, Phi-3.5 and Phi-4, dense: `Phi3ForCausalLM`, with fused projections and LongRoPE (arXiv:2404.14219)."""

from jaxquant.models.family import DEFAULTS, FIXED, Family

_FIXED = {key: value for key, value in FIXED.items() if key != "partial_rotary_factor"}

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    parts={"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "fused": True},
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "num_key_value_heads": None,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    fixed={
        **_FIXED,
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "model_type": "phi3",
    },
    rope_types=("default", "longrope", "su"),
)
