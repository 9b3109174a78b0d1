"""GPTQ's `quantization_config`: bits and groups, and the modules that have others.

Sources: GPTQModel 7.7, quantization/config.py (`dynamic`: the first pattern that matches a module's name decides, "-:"
leaves the module alone, anything else overrides); AutoGPTQ, quantization/config.py; transformers' GPTQConfig.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxquant.checkpoints.modules import Understood, check_codes, check_understood, read_group_size
from jaxquant.checkpoints.patterns import matches, patterns_of
from jaxquant.numerics.spec import QuantSpec

METHOD = "gptq"
BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
COPY = "quantize_config.json"  # where AutoGPTQ looks for the configuration
WHERE = "quantization_config"

_CODES: Understood = {"bits": None, "group_size": None, "sym": (True, False), "desc_act": (True, False)}
_TOP: Understood = {
    **_CODES,
    "quant_method": (METHOD,),
    "method": (METHOD,),
    "checkpoint_format": (V1, V2),
    "format": (V1, V2),
    "dynamic": None,
    "pack_dtype": ("int32",),
    "adapter": (None, {}),
    "rotation": (None,),
    "is_marlin_format": (False,),
    "fmt": (None, "int"),
    "lm_head": (True, False),  # the tensors tell which modules are quantized
    **dict.fromkeys(  # how the codes were found, or how others compute with them
        (
            *("damp_percent", "damp_auto_increment", "damp_auto_increments", "static_groups", "true_sequential"),
            *("model_name_or_path", "model_file_base_name", "meta", "dataset", "tokenizer", "batch_size", "mse"),
            *("block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id", "model_seqlen"),
            *("use_exllama", "disable_exllama", "exllama_config", "max_input_length", "cache_block_outputs"),
            *("modules_in_block_to_quantize", "use_cuda_fp16", "backend", "version", "quantizer", "act_group_aware"),
            *("parallel_packing", "offload_to_disk", "offload_to_disk_path", "device", "compute_device_filter"),
            *("hyb_act", "gptaq", "gptaq_alpha", "v2", "v2_alpha", "fail_safe", "failsafe"),
        )
    ),
}


class Config(NamedTuple):
    """What a configuration says.

    Attributes:
      base: the codes of modules that no rule names.
      rules: (pattern, codes) of others; no codes where a module is left alone.
      version: `V1` or `V2`.
      act_order: whether groups may lie in another order than the inputs.
    """

    base: QuantSpec
    rules: list[tuple[str, QuantSpec | None]]
    version: str
    act_order: bool

    def spec(self, module: str) -> QuantSpec:
        """The codes of a module; ValueError if it should have none."""
        for pattern, spec in self.rules:
            if matches(pattern, module, pattern):
                if spec is None:
                    raise ValueError(f"{WHERE}: {pattern!r} leaves {module} alone, but it is quantized")
                return spec
        return self.base


def check_spec(spec: QuantSpec) -> None:
    """Raises ValueError, with the reason, for codes that the format cannot express."""
    check_codes(METHOD, spec, BITS)


def version_of(specs: Mapping[str, QuantSpec]) -> str:
    """The version that a model is written as."""
    return V1 if all(spec.symmetric for spec in specs.values()) else V2


def describe(specs: Mapping[str, QuantSpec], classes: Mapping[str, str], *, act_order: bool = False) -> dict[str, Any]:
    """The `quantization_config` for quantized modules (name -> spec) among those of a model (name -> class).

    `act_order` says whether groups lie in another order than inputs.
    """
    specs = {module: QuantSpec(spec.bits, spec.group_size, spec.symmetric) for module, spec in specs.items()}
    (base, _), *_ = Counter(specs.values()).most_common(1)
    linears: dict[str, QuantSpec | None] = {m: specs.get(m) for m, kind in classes.items() if kind == "Linear"}
    dynamic: dict[str, Any] = {}
    for module, pattern in patterns_of(linears).items():
        spec, name = linears[module], pattern or "^" + re.escape(module) + "$"
        if spec is None and module != "lm_head":
            dynamic[f"-:{name}"] = {}
        elif spec not in (None, base):
            dynamic[f"+:{name}"] = _codes(spec)
    rules = {"dynamic": dynamic} if dynamic else {}
    return {
        "quant_method": METHOD,
        **_codes(base),
        "desc_act": act_order,
        "lm_head": "lm_head" in specs,
        "checkpoint_format": version_of(specs),
        "pack_dtype": "int32",
        **rules,
    }


def read_config(given: Mapping[str, Any]) -> Config:
    """Reads a configuration, of which nothing is ignored that could change what the codes mean.

    Raises:
      ValueError: a key or a value is not understood.
    """
    check_understood(WHERE, given, _TOP)
    version = given.get("checkpoint_format", given.get("format", V1))
    base = _spec(WHERE, given)
    act_order, rules = [given.get("desc_act", False)], list[tuple[str, QuantSpec | None]]()
    dynamic = given.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ValueError(f"{WHERE}: dynamic={dynamic!r} is not supported; expected an object")
    for pattern, changes in dynamic.items():
        where = f"{WHERE}: dynamic: {pattern}"
        if pattern.startswith("-:"):
            rules.append((pattern.removeprefix("-:"), None))
            continue
        check_understood(where, changes, _CODES)
        rules.append((pattern.removeprefix("+:"), _spec(where, {**given, **changes})))
        act_order.append(changes.get("desc_act", False))
    return Config(base, rules, version, any(act_order))


def _codes(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size or -1, "sym": spec.symmetric}


def _spec(where: str, given: Mapping[str, Any]) -> QuantSpec:
    group_size = read_group_size(where, given.get("group_size", 128))  # as AutoGPTQ and GPTQModel take it if left out
    bits = given.get("bits")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"{where}: bits={bits!r} is not supported; supported: {', '.join(map(str, BITS))}")
    return QuantSpec(bits, group_size, given.get("sym", True))
