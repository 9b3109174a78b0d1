"""What sets one family of checkpoints apart: names and constants, never code.

All families are the same decoder with parts switched on or off, and transformers gives a part the same name in each of
them. So there is one list of names, and the few keys of config.json that all of them understand are here too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxquant.transforms.fold import FoldPair


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Where a parameter of the decoder lies in a Hugging Face checkpoint.

    `path` is the parameter's path ("layers/mlp/up_proj/kernel"), `name` the tensor's, with `{layer}` where the
    checkpoint has one tensor per layer. `transposed` marks kernels: `[in, out]` in Flax, `[out, in]` in the checkpoint.
    """

    path: str
    name: str
    transposed: bool

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{layer}" in self.name


def _linear(module: str) -> tuple[TensorName, TensorName]:
    path, name = f"layers/{module.replace('.', '/')}", f"model.layers.{{layer}}.{module}"
    return TensorName(f"{path}/kernel", f"{name}.weight", True), TensorName(f"{path}/bias", f"{name}.bias", False)


def _norm(module: str) -> TensorName:
    return TensorName(f"layers/{module.replace('.', '/')}/scale", f"model.layers.{{layer}}.{module}.weight", False)


_TENSORS = (
    TensorName("embed_tokens/embedding", "model.embed_tokens.weight", False),
    _norm("input_layernorm"),
    *_linear("self_attn.q_proj"),
    *_linear("self_attn.k_proj"),
    *_linear("self_attn.v_proj"),
    *_linear("self_attn.qkv_proj"),
    *_linear("self_attn.o_proj"),
    _norm("self_attn.q_norm"),
    _norm("self_attn.k_norm"),
    _norm("post_attention_layernorm"),
    _norm("pre_feedforward_layernorm"),
    _norm("post_feedforward_layernorm"),
    *_linear("mlp.gate_proj"),
    *_linear("mlp.up_proj"),
    *_linear("mlp.gate_up_proj"),
    *_linear("mlp.down_proj"),
    TensorName("norm/scale", "model.norm.weight", False),
)

VALUES = FoldPair(  # the last outputs of a fused projection are the values
    tuple(f"layers/self_attn/{name}_proj/{leaf}" for name in ("v", "qkv") for leaf in ("kernel", "bias")),
    ("layers/self_attn/o_proj/kernel",),
)


def fold_pairs(mlp_norm: str = "post_attention_layernorm", norm_offset: float = 0.0) -> tuple[FoldPair, ...]:
    """What makes the inputs of the linear layers, where `mlp_norm` is the norm before the feed-forward network."""
    return (
        FoldPair(
            ("layers/input_layernorm/scale",),
            tuple(f"layers/self_attn/{name}_proj/kernel" for name in ("q", "k", "v", "qkv")),
            norm_offset,
        ),
        VALUES,
        FoldPair(
            (f"layers/{mlp_norm}/scale",),
            tuple(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "gate_up")),
            norm_offset,
        ),
        FoldPair(
            tuple(f"layers/mlp/{name}_proj/{leaf}" for name in ("up", "gate_up") for leaf in ("kernel", "bias")),
            ("layers/mlp/down_proj/kernel",),
        ),
    )


# The keys of every family, to be united with its own.
DEFAULTS: Mapping[str, Any] = {
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
FIXED: Mapping[str, Any] = {"hidden_act": "silu", "is_encoder_decoder": False, "partial_rotary_factor": 1.0}
_HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "_sliding_window_pattern",  # `layer_types` stands beside it
        "architectures",
        "attention_dropout",  # training only
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "quantization_config",  # says how the tensors are stored, which `checkpoints` reads
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Key(NamedTuple):
    """A key of config.json."""

    name: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      architecture: its name in config.json.
      parts: what `DecoderConfig` has by field: a value where the architecture settles it, else the key that does.
      defaults: the optional configuration keys, with the value that transformers takes where one is missing. A family
        has windows if `sliding_window` is among them.
      fixed: the configuration keys that would change the mathematics, with the one value that this decoder computes.
      harmless: the configuration keys that do not matter to it.
      tensors: every parameter that the decoder can have, but the output head. A model has those that its configuration
        switches on.
      head: the output head of models that do not tie it to the embedding.
      fold_pairs: what makes the inputs of linear layers, for `jaxquant.fold`.
      rope_types: the values of `rope_type` that it may have.
      ignored_tensors: a regular expression for the names of tensors that hold nothing that is learned.
    """

    architecture: str
    parts: Mapping[str, Any]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    harmless: frozenset[str] = _HARMLESS
    tensors: tuple[TensorName, ...] = _TENSORS
    head: TensorName = TensorName("lm_head/kernel", "lm_head.weight", True)
    fold_pairs: tuple[FoldPair, ...] = fold_pairs()
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    ignored_tensors: str = r".*rotary_emb\.inv_freq"
