"""GPT-2: `GPT2LMHeadModel`, with learned positions and LayerNorms; its kernels are stored as `[in, out]`."""

from jaxquant.models.family import HARMLESS, Family, TensorName, fold_pairs, layer_norm, linear

_LAYER = "transformer.h.{layer}"
_TENSORS = (
    TensorName("embed_tokens/embedding", "transformer.wte.weight", False),
    TensorName("embed_positions/embedding", "transformer.wpe.weight", False),
    *layer_norm("layers/input_layernorm", f"{_LAYER}.ln_1"),
    *linear("layers/self_attn/qkv_proj", f"{_LAYER}.attn.c_attn", transposed=False),
    *linear("layers/self_attn/o_proj", f"{_LAYER}.attn.c_proj", transposed=False),
    *layer_norm("layers/post_attention_layernorm", f"{_LAYER}.ln_2"),
    *linear("layers/mlp/up_proj", f"{_LAYER}.mlp.c_fc", transposed=False),
    *linear("layers/mlp/down_proj", f"{_LAYER}.mlp.c_proj", transposed=False),
    *layer_norm("norm", "transformer.ln_f"),
)
_SUMMARY = {f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")}

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    parts={
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "activation": "gelu_pytorch_tanh",
        "fused": True,
        "layer_norms": True,
        "gated": False,
        "position_offset": 0,
    },
    defaults={
        "intermediate_size": None,  # 4 * hidden_size
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    fixed={
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "model_type": "gpt2",
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    harmless=HARMLESS | _SUMMARY | {"attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "task_specific_params"},
    tensors=_TENSORS,
    fold_pairs=fold_pairs(proportional=False),
    prefix="transformer.",
    ignored_tensors=r".*\.attn\.(bias|masked_bias)",  # the causal mask
    spellings={
        "layer_norm_epsilon": "rms_norm_eps",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
    },
)
