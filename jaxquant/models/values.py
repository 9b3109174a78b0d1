"""What the values in a config.json must be: checkpoints come from anywhere."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What the keys that hold numbers and switches must be; those that may be null have a default that is worked out, or
# switch something on.
_COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "max_window_layers"),
    *("original_max_position_embeddings", "sliding_window_pattern", "moe_intermediate_size", "num_local_experts"),
    "num_experts_per_tok",
}
_MEASURES = {
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor"),
    *("attention_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
}
_SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"}
_NULLABLE = {
    *("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window", "rope_theta"),
    *("attn_logit_softcapping", "final_logit_softcapping", "factor", "attention_factor"),
}
_MOST = {"num_hidden_layers": 10**4, "num_local_experts": 10**4}  # each tensor of which has a name
LARGEST = 1e30  # far beyond any model's, and far from overflow


def check_values(settings: Mapping[str, Any], words: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises ValueError for a number or a switch that is something else; `words` has other names of keys."""
    for key, value in settings.items():
        if value is None and key in _NULLABLE:
            continue
        if key in _COUNTS:
            least, most = int(key != "max_window_layers"), _MOST.get(key, 2**31 - 1)
            right, wanted = type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"
        elif key in _MEASURES:
            right, wanted = is_measure(value), f"a number above 0, up to {LARGEST}"
        elif key == "partial_rotary_factor":
            right, wanted = is_measure(value) and value <= 1, "a number above 0, up to 1"
        else:
            right, wanted = key not in _SWITCHES or type(value) is bool, "true or false"
        if not right:
            raise ValueError(f"config.json: {words.get(key, key)}={value!r} must be {wanted}")


def is_measure(value: Any) -> bool:
    """Whether it is a positive number of a size that can be computed with."""
    return type(value) in (int, float) and 0 < value <= LARGEST
