"""Gemma 2 (`Gemma2ForCausalLM`, arXiv:2408.00118) and 3, text only (`Gemma3ForCausalLM`, arXiv:2503.19786).

Norms multiply with 1 + scale, and stand before and behind attention and feed-forward network; layers with and without a
window take turns. Gemma 2 caps logits and scores of attention; Gemma 3 normalizes queries and keys instead, and rotates
them differently in layers with a window.
"""

from jaxquant.models.family import DEFAULTS, FIXED, Family, Key, fold_pairs

_PARTS = {
    "qkv_bias": Key("attention_bias"),
    "o_bias": Key("attention_bias"),
    "mlp_bias": False,
    "activation": "gelu_pytorch_tanh",
    "norm_offset": 1.0,
    "post_norms": True,
    "embedding_scaled": True,
    "attention_scalar": Key("query_pre_attn_scalar"),
    "logit_cap": Key("final_logit_softcapping"),
}
_DEFAULTS = {
    **DEFAULTS,
    "attention_bias": False,
    "head_dim": 256,
    "layer_types": None,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_FIXED = {
    **FIXED,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
}
_FOLD_PAIRS = fold_pairs("pre_feedforward_layernorm", norm_offset=1.0)

GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    parts={**_PARTS, "qk_norm": False, "attention_cap": Key("attn_logit_softcapping")},
    defaults={
        **_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    },
    fixed={**_FIXED, "model_type": "gemma2", "sliding_window_pattern": 2},
    fold_pairs=_FOLD_PAIRS,
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    parts={**_PARTS, "qk_norm": True},
    defaults={
        **_DEFAULTS,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "sliding_window_pattern": 6,
    },
    fixed={**_FIXED, "attn_logit_softcapping": None, "model_type": "gemma3_text"},
    fold_pairs=_FOLD_PAIRS,
)
