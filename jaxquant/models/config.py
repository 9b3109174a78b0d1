"""What a decoder computes, as one frozen value, and how it is read from a Hugging Face config.json.

A key that is neither understood nor known to be harmless is an error: a model that is almost the right one would be
measured, quantized and written without anybody noticing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxquant.models.family import Family, Key
from jaxquant.models.gemma import GEMMA2, GEMMA3
from jaxquant.models.llama import LLAMA
from jaxquant.models.mistral import MISTRAL
from jaxquant.models.phi3 import PHI3
from jaxquant.models.qwen2 import QWEN2
from jaxquant.models.qwen3 import QWEN3
from jaxquant.models.rope import Rope
from jaxquant.models.rope_config import FULL, ROPE_KEYS, SLIDING, read_ropes
from jaxquant.models.values import check_values

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder; hashable, so it can be a static argument and a cache key.

    `qkv_bias`, `o_bias` and `mlp_bias` say which linear layers have a bias, `qk_norm` whether queries and keys are
    normalized. `windows` has an entry per layer: how many positions one sees, itself included, or None for all.
    `rope` says how heads are rotated, `local_rope` how in layers with a window, if that is different there.
    `architecture` names the family, which says what its tensors are called.

    Fields with a default are parts that not all families have. `fused` is one product for queries, keys and values, and
    one for the gate and what it multiplies. `norm_offset` is what norms add to their scale, `post_norms` puts one
    behind attention and feed-forward network too. `embedding_scaled` multiplies embeddings with the root of
    `hidden_size`. Scores of attention are divided by the root of `attention_scalar`, None for `head_dim`. What is
    capped at c is c · tanh(x / c).

    Raises ValueError when the numbers do not fit together: `num_kv_heads` must divide `num_heads`, and a window see at
    least its own position.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    local_rope: Rope | None
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    architecture: str
    activation: str = "silu"
    fused: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scaled: bool = False
    attention_scalar: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows}: a window of less than one position sees nothing")


# Hugging Face's keys that hold a field's value.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_OPTIONAL = {
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}


def from_hf(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face config.json (as a dict) describes.

    Reads the architectures of `FAMILIES`, in the words of transformers 4 (`rope_theta`, `rope_scaling`,
    `max_window_layers`) or 5 (`rope_parameters`, `layer_types`); a missing key has the value that transformers takes
    for it. Raises ValueError for another architecture, for a missing key without such a value, and for any key whose
    value this decoder does not compute or whose meaning it does not know.
    """
    family = _family(hf_config)
    _refuse_unsupported(hf_config, family)
    settings = {**family.fixed, **family.defaults, **hf_config}
    check_values(settings)
    fields = {field: settings[key] for key, field in (_REQUIRED | _OPTIONAL).items()}
    parts = {field: settings[part.name] if isinstance(part, Key) else part for field, part in family.parts.items()}
    heads = fields["num_heads"]
    head_dim = _unless_null(settings["head_dim"], fields["hidden_size"] // heads)
    rope, local_rope = read_ropes(hf_config, family.defaults, family.rope_types, head_dim)
    return DecoderConfig(
        **fields,
        **parts,
        num_kv_heads=_unless_null(settings["num_key_value_heads"], heads),
        head_dim=head_dim,
        rope=rope,
        local_rope=local_rope,
        windows=_windows(settings),
        architecture=family.architecture,
    )


def _unless_null(value, default):
    return default if value is None else value


def _family(hf_config: Mapping[str, Any]) -> Family:
    architectures = hf_config.get("architectures")
    if architectures not in [[name] for name in FAMILIES]:
        raise ValueError(f"config.json: architectures={architectures!r} is not supported; supported: {[*FAMILIES]}")
    return FAMILIES[architectures[0]]


def _refuse_unsupported(hf_config: Mapping[str, Any], family: Family) -> None:
    missing = sorted(_REQUIRED.keys() - hf_config.keys())
    if missing:
        raise ValueError(f"config.json: {missing} missing; {family.architecture} needs {sorted(_REQUIRED)}")
    known = _REQUIRED.keys() | family.defaults.keys() | ROPE_KEYS | family.harmless
    for key, value in hf_config.items():
        if key in family.fixed:
            if value != family.fixed[key] and not (value is None and family.fixed[key] is False):
                raise ValueError(
                    f"config.json: {key}={value!r} is not supported; {family.architecture} is computed with "
                    f"{key}={family.fixed[key]!r} only"
                )
        elif key not in known:
            raise ValueError(
                f"config.json: {key}={value!r} is unknown for {family.architecture} and might change what the model "
                f"computes; understood: {sorted(known | family.fixed.keys())}"
            )


def _windows(settings: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` or the older `max_window_layers` and `sliding_window_pattern`."""
    layers, types = settings["num_hidden_layers"], settings.get("layer_types")
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if types is None and (every := settings.get("sliding_window_pattern")) is not None:
        types = [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(layers)]
    if types is None:
        first = settings.get("max_window_layers", 0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or not all(t in (FULL, SLIDING) for t in types):
        raise ValueError(
            f"config.json: layer_types={types!r} is not supported; supported: a list of num_hidden_layers={layers} "
            f"entries that are {FULL!r} or {SLIDING!r}"
        )
    if SLIDING in types and window is None:
        raise ValueError(
            f"config.json: layer_types has {SLIDING!r}, but there is no window; needed are use_sliding_window=True "
            "and a number for sliding_window"
        )
    return tuple(window if kind == SLIDING else None for kind in types)
