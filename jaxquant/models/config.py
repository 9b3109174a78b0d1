"""What a decoder computes, as one frozen value, and how it is read from a Hugging Face config.json.

A key that is neither understood nor known to be harmless is an error: a model that is almost the right one would be
measured, quantized and written without anybody noticing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxquant.models.family import Family
from jaxquant.models.llama import LLAMA
from jaxquant.models.mistral import MISTRAL
from jaxquant.models.qwen2 import QWEN2
from jaxquant.models.qwen3 import QWEN3
from jaxquant.models.rope import LinearScaling, Llama3Scaling, RopeScaling

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder; hashable, so it can be a static argument and a cache key.

    `qkv_bias`, `o_bias` and `mlp_bias` say which linear layers have a bias, `qk_norm` whether queries and keys are
    normalized. `windows` has an entry per layer: how many positions one sees, itself included, or None for all.
    `architecture` names the family, which says what its tensors are called. Raises ValueError when the numbers do not
    fit together: `num_kv_heads` must divide `num_heads`, `head_dim` be even (its halves are rotated against each
    other), and a window see at least its own position.
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
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    architecture: str

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, but rotary embedding needs two equal halves")
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
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}

# What the keys that hold numbers and switches must be; those that may be null have a default that is worked out.
_COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "max_window_layers"),
    "original_max_position_embeddings",
}
_MEASURES = {"rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
_SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"}
_NULLABLE = {"num_key_value_heads", "head_dim", "sliding_window", "rope_theta"}
MAX_LAYERS = 10**4
LARGEST = 1e30  # far beyond any model's, and far from overflow
_FULL, _SLIDING = "full_attention", "sliding_attention"  # Hugging Face's words in `layer_types`


def from_hf(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face config.json (as a dict) describes.

    Reads the architectures of `FAMILIES`, in the words of transformers 4 (`rope_theta`, `rope_scaling`,
    `max_window_layers`) or 5 (`rope_parameters`, `layer_types`); a missing key has the value that transformers takes
    for it. Raises ValueError for another architecture, for a missing key without such a value, and for any key whose
    value this decoder does not compute or whose meaning it does not know.
    """
    family = _family(hf_config)
    _refuse_unsupported(hf_config, family)
    settings = {**family.defaults, **hf_config}
    _check_values(settings)
    fields = {field: settings[key] for key, field in (_REQUIRED | _OPTIONAL).items()}
    parts = {field: settings[part] if isinstance(part, str) else part for field, part in family.parts.items()}
    heads = fields["num_heads"]
    theta, scaling = _rope(hf_config, family.defaults["rope_theta"])
    return DecoderConfig(
        **fields,
        **parts,
        num_kv_heads=_unless_null(settings["num_key_value_heads"], heads),
        head_dim=_unless_null(settings["head_dim"], fields["hidden_size"] // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(settings),
        architecture=family.architecture,
    )


def _check_values(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a number or a switch that is something else."""
    for key, value in settings.items():
        if value is None and key in _NULLABLE:
            continue
        if key in _COUNTS:
            least, most = int(key != "max_window_layers"), MAX_LAYERS if key == "num_hidden_layers" else 2**31 - 1
            right, wanted = type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"
        elif key in _MEASURES:
            right, wanted = type(value) in (int, float) and 0 < value <= LARGEST, f"a number above 0, up to {LARGEST}"
        else:
            right, wanted = key not in _SWITCHES or type(value) is bool, "true or false"
        if not right:
            raise ValueError(f"config.json: {key}={value!r} must be {wanted}")


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
    known = _REQUIRED.keys() | family.defaults.keys() | _ROPE | family.harmless
    for key, value in hf_config.items():
        if key in family.fixed:
            if value != family.fixed[key]:
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
    """The window of each layer, from `layer_types` or, where a checkpoint is older, from `max_window_layers`."""
    layers, types = settings["num_hidden_layers"], settings.get("layer_types")
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if types is None:
        first = settings.get("max_window_layers", 0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or not all(t in (_FULL, _SLIDING) for t in types):
        raise ValueError(
            f"config.json: layer_types={types!r} is not supported; supported: a list of num_hidden_layers={layers} "
            f"entries that are {_FULL!r} or {_SLIDING!r}"
        )
    if _SLIDING in types and window is None:
        raise ValueError(
            f"config.json: layer_types has {_SLIDING!r}, but there is no window; needed are use_sliding_window=True "
            "and a number for sliding_window"
        )
    return tuple(window if kind == _SLIDING else None for kind in types)


def _rope(hf_config: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """The base and the scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    old = _rope_settings("rope_scaling", hf_config)
    if hf_config.get("rope_theta") is not None:
        old["rope_theta"] = hf_config["rope_theta"]
    new = _rope_settings("rope_parameters", hf_config)
    if new and any(new.get(key) != value for key, value in old.items()):
        raise ValueError(f"config.json: rope_parameters={new} contradicts rope_theta and rope_scaling, {old}")
    settings = new or old
    theta = settings.pop("rope_theta", default_theta)
    return float(theta), _scaling(settings.pop("rope_type", "default"), settings)


def _rope_settings(key: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the object under a key, in which `type`, the older spelling, is `rope_type`."""
    given = hf_config.get(key)
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"config.json: {key}={given!r} must be an object")
    settings = dict(given or {})
    _check_values(settings)
    kind = settings.pop("type", None)
    if kind is not None and settings.setdefault("rope_type", kind) != kind:
        raise ValueError(f"config.json: rope_type={settings['rope_type']!r} contradicts type={kind!r}")
    return settings


def _scaling(kind: str, settings: Mapping[str, Any]) -> RopeScaling | None:
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; supported: {[*_SCALINGS]}")
    scaling = _SCALINGS[kind]
    needed = set() if scaling is None else {field.name for field in dataclasses.fields(scaling)}
    if settings.keys() != needed:
        raise ValueError(
            f"config.json: rope_type={kind!r} has the settings {sorted(settings)}; supported: {sorted(needed)}"
        )
    return None if scaling is None else scaling(**settings)


_SCALINGS = {"default": None, "linear": LinearScaling, "llama3": Llama3Scaling}
