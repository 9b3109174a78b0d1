"""What a decoder computes, as one frozen value, and how it is read from a Hugging Face config.json.

A key that is neither understood nor known to be harmless is an error: a model that is almost the right one would be
measured, quantized and written without anybody noticing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxquant.models.family import Family, Key
from jaxquant.models.gemma import GEMMA2, GEMMA3
from jaxquant.models.gpt2 import GPT2
from jaxquant.models.llama import LLAMA
from jaxquant.models.mistral import MISTRAL
from jaxquant.models.mixture import MIXTRAL, QWEN3_MOE
from jaxquant.models.opt import OPT
from jaxquant.models.phi3 import PHI3
from jaxquant.models.qwen2 import QWEN2
from jaxquant.models.qwen3 import QWEN3
from jaxquant.models.rope import Rope
from jaxquant.models.rope_config import FULL, ROPE_KEYS, SLIDING, read_ropes
from jaxquant.models.values import check_values

_FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, MIXTRAL, QWEN3_MOE, GPT2, OPT)
MAX_EXPERTS = 10**6  # of all layers: each has tensors with names of their own
FAMILIES = {family.architecture: family for family in _FAMILIES}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder; hashable, so it can be a static argument and a cache key.

    `qkv_bias`, `o_bias` and `mlp_bias` say which linear layers have a bias, `qk_norm` whether queries and keys are
    normalized. `windows` has an entry per layer: how many positions one sees, itself included, or None for all.
    `rope` says how heads are rotated, None for not at all, `local_rope` how in layers with a window, if differently.
    `architecture` names the family, which says what its tensors are called.

    Fields with a default are parts that not all families have. `fused` is one product for queries, keys and values, and
    one for the gate and what it multiplies. `norm_offset` is what norms add to their scale, `post_norms` puts one
    behind attention and feed-forward network too. `embedding_scaled` multiplies embeddings with the root of
    `hidden_size`. Scores of attention are divided by the root of `attention_scalar`, None for `head_dim`. What is
    capped at c is c · tanh(x / c). `layer_norms` are LayerNorms, with biases, in place of RMSNorms; without `gated`,
    the feed-forward network has one inner product. With `position_offset` n, positions are learned, the first at row n
    of their table. With `num_experts`, the feed-forward network is a mixture, of which each token chooses
    `experts_per_token`; `normalize_routing` makes their weights add up to 1.

    Raises ValueError when the numbers do not fit together: `num_kv_heads` must divide `num_heads`, a window see at
    least its own position, and there be as many experts as a token chooses.
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
    rope: Rope | None
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
    layer_norms: bool = False
    gated: bool = True
    position_offset: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_routing: bool = True

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows}: a window of less than one position sees nothing")
        if self.num_layers * self.num_experts > MAX_EXPERTS:
            raise ValueError(f"num_layers={self.num_layers} with num_experts={self.num_experts} each are too many")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}, but there are only num_experts={self.num_experts}"
            )


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
    hf_config = _respelled(hf_config, family)
    _refuse_unsupported(hf_config, family)
    own = {**family.fixed, **family.defaults}
    settings = own | {key: value for key, value in hf_config.items() if key in own or key in _REQUIRED}
    check_values(settings, _own_words(family))
    fields = {field: settings[key] for key, field in (_REQUIRED | _OPTIONAL).items() if key in settings}
    parts = {field: settings[part.name] if isinstance(part, Key) else part for field, part in family.parts.items()}
    heads = fields["num_heads"]
    head_dim = _unless_null(settings.get("head_dim"), fields["hidden_size"] // heads)
    rope, local_rope = None, None
    if "rope_theta" in family.defaults:
        rope, local_rope = read_ropes(hf_config, family.defaults, family.rope_types, head_dim)
    common = {
        "intermediate_size": _unless_null(settings["intermediate_size"], 4 * fields["hidden_size"]),  # null in GPT-2
        "num_kv_heads": _unless_null(settings.get("num_key_value_heads"), heads),
        "head_dim": head_dim,
        "rope": rope,
        "local_rope": local_rope,
        "windows": _windows(settings),
        "architecture": family.architecture,
    }
    return DecoderConfig(**(fields | common | parts))


def _unless_null(value, default):
    return default if value is None else value


def _family(hf_config: Mapping[str, Any]) -> Family:
    architectures = hf_config.get("architectures")
    if architectures not in [[name] for name in FAMILIES]:
        raise ValueError(f"config.json: architectures={architectures!r} is not supported; supported: {[*FAMILIES]}")
    return FAMILIES[architectures[0]]


def _own_words(family: Family) -> dict[str, str]:
    """What a family calls the keys that others have too."""
    return {common: own for own, common in family.spellings.items()}


def _respelled(hf_config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The configuration in the words that families share, of which one that the family does not use is unknown."""
    respelled: dict[str, Any] = {}
    for key, value in hf_config.items():
        common = family.spellings.get(key, key)
        if key in family.spellings.values() and key not in family.spellings:
            own = _own_words(family)[key]
            raise ValueError(f"config.json: {key}={value!r} is unknown for {family.architecture}; it says {own}")
        if respelled.setdefault(common, value) != value:
            raise ValueError(f"config.json: {key}={value!r} contradicts {common}={respelled[common]!r}")
    return respelled


def _refuse_unsupported(hf_config: Mapping[str, Any], family: Family) -> None:
    words, required = _own_words(family), _REQUIRED.keys() - family.defaults.keys()
    missing = sorted(words.get(key, key) for key in required if hf_config.get(key) is None)
    if missing:
        needed = sorted(words.get(key, key) for key in required)
        raise ValueError(f"config.json: {missing} missing; {family.architecture} needs {needed}")
    known = required | family.defaults.keys() | family.harmless | family.same.keys()
    known |= ROPE_KEYS if "rope_theta" in family.defaults else set()
    for key, value in hf_config.items():
        if key in family.fixed:
            if value != family.fixed[key] and (value is not None or family.fixed[key]):
                raise ValueError(
                    f"config.json: {key}={value!r} is not supported; {family.architecture} is computed with "
                    f"{key}={family.fixed[key]!r} only"
                )
        elif key not in known:
            raise ValueError(
                f"config.json: {key}={value!r} is unknown for {family.architecture} and might change what the model "
                f"computes; understood: {sorted(known | family.fixed.keys())}"
            )
        elif key in family.same and value not in (None, hf_config[family.same[key]]):
            raise ValueError(
                f"config.json: {key}={value!r} is not supported; {family.architecture} is computed with that of "
                f"{family.same[key]} only, {hf_config[family.same[key]]!r}"
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
