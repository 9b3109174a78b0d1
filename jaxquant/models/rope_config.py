"""Rotary embeddings from a config.json, in the words of transformers 4 or 5.

The older `rope_theta` and `rope_scaling` stand beside each other, `rope_parameters` holds both; where layers with and
without a window rotate differently (Gemma 3), it was `rope_local_base_freq`, and is one object for each kind of layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxquant.models.rope import LinearScaling, Llama3Scaling, LongRope, Rope, RopeScaling
from jaxquant.models.values import check_values, is_measure

FULL, SLIDING = "full_attention", "sliding_attention"  # Hugging Face's words for kinds of layers
ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_PARTIAL, _ORIGINAL, _LOCAL = "partial_rotary_factor", "original_max_position_embeddings", "rope_local_base_freq"
_SIMPLE = {"linear": LinearScaling, "llama3": Llama3Scaling}


def read_ropes(
    hf_config: Mapping[str, Any], defaults: Mapping[str, Any], types: tuple[str, ...], head_dim: int
) -> tuple[Rope, Rope | None]:
    """The rotation of layers without a window, and of those with one where it is another.

    Args:
      hf_config: the configuration as it is given.
      defaults: what its family has for keys that are missing. Those among them say what it understands.
      types: the values of `rope_type` that it understands.
      head_dim: features of a head.

    Raises:
      ValueError: keys contradict each other, are unknown, or hold what they must not.
    """
    given = {**defaults, **hf_config}
    part = given[_PARTIAL] if _PARTIAL in defaults else None
    old = _settings("rope_scaling", hf_config.get("rope_scaling"))
    beside = {"rope_theta"} if part is None else {"rope_theta", _PARTIAL}
    old |= {key: hf_config[key] for key in beside if hf_config.get(key) is not None}
    new = hf_config.get("rope_parameters")
    if _LOCAL not in defaults:
        base = {"rope_theta": defaults["rope_theta"]} | ({} if part is None else {_PARTIAL: part})
        return _rope("rope_parameters", new, old, base, given, types, head_dim), None
    if new is not None and not (isinstance(new, Mapping) and new.keys() <= {FULL, SLIDING}):
        raise ValueError(f"config.json: rope_parameters={new!r} must be an object with {FULL} and {SLIDING}")
    local = {} if hf_config.get(_LOCAL) is None else {"rope_theta": hf_config[_LOCAL]}
    full, sliding = (
        _rope(f"rope_parameters.{kind}", (new or {}).get(kind), words, {"rope_theta": theta}, given, types, head_dim)
        for kind, words, theta in ((FULL, old, defaults["rope_theta"]), (SLIDING, local, defaults[_LOCAL]))
    )
    return full, sliding


def _rope(
    key: str,
    new: Any,
    old: Mapping[str, Any],
    base: Mapping[str, Any],
    given: Mapping[str, Any],
    types: tuple[str, ...],
    head_dim: int,
) -> Rope:
    """One rotation, from its object in the words of transformers 5, or the older words, and what `base` has beside."""
    new = _settings(key, new)
    if new and any(new.get(name) != value for name, value in old.items()):
        raise ValueError(f"config.json: {key}={new} contradicts rope_theta and rope_scaling, {old}")
    settings = {**base, **(new or old)}
    part = settings.pop(_PARTIAL) if _PARTIAL in base else 1.0
    theta, kind = float(settings.pop("rope_theta")), settings.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in types:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; supported: {[*types]}")
    dim = int(head_dim * part)
    return Rope(dim, theta, _scaling(kind, settings, given, dim))


def _settings(key: str, given: Any) -> dict[str, Any]:
    """A copy of the object under a key, in which `type`, the older spelling, is `rope_type`."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"config.json: {key}={given!r} must be an object")
    settings = dict(given or {})
    check_values(settings)
    kind = settings.pop("type", None)
    if kind is not None and settings.setdefault("rope_type", kind) != kind:
        raise ValueError(f"config.json: rope_type={settings['rope_type']!r} contradicts type={kind!r}")
    return settings


def _scaling(kind: str, settings: dict[str, Any], given: Mapping[str, Any], dim: int) -> RopeScaling | None:
    scaling = _SIMPLE.get(kind)
    long = {"short_factor", "long_factor"} if kind in ("longrope", "su") else set()
    needed = long if scaling is None else {field.name for field in dataclasses.fields(scaling)}
    allowed = needed | ({"factor", "attention_factor", _ORIGINAL} if long else set())
    if not needed <= settings.keys() <= allowed:
        raise ValueError(
            f"config.json: rope_type={kind!r} has the settings {sorted(settings)}; supported: {sorted(allowed)}"
        )
    if long:
        return _long_rope(settings, given, dim)
    return None if scaling is None else scaling(**settings)


def _long_rope(settings: dict[str, Any], given: Mapping[str, Any], dim: int) -> LongRope:
    """The magnitude is the paper's where none is given: it grows with how far the context was extended."""
    original = given[_ORIGINAL]
    if original < 2:
        raise ValueError(f"config.json: {_ORIGINAL}={original} must be more than one position")
    if settings.get(_ORIGINAL, original) != original:
        raise ValueError(f"config.json: {_ORIGINAL}={settings[_ORIGINAL]} of rope contradicts {original} beside it")
    for key in ("short_factor", "long_factor"):
        factors = settings[key]
        if not (isinstance(factors, list) and len(factors) == dim // 2 and all(map(is_measure, factors))):
            raise ValueError(f"config.json: {key}={factors!r} must be a list of {dim // 2} numbers above 0")
    factor, magnitude = settings.get("factor"), settings.get("attention_factor")
    if factor is None:
        factor = given["max_position_embeddings"] / original
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(tuple(settings["short_factor"]), tuple(settings["long_factor"]), original, float(magnitude))
