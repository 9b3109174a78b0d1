"""Mixtures of experts: `MixtralForCausalLM` (arXiv:2401.04088) and `Qwen3MoeForCausalLM` (arXiv:2505.09388)."""

from jaxquant.models.family import DEFAULTS, FIXED, HARMLESS, TENSORS, Family, Key, experts

_PARTS = {
    "mlp_bias": False,
    "num_experts": Key("num_local_experts"),
    "experts_per_token": Key("num_experts_per_tok"),
}
_SPELLINGS = {"num_experts": "num_local_experts", "num_local_experts": "num_local_experts"}

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    parts={**_PARTS, "qkv_bias": False, "o_bias": False, "qk_norm": False},
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    fixed={**FIXED, "model_type": "mixtral"},
    tensors=TENSORS + experts("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    spellings=_SPELLINGS,
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    parts={
        **_PARTS,
        "intermediate_size": Key("moe_intermediate_size"),
        "normalize_routing": Key("norm_topk_prob"),
        "qkv_bias": Key("attention_bias"),
        "o_bias": Key("attention_bias"),
        "qk_norm": True,
    },
    defaults={
        **DEFAULTS,
        "attention_bias": False,
        "intermediate_size": 6144,  # of layers without experts, which are not supported
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    fixed={**FIXED, "decoder_sparse_step": 1, "mlp_only_layers": [], "model_type": "qwen3_moe"},
    harmless=HARMLESS | {"max_window_layers"},
    tensors=TENSORS + experts("mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}),
    spellings=_SPELLINGS,
)
