"""compressed-tensors' `quantization_config`: which module has which bits and groups.

Source: compressed-tensors 0.20, quantization/{quant_config,quant_scheme,quant_args}.py. The last two refuse keys that
they do not know, so exactly theirs are written. A config group names its modules by class ("Linear"), by name, or by a
regular expression ("re:...") that matches from the start of the name.

`actorder="group"`, with the group of each input in the tensors, was in the format up to release 0.18. Later ones, and
so transformers beside them, refuse such a configuration, whoever wrote it; "weight" leaves no trace in the tensors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxquant.checkpoints import int_quantized, pack_quantized
from jaxquant.checkpoints.modules import Understood, check_understood
from jaxquant.checkpoints.patterns import matches, patterns_of
from jaxquant.numerics.spec import ActivationSpec, QuantSpec

METHOD = "compressed-tensors"
MIXED = "mixed-precision"  # modules of several formats in one model
FORMATS = (pack_quantized.FORMAT, int_quantized.FORMAT)

GROUP = "group"
MIXED_ORDERS = (GROUP, "dynamic", True)  # words for groups of inputs from everywhere

# What is understood of each key when a configuration is read.
_TOP: Understood = {
    "quant_method": (METHOD,),
    "format": (*FORMATS, MIXED),
    "quantization_status": ("compressed",),
    "config_groups": None,
    "ignore": None,  # the tensors tell which modules are not quantized
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "moe_sparsity_config": (None,),
    "transform_config": (None, {}),
    "global_compression_ratio": None,
    "version": None,
}
_GROUP: Understood = {
    "targets": None,
    "weights": None,
    "input_activations": None,
    "output_activations": (None,),
    "format": (None, *FORMATS),
}
_WEIGHTS: Understood = {
    "num_bits": None,
    "type": ("int",),
    "symmetric": (True, False),
    "strategy": ("channel", "group"),
    "group_size": None,
    "dynamic": (False,),
    "block_structure": (None,),
    "scale_dtype": (None,),
    "actorder": (*MIXED_ORDERS, None, False, "weight", "static"),
    "observer": None,  # how the scales were found
    "observer_kwargs": None,
    "zp_dtype": None,  # they are stored as codes, in the width of the codes
}
_ACTIVATIONS: Understood = {
    **_WEIGHTS,
    "strategy": ("token", "tensor"),
    "group_size": (None,),
    "dynamic": (True, False),
    "actorder": (None,),
}


class Group(NamedTuple):
    """One config group: the modules that it names, the codes of their weights, and whether a g_idx is beside those."""

    targets: list[str]
    spec: QuantSpec
    act_order: bool


def format_of(spec: QuantSpec) -> str:
    """The format of a weight: whether its inputs are rounded too decides."""
    return pack_quantized.FORMAT if spec.activations is None else int_quantized.FORMAT


def check_spec(spec: QuantSpec) -> None:
    """Raises ValueError, with the reason, for codes that the format cannot express or that are not written yet."""
    reason = None
    if spec.narrow_range:
        reason = "narrow_range has no place in the format; use the full range"
    elif spec.granularity not in ("per_channel", "per_group"):
        reason = f"granularity {spec.granularity} is not supported; use per_channel or a group_size"
    elif spec.activations is not None and spec.activations.outlier_threshold is not None:
        reason = "inputs that keep outliers in floating point have no place in the format; use another method"
    if reason:
        raise ValueError(f"cannot be written as compressed-tensors: {reason}, or format='jaxquant'")


def describe(specs: Mapping[str, QuantSpec], classes: Mapping[str, str], *, act_order: bool = False) -> dict[str, Any]:
    """The `quantization_config` for quantized modules (name -> spec) among those of a model (name -> class).

    `act_order` says whether a g_idx is beside all codes with groups.
    """
    specs = {module: dataclasses.replace(spec, scale_dtype=None) for module, spec in specs.items()}
    groups = [
        _describe_group(spec, _targets(spec, specs, classes), act_order) for spec in dict.fromkeys(specs.values())
    ]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [module for module, kind in classes.items() if kind == "Linear" and module not in specs],
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


def read_groups(quantization_config: Mapping[str, Any]) -> list[Group]:
    """The groups of a `quantization_config`, of which nothing is ignored that could change what the codes mean.

    Raises:
      ValueError: a key or a value is not understood.
    """
    check_understood("quantization_config", quantization_config, _TOP)
    groups, format = quantization_config.get("config_groups"), quantization_config.get("format")
    if not isinstance(groups, dict):
        raise ValueError(f"quantization_config: config_groups={groups!r} is not supported; expected named groups")
    return [_read_group(f"quantization_config: {name}", group, format) for name, group in groups.items()]


def find_group(module: str, kind: str, groups: list[Group]) -> Group:
    """The group of a module: the one that names it, else the first whose pattern fits, else that of its class `kind`.

    Raises:
      ValueError: there is none, or a pattern is no regular expression.
    """
    for name, fits in ((module, _is_name), (module, _is_pattern), (kind, _is_name)):
        for group in groups:
            if any(fits(target, name) for target in group.targets):
                return group
    raise ValueError(f"{module} is quantized, but no group of the quantization_config names it")


def _describe_group(spec: QuantSpec, targets: list[str], act_order: bool) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    if act_order and spec.group_size is not None:
        weights["actorder"] = GROUP
    activations = {"input_activations": _describe_activations(spec.activations), "output_activations": None}
    return {"targets": targets, "weights": weights, **activations, "format": format_of(spec)}


def _describe_activations(activations: ActivationSpec | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.symmetric,
        "strategy": str(activations.granularity).removeprefix("per_"),
        "group_size": None,
        "dynamic": not activations.static,
    }


def _targets(spec: QuantSpec, specs: Mapping[str, QuantSpec], classes: Mapping[str, str]) -> list[str]:
    """What names the modules of one spec and no module of another."""
    if set(specs.values()) == {spec}:
        return sorted({classes[module] for module in specs}, reverse=True)
    patterns = patterns_of(specs)
    mine = [module for module, other in specs.items() if other == spec]
    return list(dict.fromkeys(m if (pattern := patterns[m]) is None else f"re:{pattern}" for m in mine))


def _read_group(where: str, group: Any, format: Any) -> Group:
    check_understood(where, group, _GROUP)
    weights, targets, activations = group.get("weights"), group.get("targets"), group.get("input_activations")
    check_understood(f"{where}: weights", weights, _WEIGHTS)
    if activations is not None:
        check_understood(f"{where}: input_activations", activations, _ACTIVATIONS)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{where}: targets={targets!r} is not supported; expected names")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    act_order = weights.get("actorder") in MIXED_ORDERS
    if act_order and strategy != "group":
        raise ValueError(f"{where}: actorder={weights['actorder']!r} with strategy={strategy!r} is not supported")
    if strategy is None or (strategy == "group" and group_size is None):
        raise ValueError(f"{where}: strategy={strategy!r} with group_size={group_size!r} is not supported")
    group_size = None if strategy == "channel" else group_size
    try:
        spec = QuantSpec(
            bits=weights.get("num_bits"),
            group_size=group_size,
            symmetric=weights.get("symmetric", True),  # left out, it is upstream's default
            activations=_read_activations(activations),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    stored = group.get("format") or format
    if stored not in (None, MIXED, format_of(spec)):
        with_or_without = "without" if spec.activations is None else "with"
        raise ValueError(f"{where}: format={stored!r} {with_or_without} input_activations is not supported")
    return Group(targets, spec, act_order)


def _read_activations(given: dict[str, Any] | None) -> ActivationSpec | None:
    if given is None:
        return None
    return ActivationSpec(
        bits=given.get("num_bits", 8),
        symmetric=given.get("symmetric", True),
        granularity="per_tensor" if given.get("strategy", "tensor") == "tensor" else "per_token",
        static=not given.get("dynamic", False),
    )


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and matches(target.removeprefix("re:"), module, target)
