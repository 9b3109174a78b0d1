"""What sets one family of checkpoints apart: names and constants, never code.

All families are the same decoder with parts switched on or off, and transformers gives a part the same name in most of
them. So there is one list of names, and the few keys of config.json that most of them understand are here too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxquant.transforms.fold import FoldPair


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Where a parameter of the decoder lies in a Hugging Face checkpoint.

    `path` is the parameter's path ("layers/mlp/up_proj/kernel"), `name` the tensor's, with `{layer}` where the
    checkpoint has one tensor per layer, and `{expert}` where it has one per expert. `transposed` marks kernels:
    `[in, out]` in Flax, `[out, in]` in the checkpoint.
    """

    path: str
    name: str
    transposed: bool

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{layer}" in self.name

    @property
    def of_experts(self) -> bool:
        """Whether the parameter has an axis of experts, behind that of layers."""
        return "{expert}" in self.name


def linear(path: str, name: str, transposed: bool = True) -> tuple[TensorName, TensorName]:
    """The kernel and the bias of a linear layer."""
    return TensorName(f"{path}/kernel", f"{name}.weight", transposed), TensorName(f"{path}/bias", f"{name}.bias", False)


def layer_norm(path: str, name: str) -> tuple[TensorName, TensorName]:
    """The scale and the bias of a LayerNorm."""
    return TensorName(f"{path}/scale", f"{name}.weight", False), TensorName(f"{path}/bias", f"{name}.bias", False)


def _linear(module: str) -> tuple[TensorName, TensorName]:
    return linear(f"layers/{module.replace('.', '/')}", f"model.layers.{{layer}}.{module}")


def _norm(module: str) -> TensorName:
    return TensorName(f"layers/{module.replace('.', '/')}/scale", f"model.layers.{{layer}}.{module}.weight", False)


def experts(module: str, names: Mapping[str, str]) -> tuple[TensorName, ...]:
    """The router and the experts of a mixture; `names` are those of an expert's projections."""
    name = f"model.layers.{{layer}}.{module}"
    return (
        TensorName("layers/mlp/gate/kernel", f"{name}.gate.weight", True),
        *(
            TensorName(f"layers/mlp/experts/{part}/kernel", f"{name}.experts.{{expert}}.{own}.weight", True)
            for part, own in names.items()
        ),
    )


TENSORS = (
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

_AFTER_NORM = "gate_proj", "up_proj", "gate_up_proj", "gate", "experts/gate_proj", "experts/up_proj"
_INNER = (
    FoldPair(
        tuple(f"layers/mlp/{name}_proj/{leaf}" for name in ("up", "gate_up") for leaf in ("kernel", "bias")),
        ("layers/mlp/down_proj/kernel",),
    ),
    FoldPair(("layers/mlp/experts/up_proj/kernel",), ("layers/mlp/experts/down_proj/kernel",)),
)
VALUES = FoldPair(  # the last outputs of a fused projection are the values
    tuple(f"layers/self_attn/{name}_proj/{leaf}" for name in ("v", "qkv") for leaf in ("kernel", "bias")),
    ("layers/self_attn/o_proj/kernel",),
)


def fold_pairs(
    mlp_norm: str = "post_attention_layernorm", norm_offset: float = 0.0, proportional: bool = True
) -> tuple[FoldPair, ...]:
    """What makes the inputs of the linear layers.

    `mlp_norm` is the norm before the feed-forward network. What that network's last product reads is `proportional` to
    the outputs of another one if it is gated, or its activation is a ReLU.
    """
    return (
        FoldPair(
            ("layers/input_layernorm/scale", "layers/input_layernorm/bias"),
            tuple(f"layers/self_attn/{name}_proj/kernel" for name in ("q", "k", "v", "qkv")),
            norm_offset,
        ),
        VALUES,
        FoldPair(
            (f"layers/{mlp_norm}/scale", f"layers/{mlp_norm}/bias"),
            tuple(f"layers/mlp/{name}/kernel" for name in _AFTER_NORM),
            norm_offset,
        ),
        *(_INNER if proportional else ()),
    )


# The keys of every family, to be united with its own.
DEFAULTS: Mapping[str, Any] = {
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
FIXED: Mapping[str, Any] = {"hidden_act": "silu", "is_encoder_decoder": False, "partial_rotary_factor": 1.0}
HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "_sliding_window_pattern",  # `layer_types` stands beside it
        "architectures",
        "attention_dropout",  # of no concern: it acts in training only
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
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "quantization_config",  # says how the tensors are stored, which `checkpoints` reads
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
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
      prefix: what the names of all tensors but the output head's begin with, unless a checkpoint leaves it out.
      spellings: configuration keys that other families call otherwise, with what those call them; where transformers
        has two words for a key, both.
      same: configuration keys that must be null, or equal to another key.
      ignored_tensors: a regular expression for the names of tensors that hold nothing that is learned.
    """

    architecture: str
    parts: Mapping[str, Any]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    harmless: frozenset[str] = HARMLESS
    tensors: tuple[TensorName, ...] = TENSORS
    head: TensorName = TensorName("lm_head/kernel", "lm_head.weight", True)
    fold_pairs: tuple[FoldPair, ...] = fold_pairs()
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    prefix: str = "model."
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored_tensors: str = r".*rotary_emb\.inv_freq"
