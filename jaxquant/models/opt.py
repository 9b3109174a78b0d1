"""OPT (arXiv:2205.01068): `OPTForCausalLM`, with learned positions, LayerNorms and ReLU; all sizes but 350M."""

from jaxquant.models.family import HARMLESS, Family, TensorName, layer_norm, linear

_DECODER = "model.decoder"
_LAYER = f"{_DECODER}.layers.{{layer}}"
_TENSORS = (
    TensorName("embed_tokens/embedding", f"{_DECODER}.embed_tokens.weight", False),
    TensorName("embed_positions/embedding", f"{_DECODER}.embed_positions.weight", False),
    *layer_norm("layers/input_layernorm", f"{_LAYER}.self_attn_layer_norm"),
    *linear("layers/self_attn/q_proj", f"{_LAYER}.self_attn.q_proj"),
    *linear("layers/self_attn/k_proj", f"{_LAYER}.self_attn.k_proj"),
    *linear("layers/self_attn/v_proj", f"{_LAYER}.self_attn.v_proj"),
    *linear("layers/self_attn/o_proj", f"{_LAYER}.self_attn.out_proj"),
    *layer_norm("layers/post_attention_layernorm", f"{_LAYER}.final_layer_norm"),
    *linear("layers/mlp/up_proj", f"{_LAYER}.fc1"),
    *linear("layers/mlp/down_proj", f"{_LAYER}.fc2"),
    *layer_norm("norm", f"{_DECODER}.final_layer_norm"),
)

OPT = Family(
    architecture="OPTForCausalLM",
    parts={
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "norm_eps": 1e-5,
        "activation": "relu",
        "layer_norms": True,
        "gated": False,
        "position_offset": 2,
    },
    defaults={"max_position_embeddings": 2048, "tie_word_embeddings": True},
    fixed={
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "is_encoder_decoder": False,
        "layer_norm_elementwise_affine": True,
        "model_type": "opt",
    },
    harmless=HARMLESS | {"activation_dropout", "dropout", "init_std", "layerdrop", "prefix"},
    tensors=_TENSORS,
    spellings={"ffn_dim": "intermediate_size"},
    same={"word_embed_proj_dim": "hidden_size"},
)
