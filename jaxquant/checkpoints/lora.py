"""LoRA adapters (arXiv:2106.09685) in PEFT's files, added to the weights that they were trained beside.

An adapter is `adapter_config.json` and `adapter_model.safetensors`. For a linear layer with the weight W `[out, in]` it
has A `[r, in]` and B `[out, r]`, and stands for W + s · BA with s = alpha / r, or alpha / √r for rank-stabilized LoRA
(arXiv:2312.03732). `fan_in_fan_out` says that W is stored as `[in, out]`. What PEFT can express beyond that is refused.

Source: PEFT 0.21, tuners/lora/{config,layer}.py and utils/other.py (`get_pattern_key`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxquant.checkpoints.json_file import read_json
from jaxquant.checkpoints.tensors import Tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _PARTS = "base_model.model.", {".lora_A.weight": "A", ".lora_B.weight": "B"}

_READ = {"r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"}
_FIXED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the weights that the adapter belongs to, not only where training starts.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_HARMLESS = {  # how it was trained, and where: the tensors say which layers it is for
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("target_modules", "task_type"),
}


class _Update(NamedTuple):
    """What is added to a weight: `scale` times B `[out, r]` times A `[r, in]`."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Merged(Mapping[str, np.ndarray]):
    """The tensors of a float checkpoint with an adapter added, each when it is asked for.

    The sum is computed in float32 and has the dtype of the weight.

    Raises, when it is made:
      FileNotFoundError: a file of the adapter is missing.
      ValueError: a file is damaged, the adapter is not LoRA or needs something beyond it, or it does not fit the model.
    """

    def __init__(self, tensors: Tensors, adapter: Path):
        self._tensors = tensors
        config = read_json(adapter / CONFIG)
        _check_config(adapter, config)
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._updates = _updates(adapter, config)
        for name, (a, b, _) in self._updates.items():
            shape = (b.shape[0], a.shape[1])
            expected = shape[::-1] if self._transposed else shape
            found = tensors.layout(name)[1] if name in tensors else None
            if found != expected:
                raise ValueError(
                    f"{adapter}: it changes {name} of shape {list(expected)}, which the model has in the shape {found} "
                    "(None if there is none, as where the head is the embedding too)"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        weight = self._tensors[name]
        if name not in self._updates:
            return weight
        a, b, scale = self._updates[name]
        change = np.float32(scale) * (b.astype(np.float32) @ a.astype(np.float32))
        return (weight.astype(np.float32) + (change.T if self._transposed else change)).astype(weight.dtype)

    def dtype(self, name: str) -> str:
        """NumPy's name for the dtype of a tensor, without reading it."""
        return self._tensors.dtype(name)

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor, without reading it."""
        return self._tensors.nbytes(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_config(adapter: Path, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _FIXED and value not in _FIXED[key]:
            raise ValueError(f"{adapter / CONFIG}: {key}={value!r} is not merged; supported: {_FIXED[key]}")
        if key not in _READ | _HARMLESS | _FIXED.keys() and value not in (None, False, {}, [], ""):
            raise ValueError(
                f"{adapter / CONFIG}: {key}={value!r} might change what the adapter computes, and is not merged; merge "
                "it with PEFT's merge_and_unload, and load the result"
            )
    if config.get("peft_type") is None:
        raise ValueError(f"{adapter / CONFIG}: peft_type is missing; supported: 'LORA'")


def _updates(adapter: Path, config: Mapping[str, Any]) -> dict[str, _Update]:
    """What is added to each weight, by the weight's name."""
    tensors, parts = Tensors.of_file(adapter / TENSORS), dict[str, dict[str, np.ndarray]]()
    for name in tensors:
        module = re.fullmatch(re.escape(_PREFIX) + r"(.*)(\.lora_[AB]\.weight)", name)
        if module is None:
            raise ValueError(
                f"{adapter / TENSORS}: {name} is no part of a linear layer's LoRA, and nothing else is merged here; "
                "merge it with PEFT's merge_and_unload, and load the result"
            )
        parts.setdefault(module[1], {})[_PARTS[module[2]]] = tensors[name]
    if not parts:
        raise ValueError(f"{adapter / TENSORS} is empty")
    return {f"{module}.weight": _update(adapter, config, module, found) for module, found in parts.items()}


def _update(adapter: Path, config: Mapping[str, Any], module: str, found: Mapping[str, np.ndarray]) -> _Update:
    rank = _of_module(adapter, config, "rank_pattern", module, config.get("r"))
    alpha = _of_module(adapter, config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{adapter / CONFIG}: r={rank!r}, lora_alpha={alpha!r} for {module}; expected numbers")
    shapes = {part: array.shape for part, array in sorted(found.items())}
    fits = shapes.keys() == {"A", "B"} and all(len(shape) == 2 for shape in shapes.values())
    if not fits or (shapes["A"][0], shapes["B"][1]) != (rank, rank):
        raise ValueError(f"{adapter / TENSORS}: {module} has {shapes}; expected A [{rank}, in] and B [out, {rank}]")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return _Update(found["A"], found["B"], alpha / divisor)


def _of_module(adapter: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module; patterns are whole names, or the last parts of them."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping) or not all(re.fullmatch(r"[\w.]+", pattern) for pattern in patterns):
        raise ValueError(f"{adapter / CONFIG}: {key}={patterns!r} is not supported; expected names of modules")
    fitting = (value for name, value in patterns.items() if f".{module}".endswith(f".{name}"))
    return next(fitting, default)
